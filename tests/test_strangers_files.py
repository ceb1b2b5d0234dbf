"""Files that anybody may have made: pictures, meshes, run folders, and places to write to."""

import logging
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsd_fast.evaluate import meshes
from dsd_fast.evaluate.assets import EvaluateError, read_image
from dsd_fast.picture_file import MAX_PIXELS, read_rgba
from dsd_fast.scene.picture import LARGEST_SIDE, RECENTRED_SIDE, read_picture

EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%Pages: 1\n%%EndComments\n"
    b"0 0 20 20 rectfill\nshowpage\n%%EOF\n"
)


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
    for _ in range(120):
        bad = bytearray(whole)
        if rng.random() < 0.4:
            bad = bad[: rng.integers(len(bad))]
        for _ in range(rng.integers(1, 8)):
            if bad:
                bad[rng.integers(len(bad))] = rng.integers(256)
        path.write_bytes(bad)
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
    rgba = disc(2500, 2500, 1200, (1249.5, 1249.5))
    rgba[..., 1][rgba[..., 3] == 0] = 255  # green where nothing is, which must not bleed
    Image.fromarray(rgba).save(tmp_path / "a.png", compress_level=1)
    small = read_picture(tmp_path / "a.png")
    side = small.shape[-1]
    assert LARGEST_SIDE / 2 < side <= LARGEST_SIDE
    cover = small[0, 3].mean().item()
    assert cover == pytest.approx(np.pi * 1200**2 / 2500**2, rel=1e-3)
    assert small[0, 1].max() < 0.02 and abs(small[0, 0, side // 2, side // 2] - 200 / 255) < 0.01


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
