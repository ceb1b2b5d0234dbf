"""Files of assets, each read back by a reader of its own."""

import json
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import trimesh

from dsd_fast.asset import formats
from dsd_fast.asset.model import Asset
from dsd_fast.ranges import ConfigError

# A tetrahedron that is not its own mirror image, 1 high, whose long corner is to the front.
POINTS = np.array([[0, 0, 2], [0.5, 0, 0], [-0.5, 0, 0], [0, 1, 0]], np.float32)
FACES = np.array([[0, 1, 3], [1, 2, 3], [2, 0, 3], [0, 2, 1]])
ABOUT = {"prompt": "an armchair", "seed": 2**40, "method": "dsd", "model_sha256": None, "cfg": 7.5}


def asset(texture: bool = True) -> Asset:
    """Corners apart, a texture of four colours, one a face."""
    corners = FACES.reshape(-1)
    points, faces = POINTS[corners], np.arange(12).reshape(-1, 3)
    normals = np.cross(points[1::3] - points[::3], points[2::3] - points[::3])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    palette = np.array([[255, 0, 0], [128, 128, 128], [5, 0, 255], [20, 200, 40]], np.uint8)
    made = Asset(
        points,
        np.repeat(normals, 3, 0).astype(np.float32),
        faces,
        np.repeat(palette / 255, 3, 0).astype(np.float32),
    ).called("an  armchair\nof wood", ABOUT)
    if not texture:
        return made
    # Face k lies in quadrant k of the texture, row 0 its upper one.
    middle = np.array([[0.25, 0.75], [0.75, 0.75], [0.25, 0.25], [0.75, 0.25]])
    small = np.array([[-0.1, -0.1], [0.1, -0.1], [0, 0.1]])
    picture = palette.reshape(2, 2, 3).repeat(8, 0).repeat(8, 1)
    bumps = np.full((16, 16, 3), (128, 128, 255), np.uint8)
    uvs = (middle[:, None] + small).reshape(-1, 2).astype(np.float32)
    return replace(made, uvs=uvs, texture=picture, normal_map=bumps)


