"""A mesh as a scene: what is seen of it, where gradients go, and runs of training steps."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_rasterize import sphere

from dsd_fast.config import ConfigError, preset
from dsd_fast.diffusion import embed_views, load_model
from dsd_fast.guidance import DSDGuidance, GuidanceConfig, seed_noise
from dsd_fast.rng import RngStreams
from dsd_fast.run.optimizer import Adam
from dsd_fast.run.state import TrainState
from dsd_fast.scene.cameras import CameraBatch, RandomCameras, eval_camera
from dsd_fast.scene.material import albedo_color
from dsd_fast.scene.mesh_scene import MeshScene, Surface
from dsd_fast.tasks.texture import MeshStep

RADIUS = 0.5
CPU = torch.device("cpu")


def settings(**background):
    cfg = preset("embedded", 10, on_cpu=True)
    cfg.field.grid.n_levels, cfg.field.grid.log2_table_size = 3, 10
    cfg.field.grid.start_level = 3
    for name, value in background.items():
        setattr(cfg.background, name, value)
    return cfg


def ball(cfg=None, n_samples: int = 4, n: int = 24, seed: int = 0) -> MeshScene:
    points, faces = sphere(n)
    surface = Surface(RADIUS * points.numpy(), points.numpy(), faces.numpy())
    scene = MeshScene(cfg or settings(), surface, n_samples, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # a new field is of one colour
        table = scene.field.grid.table
        table.uniform_(-30.0, 30.0, generator=torch.Generator().manual_seed(seed))
    return scene


def look(n_views: int = 2, size: tuple[int, int] = (20, 28), device=CPU) -> CameraBatch:
    cfg = settings().cameras
    views = [eval_camera(cfg, 40.0 + 90 * i, 10.0, size) for i in range(n_views)]
    parts = {name: torch.cat([v.tensors()[name] for v in views]) for name in views[0].tensors()}
    angles = {
        name: torch.cat([getattr(v, name) for v in views])
        for name in ("elevation_deg", "azimuth_deg", "distance")
    }
    return CameraBatch(**parts, **angles, height=size[0], width=size[1]).to(device)


def draws_of(scene: MeshScene, views: CameraBatch, step: int = 0) -> dict[str, torch.Tensor]:
    drawn = scene.draw(views, step, torch.Generator().manual_seed(1))
    return {name: value.to(scene.device) for name, value in drawn.items()}


def test_a_ball_is_seen_as_one(device) -> None:
    """Outline, depth, normals, and the field's colours on its surface."""
    scene = ball(settings(eval_color=(0.2, 0.4, 0.6)), n=60).to(device)
    views = look(size=(64, 64), device=device)
    seen = scene.view(views, 0)
    inside = seen.opacity[..., 0] == 1
    origins, dirs = views.rays_o, views.rays_d
    middle = -(origins * dirs).sum(-1)
    room = RADIUS**2 - (origins + middle[..., None] * dirs).square().sum(-1)
    assert abs(seen.opacity.mean() - (room > 0).float().mean()) < 0.01
    deep = inside & (room > 0.3 * RADIUS**2)
    depth = (middle - room.clamp_min(0).sqrt())[deep]
    assert (seen.depth[..., 0][deep] - depth).abs().max() < 0.02
    points = origins[deep] + seen.depth[deep] * dirs[deep]
    normals = 2 * seen.normal[deep] - 1
    assert (normals - points / RADIUS).norm(dim=-1).max() < 0.1
    outside = seen.opacity[..., 0] == 0
    assert (seen.rgb[outside] - torch.tensor([0.2, 0.4, 0.6], device=device)).abs().max() < 1e-6
    assert (seen.rgb_fg[outside] == 0).all()
    albedo = albedo_color(scene.field(points, normals=False).features)
    assert (seen.rgb[deep] - albedo).abs().mean() < 0.05 < seen.rgb[deep].std()


def test_samples_make_outlines_smooth() -> None:
    for n_samples in (1, 4, 8):
        opacity = ball(n_samples=n_samples).view(look(), 0).opacity
        assert set(torch.unique(opacity * n_samples).tolist()) <= set(range(n_samples + 1))
        assert ((opacity > 0) & (opacity < 1)).any() == (n_samples > 1)


def test_gradients_go_to_colours_and_background(device) -> None:
    """And are what they are by autograd of the mean of samples, colour by colour."""
    scene = ball(settings(random_aug_prob=0.0)).to(device)
    views = look(device=device)
    seen = scene.render(views, draws_of(scene, views))
    weights = torch.rand(seen.rgb.shape, generator=torch.Generator().manual_seed(2)).to(device)
    (seen.rgb * weights).sum().backward()
    trained = scene.trainables()
    for name, parameter in scene.named_parameters():
        if name in trained:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert name.startswith("field.density_network"), name
    # Along a direction the rendering changes by what the gradient says.
    parameter = scene.field.feature_network.weights[-1]
    step = 1e-3 * torch.sign(parameter.grad)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * step
            rgb = scene.render(views, draws_of(scene, views)).rgb
            values.append((rgb.double() * weights).sum().item())
            parameter -= sign * step
    wanted = (parameter.grad.double() * step).sum().item()
    assert (values[0] - values[1]) / 2 == pytest.approx(wanted, rel=1e-2)


