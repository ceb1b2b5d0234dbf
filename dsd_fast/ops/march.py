"""Marching: samples at a constant step along rays, inside the occupied cells of a grid."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsd_fast._backend import address, backend, extension, target
from dsd_fast.ops._check import LARGEST, check_number, check_tensor
from dsd_fast.ops._pack import (
    PackedSamples,
    addresses,
    check_capacity,
    empty_packed,
    pack_reference,
    scratch,
)

# A ray's lattice ends here: float32 counts whole steps exactly up to 2^24.
MAX_STEPS = 1 << 24

# A ray that takes more steps from the box's entry to its exit has no samples (kMaxRaySteps).
MAX_RAY_STEPS = 1 << 17

# A cell's flat index must fit 32 bits.
MAX_CELLS = 1024

# Runs of samples that the kernels keep of a ray from counting for writing (kMarchRuns).
_RUNS = 4

# The smallest step; below it float32 loses digits, and its reciprocal is infinite.
_SMALLEST = float(torch.finfo(torch.float32).tiny)

# The reference looks at rays x steps points at once; this bounds its memory.
_REFERENCE_POINTS = 1 << 21


def march(
    origins: Tensor,
    dirs: Tensor,
    occupancy: Tensor,
    aabb: Sequence[float],
    step: float,
    jitter: Tensor | None = None,
    near: float = 0.0,
    far: float = 1e10,
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples at a constant step along rays, in the occupied cells of a grid.

    Ray r carries the lattice t_k = near + (k + jitter[r])·step, k = 0, 1, ...; interval
    [t_k, t_k+1) is a sample where its middle lies in an occupied cell and before `far`. These are
    the samples that nerfacc's occupancy estimator takes with a fixed step. The reference and the
    compiled backends decide by the same roundings and give the same samples.

    The work is bounded: a ray takes at most 2^17 steps between where it enters the box, or `near`,
    and where it leaves it, or `far`. Rays that would take more, as with a direction that is next to
    nothing or a box that is huge beside the step, have no samples; nor have rays that miss the box,
    stand still or are not finite, their jitter included. A lattice ends after 2^24 steps, where
    float32 no longer counts.

    Args:
        origins: float32 [R, 3], contiguous, as all tensors here; inside the box or outside.
        dirs: float32 [R, 3], of any length; t is measured in it.
        occupancy: bool [G, G, G] indexed by x, y, z, with G at most 1024.
        aabb: the box, (x, y, z) of its low and then of its high corner, six numbers.
        step: distance in t between samples.
        jitter: float32 [R] in [0, 1), shifts each ray's lattice by that share of a step.
        near: t of the first lattice point.
        far: middles of samples are before it.

    Returns:
        (ray_indices int64 [S], t_starts float32 [S], t_ends float32 [S]), sorted by ray, then by t.
        Nothing here is differentiable. On CUDA the number of samples costs one synchronisation.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: another shape or device, not contiguous, or numbers without a meaning.

    Example:
        >>> origins = torch.tensor([[0.0, 0.0, -3.0]])
        >>> dirs = torch.tensor([[0.0, 0.0, 1.0]])
        >>> ball = torch.ones(8, 8, 8, dtype=torch.bool)
        >>> march(origins, dirs, ball, (-1, -1, -1, 1, 1, 1), step=0.5)[1]
        tensor([2.0000, 2.5000, 3.0000, 3.5000])
    """
    aabb, step, near, far = _check_march(
        "march", origins, dirs, occupancy, aabb, step, jitter, near, far
    )
    if backend(origins) == "torch":
        return march_reference(origins, dirs, occupancy, aabb, step, jitter, near, far)
    jitter = None if jitter is None else jitter.detach()
    return _march_op(origins.detach(), dirs.detach(), occupancy, aabb, step, jitter, near, far)


