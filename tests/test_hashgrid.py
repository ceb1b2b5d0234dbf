"""Hash grid: fixtures of tiny-cuda-nn, reference against kernels, finite differences, errors."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import relative_error
from torch import Tensor

import dsd_fast
from dsd_fast._backend import extension
from dsd_fast.ops.hashgrid import (
    GridSpec,
    _spec_args,
    hashgrid,
    hashgrid_jacobian,
    hashgrid_jacobian_reference,
    hashgrid_reference,
)

DSD = GridSpec(16, 2, 19, 16, 1.447269237440378)
# Dense levels, hashed levels, and a level whose size is not a power of two.
SMALL = GridSpec(6, 2, 9, 4, 1.6)
WIDE = GridSpec(5, 4, 8, 3, 1.9)
SPECS = [pytest.param(SMALL, id="F2"), pytest.param(WIDE, id="F4")]
FACES = [
    pytest.param(hashgrid, hashgrid_jacobian, id="compiled"),
    pytest.param(hashgrid_reference, hashgrid_jacobian_reference, id="reference"),
]


def make_inputs(
    spec: GridSpec, n: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """n points, the first of them on the cube's corners, edges and outside it; a random table."""
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(n, 3, generator=generator)
    special = torch.tensor(
        [[0, 0, 0], [1, 1, 1], [1, 0, 0.5], [0.5, 0.5, 0.5], [-0.3, 0.2, 1.7], [9.0, -9.0, 3.3]]
    )
    x[: len(special)] = special[:n]
    table = torch.randn(spec.n_params, generator=generator)
    return x.to(device, dtype), table.to(device, dtype)


def cotangents(spec: GridSpec, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + 1)
    grad_y = torch.randn(n, spec.n_outputs, generator=generator)
    grad_jac = torch.randn(n, spec.n_outputs, 3, generator=generator) / 10
    return grad_y.to(like), grad_jac.to(like)


# ---- layout -------------------------------------------------------------------------------------


def test_levels_are_those_of_the_official_grid() -> None:
    resolutions = [level.resolution for level in DSD.levels]
    assert resolutions == [
        *(16, 24, 34, 49, 71, 102, 148, 213, 308, 446, 646, 934, 1352, 1956, 2831, 4096)
    ]
    sizes = [level.size for level in DSD.levels]
    assert sizes == [4096, 13824, 39304, 117656, 357912] + [2**19] * 11
    assert [level.hashed for level in DSD.levels] == [False] * 5 + [True] * 11
    assert DSD.n_params == 12_599_920 and DSD.n_outputs == 32


