"""One step of decoding: keys split over the chip, partial results merged in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.attn.blocks import LEAST, STEEPEST_GATE, Call, Line, own, put_tile, rising, tile
from fla.ops.common.kernels import LOG2E, cdiv, first_slot, multiprocessors, power_of_two, product
from fla.ops.common.launch import Relaunch
from fla.ops.common.once import found_by

# BM is the most query heads of a program: those of a key head share what it reads, up to 32.  Three
# blocks of keys and values on the way keep memory busy; larger heads fill it with two.
LINES = (
    Line(2, 128, 128, 32, 64, 4, 3, shared=97),
    Line(2, 256, 512, 32, 32, 8, 2, shared=73),
    Line(4, 128, 128, 32, 32, 4, 2, shared=77),
    Line(4, 256, 256, 16, 16, 4, 2, shared=68),
)
# Programs that the chip is given for each multiprocessor, and the fewest keys that are worth one.
_PROGRAMS = 8
_FEWEST_KEYS = 256
# Parts that are merged at a time
_PARTS = 16


@triton.jit
def keys_of(cu_seqlens, n, T, window):
    """[first, stop) of the keys that the query of sequence n sees; a single one sees all."""
    if cu_seqlens is None:
        first = n * 0
        stop = T
    else:
        first = tl.load(cu_seqlens + n).to(tl.int32)
        stop = tl.load(cu_seqlens + n + 1).to(tl.int32)
    if window is not None:
        first = tl.maximum(first, stop - window)
    return first, stop


@triton.jit(do_not_specialize=["window", "N", "T", "size", "slots", "splits"])
def split_kernel(
    q,
    k,
    v,
    g,
    cu_seqlens,
    parts,
    marks,
    scale,
    gate_scale,
    window,
    N,
    T,
    size,
    slots,
    splits,
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
    """What ``size`` keys of one head give to their BM queries, one of each query head.

        s_j = scale q·k_j + g_{j+1} + … to the split's end and the key behind it
        most = max s    sums = Σ exp(s_j − most)    o = Σ exp(s_j − most) v_j    total = Σ g_{j+1}

    Reads q [BM, K], k [size, K], v [size, V], g [size, BM]; writes o [BM, V] to parts
    [slots, HQ, V] and the others [BM] to marks [3, slots, HQ], in fp32.
    """
    HEADS: tl.constexpr = H * ((G + BM - 1) // BM)
    if window is None:
        i, n, i_s, bos, _length, _live = own(cu_seqlens, tl.program_id(0), N, T, HEADS, size, False)
    else:
        i = tl.program_id(0) % HEADS
        n = tl.program_id(0) // HEADS // splits
        i_s = tl.program_id(0) // HEADS % splits
    if n >= N:
        return
    first, end = keys_of(cu_seqlens, n, T, window)
    first += i_s * size
    if first >= end:
        return
    stop = tl.minimum(first + size, end)
    i_h = i % H
    o_g = i // H * BM + tl.arange(0, BM)
    m_g = o_g < G
    o_n = tl.arange(0, BN)
    b_q = tile(q + n.to(tl.int64) * (H * G * K) + i_h * G * K, o_g, m_g, K, K, BK)
    p_k = k + i_h * K
    p_v = v + i_h * V

    b_o = tl.zeros([BM, BV], tl.float32)
    b_most = tl.full([BM], LEAST, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_total = tl.zeros([BM], tl.float32)
    blocks = tl.cdiv(stop - first, BN)
    for i_b in range(blocks):
        start = first + (blocks - 1 - i_b) * BN
        o_j = start + o_n
        m_j = o_j < stop
        b_k = tile(p_k + start.to(tl.int64) * (H * K), o_n, m_j, H * K, K, BK)  # [BN, BK]
        b_s = product(b_q, tl.trans(b_k), None, PRECISION) * scale  # [BM, BN]
        if g is not None:
            p_g = g + (start.to(tl.int64) + 1) * (H * G) + i_h * G
            b_g = tl.load(
                p_g + o_n[None, :] * (H * G) + o_g[:, None],
                mask=(m_j & (o_j + 1 < end))[None, :] & m_g[:, None],
                other=0.0,
            )
            b_g = tl.clamp(b_g.to(tl.float32), STEEPEST_GATE, -STEEPEST_GATE) * gate_scale
            b_s += tl.cumsum(b_g, 1, reverse=True) + b_total[:, None]
            b_total += tl.sum(b_g, 1)
        b_s = tl.where(m_j[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_most, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_fall = tl.exp2(b_most - b_new)
        b_most = b_new
        b_sum = b_sum * b_fall + tl.sum(b_p, 1)
        b_v = tile(p_v + start.to(tl.int64) * (H * V), o_n, m_j, H * V, V, BV)  # [BN, BV]
        b_o = product(b_p.to(b_v.dtype), b_v, b_o * b_fall[:, None], PRECISION)

    if window is None:
        slot = first_slot(cu_seqlens, n, bos, T, size) + i_s
    else:
        slot = n * splits + i_s
    at = slot.to(tl.int64) * (H * G) + i_h * G
    put_tile(parts + at * V, b_o, o_g, m_g, V, V, BV)
    p_marks = marks + at + o_g
    plane = slots.to(tl.int64) * (H * G)
    tl.store(p_marks, b_most, mask=m_g)
    tl.store(p_marks + plane, b_sum, mask=m_g)
    if g is not None:
        tl.store(p_marks + 2 * plane, b_total, mask=m_g)


@triton.jit(do_not_specialize=["window", "N", "T", "size", "slots", "splits"])
def merge_kernel(
    parts,
    marks,
    sink,
    cu_seqlens,
    o,
    window,
    N,
    T,
    size,
    slots,
    splits,
    HQ: tl.constexpr,
    V: tl.constexpr,
    BS: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
):
    """o [V] of one head of one sequence, from the parts that ``split_kernel`` wrote.

    A part's logits lack the gates behind it, which are the totals of the later parts.  The parts
    are taken from the last to the first, BS at a time.
    """
    n = tl.program_id(0) // HQ
    i_h = tl.program_id(0) % HQ
    first, stop = keys_of(cu_seqlens, n, T, window)
    if window is None:
        slot = first_slot(cu_seqlens, n, first, T, size)
    else:
        slot = n * splits
    count = tl.cdiv(stop - first, size)
    at = slot.to(tl.int64) * HQ + i_h
    p_most = marks + at
    plane = slots.to(tl.int64) * HQ
    o_v = tl.arange(0, BV)
    m_v = o_v < V

    b_o = tl.zeros([BV], tl.float32)
    b_most = tl.full([], LEAST, tl.float32)
    b_sum = tl.full([], 0.0, tl.float32)
    if sink is not None:
        b_most = tl.load(sink + i_h).to(tl.float32) * LOG2E
        b_sum += 1.0
    between = tl.full([], 0.0, tl.float32)
    for i in range(0, count, BS):
        o_s = count - 1 - i - tl.arange(0, BS)
        m_s = o_s >= 0
        b_s = tl.load(p_most + o_s * HQ, mask=m_s, other=float("-inf"))
        if GATED:
            m_later = m_s & (o_s + 1 < count)
            b_later = tl.load(p_most + 2 * plane + (o_s + 1) * HQ, mask=m_later, other=0.0)
            b_s += between + tl.cumsum(b_later, 0)
            between += tl.sum(b_later, 0)
        b_new = tl.maximum(b_most, tl.max(b_s, 0))
        b_weight = tl.exp2(b_s - b_new)  # [BS]
        b_fall = tl.exp2(b_most - b_new)
        b_most = b_new
        b_part = tl.load(
            parts + (at + o_s[:, None] * HQ) * V + o_v[None, :],
            mask=m_s[:, None] & m_v[None, :],
            other=0.0,
        )  # [BS, BV]
        b_sums = tl.load(p_most + plane + o_s * HQ, mask=m_s, other=0.0)
        b_o = b_o * b_fall + tl.sum(b_part * b_weight[:, None], 0)
        b_sum = b_sum * b_fall + tl.sum(b_sums * b_weight, 0)
    b_o /= tl.where(b_sum > 0, b_sum, 1.0)
    p_o = o + (n.to(tl.int64) * HQ + i_h) * V + o_v
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_v)


def run_decoding(q, k, v, g, sink, cu_seqlens, options) -> Tensor:
    """Launch ``split_kernel`` and ``merge_kernel``: o [1, N, HQ, V]."""
    q, scale = rising(q, options.scale)
    found, V = found_by(options), v.shape[-1]  # of a part, where v is in parts
    step = found.get((_Step, V))
    if step is None:
        step = found[_Step, V] = _Step(q, k, v, g is not None, cu_seqlens, scale, options)
    N, HQ = q.shape[1:3]
    o = q.new_empty(1, N, HQ, V)
    parts = q.new_empty(step.slots, HQ, V, dtype=torch.float32)
    marks = q.new_empty(3, step.slots, HQ, dtype=torch.float32)
    step.split(q, k, v, g, cu_seqlens, parts, marks)
    step.merge(parts, marks, sink, cu_seqlens, o)
    return o


class _Step:
    """The launches of a step of decoding, and how many parts of a head's output they pass on."""

    def __init__(self, q, k, v, gated, cu_seqlens, scale, options):
        N, HQ = q.shape[1:3]
        T, H, V = v.shape[1:]
        call = Call(k, v, cu_seqlens, scale, options.window_size)
        line = call.choose(LINES)
        BM = min(line.BM, max(power_of_two(HQ // H), 16))
        size = power_of_two(cdiv(T * H, _PROGRAMS * multiprocessors(q.device)))
        size = max(size, _FEWEST_KEYS)
        splits = 0
        self.slots = call.blocks(size)
        if call.window is not None:
            splits = cdiv(call.window, size)
            self.slots = N * splits
        numbers = call.window, N, T, size, self.slots, splits
        self.split = Relaunch(
            split_kernel,
            self.slots * H * cdiv(HQ // H, BM),
            (call.scale, options.gate_scale * LOG2E.value, *numbers),
            {**call.constants, **line.constants, "G": HQ // H, "BM": BM},
        )
        self.merge = Relaunch(
            merge_kernel,
            N * HQ,
            numbers,
            {"HQ": HQ, "V": V, "BS": _PARTS, "BV": call.constants["BV"], "GATED": gated},
        )
