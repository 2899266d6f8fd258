"""Where chunks lie and how their tokens weigh, for warp-specialised kernels on Hopper.

The same as in ``common/kernels.py`` and ``blocks.py``, where tensors have no layout.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fla.ops.common.hopper import VECTOR, scalar
from fla.ops.simple_gla.blocks import CHUNK

C = gl.constexpr(CHUNK)
_BLOCK = gl.constexpr(256)


@gluon.jit
def leading(x):
    """The digits of x that bf16 holds."""
    return (x.to(gl.int32, bitcast=True) & -0x10000).to(gl.float32, bitcast=True)


@gluon.jit
def rounded(x):
    """x as bf16 holds it."""
    return leading((x.to(gl.int32, bitcast=True) + 0x8000).to(gl.float32, bitcast=True))


@gluon.jit
def sequences_in(cu_seqlens, i_b, N, T, begin, stop):
    """[first, last) of the sequences that have chunks in [begin, stop), empty ones too.

    Sequence N is what lies behind the last one.
    """
    if cu_seqlens is None:
        first = i_b
        last = i_b + 1
    else:
        first = begin * 0
        last = first + N + 1
        if (begin > 0) | (stop <= T):  # else all of them
            last = first
            for at in range(0, N + 1, _BLOCK):
                o_n = at + gl.arange(0, _BLOCK, gl.BlockedLayout([2], [32], [4], [0]))
                b_bos = gl.load(cu_seqlens + o_n, mask=o_n <= N, other=T + 1).to(gl.int32)
                b_eos = gl.load(cu_seqlens + o_n + 1, mask=o_n < N, other=T + 1).to(gl.int32)
                b_last = b_bos + (gl.cdiv(b_eos - b_bos, C) - 1) * C  # where the last chunk begins
                first += gl.sum(((b_bos < begin) & (b_last < begin)).to(gl.int32), 0)
                last += gl.sum((b_bos < stop).to(gl.int32), 0)
    return first, last


@gluon.jit
def visit(cu_seqlens, i_n, N, T, begin, stop):
    """Of sequence i_n its first token, its length and its number of chunks.

    And of its chunks the first in [begin, stop), and how many lie there.  An empty sequence has one
    chunk, without a token, in which its state passes by.
    """
    bos = begin * 0
    length = T
    if cu_seqlens is not None:
        bos = gl.minimum(gl.load(cu_seqlens + i_n).to(gl.int32), T)
        eos = gl.load(cu_seqlens + i_n + 1, mask=i_n < N, other=T).to(gl.int32)
        length = gl.minimum(eos, T) - bos
    chunks = gl.maximum(gl.cdiv(length, C), 1)
    first = gl.cdiv(gl.maximum(begin - bos, 0), C)
    last = gl.minimum(gl.cdiv(gl.maximum(stop - bos, 0), C), chunks)
    return bos, length, chunks, first, last - first


@gluon.jit
def seen(BACK: gl.constexpr, LAYOUT: gl.constexpr):
    """Which tokens of a chunk (columns) a token (a row) comes after, or BACK before: [C, C]."""
    o_i = gl.arange(0, C, gl.SliceLayout(1, LAYOUT))[:, None]
    o_j = gl.arange(0, C, gl.SliceLayout(0, LAYOUT))[None, :]
    if BACK:
        m = o_i <= o_j
    else:
        m = o_i >= o_j
    return m


@gluon.jit
def chunks_of(cu_seqlens, N, T):
    """How many chunks ``visit`` finds in the sequences of a row of T tokens."""
    if cu_seqlens is None:
        count = gl.cdiv(T, C)
    else:
        count = N * 0
        for at in range(0, N, _BLOCK):
            o_n = at + gl.arange(0, _BLOCK, gl.BlockedLayout([2], [32], [4], [0]))
            b_bos = gl.load(cu_seqlens + o_n, mask=o_n < N, other=0).to(gl.int32)
            b_eos = gl.load(cu_seqlens + o_n + 1, mask=o_n < N, other=0).to(gl.int32)
            b_count = gl.cdiv(gl.minimum(b_eos, T) - gl.minimum(b_bos, T), C)
            count += gl.sum(gl.where(o_n < N, gl.maximum(b_count, 1), 0), 0)
    return count


@gluon.jit
def sums_at(
    sums, gamma, n, there, REVERSE: gl.constexpr, SUMMED: gl.constexpr, LAYOUT: gl.constexpr
):
    """The sums of chunk n up to each of its tokens, any number for those that are not there.

    They lie in ``sums`` [stages, C] in shared memory, or are those of a constant decay ``gamma``.
    """
    o_c = gl.arange(0, C, LAYOUT)
    if SUMMED:
        b_to = sums.index(n % sums.shape[0]).load(LAYOUT)
    elif REVERSE:
        b_to = gamma * (there - o_c)
    else:
        b_to = gamma * (o_c + 1)
    return b_to


@gluon.jit
def sum_of(sums, gamma, n, there, REVERSE: gl.constexpr, SUMMED: gl.constexpr):
    """The sum over all tokens of chunk n."""
    if SUMMED:
        last = n % sums.shape[0] * C
        if not REVERSE:
            last += gl.maximum(there - 1, 0)
        each = sums._reinterpret(gl.float32, [sums.shape[0] * C, 1], VECTOR)
        s_all = scalar(each.index(last))
    else:
        s_all = gamma * there
    return s_all
