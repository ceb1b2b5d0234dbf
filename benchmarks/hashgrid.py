"""Hash-grid encoding with the official field's grid, all 16 levels active, float32.

The table is random and the same for all calls, as in training; the points change from call to call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from benchmarks import scene
from benchmarks.case import Workload, backward_of, by_reference
from dsd_fast import ops
from dsd_fast.ops.hashgrid import hashgrid_jacobian_reference, hashgrid_reference
from dsd_fast.scene.field import GridConfig

_GRID = GridConfig()
SPEC = ops.GridSpec(
    _GRID.n_levels,
    _GRID.n_features,
    _GRID.log2_table_size,
    _GRID.base_resolution,
    _GRID.per_level_scale,
)
# Samples of a ray in `along_rays`: as many as a ray through the blob has.
_PER_RAY = 64

Points = Callable[[int, torch.device, torch.Generator], Tensor]


def uniform(n: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Points [n,3] anywhere in the unit cube: no two near each other."""
    return torch.rand(n, 3, generator=generator).to(device)


def along_rays(n: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Points [n,3] a renderer's step apart on neighbouring rays of a view of the blob."""
    width = math.ceil(math.sqrt(n / _PER_RAY))
    origins, dirs, jitter = scene.rays(width, device, generator)
    k = torch.arange(_PER_RAY, device=device) - 0.5 * _PER_RAY + jitter[:, None]
    t = scene.DISTANCE + scene.STEP_SIZE * k
    points = origins[:, None] + dirs[:, None] * t[..., None]
    return (points / (2 * scene.RADIUS) + 0.5).reshape(-1, 3)[:n].contiguous()


@cache
def table(device: torch.device) -> Tensor:
    """Random numbers of order 1 [P], a leaf that takes gradients."""
    values = torch.empty(SPEC.n_params).uniform_(
        -1.0, 1.0, generator=torch.Generator().manual_seed(0)
    )
    return values.to(device).requires_grad_()


def forward(
    n: int,
    device: torch.device,
    generator: torch.Generator,
    points: Points = uniform,
    half: bool = False,
) -> Workload:
    """Encode points, no gradient wanted. (The reference computes the Jacobian too.)"""
    x, weights = points(n, device, generator), table(device).detach()
    if half:
        weights = weights.half()
    return Workload(
        compiled=lambda: ops.hashgrid(x, weights, SPEC),
        reference=lambda: hashgrid_reference(x, weights, SPEC),
        outputs=("y",),
        n_items=n,
        n_bytes=_bytes(n, widths=3 + SPEC.n_outputs) + _bytes_touched(n) // (1 + half),
    )


def backward(
    n: int, device: torch.device, generator: torch.Generator, points: Points = uniform
) -> Workload:
    """From the encoding's gradient to the table's, zeroing included."""
    x, (grad_y, _) = points(n, device, generator), _grads(n, device, generator)
    weights = table(device)
    return Workload(
        compiled=lambda: torch.ops.dsd_fast.hashgrid_bwd_table(x, grad_y, None, *_spec()),
        reference=backward_of(
            lambda: (hashgrid_reference(x, weights, SPEC),), (weights,), (grad_y,)
        ),
        outputs=("grad_table",),
        n_items=n,
        n_bytes=_bytes(n, widths=3 + SPEC.n_outputs) + 4 * SPEC.n_params,
    )


def jacobian_forward(
    n: int, device: torch.device, generator: torch.Generator, points: Points = uniform
) -> Workload:
    """Encoding and its Jacobian, no gradient wanted."""
    x, weights = points(n, device, generator), table(device).detach()
    return Workload(
        compiled=lambda: ops.hashgrid_jacobian(x, weights, SPEC),
        reference=lambda: hashgrid_jacobian_reference(x, weights, SPEC),
        outputs=("y", "jacobian"),
        n_items=n,
        n_bytes=_bytes(n, widths=3 + 4 * SPEC.n_outputs) + _bytes_touched(n),
    )


def jacobian_backward(
    n: int, device: torch.device, generator: torch.Generator, points: Points = uniform
) -> Workload:
    """From the gradients of encoding and Jacobian to the table's, zeroing included."""
    x, grads = points(n, device, generator), _grads(n, device, generator)
    weights = table(device)
    return Workload(
        compiled=lambda: torch.ops.dsd_fast.hashgrid_bwd_table(x, *grads, *_spec()),
        reference=backward_of(
            lambda: hashgrid_jacobian_reference(x, weights, SPEC), (weights,), grads
        ),
        outputs=("grad_table",),
        n_items=n,
        n_bytes=_bytes(n, widths=3 + 4 * SPEC.n_outputs) + 4 * SPEC.n_params,
    )


def jacobian_forward_backward(
    n: int, device: torch.device, generator: torch.Generator, points: Points = uniform
) -> Workload:
    """Encoding and Jacobian, and from their gradients to the table's: what normals cost."""
    x, grads = points(n, device, generator), _grads(n, device, generator)
    weights = table(device)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.hashgrid_jacobian(x, weights, SPEC), (weights,), grads)

    # Value and Jacobian are written, and their gradients read.
    n_bytes = _bytes(n, widths=3 + 8 * SPEC.n_outputs) + _bytes_touched(n) + 4 * SPEC.n_params
    return Workload(call, by_reference(call), ("grad_table",), n, n_bytes)


def _grads(n: int, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    grad_y = torch.randn(n, SPEC.n_outputs, generator=generator)
    return grad_y.to(device), torch.randn(n, SPEC.n_outputs, 3, generator=generator).to(device)


def _spec() -> tuple[int, int, int, int, float, int]:
    """The end of the backward operators' arguments: the spec and the number of active levels."""
    return (
        SPEC.n_levels,
        SPEC.n_features,
        SPEC.log2_table_size,
        SPEC.base_resolution,
        SPEC.per_level_scale,
        SPEC.n_levels,
    )


def _bytes(n: int, widths: int) -> int:
    return 4 * n * widths


def _bytes_touched(n: int) -> int:
    """Bytes of the table entries that n points can touch, each counted once."""
    return sum(min(level.size, 8 * n) for level in SPEC.levels) * SPEC.n_features * 4
