"""Fused guidance passes: Triton kernels against their torch twins and against float64.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET, set by conftest).
"""

import pytest
import torch
from conftest import cuda_only, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.guidance import passes
from dsd_fast.guidance.conditions.text import text_mix
from dsd_fast.guidance.passes import Form, Guide
from dsd_fast.guidance.rows import expand_rows, mixed_rows

pytest.importorskip("triton", reason="needs Triton")
from dsd_fast.kernels import guidance as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PATH = NoisePath.of_scheduler(
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
).to(DEVICE)
EXACT = PATH.to(DEVICE, torch.float64)


def form(dtype: torch.dtype, guide: Guide) -> Form:
    return Form(PATH, dtype, guide.rows == 4)


CASES = pytest.mark.parametrize(
    ("n_items", "shape", "dtype"),
    [
        (1, (4, 8, 8), torch.float16),
        (3, (3, 5, 7), torch.bfloat16),
        (3, (3, 5, 7), torch.float32),
        (2, (1, 1, 1), torch.float16),
    ],
)
GUIDES = pytest.mark.parametrize("kind", ["perp_neg", "perp_neg_pure", "plain", "standard_pure"])


# NumPy, which the interpreter computes with, warns of what these tests are about.
overflows = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_on_kernels", lambda tensor: True)


@pytest.fixture(params=["one program", "tiles", "splits"])
def walk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row in one tile, in several, and summed by several programs."""
    if request.param != "one program":
        monkeypatch.setattr(kernels, "BLOCK", 64)
    if request.param == "splits":
        monkeypatch.setattr(kernels, "ROW_LIMIT", 64)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def guide_of(kind: str, n_items: int) -> Guide:
    weights = -randn(n_items, 2, seed=9).abs() if kind.startswith("perp_neg") else None
    return Guide(weights, kind.startswith("standard"), kind.endswith("pure"))


def doubled(guide: Guide) -> Guide:
    weights = None if guide.weights is None else guide.weights.double()
    return Guide(weights, guide.standard_cfg, guide.pure_conditional)


def levels(*values: int) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


def spread(first: int, n_items: int) -> torch.Tensor:
    return levels(*range(first, first - 150 * n_items, -150))


def assert_as_good(got: torch.Tensor, twin: torch.Tensor, exact: torch.Tensor, floor: float):
    """The kernel's error against float64 is at most twice the twin's, or rounding."""
    assert got.dtype == twin.dtype
    assert relative_error(got, exact) <= max(2 * relative_error(twin, exact), floor)


@CASES
@GUIDES
@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_combine(n_items, shape, dtype, kind, scale, walk) -> None:
    guide = guide_of(kind, n_items)
    eps = randn(guide.rows * n_items, *shape).to(dtype)
    got = passes.combine(eps, guide, scale)
    assert got.dtype == torch.float32
    twin = passes._combine(eps, guide, scale)
    assert_as_good(got, twin, passes._combine(eps.double(), doubled(guide), scale), 1e-6)


def assert_rows(got: torch.Tensor, want: torch.Tensor) -> None:
    """Rows are the float32 values rounded to nearest."""
    if got.dtype == torch.bfloat16 and DEVICE.type == "cpu":
        # the interpreter cuts bfloat16 off where a GPU rounds it
        assert ((got - want).float().abs() <= 2**-7 * want.float().abs()).all()
    else:
        assert torch.equal(got, want)


def assert_linked(got: passes.Batch, twin: passes.Batch, exact: passes.Batch) -> None:
    """Rows as near as the twin's; of bfloat16, which the interpreter cuts off, within a digit."""
    assert got.rows.shape == twin.rows.shape and got.rows.dtype == twin.rows.dtype
    if got.rows.dtype == torch.bfloat16:
        torch.testing.assert_close(got.rows, twin.rows, rtol=2**-7, atol=1e-3)
    else:
        assert_as_good(got.rows, twin.rows, exact.rows, 1e-6)


