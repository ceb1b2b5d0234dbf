"""Contact sheets and the turntable video of a scene."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NoReturn, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.config import TrainConfig
from dsd_fast.output_file import writing
from dsd_fast.scene.cameras import CameraBatch, CameraConfig, eval_camera, turntable
from dsd_fast.scene.renderer import RenderOutput

# Of a video that does not name its colours every player has a guess of its own.
_COLORS = "scale=out_color_matrix=bt709,setparams=color_primaries=bt709:color_trc=bt709"
# What ffmpeg is told of the kinds of videos, by the endings of their names.
VIDEOS = {
    ".mp4": f"-vf {_COLORS} -vcodec libx264 -pix_fmt yuv420p -crf 10 -movflags +faststart -f mp4",
    ".webm": f"-vf {_COLORS} -vcodec libvpx-vp9 -pix_fmt yuv420p -crf 18 -b:v 0 -cpu-used 4 "
    "-row-mt 1 -f webm",
    # One palette for all frames, so that nothing that stands still flickers; over and over.
    ".gif": "-filter_complex split[a][b];[a]palettegen=stats_mode=full[p];"
    "[b][p]paletteuse=dither=sierra2_4a -loop 0 -f gif",
}


class Shown(Protocol):
    """A scene that can be looked at when it is finished."""

    @property
    def device(self) -> torch.device: ...

    def view(self, cameras: CameraBatch, step: int) -> RenderOutput:
        """What cameras see at a step of the run, without chance or gradients."""
        ...


def contact_sheet(
    scene: Shown, cfg: CameraConfig, step: int, n_views: int, size: int
) -> np.ndarray:
    """Square views around the object, colours above normals: uint8 [2*size, n_views*size, 3]."""
    columns = []
    for view in range(n_views):
        azimuth = 360.0 * view / n_views
        camera = eval_camera(cfg, azimuth, size=(size, size), device=scene.device)
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
    scene: Shown,
    cfg: TrainConfig,
    step: int,
    path: Path,
    n_views: int | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Render once around the object into a video, written atomically.

    Colours, or with ``pictures.panels`` "all" colours | normals | opacity.

    Args:
        n_views, size: frames, and (height, width) of a panel, in place of the configuration's.
    """
    size = size or (cfg.cameras.eval_height, cfg.cameras.eval_width)
    rendered = cfg.pictures.rendered(*size)

    def frame(camera: CameraBatch) -> np.ndarray:
        seen = scene.view(camera, step)
        panels = [seen.rgb]
        if cfg.pictures.panels == "all":
            panels += [seen.normal, seen.opacity.expand_as(seen.rgb)]
        return to_uint8(torch.cat([_enlarged(panel, size) for panel in panels], dim=1))

    cameras = turntable(cfg.cameras, n_views, rendered, scene.device)
    write_video((frame(camera) for camera in cameras), path, cfg.pictures.fps)


def _enlarged(view: Tensor, size: tuple[int, int]) -> Tensor:
    """A view [1, h, w, 3] as [H, W, 3]. Bicubic: no steps at edges, no blur within."""
    if view.shape[1:3] != size:
        view = F.interpolate(view.permute(0, 3, 1, 2), size, mode="bicubic").permute(0, 2, 3, 1)
    return view[0]


def write_video(frames: Iterable[np.ndarray], path: Path, fps: int) -> None:
    """Encode uint8 frames [H, W, 3] as the name's ending says, one of VIDEOS, atomically.

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
                kind = path.suffix.lower()
                encoder = encoder or _Encoder(temporary, kind, even.shape[:2], fps, said)
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
        path: of the file.
        kind: of VIDEOS.
        size: height and width of frames, even.
        said: takes the program's words.
    """

    def __init__(
        self, path: Path, kind: str, size: tuple[int, ...], fps: int, said: IO[bytes]
    ) -> None:
        import imageio_ffmpeg

        try:
            program = imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError as error:
            raise OSError(errno.ENOENT, f"no video without ffmpeg: {error}") from error
        self._said = said
        source = f"-f rawvideo -pix_fmt rgb24 -s {size[1]}x{size[0]} -r {fps} -i - -an"
        self._process = subprocess.Popen(
            # A path may look like an address to ffmpeg.
            [program, "-y", "-v", "error", *source.split(), *VIDEOS[kind].split(), f"file:{path}"],
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
