"""The kernel of the softmax engine's forward pass on Hopper.

One warp says where tiles of queries lie and copies what they meet; two partitions of four warps
each own half of a tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fla.ops.attn.blocks import (
    LEAST,
    SPAN,
    along_time,
    gate_marks,
    gate_sums,
    gates_within,
    place_of,
    sees,
)
from fla.ops.common.hopper import (
    VECTOR,
    along,
    arrive,
    at_turn,
    new_barriers,
    new_ring,
    new_tiles,
    tell,
    told,
    wait_for,
)
from fla.ops.common.kernels import LOG2E, SEARCH, first_slot, sequence, sequence_at

# 2 × 64 queries meet 128 keys, an interval of gates: logits, weights and output of a consumer fill
# its registers.  With heads of 128 two stages of keys and values, the queries and the output fill
# three quarters of the shared memory; narrow ones leave room for the queries of the next tile and
# for twice as many stages, of which each is over in half the time.
ROWS = gl.constexpr(64)
BLOCK = SPAN
# What a thread may have: a producer that also looks for its sequence does with no less than 40
CONSUMER_REGISTERS = gl.constexpr(232)
PRODUCER_REGISTERS = gl.constexpr(40)
# A tile's place: its head, or NONE; its sequence, where that begins, how long it is and how many of
# its tokens live; and which blocks of keys it meets, see ``key_blocks``
HEAD = gl.constexpr(0)
SEQUENCE = gl.constexpr(1)
BOS = gl.constexpr(2)
LENGTH = gl.constexpr(3)
LIVE = gl.constexpr(4)
LOW = gl.constexpr(5)
FULL = gl.constexpr(6)
LAST = gl.constexpr(7)
NONE = gl.constexpr(-1)
# Tiles whose places are kept, more than there are stages of queries: when one is written, those of
# the third before it, at the least, have been left.
PLACES = gl.constexpr(4)


@gluon.jit
def tiles_of(cu_seqlens, N, T, HQ: gl.constexpr):
    """How many tiles there are: for each head as many as ``Call.blocks`` says."""
    if cu_seqlens is None:
        return gl.cdiv(T, BLOCK) * N * HQ
    return (T // BLOCK + N + 1) * HQ


@gluon.jit
def next_tile(taken, turn):
    """The tile that a program takes at a turn; of those that ``taken`` counts the next one."""
    if taken is None:
        i = at_turn(turn)
    else:
        i = gl.atomic_add(taken, 1, sem="relaxed", scope="gpu")
    return i


@gluon.jit
def tile_at(i, cu_seqlens, N, T, HQ: gl.constexpr):
    """Which queries make tile i, as ``blocks.own`` says it; the longest tiles come first."""
    i_h = i % HQ
    if cu_seqlens is None:
        n = i // HQ % N
        i_b = gl.cdiv(T, BLOCK) - 1 - i // HQ // N
    else:
        slot = T // BLOCK + N - i // HQ
        n = sequence_at(cu_seqlens, slot, N, BLOCK, gl.arange(0, SEARCH, along(gl.num_warps())))
        i_b = slot - n - gl.load(cu_seqlens + n).to(gl.int32) // BLOCK
    bos, length, live = sequence(cu_seqlens, n, N, T, T)
    return i_h, n, i_b, bos, length, live


@gluon.jit
def key_blocks(last, live, window, needed, slot):
    """Which blocks of keys BLOCK queries meet: all of [full, last), with a mask [low, full) too.

    Block ``last`` is the queries' own.  Tokens behind the last sequence meet no other.  ``slot`` is
    where a sequence begins in what ``needed_kernel`` writes.
    """
    low = last * 0
    full = last * 0
    if window is not None:
        i_q = last * BLOCK
        low = gl.maximum(i_q - window + 1, 0) // BLOCK
        full = gl.minimum(gl.cdiv(gl.maximum(i_q + BLOCK - window, 0), BLOCK), last)
    if needed is not None:
        low = gl.maximum(low, gl.load(needed + slot + last, mask=live > 0, other=0))
    low = gl.where(live > 0, low, last)
    return low, gl.maximum(low, full)


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, until_desc, q_0, q_1, k_ring, v_ring, until, places, placed, needed,
    cu_seqlens, window, N, T, intervals, H: gl.constexpr, HQ: gl.constexpr,
):  # fmt: skip
    """Say where each tile lies, and copy its queries, and its keys and values backwards."""
    o_p = gl.arange(0, places.shape[1], along(1))
    taken = None
    if needed is not None and cu_seqlens is not None:  # no turns even out how long these are
        taken = needed + HQ * intervals
    tiles = tiles_of(cu_seqlens, N, T, HQ)
    m = 0
    n = 0
    turn = 0
    i = next_tile(taken, turn)
    while i < tiles:
        i_h, i_n, last, bos, length, live = tile_at(i, cu_seqlens, N, T, HQ)
        if last * BLOCK < length:
            row, start = place_of(cu_seqlens, i_n, bos)
            slot = first_slot(cu_seqlens, i_n, bos, T, BLOCK)
            low, full = key_blocks(last, live, window, needed, i_h * intervals + slot)
            first = start + last * BLOCK
            b_p = gl.where(o_p == HEAD, i_h, gl.where(o_p == SEQUENCE, i_n, last))
            b_p = gl.where(o_p == BOS, bos, gl.where(o_p == LENGTH, length, b_p))
            b_p = gl.where(o_p == LIVE, live, gl.where(o_p == LOW, low, b_p))
            b_p = gl.where(o_p == FULL, full, b_p)
            tell(places, m, b_p)
            arrive(placed, m)
            q_0.fill(q_desc, [row, first, i_h, 0], m)
            q_1.fill(q_desc, [row, first + ROWS, i_h, 0], m)
            m += 1
            for j in range(last + 1 - low):
                place = [row, first - j * BLOCK, i_h // (HQ // H), 0]
                if until is None:
                    k_ring.fill(k_desc, place, n)
                else:
                    k_ring.fill(k_desc, place, n, until_desc.block_type.nbytes)
                    i_s = (2 * HQ + i_h) * intervals + slot + last - j
                    k_ring.join(until_desc, [i_s * BLOCK], n, until)
                v_ring.fill(v_desc, place, n)
                n += 1
        turn += 1
        i = next_tile(taken, turn)
    tell(places, m, gl.where(o_p == HEAD, NONE, 0))
    arrive(placed, m)


@gluon.jit
def masked(b_s, o_i, first, window):
    """Logits, without those of keys that a query does not see."""
    o_j = first + gl.arange(0, BLOCK, gl.SliceLayout(0, b_s.type.layout))
    return gl.where(sees(o_i[:, None], o_j[None, :], window), b_s, float("-inf"))


@gluon.jit
def weigh(b_s, b_row, b_most, b_sum, scale):
    """The weights of logits scale b_s + b_row, their rows' largest and sum, and what falls off."""
    b_new = gl.max(b_s, 1) * scale
    if b_row is None:
        b_new = gl.maximum(b_most, b_new)
        b_p = gl.exp2(b_s * scale - b_new[:, None])
    else:
        b_new = gl.maximum(b_most, b_new + b_row)
        b_p = gl.exp2(b_s * scale - (b_new - b_row)[:, None])
    b_fall = gl.exp2(b_most - b_new)
    return b_p, b_new, b_sum * b_fall + gl.sum(b_p, 1), b_fall


