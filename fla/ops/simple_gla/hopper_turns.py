"""The walk forward on Hopper where heads are few and narrow: those who put out take turns.

There programs with 64 columns of the state leave half of the chip idle.  These have 32, and nothing
but the state is on their chain.  One warp copies tiles and says where each chunk lies; four carry
the state and lay down what enters each chunk.  Three partitions of four put out: each has every
third chunk, its pairs, what is added to the state, and its output.
"""

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
    aggregate,
    arrive,
    descriptor,
    new_barriers,
    new_tiles,
    tile_of,
    told,
    wait_before,
    wait_for,
)
from fla.ops.common.kernels import LOG2E, multiprocessors, power
from fla.ops.common.launch import launch
from fla.ops.simple_gla.blocks import Call
from fla.ops.simple_gla.hopper_blocks import C, seen, sum_of, sums_at
from fla.ops.simple_gla.hopper_chunks import (
    BY_FOUR,
    CLOSES,
    LAST,
    MARKS,
    OPENS,
    PLACES,
    THERE,
    TOKEN,
    WHOSE,
    chunks_of,
    forget,
    new_rings,
    produce,
)

# How many take turns, and registers of a thread of each; what they leave is the state's
TURNS = gl.constexpr(3)
REGISTERS = gl.constexpr(120)
COPY_REGISTERS = gl.constexpr(24)
_COLUMNS = 32
# Bytes of shared memory for tiles
_SHARED = 224 << 10


@aggregate
class Passing:
    """What passes between the partitions, of chunks under way; what a call lacks is any tile.

    Tiles of x, y and z; states that enter chunks; outputs, in whose places u has been before;
    sums of the gate; and where chunks lie.
    """

    x_ring: Ring
    y_ring: Ring
    z_ring: Ring
    h_ring: Ring
    o_tiles: gl.shared_memory_descriptor
    u_tiles: gl.shared_memory_descriptor
    u_ready: gl.shared_memory_descriptor
    u_done: gl.shared_memory_descriptor
    s_tiles: gl.shared_memory_descriptor
    places: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self, x_ring, y_ring, z_ring, h_ring, o_tiles, u_tiles, u_ready, u_done, s_tiles, places
    ):  # fmt: skip
        self.x_ring, self.y_ring, self.z_ring, self.h_ring = x_ring, y_ring, z_ring, h_ring
        self.o_tiles, self.u_tiles, self.u_ready, self.u_done = o_tiles, u_tiles, u_ready, u_done
        self.s_tiles, self.places = s_tiles, places


@gluon.jit
def carry_on(
    passing, gamma, start, end, i_z, count,
    X: gl.constexpr, Z: gl.constexpr, REVERSE: gl.constexpr, V_FIRST: gl.constexpr,
    GATED: gl.constexpr, SUMMED: gl.constexpr,
):  # fmt: skip
    """Carry the state from chunk to chunk, S ← w S + yᵀ u, and lay down what enters each."""
    BZ: gl.constexpr = passing.u_tiles.shape[4]
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BZ, 16])
    o_x = gl.arange(0, X, gl.SliceLayout(1, STATE))[:, None]
    o_z = i_z * BZ + gl.arange(0, BZ, gl.SliceLayout(0, STATE))[None, :]
    p_state = o_z * X + o_x if V_FIRST else o_x * Z + o_z  # [X, BZ]
    n = 0
    while n < count:
        passing.x_ring.wait(n)
        marks = told(passing.places, n, MARKS)
        place = told(passing.places, n, WHOSE).to(gl.int64) * (X * Z)
        b_s = gl.zeros([X, BZ], gl.float32, STATE)
        if start is not None:
            m = ((marks & OPENS) != 0) & (o_x < X)
            b_s += gl.load(start + place + p_state, mask=m, other=0.0).to(gl.float32)
        within = n >= 0  # a sequence has a chunk
        while within:
            passing.x_ring.wait(n)
            wait_before(passing.h_ring.empty, n)
            passing.h_ring.tile(n).store(b_s.to(passing.h_ring.tiles.dtype))
            if GATED:
                there = told(passing.places, n, THERE)
                b_s = b_s * power(sum_of(passing.s_tiles, gamma, n, there, REVERSE, SUMMED))
            wait_for(passing.u_ready, n)
            u = tile_of(passing.u_tiles, n)
            b_s = warpgroup_mma(passing.y_ring.tile(n).permute((1, 0)), u, b_s, is_async=True)
            # All else beside the product, for this is the chain that all chunks wait for
            fence_async_shared()
            gl.thread_barrier()
            arrive(passing.h_ring.ready, n)
            marks = told(passing.places, n, MARKS)
            b_s = warpgroup_mma_wait(0, deps=(b_s,))
            gl.thread_barrier()
            arrive(passing.u_done, n)
            arrive(passing.x_ring.empty, n)
            within = (marks & LAST) == 0
            n += 1
        if end is not None:
            m = ((marks & CLOSES) != 0) & (o_x < X)
            gl.store(end + place + p_state, b_s.to(end.dtype.element_ty), mask=m)


