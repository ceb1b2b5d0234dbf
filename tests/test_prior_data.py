"""The prior's data: catalogue, meshes, pack file, renders and captions, on models made here."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image", reason="needs the extra `prior`")
pytest.importorskip("scipy", reason="needs the extra `prior`")

from dsd_fast.judge import captions, nouns  # noqa: E402
from dsd_fast.prior import catalogue, credits, mesh, render, views  # noqa: E402
from dsd_fast.prior.obj import parse_mtl, parse_obj  # noqa: E402
from dsd_fast.scene.normals import crease_normals  # noqa: E402

# A box 2 wide (x), 1 high (y), 4 deep (z), its front (+z) red, the rest blue.
BOX = """
mtllib box.mtl
v -1 0 -2
v 1 0 -2
v 1 1 -2
v -1 1 -2
v -1 0 2
v 1 0 2
v 1 1 2
v -1 1 2
usemtl blue
f 1 2 3 4
f 1 2 6 5
f 4 3 7 8
f 1 5 8 4
f 2 6 7 3
usemtl red
f 5 6 7 8
"""
BOX_MTL = "newmtl blue\nKd 0 0 1\nnewmtl red\nKd 1.0 0 0\n"
# A textured square, in relative indices; the texture's path is somebody's own disk.
SQUARE = """
mtllib elsewhere.mtl
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
vt 0 0
vt 1 0
vt 1 1
vt 0 1
usemtl leaf
f -4/-4 -3/-3 -2/-2 -1/-1
"""
SQUARE_MTL = "newmtl leaf\nKd 0.1 0.1 0.1\nd 0.5\nmap_Kd C:\\Users\\me\\Leaf.PNG\n"


def noun(id_: str, **fields) -> nouns.Noun:
    row = nouns.Noun(id_, "box", "box", "", 0.0, "", 0.0, "", "Box", "Someone", "CC0-1.0")
    return replace(row, **fields)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A library of three models: a box, a textured square, and one that the table excludes."""
    texture = np.zeros((4, 4, 4), np.uint8)
    texture[:2] = (0, 200, 0, 255)  # the upper half is opaque green, the lower one empty
    png = io.BytesIO()
    Image.fromarray(texture).save(png, "PNG")
    path = tmp_path / "Blend.sh3f"
    with ZipFile(path, "w") as file:
        file.writestr(
            "PluginFurnitureCatalog.properties",
            """# a comment
id=SweetHome3D#Models
id#1=Blend Swap CC-0#box
model#1=/m/box/box.obj
id#2=Blend Swap CC-0#square
model#2=/m/square/square.obj
modelRotation#2=0 0 1 0 1 0 -1 0 0
id#3=Blend Swap CC-0#rug
model#3=/m/rug/rug.obj
""",
        )
        file.writestr("m/box/box.obj", BOX)
        file.writestr("m/box/box.mtl", BOX_MTL)
        file.writestr("m/square/square.obj", SQUARE)
        file.writestr("m/square/square.mtl", SQUARE_MTL)
        file.writestr("m/square/leaf.png", png.getvalue())
    return path


@pytest.fixture
def entries(archive: Path) -> list[catalogue.Entry]:
    table = [
        noun("Blend Swap CC-0#box"),
        noun("Blend Swap CC-0#rug", exclude="rug"),
        noun("Blend Swap CC-0#square"),
    ]
    return catalogue.load([archive], {row.id: row for row in table})


@pytest.fixture(scope="module")
def renderer() -> render.Renderer:
    pytest.importorskip("moderngl", reason="needs the extra `prior`")
    try:
        return render.Renderer(size=64)
    except RuntimeError as error:
        pytest.skip(str(error))


