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

from dsd_fast.picture_file import read_rgba
from dsd_fast.ranges import AnyPath, Bins, ViewElevation, Weight
from dsd_fast.schedules import ScheduleValue

# Pictures whose alpha is above this everywhere have a background.
OPAQUE_ALPHA = 250
# Least share of the square around a picture, or around its object if that is asked for, that the
# object must cover.
LEAST_COVER = 0.005
# Least pixels of the longer side of an object that the picture is cropped to.
LEAST_SIDE = 4
# Pictures with a longer side are made smaller: no model and no view shows more.
LARGEST_SIDE = 2048
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
        path: of a PNG, JPEG or WebP file; a grey or colour picture without alpha, or with one that
            is opaque everywhere, loses its background through rembg.
        recenter: see SingleViewConfig.
    Returns:
        [1,4,S,S] float32 in [0,1] on the CPU, straight alpha; the shorter side is padded with
        nothing. S is at most LARGEST_SIDE, and a third more where `recenter` adds margins: larger
        pictures are made smaller.
    Raises:
        FileNotFoundError: there is no such file, or none was named.
        ValueError: it cannot be read as a picture, or shows no object that can be seen.
        ImportError: its background is to be removed and rembg is not installed.
    """
    if path is None:
        raise FileNotFoundError("--task single-view needs a picture: pass --image chair.png")
    try:
        rgba = read_rgba(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--image {error}") from None
    except ValueError as error:
        raise ValueError(f"--image: {error}") from error
    if rgba[..., 3].min() > OPAQUE_ALPHA:
        rgba = _without_background(rgba, path)
    there = rgba[..., 3] > 127
    if recenter:
        rows, columns = (np.flatnonzero(there.any(axis)) for axis in (1, 0))
        if not len(rows):
            raise ValueError(f"--image {path}: it shows no object; check its alpha channel")
        around = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        rgba, there = rgba[around], there[around]
        if max(there.shape) < LEAST_SIDE:
            raise ValueError(
                f"--image {path}: the object has {there.shape[1]} x {there.shape[0]} pixels, "
                f"expected at least {LEAST_SIDE} on one side; pass a larger picture of it"
            )
    # Of the square that it is looked at in, which is not made before.
    height, width = there.shape
    cover = np.count_nonzero(there) / max(height, width) ** 2
    if cover < LEAST_COVER:
        what = f"in a square around it the object ({width} x {height} pixels)"
        raise ValueError(
            f"--image {path}: {what if recenter else 'padded to a square, the object'} covers "
            f"{cover:.2%}, expected at least {LEAST_COVER:.1%}; "
            + ("it is too thin" if recenter else "crop it, pass --single-view.recenter")
            + ", or check its alpha channel"
        )
    square = _squared(_to_tensor(_no_larger(rgba)))
    if not recenter:
        return square
    margin = round(square.shape[-1] * (1 / RECENTRED_SIDE - 1) / 2)
    return F.pad(square, (margin,) * 4)


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


def _without_background(rgba: np.ndarray, path: Path) -> np.ndarray:
    try:
        import rembg  # pyright: ignore[reportMissingImports]  # it is of no extra
    except ImportError as error:
        raise ImportError(
            f"--image {path} has no transparent background, and removing it needs rembg: "
            "pip install 'rembg[cpu]', or pass a PNG with an alpha channel"
        ) from error
    return np.asarray(rembg.remove(rgba[..., :3].copy()))


def _no_larger(rgba: np.ndarray) -> np.ndarray:
    """[h,w,4] uint8 whose longer side is at most LARGEST_SIDE, by means over whole pixels."""
    factor = -(-max(rgba.shape[:2]) // LARGEST_SIDE)
    if factor == 1:
        return rgba
    from PIL import Image

    # Colours are weighted with alpha.
    small = Image.fromarray(rgba).convert("RGBa").reduce(factor)
    return np.asarray(small.convert("RGBA"))


def _to_tensor(rgba: np.ndarray) -> Tensor:
    """[h,w,4] uint8 as [1,4,h,w] float32 in [0,1]."""
    return torch.from_numpy(rgba.astype(np.float32) / 255).permute(2, 0, 1)[None]


def _squared(picture: Tensor) -> Tensor:
    """Padded with nothing to a square, the picture in its middle."""
    height, width = picture.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(picture, (left, side - width - left, top, side - height - top))
