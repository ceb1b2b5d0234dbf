"""Files that anybody may have made: pictures, meshes, run folders, and places to write to."""

import contextlib
import json
import logging
import os
import random
import re
import resource
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from dsd_fast import export
from dsd_fast.asset import formats
from dsd_fast.asset.model import Asset
from dsd_fast.config import preset, to_dict
from dsd_fast.evaluate import __main__ as evaluate
from dsd_fast.evaluate import meshes
from dsd_fast.evaluate.assets import EvaluateError, cost, open_run, read_image
from dsd_fast.evaluate.eyes import open_judge
from dsd_fast.judge.truth import read_truth
from dsd_fast.picture_file import MAX_PIXELS, read_rgba
from dsd_fast.run import checkpoint, pictures
from dsd_fast.run.outputs import RunFolder
from dsd_fast.scene.field_scene import FieldScene
from dsd_fast.scene.picture import LARGEST_SIDE, RECENTRED_SIDE, read_picture
from dsd_fast.tasks.image import progress_strip

EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%Pages: 1\n%%EndComments\n"
    b"0 0 20 20 rectfill\nshowpage\n%%EOF\n"
)


# Random damage of each kind; DSD_HOSTILE=100 for a longer look.
TRIALS = 30 * int(os.environ.get("DSD_HOSTILE", "1"))


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, dropped or added, mostly near the beginning, or the end cut off."""
    content = bytearray(whole)
    for _ in range(rng.choice([1, 2, 4, 16])):
        end = min(len(content), rng.choice([40, 400, len(whole)]))
        at, how, count = rng.integers(max(end, 1)), rng.random(), rng.integers(1, 9)
        if how < 0.5:
            content[at : at + 1] = rng.bytes(1) if rng.random() < 0.5 else b"\xff"
        elif how < 0.7:
            del content[at : at + count]
        elif how < 0.9:
            content[at:at] = rng.bytes(int(count))
        else:
            del content[at:]
    return bytes(content)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int = 8, kind: int = 6) -> bytes:
    """A PNG that promises pixels and has none."""
    size = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b""))


def disc(height: int, width: int, radius: float, at: tuple[float, float]) -> np.ndarray:
    """A red disc on nothing, [h,w,4] uint8."""
    y, x = np.mgrid[:height, :width]
    rgba = np.zeros((height, width, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[..., 3] = ((y - at[0]) ** 2 + (x - at[1]) ** 2 <= radius**2) * 255
    return rgba


# Pictures


@pytest.fixture
def no_other_program(monkeypatch):
    """Fails where a program is started."""

    def refuse(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen.__init__", refuse)
    # As where Ghostscript is installed.
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")


@pytest.mark.parametrize("read", [read_rgba, read_picture, read_image])
@pytest.mark.parametrize("name", ["a.png", "a.eps", "a.jpg", "a"])
def test_postscript_starts_no_program(read, name, tmp_path, no_other_program):
    (tmp_path / name).write_bytes(EPS)
    with pytest.raises((ValueError, EvaluateError), match="not a picture that is PNG, JPEG"):
        read(tmp_path / name)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM", "ICO", "PCX", "TGA", "PDF", "SGI"])
def test_other_formats_are_refused(kind, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png", kind)
    with pytest.raises(ValueError, match=r"a\.png: not a picture that is PNG, JPEG or WebP"):
        read_rgba(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_content_decides_not_the_name(kind, tmp_path):
    Image.new("RGB", (6, 4), (200, 10, 10)).save(tmp_path / "a.picture", kind)
    rgba = read_rgba(tmp_path / "a.picture")
    assert rgba.shape == (4, 6, 4) and rgba.dtype == np.uint8
    assert abs(rgba[2, 2].astype(int) - [200, 10, 10, 255]).max() < 8


@pytest.mark.parametrize("size", [(30000, 30000), (8193, 8193), (MAX_PIXELS + 1, 1), (1, 2**30)])
def test_a_size_is_looked_at_before_pixels(size, tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels, expected at most 67 mil"):
        read_rgba(tmp_path / "bomb.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def modes() -> dict[str, Image.Image]:
    grey = Image.fromarray(np.full((4, 6), 40000, np.uint16))
    return {
        "1": Image.new("1", (6, 4), 1),
        "L": Image.new("L", (6, 4), 90),
        "LA": Image.new("LA", (6, 4), (90, 128)),
        "P": Image.new("RGB", (6, 4), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE),
        "RGB": Image.new("RGB", (6, 4), (10, 20, 30)),
        "RGBA": Image.new("RGBA", (6, 4), (10, 20, 30, 40)),
        "I;16": grey,
    }


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("1", [255, 255, 255, 255]),
        ("L", [90, 90, 90, 255]),
        ("LA", [90, 90, 90, 128]),
        ("P", [10, 20, 30, 255]),
        ("RGB", [10, 20, 30, 255]),
        ("RGBA", [10, 20, 30, 40]),
        ("I;16", [156, 156, 156, 255]),
    ],
)
def test_all_kinds_of_pixels_become_eight_bits(mode, expected, tmp_path):
    modes()[mode].save(tmp_path / "a.png")
    rgba = read_rgba(tmp_path / "a.png")
    assert rgba.shape == (4, 6, 4) and (rgba == np.array(expected)).all()


def test_cmyk_and_sixteen_bits_with_a_transparent_grey(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red = read_rgba(tmp_path / "a.jpg")[4, 4].astype(int)
    assert red[0] > 240 and red[1:3].max() < 15 and red[3] == 255

    rows = b"".join(b"\0" + struct.pack(">2H", 40000, 500) for _ in range(2))
    size = struct.pack(">IIBBBBB", 2, 2, 16, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + chunk(b"tRNS", struct.pack(">H", 500))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    assert read_rgba(tmp_path / "a.png")[0].tolist() == [[156] * 3 + [255], [1, 1, 1, 0]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken_and_said(kind, tmp_path, caplog):
    frames = [Image.new("RGBA", (6, 4), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.png", kind, save_all=True, append_images=frames[1:], lossless=True)
    with caplog.at_level(logging.WARNING):
        assert read_rgba(tmp_path / "a.png")[0, 0].tolist() == [255, 0, 0, 255]
    assert "has 3 frames: the first is taken" in caplog.text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_pictures_are_one_message(kind, tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(noise).save(path, kind)
    whole = path.read_bytes()
    failed = 0
    for _ in range(2 * TRIALS):
        path.write_bytes(damaged(whole, rng))
        try:
            read_rgba(path)
        except ValueError as error:
            failed += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert failed > 10


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0junk", b"\xff" * 64]
)
def test_a_broken_note_of_the_camera_does_not_lose_the_picture(exif, tmp_path):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.jpg", exif=exif)
    assert read_rgba(tmp_path / "a.jpg").shape == (4, 8, 4)


def irregular(kind: str, folder: Path) -> Path:
    path = folder / "a.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to(folder / "pipe")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "empty":
        path.touch()
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(2**40)
    elif kind == "long name":
        path = folder / ("a" * 300 + ".png")
    elif kind == "below a file":
        path.touch()
        path = path / "b.png"
    return path


KINDS = (
    *("folder", "pipe", "link to a pipe", "device", "loop", "empty", "huge", "long name"),
    "below a file",
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [read_rgba, read_picture, read_image])
def test_what_is_no_regular_file_is_not_opened(kind, read, tmp_path):
    path = irregular(kind, tmp_path)
    with pytest.raises((ValueError, EvaluateError), match="cannot read"):
        read(path)


# The object of a picture


@pytest.mark.parametrize(
    "size, radius, at",
    [
        ((400, 400), 6, (30, 350)),  # 0.07 % of the picture
        ((400, 600), 4, (399, 0)),  # cut by a corner
        ((64, 64), 31, (32, 32)),
        ((20, 4000), 9, (10, 3000)),
    ],
)
def test_recentring_is_for_small_objects(size, radius, at, tmp_path):
    Image.fromarray(disc(size[0], size[1], radius, at)).save(tmp_path / "a.png")
    rgba = read_picture(tmp_path / "a.png", recenter=True)
    side = rgba.shape[-1]
    assert rgba.shape == (1, 4, side, side) and side <= 3 * radius + 4
    there = (rgba[0, 3] > 0.5).numpy()
    for axis in (0, 1):
        found = np.flatnonzero(there.any(axis))
        assert abs(found[0] + found[-1] - (side - 1)) <= 1
    longest = max(np.ptp(np.flatnonzero(there.any(axis))) + 1 for axis in (0, 1))
    assert longest / side == pytest.approx(RECENTRED_SIDE, abs=2 / side)


def test_without_recentring_a_small_object_is_refused_with_the_flag(tmp_path):
    Image.fromarray(disc(400, 400, 6, (30, 350))).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"covers 0\.07%.*--single-view\.recenter"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("recenter", [False, True])
def test_a_picture_without_an_object_is_refused(recenter, tmp_path):
    Image.fromarray(np.zeros((40, 40, 4), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="alpha channel"):
        read_picture(tmp_path / "a.png", recenter)


def test_a_stray_pixel_is_no_object(tmp_path):
    Image.fromarray(disc(60, 60, 1, (20, 20))).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="the object has 3 x 3 pixels, expected at least 4"):
        read_picture(tmp_path / "a.png", recenter=True)


@pytest.mark.parametrize("size", [(1, 10000), (10000, 1), (3, 9000)])
@pytest.mark.parametrize("recenter", [False, True])
def test_a_line_is_not_padded_before_it_is_looked_at(size, recenter, tmp_path):
    rgba = np.full((*size, 4), 255, np.uint8)
    rgba[0, 0, 3] = 0  # it has an alpha channel that says something
    Image.fromarray(rgba).save(tmp_path / "line.png")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"--image .*covers 0\.0"):
        read_picture(tmp_path / "line.png", recenter)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def test_large_pictures_are_made_smaller(tmp_path):
    rgba = disc(2500, 2500, 1100, (1249.5, 1249.5))
    rgba[..., 1][rgba[..., 3] == 0] = 255  # green where nothing is, which must not bleed
    Image.fromarray(rgba).save(tmp_path / "a.png", compress_level=1)
    small = read_picture(tmp_path / "a.png")
    side = small.shape[-1]
    assert LARGEST_SIDE / 2 < side <= LARGEST_SIDE
    cover = small[0, 3].mean().item()
    assert cover == pytest.approx(np.pi * 1100**2 / 2500**2, rel=1e-3)
    assert small[0, 1].max() < 0.02 and abs(small[0, 0, side // 2, side // 2] - 200 / 255) < 0.01


def test_large_objects_are_made_smaller_and_centred(tmp_path):
    Image.fromarray(disc(2400, 2600, 1150, (1200, 1449))).save(tmp_path / "a.png", compress_level=1)
    seen = read_picture(tmp_path / "a.png")
    side = seen.shape[-1]
    assert LARGEST_SIDE / 2 < side <= LARGEST_SIDE / RECENTRED_SIDE + 1
    for axis in (1, 2):
        found = (seen[0, 3] > 0.5).any(axis - 1).nonzero()
        assert abs(found[0] + found[-1] - (side - 1)) <= 2
        assert (found[-1] - found[0] + 1) / side == pytest.approx(RECENTRED_SIDE, abs=3 / side)


# Meshes by other tools


def test_a_texture_of_postscript_starts_no_program(tmp_path, no_other_program):
    (tmp_path / "t.png").write_bytes(EPS)
    write_textured(tmp_path, "t.png")
    with pytest.raises(ValueError, match="not a picture that is PNG, JPEG or WebP"):
        meshes.read_mesh(tmp_path / "a.obj")


def test_a_texture_of_too_many_pixels_is_refused(tmp_path):
    (tmp_path / "t.png").write_bytes(png_header(30000, 30000))
    write_textured(tmp_path, "t.png")
    with pytest.raises(ValueError, match="30000 x 30000 pixels"):
        meshes.read_mesh(tmp_path / "a.obj")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("target", ["/dev/zero", "../outside.png", "pipe", "link"])
def test_files_that_a_mesh_names_are_regular_and_beside_it(target, tmp_path):
    folder = tmp_path / "mesh"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/dev/zero")
    write_textured(folder, target)
    with pytest.raises(ValueError, match="expected a regular file in the mesh's folder"):
        meshes.read_mesh(folder / "a.obj")


def write_textured(folder: Path, texture: str) -> None:
    """A triangle a.obj with a texture."""
    (folder / "a.mtl").write_text(f"newmtl m\nKd 1 1 1\nmap_Kd {texture}\n")
    (folder / "a.obj").write_text(
        "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl m\nf 1/1 2/2 3/3\n"
    )


# Export


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder with a checkpoint, as after no steps: what its field has at the start."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "a_chair-seed0")
    write_checkpoint(run, saved_tree())
    return run.path


def saved_tree(**settings) -> dict:
    """A small checkpoint's tree; settings by their dotted paths, with "/" for dots."""
    cfg = preset("embedded", 10, True, "text")
    cfg.prompt, cfg.device = "a chair", "cpu"
    cfg.field.grid.n_levels, cfg.field.grid.log2_table_size = 4, 10
    cfg.field.grid.start_level = 2
    cfg.renderer.occupancy.resolution = 8
    cfg.mesh.resolution, cfg.mesh.iso, cfg.mesh.texture_size = 16, "2", 0
    cfg.cameras.n_test_views = 2
    cfg.cameras.eval_height = cfg.cameras.eval_width = 8
    scene = FieldScene(cfg, torch.Generator().manual_seed(0))
    tree = {"step": 10, "config": to_dict(cfg), "scene": scene.state_dict()}
    for path, value in settings.items():
        *parents, name = path.split("/")
        node = tree["config"]
        for parent in parents:
            node = node[parent]
        node[name] = value
    return tree


