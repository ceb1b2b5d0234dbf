"""The fused field with the official grid and all 16 levels; on CUDA it reads a float16 table.

The table is random and the same for all calls, as in training; the points change from call to call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks import hashgrid
from benchmarks.case import Workload, by_reference
from benchmarks.hashgrid import Points, table, uniform
from dsd_fast import ops
from dsd_fast.scene.field import FieldConfig

_CFG = FieldConfig()
# Multiplications and additions of one point in the 32 → 64 → 1 and 32 → 64 → 3 networks.
DENSITY_FLOPS = 2 * (32 * 64 + 64)
FEATURE_FLOPS = 2 * (32 * 64 + 64 * 3)


def forward(
    n: int,
    device: torch.device,
    generator: torch.Generator,
    points: Points = uniform,
    features: bool = True,
) -> Workload:
    """Density and colour features, no gradient wanted."""
    world, tensors, half = _inputs(n, device, generator, points)
    tensors = [tensor.detach() for tensor in tensors]

    def call() -> list[Tensor]:
        outputs = ops.fused_field(
            world, *tensors, _shape(), features=features, normals=False, half_table=half
        )
        return [x for x in outputs if x is not None]

    return Workload(
        compiled=call,
        reference=by_reference(call),
        outputs=("density", "features")[: 1 + features],
        n_items=n,
        n_flops=n * (DENSITY_FLOPS + features * FEATURE_FLOPS),
    )


def forward_backward(
    n: int,
    device: torch.device,
    generator: torch.Generator,
    points: Points = uniform,
    normals: bool = False,
) -> Workload:
    """Forward, and from the gradients of all outputs to table and networks, zeroing included."""
    world, tensors, half = _inputs(n, device, generator, points)
    shapes = ((n,), (n, 3), (n, 3))[: 2 + normals]
    grads = [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    def call() -> tuple[Tensor, ...]:
        outputs = ops.fused_field(world, *tensors, _shape(), normals=normals, half_table=half)
        return torch.autograd.grad(outputs[: len(grads)], tensors, grads)

    return Workload(
        compiled=call,
        reference=by_reference(call),
        outputs=tuple(f"gradient of {x}" for x in ("table", "w1d", "w2d", "w1f", "w2f")),
        n_items=n,
        n_flops=3 * n * (DENSITY_FLOPS + FEATURE_FLOPS),
    )


def _shape() -> ops.FieldShape:
    return ops.FieldShape(
        hashgrid.SPEC,
        _CFG.radius,
        _CFG.density_bias,
        _CFG.density_blob_scale,
        _CFG.density_blob_std,
        _CFG.density_activation,
    )


def _inputs(
    n: int, device: torch.device, generator: torch.Generator, points: Points
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Points in world units, the parameters, and the copy of the table to read."""
    world = (points(n, device, generator) * 2 - 1) * _CFG.radius
    weights = []
    width = hashgrid.SPEC.n_outputs
    for n_out, n_in in ((64, width), (1, 64), (64, width), (3, 64)):
        weight = torch.empty(n_out, n_in).uniform_(-1, 1, generator=generator) / math.sqrt(n_in)
        weights.append(weight.to(device).requires_grad_())
    values = table(device)
    return world, [values, *weights], values.detach().half() if device.type == "cuda" else None
