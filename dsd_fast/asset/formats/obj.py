"""Wavefront OBJ with its material and pictures, by trimesh."""

from __future__ import annotations

from pathlib import Path

from dsd_fast.asset.formats.scene import beside, mesh_of, picture, png
from dsd_fast.asset.model import METALLIC, ROUGHNESS, Asset


def write(asset: Asset, path: Path) -> None:
    from trimesh.exchange.obj import export_obj
    from trimesh.visual import ColorVisuals, TextureVisuals
    from trimesh.visual.material import SimpleMaterial

    # Each line of it but the first is ours to mark as a comment.
    header = "\n# ".join([f"dsd_fast: {asset.name}", *_lines(asset)])
    if asset.texture is None or asset.uvs is None:
        # Colours behind the coordinates, which no standard has and most programs read.
        mesh = mesh_of(asset, ColorVisuals(vertex_colors=asset.colors))
        text = export_obj(mesh, include_normals=True, include_color=True, header=header)
        path.write_text(_named(text, asset), encoding="utf-8")
        return
    name = beside(path, "").name
    material = SimpleMaterial(image=picture(asset.texture), name=name)
    mesh = mesh_of(asset, TextureVisuals(asset.uvs, material=material))
    material_file, texture = beside(path, ".mtl"), beside(path, ".png")
    text, _ = export_obj(
        mesh,
        include_normals=True,
        include_texture=True,
        return_texture=True,
        mtl_name=material_file.name,
        header=header,
    )
    path.write_text(_named(text, asset), encoding="utf-8")
    texture.write_bytes(png(asset.texture))
    # White, for a texture is multiplied; Pr and Pm are of its extension for physical materials.
    lines = [
        f"newmtl {name}",
        "Ka 0 0 0",
        "Kd 1 1 1",
        "Ks 0 0 0",
        "Ns 10",
        "illum 1",
        f"Pr {ROUGHNESS:g}",
        f"Pm {METALLIC:g}",
        f"map_Kd {texture.name}",
    ]
    if asset.normal_map is not None:
        normals = beside(path, "-normal.png")
        normals.write_bytes(png(asset.normal_map))
        lines.append(f"norm {normals.name}")
    material_file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(asset: Asset) -> list[str]:
    return [f"{key}: {' '.join(str(value).split())}" for key, value in asset.about.items()]


def _named(text: str, asset: Asset) -> str:
    """With the object's name in front of what is of it."""
    name = "_".join(asset.name.split())
    first = "\nusemtl " if asset.texture is not None else "\nv "
    return text.replace(first, f"\no {name}{first}", 1)
