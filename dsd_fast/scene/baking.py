"""From a field to the texture of its surface: what rays see that fall on it along its normals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dsd_fast import ops
from dsd_fast.asset.model import tangents
from dsd_fast.scene.atlas import Atlas
from dsd_fast.scene.field import FieldOutput
from dsd_fast.scene.material import albedo_color
from dsd_fast.scene.mesh_scene import Surface
from dsd_fast.scene.simplify import FineNormals
from dsd_fast.scene.surface import QUERY_POINTS
from dsd_fast.scene.texture import filled

# Rays begin so many steps of a rendering above the surface, in the fog that pictures see too, and
# end so many below it, or where less than this is left of the light.
ABOVE, BELOW = 2.0, 8.0
DARK = 0.02
# Steps of a ray in one of a rendering: the texture's rays are few, and its bands would be seen.
STEPS = 2
# Texels that are looked at in one go.
MOST_TEXELS = 1 << 20


class Colored(Protocol):
    def density(self, points: Tensor) -> Tensor: ...

    def __call__(self, points: Tensor, normals: bool = ..., /) -> FieldOutput: ...


@torch.no_grad()
def seen_colors(
    field: Colored, points: np.ndarray, normals: np.ndarray, step: float, device: torch.device
) -> np.ndarray:
    """What is seen of points [N,3] along their normals [N,3]: sRGB in [0,1], float32 [N,3].

    The rendering's sum over a ray (Max 1995), of the field's albedo, as a share of what it gathers.
    A ray that would begin inside of another part begins behind that.

    Args:
        step: of renderings, in the field's units.
    """
    found = []
    for at, n in zip(
        torch.from_numpy(np.ascontiguousarray(points, np.float32)).split(QUERY_POINTS),
        torch.from_numpy(np.ascontiguousarray(normals, np.float32)).split(QUERY_POINTS),
    ):
        found.append(_seen(field, at.to(device), n.to(device), step / STEPS).cpu())
    return torch.cat(found).numpy() if found else np.zeros((0, 3), np.float32)


def _seen(field: Colored, points: Tensor, normals: Tensor, step: float) -> Tensor:
    n_above, n_below = round(ABOVE * STEPS), round(BELOW * STEPS)
    # From the surface outwards density falls; where it rises again something else begins.
    begin = torch.full((len(points),), float(n_above), device=points.device)
    last = field.density(points)
    for k in range(n_above):
        density = field.density(points + normals * ((k + 0.5) * step))
        blocked = (density > last) & (begin == n_above)
        begin = torch.where(blocked, torch.full_like(begin, float(k)), begin)
        last = density
    color = torch.zeros(len(points), 3, device=points.device)
    light = torch.ones(len(points), device=points.device)
    live = torch.arange(len(points), device=points.device)
    for k in range(n_above + n_below):
        height = n_above - 0.5 - k  # in steps above the surface
        here = live[begin[live] > height]
        out = field(points[here] + normals[here] * (height * step), False)
        weight = light[here] * (1 - (-out.density * step).exp())
        color.index_add_(0, here, weight[:, None] * albedo_color(out.features))
        light[here] -= weight
        live = live[light[live] > DARK]
        if not len(live):
            break
    gathered = 1 - light
    # What gathers next to nothing has the colour that the field has there.
    own = albedo_color(field(points, False).features)
    seen = color / gathered.clamp_min(1e-6)[:, None]
    return torch.where(gathered[:, None] > 0.05, seen, own)


class Baked(NamedTuple):
    texture: np.ndarray  # uint8 [S,S,3] sRGB, row 0 the upper one
    normal_map: np.ndarray | None  # uint8 [S,S,3], in the tangent space of `tangents`


def bake_field(
    field: Colored,
    surface: Surface,
    fine: FineNormals,
    atlas: Atlas,
    size: int,
    step: float,
    device: torch.device,
    with_normals: bool = True,
) -> Baked:
    """Colours of a field and normals of the fine surface as textures of a coarse one.

    Texels off the surface have the nearest one's, so that nothing foreign comes in where textures
    are made smaller.
    """
    points, normals = surface.points[atlas.vertices], surface.normals[atlas.vertices]
    frame = tangents(points, normals, atlas.faces, atlas.uvs)
    texture = np.zeros((size * size, 3), np.float32)
    bumps = np.zeros((size * size, 3), np.float32) if with_normals else None
    known = np.zeros(size * size, bool)
    for texels, triangles, weights in _texels(atlas, size):
        corners = atlas.faces[triangles]

        def mean(values: np.ndarray, c: np.ndarray = corners, w: np.ndarray = weights):
            return np.einsum("nk,nkd->nd", w, values[c].astype(np.float64))

        at, base = mean(points), _unit(mean(normals))
        detail = fine.at(at, base)
        texture[texels] = seen_colors(field, at, detail, step, device)
        known[texels] = True
        if bumps is not None:
            along = mean(frame[:, :3])
            along = _unit(along - base * (along * base).sum(1, keepdims=True))
            across = np.cross(base, along) * frame[corners[:, 0], 3:]
            parts = [(detail * axis).sum(1) for axis in (along, across, base)]
            bumps[texels] = np.stack(parts, 1)
    shape = (size, size, 3)
    at_all = known.reshape(size, size)
    colors = _bytes(filled(texture.reshape(shape), at_all).clip(0, 1))
    if bumps is None:
        return Baked(colors, None)
    return Baked(colors, _bytes(0.5 + 0.5 * filled(bumps.reshape(shape), at_all).clip(-1, 1)))


def _texels(atlas: Atlas, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Texels whose middle is on the surface, row * size + column [N], their triangles [N] and the
    weights of the corners there [N,3], in parts."""
    faces = torch.from_numpy(atlas.faces.astype(np.int32))
    rows = max(MOST_TEXELS // size, 1)
    uvs = atlas.uvs.astype(np.float64)
    zeros = np.zeros(len(uvs))
    for top in range(0, size, rows):
        n_rows = min(rows, size - top)
        # Row r of the texture reaches from v = 1 - r / size down to 1 - (r + 1) / size.
        down = (1 - uvs[:, 1]) * size - top
        flat = np.stack([2 * uvs[:, 0] - 1, 1 - 2 * down / n_rows, zeros, zeros + 1], 1)
        clip = torch.from_numpy(flat[None].astype(np.float32))
        found = ops.rasterize(clip, faces, n_rows, size)
        ids, weights = found.ids.numpy().reshape(-1), found.weights.numpy().reshape(-1, 3)
        texels = np.flatnonzero(ids >= 0)
        yield texels + top * size, ids[texels], weights[texels]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _bytes(values: np.ndarray) -> np.ndarray:
    return (values * 255).round().astype(np.uint8)
