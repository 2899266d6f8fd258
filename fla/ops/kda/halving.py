"""What the kernels of a chunk share: tiles on their side, sums of log-decays, pairs by halving.

Tiles are channels by tokens, [BLOCK, TILE]: a sum over tokens is a product with a small matrix from
the right, what a thread holds enters the next product as it is, and a chunk of 64 goes through
registers in blocks of 16.

In every block of 2s tokens, s = 1, 2, 4, …, the queries of the second half meet the keys of the
first: each pair j < i has exactly one s = 2^level.  The decay between them goes over the boundary
between the halves and is a product of two, one for the query and one for the key.  Each exponent is
a sum of its own segment of log-decays; none is a difference of sums, so −1e4 disturbs neither −0.05
beside it nor its gradient, and where gates forget both factors are at most 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.common.kernels import power
from fla.ops.kda.activations import log_decay

# Tokens of a tile.
TILE = tl.constexpr(16)
# A decay of 2^-116 from the start of a block of 16 leaves its inverse, times a key, within fp32;
# 16 gates of −5 fit.
ROOM = tl.constexpr(116.0)


@triton.jit
def level_mask(level, C: tl.constexpr):
    """[C, C], true for the pairs (i, j) of one level."""
    block = tl.arange(0, C) >> level
    return (block[:, None] == block[None, :] + 1) & ((block & 1) == 1)[:, None]


@triton.jit
def level_mask_transposed(level, C: tl.constexpr):
    """[C, C], true for (j, i) where (i, j) is a pair of this level."""
    block = tl.arange(0, C) >> level
    return (block[:, None] + 1 == block[None, :]) & ((block & 1) == 0)[:, None]


@triton.jit
def segment_mask(level, C: tl.constexpr):
    """[C, C], true at (m, l) where the gate of l lies between token m and its level's boundary.

    From the boundary up to m for tokens of the second half, behind m up to the boundary for those
    of the first.
    """
    o_c = tl.arange(0, C)
    block = o_c >> level
    second = ((block & 1) == 1)[:, None]
    before = o_c[None, :] <= o_c[:, None]
    return (block[:, None] == block[None, :]) & (second == before)


@triton.jit
def segment_mask_transposed(level, C: tl.constexpr):
    """[C, C], true at (l, m) where ``segment_mask`` is true at (m, l)."""
    o_c = tl.arange(0, C)
    block = o_c >> level
    second = ((block & 1) == 1)[None, :]
    before = o_c[:, None] <= o_c[None, :]
    return (block[:, None] == block[None, :]) & (second == before)


@triton.jit
def rounded(b_x, DTYPE: tl.constexpr):
    """x in fp32, rounded to the precision of DTYPE; on integers, for a conversion there and back
    costs four times as much."""
    if DTYPE == tl.bfloat16:
        b_bits = (b_x.to(tl.int32, bitcast=True) + 0x8000) & -65536
        b_x = b_bits.to(tl.float32, bitcast=True)
    return b_x


@triton.jit
def sums(b_x, b_mask, DTYPE: tl.constexpr, PARTS: tl.constexpr = 2):
    """x [BLOCK, TILE], in fp32, summed over the tokens that are set in each row of the mask.

    Products with 0 and 1 are exact; x goes in as one or two 16-bit parts, or as three of tf32.
    """
    b_mask = tl.trans(tl.where(b_mask, 1.0, 0.0).to(DTYPE))
    if DTYPE == tl.bfloat16:
        b_high = rounded(b_x, tl.bfloat16)
        b_sums = tl.dot(b_high.to(tl.bfloat16), b_mask)
        if PARTS == 2:
            b_sums = tl.dot((b_x - b_high).to(tl.bfloat16), b_mask, b_sums)
    else:
        b_sums = tl.dot(b_x, b_mask, input_precision="tf32x3")
    return b_sums


@triton.jit
def copies(value, N: tl.constexpr):
    """A tuple of N times the same value, to be ``replaced`` one by one."""
    values = (value,)
    for _ in tl.static_range(N - 1):
        values += (value,)  # type: ignore[assignment]
    return values


@triton.jit
def replaced(values, i: tl.constexpr, value):
    """A tuple with another i-th element."""
    return values[:i] + (value,) + values[i + 1 :]  # noqa: RUF005, jit functions know no *


@triton.jit
def load_rate(A_log, i_hv, GATE: tl.constexpr):
    """The rate of a head's gates."""
    rate = 1.0
    if GATE:
        if A_log is not None:
            rate = tl.exp(tl.load(A_log + i_hv).to(tl.float32))
    return rate


@triton.jit
def load_bias(dt_bias, o_k, i_hv, K, GATE: tl.constexpr):
    """The bias of a head's gates, [1, BK]."""
    b_bias = tl.zeros([1, o_k.shape[0]], tl.float32)
    if GATE:
        if dt_bias is not None:
            b_bias = tl.load(dt_bias + i_hv * K + o_k, o_k < K, 0).to(tl.float32)[None, :]
    return b_bias


