"""The softmax engine's backward on Hopper: five products a pair of blocks, warp-specialised.

    p_ij = exp(s_ij − lse_i)    Δ_i = do_i·o_i    dS_ij = p_ij (do_i·v_j − Δ_i)
    dq_i = scale Σ_j dS_ij k_j    dk_j = scale Σ_i dS_ij q_i    dv_j = Σ_i p_ij do_i

A program owns a block of keys, and adds what its keys give to dq in global memory: after the blocks
before it, so that the same bits come out every time.  Programs take blocks in the order in which
they start, the first keys first, which have the most queries, and go through their queries from the
last ones backwards, all heads of a group at each block of them.  So they follow each other a step
apart, and who waits, waits for programs that are running.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fla.ops.attn import triton as portable
from fla.ops.attn.blocks import LOG2E, Call
from fla.ops.common.boundary import absent
from fla.ops.common.hopper import (
    CONSUMER_REGISTERS,
    Ring,
    arrive,
    descriptor,
    new_barriers,
    new_tiles,
    wait_before,
    wait_for,
)
from fla.ops.common.kernels import cdiv, dense
from fla.ops.common.launch import launch

# Shorter calls, and calls of fewer blocks of keys, have not been measured
SHORTEST = 4096
FEWEST = 512
HEAD = 128
# A step is 64 queries of a head that meet 128 keys: dk, dv, and the logits and their gradients of
# 64 keys fill a consumer's registers, three steps of q and do nearly all that k and v leave.
ROWS = gl.constexpr(64)
KEYS = gl.constexpr(128)
STAGES = gl.constexpr(3)
# Of dS a step is written while the one before it is read
DS_STAGES = gl.constexpr(2)
DQ_STAGES = gl.constexpr(1)
# How many steps the turns may be known ahead
TURNS = gl.constexpr(4)
# Elements of dq that a warp moves at once
LINE = gl.constexpr(512)
# Those of four warps that copy, add and wait
HELPER_REGISTERS = gl.constexpr(32)


@triton.jit(do_not_specialize=["T"])
def rows_kernel(o, do, lse, rows, turns, T, HQ: tl.constexpr, D: tl.constexpr, BM: tl.constexpr):
    """−lse and Δ of BM queries of one head, to rows [B, HQ, blocks, 2, BM]; and nobody's turn yet.

    Reads o and do [BM, D] and lse [BM].  What is behind T weighs nothing.
    """
    i = tl.program_id(0)
    blocks = tl.cdiv(T, BM)
    i_h = i % HQ
    i_s = i // HQ % blocks
    i_b = i // HQ // blocks
    o_i = i_s * BM + tl.arange(0, BM)
    m_i = o_i < T
    at = ((i_b.to(tl.int64) * T + o_i)[:, None] * HQ + i_h) * D + tl.arange(0, D)[None, :]
    b_o = tl.load(o + at, mask=m_i[:, None], other=0.0).to(tl.float32)
    b_do = tl.load(do + at, mask=m_i[:, None], other=0.0).to(tl.float32)
    b_delta = tl.sum(b_o * b_do, 1)
    head = i_b * HQ + i_h
    b_lse = tl.load(lse + head.to(tl.int64) * T + o_i, mask=m_i, other=float("inf"))
    block = head * blocks + i_s
    p = rows + block.to(tl.int64) * (2 * BM) + tl.arange(0, BM)
    tl.store(p, -b_lse * LOG2E)
    tl.store(p + BM, b_delta)
    tl.store(turns + block, 0)


@triton.jit(do_not_specialize=["T"])
def dq_kernel(
    sums, dq, scale, T, HQ: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    """dq of BM queries of one head, from sums [B, HQ, blocks, BM · BK] as ``offer`` has them."""
    i = tl.program_id(0)
    blocks = tl.cdiv(T, BM)
    i_h = i % HQ
    i_s = i // HQ % blocks
    i_b = i // HQ // blocks
    block = (i_b * HQ + i_h) * blocks + i_s
    b_dq = tl.load(sums + block.to(tl.int64) * (BM * BK) + tl.arange(0, BM * BK))
    W: tl.constexpr = BK // 2
    b_dq = b_dq.reshape([2, W // 8, 4, 8, 4, 2, 2]).permute((2, 5, 3, 0, 1, 4, 6)).reshape([BM, BK])
    o_i = i_s * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BK)
    at = ((i_b.to(tl.int64) * T + o_i)[:, None] * HQ + i_h) * K + o_d[None, :]
    m = (o_i < T)[:, None] & (o_d < K)[None, :]
    tl.store(dq + at, (b_dq * scale).to(dq.dtype.element_ty), mask=m)


@gluon.jit
def block_of(n, last, i_h, i_b, T, H: gl.constexpr, G: gl.constexpr):
    """The number of what step n is of, a query block of a head, among those of all heads."""
    i_s = last - n // G
    i_hq = i_h * G + n % G
    return (i_b * (H * G) + i_hq) * gl.cdiv(T, ROWS) + i_s


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, do_desc, rows_desc, k_tiles, v_tiles, ready, q_ring, do_ring, row_tiles,
    i_h, i_b, j, first, last, T, H: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """Copy the program's keys and values; then of each step q with its rows, and do."""
    mbarrier.expect(ready, 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for i_w in gl.static_range(2):
        place = [i_b, j * KEYS + i_w * ROWS, i_h, 0]
        tma.async_copy_global_to_shared(k_desc, place, ready, k_tiles.index(i_w))
        tma.async_copy_global_to_shared(v_desc, place, ready, v_tiles.index(i_w))
    blocks = gl.cdiv(T, ROWS)
    for n in range((last - first + 1) * G):
        i_s = last - n // G
        i_hq = i_h * G + n % G
        place = [i_b, i_s * ROWS, i_hq, 0]
        stage = n % STAGES
        wait_before(q_ring.empty, n)
        arrived = q_ring.ready.index(stage)
        mbarrier.expect(arrived, q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, place, arrived, q_ring.tiles.index(stage))
        at = [(i_b * (H * G) + i_hq) * blocks + i_s, 0, 0, 0]
        tma.async_copy_global_to_shared(rows_desc, at, arrived, row_tiles.index(stage))
        arrived = do_ring.ready.index(stage)
        mbarrier.expect(arrived, do_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(do_desc, place, arrived, do_ring.tiles.index(stage))


@gluon.jit
def await_turns(
    come, told, turns, i_h, i_b, j, first, last, T, H: gl.constexpr, G: gl.constexpr
):  # fmt: skip
    """Say of each step when all programs before this one have added to its dq."""
    for n in range((last - first + 1) * G):
        block = block_of(n, last, i_h, i_b, T, H, G)
        while gl.atomic_add(turns + block, 0, sem="acquire", scope="gpu") < j:
            pass
        wait_before(told, n)
        arrive(come, n)


@gluon.jit
def pass_turns(
    added, told, turns, i_h, i_b, j, first, last, T, H: gl.constexpr, G: gl.constexpr
):  # fmt: skip
    """Tell the next program of each step that has been added."""
    for n in range((last - first + 1) * G):
        block = block_of(n, last, i_h, i_b, T, H, G)
        wait_for(added, n)
        gl.atomic_xchg(turns + block, j + 1, sem="release", scope="gpu")
        arrive(told, n)


@gluon.jit
def add(
    come, added, part_0, part_1, offered, taken, sums,
    i_h, i_b, j, first, last, T, H: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """Add to the sums what both consumers offer of a step, when its turn has come."""
    SIZE: gl.constexpr = part_0.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    o_x = gl.arange(0, LINE, LAYOUT)
    for n in range((last - first + 1) * G):
        block = block_of(n, last, i_h, i_b, T, H, G)
        p = sums + block.to(gl.int64) * (2 * SIZE)
        wait_for(come, n)
        for i_w in gl.static_range(2):
            wait_for(offered, 2 * n + i_w)
            part = part_0 if i_w == 0 else part_1
            tile = part.index(n % DQ_STAGES)
            if j == 0:
                for at in gl.static_range(0, SIZE, LINE):
                    gl.store(p + (i_w * SIZE + at) + o_x, tile.slice(at, LINE).load(LAYOUT))
            else:
                for at in gl.static_range(0, SIZE, LINE):
                    b_x = tile.slice(at, LINE).load(LAYOUT)
                    gl.atomic_add(p + (i_w * SIZE + at) + o_x, b_x, sem="relaxed", scope="gpu")
            gl.thread_barrier()
            arrive(taken, 2 * n + i_w)
        arrive(added, n)


@gluon.jit
def offer(i_w: gl.constexpr, n, b_dq, part, offered, taken):
    """Give a step's part of dq away in the order in which threads hold it, four side by side."""
    W: gl.constexpr = b_dq.shape[1]
    FLAT: gl.constexpr = gl.DistributedLinearLayout(
        [[1], [2], [512], [1024], [2048]],
        [[4], [8], [16], [32], [64]],
        [[128], [256]],
        [],
        [ROWS * W],
    )
    wait_before(taken, 2 * n + i_w)
    b_dq = b_dq.reshape([4, 2, 8, W // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([ROWS * W])
    part.index(n % DQ_STAGES).store(gl.convert_layout(b_dq, FLAT, assert_trivial=True))
    gl.thread_barrier()
    arrive(offered, 2 * n + i_w)


@gluon.jit
def product_with_queries(x, ring, n):
    """Start the product of keys or values [ROWS, D] with queries or do, transposed, of step n."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    ring.wait(n)
    b_0 = gl.zeros([ROWS, ROWS], gl.float32, LAYOUT)
    return warpgroup_mma(x, ring.tile(n).permute((1, 0)), b_0, use_acc=False, is_async=True)


@gluon.jit
def product_with_keys(i_w: gl.constexpr, n, wanted, k_tiles, ds_0, ds_1, ready):
    """Start dS k [ROWS, D / 2] of step n, half i_w of its columns, when dS is ``ready``."""
    D: gl.constexpr = k_tiles.shape[4]
    W: gl.constexpr = D // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    wait_for(ready, n, wanted)
    b_dq = gl.zeros([ROWS, W], gl.float32, LAYOUT)
    k_0 = k_tiles.index(0).reshape([ROWS, D]).slice(i_w * W, W, 1)
    k_1 = k_tiles.index(1).reshape([ROWS, D]).slice(i_w * W, W, 1)
    ds = ds_0.index(n % DS_STAGES)
    b_dq = warpgroup_mma(ds.permute((1, 0)), k_0, b_dq, use_acc=False, is_async=True)
    ds = ds_1.index(n % DS_STAGES)
    return warpgroup_mma(ds.permute((1, 0)), k_1, b_dq, is_async=True)


@gluon.jit
def power(x):
    """2^x; zero for what is not normal, which takes fewer instructions."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def put(desc, place, tile, value):
    """Write a consumer's tile through shared memory that nobody else uses."""
    tile.reshape([tile.shape[1], tile.shape[3]]).store(value)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(desc, place, tile)
    tma.store_wait(0)


@gluon.jit
def consume(
    i_w: gl.constexpr, dk_desc, dv_desc, part, offered, taken, k_tiles, v_tiles, ready,
    q_ring, do_ring, row_tiles, ds_0, ds_1, ready_0, ready_1, read,
    i_h, i_b, j, first, last, scale, dk_scale, H: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """dk and dv of keys [ROWS i_w, ROWS (i_w + 1)) of the program; of all of them half of dq.

    What stands along a step is transposed: keys × queries.  A step's dq follows in the next one:
    by then the other consumer has put its dS there too.
    """
    D: gl.constexpr = k_tiles.shape[4]
    DTYPE: gl.constexpr = k_tiles.dtype
    PAIRS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    k = k_tiles.index(i_w).reshape([ROWS, D])
    v = v_tiles.index(i_w).reshape([ROWS, D])
    ds = ds_0
    mine = ready_0
    other = ready_1
    if i_w == 1:
        ds = ds_1
        mine = ready_1
        other = ready_0
    b_dk = gl.zeros([ROWS, D], gl.float32, ACC)
    b_dv = gl.zeros([ROWS, D], gl.float32, ACC)
    mbarrier.wait(ready, 0)
    steps = (last - first + 1) * G
    for n in range(steps):
        b_s = product_with_queries(k, q_ring, n)
        b_dp = product_with_queries(v, do_ring, n)
        i_s = last - n // G
        rows = row_tiles.index(n % STAGES).reshape([1, 2 * ROWS])
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        b_p = power(b_s * scale + rows.slice(0, ROWS, 1).load(PAIRS))
        if i_s * ROWS < j * KEYS + i_w * ROWS + ROWS:
            o_i = i_s * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, PAIRS))
            o_j = j * KEYS + i_w * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, PAIRS))
            b_p = gl.where(o_j[:, None] <= o_i[None, :], b_p, 0.0)
        b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
        b_ds = (b_p * (b_dp - rows.slice(ROWS, ROWS, 1).load(PAIRS))).to(DTYPE)
        b_p = gl.convert_layout(b_p.to(DTYPE), OPERAND)
        b_dst = gl.convert_layout(b_ds, OPERAND)
        b_dv = warpgroup_mma(b_p, do_ring.tile(n), b_dv, is_async=True)
        b_dk = warpgroup_mma(b_dst, q_ring.tile(n), b_dk, is_async=True)
        wait_before(read, n)
        ds.index(n % DS_STAGES).store(b_ds)
        fence_async_shared()
        gl.thread_barrier()
        arrive(mine, n)
        # in the first step there is none before it: a product of anything, which is not used
        before = n - 1 + gl.where(n == 0, DS_STAGES, 0)
        b_dq = product_with_keys(i_w, before, n > 0, k_tiles, ds_0, ds_1, other)
        b_dv, b_p, b_dk, b_dst, b_dq = warpgroup_mma_wait(
            0, deps=(b_dv, b_p, b_dk, b_dst, b_dq)
        )  # fmt: skip
        q_ring.release(n)
        if n > 0:
            arrive(read, n - 1)
            offer(i_w, n - 1, b_dq, part, offered, taken)
    b_dq = product_with_keys(i_w, steps - 1, True, k_tiles, ds_0, ds_1, other)
    b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
    offer(i_w, steps - 1, b_dq, part, offered, taken)
    # v has been read by all warps
    place = [i_b, j * KEYS + i_w * ROWS, i_h, 0]
    put(dv_desc, place, v_tiles.index(i_w), b_dv.to(DTYPE))
    gl.thread_barrier()
    put(dk_desc, place, v_tiles.index(i_w), (b_dk * dk_scale).to(DTYPE))


@gluon.jit(do_not_specialize=["B", "T"])
def hopper_backward_kernel(
    q_desc, k_desc, v_desc, do_desc, rows_desc, dk_desc, dv_desc, sums, turns, ticket,
    scale, dk_scale, B, T, H: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """dk and dv of KEYS keys of a key head, summed over its G query heads, and their part of dq.

    A producer reads k and v [KEYS, D], and of each later block of queries and head q and do
    [ROWS, D], −lse and Δ [ROWS].  Two consumers write dk and dv [ROWS, D]; one warp adds what they
    give to dq to sums [B, HQ, blocks, ROWS · D], one waits for its turn there, one passes it on.
    """
    q_tiles = new_tiles(q_desc, STAGES)
    do_tiles = new_tiles(do_desc, STAGES)
    row_tiles = new_tiles(rows_desc, STAGES)
    q_ready = new_barriers(STAGES, 1)
    do_ready = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, 2)
    q_ring = Ring(q_tiles, q_ready, empty)
    do_ring = Ring(do_tiles, do_ready, empty)
    DS: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    ds_0 = gl.allocate_shared_memory(q_desc.dtype, [DS_STAGES, ROWS, ROWS], DS)
    ds_1 = gl.allocate_shared_memory(q_desc.dtype, [DS_STAGES, ROWS, ROWS], DS)
    ready_0 = new_barriers(DS_STAGES, 1)
    ready_1 = new_barriers(DS_STAGES, 1)
    read = new_barriers(DS_STAGES, 2)
    k_tiles = new_tiles(k_desc, 2)
    v_tiles = new_tiles(v_desc, 2)
    come = new_barriers(TURNS, 1)
    added = new_barriers(TURNS, 1)
    told = new_barriers(TURNS, 1)
    PART: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [0])
    SIZE: gl.constexpr = ROWS * k_desc.block_type.shape[3] // 2
    part_0 = gl.allocate_shared_memory(gl.float32, [DQ_STAGES, SIZE], PART)
    part_1 = gl.allocate_shared_memory(gl.float32, [DQ_STAGES, SIZE], PART)
    offered = new_barriers(2 * DQ_STAGES, 1)
    taken = new_barriers(2 * DQ_STAGES, 1)
    ready = new_barriers(1, 1).index(0)
    fence_async_shared()
    tile = gl.atomic_add(ticket, 1, sem="relaxed", scope="gpu")
    i_h = tile % H
    i_b = tile // H % B
    j = tile // H // B
    first = j * (KEYS // ROWS)
    last = gl.cdiv(T, ROWS) - 1
    # What partitions are given goes where warps have just read the ticket, and for these accesses
    # the compiler places no barrier.
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    0, dk_desc, dv_desc, part_0, offered, taken, k_tiles, v_tiles, ready,
                    q_ring, do_ring, row_tiles, ds_0, ds_1, ready_0, ready_1, read,
                    i_h, i_b, j, first, last, scale, dk_scale, H, G,
                ),
            ),
            (
                consume,
                (
                    1, dk_desc, dv_desc, part_1, offered, taken, k_tiles, v_tiles, ready,
                    q_ring, do_ring, row_tiles, ds_0, ds_1, ready_0, ready_1, read,
                    i_h, i_b, j, first, last, scale, dk_scale, H, G,
                ),
            ),
            (
                produce,
                (
                    q_desc, k_desc, v_desc, do_desc, rows_desc, k_tiles, v_tiles, ready,
                    q_ring, do_ring, row_tiles, i_h, i_b, j, first, last, T, H, G,
                ),
            ),
            (await_turns, (come, told, turns, i_h, i_b, j, first, last, T, H, G)),
            (pass_turns, (added, told, turns, i_h, i_b, j, first, last, T, H, G)),
            (
                add,
                (
                    come, added, part_0, part_1, offered, taken, sums,
                    i_h, i_b, j, first, last, T, H, G,
                ),
            ),
        ],
        [4, 1, 1, 1, 1],
        [
            CONSUMER_REGISTERS, HELPER_REGISTERS, HELPER_REGISTERS, HELPER_REGISTERS,
            HELPER_REGISTERS,
        ],
    )  # fmt: skip


