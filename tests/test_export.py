"""The command `dsd_fast.export` and the same settings in training: what is written, and where."""

import json
import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image, ImageSequence
from runs import Runner
from test_asset_formats import gltf_of
from test_strangers_files import saved_tree, write_checkpoint

from dsd_fast import export
from dsd_fast.config import TrainConfig, from_dict
from dsd_fast.run.outputs import RunFolder
from dsd_fast.run.state import saved_scene
from dsd_fast.scene import mesh as mesh_module
from dsd_fast.scene.atlas import AtlasError


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder with the checkpoint of a small field as it starts: a blob."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "a_chair-seed0")
    tree = saved_tree()
    # As versions before textures saved it, but for the size.
    tree["config"]["mesh"] = {"resolution": 24, "iso": "2", "max_faces": 0}
    tree["config"]["pictures"]["enlarge"] = 1
    scene = saved_scene(from_dict(TrainConfig, tree["config"]), tree["scene"])
    # As after the first step: it is seen.
    scene.renderer.update_occupancy(scene.field, 0, torch.Generator().manual_seed(0))
    tree["scene"] = scene.state_dict()
    write_checkpoint(run, tree)
    run.versions.write_text('{"model_sha256": "abc", "model": "/home/somebody/model"}')
    return run.path


def exported(run: Path, *flags: object) -> int:
    return export.main([str(run), "--device", "cpu", *map(str, flags)])


def test_by_default_a_textured_glb_in_the_run_folder(trained, caplog):
    assert exported(trained, "--texture-size", 512) == 0
    tree, _ = gltf_of(trained / "mesh.glb")
    about = tree["asset"]["extras"]
    assert about["prompt"] == tree["nodes"][0]["name"] == "a chair"
    assert about["model_sha256"] == "abc" and about["model"] == "embedded"
    assert "MIT" in about["licence"] and about["method"] == "dsd"
    assert "somebody" not in json.dumps(tree)
    assert "TEXCOORD_0" in tree["meshes"][0]["primitives"][0]["attributes"]
    points = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
    assert points["min"][1] == pytest.approx(0, abs=1e-6)
    assert points["max"][1] == pytest.approx(1, abs=1e-6)
    assert points["min"][0] == pytest.approx(-points["max"][0], abs=1e-5)
    assert "texture and normal map of 512 x 512" in caplog.text


def test_size_place_and_number_of_triangles(trained, tmp_path):
    path = tmp_path / "chair.ply"
    flags = ("--height", 2.5, "--max-faces", 300, "--output", path)
    assert exported(trained, *flags) == 0
    stands = trimesh.load_mesh(path)
    assert len(stands.faces) <= 300
    assert stands.bounds[:, 2].tolist() == pytest.approx([0, 2.5], abs=1e-5)
    assert exported(trained, *flags, "--no-ground") == 0
    floats = trimesh.load_mesh(path)
    assert floats.bounds[0, 2] < -0.5 and np.ptp(floats.bounds[:, 2]) == pytest.approx(
        2.5, abs=1e-4
    )


@pytest.mark.parametrize("name", ["gltf", "obj", "ply", "stl", "usdz"])
def test_format_by_name_or_by_ending(trained, tmp_path, name):
    if name == "usdz":
        pytest.importorskip("pxr")
    flags = ("--texture-size", 512, "--max-faces", 500)
    assert exported(trained, *flags, "--format", name) == 0
    assert exported(trained, *flags, "--output", tmp_path / f"mesh.{name}") == 0
    for file in tmp_path.iterdir():
        # Packages of OpenUSD have times in them.
        same = (trained / file.name).read_bytes() == file.read_bytes()
        assert same or name == "usdz"


def test_flags_that_say_two_things(trained, tmp_path, caplog):
    assert exported(trained, "--format", "obj", "--output", tmp_path / "a.glb") == 2
    assert "drop one of them" in caplog.text
    assert exported(trained, "--output", tmp_path / "a.glb", "--turntable") == 2
    assert "ends in .mp4 or .webm or .gif" in caplog.text
    assert exported(trained, "--output", tmp_path / "a.fbx") == 2
    assert exported(trained, "--height", 0) == 2
    with pytest.raises(SystemExit, match="2"):
        exported(trained, "--texture-size", 1000)
    assert not list(tmp_path.iterdir())