@pytest.mark.parametrize("magnitude", [1e-15, 1e-6, 1e-3, 1e4, 1e15])
def test_combine_at_any_magnitude(magnitude, walk) -> None:
    guide = guide_of("perp_neg", 3)
    eps = randn(12, 3, 5, 7) * magnitude
    got, twin = passes.combine(eps, guide, 7.5), passes._combine(eps, guide, 7.5)
    assert_as_good(got, twin, passes._combine(eps.double(), doubled(guide), 7.5), 1e-6)


def test_perp_neg_of_parallel_equal_and_weightless_negatives(walk) -> None:
    shape = (4, 5, 7)
    uncond, toward = randn(1, *shape, seed=1), randn(1, *shape, seed=2)
    guide = guide_of("perp_neg", 1)
    parallel = torch.cat([uncond + toward, uncond, uncond + 2 * toward, uncond - toward])
    plain = uncond + 7.5 * toward
    assert relative_error(passes.combine(parallel, guide, 7.5), plain) < 1e-5
    # no direction to project on: the negatives count in full
    equal = torch.cat([uncond, uncond, uncond + toward, uncond])
    wanted = uncond + 7.5 * guide.weights[0, 0] * toward
    assert relative_error(passes.combine(equal, guide, 7.5), wanted) < 1e-5
    free = Guide(torch.zeros(1, 2, device=DEVICE))
    stack = torch.cat([uncond + toward, uncond, randn(2, *shape, seed=3)])
    assert relative_error(passes.combine(stack, free, 7.5), plain) < 1e-6


@overflows
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", range(4))
def test_combine_spreads_what_is_not_finite_as_torch_does(bad, row, walk) -> None:
    guide = guide_of("perp_neg", 2)
    eps = randn(8, 3, 5, 7)
    eps[[0, 2, 4, 5][row], 1, 2, 3] = bad
    got, twin = passes.combine(eps, guide, 7.5), passes._combine(eps, guide, 7.5)
    assert torch.equal(got.isfinite(), twin.isfinite())
    assert relative_error(got[1], twin[1]) < 1e-6


@CASES
@GUIDES
def test_step(n_items, shape, dtype, kind, walk) -> None:
    guide = guide_of(kind, n_items)
    eps, z = randn(guide.rows * n_items, *shape).to(dtype), randn(n_items, *shape, seed=1)
    t, t_next = spread(899, n_items), spread(799, n_items)
    t_next[-1] = t[-1]
    got = passes.step(eps, guide, 7.5, z, t, t_next, form(dtype, guide))
    twin = passes.step_reference(eps, guide, 7.5, z, t, t_next, form(dtype, guide))
    exact = passes.step_reference(
        eps.double(),
        doubled(guide),
        7.5,
        z.double(),
        t,
        t_next,
        Form(EXACT, dtype, guide.rows == 4),
    )
    assert_as_good(got.value, twin.value, exact.value, 1e-6)
    assert torch.equal(got.value[-1], z[-1])
    assert_rows(got.rows, expand_rows(got.value, guide.rows == 4).to(dtype))
    assert torch.equal(got.levels, twin.levels)


@CASES
@pytest.mark.parametrize("perp_neg", [True, False])
def test_state(n_items, shape, dtype, perp_neg) -> None:
    states, predictions = randn(5, *shape), randn(7, *shape, seed=1)
    slot = levels(*[4, 0, 4][:n_items])
    t, t_next = spread(899, n_items), spread(812, n_items)
    t_next[-1] = t[-1]
    arguments = (slot, slot + 2, t, t_next)
    got = passes.state(states, predictions, *arguments, Form(PATH, dtype, perp_neg))
    twin = passes.state_reference(states, predictions, *arguments, Form(PATH, dtype, perp_neg))
    exact = passes.state_reference(
        states.double(),
        predictions.double(),
        *arguments,
        Form(EXACT, dtype, perp_neg),
    )
    assert_as_good(got.value, twin.value, exact.value, 1e-6)
    assert torch.equal(got.value[-1], states[slot[-1]])
    assert_rows(got.rows, expand_rows(got.value, perp_neg).to(dtype))
    assert torch.equal(got.levels, twin.levels)