def backward(do, q, k, v, g, sink_bias, cu_seqlens, o, lse, options):
    """Return the gradients of q, k, v, g and the sink."""
    if g is None and sink_bias is None and cu_seqlens is None and _takes(q, v, options):
        signed, scale = portable.rising(q, options.scale)
        tensors = dense(do, signed, k, v, o)
        if all(x.data_ptr() % 16 == 0 for x in tensors):
            dq, dk, dv = run_backward(Call(q, v, None, scale, None), *tensors, lse)
            dq = dq if scale == options.scale else dq.neg_()
            return dq, dk, dv, absent(q), absent(q)
    return portable.backward(do, q, k, v, g, sink_bias, cu_seqlens, o, lse, options)


def _takes(q: Tensor, v: Tensor, options) -> bool:
    B, T, H, V = v.shape
    window = options.window_size
    return (
        q.dtype == torch.bfloat16
        and q.shape[-1] == V == HEAD
        and T >= SHORTEST
        and cdiv(T, KEYS.value) * H * B >= FEWEST
        and (window is None or window >= T)
    )


def run_backward(call: Call, do, q, k, v, o, lse) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels: dq, dk and dv."""
    B, T, HQ, D = q.shape
    H = v.shape[2]
    rows_in, keys_in = ROWS.value, KEYS.value
    blocks = B * HQ * cdiv(T, rows_in)
    rows = lse.new_empty(blocks, 1, 1, 2 * rows_in)
    sums = lse.new_empty(blocks, rows_in * D)
    turns = torch.empty(blocks, device=q.device, dtype=torch.int32)
    ticket = turns.new_zeros(1)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    constants = {"HQ": HQ, "D": D, "BM": rows_in}
    launch(rows_kernel, blocks, (o, do, lse, rows, turns), (T,), constants)
    row_layout = gl.NVMMASharedLayout(0, 32, rank=4)
    rows_desc = TensorDescriptor(
        rows, list(rows.shape), list(rows.stride()), [1, 1, 1, 2 * rows_in], row_layout
    )
    scale = call.scale / LOG2E.value
    with torch.cuda.device_of(q):
        hopper_backward_kernel[(cdiv(T, keys_in) * H * B,)](
            *(descriptor(x, rows_in, D) for x in (q, k, v, do)),
            rows_desc,
            *(descriptor(x, rows_in, D) for x in (dk, dv)),
            sums, turns, ticket, call.scale, scale, B, T, H, HQ // H, num_warps=4,
        )  # fmt: skip
    launch(dq_kernel, blocks, (sums, dq), (scale, T), {"HQ": HQ, "K": D, "BM": rows_in, "BK": D})
    return dq, dk, dv
