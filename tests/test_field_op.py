"""The fused field: against the Field module in float64, gradients of everything, edge cases."""

import pytest
import torch
from conftest import cuda_only, relative_error
from torch import Tensor

from dsd_fast.ops.field import FieldShape, fused_field, fused_field_reference
from dsd_fast.ops.hashgrid import GridSpec
from dsd_fast.scene.field import Field, FieldConfig, GridConfig

GRIDS = {
    "F2": GridConfig(6, 2, 9, 4, 1.6, start_level=6),
    "F4": GridConfig(5, 4, 8, 3, 1.9, start_level=5),
    "wide": GridConfig(16, 2, 10, 4, 1.4, start_level=16),
}
BIASES = ["blob_magic3d", "blob_dreamfusion", -0.7]
ACTIVATIONS = ["softplus", "exp", "trunc_exp"]


def make_field(grid: str = "F2", bias="blob_magic3d", activation="softplus") -> Field:
    cfg = FieldConfig(
        grid=GRIDS[grid],
        radius=1.5,
        density_bias=bias,
        density_blob_scale=3.0,
        density_activation=activation,
    )
    generator = torch.Generator().manual_seed(3)
    field = Field(cfg, generator)
    with torch.no_grad():
        field.grid.table.copy_(torch.randn(field.grid.table.shape, generator=generator))
    return field


def tensors_of(field: Field) -> list[Tensor]:
    heads = (field.density_network, field.feature_network)
    return [field.grid.table, *(weight for head in heads for weight in head.weights)]


