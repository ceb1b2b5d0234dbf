"""PLY with colours of vertices, and STL, by trimesh; z up, as programs read them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dsd_fast.asset.formats.scene import mesh_of, z_up
from dsd_fast.asset.model import Asset


def write_ply(asset: Asset, path: Path) -> None:
    from trimesh.exchange.ply import export_ply
    from trimesh.visual import ColorVisuals

    colors = (np.clip(asset.colors, 0, 1) * 255).round().astype(np.uint8)
    opaque = np.full((len(colors), 1), 255, np.uint8)
    visual = ColorVisuals(vertex_colors=np.concatenate([colors, opaque], 1))
    path.write_bytes(export_ply(mesh_of(_turned(asset), visual), vertex_normal=True))


def write_stl(asset: Asset, path: Path) -> None:
    from trimesh.exchange.stl import export_stl
    from trimesh.visual import ColorVisuals

    path.write_bytes(export_stl(mesh_of(_turned(asset), ColorVisuals())))


def _turned(asset: Asset) -> Asset:
    return replace(asset, points=z_up(asset.points), normals=z_up(asset.normals))
