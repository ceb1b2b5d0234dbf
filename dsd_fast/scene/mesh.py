"""From a field to an asset: the surface where pictures show it, with few triangles and a texture.

The diffusion model is never loaded. The steps are modules of their own: `level` (which density is
the surface), `surface` (fine triangles), `simplify`, `atlas`, `baking`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Interval
from pydantic import AfterValidator

from dsd_fast.asset.model import FIELD_TO_GLTF, Asset, placed
from dsd_fast.ranges import CountOrNone, Length, Share, check
from dsd_fast.scene.atlas import AtlasError, make_atlas
from dsd_fast.scene.baking import bake_field, seen_colors
from dsd_fast.scene.mesh_scene import Surface
from dsd_fast.scene.simplify import FineNormals, simplified
from dsd_fast.scene.surface import fine_surface

log = logging.getLogger(__name__)


def _known_iso(iso: str) -> str:
    with contextlib.suppress(ValueError):
        if iso == "auto" or 0 < float(iso) < math.inf:
            return iso
    raise ValueError(f'expected "auto" or a number above 0, got {iso!r}')


GridPoints = Annotated[int, Interval(ge=2, le=1024)]
Iso = Annotated[str, AfterValidator(_known_iso)]
# 0 is none.
TextureSize = Literal[0, 512, 1024, 2048, 4096]
Seconds = Annotated[float, Interval(ge=1, le=86400)]
FormatName = Literal["glb", "gltf", "obj", "ply", "stl", "usdz"]


@dataclass
class MeshConfig:
    """How a mesh is cut out of the density, and what is written of it."""

    # Grid points along the longest side of the object.
    resolution: GridPoints = 192
    # Density of the surface: a number, or "auto" for the one at which outlines are those of the
    # pictures.
    iso: Iso = "auto"
    # Components with fewer faces than this fraction of the largest one are dropped.
    min_component: Share = 0.01
    # Larger meshes are decimated to this many triangles. 0 keeps all.
    max_faces: CountOrNone = 20_000
    # Rows and columns of the texture; 0 colours vertices instead.
    texture_size: TextureSize = 1024
    # Give the texture a normal map of the fine surface.
    normal_map: bool = True
    # Seconds that texture coordinates may take; after that, vertices are coloured instead.
    atlas_seconds: Seconds = 30.0
    # Height of the object in metres.
    height: Length = 1.0
    # Stand the object on y = 0, its middle above the origin.
    ground: bool = True
    # Kind of file: .glb and .gltf have all; .obj and .usdz (needs usd-core) colours and normals,
    # .ply colours of vertices, .stl the shape alone.
    format: FormatName = "glb"

    @staticmethod
    def of_older(values: dict[str, Any]) -> dict[str, Any]:
        """Saved values, also of versions that had no textures, and kept all triangles unless they
        were told otherwise."""
        if "texture_size" in values or values.get("max_faces") != 0:
            return values
        return {name: value for name, value in values.items() if name != "max_faces"}


class Made(NamedTuple):
    """An asset, and where its vertices are in the field's coordinates, [V,3] float32."""

    asset: Asset
    points: np.ndarray


def make_mesh(
    field: Any,
    radius: float,
    cfg: MeshConfig,
    device: torch.device,
    step: float,
    tell: Callable[[str], object] | None = None,
) -> tuple[Surface, FineNormals]:
    """The surface of a field with as many triangles as were asked for, and the fine one's normals.

    Args:
        field: ``field.density(points[N, 3]) -> [N]`` and ``field(points, False).features`` are
            asked in the box [-radius, radius]³.
        step: length of a step in which pictures of the field are rendered.
        tell: gets a line on how the density is spread.
    Raises:
        ConfigError: for settings that cannot work.
        MeshError: the surface is empty.
    """
    check(cfg)
    fine = fine_surface(
        field, radius, device, cfg.resolution, cfg.iso, cfg.min_component, step, tell
    )
    normals = FineNormals(fine)
    return simplified(fine, cfg.max_faces, normals), normals


def make_asset(
    field: Any,
    radius: float,
    cfg: MeshConfig,
    device: torch.device,
    step: float,
    tell: Callable[[str], object] | None = None,
    say: Callable[[str], object] | None = None,
) -> Made:
    """The object of a field, ready to be written; arguments and errors as of `make_mesh`.

    Where no texture coordinates can be made, in time or at all, vertices are coloured, and the log
    has a line that says so.

    Args:
        say: is told what is being done.
    """
    say = say or (lambda _: None)
    say("the surface")
    surface, normals = make_mesh(field, radius, cfg, device, step, tell)
    atlas = None
    if cfg.texture_size and cfg.format not in ("ply", "stl"):
        say("texture coordinates")
        try:
            atlas = make_atlas(
                surface.points,
                surface.faces,
                cfg.atlas_seconds,
                lambda s: say(f"texture coordinates, {s} s of at most {cfg.atlas_seconds:g}"),
            )
        except AtlasError as error:
            log.warning("the mesh gets colours of vertices, no texture: %s", error)
    say("colours")
    colors = seen_colors(field, surface.points, surface.normals, step, device)
    if atlas is None:
        points, of_corners = surface.points, surface.normals
        faces, extra = surface.faces, {}
    else:
        points, of_corners = surface.points[atlas.vertices], surface.normals[atlas.vertices]
        colors, faces = colors[atlas.vertices], atlas.faces
        baked = bake_field(
            field, surface, normals, atlas, cfg.texture_size, step, device, cfg.normal_map
        )
        extra = {"uvs": atlas.uvs, "texture": baked.texture, "normal_map": baked.normal_map}
    asset = Asset(
        placed(points, cfg.height, cfg.ground),
        of_corners[:, FIELD_TO_GLTF],
        faces.astype(np.int64),
        colors,
        **extra,
    )
    return Made(asset, points)