@gluon.jit
def put_out(
    o_desc, out, passing, gamma, cu_seqlens, scale, i_b, i_h, i_z, count, N, T,
    H: gl.constexpr, Z: gl.constexpr, REVERSE: gl.constexpr, GATED: gl.constexpr,
    SUMMED: gl.constexpr, TURN: gl.constexpr,
):  # fmt: skip
    """Put out = scale (w (x·S) + w (x·y) z) of every chunk at this turn.

    Before it comes u, the chunk's z as they are added to the state, in the output's place.
    """
    BZ: gl.constexpr = passing.o_tiles.shape[4]
    PAIRS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BZ, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, PAIRS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, PAIRS)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BZ, BZ // 8], [4, 1], [1, 0])
    m = seen(REVERSE, PAIRS)
    o_c = gl.arange(0, C, gl.SliceLayout(1, FLAT))
    o_o = gl.arange(0, BZ, gl.SliceLayout(0, FLAT))
    p_o = i_h * Z + i_z * BZ + o_c[:, None] * (H * Z) + o_o[None, :]  # [C, BZ]
    o_tile = passing.o_tiles.index(TURN)
    for n in range(TURN, count, passing.o_tiles.shape[0]):
        passing.x_ring.wait(n)
        token = told(passing.places, n, TOKEN)
        there = told(passing.places, n, THERE)
        z = passing.z_ring.tile(n)
        x = passing.x_ring.tile(n)
        b_a = gl.zeros([C, C], gl.float32, PAIRS)
        b_a = warpgroup_mma(
            x, passing.y_ring.tile(n).permute((1, 0)), b_a, use_acc=False, is_async=True
        )
        tma.store_wait(0)  # of the last chunk here
        if GATED:
            gl.thread_barrier()
            b_u = sums_at(
                passing.s_tiles, gamma, n, there, REVERSE, SUMMED, gl.SliceLayout(1, FLAT)
            )
            s_all = sum_of(passing.s_tiles, gamma, n, there, REVERSE, SUMMED)
            b_u = z.load(FLAT).to(gl.float32) * power(s_all - b_u)[:, None]
            o_tile.reshape([C, BZ]).store(b_u.to(o_desc.dtype))
            fence_async_shared()
        gl.thread_barrier()
        arrive(passing.u_ready, n)
        if GATED:
            b_i = sums_at(passing.s_tiles, gamma, n, there, REVERSE, SUMMED, ROW)
            b_j = sums_at(passing.s_tiles, gamma, n, there, REVERSE, SUMMED, COLUMN)
            b_w = power(b_i[:, None] - b_j[None, :])
            b_q = sums_at(passing.s_tiles, gamma, n, there, REVERSE, SUMMED, gl.SliceLayout(1, ACC))
            b_q = power(b_q)
        passing.h_ring.wait(n)
        b_o = gl.zeros([C, BZ], gl.float32, ACC)
        b_o = warpgroup_mma(x, passing.h_ring.tile(n), b_o, use_acc=False, is_async=True)
        b_a = warpgroup_mma_wait(1, deps=(b_a,))
        if GATED:
            b_a = b_a * b_w
        b_a = gl.where(m, b_a, 0.0)
        b_a = gl.convert_layout(b_a.to(o_desc.dtype), gl.DotOperandLayout(0, ACC, 2))
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        passing.h_ring.release(n)
        if GATED:
            b_o = b_o * b_q[:, None]
        b_o = warpgroup_mma(b_a, z, b_o, is_async=True)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        if GATED:
            wait_for(passing.u_done, n)
        o_tile.reshape([C, BZ]).store((b_o * scale).to(o_desc.dtype))
        fence_async_shared()
        passing.x_ring.release(n)
        if there == C:
            tma.async_copy_shared_to_global(o_desc, [i_b, token, i_h, i_z * BZ], o_tile)
        else:
            p = out + token.to(gl.int64) * (H * Z) + p_o
            gl.store(p, o_tile.reshape([C, BZ]).load(FLAT), mask=(o_c < there)[:, None])
    if TURN == 0 and cu_seqlens is not None:
        forget(out, p_o, o_c, H * Z, cu_seqlens, N, T, 0, T + 1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["scale", "N", "T"])
