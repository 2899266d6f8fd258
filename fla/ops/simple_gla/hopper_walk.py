"""The walk over time on Hopper, warp-specialised: what does not wait for the state runs ahead.

One warp copies tiles.  Eight warps weigh the pairs inside a chunk and what is added to the state,
four carry the state and four put out; so a chunk waits for the one before it only where the state
does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fla.ops.common.hopper import (
    Ring,
    arrive,
    descriptor,
    new_barriers,
    new_ring,
    new_tiles,
    wait_before,
)
from fla.ops.common.kernels import cdiv
from fla.ops.common.launch import launch
from fla.ops.simple_gla.blocks import LOG2E, Call
from fla.ops.simple_gla.hopper_blocks import (
    C,
    chunk_ahead,
    chunk_at,
    leading,
    power,
    rounded,
    sequences_in,
    sum_of,
    sums_at,
    visit,
)

# Registers a thread; what they leave is the state's
OUT_REGISTERS = gl.constexpr(128)
WEIGH_REGISTERS = gl.constexpr(80)
COPY_REGISTERS = gl.constexpr(32)
BZ = gl.constexpr(64)
# Chunks that the pairs may be ahead of the output
AHEAD = gl.constexpr(2)
_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_ROW = gl.constexpr(gl.SliceLayout(1, _ACC))
_COLUMN = gl.constexpr(gl.SliceLayout(0, _ACC))


@gluon.jit
def clear(tile, there, LAYOUT: gl.constexpr):
    """Zeros for the rows of a tile from ``there`` on.

    They are another sequence's and may hold anything, of which no weight makes zero.
    """
    m = gl.arange(0, C, gl.SliceLayout(1, LAYOUT)) < there
    tile.store(gl.where(m[:, None], tile.load(LAYOUT), 0.0))


@gluon.jit
def produce(
    x_desc, y_desc, z_desc, b_desc, x_ring, y_ring, z_ring, b_ring, cu_seqlens,
    i_b, i_h, i_z, first, last, N, T, begin, stop, BACK: gl.constexpr,
):  # fmt: skip
    """Copy the tiles of each chunk in the order of the walk."""
    n = 0
    for i_n in range(first, gl.minimum(last, N)):
        here = visit(cu_seqlens, i_n, N, T, begin, stop)
        for i in range(here[3]):
            token, _ = chunk_at(i, here, BACK)
            wide = [i_b, token, i_h, 0]
            block = [i_b, token, i_h, i_z * BZ]
            x_ring.fill(x_desc, wide, n)
            y_ring.fill(y_desc, wide, n)
            z_ring.fill(z_desc, block, n)
            if b_desc is not None:
                b_ring.fill(b_desc, block, n)
            n += 1


@gluon.jit
def three_sums(sums, gamma, at, REVERSE: gl.constexpr, PAIRS: gl.constexpr, FLAT: gl.constexpr):
    """``sums_at`` along rows and columns of pairs, and along rows of tiles."""
    b_i, s_all = sums_at(sums, gamma, at[0], at[1], REVERSE, gl.SliceLayout(1, PAIRS))
    b_j, s_all = sums_at(sums, gamma, at[0], at[1], REVERSE, gl.SliceLayout(0, PAIRS))
    b_k, s_all = sums_at(sums, gamma, at[0], at[1], REVERSE, gl.SliceLayout(1, FLAT))
    return b_i, b_j, b_k, s_all


@gluon.jit
def weigh(
    x_ring, y_ring, z_ring, a_ring, u_tiles, sums, gamma, cu_seqlens, scale,
    first, last, N, T, begin, stop, REVERSE: gl.constexpr, GRADIENT: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """A chunk's pairs a = scale w (x·y), and u, its z as they are added to the state.

    Where a sequence ends inside a chunk, y and z are cleared before anybody else looks at them.
    """
    BACK: gl.constexpr = REVERSE != GRADIENT
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    PAIRS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, PAIRS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, PAIRS)
    o_i = gl.arange(0, C, ROW)[:, None]
    o_j = gl.arange(0, C, COLUMN)[None, :]
    if BACK:
        m = o_i <= o_j
    else:
        m = o_i >= o_j
    n = 0
    if GATED:
        here = visit(cu_seqlens, first, N, T, begin, stop)
        at = chunk_ahead(0, here, here, cu_seqlens, BACK)
        b_i, b_j, b_k, s_all = three_sums(sums, gamma, at, REVERSE, PAIRS, FLAT)
    for i_n in range(first, gl.minimum(last, N)):
        if GATED:
            after = visit(cu_seqlens, i_n + 1, N, T, begin, stop)
        else:
            here = visit(cu_seqlens, i_n, N, T, begin, stop)
        for i in range(here[3]):
            x_ring.wait(n)
            y_ring.wait(n)
            if cu_seqlens is not None:
                _, there = chunk_at(i, here, BACK)
                if there < C:
                    z_ring.wait(n)
                    clear(y_ring.tile(n), there, FLAT)
                    clear(z_ring.tile(n), there, FLAT)
                    fence_async_shared()
                    gl.thread_barrier()
            b_0 = gl.zeros([C, C], gl.float32, PAIRS)
            b_a = warpgroup_mma(
                x_ring.tile(n), y_ring.tile(n).permute((1, 0)), b_0, use_acc=False, is_async=True
            )
            if GATED:
                b_w = b_i[:, None] - b_j[None, :]
                if GRADIENT:
                    b_w = -b_w
                b_w = power(gl.where(m, b_w, float("-inf")))
                b_p = power(b_k if GRADIENT else s_all - b_k)
                # the next chunk's, which arrive while this one is at work
                at = chunk_ahead(i + 1, here, after, cu_seqlens, BACK)
                b_i, b_j, b_k, s_all = three_sums(sums, gamma, at, REVERSE, PAIRS, FLAT)
            wait_before(a_ring.empty, n)
            if GATED:
                z_ring.wait(n)
                b_z = z_ring.tile(n).load(FLAT)
                b_u = b_z.to(gl.float32) * b_p[:, None]
                u_tiles.index(n % AHEAD).reshape([C, BZ]).store(b_u.to(b_z.dtype))
                b_a = warpgroup_mma_wait(0, deps=(b_a,))
                # of tokens that are not there the product is 0, but w may be 2^127, and scale w ∞
                b_a = b_a * scale * b_w
            else:
                b_a = warpgroup_mma_wait(0, deps=(b_a,))
                b_a = gl.where(m, b_a * scale, 0.0)
            a_ring.tile(n).store(b_a.to(a_ring.tiles.dtype))
            fence_async_shared()
            gl.thread_barrier()
            arrive(a_ring.ready, n)
            arrive(x_ring.empty, n)
            arrive(y_ring.empty, n)
            if GATED:
                arrive(z_ring.empty, n)
            n += 1
        if GATED:
            if cu_seqlens is not None:
                if here[3] == 0:
                    at = chunk_ahead(0, after, after, cu_seqlens, BACK)
                    b_i, b_j, b_k, s_all = three_sums(sums, gamma, at, REVERSE, PAIRS, FLAT)
            here = after


@gluon.jit
def carry_on(
    y_ring, z_ring, a_ring, u_tiles, h_ring, l_tile, sums, gamma, start, carry, end, cu_seqlens,
    scale, i_h, i_z, first, last, N, T, begin, stop, H: gl.constexpr, X: gl.constexpr,
    Z: gl.constexpr, REVERSE: gl.constexpr, GRADIENT: gl.constexpr, TURNED: gl.constexpr,
    V_FIRST: gl.constexpr, GATED: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Carry the state from chunk to chunk, and lay out what enters each as an operand.

    SPLIT, what bf16 leaves of it is another.
    """
    BACK: gl.constexpr = REVERSE != GRADIENT
    WEIGHED: gl.constexpr = GATED or (cu_seqlens is not None)
    o_x = gl.arange(0, X, _ROW)[:, None]
    o_z = i_z * BZ + gl.arange(0, BZ, _COLUMN)[None, :]
    p_kv = o_z * X + o_x if TURNED else o_x * Z + o_z
    p_state = o_z * X + o_x if TURNED != V_FIRST else o_x * Z + o_z
    s_held = scale if GRADIENT else 1.0
    n = 0
    if GATED:
        here = visit(cu_seqlens, first, N, T, begin, stop)
        token, there = chunk_ahead(0, here, here, cu_seqlens, BACK)
        s_next = sum_of(sums, gamma, token, there, REVERSE)
    for i_n in range(first, gl.minimum(last, N)):
        if GATED:
            after = visit(cu_seqlens, i_n + 1, N, T, begin, stop)
        else:
            here = visit(cu_seqlens, i_n, N, T, begin, stop)
        bos, length, at, steps = here
        count = gl.cdiv(length, C)
        head = bos >= begin
        tail = (at + steps == count) & ((at < count) | (length == 0))
        opens = tail if BACK else head
        closes = head if BACK else tail
        place = (i_n * H + i_h).to(gl.int64) * (X * Z)
        b_s = gl.zeros([X, BZ], gl.float32, _ACC)
        if start is not None:
            b_start = gl.load(start + place + p_state, mask=opens & (o_x < X), other=0.0)
            b_s += b_start.to(gl.float32) / s_held
        if carry is not None:
            b_s += gl.load(carry + p_kv, mask=(opens == 0) & (o_x < X), other=0.0)
        for i in range(steps):
            if GATED:
                s_all = s_next
                token, there = chunk_ahead(i + 1, here, after, cu_seqlens, BACK)
                s_next = sum_of(sums, gamma, token, there, REVERSE)
            wait_before(h_ring.empty, n)
            h_tile = h_ring.tile(0)
            if SPLIT:
                b_h = leading(b_s)
                h_tile.store(b_h.to(h_tile.dtype))
                l_tile.store((b_s - b_h).to(l_tile.dtype))
            else:
                h_tile.store(b_s.to(h_tile.dtype))
            fence_async_shared()
            gl.thread_barrier()
            arrive(h_ring.ready, n)
            if WEIGHED:
                a_ring.wait(n)
            y_ring.wait(n)
            turned = y_ring.tile(n).permute((1, 0))
            if GATED:
                b_s = b_s * power(s_all)
                u = u_tiles.index(n % AHEAD).reshape([C, BZ])
                b_s = warpgroup_mma(turned, u, b_s, is_async=True)
            else:
                z_ring.wait(n)
                b_s = warpgroup_mma(turned, z_ring.tile(n), b_s, is_async=True)
            b_s = warpgroup_mma_wait(0, deps=(b_s,))
            gl.thread_barrier()
            arrive(y_ring.empty, n)
            if WEIGHED:
                arrive(a_ring.empty, n)
            if not GATED:
                arrive(z_ring.empty, n)
            n += 1
        if end is not None:
            b_e = (b_s * s_held).to(end.dtype.element_ty)
            gl.store(end + place + p_state, b_e, mask=closes & (o_x < X))
        if GATED:
            if cu_seqlens is not None:
                if steps == 0:
                    token, there = chunk_ahead(0, after, after, cu_seqlens, BACK)
                    s_next = sum_of(sums, gamma, token, there, REVERSE)
            here = after


