"""Argument checks of the operators: every error says what was expected, what came and the way out.

Addresses go to compiled code unseen, so each operator checks device, dtype, shape and contiguity of
each tensor here first. Numbers become float32 and int64 there, so their type and range are checked
too.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The largest number of float32.
LARGEST = float(np.finfo(np.float32).max)

_INTEGERS = (int, np.integer, torch.SymInt)
_NUMBERS = (*_INTEGERS, float, np.floating, torch.SymFloat)


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
        ValueError: another shape or device, not dense, or not contiguous.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{op}: {name} must be dense, got a {kind} tensor; call .to_dense()")
    fits = tensor.dim() == len(shape) and all(
        isinstance(size, str) or size == got for size, got in zip(shape, tensor.shape)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must have shape {_text(shape)}, got {describe(tensor)}")
    if dtype is None:
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must be floating point, got {describe(tensor)}")
    elif tensor.dtype != dtype:
        expected = str(dtype).removeprefix("torch.")
        raise TypeError(
            f"{op}: {name} must be {expected} {_text(shape)}, got {describe(tensor)}; convert it "
            f"with .to({dtype})"
        )
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {describe(tensor)}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} {_text(shape)} must be contiguous, got strides {list(tensor.stride())}; "
            "call .contiguous()"
        )
    # torch.compile has no such views, and does not know the question.
    if not torch.compiler.is_compiling() and tensor.is_neg():
        raise ValueError(f"{op}: {name} must hold its values, got a negated view; call .clone()")


def _text(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def check_number(op: str, name: str, value: Any) -> float:
    """Raises TypeError unless `value` is a number; a bool is none, infinity and NaN are.

    Gives it as float32 has it: what is larger than its largest is infinite.
    """
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    number: Any = value  # of any of these types
    if abs(number) > LARGEST:
        return math.inf if number > 0 else -math.inf
    number = torch.sym_float(number)
    return number


def check_integer(op: str, name: str, value: object, low: int, high: int) -> None:
    """Raises TypeError unless `value` is an integer, ValueError unless it is in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, _INTEGERS):
        raise TypeError(f"{op}: {name} must be an integer, got {_kind(value)}")
    if value < low:
        raise ValueError(f"{op}: {name} must be at least {low}, got {value}")
    if value > high:
        raise ValueError(f"{op}: {name} must be at most {high}, got {value}")


def check_flag(op: str, name: str, value: object) -> None:
    """Raises TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def _kind(value: object) -> str:
    return f"{value!r}" if isinstance(value, float) else type(value).__name__