@pytest.mark.parametrize("value, jacobian", FACES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n_active", [None, 1, 3])
def test_float16_table(value, jacobian, spec, n_active, device) -> None:
    """The numbers of a float32 table that holds the same values, and the gradient to points."""
    x, table = make_inputs(spec, 65, device)
    half, same = table.half(), table.half().float()
    x.requires_grad_()
    y, jac = jacobian(x, half, spec, n_active)
    want_y, want_jac = jacobian(x, same, spec, n_active)
    assert torch.equal(y, want_y) and torch.equal(jac, want_jac)
    assert torch.equal(value(x, half, spec, n_active), value(x, same, spec, n_active))
    grads = cotangents(spec, 65, x)[0]
    (got,) = torch.autograd.grad(value(x, half, spec, n_active), x, grads)
    (want,) = torch.autograd.grad(value(x, same, spec, n_active), x, grads)
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("value, jacobian", FACES)
def test_tiny_cuda_nn_fixture(value, jacobian, device, golden) -> None:
    data, settings = golden("peer_render")
    data = {k: v.to(device) for k, v in data.items() if k.startswith("a.")}
    names = ("n_levels", "n_features_per_level", "log2_hashmap_size", "base_resolution")
    spec = GridSpec(*(settings["a"][name] for name in names), settings["a"]["per_level_scale"])
    x, table = data["a.x"].requires_grad_(), data["a.params"].requires_grad_()
    errors = {}

    y = value(x, table, spec)
    errors["value"] = relative_error(y, data["a.y"])
    gx, gtable = torch.autograd.grad(y, (x, table), data["a.ct"], create_graph=True)
    errors["input gradient"] = relative_error(gx, data["a.gx"])
    errors["table gradient"] = relative_error(gtable, data["a.gparams_value"])
    twice = torch.autograd.grad((gx * data["a.v"]).sum(), table)[0]
    errors["table gradient of the input gradient"] = relative_error(twice, data["a.gparams_grad"])

    y, jac = jacobian(x.detach(), table, spec)
    errors["value beside the Jacobian"] = relative_error(y, data["a.y"])
    along = torch.einsum("nk,nkd->nd", data["a.ct"], jac)
    errors["Jacobian"] = relative_error(along, data["a.gx"])
    gtable = torch.autograd.grad((along * data["a.v"]).sum(), table)[0]
    errors["table gradient of the Jacobian"] = relative_error(gtable, data["a.gparams_grad"])
    assert max(errors.values()) <= 1e-5, errors


def test_what_is_left_of_the_fixture_is_one_rounding_of_a_scale(golden) -> None:
    """The peer's GPU rounded exp2 up on level 6; with that scale every number agrees to 1e-6."""
    data, _ = golden("peer_render")
    spec = GridSpec(8, 2, 12, 4, 1.7)
    scale = torch.tensor(spec.levels[6].scale)
    scale = torch.nextafter(scale, torch.tensor(torch.inf)).item()
    levels = [lv._replace(scale=scale) if i == 6 else lv for i, lv in enumerate(spec.levels)]
    spec.__dict__["levels"] = tuple(levels)
    y = hashgrid_reference(data["a.x"], data["a.params"], spec)
    assert (y - data["a.y"]).abs().max() <= 1e-6 * data["a.y"].abs().max()


# ---- kernels against the reference --------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [1, 7, 65, 1031])
@pytest.mark.parametrize("n_active", [None, 3])
def test_kernels_agree_with_the_reference(spec, n, n_active, device) -> None:
    x, table = make_inputs(spec, n, device)
    grad_y, grad_jac = cotangents(spec, n, x)
    results = []
    for value, jacobian in ((hashgrid, hashgrid_jacobian), [p.values for p in FACES][1]):
        xs, ts = x.clone().requires_grad_(), table.clone().requires_grad_()
        y = value(xs, ts, spec, n_active)
        y2, jac = jacobian(xs, ts, spec, n_active)
        grads = torch.autograd.grad(y, (xs, ts), grad_y, retain_graph=True)
        grads += torch.autograd.grad((y2, jac), (xs, ts), (grad_y, grad_jac), retain_graph=True)
        grads += torch.autograd.grad(jac, (ts,), grad_jac)
        results.append((y, y2, jac, *grads))
    names = ["y", "y2", "jac", "y/x", "y/table", "both/x", "both/table", "jac/table"]
    inactive = (0 if n_active is None else spec.n_levels - n_active) * spec.n_features
    for name, got, want in zip(names, *results):
        # Outside the cube fractions lose digits, more on finer levels; inside 1e-6 holds.
        assert relative_error(got, want) <= 2e-5, name
        assert got.isfinite().all(), name
        if inactive and name in ("y", "y2", "jac"):
            assert (got[:, -inactive:] == 0).all(), name


def test_no_active_level(device) -> None:
    x, table = make_inputs(SMALL, 70, device)
    xs, ts = x.requires_grad_(), table.requires_grad_()
    y, jac = hashgrid_jacobian(xs, ts, SMALL, 0)
    (y.sum() + jac.sum() + hashgrid(xs, ts, SMALL, 0).sum()).backward()
    for zero in (y, jac, xs.grad, ts.grad, *hashgrid_jacobian_reference(xs, ts, SMALL, 0)):
        assert (zero == 0).all()


def test_gradients_agree_with_float64(device) -> None:
    """The kernels' error against float64 is at most twice that of torch in the same precision."""
    x, table = make_inputs(SMALL, 333, device)
    x = x[6:].contiguous()  # inside the cube
    grad_y, grad_jac = cotangents(SMALL, len(x), x)

    def gradients(jacobian, dtype) -> list[Tensor]:
        xs, ts = x.to(dtype).requires_grad_(), table.to(dtype).requires_grad_()
        y, jac = jacobian(xs, ts, SMALL)
        grads = torch.autograd.grad((y, jac), (xs, ts), (grad_y.to(dtype), grad_jac.to(dtype)))
        return [y, jac, *grads]

    exact = gradients(hashgrid_jacobian_reference, torch.float64)
    same = gradients(hashgrid_jacobian_reference, torch.float32)
    for got, torch32, want in zip(gradients(hashgrid_jacobian, torch.float32), same, exact):
        assert relative_error(got, want) <= 2 * relative_error(torch32, want) + 1e-7


def test_reference_jacobian_is_the_derivative() -> None:
    x, table = make_inputs(SMALL, 40, torch.device("cpu"), torch.float64)
    x, eps = x[6:], 1e-7
    _, jac = hashgrid_jacobian_reference(x, table, SMALL)
    for d in range(3):
        shift = torch.zeros(3, dtype=x.dtype)
        shift[d] = eps
        up, down = (hashgrid_reference(x + s, table, SMALL) for s in (shift, -shift))
        assert relative_error((up - down) / (2 * eps), jac[..., d]) <= 1e-6


def test_second_derivatives(device) -> None:
    """create_graph=True through the value op: every path equals the reference's."""
    x, table = make_inputs(SMALL, 50, device)
    x = x[6:].contiguous()
    grad_y, _ = cotangents(SMALL, len(x), x)
    results = []
    for value in (hashgrid, hashgrid_reference):
        xs, ts, gs = (v.clone().requires_grad_() for v in (x, table, grad_y))
        gx, gt = torch.autograd.grad(value(xs, ts, SMALL), (xs, ts), gs, create_graph=True)
        loss = gx.square().sum() + gt.square().sum()
        results.append(torch.autograd.grad(loss, (xs, ts, gs)))
    for name, got, want in zip(("x", "table", "cotangent"), *results):
        assert relative_error(got, want) <= 2e-5, name


def test_second_derivative_of_the_jacobian_to_x_is_refused() -> None:
    x, table = make_inputs(SMALL, 9, torch.device("cpu"))
    x.requires_grad_()
    _, jac = hashgrid_jacobian(x, table, SMALL)
    gx = torch.autograd.grad(jac.square().sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="third derivatives"):
        gx.sum().backward()


# ---- properties ---------------------------------------------------------------------------------


def test_constant_table_gives_constants(device) -> None:
    x, _ = make_inputs(SMALL, 100, device)
    y, jac = hashgrid_jacobian(x, torch.ones(SMALL.n_params, device=device), SMALL)
    torch.testing.assert_close(y, torch.ones_like(y))
    assert jac.abs().max() <= 1e-3


def test_value_is_linear_in_the_table(device) -> None:
    x, table = make_inputs(SMALL, 65, device)
    other = torch.randn_like(table)
    together = hashgrid(x, 2 * table - other, SMALL)
    apart = 2 * hashgrid(x, table, SMALL) - hashgrid(x, other, SMALL)
    assert relative_error(together, apart) <= 1e-6


def test_cpu_results_do_not_depend_on_threads() -> None:
    x, table = make_inputs(SMALL, 5003, torch.device("cpu"))
    grads = cotangents(SMALL, 5003, x)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            ts, xs = table.clone().requires_grad_(), x.clone().requires_grad_()
            outputs = hashgrid_jacobian(xs, ts, SMALL)
            results.append((*outputs, *torch.autograd.grad(outputs, (ts, xs), grads)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.skipif("avx2" not in extension().build_info()["cpu_isa"], reason="no AVX2 here")
def test_baseline_code_agrees_with_avx2(tmp_path) -> None:
    """The code for processors without AVX2, in a process that is told to have none."""
    code = f"""
import torch
from dsd_fast._backend import extension
from dsd_fast.ops import GridSpec, hashgrid_jacobian
assert extension().build_info()["cpu_isa"] == "baseline"
x, table, grad_y, grad_jac = torch.load({str(tmp_path / "in.pt")!r})
outputs = hashgrid_jacobian(x.requires_grad_(), table.requires_grad_(), {SMALL!r})
grads = torch.autograd.grad(outputs, (x, table), (grad_y, grad_jac))
torch.save([v.detach() for v in (*outputs, *grads)], {str(tmp_path / "out.pt")!r})
"""
    x, table = make_inputs(SMALL, 333, torch.device("cpu"))
    grads = cotangents(SMALL, 333, x)
    torch.save((x, table, *grads), tmp_path / "in.pt")
    env = {**os.environ, "DSD_CPU_ISA": "baseline"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)
    outputs = hashgrid_jacobian(x.requires_grad_(), table.requires_grad_(), SMALL)
    here = (*outputs, *torch.autograd.grad(outputs, (x, table), grads))
    for got, want in zip(torch.load(tmp_path / "out.pt"), here):
        assert relative_error(got, want) <= 1e-6


def test_no_points(device) -> None:
    x = torch.empty(0, 3, device=device, requires_grad=True)
    table = torch.ones(SMALL.n_params, device=device, requires_grad=True)
    y, jac = hashgrid_jacobian(x, table, SMALL)
    assert y.shape == (0, SMALL.n_outputs) and jac.shape == (0, SMALL.n_outputs, 3)
    (hashgrid(x, table, SMALL).sum() + y.sum() + jac.sum()).backward()
    assert x.grad.shape == (0, 3) and (table.grad == 0).all()


def test_far_and_nan_points_stay_in_the_table(device) -> None:
    """Nothing is read out of bounds; NaN comes out as NaN."""
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[1e9, -1e9, 1e30], [nan, 0.5, 0.5], [inf, -inf, 0]], device=device)
    table = torch.ones(SMALL.n_params, device=device, requires_grad=True)
    y = hashgrid(x, table, SMALL)
    y.sum().backward()
    assert y[0].isfinite().all() and y[1].isnan().all() and y[2].isnan().all()


# ---- operator, module, errors -------------------------------------------------------------------


def test_opcheck(device) -> None:
    x, table = make_inputs(SMALL, 9, device)
    x, table = x[6:].contiguous().requires_grad_(), table.requires_grad_()
    grad_y, grad_jac = cotangents(SMALL, 3, x)
    args, operators = _spec_args(SMALL, 4), torch.ops.dsd_fast
    # The table gradient's atomics on CUDA are compared with the usual tolerances.
    for op, tensors in (
        (operators.hashgrid, (x, table)),
        (operators.hashgrid_jacobian, (x, table)),
        (operators.hashgrid_bwd_table, (x.detach(), grad_y, grad_jac)),
        (operators.hashgrid_bwd_input, (x.detach(), table.detach(), grad_y, None)),
    ):
        torch.library.opcheck(op.default, (*tensors, *args))


def test_module(device) -> None:
    grid = dsd_fast.HashGrid(6, 2, 9, 4, 1.6).to(device)
    assert grid.spec == SMALL and grid.n_outputs == 12
    assert grid.table.abs().max() <= 1e-4 and grid.table.std() > 5e-5
    assert torch.equal(grid.table.cpu(), dsd_fast.HashGrid(6, 2, 9, 4, 1.6).table)
    x, _ = make_inputs(SMALL, 17, device)
    grid.n_active_levels = 2
    y, jac = grid.value_and_jacobian(x)
    torch.testing.assert_close(grid(x), y)
    assert (y[:, 4:] == 0).all() and (jac[:, :4] != 0).any()
    y.sum().backward()
    inactive = SMALL.levels[2].offset * SMALL.n_features
    assert (grid.table.grad[inactive:] == 0).all() and (grid.table.grad[:inactive] != 0).any()
    assert "resolution 4 to" in repr(grid)


def test_reference_is_chosen_by_environment(monkeypatch) -> None:
    x, table = make_inputs(SMALL, 9, torch.device("cpu"))
    monkeypatch.setenv("DSD_BACKEND", "torch")
    y = hashgrid(x.double(), table.double(), SMALL)
    assert y.dtype == torch.float64
    monkeypatch.setenv("DSD_BACKEND", "numpy")
    with pytest.raises(ValueError, match="DSD_BACKEND must be one of"):
        hashgrid(x, table, SMALL)


X = torch.zeros(4, 3)
TABLE = torch.zeros(SMALL.n_params)


@pytest.mark.parametrize(
    "x, table, n_active, error, text",
    [
        pytest.param(X.double(), TABLE, None, TypeError, r"x must be float32.*float64", id="dtype"),
        pytest.param(X, TABLE.double(), None, TypeError, "table must be float32", id="table dtype"),
        pytest.param(
            X, TABLE.half().requires_grad_(), None, ValueError, "is read alone", id="half table"
        ),
        pytest.param(
            X[:, :2], TABLE, None, ValueError, r"\[N, 3\], got float32 \[4, 2\]", id="shape"
        ),
        pytest.param(X, TABLE[1:], None, ValueError, "table must have shape", id="table size"),
        pytest.param(X.T.contiguous().T, TABLE, None, ValueError, "contiguous", id="layout"),
        pytest.param(X, TABLE.to("meta"), None, ValueError, "must be on cpu", id="device"),
        pytest.param([[0.0] * 3], TABLE, None, TypeError, "must be a tensor, got list", id="list"),
        pytest.param(X, TABLE, 7, ValueError, "must be at most 6, got 7", id="levels"),
        pytest.param(X, TABLE, -1, ValueError, "must be at least 0, got -1", id="negative"),
    ],
)
@pytest.mark.parametrize("op", [hashgrid, hashgrid_jacobian])
def test_errors_name_what_was_expected(op, x, table, n_active, error, text) -> None:
    with pytest.raises(error, match=text):
        op(x, table, SMALL, n_active)


@pytest.mark.parametrize(
    "args, text",
    [
        ((0, 2, 9, 4, 1.5), "n_levels must be 1 to 32, got 0"),
        ((33, 2, 9, 4, 1.5), "n_levels"),
        ((4, 3, 9, 4, 1.5), r"n_features must be one of \(2, 4\), got 3"),
        ((4, 2, 40, 4, 1.5), "log2_table_size"),
        ((4, 2, 9, 1, 1.5), "base_resolution"),
        ((4, 2, 9, 4, 0.5), "per_level_scale"),
        ((4, 2, 9, 4, float("nan")), "per_level_scale"),
        ((32, 2, 9, 16, 2.0), "cannot tell cells apart"),
    ],
)
def test_impossible_grids_are_refused(args, text) -> None:
    with pytest.raises(ValueError, match=text):
        GridSpec(*args)


def test_compiles_without_graph_breaks(device) -> None:
    """torch.compile sees one operator: the fakes give the shapes."""
    x, table = make_inputs(SMALL, 9, device)
    graph = torch.compile(lambda x, t: hashgrid(x, t, SMALL) * 2, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(x, table), hashgrid(x, table, SMALL) * 2)
