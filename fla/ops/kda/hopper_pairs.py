"""Gradients through the pairs of blocks too steep for one anchor, on Hopper: pair after pair.

A thread has one channel and all 16 tokens of a block.  The decay between two tokens is a product of
the steps between them in plain fp32, one multiplication from one row to the next: exact, whatever
the gates are, and no exponential.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fla.ops.common.hopper import VECTOR
from fla.ops.kda.halving import TILE, joined, parts
from fla.ops.kda.hopper_tiles import PLAIN, SHARED
from fla.ops.kda.launches import GRADIENTS

# Two blocks of 16 tokens are at work at once, so that a chunk of 64 takes two rounds.
ROUNDS = gl.constexpr(2)
TOKENS = gl.constexpr(32)
# Channels of a program
CHANNELS = gl.constexpr(GRADIENTS.block)
# What a product of steps may grow to, as ``power``
LARGEST = gl.constexpr(2.0**120)
_OWN = gl.constexpr(gl.BlockedLayout([1, 16], [32, 1], [2, 2], [0, 1]))
_ROW = gl.constexpr(gl.SliceLayout(0, _OWN))
_MATRIX = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0]))
_STEPS = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, [1, 0]))


@gluon.jit
def rooms():
    """24 KB of a chunk's pairs, looked at in four ways.

    Steps, decays over one token each, lie where dq and dk of their blocks come to lie, and matrices
    in fp32 where the gradients of log-decays do.
    """
    gains = gl.allocate_shared_memory(gl.bfloat16, [2 * ROUNDS, TOKENS, CHANNELS], SHARED)
    flow = gl.allocate_shared_memory(gl.bfloat16, [ROUNDS, TOKENS, CHANNELS], SHARED)
    steps = gains._reinterpret(gl.float32, [ROUNDS, TOKENS, CHANNELS], _STEPS)
    matrices = flow._reinterpret(gl.float32, [2 * ROUNDS, TILE, TOKENS], PLAIN)
    return gains, flow, steps, matrices


@gluon.jit
def put_step(room, a, b_step):
    """Steps of block a on their side, [CHANNELS, TILE]."""
    steps = room[2]._reinterpret(gl.float32, [2 * ROUNDS, TILE, CHANNELS], _STEPS)
    steps.index(a).permute((1, 0)).store(b_step)


@gluon.jit
def gains_at(room, a: gl.constexpr):
    """dq, dk and the gradients of log-decays of block a, [TILE, CHANNELS] each."""
    gains = room[0]._reinterpret(gl.bfloat16, [4 * ROUNDS, TILE, CHANNELS], SHARED)
    flow = room[1]._reinterpret(gl.bfloat16, [2 * ROUNDS, TILE, CHANNELS], SHARED)
    first: gl.constexpr = a // 2 * 4 + a % 2
    return gains.index(first), gains.index(first + 2), flow.index(a)


@gluon.jit
def tokens_at(tiles, i):
    """The tokens of round i on their side, [CHANNELS, TOKENS] in fp32."""
    tiles = tiles._reinterpret(tiles.dtype, [ROUNDS, TOKENS, CHANNELS], SHARED)
    return tiles.index(i).permute((1, 0)).load(_OWN).to(gl.float32)


@gluon.jit
def numbers_at(vector, N: gl.constexpr, i):
    """The i-th TOKENS of N · TOKENS numbers, one a token, [1, TOKENS]."""
    vector = vector._reinterpret(gl.float32, [N, TOKENS], VECTOR)
    return gl.expand_dims(vector.index(i).load(_ROW), 0)


@gluon.jit
def widened(matrices, blocks, i, N: gl.constexpr):
    """Matrix N of both blocks of round i in fp32, side by side."""
    for h in gl.static_range(2):
        b_block = blocks.index((2 * i + h) * 5).load(_MATRIX).to(gl.float32)
        matrices.index(2 * i + N).slice(h * TILE, TILE, 1).store(b_block)


@gluon.jit
def one_by_one(x):
    """A tensor [CHANNELS, TOKENS] as 16 of [CHANNELS, 2], token after token of both blocks."""
    return parts(x.reshape([CHANNELS, 2, 2, 2, 2, 2]))


@gluon.jit
def row_of(rows, i, like):
    """A row of both blocks as 16 numbers, the same in every channel."""
    b_row, _ = gl.broadcast(gl.expand_dims(rows.index(i).load(_ROW), 0), like)
    return one_by_one(b_row)


@gluon.jit
def together(tokens):
    """What was taken apart ``one_by_one``."""
    b_x = joined(tokens).reshape([CHANNELS, TOKENS])
    return gl.convert_layout(b_x, _OWN, assert_trivial=True)


@gluon.jit
def through_pairs(
    room, q_tiles, k_tiles, dm_blocks, da_blocks, norms, own, scale, i,
    FORGETS: gl.constexpr,
):  # fmt: skip
    """What tokens of round i and their log-decays gain from the pairs in their block.

        dq_i = Σ_j dM_ij D_ij k_j    dk_i = Σ_j dA_ij D_ij k_j + Σ_l D_li (dM_li q_l + dA_li k_l)

    with D_ij the product of the steps behind j up to i, and dM_ii apart, which is ``own``.  A
    log-decay gains what rows from its token on do by their exponents, less what keys there do:
    pairs on both sides of it, and none where its step is 0.
    """
    gains, flow, steps, matrices = room
    rows = matrices._reinterpret(gl.float32, [2 * ROUNDS * TILE, TOKENS], VECTOR)
    widened(matrices, dm_blocks, i, 0)
    widened(matrices, da_blocks, i, 1)
    b_q = tokens_at(q_tiles, i) * (numbers_at(norms, 2 * ROUNDS, i) * scale)
    b_k = tokens_at(k_tiles, i) * numbers_at(norms, 2 * ROUNDS, ROUNDS + i)
    r_q = one_by_one(b_q)
    r_k = one_by_one(b_k)
    r_step = one_by_one(steps.index(i).permute((1, 0)).load(_OWN))
    zero = gl.zeros_like(r_q[0])
    r_decay = ()
    r_dq = ()
    r_row = ()  # dk of rows
    r_key = ()  # and of keys
    for t in gl.static_range(TILE):
        r_m = row_of(rows, 2 * i * TILE + t, b_q)
        r_a = row_of(rows, (2 * i + 1) * TILE + t, b_q)
        dq = zero
        dk = zero
        decays = ()
        keys = ()
        for j in gl.static_range(t):
            decay = r_decay[j] * r_step[t]
            if not FORGETS:
                decay = gl.minimum(decay, LARGEST)
            key = decay * r_k[j]
            dq += r_m[j] * key
            dk += r_a[j] * key
            keys += (r_key[j] + decay * (r_m[j] * r_q[t] + r_a[j] * r_k[t]),)
            decays += (decay,)
        r_decay = decays + (zero + 1.0,)  # noqa: RUF005, jit functions know no *
        r_key = keys + (zero,)  # noqa: RUF005
        r_dq += (dq,)
        r_row += (dk,)
    b_dq = together(r_dq)
    b_row = together(r_row)
    b_key = together(r_key)
    r_gain = one_by_one(b_q * b_dq + b_k * (b_row - b_key))
    r_flow = ()
    gain = zero
    for t in gl.static_range(TILE - 1, -1, -1):
        gain = gl.where(r_step[t] == 0.0, 0.0, gain + r_gain[t])
        r_flow = (gain,) + r_flow  # noqa: RUF005
    b_own = numbers_at(own, ROUNDS, i)
    gains.index(2 * i).permute((1, 0)).store((b_dq + b_own * b_k).to(gl.bfloat16))
    gains.index(2 * i + 1).permute((1, 0)).store((b_row + b_key + b_own * b_q).to(gl.bfloat16))
    flow.index(i).permute((1, 0)).store(together(r_flow).to(gl.bfloat16))
