"""Assets as trimesh's scenes, which its writers take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from dsd_fast.asset.model import METALLIC, ROUGHNESS, Asset


def beside(path: Path, ending: str) -> Path:
    """A file that the one at ``path`` names: in a name without what needs escapes there."""
    return path.with_name(re.sub(r"[^A-Za-z0-9._-]", "_", path.stem) + ending)


def picture(pixels: np.ndarray) -> Any:
    """uint8 [H,W,3] as a picture of Pillow."""
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels))


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H,W,3] as the content of a PNG file."""
    import io

    content = io.BytesIO()
    picture(pixels).save(content, format="png")
    return content.getvalue()


def mesh_of(asset: Asset, visual: Any, **more: Any) -> Any:
    """A trimesh of an asset, its vertices as they are; `more` goes to its constructor."""
    import trimesh

    return trimesh.Trimesh(
        asset.points,
        asset.faces,
        vertex_normals=asset.normals,
        visual=visual,
        process=False,
        **more,
    )


def pbr_material(asset: Asset) -> Any:
    from trimesh.visual.material import PBRMaterial

    normals = asset.normal_map
    assert asset.texture is not None
    return PBRMaterial(
        name=asset.name,
        baseColorTexture=picture(asset.texture),
        normalTexture=None if normals is None else picture(normals),
        metallicFactor=METALLIC,
        roughnessFactor=ROUGHNESS,
    )


def z_up(vectors: np.ndarray) -> np.ndarray:
    """glTF's axes [V,3] as programs with z up show them after they have read glTF: front on -y."""
    return np.stack([vectors[:, 0], -vectors[:, 2], vectors[:, 1]], 1)