def fixed_views(azimuth: list[float], elevation: list[float]) -> views.Views:
    """Unperturbed views under flat white light, unpainted."""
    n = len(azimuth)
    drawn = views.sample_views(n, False, np.random.default_rng(0))
    flat = np.zeros((n, 4))
    flat[:, 2] = 1.0
    return replace(
        drawn,
        azimuth=np.array(azimuth),
        elevation=np.array(elevation),
        position=1.8 * views.direction(np.array(azimuth), np.array(elevation)),
        centre=np.zeros((n, 3)),
        up=np.tile([0.0, 0.0, 1.0], (n, 1)),
        fovy=np.full(n, np.radians(50.0)),
        key=flat,
        fill=flat,
        sky=np.ones((n, 3)),
        ground=np.ones((n, 3)),
        gloss=np.tile([0.0, 10.0], (n, 1)),
    )


# The committed table.


def test_table_is_complete():
    rows = nouns.nouns()
    used = [row for row in rows if not row.exclude]
    assert (len(rows), len(used)) == (820, 676)
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.noun and row.group and row.creator and row.name for row in used)
    assert len(captions.frequent_nouns()) == 46
    known = {row.noun for row in used} | {row.group for row in used}
    assert known >= captions.NO_FRONT | captions.NO_ARTICLE | captions.NATURAL
    assert known >= captions.SYNONYMS.keys()


def test_credits_name_every_model():
    text = credits.credits()
    for row in nouns.nouns():
        if not row.exclude:
            assert f"| {row.id.partition('#')[2]} | {row.name} | {row.creator} |" in text
    with pytest.raises(ValueError, match="no credit text"):
        credits.credits([noun("Somewhere else#box")])


# Catalogue files.


def test_catalogue_joins_table_and_skips_excluded(entries):
    assert [entry.id for entry in entries] == ["Blend Swap CC-0#box", "Blend Swap CC-0#square"]
    assert entries[0].rotation == catalogue.IDENTITY
    assert entries[1].rotation == (0, 0, 1, 0, 1, 0, -1, 0, 0)
    assert entries[0].member == "m/box/box.obj"


def test_missing_model_is_an_error(archive):
    with pytest.raises(FileNotFoundError, match=r"rug\.obj"):
        catalogue.load(
            [archive], {"r": noun("r"), "Blend Swap CC-0#rug": noun("Blend Swap CC-0#rug")}
        )


def test_unpack_reads_debian_packages(archive, tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        tar.add(archive, "./usr/share/sweethome3d/furniture/Blend.sh3f")

    def member(name: str, content: bytes) -> bytes:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        return header + content + b"\n" * (len(content) % 2)

    deb = tmp_path / "models.deb"
    deb.write_bytes(
        b"!<arch>\n" + member("debian-binary", b"2.0") + member("data.tar.xz", data.getvalue())
    )
    [unpacked] = catalogue.unpack(deb, tmp_path / "unpacked")
    assert unpacked.read_bytes() == archive.read_bytes()
    assert catalogue.unpack(tmp_path / "unpacked", tmp_path) == [unpacked]

    deb.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="Debian package"):
        catalogue.unpack(deb, tmp_path / "unpacked")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.sh3f"):
        catalogue.unpack(tmp_path / "empty", tmp_path)


# OBJ and MTL.


def test_obj_corners_and_fans():
    obj = parse_obj(
        "v 0 0 0 1 1 1\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 0 0 1\nvt .5 .25 0\n"
        "f 1 2//7 3/1 4/1/9 5\nusemtl a b\nf 1 2 \\\n3\nf 1 2\n"
    )
    assert obj.positions.shape == (5, 3)
    assert obj.corner_position.tolist() == [[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 1, 2]]
    assert obj.corner_uv[1].tolist() == [-1, 0, 0]
    assert [obj.materials[k] for k in obj.face_material] == ["", "", "", "a b"]


