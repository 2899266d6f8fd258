"""What the stages of the softmax engine share: which block a program owns, how gates join blocks.

Blocks are counted from the start of their sequence.  A gate joins query i and key j by the sum
g_{j+1} + … + g_i.  Inside an interval of ``SPAN`` tokens that is the difference of two running
sums, each held in two floats.  Between intervals it is the sum of what follows the key in its own,
the totals of those between, and what precedes the query in its own.  So near pairs never meet a
large number.  Logarithms are to the base 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.common.kernels import (
    LOG2E,
    SEARCH,
    cdiv,
    first_line,
    first_slot,
    power_of_two,
    sequence,
    sequence_at,
    shared_memory,
)
from fla.ops.common.launch import launch

SPAN = tl.constexpr(128)
# The least finite number: what the largest of no logits is
LEAST = tl.constexpr(-3.4028234663852886e38)
# A token with this gate forgets all before it, and with its negative sees nothing else; beside
# anything steeper a sum would lose its digits.
STEEPEST_GATE = tl.constexpr(-1e7)

# Whether blocks that do not show are left out.  For all threads: autograd has one of its own.
_leave_out = [True]


@contextlib.contextmanager
def nothing_left_out() -> Iterator[None]:
    """Inside, every visible key is met, however far a gate has put it; for tests and benchmarks."""
    _leave_out.append(False)
    try:
        yield
    finally:
        _leave_out.pop()


@dataclasses.dataclass(frozen=True)
class Line:
    """One launch configuration, for elements of up to ``bytes`` and heads of up to K and V.

    ``shared`` is the most shared memory, in KiB, that it takes up to sm_90; what newer tensor cores
    take beyond it, their GPUs have.  A ``long`` line is for dense calls without a window: smaller
    blocks waste less at the edges of short rows.
    """

    bytes: int
    K: int
    V: int
    BM: int
    BN: int
    warps: int
    stages: int
    shared: int
    long: bool = False

    @functools.cached_property
    def constants(self) -> dict[str, int]:
        return {
            "BM": self.BM,
            "BN": self.BN,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def hiding(window: int | None, T: int) -> int | None:
    """A window, or None where it hides none of T tokens."""
    return None if window is None or window >= T else window


def rising(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and a scale that is not negative: the largest product is then the largest logit."""
    return (q, scale) if scale >= 0 else (-q, -scale)


class Call:
    """What one call's kernels are launched with, beside its tensors; no scale is below zero."""

    def __init__(self, q, v, cu_seqlens: Tensor | None, scale: float, window: int | None):
        B, self.T, HQ, K = q.shape
        H, V = v.shape[2:]
        self.packed = cu_seqlens is not None
        self.N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.scale = max(scale * LOG2E.value, 1e-30)  # zero times a logit of −inf would be NaN
        self.window = hiding(window, self.T)
        self.floor = -(17 + math.log(self.T)) * LOG2E.value if _leave_out[-1] else -math.inf
        self.long = self.window is None and not self.packed
        self.intervals = self.blocks(SPAN.value)
        self.shared = shared_memory(q.device)
        self._sizes = q.element_size(), K, V
        self.constants = {
            "H": H,
            "G": HQ // H,
            "K": K,
            "V": V,
            "BK": max(power_of_two(K), 16),
            "BV": max(power_of_two(V), 16),
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else None,
        }

    @property
    def numbers(self) -> tuple[float | int | None, ...]:
        """Scale, floor, window, N, T and intervals, as most kernels take them."""
        return self.scale, self.floor, self.window, self.N, self.T, self.intervals

    def choose(self, lines: tuple[Line, ...]) -> Line:
        """The first line that takes this call on its GPU."""
        size, K, V = self._sizes

        def takes(line: Line) -> bool:
            fits = size <= line.bytes and K <= line.K and V <= line.V
            return fits and line.long <= self.long

        return first_line(lines, self.shared, takes)

    def blocks(self, size: int) -> int:
        """How many blocks the grid of one head walks, whatever the boundaries.

        Packed, sequence n owns the slots from ⌊cu_seqlens[n] / size⌋ + n on, which always suffice,
        and the tokens behind the last one count as one more sequence.
        """
        if self.packed:
            return self.T // size + self.N + 1
        return self.N * cdiv(self.T, size)


