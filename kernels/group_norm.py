"""Triton kernels of GroupNorm over token matrices [B, N, C] (images with the channels innermost).

Channels are cut into chunks of whole groups. A program owns a chunk of an item, or some rows of
it, and walks them in tiles [BLOCK_R, BLOCK_C]. Two launches: statistics, then the normalised rows,
which finds its input in the second-level cache; items of few rows need one launch for both.

Statistics are float32 and have a fixed order: sums of a channel are taken around its first value,
so that means far from zero do not cancel, and the rest is Chan's formula. Arguments are checked by
`dsd_fast.diffusion.networks.token_ops`, which is the way in.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile: with 4 warps four 16-byte loads a thread and source in half precision.
TILE = 4096
# Widest chunk that is not a single group.
MAX_CHUNK = 256
# Items of at most this many rows are done in one launch.
ONE_LAUNCH_ROWS = 128
# Programs that keep a large GPU busy: one to six for each of 132 multiprocessors. One costs a few
# tiles beside its own: twice as many were up to 80 % slower on small images.
MIN_PROGRAMS, MAX_PROGRAMS = 132, 792
TILES_A_PROGRAM = 8
# Each is read by every program of the second launch.
MAX_SPLITS = 256
NUM_WARPS = 4

_SPLIT_BLOCK = tl.constexpr(32)
# Numbers whose alignment says nothing about addresses: another value compiles nothing anew.
_COUNTS = ["n", "rows", "walk", "n_splits", "groups", "group", "eps"]


@triton.jit
def _load_tile(
    p_x, p_x2, p_add, p_residual, i_b, o_n, o_c, m_n, m_c, n, channels, first, add_stride,
    ADD: tl.constexpr, RESIDUAL: tl.constexpr, CONCAT: tl.constexpr,
):  # fmt: skip
    """s = (x | x2) + add + residual of rows o_n and channels o_c, float32 [BLOCK_R, BLOCK_C]."""
    i_item = i_b.to(tl.int64)
    m = m_n[:, None] & m_c[None, :]
    o_x = o_n[:, None] * channels + o_c[None, :]
    if CONCAT:
        second = channels - first
        m_1 = m & (o_c < first)[None, :]
        m_2 = m & (o_c >= first)[None, :]
        o_1 = o_n[:, None] * first + o_c[None, :]
        o_2 = o_n[:, None] * second + (o_c - first)[None, :]
        b_1 = tl.load(p_x + i_item * n * first + o_1, mask=m_1, other=0.0).to(tl.float32)
        b_2 = tl.load(p_x2 + i_item * n * second + o_2, mask=m_2, other=0.0).to(tl.float32)
        b_s = b_1 + b_2
    else:
        b_s = tl.load(p_x + i_item * n * channels + o_x, mask=m, other=0.0).to(tl.float32)
    if RESIDUAL:
        b_s += tl.load(p_residual + i_item * n * channels + o_x, mask=m, other=0.0).to(tl.float32)
    if ADD:
        b_add = tl.load(p_add + i_item * add_stride + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_s += b_add[None, :]
    return b_s


@triton.jit
def _group_sums(
    p_x, p_x2, p_add, p_residual, p_sum, i_b, o_k, o_c, m_c, begin, end,
    n, channels, first, add_stride, group,
    ADD: tl.constexpr, RESIDUAL: tl.constexpr, CONCAT: tl.constexpr, SUM: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each group over rows [begin, end): [GROUPS] each."""
    o_r = tl.arange(0, BLOCK_R)
    # one row, once: what the sums of a channel are taken around
    o_first = begin + tl.zeros([1], tl.int32)
    b_shift = _load_tile(
        p_x, p_x2, p_add, p_residual, i_b, o_first, o_c, o_first < n, m_c,
        n, channels, first, add_stride, ADD, RESIDUAL, CONCAT,
    )  # fmt: skip
    b_s1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_s2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_R):
        o_n = start + o_r
        m_n = o_n < end
        m = m_n[:, None] & m_c[None, :]
        b_s = _load_tile(
            p_x, p_x2, p_add, p_residual, i_b, o_n, o_c, m_n, m_c,
            n, channels, first, add_stride, ADD, RESIDUAL, CONCAT,
        )  # fmt: skip
        if SUM:
            b_half = b_s.to(p_sum.dtype.element_ty)
            o_x = i_b.to(tl.int64) * n * channels + o_n[:, None] * channels + o_c[None, :]
            tl.store(p_sum + o_x, b_half, mask=m)
            # statistics are those of what the second walk reads
            b_s = b_half.to(tl.float32)
        b_d = tl.where(m, b_s - b_shift, 0.0)
        b_s1 += b_d
        b_s2 += b_d * b_d
    count = (end - begin).to(tl.float32)
    b_c1 = tl.sum(b_s1, 0)  # [BLOCK_C]
    b_c2 = tl.sum(b_s2, 0) - b_c1 * b_c1 / count
    b_mean_c = tl.sum(b_shift, 0) + b_c1 / count
    m_owner = (o_k[None, :] // group == tl.arange(0, GROUPS)[:, None]) & m_c[None, :]
    b_mean = tl.sum(tl.where(m_owner, b_mean_c[None, :], 0.0), 1) / group  # [GROUPS]
    b_own = tl.sum(tl.where(m_owner, b_mean[:, None], 0.0), 0)  # [BLOCK_C]
    b_d = b_mean_c - b_own
    b_m2 = tl.sum(tl.where(m_owner, (b_c2 + count * b_d * b_d)[None, :], 0.0), 1)
    return b_mean, b_m2


@triton.jit
def _write_rows(
    p_x, p_x2, p_add, p_residual, p_weight, p_bias, p_scale_shift, p_y,
    b_mean, b_rstd, i_b, o_k, o_c, m_c, begin, end,
    n, channels, first, add_stride, scale_stride, group,
    ADD: tl.constexpr, RESIDUAL: tl.constexpr, CONCAT: tl.constexpr, SCALE: tl.constexpr,
    SILU: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act((s - mean) rstd weight + bias) of rows [begin, end)."""
    m_owner = o_k[None, :] // group == tl.arange(0, GROUPS)[:, None]
    b_mean_c = tl.sum(tl.where(m_owner, b_mean[:, None], 0.0), 0)  # [BLOCK_C]
    b_gain = tl.sum(tl.where(m_owner, b_rstd[:, None], 0.0), 0)
    b_gain *= tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if SCALE:
        p_scale = p_scale_shift + i_b.to(tl.int64) * scale_stride + o_c
        b_scale = 1.0 + tl.load(p_scale, mask=m_c, other=0.0).to(tl.float32)
        b_gain *= b_scale
        b_bias *= b_scale
        b_bias += tl.load(p_scale + channels, mask=m_c, other=0.0).to(tl.float32)
    for start in range(begin, end, BLOCK_R):
        o_n = start + tl.arange(0, BLOCK_R)
        m_n = o_n < end
        b_s = _load_tile(
            p_x, p_x2, p_add, p_residual, i_b, o_n, o_c, m_n, m_c,
            n, channels, first, add_stride, ADD, RESIDUAL, CONCAT,
        )  # fmt: skip
        b_y = (b_s - b_mean_c[None, :]) * b_gain[None, :] + b_bias[None, :]
        if SILU:
            b_y = b_y / (1.0 + tl.exp(-b_y))
        o_y = i_b.to(tl.int64) * n * channels + o_n[:, None] * channels + o_c[None, :]
        b_y = b_y.to(p_y.dtype.element_ty)
        tl.store(p_y + o_y, b_y, mask=m_n[:, None] & m_c[None, :])


# Program (chunk, split, item): reads its rows once, writes mean and squared deviations of its
# groups and, with SUM, the rows that were summed.
@triton.jit(do_not_specialize=_COUNTS)
def stats_kernel(
    p_x, p_x2, p_add, p_residual, p_sum, p_partial,
    n, channels, first, add_stride, rows, n_splits, groups, group, chunk,
    ADD: tl.constexpr, RESIDUAL: tl.constexpr, CONCAT: tl.constexpr, SUM: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_k = tl.program_id(0)
    i_s = tl.program_id(1)
    i_b = tl.program_id(2)
    o_k = tl.arange(0, BLOCK_C)
    o_c = i_k * chunk + o_k
    m_c = (o_k < chunk) & (o_c < channels)
    begin = i_s * rows
    b_mean, b_m2 = _group_sums(
        p_x, p_x2, p_add, p_residual, p_sum, i_b, o_k, o_c, m_c, begin,
        tl.minimum(begin + rows, n), n, channels, first, add_stride, group,
        ADD, RESIDUAL, CONCAT, SUM, GROUPS, BLOCK_R, BLOCK_C,
    )  # fmt: skip
    per_chunk = chunk // group
    o_g = tl.arange(0, GROUPS)
    m_g = (o_g < per_chunk) & (i_k * per_chunk + o_g < groups)
    p_out = p_partial + ((i_b * n_splits + i_s) * groups + i_k * per_chunk + o_g) * 2
    tl.store(p_out, b_mean, mask=m_g)
    tl.store(p_out + 1, b_m2, mask=m_g)


# Program (chunk, block of rows, item): combines the splits of its groups, then writes its rows.
@triton.jit(do_not_specialize=_COUNTS)
def apply_kernel(
    p_x, p_x2, p_add, p_residual, p_weight, p_bias, p_scale_shift, p_partial, p_stats, p_y,
    n, channels, first, add_stride, scale_stride, rows, n_splits, walk, groups, group, chunk, eps,
    ADD: tl.constexpr, RESIDUAL: tl.constexpr, CONCAT: tl.constexpr, SCALE: tl.constexpr,
    SILU: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_k = tl.program_id(0)
    # the last rows were read last, and may still be in the second-level cache
    i_r = tl.num_programs(1) - 1 - tl.program_id(1)
    i_b = tl.program_id(2)
    per_chunk = chunk // group
    o_g = tl.arange(0, GROUPS)
    m_g = (o_g < per_chunk) & (i_k * per_chunk + o_g < groups)
    p_item = p_partial + (i_b * n_splits * groups + i_k * per_chunk) * 2
    # Chan's formula around the first split's mean, which the others are near to
    b_shift = tl.load(p_item + 2 * o_g, mask=m_g, other=0.0)
    b_d = tl.zeros([GROUPS], tl.float32)
    b_m2 = tl.zeros([GROUPS], tl.float32)
    for start in range(0, n_splits, _SPLIT_BLOCK):
        o_s = start + tl.arange(0, _SPLIT_BLOCK)
        m_s = m_g[:, None] & (o_s < n_splits)[None, :]
        o_p = o_s[None, :] * groups + o_g[:, None]
        b_mean_s = tl.load(p_item + 2 * o_p, mask=m_s, other=0.0)  # [GROUPS, _SPLIT_BLOCK]
        b_m2_s = tl.load(p_item + 2 * o_p + 1, mask=m_s, other=0.0)
        b_count = tl.minimum(tl.maximum(n - o_s * rows, 0), rows).to(tl.float32)
        b_d_s = tl.where(m_s, b_mean_s - b_shift[:, None], 0.0)
        b_d += tl.sum(b_count[None, :] * b_d_s, 1)
        b_m2 += tl.sum(b_m2_s + group * b_count[None, :] * b_d_s * b_d_s, 1)
    b_d /= n
    b_mean = b_shift + b_d
    b_m2 = tl.maximum(b_m2 - n * group.to(tl.float32) * b_d * b_d, 0.0)
    b_rstd = tl.rsqrt(b_m2 / (n * group.to(tl.float32)) + eps)
    if i_r == 0:
        p_out = p_stats + (i_b * groups + i_k * per_chunk + o_g) * 2
        tl.store(p_out, b_mean, mask=m_g)
        tl.store(p_out + 1, b_rstd, mask=m_g)
    o_k = tl.arange(0, BLOCK_C)
    o_c = i_k * chunk + o_k
    m_c = (o_k < chunk) & (o_c < channels)
    begin = i_r * walk
    _write_rows(
        p_x, p_x2, p_add, p_residual, p_weight, p_bias, p_scale_shift, p_y,
        b_mean, b_rstd, i_b, o_k, o_c, m_c, begin, tl.minimum(begin + walk, n),
        n, channels, first, add_stride, scale_stride, group,
        ADD, RESIDUAL, CONCAT, SCALE, SILU, GROUPS, BLOCK_R, BLOCK_C,
    )  # fmt: skip


# Program (chunk, item): both walks over all rows.
@triton.jit(do_not_specialize=_COUNTS)
def whole_kernel(
    p_x, p_x2, p_add, p_residual, p_weight, p_bias, p_scale_shift, p_sum, p_stats, p_y,
    n, channels, first, add_stride, scale_stride, groups, group, chunk, eps,
    ADD: tl.constexpr, RESIDUAL: tl.constexpr, CONCAT: tl.constexpr, SUM: tl.constexpr,
    SCALE: tl.constexpr, SILU: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_k = tl.program_id(0)
    i_b = tl.program_id(1)
    o_k = tl.arange(0, BLOCK_C)
    o_c = i_k * chunk + o_k
    m_c = (o_k < chunk) & (o_c < channels)
    b_mean, b_m2 = _group_sums(
        p_x, p_x2, p_add, p_residual, p_sum, i_b, o_k, o_c, m_c, 0, n,
        n, channels, first, add_stride, group,
        ADD, RESIDUAL, CONCAT, SUM, GROUPS, BLOCK_R, BLOCK_C,
    )  # fmt: skip
    b_rstd = tl.rsqrt(b_m2 / (n * group.to(tl.float32)) + eps)
    per_chunk = chunk // group
    o_g = tl.arange(0, GROUPS)
    m_g = (o_g < per_chunk) & (i_k * per_chunk + o_g < groups)
    p_out = p_stats + (i_b * groups + i_k * per_chunk + o_g) * 2
    tl.store(p_out, b_mean, mask=m_g)
    tl.store(p_out + 1, b_rstd, mask=m_g)
    # a sum was written by this thread or a neighbour of its block
    if SUM:
        tl.debug_barrier()
        _write_rows(
            p_sum, p_sum, p_add, p_residual, p_weight, p_bias, p_scale_shift, p_y,
            b_mean, b_rstd, i_b, o_k, o_c, m_c, 0, n,
            n, channels, first, add_stride, scale_stride, group,
            False, False, False, SCALE, SILU, GROUPS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    else:
        _write_rows(
            p_x, p_x2, p_add, p_residual, p_weight, p_bias, p_scale_shift, p_y,
            b_mean, b_rstd, i_b, o_k, o_c, m_c, 0, n,
            n, channels, first, add_stride, scale_stride, group,
            ADD, RESIDUAL, CONCAT, SCALE, SILU, GROUPS, BLOCK_R, BLOCK_C,
        )  # fmt: skip


def chunk_of(channels: int, groups: int) -> tuple[int, int]:
    """Channels of a chunk, a multiple of the group's and if possible of 16, and its BLOCK_C.

    16 halves are two 16-byte loads: a chunk that begins elsewhere is read in smaller pieces.
    """
    group = channels // groups
    step = math.lcm(group, 16)
    if step > MAX_CHUNK:
        step = group
    sizes = range(step, max(min(MAX_CHUNK, channels), step) + 1, step)

    def cost(size: int) -> tuple[int, int]:
        block = triton.next_power_of_2(size)
        return triton.cdiv(channels, size) * block, block

    chunk = min(sizes, key=cost)
    return chunk, max(16, triton.next_power_of_2(chunk))


def group_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    *,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
    out_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = act(GroupNorm(s)), s = (x | x2) + add + residual.

    Args:
        x: [B, N, C1] contiguous.
        weight, bias: [C], C = C1 + C2.
        silu: act is SiLU, else nothing.
        x2: [B, N, C2] contiguous, channels that follow those of x.
        add: [C], or [B, C] with contiguous rows.
        residual: [B, N, C] contiguous.
        scale_shift: [B, 2C] with contiguous rows: y is act(GroupNorm(s) (1 + scale) + shift).
        out_sum: [B, N, C] contiguous: takes s, rounded to its dtype before the statistics.
    Returns:
        y [B, N, C] in x's dtype; stats [B, groups, 2] float32: mean, 1 / sqrt(variance + eps).
    """
    batch, n, first = x.shape
    channels = first + (0 if x2 is None else x2.shape[2])
    group = channels // groups
    y = x.new_empty(batch, n, channels)
    stats = x.new_empty((batch, groups, 2), dtype=torch.float32)
    if y.numel() == 0:
        return y, stats
    chunk, block_c = chunk_of(channels, groups)
    n_chunks = triton.cdiv(channels, chunk)
    block_r = max(1, min(TILE // block_c, triton.next_power_of_2(n)))
    shape = {
        "n": n, "channels": channels, "first": first, "groups": groups, "group": group,
        # no smaller than 16: a kernel less to compile for each width that a network has
        "chunk": chunk, "GROUPS": max(16, triton.next_power_of_2(chunk // group)),
        "BLOCK_C": block_c, "add_stride": _row_stride(add), "num_warps": NUM_WARPS,
    }  # fmt: skip
    source = {
        "p_x": x, "p_x2": x if x2 is None else x2, "p_add": x if add is None else add,
        "p_residual": x if residual is None else residual,
        "ADD": add is not None, "RESIDUAL": residual is not None, "CONCAT": x2 is not None,
    }  # fmt: skip
    affine = {
        "p_weight": weight, "p_bias": bias,
        "p_scale_shift": x if scale_shift is None else scale_shift,
        "scale_stride": _row_stride(scale_shift), "SCALE": scale_shift is not None,
        "SILU": silu, "eps": eps, "p_stats": stats, "p_y": y,
    }  # fmt: skip
    total = {"p_sum": y if out_sum is None else out_sum, "SUM": out_sum is not None}
    if n <= ONE_LAUNCH_ROWS:
        whole_kernel[(n_chunks, batch)](**source, **affine, **total, **shape, BLOCK_R=block_r)
        return y, stats
    # whole tiles a program, enough programs to keep the GPU busy, few enough splits to be combined
    tiles = triton.cdiv(n, block_r)
    programs = n_chunks * batch * tiles // TILES_A_PROGRAM
    programs = max(MIN_PROGRAMS, min(programs, MAX_PROGRAMS))
    walk = triton.cdiv(n, min(triton.cdiv(programs, n_chunks * batch), tiles))
    walk = triton.cdiv(walk, block_r) * block_r
    rows = max(walk, triton.cdiv(triton.cdiv(n, MAX_SPLITS), block_r) * block_r)
    splits = triton.cdiv(n, rows)
    partial = x.new_empty((batch, splits, groups, 2), dtype=torch.float32)
    stats_kernel[(n_chunks, splits, batch)](
        **source, **total, **shape, p_partial=partial, rows=rows, n_splits=splits, BLOCK_R=block_r
    )
    if out_sum is not None:
        source |= {"p_x": out_sum, "p_x2": out_sum, "ADD": False, "RESIDUAL": False}
        source |= {"CONCAT": False}
    apply_kernel[(n_chunks, triton.cdiv(n, walk), batch)](
        **source, **affine, **shape, p_partial=partial, rows=rows, n_splits=splits, walk=walk,
        BLOCK_R=block_r,
    )  # fmt: skip
    return y, stats


def _row_stride(rows: Tensor | None) -> int:
    """Elements from an item's row to the next; 0 where all items share one."""
    return 0 if rows is None or rows.ndim == 1 else rows.stride(0)
