"""The forward stage of the softmax engine: o and lse in one pass over the keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.attn.blocks import (
    LEAST,
    SPAN,
    Call,
    Line,
    along_time,
    first_interval_needed,
    gate_marks,
    gate_sums,
    gates_within,
    largest_norm,
    own,
    put_tile,
    sees,
    tile,
)
from fla.ops.common.kernels import LOG2E, first_slot, product
from fla.ops.common.launch import launch

# 128 queries on two warpgroups let K and V pass half as often as 64 would.  Blocks shrink as heads
# grow: output, logits and some blocks of K and V have to stay on the chip.
LINES = (
    Line(2, 64, 64, 128, 64, 8, 3, shared=66),
    Line(2, 128, 128, 128, 128, 8, 3, shared=226, long=True),
    Line(2, 128, 128, 64, 64, 4, 3, shared=114),  # two programs a multiprocessor
    Line(2, 256, 256, 128, 64, 8, 2, shared=193),
    Line(2, 256, 512, 64, 32, 8, 2, shared=130),
    Line(2, 256, 512, 32, 16, 4, 2, shared=42),  # for GPUs with little shared memory
    # tf32x3 holds each operand twice
    Line(4, 64, 64, 64, 32, 4, 2, shared=65),
    Line(4, 128, 128, 64, 32, 4, 2, shared=129),
    Line(4, 256, 256, 16, 16, 4, 2, shared=67),
)


@triton.jit
def meet(
    b_o,
    b_most,
    b_sum,
    between,
    b_q,
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
    PRECISION: tl.constexpr,
):
    """Let queries meet ``count`` blocks of keys, from the one that ends at ``stop`` backwards.

    NEAR blocks share the queries' interval, and only there is a key after its query; behind
    ``straight`` of them may be a gap.  With MASKED the window is looked at.  ``between`` is the sum
    of the gates between the queries' interval and that of the keys.
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
        b_s = product(b_q, tl.trans(b_k), None, PRECISION)  # [BM, BN]
        if NEAR or (MASKED and window is not None):
            b_s = tl.where(sees(o_i[:, None], o_j[None, :], window), b_s, float("-inf"))
        if p_until is None:
            b_new = tl.maximum(b_most, tl.max(b_s, 1) * scale)
            b_p = tl.exp2(b_s * scale - b_new[:, None])
        else:
            if NEAR:
                b_row = tl.zeros_like(b_most)
                b_s = b_s * scale + gates_within(b_since, b_rest, p_since, p_rest, o_j)
            else:
                b_row = b_since + between.to(tl.float32)
                b_s = b_s * scale + tl.load(p_until + o_j)[None, :]
                i_s = first // SPAN
                between += tl.where(first % SPAN == 0, tl.load(p_total + i_s), 0.0).to(tl.float64)
            b_new = tl.maximum(b_most, tl.max(b_s, 1) + b_row)
            b_p = tl.exp2(b_s - (b_new - b_row)[:, None])
        b_fall = tl.exp2(b_most - b_new)
        b_most = b_new
        b_sum = b_sum * b_fall + tl.sum(b_p, 1)
        b_v = tile(p_v + first.to(tl.int64) * VS, o_n, m_j, VS, V, BV)  # [BN, BV]
        b_o = product(b_p.to(b_v.dtype), b_v, b_o * b_fall[:, None], PRECISION)
    return b_o, b_most, b_sum, between


@triton.jit
def key_blocks(i_q, BM: tl.constexpr, BN: tl.constexpr, live, window, GATED: tl.constexpr):
    """The keys that queries [i_q, i_q + BM) meet, cut where they are met in another way.

    Returns ``low ≤ full ≤ near ≤ stop``: every query sees all keys of [full, near), while for
    [low, full) the window, and for [near, stop) the order in time, is to be looked at.
    """
    near = i_q // BN * BN
    if GATED:
        near = i_q // SPAN * SPAN
    near = tl.minimum(near, live)  # no keys at all for tokens behind the last sequence
    stop = tl.cdiv(tl.minimum(i_q + BM, live), BN) * BN
    low = near * 0
    full = near * 0
    if window is not None:
        low = tl.maximum(i_q - window + 1, 0) // BN * BN
        full = tl.minimum(tl.cdiv(tl.maximum(i_q + BM - window, 0), BN) * BN, near)
        low = tl.minimum(low, full)
    return low, full, near, tl.maximum(stop, near)


