"""Spherical harmonics of directions, as the background uses them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Workload, backward_of
from dsd_fast import ops
from dsd_fast.ops.sh import N_VALUES, spherical_harmonics_reference


def forward(n: int, device: torch.device, generator: torch.Generator) -> Workload:
    """Nine values a direction."""
    dirs = _directions(n, device, generator)
    return Workload(
        compiled=lambda: ops.spherical_harmonics(dirs),
        reference=lambda: spherical_harmonics_reference(dirs),
        outputs=("y",),
        n_items=n,
        n_bytes=4 * n * (3 + N_VALUES),
    )


def backward(n: int, device: torch.device, generator: torch.Generator) -> Workload:
    """From the values' gradient to the directions'."""
    dirs = _directions(n, device, generator)
    grad_y = torch.randn(n, N_VALUES, generator=generator).to(device)
    leaf = dirs.clone().requires_grad_()
    return Workload(
        compiled=lambda: torch.ops.dsd_fast.spherical_harmonics_bwd(dirs, grad_y),
        reference=backward_of(lambda: (spherical_harmonics_reference(leaf),), (leaf,), (grad_y,)),
        outputs=("grad_dirs",),
        n_items=n,
        n_bytes=4 * n * (3 + N_VALUES + 3),
    )


def _directions(n: int, device: torch.device, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(n, 3, generator=generator), dim=-1).to(device)
