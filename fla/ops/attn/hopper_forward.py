"""The softmax engine on Hopper: a warp-specialised forward; what it does not take, Triton does."""

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

from fla.ops.attn import triton as portable
from fla.ops.attn.blocks import LEAST, LOG2E, Call
from fla.ops.common.hopper import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    at_turn,
    descriptor,
    new_ring,
    new_tiles,
    turns,
)
from fla.ops.common.kernels import cdiv, multiprocessors

# Below this length a call is short beside the host's time to describe its tensors
SHORTEST = 4096
# 2 × 64 queries meet 128 keys: logits, weights and output of a consumer fill its registers, and two
# stages of keys and values, the queries and the output three quarters of the shared memory.
ROWS = gl.constexpr(64)
BLOCK = gl.constexpr(128)
STAGES = gl.constexpr(2)


def forward(q, k, v, g, sink_bias, cu_seqlens, options):
    """Return o [B, T, HQ, V] and lse [B, HQ, T]."""
    signed, scale = portable.rising(q, options.scale)
    tensors = portable.dense(signed, k, v, sink_bias)
    aligned = all(x.data_ptr() % 16 == 0 for x in tensors[:3])
    if g is not None or cu_seqlens is not None or q.shape[1] < SHORTEST or not aligned:
        return portable.forward(q, k, v, g, sink_bias, cu_seqlens, options)
    return run_forward(Call(q, v, None, scale, options.window_size), *tensors)


@gluon.jit
def key_blocks(i_q, window):
    """Which blocks of keys BLOCK queries meet: all of [full, last), with a mask [low, full) too.

    Block ``last`` is the queries' own.
    """
    last = i_q // BLOCK
    low = last * 0
    full = last * 0
    if window is not None:
        low = gl.maximum(i_q - window + 1, 0) // BLOCK
        full = gl.minimum(gl.cdiv(gl.maximum(i_q + BLOCK - window, 0), BLOCK), last)
    return low, full, last


@gluon.jit
def tile_at(turn, B, T, HQ: gl.constexpr):
    """The head, sequence and first query of a turn: those with the most keys come first."""
    i = at_turn(turn)
    return i % HQ, i // HQ % B, (gl.cdiv(T, BLOCK) - 1 - i // HQ // B) * BLOCK


@gluon.jit
def produce(q_desc, k_desc, v_desc, q_0, q_1, k_ring, v_ring, window, B, T, H, HQ: gl.constexpr):
    """Copy each tile's queries, and its keys and values from the nearest backwards."""
    n = 0
    for turn in range(turns(gl.cdiv(T, BLOCK) * B * HQ)):
        i_h, i_b, i_q = tile_at(turn, B, T, HQ)
        i_kh = i_h // (HQ // H)
        low, _, last = key_blocks(i_q, window)
        q_0.fill(q_desc, [i_b, i_q, i_h, 0], turn)
        q_1.fill(q_desc, [i_b, i_q + ROWS, i_h, 0], turn)
        for i in range(last + 1 - low):
            place = [i_b, (last - i) * BLOCK, i_kh, 0]
            k_ring.fill(k_desc, place, n)
            v_ring.fill(v_desc, place, n)
            n += 1


@gluon.jit
def masked(b_s, o_i, first, window):
    """Logits, without those of keys that a query does not see."""
    o_j = first + gl.arange(0, BLOCK, gl.SliceLayout(0, b_s.type.layout))
    if window is None:
        m = o_j[None, :] <= o_i[:, None]
    else:
        m = (o_i[:, None] - o_j[None, :]).to(gl.uint32) < window.to(gl.uint32)
    return gl.where(m, b_s, float("-inf"))


@gluon.jit
def weigh(b_s, b_most, b_sum, scale):
    """The weights of logits, the rows' largest logit and sum, and by what their past falls."""
    b_new = gl.maximum(b_most, gl.max(b_s, 1) * scale)
    b_p = gl.exp2(b_s * scale - b_new[:, None])
    b_fall = gl.exp2(b_most - b_new)
    return b_p, b_new, b_sum * b_fall + gl.sum(b_p, 1), b_fall