def write_checkpoint(run: RunFolder, tree: dict) -> None:
    checkpoint.save(checkpoint.step_path(run.checkpoints, 10), tree)


def refused(caplog, *argv: object) -> str:
    """The one message of a command that ends with exit code 2."""
    caplog.clear()
    assert export.main([*map(str, argv), "--device", "cpu"]) == 2
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--iso high", "iso: expected"),
        ("--iso nan", "iso: expected"),
        ("--iso 0", "iso: expected"),
        ("--iso -3", "iso: expected"),
        ("--iso inf", "iso: expected"),
        ("--resolution 0", "resolution: expected 2 or more"),
        ("--resolution -1", "resolution: expected 2 or more"),
        ("--resolution 1000000000", "resolution: expected 1024 or less"),
        ("--min-component nan", "min_component: expected a finite number"),
        ("--min-component -1", "min_component: expected 0 or more"),
        ("--min-component 2", "min_component: expected 1 or less"),
        ("--max-faces -1", "max_faces: expected 0 or more"),
        ("--turntable --views 0", "views: expected 1 or more"),
        ("--turntable --views -1", "views: expected 1 or more"),
        ("--turntable --views 1000000000", "views: expected 100000 or less"),
        ("--turntable --size 0", "size: expected 2 or more"),
        ("--turntable --size 100000", "size: expected 4096 or less"),
    ],
)
def test_flags_of_export_are_checked_first(flags, message, caplog):
    # Before the run, which is none, is looked at.
    assert message in refused(caplog, "no-run", *flags.split())


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--views 3", "--views does nothing: it is of the video (--turntable)"),
        ("--turntable --min-component 0", "--min-component does nothing: it is of the mesh"),
    ],
)
def test_a_flag_that_does_nothing_says_so(flags, message, caplog):
    refused(caplog, "no-run", *flags.split())
    assert message in caplog.text


