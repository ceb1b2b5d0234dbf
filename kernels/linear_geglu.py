"""Triton kernel of a linear layer with GEGLU: the wide product never reaches memory.

A program owns a tile of the result and makes its values and its gates side by side, two
accumulators of one walk over K. Sums are float32; operands are in half precision on a GPU.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M = 128
BLOCK_N = 128
BLOCK_K = 64
NUM_WARPS = 8
MAX_STAGES = 4
# Row tiles that are walked together, so that their rows and the weights stay in the cache.
GROUP_M = 8


# Program: a tile of y. Reads BLOCK_M rows of x, BLOCK_N rows of the values' and the gates' weights.
@triton.jit(do_not_specialize=["n_rows"])
def linear_geglu_kernel(
    p_x, p_weight, p_bias, p_y, n_rows, width, depth, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n_m = tl.cdiv(n_rows, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(width, BLOCK_N)
    first_m = tl.program_id(0) // per_group * GROUP_M
    size_m = tl.minimum(n_m - first_m, GROUP_M)
    i_m = first_m + tl.program_id(0) % per_group % size_m
    i_n = tl.program_id(0) % per_group // size_m
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    # rows past the end read the last one again and are not stored
    o_row = tl.minimum(o_m, n_rows - 1).to(tl.int64)
    o_out = tl.minimum(o_n, width - 1)
    p_a = p_x + o_row[:, None] * depth + o_k[None, :]  # [BLOCK_M, BLOCK_K]
    p_value = p_weight + o_out[None, :] * depth + o_k[:, None]  # [BLOCK_K, BLOCK_N]
    p_gate = p_value + width * depth
    b_value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            b_a = tl.load(p_a + start)
            b_v = tl.load(p_value + start)
            b_g = tl.load(p_gate + start)
        else:
            m_k = o_k < depth - start
            b_a = tl.load(p_a + start, mask=m_k[None, :], other=0.0)
            b_v = tl.load(p_value + start, mask=m_k[:, None], other=0.0)
            b_g = tl.load(p_gate + start, mask=m_k[:, None], other=0.0)
        b_value = tl.dot(b_a, b_v, b_value)
        b_gate = tl.dot(b_a, b_g, b_gate)
    b_value += tl.load(p_bias + o_out).to(tl.float32)[None, :]
    b_gate += tl.load(p_bias + width + o_out).to(tl.float32)[None, :]
    b_y = b_value * (0.5 * b_gate * (1.0 + tl.erf(b_gate * 0.7071067811865476)))
    m_y = (o_m < n_rows)[:, None] & (o_n < width)[None, :]
    o_y = o_m.to(tl.int64)[:, None] * width + o_n[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


def linear_geglu_fwd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GEGLU(x weightᵀ + bias) of x [.., K], weight [2D, K] = (value | gate), bias [2D]: [.., D]."""
    depth = x.shape[-1]
    width = len(weight) // 2
    y = x.new_empty(*x.shape[:-1], width)
    n_rows = y.numel() // width if width else 0
    if n_rows == 0:
        return y
    tiles = triton.cdiv(n_rows, BLOCK_M) * triton.cdiv(width, BLOCK_N)
    linear_geglu_kernel[(tiles,)](
        p_x=x, p_weight=weight, p_bias=bias, p_y=y, n_rows=n_rows, width=width, depth=depth,
        GROUP_M=GROUP_M, EVEN_K=depth % BLOCK_K == 0,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        num_warps=NUM_WARPS, num_stages=_stages(x.device, x.element_size()),
    )  # fmt: skip
    return y


def _stages(device: torch.device, element_size: int) -> int:
    """Tiles in flight: as many as fit a multiprocessor's shared memory."""
    stage = (BLOCK_M + 2 * BLOCK_N) * BLOCK_K * element_size
    return max(2, min(MAX_STAGES, _shared_memory(device) // stage))


@cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
