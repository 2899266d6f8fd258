"""The gradients of q, k and the gates of a chunk on Hopper: ``gradients_kernel`` in given layouts.

A warp has 16 channels and all tokens of the chunk, as tiles of 16 tokens that stand on their side.
They are accumulators of one product and operands of the next without a move between threads, and
no warp waits for another.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from fla.ops.common.hopper import VECTOR, along
from fla.ops.common.kernels import LOG2E, SEARCH, power
from fla.ops.common.launch import launch
from fla.ops.kda.activations import sigmoid
from fla.ops.kda.halving import TILE, load_rate, middle, replaced, weight_of
from fla.ops.kda.hopper_intra import decays_of
from fla.ops.kda.hopper_pairs import CHANNELS, gains_at, put_step, rooms, through_pairs
from fla.ops.kda.hopper_tiles import (
    BLOCKS,
    SHARED,
    C,
    as_mask,
    copied,
    in_lines,
    lines,
    narrow,
    wide,
)
from fla.ops.kda.slots import locate

_ACC = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
_LEFT = gl.constexpr(gl.DotOperandLayout(0, _ACC, 2))
_RIGHT = gl.constexpr(gl.DotOperandLayout(1, _ACC, 2))
_TOKEN = gl.constexpr(gl.SliceLayout(0, _ACC))
_CHANNEL = gl.constexpr(gl.SliceLayout(1, _ACC))
_LINES = gl.constexpr(in_lines(4))
_PAIRS = gl.constexpr(gl.BlockedLayout([1, 1, 8], [1, 16, 2], [1, 4, 1], [2, 1, 0]))
_WORDS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
_COLUMNS = gl.constexpr(gl.SwizzledSharedLayout(8, 4, 2, [2, 1, 0]))
_SMALL = gl.constexpr(gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))


@gluon.jit
def copied_blocks(p, stride, left):
    """A tile [C, CHANNELS] on its way to shared memory, in blocks of TILE tokens."""
    tile = copied(p, C, CHANNELS, stride, left)
    return tile._reinterpret(p.dtype.element_ty, [BLOCKS, TILE, CHANNELS], SHARED)


@gluon.jit
def copied_pairs(p):
    """A matrix [C, C] likewise: rows of block a by columns of block b are block b · BLOCKS + a."""
    o_b = gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, _PAIRS)))
    o_r = gl.arange(0, C, gl.SliceLayout(0, gl.SliceLayout(2, _PAIRS)))
    o_c = gl.arange(0, TILE, gl.SliceLayout(0, gl.SliceLayout(1, _PAIRS)))
    o_x = gl.expand_dims(gl.expand_dims(o_b * TILE, 1), 2)
    o_x += gl.expand_dims(gl.expand_dims(o_r * C, 0), 2)
    o_x += gl.expand_dims(gl.expand_dims(o_c, 0), 1)
    blocks = gl.allocate_shared_memory(p.dtype.element_ty, [BLOCKS, C, TILE], _COLUMNS)
    async_copy.async_copy_global_to_shared(blocks, p + o_x)
    return blocks._reinterpret(p.dtype.element_ty, [BLOCKS * BLOCKS, TILE, TILE], _SMALL)


@gluon.jit
def copied_vector(p, N: gl.constexpr):
    """N numbers likewise."""
    vector = gl.allocate_shared_memory(p.dtype.element_ty, [1, N], VECTOR)
    async_copy.async_copy_global_to_shared(vector.index(0), p + gl.arange(0, N, _WORDS))
    return vector._reinterpret(p.dtype.element_ty, [N // TILE, TILE], VECTOR)


@gluon.jit
def put(p, stride, left, tiles):
    """A tile from shared memory, its tokens before ``left``."""
    o_x, o_t = lines(C, CHANNELS, stride)
    tile = tiles._reinterpret(tiles.dtype, [C, CHANNELS], SHARED)
    gl.store(p + o_x, tile.load(_LINES), o_t < left)


@gluon.jit
def side(tile):
    """Tokens of a block on their side, [CHANNELS, TILE], in fp32."""
    x = tile.permute((1, 0)).load(_ACC)
    return wide(x) if tile.dtype == gl.bfloat16 else x.to(gl.float32)


@gluon.jit
def put_side(tile, x):
    tile.permute((1, 0)).store(x.to(tile.dtype))


@gluon.jit
def tokens_of(vector):
    """TILE numbers, one a token, [1, TILE]."""
    return gl.expand_dims(vector.load(_TOKEN), 0)


@gluon.jit
def channels_of(vector):
    """CHANNELS numbers, one a channel, [CHANNELS, 1]."""
    return gl.expand_dims(vector.load(_CHANNEL), 1)


@gluon.jit
def left_side(tile):
    """Tokens of a block on their side as left operand."""
    return tile.permute((1, 0)).load(_LEFT)


@gluon.jit
def pairs_of(blocks, a, b):
    """Rows of block a by columns of block b of a matrix as right operand, and the transpose."""
    tile = blocks.index(b * BLOCKS + a)
    return tile.load(_RIGHT), tile.permute((1, 0)).load(_RIGHT)


@gluon.jit
def times(x, matrix, acc):
    """acc + x [CHANNELS, TILE] times a right operand [TILE, TILE]."""
    return mma_v2(gl.convert_layout(x.to(gl.bfloat16), _LEFT), matrix, acc)


@gluon.jit
def sums(x, mask, acc):
    """acc + x times a mask of 0 and 1, which is exact; x goes in as two 16-bit parts."""
    high, rounded = narrow(x)
    return times(x - rounded, mask, times(high, mask, acc))


@gluon.jit
def part_of(x):
    """Over the tokens that a thread has, four threads to a channel."""
    return gl.sum(gl.sum(x.reshape([CHANNELS, 2, 4, 2]), 3), 1)


@gluon.jit
def sum_of(x):
    """Over tokens, [CHANNELS, 1]."""
    return gl.expand_dims(gl.sum(x, 1), 1)


@gluon.jit
def gates_at(tile, bias, rate, lower_bound, m_t, GATE: gl.constexpr):
    """Of a block what the gates' gradient asks for, and log-decays in units of log 2."""
    x = side(tile)
    if GATE and lower_bound is not None:
        slope = -LOG2E * rate
        y = 1 + gl.exp2(x * slope + bias * slope)
        x = gl.rsqrt(y * y)
        decay = x * gl.where(m_t, lower_bound * LOG2E, 0.0)
    else:
        x += bias
        decay = gl.where(m_t, decays_of(x, 0.0, rate, lower_bound, GATE), 0.0)
    return x, decay


