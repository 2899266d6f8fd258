"""The scans that carry a state over time, and segments that let them run side by side.

Where heads are too few to fill a chip, time falls into segments, in three steps: *summarise* what
each segment adds to a state and how much it keeps of one that enters, *join* these into the states
that enter each segment, and *run* all of them.  A summary carries nothing from far: it is made of a
segment's pieces, side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.common.kernels import (
    LOG2E,
    cdiv,
    chunks_in,
    operand,
    power,
    product,
    sequence,
    sequences_in,
)
from fla.ops.common.launch import launch
from fla.ops.simple_gla.blocks import Call, Line, step_weights

_BLOCK = 512


@triton.jit(do_not_specialize=["N", "T", "tokens", "piece", "units", "pieces", "scale"])
def summary_kernel(
    k, v, q, do, sums, rests, g_gamma, norm, dnorm, state, z, dstate, dz, added, kept,
    cu_seqlens, scale, N, T, tokens, piece, units, pieces,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BX: tl.constexpr,
    BZ: tl.constexpr, V_FIRST: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What a piece adds to a state, or to a state's gradient, and what share of one it keeps.

        S ← w S + Σ_j w_j k_j v_jᵀ                dS ← w dS + Σ_i w_i q_i do_iᵀ

    A program owns a block [BX, BZ] of one or the other of one head in one of the ``units`` of
    ``piece`` tokens whose summary a segment waits for; the last segment's, ``pieces`` units, none
    does.  added [sides, units, H, K V + K] has z behind the state, kept is [sides, units, H].
    """
    D: tl.constexpr = k.dtype.element_ty
    NK: tl.constexpr = (K + BX - 1) // BX
    NV: tl.constexpr = (V + BZ - 1) // BZ
    pid = tl.program_id(0)
    i_v = pid % NV
    i_k = pid // NV % NK
    i_h = pid // (NV * NK) % H
    unit = pid // (NV * NK * H)
    side = unit // units  # 0 for states, 1 for their gradients
    unit = unit % units
    back = (side == 1) != REVERSE
    x = k
    y = v
    if side == 1:
        x = q
        y = do
    o_c = tl.arange(0, C)
    o_k = i_k * BX + tl.arange(0, BX)
    o_v = i_v * BZ + tl.arange(0, BZ)
    m_k = o_k < K
    m_v = o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    p_x = o_c[:, None] * (H * K) + o_k[None, :]  # [C, BX]
    p_y = o_c[:, None] * (H * V) + o_v[None, :]  # [C, BZ]
    p_kv = o_k[:, None] * V + o_v[None, :]  # [BX, BZ]
    p_s = o_v[None, :] * K + o_k[:, None] if V_FIRST else p_kv
    begin = (unit + tl.where(back, pieces, 0)) * piece
    stop = tl.minimum(begin + piece, tokens)
    first, last = sequences_in(cu_seqlens, N, T, tokens, begin, stop)
    last = tl.minimum(last, N)
    place = ((side * units + unit) * H + i_h).to(tl.int64)
    added += place * (K * V + K)
    # a piece in which no sequence goes on adds nothing and keeps nothing
    tl.store(added + p_kv, tl.zeros([BX, BZ], tl.float32), mask=m_s)
    if NORMALIZE:
        tl.store(added + K * V + o_k, tl.zeros([BX], tl.float32), mask=m_k & (i_v == 0))
    tl.store(kept + place, -1.0, mask=(i_k == 0) & (i_v == 0))
    gamma = 0.0
    if g_gamma is not None:
        gamma = tl.load(g_gamma + i_h).to(tl.float32) * LOG2E
    if sums is not None:
        sums += i_h.to(tl.int64) * tokens
        if rests is not None:
            rests += i_h.to(tl.int64) * tokens

    for i_n in range(first, last):
        bos, length, live = sequence(cu_seqlens, i_n, N, T, tokens)
        c_first, c_last, count = chunks_in(bos, length, begin, stop, C)
        head = bos >= begin
        tail = (c_last == count) & ((c_first < count) | (length == 0))
        opens = tl.where(back, tail, head)
        closes = tl.where(back, head, tail)
        at = (i_n * H + i_h).to(tl.int64)
        steps = tl.where(closes, 0, c_last - c_first)  # only what goes on is summarised
        b_s = tl.zeros([BX, BZ], tl.float32)
        b_z = tl.zeros([BX], tl.float32)
        if state is not None:
            m = opens & (side == 0)
            b_s += tl.load(state + at * (K * V) + p_s, mask=m_s & m, other=0.0).to(tl.float32)
        if dstate is not None:
            m = opens & (side == 1)
            b_h = tl.load(dstate + at * (K * V) + p_s, mask=m_s & m, other=0.0)
            b_s += b_h.to(tl.float32) / scale
        if NORMALIZE:
            if z is not None:
                m = opens & (side == 0)
                b_z += tl.load(z + at * K + o_k, mask=m_k & m, other=0.0).to(tl.float32)
            if dz is not None:
                m = opens & (side == 1)
                b_z += tl.load(dz + at * K + o_k, mask=m_k & m, other=0.0).to(tl.float32) / scale
        s_sum = 0.0
        for i in tl.range(0, steps, num_stages=STAGES):
            c = tl.where(back, c_last - 1 - i, c_first + i)
            there = tl.minimum(live - c * C, C)
            token = (bos + c * C).to(tl.int64)
            m_t = o_c < there
            m_x = m_t[:, None] & m_k[None, :]
            m_y = m_t[:, None] & m_v[None, :]
            b_x = tl.load(x + (token * H + i_h) * K + p_x, mask=m_x, other=0.0)
            b_y = tl.load(y + (token * H + i_h) * V + p_y, mask=m_y, other=0.0)
            if PRECISION is not None:
                b_x = b_x.to(tl.float32)
                b_y = b_y.to(tl.float32)
            # Triton 3.6 gives a tile that is summed, and multiplied as it was copied, one stage too
            # few: the next copy but one would overtake the product.  So it goes through registers.
            if (sums is not None) or (g_gamma is not None) or (norm is not None) or NORMALIZE:
                b_w = tl.where(m_t, 1.0, 0.0)
                if (sums is not None) or (g_gamma is not None):
                    b_into, b_out, s_all = step_weights(
                        sums, rests, gamma, token, there, C, REVERSE
                    )
                    b_w = tl.where(side == 1, b_into, b_out)
                    b_s *= power(s_all)
                    s_sum += s_all
                b_e = b_w
                if norm is not None:
                    p = (token + o_c) * H + i_h
                    b_w = tl.where(side == 1, b_w / tl.load(norm + p, mask=m_t, other=1.0), b_w)
                    b_d = tl.load(dnorm + p, mask=m_t, other=0.0)
                    b_e = tl.where(side == 1, b_w * b_d, b_w)
                if NORMALIZE:
                    b_z += tl.sum(b_x.to(tl.float32) * b_e[:, None], 0)
                b_x = operand(b_x * b_w[:, None], D, PRECISION)  # rounded as in the walk
            b_s = product(tl.trans(b_x), b_y, b_s, PRECISION)
        m = steps > 0
        tl.store(added + p_kv, b_s, mask=m_s & m)
        if NORMALIZE:
            tl.store(added + K * V + o_k, b_z, mask=m_k & (m & (i_v == 0)))
        share = tl.where(opens, -1.0, power(s_sum))
        tl.store(kept + place, share, mask=m & (i_k == 0) & (i_v == 0))


