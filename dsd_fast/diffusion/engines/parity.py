"""The gate before an engine: does it compute what the plain module computes?

Two half-precision runs of one network never agree to the bit. What may be asked of an engine is an
error against float32 of the same size as that of the eager module in half precision.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsd_fast.diffusion.engines.base import EagerEngine, Forward, UNetShape

# An engine sums in another order than the eager kernels do; more than twice their error is wrong.
_ALLOWED_RATIO = 2.0
# Rounding of float32 itself, summed in another order, where the eager module has no error.
_FLOOR = 1e-4
# Without a float32 reference: two half-precision results apart by more are not both right.
_OWN_PRECISION_TOLERANCE = 2e-2


class ParityError(RuntimeError):
    """An engine does not compute what the module computes."""


@dataclass(frozen=True)
class Parity:
    """Relative error of an engine, and how much of it is allowed."""

    error: float
    allowed: float
    reference: torch.dtype

    @property
    def passed(self) -> bool:
        # A NaN compares false, and does not pass.
        return self.error <= self.allowed


@torch.no_grad()
def measure(
    engine: Forward, unet: nn.Module, shape: UNetShape, rows: int, *, float32: bool = True
) -> Parity:
    """Compare an engine with its module on random inputs.

    Args:
        unet: the module the engine was made from, on the engine's device, in its dtype.
        rows: row count of the inputs.
        float32: compare both with a float32 copy of the module, which for a short time takes
            twice the memory of half-precision weights; else compare them with one another.
    """
    parameter = next(unet.parameters())
    inputs = shape.sample(rows, parameter.dtype, parameter.device)
    result, eager = engine(*inputs), EagerEngine(unet)(*inputs)
    if not float32:
        error = relative_error(result, eager)
        return Parity(error, _OWN_PRECISION_TOLERANCE, parameter.dtype)
    exact = EagerEngine(copy.deepcopy(unet).float())
    latents, t, condition = inputs
    reference = exact(latents.float(), t, condition.to(torch.float32))
    allowed = max(_ALLOWED_RATIO * relative_error(eager, reference), _FLOOR)
    return Parity(relative_error(result, reference), allowed, torch.float32)


def require(parity: Parity, name: str) -> None:
    """Raise ParityError, with the figures, for an engine that did not pass."""
    if not parity.passed:
        raise ParityError(
            f"{name} differs from the eager UNet: relative error {parity.error:.2e} against "
            f"{str(parity.reference).removeprefix('torch.')}, allowed {parity.allowed:.2e}"
        )


def fits_float32_copy(unet: nn.Module) -> bool:
    """Whether the GPU's free memory holds a float32 copy of a module and its activations."""
    device = next(unet.parameters()).device
    if device.type != "cuda":
        return True
    needed = sum(p.numel() for p in unet.parameters()) * 4
    return torch.cuda.mem_get_info(device)[0] > 2 * needed


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float32; infinity where either holds a NaN."""
    got, want = got.float(), want.float()
    error = float((got - want).norm() / want.norm().clamp_min(1e-12))
    return error if error == error else float("inf")


def gate(
    engine: Forward,
    unet: nn.Module,
    shape: UNetShape,
    rows: int,
    name: str,
) -> Parity:
    """Measure with the best reference that memory allows, and require that it passes."""
    parity = measure(engine, unet, shape, rows, float32=fits_float32_copy(unet))
    require(parity, name)
    return parity