@gluon.jit
def meet(
    n, count, more, stop, q, k_ring, v_ring, until, b_p, b_o, b_most, b_sum, o_i,
    b_since, between, p_total, window, scale, MASKED: gl.constexpr,
):  # fmt: skip
    """Let queries meet ``count`` blocks of keys, backwards from block ``stop``; ``more`` follow.

    The keys of block n have arrived, and b_p are the weights of the block before it.  So both
    products of a turn, with keys n and values n − 1, run at once, the second under the softmax.
    ``between`` is the sum of the gates between the queries' interval and that of the keys.
    """
    LOGITS: gl.constexpr = b_most.type.layout.parent
    OUT: gl.constexpr = b_o.type.layout
    for i in range(count):
        i_s = stop - 1 - i
        b_0 = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
        b_s = warpgroup_mma(q, k_ring.tile(n).permute((1, 0)), b_0, use_acc=False, is_async=True)
        v_ring.wait(n - 1)
        b_o = warpgroup_mma(b_p, v_ring.tile(n - 1), b_o, is_async=True)
        if until is not None:
            b_row = b_since + between.to(gl.float32)
            between += gl.load(p_total + i_s).to(gl.float64)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        if until is not None:
            b_s = (
                b_s * scale
                + until.index(n % until.shape[0]).load(gl.SliceLayout(0, LOGITS))[None, :]
            )
        k_ring.release(n)
        if MASKED:
            b_s = masked(b_s, o_i, i_s * BLOCK, window)
        if until is None:
            b_w, b_most, b_sum, b_fall = weigh(b_s, None, b_most, b_sum, scale)
        else:
            b_w, b_most, b_sum, b_fall = weigh(b_s, b_row, b_most, b_sum, 1.0)
        # There is nothing to wait for yet.  But without this, and a branch behind it, the assembler
        # moves the exponentials behind the wait for b_o.
        b_o, b_w, b_p, b_sum = warpgroup_mma_wait(1, deps=(b_o, b_w, b_p, b_sum))
        n += 1
        k_ring.wait(n, i + 1 < count + more)
        b_o, b_p = warpgroup_mma_wait(0, deps=(b_o, b_p))
        v_ring.release(n - 2)
        b_o = b_o * gl.convert_layout(b_fall, gl.SliceLayout(1, OUT))[:, None]
        b_p = gl.convert_layout(b_w.to(v_ring.tiles.dtype), gl.DotOperandLayout(0, OUT, 2))
    return n, b_p, b_o, b_most, b_sum, between


