"""Interactions inside a chunk, on Hopper: ``chunk_intra.intra_kernel`` with layouts by hand.

A thread owns two channels of a block of 16 tokens, whose log-decays it sums one after another.
Norms are taken where a thread has eight channels of a token, and pairs are products of tiles in
shared memory: queries at the start of their block with keys of their own block, and with keys of
blocks before it that are carried up to there.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fla.ops.common.hopper import along
from fla.ops.common.kernels import LOG2E, SEARCH, power
from fla.ops.common.launch import launch
from fla.ops.kda.activations import L2NORM_EPS, STEEPEST, beta_of
from fla.ops.kda.halving import ROOM, TILE, joined, load_rate, parts, weight_of
from fla.ops.kda.hopper_tiles import BLOCKS, PLAIN, C
from fla.ops.kda.slots import locate

# Two −∞ of bf16
PAIR_OF_INFINITIES = gl.constexpr(-0x7F0080)
# What a thread may have, that two programs of eight warps, or four of four, run side by side
REGISTERS = 128


@gluon.jit
def lay(tile, rows):
    """16 rows [4, K] of bf16 into a tile [4, 16, K]."""
    b_x = joined(rows).reshape([BLOCKS, rows[0].shape[1], TILE])
    tile.store(b_x.permute((0, 2, 1)))


@gluon.jit
def halves(b_x):
    """The two bf16 of each 32 bits as fp32; ptxas takes an instruction more for the second."""
    return (b_x << 16).to(gl.float32, bitcast=True), (b_x & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def unpacked(b_x, LAYOUT: gl.constexpr):
    """Pairs of bf16 [4, K / 2] as fp32 [4, K]."""
    b_low, b_high = halves(b_x)
    b_x = gl.join(b_low, b_high).reshape([BLOCKS, b_x.shape[1] * 2])
    return gl.convert_layout(b_x, LAYOUT, assert_trivial=True)


@gluon.jit
def as_pairs(tiles):
    """Tiles [blocks, 16, K] of bf16 in shared memory as [blocks, 16, K / 2] of 32 bits.

    All of an allocation: 64 channels of all its tokens lie before the next 64, and how far apart
    these are a part of it, looked at as 32 bits, would not know.
    """
    shape: gl.constexpr = [tiles.shape[0], TILE, tiles.shape[2] // 2]
    return tiles._reinterpret(gl.int32, shape, gl.NVMMASharedLayout(128, 32, rank=3))


@gluon.jit
def copy_in(tile, p, stride, left):
    """Start to copy rows of tokens at ``p`` into a tile [4, 16, K]; zeros where there are none."""
    K: gl.constexpr = tile.shape[2]
    ROWS: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [1, 256 // K, K // 8], [1, gl.num_warps(), 1], [2, 1, 0]
    )
    o_b = gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, ROWS)))[:, None, None]
    o_t = gl.arange(0, TILE, gl.SliceLayout(0, gl.SliceLayout(2, ROWS)))[None, :, None]
    o_k = gl.arange(0, K, gl.SliceLayout(0, gl.SliceLayout(1, ROWS)))[None, None, :]
    o_c = o_b * TILE + o_t
    m = (o_c < left) & (o_k < K)
    async_copy.async_copy_global_to_shared(tile, p + o_c * stride + o_k, mask=m)
    async_copy.commit_group()


@gluon.jit
def measure(pairs, factors, lengths, scale, ENABLED: gl.constexpr):
    """1 / sqrt(Σx² + ε) of a tile's tokens, to ``factors``, and ``scale`` of it to ``lengths``.

    The tile as pairs; 1 in place of the root where norms are not asked for.
    """
    K: gl.constexpr = 2 * pairs.shape[2]
    PAIRS: gl.constexpr = gl.BlockedLayout(
        [1, 1, 4], [1, 256 // K, K // 8], [1, gl.num_warps(), 1], [2, 1, 0]
    )
    b_low, b_high = halves(pairs.load(PAIRS))
    b_sum = gl.sum(b_low * b_low + b_high * b_high, 2)  # [4, 16]
    if ENABLED:
        b_sum = gl.rsqrt(b_sum + L2NORM_EPS)
    else:
        b_sum = gl.full(b_sum.shape, 1.0, gl.float32, b_sum.type.layout)
    o_b = gl.arange(0, BLOCKS, gl.SliceLayout(1, b_sum.type.layout))[:, None]
    o_t = gl.arange(0, TILE, gl.SliceLayout(0, b_sum.type.layout))[None, :]
    gl.store(factors + o_b * TILE + o_t, b_sum)
    lengths.store(b_sum * scale)


@gluon.jit
def rows_at(pairs, lengths, ROW: gl.constexpr):
    """The 16 rows [4, K / 2] of a tile as pairs, and of ``lengths`` [4]."""
    WARPS: gl.constexpr = gl.num_warps()
    TOKENS: gl.constexpr = gl.BlockedLayout([1, TILE, 1], [1, 1, 32], [4, 1, WARPS // 4], [2, 1, 0])
    b_x = pairs.load(TOKENS).permute((0, 2, 1))
    r_x = parts(b_x.reshape([BLOCKS, b_x.shape[1], 2, 2, 2, 2]))
    b_l = lengths.load(gl.SliceLayout(2, TOKENS))
    r_l = parts(b_l.reshape([BLOCKS, 2, 2, 2, 2]))
    rows = ()
    for t in gl.static_range(TILE):
        b_l = gl.convert_layout(r_l[t], gl.SliceLayout(1, ROW), assert_trivial=True)
        rows += ((r_x[t], b_l),)
    return rows


@gluon.constexpr_function
def _grid(K):
    """Totals of blocks [4, 4, K]: of each block those of all, in one thread."""
    return gl.BlockedLayout([1, 4, 2], [1, 1, 32], [4, 1, K // 64], [2, 1, 0])


@gluon.jit
def over(b_all, LOW: gl.constexpr, HIGH: gl.constexpr, LAYOUT: gl.constexpr):
    """Decays [4, K] over the blocks LOW to HIGH away from each, of all log-decays [1, 4, K]."""
    GRID: gl.constexpr = b_all.type.layout
    o_i = gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, GRID)))[:, None, None]
    o_j = gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, GRID)))[None, :, None]
    m = (o_j >= o_i + LOW) & (o_j <= o_i + HIGH)
    b_decay = power(gl.sum(gl.where(m, b_all, 0.0), 1))
    return gl.convert_layout(b_decay, LAYOUT, assert_trivial=True)


@gluon.jit
def load_gates(p, stride, left, K: gl.constexpr, GATE: gl.constexpr, ROW: gl.constexpr):
    """16 rows [4, K] of raw gates at ``p``, or of pairs of bf16 [4, K / 2].

    Where there is no token they are such that its decay is 1.
    """
    rows = ()
    if p.dtype.element_ty == gl.bfloat16:
        HALF: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, gl.num_warps() // 4], [1, 0])
        o_b = gl.arange(0, BLOCKS, gl.SliceLayout(1, HALF))[:, None] * TILE
        o_k = gl.arange(0, K // 2, gl.SliceLayout(0, HALF))[None, :]
        p = p.to(gl.pointer_type(gl.int32), bitcast=True) + o_b * (stride // 2) + o_k
        for t in gl.static_range(TILE):
            m = o_b + t < left
            b_x = gl.load(p + t * (stride // 2), mask=m, other=PAIR_OF_INFINITIES if GATE else 0)
            rows += (b_x,)
    else:
        o_b = gl.arange(0, BLOCKS, gl.SliceLayout(1, ROW))[:, None] * TILE
        o_k = gl.arange(0, K, gl.SliceLayout(0, ROW))[None, :]
        p += o_b * stride + o_k
        for t in gl.static_range(TILE):
            m = o_b + t < left
            rows += (gl.load(p + t * stride, mask=m, other=float("-inf") if GATE else 0),)
    return rows


@gluon.jit
def log2_above_1(e):
    """log2(1 + e) of e in [0, 1], 4e-7 of it off at most; Triton's own log2 is thrice as long.

    A polynomial whose largest relative error is as small as one of its degree has.
    """
    high = ((-0.0123191131 * e + 0.0636066347) * e - 0.155350164) * e + 0.256008565
    return ((((high * e - 0.353394419) * e + 0.480063617) * e - 0.721310079) * e + 1.44269478) * e


@gluon.jit
def decays_of(b_x, b_bias, rate, lower_bound, GATE: gl.constexpr):
    """``activations.log_decay`` of raw gates, in units of log 2 throughout: fewer instructions."""
    if not GATE:
        b_x = gl.maximum(b_x * LOG2E, STEEPEST)
    elif lower_bound is None:
        b_y = (b_x + b_bias) * LOG2E
        b_e = gl.exp2(-gl.abs(b_y))
        b_x = gl.maximum(-rate * (gl.maximum(b_y, 0.0) + log2_above_1(b_e)), STEEPEST)
    else:
        b_y = 1 + gl.exp2((b_x + b_bias) * (-rate * LOG2E))
        b_x = gl.rsqrt(b_y * b_y) * (lower_bound * LOG2E)
    return b_x


@gluon.jit
def meet(x, tiles, p_pairs, side):
    """M and A [C, C], ``side`` apart: queries and keys x [8, 16, K] with the ``tiles`` of keys."""
    K: gl.constexpr = x.shape[2]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])
    o_r = gl.arange(0, 2 * C, gl.SliceLayout(1, ACC))[:, None]
    o_j = gl.arange(0, C, gl.SliceLayout(0, ACC))[None, :]
    o_i = o_r % C
    away = o_i // TILE - o_j // TILE
    b_pairs = gl.zeros([2 * C, C], gl.float32, ACC)
    for d in range(BLOCKS):
        y = tiles.index(d).reshape([C, K]).permute((1, 0))
        b_x = gl.zeros([2 * C, C], gl.float32, ACC)
        b_x = warpgroup_mma(x.reshape([2 * C, K]), y, b_x, use_acc=False, is_async=True)
        b_x = warpgroup_mma_wait(0, deps=(b_x,))
        b_pairs = gl.where(away == d, b_x, b_pairs)
    b_pairs = gl.where(o_j <= o_i, b_pairs, 0.0)
    p_pairs += side * (o_r // C) + o_i * C + o_j
    gl.store(p_pairs, b_pairs.to(p_pairs.dtype.element_ty))


@gluon.jit(do_not_specialize=["T", "rows"])
def hopper_intra_kernel(
    q, k, g, beta, A_log, dt_bias, cu_seqlens, q_in, k_in, k_out, decay, betas, factors, near,
    pairs, scale, lower_bound, T, rows,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr,
    QK_L2NORM: gl.constexpr, GATE: gl.constexpr, FORGETS: gl.constexpr,
    BETA_SIGMOID: gl.constexpr, BETA_RANGE: gl.constexpr,
):  # fmt: skip
    """What ``chunk_intra.intra_kernel`` does, with M and A in ``pairs`` unless that is None."""
    WARPS: gl.constexpr = gl.num_warps()
    TOKENS: gl.constexpr = gl.BlockedLayout([1, TILE, 2], [1, 1, 32], [4, 1, WARPS // 4], [2, 1, 0])
    i_slot = gl.program_id(0) // HV
    i_hv = gl.program_id(0) % HV
    o_s = gl.arange(0, SEARCH, along(WARPS))
    _, i_c, start, _, live = locate(cu_seqlens, i_slot, rows, T, C, o_s)
    if i_c * C >= live:
        return
    dtype: gl.constexpr = k_in.dtype.element_ty
    i_h = i_hv // (HV // H)
    token = start + i_c * C
    place = i_slot.to(gl.int64) * HV + i_hv
    left = live - i_c * C
    # rows [4, K] of tokens t of all blocks
    ROW: gl.constexpr = gl.SliceLayout(1, TOKENS)
    o_b = gl.arange(0, BLOCKS, gl.SliceLayout(1, ROW))[:, None]
    o_k = gl.arange(0, K, gl.SliceLayout(0, ROW))[None, :]
    TILES: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    both = gl.allocate_shared_memory(dtype, [2 * BLOCKS, TILE, K], TILES)
    b_q, b_kd = both.slice(0, BLOCKS), both.slice(BLOCKS, BLOCKS)
    words = as_pairs(both)
    q_words, k_words = words.slice(0, BLOCKS), words.slice(BLOCKS, BLOCKS)
    copy_in(b_kd, k + token * (H * K) + i_h * K, H * K, left)
    copy_in(b_q, q + token * (H * K) + i_h * K, H * K, left)

    r_x = load_gates(g + token * (HV * K) + i_hv * K, HV * K, left, K, GATE, ROW)
    o_c = gl.arange(0, C, along(WARPS))
    b_beta = gl.load(beta + (token + o_c) * HV + i_hv, mask=o_c < left, other=0).to(gl.float32)
    b_beta = gl.where(o_c < left, beta_of(b_beta, BETA_SIGMOID, BETA_RANGE), 0.0)
    gl.store(betas + place * C + o_c, b_beta)

    rate = gl.maximum(load_rate(A_log, i_hv, GATE), 1e-30)
    b_bias = gl.zeros([1, K], gl.float32, ROW)
    if GATE:
        if dt_bias is not None:
            b_bias = gl.load(dt_bias + i_hv * K + o_k).to(gl.float32)
    r_decay = ()
    b_total = gl.zeros([BLOCKS, K], gl.float32, ROW)
    for t in gl.static_range(TILE):
        b_x = r_x[t].to(gl.float32) if r_x[t].dtype != gl.int32 else unpacked(r_x[t], ROW)
        b_x = decays_of(b_x, b_bias, rate, lower_bound, GATE)
        r_decay += (b_x,)
        b_total += b_x
    b_all = gl.convert_layout(b_total, gl.SliceLayout(0, _grid(K)))[None, :, :]
    b_before = over(b_all, -3, -1, ROW)
    b_behind = over(b_all, 1, 3, ROW)
    b_whole = power(gl.sum(b_all, 1))
    o_d = gl.arange(0, K, gl.SliceLayout(0, b_whole.type.layout))[None, :]
    gl.store(decay + place * K + o_d, b_whole)

    # keys at the end of their blocks, and carried on
    p_out = place * (C * K) + o_b * (TILE * K) + o_k
    k_lengths = gl.allocate_shared_memory(gl.float32, [BLOCKS, TILE], PLAIN)
    q_lengths = gl.allocate_shared_memory(gl.float32, [BLOCKS, TILE], PLAIN)
    factors += place * (2 * C)
    async_copy.wait_group(0)
    gl.thread_barrier()
    measure(q_words, factors, q_lengths, scale, QK_L2NORM)
    measure(k_words, factors + C, k_lengths, 1.0, QK_L2NORM)
    if pairs is not None:
        # keys for queries of their own block, of the one behind, of the second and of the third
        tiles = gl.allocate_shared_memory(dtype, [BLOCKS, BLOCKS, TILE, K], TILES)
        b_1 = over(b_all, 1, 1, ROW)
        b_2 = over(b_all, 1, 2, ROW)
    b_sum = gl.zeros([BLOCKS, K], gl.float32, ROW)
    r_x = ()
    r_1 = ()
    r_2 = ()
    r_k = rows_at(k_words, k_lengths, ROW)
    for t in gl.static_range(TILE - 1, -1, -1):
        b_x = unpacked(r_k[t][0], ROW) * r_k[t][1][:, None] * weight_of(b_sum, FORGETS)
        gl.store(k_out + p_out + t * K, (b_x * b_behind).to(dtype))
        b_sum += r_decay[t]
        if pairs is not None:
            r_x = (b_x.to(dtype),) + r_x  # noqa: RUF005, jit functions know no *
            r_1 = ((b_x * b_1).to(dtype),) + r_1  # noqa: RUF005
            r_2 = ((b_x * b_2).to(dtype),) + r_2  # noqa: RUF005
    if pairs is not None:
        lay(tiles.index(1), r_x)
        lay(tiles.index(2), r_1)
        lay(tiles.index(3), r_2)

    # keys and queries at the start of their blocks
    b_sum = gl.zeros([BLOCKS, K], gl.float32, ROW)
    b_largest = b_sum
    b_near = b_sum
    r_x = ()
    r_1 = ()
    r_2 = ()
    r_k = rows_at(k_words, k_lengths, ROW)
    r_q = rows_at(q_words, q_lengths, ROW)
    for t in gl.static_range(TILE):
        b_sum += r_decay[t]
        b_largest = -b_sum if FORGETS else gl.maximum(b_largest, gl.abs(b_sum))
        b_near += gl.where(b_largest <= ROOM, 1.0, 0.0)
        b_w = weight_of(b_sum, FORGETS)
        b_k = unpacked(r_k[t][0], ROW) * r_k[t][1][:, None]
        b_x = b_k * b_w
        gl.store(k_in + p_out + t * K, (b_x * b_before).to(dtype))
        r_x += (b_x.to(dtype),)
        r_1 += ((b_k * weight_of(-b_sum, FORGETS)).to(dtype),)
        b_x = unpacked(r_q[t][0], ROW) * r_q[t][1][:, None] * b_w
        gl.store(q_in + p_out + t * K, (b_x * b_before).to(dtype))
        r_2 += (b_x.to(dtype),)
    if pairs is not None:
        lay(tiles.index(0), r_1)
        lay(b_kd, r_x)
        lay(b_q, r_2)

    p_near = near + place * BLOCKS + gl.arange(0, BLOCKS, gl.SliceLayout(1, ROW))
    gl.store(p_near, gl.min(b_near, 1).to(gl.int32))

    if pairs is not None:
        fence_async_shared()
        gl.thread_barrier()
        meet(both, tiles, pairs + place * (C * C), gl.num_programs(0).to(gl.int64) * (C * C))


def run_intra(call, pairs: bool) -> None:
    """Launch ``hopper_intra_kernel`` for a ``launches.Call``."""
    launch(
        hopper_intra_kernel,
        call.slots * call.HV,
        (*call.into_operands(), call.pairs if pairs else None),
        (call.options.scale, call.lower_bound, call.T, call.rows),
        {
            "H": call.H, "HV": call.HV, "K": call.K, **call.beta_flags,
            "QK_L2NORM": call.options.qk_l2norm, "GATE": call.options.gate,
            "FORGETS": call.forgets, "num_warps": call.K // 16, "maxnreg": REGISTERS,
        },
    )  # fmt: skip
