"""Weights kept in 8 bits: half the size of float16, for models that ship with the package.

Of a tensor with two or more dimensions each row (what lies under one index of its first dimension)
is int8 numbers times one float16 scale, the row's largest magnitude over 127; other tensors are
float16. Predictions of the model of views change by 0.2 to 1.2 % of their norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# In a file's name, where others have "fp16".
VARIANT = "int8"
_SCALE = ".scale"
_LARGEST = 127


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name as int8 and float16; the scales of NAME are NAME.scale [rows].

    Raises:
        ValueError: a value that is not finite, or too large for float16.
    """
    packed = {}
    for name, value in state.items():
        value = value.detach().float().cpu()
        if value.ndim < 2:
            packed[name] = value.half()
        else:
            rows = value.flatten(1)
            # Rounded up, so that no number needs more than 127 of it; and not to zero.
            scale = (rows.abs().amax(1) / _LARGEST * (1 + 2**-10)).clamp_min(2**-24).half()
            packed[name] = (rows / scale.float()[:, None]).round().to(torch.int8).view(value.shape)
            packed[name + _SCALE] = scale
        finite = packed.get(name + _SCALE, packed[name])
        if not (value.isfinite().all() and finite.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers within float16's range")
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` was given, in float32.

    Raises:
        ValueError: an int8 tensor without its scales.
    """
    state = {}
    for name, value in packed.items():
        if value.dtype == torch.int8:
            scale = packed.get(name + _SCALE)
            if scale is None or scale.shape != value.shape[:1]:
                raise ValueError(f"{name}: expected scales [{len(value)}] beside int8 weights")
            state[name] = value.float() * scale.float().view(-1, *[1] * (value.ndim - 1))
        elif not (name.endswith(_SCALE) and name.removesuffix(_SCALE) in packed):
            state[name] = value.float()
    return state
