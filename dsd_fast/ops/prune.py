"""Pruning: the visible ones of packed samples, packed anew."""

import torch
from torch import Tensor

from dsd_fast._backend import address, backend, extension, target
from dsd_fast.ops._check import check_number, check_tensor
from dsd_fast.ops._pack import (
    PackedSamples,
    addresses,
    check_capacity,
    check_offsets,
    check_offsets_tensor,
    empty_packed,
    pack_reference,
    scratch,
    unpack,
)
from dsd_fast.ops.composite import visibility_reference


def prune(
    sigmas: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    offsets: Tensor,
    alpha_threshold: float | Tensor,
    transmittance_threshold: float = 1e-4,
    *,
    capacity: int,
) -> PackedSamples:
    """The samples that `visibility` flags, in arrays of a fixed size; nothing waits for the device.

    Where there are more of them than room, they are dropped from the end: a ray that the end cuts
    keeps its nearest samples, and later rays get none. A CUDA graph can hold it.

    Args:
        sigmas: float32 [S], contiguous, as all tensors here.
        t_starts, t_ends: float32 [S].
        offsets: int64 [R + 1], where each ray's samples begin (`march_packed` gives it, with the
            intervals); samples from offsets[R] on are not read. On CUDA, offsets that do not rise
            from 0 to at most S give wrong samples, but never an access out of bounds.
        alpha_threshold: a number, or a float32 tensor [] on the device of the samples.
        transmittance_threshold: a number.
        capacity: room for samples C, at least 0.

    Returns:
        A `PackedSamples`. Nothing in it is differentiable.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: another shape or device, not contiguous, a capacity below 0, or (CPU) offsets
            that do not rise from 0 to at most S.

    Example:
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> sigmas, offsets = torch.tensor([0.0, 2.0]), torch.tensor([0, 2])
        >>> prune(sigmas, t[:-1], t[1:], offsets, 0.1, capacity=3).t_starts
        tensor([1., 0., 0.])
    """
    least = check_number("prune", "transmittance_threshold", transmittance_threshold)
    n_rays = _check_samples(sigmas, t_starts, t_ends, offsets)
    check_capacity("prune", n_rays, capacity)
    if not isinstance(alpha_threshold, Tensor):
        alpha_threshold = check_number("prune", "alpha_threshold", alpha_threshold)
        alpha_threshold = sigmas.new_full((), alpha_threshold)
    check_tensor("prune", "alpha_threshold", alpha_threshold, torch.float32, (), sigmas.device)
    function = prune_reference if backend(sigmas) == "torch" else _prune_op
    samples = sigmas.detach(), t_starts.detach(), t_ends.detach(), offsets
    thresholds = alpha_threshold.detach(), least
    return PackedSamples(*function(*samples, *thresholds, capacity=capacity))


def _check_samples(sigmas: Tensor, t_starts: Tensor, t_ends: Tensor, offsets: Tensor) -> int:
    """Gives the number of rays."""
    check_tensor("prune", "sigmas", sigmas, torch.float32, ("S",))
    for name, values in (("t_starts", t_starts), ("t_ends", t_ends)):
        check_tensor("prune", name, values, torch.float32, sigmas.shape, sigmas.device)
    return check_offsets_tensor("prune", offsets, sigmas.device)


@torch.library.custom_op("dsd_fast::prune", mutates_args=())
def _prune_op(
    sigmas: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    offsets: Tensor,
    alpha_threshold: Tensor,
    transmittance_threshold: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_samples, n_rays = len(sigmas), _check_samples(sigmas, t_starts, t_ends, offsets)
    check_tensor("prune", "alpha_threshold", alpha_threshold, torch.float32, (), sigmas.device)
    check_capacity("prune", n_rays, capacity)
    if not offsets.is_cuda:
        check_offsets(offsets, n_samples)
    visible = torch.empty_like(sigmas, dtype=torch.bool)
    working = scratch(sigmas, n_rays)
    packed = empty_packed(sigmas, n_rays, capacity)
    extension().prune(
        address(sigmas),
        address(t_starts),
        address(t_ends),
        address(offsets),
        address(alpha_threshold),
        transmittance_threshold,
        n_rays,
        n_samples,
        address(visible),
        tuple(address(tensor) for tensor in working),
        capacity,
        addresses(packed),
        *target(sigmas),
    )
    return packed[:]


@_prune_op.register_fake
def _(sigmas, t_starts, t_ends, offsets, alpha_threshold, transmittance_threshold, capacity):
    return tuple(empty_packed(sigmas, offsets.shape[0] - 1, capacity))


@torch.no_grad()
def prune_reference(
    sigmas: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    offsets: Tensor,
    alpha_threshold: float | Tensor,
    transmittance_threshold: float = 1e-4,
    *,
    capacity: int,
) -> PackedSamples:
    """`prune` in pure torch, any floating dtype and device; it waits for the device."""
    check_offsets(offsets, len(sigmas))
    rays, n_rays = unpack(offsets), len(offsets) - 1
    sigmas, t_starts, t_ends = (values[: len(rays)] for values in (sigmas, t_starts, t_ends))
    thresholds = alpha_threshold, transmittance_threshold
    seen = visibility_reference(sigmas, t_starts, t_ends, rays, n_rays, *thresholds)
    return pack_reference(rays[seen], t_starts[seen], t_ends[seen], n_rays, capacity)
