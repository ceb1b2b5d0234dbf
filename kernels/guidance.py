"""Triton kernels of a guidance step outside the UNet, and the functions that launch them.

An item's predictions are rows of the stack that the UNet returns, [ROWS * B, C, h, w]: positive i,
unconditional B + i and, with perp-neg (ROWS = 4), negatives 2B + 2i and 2B + 2i + 1. A program owns
one item, or one split of it, and walks it in tiles. Perp-neg needs the dot products of whole rows
first: a row of up to ROW_LIMIT elements is summed by its own program, which then finds the rows in
the cache and writes; longer ones are summed by `dots_kernel`, one launch more, over many programs.

Arithmetic is float32, whatever the predictions' dtype. Sums have a fixed order, so that results are
deterministic. Nothing waits for the device: levels are read there, and a CUDA graph can hold every
launch. Arguments are checked by `dsd_fast.guidance.passes`, which is the way in; here tensors are
taken as contiguous, on one device, with levels from 0 to 999.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# How the rows of an item become one prediction (mathematics.md 3.4).
POSITIVE, PLAIN, STANDARD, PERP_NEG = range(4)
# What a combined prediction is weighted by in the gradient.
SDS, DDIM = range(2)

# Elements of a tile: with 8 warps, 8 to a thread and row, one 16-byte load in half precision.
BLOCK = 2048
# Longest row that one program sums alone. Four half-precision rows of this size are 128 KiB, which
# the first-level cache of large GPUs holds between the two walks, and the second-level one of all.
ROW_LIMIT = 16384

_POSITIVE = tl.constexpr(POSITIVE)
_STANDARD = tl.constexpr(STANDARD)
_PERP_NEG = tl.constexpr(PERP_NEG)
_DDIM = tl.constexpr(DDIM)
# As guidance.prompt: keeps the projection defined where positive and unconditional agree.
_MIN_SQUARED_NORM = tl.constexpr(1e-6)
_LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
_SUM_BLOCK = tl.constexpr(64)
# Without contraction each operation rounds as torch's own does; these kernels wait for memory.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# Left as they are at 1 or 16, so that another batch size compiles nothing anew.
_COUNTS = ["n_items", "n_splits"]


@triton.jit
def _load_row(p_eps, i_row, n, o_x, m_x):
    # 64-bit addresses: a stack of large latents passes 2^31 elements
    return tl.load(p_eps + i_row.to(tl.int64) * n + o_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def _dots(p_eps, i_b, n_items, n, begin, end, BLOCK: tl.constexpr):
    """<p,p>, <q0,p> and <q1,p> over [begin, end) of item i_b, with p and q less the uncond row."""
    b_pp = tl.zeros([BLOCK], tl.float32)
    b_q0 = tl.zeros([BLOCK], tl.float32)
    b_q1 = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        o_x = start + tl.arange(0, BLOCK)  # [BLOCK]
        m_x = o_x < end
        b_0 = _load_row(p_eps, n_items + i_b, n, o_x, m_x)
        b_p = _load_row(p_eps, i_b, n, o_x, m_x) - b_0
        b_pp += b_p * b_p
        b_q0 += (_load_row(p_eps, 2 * n_items + 2 * i_b, n, o_x, m_x) - b_0) * b_p
        b_q1 += (_load_row(p_eps, 2 * n_items + 2 * i_b + 1, n, o_x, m_x) - b_0) * b_p
    return tl.sum(b_pp, 0), tl.sum(b_q0, 0), tl.sum(b_q1, 0)


@triton.jit
def _parallel_shares(
    p_eps, p_dots, i_b, n_items, n, n_splits, MODE: tl.constexpr, SUMMED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """<q_i,p> / max(<p,p>, 1e-6) of both negatives; SUMMED: read the sums of `dots_kernel`."""
    k_0 = 0.0
    k_1 = 0.0
    if MODE == _PERP_NEG:
        if SUMMED:
            b_pp = tl.zeros([_SUM_BLOCK], tl.float32)
            b_q0 = tl.zeros([_SUM_BLOCK], tl.float32)
            b_q1 = tl.zeros([_SUM_BLOCK], tl.float32)
            for start in range(0, n_splits, _SUM_BLOCK):
                o_s = start + tl.arange(0, _SUM_BLOCK)
                m_s = o_s < n_splits
                p_s = p_dots + (i_b * n_splits + o_s) * 3
                b_pp += tl.load(p_s, mask=m_s, other=0.0)
                b_q0 += tl.load(p_s + 1, mask=m_s, other=0.0)
                b_q1 += tl.load(p_s + 2, mask=m_s, other=0.0)
            pp = tl.sum(b_pp, 0)
            q_0 = tl.sum(b_q0, 0)
            q_1 = tl.sum(b_q1, 0)
        else:
            pp, q_0, q_1 = _dots(p_eps, i_b, n_items, n, 0, n, BLOCK)
        # a NaN in the rows must come out as NaN, as it does in torch
        pp = tl.maximum(pp, _MIN_SQUARED_NORM, propagate_nan=tl.PropagateNan.ALL)
        k_0 = q_0 / pp
        k_1 = q_1 / pp
    return k_0, k_1


@triton.jit
def _guided(p_eps, p_weights, i_b, n_items, n, o_x, m_x, scale, k_0, k_1, MODE: tl.constexpr):
    """A tile of the guided prediction, float32 [BLOCK]."""
    b_y = _load_row(p_eps, i_b, n, o_x, m_x)
    if MODE == _POSITIVE:
        b_eps = b_y
    else:
        b_0 = _load_row(p_eps, n_items + i_b, n, o_x, m_x)
        b_p = b_y - b_0
        if MODE == _PERP_NEG:
            w_0 = tl.load(p_weights + 2 * i_b)
            w_1 = tl.load(p_weights + 2 * i_b + 1)
            b_q0 = _load_row(p_eps, 2 * n_items + 2 * i_b, n, o_x, m_x) - b_0
            b_q1 = _load_row(p_eps, 2 * n_items + 2 * i_b + 1, n, o_x, m_x) - b_0
            b_a = w_0 * (b_q0 - k_0 * b_p) + w_1 * (b_q1 - k_1 * b_p)
            b_eps = b_0 + scale * (b_p + b_a)
        elif MODE == _STANDARD:
            b_eps = b_0 + scale * b_p
        else:
            b_eps = b_y + scale * b_p
    return b_eps


@triton.jit
def _signal_and_noise(p_alpha, p_sigma, t):
    return tl.load(p_alpha + t), tl.load(p_sigma + t)


@triton.jit
def _store_rows(p_rows, b_x, i_b, n_items, n, o_x, m_x, ROWS: tl.constexpr):
    """A tile of an item into each of its rows of the UNet's next batch."""
    b_row = b_x.to(p_rows.dtype.element_ty)
    tl.store(p_rows + i_b.to(tl.int64) * n + o_x, b_row, mask=m_x)
    tl.store(p_rows + (n_items + i_b).to(tl.int64) * n + o_x, b_row, mask=m_x)
    if ROWS == 4:
        i_negative = (2 * n_items + 2 * i_b).to(tl.int64)
        tl.store(p_rows + i_negative * n + o_x, b_row, mask=m_x)
        tl.store(p_rows + (i_negative + 1) * n + o_x, b_row, mask=m_x)


