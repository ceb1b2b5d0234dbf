"""Marching: samples at a constant step along rays, inside the occupied cells of a grid."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A ray's lattice ends here: float32 counts whole steps exactly up to 2^24.
MAX_STEPS = 1 << 24

# The reference looks at rays x steps points at once; this bounds its memory.
_REFERENCE_POINTS = 1 << 21


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

    # entry and exit only bound the search, so they need no care at grazing rays
    moving = dirs != 0
    safe_dirs = torch.where(moving, dirs, 1)
    t_low, t_high = (low - origins) / safe_dirs, (high - origins) / safe_dirs
    entry = torch.where(moving, torch.minimum(t_low, t_high), -math.inf).amax(-1).clamp(min=near)
    exit_ = torch.where(moving, torch.maximum(t_low, t_high), math.inf).amin(-1).clamp(max=far)
    first = torch.floor((entry - start) / step_t - 2).clamp(min=0)
    last = torch.ceil((exit_ - start) / step_t + 2).clamp(max=MAX_STEPS)
    valid = torch.isfinite(origins).all(-1) & torch.isfinite(dirs).all(-1) & torch.isfinite(start)
    valid &= moving.any(-1) & (first < last)
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
        inside = ((cells >= 0) & (cells < n_cells)).all(-1) & (middle < far) & (k < MAX_STEPS)
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


def _interval(start: Tensor, k: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of lattice interval k; one expression, so that neighbours share their end exactly."""
    return start + k * step, start + (k + 1) * step


def _cells_per_unit(aabb: Sequence[float], n_cells: int) -> list[float]:
    """Grid cells per unit of length along each axis."""
    return [n_cells / (high - low) for low, high in zip(aabb[:3], aabb[3:])]


march = march_reference
