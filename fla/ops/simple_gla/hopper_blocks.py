"""Where chunks lie and how their tokens weigh, for warp-specialised kernels on Hopper.

The same as in ``common/kernels.py`` and ``blocks.py``, where tensors have no layout.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fla.ops.simple_gla.blocks import CHUNK

C = gl.constexpr(CHUNK)
_BLOCK = gl.constexpr(256)


@gluon.jit
def power(x):
    """2^x, finite for every x."""
    return gl.exp2(gl.minimum(x, 127.0))


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
    """[first, last) of the sequences that may have chunks in [begin, stop), or lie there, empty."""
    if cu_seqlens is None:
        first = i_b
        last = i_b + 1
    else:
        first = begin * 0
        last = first + N + 1
        if (begin > 0) | (stop < T):  # else all of them, empty ones at the very end too
            last = first
            stop = gl.where(stop >= T, T + 1, stop)
            for at in range(0, N + 1, _BLOCK):
                o_n = at + gl.arange(0, _BLOCK, gl.BlockedLayout([2], [32], [4], [0]))
                b_bos = gl.load(cu_seqlens + o_n, mask=o_n <= N, other=T + 1).to(gl.int32)
                b_eos = gl.load(cu_seqlens + o_n + 1, mask=o_n < N, other=T + 1).to(gl.int32)
                first += gl.sum(((b_bos < begin) & (b_eos <= begin)).to(gl.int32), 0)
                last += gl.sum((b_bos < stop).to(gl.int32), 0)
    return first, last


@gluon.jit
def visit(cu_seqlens, i_n, N, T, begin, stop):
    """Of sequence i_n its first token and its length; of its chunks those in [begin, stop).

    These are the first one, and how many.  Behind the last sequence lies what sequence N is.
    """
    bos = begin * 0
    length = T
    if cu_seqlens is not None:
        i_n = gl.minimum(i_n, N)
        bos = gl.minimum(gl.load(cu_seqlens + i_n).to(gl.int32), T)
        eos = gl.load(cu_seqlens + i_n + 1, mask=i_n < N, other=T).to(gl.int32)
        length = gl.minimum(eos, T) - bos
    first = gl.cdiv(gl.maximum(begin - bos, 0), C)
    last = gl.minimum(gl.cdiv(gl.maximum(stop - bos, 0), C), gl.cdiv(length, C))
    return bos, length, first, last - first


@gluon.jit
def chunk_at(i, here, BACK: gl.constexpr):
    """The first token of the chunk of step i of a visit, and how many tokens it has."""
    bos, length, first, steps = here
    c = first + i
    if BACK:
        c = first + steps - 1 - i
    return bos + c * C, gl.minimum(length - c * C, C)


@gluon.jit
def chunk_ahead(i, here, after, cu_seqlens, BACK: gl.constexpr):
    """``chunk_at`` in the visit ``here``, or the first chunk of that ``after`` it.

    No tokens where there is none: what is loaded for it is masked.
    """
    token, there = chunk_at(i, here, BACK)
    within = i < here[3]
    if cu_seqlens is not None:
        first, behind = chunk_at(0, after, BACK)
        token = gl.where(within, token, first)
        there = gl.where(within, there, behind)
        within = within | (after[3] > 0)
    return token, gl.where(within, there, 0)


@gluon.jit
def sums_at(sums, gamma, token, there, REVERSE: gl.constexpr, LAYOUT: gl.constexpr):
    """A chunk's sums up to each of its ``there`` tokens, none if negative, and over all of them."""
    o_c = gl.arange(0, C, LAYOUT)
    if sums is not None:
        b_to = gl.load(sums + token + o_c, mask=o_c < there, other=0.0)
        last = token
        if not REVERSE:
            last = token + there - 1
        s_all = gl.load(sums + last, mask=there > 0, other=0.0)
    elif REVERSE:
        b_to = gamma * (there - o_c)
        s_all = gamma * there
    else:
        b_to = gamma * (o_c + 1)
        s_all = gamma * there
    return b_to, s_all


@gluon.jit
def sum_of(sums, gamma, token, there, REVERSE: gl.constexpr):
    """A chunk's sum over all of its tokens."""
    s_all = gamma * there
    if sums is not None:
        last = token
        if not REVERSE:
            last = token + there - 1
        s_all = gl.load(sums + last, mask=there > 0, other=0.0)
    return s_all