def march_packed(
    origins: Tensor,
    dirs: Tensor,
    occupancy: Tensor,
    aabb: Sequence[float],
    step: float,
    jitter: Tensor | None = None,
    near: float = 0.0,
    far: float = 1e10,
    *,
    capacity: int,
) -> PackedSamples:
    """The samples of `march` in arrays of a fixed size; nothing waits for the device.

    Where there are more samples than room, they are dropped from the end: a ray that the end cuts
    keeps its nearest samples, and later rays get none. A CUDA graph can hold it.

    Args:
        capacity: room for samples C, at least 0; the other arguments are those of `march`.

    Returns:
        A `PackedSamples`, on the device of the rays. Nothing in it is differentiable.

    Raises:
        TypeError, ValueError: see `march`; ValueError for a capacity below 0.

    Example:
        >>> origins = torch.tensor([[0.0, 0.0, -3.0]])
        >>> dirs = torch.tensor([[0.0, 0.0, 1.0]])
        >>> ball = torch.ones(8, 8, 8, dtype=torch.bool)
        >>> box = (-1, -1, -1, 1, 1, 1)
        >>> march_packed(origins, dirs, ball, box, step=0.5, capacity=6).t_starts
        tensor([2.0000, 2.5000, 3.0000, 3.5000, 0.0000, 0.0000])
    """
    aabb, step, near, far = _check_march(
        "march_packed", origins, dirs, occupancy, aabb, step, jitter, near, far
    )
    check_capacity("march_packed", origins.shape[0], capacity)
    rays = origins.detach(), dirs.detach(), occupancy, aabb, step
    jitter = None if jitter is None else jitter.detach()
    function = march_packed_reference if backend(origins) == "torch" else _march_packed_op
    return PackedSamples(*function(*rays, jitter, near, far, capacity=capacity))


def _check_march(
    op: str,
    origins: Tensor,
    dirs: Tensor,
    occupancy: Tensor,
    aabb: Sequence[float],
    step: float,
    jitter: Tensor | None,
    near: float,
    far: float,
) -> tuple[list[float], float, float, float]:
    """Gives (aabb, step, near, far) as float32 has them.

    Called twice, as all checks of arguments are: by the public functions, where torch would turn a
    list or a mix of devices away in words of its own, and by the operators, which torch.ops can
    reach directly.
    """
    check_tensor(op, "origins", origins, torch.float32, ("R", 3))
    device, n_rays = origins.device, origins.shape[0]
    check_tensor(op, "dirs", dirs, torch.float32, (n_rays, 3), device)
    check_tensor(op, "occupancy", occupancy, torch.bool, ("G", "G", "G"), device)
    n_cells = occupancy.shape[0]
    if occupancy.shape != (n_cells,) * 3 or not 1 <= n_cells <= MAX_CELLS:
        raise ValueError(
            f"{op}: occupancy must have shape [G, G, G] with 1 <= G <= {MAX_CELLS}, "
            f"got {list(occupancy.shape)}"
        )
    if jitter is not None:
        check_tensor(op, "jitter", jitter, torch.float32, (n_rays,), device)
    aabb = _check_box(op, aabb, n_cells)
    step_f, near_f = check_number(op, "step", step), check_number(op, "near", near)
    far_f = check_number(op, "far", far)
    if not _SMALLEST <= step_f < math.inf:
        raise ValueError(f"{op}: step must be finite and above 0 in float32, got {step}")
    if not (math.isfinite(near_f) and near_f < far_f):
        raise ValueError(f"{op}: near must be finite and below far, got near {near}, far {far}")
    return aabb, step_f, near_f, far_f


def _check_box(op: str, aabb: Sequence[float], n_cells: int) -> list[float]:
    """Gives the box as numbers. Its edges and its cells must be what float32 can tell."""
    try:
        box = [float(bound) for bound in aabb]
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{op}: aabb must be six numbers, got {aabb!r}") from None
    edges = [high - low for low, high in zip(box[:3], box[3:])]
    if len(box) != 6 or not all(abs(number) <= LARGEST for number in (*box, *edges)):
        raise ValueError(
            f"{op}: aabb must be six finite numbers, with edges of at most {LARGEST:.3g}, got {box}"
        )
    if not all(edge > 0 and n_cells / edge <= LARGEST for edge in edges):
        raise ValueError(
            f"{op}: aabb must be a low corner below a high one, with cells that float32 can count, "
            f"got {box}"
        )
    return box