@gluon.jit
def put_out(
    o_desc, out, rows, x_ring, z_ring, b_ring, a_ring, h_ring, l_tile, o_tile, sums, gamma,
    cu_seqlens, scale, i_b, i_h, i_z, first, last, N, T, begin, stop, H: gl.constexpr,
    Z: gl.constexpr, REVERSE: gl.constexpr, GRADIENT: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """out = scale w (x·S) + a z, and rows.

    The gate's gradient is what is left between rows of two walks.  Each pair of tokens is in both,
    once through either walk's state.  Both have a key, or a query, with its weight and rounded: so
    has each row here, and what is rounded alike leaves nothing between them.
    """
    BACK: gl.constexpr = REVERSE != GRADIENT
    SPLIT: gl.constexpr = rows is not None
    o_c = gl.arange(0, C, _ROW)
    p_o = o_c[:, None] * (H * Z) + i_z * BZ + gl.arange(0, BZ, _COLUMN)[None, :]
    n = 0
    if GATED:
        here = visit(cu_seqlens, first, N, T, begin, stop)
        t_next, n_next = chunk_ahead(0, here, here, cu_seqlens, BACK)
        b_next, s_next = sums_at(sums, gamma, t_next, n_next, REVERSE, _ROW)
    for i_n in range(first, last):
        if GATED:
            after = visit(cu_seqlens, i_n + 1, N, T, begin, stop)
        else:
            here = visit(cu_seqlens, i_n, N, T, begin, stop)
        for i in range(here[3]):
            token, there = chunk_at(i, here, BACK)
            p = out + (token.to(gl.int64) * H + i_h) * Z + p_o
            m_c = o_c < there
            if i_n < N:
                if GATED:
                    b_q = power(s_next - b_next if GRADIENT else b_next)
                    t_next, n_next = chunk_ahead(i + 1, here, after, cu_seqlens, BACK)
                    b_next, s_next = sums_at(sums, gamma, t_next, n_next, REVERSE, _ROW)
                x_ring.wait(n)
                h_ring.wait(n)
                b_o = gl.zeros([C, BZ], gl.float32, _ACC)
                b_o = warpgroup_mma(
                    x_ring.tile(n), h_ring.tile(0), b_o, use_acc=False, is_async=True
                )
                if SPLIT:
                    b_o = warpgroup_mma(x_ring.tile(n), l_tile, b_o, is_async=True)
                tma.store_wait(0)  # the last chunk's
                b_o = warpgroup_mma_wait(0, deps=(b_o,))
                gl.thread_barrier()
                arrive(x_ring.empty, n)
                arrive(h_ring.empty, n)
                if SPLIT:
                    # beside, as the other walk's state holds it
                    b_ring.wait(n)
                    b_f = b_ring.tile(n).load(_ACC).to(gl.float32) * b_q[:, None]
                    b_r = gl.sum(b_o * (rounded(b_f) - b_f), 1) * scale
                if GATED:
                    b_o = b_o * (b_q * scale)[:, None]
                else:
                    b_o = b_o * scale
                a_ring.wait(n)
                z_ring.wait(n)
                b_o = warpgroup_mma(a_ring.tile(n), z_ring.tile(n), b_o, is_async=True)
                b_o = warpgroup_mma_wait(0, deps=(b_o,))
                o_tile.store(b_o.to(o_tile.dtype))
                if SPLIT:
                    b_r += gl.sum(b_o * b_ring.tile(n).load(_ACC).to(gl.float32), 1)
                    gl.store(rows + token + o_c, b_r, mask=m_c)
                fence_async_shared()
                gl.thread_barrier()
                arrive(z_ring.empty, n)
                arrive(a_ring.empty, n)
                if SPLIT:
                    arrive(b_ring.empty, n)
                if there == C or cu_seqlens is None:
                    tile = o_tile.reshape([1, C, 1, BZ])
                    tma.async_copy_shared_to_global(o_desc, [i_b, token, i_h, i_z * BZ], tile)
                else:
                    gl.store(p, b_o.to(o_tile.dtype), mask=m_c[:, None])
                n += 1
            else:  # behind the last sequence
                b_0 = gl.zeros([C, BZ], o_tile.dtype, _ACC)
                gl.store(p, b_0, mask=m_c[:, None])
        if GATED:
            if cu_seqlens is not None:
                if here[3] == 0:
                    t_next, n_next = chunk_ahead(0, after, after, cu_seqlens, BACK)
                    b_next, s_next = sums_at(sums, gamma, t_next, n_next, REVERSE, _ROW)
            here = after
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["scale", "N", "T", "segment", "segments"])
def hopper_walk_kernel(
    out, rows, sums, g_gamma, start, carry, end, cu_seqlens, x_desc, y_desc, z_desc, b_desc,
    o_desc, scale, N, T, segment, segments,
    H: gl.constexpr, X: gl.constexpr, Z: gl.constexpr, REVERSE: gl.constexpr,
    GRADIENT: gl.constexpr, TURNED: gl.constexpr, V_FIRST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What ``walk_kernel`` does, with a block [X, BZ] of the state, without a normaliser.

    A program owns the chunks that begin in one of the ``segments`` of a row of T tokens, be they
    those of one sequence or of several; where there are several segments it finds the state that
    enters in ``carry`` [segments, H, K V + K].
    """
    NZ: gl.constexpr = Z // BZ
    GATED: gl.constexpr = (sums is not None) or (g_gamma is not None)
    i_z = gl.program_id(0) % NZ
    i_h = gl.program_id(0) // NZ % H
    unit = gl.program_id(0) // (NZ * H)
    i_b = unit // segments
    begin = unit % segments * segment
    stop = gl.minimum(begin + segment, T)
    first, last = sequences_in(cu_seqlens, i_b, N, T, begin, stop)
    gamma = 0.0
    if g_gamma is not None:
        gamma = gl.load(g_gamma + i_h).to(gl.float32) * LOG2E
    rows_of_tokens = gl.num_programs(0) // (NZ * H * segments)
    line = i_h * rows_of_tokens + i_b
    if sums is not None:
        sums += line.to(gl.int64) * T
    if rows is not None:
        rows += (i_z * H * rows_of_tokens + line).to(gl.int64) * T
    if carry is not None:
        carry += (unit * H + i_h).to(gl.int64) * (X * Z + (Z if TURNED else X))

    x_ring = new_ring(x_desc, STAGES, 2)
    y_ring = new_ring(y_desc, STAGES, 2)
    z_ring = new_ring(z_desc, STAGES, 2)
    a_ring = new_ring(o_desc, AHEAD, 2 if GATED or cu_seqlens is not None else 1)
    h_tiles = gl.allocate_shared_memory(o_desc.dtype, [1, 1, X, 1, BZ], o_desc.layout)
    h_ring = Ring(h_tiles, new_barriers(1, 1), new_barriers(1, 1))
    o_tile = gl.allocate_shared_memory(o_desc.dtype, [C, BZ], _TILE)
    # These stand for what a call does not have; partitions take no None.  No barrier is made that
    # is not used: its memory would be that of a tile, and its beginning be seen there.
    u_tiles = a_ring.tiles
    b_ring = z_ring
    l_tile = o_tile
    if GATED:
        u_tiles = new_tiles(o_desc, AHEAD)
    if rows is not None:
        b_ring = new_ring(b_desc, STAGES, 1)
        l_tile = gl.allocate_shared_memory(o_desc.dtype, [X, BZ], _TILE)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                carry_on,
                (
                    y_ring, z_ring, a_ring, u_tiles, h_ring, l_tile, sums, gamma, start, carry,
                    end, cu_seqlens, scale, i_h, i_z, first, last, N, T, begin, stop,
                    H, X, Z, REVERSE, GRADIENT, TURNED, V_FIRST, GATED, rows is not None,
                ),
            ),
            (
                put_out,
                (
                    o_desc, out, rows, x_ring, z_ring, b_ring, a_ring, h_ring, l_tile, o_tile,
                    sums, gamma, cu_seqlens, scale, i_b, i_h, i_z, first, last, N, T, begin, stop,
                    H, Z, REVERSE, GRADIENT, GATED,
                ),
            ),
            (
                weigh,
                (
                    x_ring, y_ring, z_ring, a_ring, u_tiles, sums, gamma, cu_seqlens, scale,
                    first, last, N, T, begin, stop, REVERSE, GRADIENT, GATED,
                ),
            ),
            (
                produce,
                (
                    x_desc, y_desc, z_desc, b_desc, x_ring, y_ring, z_ring, b_ring, cu_seqlens,
                    i_b, i_h, i_z, first, last, N, T, begin, stop, REVERSE != GRADIENT,
                ),
            ),
        ],
        [4, 8, 1],
        [OUT_REGISTERS, WEIGH_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def run_walk(
    call: Call, x, y, z, *, starts, carry, ends, decays, cu_seqlens, scale, segment: int,
    v_first: bool, gradient: bool = False, turned: bool = False, beside: Tensor | None = None,
) -> tuple[Tensor, None, Tensor | None]:  # fmt: skip
    """Launch ``hopper_walk_kernel``: out in the shape of z, no normaliser, and rows."""
    B, T, H, X = x.shape
    Z, block = z.shape[-1], BZ.value
    out = torch.empty_like(z)
    sums, _, g_gamma = decays
    rows = None
    if beside is not None:
        rows = z.new_empty(Z // block, H, call.tokens, dtype=torch.float32)
    tiles = (x, X), (y, X), (z, block), (beside, block), (out, block)
    descriptors = [None if t is None else descriptor(t, C.value, size) for t, size in tiles]
    segments = cdiv(T, segment) if segment else 1
    launch(
        hopper_walk_kernel,
        B * segments * H * (Z // block),
        (out, rows, sums, g_gamma, starts[0], carry, ends[0], cu_seqlens),
        (*descriptors, scale, call.N, T, segment or cdiv(T, C.value) * C.value, segments),
        {
            "H": H,
            "X": X,
            "Z": Z,
            "REVERSE": call.constants["REVERSE"],
            "GRADIENT": gradient,
            "TURNED": turned,
            "V_FIRST": v_first,
            "STAGES": 2 if X == 256 else 3,  # what fits into shared memory
            "num_warps": 4,
        },
    )
    return out, None, rows