@gluon.jit
def clear_half(tile, i_w: gl.constexpr, live, cleared, cuts):
    """What ``clear`` does with values, half a tile in each consumer.

    The copying warp does not wait for them to arrive, but goes on to the next blocks.
    """
    WIDE: gl.constexpr = tile.shape[1] // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [4, 1], [1, 0])
    o_r = i_w * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    half = tile.slice(i_w * ROWS, ROWS)
    b = half.load(LAYOUT)
    half.store(gl.where((o_r < live)[:, None], b, gl.zeros_like(b)))
    fence_async_shared()
    gl.thread_barrier()
    arrive(cleared, cuts)
    wait_for(cleared, cuts)


@gluon.jit
def consume(
    i_w: gl.constexpr, o_desc, o, lse, sink, sums, marks, q_ring, k_ring, v_ring, until, places,
    placed, cleared, tiles, cu_seqlens, scale, window, T, intervals,
    HQ: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """Rows [ROWS i_w, ROWS (i_w + 1)) of each tile: o through shared memory, and lse."""
    D: gl.constexpr = tiles.shape[4]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    # Queries stay in registers, so that a seventh less passes through shared memory; with gates
    # wide heads have no room for them, and narrow ones gain little.
    KEPT: gl.constexpr = sums is None
    m = 0
    n = 0
    cuts = 0
    wait_for(placed, m)
    i_h = told(places, m, HEAD)
    while i_h != NONE:
        i_n = told(places, m, SEQUENCE)
        bos = told(places, m, BOS)
        length = told(places, m, LENGTH)
        live = told(places, m, LIVE)
        low = told(places, m, LOW)
        full = told(places, m, FULL)
        last = told(places, m, LAST)
        slot = first_slot(cu_seqlens, i_n, bos, T, BLOCK)
        i_q = last * BLOCK
        o_i = i_q + i_w * ROWS + gl.arange(0, ROWS, ROW)
        q_ring.wait(m)
        q = q_ring.tile(m)
        if KEPT:
            q = q.load(gl.DotOperandLayout(0, LOGITS, 2))

        # the sink is a key with this logit and without a value
        b_most = gl.full([ROWS], LEAST, gl.float32, ROW)
        b_sum = gl.zeros([ROWS], gl.float32, ROW)
        if sink is not None:
            b_sink = gl.load(sink + i_h).to(gl.float32) * LOG2E
            b_most = gl.full([ROWS], 0.0, gl.float32, ROW) + b_sink
            b_sum = gl.full([ROWS], 1.0, gl.float32, ROW)
        b_o = gl.zeros([ROWS, D], gl.float32, OUT)

        k_ring.wait(n)
        b_0 = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
        k = k_ring.tile(n).permute((1, 0))
        b_s = warpgroup_mma(q, k, b_0, use_acc=False, is_async=True)
        b_since = None
        p_total = None
        if sums is not None:
            p_since, p_rest, _ = gate_sums(sums, i_h, slot, intervals, HQ)
            p_total, _, _ = gate_marks(marks, i_h, 0, slot, intervals, HQ)
            b_since = gl.load(p_since + o_i)
            o_j = i_q + gl.arange(0, BLOCK, gl.SliceLayout(0, LOGITS))
            b_gates = gates_within(b_since, gl.load(p_rest + o_i), p_since, p_rest, o_j)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        k_ring.release(n)
        if KEPT:  # their loads have arrived, for which no barrier waits
            q_ring.release(m)
        if sums is None:
            b_s = masked(b_s, o_i, i_q, window)
            b_w, b_most, b_sum, _ = weigh(b_s, None, b_most, b_sum, scale)
        else:
            b_s = masked(b_s * scale + b_gates, o_i, i_q, window)
            b_w, b_most, b_sum, _ = weigh(b_s, None, b_most, b_sum, 1.0)
        b_p = b_w.to(tiles.dtype)
        b_near = b_most
        b_over = gl.sum(b_p.to(gl.float32) - b_w, 1)
        b_p = gl.convert_layout(b_p, gl.DotOperandLayout(0, OUT, 2))
        if cu_seqlens is not None:
            if i_q + BLOCK > live:
                v_ring.wait(n)
                clear_half(v_ring.tile(n), i_w, live - i_q, cleared, cuts)
                cuts += 1
        between = gl.to_tensor(0.0).to(gl.float64)
        n += 1
        k_ring.wait(n, last > low)
        n, b_p, b_o, b_most, b_sum, between = meet(
            n, last - full, full - low, last, q, k_ring, v_ring, until, b_p, b_o, b_most,
            b_sum, o_i, b_since, between, p_total, window, scale, False,
        )  # fmt: skip
        if window is not None:
            n, b_p, b_o, b_most, b_sum, between = meet(
                n, full - low, 0, full, q, k_ring, v_ring, until, b_p, b_o, b_most,
                b_sum, o_i, b_since, between, p_total, window, scale, True,
            )  # fmt: skip
        if not KEPT:
            q_ring.release(m)
        v_ring.wait(n - 1)
        b_o = warpgroup_mma(b_p, v_ring.tile(n - 1), b_o, is_async=True)
        tma.store_wait(0)  # the last turn's
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        v_ring.release(n - 1)
        # Where a row has few keys, o is the mean with the weights as they were rounded.
        b_all = b_sum + b_over * gl.exp2(b_near - b_most)
        b_o = b_o * (1.0 / gl.convert_layout(b_all, gl.SliceLayout(1, OUT)))[:, None]
        b_lse = (b_most + gl.log2(b_sum)) / LOG2E
        row, start = place_of(cu_seqlens, i_n, bos)
        if cu_seqlens is not None and i_q + BLOCK > live:
            # Behind its last token begins another sequence; behind the last one all is zero.
            o_r = i_q + i_w * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
            o_d = gl.arange(0, D, gl.SliceLayout(0, OUT))
            m_o = (o_r < length)[:, None] & (o_d < V)[None, :]
            b_o = gl.where((o_r < live)[:, None], b_o, 0.0)
            p_o = o + (bos + o_r).to(gl.int64)[:, None] * (HQ * V) + i_h * V + o_d[None, :]
            gl.store(p_o, b_o.to(tiles.dtype), mask=m_o)
            b_lse = gl.where(o_i < live, b_lse, LEAST)
        else:
            tiles.index(i_w).reshape([ROWS, D]).store(b_o.to(tiles.dtype))
            fence_async_shared()
            place = [row, start + i_q + i_w * ROWS, i_h, 0]
            tma.async_copy_shared_to_global(o_desc, place, tiles.index(i_w))
        p_lse = lse + along_time(cu_seqlens, bos, i_h, T, HQ)
        gl.store(p_lse + o_i, b_lse, mask=o_i < length)
        m += 1
        wait_for(placed, m)
        i_h = told(places, m, HEAD)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["window", "N", "T", "intervals"])
