"""Where chunks lie: each sequence's chunks in slots of their own, found from shapes alone.

Chunk c of sequence n has slot cu_seqlens[n] // size + n + c, dense rows n · ceil(T / size) + c.
Slots of different sequences never meet, and rising n means rising slots, so a kernel finds the
sequence of a slot by bisection.  Packed, one more sequence holds the tokens behind the last one.
"""

from __future__ import annotations

import triton
import triton.language as tl


def rows_and_slots(B: int, T: int, cu_seqlens, size: int) -> tuple[int, int]:
    """How many sequences a grid walks, the one of padding included, and how many slots."""
    if cu_seqlens is None:
        return B, B * -(-T // size)
    N = cu_seqlens.shape[0]  # one more than there are sequences
    return N, T // size + N


@triton.jit
def sequence(cu_seqlens, i_n, rows, T):
    """First token of sequence ``i_n``, int64, and its number of tokens."""
    if cu_seqlens is None:
        start = i_n.to(tl.int64) * T
        length = T
    else:
        start = tl.load(cu_seqlens + i_n).to(tl.int64)
        stop = tl.load(cu_seqlens + i_n + 1, i_n + 1 < rows, T).to(tl.int64)
        length = (stop - start).to(tl.int32)
    return start, length


@triton.jit
def first_slot(cu_seqlens, i_n, T, size):
    """The slot of the first chunk of sequence ``i_n``."""
    if cu_seqlens is None:
        return i_n * tl.cdiv(T, size)
    else:
        return (tl.load(cu_seqlens + i_n) // size).to(tl.int32) + i_n


@triton.jit
def locate(cu_seqlens, i_slot, rows, T, size):
    """Of a slot the sequence, the chunk in it, the sequence's first token and number of tokens."""
    if cu_seqlens is None:
        i_n = i_slot // tl.cdiv(T, size)
    else:
        low = i_slot * 0
        high = low + rows - 1  # the sequence is in [low, high]
        while low < high:
            middle = (low + high + 1) // 2
            if (tl.load(cu_seqlens + middle) // size).to(tl.int32) + middle <= i_slot:
                low = middle
            else:
                high = middle - 1
        i_n = low
    start, length = sequence(cu_seqlens, i_n, rows, T)
    return i_n, i_slot - first_slot(cu_seqlens, i_n, T, size), start, length
