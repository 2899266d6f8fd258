"""What kernels share: where sequences lie, decays as powers of two, products in a chosen precision.

A dense batch is N sequences of T tokens one behind the other; a packed one is what ``cu_seqlens``
says, and tokens behind its last boundary are one more sequence, number N, whose inputs are never
read and whose outputs are zero.  Work is cut into intervals of tokens: a chunk, counted from the
start of its sequence, belongs to the interval that it begins in.  So grids follow from shapes
alone, and no program needs more than the boundaries themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = tl.constexpr(1024)
# How many blocks or boundaries a program looks at together when it searches among them
SEARCH = tl.constexpr(128)


@triton.jit
def sequences_in(cu_seqlens, N, T, tokens, start, stop):
    """[first, last) of the sequences that may have chunks in [start, stop), or lie there, empty."""
    if cu_seqlens is None:
        first = start // T
        last = tl.cdiv(tl.minimum(stop, tokens), T)
    else:
        stop = tl.where(stop >= tokens, tokens + 1, stop)  # empty ones at the very end too
        first = start * 0
        last = start * 0
        for at in range(0, N + 1, _BLOCK):
            o_n = at + tl.arange(0, _BLOCK)
            b_bos = tl.load(cu_seqlens + o_n, mask=o_n <= N, other=tokens + 1).to(tl.int32)
            b_eos = tl.load(cu_seqlens + o_n + 1, mask=o_n < N, other=tokens + 1).to(tl.int32)
            first += tl.sum(((b_bos < start) & (b_eos <= start)).to(tl.int32))
            last += tl.sum((b_bos < stop).to(tl.int32))
    return first, last


@triton.jit
def sequence(cu_seqlens, i_n, N, T, tokens):
    """Where sequence i_n begins, how many tokens it has, and how many of them may be read."""
    if cu_seqlens is None:
        bos = i_n * T
        length = T
        live = T
    else:
        bos = tl.minimum(tl.load(cu_seqlens + i_n).to(tl.int32), tokens)
        eos = tl.load(cu_seqlens + i_n + 1, mask=i_n < N, other=tokens).to(tl.int32)
        length = tl.minimum(eos, tokens) - bos
        live = tl.where(i_n < N, length, 0)
    return bos, length, live


@triton.jit
def chunks_in(bos, length, start, stop, C: tl.constexpr):
    """[first, last) of a sequence's chunks that begin in [start, stop), and how many it has."""
    count = tl.cdiv(length, C)
    first = tl.cdiv(tl.maximum(start - bos, 0), C)
    last = tl.minimum(tl.cdiv(tl.maximum(stop - bos, 0), C), count)
    return first, last, count


@triton.jit
def first_slot(cu_seqlens, i_n, bos, T, C):
    """The number of a sequence's first chunk among the slots that all chunks have."""
    if cu_seqlens is None:
        slot = i_n * tl.cdiv(T, C)
    else:
        slot = bos // C + i_n  # always leaves the sequences before it enough
    return slot


@triton.jit
def sequence_at(cu_seqlens, slot, N, size, o_s):
    """Which packed sequence owns a slot; o_s are the numbers below SEARCH, which Gluon lays out."""
    n = slot * 0
    for at in range(0, N, SEARCH):
        o_n = at + 1 + o_s
        b_bos = tl.load(cu_seqlens + o_n, mask=o_n <= N, other=0).to(tl.int32)
        n += tl.sum(((b_bos // size + o_n <= slot) & (o_n <= N)).to(tl.int32))
    return n


@triton.jit
def chunk_in_slot(cu_seqlens, slot, N, T, C, o_s=None):
    """The sequence whose slot this is, and which of its chunks; packed, it may not have so many."""
    if cu_seqlens is None:
        i_n = slot // tl.cdiv(T, C)
        c = slot % tl.cdiv(T, C)
    else:
        if o_s is None:
            o_s = tl.arange(0, SEARCH)
        i_n = sequence_at(cu_seqlens, slot, N, C, o_s)
        c = slot - i_n - tl.load(cu_seqlens + i_n).to(tl.int32) // C
    return i_n, c


LOG2E = tl.constexpr(1.4426950408889634)
# A decay's size, above all a growing gate's, stays below 2 to this: so it is finite, and so is its
# product with an operand of moderate size.
LARGEST_EXPONENT = tl.constexpr(120.0)


@triton.jit
def power(x):
    """2^x, finite: 0 · inf would turn a result that is representable into NaN."""
    return tl.exp2(tl.minimum(x, LARGEST_EXPONENT))


@triton.jit
def operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x as ``product`` takes it: in DTYPE, or in fp32, there rounded where tf32 would truncate."""
    x = x.to(DTYPE if PRECISION is None else tl.float32)
    if PRECISION == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32; 16-bit operands as they are, fp32 operands in ``PRECISION``."""
    if PRECISION is None:
        return tl.dot(a, b, acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors as kernels take them, contiguous, and None for those that are not there."""
    return tuple([None if x is None else x.contiguous() for x in tensors])


# Triton's own cdiv and next_power_of_2 are made for kernels and slow on the host.
def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def power_of_two(x: int) -> int:
    """The smallest power of two that is not below x."""
    return 1 << max(x - 1, 0).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; for the interpreter, which has none, one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Line(Protocol):
    @property
    def shared(self) -> int: ...


_AnyLine = TypeVar("_AnyLine", bound=_Line)


def first_line(
    lines: tuple[_AnyLine, ...], shared: int, takes: Callable[[_AnyLine], bool]
) -> _AnyLine:
    """The first launch configuration within ``shared`` KiB that ``takes`` a call."""
    for line in lines:
        if line.shared <= shared and takes(line):
            return line
    raise RuntimeError(f"no launch configuration in {shared} KiB of shared memory")


@functools.cache
def shared_memory(device: torch.device) -> int:
    """KiB of shared memory that one program may have; the interpreter has no limit."""
    if device.type != "cuda":
        return 1 << 20
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >> 10
