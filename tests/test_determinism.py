"""`--deterministic`: what is switched and refused; on CUDA, that work gives the same bits again."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import cuda_only, relative_error
from deterministic_cuda import differences, state_of
from runs import Runner
from test_field_op import cotangents, fused, make_field, make_points

from dsd_fast import determinism, resize
from dsd_fast._backend import deterministic
from dsd_fast.graphs import tuned_convolutions
from dsd_fast.ops import PackedSamples
from dsd_fast.ops.hashgrid import GridSpec, hashgrid, hashgrid_jacobian
from dsd_fast.ranges import ConfigError
from dsd_fast.run import checkpoint
from dsd_fast.scene.sample_room import LAG, LESSONS, SampleRoom

NO_PICTURES = ["--pictures.no-turntable", "--pictures.no-mesh"]


@pytest.fixture
def strict() -> Iterator[None]:
    """torch's own switch, without warn_only; the fixture of all tests puts back what was."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture
def restored(monkeypatch) -> Iterator[None]:
    """Whatever `make_deterministic` changes is put back."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    attention = torch.backends.cuda.mem_efficient_sdp_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.backends.cuda.enable_mem_efficient_sdp(attention)
    torch.utils.deterministic.fill_uninitialized_memory = fill


# ---- switches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, want", [((False,), False), ((True,), True), ((True, True), False)], ids=str
)
def test_torch_switches_our_sums_too(mode, want) -> None:
    on, *warn_only = mode
    torch.use_deterministic_algorithms(on, warn_only=bool(warn_only))
    assert deterministic() is want
    with tuned_convolutions():
        assert torch.backends.cudnn.benchmark is not want


def test_the_cpu_needs_no_switch(restored) -> None:
    torch.use_deterministic_algorithms(False)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":0:0"
    determinism.make_deterministic(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("before", [None, ":4096:8", ":16:8"])
def test_on_cuda_libraries_are_told(before, restored) -> None:
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if before:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = before
    determinism.make_deterministic(torch.device("cuda"))
    assert deterministic() and not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (before or ":4096:8")
    assert not torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize("value", ["", ":0:0", ":4096:8:16:8"])
def test_another_workspace_of_cublas_is_refused(value, restored) -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = value
    with pytest.raises(ConfigError, match=f"CUBLAS_WORKSPACE_CONFIG .* got '{value}': unset it"):
        determinism.make_deterministic(torch.device("cuda"))


def test_an_operation_that_is_never_deterministic_is_named() -> None:
    words = "histc_cuda does not have a deterministic implementation, but you set 'torch.use_...'."
    told = r"needs histc_cuda, which .*drop --deterministic"
    with pytest.raises(ConfigError, match=told), determinism.explained():
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="something else"), determinism.explained():
        raise RuntimeError("something else")


@pytest.mark.parametrize("engine", ["compiled", "tensorrt"])
def test_engines_that_choose_by_time_are_refused(engine, runner, caplog) -> None:
    assert runner("--deterministic", "--diffusion.engine", engine) == 2
    assert f"the engine {engine} chooses its kernels by their time" in caplog.text
    assert not runner.files()


def test_on_the_cpu_it_changes_nothing(tmp_path, tiny_model) -> None:
    plain, ordered = (Runner(tmp_path / name, tiny_model) for name in ("plain", "ordered"))
    assert plain(*NO_PICTURES, steps=2) == 0
    assert ordered(*NO_PICTURES, "--deterministic", steps=2) == 0
    assert not differences(state_of(plain.folder), state_of(ordered.folder))


# ---- room for samples ---------------------------------------------------------------------------


def _packed(n_samples: int, n_dropped: int = 0) -> PackedSamples:
    packed = PackedSamples(*[torch.zeros(0)] * 5)
    return packed._replace(offsets=torch.tensor([0, n_samples]), n_dropped=torch.tensor(n_dropped))


class Late:
    """Counts of a GPU that is behind: they have arrived when somebody waits for them."""

    def __init__(self) -> None:
        self.waited = 0

    def record(self) -> None:
        """Nothing to do."""

    def query(self) -> bool:
        raise AssertionError("a room must not depend on what has arrived by chance")

    def synchronize(self) -> None:
        self.waited += 1


def _see(room: SampleRoom, n_samples: int, n_rays: int = 1000) -> None:
    """A rendering on CUDA, pretended: its room, then its counts."""
    room.room(n_rays)
    room._counts = torch.tensor([n_samples, 0])
    room.watch_replay(n_rays)


@pytest.fixture
def learnt(monkeypatch) -> SampleRoom:
    """A room that has had its lessons, with 20 samples a ray."""
    monkeypatch.setattr(torch.cuda, "Event", Late)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more)
    )
    room = SampleRoom("kept")
    for _ in range(LESSONS):
        room.learn(20_000, 1000)
    return room


def test_counts_are_looked_at_always_as_late(learnt) -> None:
    assert learnt.room(100_000) == 2_500_000
    _see(learnt, 80_000)
    for _ in range(LAG):
        assert learnt.room(100_000) == 2_500_000
        _see(learnt, 20_000)
    assert learnt.room(100_000) == 10_000_000


@pytest.mark.parametrize("seen", range(LAG + 3))
def test_a_room_that_was_saved_goes_on_as_if_it_had_not(seen, learnt) -> None:
    counts = [80_000, 20_000, 160_000, 30_000, 40_000, 320_000, 10_000, 10_000, 10_000]
    for n in counts[:seen]:
        _see(learnt, n)
    other = SampleRoom("kept")
    other.load_state(learnt.state())
    for n in counts[seen:]:
        assert other.room(100_000) == learnt.room(100_000)
        _see(learnt, n)
        _see(other, n)
    assert other.state() == learnt.state()


def test_checkpoints_have_the_rooms_and_older_ones_need_none(runner, caplog) -> None:
    assert runner(*NO_PICTURES, "--stop-at", "2") == 0
    path = checkpoint.step_path(runner.run.checkpoints, 2)
    tree = checkpoint.load(path)
    assert tree["rooms"].keys() == {"marched", "kept"}
    assert all(room["n_lessons"] >= 2 for room in tree["rooms"].values())
    rooms = tree["rooms"]
    kept = rooms["kept"]
    for damaged in (
        None,
        [],
        {},
        {**rooms, "kept": 3},
        {**rooms, "kept": {**kept, "coming": [1]}},
        {**rooms, "kept": {**kept, "per_ray": float("nan")}},
    ):
        checkpoint.save(path, {**tree, "rooms": damaged})
        assert runner(*NO_PICTURES, "--resume", "auto", steps=4) == 2
        assert "rooms for samples cannot be read" in caplog.messages[-1]
    del tree["rooms"]
    checkpoint.save(path, tree)
    assert runner(*NO_PICTURES, "--resume", "auto", steps=4) == 0
    assert "rooms" in checkpoint.load(checkpoint.step_path(runner.run.checkpoints, 4))


# ---- resizing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [((5, 9), (16, 16)), ((32, 24), (8, 8)), ((7, 7), (7, 20))])
def test_resizing_as_products(sizes, device, monkeypatch) -> None:
    """What runs on CUDA alone is formed here on the CPU too."""
    before, after = sizes
    image = torch.rand(2, 3, *before, dtype=torch.float64, device=device, requires_grad=True)
    want = F.interpolate(image, after, mode="bilinear", align_corners=False)
    down, across = (resize._weights(n, m, image) for n, m in zip(before, after))
    got = down.mT @ (image @ across)
    torch.testing.assert_close(got, want)
    weights = torch.rand_like(want)
    wanted, gradient = (torch.autograd.grad((y * weights).sum(), image) for y in (want, got))
    torch.testing.assert_close(gradient, wanted)
    torch.use_deterministic_algorithms(True)
    torch.testing.assert_close(resize.bilinear(image, after), want)


# ---- on CUDA ------------------------------------------------------------------------------------


def _gradients(half: bool, normals: bool, n: int, room: int = 0) -> list[torch.Tensor]:
    """Of the table and the weights, with so much room behind n points."""
    device = torch.device("cuda")
    field, points = make_field("wide"), make_points(n, device)
    with torch.no_grad():
        field.grid.table.mul_(0.1)
    grads = cotangents(n, points)
    grads = tuple(torch.cat([g, g.new_full((room, *g.shape[1:]), 7.0)]) for g in grads)
    points = torch.cat([points, points.new_full((room, 3), 0.3)])
    count = torch.tensor(n, device=device) if room else None
    grads = grads if normals else (*grads[:2], None)
    return fused(field, points, grads, half=half, n_valid=count)[3:]


@cuda_only
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("normals", [False, True])
@pytest.mark.parametrize("n", [33, 5003, (1 << 18) + 700], ids=["few", "some", "two chunks"])
def test_the_field_gives_the_same_bits(half, normals, n, strict) -> None:
    first = _gradients(half, normals, n)
    for room in (0, 0, 1, 129, 300_000):
        again = _gradients(half, normals, n, room)
        assert all(torch.equal(a, b) for a, b in zip(first, again)), room


@cuda_only
@pytest.mark.parametrize("half", [False, True])
def test_the_field_agrees_with_float_atomics(half) -> None:
    plain = _gradients(half, True, 50_021)
    torch.use_deterministic_algorithms(True)
    for want, got in zip(plain, _gradients(half, True, 50_021)):
        assert relative_error(got, want) < 1e-6


def _points_and_gradients(n: int, spec: GridSpec) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(n, 3, generator=generator)
    shape = (n, spec.n_outputs)
    # Over many magnitudes, as gradients are.
    grad_y = torch.randn(shape, generator=generator) * 10 ** (
        -6 * torch.rand(n, 1, generator=generator)
    )
    grad_jac = 1e-3 * torch.randn(*shape, 3, generator=generator) * grad_y[..., None]
    return x, grad_y, grad_jac


def _table_gradient(x, grad_y, grad_jac, spec: GridSpec) -> torch.Tensor:
    table = torch.zeros(spec.n_params, device=x.device, dtype=x.dtype, requires_grad=True)
    if grad_jac is None:
        return torch.autograd.grad(hashgrid(x, table, spec), table, grad_y)[0]
    return torch.autograd.grad(hashgrid_jacobian(x, table, spec), table, (grad_y, grad_jac))[0]


@cuda_only
@pytest.mark.parametrize("features", [2, 4])
@pytest.mark.parametrize("jacobian", [False, True])
def test_the_grid_is_more_exact_than_float_sums(features, jacobian, monkeypatch) -> None:
    spec = GridSpec(5, features, 9, 4, 1.7)
    inputs = _points_and_gradients(100_003, spec)
    x, grad_y, grad_jac = (t.cuda() for t in inputs)
    grad_jac = grad_jac if jacobian else None
    plain = _table_gradient(x, grad_y, grad_jac, spec)
    torch.use_deterministic_algorithms(True)
    first, again = (_table_gradient(x, grad_y, grad_jac, spec) for _ in range(2))
    assert torch.equal(first, again)
    monkeypatch.setenv("DSD_BACKEND", "torch")
    doubles = [t.double() for t in inputs]
    want = _table_gradient(*doubles[:2], doubles[2] if jacobian else None, spec)
    assert relative_error(first, want) <= relative_error(plain, want)


@cuda_only
@pytest.mark.parametrize("features", [2, 4])
def test_small_gradients_are_not_lost_to_large_ones(features) -> None:
    """Of few points, whose cells are their own, each entry's sum is one product."""
    spec = GridSpec(5, features, 12, 4, 1.7)
    x, grad_y, _ = (t.cuda() for t in _points_and_gradients(7, spec))
    plain = _table_gradient(x, grad_y, None, spec)
    torch.use_deterministic_algorithms(True)
    got = _table_gradient(x, grad_y, None, spec)
    there = plain.abs() > 1e-9 * plain.abs().max()
    assert float(((got - plain).abs() / plain.abs())[there].max()) < 1e-3
    assert float(((got - plain).abs() / plain.abs())[there].quantile(0.9)) < 1e-6


