"""Figures of an object's surface, from the normals and opacity of views around it.

They depend on the size of a pixel: views are rendered at SIZE, whatever is shown. All views count
together, each pixel alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsd_fast.scene.renderer import OPAQUE

# Pixels along a side of the views that figures are taken of.
SIZE = 128
# Pixels more opaque than this are covered: what lies below is invisible before any background.
COVERED = 0.05
# A connected piece with less than this share of the largest one's pixels is a speck; others are
# parts of the object that the view shows apart, as legs below a seat.
SPECK = 0.1


@dataclass(frozen=True)
class Surface:
    """How clean a surface is; None where views have no pixel to tell it by."""

    # Mean angle between normals of neighbouring pixels, degrees.
    roughness: float | None
    # Mean of 4a(1 - a) over covered pixels of opacity a: 0 is empty or opaque, 1 half transparent.
    fog: float | None
    # Pixels in specks, per cent of those that are opaque.
    specks: float | None


def surface(opacity: np.ndarray, normal: np.ndarray) -> Surface:
    """The figures of views of one object.

    Args:
        opacity: [V,H,W] in [0, 1].
        normal: [V,H,W,3] normals of any length, where opacity is above OPAQUE; zeros have none.
    Raises:
        ValueError: shapes that do not belong together.
    """
    opacity, normal = np.asarray(opacity, np.float64), np.asarray(normal, np.float64)
    if opacity.ndim != 3 or normal.shape != (*opacity.shape, 3):
        raise ValueError(
            "expected opacity [V,H,W] and normal [V,H,W,3] of the same views, got "
            f"{list(opacity.shape)} and {list(normal.shape)}"
        )
    return Surface(roughness(opacity, normal), fog(opacity), specks(opacity > OPAQUE))


def roughness(opacity: np.ndarray, normal: np.ndarray) -> float | None:
    """Mean angle in degrees between a pixel's normal and that of its neighbour to the right or
    below, over all pairs that are both more opaque than OPAQUE.

    Creases and steps of the object count too. A sphere with a radius of R pixels far away has a
    little less than 90 / R: the mean over its disc of the slope of its normal.

    Args:
        opacity: [V,H,W]; normal: [V,H,W,3].
    """
    length = np.linalg.norm(normal, axis=-1)
    inside = (opacity > OPAQUE) & (length > 0)
    n = normal / np.where(length > 0, length, 1)[..., None]
    down = n[:, 1:] - n[:, :-1], inside[:, 1:] & inside[:, :-1]
    right = n[:, :, 1:] - n[:, :, :-1], inside[:, :, 1:] & inside[:, :, :-1]
    chords = np.concatenate([np.linalg.norm(chord[both], axis=-1) for chord, both in (down, right)])
    # By the chord: exact for small angles too, unlike the arc cosine.
    angles = 2 * np.arcsin((0.5 * chords).clip(max=1))
    return float(np.rad2deg(angles.mean())) if len(angles) else None


def fog(opacity: np.ndarray) -> float | None:
    """Mean of 4a(1 - a) over pixels of opacity a > COVERED; opacity [V,H,W]."""
    a = opacity[opacity > COVERED]
    return float((4 * a * (1 - a)).mean()) if len(a) else None


def specks(masks: np.ndarray) -> float | None:
    """Per cent of set pixels of masks [V,H,W] in pieces, connected by sides or corners, with less
    than SPECK of the pixels of their view's largest one."""
    from scipy.ndimage import label

    lost = 0
    for mask in masks:
        pieces = np.empty(mask.shape, np.int32)
        if label(mask, np.ones((3, 3)), output=pieces):
            sizes = np.bincount(pieces.ravel())[1:]
            lost += int(sizes[sizes < SPECK * sizes.max()].sum())
    n_set = int(np.count_nonzero(masks))
    return 100 * lost / n_set if n_set else None
