"""Marching: the peers' samples, the reference's samples bit for bit, and rays of every odd kind."""

import pytest
import torch
from conftest import cuda_only
from torch import Tensor

from dsd_fast.graphs import captured
from dsd_fast.ops._pack import PackedSamples
from dsd_fast.ops.march import (
    MAX_RAY_STEPS,
    march,
    march_packed,
    march_packed_reference,
    march_reference,
)

BOX = (-2.0, -2.0, -2.0, 2.0, 2.0, 2.0)


def random_rays(n_rays: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rays that start inside and outside BOX; some miss it, some run along an axis or a face."""
    generator = torch.Generator().manual_seed(seed)
    origins = 6.0 * torch.rand(n_rays, 3, generator=generator) - 3.0
    dirs = torch.randn(n_rays, 3, generator=generator)
    dirs[::7, 0] = 0.0
    dirs[::11, 1:] = 0.0
    dirs[::13, 2] = -1e-20
    origins[::17] = origins[::17].round()
    return origins, dirs


def random_grid(n_cells: int, share: float, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_cells, n_cells, n_cells, generator=generator) < share


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, a, b in zip(("ray_indices", "t_starts", "t_ends"), got, expected):
        torch.testing.assert_close(
            a.cpu(), b.cpu(), rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_golden(golden, device):
    """nerfacc's samples through a ball of occupied cells."""
    tensors, settings = golden("peer_render")
    half = settings["march"]["aabb"]
    ray_indices, t_starts, t_ends = march(
        tensors["march.origins"].to(device),
        tensors["march.dirs"].to(device),
        tensors["march.binaries"].to(device),
        (-half,) * 3 + (half,) * 3,
        settings["march"]["step"],
    )
    assert torch.equal(ray_indices.cpu(), tensors["march.ray_indices"])
    # nerfacc adds the step up and drifts by some 1e-6; a lattice index times the step does not
    torch.testing.assert_close(t_starts.cpu(), tensors["march.t_starts"], rtol=1e-5, atol=0)
    torch.testing.assert_close(t_ends.cpu(), tensors["march.t_ends"], rtol=1e-5, atol=0)


def test_golden_reference(golden):
    tensors, settings = golden("peer_render")
    half = settings["march"]["aabb"]
    args = (tensors["march.origins"], tensors["march.dirs"], tensors["march.binaries"])
    got = march_reference(*args, (-half,) * 3 + (half,) * 3, settings["march"]["step"])
    assert torch.equal(got[0], tensors["march.ray_indices"])
    torch.testing.assert_close(got[1], tensors["march.t_starts"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0], ids="occupied={}".format)
@pytest.mark.parametrize("n_cells", [1, 7, 32], ids="grid={}".format)
def test_same_samples_as_reference(device, n_cells, share):
    origins, dirs = random_rays(301)
    grid = random_grid(n_cells, share)
    jitter = torch.rand(301, generator=torch.Generator().manual_seed(2))
    box = (-2.0, -1.5, -1.0, 1.0, 1.7, 2.0)
    expected = march_reference(origins, dirs, grid, box, 0.031, jitter, 0.1, 4.0)
    on_device = (tensor.to(device) for tensor in (origins, dirs, grid))
    got = march(*on_device, box, 0.031, jitter.to(device), 0.1, 4.0)
    assert_same(got, expected)
    assert (len(got[0]) > 0) == bool(grid.any())


def test_laws(device):
    """Sorted, contiguous lattice intervals whose middles lie in occupied cells, and all of them."""
    origins, dirs = random_rays(97)
    grid, step, far = random_grid(16, 0.3), 0.05, 5.0
    rays, t_starts, t_ends = (
        out.cpu()
        for out in march(origins.to(device), dirs.to(device), grid.to(device), BOX, step, far=far)
    )
    later = rays[1:] == rays[:-1]
    assert bool((rays[1:] >= rays[:-1]).all())
    assert bool((t_starts[1:] >= t_ends[:-1])[later].all())
    torch.testing.assert_close(t_ends - t_starts, torch.full_like(t_ends, step), rtol=0, atol=2e-6)
    middle = 0.5 * (t_starts.double() + t_ends.double())
    points = origins[rays].double() + dirs[rays].double() * middle[:, None]
    cells = ((points + 2.0) * 4.0).clamp(0, 15.999).long()
    # float32 and float64 may differ about a point within rounding of a cell's face
    occupied = grid[cells[:, 0], cells[:, 1], cells[:, 2]].double().mean()
    assert occupied > 0.999
    assert float(middle.max()) < far


def test_jitter_shifts_the_lattice(device):
    origins = torch.zeros(2, 3, device=device)
    dirs = torch.tensor([[1.0, 0.0, 0.0]], device=device).repeat(2, 1)
    grid = torch.ones(4, 4, 4, dtype=torch.bool, device=device)
    jitter = torch.tensor([0.0, 0.5], device=device)
    rays, t_starts, _ = march(origins, dirs, grid, BOX, 0.25, jitter)
    assert float(t_starts[rays == 0][0]) == 0.0
    assert float(t_starts[rays == 1][0]) == 0.125
    assert t_starts[rays == 0].numel() == 8


def test_inside_outside_parallel_and_missing_rays(device):
    origins = torch.tensor(
        [[0.0, 0.0, 0.0], [-5.0, 0.3, 0.3], [-5.0, 2.5, 0.0], [5.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    )
    dirs = torch.tensor([[1.0, 0.0, 0.0]]).repeat(5, 1)
    grid = torch.ones(3, 3, 3, dtype=torch.bool, device=device)
    rays, t_starts, t_ends = march(origins.to(device), dirs.to(device), grid, BOX, 0.5)
    counts = torch.bincount(rays.cpu(), minlength=5).tolist()
    # the last ray runs along the box's upper face, which is outside
    assert counts == [4, 8, 0, 0, 0]
    assert float(t_starts[rays == 1].min()) == 3.0
    assert float(t_ends[rays == 1].max()) == 7.0


def test_rays_without_meaning_have_no_samples(device):
    origins = torch.zeros(6, 3)
    dirs = torch.tensor([[1.0, 1.0, 1.0]]).repeat(6, 1)
    dirs[0, 1] = float("nan")
    dirs[1, 2] = float("inf")
    dirs[2] = 0.0
    origins[3, 0] = float("nan")
    origins[4] = -1e30  # more than 2^24 steps away
    grid = torch.ones(5, 5, 5, dtype=torch.bool)
    expected = march_reference(origins, dirs, grid, BOX, 0.1)
    got = march(origins.to(device), dirs.to(device), grid.to(device), BOX, 0.1)
    assert_same(got, expected)
    assert set(got[0].tolist()) == {5}


def test_a_lattice_ends_at_its_last_exact_step(device):
    grid = torch.ones(2, 2, 2, dtype=torch.bool, device=device)
    origins = torch.tensor([[-3.0, 0.0, 0.0]], device=device)
    dirs = torch.tensor([[1.0, 0.0, 0.0]], device=device)
    assert len(march(origins, dirs, grid, BOX, 1e-9)[0]) == 0


HUGE = (-1e38,) * 3 + (1e38,) * 3


# Each would take 2^24 steps a ray and more, all of them samples where the grid is full.
@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
@pytest.mark.parametrize(
    ("length", "box", "step"),
    [
        (1e-45, BOX, 0.1),
        (-1e-39, BOX, 0.1),
        (1e-30, BOX, 0.1),
        (1e-5, BOX, 0.1),
        (1.0, HUGE, 0.1),
        (1e-42, HUGE, 1e-30),
        (1e38, HUGE, 1e-6),
        (1.0, BOX, 2e-38),
        (1.0, BOX, 1e-5),
    ],
)
def test_a_ray_of_too_many_steps_has_no_samples(device, length, box, step, full):
    origins, dirs = torch.zeros(4097, 3), torch.full((4097, 3), length)
    origins[1::3, 0] = 1e-40
    origins[2::3] = dirs[2::3].sign() * -2.0
    dirs[::2, 1:] = 0.0
    grid = torch.full((8, 8, 8), full)
    assert not len(march_reference(origins, dirs, grid, box, step)[0])
    on_device = [tensor.to(device) for tensor in (origins, dirs, grid)]
    assert not len(march(*on_device, box, step)[0])
    assert int(march_packed(*on_device, box, step, capacity=3).offsets[-1]) == 0


def test_a_ray_that_grazes_the_box_ends_the_same_in_any_company(device):
    """It leaves at once, by so little that its points round to the inside."""
    origins = torch.tensor([[-2.0, 0.1, 0.1], [-2.0, 0.1, 0.1]])
    dirs = torch.tensor([[-1e-40, 0.0, 0.5], [1.0, 0.0, 0.0]])
    grid = torch.ones(4, 4, 4, dtype=torch.bool)
    alone = march_reference(origins[:1], dirs[:1], grid, BOX, 0.1)
    together = march_reference(origins, dirs, grid, BOX, 0.1)
    assert len(alone[0]) == int((together[0] == 0).sum()) < 5
    assert_same(march(origins.to(device), dirs.to(device), grid.to(device), BOX, 0.1), together)


def test_the_most_steps_of_a_ray(device):
    """One step fewer than the bound gives all samples; one more gives none."""
    origins = torch.tensor([[0.0, 0.1, 0.1]], device=device)
    dirs = torch.tensor([[1.0, 0.0, 0.0]], device=device)
    grid = torch.ones(3, 3, 3, dtype=torch.bool, device=device)
    # A lattice of whole numbers: nothing rounds. The bound counts 3 steps of room.
    for width, n_samples in ((MAX_RAY_STEPS - 3, MAX_RAY_STEPS - 3), (MAX_RAY_STEPS - 2, 0)):
        args = origins, dirs, grid, (0.0, 0.0, 0.0, float(width), 1.0, 1.0), 1.0
        assert len(march(*args)[0]) == n_samples
        assert_same(march(*args), march_reference(*args))
        assert int(march_packed(*args, capacity=5).n_dropped) == max(n_samples - 5, 0)


@pytest.mark.parametrize("n_rays", [0, 5])
def test_empty(device, n_rays):
    origins = torch.zeros(n_rays, 3, device=device)
    grid = torch.zeros(4, 4, 4, dtype=torch.bool, device=device)
    dirs = torch.ones_like(origins)
    for out in (
        march(origins, dirs, grid, BOX, 0.1),
        march_reference(origins, dirs, grid, BOX, 0.1),
    ):
        assert [len(tensor) for tensor in out] == [0, 0, 0]
        assert [tensor.dtype for tensor in out] == [torch.int64, torch.float32, torch.float32]


def test_threads_do_not_change_the_result():
    origins, dirs = random_rays(1000)
    grid = random_grid(16, 0.2)
    threads = torch.get_num_threads()
    results = []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        results.append(march(origins, dirs, grid, BOX, 0.02))
    torch.set_num_threads(threads)
    assert_same(results[0], results[1])


def test_not_differentiable(device):
    origins = torch.zeros(1, 3, device=device, requires_grad=True)
    grid = torch.ones(2, 2, 2, dtype=torch.bool, device=device)
    out = march(origins, torch.ones(1, 3, device=device), grid, BOX, 0.5)
    assert not any(tensor.requires_grad for tensor in out)


def test_reference_in_float64():
    origins, dirs = random_rays(20)
    out = march_reference(origins.double(), dirs.double(), random_grid(8, 0.5), BOX, 0.1)
    assert out[1].dtype == torch.float64
    assert len(out[0]) > 0


def test_backend_choice(monkeypatch):
    origins, dirs = random_rays(20)
    grid = random_grid(8, 0.5)
    compiled = march(origins, dirs, grid, BOX, 0.1)
    monkeypatch.setenv("DSD_BACKEND", "torch")
    assert_same(march(origins, dirs, grid, BOX, 0.1), compiled)
    packed = march_packed(origins, dirs, grid, BOX, 0.1, capacity=90)
    monkeypatch.delenv("DSD_BACKEND")
    assert_same_packed(march_packed(origins, dirs, grid, BOX, 0.1, capacity=90), packed)


def test_operator(device):
    origins, dirs = random_rays(9)
    grid = random_grid(4, 0.5)
    jitter = torch.rand(9)
    tensors = [tensor.to(device) for tensor in (origins, dirs, grid, jitter)]
    torch.library.opcheck(
        torch.ops.dsd_fast.march.default,
        (*tensors[:3], list(BOX), 0.1, tensors[3], 0.0, 1e10),
    )
    torch.library.opcheck(
        torch.ops.dsd_fast.march_packed.default,
        (*tensors[:3], list(BOX), 0.1, tensors[3], 0.0, 1e10, 50),
    )


def assert_same_packed(got: PackedSamples, expected: PackedSamples) -> None:
    """All of every array: what is behind the last sample is defined too."""
    for name in PackedSamples._fields:
        a, b = getattr(got, name).cpu(), getattr(expected, name).cpu()
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


# One group of rays, a whole number of groups, and a ray to either side.
@pytest.mark.parametrize("n_rays", [1, 33, 255, 256, 257, 1024, 1301], ids="rays={}".format)
@pytest.mark.parametrize("share", [0.0, 0.03, 1.0], ids="occupied={}".format)
def test_packed_samples_are_those_of_the_reference(device, n_rays, share):
    origins, dirs = random_rays(n_rays, seed=n_rays)
    grid = random_grid(9, share)
    jitter = torch.rand(n_rays, generator=torch.Generator().manual_seed(2))
    tensors = [tensor.to(device) for tensor in (origins, dirs, grid)]
    box = (-2.0, -1.5, -1.0, 1.0, 1.7, 2.0)
    n_samples = len(march_reference(origins, dirs, grid, box, 0.05, jitter, 0.1, 4.0)[0])
    for capacity in {0, 1, n_samples // 2, n_samples - 1, n_samples, n_samples + 70} - {-1}:
        expected = march_packed_reference(
            origins, dirs, grid, box, 0.05, jitter, 0.1, 4.0, capacity=capacity
        )
        got = march_packed(*tensors, box, 0.05, jitter.to(device), 0.1, 4.0, capacity=capacity)
        assert_same_packed(got, expected)
        assert int(got.n_dropped) == max(n_samples - capacity, 0)
        assert int(got.offsets[-1]) == min(n_samples, capacity)


def test_packed_samples_of_rays_with_many_runs(device):
    """More gaps on a ray than the kernels remember, and a capacity that ends in each run."""
    grid = torch.zeros(16, 16, 16, dtype=torch.bool)
    grid[::2] = True
    origins = torch.tensor([[-4.0, 0.1, 0.1], [-4.0, 0.1, 3.0], [4.0, -0.2, 0.3]])
    dirs = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [-1.0, 0.05, 0.0]])
    on_device = [tensor.to(device) for tensor in (origins, dirs, grid)]
    n_samples = len(march_reference(origins, dirs, grid, BOX, 0.06)[0])
    assert_same(march(*on_device, BOX, 0.06), march_reference(origins, dirs, grid, BOX, 0.06))
    for capacity in range(0, n_samples + 3, 3):
        expected = march_packed_reference(origins, dirs, grid, BOX, 0.06, capacity=capacity)
        assert_same_packed(march_packed(*on_device, BOX, 0.06, capacity=capacity), expected)


@pytest.mark.parametrize("n_rays", [0, 5])
def test_packed_samples_of_nothing(device, n_rays):
    origins = torch.full((n_rays, 3), 9.0, device=device)
    grid = torch.ones(4, 4, 4, dtype=torch.bool, device=device)
    for function in (march_packed, march_packed_reference):
        out = function(origins, torch.ones_like(origins), grid, BOX, 0.1, capacity=7)
        dtypes = [torch.int64, torch.int32, torch.float32, torch.float32, torch.int64]
        assert [tensor.dtype for tensor in out] == dtypes
        assert [list(tensor.shape) for tensor in out] == [[n_rays + 1], [7], [7], [7], []]
        assert not any(bool(tensor.any()) for tensor in out)


def test_packed_samples_do_not_depend_on_the_threads():
    origins, dirs = random_rays(1000)
    grid = random_grid(16, 0.2)
    threads = torch.get_num_threads()
    results = []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        results.append(march_packed(origins, dirs, grid, BOX, 0.02, capacity=30_000))
    torch.set_num_threads(threads)
    assert_same_packed(*results)


@cuda_only
def test_a_graph_marches_anew():
    """What a CUDA graph writes follows its inputs, past the capacity and back."""
    device = torch.device("cuda")
    origins, dirs = (tensor.to(device) for tensor in random_rays(777))
    grid = random_grid(8, 0.05).to(device)
    out = []
    replay = captured(
        lambda: out.append(march_packed(origins, dirs, grid, BOX, 0.05, capacity=10_000))
    )
    for share in (0.9, 0.0, 0.1):
        grid.copy_(random_grid(8, share))
        replay()
        expected = march_packed_reference(origins, dirs, grid, BOX, 0.05, capacity=10_000)
        assert_same_packed(out[-1], expected)
        assert (int(out[-1].n_dropped) > 0) == (share == 0.9)


@cuda_only
def test_packed_marching_does_not_wait():
    origins, dirs = (tensor.cuda() for tensor in random_rays(300))
    grid = random_grid(8, 0.5).cuda()
    march_packed(origins, dirs, grid, BOX, 0.05, capacity=100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        march_packed(origins, dirs, grid, BOX, 0.05, capacity=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


ORIGINS, DIRS, GRID = torch.zeros(4, 3), torch.ones(4, 3), torch.ones(2, 2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"origins": [[0.0] * 3]}, TypeError, ["origins", "tensor", "list"]),
        ({"origins": ORIGINS.double()}, TypeError, ["origins", "float32", "float64"]),
        ({"dirs": DIRS[:3]}, ValueError, ["dirs", r"\[4, 3\]", r"\[3, 3\]"]),
        ({"dirs": DIRS.t().contiguous().t()}, ValueError, ["dirs", "contiguous", "strides"]),
        ({"dirs": DIRS.to("meta")}, ValueError, ["dirs", "cpu", "meta"]),
        ({"occupancy": GRID.float()}, TypeError, ["occupancy", "bool", "float32"]),
        ({"occupancy": torch.ones(2, 2, 3, dtype=torch.bool)}, ValueError, [r"\[2, 2, 3\]"]),
        ({"jitter": torch.zeros(3)}, ValueError, ["jitter", r"\[4\]", r"\[3\]"]),
        ({"aabb": (0, 0, 0, 1, 1)}, ValueError, ["aabb", "six"]),
        ({"aabb": (0, 0, 0, 1, 1, 0)}, ValueError, ["aabb", "low corner"]),
        ({"aabb": (1, 1, 1, 0, 0, 0)}, ValueError, ["aabb", "low corner"]),
        ({"aabb": (0, 0, 0, 1, 1, float("nan"))}, ValueError, ["aabb", "finite", "nan"]),
        ({"aabb": (0, 0, 0, 1, 1, 1e39)}, ValueError, ["aabb", "finite", r"1e\+39"]),
        ({"aabb": (-3e38,) * 3 + (3e38,) * 3}, ValueError, ["aabb", "edges"]),
        ({"aabb": (0, 0, 0, 1, 1, 1e-40)}, ValueError, ["aabb", "float32"]),
        ({"aabb": (0, 0, 0, 1, 1, 10**400)}, TypeError, ["aabb", "six numbers"]),
        ({"aabb": 3}, TypeError, ["aabb", "six numbers", "got 3"]),
        ({"step": 0.0}, ValueError, ["step", "got 0.0"]),
        ({"step": float("nan")}, ValueError, ["step", "got nan"]),
        ({"step": 1e-50}, ValueError, ["step", "float32", "got 1e-50"]),
        ({"step": 1e39}, ValueError, ["step", "float32", r"got 1e\+39"]),
        ({"step": "0.1"}, TypeError, ["step", "number", "str"]),
        ({"near": float("-inf")}, ValueError, ["near", "got near -inf"]),
        ({"near": 1e39, "far": 1e40}, ValueError, ["near", r"got near 1e\+39"]),
        ({"far": float("nan")}, ValueError, ["far nan"]),
        ({"near": 2.0, "far": 1.0}, ValueError, ["near 2.0", "far 1.0"]),
    ],
)
def test_errors(changes, error, words):
    args = {
        "origins": ORIGINS,
        "dirs": DIRS,
        "occupancy": GRID,
        "aabb": BOX,
        "step": 0.1,
        **changes,
    }
    with pytest.raises(error, match="(?s)march: .*" + ".*".join(words)):
        march(**args)
    with pytest.raises(error, match="(?s)march_packed: .*" + ".*".join(words)):
        march_packed(**args, capacity=5)


def test_capacity_errors():
    for capacity, error, words in (
        (-1, ValueError, "at least 0, got -1"),
        (2**60, ValueError, "at most"),
        (1.5, TypeError, "an integer, got 1.5"),
        (True, TypeError, "an integer, got bool"),
    ):
        with pytest.raises(error, match=f"march_packed: capacity must be {words}"):
            march_packed(ORIGINS, DIRS, GRID, BOX, 0.1, capacity=capacity)
