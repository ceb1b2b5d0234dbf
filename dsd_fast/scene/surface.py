"""The surface of a field at a level of its density: fine triangles, in the field's coordinates."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.scene.level import Dense, Level, find_level
from dsd_fast.scene.mesh_scene import Surface

log = logging.getLogger("dsd_fast")

# Points a density query may hold at once: bounds the memory of the encoding, not the result.
QUERY_POINTS = 1 << 18
# Points along the box in which an object is looked for.
COARSE = 128
# A cell belongs to what is looked at where its density could make a ray of the box's length this
# much darker.
_THIN = 0.02
# Of a logarithm of the density: what differs more from the level is no error of a grid's.
_NEAR = 0.5


class MeshError(RuntimeError):
    """No mesh can be made from this field with these settings."""


class Tell(Protocol):
    def __call__(self, line: str, /) -> object: ...


@torch.no_grad()
def fine_surface(
    field: Dense,
    radius: float,
    device: torch.device,
    resolution: int,
    iso: str,
    min_component: float,
    step: float,
    tell: Tell | None = None,
) -> Surface:
    """The surface where pictures show it, or at a given density.

    Args:
        field: asked in the box [-radius, radius]³, on the device.
        resolution: grid points along the longest side of the object.
        iso: density of the surface, or "auto" for that of `find_level`.
        min_component: parts with fewer faces than this share of the largest one are dropped.
        step: length of the steps in which pictures of the field are rendered.
        tell: gets a line on how the density is spread, by which a person chooses another one.
    Raises:
        MeshError: the density is nowhere so high, or not finite.
    """
    density, axes = _density_grid(field, np.array([[-radius] * 3, [radius] * 3]), COARSE, device)
    level = _level(field, density, radius, iso, step, device)
    if tell is not None:
        tell(_histogram(density, level))
    box = _box(density, axes, level, radius, device)
    density, axes = _density_grid(field, box, resolution, device)
    relative = _relative(level, density, axes, device)
    points, faces = _marching_cubes(relative, axes)
    points, faces = _whole_parts(points, faces, min_component)
    if not len(faces):
        raise MeshError("no surface: all of it is inside of other parts; pass a lower iso")
    cell = float(max(axis[1] - axis[0] for axis in axes))
    normals = vertex_normals(points, faces)
    points = _settle(field, level, points, normals, cell, radius, device)
    normals = _smoothed(vertex_normals(points, faces), faces)
    return Surface(points, normals.astype(np.float32), faces.astype(np.int32))


def _level(
    field: Dense, density: np.ndarray, radius: float, iso: str, step: float, device: torch.device
) -> Level:
    if iso != "auto":
        if not density.max() > float(iso):
            raise MeshError(_nothing(float(iso), density))
        return Level.constant(float(iso), device)
    filled = torch.from_numpy(density > _THIN / (2 * radius)).to(device)
    if not filled.any():
        raise MeshError(_nothing(_THIN / (2 * radius), density))
    # Points are corners of cells; a cell is marched through where a corner or a neighbour's is
    # filled.
    cells = F.max_pool3d(filled[None, None].float(), 4, 1, 2)[0, 0, 1:-1, 1:-1, 1:-1] > 0
    # What is dense enough to make a pixel opaque decides how large the object is.
    dense = torch.from_numpy(np.argwhere(density > min(0.5 / radius, 0.5 * density.max())))
    spacing = 2 * radius / (COARSE - 1)
    low, high = (end.float() * spacing - radius for end in (dense.amin(0), dense.amax(0)))
    with torch.enable_grad():
        level = find_level(field, cells.contiguous(), radius, low - spacing, high + spacing, step)
    if level is None:
        # Fog that everyone sees through has no outline; its thicker half is better than nothing.
        mean = float(density[density > _THIN / (2 * radius)].mean())
        log.warning(
            "no view of the object is opaque: the surface is at its mean density, %.4g", mean
        )
        return Level.constant(mean, device)
    return level


def _nothing(iso: float, density: np.ndarray) -> str:
    return (
        f"no surface: the density never exceeds iso = {iso:.4g}, its maximum is "
        f"{density.max():.4g}. Pass a lower iso, or train longer if no object has formed yet."
    )


def _box(
    density: np.ndarray, axes: list[np.ndarray], level: Level, radius: float, device: torch.device
) -> np.ndarray:
    """Corners [2,3] of what is inside of the surface, with a cell of the coarse grid around it."""
    inside = np.argwhere(_relative(level, density, axes, device) > 1)
    if not len(inside):
        raise MeshError(_nothing(float(level.logs.exp().mean()), density))
    spacing = axes[0][1] - axes[0][0]
    low, high = (
        np.array([axis[i] for axis, i in zip(axes, corner)])
        for corner in (inside.min(0), inside.max(0))
    )
    margin = 1.5 * spacing
    return np.stack([np.maximum(low - margin, -radius), np.minimum(high + margin, radius)])


def _density_grid(
    field: Dense, box: np.ndarray, resolution: int, device: torch.device
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Density [X, Y, Z] float32 on a grid of nearly cubic cells over ``box``, and its axes."""
    extent = box[1] - box[0]
    counts = np.maximum(np.ceil(extent / extent.max() * resolution).astype(int), 2)
    axes = [np.linspace(low, high, n) for low, high, n in zip(box[0], box[1], counts)]
    density = np.empty(counts, dtype=np.float32)
    for slab, points in _slabs(axes, device):
        values = field.density(points)
        density[slab] = values.reshape(density[slab].shape).cpu().numpy()
    if not np.isfinite(density).all():
        raise MeshError(
            "the density is not finite: this checkpoint holds a broken field, export an older one"
        )
    return density, axes