def test_mtl_fields():
    materials = parse_mtl("newmtl a\nKd 2 0.5 -1\nd 0.25\nmap_Kd x y.jpg\nKs 1 1 1\nnewmtl b\n")
    assert materials["a"].colour == (1.0, 0.5, 0.0)
    assert (materials["a"].opacity, materials["a"].texture) == (0.25, "x y.jpg")
    assert materials["b"].texture is None


# Loading.


def test_axes_centre_and_size(entries):
    model = mesh.load_model(entries[0])
    low, high = model.positions.min(axis=0), model.positions.max(axis=0)
    np.testing.assert_allclose(low, -high, atol=2e-5)
    np.testing.assert_allclose((high - low) / (high - low)[2], [4, 2, 1], rtol=1e-4)
    assert np.linalg.norm(model.positions, axis=1).max() == pytest.approx(mesh.RADIUS, abs=2e-5)
    red = next(part for part in model.parts if part.colour == (1.0, 0.0, 0.0))
    front = model.positions[model.triangles[red.first : red.first + red.count]]
    assert (front[..., 0] > 0).all()


def test_front_azimuth_and_model_rotation(entries):
    turned = replace(entries[0], noun=replace(entries[0].noun, front_az=90.0))
    box, other = mesh.load_model(entries[0]), mesh.load_model(turned)
    # What was seen from azimuth 90 (+y) is now seen from the front (+x).
    np.testing.assert_allclose(other.positions[:, 0], box.positions[:, 1], atol=3e-5)
    np.testing.assert_allclose(other.positions[:, 1], -box.positions[:, 0], atol=3e-5)
    square = mesh.load_model(entries[1])  # in the plane z = 0; the rotation makes that x = 0
    assert np.ptp(square.positions, axis=0) == pytest.approx([0.849, 0, 0.849], abs=1e-3)


def test_texture_found_despite_its_path(entries):
    model = mesh.load_model(entries[1])
    assert [(part.texture, part.opacity) for part in model.parts] == [(0, 0.5)]
    assert model.textures[0].shape == (4, 4, 4)
    assert model.main.luma == pytest.approx(200 / 255 * 0.587, abs=1e-3)


def test_main_part_is_the_one_seen_most(entries):
    model = mesh.load_model(entries[0])
    assert model.parts[model.main.part].colour == (0.0, 0.0, 1.0)
    assert 0.5 < model.main.share < 1.0
    assert views.is_recolourable("box", model.parts, model.main)
    assert not views.is_recolourable("plant", model.parts, model.main)
    assert not views.is_recolourable("box", model.parts, replace(model.main, share=0.4))


# Normals.


def test_creases_stay_hard_and_shallow_edges_smooth():
    def fold(angle_deg: float) -> np.ndarray:
        a = np.radians(angle_deg)
        return np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0], [-np.cos(a), 0, np.sin(a)]], np.float32)

    triangles = np.array([[0, 2, 1], [0, 1, 3]], np.int32)
    for angle, expected in ((30.0, 4), (70.0, 6)):
        positions = fold(angle)
        source, normals, split = crease_normals(positions, triangles)
        assert len(source) == expected
        assert (positions[source][split] == positions[triangles]).all()
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1.0, rtol=1e-6)
    _, hard, split = crease_normals(fold(70.0), triangles)
    np.testing.assert_allclose(hard[split[0]], [[0, 0, 1]] * 3, atol=1e-6)


