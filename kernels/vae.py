"""Triton kernels of the VAE encoder beside its norms: skip sums with a border, and wide softmax.

The middle attention has one head of as many channels as the network is wide, so it is computed by
plain matrix products around these rows. Exponentials stay unnormalised in half precision, where
their largest is 1: divided by their sum (up to the number of tokens) they would be near the
smallest half. Arguments are checked by `dsd_fast.diffusion.vae_ops`, which is the way in.
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


# Program (row): reads logits, writes exp(logit - largest) and the sum of what was written.
@triton.jit(do_not_specialize=["n"])
def softmax_kernel(p_logits, p_exp, p_sum, n, BLOCK: tl.constexpr):
    i_r = tl.program_id(0).to(tl.int64)
    o_x = tl.arange(0, BLOCK)
    m_x = o_x < n
    b_x = tl.load(p_logits + i_r * n + o_x, mask=m_x, other=float("-inf")).to(tl.float32)
    b_e = tl.exp(b_x - tl.max(b_x, 0)).to(p_exp.dtype.element_ty)
    tl.store(p_exp + i_r * n + o_x, b_e, mask=m_x)
    # of the rounded: the shares then add up to one
    tl.store(p_sum + i_r, tl.sum(tl.where(m_x, b_e.to(tl.float32), 0.0), 0))


# Program (row): reads e and dp, writes e (dp - <p, dp>), p = e / sum.
@triton.jit(do_not_specialize=["n"])
def softmax_bwd_kernel(p_exp, p_sum, p_dp, p_out, n, BLOCK: tl.constexpr):
    i_r = tl.program_id(0).to(tl.int64)
    o_x = tl.arange(0, BLOCK)
    m_x = o_x < n
    b_e = tl.load(p_exp + i_r * n + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_d = tl.load(p_dp + i_r * n + o_x, mask=m_x, other=0.0).to(tl.float32)
    mean = tl.sum(b_e * b_d, 0) / tl.load(p_sum + i_r)
    b_o = b_e * (b_d - mean)
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


def softmax_fwd(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(logits - their largest) of rows [B, T, T] in `dtype`, and its sums [B, T, 1] float32."""
    batch, rows, n = logits.shape
    exp = torch.empty_like(logits, dtype=dtype)
    sums = logits.new_empty((batch, rows, 1), dtype=torch.float32)
    softmax_kernel[(batch * rows,)](
        p_logits=logits, p_exp=exp, p_sum=sums, n=n, BLOCK=triton.next_power_of_2(n), num_warps=8
    )
    return exp, sums


def softmax_bwd(exp: Tensor, sums: Tensor, dp: Tensor) -> Tensor:
    """Gradient to the logits times `sums`: exp (dp - <p, dp>), [B, T, T], written over dp."""
    batch, rows, n = exp.shape
    softmax_bwd_kernel[(batch * rows,)](
        p_exp=exp, p_sum=sums, p_dp=dp, p_out=dp, n=n, BLOCK=triton.next_power_of_2(n), num_warps=8
    )
    return dp
