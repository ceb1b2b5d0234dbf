"""Triton kernels of GroupNorm's gradient to its input, over token matrices [B, N, C].

The counterpart of `group_norm`: the same chunks of whole groups, tiles [BLOCK_R, BLOCK_C] and two
launches. The first sums g and g x^ of each group, g = dy act'(u) weight, over a split of the rows;
the second combines the splits and writes ds = rstd (g - mean(g) - x^ mean(g x^)). Sums are float32
and have a fixed order. Weights are frozen, so they get no gradient. Arguments are checked by
`dsd_fast.diffusion.networks.vae_ops`, which is the way in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsd_fast.kernels.group_norm import chunk_of

# Elements of a tile: two tensors are read, so half of the forward's.
TILE = 4096
# Programs of each launch: four for each of 132 multiprocessors.
PROGRAMS = 528
MAX_SPLITS = 256
NUM_WARPS = 8

_SPLIT_BLOCK = tl.constexpr(64)
_COUNTS = ["n", "rows", "walk", "n_splits", "groups", "group"]


@triton.jit
def _channel_terms(
    p_stats, p_weight, p_bias, p_add, i_b, o_c, m_c, groups, group, add_stride, ADD: tl.constexpr
):
    """Mean less the added term, rstd, weight and bias of channels o_c: float32 [BLOCK_C] each."""
    p_group = p_stats + (i_b * groups + o_c // group) * 2
    b_mean = tl.load(p_group, mask=m_c, other=0.0)
    b_rstd = tl.load(p_group + 1, mask=m_c, other=0.0)
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if ADD:
        b_mean -= tl.load(p_add + i_b * add_stride + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_mean, b_rstd, b_weight, b_bias


@triton.jit
def _normalised_and_gradient(
    p_dy, p_s, o_x, m, b_mean, b_rstd, b_weight, b_bias, SILU: tl.constexpr
):
    """x^ and dy act'(u) of a tile, float32; both 0 outside the mask."""
    b_g = tl.load(p_dy + o_x, mask=m, other=0.0).to(tl.float32)
    b_x = tl.load(p_s + o_x, mask=m, other=0.0).to(tl.float32)
    b_x = (b_x - b_mean[None, :]) * b_rstd[None, :]
    if SILU:
        b_u = b_x * b_weight[None, :] + b_bias[None, :]
        b_sigmoid = 1.0 / (1.0 + tl.exp(-b_u))
        b_g *= b_sigmoid * (1.0 + b_u * (1.0 - b_sigmoid))
    return b_x, b_g