def test_seams_do_not_split_shading():
    positions = np.array(
        [[0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [-1, 0, 0.2]], np.float32
    )  # vertices 3, 4 repeat 0, 1
    source, normals, split = crease_normals(positions, np.array([[0, 2, 1], [3, 4, 5]]))
    assert len(source) == 6
    np.testing.assert_array_equal(normals[split[0, 0]], normals[split[1, 0]])


# Pack file.


def test_pack_round_trip(entries, tmp_path):
    path = tmp_path / "models.pack"
    calls = []
    mesh.write_pack(entries, path, workers=1, progress=lambda *count: calls.append(count))
    assert calls == [(1, 2), (2, 2)]
    pack = mesh.Pack(path)
    assert pack.ids == [entry.id for entry in entries]
    for number, entry in enumerate(entries):
        expected, got = mesh.load_model(entry), pack.load(number)
        np.testing.assert_array_equal(got.positions, expected.positions)
        np.testing.assert_array_equal(got.uvs, expected.uvs)
        np.testing.assert_array_equal(got.triangles, expected.triangles)
        assert got.parts == expected.parts
        assert got.main.part == expected.main.part
        assert got.main.share == pytest.approx(expected.main.share, abs=1e-4)
        assert got.main.luma == pytest.approx(expected.main.luma, abs=1e-4)
        assert all((a == b).all() for a, b in zip(got.textures, expected.textures, strict=True))
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(ValueError, match="expected a model pack"):
        mesh.Pack(tmp_path / "other")


def test_geometry_codec_on_random_meshes():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 9, (300, 3, 1)) * [[[7001, 13, 6007, 4096 * 3, -5]]]
    vertices, triangles = mesh._index_by_first_use(rows.reshape(-1, 5))
    model = mesh.Model(
        "random",
        mesh._dequantise(vertices[:, :3]),
        (vertices[:, 3:] * mesh.UV_STEP).astype(np.float32),
        triangles,
        (),
        (np.zeros((1, 1, 4), np.uint8),),
        mesh.MainPart(0, 0.0, 0.0),
    )
    data = mesh.encode_geometry(model)
    positions, uvs, decoded = mesh.decode_geometry(data, len(vertices), len(triangles), True)
    np.testing.assert_array_equal(positions, model.positions)
    np.testing.assert_array_equal(uvs, model.uvs)
    np.testing.assert_array_equal(decoded, triangles)


# Views.


def test_views_cover_what_training_asks_for():
    drawn = views.sample_views(4000, True, np.random.default_rng(0))
    overhead = drawn.elevation > 50
    assert 0.07 < overhead.mean() < 0.13
    assert drawn.elevation.min() >= -10 and drawn.elevation[~overhead].max() <= 45
    assert drawn.elevation[overhead].min() >= 60 and drawn.elevation.max() <= 85
    assert drawn.azimuth.min() >= -180 and drawn.azimuth.max() <= 180
    assert np.degrees(drawn.fovy).min() >= 40 and np.degrees(drawn.fovy).max() <= 70
    distance = np.linalg.norm(drawn.position, axis=1)
    assert distance.min() > 1.5 - 0.18 and distance.max() < 2.0 + 0.18
    assert 0.4 < (drawn.colour >= 0).mean() < 0.5
    assert set(drawn.colour) == set(range(-1, len(captions.COLOURS)))
    assert (views.sample_views(50, False, np.random.default_rng(0)).colour == -1).all()
    assert len(views.sample_views(0, True, np.random.default_rng(0))) == 0


def test_camera_is_that_of_the_training_loop():
    from dsd_fast.scene.cameras import camera_rays, look_at

    drawn = views.sample_views(5, False, np.random.default_rng(1))
    as_tensor = [torch.from_numpy(a) for a in (drawn.position, drawn.centre, drawn.up)]
    c2w = look_at(*as_tensor)
    np.testing.assert_allclose(drawn.c2w(), c2w.numpy(), atol=1e-12)

    size = 7
    origins, directions = camera_rays(c2w, torch.from_numpy(drawn.fovy), size, size)
    points = (origins + 1.3 * directions).numpy().reshape(5, -1, 3)
    clip = np.einsum("bij,bnj->bni", drawn.view_projection()[:, :, :3], points)
    clip += drawn.view_projection()[:, None, :, 3]
    ndc = clip[..., :2] / clip[..., 3:]
    centres = (np.arange(size) + 0.5) / size * 2 - 1
    np.testing.assert_allclose(
        ndc[..., 0].reshape(5, size, size)[:, 0], np.tile(centres, (5, 1)), atol=1e-9
    )
    np.testing.assert_allclose(
        ndc[..., 1].reshape(5, size, size)[:, :, 0], np.tile(-centres, (5, 1)), atol=1e-9
    )