@triton.jit(do_not_specialize=["units", "pieces", "heads"])
def join_kernel(
    carry, added, kept, units, pieces, heads,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """S ← kept S + added, piece by piece, and what enters each segment of so many ``pieces``.

    Of what is of another sequence nothing is kept, whatever it may be: then ``kept`` is negative.
    A program owns BLOCK elements of a state of one head, or of its gradient, which goes the other
    way.  added [sides, units, heads, SIZE], carry [sides, segments, heads, SIZE].
    """
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i_h = tl.program_id(0) // blocks
    side = i_h // heads
    back = (side == 1) != REVERSE
    i_h = i_h % heads
    o = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    last = units // pieces
    carry += side * (last + 1) * heads.to(tl.int64) * SIZE + o
    b_s = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, units, num_stages=4):
        unit = side * units + tl.where(back, units - 1 - i, i)
        at = (unit * heads + i_h).to(tl.int64)
        b_added = tl.load(added + at * SIZE + o, mask=o < SIZE, other=0.0)
        s_kept = tl.load(kept + at)
        segment = tl.where(back, last - i // pieces, i // pieces)
        m = (o < SIZE) & (i % pieces == 0)
        tl.store(carry + (segment * heads + i_h).to(tl.int64) * SIZE, b_s, mask=m)
        b_s = tl.where(s_kept < 0, 0.0, b_s * s_kept) + b_added
    segment = tl.where(back, 0, last)
    tl.store(carry + (segment * heads + i_h).to(tl.int64) * SIZE, b_s, mask=o < SIZE)


def join(added: Tensor, kept: Tensor, pieces: int, reverse: bool) -> Tensor:
    """Join the summaries [sides, units, heads, size] in their order of time: ``join_kernel``."""
    sides, units, heads, size = added.shape
    carry = added.new_empty(sides, units // pieces + 1, heads, size)
    launch(
        join_kernel,
        sides * heads * cdiv(size, _BLOCK),
        (carry, added, kept),
        (units, pieces, heads),
        {"SIZE": size, "BLOCK": _BLOCK, "REVERSE": reverse},
    )
    return carry


LINES = (
    Line(2, 64, 64, 64, 4, 3, shared=99),
    Line(2, 512, 64, 128, 4, 3, shared=99),  # two programs a multiprocessor, and no spilling
    Line(4, 512, 64, 64, 4, 2, shared=99),  # tf32x3 holds each operand twice
)


def summarise(
    call: Call, segment: int, operands, decays, starts, cu_seqlens, scale, options, sides: int = 1
) -> Tensor:
    """The states that enter each segment, [sides, segments, H, K V + K].

    ``operands`` are k, v, q, do and the normaliser with its gradient, the last four for the second
    side; ``starts`` a state and a z for each side.
    """
    K, V = call.K, call.V
    piece = call.piece(segment)
    pieces = segment // piece
    units = (call.units(segment) - 1) * pieces
    added = operands[0].new_empty(sides, units, call.H, K * V + K, dtype=torch.float32)
    kept = added.new_empty(added.shape[:3])
    line = call.choose(LINES, K)
    *operands, norm, dnorm = operands
    launch(
        summary_kernel,
        kept.numel() * cdiv(K, line.BX) * cdiv(V, line.BZ),
        (*operands, *decays, norm, dnorm, *starts, added, kept, cu_seqlens),
        (scale, call.N, call.T, call.tokens, piece, units, pieces),
        call.constants
        | line.constants
        | {"K": K, "V": V, "V_FIRST": options.state_v_first, "NORMALIZE": options.normalize},
    )
    return join(added, kept, pieces, options.reverse)