@CASES
@GUIDES
def test_link(n_items, shape, dtype, kind, walk) -> None:
    guide = guide_of(kind, n_items)
    eps, x = randn(guide.rows * n_items, *shape).to(dtype), randn(n_items, *shape, seed=1)
    t, t_delta = spread(700, n_items), spread(757, n_items)
    mirrored = None if dtype == torch.float16 else (levels(1, 0, 1) > 0)[:n_items]
    got = passes.link(eps, guide, 7.5, x, t, t_delta, form(dtype, guide), mirrored)
    twin = passes.link_reference(eps, guide, 7.5, x, t, t_delta, form(dtype, guide), mirrored)
    exact = passes.link_reference(
        eps.double(),
        doubled(guide),
        7.5,
        x.double(),
        t,
        t_delta,
        Form(EXACT, torch.float64, guide.rows == 4),
        mirrored,
    )
    assert_as_good(got.value, twin.value, exact.value, 1e-6)
    assert_linked(got, twin, exact)
    assert torch.equal(got.levels, twin.levels)


@CASES
@pytest.mark.parametrize("perp_neg", [True, False])
@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("mirror", [False, True])
def test_link_table(n_items, shape, dtype, perp_neg, pair, mirror) -> None:
    table, x = randn(5, *shape), randn(n_items, *shape, seed=1)
    slot, slot_next = levels(*[4, 0, 2][:n_items]), levels(*[3, 0, 1][:n_items])
    mix = torch.linspace(0, 0.7, n_items, device=DEVICE)
    t, t_delta = spread(700, n_items), spread(757, n_items)
    mirrored = (levels(1, 0, 1) > 0)[:n_items] if mirror else None
    flags = (mirrored, pair)
    got, twin = (
        link(table, slot, slot_next, mix, x, t, t_delta, Form(PATH, dtype, perp_neg), *flags)
        for link in (passes.link_table, passes.link_table_reference)
    )
    exact = passes.link_table_reference(
        table.double(), slot, slot_next, mix.double(), x.double(), t, t_delta,
        Form(EXACT, torch.float64, perp_neg), *flags,
    )  # fmt: skip
    assert_as_good(got.value, twin.value, exact.value, 1e-6)
    assert_linked(got, twin, exact)
    assert torch.equal(got.levels, twin.levels)


@pytest.mark.parametrize("mirror", [False, True])
def test_link_of_one_level(mirror, walk) -> None:
    """Without a pair the rows are those of t, as the second half of a pair's."""
    guide, x = guide_of("perp_neg", 2), randn(2, 3, 5, 7, seed=1)
    eps, t = randn(8, 3, 5, 7), levels(700, 420)
    mirrored = levels(0, 1) > 0 if mirror else None
    arguments = (eps, guide, 7.5, x, t, t, form(torch.float16, guide), mirrored)
    both, one = (passes.link(*arguments, pair=pair) for pair in (True, False))
    assert torch.equal(one.rows, both.rows.chunk(2)[1])
    assert torch.equal(one.levels, both.levels.chunk(2)[1])
    assert torch.equal(one.value, both.value)
    eps_o = passes.combine(eps, guide, 7.5)
    eps_o = eps_o if mirrored is None else torch.stack([eps_o[0], eps_o[1].flip(-1)])
    torch.testing.assert_close(one.value, eps_o)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_text(dtype) -> None:
    bank = randn(8, 5, 7)
    mix = text_mix(torch.tensor([0.0, 10.0, 80.0]), torch.tensor([20.0, -130.0, 0.0]))
    rows = [tensor.to(DEVICE) for tensor in (mix.first, mix.second, mix.share)]
    got, want = passes.text(bank, *rows, dtype), mixed_rows(bank, *rows)
    assert got.dtype == dtype and got.shape == (12, 5, 7)
    torch.testing.assert_close(got, want.to(dtype))
    assert torch.equal(got[3:], want[3:].to(dtype))  # rows that are not mixed


