"""The walk over time on Hopper, warp-specialised: what does not wait for the state runs ahead.

One warp copies tiles: ``hopper_chunks.py``.  Four weigh the pairs inside a chunk and what is added
to the state; four carry the state, multiply it and put out.
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
    VECTOR,
    Ring,
    arrive,
    descriptor,
    new_ring,
    new_tiles,
    told,
    wait_before,
)
from fla.ops.common.kernels import LARGEST_EXPONENT, LOG2E, cdiv, multiprocessors, power
from fla.ops.common.launch import launch
from fla.ops.simple_gla.blocks import Call, steep
from fla.ops.simple_gla.hopper_blocks import C, leading, rounded, seen, sum_of, sums_at
from fla.ops.simple_gla.hopper_chunks import (
    CLOSES,
    GOES_ON,
    LAST,
    MARKS,
    MORE,
    OPENS,
    PLACES,
    THERE,
    TOKEN,
    WHOSE,
    forget,
    new_rings,
    produce_own,
    row_and_head,
)

# Registers a thread; what they leave is the state's
WEIGH_REGISTERS = gl.constexpr(208)
COPY_REGISTERS = gl.constexpr(32)
BZ = gl.constexpr(64)
# Chunks that the pairs may be ahead of the output
AHEAD = gl.constexpr(2)
# The widest states that shares do not spill; and what these have to save, for they cost some 5 %
_WIDEST = 128
_EVEN = 1.1
# Parts of each row that ``carry_on`` leaves to be added up
PARTS = gl.constexpr(32)
# Columns of a chunk that shared memory holds beside two tiles each of pairs, u, output and parts
_COLUMNS = 1400
_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_COLUMN = gl.constexpr(gl.SliceLayout(0, _ACC))
# Parts as they are written, by eight rows of lanes, without conflicts
_PARTS = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))


@gluon.jit
def put_rows(rows, parts, places, n, scale, B, T, H: gl.constexpr, PACKED: gl.constexpr):
    """Store the rows of the last chunk that ``carry_on`` is through with when ``weigh`` is at n."""
    b_r = gl.sum(parts, 0) * scale
    i_b, i_h = row_and_head(places, n - AHEAD, H, PACKED)
    token = (i_h * B + i_b).to(gl.int64) * T + told(places, n - AHEAD, TOKEN)
    there = gl.where(n < AHEAD, 0, told(places, n - AHEAD, THERE))
    o_r = gl.arange(0, C, b_r.type.layout)
    gl.store(rows + token + o_r, b_r, mask=o_r < there)


@gluon.jit
def weigh(
    rows, x_ring, y_ring, z_ring, a_ring, u_tiles, q_tiles, d_tiles, r_tiles, s_tiles, places,
    g_gamma, gamma, scale, B, T, H: gl.constexpr, REVERSE: gl.constexpr, GRADIENT: gl.constexpr,
    GATED: gl.constexpr, SUMMED: gl.constexpr, SHARED: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """A chunk's pairs a = w (x·y); u, its z as they are added to the state; weights of x; rows.

    Where rows are wanted and decays ``steep``, pairs of tokens with themselves stand apart, in d.
    Weights of tokens that are not there may be any number.
    """
    BACK: gl.constexpr = REVERSE != GRADIENT
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    PAIRS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, PAIRS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, PAIRS)
    PARTED: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [1, 4], [1, 0])
    m = seen(BACK, PAIRS)
    m_own = m & seen(not BACK, PAIRS)
    b_most = gl.where(m, LARGEST_EXPONENT, float("-inf"))  # as in ``power``
    n = 0
    more = n >= 0  # there is a chunk
    while more:
        x_ring.wait(n)
        there = told(places, n, THERE)
        if SHARED and g_gamma is not None:
            _, i_h = row_and_head(places, n, H, PACKED)
            gamma = gl.load(g_gamma + i_h).to(gl.float32) * LOG2E
        b_0 = gl.zeros([C, C], gl.float32, PAIRS)
        b_a = warpgroup_mma(
            x_ring.tile(n), y_ring.tile(n).permute((1, 0)), b_0, use_acc=False, is_async=True
        )
        if GATED:
            b_i = sums_at(s_tiles, gamma, n, there, REVERSE, SUMMED, ROW)
            b_w = b_i[:, None] - sums_at(s_tiles, gamma, n, there, REVERSE, SUMMED, COLUMN)[None, :]
            if GRADIENT:
                b_w = -b_w
            b_w = gl.exp2(gl.minimum(b_w, b_most))
            b_k = sums_at(s_tiles, gamma, n, there, REVERSE, SUMMED, gl.SliceLayout(1, FLAT))
            s_all = sum_of(s_tiles, gamma, n, there, REVERSE, SUMMED)
            b_p = power(b_k if GRADIENT else s_all - b_k)
            b_q = power(s_all - b_i if GRADIENT else b_i)
        more = (told(places, n, MARKS) & MORE) != 0
        wait_before(a_ring.empty, n)
        if rows is not None:
            b_r = r_tiles.index(n % AHEAD).load(PARTED)
        if GATED:
            q_tiles.index(n % AHEAD).store(b_q)
            b_z = z_ring.tile(n).load(FLAT)
            b_u = b_z.to(gl.float32) * b_p[:, None]
            u_tiles.index(n % AHEAD).reshape([C, BZ]).store(b_u.to(b_z.dtype))
            b_a = warpgroup_mma_wait(0, deps=(b_a,))
            if rows is not None:
                apart = m_own & steep(s_all, there)
                b_d = gl.sum(gl.where(apart, b_a, 0.0), 1)
                d_tiles.index(n % AHEAD).store(b_d.to(d_tiles.dtype))
                b_a = gl.where(apart, 0.0, b_a)
            b_a = b_a * b_w
        else:
            b_a = warpgroup_mma_wait(0, deps=(b_a,))
            b_a = gl.where(m, b_a, 0.0)
        a_ring.tile(n).store(b_a.to(a_ring.tiles.dtype))
        fence_async_shared()
        gl.thread_barrier()
        arrive(a_ring.ready, n)
        arrive(x_ring.empty, n)
        if rows is not None:
            put_rows(rows, b_r, places, n, scale, B, T, H, PACKED)
        n += 1
    if rows is not None:
        for _ in gl.static_range(AHEAD):
            wait_before(a_ring.empty, n)
            put_rows(rows, r_tiles.index(n % AHEAD).load(PARTED), places, n, scale, B, T, H, PACKED)
            n += 1


@gluon.jit
def carry_on(
    o_desc, out, rows, x_ring, y_ring, z_ring, b_ring, a_ring, u_tiles, q_tiles, d_tiles, o_tiles,
    r_tiles, s_tiles, places, g_gamma, gamma, start, carry, handed, flags, end, cu_seqlens, scale,
    i_z, unit, units, N, T, begin, stop, H: gl.constexpr, X: gl.constexpr, Z: gl.constexpr,
    REVERSE: gl.constexpr, GRADIENT: gl.constexpr, TURNED: gl.constexpr, V_FIRST: gl.constexpr,
    GATED: gl.constexpr, SUMMED: gl.constexpr,
):  # fmt: skip
    """Carry the state from chunk to chunk, and put out = scale (w (x·S) + a z), and rows.

    All of it stands the other way round, Sᵀ [Z, X] and outᵀ [Z, C]: so the state is, from
    registers, the left operand of its own product.

    The gate's gradient is what is left between rows of two walks.  Each pair of tokens is in both,
    once through either walk's state.  Both have a key, or a query, with its weight and rounded: so
    has each row here, and what is rounded alike leaves nothing between them.  Where decays are
    ``steep``, rows are without tokens' pairs with themselves.
    """
    NZ: gl.constexpr = Z // BZ
    SPLIT: gl.constexpr = rows is not None  # what bf16 leaves of the state is another operand
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128 if X > 128 else X, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, _ACC, 2)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    o_x = gl.arange(0, X, gl.SliceLayout(0, STATE))[None, :]
    o_s = gl.arange(0, BZ, gl.SliceLayout(1, STATE))[:, None]
    o_z = i_z * BZ + o_s
    p_kv = o_z * X + o_x if TURNED else o_x * Z + o_z  # [BZ, X]
    p_state = o_z * X + o_x if TURNED != V_FIRST else o_x * Z + o_z
    o_c = gl.arange(0, C, gl.SliceLayout(1, FLAT))
    o_o = gl.arange(0, BZ, gl.SliceLayout(0, FLAT))
    p_o = i_z * BZ + o_c[:, None] * (H * Z) + o_o[None, :]  # [C, BZ]
    s_held = scale if GRADIENT else 1.0
    n = 0
    more = n >= 0  # there is a chunk
    while more:
        x_ring.wait(n)
        marks = told(places, n, MARKS)
        place = told(places, n, WHOSE).to(gl.int64) * (X * Z)
        i_b, i_h = row_and_head(places, n, H, cu_seqlens is not None)
        if handed is not None and g_gamma is not None:
            gamma = gl.load(g_gamma + i_h).to(gl.float32) * LOG2E
        opens = (marks & OPENS) != 0
        b_s = gl.zeros([BZ, X], gl.float32, STATE)
        if start is not None:
            b_start = gl.load(start + place + p_state, mask=opens & (o_x < X), other=0.0)
            b_s += b_start.to(gl.float32) / s_held
        if carry is not None:
            b_s += gl.load(carry + p_kv, mask=(opens == 0) & (o_x < X), other=0.0)
        if handed is not None:
            before = handed + gl.maximum(gl.program_id(0) - NZ, 0) * (BZ * X)
            b_s += gl.load(before + o_s * X + o_x, mask=(opens == 0) & (o_x < X), other=0.0)
        within = n >= 0  # a sequence has a chunk
        while within:
            x_ring.wait(n)
            token = told(places, n, TOKEN)
            there = told(places, n, THERE)
            marks = told(places, n, MARKS)
            turned = x_ring.tile(n).permute((1, 0))
            b_h = leading(b_s) if SPLIT else b_s
            b_o = gl.zeros([BZ, C], gl.float32, _ACC)
            b_o = warpgroup_mma(
                gl.convert_layout(b_h.to(o_desc.dtype), LEFT), turned, b_o, use_acc=False,
                is_async=True,
            )  # fmt: skip
            if SPLIT:
                b_l = gl.convert_layout((b_s - b_h).to(o_desc.dtype), LEFT)
                b_o = warpgroup_mma(b_l, turned, b_o, is_async=True)
            if GATED:
                s_all = sum_of(s_tiles, gamma, n, there, REVERSE, SUMMED)
                b_s = b_s * power(s_all)
            a_ring.wait(n)
            # The state's product before the wait for the output's, behind which ptxas would move
            # what is done above
            z_turned = z_ring.tile(n).permute((1, 0))
            if GATED:
                b_q = q_tiles.index(n % AHEAD).load(_COLUMN)
                u = u_tiles.index(n % AHEAD).reshape([C, BZ])
                b_s = warpgroup_mma(u.permute((1, 0)), y_ring.tile(n), b_s, is_async=True)
            else:
                b_s = warpgroup_mma(z_turned, y_ring.tile(n), b_s, is_async=True)
            if SPLIT:
                # beside, as the other walk's state holds it
                b_b = b_ring.tile(n).permute((1, 0)).load(_ACC).to(gl.float32)
                b_f = b_b * b_q[None, :]
                b_f = rounded(b_f) - b_f
            b_o = warpgroup_mma_wait(1, deps=(b_o,))
            if SPLIT:
                b_f = b_o * b_f
            if GATED:
                b_o = b_o * b_q[None, :]
            b_o = warpgroup_mma(z_turned, a_ring.tile(n).permute((1, 0)), b_o, is_async=True)
            b_o, b_s = warpgroup_mma_wait(0, deps=(b_o, b_s))
            if SPLIT:
                # of a row's 64 products, a column here, each thread has two
                b_r = (b_f + b_o * b_b).reshape([4, 2, 8, C])
                r_tiles.index(n % AHEAD).store(gl.sum(b_r, 1).reshape([PARTS, C]))
                if steep(s_all, there):
                    b_d = d_tiles.index(n % AHEAD).load(_COLUMN).to(gl.float32)
                    b_o += b_d[None, :] * z_turned.load(_ACC).to(gl.float32)
            o_tile = o_tiles.index(n % 2).reshape([C, BZ])
            o_tile.permute((1, 0)).store((b_o * scale).to(o_desc.dtype))
            tma.store_wait(0)  # of the last chunk, so that the next may be laid down
            fence_async_shared()
            gl.thread_barrier()
            arrive(x_ring.empty, n)
            arrive(a_ring.empty, n)
            if there == C:
                tile = o_tiles.index(n % 2)
                tma.async_copy_shared_to_global(o_desc, [i_b, token, i_h, i_z * BZ], tile)
            else:
                p = out + (i_b.to(gl.int64) * T + token) * (H * Z) + i_h * Z + p_o
                gl.store(p, o_tile.load(FLAT), mask=(o_c < there)[:, None])
            within = (marks & LAST) == 0
            n += 1
        if end is not None:
            b_e = (b_s * s_held).to(end.dtype.element_ty)
            gl.store(end + place + p_state, b_e, mask=((marks & CLOSES) != 0) & (o_x < X))
        if handed is not None:
            if (marks & GOES_ON) != 0:
                p = handed + gl.program_id(0) * (BZ * X) + o_s * X + o_x
                gl.store(p, b_s, mask=o_x < X)
                gl.thread_barrier()
                gl.atomic_xchg(flags + gl.program_id(0), 1, sem="release", scope="gpu")
        more = (marks & MORE) != 0
    if cu_seqlens is not None:
        for i_h in range(unit if carry is None else unit % H, H, units if carry is None else H):
            forget(out + i_h * Z, p_o, o_c, H * Z, cu_seqlens, N, T, begin, stop)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["scale", "N", "T", "segment"])
def hopper_walk_kernel(
    out, rows, sums, g_gamma, start, carry, handed, flags, end, cu_seqlens, x_desc, y_desc, z_desc,
    b_desc, o_desc, scale, N, T, segment,
    H: gl.constexpr, X: gl.constexpr, Z: gl.constexpr, REVERSE: gl.constexpr,
    GRADIENT: gl.constexpr, TURNED: gl.constexpr, V_FIRST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What ``walk_kernel`` does, with a block [X, BZ] of the state, without a normaliser.

    A program owns a head; with ``carry`` [segments, H, K V + K], the states that enter, the chunks
    of a head that begin in a ``segment`` of a row of T tokens; and a share of all chunks with
    ``handed`` [programs, BZ, X], for states that are handed on, and ``flags`` [programs], zeros.
    """
    NZ: gl.constexpr = Z // BZ
    BACK: gl.constexpr = REVERSE != GRADIENT
    SUMMED: gl.constexpr = sums is not None
    GATED: gl.constexpr = SUMMED or (g_gamma is not None)
    i_z = gl.program_id(0) % NZ
    unit = gl.program_id(0) // NZ
    units = gl.num_programs(0) // NZ
    begin = 0
    stop = T + 1  # empty sequences at the very end too
    if carry is not None:
        begin = unit // H * segment
        stop = gl.where(begin + segment < T, begin + segment, stop)
        carry += unit.to(gl.int64) * (X * Z + (Z if TURNED else X))
    B = N if cu_seqlens is None else 1
    gamma = 0.0
    if handed is None and g_gamma is not None:  # of its only head
        gamma = gl.load(g_gamma + unit % H).to(gl.float32) * LOG2E
    if rows is not None:
        rows += (i_z * H * B).to(gl.int64) * T

    x_ring, y_ring, z_ring = new_rings(x_desc, y_desc, z_desc, STAGES, cu_seqlens is not None)
    a_ring = new_ring(o_desc, AHEAD, 1)
    o_tiles = new_tiles(o_desc, 2)
    # These stand for what a call does not have; partitions take no None.  No barrier is made that
    # is not used: its memory would be that of a tile, and its beginning be seen there.
    u_tiles = a_ring.tiles
    q_tiles = a_ring.tiles
    d_tiles = a_ring.tiles
    r_tiles = a_ring.tiles
    s_tiles = a_ring.tiles
    b_ring = z_ring
    places = gl.allocate_shared_memory(gl.int32, [PLACES, 4], VECTOR)
    if GATED:
        u_tiles = new_tiles(o_desc, AHEAD)
        q_tiles = gl.allocate_shared_memory(gl.float32, [AHEAD, C], VECTOR)
    if SUMMED:
        s_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, C], VECTOR)
    if rows is not None:
        b_ring = Ring(new_tiles(b_desc, STAGES), x_ring.ready, x_ring.empty)
        d_tiles = gl.allocate_shared_memory(o_desc.dtype, [AHEAD, C], VECTOR)
        r_tiles = gl.allocate_shared_memory(gl.float32, [AHEAD, PARTS, C], _PARTS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                carry_on,
                (
                    o_desc, out, rows, x_ring, y_ring, z_ring, b_ring, a_ring, u_tiles, q_tiles,
                    d_tiles, o_tiles, r_tiles, s_tiles, places, g_gamma, gamma, start, carry,
                    handed, flags, end, cu_seqlens, scale, i_z, unit, units, N, T, begin, stop,
                    H, X, Z, REVERSE, GRADIENT, TURNED, V_FIRST, GATED, SUMMED,
                ),
            ),
            (
                weigh,
                (
                    rows, x_ring, y_ring, z_ring, a_ring, u_tiles, q_tiles, d_tiles, r_tiles,
                    s_tiles, places, g_gamma, gamma, scale, B, T, H, REVERSE, GRADIENT, GATED,
                    SUMMED, handed is not None, cu_seqlens is not None,
                ),
            ),
            (
                produce_own,
                (
                    x_desc, y_desc, z_desc, b_desc, sums, flags, x_ring, y_ring, z_ring, b_ring,
                    s_tiles, places, cu_seqlens, i_z, unit, units, N, T, begin, stop,
                    H, NZ, BACK, carry is not None,
                ),
            ),
        ],
        [4, 1],
        [WEIGH_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def pays(shares: int, heads: int, packed: bool) -> bool:
    """Whether ``shares`` of all chunks are walked sooner than heads, as many at once.

    Heads of one sequence each are not, where all run at once.
    """
    rounds = cdiv(heads, shares)
    return rounds * shares > _EVEN * heads and (packed or rounds > 1)


def run_walk(
    call: Call, x, y, z, *, starts, carry, ends, decays, cu_seqlens, scale, segment: int,
    v_first: bool, gradient: bool = False, turned: bool = False, beside: Tensor | None = None,
) -> tuple[Tensor, None, Tensor | None]:  # fmt: skip
    """Launch ``hopper_walk_kernel``: out in the shape of z, no normaliser, and rows."""
    B, T, H, X = x.shape
    Z, block = z.shape[-1], BZ.value
    out = torch.empty_like(z)
    sums, _, g_gamma = decays
    rows = handed = flags = None
    if beside is not None:
        rows = z.new_empty(Z // block, H, call.tokens, dtype=torch.float32)
    # programs of each block of Z: of segments, of heads, or of shares
    units = cdiv(T, segment) * H if segment else B * H
    shares = max(multiprocessors(z.device) // (Z // block), 1)
    if not segment and X <= _WIDEST and pays(shares, units, cu_seqlens is not None):
        units = shares
        handed = z.new_empty(units * (Z // block), block, X, dtype=torch.float32)
        flags = z.new_zeros(len(handed), dtype=torch.int32)
    tiles = (x, X), (y, X), (z, block), (beside, block), (out, block)
    descriptors = [None if t is None else descriptor(t, C.value, size) for t, size in tiles]
    launch(
        hopper_walk_kernel,
        units * (Z // block),
        (out, rows, sums, g_gamma, starts[0], carry, handed, flags, ends[0], cu_seqlens),
        (*descriptors, scale, call.N, T, segment or T),
        {
            "H": H,
            "X": X,
            "Z": Z,
            "REVERSE": call.constants["REVERSE"],
            "GRADIENT": gradient,
            "TURNED": turned,
            "V_FIRST": v_first,
            "STAGES": _COLUMNS // (2 * X + block * (1 if beside is None else 2)),
            "num_warps": 4,
        },
    )
    return out, None, rows