def test_room_for_all_samples_changes_nothing(device) -> None:
    """What CUDA does, where the host counts nothing, against taking those that see the mesh."""
    scene, views = ball().to(device), look(device=device)
    few, all_of_them = scene._on_surface(views, False), scene._on_surface(views, True)
    n = int(all_of_them.n_valid)
    assert n == len(few.rows) and len(all_of_them.rows) == len(all_of_them.places) > n
    for name in ("points", "normals", "rows"):
        assert torch.equal(getattr(few, name), getattr(all_of_them, name)[:n]), name
    assert torch.equal(few.places, all_of_them.places)
    values = torch.rand(len(all_of_them.rows), 3, generator=torch.Generator().manual_seed(0))
    values = values.to(device).requires_grad_()
    spread = all_of_them.spread(values)
    assert torch.equal(spread, few.spread(values[:n]))
    weights = torch.rand(spread.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (spread * weights).sum().backward()
    assert torch.equal(values.grad[:n], weights[few.rows])


def test_anchored_views_have_the_learned_background() -> None:
    scene, views = ball(settings(random_aug_prob=1.0)), look()
    assert (draws_of(scene, views)["paint"][:, 3] == 1).all()
    anchored = replace(views, anchored=True)
    assert (draws_of(scene, anchored)["paint"] == 0).all()


def test_nothing_in_sight(device) -> None:
    """A camera that looks the other way sees the background, and parameters get zeros."""
    scene, views = ball().to(device), look(device=device)
    views.c2w[:, :3, :3] @= torch.diag(torch.tensor([-1.0, 1.0, -1.0])).to(device)
    seen = scene.render(views, draws_of(scene, views))
    assert (seen.opacity == 0).all() and seen.rgb.isfinite().all()
    seen.rgb.sum().backward()
    grad = scene.field.grid.table.grad
    assert (grad == 0).all()


def test_a_camera_inside_sees_the_wall() -> None:
    scene, views = ball(), look(1)
    views.c2w[:, :3, 3] *= 0.1
    assert (scene.view(views, 0).opacity == 1).all()


def test_a_mesh_outside_of_the_box_is_refused() -> None:
    cfg = settings()
    cfg.field.radius = 0.4
    with pytest.raises(
        ConfigError, match=r"mesh within the box of the field, whose radius is 0\.4"
    ):
        ball(cfg)


def test_colours_by_themselves() -> None:
    """Those that textures are baked of are those that are seen."""
    scene = ball()
    points = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    points *= RADIUS / np.linalg.norm(points, axis=1, keepdims=True)
    wanted = albedo_color(scene.field(torch.from_numpy(points), normals=False).features)
    assert np.allclose(scene.colors(points, 0), wanted.detach().numpy(), atol=1e-6)
    assert scene.colors(np.zeros((0, 3)), 0).shape == (0, 3)


def test_steps_train_it_and_a_state_brings_it_back(tiny_model) -> None:
    model = load_model(tiny_model, CPU, engine="eager")
    cfg = preset("dsd", 10)
    cfg.field.grid.n_levels = cfg.field.grid.start_level = 3
    cfg.field.grid.log2_table_size = 10
    cfg.guidance = GuidanceConfig(trajectory="exact", n_ddim_steps=2)
    cfg.cameras.width = cfg.cameras.height = (12, 12)
    prompts = embed_views(model, "a chair", release=False)
    shape = (1, model.latent_channels, model.latent_size, model.latent_size)

    def begun() -> tuple[TrainState, MeshStep]:
        rng = RngStreams(0)
        scene = ball(cfg)
        optimizer = Adam(scene.trainables(), (0.9, 0.99), 1e-15, CPU)
        noise = seed_noise(rng.noise, shape)
        guidance = DSDGuidance(cfg.guidance, model, prompts, noise, cfg.max_steps)
        state = TrainState(scene, optimizer, noise, rng, model)
        return state, MeshStep(cfg, [state], guidance, RandomCameras(cfg.cameras), CPU)

    state, step = begun()
    before = {name: p.detach().clone() for name, p in state.scene.named_parameters()}
    for _ in range(2):
        (output,) = step()
        assert np.isfinite(list(output.values().values())).all()
    tree = copy.deepcopy(state.to_tree(cfg))
    for _ in range(2):
        step()
    for name, parameter in state.scene.named_parameters():
        moved = (parameter - before[name]).abs().max()
        assert (moved == 0) == name.startswith("field.density_network"), name
    again, step = begun()
    again.restore(tree)
    for _ in range(2):
        step()
    wanted = state.scene.state_dict()
    assert wanted.keys() == again.scene.state_dict().keys()
    assert all(torch.equal(value, wanted[n]) for n, value in again.scene.state_dict().items())