@cuda_only
@pytest.mark.parametrize(
    "scale, limit",
    [(1e-44, 1.0), (1e-37, 1e-4), (1e-33, 1e-6), (1e-20, 1e-6), (1e20, 1e-6), (1e36, 1e-6)],
)
def test_the_grid_at_any_scale(scale, limit, strict) -> None:
    spec = GridSpec(3, 2, 8, 4, 1.7)
    x, grad_y, _ = (t.cuda() for t in _points_and_gradients(999, spec))
    want = _table_gradient(x, grad_y, None, spec).double()
    got = _table_gradient(x, (grad_y.double() * scale).float(), None, spec).double() / scale
    assert relative_error(got, want) < limit


@cuda_only
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["gradient", "point"])
def test_the_grid_shows_what_is_not_finite(value, where, strict) -> None:
    spec = GridSpec(3, 2, 8, 4, 1.7)
    x, grad_y, _ = (t.cuda() for t in _points_and_gradients(300, spec))
    (x if where == "point" else grad_y)[70, 0] = value
    assert not _table_gradient(x, grad_y, None, spec).isfinite().all()


@cuda_only
def test_the_grid_without_gradients_or_points(strict) -> None:
    spec = GridSpec(3, 2, 8, 4, 1.7)
    for n in (0, 1, 40):
        x, grad_y, _ = (t.cuda() for t in _points_and_gradients(n, spec))
        assert not _table_gradient(x, 0 * grad_y, None, spec).any()


