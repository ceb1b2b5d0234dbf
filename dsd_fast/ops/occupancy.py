"""Occupancy grid: decaying maximum of what was seen in each cell, and its binary view."""

import math

import torch
from torch import Tensor

from dsd_fast._backend import address, backend, extension, target
from dsd_fast.ops._check import check_number, check_tensor


def occupancy_update(occs: Tensor, indices: Tensor, values: Tensor, decay: float = 0.95) -> None:
    """Take values seen in some cells into the grid, in place.

    occs[i] <- max(decay·occs[i], largest value seen in i) for every i in `indices`; the other cells
    stay as they are. A cell may occur several times: it decays once, and the order does not matter,
    so the update is deterministic. A value that is not finite counts as not seen, for it could
    never decay again.

    Args:
        occs: float32 [C], contiguous, as all tensors here; changed in place.
        indices: int64 [K], cells in [0, C).
        values: float32 [K], what was seen there.
        decay: factor of the old value, in [0, 1].

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: another shape or device, not contiguous, or decay out of range.
        IndexError: an index outside the grid, on the CPU. On CUDA, where looking would cost a
            synchronisation, such an index is passed over.
    """
    _check_update(occs, indices, values, decay)
    if backend(occs) == "torch":
        occupancy_update_reference(occs, indices, values, decay)
    else:
        _occupancy_update_op(occs, indices, values.detach(), decay)


def occupancy_threshold(occs: Tensor, max_threshold: float = 0.01) -> tuple[Tensor, Tensor]:
    """Which cells are occupied: occs > min(mean(occs), max_threshold).

    Deterministic: the mean is summed in double and in a fixed order.

    Args:
        occs: float32 [C], contiguous, C at least 1.
        max_threshold: upper bound of the threshold.

    Returns:
        (binary bool [C], threshold float32 []), on the device of `occs`. Not differentiable.

    Raises:
        TypeError: `occs` is no tensor or not float32.
        ValueError: another shape, no cells, not contiguous, or a `max_threshold` of NaN.
    """
    _check_cells(occs)
    max_threshold = check_number("occupancy_threshold", "max_threshold", max_threshold)
    if math.isnan(max_threshold):
        raise ValueError("occupancy_threshold: max_threshold must be a number, got nan")
    if backend(occs) == "torch":
        return occupancy_threshold_reference(occs, max_threshold)
    return _occupancy_threshold_op(occs.detach(), max_threshold)


def _check_update(occs: Tensor, indices: Tensor, values: Tensor, decay: float) -> None:
    check_tensor("occupancy_update", "occs", occs, torch.float32, ("C",))
    check_tensor("occupancy_update", "indices", indices, torch.int64, ("K",), occs.device)
    check_tensor("occupancy_update", "values", values, torch.float32, indices.shape, occs.device)
    check_number("occupancy_update", "decay", decay)
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"occupancy_update: decay must be in [0, 1], got {decay}")


def _check_cells(occs: Tensor) -> None:
    check_tensor("occupancy_threshold", "occs", occs, torch.float32, ("C",))
    if occs.shape[0] == 0:
        raise ValueError("occupancy_threshold: occs must have at least one cell, got shape [0]")


@torch.library.custom_op("dsd_fast::occupancy_update", mutates_args=("occs",))
def _occupancy_update_op(occs: Tensor, indices: Tensor, values: Tensor, decay: float) -> None:
    _check_update(occs, indices, values, decay)
    if not indices.is_cuda:
        _check_indices(indices, occs.shape[0])
    peaks = torch.full_like(occs, -math.inf)
    extension().occupancy_update(
        address(occs),
        address(indices),
        address(values),
        address(peaks),
        occs.shape[0],
        indices.shape[0],
        decay,
        *target(occs),
    )


@_occupancy_update_op.register_fake
def _(occs: Tensor, indices: Tensor, values: Tensor, decay: float) -> None:
    return None


@torch.library.custom_op("dsd_fast::occupancy_threshold", mutates_args=())
def _occupancy_threshold_op(occs: Tensor, max_threshold: float) -> tuple[Tensor, Tensor]:
    _check_cells(occs)
    binary = torch.empty_like(occs, dtype=torch.bool)
    threshold = occs.new_empty(())
    extension().occupancy_threshold(
        address(occs),
        occs.shape[0],
        max_threshold,
        address(threshold),
        address(binary),
        *target(occs),
    )
    return binary, threshold


@_occupancy_threshold_op.register_fake
def _(occs: Tensor, max_threshold: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(occs, dtype=torch.bool), occs.new_empty(())


def _check_indices(indices: Tensor, n_cells: int) -> None:
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= n_cells:
        raise IndexError(
            f"occupancy_update: indices must be in [0, {n_cells}), got {low} to {high}"
        )


@torch.no_grad()
def occupancy_update_reference(
    occs: Tensor, indices: Tensor, values: Tensor, decay: float = 0.95
) -> None:
    """`occupancy_update` in pure torch, any floating dtype and device."""
    _check_indices(indices, occs.shape[0])
    seen = torch.where(torch.isfinite(values), values, -math.inf)
    peak = torch.full_like(occs, -math.inf).scatter_reduce_(0, indices, seen, "amax")
    occs.copy_(torch.where(peak == -math.inf, occs, torch.fmax(occs * decay, peak)))


@torch.no_grad()
def occupancy_threshold_reference(
    occs: Tensor, max_threshold: float = 0.01
) -> tuple[Tensor, Tensor]:
    """`occupancy_threshold` in pure torch, any floating dtype and device."""
    threshold = occs.mean(dtype=torch.float64).to(occs.dtype).clamp(max=max_threshold)
    return occs > threshold, threshold
