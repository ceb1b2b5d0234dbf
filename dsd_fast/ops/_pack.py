"""Packed samples in arrays of a fixed size: what `march_packed` and `prune` share (csrc/pack.h)."""

from typing import NamedTuple

import torch
from torch import Tensor

from dsd_fast._backend import address
from dsd_fast.ops._check import check_integer, check_tensor

# Rays of a group (kGroup).
_GROUP = 256

# Ray indices are int32.
MAX_RAYS = (1 << 31) - 1

# Sizes in bytes stay far from what 64 bits hold.
MAX_CAPACITY = 1 << 48


class PackedSamples(NamedTuple):
    """Samples of R rays in arrays of a fixed size C, so that nobody waits to learn their number.

    All rays' samples stand one ray after the other, each from near to far. Behind the last one,
    from place offsets[R] on, are intervals [0, 0) of ray 0.
    """

    offsets: Tensor  # int64 [R + 1] where each ray begins; the last entry is the number of samples
    ray_indices: Tensor  # int32 [C]
    t_starts: Tensor  # float32 [C]
    t_ends: Tensor  # float32 [C]
    n_dropped: Tensor  # int64 [] samples that found no room


def check_capacity(op: str, n_rays: int, capacity: int) -> None:
    """Raises TypeError or ValueError for a capacity below 0 or too many rays to be told apart."""
    check_integer(op, "capacity", capacity, 0, MAX_CAPACITY)
    check_integer(op, "the number of rays", n_rays, 0, MAX_RAYS)


def empty_packed(like: Tensor, n_rays: int, capacity: int) -> PackedSamples:
    """Unwritten samples on the device of `like`."""
    return PackedSamples(
        offsets=like.new_empty(n_rays + 1, dtype=torch.int64),
        ray_indices=like.new_empty(capacity, dtype=torch.int32),
        t_starts=like.new_empty(capacity, dtype=torch.float32),
        t_ends=like.new_empty(capacity, dtype=torch.float32),
        n_dropped=like.new_empty((), dtype=torch.int64),
    )


def addresses(packed: PackedSamples) -> tuple[int, ...]:
    """In the order of the bindings."""
    results = (packed.offsets, packed.n_dropped, packed.ray_indices, packed.t_starts, packed.t_ends)
    return tuple(address(tensor) for tensor in results)


def scratch(like: Tensor, n_rays: int) -> tuple[Tensor, Tensor, Tensor]:
    """(counts of rays, sums of groups, their total), unwritten, on the device of `like`."""
    counts = like.new_empty(n_rays, dtype=torch.int32)
    bases = like.new_empty(n_rays // _GROUP + 1, dtype=torch.int64)
    return counts, bases, like.new_empty((), dtype=torch.int64)


def pack_reference(
    ray_indices: Tensor, t_starts: Tensor, t_ends: Tensor, n_rays: int, capacity: int
) -> PackedSamples:
    """Sorted samples of any number in arrays of a fixed size, in pure torch."""
    n_samples = len(ray_indices)
    n_kept = min(n_samples, capacity)
    ends = torch.bincount(ray_indices, minlength=n_rays).cumsum(0).clamp(max=capacity)
    packed = PackedSamples(
        offsets=torch.cat([ends.new_zeros(1), ends]),
        ray_indices=torch.zeros(capacity, dtype=torch.int32, device=ray_indices.device),
        t_starts=t_starts.new_zeros(capacity),
        t_ends=t_ends.new_zeros(capacity),
        n_dropped=ends.new_tensor(n_samples - n_kept),
    )
    packed.ray_indices[:n_kept] = ray_indices[:n_kept].int()
    packed.t_starts[:n_kept] = t_starts[:n_kept]
    packed.t_ends[:n_kept] = t_ends[:n_kept]
    return packed


def unpack(offsets: Tensor) -> Tensor:
    """The ray of each sample, int64 [offsets[R]]; waits for the device."""
    lengths = offsets[1:] - offsets[:-1]
    rays = torch.arange(len(lengths), device=offsets.device)
    return torch.repeat_interleave(rays, lengths)


def check_offsets_tensor(op: str, offsets: Tensor, device: torch.device) -> int:
    """Checks all of `offsets` but the values; gives the number of rays."""
    check_tensor(op, "offsets", offsets, torch.int64, ("R + 1",), device)
    if len(offsets) == 0:
        raise ValueError(f"{op}: offsets must have shape [R + 1], got [0]")
    return len(offsets) - 1


def check_offsets(offsets: Tensor, n_samples: int) -> None:
    """Raises ValueError for offsets that do not rise from 0 to at most `n_samples`; it waits."""
    rising = bool((offsets[1:] >= offsets[:-1]).all())
    first, last = int(offsets[0]), int(offsets[-1])
    if not rising or first != 0 or last > n_samples:
        raise ValueError(
            f"offsets must rise from 0 to at most {n_samples}, the number of samples, got {first} "
            f"to {last}{'' if rising else ', not rising'}"
        )