@triton.jit
def _store_levels(p_levels, t, i_b, n_items, ROWS: tl.constexpr):
    tl.store(p_levels + i_b, t)
    tl.store(p_levels + n_items + i_b, t)
    if ROWS == 4:
        tl.store(p_levels + 2 * n_items + 2 * i_b, t)
        tl.store(p_levels + 2 * n_items + 2 * i_b + 1, t)


@triton.jit
def _store_linked_levels(
    p_levels, p_t, p_t_delta, i_b, n_items, ROWS: tl.constexpr, PAIR: tl.constexpr
):
    """Levels of the rows of linked renderings, by the first program of the item."""
    if tl.program_id(1) == 0:
        t = tl.load(p_t + i_b)
        if PAIR:
            _store_levels(p_levels, tl.load(p_t_delta + i_b), i_b, n_items, ROWS)
            _store_levels(p_levels + ROWS * n_items, t, i_b, n_items, ROWS)
        else:
            _store_levels(p_levels, t, i_b, n_items, ROWS)


@triton.jit
def _mirrored(o_x, p_mirrored, i_b, width, MIRROR: tl.constexpr):
    """Where to read what belongs at o_x: flipped left to right for items that ask for it."""
    o_eps = o_x
    if MIRROR:
        o_flipped = o_x + (width - 1 - 2 * (o_x % width))
        o_eps = tl.where(tl.load(p_mirrored + i_b) != 0, o_flipped, o_x)
    return o_eps