@CASES
@GUIDES
@pytest.mark.parametrize(("weighting", "one_level"), [("sds", False), ("ddim", True)])
def test_gradient(n_items, shape, dtype, kind, weighting, one_level, walk) -> None:
    guide = guide_of(kind, n_items)
    n_rows = guide.rows * n_items * (1 if one_level else 2)
    eps, x = randn(n_rows, *shape).to(dtype), randn(n_items, *shape, seed=1)
    t, scales = spread(700, n_items), (1.0, 7.5)
    done = torch.zeros((), dtype=torch.int32, device=DEVICE)
    twin = passes.gradient_reference(eps, guide, scales, x, t, PATH, weighting)
    exact = passes.gradient_reference(
        eps.double(),
        doubled(guide),
        scales,
        x.double(),
        t,
        EXACT,
        weighting,
    )
    for _ in range(2):  # the count of programs is back at zero for the second
        got = passes.gradient(eps, guide, scales, x, t, PATH, weighting, done)
        for name in ("grad", "target", "loss", "grad_norm"):
            assert_as_good(getattr(got, name), getattr(twin, name), getattr(exact, name), 2e-6)
        assert got.finite.dtype == torch.bool and bool(got.finite)
        assert int(done) == 0


@CASES
@GUIDES
@pytest.mark.parametrize("one_level", [False, True])
def test_gradient_with_a_share_of_the_trajectory(
    n_items, shape, dtype, kind, one_level, walk
) -> None:
    guide, t, scales = guide_of(kind, n_items), spread(700, n_items), (1.0, 7.5)
    n_rows = guide.rows * n_items * (1 if one_level else 2)
    eps, x = randn(n_rows, *shape).to(dtype), randn(n_items, *shape, seed=1)
    eps_o = randn(n_items, *shape, seed=2)
    share = torch.tensor([0.3, 1.0, 0.0], device=DEVICE)[:n_items]
    arguments = (scales, x, t, PATH)
    got = passes.gradient(eps, guide, *arguments, eps_o=eps_o, share=share)
    twin = passes.gradient_reference(eps, guide, *arguments, eps_o=eps_o, share=share)
    exact = passes.gradient_reference(
        eps.double(), doubled(guide), scales, x.double(), t, EXACT,
        eps_o=eps_o.double(), share=share.double(),
    )  # fmt: skip
    for name in ("grad", "target", "loss", "grad_norm"):
        assert_as_good(getattr(got, name), getattr(twin, name), getattr(exact, name), 2e-6)
    if n_items > 2:  # none of it is the official gradient
        assert torch.equal(got.grad[2], passes.gradient(eps, guide, *arguments).grad[2])


def test_gradient_of_half_a_share() -> None:
    guide, x = guide_of("plain", 2), randn(2, 3, 5, 7)
    arguments = (randn(4, 3, 5, 7), guide, (1.0, 7.5), x, levels(500, 400), PATH)
    with pytest.raises(ValueError, match="both of eps_o and share"):
        passes.gradient(*arguments, eps_o=x)
    with pytest.raises(ValueError, match=r"gradient: share: expected float32 \[2\]"):
        passes.gradient(*arguments, eps_o=x, share=torch.ones(3, device=DEVICE))


@overflows
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("kind", ["perp_neg", "plain"])
def test_gradient_tells_what_is_not_finite(bad, kind, walk) -> None:
    guide = guide_of(kind, 2)
    eps, x = randn(4 * guide.rows, 3, 5, 7), randn(2, 3, 5, 7, seed=1)
    eps[-1, 1, 2, 3] = bad
    arguments = (guide, (1.0, 7.5), x, levels(500, 400), PATH)
    got, twin = passes.gradient(eps, *arguments), passes.gradient_reference(eps, *arguments)
    assert not bool(got.finite) and not bool(got.loss.isfinite())
    assert torch.equal(got.grad.isfinite(), twin.grad.isfinite())
    assert torch.equal(got.target.isfinite(), twin.target.isfinite())


@overflows
def test_gradient_whose_squares_overflow_is_finite(walk) -> None:
    guide = guide_of("plain", 1)
    eps, x = randn(4, 3, 5, 7) * 1e25, randn(1, 3, 5, 7, seed=1)
    got = passes.gradient(eps, guide, (1.0, 7.5), x, levels(500), PATH)
    assert bool(got.finite) and not bool(got.loss.isfinite())


