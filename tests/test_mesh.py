"""Meshes of analytic fields: where the surface lies, which way it faces, what colour it has."""

import math
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from torch import nn

from dsd_fast.asset.model import Asset, placed, tangents
from dsd_fast.config import CameraConfig
from dsd_fast.config.codec import from_dict
from dsd_fast.ranges import ConfigError
from dsd_fast.scene import atlas as atlas_module
from dsd_fast.scene.atlas import AtlasError, make_atlas
from dsd_fast.scene.baking import seen_colors
from dsd_fast.scene.cameras import eval_camera
from dsd_fast.scene.mesh import MeshConfig, make_asset, make_mesh
from dsd_fast.scene.painted import PaintedMesh
from dsd_fast.scene.surface import MeshError, fine_surface

CPU = torch.device("cpu")
STEP = 0.02


class Balls(nn.Module):
    """Solid balls: density rises linearly from zero, ``thickness`` outside of the radius, through
    ``level`` at it; red where x > 0, blue elsewhere."""

    def __init__(self, *balls: tuple[float, float, float, float], level=10.0, thickness=0.5):
        super().__init__()
        self.balls, self.level, self.thickness = balls, level, thickness

    def density(self, points):
        inside = [r - (points - points.new_tensor(c)).norm(dim=-1) for *c, r in self.balls]
        slope = self.level / self.thickness
        return (self.level + slope * torch.stack(inside).amax(0)).clamp_min(0)

    def forward(self, points, normals=True):
        assert not normals
        red = torch.where(points[:, :1] > 0, 4.0, -4.0)
        features = torch.cat([red, torch.full_like(red, -4.0), -red], 1)
        return SimpleNamespace(density=self.density(points), features=features)


class Slab(Balls):
    """A thin board and a thick ball on it, of the same opaque stuff: no density is right for both,
    for a board of 0.04 gathers half of what a ray sees at a density of 17, a ball at 1."""

    def density(self, points):
        board = (0.6 - points[:, :2].abs().amax(-1)).clamp(-1, 0.02)
        board = torch.minimum(board, 0.02 - points[:, 2].abs())
        ball = 0.3 - (points - torch.tensor([0.0, 0.0, 0.3])).norm(dim=-1)
        return (60 * (board / 0.02).clamp(0, 1)).maximum(2 + 20 * ball).clamp_min(0)


def surface(field, radius=1.0, resolution=64, iso="10", min_component=0.01, tell=None):
    return fine_surface(field, radius, CPU, resolution, iso, min_component, STEP, tell)


# ---- surface ------------------------------------------------------------------------------------


def test_ball_at_its_place_facing_outward():
    center, radius = np.array([0.3, -0.2, 0.1]), 0.5
    mesh = surface(Balls((*center, radius)), 2.0, 48)
    distance = np.linalg.norm(mesh.points - center, axis=1)
    # On the surface far below the size of a cell, 0.02: vertices go to where the field has it.
    assert np.abs(distance - radius).max() < 1e-4
    outward = (mesh.points - center) / distance[:, None]
    assert (mesh.normals * outward).sum(1).min() > 0.99
    np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-5)
    solid = trimesh.Trimesh(mesh.points, mesh.faces)
    assert solid.is_watertight
    assert solid.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.01)


def test_the_grid_is_of_the_objects_size():
    """A small object in a large box has as many triangles as a large one."""
    large, small = (surface(Balls((0, 0, 0, r)), 2.0, 48, "10") for r in (1.0, 0.25))
    assert len(small.faces) > 0.5 * len(large.faces)


def test_surface_cut_by_the_box_is_closed():
    mesh = surface(Balls((1.0, 0, 0, 0.5)), 1.0, 40)
    assert mesh.points[:, 0].max() == pytest.approx(1.0, abs=1e-5)
    volume = trimesh.Trimesh(mesh.points, mesh.faces).volume
    assert volume == pytest.approx(2 / 3 * np.pi * 0.125, rel=0.05)


def test_small_components_go_and_larger_ones_stay():
    field = Balls((0, 0, 0, 0.6), (0.9, 0, 0, 0.2), (-0.9, 0, 0, 0.05))
    everything = surface(field, 1.2, 128, min_component=0.0)
    assert everything.points[:, 0].min() < -0.9
    kept = surface(field, 1.2, 128)
    assert kept.points[:, 0].min() == pytest.approx(-0.6, abs=0.02)
    assert kept.points[:, 0].max() == pytest.approx(1.1, abs=0.02)
    assert kept.faces.max() == len(kept.points) - 1


def test_walls_of_hollows_go():
    class Shell(Balls):
        def density(self, points):
            r = points.norm(dim=-1)
            return 20 * ((r > 0.3) & (r < 0.5)).float()

    mesh = surface(Shell(), 1.0, 48)
    assert np.linalg.norm(mesh.points, axis=1).min() > 0.45