@pytest.mark.parametrize("flags", ["--resolution ten", "--views 1.5 --turntable", "--size"])
def test_words_of_export_that_are_no_values(flags):
    with pytest.raises(SystemExit) as error:
        export.main(["no-run", *flags.split()])
    assert error.value.code == 2


@pytest.mark.parametrize("name", ["x.fbx", "x.3mf", "x.usd", "x", "x.", ".glb", "x.avi"])
def test_a_mesh_is_written_in_a_known_format_or_not_at_all(name, trained, tmp_path, caplog):
    message = refused(caplog, trained, "--output", tmp_path / name)
    assert "expected a name that ends in .glb" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.mov", "x.png", "x", "x.glb", "x.avi"])
def test_a_video_is_written_in_a_known_format_or_not_at_all(name, trained, tmp_path, caplog):
    message = refused(caplog, trained, "--turntable", "--output", tmp_path / name)
    assert "expected a name that ends in .mp4" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.glb", "X.GLB", "new/folder/x.Glb", "with space é.glb"])
def test_export_writes_a_mesh(name, trained, tmp_path):
    assert export.main([str(trained), "--output", str(tmp_path / name), "--device", "cpu"]) == 0
    assert (tmp_path / name).read_bytes()[:4] == b"glTF"


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "kind", ["folder", "pipe", "link to a pipe", "device", "loop", "dangling", "below a file"]
)
def test_export_writes_to_regular_files_alone(kind, trained, tmp_path, caplog):
    path = tmp_path / "x.glb"
    if kind == "dangling":
        path.symlink_to(tmp_path / "nothing.glb")
    elif kind == "below a file":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "x.glb"
    else:
        path = irregular(kind, tmp_path).rename(path)
    if kind == "loop":
        path.unlink()
        path.symlink_to(path.name)
    before = sorted(tmp_path.iterdir())
    assert "cannot be written" in refused(caplog, trained, "--output", path)
    assert "cannot be written" in refused(caplog, trained, "--output", "/proc/x/y.glb")
    assert sorted(tmp_path.iterdir()) == before


