"""The backward stage of the softmax engine: queries, then keys and values, then the gate.

    p_ij = exp(s_ij − lse_i)    Δ_i = do_i·o_i    dS_ij = p_ij (do_i·v_j − Δ_i)
    dq_i = scale Σ_j dS_ij k_j    dk_j = scale Σ_i dS_ij q_i    dv_j = Σ_i p_ij do_i
    dg_t = Σ_{j < t ≤ i} dS_ij = Σ_{t' ≥ t} (Σ_j dS_t'j − Σ_i dS_it')

Seven products a pair of blocks, in two kernels of which each owns what it writes.  Five would do if
dq were accumulated over the key blocks, but then in their order: no sum may depend on who comes
first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fla.ops.attn.blocks import (
    LOG2E,
    SPAN,
    Call,
    Line,
    along_time,
    cdiv,
    first_interval_needed,
    first_slot,
    gate_marks,
    gate_sums,
    largest_norm,
    own,
    put_tile,
    sees,
    tile,
)
from fla.ops.attn.forward import key_blocks
from fla.ops.common.kernels import product

# Of the queries' kernel, which holds q, do and dq.
QUERY_LINES = (
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
# Of the keys' kernel, which holds k, v, dk and dv and so has the fewest registers to spare.  Its BM
# is at most that of the queries' kernel, which fills the rows that a block of queries reads.
KEY_LINES = (
    Line(2, 64, 64, 64, 64, 4, 3, shared=68),
    Line(2, 128, 128, 64, 128, 8, 3, shared=163, long=True),
    Line(2, 128, 128, 64, 64, 4, 2, shared=98),
    Line(2, 256, 256, 32, 64, 8, 2, shared=130),
    Line(2, 256, 512, 32, 32, 8, 2, shared=99),
    Line(4, 64, 64, 32, 64, 4, 2, shared=98),
    Line(4, 128, 128, 32, 64, 8, 2, shared=193),
    Line(4, 256, 256, 16, 16, 8, 2, shared=98),
)
# Heads of a program that sums a gate's gradient: it writes them side by side.
_HEADS = 16

_LOG2E = tl.constexpr(LOG2E)
_SPAN = tl.constexpr(SPAN)
_SEARCH = tl.constexpr(128)


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
                b_since_j = tl.load(p_since + o_j)
                b_rest_j = tl.load(p_rest + o_j)
                b_s += (b_since[:, None] - b_since_j[None, :]) + (
                    b_rest[:, None] - b_rest_j[None, :]
                )
            else:
                b_row += b_since + between.to(tl.float32)
                b_s += tl.load(p_until + o_j)[None, :]
                i_s = first // _SPAN
                between += tl.where(first % _SPAN == 0, tl.load(p_total + i_s), 0.0).to(tl.float64)
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
    gates.  Writes dq [BM, K], and −lse and Δ [BM] to rows [2, HQ, intervals, SPAN]; with gates also
    Σ_j dS_ij to dgate [BM], and for ``keys_kernel`` how far the queries reach, max (since − lse)
    and max |q| · scale, to reach [2, HQ, intervals · SPAN / BM].  Zero where there are no keys.
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
    b_lse = tl.load(lse + at + o_i, mask=m_i, other=float("inf")) * _LOG2E
    slot = first_slot(cu_seqlens, bos, n, T, _SPAN)
    span = (i_h * intervals + slot).to(tl.int64) * _SPAN
    p_rows = rows + span + o_i
    tl.store(p_rows, -b_lse)
    tl.store(p_rows + (H * G * intervals).to(tl.int64) * _SPAN, b_delta)

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
        b_reach = tl.max(b_since - b_lse, 0)
        b_norm = largest_norm(b_q) * scale
        needed = first_interval_needed(
            p_total, p_rise, p_norm, i_q // _SPAN, b_norm, b_reach, floor
        )
        low = tl.maximum(low, tl.minimum(needed * _SPAN, near))
        full = tl.maximum(full, low)
        if live > 0:
            p_reach = reach + (i_h * intervals + slot) * (_SPAN // BM) + i_b
            tl.store(p_reach, b_reach)
            tl.store(p_reach + H * G * intervals * (_SPAN // BM), b_norm)

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
    put_tile(dq + q_at, b_dq * (scale / _LOG2E), o_m, m_i, H * G * K, K, BK)
    if dgate is not None:
        tl.store(dgate + span + o_i, b_row_sum)
    if sink is not None:
        # Σ_j dS_ij = (do·o)_i − (1 − share_i) Δ_i, where Δ carries the rounding of o
        b_share = tl.exp2(tl.load(sink + i_h).to(tl.float32) * _LOG2E - b_lse)
        b_dsink = -b_share * (b_row_sum + (1.0 - b_share) * b_delta)
        tl.store(dsink + tl.program_id(0), tl.sum(b_dsink, 0))


@triton.jit
def last_block_needed(
    p_total, p_reach, p_norm, i_s, first, blocks, rise, k_norm, floor, PART: tl.constexpr
):
    """The last of ``blocks`` blocks of queries, PART an interval, for which the keys count.

    The counterpart of ``blocks.first_interval_needed``: the keys lie in interval i_s, blocks from
    ``first`` on in later ones.
    """
    last = first - 1
    between = 0.0
    for at in range(first, blocks, _SEARCH):
        i = at + tl.arange(0, _SEARCH)
        m_i = i < blocks
        # on entering an interval, the total of the one before, unless that is the keys' own
        m_total = m_i & (i % PART == 0) & (i // PART > i_s + 1)
        b_total = tl.load(p_total + i // PART - 1, mask=m_total, other=0.0)
        b_bound = between + tl.cumsum(b_total, 0) + tl.load(p_reach + i, mask=m_i, other=0.0)
        b_bound += rise + k_norm * tl.load(p_norm + i, mask=m_i, other=0.0)
        last = tl.maximum(last, tl.max(tl.where(m_i & (b_bound >= floor), i, -1), 0))
        between += tl.sum(b_total, 0)
    return last


@triton.jit
def meet_queries(
    b_dk,
    b_dv,
    b_column_sum,
    between,
    b_k,
    b_v,
    o_j,
    b_since,
    b_rest,
    b_until,
    p_q,
    p_do,
    p_minus_lse,
    p_delta,
    p_since,
    p_rest,
    p_total,
    start,
    count,
    straight,
    gap,
    live,
    window,
    scale,
    QS: tl.constexpr,
    DS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NEAR: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what ``count`` blocks of queries give to dk and dv, from ``start`` on.

    NEAR blocks share the keys' interval; behind ``straight`` of them may be a gap.  Of others, all
    queries are there and see all keys, unless MASKED.
    """
    for i in range(count):
        first = start + i * BM
        if NEAR:
            first += tl.where(i < straight, 0, gap)
        first = tl.multiple_of(first, BM)
        o_m = tl.arange(0, BM)
        o_i = first + o_m
        m_i = None
        if MASKED:
            m_i = o_i < live
        b_q = tile(p_q + first.to(tl.int64) * QS, o_m, m_i, QS, K, BK)  # [BM, BK]
        b_s = product(b_k, tl.trans(b_q), None, PRECISION) * scale  # [BN, BM]
        b_column = tl.load(p_minus_lse + o_i)
        if p_total is not None:
            b_since_i = tl.load(p_since + o_i)
            if NEAR:
                b_rest_i = tl.load(p_rest + o_i)
                b_s += (b_since_i[None, :] - b_since[:, None]) + (
                    b_rest_i[None, :] - b_rest[:, None]
                )
            else:
                b_s += b_until[:, None]
                b_column += b_since_i + between.to(tl.float32)
                i_s = first // _SPAN
                leaves = (first + BM) % _SPAN == 0
                between += tl.where(leaves, tl.load(p_total + i_s), 0.0).to(tl.float64)
        b_p = tl.exp2(b_s + b_column[None, :])
        if NEAR or (MASKED and window is not None):
            b_p = tl.where(sees(o_i[None, :], o_j[:, None], window), b_p, 0.0)
        b_do = tile(p_do + first.to(tl.int64) * DS, o_m, m_i, DS, V, BV)  # [BM, BV]
        b_dv = product(b_p.to(b_do.dtype), b_do, b_dv, PRECISION)
        b_delta = tl.load(p_delta + o_i)
        b_ds = b_p * (product(b_v, tl.trans(b_do), None, PRECISION) - b_delta[None, :])  # [BN, BM]
        if p_total is not None:
            b_column_sum += tl.sum(b_ds, 1)
        b_dk = product(b_ds.to(b_q.dtype), b_q, b_dk, PRECISION)
    return b_dk, b_dv, b_column_sum, between