def hopper_turns_kernel(
    out, sums, g_gamma, start, end, cu_seqlens, x_desc, y_desc, z_desc, o_desc, scale, N, T,
    H: gl.constexpr, X: gl.constexpr, Z: gl.constexpr, REVERSE: gl.constexpr,
    V_FIRST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What ``walk_kernel`` does for outputs, in one piece and without a normaliser.

        o_i = scale (w_i q_i·S + Σ_j w_ij (q_i·k_j) v_j)          S ← w S + Σ_j w_j k_j v_jᵀ

    A program owns a block [X, BZ] of the state of one head, x of which is q, y k and z v.
    """
    BZ: gl.constexpr = z_desc.block_type.shape[3]
    NZ: gl.constexpr = Z // BZ
    SUMMED: gl.constexpr = sums is not None
    GATED: gl.constexpr = SUMMED or (g_gamma is not None)
    i_z = gl.program_id(0) % NZ
    h = gl.program_id(0) // NZ
    i_h = h % H
    i_b = h // H
    count = chunks_of(cu_seqlens, N, T, BY_FOUR)
    gamma = 0.0
    if g_gamma is not None:
        gamma = gl.load(g_gamma + i_h).to(gl.float32) * LOG2E
    out += i_b.to(gl.int64) * T * (H * Z)

    x_ring, y_ring, z_ring = new_rings(x_desc, y_desc, z_desc, STAGES, cu_seqlens is not None)
    h_tiles = gl.allocate_shared_memory(z_desc.dtype, [TURNS, 1, X, 1, BZ], z_desc.layout)
    h_ring = Ring(h_tiles, new_barriers(TURNS, 1), new_barriers(TURNS, 1))
    o_tiles = new_tiles(o_desc, TURNS)
    u_ready = new_barriers(TURNS, 1)
    u_done = new_barriers(TURNS, 1)
    places = gl.allocate_shared_memory(gl.int32, [PLACES, 4], VECTOR)
    u_tiles = z_ring.tiles
    if GATED:
        u_tiles = o_tiles
    s_tiles = o_tiles  # any, for partitions take no None
    if SUMMED:
        s_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, C], VECTOR)
    fence_async_shared()
    passing = Passing(
        x_ring, y_ring, z_ring, h_ring, o_tiles, u_tiles, u_ready, u_done, s_tiles, places
    )
    gl.warp_specialize(
        [
            (
                carry_on,
                (
                    passing, gamma, start, end, i_z, count,
                    X, Z, REVERSE, V_FIRST, GATED, SUMMED,
                ),
            ),
            (
                produce,
                (
                    x_desc, y_desc, z_desc, None, sums, None, x_ring, y_ring, z_ring, z_ring,
                    s_tiles, places, cu_seqlens, h, 0, 0, h, 1 if cu_seqlens is None else N, 0,
                    i_z, N, T, H, NZ, REVERSE,
                ),
            ),
            (
                put_out,
                (
                    o_desc, out, passing, gamma, cu_seqlens, scale, i_b, i_h, i_z, count, N, T,
                    H, Z, REVERSE, GATED, SUMMED, 0,
                ),
            ),
            (
                put_out,
                (
                    o_desc, out, passing, gamma, cu_seqlens, scale, i_b, i_h, i_z, count, N, T,
                    H, Z, REVERSE, GATED, SUMMED, 1,
                ),
            ),
            (
                put_out,
                (
                    o_desc, out, passing, gamma, cu_seqlens, scale, i_b, i_h, i_z, count, N, T,
                    H, Z, REVERSE, GATED, SUMMED, 2,
                ),
            ),
        ],
        [1, 4, 4, 4],
        [COPY_REGISTERS, REGISTERS, REGISTERS, REGISTERS],
    )  # fmt: skip


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether these programs, of half as many columns as the walk's, just fill the chip."""
    B, _, H, V = v.shape
    programs = B * H * (V // _COLUMNS)
    many = multiprocessors(q.device)
    return q.shape[-1] <= 128 and many < 2 * programs <= 2 * many


def run_turns(
    call: Call, x, y, z, *, starts, carry: None, ends, decays, cu_seqlens, scale, v_first: bool
) -> tuple[Tensor, None, None]:  # fmt: skip
    """Launch ``hopper_turns_kernel``: out in the shape of z, no normaliser, no rows."""
    B, T, H, X = x.shape
    Z = z.shape[-1]
    out = torch.empty_like(z)
    sums, _, g_gamma = decays
    tiles = (x, X), (y, X), (z, _COLUMNS), (out, _COLUMNS)
    tile = 2 * C.value * _COLUMNS
    stage, turn = 4 * C.value * X + tile, 2 * X * _COLUMNS + tile
    launch(
        hopper_turns_kernel,
        B * H * (Z // _COLUMNS),
        (out, sums, g_gamma, starts[0], ends[0], cu_seqlens),
        (*(descriptor(t, C.value, size) for t, size in tiles), scale, call.N, T),
        {
            "H": H,
            "X": X,
            "Z": Z,
            "REVERSE": call.constants["REVERSE"],
            "V_FIRST": v_first,
            "STAGES": min((_SHARED - TURNS.value * turn) // stage, 8),
            "num_warps": 4,
        },
    )
    return out, None, None