@triton.jit
def gates_of(b_raw, rate, dt_bias, lower_bound, o_k, m, i_hv, K, GATE: tl.constexpr):
    """Gates with their bias, and log-decays in units of log 2, of raw gates on their side."""
    b_x = b_raw.to(tl.float32)
    if GATE:
        if dt_bias is not None:
            b_x += tl.load(dt_bias + i_hv * K + o_k, o_k < K, 0).to(tl.float32)[:, None]
    return b_x, tl.where(m, log_decay(b_x, rate, lower_bound, GATE), 0.0)


@triton.jit
def tile(rows):
    """Rows [BLOCKS, BK], token t of every block, as one tile on its side, [BK, BLOCKS * TILE]."""
    N: tl.constexpr = rows[0].shape[0]
    BK: tl.constexpr = rows[0].shape[1]
    return joined(rows).reshape([N, BK, TILE]).permute(1, 0, 2).reshape([BK, N * TILE])


@triton.jit
def load_rows(p, stride, m, left):
    """Tokens 0 to 15 of every block at ``p``, ``stride`` apart, as far as ``left`` goes."""
    rows = ()
    for t in tl.static_range(TILE):
        rows += (tl.load(p + t * stride, m & (t < left), 0),)
    return rows


@triton.jit
def decays(rows, m, left, b_bias, rate, lower_bound, GATE: tl.constexpr):
    """Log-decays in units of log 2 of rows of raw gates, and their sums over each block."""
    b_total = tl.zeros([left.shape[0], m.shape[1]], tl.float32)
    r_decay = ()
    for t in tl.static_range(TILE):
        b_x = rows[t].to(tl.float32)
        if GATE:
            b_x += b_bias
        b_x = tl.where(m & (t < left), log_decay(b_x, rate, lower_bound, GATE), 0.0)
        r_decay += (b_x,)
        b_total += b_x
    return r_decay, b_total


@triton.jit
def weight_of(exponent, FORGETS: tl.constexpr):
    """exp2, which stays finite where gates may grow."""
    return tl.exp2(exponent) if FORGETS else power(exponent)


@triton.jit
def middle(exponents):
    """2^m and 2^-m, to the bit, of a whole m in the middle of what exponents span along axis 1.

    Anchored there, factors of a pair and gradients that pass through one of them stay within fp32,
    however small or large the gradients are that come in.
    """
    m = ((tl.max(exponents, 1) + tl.min(exponents, 1)) * 0.5).to(tl.int32)
    low = ((127 + m) << 23).to(tl.float32, bitcast=True)
    high = ((127 - m) << 23).to(tl.float32, bitcast=True)
    return low[:, None], high[:, None]


@triton.jit
def _add(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def over_blocks(b_0, b_1, b_2, b_3):
    """Sums over blocks [1, BK] of up to four times [BLOCKS, BK]."""
    t_0, t_1, t_2, t_3 = tl.reduce((b_0, b_1, b_2, b_3), 0, _add)
    return t_0[None, :], t_1[None, :], t_2[None, :], t_3[None, :]


@triton.jit
def select(o_b, x_0, x_1, x_2, x_3):
    """Of four values that of each block, [BLOCKS, BK]."""
    return tl.where(o_b == 0, x_0, tl.where(o_b == 1, x_1, tl.where(o_b == 2, x_2, x_3)))


@triton.jit
def between(b_total, o_b):
    """Decays from the chunk's start to each block, from its end to the chunk's, and between halves.

    From totals of log-decays [BLOCKS, BK]; the last are those over the blocks 1 and 2, which rows
    of block 3 and keys of block 0 pass to meet the other half.  Then the log-decay of the chunk.
    """
    b_zero = tl.zeros_like(b_total)
    t_0, t_1, t_2, t_3 = over_blocks(
        tl.where(o_b == 0, b_total, 0.0),
        tl.where(o_b == 1, b_total, 0.0),
        tl.where(o_b == 2, b_total, 0.0),
        tl.where(o_b == 3, b_total, 0.0),
    )
    t_01 = t_0 + t_1
    t_23 = t_2 + t_3
    b_before = power(select(o_b, b_zero, t_0, t_01, t_01 + t_2))
    b_behind = power(select(o_b, t_1 + t_23, t_23, t_3, b_zero))
    b_far = power(select(o_b, t_1, b_zero, b_zero, t_2))
    return b_before, b_behind, b_far, t_01 + t_23


@triton.jit
def joined(rows):
    """16 blocks as one, with four axes of 2 behind the others."""
    a = ()
    for t in tl.static_range(8):
        a += (tl.join(rows[t], rows[t + 8]),)
    b = ()
    for t in tl.static_range(4):
        b += (tl.join(a[t], a[t + 4]),)
    return tl.join(tl.join(b[0], b[2]), tl.join(b[1], b[3]))


@triton.jit
def parts(b_x):
    """What was ``joined``."""
    a = tl.split(b_x)
    b = tl.split(a[0]) + tl.split(a[1])
    c = ()
    for i in tl.static_range(4):
        c += tl.split(b[i])
    d = ()
    for i in tl.static_range(8):
        d += tl.split(c[i])
    return (
        d[0], d[8], d[4], d[12], d[2], d[10], d[6], d[14],
        d[1], d[9], d[5], d[13], d[3], d[11], d[7], d[15],
    )  # fmt: skip