def test_export_follows_a_link_to_a_file(trained, tmp_path):
    (tmp_path / "file.glb").write_bytes(b"old")
    (tmp_path / "x.glb").symlink_to("file.glb")
    assert export.main([str(trained), "--output", str(tmp_path / "x.glb"), "--device", "cpu"]) == 0
    assert (tmp_path / "x.glb").is_symlink()
    assert (tmp_path / "file.glb").read_bytes()[:4] == b"glTF"


def test_a_link_in_a_run_folder_is_not_followed(tmp_path):
    run = RunFolder(tmp_path / "run")
    write_checkpoint(run, saved_tree())
    (tmp_path / "other.glb").write_bytes(b"precious")
    run.mesh.symlink_to(tmp_path / "other.glb")
    assert export.main([str(run.path), "--device", "cpu"]) == 0
    assert (tmp_path / "other.glb").read_bytes() == b"precious"
    assert run.mesh.read_bytes()[:4] == b"glTF" and not run.mesh.is_symlink()


def test_a_format_asks_for_its_package_before_the_work(trained, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda _: None)
    monkeypatch.setattr(FieldScene, "asset", None)
    for flags in (("--format", "usdz"), ("--output", tmp_path / "a.usdz")):
        assert "pip install 'dsd_fast[usd]'" in refused(caplog, trained, *flags)
    assert not list(trained.glob("mesh.*"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"field/grid/log2_table_size": 24, "field/grid/n_levels": 32}, "own configuration"),
        (
            {
                "field/n_neurons": 4096,
                "field/n_hidden_layers": 64,
                "field/normal_type": "finite_difference",
            },
            "own configuration",
        ),
        ({"background/n_neurons": 4096, "background/n_hidden_layers": 64}, "own configuration"),
        ({"renderer/occupancy/resolution": 512}, "own configuration"),
        ({"field/grid/n_levels": 10**9}, "n_levels: expected 32 or less"),
        ({"field": 3}, "field: expected a group of settings"),
        ({"mesh/iso": "high"}, 'mesh.iso: expected "auto"'),
        ({"mesh/resolution": 0}, "mesh.resolution: expected 2 or more"),
        ({"pictures/fps": -1}, "pictures.fps"),
        ({"nonsense": 1}, "nonsense: there is no such setting"),
        ({"task": "image"}, "which has no object"),
    ],
)
def test_a_hostile_configuration_in_a_checkpoint(settings, message, tmp_path, caplog):
    write_checkpoint(RunFolder(tmp_path), saved_tree(**settings))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in refused(caplog, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10
    with pytest.raises(EvaluateError, match=re.escape(message)):
        open_run(tmp_path, torch.device("cpu"), None)


def broken_trees() -> dict[str, dict]:
    tree = saved_tree()
    table = tree["scene"]["field.grid.table"]
    rest = {k: v for k, v in tree["scene"].items() if k != "field.grid.table"}
    return {
        "no config": {k: v for k, v in tree.items() if k != "config"},
        "no scene": {k: v for k, v in tree.items() if k != "scene"},
        "no step": {k: v for k, v in tree.items() if k != "step"},
        "step of text": tree | {"step": "ten"},
        "step of tensor": tree | {"step": torch.zeros(3)},
        "config of list": tree | {"config": [1, 2]},
        "config of tensor": tree | {"config": torch.zeros(2)},
        "scene of numbers": tree | {"scene": 5},
        "empty scene": tree | {"scene": {}},
        "table gone": tree | {"scene": rest},
        "table of another size": tree | {"scene": rest | {"field.grid.table": table[:-1]}},
        "table as number": tree | {"scene": rest | {"field.grid.table": 1.0}},
        "more than a scene": tree | {"scene": tree["scene"] | {"field.other": table}},
    }


@pytest.mark.parametrize("name", broken_trees())
def test_a_checkpoint_that_holds_something_else(name, tmp_path, caplog):
    write_checkpoint(RunFolder(tmp_path), broken_trees()[name])
    assert "step-000010.safetensors" in refused(caplog, tmp_path) or name == "more than a scene"


def test_damaged_checkpoints_are_one_message(trained, tmp_path, caplog):
    whole = checkpoint.step_path(trained / "checkpoints", 10).read_bytes()
    path = checkpoint.step_path(tmp_path / "checkpoints", 10)
    path.parent.mkdir()
    rng = np.random.default_rng(0)
    for _ in range(TRIALS):
        bad = damaged(whole, rng)
        path.write_bytes(bad)
        if bad != whole:
            assert str(path) in refused(caplog, tmp_path, "--output", tmp_path / "x.glb")


# In the place of any setting or flag.
ODD = [0, -1, 1, 1e9, -1e9, 1e300, 2**70, True, None, "x", "", [], [[1]], {}, {"a": 1}, [0.5, 0.1]]
ODD += ["../..", "nan", "\ud800", 3.7, [1e9] * 1000, "a" * 10000, 8192, 65536]
WORDS = "0 -1 1 3 1e9 nan inf ² 0x10 true None auto high é 💥 -- / . /dev/null x.glb X.GLB x.obj x"
FLAGS = "--iso --resolution --min-component --max-faces --views --size --output --turntable"


def test_odd_values_in_the_configuration_of_a_checkpoint(tmp_path):
    rng = random.Random(0)
    for _ in range(TRIALS):
        tree = saved_tree()
        node = tree["config"]
        while isinstance(node, dict) and node:
            parent, name = node, rng.choice(list(node))
            node = node[name]
        parent[name] = rng.choice(ODD)
        write_checkpoint(RunFolder(tmp_path), tree)
        flags = ["--device", "cpu", "--resolution", "8", "--output", str(tmp_path / "x.glb")]
        assert export.main([str(tmp_path), *flags]) in (0, 1, 2), (name, parent[name])


def test_odd_words_in_the_place_of_flags(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    words = [*WORDS.split(), "", " ", "9" * 5000, "a" * 300 + ".glb", "nul\0.glb"]
    for _ in range(TRIALS):
        flags = [
            word for flag in rng.sample(FLAGS.split(), 2) for word in (flag, rng.choice(words))
        ]
        try:
            code = export.main([str(trained), *flags, "--device", "cpu"])
        except SystemExit as error:
            code = error.code
        assert code in (0, 1, 2), flags
        assert "Traceback" not in capsys.readouterr().err


def test_damaged_runs_and_views_in_an_evaluation(trained, tmp_path, monkeypatch, caplog):
    whole = checkpoint.step_path(trained / "checkpoints", 10).read_bytes()
    config = json.dumps(saved_tree()["config"]).encode()
    metrics = b'{"step": 1, "seconds": 1.5, "memory_mib": 5.0}\n' * 3
    sidecar = b'{"azimuths": [0, 180], "seconds": 3, "seed": 1, "prompt": "a chair", "method": "m"}'
    rng = np.random.default_rng(0)
    for i in range(TRIALS):
        run = RunFolder(tmp_path / str(i) / "run")
        run.checkpoints.mkdir(parents=True)
        file = checkpoint.step_path(run.checkpoints, 10)
        file.write_bytes(damaged(whole, rng) if i % 4 == 0 else whole)
        run.config.write_bytes(damaged(config, rng) if i % 4 == 1 else config)
        run.metrics.write_bytes(damaged(metrics, rng))
        views = write_views(tmp_path / str(i) / "other" / "a_chair-seed0")
        (views / "asset.json").write_bytes(damaged(sidecar, rng) if i % 4 == 2 else sidecar)
        if i % 4 == 3:
            (views / "1.png").write_bytes(damaged((views / "1.png").read_bytes(), rng))
        evaluated([tmp_path / str(i)], tmp_path, monkeypatch, caplog)
        (tmp_path / "report.json").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["glb", "obj", "ply", "stl"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_damaged_meshes_are_one_message(kind, tmp_path):
    ball = trimesh.creation.icosphere(1)
    path = tmp_path / f"ball.{kind}"
    ball.export(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(2 * TRIALS):
        path.write_bytes(damaged(whole, rng))
        with contextlib.suppress(ValueError):
            meshes.render_views(path, np.zeros(1), 16, 0.7)


# Evaluation


def evaluated(paths: list[Path], tmp_path: Path, monkeypatch, caplog, *flags: str) -> str:
    """The messages of an evaluation that ends with exit code 2; "" of one that is done."""

    def encoder(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1)[:, :1300].astype(np.float32) + 1

    monkeypatch.setattr("dsd_fast.evaluate.eyes.load_encoder", lambda device: encoder)
    caplog.clear()
    out = tmp_path / "report.json"
    argv = [*map(str, paths), "--json", str(out), "--size", "16", "--views", "2", *flags]
    code = evaluate.main([*argv, "--device", "cpu"])
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert (code, len(errors)) in ((0, 0), (2, 1))
    assert out.exists() == (code == 0)
    return "".join(errors)


CONFIGS = {
    "not json": b"{",
    "not utf-8": b'{"prompt": "caf\xe9", "seed": 0}',
    "empty": b"",
    "a list": b"[]",
    "a number": b"7",
    "deep": b"[" * 100_000,
    "no prompt": b'{"seed": 0}',
    "no seed": b'{"prompt": "a"}',
    "prompt of a number": b'{"prompt": 3, "seed": 0}',
    "half a character": b'{"prompt": "\\ud800", "seed": 0}',
    "seed of a text": b'{"prompt": "a", "seed": "0"}',
    "seed of a list": b'{"prompt": "a", "seed": [0]}',
    "infinite seed": b'{"prompt": "a", "seed": 1e999}',
    "seed of no number": b'{"prompt": "a", "seed": NaN}',
    "long seed": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "large seed": b'{"prompt": "a", "seed": ' + b"9" * 400 + b"}",
    "guidance of a number": b'{"prompt": "a", "seed": 0, "guidance": 3}',
    "share of a text": b'{"prompt": "a", "seed": 0, "guidance": {"trajectory_share": "x"}}',
    "scale of a text": b'{"prompt": "a", "seed": 0, "guidance": {"trajectory_scale": "x"}}',
    "image of a list": b'{"prompt": "a", "seed": 0, "task": "image", "image": [1]}',
    "method half a character": b'{"prompt": "a", "seed": 0, "guidance": {"method": "\\udfff"}}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_configuration_of_a_run(name, tmp_path, monkeypatch, caplog):
    run = RunFolder(tmp_path / "run")
    write_checkpoint(run, saved_tree())
    run.config.write_bytes(CONFIGS[name])
    assert "config.json" in evaluated([run.path], tmp_path, monkeypatch, caplog)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "huge"])
def test_a_configuration_that_is_no_file(kind, tmp_path, monkeypatch, caplog):
    run = RunFolder(tmp_path / "run")
    write_checkpoint(run, saved_tree())
    irregular(kind, tmp_path).rename(run.config)
    message = evaluated([run.path], tmp_path, monkeypatch, caplog)
    # Of a configuration that is no regular file the checkpoint is asked.
    assert "config.json" in message if kind == "huge" else not message


@pytest.mark.parametrize("name", broken_trees())
def test_a_run_whose_checkpoint_holds_something_else(name, tmp_path, monkeypatch, caplog):
    run = RunFolder(tmp_path / "run")
    write_checkpoint(run, broken_trees()[name])
    assert str(run.path) in evaluated([run.path], tmp_path, monkeypatch, caplog) or "more" in name


METRICS = [
    b'{"step": 1, "seconds": 3.0, "memory_mib": 5}\n{"step": 2, "sec',
    b'{"seconds": 3.0, "memory_mib": 5}\n7\n[]\nnull\n"text"\n',
    b'\xff\xfe\n\0\0\0\n{"seconds": 3.0, "memory_mib": 5}\n',
    b'{"seconds": "3", "memory_mib": []}\n{"seconds": 3.0, "memory_mib": 5}\n',
    b'{"seconds": NaN, "memory_mib": Infinity}\n{"seconds": 3.0, "memory_mib": 5}\n',
    b'{"seconds": 1e400, "memory_mib": true}\n{"seconds": 3.0, "memory_mib": 5}\n',
    b"[" * 100_000 + b'\n{"seconds": 3.0, "memory_mib": 5}\n',
    b'{"seconds": ' + b"9" * 5000 + b'}\n{"seconds": 3.0, "memory_mib": 5}\n',
]


@pytest.mark.parametrize("lines", METRICS)
def test_torn_metrics_lose_no_more_than_their_lines(lines, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    assert cost(tmp_path / "metrics.jsonl") == (3.0, 5)


def test_metrics_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert cost(tmp_path / "metrics.jsonl") == (None, None)


def write_views(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (16, 16), (90 * i, 10, 10)).save(folder / f"{i}.png")
    return folder


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "damage", ["eps", "bomb", "cut", "folder", "pipe", "device", "loop", "empty", "huge"]
)
def test_a_damaged_view(damage, tmp_path, monkeypatch, caplog):
    folder = write_views(tmp_path / "other" / "a_chair-seed0")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").unlink()
    content = {"eps": EPS, "bomb": png_header(30000, 30000), "cut": whole[:-30]}
    if damage in content:
        (folder / "1.png").write_bytes(content[damage])
    elif damage == "loop":
        (folder / "1.png").symlink_to("1.png")
    else:
        irregular(damage, tmp_path).rename(folder / "1.png")
    message = evaluated([folder], tmp_path, monkeypatch, caplog)
    assert "1.png" in message


@pytest.mark.parametrize(
    "sidecar",
    [
        b"{",
        b"[1]",
        b"[" * 100_000,
        b'{"azimuths": [0]}',
        b'{"azimuths": [0, NaN]}',
        b'{"azimuths": [0, "x"]}',
        b'{"azimuths": 3}',
        b'{"elevation": "x"}',
        b'{"elevation": 1e999}',
        b'{"seed": 1e999}',
        b'{"seconds": true}',
        b'{"prompt": 3}',
        b'{"prompt": "\\ud800"}',
        b'{"method": ["x"]}',
    ],
)
def test_a_damaged_sidecar(sidecar, tmp_path, monkeypatch, caplog):
    folder = write_views(tmp_path / "other" / "a_chair-seed0")
    (folder / "asset.json").write_bytes(sidecar)
    assert "asset.json" in evaluated([folder], tmp_path, monkeypatch, caplog)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("flag", ["--reference", "--nearest"])
@pytest.mark.parametrize("kind", ["zip", "npy", "text", "pickle", "shapes", "nan", "pipe", "none"])
def test_damaged_features(flag, kind, tmp_path, monkeypatch, caplog):
    folder = write_views(tmp_path / "other" / "a_chair-seed0")
    path = tmp_path / "x.npz"
    ones = np.ones((9, 4), np.float32)
    if kind == "zip":
        np.savez_compressed(path, features=ones, names=np.array(["a"] * 9))
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "npy":
        np.save(tmp_path / "x.npy", ones)
        (tmp_path / "x.npy").rename(path)
    elif kind == "text":
        path.write_text("features")
    elif kind == "pickle":
        np.savez(path, features=ones, names=np.array([{}] * 9, dtype=object))
    elif kind == "shapes":
        np.savez(path, features=ones[0], names=np.array(["a"]))
    elif kind == "nan":
        np.savez(path, features=ones * np.nan, names=np.array(["a"] * 9))
    elif kind == "pipe":
        os.mkfifo(path)
    assert "x.npz" in evaluated([folder], tmp_path, monkeypatch, caplog, flag, str(path))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--views 0", "views: expected 1 or more"),
        ("--views 1000000", "views: expected 360 or less"),
        ("--size 0", "size: expected 16 or more"),
        ("--size 100000", "size: expected 4096 or less"),
        ("--reference-images 0", "reference_images: expected"),
        ("--json /dev/null", "--json /dev/null: cannot be written"),
        ("--html .", "--html .: cannot be written: it is a folder"),
        ("--html /proc/x/y.html", "cannot be written"),
        ("--save-features /dev/stdout/x", "cannot be written"),
    ],
)
def test_flags_of_evaluate_are_checked_first(flags, message, caplog):
    argv = ["no-run", *([] if "--json" in flags else ["--json", "x.json"]), *flags.split()]
    assert evaluate.main(argv) == 2
    assert message in caplog.text and "no-run" not in caplog.text


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["text", "pipe", "folder", "header"])
def test_a_judge_that_is_none(kind, tmp_path):
    path = tmp_path / "judge.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("judge")
    else:
        header = b'{"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(EvaluateError, match=r"judge\.safetensors"):
        open_judge(path, torch.device("cpu"))