def hopper_forward_kernel(
    o, lse, sink, sums, marks, needed, cu_seqlens, q_desc, k_desc, v_desc, o_desc, until_desc,
    scale, window, N, T, intervals, H: gl.constexpr, HQ: gl.constexpr, V: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """What ``forward.forward_kernel`` gives, in tiles of BLOCK queries from the longest on.

    A producer reads q [2, ROWS, D] and, with the gates, k and v [BLOCK, D] before them; each of two
    consumers writes o [ROWS, D] and lse [ROWS].
    """
    q_0 = new_ring(q_desc, STAGES // 2, 1)
    q_1 = new_ring(q_desc, STAGES // 2, 1)
    k_ring = new_ring(k_desc, STAGES, 2)
    v_ring = new_ring(v_desc, STAGES, 2)
    until: gl.constexpr = None
    cleared: gl.constexpr = None
    if until_desc is not None:
        # twice as many: keys may be released while a load from here is under way
        until = new_tiles(until_desc, 2 * STAGES)
    if cu_seqlens is not None:
        cleared = new_barriers(1, 2)
    tiles = new_tiles(o_desc, 2)
    places = gl.allocate_shared_memory(gl.int32, [PLACES, 8], VECTOR)
    placed = new_barriers(PLACES, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    0, o_desc, o, lse, sink, sums, marks, q_0, k_ring, v_ring, until, places,
                    placed, cleared, tiles, cu_seqlens, scale, window, T, intervals, HQ, V,
                ),
            ),
            (
                consume,
                (
                    1, o_desc, o, lse, sink, sums, marks, q_1, k_ring, v_ring, until, places,
                    placed, cleared, tiles, cu_seqlens, scale, window, T, intervals, HQ, V,
                ),
            ),
            (
                produce,
                (
                    q_desc, k_desc, v_desc, until_desc, q_0, q_1, k_ring, v_ring, until, places,
                    placed, needed, cu_seqlens, window, N, T, intervals, H, HQ,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