def gltf_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The document and its buffer, read by the specification and not through a mesh library."""
    if path.suffix == ".gltf":
        tree = json.loads(path.read_text())
        (buffer,) = tree["buffers"]
        return tree, (path.parent / buffer["uri"]).read_bytes()
    content = path.read_bytes()
    magic, version, length, size, kind = struct.unpack_from("<4sIII4s", content)
    assert (magic, version, length, kind) == (b"glTF", 2, len(content), b"JSON")
    return json.loads(content[20 : 20 + size]), content[28 + size :]


def attribute(path: Path, name: str, columns: int) -> np.ndarray:
    tree, buffer = gltf_of(path)
    accessor = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"][name]]
    assert accessor["componentType"] == 5126
    view = tree["bufferViews"][accessor["bufferView"]]
    assert view["target"] == 34962
    part = buffer[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
    return np.frombuffer(part, np.float32).reshape(accessor["count"], columns)


def only(path: Path, **how: Any) -> Any:
    loaded = trimesh.load_scene(path, **how)
    (part,) = loaded.geometry.values()
    return part


@pytest.mark.parametrize("name", ["glb", "gltf", "obj", "ply", "stl"])
@pytest.mark.parametrize("texture", [True, False])
def test_trimesh_reads_shape_and_colours(name: str, texture: bool, tmp_path: Path):
    made = asset(texture)
    path = tmp_path / f"my chair.{name}"
    written = formats.write(made, path)
    assert written[0] == path and sorted(tmp_path.iterdir()) == sorted(written)
    part = only(path, process=False)
    points = np.asarray(part.vertices)
    if name in ("ply", "stl"):
        # As Blender turns glTF: y up becomes z up, the front is on -y.
        points = np.stack([points[:, 0], points[:, 2], -points[:, 1]], 1)
    np.testing.assert_allclose(points[part.faces], made.points[made.faces], atol=1e-6)
    assert part.volume == pytest.approx(1 / 3)
    if name == "stl":
        return
    if texture and name != "ply":
        image = np.asarray(getattr(part.visual.material, "baseColorTexture", None)
                           or part.visual.material.image)  # fmt: skip
        np.testing.assert_array_equal(image[..., :3], made.texture)
        np.testing.assert_allclose(part.visual.uv[part.faces], made.uvs[made.faces], atol=1e-6)
    elif name in ("ply", "obj"):
        colors = part.visual.vertex_colors[part.faces][..., :3] / 255
        np.testing.assert_allclose(colors, made.colors[made.faces], atol=0.51 / 255)
    else:
        colors = part.visual.vertex_attributes["color"][part.faces][..., :3]
        linear = np.where(made.colors <= 0.04045, made.colors / 12.92,
                          ((made.colors + 0.055) / 1.055) ** 2.4)  # fmt: skip
        np.testing.assert_allclose(colors, linear[made.faces], atol=1e-5)


@pytest.mark.parametrize("name", ["glb", "gltf"])
def test_gltf_says_what_it_is(name: str, tmp_path: Path):
    path = tmp_path / f"mesh.{name}"
    formats.write(asset(), path)
    tree, _ = gltf_of(path)
    assert tree["asset"]["generator"] == "dsd_fast" and tree["asset"]["extras"] == ABOUT
    called = "an armchair of wood"
    (node,), (mesh,), (material,) = tree["nodes"], tree["meshes"], tree["materials"]
    assert node["name"] == mesh["name"] == material["name"] == called
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0
    assert material["pbrMetallicRoughness"]["roughnessFactor"] == 0.9
    assert (
        material["normalTexture"]["index"]
        != (material["pbrMetallicRoughness"]["baseColorTexture"]["index"])
    )
    tangent = attribute(path, "TANGENT", 4)
    normal = attribute(path, "NORMAL", 3)
    np.testing.assert_allclose(np.linalg.norm(tangent[:, :3], axis=1), 1, atol=1e-5)
    np.testing.assert_allclose((tangent[:, :3] * normal).sum(1), 0, atol=1e-5)
    assert set(np.unique(tangent[:, 3])) <= {-1.0, 1.0}


def test_dark_colours_of_vertices_do_not_band(tmp_path: Path):
    grey = np.arange(256) / 255
    points = np.random.default_rng(0).normal(size=(256, 3)).astype(np.float32)
    normals = np.tile(np.float32([0, 0, 1]), (256, 1))
    faces, colors = np.arange(255).reshape(-1, 3), np.repeat(grey[:, None], 3, 1)
    formats.write(Asset(points, normals, faces, colors.astype(np.float32)), tmp_path / "m.glb")
    linear = attribute(tmp_path / "m.glb", "COLOR_0", 3)[:, 0]
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(srgb - grey).max() < 1e-3  # of eight linear bits it would be 6 / 255


def test_obj_names_its_files_and_an_older_ones_go(tmp_path: Path):
    path = tmp_path / "chair.obj"
    formats.write(asset(), path)
    assert "mtllib chair.mtl" in path.read_text() and "o an_armchair_of_wood" in path.read_text()
    words = {line.partition(" ")[0] for line in path.read_text().splitlines() if line}
    assert words == {"#", "mtllib", "o", "usemtl", "v", "vt", "vn", "f"}
    material = (tmp_path / "chair.mtl").read_text().splitlines()
    assert "map_Kd chair.png" in material and "norm chair-normal.png" in material
    np.testing.assert_array_equal(imageio.imread(tmp_path / "chair.png"), asset().texture)
    (tmp_path / "other.png").write_bytes(b"mine")
    formats.write(asset(texture=False), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chair.obj", "other.png"]


@pytest.mark.parametrize("texture", [True, False])
def test_openusd_reads_the_package(texture: bool, tmp_path: Path):
    pxr = pytest.importorskip("pxr")
    from pxr import Usd, UsdGeom, UsdShade  # pyright: ignore

    assert pxr
    made, path = asset(texture), tmp_path / "chair.usdz"
    assert formats.write(made, path) == [path] == list(tmp_path.iterdir())
    with zipfile.ZipFile(path) as package:
        names = [entry.filename for entry in package.infolist()]
        assert names[0] == "chair.usdc" and len(names) == (3 if texture else 1)
        for entry in package.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
    stage = Usd.Stage.Open(str(path))
    assert UsdGeom.GetStageUpAxis(stage) == "Y" and UsdGeom.GetStageMetersPerUnit(stage) == 1
    root = stage.GetDefaultPrim()
    assert root.GetName() == "an_armchair_of_wood"
    assert root.GetCustomData()["dsd_fast"]["seed"] == str(2**40)
    mesh = UsdGeom.Mesh(stage.GetPrimAtPath(root.GetPath().AppendChild("mesh")))
    np.testing.assert_allclose(np.array(mesh.GetPointsAttr().Get()), made.points)
    np.testing.assert_array_equal(
        np.array(mesh.GetFaceVertexIndicesAttr().Get()).reshape(-1, 3), made.faces
    )
    assert mesh.GetSubdivisionSchemeAttr().Get() == "none"
    bound, _ = UsdShade.MaterialBindingAPI(mesh.GetPrim()).ComputeBoundMaterial()
    surface, *_ = bound.ComputeSurfaceSource()
    base = surface.GetInput("diffuseColor").GetConnectedSources()[0][0].source.GetPrim()
    kind = UsdShade.Shader(base).GetIdAttr().Get()
    if not texture:
        assert kind == "UsdPrimvarReader_float3"
        linear = np.array(mesh.GetDisplayColorPrimvar().Get())
        np.testing.assert_allclose(linear[3], np.full(3, 0.2158), atol=1e-3)
        return
    assert kind == "UsdUVTexture"
    file = UsdShade.Shader(base).GetInput("file").Get()
    assert file.path == "chair.png" and file.resolvedPath.endswith("[chair.png]")
    st = UsdGeom.PrimvarsAPI(mesh).GetPrimvar("st")
    np.testing.assert_allclose(np.array(st.Get()), made.uvs)


def test_every_format_ends_as_it_is_called_and_names_its_files():
    assert formats.SUFFIXES == (".glb", ".gltf", ".obj", ".ply", ".stl", ".usdz")
    assert [p.name for p in formats.files_of(Path("a/b.OBJ"))] == [
        "b.OBJ",
        "b.mtl",
        "b.png",
        "b-normal.png",
    ]
    # Addresses and words of other files, in which not every name may stand.
    assert formats.files_of(Path("a/ein Stühl.gltf"))[1] == Path("a/ein_St_hl.bin")


def test_what_cannot_be_written_is_said_before(tmp_path: Path, monkeypatch):
    with pytest.raises(ConfigError, match=r"ends in \.glb or .*got \.fbx"):
        formats.check_asset_output(tmp_path / "a.fbx")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ConfigError, match=r"a\.png: cannot be written: it is a folder"):
        formats.check_asset_output(tmp_path / "a.obj")
    (tmp_path / "b.glb").symlink_to(tmp_path / "c.ply")
    (tmp_path / "c.ply").write_bytes(b"")
    with pytest.raises(ConfigError, match="a link to a file of another kind"):
        formats.check_asset_output(tmp_path / "b.glb")
    monkeypatch.setattr(formats, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'dsd_fast\[usd\]'"):
        formats.check_asset_output(tmp_path / "a.usdz")
    assert formats.check_asset_output(tmp_path / "a.glb") == tmp_path / "a.glb"


def test_a_failed_write_leaves_the_old_asset(tmp_path: Path, monkeypatch):
    path = tmp_path / "chair.glb"
    formats.write(asset(), path)
    before = path.read_bytes()

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats.shutil, "copyfile", fails)
    with pytest.raises(OSError, match=r"chair\.glb"):
        formats.write(asset(texture=False), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_evaluate_reads_our_meshes_in_their_colours(tmp_path: Path):
    from dsd_fast.evaluate.meshes import read_mesh

    for texture in (True, False):
        formats.write(asset(texture), tmp_path / "mesh.glb")
        (part,) = read_mesh(tmp_path / "mesh.glb")
        if texture:
            assert part.texture is not None
            np.testing.assert_allclose(part.texture * 255, asset().texture, atol=0.5)
        else:
            assert part.colours is not None
            np.testing.assert_allclose(part.colours, asset().colors, atol=0.012)