@cuda_only
@pytest.mark.parametrize("normals", [True, False])
def test_a_graph_holds_the_sums(normals, strict) -> None:
    device = torch.device("cuda")
    field, points = make_field("wide"), make_points(4099, device)
    grads = cotangents(4099, points)
    grads = grads if normals else (*grads[:2], None)
    field.to(device)
    want = fused(field, points, grads, half=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused(field, points, grads, half=True)
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, want))


@cuda_only
@pytest.mark.parametrize("flags", [(), ("--num-seeds", "2")], ids=["one", "two seeds"])
def test_runs_on_cuda_are_the_same_also_when_resumed(flags, tmp_path, tiny_model, restored) -> None:
    # Long enough for graphs, which come after the lessons.
    flags = (*NO_PICTURES, "--deterministic", "--device", "cuda", "--diffusion.dtype", "float16")
    whole, again, parts = (Runner(tmp_path / name, tiny_model) for name in ("a", "b", "c"))
    assert whole(*flags, steps=40) == 0
    assert again(*flags, steps=40) == 0
    for stop in ("7", "25"):
        assert parts(*flags, "--resume", "auto", "--stop-at", stop, steps=40) == 0
    assert parts(*flags, "--resume", "auto", steps=40) == 0
    assert not differences(state_of(whole.folder), state_of(again.folder))
    assert not differences(state_of(whole.folder), state_of(parts.folder))
