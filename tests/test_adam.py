"""One step of Adam: torch's own, skipped steps, the half copy, the gradient's zeroing."""

import math

import pytest
import torch
from torch import Tensor

from dsd_fast import ops
from dsd_fast.ops.adam import adam_step, adam_step_reference

STATE = ("param", "exp_avg", "exp_avg_sq", "step")
# Around a vector's width and a block's share; several blocks or threads; tails of one to three.
SIZES = [1, 3, 4, 31, 1023, 8192, 8193, 16_387, 150_001]


def random_state(n: int, seed: int = 0, steps: float = 3.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "param": torch.randn(n, generator=generator),
        "grad": torch.randn(n, generator=generator),
        "exp_avg": 0.1 * torch.randn(n, generator=generator),
        "exp_avg_sq": 0.01 * torch.rand(n, generator=generator),
        "step": torch.tensor(steps),
    }


def on(state: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A copy on `device`."""
    return {name: tensor.to(device, copy=True) for name, tensor in state.items()}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("half", [False, True], ids=["float", "half"])
def test_against_float64(device, n, half):
    state = random_state(n)
    exact = {name: tensor.double() for name, tensor in state.items()}
    got = on(state, device)
    copy = torch.full((n,), math.nan, dtype=torch.float16, device=device) if half else None
    scale = torch.tensor(2.0**10)
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-15}
    adam_step_reference(**exact, **options, grad_scale=scale.double())
    adam_step(**got, **options, grad_scale=scale.to(device), half_copy=copy)
    for name in STATE:
        torch.testing.assert_close(got[name].cpu().double(), exact[name], rtol=2e-6, atol=1e-7)
    assert torch.equal(got["grad"].cpu(), state["grad"])
    assert got["step"].item() == 4.0
    if half:
        assert torch.equal(copy, got["param"].half())


def test_steps_are_those_of_torch(device):
    """Ten steps of torch.optim.Adam(fused=True), one of them left out, under a loss scale."""
    state = random_state(5003, steps=0.0)
    state["exp_avg"].zero_(), state["exp_avg_sq"].zero_()
    got = on(state, device)
    parameter = torch.nn.Parameter(state["param"].to(device, copy=True))
    betas, eps = (0.9, 0.99), 1e-15
    adam = torch.optim.Adam([parameter], lr=0.01, betas=betas, eps=eps, fused=True)
    generator = torch.Generator().manual_seed(1)
    for i in range(10):
        grad = torch.randn(5003, generator=generator).to(device)
        scale = torch.tensor(2.0 ** (i - 3), device=device)
        found_inf = torch.tensor(float(i == 4), device=device)
        parameter.grad = grad * scale
        adam.grad_scale, adam.found_inf = scale, found_inf
        adam.step()
        got["grad"] = grad * scale
        adam_step(**got, lr=0.01, betas=betas, eps=eps, grad_scale=scale, found_inf=found_inf)
    wanted = adam.state[parameter]
    assert got["step"].item() == wanted["step"].item() == 9.0
    torch.testing.assert_close(got["param"], parameter.detach(), rtol=1e-5, atol=1e-6)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reference", [False, True], ids=["compiled", "reference"])
@pytest.mark.parametrize("n", [5, 150_001])
@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_step_left_out_changes_nothing(device, n, zero_grad, reference):
    state = random_state(n)
    state["grad"][::3] = math.nan
    state["grad"][1::3] = math.inf
    got = on(state, device)
    copy = got["param"].half()
    before = copy.clone()
    function = adam_step_reference if reference else adam_step
    function(
        **got,
        lr=0.1,
        found_inf=torch.ones((), device=device),
        half_copy=copy,
        zero_grad=zero_grad,
    )
    for name in STATE:
        assert torch.equal(got[name].cpu(), state[name]), name
    assert torch.equal(copy, before)
    if zero_grad:
        assert not bool(got["grad"].any())
    else:
        assert torch.equal(got["grad"].cpu().nan_to_num(), state["grad"].nan_to_num())


@pytest.mark.parametrize("n", [7, 150_001])
@pytest.mark.parametrize("half", [False, True], ids=["float", "half"])
def test_the_gradient_is_zeroed_behind(device, n, half):
    kept, zeroed = on(random_state(n), device), on(random_state(n), device)
    copies = [torch.zeros(n, dtype=torch.float16, device=device) if half else None for _ in "12"]
    adam_step(**kept, lr=0.1, half_copy=copies[0])
    adam_step(**zeroed, lr=0.1, half_copy=copies[1], zero_grad=True)
    assert not bool(zeroed["grad"].any())
    for name in STATE:
        assert torch.equal(kept[name], zeroed[name]), name
    if half:
        assert torch.equal(*copies)


def test_half_copies_round_as_torch_does(device):
    """Every half and the halfway points between them; subnormals, overflow, zeros, infinity, NaN.

    A rate of zero leaves the parameter alone.
    """
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = halves[halves.isfinite()].float()
    middle = 0.5 * (values[1:] + values[:-1])
    odd = torch.tensor([65519.0, 65520.0, 1e30, math.inf, math.nan, 2.0**-25, 1e-30, 1e-45])
    values = torch.cat([values, middle, torch.nextafter(middle, torch.tensor(math.inf)), odd, -odd])
    state = on({**random_state(len(values)), "param": values}, device)
    copy = torch.zeros(len(values), dtype=torch.float16, device=device)
    adam_step(**state, lr=0.0, half_copy=copy)
    torch.testing.assert_close(copy.cpu(), values.half(), rtol=0, atol=0, equal_nan=True)
    # -0 - 0 is -0: the copies' signs are those of the parameter.
    assert torch.equal(copy.cpu().signbit(), state["param"].cpu().half().signbit())


def test_tensors_off_the_vectors_alignment(device):
    state = random_state(1003)
    plain, shifted = on(state, device), on(state, device)
    for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
        storage = torch.zeros(1004, device=device)
        storage[1:] = shifted[name]
        shifted[name] = storage[1:]
    copy = torch.zeros(1004, dtype=torch.float16, device=device)
    adam_step(**plain, lr=0.1)
    adam_step(**shifted, lr=0.1, half_copy=copy[1:])
    for name in STATE:
        torch.testing.assert_close(shifted[name], plain[name], rtol=1e-6, atol=1e-7)
    assert torch.equal(copy[1:], shifted["param"].half()) and copy[0] == 0


def test_same_result_for_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        results.append(random_state(100_003))
        adam_step(**results[-1], lr=0.1)
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in STATE)


def test_a_graph_holds_the_step(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need CUDA")
    eager, replayed = on(random_state(150_001), device), on(random_state(150_001), device)
    found_inf = torch.zeros((), device=device)
    graph = torch.cuda.CUDAGraph()
    adam_step(**on(random_state(150_001), device), lr=0.1, found_inf=found_inf)
    with torch.cuda.graph(graph):
        adam_step(**replayed, lr=0.1, found_inf=found_inf)
    for skip in (0.0, 1.0, 0.0):
        found_inf.fill_(skip)
        adam_step(**eager, lr=0.1, found_inf=found_inf)
        graph.replay()
    assert replayed["step"].item() == 5.0
    assert all(torch.equal(eager[name], replayed[name]) for name in STATE)


def test_a_parameter_that_takes_gradients(device):
    """A leaf is changed in place, and autograd notices."""
    state = on(random_state(9), device)
    state["param"].requires_grad_()
    version, before = state["param"]._version, state["param"].detach().clone()
    adam_step(**state, lr=0.1)
    assert state["param"]._version > version and state["param"].requires_grad
    assert not torch.equal(state["param"], before)


def test_no_elements(device):
    state = on(random_state(0), device)
    adam_step(**state, lr=0.1)
    assert state["step"].item() == 4.0


def test_backend_choice(monkeypatch):
    compiled, chosen = random_state(77), random_state(77)
    ops.adam_step(**compiled, lr=0.1)
    monkeypatch.setenv("DSD_BACKEND", "torch")
    ops.adam_step(**chosen, lr=0.1)
    for name in STATE:
        torch.testing.assert_close(compiled[name], chosen[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("half", [False, True], ids=["float", "half"])
def test_operator(device, half):
    state = on(random_state(9), device)
    one = torch.ones((), device=device)
    copy = torch.zeros(9, dtype=torch.float16, device=device) if half else None
    torch.library.opcheck(
        torch.ops.dsd_fast.adam_step.default,
        (*state.values(), 0.1, 0.9, 0.99, 1e-8, one, 0 * one, copy, half),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": -1.0}, "lr and eps must be at least 0, got -1.0"),
        ({"eps": -1.0}, "lr and eps must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got 0.9 and 1.0"),
        ({"grad": torch.zeros(8)}, r"grad must have shape \[9\], got float32 \[8\]"),
    ],
)
def test_errors(changes, words):
    with pytest.raises(ValueError, match=f"^adam_step: {words}"):
        adam_step(**{**random_state(9), "lr": 0.1, **changes})


def test_tensors_that_share_memory_are_refused(device):
    for names in (("param", "grad"), ("exp_avg", "exp_avg_sq"), ("param", "half_copy")):
        state = on(random_state(64), device) | {"half_copy": None}
        # The second is the first, or the second half of it.
        shared = state[names[0]].view(torch.float16)[64:] if "half_copy" in names else None
        state[names[1]] = state[names[0]] if shared is None else shared
        before = state["param"].clone()
        with pytest.raises(ValueError, match="must not share memory"):
            adam_step(**state, lr=0.1)
        assert torch.equal(state["param"], before)
