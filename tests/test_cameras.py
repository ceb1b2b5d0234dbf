import dataclasses
import math

import pytest
import torch
from conftest import cuda_only

from dsd_fast.guidance.conditions.text import ViewBins
from dsd_fast.scene.cameras import (
    CameraConfig,
    RandomCameras,
    eval_camera,
    look_at,
    turntable,
)

SMALL = {"width": 9, "height": 7, "resolution_milestones": ()}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sample(n: int, **changes) -> object:
    cfg = CameraConfig(**{**SMALL, "width": 1, "height": 1, "batch_size": n, **changes})
    return RandomCameras(cfg).sample(10, _generator())


def _project(camera, points: torch.Tensor) -> torch.Tensor:
    """Pixel coordinates (column, row) of world points [N,3], by a textbook pinhole camera."""
    rotation, position = camera.c2w[0, :3, :3], camera.c2w[0, :3, 3]
    local = (points - position) @ rotation
    focal = 0.5 * camera.height / math.tan(0.5 * float(camera.fovy[0]))
    x = camera.width / 2 + focal * local[:, 0] / -local[:, 2]
    y = camera.height / 2 - focal * local[:, 1] / -local[:, 2]
    return torch.stack([x, y], dim=-1)


def test_front_camera_is_on_x():
    camera = eval_camera(CameraConfig(), 0.0, elevation_deg=0.0, size=(5, 5))
    torch.testing.assert_close(camera.camera_positions, torch.tensor([[2.0, 0.0, 0.0]]))
    torch.testing.assert_close(camera.rays_d[0, 2, 2], torch.tensor([-1.0, 0.0, 0.0]))
    # Seen from the front, +y is to the right and +z is up.
    right, up, backward = camera.c2w[0, :3, :3].unbind(-1)
    torch.testing.assert_close(right, torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(up, torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(backward, torch.tensor([1.0, 0.0, 0.0]))
    assert camera.rays_d[0, 0, 0, 2] > 0 > camera.rays_d[0, 0, 0, 1]


def test_azimuth_turns_towards_y():
    camera = eval_camera(CameraConfig(), 90.0, elevation_deg=0.0, size=(2, 2))
    expected = torch.tensor([[0.0, 2.0, 0.0]])
    torch.testing.assert_close(camera.camera_positions, expected, atol=1e-6, rtol=0)


def test_points_on_a_ray_project_to_its_pixel():
    camera = _sample(1, width=9, height=7)
    rows, columns = torch.meshgrid(torch.arange(7), torch.arange(9), indexing="ij")
    pixels = torch.stack([columns, rows], dim=-1).reshape(-1, 2) + 0.5
    points = (camera.rays_o + 1.7 * camera.rays_d).reshape(-1, 3)
    torch.testing.assert_close(_project(camera, points), pixels, atol=1e-4, rtol=0)


def test_vertical_field_of_view():
    camera = eval_camera(CameraConfig(), size=(2048, 2))
    top, bottom = camera.rays_d[0, 0].mean(0), camera.rays_d[0, -1].mean(0)
    angle = torch.rad2deg(torch.acos((top * bottom).sum() / (top.norm() * bottom.norm())))
    assert float(angle) == pytest.approx(70.0, abs=0.1)


def test_poses_are_orthonormal_and_look_near_the_origin():
    cameras = _sample(256)
    rotation = cameras.c2w[:, :3, :3]
    identity = torch.eye(3).expand(256, 3, 3)
    torch.testing.assert_close(rotation.mT @ rotation, identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(256), atol=1e-5, rtol=0)
    assert torch.equal(cameras.c2w[:, 3], torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(256, 4))
    toward_origin = torch.nn.functional.normalize(-cameras.camera_positions, dim=-1)
    assert float((-rotation[:, :, 2] * toward_origin).sum(-1).min()) > 0.7
    # Up stays up: roll comes only from a small perturbation.
    assert float(rotation[:, 2, 1].min()) > 0.5


def test_rays():
    cameras = _sample(3, width=9, height=7)
    assert cameras.rays_o.shape == cameras.rays_d.shape == (3, 7, 9, 3)
    torch.testing.assert_close(cameras.rays_d.norm(dim=-1), torch.ones(3, 7, 9))
    assert torch.equal(cameras.rays_o[:, 4, 2], cameras.camera_positions)
    assert len(cameras) == 3


def test_ranges_and_statistics():
    n = 20000
    cameras = _sample(n, batch_uniform_azimuth=False)
    for values, low, high in (
        (cameras.elevation_deg, -10, 45),
        (cameras.azimuth_deg, -180, 180),
        (cameras.distance, 1.5, 2.0),
        (torch.rad2deg(cameras.fovy), 40, 70),
        (cameras.light_positions.norm(dim=-1), 0.8, 1.5),
    ):
        assert low - 1e-3 <= float(values.min()) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < float(values.max()) <= high + 1e-3
    assert float(cameras.azimuth_deg.mean()) == pytest.approx(0.0, abs=3.0)
    assert float(cameras.distance.mean()) == pytest.approx(1.75, abs=0.01)
    # Positions stay within the perturbation of the nominal ones.
    elevation, azimuth = torch.deg2rad(cameras.elevation_deg), torch.deg2rad(cameras.azimuth_deg)
    nominal = cameras.distance[:, None] * torch.stack(
        [elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], -1
    )
    shift = cameras.camera_positions - nominal
    assert 0.099 < float(shift.abs().max()) <= 0.1 + 1e-5
    assert float(shift.std()) == pytest.approx(0.2 / math.sqrt(12), rel=0.03)
    # Lights lean towards the camera.
    light = torch.nn.functional.normalize(cameras.light_positions, dim=-1)
    camera = torch.nn.functional.normalize(cameras.camera_positions, dim=-1)
    assert float((light * camera).sum(-1).mean()) > 0.6


def test_elevation_is_uniform_in_angle_or_in_area_by_batch():
    medians = []
    sampler = RandomCameras(CameraConfig(**{**SMALL, "width": 1, "height": 1, "batch_size": 4000}))
    generator = _generator()
    for _ in range(24):
        medians.append(float(sampler.sample(10, generator).elevation_deg.median()))
    low, high = math.sin(math.radians(-10)), math.sin(math.radians(45))
    by_area = math.degrees(math.asin((low + high) / 2))
    kinds = [min((17.5, by_area), key=lambda kind: abs(kind - median)) for median in medians]
    assert all(abs(kind - median) < 1.2 for kind, median in zip(kinds, medians))
    assert 5 <= kinds.count(17.5) <= 19


def test_azimuths_of_a_batch_are_stratified():
    azimuths = _sample(8).azimuth_deg
    assert torch.equal(((azimuths + 180) / 45).floor(), torch.arange(8.0))


@pytest.mark.parametrize("n_bins", [1, 7, 48])
def test_lattice(n_bins):
    """Azimuths of cached trajectories, from the same draws as azimuths from anywhere."""
    cfg = CameraConfig(**{**SMALL, "width": 1, "height": 1, "batch_size": 400})
    free = RandomCameras(cfg).sample(10, _generator())
    snapped = RandomCameras(cfg, n_bins).sample(10, _generator())
    for name in ("elevation_deg", "distance", "fovy"):
        assert torch.equal(getattr(free, name), getattr(snapped, name))
    shift = snapped.azimuth_deg - free.azimuth_deg
    assert float(shift.abs().max()) <= 90 / n_bins + 1e-4
    assert torch.equal(snapped.azimuth_deg < 0, free.azimuth_deg < 0)
    # The numbers are those of the bins, to the last bit.
    bins = ViewBins(n_bins, perp_neg=True)
    indices = bins.index(snapped.elevation_deg, snapped.azimuth_deg)
    centres = torch.tensor([bins.camera(index)[1] for index in indices])
    assert torch.equal(snapped.azimuth_deg.abs(), centres)
    assert indices == bins.index(free.elevation_deg, free.azimuth_deg)
    assert set(indices) == set(range(n_bins))


def test_resolution_stages():
    cameras = RandomCameras(CameraConfig(width=(8, 16), height=(6, 12), batch_size=(2, 1)))
    shapes = [cameras.sample(step, _generator()).rays_d.shape for step in (0, 4999, 5000, 9999)]
    assert shapes == [(2, 6, 8, 3)] * 2 + [(1, 12, 16, 3)] * 2


def test_first_step_of_the_progressive_view_is_the_evaluation_view():
    cameras = RandomCameras(CameraConfig(**SMALL))
    first, second = (cameras.sample(step, _generator()) for step in (0, 1))
    assert float(first.elevation_deg) == pytest.approx(15.0, abs=1e-4)
    assert float(first.azimuth_deg) == 0.0
    assert float(second.azimuth_deg) != 0.0
    half = RandomCameras(CameraConfig(**{**SMALL, "batch_size": 2000}, progressive_until=99))
    azimuths = half.sample(50, _generator()).azimuth_deg
    assert 89 < float(azimuths.max()) <= 90.001


def test_same_generator_state_same_cameras():
    cfg = CameraConfig(**SMALL)
    first, second = (RandomCameras(cfg).sample(5, _generator(4)) for _ in range(2))
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_magic3d_lights_are_around_the_camera_direction():
    cameras = _sample(2000, light_sample_strategy="magic3d")
    light = torch.nn.functional.normalize(cameras.light_positions, dim=-1)
    camera = torch.nn.functional.normalize(cameras.camera_positions, dim=-1)
    above = torch.rad2deg(torch.asin((light * camera).sum(-1).clamp(-1, 1)))
    assert 29.9 < float(above.min()) < 31
    assert float(above.median()) == pytest.approx(60.0, abs=2.0)


def test_turntable_closes():
    views = list(turntable(CameraConfig(), n_views=5, size=(4, 6)))
    assert [float(view.azimuth_deg) for view in views] == [0.0, 90.0, 180.0, 270.0, 360.0]
    assert all(view.rays_d.shape == (1, 4, 6, 3) for view in views)
    torch.testing.assert_close(views[0].c2w, views[-1].c2w, atol=1e-5, rtol=0)
    assert torch.equal(views[1].light_positions, views[1].camera_positions)
    assert float(views[0].elevation_deg) == 15.0
    assert len(list(turntable(CameraConfig(), size=(1, 1)))) == 120


# What the guidance decides by, on the CPU.
NOMINAL = {"elevation_deg", "azimuth_deg", "distance"}


# The meta device stands in for a GPU where there is none.
@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=cuda_only)])
@pytest.mark.parametrize(
    "make",
    [
        lambda device: _sample(2, width=3, height=3).to(device),
        lambda device: RandomCameras(CameraConfig(**SMALL)).sample(3, _generator()).to(device),
        lambda device: eval_camera(CameraConfig(), size=(3, 3), device=device),
    ],
    ids=["to", "sample", "eval_camera"],
)
def test_all_but_the_nominal_view_is_on_the_device(make, device):
    tensors = {k: v for k, v in vars(make(device)).items() if isinstance(v, torch.Tensor)}
    assert set(tensors) > NOMINAL
    for name, tensor in tensors.items():
        assert tensor.device.type == ("cpu" if name in NOMINAL else device), name


def test_look_at_down_the_up_axis_of_the_world_is_finite_only_off_axis():
    pose = look_at(
        torch.tensor([[1e-3, 0.0, 2.0]]), torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]])
    )
    assert pose.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": (8, 16, 32)}, "width: expected one number or 2 numbers"),
        ({"height": 0}, "height: expected 1 or more, got 0"),
        ({"resolution_milestones": (5, 5)}, "must grow"),
        ({"fovy_range": (70.0, 40.0)}, "fovy_range"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        RandomCameras(CameraConfig(**changes))


def test_unknown_light_strategy():
    with pytest.raises(ValueError, match="expected 'dreamfusion' or 'magic3d', got 'sun'"):
        RandomCameras(CameraConfig(**SMALL, light_sample_strategy="sun"))
