"""Views of a mesh that another tool has made, drawn on the CPU.

Files are read by trimesh. The object is centred, scaled to one size, and looked at by the cameras
that look at runs, so that no method gains by the size or the place of its objects. Light comes from
the viewer, mild, as runs are shown without shadows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsd_fast.config import CameraConfig
from dsd_fast.scene.cameras import eval_camera
from dsd_fast.scene.mesh_file import Z_UP, mesh_parts

log = logging.getLogger("dsd_fast.evaluate")

# Half the longest side of an object's bounding box, in units of the scene.
HALF_SIDE = 0.5
# What a surface that is seen edge-on keeps of its colour.
AMBIENT = 0.6
SUPERSAMPLING = 2
# Pixel tests that are held at once.
_BATCH = 1 << 22


@dataclass(frozen=True)
class Textured:
    """Triangles, and what colours them.

    points [V,3] float64 and normals [V,3], in our axes (z up, front on +x); triangles [T,3];
    colours [V,3] in [0,1], sRGB, or with a texture uvs [V,2] (v up) and texture [h,w,3].
    """

    points: np.ndarray
    normals: np.ndarray
    triangles: np.ndarray
    colours: np.ndarray | None = None
    uvs: np.ndarray | None = None
    texture: np.ndarray | None = None


def read_mesh(path: Path) -> list[Textured]:
    """All parts of a mesh, the whole of it centred and scaled.

    Raises:
        ImportError: trimesh is missing.
        ValueError: not a mesh, or one without a face that has an area.
    """
    axes = [0, 1, 2] if path.suffix.lower() in Z_UP else [2, 0, 1]
    is_gltf = path.suffix.lower() in (".glb", ".gltf")
    try:
        parts = [
            Textured(
                points=np.asarray(part.mesh.vertices, np.float64)[:, axes],
                normals=np.asarray(part.mesh.vertex_normals, np.float64)[:, axes],
                triangles=np.asarray(part.mesh.faces, np.int64),
                **_appearance(part.visual, len(part.mesh.vertices), is_gltf),
            )
            for part in mesh_parts(path)
        ]
    except (AttributeError, TypeError, IndexError, ArithmeticError) as error:
        raise ValueError(f"not a mesh: {type(error).__name__}: {error}") from error
    if not parts:
        raise ValueError("no triangles in it")
    used = np.concatenate([part.points[np.unique(part.triangles)] for part in parts])
    low, high = used.min(0), used.max(0)
    side = float((high - low).max())
    if not (np.isfinite(side) and side > 0):
        raise ValueError("its vertices are one point, or not finite")
    scale = 2 * HALF_SIDE / side
    return [replace(part, points=(part.points - (low + high) / 2) * scale) for part in parts]


def _appearance(visual: Any, n_vertices: int, is_gltf: bool) -> dict[str, np.ndarray]:
    """Fields of `Textured`; glTF's colours of vertices and materials are linear."""
    if visual.kind == "texture":
        material = visual.material
        image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
        if image is not None and visual.uv is not None:
            texture = np.asarray(image.convert("RGB"), np.float64) / 255
            return {"uvs": np.asarray(visual.uv, np.float64)[:, :2], "texture": texture}
        if is_gltf:
            # An absent factor is 1; trimesh's main_color would make it grey.
            factor = getattr(material, "baseColorFactor", None)
            colours = _unit(np.full(4, 255, np.uint8) if factor is None else factor)
            if "color" in visual.vertex_attributes:
                colours = colours * _unit(visual.vertex_attributes["color"])
        else:
            colours = _unit(material.main_color)
    elif visual.kind is None:
        return {"colours": np.full((n_vertices, 3), 0.7)}
    else:
        colours = _unit(visual.vertex_colors)
    colours = np.broadcast_to(colours, (n_vertices, 3))
    return {"colours": _srgb(colours) if is_gltf else colours}


def _unit(colours: np.ndarray) -> np.ndarray:
    """The first three channels of colours [...,3+] as float64 in [0,1]."""
    colours = np.asarray(colours)
    largest = np.iinfo(colours.dtype).max if colours.dtype.kind in "ui" else 1
    return colours[..., :3].astype(np.float64) / largest