class _Marching:
    """The bindings' arguments of one march, and what its two passes share."""

    def __init__(self, origins, dirs, occupancy, aabb, step, jitter, near, far) -> None:
        self.n_rays = n_rays = origins.shape[0]
        self.like = origins
        runs = origins.new_empty((_RUNS, n_rays, 2), dtype=torch.int32)
        counts, bases, total = scratch(origins, n_rays)
        # These live until both passes are launched.
        self.tensors = origins, dirs, jitter, occupancy, runs, counts, bases, total
        self.total = total
        self.arguments = (
            *(address(tensor) for tensor in (origins, dirs, jitter, occupancy)),
            n_rays,
            occupancy.shape[0],
            list(aabb),
            step,
            near,
            far,
            address(runs),
            tuple(address(tensor) for tensor in (counts, bases, total)),
        )

    def count(self) -> None:
        extension().march_count(*self.arguments, *target(self.like))

    def write(self, packed: tuple[int, ...], capacity: int, wide: bool) -> None:
        extension().march_write(*self.arguments, capacity, packed, wide, *target(self.like))


@torch.library.custom_op("dsd_fast::march", mutates_args=())
def _march_op(
    origins: Tensor,
    dirs: Tensor,
    occupancy: Tensor,
    aabb: Sequence[float],
    step: float,
    jitter: Tensor | None,
    near: float,
    far: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rays = origins, dirs, occupancy
    aabb, step, near, far = _check_march("march", *rays, aabb, step, jitter, near, far)
    marching = _Marching(*rays, aabb, step, jitter, near, far)
    marching.count()
    n_samples = int(marching.total)
    ray_indices = origins.new_empty(n_samples, dtype=torch.int64)
    samples = ray_indices, origins.new_empty(n_samples), origins.new_empty(n_samples)
    packed = (0, 0, *(address(tensor) for tensor in samples))
    marching.write(packed, n_samples, wide=True)
    return samples


@_march_op.register_fake
def _(origins, dirs, occupancy, aabb, step, jitter, near, far):
    n_samples = torch.library.get_ctx().new_dynamic_size()
    t_starts = origins.new_empty(n_samples)
    return origins.new_empty(n_samples, dtype=torch.int64), t_starts, torch.empty_like(t_starts)


@torch.library.custom_op("dsd_fast::march_packed", mutates_args=())
def _march_packed_op(
    origins: Tensor,
    dirs: Tensor,
    occupancy: Tensor,
    aabb: Sequence[float],
    step: float,
    jitter: Tensor | None,
    near: float,
    far: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rays = origins, dirs, occupancy
    aabb, step, near, far = _check_march("march_packed", *rays, aabb, step, jitter, near, far)
    check_capacity("march_packed", origins.shape[0], capacity)
    marching = _Marching(*rays, aabb, step, jitter, near, far)
    marching.count()
    packed = empty_packed(origins, marching.n_rays, capacity)
    marching.write(addresses(packed), capacity, wide=False)
    return packed[:]


@_march_packed_op.register_fake
def _(origins, dirs, occupancy, aabb, step, jitter, near, far, capacity):
    return tuple(empty_packed(origins, origins.shape[0], capacity))


@torch.no_grad()
def march_reference(
    origins: Tensor,
    dirs: Tensor,
    occupancy: Tensor,
    aabb: Sequence[float],
    step: float,
    jitter: Tensor | None = None,
    near: float = 0.0,
    far: float = 1e10,
) -> tuple[Tensor, Tensor, Tensor]:
    """`march` in pure torch: every lattice point between a ray's entry and exit is looked up."""
    dtype, device = origins.dtype, origins.device
    low = torch.tensor(aabb[:3], dtype=dtype, device=device)
    high = torch.tensor(aabb[3:], dtype=dtype, device=device)
    n_cells = occupancy.shape[0]
    cells_per_unit = torch.tensor(_cells_per_unit(aabb, n_cells), dtype=dtype, device=device)
    step_t = torch.tensor(step, dtype=dtype, device=device)
    start = torch.full((origins.shape[0],), near, dtype=dtype, device=device)
    if jitter is not None:
        start = start + jitter * step_t

    # The search ends where the kernels' does, two steps of room at both ends: a ray that grazes the
    # box may round to its inside for ever.
    moving = dirs != 0
    safe_dirs = torch.where(moving, dirs, 1)
    t_low, t_high = (low - origins) / safe_dirs, (high - origins) / safe_dirs
    entry = torch.where(moving, torch.minimum(t_low, t_high), -math.inf).amax(-1).clamp(min=near)
    exit_ = torch.where(moving, torch.maximum(t_low, t_high), math.inf).amin(-1).clamp(max=far)
    first = torch.floor((entry - start) / step_t - 2).clamp(0, MAX_STEPS)
    last = torch.floor((exit_ - start) / step_t + 3).clamp(0, MAX_STEPS)
    valid = torch.isfinite(origins).all(-1) & torch.isfinite(dirs).all(-1) & torch.isfinite(start)
    valid &= moving.any(-1) & (first < last) & (last - first <= MAX_RAY_STEPS)
    rays = valid.nonzero()[:, 0]

    found: list[tuple[Tensor, Tensor]] = []  # (ray, lattice index) of the samples
    while rays.numel():
        n_steps = int((last[rays] - first[rays]).max())
        n_chunk = max(1, _REFERENCE_POINTS // n_steps)
        chunk, rays = rays[:n_chunk], rays[n_chunk:]
        k = first[chunk, None] + torch.arange(n_steps, device=device, dtype=dtype)
        t_start, t_end = _interval(start[chunk, None], k, step_t)
        middle = 0.5 * (t_start + t_end)
        points = origins[chunk, None] + dirs[chunk, None] * middle[..., None]
        cells = (points - low) * cells_per_unit
        inside = (
            ((cells >= 0) & (cells < n_cells)).all(-1) & (middle < far) & (k < last[chunk, None])
        )
        i = torch.where(inside[..., None], cells, 0).long()
        hit = inside & occupancy[i[..., 0], i[..., 1], i[..., 2]]
        row, column = hit.nonzero(as_tuple=True)
        found.append((chunk[row], k[row, column]))
    if not found:
        empty = torch.empty(0, dtype=dtype, device=device)
        return torch.empty(0, dtype=torch.int64, device=device), empty, empty.clone()
    ray_indices = torch.cat([ray for ray, _ in found])
    k = torch.cat([index for _, index in found])
    return ray_indices, *_interval(start[ray_indices], k, step_t)


def march_packed_reference(
    origins: Tensor,
    dirs: Tensor,
    occupancy: Tensor,
    aabb: Sequence[float],
    step: float,
    jitter: Tensor | None = None,
    near: float = 0.0,
    far: float = 1e10,
    *,
    capacity: int,
) -> PackedSamples:
    """`march_packed` in pure torch; it waits for the device."""
    samples = march_reference(origins, dirs, occupancy, aabb, step, jitter, near, far)
    return pack_reference(*samples, origins.shape[0], capacity)


def _interval(start: Tensor, k: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of lattice interval k; one expression, so that neighbours share their end exactly."""
    return start + k * step, start + (k + 1) * step


def _cells_per_unit(aabb: Sequence[float], n_cells: int) -> list[float]:
    """Grid cells per unit of length along each axis."""
    return [n_cells / (high - low) for low, high in zip(aabb[:3], aabb[3:])]
