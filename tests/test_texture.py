"""Painting meshes: files of all kinds, atlases, baking, and runs of `--task texture`."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from dsd_fast import ops
from dsd_fast.run import outputs
from dsd_fast.run.pictures import contact_sheet
from dsd_fast.scene import atlas as atlas_module
from dsd_fast.scene.atlas import Atlas, AtlasError, make_atlas, own_atlas
from dsd_fast.scene.mesh_file import MAX_FACES, RADIUS, MeshFileError, read_mesh_file
from dsd_fast.scene.texture import bake, choose_atlas, write_painted

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("xatlas")

SQUARE = "v 0 0 0\nv 2 0 0\nv 2 1 0\nv 0 1 0\n"


def written(path: Path, mesh) -> Path:
    mesh.export(path)
    return path


def rainbow(points: np.ndarray) -> np.ndarray:
    return (0.5 + 0.5 * np.sin(9 * points)).astype(np.float32)


# ---- files ----


@pytest.mark.parametrize("suffix", ["glb", "gltf", "obj", "ply", "stl"])
def test_formats(suffix, tmp_path) -> None:
    """The same box comes out of each, whichever axis points up."""
    folder = tmp_path / "mesh"
    folder.mkdir()
    box = trimesh.creation.box((1.0, 2.0, 4.0))
    if suffix == "gltf":
        for name, content in trimesh.exchange.gltf.export_gltf(trimesh.Scene(box)).items():
            (folder / name).write_bytes(content)
        path = folder / "model.gltf"
    else:
        path = written(folder / f"box.{suffix}", box)
    mesh = read_mesh_file(path)
    assert len(mesh.faces) == 12 and mesh.z_up == (suffix in ("ply", "stl"))
    surface = mesh.surface()
    # Of y-up files x is to the right of a viewer in front, z towards him: our y and x.
    sides = np.array([1.0, 2.0, 4.0] if mesh.z_up else [4.0, 1.0, 2.0])
    assert np.allclose(np.ptp(surface.points, axis=0), sides * 2 * RADIUS / np.sqrt(21), atol=1e-5)
    assert np.abs(surface.points.max(0) + surface.points.min(0)).max() < 1e-6
    assert surface.points.dtype == surface.normals.dtype == np.float32
    # A box has edges, also where its file says nothing of normals.
    a, b, c = (surface.points[surface.faces[:, k]] for k in range(3))
    flat = np.cross(b - a, c - a)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    if suffix != "glb" and suffix != "gltf":
        assert np.allclose(surface.normals[surface.faces], flat[:, None], atol=1e-5)


def test_axes_by_word(tmp_path) -> None:
    path = written(tmp_path / "box.obj", trimesh.creation.box((1.0, 2.0, 4.0)))
    heights = [np.ptp(read_mesh_file(path, up).surface().points, axis=0)[2] for up in ("y", "z")]
    assert heights[1] == pytest.approx(2 * heights[0])
    turned = read_mesh_file(path).surface(turn_deg=90.0).points
    assert np.allclose(turned[:, 0], -read_mesh_file(path).surface().points[:, 1], atol=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_any_scale(scale, tmp_path) -> None:
    path = written(tmp_path / "b.ply", trimesh.creation.icosphere(2, radius=scale))
    surface = read_mesh_file(path).surface()
    length = np.linalg.norm(surface.points, axis=1)
    assert np.allclose(length, RADIUS, rtol=1e-3)
    assert (np.einsum("nd,nd->n", surface.normals, surface.points) > 0.9 * RADIUS).all()


def test_parts_are_placed(tmp_path) -> None:
    """Nodes of a scene with their transforms, one of them twice."""
    scene, box = trimesh.Scene(), trimesh.creation.box()
    for x in (0.0, 3.0):
        move = trimesh.transformations.translation_matrix([x, 0, 0])
        scene.add_geometry(box, geom_name="box", node_name=f"at {x}", transform=move)
    path = tmp_path / "two.glb"
    path.write_bytes(scene.export(file_type="glb"))
    mesh = read_mesh_file(path)
    assert len(mesh.faces) == 24
    assert mesh.points[:, 0].min() == -0.5 and mesh.points[:, 0].max() == 3.5


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("none.obj", None, "there is no such file"),
        ("a.fbx", b"x", r"expected a mesh in \.glb, \.gltf, \.obj, \.ply, \.stl, got \.fbx"),
        ("torn.glb", b"glTF\x02\x00\x00\x00", "torn.glb is not a mesh"),
        ("noise.ply", bytes(range(256)), "noise.ply is not a mesh"),
        ("points.obj", SQUARE.encode(), "no triangles|not a mesh"),
        ("flat.obj", f"{SQUARE}f 1 2 1\n".encode(), "none of its triangles has an area"),
        ("point.obj", b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "one point"),
        ("nan.obj", f"{SQUARE}v nan 0 0\nf 1 2 5\n".encode(), "not finite|not a mesh"),
        ("far.obj", f"{SQUARE}f 1 2 9\n".encode(), "damaged|not a mesh"),
    ],
)
def test_what_is_refused(name, content, text, tmp_path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MeshFileError, match=text):
        read_mesh_file(tmp_path / name)


def test_too_many_triangles(tmp_path, monkeypatch) -> None:
    assert MAX_FACES == 500_000
    monkeypatch.setattr("dsd_fast.scene.mesh_file.MAX_FACES", 11)
    path = written(tmp_path / "box.obj", trimesh.creation.box())
    with pytest.raises(MeshFileError, match="expected at most 11 triangles, got 12: decimate it"):
        read_mesh_file(path)


# ---- atlases ----


def overlap(atlas: Atlas) -> float:
    """The share of the area in the texture that more than one triangle has."""
    corners = atlas.uvs[atlas.faces].astype(np.float64)
    u, v = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = np.abs(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]).sum() / 2
    rgb = bake(lambda p: np.ones((len(p), 3)), np.zeros((atlas.vertices.max() + 1, 3)), atlas, 8)
    assert (rgb == 255).all()
    import torch

    clip = np.concatenate([2 * atlas.uvs - 1, np.zeros_like(atlas.uvs[:, :1])], 1)
    clip = torch.from_numpy(np.concatenate([clip, np.ones_like(clip[:, :1])], 1)[None])
    faces = torch.from_numpy(atlas.faces.astype(np.int32))
    found = ops.rasterize(clip.float().contiguous(), faces, 1024, 1024)
    return 1 - (found.ids >= 0).double().mean().item() / area


def check_atlas(atlas: Atlas, points: np.ndarray, faces: np.ndarray) -> None:
    """Of the same triangles at the same places, within the square, without sharing any of it."""
    assert np.array_equal(points[atlas.vertices[atlas.faces]], points[faces])
    assert atlas.uvs.dtype == np.float32 and atlas.uvs.min() >= 0 and atlas.uvs.max() <= 1
    assert abs(overlap(atlas)) < 0.02


MESHES = {
    "box": trimesh.creation.box,
    "ball": lambda: trimesh.creation.icosphere(3),
    "torus": lambda: trimesh.creation.torus(0.4, 0.17),
    "flat": lambda: trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]]),
}


@pytest.mark.parametrize("name", MESHES)
def test_new_atlases(name) -> None:
    mesh = MESHES[name]()
    points, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    atlas = make_atlas(points, faces, 60.0)
    check_atlas(atlas, points, faces)
    again = make_atlas(points, faces, 60.0)
    assert all(np.array_equal(a, b) for a, b in zip(atlas, again))
    large = make_atlas(1e5 * points, faces, 60.0)
    assert np.allclose(large.uvs, atlas.uvs, atol=1e-3)


def test_what_is_no_manifold_gets_an_atlas() -> None:
    """Edges of three triangles, triangles twice, and some without an area."""
    mesh = trimesh.creation.icosphere(2)
    points, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    extra = np.array([[faces[0, 0], faces[0, 1], 40], [5, 5, 6]])
    faces = np.concatenate([faces, faces[:3], extra])
    atlas = make_atlas(points, faces, 60.0)
    assert np.array_equal(points[atlas.vertices[atlas.faces]], points[faces])


def test_large_meshes_are_cut(monkeypatch) -> None:
    mesh = trimesh.creation.icosphere(3)
    points, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    monkeypatch.setattr(atlas_module, "MOST_FACES_OF_A_CUT", 200)
    cuts = atlas_module._cut(points[faces].mean(1), np.arange(len(faces)))
    assert max(map(len, cuts)) <= 200
    assert np.array_equal(np.sort(np.concatenate(cuts)), np.arange(len(faces)))


def test_a_time_limit(monkeypatch) -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(60_000, 3))
    with pytest.raises(AtlasError, match=r"its 20,000 triangles took more than 0\.05 seconds"):
        make_atlas(points, np.arange(60_000).reshape(-1, 3), 0.05)


def test_a_crash_is_no_crash_of_ours(tmp_path, monkeypatch) -> None:
    mesh = trimesh.creation.box()
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    with pytest.raises(AtlasError, match="xatlas failed: it ended with code -11"):
        make_atlas(np.asarray(mesh.vertices), np.asarray(mesh.faces), 60.0)


def unwrapped_box():
    mesh = trimesh.creation.box()
    points, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    atlas = make_atlas(points, faces, 60.0)
    return points[atlas.vertices], atlas.faces, atlas.uvs.astype(np.float64)


def test_own_coordinates_are_kept_where_they_are_an_atlas() -> None:
    points, faces, uvs = unwrapped_box()
    atlas = own_atlas(points, faces, uvs)
    assert np.array_equal(atlas.uvs, uvs.astype(np.float32))
    assert np.array_equal(atlas.faces, faces)
    check_atlas(atlas, points, faces)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda uvs: None, "it has no texture coordinates"),
        (lambda uvs: uvs * 3, "leave the square"),
        (lambda uvs: uvs * 0, "no room"),
        (lambda uvs: np.where(uvs > 0.5, 1 - uvs, uvs), "share places"),
        (lambda uvs: uvs * np.nan, "leave the square"),
    ],
)
def test_own_coordinates_that_are_none(change, text) -> None:
    points, faces, uvs = unwrapped_box()
    with pytest.raises(AtlasError, match=text):
        own_atlas(points, faces, change(uvs))


# ---- baking ----


@pytest.mark.parametrize("size", [256, 512])
def test_a_baked_texture_has_the_surfaces_colours(size, tmp_path, monkeypatch) -> None:
    """Through the file, by another reader: at points of the surface, and in strips as at once."""
    mesh = read_mesh_file(written(tmp_path / "t.obj", trimesh.creation.torus(0.4, 0.17)))
    points = mesh.surface().points
    atlas = choose_atlas(mesh, "auto", 60.0)
    assert atlas is not None
    texture = bake(rainbow, points, atlas, size)
    assert texture.shape == (size, size, 3) and texture.dtype == np.uint8
    monkeypatch.setattr("dsd_fast.scene.texture.MOST_SAMPLES", 4 * size * 37)
    strips = bake(rainbow, points, atlas, size)
    assert (np.abs(strips.astype(int) - texture) > 1).mean() < 1e-3

    write_painted(mesh, atlas, rainbow, points, size, tmp_path / "t.glb", {"prompt": "a ring"})
    read = trimesh.load(tmp_path / "t.glb", force="mesh", process=False)
    spots, of = trimesh.sample.sample_surface(read, 5000, seed=1)
    shares = trimesh.triangles.points_to_barycentric(read.triangles[of], spots)
    u, v = np.einsum("nk,nkd->nd", shares, read.visual.uv[read.faces[of]]).T
    image = np.asarray(read.visual.material.baseColorTexture.convert("RGB"))
    rows, columns = ((1 - v) * size).astype(int), (u * size).astype(int)
    seen = image[rows.clip(0, size - 1), columns.clip(0, size - 1)] / 255
    scale = RADIUS / np.linalg.norm(mesh.points, axis=1).max()
    assert np.abs(seen - rainbow(spots[:, [2, 0, 1]] * scale)).mean() < 8 / size


def document(path: Path) -> tuple[dict, bytes]:
    """JSON and binary of a GLB file."""
    content = path.read_bytes()
    size = struct.unpack("<I", content[12:16])[0]
    return json.loads(content[20 : 20 + size]), content[28 + size :]


def geometry(path: Path) -> list[bytes]:
    """The bytes of all accessors, which an image is not."""
    tree, binary = document(path)
    views = [tree["bufferViews"][accessor["bufferView"]] for accessor in tree["accessors"]]
    return [binary[v.get("byteOffset", 0) :][: v["byteLength"]] for v in views]


def test_without_an_atlas_vertices_are_coloured(tmp_path) -> None:
    mesh = read_mesh_file(written(tmp_path / "b.ply", trimesh.creation.icosphere(2)))
    points = mesh.surface().points
    write_painted(mesh, None, rainbow, points, 256, tmp_path / "b.glb", {})
    tree, _ = document(tmp_path / "b.glb")
    assert tree["meshes"][0]["primitives"][0]["attributes"].keys() == {
        "POSITION",
        "NORMAL",
        "COLOR_0",
    }
    # y up: what was z.
    read = trimesh.load(tmp_path / "b.glb", force="mesh", process=False)
    assert np.allclose(read.vertices, mesh.points[:, [1, 2, 0]], atol=1e-6)


def test_a_slow_unwrapping_leaves_colours_of_vertices(tmp_path, monkeypatch, caplog) -> None:
    mesh = read_mesh_file(written(tmp_path / "b.obj", trimesh.creation.box()))

    def late(*arguments):
        raise AtlasError("unwrapping took more than 1 seconds")

    monkeypatch.setattr("dsd_fast.scene.texture.make_atlas", late)
    assert choose_atlas(mesh, "auto", 60.0) is None
    assert "colours of vertices, no texture: unwrapping took more than 1 seconds" in caplog.text


# ---- runs ----


@pytest.fixture
def chair(tmp_path) -> Path:
    """A seat with a back, without coordinates, far from the origin."""
    seat = trimesh.creation.box((4.0, 0.5, 4.0))
    back = trimesh.creation.box((4.0, 5.0, 0.5))
    back.apply_translation([0.0, 2.5, -2.0])
    both = trimesh.util.concatenate([seat, back])
    both.apply_translation([100.0, 20.0, 3.0])
    return written(tmp_path / "chair.obj", both)


PAINTING = [
    "--task",
    "texture",
    "--cameras.width",
    "12",
    "--cameras.height",
    "12",
    "--texture.size",
    "512",
]


def folder_of(runner, seed: int = 0) -> outputs.RunFolder:
    name = "diverse-score-distillation"
    return outputs.RunFolder.named(runner.folder, name, "a chair", seed, "texture")


def test_seeds_share_geometry_and_coordinates(runner, chair) -> None:
    """Two at once, and one of another command: colours differ, and nothing else."""
    flags = (*PAINTING, "--mesh", str(chair))
    assert runner(*flags, "--num-seeds", "2", steps=3) == 0
    assert runner(*flags, "--seed", "2", "--pictures.no-turntable", steps=3) == 0
    meshes = [folder_of(runner, seed).mesh for seed in range(3)]
    first, *others = [geometry(path) for path in meshes]
    assert len(first) == 4 and all(other == first for other in others)
    assert len({path.read_bytes() for path in meshes}) == 3
    run = folder_of(runner)
    assert {p.name for p in run.path.iterdir()} >= {"mesh.glb", "preview.png", "turntable.mp4"}
    tree, _ = document(run.mesh)
    extras = tree["asset"]["extras"]
    assert [extras[k] for k in ("prompt", "seed", "method")] == ["a chair", 0, "dsd"]
    assert extras["licence"] and extras["steps"] > 0
    assert tree["materials"][0]["pbrMetallicRoughness"]["metallicFactor"] == 0.0
    # Where the mesh was, and as large.
    read = trimesh.load(run.mesh, force="mesh")
    assert np.allclose(read.bounds, trimesh.load(chair, force="mesh").bounds, atol=1e-4)


def test_a_run_stops_and_goes_on(runner, chair, tmp_path) -> None:
    flags = (*PAINTING, "--mesh", str(chair), "--pictures.no-turntable")
    assert runner(*flags, steps=4) == 0
    whole = folder_of(runner).mesh.read_bytes()
    again = type(runner)(tmp_path / "again", runner.model)
    assert again(*flags, "--stop-at", "2", steps=4) == 0
    assert not folder_of(again).mesh.exists()
    moved = chair.rename(tmp_path / "moved.obj")
    flags = (*PAINTING, "--mesh", str(moved), "--pictures.no-turntable")
    assert again(*flags, "--resume", "auto", steps=4) == 0
    assert folder_of(again).mesh.read_bytes() == whole


def test_another_mesh_is_another_run(runner, chair, capfd) -> None:
    flags = (*PAINTING, "--mesh", str(chair), "--pictures.no-turntable")
    assert runner(*flags, "--stop-at", "1", steps=4) == 0
    written(chair, trimesh.creation.box())
    assert runner(*flags, "--resume", "auto", steps=4) == 2
    assert "is not the mesh that this run was started with" in capfd.readouterr().err


@pytest.mark.parametrize(
    "flags, text",
    [
        (PAINTING, "--task texture needs a mesh: pass --mesh chair.glb"),
        (["--mesh", "{chair}"], "is what --task texture paints: pass that too"),
        ([*PAINTING, "--mesh", "{none}"], "--mesh .*none.obj: cannot be read"),
        ([*PAINTING, "--mesh", "{noise}"], "--mesh: .*noise.glb is not a mesh"),
        (
            [*PAINTING, "--mesh", "{chair}", "--texture.uv", "keep"],
            "--texture.uv keep: it has no texture coordinates: pass --texture.uv new",
        ),
    ],
)
def test_mistakes_cost_nothing(flags, text, runner, chair, tmp_path, capfd) -> None:
    import re

    noise = tmp_path / "noise.glb"
    noise.write_bytes(bytes(range(256)))
    paths = {"chair": chair, "none": tmp_path / "none.obj", "noise": noise}
    assert runner(*(flag.format(**paths) for flag in flags), steps=4) == 2
    assert re.search(text, capfd.readouterr().err)
    assert not runner.folder.exists()


def test_pictures_of_a_mesh_scene() -> None:
    from test_mesh_scene import ball, settings

    sheet = contact_sheet(ball(), settings().cameras, 0, 2, 24)
    assert sheet.shape == (48, 48, 3) and sheet.std() > 10
