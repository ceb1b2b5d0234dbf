"""Occupancy update and threshold: reference, duplicates, odd values, errors."""

import math

import pytest
import torch

from dsd_fast.ops.occupancy import (
    occupancy_threshold,
    occupancy_threshold_reference,
    occupancy_update,
    occupancy_update_reference,
)


def random_update(n_cells: int, n_values: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    occs = torch.rand(n_cells, generator=generator)
    indices = torch.randint(n_cells, (n_values,), generator=generator)
    values = 1.5 * torch.rand(n_values, generator=generator) - 0.5
    return occs, indices, values


@pytest.mark.parametrize(("n_cells", "n_values"), [(1, 5), (1000, 333), (4913, 20_011)])
def test_update(device, n_cells, n_values):
    """Bit for bit the reference, cells seen several times included."""
    occs, indices, values = random_update(n_cells, n_values)
    expected = occs.clone()
    occupancy_update_reference(expected, indices, values, 0.9)
    got = occs.clone().to(device)
    occupancy_update(got, indices.to(device), values.to(device), 0.9)
    assert torch.equal(got.cpu(), expected)
    seen = torch.zeros(n_cells, dtype=torch.bool)
    seen[indices] = True
    assert torch.equal(got.cpu()[~seen], occs[~seen])


def test_order_of_duplicates_does_not_matter(device):
    occs, indices, values = random_update(50, 999)
    order = torch.randperm(999, generator=torch.Generator().manual_seed(1))
    results = []
    for i, v in ((indices, values), (indices[order], values[order])):
        results.append(occs.clone().to(device))
        occupancy_update(results[-1], i.to(device), v.to(device))
    assert torch.equal(*results)


def test_a_cell_decays_once_and_keeps_its_largest_value(device):
    occs = torch.tensor([1.0, 1.0, 1.0, 0.0, -1.0], device=device)
    indices = torch.tensor([0, 0, 0, 1, 3, 3, 4, 4], device=device)
    values = torch.tensor([0.2, 0.3, 0.1, 2.0, -0.0, -5.0, -0.5, -0.25], device=device)
    occupancy_update(occs, indices, values, 0.5)
    assert occs.tolist() == [0.5, 2.0, 1.0, 0.0, -0.25]


@pytest.mark.parametrize("reference", [False, True], ids=["compiled", "reference"])
def test_values_that_are_not_finite_are_passed_over(device, reference):
    if reference and device.type != "cpu":
        pytest.skip("the reference is compared on the CPU")
    update = occupancy_update_reference if reference else occupancy_update
    occs = torch.tensor([1.0, 1.0, 1.0, math.nan], device=device)
    values = torch.tensor([math.nan, math.inf, 0.75, 0.5], device=device)
    update(occs, torch.tensor([0, 1, 1, 3], device=device), values, 0.5)
    assert occs.tolist() == [1.0, 0.75, 1.0, 0.5]


@pytest.mark.parametrize("n_cells", [1, 31, 1024, 4913])
@pytest.mark.parametrize("scale", [1e-3, 1.0], ids=["below", "above"])
def test_threshold(device, n_cells, scale):
    occs = scale * torch.rand(n_cells, generator=torch.Generator().manual_seed(0)) + 1e-5
    binary, threshold = occupancy_threshold(occs.to(device), 0.01)
    expected_binary, expected = occupancy_threshold_reference(occs.double(), 0.01)
    assert threshold.shape == () and threshold.dtype == torch.float32
    torch.testing.assert_close(threshold.cpu().double(), expected, rtol=1e-6, atol=0)
    assert binary.dtype == torch.bool and binary.shape == occs.shape
    clear = (occs - expected).abs() > 1e-6 * expected
    assert torch.equal(binary.cpu()[clear], expected_binary[clear])


def test_threshold_of_nan_occupies_nothing(device):
    binary, threshold = occupancy_threshold(torch.tensor([math.nan, 1.0], device=device))
    assert math.isnan(float(threshold))
    assert not bool(binary.any())


def test_same_threshold_for_any_number_of_threads():
    occs = torch.rand(200_003)
    threads = torch.get_num_threads()
    results = []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        results.append(occupancy_threshold(occs, 1.0))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_no_values(device):
    occs = torch.rand(7, device=device)
    before = occs.clone()
    none = torch.empty(0, device=device)
    occupancy_update(occs, none.long(), none)
    assert torch.equal(occs, before)
    nothing = torch.empty(0, device=device)
    occupancy_update(nothing, none.long(), none)
    assert nothing.shape == (0,)


def test_update_records_no_gradient(device):
    occs = torch.zeros(3, device=device)
    values = torch.ones(2, device=device, requires_grad=True)
    occupancy_update(occs, torch.tensor([0, 2], device=device), values)
    assert not occs.requires_grad
    assert occs.tolist() == [1.0, 0.0, 1.0]


def test_backend_choice(monkeypatch):
    occs, indices, values = random_update(100, 300)
    compiled, chosen = occs.clone(), occs.clone()
    occupancy_update(compiled, indices, values)
    binary, _ = occupancy_threshold(compiled)
    monkeypatch.setenv("DSD_BACKEND", "torch")
    occupancy_update(chosen, indices, values)
    assert torch.equal(chosen, compiled)
    assert torch.equal(occupancy_threshold(chosen)[0], binary)


def test_operators(device):
    occs, indices, values = (tensor.to(device) for tensor in random_update(20, 9))
    torch.library.opcheck(
        torch.ops.dsd_fast.occupancy_update.default, (occs, indices, values, 0.95)
    )
    torch.library.opcheck(torch.ops.dsd_fast.occupancy_threshold.default, (occs, 0.01))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"occs": torch.zeros(2, 2, 2)}, ValueError, ["occs", r"\[C\]", r"\[2, 2, 2\]"]),
        ({"occs": torch.zeros(9).double()}, TypeError, ["occs", "float32", "float64"]),
        ({"occs": torch.zeros(18)[::2]}, ValueError, ["occs", "contiguous", "strides"]),
        ({"indices": torch.zeros(3).int()}, TypeError, ["indices", "int64", "int32"]),
        ({"values": torch.zeros(4)}, ValueError, ["values", r"\[3\]", r"\[4\]"]),
        ({"values": torch.zeros(3, device="meta")}, ValueError, ["values", "cpu", "meta"]),
        ({"indices": torch.tensor([0, 9, 1])}, IndexError, ["indices", r"\[0, 9\)", "0 to 9"]),
        ({"indices": torch.tensor([0, -1, 1])}, IndexError, ["indices", r"\[0, 9\)", "-1 to 1"]),
        ({"decay": 1.5}, ValueError, ["decay", "got 1.5"]),
    ],
)
def test_update_errors(changes, error, words):
    args = {"occs": torch.zeros(9), "indices": torch.arange(3), "values": torch.ones(3), **changes}
    with pytest.raises(error, match="(?s)occupancy_update.*" + ".*".join(words)):
        occupancy_update(**args)


def test_threshold_errors():
    with pytest.raises(ValueError, match="at least one cell"):
        occupancy_threshold(torch.empty(0))
    with pytest.raises(TypeError, match="occs must be float32"):
        occupancy_threshold(torch.zeros(3, dtype=torch.int64))


def test_index_outside_the_grid_is_passed_over_on_cuda(device):
    if device.type == "cpu":
        pytest.skip("an error on the CPU, see test_update_errors")
    occs = torch.zeros(4, device=device)
    indices = torch.tensor([-1, 2, 4], device=device)
    occupancy_update(occs, indices, torch.ones(3, device=device))
    assert occs.tolist() == [0.0, 0.0, 1.0, 0.0]