# Renders.


def test_front_is_seen_from_azimuth_zero(renderer, entries):
    model = mesh.load_model(entries[0])
    images = renderer.render(model, fixed_views([0.0, 90.0, 180.0, 0.0], [0.0, 0.0, 0.0, 80.0]))
    middle = images[:, 32, 32]
    assert middle.tolist() == [[255, 0, 0, 255]] + [[0, 0, 255, 255]] * 3
    assert (images[:, 0, 0] == 0).all()
    width = (images[:, :, :, 3] > 0).any(axis=1).sum(axis=1)
    assert width[1] > 1.5 * width[0]  # the box is deeper than wide


def test_images_have_their_first_row_on_top(renderer, entries):
    # The square's texture is opaque green above; its lower half is empty.
    model = mesh.load_model(entries[1])
    solid = replace(model, parts=(replace(model.parts[0], opacity=1.0),))
    turned = fixed_views([90.0], [0.0])
    [image] = renderer.render(solid, turned)
    rows = np.flatnonzero((image[..., 3] > 0).any(axis=1))
    assert len(rows) > 8 and rows.max() < 33
    assert image[rows[4], 32].tolist() == [0, 200, 0, 255]
    [half] = renderer.render(model, turned)
    assert half[rows[4], 32, 3] == pytest.approx(128, abs=2)
    assert half[rows[4], 32, :3].tolist() == pytest.approx([0, 200, 0], abs=2)


def test_image_position_matches_the_projection(renderer, entries):
    model = mesh.load_model(entries[0])
    small = replace(model, positions=(model.positions * 0.05 + [0.1, 0.2, 0.15]).astype(np.float32))
    drawn = replace(views.sample_views(20, False, np.random.default_rng(2)))
    images = renderer.render(small, drawn)
    clip = drawn.view_projection() @ [0.1, 0.2, 0.15, 1.0]
    x, y = (clip[:, :2] / clip[:, 3:]).T
    alpha = images[..., 3].astype(float)
    assert alpha.any(axis=(1, 2)).all()
    pixels = np.arange(64) + 0.5
    column = (alpha.sum(axis=1) * pixels).sum(axis=1) / alpha.sum(axis=(1, 2))
    row = (alpha.sum(axis=2) * pixels).sum(axis=1) / alpha.sum(axis=(1, 2))
    np.testing.assert_allclose(column, (x + 1) * 32, atol=0.4)
    np.testing.assert_allclose(row, (1 - y) * 32, atol=0.4)


def test_paint_replaces_the_main_part_only(renderer, entries):
    model = mesh.load_model(entries[0])
    drawn = fixed_views([0.0, 180.0], [0.0, 0.0])
    painted = replace(drawn, colour=np.array([3, 3]), paint=np.tile([0.2, 0.6, 0.4], (2, 1)))
    images = renderer.render(model, painted)
    assert images[0, 32, 32].tolist() == [255, 0, 0, 255]
    assert images[1, 32, 32].tolist() == [51, 153, 102, 255]


def test_stretched_model_is_one_of_other_measures(renderer, entries):
    model = mesh.load_model(entries[0])
    stretch = np.array([1.0, 0.7, 0.8])
    drawn = views.sample_views(6, False, np.random.default_rng(3))  # lights from a side
    scaled = replace(model, positions=(model.positions * stretch).astype(np.float32))
    stretched = replace(drawn, stretch=np.tile(stretch, (6, 1)))
    expected, images = renderer.render(scaled, drawn), renderer.render(model, stretched)
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert np.abs(images.astype(int) - renderer.render(model, drawn)).max() > 100


