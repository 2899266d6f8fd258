"""The softmax engine's backward on Hopper: what goes before and after ``hopper_keys``; who gets it.

With gates or a window, a block of queries needs the keys from an interval on: it is known before
any product, with gates from the bound of ``blocks.first_interval_needed``, and no program comes to
blocks without need.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fla.ops.attn import triton as portable
from fla.ops.attn.backward import gate_kernel
from fla.ops.attn.blocks import (
    SPAN,
    Call,
    along_time,
    first_interval_needed,
    first_interval_seen,
    gate_marks,
    gate_sums,
    gates,
    hiding,
    largest_norm,
    own,
    own_logits,
    put_tile,
    rising,
    tile,
)
from fla.ops.attn.hopper_keys import hopper_backward_kernel
from fla.ops.attn.hopper_steps import KEYS, ROWS
from fla.ops.common.boundary import absent
from fla.ops.common.hopper import descriptor
from fla.ops.common.kernels import LOG2E, SEARCH, cdiv, dense, first_slot
from fla.ops.common.launch import launch

# The heads that are taken, and for how many stages of q and do shared memory has room
_STAGES = {64: 4, 128: 2}
# A copy takes up to 256 elements of each dimension
_LINE = 256


class _Least(NamedTuple):
    """What a call has at least, to be faster here than in Triton.

    Tokens, blocks of keys, tokens of a packed sequence on average, and windows.
    """

    tokens: int
    blocks: int
    packed: int
    window: float
    gated_window: int


_LEAST = {64: _Least(4096, 512, 1024, math.inf, 1024), 128: _Least(512, 256, 512, 128, 512)}
# Heads of a program that sums a gate's gradient: it writes them side by side.
_HEADS = 16


@triton.jit
def in_two(x):
    """A number in fp64 as two in fp32."""
    high = x.to(tl.float32)
    return high, (x - high).to(tl.float32)


@triton.jit(do_not_specialize=["window", "N", "T", "intervals"])
def rows_kernel(
    q, k, o, do, lse, sink, sums, marks, cu_seqlens, rows, keys, turns, needed, latest, row_sums,
    column_sums, dsink, scale, floor, window, N, T, intervals,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What is to be known of BM queries of one head; and zeros, where sums are to come.

    Reads q, k, o and do [BM, D] and lse [BM].  Writes −lse and Δ to rows [blocks, 2, BM], and the
    first block of keys that is needed to turns; what the queries give to the sink's gradient,
    −Σ exp(sink − lse) Δ, to dsink.  What is behind their sequence weighs nothing.

    With gates rows are [blocks, 2, 4, BM]: for keys of the same interval −lse, Δ, since and rest;
    for others since − lse, Δ, in two floats the sum of all gates before the interval, and beside
    the first one the bits of the first query's number.  To keys
    [intervals, 2, 2, SPAN] goes what the interval's keys bring along: since and rest, or until and,
    as its first two floats, the sum of all gates to the interval's end.  Which keys are needed also
    goes to needed and to latest, see ``hopper_steps.new_steps``.
    """
    i_h, n, i_s, bos, _length, live = own(cu_seqlens, tl.program_id(0), N, T, H * G, BM, False)
    if i_s * BM >= live:
        return
    slot = first_slot(cu_seqlens, n, bos, T, SPAN)
    block = (i_h * intervals + slot) * (SPAN // BM) + i_s
    o_m = tl.arange(0, BM)
    o_i = i_s * BM + o_m
    m_i = o_i < live
    at = (bos.to(tl.int64) + i_s * BM) * (H * G * D) + i_h * D
    b_o = tile(o + at, o_m, m_i, H * G * D, D, D).to(tl.float32)
    b_do = tile(do + at, o_m, m_i, H * G * D, D, D).to(tl.float32)
    b_delta = tl.sum(b_o * b_do, 1)
    p_lse = lse + along_time(cu_seqlens, bos, i_h, T, H * G)
    b_lse = tl.load(p_lse + o_i, mask=m_i, other=float("inf")) * LOG2E
    if sink is not None:
        b_share = tl.exp2(tl.load(sink + i_h).to(tl.float32) * LOG2E - b_lse)
        tl.store(dsink + tl.program_id(0), -tl.sum(b_share * b_delta, 0))
    SIZE: tl.constexpr = 2 * BM if sums is None else 8 * BM
    p_rows = rows + block.to(tl.int64) * SIZE + o_m
    tl.store(p_rows, -b_lse)
    tl.store(p_rows + BM, b_delta)
    first = i_s * 0
    if window is not None:
        first = first_interval_seen(i_s * BM, window)
    if sums is not None:
        p_sums = block.to(tl.int64) * BM + o_m
        tl.store(row_sums + p_sums, tl.zeros([BM], tl.float32))
        tl.store(column_sums + p_sums, tl.zeros([BM], tl.float32))
        i_i = i_s // (SPAN // BM)
        p_since, p_rest, p_until = gate_sums(sums, i_h, slot, intervals, H * G)
        p_total, p_rise, p_norm = gate_marks(marks, i_h, i_h // G, slot, intervals, H * G)
        b_since = tl.load(p_since + o_i)
        b_before = tl.zeros([SEARCH], tl.float64)
        for start in range(0, i_i, SEARCH):
            o_x = start + tl.arange(0, SEARCH)
            b_before += tl.load(p_total + o_x, mask=o_x < i_i, other=0.0).to(tl.float64)
        before = tl.sum(b_before, 0)
        high, low = in_two(before)
        tl.store(p_rows + 2 * BM, b_since)
        tl.store(p_rows + 3 * BM, tl.load(p_rest + o_i))
        tl.store(p_rows + 4 * BM, b_since - b_lse)
        tl.store(p_rows + 5 * BM, b_delta)
        b_place = (i_s * BM + 0 * o_m).to(tl.float32, bitcast=True)
        tl.store(p_rows + 6 * BM, tl.where(o_m == 1, b_place, high))
        tl.store(p_rows + 7 * BM, low + tl.zeros([BM], tl.float32))
        if i_s % (SPAN // BM) == 0:
            o_j = tl.arange(0, SPAN)
            p_keys = keys + (block // (SPAN // BM)).to(tl.int64) * (4 * SPAN) + o_j
            high, low = in_two(before + tl.load(p_total + i_i))
            tl.store(p_keys, tl.load(p_since + i_i * SPAN + o_j))
            tl.store(p_keys + SPAN, tl.load(p_rest + i_i * SPAN + o_j))
            tl.store(p_keys + 2 * SPAN, tl.load(p_until + i_i * SPAN + o_j))
            tl.store(p_keys + 3 * SPAN, tl.where(o_j == 0, high, low))
        b_q = tile(q + at, o_m, m_i, H * G * D, D, D)
        b_least = b_lse
        if sink is not None:
            p_own = k + (bos.to(tl.int64) + i_s * BM) * (H * D) + i_h // G * D
            b_least = own_logits(b_q, p_own, o_m, m_i, scale, H * D, D, D)
        norm = largest_norm(b_q) * scale
        reach = tl.max(b_since - b_least, 0)
        gated = first_interval_needed(p_total, p_rise, p_norm, i_i, norm, reach, floor)
        first = tl.maximum(first, gated)
        tl.store(needed + block, first)
        p_latest = latest + i_h // G * intervals + slot + first
        tl.atomic_max(p_latest, i_s, sem="relaxed")
        tl.atomic_add(p_latest + H * intervals, 1, sem="relaxed")
    tl.store(turns + block, first)


@triton.jit(do_not_specialize=["N", "T", "intervals", "blocks"])
def dq_kernel(
    sums, row_sums, column_sums, cu_seqlens, dq, dk, dv, dgate_sum, scale, N, T, intervals, blocks,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dq of BM queries of one head, from sums [blocks, BM · D] as ``hopper_keys.offer`` has them.

    With gates also subtracts what their tokens have as keys from their row_sums, and adds that up.
    Zero for tokens behind the last sequence, and then dk and dv too.
    """
    # the last blocks first, whose sums the second-level cache still has
    i_h, n, i_s, bos, length, live = own(cu_seqlens, tl.program_id(0), N, T, H * G, BM, True)
    if i_s * BM >= length:
        return
    block = (i_h * intervals + first_slot(cu_seqlens, n, bos, T, SPAN)) * (SPAN // BM) + i_s
    p_sums = sums + block.to(tl.int64) * (BM * D)
    b_dq = tl.load(p_sums + tl.arange(0, BM * D), mask=live > 0, other=0.0)
    W: tl.constexpr = D // 2
    b_dq = b_dq.reshape([2, W // 8, 4, 8, 4, 2, 2]).permute((2, 5, 3, 0, 1, 4, 6)).reshape([BM, D])
    o_m = tl.arange(0, BM)
    m_i = i_s * BM + o_m < length
    row = bos.to(tl.int64) + i_s * BM
    put_tile(dq + (row * (H * G) + i_h) * D, b_dq * scale, o_m, m_i, H * G * D, D, D)
    if cu_seqlens is not None:
        if (live == 0) & (i_h % G == 0):
            at = (row * H + i_h // G) * D
            put_tile(dk + at, tl.zeros([BM, D], tl.float32), o_m, m_i, H * D, D, D)
            put_tile(dv + at, tl.zeros([BM, D], tl.float32), o_m, m_i, H * D, D, D)
    if row_sums is not None:
        at = block.to(tl.int64) * BM + o_m
        b_row = tl.load(row_sums + at, mask=live > 0, other=0.0)
        b_row -= tl.load(column_sums + at, mask=live > 0, other=0.0)
        tl.store(row_sums + at, b_row)
        p_sum = dgate_sum + i_h * blocks + first_slot(cu_seqlens, n, bos, T, BM) + i_s
        tl.store(p_sum, tl.sum(b_row, 0))


def backward(do, q, k, v, g, sink_bias, cu_seqlens, o, lse, options):
    """Return the gradients of q, k, v, g and the sink."""
    window = hiding(options.window_size, q.shape[1])
    if q.shape[-1] == v.shape[-1] and v.shape[-1] in _STAGES and pays(v, g, cu_seqlens, window):
        signed, scale = rising(q, options.scale)
        tensors = dense(do, signed, k, v, o)
        if all(x.data_ptr() % 16 == 0 for x in tensors):
            g, sink_bias, cu_seqlens = dense(g, sink_bias, cu_seqlens)
            call = Call(q, v, cu_seqlens, scale, window)
            marks = gates(call, g, tensors[2], cu_seqlens)
            dq, dk, dv, *more = run_backward(call, *tensors, lse, g, *marks, sink_bias, cu_seqlens)
            dq = dq if scale == options.scale else dq.neg_()
            return dq, dk, dv, *(absent(q) if x is None else x for x in more)
    return portable.backward(do, q, k, v, g, sink_bias, cu_seqlens, o, lse, options)


def pays(v, g, cu_seqlens, window: int | None) -> bool:
    """Whether calls like it are faster here than in Triton: benchmarks/NOTES.md has the times."""
    B, T, H, D = v.shape
    least = _LEAST[D]
    if T < least.tokens or cdiv(T, KEYS.value) * H * B < least.blocks:
        return False
    if cu_seqlens is not None and T < least.packed * (cu_seqlens.shape[0] - 1):
        return False
    return window is None or window >= (least.window if g is None else least.gated_window)


def _pieces(x: Tensor) -> TensorDescriptor:
    """x [pieces, 1, lines, size], of which one piece at a time is copied."""
    layout = gl.NVMMASharedLayout(0, 32, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, *x.shape[1:]], layout)


def run_backward(call: Call, do, q, k, v, o, lse, g, gates, marks, sink, cu_seqlens):
    """Launch the kernels: dq, dk, dv, dg and the sink's gradient, None for what there is not."""
    HQ, D = q.shape[2:]
    H = v.shape[2]
    block, keys = ROWS.value, KEYS.value
    blocks, programs = call.blocks(block), call.intervals * H
    numbered = HQ * call.intervals * (keys // block)
    # how many floats a block of queries has in rows, and how many of them a step reads
    size, part = (2 * block, 2 * block) if g is None else (8 * block, 4 * block)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rows = lse.new_empty(numbered * size // part, 1, 1, part)
    sums = lse.new_empty(2 * numbered, 1, block * D // (2 * _LINE), _LINE)
    turns = torch.empty(numbered, device=q.device, dtype=torch.int32)
    # the next ticket, and beside it, where there are gates, what counts queries
    counters = turns.new_zeros(4 if g is None else 4 + 2 * programs)
    pairs = needed = latest = row_sums = column_sums = dg = dgate_sum = dsink = None
    if g is not None:
        pairs = lse.new_empty(HQ * call.intervals * 2, 1, 1, 2 * keys)
        needed = torch.empty_like(turns)
        latest = counters[4:]
        row_sums = lse.new_empty(numbered * block)
        column_sums = torch.empty_like(row_sums)
        dg = torch.empty_like(g)
        dgate_sum = lse.new_empty(HQ, blocks)
    if sink is not None:
        dsink = lse.new_zeros(blocks, HQ)  # slots may stay empty
    numbers = call.window, call.N, call.T, call.intervals
    constants = {"H": H, "G": HQ // H, "D": D, "BM": block}
    launch(
        rows_kernel,
        blocks * HQ,
        (
            q, k, o, do, lse, sink, gates, marks, cu_seqlens, rows, pairs, turns, needed, latest,
            row_sums, column_sums, dsink,
        ),
        (call.scale, call.floor, *numbers),
        constants,
    )  # fmt: skip
    scale = call.scale / LOG2E.value
    launch(
        hopper_backward_kernel,
        programs,
        (dk, dv, turns, counters, needed, latest, row_sums, column_sums, cu_seqlens),
        (
            *(descriptor(x, block, D) for x in (q, k, v)),
            descriptor(k, block, D // 2) if D == 64 else None,
            descriptor(do, block, D),
            _pieces(rows),
            None if pairs is None else _pieces(pairs),
            *(descriptor(x, block, D) for x in (dk, dv)),
            _pieces(sums),
            call.scale, scale, *numbers,
        ),
        {"H": H, "G": HQ // H, "STAGES": _STAGES[D], "num_warps": 4},
    )  # fmt: skip
    launch(
        dq_kernel,
        blocks * HQ,
        (sums, row_sums, column_sums, cu_seqlens, dq, dk, dv, dgate_sum),
        (scale, call.N, call.T, call.intervals, blocks),
        constants,
    )
    if g is not None:
        launch(
            gate_kernel,
            blocks * cdiv(HQ, _HEADS),
            (row_sums, dgate_sum, cu_seqlens, dg),
            (call.N, call.T, call.intervals, blocks),
            {"HQ": HQ, "BN": block, "BH": _HEADS},
        )
    if dsink is not None:
        dsink = dsink.sum(0).to(sink.dtype)
    return dq, dk, dv, dg, dsink