def make_points(n: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    points = torch.rand(n, 3, generator=generator) * 2.8 - 1.4
    points[:1] = 0.0  # the tip of the cone
    return points.to(device)


def cotangents(n: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + 1)
    shapes = ((n,), (n, 3), (n, 3))
    return tuple(torch.randn(s, generator=generator).to(like) for s in shapes)


def exact(field: Field, points: Tensor, grads, monkeypatch) -> list[Tensor]:
    """Outputs and gradients of the module in float64, on the CPU."""
    monkeypatch.setenv("DSD_BACKEND", "torch")
    n_active = field.grid.n_active_levels
    field = field.double().cpu()
    field.grid.n_active_levels = n_active
    # Rounded as the kernels round it: which cell a point is in does not depend on precision.
    alpha = torch.tensor(0.5 / field.cfg.radius).double()
    unit = (0.5 + points.cpu().double() * alpha).float().double()
    monkeypatch.setattr(field, "_to_unit_cube", lambda _: unit)
    normals = grads[2] is not None
    with torch.enable_grad():
        outputs = field._evaluate(points.cpu().double(), normals)
        pairs = [(o, g.cpu().double()) for o, g in zip(outputs, grads) if g is not None]
        got = torch.autograd.grad(
            [o for o, _ in pairs], tensors_of(field), [g for _, g in pairs], allow_unused=True
        )
    monkeypatch.delenv("DSD_BACKEND")
    return [o for o in outputs if o is not None] + [
        torch.zeros_like(t) if g is None else g for g, t in zip(got, tensors_of(field))
    ]


def fused(
    field: Field, points: Tensor, grads, op=fused_field, half=False, n_valid=None
) -> list[Tensor]:
    tensors = [t.detach().to(points.device).requires_grad_() for t in tensors_of(field)]
    half_table = tensors[0].detach().half() if half else None
    outputs = op(
        points,
        *tensors,
        field.shape,
        field.grid.n_active_levels,
        normals=grads[2] is not None,
        half_table=half_table,
        n_valid=n_valid,
    )
    pairs = [(o, g) for o, g in zip(outputs, grads) if g is not None]
    got = torch.autograd.grad(
        [o for o, _ in pairs], tensors, [g for _, g in pairs], materialize_grads=True
    )
    return [o for o in outputs if o is not None] + list(got)


NAMES = ("density", "features", "normal", "table", "w1d", "w2d", "w1f", "w2f")


def compare(got: list[Tensor], want: list[Tensor], limit: float) -> None:
    names = [name for name in NAMES if len(got) == len(NAMES) or name != "normal"]
    errors = {n: relative_error(g, w) for n, g, w in zip(names, got, want, strict=True)}
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("n", [1, 257])
@pytest.mark.parametrize("normals", [True, False])
def test_agrees_with_the_module_in_float64(grid, n, normals, device, monkeypatch) -> None:
    field, points = make_field(grid), make_points(n, device)
    grads = cotangents(n, points)
    grads = grads if normals else (*grads[:2], None)
    # On the wide grid's finest level a fraction has 14 bits left in float32.
    limit = 1e-4 if grid == "wide" else 2e-5
    compare(fused(field, points, grads), exact(field, points, grads, monkeypatch), limit)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_biases_and_activations(bias, activation, device, monkeypatch) -> None:
    field, points = make_field("F2", bias, activation), make_points(131, device)
    grads = cotangents(131, points)
    compare(fused(field, points, grads), exact(field, points, grads, monkeypatch), 2e-5)


@pytest.mark.parametrize("bias", [19.0, 30.0, -30.0, -60.0])
@pytest.mark.parametrize("activation", ["softplus", "trunc_exp"])
def test_far_raw_densities(bias, activation, device, monkeypatch) -> None:
    """Both sides of the thresholds, and slopes so small that normals are shorter than one."""
    field, points = make_field("F2", bias, activation), make_points(65, device)
    grads = cotangents(65, points)
    compare(fused(field, points, grads), exact(field, points, grads, monkeypatch), 2e-5)


@pytest.mark.parametrize("n_active", [0, 1, 4])
def test_levels_that_are_not_active(n_active, device, monkeypatch) -> None:
    field, points = make_field(), make_points(77, device)
    field.grid.n_active_levels = n_active
    grads = cotangents(77, points)
    got = fused(field, points, grads)
    compare(got, exact(field, points, grads, monkeypatch), 2e-5)
    if n_active < 6:
        spec = field.grid.spec
        assert (got[3][spec.levels[n_active].offset * spec.n_features :] == 0).all()


def test_all_points_in_one_cell(device, monkeypatch) -> None:
    field = make_field()
    points = make_points(333, device) * 1e-3 + 0.31
    grads = cotangents(333, points)
    compare(fused(field, points, grads), exact(field, points, grads, monkeypatch), 5e-5)


def test_points_along_rays(device, monkeypatch) -> None:
    """Runs of neighbours in one cell, that end within a group of 32 and go on into the next."""
    field = make_field("wide")
    start, end = make_points(7, device), make_points(8, device)[1:]
    t = torch.linspace(0, 1, 61, device=device)[None, :, None]
    points = (start[:, None] + t * (end - start)[:, None]).reshape(-1, 3).contiguous()
    grads = cotangents(len(points), points)
    compare(fused(field, points, grads), exact(field, points, grads, monkeypatch), 1e-4)


def test_some_points_outside_the_box(device) -> None:
    field, points = make_field(), make_points(131, device)
    points[::7] *= 3.0
    grads = cotangents(131, points)
    got = fused(field, points, grads)
    compare(got, fused(field, points, grads, fused_field_reference), 1e-4)


@pytest.mark.parametrize("op", [fused_field, fused_field_reference])
@pytest.mark.parametrize("n_valid", [0, 1, 128, 200, 333, 400])
@pytest.mark.parametrize("half", [False, True])
def test_rows_that_are_not_valid(op, n_valid, half, device) -> None:
    field, points = make_field(), make_points(333, device)
    n = min(n_valid, 333)
    points[n:] = float("nan")
    grads = cotangents(333, points)
    count = torch.tensor(n_valid, device=device)
    got = fused(field, points, grads, op, half, count)
    want = fused(field, points[:n], tuple(g[:n] for g in grads), op, half)
    for output in got[:3]:
        assert (output[n:] == 0).all()
    compare([x[:n] for x in got[:3]] + got[3:], want, 1e-4)


@cuda_only
@pytest.mark.parametrize("half", [False, True])
def test_many_points_are_taken_in_chunks(half) -> None:
    device, n = torch.device("cuda"), (1 << 18) + 77
    field, points = make_field(), make_points(n, device)
    grads = cotangents(n, points)
    parts = [
        fused(field, points[part], tuple(g[part] for g in grads), half=half)
        for part in (slice(0, 1 << 18), slice(1 << 18, n))
    ]
    outputs = [torch.cat(columns) for columns in zip(*(part[:3] for part in parts))]
    want = outputs + [a + b for a, b in zip(*(part[3:] for part in parts))]
    compare(fused(field, points, grads, half=half), want, 1e-4)
    count = torch.tensor((1 << 18) + 5, device=device)
    part = slice(0, (1 << 18) + 5)
    want = fused(field, points[part], tuple(g[part] for g in grads), half=half)
    got = fused(field, points, grads, half=half, n_valid=count)
    compare([x[part] for x in got[:3]] + got[3:], want, 1e-4)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("output", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_show(half, output, value, device) -> None:
    field, points = make_field(), make_points(65, device)
    grads = cotangents(65, points)
    grads[output][40] = value
    table, w1d, w2d, w1f, w2f = fused(field, points, grads, half=half)[3:]
    reached = (table, w1f, w2f) if output == 1 else (table, w1d, w2d)
    assert not any(bool(g.isfinite().all()) for g in reached)


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_outputs_without_gradients(missing, device, monkeypatch) -> None:
    field, points = make_field(), make_points(65, device)
    grads = cotangents(65, points)
    zeroed = tuple(torch.zeros_like(g) if i in missing else g for i, g in enumerate(grads))
    want = exact(field, points, zeroed, monkeypatch)[3:]
    tensors = [t.detach().float().to(device).requires_grad_() for t in tensors_of(field)]
    outputs = fused_field(points, *tensors, field.shape)
    kept = [i for i in range(3) if i not in missing]
    got = torch.autograd.grad(
        [outputs[i] for i in kept], tensors, [grads[i] for i in kept], materialize_grads=True
    )
    for name, g, w in zip(NAMES[3:], got, want, strict=True):
        assert relative_error(g, w) <= 2e-5, name


def test_density_alone(device) -> None:
    field, points = make_field(), make_points(65, device)
    tensors = [t.detach().to(device) for t in tensors_of(field)]
    density, features, normal = fused_field(
        points, *tensors, field.shape, features=False, normals=False
    )
    assert features is None and normal is None
    assert torch.equal(density, fused_field(points, *tensors, field.shape, normals=False)[0])


def test_no_points(device) -> None:
    field = make_field()
    grads = cotangents(0, torch.empty(0, device=device))
    got = fused(field, torch.empty(0, 3, device=device), grads)
    assert [list(g.shape) for g in got[:3]] == [[0], [0, 3], [0, 3]]
    assert all((g == 0).all() for g in got[3:])


def test_reference_agrees_with_the_module(monkeypatch) -> None:
    field, points = make_field(), make_points(65, torch.device("cpu"))
    grads = cotangents(65, points)
    got = fused(field, points, grads, fused_field_reference)
    compare(got, exact(field, points, grads, monkeypatch), 2e-5)


def test_cpu_results_do_not_depend_on_threads() -> None:
    field, points = make_field(), make_points(5003, torch.device("cpu"))
    grads = cotangents(5003, points)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(fused(field, points, grads))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_half_table(device) -> None:
    """Values of the copy; on CUDA the heads' operands are rounded too.

    A rounding that moves a neuron over the edge of its ReLU changes a sample's gradient by that
    neuron's whole part, and one in some thousand does.
    """
    field, points = make_field("wide"), make_points(1031, device)
    with torch.no_grad():
        field.grid.table.mul_(0.1)
    # The scale of a mean over many pixels.
    grads = tuple(g * 1e-7 for g in cotangents(1031, points))
    got = fused(field, points, grads, half=True)
    want = fused(field, points, grads, fused_field_reference, half=True)
    limit = 1e-4 if device.type == "cpu" else 8e-2
    compare(got, want, limit)


@cuda_only
@pytest.mark.parametrize("normals", [True, False])
def test_captures(normals) -> None:
    """Forward and backward run inside a CUDA graph: no synchronisation, no host reads."""
    device = torch.device("cuda")
    field, points = make_field("wide"), make_points(4099, device)
    grads = cotangents(4099, points)
    grads = grads if normals else (*grads[:2], None)
    field.to(device)
    fused(field, points, grads, half=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused(field, points, grads, half=True)
    graph.replay()
    for got, want in zip(captured, fused(field, points, grads, half=True)):
        assert relative_error(got, want) <= 1e-4


def test_opcheck(device) -> None:
    from dsd_fast.ops.field import _numbers

    field, points = make_field(), make_points(9, device)
    table, *weights = (t.detach().to(device).requires_grad_() for t in tensors_of(field))
    numbers = _numbers(field.shape, 6)
    tensors = (points, table, None, *weights, torch.tensor(7, device=device))
    operators = torch.ops.dsd_fast
    torch.library.opcheck(operators.fused_field.default, (*tensors, True, True, *numbers))
    detached = tuple(None if t is None else t.detach() for t in tensors)
    grads = cotangents(9, points)
    torch.library.opcheck(operators.fused_field_bwd.default, (*detached, *grads, *numbers))


def test_errors_name_what_was_expected() -> None:
    field = make_field()
    tensors = [t.detach() for t in tensors_of(field)]
    points = torch.zeros(4, 3)
    with pytest.raises(TypeError, match="points must be float32"):
        fused_field(points.double(), *tensors, field.shape)
    with pytest.raises(TypeError, match="n_valid must be int64"):
        fused_field(points, *tensors, field.shape, n_valid=torch.tensor(1.0))
    with pytest.raises(ValueError, match="w2f must have shape"):
        fused_field(points, *tensors[:4], tensors[4][:2], field.shape)
    with pytest.raises(ValueError, match="at most 32 columns"):
        fused_field(points, *tensors, FieldShape(GridSpec(16, 4, 9, 4, 1.4)))
    with pytest.raises(ValueError, match="activation must be one of"):
        fused_field(points, *tensors, field.shape._replace(activation="relu"))
