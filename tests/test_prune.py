"""Pruning: what `visibility` flags, packed anew, against the reference and the two steps apart."""

import pytest
import torch
from conftest import cuda_only
from torch import Tensor

from dsd_fast.graphs import captured
from dsd_fast.ops._pack import PackedSamples, pack_reference
from dsd_fast.ops.composite import visibility
from dsd_fast.ops.prune import prune, prune_reference

# Samples of each ray: around the warp size, none, one, and long ones.
LENGTHS = [0, 1, 5, 31, 32, 33, 0, 64, 65, 100, 3001, 2, 0]
# Groups of rays that are full, not full, and empty in part.
MANY = [(7 * ray) % 41 if ray % 300 < 200 else 0 for ray in range(1031)]


def random_samples(
    lengths: list[int], room: int = 0, density: float = 50.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sigmas, t_starts, t_ends, offsets); NaN in `room` places behind the last sample."""
    generator = torch.Generator().manual_seed(len(lengths))
    n = sum(lengths)
    widths = 0.02 * torch.rand(n, generator=generator)
    sigmas = density * torch.rand(n, generator=generator) ** 3
    sigmas[45::50] *= 1e4  # alpha is 1 to the last bit
    t_starts = torch.rand(n, generator=generator)
    nothing = torch.full((room,), float("nan"))
    samples = (torch.cat([part, nothing]) for part in (sigmas, t_starts, t_starts + widths))
    return *samples, torch.tensor([0, *lengths]).cumsum(0)


def assert_same(got: PackedSamples, expected: PackedSamples) -> None:
    for name in PackedSamples._fields:
        a, b = getattr(got, name).cpu(), getattr(expected, name).cpu()
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("room", [0, 77])
@pytest.mark.parametrize(
    "lengths", [LENGTHS, MANY, [7], [0], [0, 0, 40], []], ids=lambda x: f"{len(x)} rays"
)
def test_same_samples_as_visibility(device, lengths, room):
    """The flags that the same device gives, packed; any capacity."""
    samples = random_samples(lengths, room)
    sigmas, t_starts, t_ends, offsets = (tensor.to(device) for tensor in samples)
    n_samples, n_rays = sum(lengths), len(lengths)
    threshold = torch.tensor(0.05, device=device)
    seen = visibility(sigmas, t_starts, t_ends, None, None, threshold, 0.1, offsets=offsets)
    seen = seen[:n_samples].cpu()
    rays = torch.repeat_interleave(torch.arange(n_rays), torch.tensor(lengths).long())[seen]
    kept = (tensor[:n_samples][seen] for tensor in samples[1:3])
    kept, n_seen = (rays, *kept), int(seen.sum())
    assert n_samples < 10 or 0 < n_seen < n_samples
    for capacity in {0, 1, n_seen // 2, n_seen - 1, n_seen, n_seen + 300} - {-1}:
        got = prune(sigmas, t_starts, t_ends, offsets, threshold, 0.1, capacity=capacity)
        assert_same(got, pack_reference(*kept, n_rays, capacity))
        assert int(got.n_dropped) == max(n_seen - capacity, 0)


@pytest.mark.parametrize("lengths", [LENGTHS, MANY], ids=lambda x: f"{len(x)} rays")
def test_same_samples_as_reference(device, lengths):
    """Thresholds that no sample comes near; alphas of 1 and rays without samples among them."""
    sigmas, t_starts, t_ends, offsets = random_samples(lengths, 9)
    n_samples = sum(lengths)
    sigmas[:n_samples] = torch.tensor([0.0, 3.0, 1e6])[torch.arange(n_samples) % 7 % 3]
    t_ends = t_starts + 0.25
    args = (sigmas, t_starts, t_ends, offsets)
    expected = prune_reference(*args, 0.1, 0.3, capacity=500)
    threshold = torch.tensor(0.1, device=device)
    got = prune(*(tensor.to(device) for tensor in args), threshold, 0.3, capacity=500)
    assert_same(got, expected)
    in_double = [tensor.double() if tensor.is_floating_point() else tensor for tensor in args]
    exact = prune_reference(*in_double, 0.1, 0.3, capacity=500)
    assert torch.equal(exact.offsets, expected.offsets)
    assert torch.equal(exact.ray_indices, expected.ray_indices)


def test_nothing_is_seen_and_everything(device):
    args = [tensor.to(device) for tensor in random_samples(LENGTHS)]
    none = prune(*args, 2.0, capacity=10)
    assert not any(bool(tensor.any()) for tensor in none)
    every = prune(*args, -1.0, -1.0, capacity=sum(LENGTHS))
    assert torch.equal(every.offsets, args[3])
    assert torch.equal(every.t_starts, args[1]) and torch.equal(every.t_ends, args[2])


def test_threads_do_not_change_the_result():
    args = random_samples(MANY)
    threads = torch.get_num_threads()
    results = []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        results.append(prune(*args, 0.05, capacity=5000))
    torch.set_num_threads(threads)
    assert_same(*results)


def test_not_differentiable(device):
    sigmas, *rest = (tensor.to(device) for tensor in random_samples([5, 3]))
    out = prune(sigmas.requires_grad_(), *rest, 0.05, capacity=9)
    assert not any(tensor.requires_grad for tensor in out)


def test_backend_choice(monkeypatch):
    args = random_samples([5, 0, 40])
    compiled = prune(*args, 0.05, capacity=20)
    monkeypatch.setenv("DSD_BACKEND", "torch")
    assert_same(prune(*args, 0.05, capacity=20), compiled)


def test_operator(device):
    args = [tensor.to(device) for tensor in random_samples([3, 0, 5], 2)]
    threshold = torch.tensor(0.01, device=device)
    torch.library.opcheck(torch.ops.dsd_fast.prune.default, (*args, threshold, 1e-4, 6))


@cuda_only
def test_a_graph_prunes_anew():
    """A CUDA graph follows its densities and its threshold, past the capacity and back."""
    args = [tensor.cuda() for tensor in random_samples(MANY, 50)]
    threshold = torch.tensor(0.05).cuda()
    out = []
    replay = captured(lambda: out.append(prune(*args, threshold, capacity=2000)))
    written = out[-1]
    for alpha, dropped in ((0.0, True), (0.9, False), (2.0, False)):
        threshold.fill_(alpha)
        replay()
        assert_same(written, prune(*args, alpha, capacity=2000))
        assert (int(written.n_dropped) > 0) == dropped


@cuda_only
def test_pruning_does_not_wait():
    args = [tensor.cuda() for tensor in random_samples(LENGTHS)]
    threshold = torch.tensor(0.05).cuda()
    prune(*args, threshold, capacity=100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prune(*args, threshold, capacity=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"sigmas": torch.zeros(5, 1)}, ValueError, ["sigmas", r"\[S\]", r"\[5, 1\]"]),
        ({"offsets": torch.tensor([]).long()}, ValueError, ["offsets", r"\[R \+ 1\]", r"\[0\]"]),
        ({"offsets": torch.tensor([0, 3, 6])}, ValueError, ["offsets", "at most 5", "0 to 6"]),
        ({"offsets": torch.tensor([0, 4, 3])}, ValueError, ["offsets", "not rising"]),
        ({"alpha_threshold": torch.zeros(1)}, ValueError, ["alpha_threshold", r"\[\]", r"\[1\]"]),
        ({"capacity": -1}, ValueError, ["capacity must be at least 0, got -1"]),
    ],
)
def test_errors(changes, error, words):
    sigmas, t_starts, t_ends, offsets = random_samples([3, 2])
    args = {
        "sigmas": sigmas,
        "t_starts": t_starts,
        "t_ends": t_ends,
        "offsets": offsets,
        "alpha_threshold": 0.1,
        "capacity": 4,
    }
    with pytest.raises(error, match="(?s)" + ".*".join(words)):
        prune(**{**args, **changes})