def outlines(mesh, field, n=6):
    """Intersection over union, and the mesh's outline as a share of the field's, over views."""
    from dsd_fast import ops

    made = SimpleNamespace(points=mesh.points, asset=bare(mesh))
    painted = PaintedMesh(made, plain, SimpleNamespace())  # pyright: ignore
    both = either = own = 0
    cells = torch.ones(32, 32, 32, dtype=torch.bool)
    far = CameraConfig(eval_camera_distance=3.0)
    for view in range(n):
        camera = eval_camera(far, 50 * view, 13.0 * view, (96, 96))
        seen, *_ = painted._samples(camera)
        a = (seen.view(96 * 96, -1).float().mean(1) > 0.5).numpy()
        origins, dirs = (x.reshape(-1, 3).contiguous() for x in (camera.rays_o, camera.rays_d))
        rays, starts, ends = ops.march(origins, dirs, cells, (-1, -1, -1, 1, 1, 1), STEP)
        at = origins[rays] + dirs[rays] * (0.5 * (starts + ends))[:, None]
        depth = torch.zeros(len(origins)).index_add_(0, rays, field.density(at) * (ends - starts))
        b = (1 - (-depth).exp() > 0.5).numpy()
        both, either, own = both + (a & b).sum(), either + (a | b).sum(), own + b.sum()
    return both / either, (either - own + both) / own


def bare(mesh) -> Asset:
    return Asset(mesh.points, mesh.normals, mesh.faces, np.zeros_like(mesh.points))


plain = nn.Identity()


@pytest.mark.parametrize("thickness", [0.1, 0.5])
def test_auto_is_where_pictures_have_their_outlines(thickness):
    """Fog or not: no number is right for both."""
    field = Balls((0.1, 0, 0, 0.4), level=10.0, thickness=thickness)
    told = []
    iou, area = outlines(surface(field, iso="auto", tell=told.append), field)
    assert iou > 0.98 and area == pytest.approx(1, abs=0.01)
    assert len(told) == 1 and "density" in told[0] and "outlines of 32 views agree" in told[0]
    # The mean of what is filled, which was taken for the surface once.
    filled = field.density(torch.rand(1 << 16, 3) * 2 - 1)
    mean = float(filled[filled > 1e-5].mean())
    assert outlines(surface(field, iso=str(mean)), field)[0] < iou - 0.005


def test_what_is_thin_stays_where_what_is_thick_would_swell():
    field = Slab()
    auto = surface(field, resolution=128, iso="auto")
    iou, area = outlines(auto, field)
    assert iou > 0.95 and area == pytest.approx(1, abs=0.02)
    assert all(outlines(surface(field, resolution=128, iso=c), field)[0] < iou for c in ("4", "12"))
    # The board is there as a whole, and no thicker than it is seen.
    board = np.abs(auto.points[:, :2]).max(1) > 0.4
    assert np.abs(auto.points[board, 2]).max() < 0.03
    corners = auto.points[np.abs(auto.points[:, :2]).min(1) > 0.5]
    assert {tuple(signs) for signs in np.sign(corners[:, :2]).astype(int)} == {
        (-1, -1), (-1, 1), (1, -1), (1, 1)
    }  # fmt: skip


def test_fog_that_hides_is_inside():
    """A hollow full of fog, whose density is below that of outlines: pictures show no hole."""

    class Bowl(Balls):
        def density(self, points):
            solid = 0.5 - points.norm(dim=-1)
            hole = 0.25 - points[:, :2].norm(dim=-1)
            walls = (2000 * solid).clamp(0, 100)
            # A shaft down to z = -0.2 that holds a fog of 6.
            shaft = (hole > 0) & (points[:, 2] > -0.2)
            return torch.where(shaft, walls.clamp_max(6), walls)

    mesh = surface(Bowl(), resolution=96, iso="auto")
    shaft = np.linalg.norm(mesh.points[:, :2], axis=1) < 0.2
    # From above a ray has gathered a half 0.12 below the sphere's top: nothing is seen below that,
    # nor is the level's hole, down to the shaft's end.
    assert (mesh.points[shaft, 2] > 0.3).sum() > 100
    assert not ((mesh.points[shaft, 2] > -0.4) & (mesh.points[shaft, 2] < 0.3)).any()
    hole = surface(Bowl(), resolution=96, iso="10")
    assert hole.points[np.linalg.norm(hole.points[:, :2], axis=1) < 0.2, 2].min() < -0.1


def test_fog_without_outlines_has_a_mesh_and_a_warning(caplog):
    field = Balls((0, 0, 0, 0.5), level=0.05)
    assert len(surface(field, iso="auto").faces) > 100
    assert "no view of the object is opaque" in caplog.text


