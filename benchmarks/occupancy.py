"""The update of the occupancy grid, without the field that it asks."""

from __future__ import annotations

import torch

from benchmarks.case import Workload
from dsd_fast import ops
from dsd_fast.ops.occupancy import occupancy_threshold_reference, occupancy_update_reference


def update(n_cells: int, device: torch.device, generator: torch.Generator) -> Workload:
    """Half as many random values as cells, several to some cells, into n_cells³ cells."""
    occs = torch.rand(n_cells**3, generator=generator).to(device)
    n_values = max(len(occs) // 2, 1)
    indices = torch.randint(len(occs), (n_values,), generator=generator).to(device)
    values = torch.rand(n_values, generator=generator).to(device)
    copy = occs.clone()

    def compiled() -> torch.Tensor:
        ops.occupancy_update(occs, indices, values)
        return occs

    def reference() -> torch.Tensor:
        occupancy_update_reference(copy, indices, values)
        return copy

    # An index and a value in; each cell read and written.
    return Workload(compiled, reference, ("occs",), len(occs), 12 * n_values + 8 * len(occs))


def threshold(n_cells: int, device: torch.device, generator: torch.Generator) -> Workload:
    """Which of n_cells³ cells are occupied; the mean decides."""
    occs = 0.01 * torch.rand(n_cells**3, generator=generator).to(device)
    return Workload(
        compiled=lambda: ops.occupancy_threshold(occs),
        reference=lambda: occupancy_threshold_reference(occs),
        outputs=("binary", "threshold"),
        n_items=len(occs),
        n_bytes=5 * len(occs),
    )
