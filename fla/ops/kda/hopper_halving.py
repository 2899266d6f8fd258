"""Pairs of rows too steep for one anchor, on Hopper: ``halving_kernel`` with layouts by hand.

A warp has a block of 16 tokens.  As an accumulator, as a left operand and, on its side, as a right
one, a thread holds the same tokens and channels of it: nothing moves between threads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from fla.ops.common.hopper import along
from fla.ops.common.kernels import SEARCH
from fla.ops.common.launch import launch
from fla.ops.kda.halving import TILE, load_rate, replaced, weight_of
from fla.ops.kda.hopper_intra import decays_of
from fla.ops.kda.hopper_tiles import BLOCKS, C, as_mask, narrow, wide
from fla.ops.kda.slots import locate

LEVELS = gl.constexpr(4)
# Channels at a time
CHANNELS = gl.constexpr(32)
# What a thread may have, that three programs run side by side
REGISTERS = 168
_ACC = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))
_LEFT = gl.constexpr(gl.DotOperandLayout(0, _ACC, 2))
_RIGHT = gl.constexpr(gl.DotOperandLayout(1, _ACC, 2))
_BLOCK = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, _ACC)))
_TOKEN = gl.constexpr(gl.SliceLayout(2, _ACC))
_CHANNEL = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(1, _RIGHT)))
_LINES = gl.constexpr(gl.BlockedLayout([1, 1, 8], [1, 8, 4], [1, 4, 1], [2, 1, 0]))
_SHARED = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, [2, 1, 0]))


@gluon.constexpr_function
def rows_of(layout):
    return gl.SliceLayout(0, gl.SliceLayout(2, layout))


@gluon.constexpr_function
def columns_of(layout):
    return gl.SliceLayout(0, gl.SliceLayout(1, layout))


@gluon.jit
def copied(p, stride, left, K: gl.constexpr):
    """Tokens on their way to shared memory, [K / CHANNELS, BLOCKS, TILE, CHANNELS]."""
    o_x = gl.arange(0, K // CHANNELS, gl.SliceLayout(1, gl.SliceLayout(2, _LINES)))[:, None, None]
    o_t = gl.arange(0, C, gl.SliceLayout(0, gl.SliceLayout(2, _LINES)))[None, :, None]
    o_k = gl.arange(0, CHANNELS, gl.SliceLayout(0, gl.SliceLayout(1, _LINES)))[None, None, :]
    dtype: gl.constexpr = p.dtype.element_ty
    tile = gl.allocate_shared_memory(dtype, [K // CHANNELS, C, CHANNELS], _SHARED)
    m = (o_t < left) & (o_x >= 0) & (o_k >= 0)
    async_copy.async_copy_global_to_shared(tile, p + o_t * stride + o_x * CHANNELS + o_k, mask=m)
    return tile._reinterpret(dtype, [K // CHANNELS, BLOCKS, TILE, CHANNELS], _SHARED)


@gluon.jit
def tokens_at(tiles, i):
    """Channels i · CHANNELS on of all tokens, [BLOCKS, TILE, CHANNELS] in fp32."""
    return wide(gl.convert_layout(tiles.index(i).load(_LEFT), _ACC, assert_trivial=True))


@gluon.jit
def factors_at(p):
    """A number for each token, [BLOCKS, TILE, 1] as rows and [BLOCKS, 1, TILE] as columns."""
    o_b = gl.arange(0, BLOCKS, _BLOCK)[:, None]
    o_r = gl.arange(0, TILE, gl.SliceLayout(0, _TOKEN))[None, :]
    o_c = gl.arange(0, TILE, gl.SliceLayout(0, gl.SliceLayout(1, _ACC)))[None, :]
    b_rows = gl.load(p + o_b * TILE + o_r)
    o_b = gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(1, _ACC)))[:, None]
    return b_rows[:, :, None], gl.load(p + o_b * TILE + o_c)[:, None, :]


@gluon.jit
def segment(level: gl.constexpr):
    """``halving.segment_mask`` of a block as left operand, [BLOCKS, TILE, TILE]."""
    o_i = gl.arange(0, TILE, rows_of(_LEFT))[None, :, None]
    o_l = gl.arange(0, TILE, columns_of(_LEFT))[None, None, :]
    o_b = gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, _LEFT)))[:, None, None]
    near = (o_i >> level) == (o_l >> level)
    m = near & ((((o_i >> level) & 1) == 1) == (o_l <= o_i))
    return as_mask(m & (o_b >= 0))


@gluon.jit(do_not_specialize=["T", "rows"])
def hopper_halving_kernel(
    q, k, g, A_log, dt_bias, cu_seqlens, factors, near, queries, keys,
    scale, lower_bound, T, rows,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr,
    GATE: gl.constexpr, FORGETS: gl.constexpr,
):  # fmt: skip
    """What ``chunk_intra.halving_kernel`` does, for chunks of 64 in bf16.

    Norms enter when sums over channels are there.
    """
    i_slot = gl.program_id(0) // HV
    i_hv = gl.program_id(0) % HV
    o_s = gl.arange(0, SEARCH, along(gl.num_warps()))
    _, i_c, start, _, live = locate(cu_seqlens, i_slot, rows, T, C, o_s)
    if i_c * C >= live:
        return
    place = i_slot.to(gl.int64) * HV + i_hv
    b_near = gl.load(near + place * BLOCKS + gl.arange(0, BLOCKS, _BLOCK))
    if gl.min(b_near, 0) == TILE:
        return
    i_h = i_hv // (HV // H)
    token = start + i_c * C
    left = live - i_c * C
    g_tiles = copied(g + (token * HV + i_hv) * K, HV * K, left, K)
    k_tiles = copied(k + (token * H + i_h) * K, H * K, left, K)
    q_tiles = copied(q + (token * H + i_h) * K, H * K, left, K)
    async_copy.commit_group()
    rate = gl.maximum(load_rate(A_log, i_hv, GATE), 1e-30)
    factors += place * (2 * C)
    q_rows, _ = factors_at(factors)
    k_rows, k_columns = factors_at(factors + C)

    zero = gl.zeros([BLOCKS, TILE, CHANNELS], gl.float32, _ACC)
    none = gl.zeros([BLOCKS, TILE, TILE], gl.float32, _ACC)
    b_own = gl.zeros([BLOCKS, TILE], gl.float32, _TOKEN)
    r_a = (none, none, none, none)
    r_m = r_a
    async_copy.wait_group(0)
    gl.thread_barrier()
    for i in range(K // CHANNELS):
        b_bias = gl.zeros([CHANNELS], gl.float32, _CHANNEL)
        if GATE:
            if dt_bias is not None:
                o_k = i * CHANNELS + gl.arange(0, CHANNELS, _CHANNEL)
                b_bias = gl.load(dt_bias + i_hv * K + o_k).to(gl.float32)
        b_x = g_tiles.index(i).load(_RIGHT).to(gl.float32)
        b_g = decays_of(b_x, b_bias[None, None, :], rate, lower_bound, GATE)
        b_high, b_high32 = narrow(b_g)
        b_low = (b_g - b_high32).to(gl.bfloat16)
        b_q = tokens_at(q_tiles, i)
        b_k = tokens_at(k_tiles, i)
        b_own += gl.sum(b_q * b_k, 2)
        for level in gl.static_range(LEVELS):
            m = segment(level)
            b_decay = weight_of(mma_v2(m, b_low, mma_v2(m, b_high, zero)), FORGETS)
            b_key = (b_k * b_decay).to(gl.bfloat16)
            b_query = (b_q * b_decay).to(gl.bfloat16)
            b_right = gl.convert_layout(b_key.permute((0, 2, 1)), _RIGHT, assert_trivial=True)
            b_left = gl.convert_layout(b_key, _LEFT, assert_trivial=True)
            r_a = replaced(r_a, level, mma_v2(b_left, b_right, r_a[level]))
            b_left = gl.convert_layout(b_query, _LEFT, assert_trivial=True)
            r_m = replaced(r_m, level, mma_v2(b_left, b_right, r_m[level]))

    o_b = gl.arange(0, BLOCKS, _BLOCK)[:, None, None]
    o_i = gl.arange(0, TILE, rows_of(_ACC))[None, :, None]
    o_j = gl.arange(0, TILE, columns_of(_ACC))[None, None, :]
    b_a = none
    b_m = gl.where(o_i == o_j, b_own[:, :, None], none)
    for level in gl.static_range(LEVELS):
        m = ((o_i >> level) == (o_j >> level) + 1) & (((o_i >> level) & 1) == 1)
        b_a = gl.where(m, r_a[level], b_a)
        b_m = gl.where(m, r_m[level], b_m)
    m = (o_j <= o_i) & (o_i >= b_near[:, None, None])
    o_x = place * (C * C) + (o_b * TILE + o_i) * C + o_b * TILE + o_j
    dtype: gl.constexpr = keys.dtype.element_ty
    gl.store(keys + o_x, (b_a * k_rows * k_columns).to(dtype), m)
    gl.store(queries + o_x, (b_m * (q_rows * scale) * k_columns).to(dtype), m)


def run_halving(call) -> None:
    """``triton.Call.halve`` for Hopper."""
    launch(
        hopper_halving_kernel,
        call.slots * call.HV,
        (
            call.q, call.k, call.g, call.A_log, call.dt_bias, call.cu_seqlens, call.factors,
            call.near, call.queries, call.solver,
        ),
        (call.options.scale, call.lower_bound, call.T, call.rows),
        {
            "H": call.H, "HV": call.HV, "K": call.K, "GATE": call.options.gate,
            "FORGETS": call.forgets, "num_warps": 4, "maxnreg": REGISTERS,
        },
    )  # fmt: skip