def test_wrong_arguments_are_errors() -> None:
    guide, x = guide_of("perp_neg", 2), randn(2, 3, 4, 4)
    eps, t = randn(8, 3, 4, 4), levels(500, 400)
    with pytest.raises(ValueError, match=r"eps \[4B,C,h,w\]"):
        passes.combine(eps[:7], guide, 7.5)
    with pytest.raises(ValueError, match=r"weights \[1,2\]"):
        passes.combine(eps[:4], guide, 7.5)
    with pytest.raises(ValueError, match="step: z: expected float32"):
        passes.step(eps, guide, 7.5, x.half(), t, t, form(torch.float16, guide))
    with pytest.raises(ValueError, match=r"int64 \[2\]"):
        passes.step(eps, guide, 7.5, x, t[:1], t, form(torch.float16, guide))
    with pytest.raises(ValueError, match="a noise path of float32"):
        passes.gradient(eps, guide, (1.0, 7.5), x, t, EXACT)
    with pytest.raises(ValueError, match=r"mirrored bool \[2\]"):
        passes.link(eps, guide, 7.5, x, t, t, form(torch.float16, guide), mirrored=t)
    with pytest.raises(ValueError, match="weighting: expected one of"):
        passes.gradient(eps, guide, (1.0, 7.5), x, t, PATH, "other")


class Computed(TorchDispatchMode):
    """Names of torch's operations that would launch something, or wait for the device."""

    FREE = tuple(
        f"aten.{name}"
        for name in ("empty", "new_empty", "view", "select", "slice", "split", "detach")
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).startswith(self.FREE):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["perp_neg", "plain"])
def test_a_cached_step_is_few_launches(kind, monkeypatch) -> None:
    launched = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            return lambda **arguments: launched.append(self.name)

    for name in ("dots", "combine", "step", "state", "link", "link_table", "text", "gradient"):
        monkeypatch.setattr(kernels, f"{name}_kernel", Recorder(name))
    torch.use_deterministic_algorithms(False)  # which fills fresh memory
    guide, shape, half = guide_of(kind, 2), (4, 64, 64), torch.float16
    table, x = randn(3, *shape), randn(2, *shape)
    eps = randn(2 * guide.rows * 2, *shape).to(half)
    slot, t, t_delta = levels(1, 2), levels(600, 610), levels(640, 650)
    done = torch.zeros((), dtype=torch.int32, device=DEVICE)
    first, mix = eps[: 2 * guide.rows], torch.zeros(2, device=DEVICE)
    bank, rows, share = randn(8, 5, 7), levels(0, 1), torch.ones(2, device=DEVICE)
    with Computed() as computed:
        passes.text(bank, rows, rows, share, half)
        passes.link_table(table, slot, slot, mix, x, t, t_delta, Form(PATH, half, guide.rows == 4))
        passes.gradient(eps, guide, (1.0, 7.5), x, t, PATH, done=done)
        assert launched == ["text", "link_table", "gradient"]
        launched.clear()
        passes.text(bank, rows, rows, share, half)
        passes.state(table, table, slot, slot, t, t_delta, Form(PATH, half, guide.rows == 4))
        passes.link(first, guide, 7.5, x, t, t_delta, form(half, guide))
        passes.gradient(eps, guide, (1.0, 7.5), x, t, PATH, done=done)
    assert launched == ["text", "state", "link", "gradient"]
    assert computed.names == []


@cuda_only
def test_a_cached_step_in_a_graph_follows_its_inputs() -> None:
    guide, shape = guide_of("perp_neg", 1), (4, 64, 64)
    table, predictions, x = randn(3, *shape), randn(3, *shape, seed=1), randn(1, *shape, seed=2)
    slot, t, t_delta, t_node = (levels(v) for v in (1, 600, 640, 699))
    done = torch.zeros((), dtype=torch.int32, device=DEVICE)

    def run() -> passes.Gradient:
        z = passes.state(
            table, predictions, slot, slot, t_node, t_delta, Form(PATH, torch.float16, True)
        )
        pair = passes.link(z.rows, guide, 7.5, x, t, t_delta, form(torch.float16, guide))
        return passes.gradient(pair.rows, guide, (1.0, 7.5), x, t, PATH, done=done)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for level in (600, 420):
        t.fill_(level)
        x.normal_()
        graph.replay()
        assert relative_error(captured.grad, run().grad) < 1e-6
