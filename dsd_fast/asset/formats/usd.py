"""USDZ by OpenUSD: one archive with the mesh and its pictures."""

# Its modules are filled by a macro that no checker sees through.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import numpy as np

from dsd_fast.asset.formats.scene import beside, png
from dsd_fast.asset.model import METALLIC, ROUGHNESS, Asset, linear


def write(asset: Asset, path: Path) -> None:
    try:
        from pxr import Usd, UsdGeom, UsdShade
    except ImportError as error:
        raise ImportError("USDZ is written by usd-core: pip install 'dsd_fast[usd]'") from error

    folder = path.parent
    layer = beside(path, ".usdc")
    stage = Usd.Stage.CreateNew(str(layer))
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    name = re.sub(r"[^A-Za-z0-9_]", "_", asset.name)
    name = name if re.match("[A-Za-z_]", name) else f"_{name}"
    root = UsdGeom.Xform.Define(stage, f"/{name}")
    prim = root.GetPrim()
    stage.SetDefaultPrim(prim)
    # What readers ask of a package: that it is one thing.
    Usd.ModelAPI(prim).SetKind("component")
    prim.SetDisplayName(asset.name)
    prim.SetCustomData({"dsd_fast": _plain(asset.about)})
    mesh = UsdGeom.Mesh.Define(stage, f"/{name}/mesh")
    _geometry(mesh, asset)
    material = UsdShade.Material.Define(stage, f"/{name}/material")
    _material(stage, material, asset, path)
    UsdShade.MaterialBindingAPI.Apply(mesh.GetPrim()).Bind(material)
    stage.GetRootLayer().Save()
    _pack(path, [layer, *sorted(folder.glob("*.png"))])


def _pack(path: Path, files: list[Path]) -> None:
    """A package of files in one folder; what is shown is the first."""
    from pxr import Sdf

    with Sdf.ZipFileWriter.CreateNew(str(path)) as package:
        for file in files:
            if not package.AddFile(str(file), file.name):
                raise OSError(errno.EIO, "OpenUSD could not write the package", str(path))


def _geometry(mesh: Any, asset: Asset) -> None:
    from pxr import Sdf, UsdGeom, Vt

    mesh.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(np.ascontiguousarray(asset.points)))
    mesh.CreateFaceVertexCountsAttr(Vt.IntArray.FromNumpy(np.full(len(asset.faces), 3, np.int32)))
    indices = np.ascontiguousarray(asset.faces.reshape(-1), np.int32)
    mesh.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(indices))
    # As they are: without it readers smooth the mesh by subdivision.
    mesh.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
    mesh.CreateNormalsAttr(Vt.Vec3fArray.FromNumpy(np.ascontiguousarray(asset.normals)))
    mesh.SetNormalsInterpolation(UsdGeom.Tokens.vertex)
    extent = np.stack([asset.points.min(0), asset.points.max(0)])
    mesh.CreateExtentAttr(Vt.Vec3fArray.FromNumpy(extent))
    api = UsdGeom.PrimvarsAPI(mesh)
    if asset.uvs is None:
        # USD's colours are linear.
        colors = np.ascontiguousarray(linear(asset.colors), np.float32)
        of_vertices = mesh.CreateDisplayColorPrimvar(UsdGeom.Tokens.vertex)
        of_vertices.Set(Vt.Vec3fArray.FromNumpy(colors))
    else:
        st = api.CreatePrimvar("st", Sdf.ValueTypeNames.TexCoord2fArray, UsdGeom.Tokens.vertex)
        st.Set(Vt.Vec2fArray.FromNumpy(np.ascontiguousarray(asset.uvs, np.float32)))


def _material(stage: Any, material: Any, asset: Asset, path: Path) -> None:
    """A UsdPreviewSurface; names as of its specification."""
    from pxr import Gf, Sdf, UsdShade

    at, types = material.GetPath(), Sdf.ValueTypeNames
    surface = UsdShade.Shader.Define(stage, at.AppendChild("surface"))
    surface.CreateIdAttr("UsdPreviewSurface")
    surface.CreateInput("metallic", types.Float).Set(METALLIC)
    surface.CreateInput("roughness", types.Float).Set(ROUGHNESS)
    material.CreateSurfaceOutput().ConnectToSource(surface.ConnectableAPI(), "surface")

    def reader(name: str, kind: str, of: str, output: Any) -> Any:
        found = UsdShade.Shader.Define(stage, at.AppendChild(name))
        found.CreateIdAttr(f"UsdPrimvarReader_{kind}")
        found.CreateInput("varname", types.String).Set(of)
        return found.CreateOutput("result", output)

    diffuse = surface.CreateInput("diffuseColor", types.Color3f)
    if asset.texture is None:
        diffuse.ConnectToSource(reader("color", "float3", "displayColor", types.Float3))
        return
    st = reader("st", "float2", "st", types.Float2)

    def texture(name: str, pixels: np.ndarray, ending: str, space: str) -> Any:
        file = beside(path, ending)
        file.write_bytes(png(pixels))
        found = UsdShade.Shader.Define(stage, at.AppendChild(name))
        found.CreateIdAttr("UsdUVTexture")
        found.CreateInput("file", types.Asset).Set(file.name)
        found.CreateInput("sourceColorSpace", types.Token).Set(space)
        for wrap in ("wrapS", "wrapT"):
            found.CreateInput(wrap, types.Token).Set("clamp")
        found.CreateInput("st", types.Float2).ConnectToSource(st)
        return found

    base = texture("base_color", asset.texture, ".png", "sRGB")
    diffuse.ConnectToSource(base.CreateOutput("rgb", types.Float3))
    if asset.normal_map is not None:
        bumps = texture("normals", asset.normal_map, "-normal.png", "raw")
        bumps.CreateInput("scale", types.Float4).Set(Gf.Vec4f(2, 2, 2, 1))
        bumps.CreateInput("bias", types.Float4).Set(Gf.Vec4f(-1, -1, -1, 0))
        normal = surface.CreateInput("normal", types.Normal3f)
        normal.ConnectToSource(bumps.CreateOutput("rgb", types.Float3))


def _plain(values: Any) -> dict[str, Any]:
    """Values that USD keeps: texts and numbers; None is left out, the rest is written out."""
    kept = {}
    for key, value in dict(values).items():
        if value is not None:
            # Whole numbers of USD have 32 bits, a seed has 64.
            small = isinstance(value, bool) or (isinstance(value, int) and abs(value) < 2**31)
            kept[key] = value if small or isinstance(value, (str, float)) else str(value)
    return kept
