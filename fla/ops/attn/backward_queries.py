"""The backward stage's first kernel: dq, and what the second one has to know of the queries."""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.attn.blocks import (
    SPAN,
    Line,
    along_time,
    first_interval_needed,
    gate_marks,
    gate_sums,
    gates_within,
    largest_norm,
    own,
    own_logits,
    put_tile,
    sees,
    tile,
)
from fla.ops.attn.forward import key_blocks
from fla.ops.common.kernels import LOG2E, first_slot, product

# A program holds q, do and dq.
LINES = (
    Line(2, 64, 64, 64, 64, 4, 3, shared=66),
    Line(2, 128, 128, 128, 64, 8, 3, shared=162, long=True),
    Line(2, 128, 128, 64, 64, 4, 2, shared=98),  # two programs a multiprocessor
    Line(2, 256, 512, 64, 32, 8, 2, shared=194),
    Line(2, 256, 512, 32, 16, 8, 2, shared=74),  # for GPUs with little shared memory
    # tf32x3 holds each operand twice
    Line(4, 64, 64, 64, 32, 4, 2, shared=97),
    Line(4, 128, 128, 64, 32, 8, 2, shared=193),
    Line(4, 256, 256, 16, 16, 8, 2, shared=98),
)


@triton.jit
def meet_keys(
    b_dq,
    b_row_sum,
    between,
    b_q,
    b_do,
    b_lse,
    b_delta,
    o_i,
    b_since,
    b_rest,
    p_k,
    p_v,
    p_since,
    p_rest,
    p_until,
    p_total,
    stop,
    count,
    straight,
    gap,
    live,
    window,
    scale,
    KS: tl.constexpr,
    VS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NEAR: tl.constexpr,
    MASKED: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what ``count`` blocks of keys give to dq, backwards from the one that ends at ``stop``.

    With SUMS also Σ_j dS_ij to ``b_row_sum``; else as ``forward.meet``.
    """
    for i in range(count):
        first = stop - (i + 1) * BN
        if NEAR:
            first -= tl.where(i < straight, 0, gap)
        first = tl.multiple_of(first, BN)
        o_n = tl.arange(0, BN)
        o_j = first + o_n
        m_j = None
        if NEAR:
            m_j = o_j < live
        b_k = tile(p_k + first.to(tl.int64) * KS, o_n, m_j, KS, K, BK)  # [BN, BK]
        b_s = product(b_q, tl.trans(b_k), None, PRECISION) * scale  # [BM, BN]
        b_row = -b_lse
        if p_until is not None:
            if NEAR:
                b_s += gates_within(b_since, b_rest, p_since, p_rest, o_j)
            else:
                b_row += b_since + between.to(tl.float32)
                b_s += tl.load(p_until + o_j)[None, :]
                i_s = first // SPAN
                between += tl.where(first % SPAN == 0, tl.load(p_total + i_s), 0.0).to(tl.float64)
        b_p = tl.exp2(b_s + b_row[:, None])
        if NEAR or (MASKED and window is not None):
            b_p = tl.where(sees(o_i[:, None], o_j[None, :], window), b_p, 0.0)
        b_v = tile(p_v + first.to(tl.int64) * VS, o_n, m_j, VS, V, BV)  # [BN, BV]
        b_ds = b_p * (product(b_do, tl.trans(b_v), None, PRECISION) - b_delta[:, None])
        if SUMS:
            b_row_sum += tl.sum(b_ds, 1)
        b_dq = product(b_ds.to(b_k.dtype), b_k, b_dq, PRECISION)
    return b_dq, b_row_sum, between


@triton.jit(do_not_specialize=["N", "T", "window", "intervals"])
def queries_kernel(
    q,
    k,
    v,
    sink,
    o,
    do,
    lse,
    sums,
    marks,
    cu_seqlens,
    dq,
    rows,
    dgate,
    dsink,
    reach,
    scale,
    floor,
    window,
    N,
    T,
    intervals,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq and Δ of BM queries of one head.

    Reads q [BM, K], o and do [BM, V], lse [BM], all k [·, K] and v [·, V] before them, and the
    gates.  Writes dq [BM, K], and −lse and Δ [BM] to rows [2, HQ, intervals, SPAN].  With gates
    also since − lse to a third plane of rows, Σ_j dS_ij to dgate [BM], and how far the queries
    reach, the largest since − (what keys reach) and scale |q|, to
    reach [2, HQ, intervals · SPAN / BM].  Zero where there are no keys.
    """
    i_h, n, i_b, bos, length, live = own(cu_seqlens, tl.program_id(0), N, T, H * G, BM, True)
    i_q = i_b * BM
    if i_q >= length:
        return
    row = bos.to(tl.int64)
    o_m = tl.arange(0, BM)
    o_i = i_q + o_m
    m_i = o_i < live
    p_k = k + row * (H * K) + i_h // G * K
    p_v = v + row * (H * V) + i_h // G * V
    at = along_time(cu_seqlens, bos, i_h, T, H * G)
    q_at = (row + i_q) * (H * G * K) + i_h * K
    v_at = (row + i_q) * (H * G * V) + i_h * V
    b_q = tile(q + q_at, o_m, m_i, H * G * K, K, BK)
    b_do = tile(do + v_at, o_m, m_i, H * G * V, V, BV)
    b_o = tile(o + v_at, o_m, m_i, H * G * V, V, BV)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    b_lse = tl.load(lse + at + o_i, mask=m_i, other=float("inf")) * LOG2E
    slot = first_slot(cu_seqlens, n, bos, T, SPAN)
    span = (i_h * intervals + slot).to(tl.int64) * SPAN
    plane = (H * G * intervals).to(tl.int64) * SPAN
    p_rows = rows + span + o_i
    tl.store(p_rows, -b_lse)
    tl.store(p_rows + plane, b_delta)

    low, full, near, stop = key_blocks(i_q, BM, BN, live, window, sums is not None)
    b_since = None
    b_rest = None
    p_since = None
    p_rest = None
    p_until = None
    p_total = None
    if sums is not None:
        p_since, p_rest, p_until = gate_sums(sums, i_h, slot, intervals, H * G)
        p_total, p_rise, p_norm = gate_marks(marks, i_h, i_h // G, slot, intervals, H * G)
        b_since = tl.load(p_since + o_i)
        b_rest = tl.load(p_rest + o_i)
        tl.store(p_rows + 2 * plane, b_since - b_lse)
        b_least = b_lse
        if sink is not None:
            p_own = p_k + i_q.to(tl.int64) * (H * K)
            b_least = own_logits(b_q, p_own, o_m, m_i, scale, H * K, K, BK)
        b_reach = tl.max(b_since - b_least, 0)
        b_norm = largest_norm(b_q) * scale
        needed = first_interval_needed(p_total, p_rise, p_norm, i_q // SPAN, b_norm, b_reach, floor)
        low = tl.maximum(low, tl.minimum(needed * SPAN, near))
        full = tl.maximum(full, low)
        if live > 0:
            p_reach = reach + (i_h * intervals + slot) * (SPAN // BM) + i_b
            tl.store(p_reach, b_reach)
            tl.store(p_reach + H * G * intervals * (SPAN // BM), b_norm)

    SUMS: tl.constexpr = sums is not None or sink is not None
    b_dq = tl.zeros([BM, BK], tl.float32)
    b_row_sum = tl.zeros([BM], tl.float32)
    between = tl.full([], 0.0, tl.float64)
    PHASES: tl.constexpr = 3 if window is not None and sums is not None else 2
    for phase in tl.static_range(PHASES):
        if phase == 0:
            start = stop
            straight = (stop - near) // BN
            count = straight
            if sums is None:
                count += (full - low) // BN
        elif phase == 1:
            start = near
            count = (near - full) // BN
        else:
            start = full
            count = (full - low) // BN
        b_dq, b_row_sum, between = meet_keys(
            b_dq, b_row_sum, between, b_q, b_do, b_lse, b_delta, o_i, b_since, b_rest, p_k, p_v,
            p_since, p_rest, p_until, p_total, start, count, straight, near - full, live, window,
            scale, H * K, H * V, K, V, BN, BK, BV, phase == 0, phase != 1, SUMS, PRECISION,
        )  # fmt: skip
    m_i = o_i < length
    put_tile(dq + q_at, b_dq * (scale / LOG2E), o_m, m_i, H * G * K, K, BK)
    if dgate is not None:
        tl.store(dgate + span + o_i, b_row_sum)
    if sink is not None:
        # Σ_j dS_ij = (do·o)_i − (1 − share_i) Δ_i, where Δ carries the rounding of o
        b_share = tl.exp2(tl.load(sink + i_h).to(tl.float32) * LOG2E - b_lse)
        b_dsink = -b_share * (b_row_sum + (1.0 - b_share) * b_delta)
        tl.store(dsink + tl.program_id(0), tl.sum(b_dsink, 0))
