"""Pairs of rows too steep for one anchor, on Hopper: ``halving_kernel`` with layouts by hand.

A warp has a block of 16 tokens.  As an accumulator, as a left operand and, on its side, as a right
one, a thread holds the same tokens and channels of it: nothing moves between threads.  All levels
but the last stay within half a block, 8 tokens: a product has the keys of a half in its first 8
rows, in the others its queries.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from fla.ops.common.hopper import VECTOR, along
from fla.ops.common.kernels import SEARCH
from fla.ops.common.launch import launch
from fla.ops.kda.halving import TILE, load_rate, replaced, weight_of
from fla.ops.kda.hopper_intra import decays_of
from fla.ops.kda.hopper_tiles import BLOCKS, PLAIN, C, as_mask, narrow, wide
from fla.ops.kda.slots import locate

# Tokens of half a block
HALF = gl.constexpr(TILE.value // 2)
# Channels at a time
CHANNELS = gl.constexpr(32)
# What a thread may have, that four programs run side by side
REGISTERS = 128
_ACC = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))
_LEFT = gl.constexpr(gl.DotOperandLayout(0, _ACC, 2))
_RIGHT = gl.constexpr(gl.DotOperandLayout(1, _ACC, 2))
_BLOCK = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, _ACC)))
_TOKEN = gl.constexpr(gl.SliceLayout(2, _ACC))
_CHANNEL = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(1, _RIGHT)))
_LINES = gl.constexpr(gl.BlockedLayout([1, 1, 8], [1, 8, 4], [1, 4, 1], [2, 1, 0]))
_NUMBERS = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))
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
def copied_factors(p):
    """Factors on their way to shared memory, [4, BLOCKS, HALF]: halves of queries', of keys'."""
    o_x = gl.arange(0, 4 * BLOCKS, gl.SliceLayout(1, _NUMBERS))[:, None]
    o_t = gl.arange(0, HALF, gl.SliceLayout(0, _NUMBERS))[None, :]
    tile = gl.allocate_shared_memory(gl.float32, [4 * BLOCKS, HALF], PLAIN)
    o_t += o_x // (2 * BLOCKS) * C + o_x // BLOCKS % 2 * HALF + o_x % BLOCKS * TILE
    async_copy.async_copy_global_to_shared(tile, p + o_t)
    return tile._reinterpret(gl.float32, [4, BLOCKS, HALF], PLAIN)


@gluon.jit
def kept_biases(p, K: gl.constexpr):
    """Biases of a head in shared memory, [K / CHANNELS, CHANNELS]."""
    b_bias = gl.load(p + gl.arange(0, K, along(gl.num_warps()))).to(gl.float32)
    tile = gl.allocate_shared_memory(gl.float32, [K], VECTOR)
    tile.store(b_bias)
    return tile._reinterpret(gl.float32, [K // CHANNELS, CHANNELS], VECTOR)


@gluon.jit
def tokens_at(tiles, i):
    """Channels i · CHANNELS on of all tokens, [BLOCKS, TILE, CHANNELS] in fp32."""
    return wide(gl.convert_layout(tiles.index(i).load(_LEFT), _ACC, assert_trivial=True))


@gluon.jit
def halves(b_x):
    """The first and the last tokens of each block, [BLOCKS, HALF, ...] of [BLOCKS, TILE, ...]."""
    b_x = b_x.reshape([BLOCKS, 2, HALF] + b_x.shape[2:])  # noqa: RUF005, stars are not compiled
    if len(b_x.shape) == 3:
        b_x = b_x.permute((0, 2, 1))
    else:
        b_x = b_x.permute((0, 2, 3, 1))
    return gl.split(b_x)


@gluon.jit
def pairs(b_key, b_query, b_right, b_acc):
    """Products of keys and, in rows below them, of queries with the keys ``b_right``."""
    b_left = gl.join(b_key, b_query).permute((0, 3, 1, 2)).reshape([BLOCKS, TILE, CHANNELS])
    b_left = gl.convert_layout(b_left, _LEFT, assert_trivial=True)
    b_right = gl.convert_layout(b_right.permute((0, 2, 1)), _RIGHT, assert_trivial=True)
    return mma_v2(b_left, b_right, b_acc)


@gluon.jit
def segment(level: gl.constexpr):
    """``halving.segment_mask`` of each half of a block, on its side, beside every 8 channels."""
    o_l = gl.arange(0, TILE, gl.SliceLayout(0, gl.SliceLayout(2, _RIGHT)))[None, :, None]
    o_c = gl.arange(0, CHANNELS, gl.SliceLayout(0, gl.SliceLayout(1, _RIGHT)))[None, None, :]
    o_b = gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, _RIGHT)))[:, None, None]
    second = o_l >= HALF
    o_l = o_l % HALF
    o_i = o_c % HALF
    if level < 3:
        second = ((o_i >> level) & 1) == 1
    m = ((o_i >> level) == (o_l >> level)) & (second == (o_l <= o_i))
    return as_mask(m & (o_b >= 0))


@gluon.jit
def products(m_0, m_1, b_high, b_low):
    """Sums of ``b_high`` and ``b_low`` over the tokens of two masks, [BLOCKS, TILE, CHANNELS].

    A segment lies within 8 tokens: rows 0 to 7 of a product are its sums for one level, rows 8 to
    15 for another.  A thread gets the sums of tokens and channels that it holds as an accumulator.
    """
    b_0, b_1 = products_of_eight(m_0, m_1, b_high, b_low)
    return turned(b_0), turned(b_1)


@gluon.jit
def products_of_eight(m_0, m_1, b_high, b_low):
    """Two masks times each 8 tokens and 8 channels; the results are on their side."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 a, b, c, d, z;
        mov.f32 z, 0f00000000;
        mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {a,b,c,d}, {$4,$5}, {$6}, {z,z,z,z};
        mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5}, {$7}, {a,b,c,d};
        }""",
        "=f,=f,=f,=f,r,r,r,r", [m_0, m_1, b_high, b_low], (gl.float32, gl.float32), True, 2,
    )  # fmt: skip


@gluon.jit
def turned(b_x):
    """Tiles of 8 tokens and 8 channels put upright."""
    b_x = b_x.reshape([BLOCKS, 2, HALF, CHANNELS // HALF, HALF]).permute((0, 1, 4, 3, 2))
    b_x = b_x.reshape([BLOCKS, TILE, CHANNELS])
    return gl.convert_layout(b_x, _ACC, assert_trivial=True)


@gluon.jit
def pair_mask(level: gl.constexpr, LAYOUT: gl.constexpr):
    """``halving.level_mask`` of half a block."""
    o_i = gl.arange(0, HALF, rows_of(LAYOUT))[None, :, None] >> level
    o_j = gl.arange(0, HALF, columns_of(LAYOUT))[None, None, :] >> level
    return (o_i == o_j + 1) & ((o_i & 1) == 1)


@gluon.jit
def merged(r, b_own):
    """Of products in one half of a block those of keys, and of queries, whose own key is there."""
    b_a, b_m = halves(r[0])
    LAYOUT: gl.constexpr = b_a.type.layout
    b_own = gl.convert_layout(b_own, gl.SliceLayout(2, LAYOUT), assert_trivial=True)
    m = pair_mask(0, LAYOUT)
    b_a = gl.where(m, b_a, 0.0)
    b_m = gl.where(m, b_m, b_own[:, :, None])
    for level in gl.static_range(1, 3):
        b_keys, b_queries = halves(r[level])
        m = pair_mask(level, LAYOUT)
        b_a = gl.where(m, b_keys, b_a)
        b_m = gl.where(m, b_queries, b_m)
    return b_a, b_m


@gluon.jit
def put(queries, keys, factors, b_near, scale, b_m, b_a, I: gl.constexpr, J: gl.constexpr):
    """Half I of the rows, from row ``b_near`` on, and half J of the columns of each block."""
    LAYOUT: gl.constexpr = b_a.type.layout
    BLOCK: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
    ROW: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    o_b = gl.arange(0, BLOCKS, BLOCK)[:, None, None]
    o_i = gl.arange(0, HALF, rows_of(LAYOUT))[None, :, None] + I * HALF
    o_j = gl.arange(0, HALF, columns_of(LAYOUT))[None, None, :] + J * HALF
    b_near = gl.convert_layout(b_near, BLOCK, assert_trivial=True)
    m = (o_j <= o_i) & (o_i >= b_near[:, None, None])
    o_x = (o_b * TILE + o_i) * C + o_b * TILE + o_j
    b_columns = factors.index(2 + J).load(gl.SliceLayout(1, LAYOUT))[:, None, :]
    b_m *= factors.index(I).load(ROW)[:, :, None] * scale * b_columns
    b_a *= factors.index(2 + I).load(ROW)[:, :, None] * b_columns
    gl.store(queries + o_x, b_m.to(queries.dtype.element_ty), m)
    gl.store(keys + o_x, b_a.to(keys.dtype.element_ty), m)


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
    factors = copied_factors(factors + place * (2 * C))
    async_copy.commit_group()
    BIASED: gl.constexpr = GATE and dt_bias is not None
    if BIASED:
        biases = kept_biases(dt_bias + i_hv * K, K)
    rate = gl.maximum(load_rate(A_log, i_hv, GATE), 1e-30)

    none = gl.zeros([BLOCKS, TILE, HALF], gl.float32, _ACC)
    b_own = gl.zeros([BLOCKS, TILE], gl.float32, _TOKEN)
    r_0 = (none, none, none)
    r_1 = r_0
    r_far = none
    masks = (segment(0), segment(1), segment(2), segment(3))
    async_copy.wait_group(0)
    gl.thread_barrier()
    for i in range(K // CHANNELS):
        b_bias = gl.zeros([CHANNELS], gl.float32, _CHANNEL)
        if BIASED:
            b_bias = biases.index(i).load(_CHANNEL)
        b_x = g_tiles.index(i).load(_RIGHT)
        b_x = wide(b_x) if b_x.dtype == gl.bfloat16 else b_x.to(gl.float32)
        b_g = decays_of(b_x, b_bias[None, None, :], rate, lower_bound, GATE)
        b_high, b_high32 = narrow(b_g)
        b_low = (b_g - b_high32).to(gl.bfloat16)
        b_q = tokens_at(q_tiles, i)
        b_k = tokens_at(k_tiles, i)
        b_own += gl.sum(b_q * b_k, 2)
        r_sum = products(masks[0], masks[1], b_high, b_low)
        r_sum += products(masks[2], masks[3], b_high, b_low)
        for level in gl.static_range(4):
            b_decay = weight_of(r_sum[level], FORGETS)
            k_0, k_1 = halves((b_k * b_decay).to(gl.bfloat16))
            q_0, q_1 = halves((b_q * b_decay).to(gl.bfloat16))
            if level < 3:
                r_0 = replaced(r_0, level, pairs(k_0, q_0, k_0, r_0[level]))
                r_1 = replaced(r_1, level, pairs(k_1, q_1, k_1, r_1[level]))
            else:
                r_far = pairs(k_1, q_1, k_0, r_far)

    own_0, own_1 = halves(b_own)
    queries += place * (C * C)
    keys += place * (C * C)
    b_a, b_m = merged(r_0, own_0)
    put(queries, keys, factors, b_near, scale, b_m, b_a, 0, 0)
    b_a, b_m = merged(r_1, own_1)
    put(queries, keys, factors, b_near, scale, b_m, b_a, 1, 1)
    b_a, b_m = halves(r_far)
    put(queries, keys, factors, b_near, scale, b_m, b_a, 1, 0)


def run_halving(call) -> None:
    """``launches.Call.halve`` for Hopper."""
    launch(
        hopper_halving_kernel,
        call.slots * call.HV,
        call.into_halving(),
        (call.options.scale, call.lower_bound, call.T, call.rows),
        {
            "H": call.H, "HV": call.HV, "K": call.K, "GATE": call.options.gate,
            "FORGETS": call.forgets, "num_warps": 4, "maxnreg": REGISTERS,
        },
    )  # fmt: skip