@triton.jit
def _store_linked(
    p_rows, p_eps_o, p_x, b_eps, p_t, p_t_delta, p_alpha, p_sigma, i_b, n_items, n, o_x, m_x,
    ROWS: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """A tile of the noise b_eps, and of the rows of the rendering with it, at t_delta and at t."""
    alpha, sigma = _signal_and_noise(p_alpha, p_sigma, tl.load(p_t + i_b))
    o_item = i_b.to(tl.int64) * n + o_x
    b_x = tl.load(p_x + o_item, mask=m_x, other=0.0)
    b_t = alpha * b_x + sigma * b_eps
    tl.store(p_eps_o + o_item, b_eps, mask=m_x)
    if PAIR:
        alpha_delta, sigma_delta = _signal_and_noise(p_alpha, p_sigma, tl.load(p_t_delta + i_b))
        b_delta = alpha_delta * b_x + sigma_delta * b_eps
        _store_rows(p_rows, b_delta, i_b, n_items, n, o_x, m_x, ROWS)
        p_rows_t = p_rows + (ROWS * n_items).to(tl.int64) * n
        _store_rows(p_rows_t, b_t, i_b, n_items, n, o_x, m_x, ROWS)
    else:
        _store_rows(p_rows, b_t, i_b, n_items, n, o_x, m_x, ROWS)


@triton.jit
def _moved(b_z, b_eps, t, t_next, p_alpha, p_sigma):
    """DDIM with eta = 0 from t to t_next; a step of no length is exactly the identity."""
    alpha, sigma = _signal_and_noise(p_alpha, p_sigma, t)
    alpha_next, sigma_next = _signal_and_noise(p_alpha, p_sigma, t_next)
    b_clean = tl.div_rn(b_z - sigma * b_eps, alpha + tl.zeros_like(b_z))
    return tl.where(t != t_next, alpha_next * b_clean + sigma_next * b_eps, b_z)


# Program (group and item, split): reads a split of the item's four rows once, writes its 3 sums.
@triton.jit(do_not_specialize=_COUNTS)
def dots_kernel(p_eps, p_dots, n_items, n, split, n_splits, BLOCK: tl.constexpr):
    i_g = tl.program_id(0) // n_items
    i_b = tl.program_id(0) % n_items
    i_s = tl.program_id(1)
    begin = i_s * split
    p_group = p_eps + (4 * n_items * i_g).to(tl.int64) * n
    pp, q_0, q_1 = _dots(p_group, i_b, n_items, n, begin, tl.minimum(begin + split, n), BLOCK)
    p_out = p_dots + (tl.program_id(0) * n_splits + i_s) * 3
    tl.store(p_out, pp)
    tl.store(p_out + 1, q_0)
    tl.store(p_out + 2, q_1)


# Program (item, split): reads the item's rows, writes its split of the guided prediction.
@triton.jit(do_not_specialize=_COUNTS)
def combine_kernel(
    p_eps, p_weights, p_dots, p_guided, scale, n_items, n, split, n_splits,
    MODE: tl.constexpr, SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0)
    begin = tl.program_id(1) * split
    end = tl.minimum(begin + split, n)
    k_0, k_1 = _parallel_shares(p_eps, p_dots, i_b, n_items, n, n_splits, MODE, SUMMED, BLOCK)
    for start in range(begin, end, BLOCK):
        o_x = start + tl.arange(0, BLOCK)  # [BLOCK]
        m_x = o_x < end
        b_eps = _guided(p_eps, p_weights, i_b, n_items, n, o_x, m_x, scale, k_0, k_1, MODE)
        tl.store(p_guided + i_b.to(tl.int64) * n + o_x, b_eps, mask=m_x)


# Program (item, split): reads the item's rows and z at t, writes z at t_next, its rows and levels.
@triton.jit(do_not_specialize=_COUNTS)
def step_kernel(
    p_eps, p_weights, p_dots, p_z, p_t, p_t_next, p_alpha, p_sigma, p_moved, p_rows, p_levels,
    scale, n_items, n, split, n_splits,
    ROWS: tl.constexpr, MODE: tl.constexpr, SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0)
    begin = tl.program_id(1) * split
    end = tl.minimum(begin + split, n)
    t = tl.load(p_t + i_b)
    t_next = tl.load(p_t_next + i_b)
    if tl.program_id(1) == 0:
        _store_levels(p_levels, t_next, i_b, n_items, ROWS)
    k_0, k_1 = _parallel_shares(p_eps, p_dots, i_b, n_items, n, n_splits, MODE, SUMMED, BLOCK)
    for start in range(begin, end, BLOCK):
        o_x = start + tl.arange(0, BLOCK)  # [BLOCK]
        m_x = o_x < end
        o_item = i_b.to(tl.int64) * n + o_x
        b_eps = _guided(p_eps, p_weights, i_b, n_items, n, o_x, m_x, scale, k_0, k_1, MODE)
        b_z = tl.load(p_z + o_item, mask=m_x, other=0.0)
        b_z = _moved(b_z, b_eps, t, t_next, p_alpha, p_sigma)
        tl.store(p_moved + o_item, b_z, mask=m_x)
        _store_rows(p_rows, b_z, i_b, n_items, n, o_x, m_x, ROWS)


# Program (item, tile): reads a slot's state and a slot's prediction, writes z at t_next, its rows
# and levels.
@triton.jit(do_not_specialize=["n_items"])
def state_kernel(
    p_states, p_eps, p_slot, p_slot_eps, p_t, p_t_next, p_alpha, p_sigma, p_moved, p_rows, p_levels,
    n_items, n, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0)
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_x = o_x < n
    t = tl.load(p_t + i_b)
    t_next = tl.load(p_t_next + i_b)
    if tl.program_id(1) == 0:
        _store_levels(p_levels, t_next, i_b, n_items, ROWS)
    b_z = _load_row(p_states, tl.load(p_slot + i_b), n, o_x, m_x)
    b_eps = _load_row(p_eps, tl.load(p_slot_eps + i_b), n, o_x, m_x)
    b_z = _moved(b_z, b_eps, t, t_next, p_alpha, p_sigma)
    tl.store(p_moved + i_b.to(tl.int64) * n + o_x, b_z, mask=m_x)
    _store_rows(p_rows, b_z, i_b, n_items, n, o_x, m_x, ROWS)


# Program (item, split): reads the item's rows and x, writes the trajectory's noise, and the rows
# and levels of both noisy latents, those of t_delta first; but for a pair those of t alone.
@triton.jit(do_not_specialize=_COUNTS)
def link_kernel(
    p_eps, p_weights, p_dots, p_x, p_t, p_t_delta, p_mirrored, p_alpha, p_sigma,
    p_eps_o, p_rows, p_levels, scale, n_items, n, width, split, n_splits,
    ROWS: tl.constexpr, MODE: tl.constexpr, MIRROR: tl.constexpr, PAIR: tl.constexpr,
    SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0)
    begin = tl.program_id(1) * split
    end = tl.minimum(begin + split, n)
    _store_linked_levels(p_levels, p_t, p_t_delta, i_b, n_items, ROWS, PAIR)
    k_0, k_1 = _parallel_shares(p_eps, p_dots, i_b, n_items, n, n_splits, MODE, SUMMED, BLOCK)
    for start in range(begin, end, BLOCK):
        o_x = start + tl.arange(0, BLOCK)  # [BLOCK]
        m_x = o_x < end
        # sums over a row do not see its order, so mirroring the reads mirrors the prediction
        o_eps = _mirrored(o_x, p_mirrored, i_b, width, MIRROR)
        b_eps = _guided(p_eps, p_weights, i_b, n_items, n, o_eps, m_x, scale, k_0, k_1, MODE)
        _store_linked(
            p_rows, p_eps_o, p_x, b_eps, p_t, p_t_delta, p_alpha, p_sigma, i_b, n_items, n,
            o_x, m_x, ROWS, PAIR,
        )  # fmt: skip


# Program (item, tile): as link_kernel, from predictions already combined: between those of two
# slots of a table.
@triton.jit(do_not_specialize=["n_items"])
def link_table_kernel(
    p_eps, p_slot, p_slot_next, p_mix, p_x, p_t, p_t_delta, p_mirrored, p_alpha, p_sigma,
    p_eps_o, p_rows, p_levels, n_items, n, width,
    ROWS: tl.constexpr, MIRROR: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0)
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_x = o_x < n
    _store_linked_levels(p_levels, p_t, p_t_delta, i_b, n_items, ROWS, PAIR)
    o_eps = _mirrored(o_x, p_mirrored, i_b, width, MIRROR)
    b_eps = _load_row(p_eps, tl.load(p_slot + i_b), n, o_eps, m_x)
    b_next = _load_row(p_eps, tl.load(p_slot_next + i_b), n, o_eps, m_x)
    b_eps += tl.load(p_mix + i_b) * (b_next - b_eps)
    _store_linked(
        p_rows, p_eps_o, p_x, b_eps, p_t, p_t_delta, p_alpha, p_sigma, i_b, n_items, n, o_x, m_x,
        ROWS, PAIR,
    )  # fmt: skip


# Program (row, tile): writes a text row, the mix of two rows of the bank.
@triton.jit
def text_kernel(p_bank, p_first, p_second, p_share, p_rows, n, BLOCK: tl.constexpr):
    i_r = tl.program_id(0)
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_x = o_x < n
    share = tl.load(p_share + i_r)
    b_row = share * _load_row(p_bank, tl.load(p_first + i_r), n, o_x, m_x)
    b_row += (1.0 - share) * _load_row(p_bank, tl.load(p_second + i_r), n, o_x, m_x)
    tl.store(p_rows + i_r.to(tl.int64) * n + o_x, b_row.to(p_rows.dtype.element_ty), mask=m_x)


# Program (item, split): reads the item's rows of both levels and x, and with OWN the trajectory's
# noise, writes gradient and target and its sums. The program that finishes last adds up the sums of
# all, in their order.
@triton.jit(do_not_specialize=_COUNTS)
def gradient_kernel(
    p_eps_delta, p_eps_t, p_weights, p_dots_delta, p_dots_t, p_eps_o, p_share, p_x, p_t,
    p_alpha, p_sigma, p_grad, p_target, p_sums, p_done, p_numbers, p_finite,
    scale_delta, scale_t, n_items, n, split, n_splits,
    MODE_DELTA: tl.constexpr, MODE_T: tl.constexpr, WEIGHTING: tl.constexpr,
    OWN: tl.constexpr, SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0)
    begin = tl.program_id(1) * split
    end = tl.minimum(begin + split, n)
    alpha, sigma = _signal_and_noise(p_alpha, p_sigma, tl.load(p_t + i_b))
    weight = sigma / alpha if WEIGHTING == _DDIM else sigma * sigma
    d_0, d_1 = _parallel_shares(
        p_eps_delta, p_dots_delta, i_b, n_items, n, n_splits, MODE_DELTA, SUMMED, BLOCK
    )
    k_0, k_1 = _parallel_shares(p_eps_t, p_dots_t, i_b, n_items, n, n_splits, MODE_T, SUMMED, BLOCK)
    b_squares = tl.zeros([BLOCK], tl.float32)
    b_bad = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        o_x = start + tl.arange(0, BLOCK)  # [BLOCK]
        m_x = o_x < end
        b_delta = _guided(
            p_eps_delta, p_weights, i_b, n_items, n, o_x, m_x, scale_delta, d_0, d_1, MODE_DELTA
        )
        b_t = _guided(p_eps_t, p_weights, i_b, n_items, n, o_x, m_x, scale_t, k_0, k_1, MODE_T)
        o_item = i_b.to(tl.int64) * n + o_x
        if OWN:
            share = tl.load(p_share + i_b)
            b_o = tl.load(p_eps_o + o_item, mask=m_x, other=0.0)
            b_delta = (1.0 - share) * b_delta + share * b_o
        # lanes past the end are 0 unless a whole row is NaN by its shares
        b_grad = tl.where(m_x, weight * (b_t - b_delta), 0.0)
        b_x = tl.load(p_x + o_item, mask=m_x, other=0.0)
        tl.store(p_grad + o_item, b_grad, mask=m_x)
        tl.store(p_target + o_item, b_x - b_grad, mask=m_x)
        b_squares += b_grad * b_grad
        # of the elements, not of their sum: squares overflow long before the gradient does
        b_bad += tl.where(tl.abs(b_grad) <= _LARGEST_FLOAT, 0.0, 1.0)
    p_own = p_sums + 2 * (i_b * n_splits + tl.program_id(1))
    tl.store(p_own, tl.sum(b_squares, 0))
    tl.store(p_own + 1, tl.sum(b_bad, 0))
    # every thread's stores come before the count, and the count before the loads of the last one
    tl.debug_barrier()
    n_programs = n_items * n_splits
    if tl.atomic_add(p_done, 1, sem="acq_rel") == n_programs - 1:
        b_all_squares = tl.zeros([_SUM_BLOCK], tl.float32)
        b_all_bad = tl.zeros([_SUM_BLOCK], tl.float32)
        for start in range(0, n_programs, _SUM_BLOCK):
            o_s = start + tl.arange(0, _SUM_BLOCK)
            m_s = o_s < n_programs
            # volatile: other programs wrote these during this launch
            b_all_squares += tl.load(p_sums + 2 * o_s, mask=m_s, other=0.0, volatile=True)
            b_all_bad += tl.load(p_sums + 2 * o_s + 1, mask=m_s, other=0.0, volatile=True)
        squares = tl.sum(b_all_squares, 0)
        tl.store(p_numbers, 0.5 * squares / n_items)
        tl.store(p_numbers + 1, tl.sqrt_rn(squares))
        tl.store(p_finite, (tl.sum(b_all_bad, 0) == 0.0).to(tl.uint8))
        # ready for the next launch, which may be a replay of this one
        tl.store(p_done, 0)


def combine_fwd(eps: Tensor, weights: Tensor | None, scale: float, mode: int, rows: int) -> Tensor:
    """Guided prediction [B,C,h,w] float32 of a stack [rows*B,C,h,w] (mode: one of this module)."""
    n_items, n = eps.shape[0] // rows, eps[0].numel()
    guided = eps.new_empty((n_items, *eps.shape[1:]), dtype=torch.float32)
    with _on(eps):
        split, n_splits, dots = _splits(eps, n_items, n, 1, mode == PERP_NEG)
        combine_kernel[(n_items, n_splits)](
            p_eps=eps, p_weights=_or(weights, eps), p_dots=_or(dots, eps), p_guided=guided,
            scale=scale, n_items=n_items, n=n, split=split, n_splits=n_splits,
            MODE=mode, SUMMED=dots is not None, BLOCK=BLOCK, **_OPTIONS,
        )  # fmt: skip
    return guided


def step_fwd(
    eps: Tensor, weights: Tensor | None, scale: float, mode: int, rows: int,
    z: Tensor, t: Tensor, t_next: Tensor, alpha: Tensor, sigma: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(z at t_next, its rows in `dtype`, their levels) from the UNet's stack for z at t."""
    n_items, n = z.shape[0], z[0].numel()
    moved, out, levels = _next_batch(z, rows, dtype)
    with _on(eps):
        split, n_splits, dots = _splits(eps, n_items, n, 1, mode == PERP_NEG)
        step_kernel[(n_items, n_splits)](
            p_eps=eps, p_weights=_or(weights, eps), p_dots=_or(dots, eps), p_z=z, p_t=t,
            p_t_next=t_next, p_alpha=alpha, p_sigma=sigma, p_moved=moved, p_rows=out,
            p_levels=levels, scale=scale, n_items=n_items, n=n, split=split, n_splits=n_splits,
            ROWS=rows, MODE=mode, SUMMED=dots is not None, BLOCK=BLOCK, **_OPTIONS,
        )  # fmt: skip
    return moved, out, levels


def state_fwd(
    states: Tensor, predictions: Tensor, slot: Tensor, slot_eps: Tensor, t: Tensor,
    t_next: Tensor, alpha: Tensor, sigma: Tensor, rows: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `step_fwd` from slots of a table of states and guided predictions [S,C,h,w]."""
    n_items, n = slot.shape[0], states[0].numel()
    like = states.new_empty((n_items, *states.shape[1:]), dtype=torch.float32, device="meta")
    moved, out, levels = _next_batch(like, rows, dtype, states.device)
    with _on(states):
        state_kernel[(n_items, triton.cdiv(n, BLOCK))](
            p_states=states, p_eps=predictions, p_slot=slot, p_slot_eps=slot_eps, p_t=t,
            p_t_next=t_next, p_alpha=alpha, p_sigma=sigma, p_moved=moved, p_rows=out,
            p_levels=levels, n_items=n_items, n=n, ROWS=rows, BLOCK=BLOCK, **_OPTIONS,
        )  # fmt: skip
    return moved, out, levels


def link_fwd(
    eps: Tensor, weights: Tensor | None, scale: float, mode: int, rows: int,
    x: Tensor, t: Tensor, t_delta: Tensor, alpha: Tensor, sigma: Tensor, mirrored: Tensor | None,
    dtype: torch.dtype, pair: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(eps_o, rows of x at t_delta and at t, their levels) from the trajectory's stack."""
    n_items, n = x.shape[0], x[0].numel()
    eps_o, out, levels = _next_batch(x, (1 + pair) * rows, dtype)
    with _on(eps):
        split, n_splits, dots = _splits(eps, n_items, n, 1, mode == PERP_NEG)
        link_kernel[(n_items, n_splits)](
            p_eps=eps, p_weights=_or(weights, eps), p_dots=_or(dots, eps), p_x=x, p_t=t,
            p_t_delta=t_delta, p_mirrored=t if mirrored is None else mirrored.view(torch.uint8),
            p_alpha=alpha, p_sigma=sigma, p_eps_o=eps_o, p_rows=out, p_levels=levels,
            scale=scale, n_items=n_items, n=n, width=x.shape[-1], split=split, n_splits=n_splits,
            ROWS=rows, MODE=mode, MIRROR=mirrored is not None, PAIR=pair,
            SUMMED=dots is not None, BLOCK=BLOCK, **_OPTIONS,
        )  # fmt: skip
    return eps_o, out, levels


def link_table_fwd(
    predictions: Tensor, slot: Tensor, slot_next: Tensor, mix: Tensor, rows: int,
    x: Tensor, t: Tensor, t_delta: Tensor, alpha: Tensor, sigma: Tensor, mirrored: Tensor | None,
    dtype: torch.dtype, pair: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `link_fwd` from guided predictions [S,C,h,w]: slot's, moved by mix to slot_next's."""
    n_items, n = x.shape[0], x[0].numel()
    eps_o, out, levels = _next_batch(x, (1 + pair) * rows, dtype)
    with _on(x):
        link_table_kernel[(n_items, triton.cdiv(n, BLOCK))](
            p_eps=predictions, p_slot=slot, p_slot_next=slot_next, p_mix=mix, p_x=x, p_t=t,
            p_t_delta=t_delta, p_mirrored=t if mirrored is None else mirrored.view(torch.uint8),
            p_alpha=alpha, p_sigma=sigma, p_eps_o=eps_o, p_rows=out, p_levels=levels,
            n_items=n_items, n=n, width=x.shape[-1], ROWS=rows, MIRROR=mirrored is not None,
            PAIR=pair, BLOCK=BLOCK, **_OPTIONS,
        )  # fmt: skip
    return eps_o, out, levels


def text_fwd(
    bank: Tensor, first: Tensor, second: Tensor, share: Tensor, dtype: torch.dtype
) -> Tensor:
    """share bank[first] + (1 - share) bank[second]: [R,L,D] in `dtype` of a bank [V,L,D]."""
    n = bank[0].numel()
    rows = bank.new_empty((first.shape[0], *bank.shape[1:]), dtype=dtype)
    with _on(bank):
        text_kernel[(first.shape[0], triton.cdiv(n, BLOCK))](
            p_bank=bank, p_first=first, p_second=second, p_share=share, p_rows=rows, n=n,
            BLOCK=BLOCK, **_OPTIONS,
        )  # fmt: skip
    return rows


def gradient_fwd(
    eps: Tensor, weights: Tensor | None, scales: tuple[float, float], modes: tuple[int, int],
    rows: int, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, weighting: int, done: Tensor,
    eps_o: Tensor | None, share: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad, target, [loss, norm of grad], whether grad is finite) from the pair's stack.

    eps [2*rows*B,C,h,w], t_delta first, or [rows*B,C,h,w] where one stack serves both levels.
    `done` is an int32 zero that the launch needs to itself, and leaves at zero. eps_o [B,C,h,w]
    takes a `share` [B] of what the prediction at t is compared with.
    """
    n_items, n = x.shape[0], x[0].numel()
    groups = eps.shape[0] // (rows * n_items)
    eps_t = eps[(groups - 1) * rows * n_items :]
    grad, target = torch.empty_like(x), torch.empty_like(x)
    numbers = x.new_empty(2)
    finite = x.new_empty((), dtype=torch.uint8)
    with _on(eps):
        split, n_splits, dots = _splits(eps, n_items, n, groups, PERP_NEG in modes)
        dots_t = None if dots is None else dots[groups - 1]
        sums = x.new_empty((n_items, n_splits, 2))
        gradient_kernel[(n_items, n_splits)](
            p_eps_delta=eps, p_eps_t=eps_t, p_weights=_or(weights, eps),
            p_dots_delta=_or(dots, eps), p_dots_t=_or(dots_t, eps),
            p_eps_o=_or(eps_o, x), p_share=_or(share, x), p_x=x, p_t=t,
            p_alpha=alpha, p_sigma=sigma, p_grad=grad, p_target=target, p_sums=sums, p_done=done,
            p_numbers=numbers, p_finite=finite,
            scale_delta=scales[0], scale_t=scales[1], n_items=n_items, n=n, split=split,
            n_splits=n_splits, MODE_DELTA=modes[0], MODE_T=modes[1], WEIGHTING=weighting,
            OWN=eps_o is not None, SUMMED=dots is not None, BLOCK=BLOCK, **_OPTIONS,
        )  # fmt: skip
    return grad, target, numbers, finite.view(torch.bool)


def _splits(
    eps: Tensor, n_items: int, n: int, groups: int, perp_neg: bool
) -> tuple[int, int, Tensor | None]:
    """(elements of a split, splits of an item, sums of long rows [groups,B,splits,3] or None)."""
    if not perp_neg:
        # nothing is summed over a row, so a tile a program spreads it over the whole device
        return BLOCK, triton.cdiv(n, BLOCK), None
    if n <= ROW_LIMIT:
        return n, 1, None
    n_splits = triton.cdiv(n, BLOCK)
    dots = eps.new_empty((groups, n_items, n_splits, 3), dtype=torch.float32)
    dots_kernel[(groups * n_items, n_splits)](
        p_eps=eps, p_dots=dots, n_items=n_items, n=n, split=BLOCK, n_splits=n_splits,
        BLOCK=BLOCK, **_OPTIONS,
    )  # fmt: skip
    return BLOCK, n_splits, dots


def _next_batch(
    x: Tensor, rows: int, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    device = device or x.device
    n_rows = rows * x.shape[0]
    return (
        torch.empty_like(x, device=device),
        torch.empty((n_rows, *x.shape[1:]), dtype=dtype, device=device),
        torch.empty(n_rows, dtype=torch.int64, device=device),
    )


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Something to point at where a mode reads nothing."""
    return other if tensor is None else tensor


def _on(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
