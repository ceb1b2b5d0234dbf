"""Meshes of analytic fields: where the surface lies, which way it faces, what colour it has."""

import json
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from torch import nn

from dsd_fast.ranges import ConfigError
from dsd_fast.scene.mesh import Mesh, MeshConfig, MeshError, make_mesh, write_glb

CPU = torch.device("cpu")


class Balls(nn.Module):
    """Solid balls: density falls linearly from 2 * radius through ``level`` at the surface."""

    def __init__(self, *balls: tuple[float, float, float, float], level: float = 10.0):
        super().__init__()
        self.balls, self.level = balls, level

    def density(self, points):
        inside = [r - (points - torch.tensor(c)).norm(dim=-1) for *c, r in self.balls]
        return (self.level + 20 * torch.stack(inside).amax(0)).clamp_min(0)

    def forward(self, points, normals=True):
        assert not normals
        return SimpleNamespace(features=points * 4)


def test_ball_at_its_place_facing_outward():
    center, radius = np.array([0.3, -0.2, 0.1]), 0.5
    mesh = make_mesh(Balls((*center, radius)), 2.0, MeshConfig(resolution=48, iso="10"), CPU)
    distance = np.linalg.norm(mesh.vertices - center, axis=1)
    assert np.abs(distance - radius).max() < 0.01
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces)
    assert solid.is_watertight
    assert solid.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)
    expected = 1 / (1 + np.exp(-4 * mesh.vertices))
    np.testing.assert_allclose(mesh.albedo, expected, atol=1e-5)


def test_surface_cut_by_the_box_is_closed():
    mesh = make_mesh(Balls((1.0, 0, 0, 0.5)), 1.0, MeshConfig(resolution=40, iso="10"), CPU)
    assert mesh.vertices[:, 0].max() == pytest.approx(1.0)
    volume = trimesh.Trimesh(mesh.vertices, mesh.faces).volume
    assert volume == pytest.approx(2 / 3 * np.pi * 0.125, rel=0.05)


def test_small_components_go_and_larger_ones_stay():
    field = Balls((0, 0, 0, 0.6), (0.9, 0, 0, 0.2), (-0.9, 0, 0, 0.05))
    everything = make_mesh(field, 1.2, MeshConfig(128, "10", min_component=0.0), CPU)
    assert everything.vertices[:, 0].min() < -0.9
    kept = make_mesh(field, 1.2, MeshConfig(128, "10", min_component=0.01), CPU)
    assert kept.vertices[:, 0].min() == pytest.approx(-0.6, abs=0.02)
    assert kept.vertices[:, 0].max() == pytest.approx(1.1, abs=0.02)
    assert kept.faces.max() == len(kept.vertices) - 1


def test_auto_threshold_is_the_mean_of_the_filled_part():
    told = []
    mesh = make_mesh(Balls((0, 0, 0, 0.5)), 1.0, MeshConfig(resolution=40), CPU, told.append)
    assert len(mesh.faces) > 100
    assert len(told) == 1 and "density" in told[0] and "iso" in told[0]


@pytest.mark.parametrize("iso", ["auto", "0.5"])
def test_empty_field(iso):
    class Empty(Balls):
        def density(self, points):
            return points[:, 0] * 0

    with pytest.raises(MeshError, match=r"no surface.*lower iso"):
        make_mesh(Empty((0, 0, 0, 1)), 1.0, MeshConfig(16, iso), CPU)


def test_bad_threshold_and_broken_field():
    with pytest.raises(ConfigError, match="\"auto\" or a number above 0, got 'high'"):
        make_mesh(Balls((0, 0, 0, 0.5)), 1.0, MeshConfig(16, "high"), CPU)
    with pytest.raises(MeshError, match="not finite"):
        make_mesh(Balls((0, 0, 0, float("nan"))), 1.0, MeshConfig(16), CPU)


def test_decimation():
    pytest.importorskip("fast_simplification")
    cfg = MeshConfig(resolution=64, iso="10", max_faces=500)
    mesh = make_mesh(Balls((0, 0, 0, 0.5)), 1.0, cfg, CPU)
    assert len(mesh.faces) <= 500
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.5).max() < 0.05