@pytest.mark.parametrize(
    "change",
    [
        {"rgba": np.zeros((2, 4, 4, 3), np.uint8)},
        {"rgba": np.zeros((2, 4, 5, 4), np.uint8)},
        {"rgba": np.zeros((2, 4, 4, 4), np.float32)},
        {"rgba": np.zeros((0, 4, 4, 4), np.uint8)},
        {"rgba": np.zeros((2, 0, 0, 4), np.uint8)},
        {"rgba": np.array(5)},
        {"azimuth": np.zeros(3)},
        {"azimuth": np.array(0.0)},
        {"distance": np.array([1, np.nan])},
        {"fovy": np.array(["a", "b"])},
        {"elevation": np.array([{}, {}], dtype=object)},
    ],
)
def test_true_views_that_do_not_fit(change, tmp_path):
    cameras = {name: np.ones(2) for name in ("elevation", "azimuth", "distance", "fovy")}
    good: dict[str, Any] = {"rgba": np.ones((2, 4, 4, 4), np.uint8), **cameras}
    np.savez(tmp_path / "truth.npz", **good)
    assert read_truth(tmp_path).rgba.shape == (2, 4, 4, 4)
    np.savez(tmp_path / "truth.npz", **(good | change))
    with pytest.raises(ValueError, match=r"truth\.npz: expected"):
        read_truth(tmp_path)