@triton.jit
def own(cu_seqlens, i, N, T, HEADS: tl.constexpr, BLOCK, LAST_FIRST: tl.constexpr):
    """What program i of ``Call.blocks`` × HEADS owns: a head of block i_b of sequence n.

    Programs start in the order of their numbers; with LAST_FIRST the blocks that stand last in
    their sequences come first, otherwise those that stand first.

    Returns the head, n, i_b, and the sequence's first token, tokens, and tokens that may be read.
    """
    if cu_seqlens is None:
        i_h = i % HEADS
        n = i // HEADS % N
        i_b = i // HEADS // N
        if LAST_FIRST:
            i_b = tl.cdiv(T, BLOCK) - 1 - i_b
    else:
        i_h = i % HEADS
        slot = i // HEADS
        if LAST_FIRST:
            slot = tl.num_programs(0) // HEADS - 1 - slot
        n = sequence_at(cu_seqlens, slot, N, BLOCK, tl.arange(0, SEARCH))
        i_b = slot - n - tl.load(cu_seqlens + n).to(tl.int32) // BLOCK
    bos, length, live = sequence(cu_seqlens, n, N, T, T)
    return i_h, n, i_b, bos, length, live


@triton.jit
def place_of(cu_seqlens, n, bos):
    """The row of a sequence in memory, and its first token there."""
    if cu_seqlens is None:
        return n, bos * 0
    return n * 0, bos


@triton.jit
def along_time(cu_seqlens, bos, i_h, T, HEADS: tl.constexpr):
    """Where a sequence begins in a tensor [B, HEADS, T]."""
    at = i_h.to(tl.int64) * T
    if cu_seqlens is None:
        return at + bos.to(tl.int64) * HEADS
    return at + bos


@triton.jit
def tile(p, o_r, m_r, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Rows o_r of p as [rows, BD]: zero beyond their D elements and where m_r does not hold."""
    o_d = tl.arange(0, BD)
    p = p + o_r[:, None] * STRIDE + o_d[None, :]
    if m_r is None:
        if D == BD:
            b = tl.load(p)
        else:
            b = tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    else:
        if D == BD:
            b = tl.load(p, mask=m_r[:, None], other=0.0)
        else:
            b = tl.load(p, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)
    return b


@triton.jit
def put_tile(p, value, o_r, m_r, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Write what ``tile`` reads."""
    o_d = tl.arange(0, BD)
    p = p + o_r[:, None] * STRIDE + o_d[None, :]
    tl.store(p, value.to(p.dtype.element_ty), mask=m_r[:, None] & (o_d < D)[None, :])


@triton.jit
def sees(o_i, o_j, window):
    """Whether queries o_i see keys o_j: none after them, and of those before them the nearest."""
    if window is None:
        m = o_j <= o_i
    else:
        m = (o_i - o_j).to(tl.uint32, bitcast=True) < window.to(tl.uint32)
    return m


@triton.jit
def first_interval_seen(i, window):
    """The interval of the first key that query i sees."""
    return tl.maximum(i - window + 1, 0) // SPAN


@triton.jit
def largest_norm(x):
    """The largest norm of the rows of x [rows, D]."""
    x = x.to(tl.float32)
    return tl.sqrt(tl.max(tl.sum(x * x, 1), 0))


@triton.jit
def own_logits(b_q, p_k, o_r, m_r, scale, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """What queries b_q [rows, BD] reach at least, for each sees its own key; inf without m_r."""
    b_k = tile(p_k, o_r, m_r, STRIDE, D, BD)  # [rows, BD]
    b_own = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), 1) * scale
    return tl.where(m_r, b_own, float("inf"))


@triton.jit
def first_interval_needed(p_total, p_rise, p_norm, i_b, q_norm, reach, floor):
    """The first interval whose keys count for queries in interval i_b; all before it are left out.

    The logits of those queries with the keys of interval j, over what their rows are known to
    reach, are at most ``reach`` + (totals between) + rise_j + q_norm norm_j.  Below ``floor`` all
    such keys together do not show.  What rows reach is what keys reach: a sink may be far above all
    of them, but gives no output that theirs would not show beside.
    """
    first = i_b
    between = 0.0
    for at in range(0, i_b, SEARCH):
        j = i_b - 1 - at - tl.arange(0, SEARCH)  # the nearest first
        m_j = j >= 0
        b_total = tl.load(p_total + j + 1, mask=m_j & (j + 1 < i_b), other=0.0)
        b_between = between + tl.cumsum(b_total, 0)
        b_bound = reach + b_between + tl.load(p_rise + j, mask=m_j, other=0.0)
        b_bound += q_norm * tl.load(p_norm + j, mask=m_j, other=0.0)
        first = tl.minimum(first, tl.min(tl.where(m_j & (b_bound >= floor), j, i_b), 0))
        between += tl.sum(b_total, 0)
    return first


