"""What reconstruction from one picture is told, and the picture itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from dsd_fast.ranges import AnyPath, Bins, ViewElevation, Weight
from dsd_fast.schedules import ScheduleValue

# Pictures whose alpha is above this everywhere have a background.
OPAQUE_ALPHA = 250
# Least share of a picture that the object must cover.
LEAST_COVER = 0.005
# `recenter` gives the object this share of the picture's side: that of the small model's training
# objects, a sphere of radius 0.6 at distance 1.75 through 50 degrees, less what corners leave.
RECENTRED_SIDE = 0.75


@dataclass
class SingleViewConfig:
    # Picture of the object: with an alpha channel, or with a background that rembg removes.
    image: Annotated[AnyPath | None, tyro.conf.arg(name="image", prefix_name=False)] = None
    # Elevation in degrees from which the picture was taken; azimuth 0 is where it was taken from.
    elevation: ViewElevation = 5.0
    # Crop the picture to the object and centre it at the size of the model's training pictures.
    recenter: bool = False
    # The model is Stable Zero123, whose pose ends with the picture's polar angle.
    polar_pose: bool = False
    # Bins of azimuth, all around, that share a cached trajectory.
    azimuth_bins: Bins = 24
    # Bins of elevation over --cameras.elevation-range.
    elevation_bins: Bins = 6
    # Weight of the colours of the reference view: mean squared error; a number or a schedule.
    lambda_rgb: Weight = 500.0
    # Weight of its outline: mean squared error of the opacity.
    lambda_mask: Weight = 50.0
    # Weight for normals that change little from pixel to pixel.
    lambda_normal_smooth: Weight = 8.0
    # Weight for normals that change little from a point on the surface to one beside it.
    lambda_normal_smooth_3d: Weight = 8.0

    # Of the picture's file: a resumed run must find the same.
    digest: tyro.conf.Suppress[str] = ""

    def schedules(self) -> dict[str, ScheduleValue]:
        """Name of a loss -> its weight."""
        return {
            name.removeprefix("lambda_"): value
            for name, value in vars(self).items()
            if name.startswith("lambda_")
        }


def read_picture(path: Path | None, recenter: bool = False) -> Tensor:
    """The object of a picture, cut out.

    Args:
        path: of a file that Pillow reads, of any size; a grey or colour picture without alpha, or
            with one that is opaque everywhere, loses its background through rembg.
        recenter: see SingleViewConfig.
    Returns:
        [1,4,S,S] float32 in [0,1] on the CPU, straight alpha; the shorter side is padded with
        nothing.
    Raises:
        FileNotFoundError: there is no such file, or none was named.
        ValueError: it cannot be read as a picture, or shows no object.
        ImportError: its background is to be removed and rembg is not installed.
    """
    if path is None:
        raise FileNotFoundError("--task single-view needs a picture: pass --image chair.png")
    if not path.is_file():
        raise FileNotFoundError(f"--image {path}: there is no such file")
    rgba = _read(path)
    if rgba[..., 3].min() > OPAQUE_ALPHA:
        rgba = _without_background(rgba, path)
    cover = float((rgba[..., 3] > 127).mean())
    if cover < LEAST_COVER:
        raise ValueError(
            f"--image {path}: the object covers {cover:.1%} of the picture, expected at least "
            f"{LEAST_COVER:.1%}; crop it, or check its alpha channel"
        )
    picture = torch.from_numpy(rgba.astype(np.float32) / 255).permute(2, 0, 1)[None]
    return _recentred(picture) if recenter else _squared(picture)


def on_color(rgba: Tensor, color: float = 1.0) -> Tensor:
    """A picture [B,4,h,w] over one grey, white by default: [B,3,h,w]."""
    return rgba[:, :3] * rgba[:, 3:] + color * (1 - rgba[:, 3:])


def resized(rgba: Tensor, size: int) -> Tensor:
    """A picture [B,4,h,w] at size x size: by area, colours weighted with alpha.

    Enlarged bilinearly. Straight alpha in and out; colours are black where nothing is.
    """
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    mode = "area" if rgba.shape[-1] >= size else "bilinear"
    small = F.interpolate(premultiplied, (size, size), mode=mode)
    alpha = small[:, 3:]
    return torch.cat([(small[:, :3] / alpha.clamp_min(1e-6)).clamp(0, 1), alpha], dim=1)


def _read(path: Path) -> np.ndarray:
    """[h,w,4] uint8, upright."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # grey of 16 bits, which conversion would cut off
                grey = np.asarray(image).astype(np.int64) >> 8
                image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            return np.array(image.convert("RGBA"))
    except OSError as error:
        raise ValueError(f"--image {path}: not a picture that can be read: {error}") from error


def _without_background(rgba: np.ndarray, path: Path) -> np.ndarray:
    try:
        import rembg  # pyright: ignore[reportMissingImports]  # it is of no extra
    except ImportError as error:
        raise ImportError(
            f"--image {path} has no transparent background, and removing it needs rembg: "
            "pip install 'rembg[cpu]', or pass a PNG with an alpha channel"
        ) from error
    return np.asarray(rembg.remove(rgba[..., :3].copy()))


def _squared(picture: Tensor) -> Tensor:
    """Padded with nothing to a square, the picture in its middle."""
    height, width = picture.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(picture, (left, side - width - left, top, side - height - top))


def _recentred(picture: Tensor) -> Tensor:
    """The object in the middle of a square of which its longer side is RECENTRED_SIDE."""
    there = picture[0, 3] > 0.5
    rows, columns = there.any(1).nonzero().flatten(), there.any(0).nonzero().flatten()
    part = picture[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    square = _squared(part)
    margin = round(square.shape[-1] * (1 / RECENTRED_SIDE - 1) / 2)
    return F.pad(square, (margin,) * 4)