@triton.jit(do_not_specialize=["N", "T", "window", "intervals", "blocks"])
def keys_kernel(
    q,
    k,
    v,
    do,
    rows,
    sums,
    marks,
    reach,
    cu_seqlens,
    dk,
    dv,
    dgate,
    dgate_sum,
    scale,
    floor,
    window,
    N,
    T,
    intervals,
    blocks,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of BN keys of one key head, summed over its G query heads.

    Reads k [BN, K], v [BN, V], and of every later query and head q, do, lse, Δ, and the gates.
    Writes dk [BN, K], dv [BN, V]; with gates also subtracts Σ_i dS_ij from dgate [G, BN], and
    leaves the sums of what is there then in dgate_sum [HQ, blocks].  Zero where no query is.
    """
    i_h, n, i_b, bos, length, live = own(cu_seqlens, tl.program_id(0), N, T, H, BN, False)
    i_k = i_b * BN
    if i_k >= length:
        return
    row = bos.to(tl.int64)
    o_n = tl.arange(0, BN)
    o_j = i_k + o_n
    m_j = o_j < live
    k_at = (row + i_k) * (H * K) + i_h * K
    v_at = (row + i_k) * (H * V) + i_h * V
    b_k = tile(k + k_at, o_n, m_j, H * K, K, BK)
    b_v = tile(v + v_at, o_n, m_j, H * V, V, BV)

    # queries [near, middle) may come before the keys, [middle, full) are whole blocks that see all
    # of them, and [full, end) the last ones
    near = i_k // BM * BM
    middle = tl.cdiv(i_k + BN, BM) * BM
    if sums is not None:
        middle = i_k // _SPAN * _SPAN + _SPAN
    end = tl.maximum(live, near)  # no queries for tokens behind the last sequence
    middle = tl.minimum(middle, tl.cdiv(end, BM) * BM)
    full = end // BM * BM
    if window is not None:
        end = tl.maximum(tl.minimum(end, i_k + BN - 1 + window), near)
        full = tl.minimum(full, (i_k + window) // BM * BM)
    full = tl.maximum(full, middle)
    slot = first_slot(cu_seqlens, bos, n, T, _SPAN)
    b_dk = tl.zeros([BN, BK], tl.float32)
    b_dv = tl.zeros([BN, BV], tl.float32)
    for i_g in range(G):
        i_hq = i_h * G + i_g
        span = (i_hq * intervals + slot).to(tl.int64) * _SPAN
        p_q = q + row * (H * G * K) + i_hq * K
        p_do = do + row * (H * G * V) + i_hq * V
        p_minus_lse = rows + span
        p_delta = p_minus_lse + (H * G * intervals).to(tl.int64) * _SPAN
        b_since = None
        b_rest = None
        b_until = None
        p_since = None
        p_rest = None
        p_total = None
        full_g = full
        end_g = end
        if sums is not None:
            p_since, p_rest, p_until = gate_sums(sums, i_hq, slot, intervals, H * G)
            p_total, p_rise, p_norm = gate_marks(marks, i_hq, i_h, slot, intervals, H * G)
            b_since = tl.load(p_since + o_j)
            b_rest = tl.load(p_rest + o_j)
            b_until = tl.load(p_until + o_j)
            PQ: tl.constexpr = _SPAN // PART
            p_reach = reach + (i_hq * intervals + slot) * PART
            last = last_block_needed(
                p_total, p_reach, p_reach + H * G * intervals * PART, i_k // _SPAN, middle // PQ,
                tl.cdiv(end, PQ), tl.load(p_rise + i_k // _SPAN), tl.load(p_norm + i_k // _SPAN),
                floor, PART,
            )  # fmt: skip
            end_g = tl.maximum(tl.minimum(end, (last + 1) * PQ), middle)
            full_g = tl.minimum(full, end_g)
        b_column_sum = tl.zeros([BN], tl.float32)
        between = tl.full([], 0.0, tl.float64)
        PHASES: tl.constexpr = 3 if sums is not None else 2
        for phase in tl.static_range(PHASES):
            if phase == 0:
                start = near
                straight = tl.cdiv(middle - near, BM)
                count = straight
                if sums is None:  # without gates the order is free: at once all that masks concern
                    count += tl.maximum(tl.cdiv(end - full, BM), 0)
            elif phase == 1:
                start = middle
                count = tl.cdiv(full_g - middle, BM)
            else:
                start = full_g
                count = tl.cdiv(end_g - full_g, BM)
            b_dk, b_dv, b_column_sum, between = meet_queries(
                b_dk, b_dv, b_column_sum, between, b_k, b_v, o_j, b_since, b_rest, b_until, p_q,
                p_do, p_minus_lse, p_delta, p_since, p_rest, p_total, start, count, straight,
                full - middle, live, window, scale, H * G * K, H * G * V, K, V, BM, BK, BV,
                phase == 0, phase != 1, PRECISION,
            )  # fmt: skip
        if dgate is not None:
            # keys behind the end have no sums, but nobody else may have written there
            b_dgate = tl.where(m_j, tl.load(dgate + span + o_j) - b_column_sum, 0.0)
            tl.store(dgate + span + o_j, b_dgate)
            mine = first_slot(cu_seqlens, bos, n, T, BN) + i_b
            tl.store(dgate_sum + i_hq * blocks + mine, tl.sum(b_dgate, 0))
    put_tile(dk + k_at, b_dk * (scale / _LOG2E), o_n, o_j < length, H * K, K, BK)
    put_tile(dv + v_at, b_dv, o_n, o_j < length, H * V, V, BV)


@triton.jit(do_not_specialize=["N", "T", "intervals", "blocks"])
def gate_kernel(
    dgate,
    dgate_sum,
    cu_seqlens,
    dg,
    N,
    T,
    intervals,
    blocks,
    HQ: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
):
    """dg of BN tokens of BH heads: the sum of dgate from each token to its sequence's end.

    Reads dgate [BH, BN] and dgate_sum of all later blocks; writes dg [BN, BH] of [B, T, HQ].
    """
    HEADS: tl.constexpr = (HQ + BH - 1) // BH
    i_h, n, i_b, bos, length, _live = own(cu_seqlens, tl.program_id(0), N, T, HEADS, BN, False)
    if i_b * BN >= length:
        return
    o_h = i_h * BH + tl.arange(0, BH)
    m_h = o_h < HQ
    o_t = i_b * BN + tl.arange(0, BN)
    m_t = o_t < length
    slot = first_slot(cu_seqlens, bos, n, T, BN)
    b_later = tl.zeros([BH], tl.float64)
    for at in range(i_b + 1, tl.cdiv(length, BN), 64):
        o_b = at + tl.arange(0, 64)
        m = m_h[:, None] & (o_b < tl.cdiv(length, BN))[None, :]
        b_sums = tl.load(dgate_sum + o_h[:, None] * blocks + slot + o_b[None, :], mask=m, other=0.0)
        b_later += tl.sum(b_sums.to(tl.float64), 1)
    at = (o_h * intervals + first_slot(cu_seqlens, bos, n, T, _SPAN)).to(tl.int64) * _SPAN
    b_dgate = tl.load(dgate + at[:, None] + o_t[None, :], mask=m_h[:, None], other=0.0)  # [BH, BN]
    b_dg = tl.cumsum(b_dgate.to(tl.float64), 1, reverse=True) + b_later[:, None]
    p_dg = dg + (bos.to(tl.int64) + o_t)[:, None] * HQ + o_h[None, :]
    tl.store(p_dg, tl.trans(b_dg).to(dg.dtype.element_ty), mask=m_t[:, None] & m_h[None, :])


def run_backward(call: Call, do, q, k, v, sums, marks, sink, cu_seqlens, o, lse, g):
    """Launch the kernels: dq, dk, dv, dg and the sink's gradient, None for what there is not."""
    HQ, H = q.shape[2], k.shape[2]
    query_line, key_line = call.choose(QUERY_LINES), call.choose(KEY_LINES)
    query_blocks, blocks = call.blocks(query_line.BM), call.blocks(key_line.BN)
    part = SPAN // query_line.BM
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rows = lse.new_empty(2, HQ, call.intervals, SPAN)
    dgate = dgate_sum = reach = dg = dsink = None
    if g is not None:
        dg = torch.empty_like(g)
        dgate = torch.empty_like(rows[0])
        dgate_sum = lse.new_empty(HQ, blocks)
        reach = lse.new_empty(2, HQ, call.intervals * part)
    if sink is not None:
        dsink = lse.new_zeros(query_blocks, HQ)  # slots may stay empty
    queries_kernel[(query_blocks * HQ,)](
        q, k, v, sink, o, do, lse, sums, marks, cu_seqlens, dq, rows, dgate, dsink, reach,
        call.scale, call.floor, call.window, call.N, call.T, call.intervals,
        **call.constants, **query_line.constants,
    )  # fmt: skip
    keys_kernel[(blocks * H,)](
        q, k, v, do, rows, sums, marks, reach, cu_seqlens, dk, dv, dgate, dgate_sum,
        call.scale, call.floor, call.window, call.N, call.T, call.intervals, blocks,
        PART=part, **call.constants, **key_line.constants,
    )  # fmt: skip
    if g is not None:
        gate_kernel[(blocks * cdiv(HQ, _HEADS),)](
            dgate, dgate_sum, cu_seqlens, dg, call.N, call.T, call.intervals, blocks,
            HQ=HQ, BN=key_line.BN, BH=_HEADS,
        )  # fmt: skip
    if sink is not None:
        dsink = dsink.sum(0).to(sink.dtype)
    return dq, dk, dv, dg, dsink
