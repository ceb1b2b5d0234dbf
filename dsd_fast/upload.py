"""Small tensors from the CPU, where levels, angles and random numbers are made, to the device."""

from __future__ import annotations

import torch
from torch import Tensor

# CUDA takes a pageable source of this size over before the copy returns; a larger one would make
# the host wait for all work queued before it.
_PAGEABLE_BYTES = 1 << 16


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for the work already queued there.

    The source may be changed or freed at once. A plain `.to` would drain the stream every time.
    """
    if device.type == "cuda" and not tensor.is_cuda and tensor.nbytes > _PAGEABLE_BYTES:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")