def _srgb(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def render_views(
    path: Path, azimuths: np.ndarray, size: int, grey: float, cfg: CameraConfig | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Views of a mesh over grey by evaluation cameras at azimuths [V].

    Returns:
        [V,size,size,3] uint8, and where the mesh is, [V,size,size] bool.
    Args:
        cfg: distance, height and field of view of the cameras; default the configuration's own.
    Raises: as `read_mesh`.
    """
    parts = read_mesh(path)
    views = [
        _view(parts, azimuth, size, grey, cfg or CameraConfig()) for azimuth in azimuths.tolist()
    ]
    images, masks = zip(*views)
    return np.stack(images), np.stack(masks)


def _view(
    parts: list[Textured], azimuth: float, size: int, grey: float, cfg: CameraConfig
) -> tuple[np.ndarray, np.ndarray]:
    n = size * SUPERSAMPLING
    camera = eval_camera(cfg, azimuth, size=(n, n))
    c2w = camera.c2w[0].double().numpy()
    focal = 0.5 * n / np.tan(0.5 * float(camera.fovy[0]))
    image = np.full((n * n, 3), grey)
    depth = np.full(n * n, np.inf)
    for part in parts:
        seen = (part.points - c2w[:3, 3]) @ c2w[:3, :3]  # the camera looks along -z
        z = -seen[:, 2]
        at = np.stack([0.5 * n + focal * seen[:, 0] / z, 0.5 * n - focal * seen[:, 1] / z], 1)
        pixels, triangle, weights = _covered(at, z, part.triangles, n, depth)
        if len(pixels):
            image[pixels] = _shaded(part, triangle, weights, c2w[:3, 3])
    image = image.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean((1, 3))
    hit = np.isfinite(depth).reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean((1, 3))
    return (image.clip(0, 1) * 255).round().astype(np.uint8), hit > 0.5


def _covered(
    at: np.ndarray, z: np.ndarray, triangles: np.ndarray, n: int, depth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of an n x n image that triangles are nearest at: pixel, triangle, weights [P,3].

    Args:
        at: [V,2] places in pixels; z: [V] depths; depth: [n*n] nearest so far, brought up to date.
    """
    corners = at[triangles]  # [T,3,2]
    u, v = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]
    # pixel centres lie at i + 0.5
    low = np.ceil(corners.min(1) - 0.5).clip(0, n).astype(np.int64)
    high = (np.floor(corners.max(1) - 0.5) + 1).clip(0, n).astype(np.int64)
    extent = (high - low).max(1)
    usable = (area != 0) & (high > low).all(1) & (z[triangles] > 1e-6).all(1)
    owner = np.full(n * n, -1)
    shares = np.zeros((n * n, 3))
    reach = 1
    while reach < 2 * n:
        mine = np.flatnonzero(usable & (extent <= reach) & (extent > reach // 2))
        grid = np.stack(np.divmod(np.arange(reach * reach), reach)[::-1], 1)  # [k*k,2]
        for chunk in np.array_split(mine, -(-len(mine) * reach * reach // _BATCH) or 1):
            place = low[chunk, None] + grid  # [t,k*k,2]
            p = place + 0.5 - corners[chunk, :1]
            b = (p[..., 0] * v[chunk, None, 1] - p[..., 1] * v[chunk, None, 0]) / area[chunk, None]
            c = (u[chunk, None, 0] * p[..., 1] - u[chunk, None, 1] * p[..., 0]) / area[chunk, None]
            inside = (b >= 0) & (c >= 0) & (b + c <= 1) & (place < high[chunk, None]).all(-1)
            row, cell = np.nonzero(inside)
            if not len(row):
                continue
            b, c, face = b[row, cell], c[row, cell], chunk[row]
            # what is linear in space is linear in the image once divided by depth
            w = np.stack([1 - b - c, b, c], 1) / z[triangles[face]]
            far = 1 / w.sum(1)
            pixel = place[row, cell, 1] * n + place[row, cell, 0]
            order = np.lexsort((far, pixel))
            pixel, first = np.unique(pixel[order], return_index=True)
            best = order[first]
            nearer = far[best] < depth[pixel]
            pixel, best = pixel[nearer], best[nearer]
            depth[pixel], owner[pixel] = far[best], face[best]
            shares[pixel] = w[best] * far[best, None]
        reach *= 2
    pixels = np.flatnonzero(owner >= 0)
    return pixels, owner[pixels], shares[pixels]


def _shaded(
    part: Textured, triangle: np.ndarray, weights: np.ndarray, eye: np.ndarray
) -> np.ndarray:
    """Colours [P,3] of points by the triangles they lie in and their weights [P,3] there."""

    def interpolated(values: np.ndarray) -> np.ndarray:
        return np.einsum("pk,pkd->pd", weights, values[part.triangles[triangle]])

    if part.colours is not None:
        colours = interpolated(part.colours)
    else:
        assert part.uvs is not None and part.texture is not None
        height, width = part.texture.shape[:2]
        u, v = interpolated(part.uvs).T
        column = np.floor(u % 1.0 * width).astype(np.int64) % width
        row = np.floor((1.0 - v % 1.0) * height).astype(np.int64) % height
        colours = part.texture[row, column]
    normal = interpolated(part.normals)
    to_eye = eye - interpolated(part.points)
    lengths = np.linalg.norm(normal, axis=1) * np.linalg.norm(to_eye, axis=1)
    # either side of a surface may be seen
    facing = np.abs((normal * to_eye).sum(1)) / np.maximum(lengths, 1e-12)
    return colours * (AMBIENT + (1 - AMBIENT) * facing)[:, None]
