"""Small tensors from the CPU, where levels, angles and random numbers are made, to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for the work already queued there.

    CUDA takes a pageable source over before the copy returns, so the source may be changed or
    freed at once; a plain `.to` would drain the stream every time.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
