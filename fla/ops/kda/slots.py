"""Where chunks lie, as the delta engine's kernels ask the hall.

``rows`` are the sequences that a grid walks: those of a batch, or the packed ones and behind them
one more, which holds the tokens behind the last boundary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.common import kernels


def rows_and_slots(B: int, T: int, cu_seqlens, size: int) -> tuple[int, int]:
    """How many sequences a grid walks, and the slots that chunks of ``size`` tokens may have."""
    if cu_seqlens is None:
        return B, B * -(-T // size)
    N = cu_seqlens.shape[0]  # one more than there are sequences
    return N, T // size + N


@triton.jit
def sequence(cu_seqlens, i_n, rows, T):
    """First token of sequence ``i_n``, int64, its number of tokens, and of those that are read."""
    bos, length, live = kernels.sequence(cu_seqlens, i_n, rows - 1, T, T)
    return bos.to(tl.int64), length, live


@triton.jit
def first_slot(cu_seqlens, i_n, T, size):
    """The slot of the first chunk of sequence ``i_n``."""
    bos = i_n * 0
    if cu_seqlens is not None:
        bos = tl.load(cu_seqlens + i_n).to(tl.int32)
    return kernels.first_slot(cu_seqlens, i_n, bos, T, size)


@triton.jit
def locate(cu_seqlens, i_slot, rows, T, size, o_s=None):
    """Of a slot the sequence, the chunk in it, and what ``sequence`` says; o_s: ``sequence_at``."""
    i_n, i_c = kernels.chunk_in_slot(cu_seqlens, i_slot, rows - 1, T, size, o_s)
    start, length, live = sequence(cu_seqlens, i_n, rows, T)
    return i_n, i_c, start, length, live