@triton.jit(do_not_specialize=["N", "T", "window", "intervals"])
def forward_kernel(
    q,
    k,
    v,
    sink,
    sums,
    marks,
    cu_seqlens,
    o,
    lse,
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
    """o and lse of BM queries of one head, which meet the nearest keys first.

        s_ij = scale q_i·k_j + g_{j+1} + … + g_i    o_i = Σ_j exp(s_ij − lse_i) v_j
        lse_i = log(Σ_j exp s_ij + exp sink)

    Reads q [BM, K], all k [·, K] and v [·, V] before them, and what ``gates_kernel`` says of both.
    With gates it stops at the first interval that, by the bound of ``first_interval_needed``, no
    query can see.  Writes o [BM, V] and lse [BM], zero and the sink where there are no keys.
    """
    i_h, n, i_b, bos, length, live = own(cu_seqlens, tl.program_id(0), N, T, H * G, BM, True)
    i_q = i_b * BM
    if i_q >= length:
        return
    row = bos.to(tl.int64)
    o_i = i_q + tl.arange(0, BM)
    m_i = o_i < live
    p_k = k + row * (H * K) + i_h // G * K
    p_v = v + row * (H * V) + i_h // G * V
    at = along_time(cu_seqlens, bos, i_h, T, H * G)
    b_q = tile(q + (row + i_q) * (H * G * K) + i_h * K, tl.arange(0, BM), m_i, H * G * K, K, BK)

    b_since = None
    b_rest = None
    p_since = None
    p_rest = None
    p_until = None
    p_total = None
    if sums is not None:
        slot = first_slot(cu_seqlens, n, bos, T, SPAN)
        p_since, p_rest, p_until = gate_sums(sums, i_h, slot, intervals, H * G)
        p_total, p_rise, p_norm = gate_marks(marks, i_h, i_h // G, slot, intervals, H * G)
        b_since = tl.load(p_since + o_i)
        b_rest = tl.load(p_rest + o_i)

    b_most = tl.full([BM], LEAST, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BV], tl.float32)
    between = tl.full([], 0.0, tl.float64)
    low, full, near, stop = key_blocks(i_q, BM, BN, live, window, sums is not None)
    PHASES: tl.constexpr = 3 if window is not None and sums is not None else 2
    for phase in tl.static_range(PHASES):
        if phase == 0:
            start = stop
            straight = (stop - near) // BN
            count = straight
            if sums is None:  # without gates the order is free: at once all that masks concern
                count += (full - low) // BN
        elif phase == 1:
            if sums is not None:
                reach = tl.max(tl.where(m_i, b_since - b_most, float("-inf")), 0)
                needed = first_interval_needed(
                    p_total, p_rise, p_norm, i_q // SPAN, largest_norm(b_q) * scale, reach, floor
                )
                low = tl.maximum(low, tl.minimum(needed * SPAN, near))
                full = tl.maximum(full, low)
            start = near
            count = (near - full) // BN
        else:
            start = full
            count = (full - low) // BN
        b_o, b_most, b_sum, between = meet(
            b_o, b_most, b_sum, between, b_q, o_i, b_since, b_rest, p_k, p_v, p_since, p_rest,
            p_until, p_total, start, count, straight, near - full, live, window, scale,
            H * K, H * V, K, V, BN, BK, BV, phase == 0, phase != 1, PRECISION,
        )  # fmt: skip

    m_i = o_i < length
    if sink is not None:  # a key with this logit and without a value
        s_sink = tl.load(sink + i_h).to(tl.float32) * LOG2E
        b_new = tl.maximum(b_most, s_sink)
        b_fall = tl.exp2(b_most - b_new)
        b_most = b_new
        b_sum = b_sum * b_fall + tl.exp2(s_sink - b_new)
        b_o *= b_fall[:, None]
    b_seen = b_sum > 0
    b_o = b_o / tl.where(b_seen, b_sum, 1.0)[:, None]
    b_lse = tl.where(b_seen, (b_most + tl.log2(b_sum)) / LOG2E, LEAST)
    put_tile(o + (row + i_q) * (H * G * V) + i_h * V, b_o, tl.arange(0, BM), m_i, H * G * V, V, BV)
    tl.store(lse + at + o_i, b_lse, mask=m_i)


def run_forward(call: Call, q, k, v, sums, marks, sink, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Launch ``forward_kernel``: o [B, T, HQ, V] and lse [B, HQ, T]."""
    B, T, HQ, _ = q.shape
    o = q.new_empty(B, T, HQ, v.shape[-1])
    lse = q.new_empty(B, HQ, T, dtype=torch.float32)
    line = call.choose(LINES)
    launch(
        forward_kernel,
        call.blocks(line.BM) * HQ,
        (q, k, v, sink, sums, marks, cu_seqlens, o, lse),
        call.numbers,
        call.constants | line.constants,
    )
    return o, lse
