"""An object that is finished: triangles, what colours them, and what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

# glTF is y-up and an asset's front faces +z; the field is z-up with its front on +x. This cyclic
# exchange of axes is a rotation, so the orientation of the triangles survives.
FIELD_TO_GLTF = (1, 2, 0)
# What colours alone cannot say: nothing is metal, and highlights are wide.
METALLIC, ROUGHNESS = 0.0, 0.9


@dataclass(frozen=True)
class Asset:
    """Triangles as glTF has them, y up and the front on +z, coloured by a texture or by vertex.

    With a texture vertices on its seams are there more than once.
    """

    points: np.ndarray  # [V,3] float32, metres
    normals: np.ndarray  # [V,3] float32, unit
    faces: np.ndarray  # [F,3] int64, counter-clockwise seen from outside
    colors: np.ndarray  # [V,3] float32, sRGB in [0,1]
    uvs: np.ndarray | None = None  # [V,2] float32 in [0,1], v up
    texture: np.ndarray | None = None  # [S,S,3] uint8, sRGB, row 0 the upper one
    # [S,S,3] uint8: normals in the tangent space of `tangents`, green up.
    normal_map: np.ndarray | None = None
    name: str = "object"
    # What it was made of and how, in values of JSON.
    about: Mapping[str, Any] = field(default_factory=dict)

    def called(self, name: str, about: Mapping[str, Any]) -> Asset:
        """The same with a name, one line of at most 64 characters, and what is to be known."""
        return replace(self, name=" ".join(name.split())[:64] or "object", about=about)


def placed(points: np.ndarray, height: float | None, ground: bool) -> np.ndarray:
    """Points [V,3] of the field as an asset has them, [V,3] float32.

    Args:
        height: of the object in metres; None leaves a unit of the field one metre.
        ground: put it on y = 0, the middle of its bounding box above the origin; without, what was
            the field's middle stays in the origin.
    """
    turned = points.astype(np.float64)[:, FIELD_TO_GLTF]
    low, high = turned.min(0), turned.max(0)
    if ground:
        turned = turned - [(low[0] + high[0]) / 2, low[1], (low[2] + high[2]) / 2]
    if height is not None and high[1] > low[1]:
        turned = turned * (height / (high[1] - low[1]))
    return turned.astype(np.float32)


def tangents(
    points: np.ndarray, normals: np.ndarray, faces: np.ndarray, uvs: np.ndarray
) -> np.ndarray:
    """[V,4] float32: unit tangents along u, at right angles to the normals, and the side on which
    bitangents are, as glTF's TANGENT.

    Each is the mean of its triangles', weighted by the angle of their corners, which is MikkTSpace
    (Mikkelsen 2008) where vertices are apart on seams.
    """
    corners, at = points[faces].astype(np.float64), uvs[faces].astype(np.float64)
    edge, far = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    (du, dv), (eu, ev) = (at[:, 1] - at[:, 0]).T, (at[:, 2] - at[:, 0]).T
    area = du * ev - eu * dv
    along = (edge * ev[:, None] - far * dv[:, None]) * np.sign(area)[:, None]
    total, side = np.zeros((len(points), 3)), np.zeros(len(points))
    normals = normals.astype(np.float64)
    for k in range(3):
        vertex = faces[:, k]
        one, other = (corners[:, (k + i) % 3] - corners[:, k] for i in (1, 2))
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        angle = np.arccos(np.clip((one * other).sum(1) / np.maximum(lengths, 1e-30), -1, 1))
        n = normals[vertex]
        share = _unit(along - n * (n * along).sum(1, keepdims=True)) * angle[:, None]
        for axis in range(3):
            total[:, axis] += np.bincount(vertex, share[:, axis], len(points))
        side += np.bincount(vertex, np.sign(area) * angle, len(points))
    total -= normals * (normals * total).sum(1, keepdims=True)
    # A vertex without an area in the texture has any tangent.
    least = np.eye(3)[np.abs(normals).argmin(1)]
    any_other = np.cross(normals, least)
    lost = np.linalg.norm(total, axis=1, keepdims=True) < 1e-12
    unit = _unit(np.where(lost, any_other, total))
    return np.concatenate([unit, np.where(side < 0, -1.0, 1.0)[:, None]], 1).astype(np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)


def linear(srgb: np.ndarray) -> np.ndarray:
    """Colours in [0,1] without sRGB's curve (IEC 61966-2-1)."""
    srgb = np.clip(np.asarray(srgb, np.float64), 0.0, 1.0)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
