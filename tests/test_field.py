import math

import pytest
import torch
import torch.nn.functional as F
from conftest import cuda_only

from dsd_fast.ops.hashgrid import hashgrid_reference
from dsd_fast.scene.field import Field, FieldConfig, GridConfig

SMALL_GRID = GridConfig(
    n_levels=4, log2_table_size=9, base_resolution=4, start_level=3, start_step=20, update_steps=5
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _field(**changes) -> Field:
    """A small field whose grid is no longer flat."""
    field = Field(FieldConfig(**{"grid": SMALL_GRID, **changes}), _generator())
    with torch.no_grad():
        field.grid.table.uniform_(-0.5, 0.5, generator=_generator(1))
    return field


def _points(n: int = 131, scale: float = 0.5) -> torch.Tensor:
    return (scale * torch.randn(n, 3, generator=_generator(2))).clamp(-1.9, 1.9)


@pytest.fixture
def reference_ops(monkeypatch):
    monkeypatch.setenv("DSD_BACKEND", "torch")


def _bias(cfg: FieldConfig, points: torch.Tensor) -> torch.Tensor:
    scale, std = cfg.density_blob_scale, cfg.density_blob_std
    if cfg.density_bias == "blob_magic3d":
        return scale * (1 - points.norm(dim=-1) / std)
    if cfg.density_bias == "blob_dreamfusion":
        return scale * torch.exp(-points.square().sum(-1) / (2 * std**2))
    return torch.full((len(points),), float(cfg.density_bias), dtype=points.dtype)


class _TruncExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.exp(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.exp(ctx.saved_tensors[0].clamp(max=15))


_ACTIVATIONS = {"softplus": F.softplus, "exp": torch.exp, "trunc_exp": _TruncExp.apply}


def _by_double_backward(field: Field, points: torch.Tensor):
    """Density, features and analytic normal through autograd with create_graph."""
    points = points.clone().requires_grad_()
    encoded = hashgrid_reference(
        (points + field.cfg.radius) / (2 * field.cfg.radius),
        field.grid.table,
        field.grid.spec,
        field.grid.n_active_levels,
    )
    levels = field.grid.spec.levels
    shares = torch.tensor([levels[0].resolution / level.resolution for level in levels])
    shares = (shares.double() ** field.cfg.density_fade).float()  # kept in single precision
    faded = (encoded.unflatten(1, (len(levels), -1)) * shares[:, None]).flatten(1)
    raw = field.density_network(faded)[:, 0] + _bias(field.cfg, points)
    density = _ACTIVATIONS[field.cfg.density_activation](raw)
    (gradient,) = torch.autograd.grad(density.sum(), points, create_graph=True)
    return density, field.feature_network(encoded), -F.normalize(gradient, dim=-1, eps=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"density_bias": "blob_dreamfusion"},
        {"density_bias": -1.0, "radius": 1.5},
        {"density_activation": "exp", "density_bias": 0.3},
        {"density_activation": "trunc_exp", "density_blob_scale": 20.0},
        {"density_fade": 1.5},
    ],
    ids=["official", "dreamfusion", "constant", "exp", "trunc_exp", "fade"],
)
def test_analytic_normals_equal_double_backward(changes, reference_ops):
    field = _field(**changes).double()
    points = _points().double().clamp(-1.4, 1.4)
    weights = [
        torch.randn(131, *shape, generator=_generator(i)).double()
        for i, shape in enumerate([(), (3,), (3,)])
    ]

    def gradients(outputs):
        loss = sum((w * output).sum() for w, output in zip(weights, outputs))
        field.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in field.named_parameters()}

    outputs, expected = field(points), _by_double_backward(field, points)
    for output, value in zip(outputs, expected):
        torch.testing.assert_close(output, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients(outputs), gradients(expected), rtol=1e-8, atol=1e-10)
    assert all(g.any() for g in gradients(field(points)).values())