@pytest.mark.parametrize("iso", ["auto", "0.5"])
def test_empty_field(iso):
    class Empty(Balls):
        def density(self, points):
            return points[:, 0] * 0

    with pytest.raises(MeshError, match=r"no surface.*lower iso"):
        surface(Empty((0, 0, 0, 1)), iso=iso)


def test_bad_threshold_and_broken_field():
    with pytest.raises(ConfigError, match="\"auto\" or a number above 0, got 'high'"):
        make_mesh(Balls((0, 0, 0, 0.5)), 1.0, MeshConfig(16, "high"), CPU, STEP)
    with pytest.raises(MeshError, match="not finite"):
        surface(Balls((0, 0, 0, float("nan"))))


# ---- fewer triangles ----------------------------------------------------------------------------


def test_decimation_keeps_shape_and_normals():
    cfg = MeshConfig(resolution=64, iso="10", max_faces=500)
    mesh, _ = make_mesh(Balls((0, 0, 0, 0.5)), 1.0, cfg, CPU, STEP)
    assert 400 < len(mesh.faces) <= 500
    distance = np.linalg.norm(mesh.points, axis=1)
    assert np.abs(distance - 0.5).max() < 0.02
    # Those of the fine surface, where its own would be off by several degrees.
    assert (mesh.normals * mesh.points / distance[:, None]).sum(1).min() > 0.999


def test_configurations_of_before_textures_get_todays_number_of_triangles():
    before = {"resolution": 32, "iso": "auto", "min_component": 0.01, "max_faces": 0}
    assert from_dict(MeshConfig, before).max_faces == MeshConfig.max_faces
    assert from_dict(MeshConfig, before | {"max_faces": 700}).max_faces == 700
    assert from_dict(MeshConfig, before | {"texture_size": 0}).max_faces == 0


# ---- colours ------------------------------------------------------------------------------------


def sides(asset: Asset) -> tuple[np.ndarray, np.ndarray]:
    """Which vertices are well inside of either half of `Balls`; the front, on +x, is glTF's z."""
    return asset.points[:, 2] > 0.1, asset.points[:, 2] < -0.1


def test_texture_has_the_fields_colours_where_they_are():
    cfg = MeshConfig(resolution=48, max_faces=2000, texture_size=512)
    asset = make_asset(Balls((0, 0, 0, 0.4)), 1.0, cfg, CPU, STEP).asset
    assert asset.texture is not None and asset.uvs is not None and asset.normal_map is not None
    assert asset.texture.shape == asset.normal_map.shape == (512, 512, 3)
    row = ((1 - asset.uvs[:, 1]) * 512).astype(int).clip(0, 511)
    column = (asset.uvs[:, 0] * 512).astype(int).clip(0, 511)
    at = asset.texture[row, column] / 255
    red, blue = (torch.tensor([4.0, -4.0, -4.0]).sigmoid().numpy(), None)
    blue = red[::-1]
    front, back = sides(asset)
    assert front.sum() > 300 and back.sum() > 300
    np.testing.assert_allclose(at[front], np.tile(red, (front.sum(), 1)), atol=0.01)
    np.testing.assert_allclose(at[back], np.tile(blue, (back.sum(), 1)), atol=0.01)
    # Gutters: no texel is of no colour of the object.
    assert (asset.texture.astype(int).sum(-1) > 230).all()
    # A ball's low and fine normals are nearly the same: straight up, in the map's terms.
    assert np.abs(asset.normal_map[row, column].astype(int) - [128, 128, 255]).max() < 12


def test_normal_map_has_what_decimation_took():
    """Waves too fine for the triangles: the map, in the frame of its vertices, gives them back."""

    class Waves(Balls):
        def density(self, points):
            r = 0.4 + 0.01 * torch.sin(40 * points[:, 2])
            return (200 * (r - points.norm(dim=-1)) + 10).clamp_min(0)

    cfg = MeshConfig(resolution=160, iso="10", max_faces=300, texture_size=512)
    made = make_asset(Waves(), 1.0, cfg, CPU, STEP)
    asset = made.asset
    assert asset.normal_map is not None and asset.uvs is not None
    frame = tangents(asset.points, asset.normals, asset.faces, asset.uvs)
    np.testing.assert_allclose((frame[:, :3] * asset.normals).sum(1), 0, atol=1e-5)
    row = ((1 - asset.uvs[:, 1]) * 512).astype(int).clip(0, 511)
    column = (asset.uvs[:, 0] * 512).astype(int).clip(0, 511)
    x, y, z = (asset.normal_map[row, column] / 127.5 - 1).T[..., None]
    across = np.cross(asset.normals, frame[:, :3]) * frame[:, 3:]
    told = x * frame[:, :3] + y * across + z * asset.normals
    # Between vertices the map is tilted, as the waves are.
    tilt = np.degrees(np.arccos((asset.normal_map[..., 2] / 127.5 - 1).clip(-1, 1)))
    assert np.percentile(tilt, 90) > 12
    # At the vertices it and their normals agree.
    assert np.median((told * asset.normals).sum(1)) > 0.97


