"""How the tokens of a chunk weigh, for warp-specialised kernels on Hopper.

The same as in ``blocks.py``, where tensors have no layout.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fla.ops.common.hopper import VECTOR, scalar
from fla.ops.simple_gla.blocks import CHUNK

C = gl.constexpr(CHUNK)


@gluon.jit
def leading(x):
    """The digits of x that bf16 holds."""
    return (x.to(gl.int32, bitcast=True) & -0x10000).to(gl.float32, bitcast=True)


@gluon.jit
def rounded(x):
    """x as bf16 holds it."""
    return leading((x.to(gl.int32, bitcast=True) + 0x8000).to(gl.float32, bitcast=True))


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