def _relative(
    level: Level, density: np.ndarray, axes: list[np.ndarray], device: torch.device
) -> np.ndarray:
    """As `Level.relative`, of the densities [X,Y,Z] of a grid."""
    relative = np.empty_like(density)
    for slab, points in _slabs(axes, device):
        own = torch.from_numpy(density[slab]).to(device).flatten()
        relative[slab] = level.relative(points, own).view(density[slab].shape).cpu().numpy()
    return relative


def _slabs(axes: list[np.ndarray], device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """The points [N,3] of a grid in parts, each with its rows."""
    x, y, z = (torch.as_tensor(axis, dtype=torch.float32, device=device) for axis in axes)
    n_rows = max(QUERY_POINTS // (len(y) * len(z)), 1)
    for start in range(0, len(x), n_rows):
        slab = slice(start, start + n_rows)
        yield slab, torch.stack(torch.meshgrid(x[slab], y, z, indexing="ij"), -1).reshape(-1, 3)


def _histogram(density: np.ndarray, level: Level) -> str:
    edges = np.array([0.0, 0.01, 0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, np.inf])
    counts, _ = np.histogram(density, bins=edges)
    share = 100 * counts / density.size
    bins = "  ".join(f">={edge:g}: {part:.2f}%" for edge, part in zip(edges, share))
    return f"density  {bins}  max {density.max():.4g}; surface at iso = {level}"


def _marching_cubes(relative: np.ndarray, axes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] of where a grid of densities, as multiples of the level, is one, in field
    coordinates, and outward-facing triangles; closed at the box."""
    from skimage.measure import marching_cubes

    # A layer of empty space closes surfaces that reach the edge of the box.
    padded = np.pad(relative, 1, constant_values=0.0)
    if not padded.max() > 1.0:
        raise MeshError("no surface: it is thinner than the grid; pass a larger resolution")
    # "ascent" is what makes scikit-image's triangles counter-clockwise seen from low density.
    vertices, faces, _, _ = marching_cubes(padded, level=1.0, gradient_direction="ascent")
    vertices = np.clip(vertices - 1, 0, np.array(relative.shape) - 1)
    origin = np.array([axis[0] for axis in axes])
    cell = np.array([axis[1] - axis[0] for axis in axes])
    return (origin + vertices * cell).astype(np.float32), faces.astype(np.int64)


def _whole_parts(
    points: np.ndarray, faces: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Without floating specks, which have less than ``share`` of the faces of the largest part, and
    without the walls of hollows, which nobody sees."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]])
    graph = coo_matrix((np.ones(len(edges), bool), edges.T), shape=(len(points), len(points)))
    n_parts, label = connected_components(graph, directed=False)
    part = label[faces[:, 0]]
    size = np.bincount(part, minlength=n_parts)
    corners = points[faces].astype(np.float64)
    six_volumes = np.einsum("fd,fd->f", corners[:, 0], np.cross(corners[:, 1], corners[:, 2]))
    # The surface of a hollow faces inwards.
    volume = np.bincount(part, six_volumes, n_parts)
    kept = (size >= share * size.max()) & (volume > 0)
    faces = faces[kept[part]]
    used, faces = np.unique(faces, return_inverse=True)
    return points[used], faces.reshape(-1, 3)


def _settle(
    field: Dense,
    level: Level,
    points: np.ndarray,
    normals: np.ndarray,
    cell: float,
    radius: float,
    device: torch.device,
) -> np.ndarray:
    """Points moved along their normals to where the field itself has the level: between grid points
    the density is not linear. Secant steps, which stay within half a cell. Where the surface is not
    of the level but of what is hidden, it stays."""
    settled = []
    for at, n in zip(
        torch.from_numpy(points).split(QUERY_POINTS),
        torch.from_numpy(normals.astype(np.float32)).split(QUERY_POINTS),
    ):
        at, n = at.to(device), n.to(device)

        def above(shift: Tensor, at: Tensor = at, n: Tensor = n) -> Tensor:
            moved = (at + n * shift[:, None]).clamp(-radius, radius)
            return field.density(moved).clamp_min(1e-6).log() - level.at(moved)

        shift = torch.zeros(len(at), device=device)
        of_level = above(shift).abs() < _NEAR
        for _ in range(2):
            here, out = above(shift), above(shift + 0.1 * cell)
            slope = (out - here) / (0.1 * cell)
            # Where it does not fall outwards there is nothing to follow.
            wanted = torch.where(slope < -1e-3, -here / slope, torch.zeros_like(here))
            shift = (shift + wanted).clamp(-0.5 * cell, 0.5 * cell)
        shift = torch.where(of_level, shift, 0.0)
        settled.append((at + n * shift[:, None]).clamp(-radius, radius).cpu())
    return torch.cat(settled).numpy()


def vertex_normals(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit vertex normals [V, 3], each the area-weighted mean of its faces' normals."""
    a, b, c = (points[faces[:, corner]].astype(np.float64) for corner in range(3))
    face_normals = np.cross(b - a, c - a)
    return _unit(_sums(np.repeat(face_normals, 3, 0), faces.reshape(-1), len(points)))


def _smoothed(normals: np.ndarray, faces: np.ndarray, rounds: int = 3) -> np.ndarray:
    """Normals [V,3] as means with their neighbours': what differs from cell to cell is the grid's,
    not the object's."""
    start, end = faces.reshape(-1), np.roll(faces, -1, 1).reshape(-1)
    for _ in range(rounds):
        near = _sums(normals[end], start, len(normals)) + _sums(normals[start], end, len(normals))
        normals = _unit(_unit(near) + normals)
    return normals


def _sums(values: np.ndarray, rows: np.ndarray, n: int) -> np.ndarray:
    return np.stack([np.bincount(rows, values[:, k], n) for k in range(3)], axis=1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    # Files demand unit normals, also where degenerate faces cancel.
    return np.where(length > 1e-20, vectors / np.maximum(length, 1e-20), [0.0, 0.0, 1.0])
