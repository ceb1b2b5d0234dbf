"""Argument checks of the operators: every error says what was expected, what came and the way out.

Addresses go to compiled code unseen, so each operator checks device, dtype, shape and contiguity of
each tensor here first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def describe(tensor: Tensor) -> str:
    """'float32 [5, 3] on cpu', for error messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def check_tensor(
    op: str,
    name: str,
    tensor: object,
    dtype: torch.dtype | None,
    shape: Sequence[int | str],
    device: torch.device | None = None,
) -> None:
    """Raises unless `tensor` is what a compiled kernel may be given.

    Args:
        op, name: operator and argument, for the message.
        dtype: expected dtype, or None for any floating point one (references only).
        shape: expected shape; a string entry stands for any size ("N").
        device: expected device, or None for any.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, or not contiguous.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    wanted = "[" + ", ".join(str(size) for size in shape) + "]"
    fits = tensor.dim() == len(shape) and all(
        isinstance(size, str) or size == got for size, got in zip(shape, tensor.shape)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {describe(tensor)}")
    if dtype is None:
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must be floating point, got {describe(tensor)}")
    elif tensor.dtype != dtype:
        expected = str(dtype).removeprefix("torch.")
        raise TypeError(
            f"{op}: {name} must be {expected} {wanted}, got {describe(tensor)}; convert it with "
            f".to({dtype})"
        )
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {describe(tensor)}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} {wanted} must be contiguous, got strides {list(tensor.stride())}; call "
            ".contiguous()"
        )
