"""Where chunks lie and how their tokens weigh, for warp-specialised kernels on Hopper.

The same as in ``common/kernels.py`` and ``blocks.py``, where tensors have no layout.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fla.ops.common.hopper import VECTOR, scalar
from fla.ops.simple_gla.blocks import CHUNK

C = gl.constexpr(CHUNK)
# Sequences that are looked at together, by one warp or by four
_BLOCK = gl.constexpr(256)
BY_WARP = gl.constexpr(gl.BlockedLayout([8], [32], [1], [0]))
BY_FOUR = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))


@gluon.jit
def leading(x):
    """The digits of x that bf16 holds."""
    return (x.to(gl.int32, bitcast=True) & -0x10000).to(gl.float32, bitcast=True)


@gluon.jit
def rounded(x):
    """x as bf16 holds it."""
    return leading((x.to(gl.int32, bitcast=True) + 0x8000).to(gl.float32, bitcast=True))


@gluon.jit
def visit(cu_seqlens, i_n, N, T):
    """Of sequence i_n its first token, its length and its number of chunks.

    An empty sequence has one chunk, without a token, in which its state passes by.  Sequence N is
    what lies behind the last one.
    """
    bos = i_n * 0
    length = T
    if cu_seqlens is not None:
        bos = gl.minimum(gl.load(cu_seqlens + i_n).to(gl.int32), T)
        eos = gl.load(cu_seqlens + i_n + 1, mask=i_n < N, other=T).to(gl.int32)
        length = gl.minimum(eos, T) - bos
    return bos, length, gl.maximum(gl.cdiv(length, C), 1)


@gluon.jit
def _bounds(cu_seqlens, at, N, T, LAYOUT: gl.constexpr):
    """Of _BLOCK sequences from ``at`` on: whether they are there, first tokens, and chunks."""
    o_n = at + gl.arange(0, _BLOCK, LAYOUT)
    b_bos = gl.load(cu_seqlens + o_n, mask=o_n < N, other=0).to(gl.int32)
    b_eos = gl.load(cu_seqlens + o_n + 1, mask=o_n < N, other=0).to(gl.int32)
    b_bos = gl.minimum(b_bos, T)
    b_count = gl.maximum(gl.cdiv(gl.minimum(b_eos, T) - b_bos, C), 1)
    return o_n < N, b_bos, gl.where(o_n < N, b_count, 0)


@gluon.jit
def chunks_of(cu_seqlens, N, T, LAYOUT: gl.constexpr):
    """How many chunks ``visit`` finds in the sequences of a row of T tokens."""
    if cu_seqlens is None:
        count = gl.cdiv(T, C)
    else:
        count = N * 0
        for at in range(0, N, _BLOCK):
            _, _, b_count = _bounds(cu_seqlens, at, N, T, LAYOUT)
            count += gl.sum(b_count, 0)
    return count


@gluon.jit
def place_of_token(cu_seqlens, token, N, T, LAYOUT: gl.constexpr):
    """The sequence of a row's first chunk at ``token`` or behind it, and which of its it is."""
    if cu_seqlens is None:
        n = token * 0
        c = gl.cdiv(gl.minimum(token, T), C)
    else:
        n = token * 0
        for at in range(0, N, _BLOCK):
            m, b_bos, b_count = _bounds(cu_seqlens, at, N, T, LAYOUT)
            m = m & (b_bos < token) & (b_bos + (b_count - 1) * C < token)
            n += gl.sum(m.to(gl.int32), 0)
        bos, _, _ = visit(cu_seqlens, n, N, T)
        c = gl.where(n < N, gl.cdiv(gl.maximum(token - bos, 0), C), 0)
    return n, c


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def places_of_chunks(cu_seqlens, first, last, N, T, LAYOUT: gl.constexpr):
    """Of two chunks of a row the sequences, and which of these sequences' chunks they are.

    The chunk behind the last one is the first of sequence N, or its sequence's where it has one.
    """
    n_0 = first * 0
    n_1 = n_0
    c_0 = first
    c_1 = last
    if cu_seqlens is not None:
        before = n_0
        for at in range(0, N, _BLOCK):
            m, _, b_count = _bounds(cu_seqlens, at, N, T, LAYOUT)
            b_upto = before + gl.associative_scan(b_count, 0, _plus)
            m_0 = m & (b_upto <= first)
            m_1 = m & (b_upto <= last)
            n_0 += gl.sum(m_0.to(gl.int32), 0)
            n_1 += gl.sum(m_1.to(gl.int32), 0)
            c_0 = gl.minimum(c_0, first - gl.max(gl.where(m_0, b_upto, 0), 0))
            c_1 = gl.minimum(c_1, last - gl.max(gl.where(m_1, b_upto, 0), 0))
            before += gl.sum(b_count, 0)
    return n_0, c_0, n_1, c_1


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