def test_gradient_of_normals_alone_reaches_grid_and_density_network(reference_ops):
    field = _field().double()
    weights = torch.randn(131, 3, generator=_generator(5)).double()
    (field(_points().double()).normal * weights).sum().backward()
    ours = {name: p.grad.clone() for name, p in field.named_parameters() if p.grad is not None}
    field.zero_grad()
    (_by_double_backward(field, _points().double())[2] * weights).sum().backward()
    first, second = (f"density_network.layers.{i}.weight" for i in (0, 2))
    for name in ("grid.table", first, second):
        expected = field.get_parameter(name).grad
        torch.testing.assert_close(ours[name], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("fade", [0.0, 1.0])
def test_compiled_float32_agrees_with_double_reference(device, monkeypatch, fade):
    field = _field(half_table=False, density_fade=fade).to(device)
    points = _points().to(device)
    outputs = field(points)
    weights = torch.randn(131, 3, generator=_generator(5)).to(device)
    ((outputs.normal * weights).sum() + outputs.density.sum() + outputs.features.sum()).backward()
    ours = {name: p.grad.double().cpu() for name, p in field.named_parameters()}
    monkeypatch.setenv("DSD_BACKEND", "torch")
    double = _field(density_fade=fade).double()
    expected = double(_points().double())
    for output, value in zip(outputs, expected):
        torch.testing.assert_close(output.double().cpu(), value, rtol=1e-4, atol=1e-4)
    weights = weights.double().cpu()
    loss = (expected.normal * weights).sum() + expected.density.sum() + expected.features.sum()
    loss.backward()
    for name, parameter in double.named_parameters():
        error = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize("changes", [{}, {"n_hidden_layers": 2}, {"n_neurons": 32}])
def test_faded_levels_are_the_same_for_every_question(device, changes):
    """Fused or not, density alone or all; colours see all levels alike."""
    if changes.get("n_hidden_layers"):
        changes = {**changes, "normal_type": "finite_difference"}
    field = _field(half_table=False, density_fade=2.0, **changes).to(device)
    points = _points().to(device)
    density, features, _ = field(points)
    torch.testing.assert_close(field.density(points), density)
    plain = _field(half_table=False, **changes).to(device)
    torch.testing.assert_close(plain(points).features, features)
    assert (plain.density(points) - density).abs().max() > 1e-3
    assert plain.state_dict().keys() == field.state_dict().keys()


@pytest.mark.parametrize("radius, density", [(0.0, 10.0), (0.5, 0.6931), (1.0, 4.54e-5)])
def test_initial_blob(radius, density):
    field = Field(FieldConfig(grid=SMALL_GRID), _generator())
    points = torch.tensor([[0.0, radius, 0.0], [radius, 0.0, 0.0]])
    output = field(points)
    torch.testing.assert_close(output.density, torch.full((2,), density), rtol=1e-2, atol=0)
    torch.testing.assert_close(field.density(points), output.density, rtol=1e-4, atol=1e-7)
    if radius:
        expected = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        torch.testing.assert_close(output.normal, expected, atol=1e-3, rtol=0)


def test_centre_of_the_blob_is_finite(device):
    field = _field().to(device)
    output = field(torch.zeros(2, 3, device=device))
    (output.normal.sum() + output.density.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in field.parameters())
    assert output.normal.isfinite().all()


@pytest.mark.parametrize(
    ("step", "levels"),
    [
        (0, 8),
        (2000, 8),
        (2499, 8),
        (2500, 9),
        (3000, 10),
        (4999, 13),
        (5999, 15),
        (6000, 16),
        (10**6, 16),
    ],
)
def test_official_level_schedule(step, levels):
    grid = GridConfig(log2_table_size=4)
    field = Field(FieldConfig(grid=grid), _generator())
    field.set_step(step)
    assert field.grid.n_active_levels == levels


def test_locked_levels_read_zero_and_get_no_gradient():
    field = _field()
    field(_points()).normal.sum().backward()
    spec = field.grid.spec
    n_unlocked = sum(level.size for level in spec.levels[:3]) * spec.n_features
    gradient = field.grid.table.grad.flatten()
    assert gradient[:n_unlocked].any() and not gradient[n_unlocked:].any()
    before = field.density(_points())
    field.set_step(25)
    assert not torch.allclose(before, field.density(_points()))


@pytest.mark.parametrize("kind", ["finite_difference", "finite_difference_laplacian"])
def test_difference_normals_approach_analytic_ones(kind, reference_ops):
    field = _field(normal_type=kind, finite_difference_normal_eps=1e-6).double()
    analytic = _field().double()
    points = _points().double()
    normal = field(points).normal
    # Cells and ReLUs have kinks; a point beside one may see across it.
    agreement = (normal * analytic(points).normal).sum(-1)
    assert float((agreement > 1 - 1e-6).double().mean()) > 0.97
    normal.sum().backward()
    assert field.grid.table.grad.any()


def test_predicted_normals():
    field = _field(normal_type="pred")
    normal = field(_points()).normal
    torch.testing.assert_close(normal.norm(dim=-1), torch.ones(131))
    normal[:, 0].sum().backward()
    assert field.normal_network.layers[0].weight.grad.any()


def test_without_gradients_blocks_change_nothing(monkeypatch):
    field, points = _field(), _points()
    expected = field(points)
    monkeypatch.setattr("dsd_fast.scene.field._QUERY_BLOCK", {"cpu": 50, "cuda": 50})
    with torch.no_grad():
        for output, value in zip(field(points), expected):
            torch.testing.assert_close(output, value)
        torch.testing.assert_close(field.density(points), expected.density)
        assert field(points, normals=False).normal is None


@pytest.mark.parametrize("with_gradients", [True, False])
def test_no_points(with_gradients, device):
    field = _field().to(device)
    points = torch.empty(0, 3, device=device)
    with torch.set_grad_enabled(with_gradients):
        output = field(points)
        assert field.density(points).shape == (0,)
    assert output.density.shape == (0,)
    assert output.features.shape == output.normal.shape == (0, 3)
    if with_gradients:
        (output.density.sum() + output.features.sum() + output.normal.sum()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in field.parameters())


@cuda_only
def test_half_table_follows_the_table():
    """Values as of a field whose table was rounded, and gradients to the float32 table."""
    half, exact = _field().cuda(), _field(half_table=False).cuda()
    for scale in (1.0, 0.5):  # the second time the copy is stale
        with torch.no_grad():
            half.grid.table.mul_(scale)
            exact.grid.table.copy_(half.grid.table.half())
        for value, close in zip(half(_points().cuda()), exact(_points().cuda())):
            torch.testing.assert_close(value, close, rtol=2e-2, atol=2e-2)
    half(_points().cuda()).density.sum().backward()
    exact(_points().cuda()).density.sum().backward()
    gradient, expected = half.grid.table.grad, exact.grid.table.grad
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 2e-2 * expected.norm()
    assert not any("half" in name for name in half.state_dict())


@cuda_only
@pytest.mark.parametrize(
    "changes", [{"normal_type": "pred"}, {"n_neurons": 32}, {"normal_type": "finite_difference"}]
)
def test_fields_of_another_shape_run_on_cuda(changes):
    field = _field(**changes).cuda()
    output = field(_points().cuda())
    sum(x.sum() for x in output).backward()
    expected = _field(**changes)(_points())
    for value, close in zip(output, expected):
        torch.testing.assert_close(value.cpu(), close, rtol=3e-2, atol=3e-2)


def test_autocast_does_not_lower_the_precision(device):
    field, points = _field().to(device), _points().to(device)
    expected = field(points)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = field(points)
    for value, same in zip(output, expected):
        torch.testing.assert_close(value, same, rtol=0, atol=0)


def test_networks_follow_the_generator_and_the_grid_does_not():
    first, same, other = (Field(FieldConfig(grid=SMALL_GRID), _generator(s)) for s in (1, 1, 2))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        assert torch.equal(parameter, other.get_parameter(name)) == (name == "grid.table")
    assert {tuple(p.shape) for p in first.density_network.parameters()} == {(64, 8), (1, 64)}
    assert {tuple(p.shape) for p in first.feature_network.parameters()} == {(64, 8), (3, 64)}
    bound = 1 / math.sqrt(8)
    weight = first.density_network.layers[0].weight
    assert 0.95 * bound < float(weight.detach().abs().max()) <= bound


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normal_type": "mesh"}, "normal_type: expected 'analytic'"),
        ({"density_activation": "relu"}, "density_activation: expected 'softplus'"),
        ({"density_bias": "cube"}, "density_bias: expected 'blob_magic3d' or .* or a number"),
        ({"n_hidden_layers": 2}, "needs n_hidden_layers = 1"),
        ({"grid": GridConfig(n_levels=4, start_level=5)}, "start_level: expected 1 to"),
        ({"grid": GridConfig(update_steps=0)}, "update_steps: expected 1 or more"),
        ({"radius": 0.0}, "radius: expected 0.001 or more"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        Field(FieldConfig(**changes))
