"""The softmax engine's backward on Hopper: what goes before and after ``hopper_keys``; who gets it.

With gates, a block of queries needs the keys from an interval on: it is known before any product,
from the bound of ``blocks.first_interval_needed``, and no program comes to blocks without need.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fla.ops.attn import triton as portable
from fla.ops.attn.backward import gate_kernel
from fla.ops.attn.blocks import (
    LOG2E,
    SEARCH,
    SPAN,
    Call,
    first_interval_needed,
    gate_marks,
    gate_sums,
    gates,
    largest_norm,
    tile,
)
from fla.ops.attn.hopper_keys import hopper_backward_kernel
from fla.ops.attn.hopper_steps import KEYS, ROWS
from fla.ops.common.boundary import absent
from fla.ops.common.hopper import descriptor
from fla.ops.common.kernels import cdiv, dense
from fla.ops.common.launch import launch

# Shorter calls, and calls of fewer blocks of keys, have not been measured
SHORTEST = 4096
FEWEST = 512
HEAD = 128
# Heads of a program that sums a gate's gradient: it writes them side by side.
_HEADS = 16


@triton.jit
def query_block(i, N, T, HQ: tl.constexpr, BM: tl.constexpr):
    """What program i owns, a block i_s of BM queries of a head and sequence; and its number.

    Blocks of a head and sequence are counted to the end of its last interval.
    """
    blocks = tl.cdiv(T, BM)
    i_h = i % HQ
    i_s = i // HQ % blocks
    n = i // HQ // blocks
    return i_h, i_s, n, (i_h * N + n) * tl.cdiv(T, SPAN) * (SPAN // BM) + i_s


@triton.jit
def in_two(x):
    """A number in fp64 as two in fp32."""
    high = x.to(tl.float32)
    return high, (x - high).to(tl.float32)


@triton.jit(do_not_specialize=["N", "T", "intervals"])
def rows_kernel(
    q, o, do, lse, sums, marks, rows, keys, turns, needed, latest, row_sums, column_sums,
    scale, floor, N, T, intervals,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What is to be known of BM queries of one head; and zeros, where sums are to come.

    Reads o and do [BM, D] and lse [BM].  Writes −lse and Δ to rows [blocks, 2, BM], and the first
    block of keys that is needed to turns.  What is behind T weighs nothing.

    With gates rows are [blocks, 2, 4, BM]: for keys of the same interval −lse, Δ, since and rest;
    for others since − lse, Δ, and in two floats the sum of all gates before the interval.  To keys
    [intervals, 2, 2, SPAN] goes what the interval's keys bring along: since and rest, or until and,
    as its first two floats, the sum of all gates to the interval's end.  Which keys are needed also
    goes to needed and to latest, see ``hopper_steps.new_steps``.
    """
    i_h, i_s, n, block = query_block(tl.program_id(0), N, T, H * G, BM)
    o_m = tl.arange(0, BM)
    o_i = i_s * BM + o_m
    m_i = o_i < T
    row = n.to(tl.int64) * T + i_s * BM
    at = row * (H * G * D) + i_h * D
    b_o = tile(o + at, o_m, m_i, H * G * D, D, D).to(tl.float32)
    b_do = tile(do + at, o_m, m_i, H * G * D, D, D).to(tl.float32)
    b_delta = tl.sum(b_o * b_do, 1)
    p_lse = lse + (n * (H * G) + i_h).to(tl.int64) * T
    b_lse = tl.load(p_lse + o_i, mask=m_i, other=float("inf")) * LOG2E
    SIZE: tl.constexpr = 2 * BM if sums is None else 8 * BM
    p_rows = rows + block.to(tl.int64) * SIZE + o_m
    tl.store(p_rows, -b_lse)
    tl.store(p_rows + BM, b_delta)
    p_sums = block.to(tl.int64) * BM + o_m
    if row_sums is not None:
        tl.store(row_sums + p_sums, tl.zeros([BM], tl.float32))
    first = i_s * 0
    if sums is not None:
        tl.store(column_sums + p_sums, tl.zeros([BM], tl.float32))
        slot = n * tl.cdiv(T, SPAN)
        i_i = i_s // (SPAN // BM)
        p_since, p_rest, p_until = gate_sums(sums, i_h, slot, intervals, H * G)
        p_total, p_rise, p_norm = gate_marks(marks, i_h, i_h // G, slot, intervals, H * G)
        b_since = tl.load(p_since + o_i)
        b_reach = b_since - b_lse
        b_before = tl.zeros([SEARCH], tl.float64)
        for start in range(0, i_i, SEARCH):
            o_x = start + tl.arange(0, SEARCH)
            b_before += tl.load(p_total + o_x, mask=o_x < i_i, other=0.0).to(tl.float64)
        before = tl.sum(b_before, 0)
        high, low = in_two(before)
        tl.store(p_rows + 2 * BM, b_since)
        tl.store(p_rows + 3 * BM, tl.load(p_rest + o_i))
        tl.store(p_rows + 4 * BM, b_reach)
        tl.store(p_rows + 5 * BM, b_delta)
        tl.store(p_rows + 6 * BM, high + tl.zeros([BM], tl.float32))
        tl.store(p_rows + 7 * BM, low + tl.zeros([BM], tl.float32))
        if i_s % (SPAN // BM) == 0:
            o_j = tl.arange(0, SPAN)
            p_keys = keys + (block // (SPAN // BM)).to(tl.int64) * (4 * SPAN) + o_j
            high, low = in_two(before + tl.load(p_total + i_i))
            tl.store(p_keys, tl.load(p_since + i_i * SPAN + o_j))
            tl.store(p_keys + SPAN, tl.load(p_rest + i_i * SPAN + o_j))
            tl.store(p_keys + 2 * SPAN, tl.load(p_until + i_i * SPAN + o_j))
            tl.store(p_keys + 3 * SPAN, tl.where(o_j == 0, high, low))
        norm = largest_norm(tile(q + at, o_m, m_i, H * G * D, D, D)) * scale
        first = first_interval_needed(p_total, p_rise, p_norm, i_i, norm, tl.max(b_reach, 0), floor)
        tl.store(needed + block, first)
        p_latest = latest + (n * H + i_h // G) * tl.cdiv(T, SPAN) + first
        tl.atomic_max(p_latest, i_s, sem="relaxed")
        tl.atomic_add(p_latest + N * H * tl.cdiv(T, SPAN), 1, sem="relaxed")
    tl.store(turns + block, first)


@triton.jit(do_not_specialize=["N", "T"])
def dq_kernel(
    sums, rows, row_sums, column_sums, sink, dq, dgate_sum, dsink, scale, N, T,
    HQ: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dq of BM queries of one head, from sums [blocks, BM · BK] as ``hopper_keys.offer`` has them.

    With gates also subtracts what their tokens have as keys from their row_sums, and adds that up.
    """
    i_h, i_s, n, block = query_block(tl.program_id(0), N, T, HQ, BM)
    b_dq = tl.load(sums + block.to(tl.int64) * (BM * BK) + tl.arange(0, BM * BK))
    W: tl.constexpr = BK // 2
    b_dq = b_dq.reshape([2, W // 8, 4, 8, 4, 2, 2]).permute((2, 5, 3, 0, 1, 4, 6)).reshape([BM, BK])
    o_m = tl.arange(0, BM)
    o_i = i_s * BM + o_m
    o_d = tl.arange(0, BK)
    at = ((n.to(tl.int64) * T + o_i)[:, None] * HQ + i_h) * K + o_d[None, :]
    m = (o_i < T)[:, None] & (o_d < K)[None, :]
    tl.store(dq + at, (b_dq * scale).to(dq.dtype.element_ty), mask=m)
    if row_sums is not None:
        p_row = row_sums + block.to(tl.int64) * BM + o_m
        b_row = tl.load(p_row)
    if sink is not None:
        p_rows = rows + block.to(tl.int64) * SIZE + o_m
        b_delta = tl.load(p_rows + BM)
        # as in ``backward_queries``
        b_share = tl.exp2(tl.load(sink + i_h).to(tl.float32) * LOG2E + tl.load(p_rows))
        b_dsink = -b_share * (b_row + (1.0 - b_share) * b_delta)
        tl.store(dsink + tl.program_id(0), tl.sum(b_dsink, 0))
    if column_sums is not None:
        b_row -= tl.load(column_sums + block.to(tl.int64) * BM + o_m)
        tl.store(p_row, b_row)
        blocks = tl.cdiv(T, BM)
        tl.store(dgate_sum + (i_h * N + n) * blocks + i_s, tl.sum(b_row, 0))


def backward(do, q, k, v, g, sink_bias, cu_seqlens, o, lse, options):
    """Return the gradients of q, k, v, g and the sink."""
    if cu_seqlens is None and _takes(q, v, options):
        signed, scale = portable.rising(q, options.scale)
        tensors = dense(do, signed, k, v, o)
        if all(x.data_ptr() % 16 == 0 for x in tensors):
            g, sink_bias = dense(g, sink_bias)
            call = Call(q, v, None, scale, None)
            marks = gates(call, g, tensors[2], None)
            dq, dk, dv, *more = run_backward(call, *tensors, lse, g, *marks, sink_bias)
            dq = dq if scale == options.scale else dq.neg_()
            return dq, dk, dv, *(absent(q) if x is None else x for x in more)
    return portable.backward(do, q, k, v, g, sink_bias, cu_seqlens, o, lse, options)


def _takes(q: Tensor, v: Tensor, options) -> bool:
    B, T, H, V = v.shape
    window = options.window_size
    return (
        q.shape[-1] == V == HEAD
        and T >= SHORTEST
        and cdiv(T, KEYS.value) * H * B >= FEWEST
        and (window is None or window >= T)
    )


def _lines(x: Tensor) -> TensorDescriptor:
    """x [lines, 1, 1, size], of which one line at a time is copied."""
    layout = gl.NVMMASharedLayout(0, 32, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, 1, x.shape[-1]], layout)


def run_backward(call: Call, do, q, k, v, o, lse, g, gates, marks, sink):
    """Launch the kernels: dq, dk, dv, dg and the sink's gradient, None for what there is not."""
    B, T, HQ, D = q.shape
    H = v.shape[2]
    block, keys = ROWS.value, KEYS.value
    blocks, programs = B * cdiv(T, block), cdiv(T, keys) * H * B
    numbered = HQ * call.intervals * (keys // block)
    # how many floats a block of queries has in rows, and how many of them a step reads
    size, part = (2 * block, 2 * block) if g is None else (8 * block, 4 * block)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rows = lse.new_empty(numbered * size // part, 1, 1, part)
    sums = lse.new_empty(numbered, block * D)
    turns = torch.empty(numbered, device=q.device, dtype=torch.int32)
    # the next ticket, and beside it, as far as kernels want it, what counts queries
    counters = turns.new_zeros(4 if g is None else 4 + 2 * programs)
    pairs = needed = latest = row_sums = column_sums = dg = dgate_sum = dsink = None
    if g is not None or sink is not None:
        row_sums = lse.new_empty(numbered * block)
    if g is not None:
        pairs = lse.new_empty(HQ * call.intervals * 2, 1, 1, 2 * keys)
        needed = torch.empty_like(turns)
        latest = counters[4:]
        column_sums = lse.new_empty(numbered * block)
        dg = torch.empty_like(g)
        dgate_sum = lse.new_empty(HQ, blocks)
    if sink is not None:
        dsink = lse.new_empty(blocks, HQ)
    launch(
        rows_kernel,
        blocks * HQ,
        (
            q, o, do, lse, gates, marks, rows, pairs, turns, needed, latest, row_sums, column_sums,
        ),
        (call.scale, call.floor, B, T, call.intervals),
        {"H": H, "G": HQ // H, "D": D, "BM": block},
    )  # fmt: skip
    scale = call.scale / LOG2E.value
    with torch.cuda.device_of(q):
        hopper_backward_kernel[(programs,)](
            *(descriptor(x, block, D) for x in (q, k, v, do)),
            _lines(rows),
            None if pairs is None else _lines(pairs),
            *(descriptor(x, block, D) for x in (dk, dv)),
            sums, turns, counters, needed, latest, row_sums, column_sums,
            call.scale, scale, B, T, H, HQ // H, num_warps=4,
        )  # fmt: skip
    launch(
        dq_kernel,
        blocks * HQ,
        (sums, rows, row_sums, column_sums, sink, dq, dgate_sum, dsink),
        (scale, B, T),
        {"HQ": HQ, "K": D, "SIZE": size, "BM": block, "BK": D},
    )
    if g is not None:
        launch(
            gate_kernel,
            blocks * cdiv(HQ, _HEADS),
            (row_sums, dgate_sum, None, dg),
            (B, T, call.intervals, blocks),
            {"HQ": HQ, "BN": block, "BH": _HEADS},
        )
    if dsink is not None:
        dsink = dsink.sum(0).to(sink.dtype)
    return dq, dk, dv, dg, dsink