def glb_attribute(path, name, dtype, columns) -> np.ndarray:
    """One vertex attribute, read by the specification and not through a mesh library."""
    content = path.read_bytes()
    magic, version, length, json_length, kind = struct.unpack_from("<4sIII4s", content)
    assert (magic, version, length, kind) == (b"glTF", 2, len(content), b"JSON")
    document = json.loads(content[20 : 20 + json_length])
    accessor = document["accessors"][document["meshes"][0]["primitives"][0]["attributes"][name]]
    view = document["bufferViews"][accessor["bufferView"]]
    start = 20 + json_length + 8 + view["byteOffset"]
    values = np.frombuffer(content[start : start + view["byteLength"]], dtype)
    return values.reshape(accessor["count"], columns)


def test_glb_is_y_up_front_z_with_linear_colors(tmp_path):
    vertices = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]])
    albedo = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.02, 0, 1], [0, 0, 0]], np.float32)
    write_glb(Mesh(vertices, faces, albedo), tmp_path / "mesh.glb")
    assert [p.name for p in tmp_path.iterdir()] == ["mesh.glb"]

    loaded = trimesh.load(tmp_path / "mesh.glb", force="mesh", process=False)
    # Field +x (the front) becomes +z, field +z (up) becomes +y; the shape is turned, not mirrored.
    assert loaded.vertices.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert loaded.volume == pytest.approx(1 / 6)
    linear = [[1, 0, 0], [0.2140, 0.2140, 0.2140], [0.02 / 12.92, 0, 1], [0, 0, 0]]
    colors = glb_attribute(tmp_path / "mesh.glb", "COLOR_0", np.float32, 3)
    np.testing.assert_allclose(colors, linear, atol=1e-4)
    normals = glb_attribute(tmp_path / "mesh.glb", "NORMAL", np.float32, 3)
    np.testing.assert_allclose(normals[3], -np.ones(3) / np.sqrt(3), atol=1e-6)


def only_part(loaded) -> Any:
    return next(iter(loaded.geometry.values())) if isinstance(loaded, trimesh.Scene) else loaded


@pytest.mark.parametrize("how", [{}, {"process": False}, {"force": "mesh"}])
def test_trimesh_keeps_the_colors(how: dict[str, Any], tmp_path):
    rng = np.random.default_rng(0)
    vertices = rng.normal(size=(64, 3)).astype(np.float32)
    faces = np.arange(63).reshape(-1, 3)
    albedo = rng.random((64, 3)).astype(np.float32) ** 3  # most of them dark
    albedo[:3] = 0, 1, 2 / 255
    write_glb(Mesh(vertices, faces, albedo), tmp_path / "mesh.glb")

    loaded = only_part(trimesh.load(tmp_path / "mesh.glb", **how))
    assert loaded.visual.kind == "vertex"
    colors = loaded.visual.vertex_colors
    # trimesh may have put vertices in another order, or dropped the one without a face.
    at = {tuple(v): i for i, v in enumerate(vertices[:, [1, 2, 0]].tolist())}
    order = [at[tuple(v)] for v in loaded.vertices.tolist()]
    assert len(order) >= 63 and (colors[:, 3] == 255).all()
    linear = np.where(albedo <= 0.04045, albedo / 12.92, ((albedo + 0.055) / 1.055) ** 2.4)
    assert np.abs(colors[:, :3] / 255 - linear[order]).max() <= 0.51 / 255
    loaded.export(tmp_path / "again.glb")
    again = only_part(trimesh.load(tmp_path / "again.glb", **how))
    assert sorted(map(tuple, again.visual.vertex_colors)) == sorted(map(tuple, colors))


def test_dark_colors_do_not_band(tmp_path):
    grey = np.arange(256) / 255
    vertices, faces = np.random.default_rng(0).normal(size=(256, 3)), np.arange(255).reshape(-1, 3)
    mesh = Mesh(vertices.astype(np.float32), faces, np.repeat(grey[:, None], 3, 1))
    write_glb(mesh, tmp_path / "mesh.glb")
    linear = glb_attribute(tmp_path / "mesh.glb", "COLOR_0", np.float32, 3)[:, 0]
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(srgb - grey).max() < 1e-3  # of eight linear bits it would be 6 / 255


def test_evaluate_reads_our_meshes_in_their_colors(tmp_path):
    from dsd_fast.evaluate.meshes import read_mesh

    vertices = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]])
    albedo = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.25, 0.7, 1], [0.9, 0.3, 0.6]], np.float32)
    write_glb(Mesh(vertices, faces, albedo), tmp_path / "mesh.glb")
    (part,) = read_mesh(tmp_path / "mesh.glb")
    assert part.colours is not None
    np.testing.assert_allclose(part.colours, albedo, atol=0.01)