# Files that cannot be written to their end


FRAMES = [np.full((16, 24, 3), i, np.uint8) for i in range(0, 250, 5)] * 4


def write_mesh(path: Path) -> None:
    rng = np.random.default_rng(0)
    points, colours = rng.random((2, 30000, 3)).astype(np.float32)
    faces, normals = np.arange(30000).reshape(-1, 3), np.ones_like(points)
    formats.write(Asset(points, normals, faces, colours), path)


WRITERS = {
    "mesh.glb": write_mesh,
    "turntable.mp4": lambda path: pictures.write_video(FRAMES, path, 24),
    "preview.png": lambda path: pictures.write_png(
        np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8), path
    ),
}


def test_a_file_that_grows_too_large_is_one_error(tmp_path):
    """A limit of the system stands for a full disk."""
    for name in WRITERS:
        (tmp_path / name).write_bytes(b"old")
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import imageio.v3, imageio_ffmpeg
from test_strangers_files import WRITERS
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
for name, write in WRITERS.items():
    path = Path({str(tmp_path)!r}, name)
    try:
        write(path)
        sys.exit(name + " was written")
    except OSError as error:
        assert error.filename == str(path) and error.strerror, error
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(
        WRITERS, b"old"
    )


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_cannot_be_made_is_one_error(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory") as error:
        WRITERS[name](tmp_path / "file" / "below" / name)
    assert error.value.filename == str(tmp_path / "file" / "below" / name)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "program, message",
    [
        ("exit 3", "ffmpeg: it ended with code 3"),
        ("head -c 999 > /dev/null; exit 3", "ffmpeg: it ended with code 3"),
        ("cat > /dev/null; exit 4", "ffmpeg: it ended with code 4"),
        ("kill -9 $$", "ffmpeg: it ended with code -9"),
        ("cat > /dev/null; echo 1; echo oops >&2; exit 1", "ffmpeg: oops"),
        ("cat > /dev/null; echo 'x: No space left on device' >&2; exit 1", "No space left"),
        ("head -c 999999 /dev/zero | tr '\\0' x >&2; exit 1", "ffmpeg: x{300}: '"),
    ],
)
def test_the_end_of_ffmpeg_is_one_error(program, message, tmp_path, monkeypatch):
    fake = tmp_path / "ffmpeg"
    fake.write_text(f"#!/bin/sh\n{program}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    with pytest.raises(OSError, match=message) as error:
        pictures.write_video(FRAMES, tmp_path / "v.mp4", 24)
    assert error.value.filename == str(tmp_path / "v.mp4") and error.value.errno
    assert [path.name for path in tmp_path.iterdir()] == ["ffmpeg"]
    leaves_no_zombie()


def leaves_no_zombie() -> None:
    """Other children of this process may live, none may have ended unnoticed."""
    with contextlib.suppress(ChildProcessError):
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)