# Program (chunk, split, item): reads its rows of dy and s, writes the two sums of its groups.
@triton.jit(do_not_specialize=_COUNTS)
def sums_kernel(
    p_dy, p_s, p_stats, p_weight, p_bias, p_add, p_partial,
    n, channels, add_stride, rows, n_splits, groups, group, chunk,
    ADD: tl.constexpr, SILU: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_k = tl.program_id(0)
    i_s = tl.program_id(1)
    i_b = tl.program_id(2)
    o_k = tl.arange(0, BLOCK_C)
    o_c = i_k * chunk + o_k
    m_c = (o_k < chunk) & (o_c < channels)
    b_mean, b_rstd, b_weight, b_bias = _channel_terms(
        p_stats, p_weight, p_bias, p_add, i_b, o_c, m_c, groups, group, add_stride, ADD
    )
    begin = i_s * rows
    end = tl.minimum(begin + rows, n)
    i_item = i_b.to(tl.int64) * n * channels
    b_s1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_s2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_R):
        o_n = start + tl.arange(0, BLOCK_R)
        m = (o_n < end)[:, None] & m_c[None, :]
        o_x = o_n[:, None] * channels + o_c[None, :]
        b_x, b_g = _normalised_and_gradient(
            p_dy + i_item, p_s + i_item, o_x, m, b_mean, b_rstd, b_weight, b_bias, SILU
        )
        b_s1 += b_g
        b_s2 += b_g * b_x
    m_owner = (o_k[None, :] // group == tl.arange(0, GROUPS)[:, None]) & m_c[None, :]
    b_c1 = tl.sum(b_s1, 0) * b_weight  # [BLOCK_C]
    b_c2 = tl.sum(b_s2, 0) * b_weight
    b_g1 = tl.sum(tl.where(m_owner, b_c1[None, :], 0.0), 1)  # [GROUPS]
    b_g2 = tl.sum(tl.where(m_owner, b_c2[None, :], 0.0), 1)
    per_chunk = chunk // group
    o_g = tl.arange(0, GROUPS)
    m_g = (o_g < per_chunk) & (i_k * per_chunk + o_g < groups)
    p_out = p_partial + ((i_b * n_splits + i_s) * groups + i_k * per_chunk + o_g) * 2
    tl.store(p_out, b_g1, mask=m_g)
    tl.store(p_out + 1, b_g2, mask=m_g)


# Program (chunk, block of rows, item): combines the splits of its groups, then writes its rows.
@triton.jit(do_not_specialize=_COUNTS)
def apply_kernel(
    p_dy, p_s, p_stats, p_weight, p_bias, p_add, p_dresidual, p_partial, p_ds,
    n, channels, add_stride, walk, n_splits, groups, group, chunk,
    ADD: tl.constexpr, DRESIDUAL: tl.constexpr, SILU: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_k = tl.program_id(0)
    # the last rows were read last, and may still be in the second-level cache
    i_r = tl.num_programs(1) - 1 - tl.program_id(1)
    i_b = tl.program_id(2)
    per_chunk = chunk // group
    o_g = tl.arange(0, GROUPS)
    m_g = (o_g < per_chunk) & (i_k * per_chunk + o_g < groups)
    b_g1 = tl.zeros([GROUPS], tl.float32)
    b_g2 = tl.zeros([GROUPS], tl.float32)
    for start in range(0, n_splits, _SPLIT_BLOCK):
        o_s = start + tl.arange(0, _SPLIT_BLOCK)
        m_s = m_g[:, None] & (o_s < n_splits)[None, :]
        o_p = (i_b * n_splits + o_s[None, :]) * groups + i_k * per_chunk + o_g[:, None]
        b_g1 += tl.sum(tl.load(p_partial + 2 * o_p, mask=m_s, other=0.0), 1)
        b_g2 += tl.sum(tl.load(p_partial + 2 * o_p + 1, mask=m_s, other=0.0), 1)
    count = n * group.to(tl.float32)
    o_k = tl.arange(0, BLOCK_C)
    o_c = i_k * chunk + o_k
    m_c = (o_k < chunk) & (o_c < channels)
    m_owner = o_k[None, :] // group == o_g[:, None]
    b_c1 = tl.sum(tl.where(m_owner, (b_g1 / count)[:, None], 0.0), 0)  # [BLOCK_C]
    b_c2 = tl.sum(tl.where(m_owner, (b_g2 / count)[:, None], 0.0), 0)
    b_mean, b_rstd, b_weight, b_bias = _channel_terms(
        p_stats, p_weight, p_bias, p_add, i_b, o_c, m_c, groups, group, add_stride, ADD
    )
    i_item = i_b.to(tl.int64) * n * channels
    begin = i_r * walk
    end = tl.minimum(begin + walk, n)
    for start in range(begin, end, BLOCK_R):
        o_n = start + tl.arange(0, BLOCK_R)
        m = (o_n < end)[:, None] & m_c[None, :]
        o_x = o_n[:, None] * channels + o_c[None, :]
        b_x, b_g = _normalised_and_gradient(
            p_dy + i_item, p_s + i_item, o_x, m, b_mean, b_rstd, b_weight, b_bias, SILU
        )
        b_g = b_g * b_weight[None, :] - b_c1[None, :] - b_x * b_c2[None, :]
        b_ds = b_g * b_rstd[None, :]
        if DRESIDUAL:
            b_ds += tl.load(p_dresidual + i_item + o_x, mask=m, other=0.0).to(tl.float32)
        tl.store(p_ds + i_item + o_x, b_ds.to(p_ds.dtype.element_ty), mask=m)


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
    """Gradient to s of y = act(GroupNorm(s)), plus what reaches s by another way.

    Args:
        dy: [B, N, C] contiguous.
        s: [B, N, C] contiguous, what was normalised, or that less `add`.
        stats: [B, groups, 2] float32, of `group_norm_fwd`.
        add: [C], or [B, C] with contiguous rows: the sum's term that s is without.
        dresidual: [B, N, C] contiguous, added to the gradient.
    Returns:
        [B, N, C] in the dtype of dy.
    """
    batch, n, channels = s.shape
    ds = torch.empty_like(dy)
    if ds.numel() == 0:
        return ds
    chunk, block_c = chunk_of(channels, groups)
    n_chunks = triton.cdiv(channels, chunk)
    block_r = max(1, min(TILE // block_c, triton.next_power_of_2(n)))
    splits = max(1, min(triton.cdiv(PROGRAMS, n_chunks * batch), triton.cdiv(n, block_r)))
    walk = triton.cdiv(triton.cdiv(n, splits), block_r) * block_r
    # few enough to be combined quickly by every program
    rows = max(walk, triton.cdiv(triton.cdiv(n, MAX_SPLITS), block_r) * block_r)
    n_splits = triton.cdiv(n, rows)
    partial = s.new_empty((batch, n_splits, groups, 2), dtype=torch.float32)
    shared = {
        "p_dy": dy, "p_s": s, "p_stats": stats, "p_weight": weight, "p_bias": bias,
        "p_add": weight if add is None else add, "p_partial": partial,
        "add_stride": 0 if add is None or add.ndim == 1 else add.stride(0), "ADD": add is not None,
        "n": n, "channels": channels, "groups": groups, "group": channels // groups,
        "chunk": chunk, "n_splits": n_splits, "SILU": silu, "BLOCK_R": block_r,
        "BLOCK_C": block_c, "GROUPS": triton.next_power_of_2(max(2, chunk // (channels // groups))),
        "num_warps": NUM_WARPS,
    }  # fmt: skip
    sums_kernel[(n_chunks, n_splits, batch)](**shared, rows=rows)
    apply_kernel[(n_chunks, triton.cdiv(n, walk), batch)](
        **shared, p_dresidual=dy if dresidual is None else dresidual, p_ds=ds, walk=walk,
        DRESIDUAL=dresidual is not None,
    )  # fmt: skip
    return ds
