"""Triton kernels over token matrices [.., C]: LayerNorm, GEGLU, upsampling, phases of an image.

Arithmetic is float32, whatever the tensors' dtype. Arguments are checked by
`dsd_fast.diffusion.networks.token_ops`, which is the way in; here tensors are taken as contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a LayerNorm tile: whole rows, as many as fit.
NORM_TILE = 2048
NORM_WARPS = 4
GEGLU_ROWS = 8
GEGLU_COLUMNS = 256
GEGLU_WARPS = 8
UPSAMPLE_TILE = 4096
UPSAMPLE_WARPS = 8


# Program: BLOCK_R rows. Reads them (and the update), writes y and, with an update, the new rows.
@triton.jit(do_not_specialize=["n_rows", "eps"])
def layer_norm_kernel(
    p_x, p_update, p_add, p_weight, p_bias, p_y, n_rows, channels, eps,
    ADD: tl.constexpr, UPDATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    m = (o_r < n_rows)[:, None] & m_c[None, :]
    # 64-bit addresses: large batches pass 2^31 elements
    o_x = o_r.to(tl.int64)[:, None] * channels + o_c[None, :]
    b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_C]
    if ADD:
        b_x += tl.load(p_add + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if UPDATE:
        b_x += tl.load(p_update + o_x, mask=m, other=0.0).to(tl.float32)
        b_half = b_x.to(p_x.dtype.element_ty)
        tl.store(p_x + o_x, b_half, mask=m)
        b_x = b_half.to(tl.float32)
    b_mean = tl.sum(b_x, 1) / channels
    b_d = tl.where(m, b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_d * b_d, 1) / channels + eps)
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y = b_d * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(p_y + o_x, b_y.to(p_y.dtype.element_ty), mask=m)


# Program (block of rows, block of columns): reads value and gate once, writes their product.
@triton.jit(do_not_specialize=["n_rows"])
def geglu_kernel(
    p_x, p_bias, p_y, n_rows, width,
    BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < width
    m = (o_r < n_rows)[:, None] & m_c[None, :]
    o_x = o_r.to(tl.int64)[:, None] * (2 * width) + o_c[None, :]
    b_value = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(p_x + o_x + width, mask=m, other=0.0).to(tl.float32)
    if BIAS:
        b_value += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        b_gate += tl.load(p_bias + width + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_y = b_value * (0.5 * b_gate * (1.0 + tl.erf(b_gate * 0.7071067811865476)))
    o_y = o_r.to(tl.int64)[:, None] * width + o_c[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m)


# Program (block of pixels, block of channels): reads a pixel once, writes it four times.
@triton.jit(do_not_specialize=["n_pixels", "width"])
def upsample_kernel(
    p_x, p_add, p_y, n_pixels, width, channels,
    ADD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    m = (o_r < n_pixels)[:, None] & m_c[None, :]
    o_x = o_r.to(tl.int64)[:, None] * channels + o_c[None, :]
    b_x = tl.load(p_x + o_x, mask=m, other=0.0)
    if ADD:
        b_add = tl.load(p_add + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_x = (b_x.to(tl.float32) + b_add[None, :]).to(p_x.dtype.element_ty)
    # (item and row) i, column j of the small image is row 2i, column 2j of the large one
    o_top = (4 * (o_r // width) * width + 2 * (o_r % width)).to(tl.int64)
    p_top = p_y + o_top[:, None] * channels + o_c[None, :]
    p_below = p_top + 2 * width.to(tl.int64) * channels
    tl.store(p_top, b_x, mask=m)
    tl.store(p_top + channels, b_x, mask=m)
    tl.store(p_below, b_x, mask=m)
    tl.store(p_below + channels, b_x, mask=m)


# Program (block of the large image's pixels, block of channels): reads and writes each once.
@triton.jit(do_not_specialize=["n_pixels", "height", "width"])
def interleave_kernel(
    p_x, p_y, n_pixels, height, width, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (o_r < n_pixels)[:, None] & (o_c < channels)[None, :]
    column = o_r % (2 * width)
    row = o_r // (2 * width) % (2 * height)
    item = o_r // (4 * width * height)
    # phase (a, b) of pixel (2i + a, 2j + b) lies at (i + a, j + b) of a frame one pixel larger
    a = row % 2
    b = column % 2
    o_frame = (item * (height + 1) + row // 2 + a) * (width + 1) + column // 2 + b
    o_x = (4 * o_frame + 2 * a + b).to(tl.int64)[:, None] * channels + o_c[None, :]
    b_x = tl.load(p_x + o_x, mask=m, other=0.0)
    tl.store(p_y + o_r.to(tl.int64)[:, None] * channels + o_c[None, :], b_x, mask=m)


def layer_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    add: Tensor | None = None,
    update: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x + add + update) of [.., C]; with an update, x becomes that sum in place."""
    y = torch.empty_like(x)
    channels = x.shape[-1]
    n_rows = x.numel() // channels if channels else 0
    if n_rows == 0:
        return y
    block_c = triton.next_power_of_2(channels)
    block_r = max(1, min(NORM_TILE // block_c, triton.next_power_of_2(n_rows)))
    layer_norm_kernel[(triton.cdiv(n_rows, block_r),)](
        p_x=x, p_update=x if update is None else update, p_add=x if add is None else add,
        p_weight=weight, p_bias=bias, p_y=y, n_rows=n_rows, channels=channels, eps=eps,
        ADD=add is not None, UPDATE=update is not None, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=NORM_WARPS,
    )  # fmt: skip
    return y


def geglu_fwd(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """value · gelu(gate), exact gelu, of [.., 2D] = (value | gate) + bias [2D]: [.., D]."""
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    n_rows = y.numel() // width if width else 0
    if n_rows == 0:
        return y
    block_c = min(GEGLU_COLUMNS, max(16, triton.next_power_of_2(width)))
    geglu_kernel[(triton.cdiv(n_rows, GEGLU_ROWS), triton.cdiv(width, block_c))](
        p_x=x, p_bias=x if bias is None else bias, p_y=y, n_rows=n_rows, width=width,
        BIAS=bias is not None, BLOCK_R=GEGLU_ROWS, BLOCK_C=block_c, num_warps=GEGLU_WARPS,
    )  # fmt: skip
    return y


def upsample_fwd(x: Tensor, height: int, width: int, add: Tensor | None = None) -> Tensor:
    """Nearest 2x upsampling of x [B, h·w, C] + add [C]: [B, 2h·2w, C]."""
    batch, n, channels = x.shape
    y = x.new_empty(batch, 4 * n, channels)
    if y.numel() == 0:
        return y
    block_c = min(128, max(16, triton.next_power_of_2(channels)))
    block_r = UPSAMPLE_TILE // block_c
    grid = (triton.cdiv(batch * n, block_r), triton.cdiv(channels, block_c))
    upsample_kernel[grid](
        p_x=x, p_add=x if add is None else add, p_y=y, n_pixels=batch * n, width=width,
        channels=channels, ADD=add is not None, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=UPSAMPLE_WARPS,
    )  # fmt: skip
    return y


def interleave_fwd(x: Tensor, height: int, width: int) -> Tensor:
    """Phases [B, (h+1)·(w+1), 4C] of an image to its tokens [B, 2h·2w, C]."""
    channels = x.shape[2] // 4
    y = x.new_empty(x.shape[0], 4 * height * width, channels)
    if y.numel() == 0:
        return y
    block_c = min(128, max(16, triton.next_power_of_2(channels)))
    block_r = UPSAMPLE_TILE // block_c
    n_pixels = y.shape[0] * y.shape[1]
    grid = (triton.cdiv(n_pixels, block_r), triton.cdiv(channels, block_c))
    interleave_kernel[grid](
        p_x=x, p_y=y, n_pixels=n_pixels, height=height, width=width, channels=channels,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=UPSAMPLE_WARPS,
    )  # fmt: skip
    return y
