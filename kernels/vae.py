"""Triton kernels of the VAE encoder beside its norms: skip sums with a border, and wide softmax.

The middle attention has one head of as many channels as the network is wide, so it is computed by
plain matrix products around these rows. Shares of thousands of tokens are near the smallest normal
half: they are kept times SHARE_SCALE, and their gradient times GRADIENT_SCALE, which the products
that read them divide by in float32. Arguments are checked by `diffusion.networks.vae_ops`, which
is the way in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile of the skip sum.
TILE = 4096
# Longest row of a softmax that one program holds.
ROW_LIMIT = 16384
# Powers of two: exact.
SHARE_SCALE = 256.0
GRADIENT_SCALE = 16.0
_SHARE_SCALE = tl.constexpr(SHARE_SCALE)
_GRADIENT_SCALE = tl.constexpr(GRADIENT_SCALE)


# Program (rows of the bordered image, item): reads x and residual, writes their sum, zero outside.
@triton.jit(do_not_specialize=["height", "width", "out_width", "n_out"])
def skip_sum_kernel(
    p_x, p_residual, p_add, p_out, height, width, out_width, n_out, channels,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_row = o_n // out_width
    o_column = o_n % out_width
    m_c = (o_c < channels)[None, :]
    m_inside = (o_row < height) & (o_column < width)
    m = m_inside[:, None] & m_c
    o_x = (o_row * width + o_column)[:, None] * channels + o_c[None, :]
    i_item = i_b * height * width * channels
    b_x = tl.load(p_x + i_item + o_x, mask=m, other=0.0).to(tl.float32)
    b_x += tl.load(p_residual + i_item + o_x, mask=m, other=0.0).to(tl.float32)
    b_x += tl.load(p_add + o_c, mask=o_c < channels, other=0.0).to(tl.float32)[None, :]
    b_x = tl.where(m, b_x, 0.0)
    o_out = o_n[:, None] * channels + o_c[None, :]
    p_item = p_out + i_b * n_out * channels
    tl.store(p_item + o_out, b_x.to(p_out.dtype.element_ty), mask=(o_n < n_out)[:, None] & m_c)


# Program (row): reads logits, writes their softmax times SHARE_SCALE.
@triton.jit
def softmax_kernel(p_logits, p_shares, n, BLOCK: tl.constexpr):
    i_r = tl.program_id(0).to(tl.int64)
    o_x = tl.arange(0, BLOCK)
    m_x = o_x < n
    b_x = tl.load(p_logits + i_r * n + o_x, mask=m_x, other=float("-inf")).to(tl.float32)
    b_e = tl.exp(b_x - tl.max(b_x, 0))
    b_p = b_e * (_SHARE_SCALE / tl.sum(b_e, 0))
    tl.store(p_shares + i_r * n + o_x, b_p.to(p_shares.dtype.element_ty), mask=m_x)


# Program (row): reads shares p and dp, writes p (dp - <p, dp>) times GRADIENT_SCALE.
@triton.jit
def softmax_bwd_kernel(p_shares, p_dp, p_out, n, BLOCK: tl.constexpr):
    i_r = tl.program_id(0).to(tl.int64)
    o_x = tl.arange(0, BLOCK)
    m_x = o_x < n
    b_p = tl.load(p_shares + i_r * n + o_x, mask=m_x, other=0.0).to(tl.float32) / _SHARE_SCALE
    b_d = tl.load(p_dp + i_r * n + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_o = b_p * (b_d - tl.sum(b_p * b_d, 0)) * _GRADIENT_SCALE
    tl.store(p_out + i_r * n + o_x, b_o.to(p_out.dtype.element_ty), mask=m_x)


def skip_sum(x: Tensor, residual: Tensor, add: Tensor, height: int, width: int) -> Tensor:
    """x + residual + add with a border of zeros below and to the right.

    Args:
        x, residual: [B, H W, C] contiguous.
        add: [C].
    Returns:
        [B, (H + 1) (W + 1), C] in the dtype of x.
    """
    batch, _, channels = x.shape
    n_out = (height + 1) * (width + 1)
    out = x.new_empty(batch, n_out, channels)
    block_c = min(128, triton.next_power_of_2(channels))
    block_r = TILE // block_c
    skip_sum_kernel[(triton.cdiv(n_out, block_r), batch, triton.cdiv(channels, block_c))](
        p_x=x, p_residual=residual, p_add=add, p_out=out, height=height, width=width,
        out_width=width + 1, n_out=n_out, channels=channels, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=8,
    )  # fmt: skip
    return out


def softmax_fwd(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """SHARE_SCALE softmax(logits) of contiguous rows [B, T, T], in `dtype`."""
    batch, rows, n = logits.shape
    shares = torch.empty_like(logits, dtype=dtype)
    softmax_kernel[(batch * rows,)](
        p_logits=logits, p_shares=shares, n=n, BLOCK=triton.next_power_of_2(n), num_warps=8
    )
    return shares


def softmax_bwd(shares: Tensor, dp: Tensor) -> Tensor:
    """GRADIENT_SCALE times the gradient to the logits, [B, T, T], written over dp."""
    batch, rows, n = shares.shape
    softmax_bwd_kernel[(batch * rows,)](
        p_shares=shares, p_dp=dp, p_out=dp, n=n, BLOCK=triton.next_power_of_2(n), num_warps=8
    )
    return dp
