"""Sums of log-decays over segments, and pairs of tokens by halving: helpers that stages share.

In every block of 2s tokens, s = 1, 2, 4, …, the queries of the second half meet the keys of the
first: each pair j < i of a chunk has exactly one s = 2^level.  The decay between them goes over the
boundary between the halves and is a product of two, one for the query and one for the key.  Each
exponent is a sum of its own segment of log-decays; none is a difference of sums, so −1e4 disturbs
neither −0.05 beside it nor its gradient, and where gates forget both factors are at most 1.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def sums(b_mask, b_x):
    """mask @ x in fp32: sums of rows of x [C, K], each over its own set of rows.

    Products with 0 and 1 are exact; x goes in as two 16-bit parts, or as three of tf32.
    """
    if b_mask.dtype == tl.bfloat16:
        b_high = rounded(b_x, tl.bfloat16)
        b_low = (b_x - b_high).to(tl.bfloat16)
        b_sums = tl.dot(b_mask, b_low, tl.dot(b_mask, b_high.to(tl.bfloat16)))
    else:
        b_sums = tl.dot(b_mask, b_x, input_precision="tf32x3")
    return b_sums


@triton.jit
def as_operand(mask, DTYPE: tl.constexpr):
    """A mask as zeros and ones for ``sums``."""
    return tl.where(mask, 1.0, 0.0).to(DTYPE)
