"""Passes of the fused VAE encoder over token matrices [B, N, C]: Triton on CUDA, else torch.

Each has the kernel's arguments and its twin here, which also serves float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast._backend import backend

# Those of `kernels.vae`, which only a machine with Triton can import.
SHARE_SCALE = 256.0
GRADIENT_SCALE = 16.0


def on_kernels(x: Tensor) -> bool:
    return backend(x) == "triton"


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _row(add: Tensor) -> Tensor:
    return add if add.ndim == 1 else add[:, None]


def group_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    *,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    out_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = act(GroupNorm(s)), s = x + add + residual; see `kernels.group_norm.group_norm_fwd`."""
    if on_kernels(x):
        from dsd_fast.kernels import group_norm

        return group_norm.group_norm_fwd(
            x, weight, bias, groups, eps, silu, add=add, residual=residual, out_sum=out_sum
        )
    s = _wide(x)
    if residual is not None:
        s = s + residual
    if add is not None:
        s = s + _row(add)
    if out_sum is not None:
        s = _wide(out_sum.copy_(s))
    parts = s.unflatten(2, (groups, -1))
    mean = parts.mean((1, 3))
    rstd = torch.rsqrt((parts - mean[:, None, :, None]).square().mean((1, 3)) + eps)
    y = _normalised(s, mean, rstd) * weight + bias
    return (F.silu(y) if silu else y).to(x.dtype), torch.stack([mean, rstd], 2)


def group_norm_bwd(
    dy: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    groups: int,
    silu: bool,
    *,
    add: Tensor | None = None,
    dresidual: Tensor | None = None,
) -> Tensor:
    """Gradient to the normalised s (+ add); see `kernels.group_norm_bwd.group_norm_bwd`."""
    if on_kernels(dy):
        from dsd_fast.kernels import group_norm_bwd

        return group_norm_bwd.group_norm_bwd(
            dy, s, weight, bias, stats, groups, silu, add=add, dresidual=dresidual
        )
    s = _wide(s) if add is None else _wide(s) + _row(add)
    mean, rstd = stats.unbind(2)
    x = _normalised(s, mean, rstd)
    g = _wide(dy)
    if silu:
        u = x * weight + bias
        sigmoid = torch.sigmoid(u)
        g = g * sigmoid * (1 + u * (1 - sigmoid))
    g = (g * weight).unflatten(2, (groups, -1))
    x = x.unflatten(2, (groups, -1))
    g = g - g.mean((1, 3), True) - x * (g * x).mean((1, 3), True)
    ds = (g * rstd[:, None, :, None]).flatten(2)
    return (ds if dresidual is None else ds + dresidual).to(dy.dtype)


def _normalised(s: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    parts = s.unflatten(2, (mean.shape[1], -1))
    return ((parts - mean[:, None, :, None]) * rstd[:, None, :, None]).flatten(2)


def skip_sum(x: Tensor, residual: Tensor, add: Tensor, height: int, width: int) -> Tensor:
    """x + residual + add with a border of zeros below and right: [B,HW,C] to [B,(H+1)(W+1),C]."""
    if on_kernels(x):
        from dsd_fast.kernels import vae

        return vae.skip_sum(x, residual, add, height, width)
    s = (_wide(x) + residual + add).to(x.dtype).unflatten(1, (height, width))
    return F.pad(s, (0, 0, 0, 1, 0, 1)).flatten(1, 2)


def softmax_fwd(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """SHARE_SCALE softmax(logits) [B,T,T] in `dtype`; see `kernels.vae`."""
    if on_kernels(logits):
        from dsd_fast.kernels import vae

        if logits.shape[2] <= vae.ROW_LIMIT:
            return vae.softmax_fwd(logits, dtype)
    return (torch.softmax(_wide(logits), 2) * SHARE_SCALE).to(dtype)


def softmax_bwd(shares: Tensor, dp: Tensor) -> Tensor:
    """GRADIENT_SCALE times the gradient to the logits, [B,T,T]. May overwrite dp."""
    if on_kernels(shares):
        from dsd_fast.kernels import vae

        if shares.shape[2] <= vae.ROW_LIMIT:
            return vae.softmax_bwd(shares, dp)
    p, d = _wide(shares) / SHARE_SCALE, _wide(dp)
    return (p * (d - (p * d).sum(2, keepdim=True)) * GRADIENT_SCALE).to(shares.dtype)
