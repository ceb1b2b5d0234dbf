"""Contact sheets and the turntable video of a scene."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsd_fast.files import replacing
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
    """Write a uint8 image [H, W, 3] atomically."""
    import imageio.v3 as imageio

    with replacing(path) as temporary:
        imageio.imwrite(temporary, image, extension=".png")


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
    """Encode uint8 frames [H, W, 3] as H.264, atomically. Odd sides lose one row or column."""
    import imageio_ffmpeg

    with replacing(path) as temporary:
        writer = None
        try:
            for frame in frames:
                # yuv420p, the one pixel format every player takes, halves the colour resolution.
                even = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
                if writer is None:
                    writer = imageio_ffmpeg.write_frames(
                        str(temporary),
                        (even.shape[1], even.shape[0]),
                        fps=fps,
                        codec="libx264",
                        quality=8,
                        macro_block_size=2,
                        output_params=["-movflags", "+faststart"],
                    )
                    writer.send(None)
                writer.send(np.ascontiguousarray(even))
        finally:
            if writer is not None:
                writer.close()


def to_uint8(image: Tensor) -> np.ndarray:
    """[..., 3] floats in [0, 1] as bytes on the CPU."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _panels(output: RenderOutput) -> np.ndarray:
    opacity = output.opacity[0].expand(-1, -1, 3)
    return to_uint8(torch.cat([output.rgb[0], output.normal[0], opacity], dim=1))
