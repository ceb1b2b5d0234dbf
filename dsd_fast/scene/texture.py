"""What painting a mesh is told, and the mesh that comes of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from annotated_types import Interval

from dsd_fast import ops
from dsd_fast.asset import formats
from dsd_fast.asset.model import Asset
from dsd_fast.ranges import AnyPath, Count, CountOrNone
from dsd_fast.scene.atlas import Atlas, AtlasError, make_atlas, own_atlas
from dsd_fast.scene.mesh_file import MeshFile

log = logging.getLogger(__name__)

# Colours [N,3] in [0,1], sRGB, of points [N,3] of a surface.
ColorsOf = Callable[[np.ndarray], np.ndarray]

TextureSize = Literal[512, 1024, 2048, 4096]

# Samples of a texel, and of all texels that are looked at in one go.
TEXEL_SAMPLES = 4
MOST_SAMPLES = 1 << 22


@dataclass
class TextureConfig:
    # Mesh to paint (--task texture): .glb, .gltf, .obj, .ply or .stl of up to 500,000 triangles.
    mesh: Annotated[AnyPath | None, tyro.conf.arg(name="mesh", prefix_name=False)] = None
    # Rows and columns of the texture.
    size: TextureSize = 1024
    # Where the texture lies on the mesh: by the file's own coordinates ("keep"), by "new" ones, or
    # by its own where no two parts of the surface share a place ("auto").
    uv: Literal["auto", "keep", "new"] = "auto"
    # Seconds that new coordinates may take; after that, vertices are coloured instead.
    unwrap_seconds: Annotated[float, Interval(ge=1, le=86400)] = 120.0
    # The axis that points up in the file: "auto" is z for PLY and STL, y for the others.
    up: Literal["auto", "y", "z"] = "auto"
    # Degrees by which the mesh is turned around its vertical axis before it is looked at, so that
    # its front is where prompts say: on +z of glTF, on +x where z is up.
    turn: Annotated[float, Interval(ge=-360, le=360)] = 0.0
    # Samples of a rendering's pixel.
    samples: Literal[1, 4, 8] = 4

    # Of the mesh's file: a resumed run must find the same.
    digest: tyro.conf.Suppress[str] = ""


@dataclass
class RefineConfig:
    # Go on with the mesh of a finished object for so many steps, so that its texture comes out
    # crisp; 0 does not.
    steps: Annotated[CountOrNone, tyro.conf.arg(name="refine", prefix_name=False)] = 0
    # Triangles that the mesh is decimated to.
    max_faces: Count = 20_000
    # The run whose object it is (python -m dsd_fast.refine), as of its newest checkpoint.
    run: tyro.conf.Suppress[AnyPath | None] = None
    # Of that checkpoint: a resumed run must find the same.
    digest: tyro.conf.Suppress[str] = ""


def choose_atlas(mesh: MeshFile, uv: str, seconds: float) -> Atlas | None:
    """The atlas that the settings ask for; None, with a line in the log, where there can be none
    and vertices must be coloured.

    Args:
        uv, seconds: `TextureConfig.uv` and `unwrap_seconds`.
    Raises:
        AtlasError: own coordinates are asked for that are no atlas.
    """
    if uv != "new":
        try:
            return own_atlas(mesh.points, mesh.faces, mesh.uvs)
        except AtlasError as error:
            if uv == "keep":
                raise
            if mesh.uvs is not None:
                log.info("the mesh gets new texture coordinates: %s", error)
    try:
        return make_atlas(mesh.points, mesh.faces, seconds)
    except AtlasError as error:
        log.warning("the mesh gets colours of vertices, no texture: %s", error)
        return None


def bake(colors: ColorsOf, points: np.ndarray, atlas: Atlas, size: int) -> np.ndarray:
    """The texture of a surface, uint8 [size,size,3], sRGB, row 0 the upper one.

    A texel is the mean of those of its samples that are of the surface; texels of none have the
    nearest one's colour, so that nothing foreign comes in where textures are made smaller.

    Args:
        colors: asked for points on the surface.
        points: [V,3] of the mesh, as `colors` takes them.
    """
    uvs = atlas.uvs.astype(np.float64)
    faces = torch.from_numpy(atlas.faces.astype(np.int32))
    texture, count = np.zeros((size, size, 3)), np.zeros((size, size), np.int64)
    rows = max(MOST_SAMPLES // (size * TEXEL_SAMPLES), 1)
    for top in range(0, size, rows):
        strip = slice(top, min(top + rows, size))
        found = _strip(uvs, faces, size, strip)
        ids, weights = found.ids.numpy().reshape(-1), found.weights.numpy().reshape(-1, 3)
        samples = np.flatnonzero(ids >= 0)
        corners = points[atlas.vertices[atlas.faces[ids[samples]]]]
        at = np.einsum("nk,nkd->nd", weights[samples], corners)
        seen, texels = colors(at.astype(np.float32)), samples // TEXEL_SAMPLES
        n = count[strip].size
        count[strip] = np.bincount(texels, minlength=n).reshape(-1, size)
        for k in range(3):
            texture[strip, :, k] = np.bincount(texels, seen[:, k], n).reshape(-1, size)
    texture /= np.maximum(count, 1)[..., None]
    texture = filled(texture, count > 0)
    return (texture.clip(0, 1) * 255).round().astype(np.uint8)


def _strip(uvs: np.ndarray, faces: torch.Tensor, size: int, rows: slice) -> ops.Fragments:
    """What the texels of some rows see of the surface."""
    n_rows = rows.stop - rows.start
    # Row r of the texture reaches from v = 1 - r / size down to 1 - (r + 1) / size.
    down = (1 - uvs[:, 1]) * size - rows.start
    zeros = np.zeros(len(uvs))
    flat = np.stack([2 * uvs[:, 0] - 1, 1 - 2 * down / n_rows, zeros, zeros + 1], 1)
    clip = torch.from_numpy(flat[None].astype(np.float32))
    return ops.rasterize(clip, faces, n_rows, size, TEXEL_SAMPLES)


def filled(texture: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Texels [h,w,3] of which nothing is known have the colour of the nearest one that is."""
    from scipy.ndimage import distance_transform_edt

    if known.all() or not known.any():
        return texture
    nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)
    assert nearest is not None
    return texture[tuple(nearest)]


def write_painted(
    mesh: MeshFile,
    atlas: Atlas | None,
    colors: ColorsOf,
    points: np.ndarray,
    size: int,
    path: Path,
    about: Mapping[str, Any],
) -> None:
    """Write a painted mesh as binary glTF 2.0, atomically; OSError names the file.

    Vertices are the file's own, in its units, in glTF's axes; an atlas may repeat them. The same
    mesh and atlas give the same bytes of geometry and coordinates, whatever the colours.

    Args:
        atlas: None colours vertices.
        colors, points: as of `bake`.
        about: goes to the asset's extras.
    """
    at, corners = mesh.in_gltf(mesh.points), mesh.in_gltf(mesh.normals)
    painted = Asset(
        at.astype(np.float32),
        corners.astype(np.float32),
        mesh.faces,
        colors(points),
        name=path.stem,
        about=about,
    )
    if atlas is not None:
        painted = replace(
            painted,
            points=painted.points[atlas.vertices],
            normals=painted.normals[atlas.vertices],
            faces=atlas.faces,
            colors=painted.colors[atlas.vertices],
            uvs=atlas.uvs,
            texture=bake(colors, points, atlas, size),
        )
    formats.write(painted, path)