def test_render_checks_its_output_array(renderer, entries):
    model = mesh.load_model(entries[0])
    with pytest.raises(ValueError, match="expected C-contiguous uint8"):
        renderer.render(model, fixed_views([0.0], [0.0]), np.zeros((2, 64, 64, 4), np.uint8))
    assert renderer.render(model, fixed_views([], [])).shape == (0, 64, 64, 4)


def test_render_views_writes_a_consistent_set(renderer, archive, tmp_path):
    table = nouns.noun_by_id()
    ids = ["Kator Legaz#futon-couch", "Blend Swap CC-0#horse2"]
    model = catalogue.Entry(table[ids[0]], archive, "m/box/box.obj", catalogue.IDENTITY)
    mesh.write_pack([model, replace(model, noun=table[ids[1]])], tmp_path / "models.pack")
    n = 18  # more than one read-back
    out = tmp_path / "views"
    render.render_views(render.RenderConfig(tmp_path / "models.pack", out, n, workers=1, seed=5))
    rgba = np.load(out / "rgba.npy", mmap_mode="r")
    meta = np.load(out / "meta.npz")
    index = json.loads((out / "index.json").read_text())
    assert rgba.shape == (2 * n, 256, 256, 4)
    assert (rgba[..., 3].max(axis=(1, 2)) == 255).all()
    assert meta["model"].tolist() == [0] * n + [1] * n
    assert [index["nouns"][k] for k in meta["noun"][[0, n]]] == ["sofa", "horse"]
    assert (meta["colour"][n:] == -1).all() and (meta["colour"][:n] >= 0).any()
    np.testing.assert_array_equal(
        meta["view"], captions.view_index(meta["azimuth"], meta["elevation"])
    )
    for row in range(2 * n):
        texts = [index["captions"][k] for k in meta["caption"][row]]
        named = [text for text in texts if text.endswith(" view")]
        assert all(text.endswith(f", {index['views'][meta['view'][row]]} view") for text in named)


# Captions.


def test_view_thresholds_are_strict():
    azimuth = [0, 44.9, 45, -45, 90, 135, 135.1, 180, -180, 270, 360, 0, 0]
    elevation = [0] * 11 + [60, 60.1]
    names = [captions.VIEWS[k] for k in captions.view_index(azimuth, elevation)]
    assert names == [
        "front",
        "front",
        "side",
        "side",
        "side",
        "side",
        "back",
        "back",
        "back",
        "side",
        "front",
        "front",
        "overhead",
    ]


def test_captions_are_true_and_deterministic():
    row = noun("x", noun="armchair", group="armchair", colour="green", colour_share=0.9)
    texts = [captions.caption(row, 1, 0, np.random.default_rng(k)) for k in range(300)]
    again = [captions.caption(row, 1, 0, np.random.default_rng(k)) for k in range(300)]
    assert texts == again
    assert {"an armchair, front view", "a red armchair, front view", "a red armchair"} <= set(texts)
    assert not any("green" in text for text in texts)  # it was painted red
    own = {captions.caption(row, 0, -1, np.random.default_rng(k)) for k in range(300)}
    assert {"an armchair, side view", "a green armchair, side view"} <= own
    assert not any("red" in text for text in own)


def test_materials_are_named_unless_painted():
    row = noun("x", noun="armchair", colour="brown", colour_share=0.9, material="wooden")
    unpainted = [captions.caption(row, 1, -1, np.random.default_rng(k)) for k in range(400)]
    assert {
        "an armchair, front view",
        "a wooden armchair, front view",
        "a wooden armchair",
        "a brown armchair, front view",
        "a brown wooden armchair, front view",
    } <= set(unpainted)
    assert 0.4 < np.mean(["wooden" in text for text in unpainted]) < 0.6
    painted = [captions.caption(row, 1, 0, np.random.default_rng(k)) for k in range(400)]
    assert "a red armchair, front view" in painted
    assert not any("wooden" in text or "brown" in text for text in painted)


