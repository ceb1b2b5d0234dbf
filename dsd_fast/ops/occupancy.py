"""Occupancy grid: decaying maximum of what was seen in each cell, and its binary view."""

import math

import torch
from torch import Tensor


def occupancy_update_reference(
    occs: Tensor, indices: Tensor, values: Tensor, decay: float = 0.95
) -> None:
    """`occupancy_update` in pure torch."""
    seen = torch.where(torch.isfinite(values), values, -math.inf)
    peak = torch.full_like(occs, -math.inf).scatter_reduce_(0, indices, seen, "amax")
    occs.copy_(torch.where(peak == -math.inf, occs, torch.fmax(occs * decay, peak)))


def occupancy_threshold_reference(
    occs: Tensor, max_threshold: float = 0.01
) -> tuple[Tensor, Tensor]:
    """`occupancy_threshold` in pure torch."""
    threshold = occs.mean().clamp(max=max_threshold)
    return occs > threshold, threshold


occupancy_update = occupancy_update_reference
occupancy_threshold = occupancy_threshold_reference