def test_without_coordinates_a_line_says_so_and_vertices_have_colours(
    trained, tmp_path, caplog, monkeypatch
):
    def fails(*_):
        raise AtlasError("unwrapping its 9 triangles took more than 30 seconds")

    monkeypatch.setattr(mesh_module, "make_atlas", fails)
    assert exported(trained, "--output", tmp_path / "a.glb") == 0
    assert "took more than 30 seconds" in caplog.text
    attributes = gltf_of(tmp_path / "a.glb")[0]["meshes"][0]["primitives"][0]["attributes"]
    assert "COLOR_0" in attributes and "TEXCOORD_0" not in attributes
    assert "colours at the vertices" in caplog.text


def frames_of(path: Path) -> np.ndarray:
    if path.suffix == ".gif":
        with Image.open(path) as picture:
            return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(picture)])
    decode = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo"]
    decoded = subprocess.run([*decode, "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    return np.frombuffer(decoded.stdout, np.uint8).reshape(-1, 48, 48, 3)


@pytest.mark.parametrize("ending", ["mp4", "webm", "gif"])
@pytest.mark.parametrize("of", ["field", "mesh"])
def test_turntables_by_their_ending(trained, tmp_path, ending, of):
    path = tmp_path / f"around.{ending}"
    flags = ("--of", of, "--views", 5, "--size", 48, "--output", path, "--max-faces", 500)
    assert exported(trained, *flags, "--texture-size", 512) == 0
    frames = frames_of(path)
    assert frames.shape == (5, 48, 48, 3)
    kind = {"mp4": b"ftyp", "webm": b"\x1a\x45\xdf\xa3", "gif": b"GIF89a"}[ending]
    assert kind in path.read_bytes()[:12]
    # The object is in the middle, and the first view is the last.
    middle, corner = frames[0, 20:28, 20:28].astype(int), frames[0, :4, :4].astype(int)
    assert np.abs(middle.mean((0, 1)) - corner.mean((0, 1))).max() > 20
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() < 4


def test_the_mesh_looks_like_the_field(trained, tmp_path, caplog):
    flags = (
        "--texture-size",
        512,
        "--max-faces",
        5000,
        "--resolution",
        64,
        "--iso",
        "auto",
        "--measure",
    )
    assert exported(trained, *flags, "--output", tmp_path / "a.glb") == 0
    (line,) = (line for line in caplog.messages if line.startswith("mesh beside field"))
    found = re.search(r"PSNR ([\d.]+) dB, outlines' IoU ([\d.]+), area ([\d.]+) %", line)
    assert found
    psnr, iou, area = map(float, found.groups())
    assert psnr > 28 and iou > 0.97 and area == pytest.approx(100, abs=2)


def test_training_writes_the_format_it_is_told(runner: Runner):
    flags = ("--mesh.format", "obj", "--mesh.texture-size", "512", "--mesh.max-faces", "400")
    assert runner("--pictures.no-turntable", *flags, steps=2) == 0
    assert {"mesh.obj", "mesh.mtl", "mesh.png", "mesh-normal.png"} <= runner.files()
    assert "mesh.glb" not in runner.files()
    assert runner("--pictures.no-turntable", "--overwrite", steps=2) == 0
    assert "mesh.glb" in runner.files() and not {"mesh.obj", "mesh.png"} & runner.files()


def test_a_format_without_its_package_is_refused_before_training(runner, monkeypatch, caplog):
    from dsd_fast.asset import formats

    monkeypatch.setattr(formats, "find_spec", lambda _: None)
    assert runner("--mesh.format", "usdz", steps=2) == 2
    assert "pip install 'dsd_fast[usd]'" in caplog.text and not runner.files()
