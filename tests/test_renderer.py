import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import cuda_only, relative_error

from dsd_fast.ops import PackedSamples
from dsd_fast.scene.background import Background, BackgroundConfig
from dsd_fast.scene.cameras import CameraConfig, RandomCameras, eval_camera
from dsd_fast.scene.field import Field, FieldConfig, FieldOutput, GridConfig
from dsd_fast.scene.losses import LossConfig, regularizers
from dsd_fast.scene.material import MaterialConfig
from dsd_fast.scene.renderer import Renderer, RendererConfig
from dsd_fast.scene.sample_room import FLOOR, LAG, LESSONS, SampleRoom

RADIUS = 0.5
ALBEDO = MaterialConfig(ambient_only_steps=10**9)


class Sphere:
    """A hard sphere with analytic normals; red where y > 0."""

    def __init__(self, density: float = 300.0) -> None:
        self.scale = density
        self.n_queried: list[int] = []

    def set_step(self, step: int) -> None:
        self.step = step

    def density(self, points: torch.Tensor) -> torch.Tensor:
        self.n_queried.append(len(points))
        return self.scale * (points.norm(dim=-1) < RADIUS).to(points)

    def skips_rows(self, device: torch.device) -> bool:
        return False

    def __call__(self, points: torch.Tensor) -> FieldOutput:
        red = torch.stack([points[:, 1], -points[:, 1], -points[:, 1]], dim=-1)
        return FieldOutput(self.density(points), 100 * red, F.normalize(points, dim=-1))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _background() -> Background:
    return Background(BackgroundConfig(eval_color=(0.0, 0.0, 1.0)), _generator())


def _small_field() -> Field:
    grid = GridConfig(n_levels=4, log2_table_size=10, base_resolution=4, start_level=4)
    return Field(FieldConfig(grid=grid), _generator())


def _renderer(material: MaterialConfig = ALBEDO, **changes) -> Renderer:
    return Renderer(RendererConfig(**changes), 2.0, material)


def _trained(renderer, field, background, cameras, step, generator):
    draws = renderer.draw(field, background, cameras, step, generator)
    return renderer.render(field, background, cameras, draws)


def _cameras(batch: int = 1, size: int = 12, seed: int = 0):
    cfg = CameraConfig(width=size, height=size, batch_size=batch, resolution_milestones=())
    return RandomCameras(cfg).sample(10, _generator(seed))


def _render_sphere(device="cpu", size: int = 33, **changes):
    renderer = _renderer(**changes).to(device)
    sphere = Sphere()
    # One update looks at one point a cell and misses cells that the surface only cuts.
    generator = _generator()
    for _ in range(20):
        renderer.update_occupancy(sphere, 0, generator)
    sphere.n_queried.clear()
    camera = eval_camera(CameraConfig(), 0.0, 0.0, (size, size), device)
    background = _background().to(device)
    return renderer.view(sphere, background, camera, 0), camera, sphere


def test_sphere_looks_like_a_sphere(device):
    output, camera, _ = _render_sphere(device)
    # The silhouette: rays that pass the centre nearer than the radius.
    rays_o, rays_d = camera.rays_o, camera.rays_d
    along = -(rays_o * rays_d).sum(-1)
    miss = (rays_o + along[..., None] * rays_d).norm(dim=-1)
    opacity = output.opacity[..., 0]
    assert float(opacity[miss < 0.97 * RADIUS].min()) > 0.99
    assert float(opacity[miss > 1.01 * RADIUS].max()) == 0.0
    # Depth, normal and colour of the surface.
    inside = miss < 0.9 * RADIUS
    t = along - (RADIUS**2 - miss**2).clamp(min=0).sqrt()
    surface = rays_o + t[..., None] * rays_d
    torch.testing.assert_close(output.depth[inside][:, 0], t[inside], atol=0.03, rtol=0)
    expected = (F.normalize(surface, dim=-1) + 1) / 2
    torch.testing.assert_close(output.normal[inside], expected[inside], atol=0.05, rtol=0)
    assert float(output.z_variance[inside].max()) < 1e-3
    # +y is to the right of the front camera; the background is blue.
    middle = output.rgb[0, 16].cpu()
    for column, color in ((20, (1.0, 0.0, 0.0)), (12, (0.0, 1.0, 1.0)), (0, (0.0, 0.0, 1.0))):
        torch.testing.assert_close(middle[column], torch.tensor(color), atol=0.05, rtol=0)