def test_captions_always_draw_as_many_numbers():
    plain = noun("x")
    states = set()
    for row, colour in ((plain, -1), (plain, 3), (replace(plain, material="metal"), -1)):
        rng = np.random.default_rng(0)
        captions.caption(row, 0, colour, rng)
        states.add(rng.random())
    assert len(states) == 1


def test_materials_of_the_table():
    used = [row for row in nouns.nouns() if not row.exclude]
    nouns_of = {row.material: set() for row in used if row.material}
    for row in used:
        # "a wooden wooden toy", "a glass glass"
        assert not row.material or row.material not in row.noun.split() + row.group.split()
        if row.material:
            nouns_of[row.material].add(row.noun)
    assert set(nouns_of) == {"wooden", "metal", "glass", "leather", "plastic", "fabric"}
    assert min(len(names) for names in nouns_of.values()) >= 5  # no word stands for one noun
    assert {"chair", "table"} <= nouns_of["wooden"]
    assert not any(row.material for row in nouns.nouns() if row.exclude)


def test_uncertain_colours_are_not_named():
    assert captions.own_colour(noun("x", colour="red", colour_share=0.59)) == ""
    assert captions.own_colour(noun("x", colour="gray", colour_share=1.0)) == ""
    assert captions.own_colour(noun("x", colour="red", colour_share=0.9, group="plant")) == ""


def test_articles():
    assert captions.with_article("orange sofa", "sofa") == "an orange sofa"
    assert captions.with_article("red shoes", "shoes") == "red shoes"
    assert captions.with_article("pair of shoes", "pair of shoes") == "a pair of shoes"


def test_captions_are_written_once():
    rng = np.random.default_rng(0)
    rows = [(row, k % 4, k % 12 - 1) for k, row in enumerate(nouns.nouns()) if not row.exclude]
    texts, index = captions.caption_set(rows, 4, rng)
    assert index.shape == (676, 4) and index.max() == len(texts) - 1
    assert len(set(texts)) == len(texts)


def test_views_have_the_order_of_the_embeddings():
    from dsd_fast.diffusion.text import VIEWS

    assert captions.VIEWS == VIEWS


def test_turntables_of_real_models(entries, tmp_path, renderer, monkeypatch):
    from dsd_fast.evaluate import assets
    from dsd_fast.prior import turntables

    pack = tmp_path / "models.pack"
    mesh.write_pack(entries, pack, workers=1)
    table = {e.noun.id: replace(e.noun, noun="armchair", group="chair") for e in entries}
    monkeypatch.setattr(turntables, "noun_by_id", lambda: table)
    cfg = turntables.TurntableConfig(
        pack=pack,
        out=tmp_path / "real",
        prompts=("an armchair", "a red armchair"),
        models=5,
        views=4,
        size=64,
    )
    turntables.write_turntables(cfg)
    found = assets.gather([tmp_path / "real"], {})
    assert [(s.method, s.prompt, s.seed) for s in found] == [
        ("real", prompt, seed)
        for prompt in ("a red armchair", "an armchair")
        for seed in range(len(entries))
    ]
    looks = [assets.load(source, 4, 0, torch.device("cpu")) for source in found]
    assert looks[0].azimuths.tolist() == [0, 90, 180, 270] and looks[0].elevation == 15
    # the object is there, and as a red one it is redder
    red, plain = (
        np.stack([a.images for a in looks if a.source.prompt == p]).astype(float)
        for p in ("a red armchair", "an armchair")
    )
    assert (plain != round(255 * assets.GREY)).any(-1).mean() > 0.01
    assert (red[..., 0] - red[..., 2]).mean() > (plain[..., 0] - plain[..., 2]).mean()
    with pytest.raises(ValueError, match="'a dream' names none of the nouns"):
        turntables.write_turntables(replace(cfg, prompts=("a dream",)))
