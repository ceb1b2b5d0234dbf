"""What reconstruction from one picture is told, and the picture itself."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from dsd_fast.picture_file import read_rgba
from dsd_fast.ranges import AnyPath, Bins, ViewElevation, Weight
from dsd_fast.schedules import ScheduleValue

log = logging.getLogger(__name__)

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
# An object that comes nearer to an edge of the square, in shares of its side, is recentred unasked:
# cut-outs of shops and catalogues end where the object does, and what fills a view to its edge has
# no room in it once it is turned.
LEAST_MARGIN = 0.025


@dataclass
class SingleViewConfig:
    # Picture of the object: with an alpha channel, or with a background that rembg removes.
    image: Annotated[AnyPath | None, tyro.conf.arg(name="image", prefix_name=False)] = None
    # Elevation in degrees from which the picture was taken; azimuth 0 is where it was taken from.
    elevation: ViewElevation = 5.0
    # Centre the picture on the object, at the size of the model's training pictures; an object that
    # reaches an edge of the picture is centred in any case.
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
        [1,4,S,S] float32 in [0,1] on the CPU, straight alpha; beyond the picture there is nothing.
        S is at most LARGEST_SIDE, and a third more where recentring adds margins: larger pictures
        are made smaller.
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
    rows, columns = (np.flatnonzero(there.any(axis)) for axis in (1, 0))
    if not len(rows):
        raise ValueError(f"--image {path}: it shows no object; check its alpha channel")
    around = _Box(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
    whole = _Box(0, there.shape[0], 0, there.shape[1])
    if recenter and around.side < LEAST_SIDE:
        raise ValueError(
            f"--image {path}: the object has {around.width} x {around.height} pixels, "
            f"expected at least {LEAST_SIDE} on one side; pass a larger picture of it"
        )
    # Of the square that it is looked at in, which is not made before.
    cover = np.count_nonzero(there) / (around if recenter else whole).side ** 2
    if cover < LEAST_COVER:
        what = f"in a square around it the object ({around.width} x {around.height} pixels)"
        raise ValueError(
            f"--image {path}: {what if recenter else 'padded to a square, the object'} covers "
            f"{cover:.2%}, expected at least {LEAST_COVER:.1%}; "
            + ("it is too thin" if recenter else "crop it, pass --single-view.recenter")
            + ", or check its alpha channel"
        )
    if recenter:
        return _square(rgba, around, RECENTRED_SIDE)
    if around.margin_in(whole) < LEAST_MARGIN:
        _say_recentred(path)
        return _square(rgba, around, RECENTRED_SIDE)
    return _square(rgba, whole)


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


@functools.cache
def _say_recentred(path: Path) -> None:
    """Once for all the times that a session reads a picture: for each scene and for the model."""
    log.info(
        "%s: the object reaches the picture's edge: it is centred with room around it, as with "
        "--single-view.recenter",
        path,
    )


class _Box(NamedTuple):
    """Rows and columns of a picture, their ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def side(self) -> int:
        return max(self.height, self.width)

    def margin_in(self, outer: _Box) -> float:
        """Least distance to an edge of the square around the middle of `outer`, in its sides."""
        down = outer.side - outer.height + 2 * min(self.top - outer.top, outer.bottom - self.bottom)
        across = (
            outer.side - outer.width + 2 * min(self.left - outer.left, outer.right - self.right)
        )
        return min(down, across) / (2 * outer.side)


def _square(rgba: np.ndarray, box: _Box, share: float = 1.0) -> Tensor:
    """The square around the middle of a box, whose longer side is `share` of the square's.

    Args:
        rgba: [h,w,4] uint8; the square may reach beyond it, where nothing is.
    Returns:
        [1,4,S,S] float32 in [0,1]; its part of the picture has at most LARGEST_SIDE pixels a side,
        means over whole pixels of a larger one.
    """
    side = round(box.side / share)
    top, left = box.top - (side - box.height) // 2, box.left - (side - box.width) // 2
    part = rgba[max(top, 0) : top + side, max(left, 0) : left + side]
    factor = -(-max(part.shape[:2]) // LARGEST_SIDE)
    picture = torch.from_numpy(_reduced(part, factor).astype(np.float32) / 255)
    height, width = picture.shape[:2]
    side = max(-(-side // factor), height, width)
    above = min(max(-top, 0) // factor, side - height)
    before = min(max(-left, 0) // factor, side - width)
    padding = (before, side - width - before, above, side - height - above)
    return F.pad(picture.permute(2, 0, 1)[None], padding)


def _reduced(rgba: np.ndarray, factor: int) -> np.ndarray:
    """[h,w,4] uint8 made smaller, colours weighted with alpha."""
    if factor == 1:
        return rgba
    from PIL import Image

    small = Image.fromarray(rgba).convert("RGBa").reduce(factor)
    return np.asarray(small.convert("RGBA"))