def test_an_error_between_frames_leaves_no_process_and_no_file(tmp_path):
    def frames():
        yield from FRAMES[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pictures.write_video(frames(), tmp_path / "v.mp4", 24)
    assert not list(tmp_path.iterdir())
    leaves_no_zombie()


def test_a_video_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a video needs"):
        pictures.write_video([], tmp_path / "v.mp4", 24)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(1, 3), (2, 1), (3, 9)])
def test_a_video_may_be_small(size, tmp_path):
    pictures.write_video([np.zeros((*size, 3), np.uint8)] * 2, tmp_path / "v.mp4", 24)
    assert (tmp_path / "v.mp4").stat().st_size > 200


def test_a_video_is_read_back(tmp_path):
    folder = tmp_path / "tcp:host"  # no address
    folder.mkdir()
    pictures.write_video(FRAMES[:7], folder / "v.mp4", 24)
    decode = f"-v error -i file:{folder}/v.mp4 -f rawvideo -pix_fmt rgb24 -".split()
    program = imageio_ffmpeg.get_ffmpeg_exe()
    done = subprocess.run([program, *decode], capture_output=True, check=True)
    video = np.frombuffer(done.stdout, np.uint8).reshape(-1, 16, 24, 3)
    assert len(video) == 7 and np.abs(video[6].astype(int) - FRAMES[6]).max() < 6


def test_the_strip_leaves_out_what_is_no_preview(tmp_path, caplog):
    run = RunFolder(tmp_path)
    run.previews.mkdir()
    result = np.full((8, 8, 3), 9, np.uint8)
    pictures.write_png(result, run.previews / "step-000002.png")
    (run.previews / "step-000003.png").write_bytes(EPS)
    (run.previews / "step-000004.png").mkdir()
    for name in ("step-x.png", "step-².png", "step-.png", "step--1.png"):
        (run.previews / name).touch()
    assert progress_strip(run, 10, result).shape == (8, 16, 3)
    assert caplog.text.count("left out of the strip") == 2
