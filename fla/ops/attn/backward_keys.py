"""The backward stage's second kernel: dk and dv, and what the keys take from the gates."""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.attn.blocks import (
    SPAN,
    Line,
    gate_marks,
    gate_sums,
    gates_within,
    own,
    put_tile,
    sees,
    tile,
)
from fla.ops.common.kernels import LOG2E, SEARCH, first_slot, product

# A program holds k, v, dk and dv and has the fewest registers to spare.  BM is at most that of the
# queries' kernel, which fills the rows that a block of queries reads.
LINES = (
    Line(2, 64, 64, 64, 64, 4, 3, shared=68),
    Line(2, 128, 128, 64, 128, 8, 3, shared=163, long=True),
    Line(2, 128, 128, 64, 64, 4, 2, shared=98),
    Line(2, 256, 256, 32, 64, 8, 2, shared=130),
    Line(2, 256, 512, 32, 32, 8, 2, shared=99),
    Line(4, 64, 64, 32, 64, 4, 2, shared=98),
    Line(4, 128, 128, 32, 64, 8, 2, shared=193),
    Line(4, 256, 256, 16, 16, 8, 2, shared=98),
)


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
    for at in range(first, blocks, SEARCH):
        i = at + tl.arange(0, SEARCH)
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
    p_column,
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
    queries are there and see all keys, unless MASKED.  ``p_column`` is −lse, and with gates since −
    lse where the queries do not lie NEAR.
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
        b_column = tl.load(p_column + o_i)
        if p_total is not None:
            if NEAR:
                b_s -= gates_within(b_since, b_rest, p_since, p_rest, o_i)
            else:
                b_s += b_until[:, None]
                b_column += between.to(tl.float32)
                i_s = first // SPAN
                leaves = (first + BM) % SPAN == 0
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
        middle = i_k // SPAN * SPAN + SPAN
    end = tl.maximum(live, near)  # no queries for tokens behind the last sequence
    middle = tl.minimum(middle, tl.cdiv(end, BM) * BM)
    full = end // BM * BM
    if window is not None:
        end = tl.maximum(tl.minimum(end, i_k + BN - 1 + window), near)
        full = tl.minimum(full, (i_k + window) // BM * BM)
    full = tl.maximum(full, middle)
    slot = first_slot(cu_seqlens, n, bos, T, SPAN)
    b_dk = tl.zeros([BN, BK], tl.float32)
    b_dv = tl.zeros([BN, BV], tl.float32)
    for i_g in range(G):
        i_hq = i_h * G + i_g
        span = (i_hq * intervals + slot).to(tl.int64) * SPAN
        p_q = q + row * (H * G * K) + i_hq * K
        p_do = do + row * (H * G * V) + i_hq * V
        plane = (H * G * intervals).to(tl.int64) * SPAN
        p_column = rows + span
        p_delta = p_column + plane
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
            PQ: tl.constexpr = SPAN // PART
            p_reach = reach + (i_hq * intervals + slot) * PART
            last = last_block_needed(
                p_total, p_reach, p_reach + H * G * intervals * PART, i_k // SPAN, middle // PQ,
                tl.cdiv(end, PQ), tl.load(p_rise + i_k // SPAN), tl.load(p_norm + i_k // SPAN),
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
                if sums is not None:
                    p_column += 2 * plane
                start = middle
                count = tl.cdiv(full_g - middle, BM)
            else:
                start = full_g
                count = tl.cdiv(end_g - full_g, BM)
            b_dk, b_dv, b_column_sum, between = meet_queries(
                b_dk, b_dv, b_column_sum, between, b_k, b_v, o_j, b_since, b_rest, b_until, p_q,
                p_do, p_column, p_delta, p_since, p_rest, p_total, start, count, straight,
                full - middle, live, window, scale, H * G * K, H * G * V, K, V, BM, BK, BV,
                phase == 0, phase != 1, PRECISION,
            )  # fmt: skip
        if dgate is not None:
            # keys behind the end have no sums, but nobody else may have written there
            b_dgate = tl.where(m_j, tl.load(dgate + span + o_j) - b_column_sum, 0.0)
            tl.store(dgate + span + o_j, b_dgate)
            mine = first_slot(cu_seqlens, n, bos, T, BN) + i_b
            tl.store(dgate_sum + i_hq * blocks + mine, tl.sum(b_dgate, 0))
    put_tile(dk + k_at, b_dk * (scale / LOG2E), o_n, o_j < length, H * K, K, BK)
    put_tile(dv + v_at, b_dv, o_n, o_j < length, H * V, V, BV)