@triton.jit
def gate_sums(sums, i_h, slot, intervals, HQ: tl.constexpr):
    """Where a sequence's since, rest and until begin in what ``gates_kernel`` writes."""
    p = sums + (i_h * intervals + slot).to(tl.int64) * SPAN
    plane = (HQ * intervals).to(tl.int64) * SPAN
    return p, p + plane, p + 2 * plane


@triton.jit
def gates_within(b_since, b_rest, p_since, p_rest, o_j):
    """g_{j+1} + … + g_i of rows i, whose sums are given, and columns j of the same interval."""
    b_since_j = tl.load(p_since + o_j)
    b_rest_j = tl.load(p_rest + o_j)
    return (b_since[:, None] - b_since_j[None, :]) + (b_rest[:, None] - b_rest_j[None, :])


@triton.jit
def gate_marks(marks, i_h, i_kh, slot, intervals, HQ: tl.constexpr):
    """Where a sequence's total, rise and norm begin in what ``gates_kernel`` writes."""
    p = marks + i_h * intervals + slot
    return p, p + HQ * intervals, marks + (2 * HQ + i_kh) * intervals + slot


@triton.jit(do_not_specialize=["N", "T", "intervals"])
def gates_kernel(
    g,
    k,
    sums,
    marks,
    cu_seqlens,
    N,
    T,
    intervals,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    BG: tl.constexpr,
    BK: tl.constexpr,
):
    """What the gates and keys of an interval mean to others, for a key head and its query heads.

        since + rest = g_0 + … + g_t, t included      until = g_{t+1} + … to the interval's end
        total = g_0 + … to the end      rise = max until      norm = max |k|

    Reads g [SPAN, G] and k [SPAN, K].  Writes since, rest and until [G, SPAN] to sums
    [3, HQ, intervals, SPAN]; total and rise [G] and norm to marks [2 HQ + H, intervals].
    """
    i_h, n, i_b, bos, _length, live = own(cu_seqlens, tl.program_id(0), N, T, H, SPAN, False)
    if i_b * SPAN >= live:
        return
    o_t = tl.arange(0, SPAN)
    m_t = i_b * SPAN + o_t < live
    o_g = tl.arange(0, BG)
    m_g = o_g < G
    m = m_t[:, None] & m_g[None, :]
    row = bos.to(tl.int64) + i_b * SPAN
    p_g = g + row * (H * G) + i_h * G + o_t[:, None] * (H * G) + o_g[None, :]
    b_g = tl.load(p_g, mask=m, other=0.0).to(tl.float32)  # [SPAN, BG]
    b_g = tl.where(m, tl.clamp(b_g, STEEPEST_GATE, -STEEPEST_GATE), 0.0).to(tl.float64) * LOG2E
    b_sum = tl.cumsum(b_g, 0)
    b_total = tl.sum(b_g, 0)  # [BG]
    b_since = b_sum.to(tl.float32)
    b_until = (b_total[None, :] - b_sum).to(tl.float32)

    slot = first_slot(cu_seqlens, n, bos, T, SPAN) + i_b
    o_h = i_h * G + o_g
    p_since, p_rest, p_until = gate_sums(sums, o_h[None, :], slot, intervals, H * G)
    tl.store(p_since + o_t[:, None], b_since, mask=m_g[None, :])
    tl.store(p_rest + o_t[:, None], (b_sum - b_since.to(tl.float64)), mask=m_g[None, :])
    tl.store(p_until + o_t[:, None], b_until, mask=m_g[None, :])
    p_total, p_rise, p_norm = gate_marks(marks, o_h, i_h, slot, intervals, H * G)
    tl.store(p_total, b_total, mask=m_g)
    tl.store(p_rise, tl.max(tl.where(m, b_until, float("-inf")), 0), mask=m_g)
    b_k = tile(k + row * (H * K) + i_h * K, o_t, m_t, H * K, K, BK)
    tl.store(p_norm, largest_norm(b_k))


def gates(
    call: Call, g: Tensor | None, k: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Launch ``gates_kernel``: the sums and marks of the gates, None without."""
    if g is None:
        return None, None
    H, HQ = k.shape[2], g.shape[2]
    sums = g.new_empty(3, HQ, call.intervals, SPAN.value, dtype=torch.float32)
    marks = g.new_empty(2 * HQ + H, call.intervals, dtype=torch.float32)
    constants = {
        "H": H,
        "G": HQ // H,
        "K": call.constants["K"],
        "BG": power_of_two(HQ // H),
        "BK": call.constants["BK"],
        "num_warps": 8,
    }
    launch(
        gates_kernel,
        call.intervals * H,
        (g, k, sums, marks, cu_seqlens),
        (call.N, call.T, call.intervals),
        constants,
    )
    return sums, marks
