"""glTF 2.0, binary and as text, by trimesh.

trimesh has no tangents and rounds colours of vertices to eight linear bits, which band in dark
tones; both go as attributes of our own, which are given glTF's names at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsd_fast.asset.formats.scene import beside, mesh_of, pbr_material
from dsd_fast.asset.model import METALLIC, ROUGHNESS, Asset, linear, tangents

Tree = dict[str, Any]
# By our names, which trimesh takes only with the underscore.
_ATTRIBUTES = {"_TANGENT": "TANGENT", "_COLOR": "COLOR_0"}


def write_glb(asset: Asset, path: Path) -> None:
    from trimesh.exchange.gltf import export_glb

    def finish(tree: Tree) -> None:
        _finish(asset)(tree)
        _set_targets(tree)

    content = export_glb(_scene(asset), include_normals=True, tree_postprocessor=finish)
    path.write_bytes(content)


def write_gltf(asset: Asset, path: Path) -> None:
    from trimesh.exchange.gltf import export_gltf

    files = export_gltf(
        _scene(asset), include_normals=True, merge_buffers=True, tree_postprocessor=_finish(asset)
    )
    tree = json.loads(files["model.gltf"])
    _set_targets(tree)
    (buffer,) = tree["buffers"]
    buffers = beside(path, ".bin")
    buffers.write_bytes(files[buffer["uri"]])
    buffer["uri"] = buffers.name
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")


def _scene(asset: Asset) -> Any:
    import trimesh
    from trimesh.visual import ColorVisuals, TextureVisuals

    if asset.texture is None or asset.uvs is None:
        visual = ColorVisuals()
        attributes = {"_COLOR": linear(asset.colors).astype(np.float32)}
    else:
        visual = TextureVisuals(asset.uvs, material=pbr_material(asset))
        attributes = {}
        if asset.normal_map is not None:
            along = tangents(asset.points, asset.normals, asset.faces, asset.uvs)
            attributes = {"_TANGENT": along}
    scene = trimesh.Scene()
    mesh = mesh_of(asset, visual, vertex_attributes=attributes)
    scene.add_geometry(mesh, node_name=asset.name, geom_name=asset.name)
    return scene


def _finish(asset: Asset) -> Callable[[Tree], None]:
    """What trimesh does not write: names of attributes and pictures, and what the asset is."""

    def finish(tree: Tree) -> None:
        tree["asset"] |= {"generator": "dsd_fast", "extras": dict(asset.about)}
        tree["scenes"][0]["name"] = asset.name
        for mesh in tree["meshes"]:
            mesh.pop("extras", None)
            for primitive in mesh["primitives"]:
                attributes = primitive["attributes"]
                for ours, name in _ATTRIBUTES.items():
                    if ours in attributes:
                        attributes[name] = attributes.pop(ours)
                if asset.texture is None:
                    # White times the vertex's colour, and as rough as a texture's.
                    primitive["material"] = 0
        if asset.texture is None:
            factors = {"metallicFactor": METALLIC, "roughnessFactor": ROUGHNESS}
            tree["materials"] = [{"name": asset.name, "pbrMetallicRoughness": factors}]
        for image, name in zip(tree.get("images", ()), ("base color", "normals")):
            image["name"] = name
        if "textures" in tree:
            # Smooth, with mip levels; an atlas has nothing to repeat.
            clamp, linear_mipmap, linear_filter = 33071, 9987, 9729
            tree["samplers"] = [
                {
                    "magFilter": linear_filter,
                    "minFilter": linear_mipmap,
                    "wrapS": clamp,
                    "wrapT": clamp,
                }
            ]
            for texture in tree["textures"]:
                texture["sampler"] = 0

    return finish


def _set_targets(tree: Tree) -> None:
    """Say of each part of the buffer whether vertices or triangles are in it."""
    vertices, triangles = 34962, 34963
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            targets = dict.fromkeys(primitive["attributes"].values(), vertices)
            targets[primitive["indices"]] = triangles
            for accessor, target in targets.items():
                tree["bufferViews"][tree["accessors"][accessor]["bufferView"]]["target"] = target
