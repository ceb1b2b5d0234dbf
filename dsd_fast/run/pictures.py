"""Contact sheets and the turntable video of a scene."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
import torch
from torch import Tensor

from dsd_fast.output_file import writing
from dsd_fast.scene.cameras import CameraConfig, eval_camera, turntable
from dsd_fast.scene.field_scene import FieldScene
from dsd_fast.scene.renderer import RenderOutput


def contact_sheet(
    scene: FieldScene,
    cfg: CameraConfig,
    step: int,
    n_views: int,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """``n_views`` views around the object, colours above normals: uint8 [2*H, n_views*W, 3]."""
    columns = []
    for view in range(n_views):
        camera = eval_camera(cfg, 360.0 * view / n_views, size=size, device=scene.device)
        output = scene.view(camera, step)
        columns.append(torch.cat([output.rgb[0], output.normal[0]], dim=0))
    return to_uint8(torch.cat(columns, dim=1))


def write_png(image: np.ndarray, path: Path) -> None:
    """Write a uint8 image [H, W, 3] atomically; OSError names the file."""
    import imageio.v3 as imageio

    # Not by imageio, which says more than one thing where the disk is full.
    content = imageio.imwrite("<bytes>", image, extension=".png")
    with writing(path) as temporary:
        temporary.write_bytes(content)


def write_turntable(
    scene: FieldScene,
    cfg: CameraConfig,
    step: int,
    path: Path,
    fps: int,
    n_views: int | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Render once around the object into an mp4 of rgb | normal | opacity, written atomically."""
    cameras = turntable(cfg, n_views, size, scene.device)
    write_video((_panels(scene.view(camera, step)) for camera in cameras), path, fps)


def write_video(frames: Iterable[np.ndarray], path: Path, fps: int) -> None:
    """Encode uint8 frames [H, W, 3] as H.264, atomically.

    Odd sides lose one row or column, one of a single pixel has it twice.

    Raises:
        OSError: it cannot be written, or ffmpeg cannot be run or ends before its time; names the
            file.
        ValueError: there are no frames.
    """
    with writing(path) as temporary, tempfile.TemporaryFile() as said:
        encoder = None
        try:
            for frame in frames:
                even = _even(frame)
                encoder = encoder or _Encoder(temporary, even.shape[:2], fps, said)
                encoder.write(even)
            if encoder is None:
                raise ValueError("a video needs at least one frame")
            encoder.finish()
        finally:
            if encoder is not None:
                encoder.end()


def _even(frame: np.ndarray) -> np.ndarray:
    """yuv420p, the one pixel format every player takes, halves the colour resolution."""
    for axis in (0, 1):
        if frame.shape[axis] == 1:
            frame = frame.repeat(2, axis)
    return frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]


class _Encoder:
    """The program that imageio-ffmpeg brings; its own function hides that, and why, it ended.

    Args:
        path: of the mp4 file.
        size: height and width of frames, even.
        said: takes the program's words.
    """

    def __init__(self, path: Path, size: tuple[int, ...], fps: int, said: IO[bytes]) -> None:
        import imageio_ffmpeg

        try:
            program = imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError as error:
            raise OSError(errno.ENOENT, f"no video without ffmpeg: {error}") from error
        self._said = said
        source = f"-f rawvideo -pix_fmt rgb24 -s {size[1]}x{size[0]} -r {fps} -i - -an"
        result = "-vcodec libx264 -pix_fmt yuv420p -crf 10 -movflags +faststart -f mp4"
        self._process = subprocess.Popen(
            # A path may look like an address to ffmpeg.
            [program, "-y", "-v", "error", *source.split(), *result.split(), f"file:{path}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,  # Ctrl-C is for us to handle.
        )

    def write(self, frame: np.ndarray) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.ascontiguousarray(frame).data)
        except OSError:
            self._fail()

    def finish(self) -> None:
        """Wait for the end of the file."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            self._fail()
        if self._process.wait():
            self._fail()

    def end(self) -> None:
        """Leave no process behind."""
        if self._process.poll() is None:
            self._process.kill()
        with contextlib.suppress(OSError):  # what it has not read yet
            self._process.communicate()

    def _fail(self) -> NoReturn:
        """OSError with the first of what ffmpeg said, which is the cause of the rest."""
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        words = lines[0][:300] if lines else f"it ended with code {code}"
        full = any(os.strerror(errno.ENOSPC) in line for line in lines)
        raise OSError(errno.ENOSPC if full else errno.EIO, f"ffmpeg: {words}")


def to_uint8(image: Tensor) -> np.ndarray:
    """[..., 3] floats in [0, 1] as bytes on the CPU."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _panels(output: RenderOutput) -> np.ndarray:
    opacity = output.opacity[0].expand(-1, -1, 3)
    return to_uint8(torch.cat([output.rgb[0], output.normal[0], opacity], dim=1))