def test_colours_are_what_rays_see_not_the_fogs_shell():
    class Dusty(Balls):
        def forward(self, points, normals=True):
            out = super().forward(points, normals)
            shell = points.norm(dim=-1, keepdim=True) > 0.47
            green = torch.tensor([-4.0, 4.0, -4.0])
            return SimpleNamespace(
                density=out.density, features=torch.where(shell, green, out.features)
            )

    field = Dusty((0, 0, 0, 0.5), level=3.0, thickness=0.05)
    points = np.array([[0.5, 0, 0], [-0.5, 0, 0]], np.float32)
    seen = seen_colors(field, points, points / 0.5, STEP, CPU)
    assert seen[0, 0] > 0.5 and seen[1, 2] > 0.5  # mostly what is below the green dust


def test_a_ray_does_not_begin_in_another_part():
    field = Balls((0.3, 0, 0, 0.27), (-0.3, 0, 0, 0.27), level=200.0, thickness=0.02)
    # From the blue ball towards the red one, 0.06 away, where a ray might begin at 0.08.
    seen = seen_colors(field, np.array([[-0.03, 0, 0]]), np.array([[1.0, 0, 0]]), 0.04, CPU)
    assert seen[0, 2] > 0.9 > 0.1 > seen[0, 0]


# ---- texture coordinates ------------------------------------------------------------------------


def soup(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    points = (rng.normal(size=(n, 1, 3)) + 0.1 * rng.normal(size=(n, 3, 3))).astype(np.float32)
    return points.reshape(-1, 3), np.arange(3 * n).reshape(-1, 3)


@pytest.mark.timeout(120)
def test_a_soup_of_triangles_does_not_take_longer_than_it_may():
    begun = time.monotonic()
    with pytest.raises(AtlasError, match=r"20,000 triangles took more than 1 seconds"):
        make_atlas(*soup(20_000), 1.0)
    assert time.monotonic() - begun < 3


def test_without_coordinates_vertices_are_coloured(monkeypatch, caplog):
    def hangs(command, **how):
        return popen(["sleep", "60"], **how)

    popen = subprocess.Popen
    monkeypatch.setattr(atlas_module.subprocess, "Popen", hangs)
    cfg = MeshConfig(resolution=32, max_faces=500, texture_size=512, atlas_seconds=1.0)
    asset = make_asset(Balls((0, 0, 0, 0.4)), 1.0, cfg, CPU, STEP).asset
    assert asset.texture is None and asset.uvs is None
    assert "colours of vertices, no texture" in caplog.text and "1 seconds" in caplog.text
    front, back = sides(asset)
    assert (asset.colors[front, 0] > 0.9).all() and (asset.colors[back, 2] > 0.9).all()


# ---- its place ----------------------------------------------------------------------------------


def test_an_asset_stands_on_the_ground_and_has_its_height():
    points = np.array([[-1, 2, 3], [3, 4, 5]], np.float32)  # of the field: front, left, up
    stands = placed(points, 1.5, True)
    np.testing.assert_allclose(stands, [[-0.75, 0, -1.5], [0.75, 1.5, 1.5]], atol=1e-6)
    # In the field's place, turned: its front, +x, is +z, and up, +z, is +y.
    np.testing.assert_allclose(placed(points, None, False), points[:, [1, 2, 0]])
    flat = placed(np.zeros((3, 3), np.float32), 1.0, True)
    assert np.isfinite(flat).all()


def test_tangents_follow_u_and_tell_mirrored_coordinates():
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    normals = np.tile(np.float32([0, 0, 1]), (3, 1))
    faces = np.array([[0, 1, 2]])
    straight = tangents(points, normals, faces, points[:, :2])
    np.testing.assert_allclose(straight, np.tile([1, 0, 0, 1], (3, 1)), atol=1e-6)
    mirrored = tangents(points, normals, faces, points[:, :2] * [-1, 1])
    np.testing.assert_allclose(mirrored, np.tile([-1, 0, 0, -1], (3, 1)), atol=1e-6)
    nothing = tangents(points, normals, faces, np.zeros((3, 2)))
    np.testing.assert_allclose(np.linalg.norm(nothing[:, :3], axis=1), 1, atol=1e-6)
    assert math.isclose(float((nothing[0, :3] * normals[0]).sum()), 0, abs_tol=1e-6)