@gluon.jit
def gates_backward(tile, x, decay, dg, bias, rate, lower_bound, m_t, GATE: gl.constexpr):
    """From the gradients of log-decays those of the gates, and of log rate."""
    if not GATE:
        return dg, dg
    if lower_bound is None:
        drate = gl.where(m_t, dg * decay * (1 / LOG2E), 0.0)
        dx = gl.where(m_t, dg * -rate * sigmoid(x), 0.0)
    else:
        dx = dg * gl.where(m_t, lower_bound * rate, 0.0) * (x - x * x)
        drate = dx * (side(tile) + bias)
    return dx, drate


@gluon.jit(do_not_specialize=["T", "rows"])
def hopper_gradients_kernel(
    q, k, g, A_log, dt_bias, cu_seqlens, factors, near, dq_in, dk_in, dk_out, through,
    dqueries, dkeys, own, dg, drates, dbiases, radial, dq, dk,
    scale, lower_bound, T, rows,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr,
    GATE: gl.constexpr, FORGETS: gl.constexpr, FAR: gl.constexpr,
):  # fmt: skip
    """``gradients_kernel`` for chunks of 64 in bf16, a row i of block a and a key j of block b < a

        D_ij = exp2(prefix_i) Π_{b<c<a} exp2(total_c) exp2(suffix_j)

    decayed over one block after the other: what a row gains from the keys of block b passes the
    blocks between before what the next block gives is added, a key's gains likewise from behind.

    Unless ``dq`` is None the gradients of raw q and k go there and to ``dk``, with ``radial`` of
    the kernel before where q and k were normalised:

        dx = f dy − x f² (y·dy)    y = f x
    """
    PARTS: gl.constexpr = K // CHANNELS
    i_block = gl.program_id(0) % PARTS
    i_hv = gl.program_id(0) // PARTS % HV
    i_slot = gl.program_id(0) // PARTS // HV
    i_h = i_hv // (HV // H)
    o_s = gl.arange(0, SEARCH, along(gl.num_warps()))
    _n, i_c, start, length, live = locate(cu_seqlens, i_slot, rows, T, C, o_s)
    left = length - i_c * C
    place = i_slot.to(gl.int64) * HV + i_hv
    token = start + i_c * C
    first = i_block * CHANNELS
    channel = first + gl.arange(0, CHANNELS, _CHANNEL)
    p_dg = dg + (token * HV + i_hv) * K + first
    if dq is not None:
        dq += (token * H + i_h) * K + first
        dk += (token * H + i_h) * K + first

    if i_c * C >= live:  # padding has no gradient, nor has a slot that no chunk fills
        if drates is not None:
            gl.store(drates + place * PARTS + i_block, 0.0)
            gl.store(dbiases + place * K + channel, channel * 0.0)
        o_x, o_t = lines(C, CHANNELS, HV * K)
        b_zero = gl.zeros([C, CHANNELS], dg.dtype.element_ty, _LINES)
        gl.store(p_dg + o_x, b_zero, o_t < left)
        if dq is not None:
            o_x, o_t = lines(C, CHANNELS, H * K)
            b_zero = gl.zeros([C, CHANNELS], dq.dtype.element_ty, _LINES)
            gl.store(dq + o_x, b_zero, o_t < left)
            gl.store(dk + o_x, b_zero, o_t < left)
        return

    padded = place * (C * K) + first
    g_tiles = copied_blocks(g + (token * HV + i_hv) * K + first, HV * K, left)
    k_tiles = copied_blocks(k + (token * H + i_h) * K + first, H * K, left)
    out_tiles = copied_blocks(dk_out + padded, K, C)
    norms = copied_vector(factors + place * (2 * C), 2 * C)
    async_copy.commit_group()
    if FAR:
        owns = copied_vector(own + place * C, C)
    q_tiles = copied_blocks(q + (token * H + i_h) * K + first, H * K, left)
    dq_tiles = copied_blocks(dq_in + padded, K, C)
    dk_tiles = copied_blocks(dk_in + padded, K, C)
    dm_blocks = copied_pairs(dqueries + place * (C * C))
    da_blocks = copied_pairs(dkeys + place * (C * C))
    async_copy.commit_group()
    rate = load_rate(A_log, i_hv, GATE)
    b_bias = gl.zeros([CHANNELS], gl.float32, _CHANNEL)
    if GATE:
        if dt_bias is not None:
            b_bias = gl.load(dt_bias + i_hv * K + channel).to(gl.float32)
    b_bias = gl.expand_dims(b_bias, 1)
    b_through = gl.expand_dims(gl.load(through + place * K + channel), 1)
    if FAR:  # unless a lower bound keeps all blocks near
        near += place * BLOCKS
        r_near = gl.load(near), gl.load(near + 1), gl.load(near + 2), gl.load(near + 3)
        far = r_near[0] + r_near[1] + r_near[2] + r_near[3] < C
        room = rooms()

    o_r = gl.expand_dims(gl.arange(0, TILE, gl.SliceLayout(1, _RIGHT)), 1)
    o_c = gl.expand_dims(gl.arange(0, TILE, gl.SliceLayout(0, _RIGHT)), 0)
    mask = gl.allocate_shared_memory(gl.bfloat16, [TILE, TILE], _SMALL)
    mask.store(as_mask(o_r < o_c))
    o_i = gl.expand_dims(gl.arange(0, TILE, _TOKEN), 0)
    zero = gl.zeros([CHANNELS, TILE], gl.float32, _ACC)

    if radial is not None:
        o_w = gl.arange(0, 2 * C, _WORDS)
        b_factor = gl.load(factors + place * (2 * C) + o_w)
        b_radial = gl.load(radial + place * (2 * C) + o_w) * (b_factor * b_factor)
        radials = gl.allocate_shared_memory(gl.float32, [1, 2 * C], VECTOR)
        radials.index(0).store(b_radial)
        radials = radials._reinterpret(gl.float32, [2 * BLOCKS, TILE], VECTOR)

    # keys at the end of their blocks, what gates gain between them and the chunk's end, and decays;
    # in a loop that stays one, for more straight code than what follows waits for its instructions
    async_copy.wait_group(1)
    ends = gl.allocate_shared_memory(gl.bfloat16, [BLOCKS, TILE, CHANNELS], SHARED)
    b_none = gl.zeros_like(b_bias)
    decays = gl.allocate_shared_memory(gl.float32, [BLOCKS, CHANNELS], VECTOR)
    outs = gl.allocate_shared_memory(gl.float32, [BLOCKS, CHANNELS], VECTOR)
    b_rest = gl.zeros([CHANNELS], gl.float32, _CHANNEL)
    for i in range(BLOCKS):
        i_b = BLOCKS - 1 - i
        m_t = o_i + i_b * TILE < left
        _, b_g = gates_at(g_tiles.index(i_b), b_bias, rate, lower_bound, m_t, GATE)
        b_k = side(k_tiles.index(i_b)) * tokens_of(norms.index(BLOCKS + i_b))
        b_end, b_end32 = narrow(
            b_k * weight_of(sums(b_g, mask.permute((1, 0)).load(_RIGHT), zero), FORGETS)
        )
        put_side(ends.index(i_b), b_end)
        if FAR:
            if far:
                put_step(room, i_b, weight_of(b_g, FORGETS))
        b_out = gl.sum(b_end32 * side(out_tiles.index(i_b)), 1) * power(b_rest)
        b_total = gl.sum(b_g, 1)
        outs.index(i_b).store(b_out)
        decays.index(i_b).store(power(b_total))
        b_rest += b_total
    b_through *= gl.expand_dims(power(b_rest), 1)

    async_copy.wait_group(0)
    if FAR:
        if far:
            for r in gl.static_range(BLOCKS // 2):
                if r_near[2 * r] + r_near[2 * r + 1] < 2 * TILE:
                    through_pairs(
                        room, q_tiles, k_tiles, dm_blocks, da_blocks, norms, owns, scale,
                        r, FORGETS,
                    )  # fmt: skip
    b_drate = part_of(zero)
    b_dbias = b_drate
    # what gates gain between the state or a key before their block, and rows behind it
    r_flow = (b_none, b_none, b_none, b_none)
    for a in gl.static_range(BLOCKS - 1, -1, -1):
        m_t = o_i + a * TILE < left
        b_x, b_g = gates_at(g_tiles.index(a), b_bias, rate, lower_bound, m_t, GATE)
        b_q = side(q_tiles.index(a)) * (tokens_of(norms.index(a)) * scale)
        b_k = side(k_tiles.index(a)) * tokens_of(norms.index(BLOCKS + a))
        b_prefix = sums(b_g, mask.load(_RIGHT), b_g)
        b_up = weight_of(b_prefix, FORGETS)
        b_qd, b_qd32 = narrow(b_q * b_up)
        b_kd, b_kd32 = narrow(b_k * b_up)
        # rows, for the state and the keys of blocks before
        b_dq = side(dq_tiles.index(a))
        b_dk = side(dk_tiles.index(a))
        b_passing = b_through + r_flow[a]
        r_own = (b_none, b_none, b_none)
        for b in gl.static_range(a):
            b_decay = channels_of(decays.index(b))
            b_dq *= b_decay
            b_dk *= b_decay
            for c in gl.static_range(b):
                r_own = replaced(r_own, c, r_own[c] * b_decay)
            r_own = replaced(r_own, b, sum_of(b_qd32 * b_dq + b_kd32 * b_dk))
            b_passing += channels_of(outs.index(b))
            b_left = left_side(ends.index(b))
            b_dq = mma_v2(b_left, pairs_of(dm_blocks, a, b)[1], b_dq)
            b_dk = mma_v2(b_left, pairs_of(da_blocks, a, b)[1], b_dk)
        for b in gl.static_range(a):
            r_flow = replaced(r_flow, b, r_flow[b] + r_own[b])
        # keys, for rows of the blocks behind and the chunk's end
        b_gain = side(out_tiles.index(a))
        for c in gl.static_range(BLOCKS - 1, a, -1):
            b_gain *= channels_of(decays.index(c))
            b_gain = mma_v2(left_side(q_tiles.index(c)), pairs_of(dm_blocks, c, a)[0], b_gain)
            b_gain = mma_v2(left_side(k_tiles.index(c)), pairs_of(da_blocks, c, a)[0], b_gain)
        b_dg = times(side(ends.index(a)) * b_gain, mask.load(_RIGHT), zero + b_passing)
        # pairs in this block
        dms = pairs_of(dm_blocks, a, a)
        das = pairs_of(da_blocks, a, a)
        if not FAR or r_near[a] == TILE:
            # what enters a product twice is rounded once: the gradients of the two exponents of a
            # pair cancel where both sum the same gate
            b_low, b_high = middle(b_prefix)
            b_inverse = gl.exp2(-b_prefix) * b_low
            b_ki, b_ki32 = narrow(b_k * b_inverse)
            b_dq = times(b_ki, dms[1], b_dq * b_low)
            b_dk = times(b_ki, das[1], b_dk * b_low)
            b_qd32 *= b_high
            b_kd32 *= b_high
            b_up *= b_high
            b_dki = times(b_kd32, das[0], times(b_qd32, dms[0], zero))
            b_dexponent = b_qd32 * b_dq + b_kd32 * b_dk - b_ki32 * b_dki
            b_dq = b_up * b_dq
            b_gain *= channels_of(decays.index(a)) * b_high
            b_dk = b_up * b_dk + b_inverse * (b_dki + b_gain)
        else:
            own_dq, own_dk, own_dg = gains_at(room, a)
            b_dexponent = b_qd32 * b_dq + b_kd32 * b_dk
            b_dg += side(own_dg)
            b_down = weight_of(sums(b_g, mask.permute((1, 0)).load(_RIGHT), zero), FORGETS)
            b_dq = b_up * b_dq + side(own_dq)
            b_dk = b_up * b_dk + b_down * b_gain + side(own_dk)
        b_dg = sums(b_dexponent, mask.permute((1, 0)).load(_RIGHT), b_dg + b_dexponent)
        b_dx, b_share = gates_backward(
            g_tiles.index(a), b_x, b_g, b_dg, b_bias, rate, lower_bound, m_t, GATE
        )
        if dq is not None:
            b_dq *= tokens_of(norms.index(a)) * scale
            b_dk *= tokens_of(norms.index(BLOCKS + a))
        if radial is not None:
            b_dq -= side(q_tiles.index(a)) * tokens_of(radials.index(a))
            b_dk -= side(k_tiles.index(a)) * tokens_of(radials.index(BLOCKS + a))
        # rows for keys before them, in place of what they were made of
        put_side(q_tiles.index(a), b_qd)
        put_side(k_tiles.index(a), b_kd)
        put_side(dq_tiles.index(a), b_dq)
        put_side(dk_tiles.index(a), b_dk)
        put_side(g_tiles.index(a), b_dx)
        b_drate += part_of(b_share)
        b_dbias += part_of(b_dx)
    if drates is not None:
        gl.store(drates + place * PARTS + i_block, gl.sum(gl.sum(b_drate, 1), 0))
        b_dbias = gl.convert_layout(gl.sum(b_dbias, 1), _CHANNEL)
        gl.store(dbiases + place * K + channel, b_dbias)
    if dq is not None:
        put(dq, H * K, left, dq_tiles)
        put(dk, H * K, left, dk_tiles)
    else:
        put(dq_in + padded, K, C, dq_tiles)
        put(dk_in + padded, K, C, dk_tiles)
    put(p_dg, HV * K, left, g_tiles)


def run_gradients(call, dg, dq, dk) -> None:
    """``launches.Call.within`` for Hopper."""
    launch(
        hopper_gradients_kernel,
        call.slots * call.HV * (call.BK // CHANNELS.value),
        (
            call.q, call.k, call.g, call.A_log, call.dt_bias, call.cu_seqlens, call.factors,
            call.near, *call.into_gradients(dg), call.radial, dq, dk,
        ),
        (call.options.scale, call.lower_bound, call.T, call.rows),
        {
            "H": call.H, "HV": call.HV, "K": call.K, "GATE": call.options.gate,
            "FORGETS": call.forgets, "FAR": not call.all_near, "num_warps": 4,
        },
    )  # fmt: skip