@gluon.jit
def meet(
    n, count, more, stop, q, k_ring, v_ring, b_p, b_o, b_most, b_sum, o_i, window, scale,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Let queries meet ``count`` blocks of keys, the nearest ends at ``stop``; ``more`` follow.

    The keys of block n have arrived, and b_p are the weights of the block before it.  So both
    products of a turn, with keys n and values n − 1, run at once, the second under the softmax.
    """
    LOGITS: gl.constexpr = b_most.type.layout.parent
    OUT: gl.constexpr = b_o.type.layout
    for i in range(count):
        b_0 = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
        b_s = warpgroup_mma(q, k_ring.tile(n).permute((1, 0)), b_0, use_acc=False, is_async=True)
        v_ring.wait(n - 1)
        b_o = warpgroup_mma(b_p, v_ring.tile(n - 1), b_o, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        k_ring.release(n)
        if MASKED:
            b_s = masked(b_s, o_i, stop - (i + 1) * BLOCK, window)
        b_w, b_most, b_sum, b_fall = weigh(b_s, b_most, b_sum, scale)
        # There is nothing to wait for yet.  But without this, and a branch behind it, the assembler
        # moves the exponentials behind the wait for b_o.
        b_o, b_w, b_p, b_sum = warpgroup_mma_wait(1, deps=(b_o, b_w, b_p, b_sum))
        n += 1
        k_ring.wait(n, i + 1 < count + more)
        b_o, b_p = warpgroup_mma_wait(0, deps=(b_o, b_p))
        v_ring.release(n - 2)
        b_o = b_o * gl.convert_layout(b_fall, gl.SliceLayout(1, OUT))[:, None]
        b_p = gl.convert_layout(b_w.to(v_ring.tiles.dtype), gl.DotOperandLayout(0, OUT, 2))
    return n, b_p, b_o, b_most, b_sum


@gluon.jit
def consume(
    i_w: gl.constexpr, o_desc, lse, sink, q_ring, k_ring, v_ring, tiles, scale, window, B, T,
    HQ: gl.constexpr,
):  # fmt: skip
    """Rows [ROWS i_w, ROWS (i_w + 1)) of each tile: o through shared memory, and lse."""
    D: gl.constexpr = tiles.shape[4]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    n = 0
    for turn in range(turns(gl.cdiv(T, BLOCK) * B * HQ)):
        i_h, i_b, i_q = tile_at(turn, B, T, HQ)
        low, full, last = key_blocks(i_q, window)
        o_i = i_q + i_w * ROWS + gl.arange(0, ROWS, ROW)
        q_ring.wait(turn)
        q = q_ring.tile(turn)

        # the sink is a key with this logit and without a value
        b_most = gl.full([ROWS], LEAST, gl.float32, ROW)
        b_sum = gl.zeros([ROWS], gl.float32, ROW)
        if sink is not None:
            b_most = (
                gl.full([ROWS], 0.0, gl.float32, ROW) + gl.load(sink + i_h).to(gl.float32) * LOG2E
            )
            b_sum = gl.full([ROWS], 1.0, gl.float32, ROW)
        b_o = gl.zeros([ROWS, D], gl.float32, OUT)

        k_ring.wait(n)
        b_0 = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
        b_s = warpgroup_mma(q, k_ring.tile(n).permute((1, 0)), b_0, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        k_ring.release(n)
        b_s = masked(b_s, o_i, last * BLOCK, window)
        b_w, b_most, b_sum, _ = weigh(b_s, b_most, b_sum, scale)
        b_p = gl.convert_layout(b_w.to(tiles.dtype), gl.DotOperandLayout(0, OUT, 2))
        n += 1
        k_ring.wait(n, last > low)
        n, b_p, b_o, b_most, b_sum = meet(
            n, last - full, full - low, last * BLOCK, q, k_ring, v_ring,
            b_p, b_o, b_most, b_sum, o_i, window, scale, False,
        )  # fmt: skip
        if window is not None:
            n, b_p, b_o, b_most, b_sum = meet(
                n, full - low, 0, full * BLOCK, q, k_ring, v_ring,
                b_p, b_o, b_most, b_sum, o_i, window, scale, True,
            )  # fmt: skip
        q_ring.release(turn)
        v_ring.wait(n - 1)
        b_o = warpgroup_mma(b_p, v_ring.tile(n - 1), b_o, is_async=True)
        tma.store_wait(0)  # the last turn's
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        v_ring.release(n - 1)
        b_o = b_o * (1.0 / gl.convert_layout(b_sum, gl.SliceLayout(1, OUT)))[:, None]
        tiles.index(i_w).reshape([ROWS, D]).store(b_o.to(tiles.dtype))
        fence_async_shared()
        place = [i_b, i_q + i_w * ROWS, i_h, 0]
        tma.async_copy_shared_to_global(o_desc, place, tiles.index(i_w))
        p_lse = lse + (i_b * HQ + i_h).to(gl.int64) * T + o_i
        gl.store(p_lse, (b_most + gl.log2(b_sum)) / LOG2E, mask=o_i < T)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["window", "B", "T"])
def hopper_forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse, sink, scale, window, B, T,
    H: gl.constexpr, HQ: gl.constexpr,
):  # fmt: skip
    """o and lse of tiles of BLOCK queries of one head, from the longest to the shortest.

        s_ij = scale q_i·k_j    o_i = Σ_j exp(s_ij − lse_i) v_j
        lse_i = log(Σ_j exp s_ij + exp sink)

    A producer reads q [2, ROWS, D] and k and v [BLOCK, D] before them; each of two consumers writes
    o [ROWS, D] and lse [ROWS].
    """
    q_0 = new_ring(q_desc, 1, 1)
    q_1 = new_ring(q_desc, 1, 1)
    k_ring = new_ring(k_desc, STAGES, 2)
    v_ring = new_ring(v_desc, STAGES, 2)
    tiles = new_tiles(o_desc, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consume,
                (0, o_desc, lse, sink, q_0, k_ring, v_ring, tiles, scale, window, B, T, HQ),
            ),
            (
                consume,
                (1, o_desc, lse, sink, q_1, k_ring, v_ring, tiles, scale, window, B, T, HQ),
            ),
            (
                produce,
                (q_desc, k_desc, v_desc, q_0, q_1, k_ring, v_ring, window, B, T, H, HQ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def run_forward(call: Call, q, k, v, sink) -> tuple[Tensor, Tensor]:
    """Launch ``hopper_forward_kernel``: o [B, T, HQ, V] and lse [B, HQ, T]."""
    B, T, HQ, _ = q.shape
    o = q.new_empty(B, T, HQ, v.shape[-1])
    lse = q.new_empty(B, HQ, T, dtype=torch.float32)
    rows, block = ROWS.value, BLOCK.value
    descriptors = [descriptor(x, n, 128) for x, n in ((q, rows), (k, block), (v, block), (o, rows))]
    tiles = cdiv(T, block) * B * HQ
    with torch.cuda.device_of(q):
        hopper_forward_kernel[(min(tiles, multiprocessors(q.device)),)](
            *descriptors, lse, sink, call.scale, call.window, B, T, k.shape[2], HQ, num_warps=4
        )
    return o, lse
