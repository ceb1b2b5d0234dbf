"""Marching through the occupancy grid of a run's first steps."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import scene
from benchmarks.case import Call, Workload
from benchmarks.peers import nerfacc
from dsd_fast import ops
from dsd_fast.ops.march import march_packed_reference, march_reference


def march(width: int, device: torch.device, generator: torch.Generator) -> Workload:
    """width² jittered rays of a view of the initial blob, 32³ cells."""
    origins, dirs, jitter = scene.rays(width, device, generator)
    grid = scene.occupancy(device)
    arguments = (origins, dirs, grid.binary, grid.aabb, scene.STEP_SIZE, jitter)
    n_samples = len(ops.march(*arguments)[0])
    return Workload(
        compiled=lambda: ops.march(*arguments),
        reference=lambda: march_reference(*arguments),
        outputs=("ray_indices", "t_starts", "t_ends"),
        n_items=n_samples,
        # Origin, direction and jitter of a ray; index and interval of a sample.
        n_bytes=28 * len(origins) + 16 * n_samples,
        peers=_peers(origins, dirs),
    )


def packed(width: int, device: torch.device, generator: torch.Generator) -> Workload:
    """The same samples in arrays with a tenth more room, without waiting for the device."""
    origins, dirs, jitter = scene.rays(width, device, generator)
    grid = scene.occupancy(device)
    arguments = (origins, dirs, grid.binary, grid.aabb, scene.STEP_SIZE, jitter)
    n_samples = len(ops.march(*arguments)[0])
    capacity = n_samples + n_samples // 10
    return Workload(
        compiled=lambda: ops.march_packed(*arguments, capacity=capacity),
        reference=lambda: march_packed_reference(*arguments, capacity=capacity),
        outputs=ops.PackedSamples._fields,
        n_items=n_samples,
        # Origin, direction, jitter and offset of a ray; index and interval of a sample.
        n_bytes=36 * len(origins) + 12 * capacity,
        peers=_peers(origins, dirs),
    )


def _peers(origins: Tensor, dirs: Tensor) -> dict[str, Call]:
    peer = nerfacc()
    if peer is None or not origins.is_cuda:
        return {}
    grid = scene.occupancy(origins.device)
    estimator = peer.OccGridEstimator(list(grid.aabb), grid.cfg.resolution).to(origins.device)
    estimator.binaries.copy_(grid.binary[None])
    return {
        f"nerfacc {peer.__version__}": lambda: estimator.sampling(
            origins, dirs, render_step_size=scene.STEP_SIZE, stratified=True
        )
    }
