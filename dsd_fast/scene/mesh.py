"""From a field to a mesh with vertex colours.

The density is sampled on a coarse grid, the box is tightened around what was found and sampled
again, marching cubes makes the surface, small floating components go, vertices take the albedo of
the field, and everything is written as one GLB file. The diffusion model is never loaded.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval
from pydantic import AfterValidator

from dsd_fast.output_file import writing
from dsd_fast.ranges import CountOrNone, Share, check
from dsd_fast.scene.field import Field
from dsd_fast.scene.material import albedo_color

# Points a density query may hold at once: bounds the memory of the encoding, not the result.
QUERY_POINTS = 1 << 18

# glTF is y-up and an asset's front faces +z; the field is z-up with its front on +x. This cyclic
# exchange of axes is a rotation, so the orientation of the triangles survives.
FIELD_TO_GLTF = (1, 2, 0)


def _known_iso(iso: str) -> str:
    with contextlib.suppress(ValueError):
        if iso == "auto" or 0 < float(iso) < math.inf:
            return iso
    raise ValueError(f'expected "auto" or a number above 0, got {iso!r}')


class MeshError(RuntimeError):
    """No mesh can be made from this field with these settings."""


GridPoints = Annotated[int, Interval(ge=2, le=1024)]
Iso = Annotated[str, AfterValidator(_known_iso)]


@dataclass
class MeshConfig:
    """How a mesh is cut out of the density."""

    # Grid points along the longest side of the box.
    resolution: GridPoints = 192
    # Density of the surface: a number, or "auto" for the mean density of non-empty grid points.
    iso: Iso = "auto"
    # Components with fewer faces than this fraction of the largest one are dropped.
    min_component: Share = 0.01
    # Larger meshes are decimated to this many faces (needs fast-simplification). 0 keeps all.
    max_faces: CountOrNone = 0


@dataclass(frozen=True)
class Mesh:
    """Triangles in field coordinates (z up); albedo is sRGB in [0, 1]."""

    vertices: np.ndarray  # [V, 3] float32
    faces: np.ndarray  # [F, 3] int64, counter-clockwise seen from outside
    albedo: np.ndarray  # [V, 3] float32


def make_mesh(
    field: Field,
    radius: float,
    cfg: MeshConfig,
    device: torch.device,
    tell: Callable[[str], None] | None = None,
) -> Mesh:
    """The surface of ``field`` at the configured density.

    ``field.density(points[N, 3]) -> [N]`` and ``field(points, normals=False).features`` are queried
    in the box [-radius, radius]^3. ``tell`` gets a line on how the density is spread, by which a
    person chooses another one. Raises ConfigError for settings that cannot work, MeshError when the
    surface is empty.
    """
    check(cfg)
    box = np.array([[-radius] * 3, [radius] * 3])
    density, axes = _density_grid(field, box, max(cfg.resolution // 2, 16), device)
    iso = _iso_value(cfg.iso, density)
    if tell is not None:
        tell(_histogram(density, iso))
    inside = np.argwhere(density > iso)
    if len(inside) == 0:
        raise MeshError(
            f"no surface: the density never exceeds iso = {iso:.4g}, its maximum is "
            f"{density.max():.4g}. Pass a lower iso, or train longer if no object has formed yet."
        )
    found = np.stack(
        [[axis[i] for axis, i in zip(axes, corner)] for corner in (inside.min(0), inside.max(0))]
    )
    # Ten percent around the coarse extent, and at least the coarse cell that holds the surface.
    margin = np.maximum(0.1 * (found[1] - found[0]), [axis[1] - axis[0] for axis in axes])
    box = np.stack([np.maximum(found[0] - margin, -radius), np.minimum(found[1] + margin, radius)])
    density, axes = _density_grid(field, box, cfg.resolution, device)
    vertices, faces = _marching_cubes(density, axes, iso)
    vertices, faces = _largest_components(vertices, faces, cfg.min_component)
    if cfg.max_faces and len(faces) > cfg.max_faces:
        vertices, faces = _decimate(vertices, faces, cfg.max_faces)
    return Mesh(vertices, faces, _albedo(field, vertices, device))


def write_glb(mesh: Mesh, path: Path) -> None:
    """Write ``mesh`` as binary glTF 2.0 (y up, front +z), atomically; OSError names the file.

    Colours are linear, as glTF wants them, and 32-bit floats: eight linear bits band visibly in
    dark tones, and of sixteen trimesh reads the lower half. There is no material: of a mesh that
    has one trimesh forgets the colours of the vertices.
    """
    positions = np.ascontiguousarray(mesh.vertices[:, FIELD_TO_GLTF], dtype="<f4")
    normals = np.ascontiguousarray(_vertex_normals(positions, mesh.faces), dtype="<f4")
    srgb = np.clip(mesh.albedo.astype(np.float64), 0.0, 1.0)
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    colors = np.ascontiguousarray(linear, dtype="<f4")
    indices = np.ascontiguousarray(mesh.faces.reshape(-1), dtype="<u4")

    binary = b"".join(array.tobytes() for array in (positions, normals, colors, indices))
    text = json.dumps(_gltf(positions, normals, colors, indices)).encode()
    text += b" " * (-len(text) % 4)
    with writing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(binary)))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", len(binary), b"BIN\0") + binary)


def _gltf(
    positions: np.ndarray, normals: np.ndarray, colors: np.ndarray, indices: np.ndarray
) -> dict[str, Any]:
    """The document about these arrays, which follow each other in one buffer."""
    float32, uint32 = 5126, 5125
    array_buffer, element_buffer = 34962, 34963
    accessors: list[dict[str, Any]] = []
    views: list[dict[str, int]] = []
    size = 0
    for array, component, kind, target in (
        (positions, float32, "VEC3", array_buffer),
        (normals, float32, "VEC3", array_buffer),
        (colors, float32, "VEC3", array_buffer),
        (indices, uint32, "SCALAR", element_buffer),
    ):
        about = {"bufferView": len(views), "componentType": component, "count": len(array)}
        accessors.append({**about, "type": kind})
        span = {"buffer": 0, "byteOffset": size, "byteLength": array.nbytes}
        views.append({**span, "target": target})
        size += array.nbytes  # Every element is a multiple of 4 bytes, so views stay aligned.
    # The one accessor that must state its bounds.
    accessors[0] |= {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}

    attributes = {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2}
    return {
        "asset": {"version": "2.0", "generator": "dsd_fast"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": attributes, "indices": 3}]}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": size}],
    }


@torch.no_grad()
def _density_grid(
    field: Field, box: np.ndarray, resolution: int, device: torch.device
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Density [X, Y, Z] float32 on a grid of nearly cubic cells over ``box``, and its axes."""
    extent = box[1] - box[0]
    counts = np.maximum(np.ceil(extent / extent.max() * resolution).astype(int), 2)
    axes = [np.linspace(low, high, n) for low, high, n in zip(box[0], box[1], counts)]
    x, y, z = (torch.as_tensor(axis, dtype=torch.float32, device=device) for axis in axes)
    density = np.empty(counts, dtype=np.float32)
    slab = max(QUERY_POINTS // (len(y) * len(z)), 1)
    for start in range(0, len(x), slab):
        points = torch.stack(torch.meshgrid(x[start : start + slab], y, z, indexing="ij"), dim=-1)
        values = field.density(points.reshape(-1, 3))
        density[start : start + slab] = values.reshape(points.shape[:3]).cpu().numpy()
    if not np.isfinite(density).all():
        raise MeshError(
            "the density is not finite: this checkpoint holds a broken field, export an older one"
        )
    return density, axes


def _iso_value(iso: str, density: np.ndarray) -> float:
    """The surface level: a number, or for "auto" the mean over points that hold any density."""
    if iso != "auto":
        return float(iso)
    filled = density[density > 1e-5]
    return float(filled.mean()) if len(filled) else 0.0


def _histogram(density: np.ndarray, iso: float) -> str:
    edges = np.array([0.0, 0.01, 0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, np.inf])
    counts, _ = np.histogram(density, bins=edges)
    share = 100 * counts / density.size
    bins = "  ".join(f">={edge:g}: {part:.2f}%" for edge, part in zip(edges, share))
    return f"density  {bins}  max {density.max():.4g}; surface at iso = {iso:.4g}"


def _marching_cubes(
    density: np.ndarray, axes: list[np.ndarray], iso: float
) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] in field coordinates and outward-facing triangles; closed at the box."""
    from skimage.measure import marching_cubes

    # A layer of empty space closes surfaces that reach the edge of the box.
    padded = np.pad(density, 1, constant_values=0.0)
    if not 0.0 < iso < padded.max():
        raise MeshError(
            f"no surface at iso = {iso:.4g}: it must lie between 0 and the largest density, "
            f"{density.max():.4g}"
        )
    # "ascent" is what makes scikit-image's triangles counter-clockwise seen from low density.
    vertices, faces, _, _ = marching_cubes(padded, level=iso, gradient_direction="ascent")
    vertices = np.clip(vertices - 1, 0, np.array(density.shape) - 1)
    origin = np.array([axis[0] for axis in axes])
    cell = np.array([axis[1] - axis[0] for axis in axes])
    return (origin + vertices * cell).astype(np.float32), faces.astype(np.int64)


def _largest_components(
    vertices: np.ndarray, faces: np.ndarray, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Keep the connected components with at least ``fraction`` of the faces of the largest one."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]])
    graph = coo_matrix((np.ones(len(edges), bool), edges.T), shape=(len(vertices), len(vertices)))
    _, label = connected_components(graph, directed=False)
    face_label = label[faces[:, 0]]
    size = np.bincount(face_label)
    faces = faces[(size >= fraction * size.max())[face_label]]
    used, faces = np.unique(faces, return_inverse=True)
    return vertices[used], faces.reshape(-1, 3)


def _decimate(
    vertices: np.ndarray, faces: np.ndarray, max_faces: int
) -> tuple[np.ndarray, np.ndarray]:
    try:
        import fast_simplification
    except ImportError as error:
        raise MeshError(
            f"the mesh has {len(faces)} faces and max_faces is {max_faces}, but decimation needs "
            "a package: pip install 'dsd_fast[mesh]', or set max_faces to 0"
        ) from error
    vertices, faces, *_ = fast_simplification.simplify(vertices, faces, target_count=max_faces)
    if not len(faces):
        raise MeshError(f"max_faces: {max_faces} leave nothing of the mesh, pass more")
    return vertices.astype(np.float32), faces.astype(np.int64)


@torch.no_grad()
def _albedo(field: torch.nn.Module, vertices: np.ndarray, device: torch.device) -> np.ndarray:
    """The field's albedo [V, 3] at the vertices."""
    chunks = torch.from_numpy(vertices).split(QUERY_POINTS)
    colors = [albedo_color(field(p.to(device), normals=False).features).cpu() for p in chunks]
    return torch.cat(colors).numpy()


def _vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit vertex normals [V, 3], each the area-weighted mean of its faces' normals."""
    a, b, c = (vertices[faces[:, corner]].astype(np.float64) for corner in range(3))
    face_normals = np.cross(b - a, c - a)
    normals = np.stack(
        [
            np.bincount(faces.reshape(-1), np.repeat(face_normals[:, k], 3), len(vertices))
            for k in range(3)
        ],
        axis=1,
    )
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    # glTF demands unit normals, also where degenerate faces cancel.
    return np.where(length > 0, normals / np.maximum(length, 1e-30), [0.0, 1.0, 0.0])
