"""Bilinear resizing whose way back is deterministic and fast where it has to be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast._backend import deterministic


def bilinear(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image [B,C,h,w] at another size, without antialiasing; differentiable.

    Where CUDA must be deterministic it is two matrix products, for torch's own way back is then one
    sort of all pixels after the other. The two agree up to rounding.
    """
    if not (image.is_cuda and deterministic()):
        return F.interpolate(image, size, mode="bilinear", align_corners=False)
    down, across = (_weights(n, m, image) for n, m in zip(image.shape[-2:], size, strict=True))
    return down.mT @ (image @ across)


def _weights(n: int, m: int, like: Tensor) -> Tensor:
    """[n,m]: what each of n pixels has of each of m."""
    each = torch.eye(n, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(each, m, mode="linear", align_corners=False)[0]
