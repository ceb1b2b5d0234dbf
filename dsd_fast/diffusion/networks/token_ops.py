"""Passes between the matrix products of a UNet, over token matrices [B, N, C], N = h·w.

On CUDA each is a Triton kernel (`dsd_fast.kernels.group_norm`, `dsd_fast.kernels.tokens`),
elsewhere its twin in torch. Arithmetic is float32, whatever the tensors' dtype. Nothing here has
a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast._backend import backend

# From how many rows on the product and its GEGLU are one kernel. With fewer, the library's product
# is faster by more than the trip of its result through memory costs.
FUSED_GEGLU_ROWS = 16384


def _on_kernels(x: Tensor) -> bool:
    return backend(x) == "triton"


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = False,
    *,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
    out_sum: Tensor | None = None,
) -> Tensor:
    """act(GroupNorm(s)) with s = (x | x2) + add + residual: a pass for statistics and one to apply.

    Args:
        x: [B, N, C1] contiguous.
        weight, bias: [C], C = C1 + C2.
        silu: act is SiLU, else nothing.
        x2: [B, N, C2] contiguous: channels that follow those of x, as if concatenated.
        add: [C] or [B, C].
        residual: [B, N, C] contiguous.
        scale_shift: [B, 2C] = (scale | shift): act(GroupNorm(s) (1 + scale) + shift).
        out_sum: [B, N, C] contiguous, takes s; the statistics are then those of s as stored.
    Returns:
        [B, N, C] in x's dtype.
    Raises:
        ValueError: shapes that do not fit.
    """
    channels = x.shape[-1] + (0 if x2 is None else x2.shape[-1])
    rows = (*x.shape[:-1], channels)
    if x.ndim != 3 or channels % groups or weight.shape != (channels,):
        raise ValueError(
            f"group_norm: expected x [B,N,C], weight [C] and C a multiple of {groups} groups, got "
            f"{list(x.shape)}, {list(weight.shape)} and C = {channels}"
        )
    for name, tensor in (("residual", residual), ("out_sum", out_sum)):
        if tensor is not None and (tensor.shape != rows or not tensor.is_contiguous()):
            raise ValueError(
                f"group_norm: expected {name} {list(rows)} contiguous, got {list(tensor.shape)}"
            )
    if _on_kernels(x):
        from dsd_fast.kernels.group_norm import group_norm_fwd

        return group_norm_fwd(
            x, weight, bias, groups, eps, silu,
            x2=x2, add=add, residual=residual, scale_shift=scale_shift, out_sum=out_sum,
        )[0]  # fmt: skip
    s = (x if x2 is None else torch.cat([x, x2], -1)).float()
    if add is not None:
        s = s + (add if add.ndim == 1 else add[:, None]).float()
    if residual is not None:
        s = s + residual.float()
    if out_sum is not None:
        s = out_sum.copy_(s).float()
    y = F.group_norm(s.transpose(1, 2), groups, weight.float(), bias.float(), eps).transpose(1, 2)
    if scale_shift is not None:
        scale, shift = scale_shift.float()[:, None].chunk(2, -1)
        y = y * (1 + scale) + shift
    return (F.silu(y) if silu else y).to(x.dtype).contiguous()


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    add: Tensor | None = None,
    update: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x + add + update) over the last dimension; in x's dtype and shape.

    Args:
        x: [.., C] contiguous; with an update it becomes x + add + update in place.
        weight, bias: [C].
        add: [C].
        update: [.., C] contiguous.
    """
    if _on_kernels(x):
        from dsd_fast.kernels.tokens import layer_norm_fwd

        return layer_norm_fwd(x, weight, bias, eps, add=add, update=update)
    s = x.float() if add is None else x.float() + add.float()
    if update is not None:
        s = x.copy_(s + update.float()).float()
    return F.layer_norm(s, weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


def geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """value · gelu(gate), exact gelu, of x [.., 2D] = (value | gate) + bias [2D]: [.., D]."""
    if _on_kernels(x):
        from dsd_fast.kernels.tokens import geglu_fwd

        return geglu_fwd(x, bias)
    s = x.float() if bias is None else x.float() + bias.float()
    value, gate = s.chunk(2, -1)
    return (value * F.gelu(gate)).to(x.dtype)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`geglu` of x [.., K] · weightᵀ [K, 2D] + bias [2D]: [.., D]."""
    n_rows = x.numel() // max(x.shape[-1], 1)
    if _on_kernels(x) and x.element_size() == 2 and n_rows >= FUSED_GEGLU_ROWS:
        from dsd_fast.kernels.linear_geglu import linear_geglu_fwd

        return linear_geglu_fwd(x, weight, bias)
    return geglu(F.linear(x, weight), bias)


def upsample(x: Tensor, height: int, width: int, add: Tensor | None = None) -> Tensor:
    """Nearest 2x upsampling of x [B, h·w, C] + add [C]: [B, 2h·2w, C]."""
    if x.ndim != 3 or x.shape[1] != height * width:
        raise ValueError(f"upsample: expected x [B,{height}·{width},C], got {list(x.shape)}")
    if _on_kernels(x):
        from dsd_fast.kernels.tokens import upsample_fwd

        return upsample_fwd(x, height, width, add)
    s = x if add is None else (x.float() + add.float()).to(x.dtype)
    s = s.view(x.shape[0], height, 1, width, 1, x.shape[2])
    return s.expand(-1, -1, 2, -1, 2, -1).reshape(x.shape[0], -1, x.shape[2])


def interleave(x: Tensor, height: int, width: int) -> Tensor:
    """An image [B, 2h·2w, C] from its four phases [B, (h+1)·(w+1), 4C].

    Pixel (2i + a, 2j + b) is phase 2a + b at (i + a, j + b).
    """
    batch, n, channels = x.shape
    if n != (height + 1) * (width + 1) or channels % 4:
        raise ValueError(
            f"interleave: expected x [B,{height + 1}·{width + 1},4C], got {list(x.shape)}"
        )
    if _on_kernels(x):
        from dsd_fast.kernels.tokens import interleave_fwd

        return interleave_fwd(x, height, width)
    x = x.view(batch, height + 1, width + 1, 2, 2, -1)
    y = x.new_empty(batch, height, 2, width, 2, channels // 4)
    for a in range(2):
        for b in range(2):
            y[:, :, a, :, b] = x[:, a : height + a, b : width + b, a, b]
    return y.flatten(1, 4).view(batch, 4 * height * width, -1)