def test_lit_sphere_is_brightest_towards_the_light():
    output, _, _ = _render_sphere(material=MaterialConfig(ambient_only_steps=0))
    brightness = output.rgb_fg[0].sum(-1)
    assert float(brightness[16, 17]) > 1.2 * float(brightness[16, 22]) > 0.1


def test_chunks_change_nothing():
    whole, _, _ = _render_sphere()
    chunked, _, sphere = _render_sphere(eval_chunk_size=97)
    assert max(sphere.n_queried) <= 97
    for field in dataclasses.fields(whole):
        expected, value = getattr(whole, field.name), getattr(chunked, field.name)
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(value, expected)
    assert whole.n_samples == chunked.n_samples


@pytest.mark.parametrize("changes", [{"prune_alpha_threshold": False}, {"grid_prune": False}])
def test_pruning_saves_samples_and_hardly_changes_the_image(changes):
    pruned, _, _ = _render_sphere()
    full, _, _ = _render_sphere(**changes)
    assert pruned.n_samples < full.n_samples
    torch.testing.assert_close(pruned.rgb, full.rgb, atol=0.02, rtol=0)


def test_training_step_reaches_every_parameter(device):
    lit = MaterialConfig(ambient_only_steps=0, diffuse_prob=1.0, textureless_prob=0.0)
    field, renderer = _small_field().to(device), _renderer(lit).to(device)
    background = Background(BackgroundConfig(random_aug=False), _generator()).to(device)
    cameras = _cameras(batch=2).to(device)
    output = _trained(renderer, field, background, cameras, 0, _generator())
    assert output.rgb.shape == output.normal.shape == output.rgb_fg.shape == (2, 12, 12, 3)
    assert output.opacity.shape == output.depth.shape == (2, 12, 12, 1)
    assert output.orientation.shape == (2, 12, 12, 1)
    target = torch.rand(output.rgb.shape, generator=_generator()).to(device)
    terms = regularizers(output, LossConfig(), 0)
    loss = (output.rgb - target).square().mean() + sum(v * w for v, w in terms.values())
    loss.backward()
    for module in (field, background):
        for name, parameter in module.named_parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("mode", ["empty grid", "transparent"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_to_see_is_the_background(mode, training, device):
    field, renderer = _small_field().to(device), _renderer().to(device)
    if mode == "transparent":
        # Occupied cells whose samples are all too thin to keep.
        renderer.occupancy.fill()
        for parameter in field.density_network.parameters():
            torch.nn.init.zeros_(parameter)
        field.cfg.density_bias = -1000.0
    background = Background(BackgroundConfig(random_aug=False), _generator()).to(device)
    cameras = _cameras(batch=2, size=3).to(device)
    # Step 8 does not touch the occupancy grid.
    if training:
        output = _trained(renderer, field, background, cameras, 8, _generator())
    else:
        output = renderer.view(field, background, cameras, 8)
    assert output.n_samples == 0
    assert not output.opacity.any() and not output.depth.any() and not output.normal.any()
    torch.testing.assert_close(output.rgb, background(cameras.rays_d, training=False))
    if training:
        terms = regularizers(output, LossConfig(), 8)
        (output.rgb.sum() + sum(v * w for v, w in terms.values())).backward()
        assert all(p.grad is not None and not p.grad.any() for p in field.parameters())
        assert all(p.grad.isfinite().all() for p in background.parameters())


def test_batch_equals_single_views():
    field, renderer = _small_field(), _renderer(MaterialConfig(ambient_only_steps=0))
    renderer.update_occupancy(field, 0, _generator())
    background = _background()
    batch = _cameras(batch=2, size=7)
    both = renderer.view(field, background, batch, 5)
    for i in range(2):
        single = dataclasses.replace(
            batch,
            **{
                f.name: getattr(batch, f.name)[i : i + 1]
                for f in dataclasses.fields(batch)
                if isinstance(getattr(batch, f.name), torch.Tensor)
            },
        )
        output = renderer.view(field, background, single, 5)
        for name in ("rgb", "opacity", "depth", "normal", "z_variance"):
            torch.testing.assert_close(
                getattr(both, name)[i : i + 1], getattr(output, name), atol=1e-5, rtol=1e-4
            )


def test_evaluation_is_not_random_and_records_nothing():
    field, renderer = _small_field(), _renderer()
    renderer.update_occupancy(field, 0, _generator())
    background = Background(BackgroundConfig(), _generator())
    first, second = (renderer.view(field, background, _cameras(), 0) for _ in range(2))
    assert torch.equal(first.rgb, second.rgb)
    assert not first.rgb.requires_grad
    assert torch.equal(first.depth, second.depth)


def test_training_follows_the_generator():
    def render(seed):
        field, renderer = _small_field(), _renderer()
        return _trained(renderer, field, _background(), _cameras(), 0, _generator(seed)).rgb

    assert torch.equal(render(0), render(0))
    assert not torch.equal(render(0), render(1))


def test_jitter_moves_samples_within_a_step():
    outputs = {}
    for randomized in (False, True):
        renderer = _renderer(randomized=randomized)
        renderer.occupancy.fill()
        output = _trained(renderer, Sphere(), _background(), _cameras(), 8, _generator())
        outputs[randomized] = output.depth / output.opacity.clamp(min=1e-5)
    shift = (outputs[True] - outputs[False]).abs()
    assert 0 < float(shift.max()) <= 2.5 * renderer.step_size


def test_level_mask_is_refreshed_before_the_occupancy_update():
    steps_seen = []

    class Watched(Sphere):
        def density(self, points):
            steps_seen.append(self.step)
            return super().density(points)

    _trained(_renderer(), Watched(), _background(), _cameras(), 32, _generator())
    assert steps_seen and set(steps_seen) == {32}


def test_most_steps_leave_the_grid_alone():
    renderer = _renderer()
    output = _trained(renderer, Sphere(), _background(), _cameras(), 8, _generator())
    assert output.n_samples == 0 and not renderer.occupancy.occs.any()


def _cuda_render(renderer: Renderer, field: Field, seed: int = 0, generator=None):
    """A training rendering of the same view on CUDA and the gradient of all its losses."""
    cameras = _cameras(size=24).to("cuda")
    background = Background(BackgroundConfig(random_aug=False), _generator()).cuda()
    if generator is None:
        generator = _generator(seed)
    output = _trained(renderer, field, background, cameras, 8, generator)
    terms = regularizers(output, LossConfig(), 0)
    loss = output.rgb.square().sum() + sum(v * w for v, w in terms.values())
    return output, torch.autograd.grad(loss, list(field.parameters()))


def _cuda_scene(**changes) -> tuple[Renderer, Field]:
    renderer, field = _renderer(**changes).cuda(), _small_field().cuda()
    renderer.update_occupancy(field, 0, _generator())
    return renderer, field


@cuda_only
def test_learnt_room_changes_nothing(monkeypatch):
    monkeypatch.setattr("dsd_fast.scene.sample_room.LESSONS", 1)
    renderer, field = _cuda_scene()
    first, first_gradients = _cuda_render(renderer, field)  # counts
    second, gradients = _cuda_render(renderer, field)  # has room
    assert int(first.n_samples) == int(second.n_samples) > 0
    for name in ("rgb", "opacity", "depth", "normal", "z_variance", "orientation"):
        value, expected = getattr(second, name), getattr(first, name)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for value, expected in zip(gradients, first_gradients):
        assert relative_error(value, expected) < 1e-4


@cuda_only
def test_rendering_does_not_wait_for_the_device(monkeypatch):
    monkeypatch.setattr("dsd_fast.scene.sample_room.LESSONS", 1)
    renderer, field = _cuda_scene()
    _cuda_render(renderer, field)
    cameras = _cameras(size=24).to("cuda")
    background = Background(BackgroundConfig(random_aug=False), _generator()).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = _trained(renderer, field, background, cameras, 8, _generator())
        terms = regularizers(output, LossConfig(), 0)
        (output.rgb.sum() + sum(v * w for v, w in terms.values())).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert field.grid.table.grad.any()


@cuda_only
def test_samples_without_room_are_reported(caplog):
    renderer, field = _cuda_scene(sample_room=(64.0, 3.0))
    full, _ = _cuda_render(*_cuda_scene())
    cut, gradients = _cuda_render(renderer, field)
    assert int(cut.n_samples) == 3 * 24**2 < int(full.n_samples)
    assert all(g.isfinite().all() for g in gradients)
    for _ in range(LAG + 1):
        assert "found no room" not in caplog.text
        _cuda_render(renderer, field)
    assert "found no room" in caplog.text and "raise sample_room" in caplog.text


@cuda_only
def test_a_graph_holds_a_rendering_and_its_backward_pass():
    renderer, field = _cuda_scene(sample_room=(64.0, 32.0))
    generator = torch.Generator("cuda").manual_seed(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _cuda_render(renderer, field, generator=generator)
    torch.cuda.synchronize()
    cameras = _cameras(size=24).to("cuda")
    background = Background(BackgroundConfig(random_aug=False), _generator()).cuda()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        output = _trained(renderer, field, background, cameras, 8, generator)
        terms = regularizers(output, LossConfig(), 0)
        loss = output.rgb.square().sum() + sum(v * w for v, w in terms.values())
        gradients = torch.autograd.grad(loss, list(field.parameters()))
    with torch.no_grad():
        field.grid.table.mul_(0.5)
        field.half_table()
    graph.replay()
    replayed = [output.opacity.clone(), gradients[0].clone()]
    plain = _cuda_render(renderer, field, generator=torch.Generator("cuda").manual_seed(0))
    # Other jitter: alike, not equal.
    assert relative_error(replayed[0], plain[0].opacity) < 0.05
    assert relative_error(replayed[1], plain[1][0]) < 0.5
    assert int(output.n_samples) > 0


@cuda_only
def test_a_graph_needs_a_room_for_samples():
    room = SampleRoom("kept")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
        with pytest.raises(ValueError, match="not learnt yet"):
            room.room(1)


def test_room_is_learnt_kept_and_forgotten():
    room = SampleRoom("kept")
    for _ in range(LESSONS):
        assert room.room(1000) is None
        room.learn(20_000, 1000)
    assert room.room(100_000) == 2_500_000 and room.room(400_000) == 10_000_000
    room.learn(0, 1000)  # a view of nothing does not take the room away at once
    assert room.room(100_000) == 2_500_000
    room.learn(21_000, 1000)
    assert room.room(100_000) == 2_500_000
    room.learn(25_000, 1000)
    assert room.room(100_000) == 3_125_000
    for _ in range(5000):
        room.learn(0, 1000)
    assert room.room(100_000) == room.room(1) == FLOOR


def test_room_reports_what_was_dropped(caplog):
    packed = PackedSamples(*[torch.zeros(0)] * 5)._replace(
        offsets=torch.tensor([0, 30]), n_dropped=torch.tensor(10)
    )
    learning, fixed = SampleRoom("kept"), SampleRoom("marched", 5000.0)
    learning.watch(packed, 1)
    assert "10 of 40 samples kept found no room in one rendering (1 times so far); the next" in (
        caplog.text
    )
    for _ in range(4):
        learning.watch(packed, 1)
    assert caplog.text.count("samples kept") == 3  # the first, second and fourth
    fixed.watch(packed, 1)
    assert "samples marched found no room" in caplog.text and "raise sample_room" in caplog.text
    assert learning.n_dropped == 50 and learning._per_ray == 40.0
    assert fixed.room(1) == 5000


def test_room_must_be_positive():
    with pytest.raises(ValueError, match="sample_room: expected more than 0, got"):
        _renderer(sample_room=(1.0, 0.0))


def test_step_size():
    assert _renderer().step_size == pytest.approx(0.01353125)


@pytest.mark.parametrize("name", ["num_samples_per_ray", "eval_chunk_size"])
def test_bad_configurations(name):
    with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got 0"):
        _renderer(**{name: 0})
    with pytest.raises(ValueError, match="near_plane: expected less than far_plane"):
        _renderer(near_plane=2.0, far_plane=1.0)
