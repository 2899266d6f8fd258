"""The kernel of the softmax engine's backward on Hopper: five products a pair of blocks.

    p_ij = exp(s_ij − lse_i)    Δ_i = do_i·o_i    dS_ij = p_ij (do_i·v_j − Δ_i)
    dq_i = scale Σ_j dS_ij k_j    dk_j = scale Σ_i dS_ij q_i    dv_j = Σ_i p_ij do_i

A program owns a block of keys, and adds what its keys give to dq in global memory: after the blocks
before it, so that the same bits come out every time.  Programs take blocks in the order in which
they start, the first keys first, which have the most queries, and go through their queries from the
last ones backwards, all heads of a group at each block of them.  So they follow each other a step
apart, and who waits, waits for programs that are running.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fla.ops.attn.blocks import sees
from fla.ops.attn.hopper_steps import (
    KEYS,
    ROWS,
    SUMS,
    add,
    await_turns,
    new_steps,
    pass_turns,
    produce,
)
from fla.ops.common.hopper import (
    CONSUMER_REGISTERS,
    Ring,
    arrive,
    new_barriers,
    new_tiles,
    wait_before,
    wait_for,
)

# dk, dv, and the logits and their gradients of 64 keys fill a consumer's registers; what does not
# fit goes to local memory, for which the first-level cache has little room left.  With heads of 128
# k and v, two steps of q and do, and what goes to dq fill the shared memory.  Nor do consumers
# touch global memory: a step has no room to wait for it.

# Of dS a step is written while the one before it is read
DS_STAGES = gl.constexpr(2)
# Keys × queries
PAIRS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS.value, 16]))
# How many steps the turns may be known ahead
TURNS = gl.constexpr(4)
# Those of four warps that copy, add and wait
HELPER_REGISTERS = gl.constexpr(32)


@gluon.constexpr_function
def as_threads_hold(columns):
    """The layout of a part of dq [ROWS, columns] as one vector."""
    rest = [[at] for at in (512, 1024, 2048) if at < ROWS.value * columns]
    quads = [[4], [8], [16], [32], [64]]
    return gl.DistributedLinearLayout(
        [[1], [2], *rest], quads, [[128], [256]], [], [ROWS.value * columns]
    )


@gluon.jit
def offer(i_w: gl.constexpr, m, b_dq, parts, offered, taken):
    """Give a step's part of dq away in the order in which threads hold it, four side by side."""
    W: gl.constexpr = b_dq.shape[1]
    FLAT: gl.constexpr = as_threads_hold(W)
    wait_before(taken, 2 * m + i_w)
    b_dq = b_dq.reshape([4, 2, 8, W // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([ROWS * W])
    part = parts.index((2 * m + i_w) % parts.shape[0])
    part.reshape([ROWS * W]).store(gl.convert_layout(b_dq, FLAT, assert_trivial=True))
    fence_async_shared()
    gl.thread_barrier()
    arrive(offered, 2 * m + i_w)


@gluon.jit
def product_with_queries(x, ring, m):
    """Start the product of keys or values [ROWS, D] with queries or do, transposed, of step m."""
    ring.wait(m)
    b_0 = gl.zeros([ROWS, ROWS], gl.float32, PAIRS)
    return warpgroup_mma(x, ring.tile(m).permute((1, 0)), b_0, use_acc=False, is_async=True)


@gluon.jit
def product_with_keys(i_w: gl.constexpr, m, wanted, k_tiles, column_tiles, ds_0, ds_1, ready):
    """Start dS k [ROWS, D / 2] of step m, half i_w of its columns, when dS is ``ready``.

    Half of a narrow k is no operand, unless it lies in tiles of its own.
    """
    D: gl.constexpr = k_tiles.shape[4]
    W: gl.constexpr = D // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    wait_for(ready, m, wanted)
    b_dq = gl.zeros([ROWS, W], gl.float32, LAYOUT)
    if column_tiles is None:
        k_0 = k_tiles.index(0).reshape([ROWS, D]).slice(i_w * W, W, 1)
        k_1 = k_tiles.index(1).reshape([ROWS, D]).slice(i_w * W, W, 1)
    else:
        k_0 = column_tiles.index(i_w).reshape([ROWS, W])
        k_1 = column_tiles.index(2 + i_w).reshape([ROWS, W])
    ds = ds_0.index(m % DS_STAGES)
    b_dq = warpgroup_mma(ds.permute((1, 0)), k_0, b_dq, use_acc=False, is_async=True)
    ds = ds_1.index(m % DS_STAGES)
    return warpgroup_mma(ds.permute((1, 0)), k_1, b_dq, is_async=True)


@gluon.jit
def power_of_logit(x):
    """2^x; zero for what is not normal, which takes fewer instructions."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def put(i_w: gl.constexpr, desc, p, tile, value, steps, H: gl.constexpr, PACKED: gl.constexpr):
    """Write a consumer's tile, through shared memory that nobody else uses, to ``desc``, or to p.

    Behind the last token of a PACKED sequence begins another one.
    """
    D: gl.constexpr = tile.shape[3]
    first = steps.j * KEYS + i_w * ROWS
    left = steps.live - first
    whole = True
    if PACKED:
        whole = left >= ROWS
        if left < ROWS:
            o_r = gl.arange(0, ROWS, gl.SliceLayout(1, value.type.layout))
            o_d = gl.arange(0, D, gl.SliceLayout(0, value.type.layout))
            row = (steps.bos + first + o_r).to(gl.int64)
            p_rows = p + row[:, None] * (H * D) + steps.i_h * D + o_d[None, :]
            gl.store(p_rows, value, mask=(o_r < left)[:, None])
    if whole:
        tile.reshape([ROWS, D]).store(value)
        fence_async_shared()
        gl.thread_barrier()
        place = [steps.row, steps.bos + first, steps.i_h, 0]
        tma.async_copy_shared_to_global(desc, place, tile)
        tma.store_wait(0)


@gluon.jit
def seen(b_s, i, j, window):
    """Logits [ROWS, ROWS] of keys from j on with queries from i on, less what these do not see."""
    LAYOUT: gl.constexpr = b_s.type.layout
    o_i = i + gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))[None, :]
    o_j = j + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    return gl.where(sees(o_i, o_j, window), b_s, float("-inf"))


@gluon.constexpr_function
def shared_out(rows):
    """Where lanes that had columns of 2 · ``rows`` rows in common have half of them, of two rows.

    [4 warps, 2, rows, ROWS]: a lane gives the other half away, and gets a row beside its own.
    """
    columns = [[0, 0, 0, 8], [0, 0, 0, 16], [0, 0, 0, 32]]
    common = [[0, 0, row, 0] for row in (1, 2) if row < rows]
    kept = len(common)
    return gl.DistributedLinearLayout(
        [[0, 1, 0, 0], [0, 0, 0, 1], *columns[:kept]],
        [[0, 0, 0, 2], [0, 0, 0, 4], *common, *columns[kept:]],
        [[1, 0, 0, 0], [2, 0, 0, 0]],
        [],
        [4, 2, rows, ROWS.value],
    )


@gluon.jit
def sums_of_rows(b_ds):
    """The sums of b_ds [ROWS, ROWS], as products leave it, over the rows of each warp: [4, ROWS].

    Eight lanes have the same columns.  They share them out before they add, 14 exchanges for 48.
    """
    b_sum = gl.sum(b_ds.reshape([4, 2, 8, ROWS]), 1)
    for i in gl.static_range(3):
        b_sum = b_sum.reshape([4, 2, 4 >> i, ROWS])
        b_sum = gl.sum(gl.convert_layout(b_sum, shared_out(4 >> i)), 1)
    return b_sum.reshape([4, ROWS])


@gluon.jit
def meet(
    i_w: gl.constexpr, m, count, b_dk, b_dv, k, v, parts, offered, taken, k_tiles, column_tiles,
    q_ring, do_ring, row_tiles, gate_tiles, ds_0, ds_1, ready_0, ready_1, read, row_parts,
    column_parts, window, steps, scale, NEAR: gl.constexpr,
):  # fmt: skip
    """Let keys [ROWS i_w, ROWS (i_w + 1)) meet the queries of ``count`` steps.

    What stands along a step is transposed: keys × queries.  A step's dq follows in the next one:
    by then the other consumer has put its dS there too.  NEAR queries lie in the keys' interval.
    """
    DTYPE: gl.constexpr = k_tiles.dtype
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, b_dk.type.layout, 2)
    ds = ds_0
    mine = ready_0
    other = ready_1
    if i_w == 1:
        ds = ds_1
        mine = ready_1
        other = ready_0
    for i in range(count):
        b_s = product_with_queries(k, q_ring, m)
        b_dp = product_with_queries(v, do_ring, m)
        rows = row_tiles.index(m % row_tiles.shape[0]).reshape([1, row_tiles.shape[4]])
        b_row = rows.slice(0, ROWS, 1).load(PAIRS)
        if gate_tiles is not None and not NEAR:
            # the gates between the two intervals, from sums that are held in two floats each
            far = gate_tiles.index(m % gate_tiles.shape[0]).reshape([1, 2 * KEYS])
            b_far = rows.slice(2 * ROWS, 1, 1).load(PAIRS) - far.slice(KEYS, 1, 1).load(PAIRS)
            b_far += rows.slice(3 * ROWS, 1, 1).load(PAIRS) - far.slice(KEYS + 1, 1, 1).load(PAIRS)
            b_row += b_far
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        b_s = b_s * scale + b_row
        if gate_tiles is not None:
            gates = gate_tiles.index(m % gate_tiles.shape[0]).reshape([2 * KEYS])
            b_0 = gates.slice(i_w * ROWS, ROWS).load(gl.SliceLayout(1, PAIRS))[:, None]
            if NEAR:
                # what ``blocks.gates_within`` gives
                b_1 = gates.slice(KEYS + i_w * ROWS, ROWS).load(gl.SliceLayout(1, PAIRS))[:, None]
                b_near = rows.slice(2 * ROWS, ROWS, 1).load(PAIRS) - b_0
                b_s += b_near + (rows.slice(3 * ROWS, ROWS, 1).load(PAIRS) - b_1)
            else:
                b_s += b_0
        first = steps.j * KEYS + i_w * ROWS
        if steps.BY_HEAD:
            queries = steps.queries(m)
            if steps.cut(queries, window):
                b_s = seen(b_s, queries * ROWS, first, window)
        elif NEAR:
            b_s = seen(b_s, steps.queries(steps.near() + i) * ROWS, first, window)
        elif window is not None:  # which step this is, only its rows say
            at = rows.slice(2 * ROWS + 1, 1, 1).load(PAIRS).to(gl.int32, bitcast=True)
            b_s = seen(b_s, at, first, window)
        b_p = power_of_logit(b_s)
        b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
        b_dst = b_p * (b_dp - rows.slice(ROWS, ROWS, 1).load(PAIRS))
        b_ds = b_dst.to(DTYPE)
        b_p = gl.convert_layout(b_p.to(DTYPE), OPERAND)
        b_a = gl.convert_layout(b_ds, OPERAND)
        b_dv = warpgroup_mma(b_p, do_ring.tile(m), b_dv, is_async=True)
        if column_parts is not None:
            tile = column_parts.index(m % SUMS).slice(i_w * ROWS, ROWS)
            tile.store(gl.sum(b_dst, 1))
        if row_parts is not None:
            tile = row_parts.index(m % SUMS).slice(4 * i_w, 4)
            tile.store(sums_of_rows(b_dst))
        b_dk = warpgroup_mma(b_a, q_ring.tile(m), b_dk, is_async=True)
        wait_before(read, m)
        ds.index(m % DS_STAGES).store(b_ds)
        fence_async_shared()
        gl.thread_barrier()
        arrive(mine, m)
        # in the first step there is none before it: a product of anything, which is not used
        previous = m - 1 + gl.where(m == 0, DS_STAGES, 0)
        b_dq = product_with_keys(i_w, previous, m > 0, k_tiles, column_tiles, ds_0, ds_1, other)
        b_dv, b_p, b_dk, b_a, b_dq = warpgroup_mma_wait(0, deps=(b_dv, b_p, b_dk, b_a, b_dq))
        q_ring.release(m)
        if m > 0:
            arrive(read, m - 1)
            offer(i_w, m - 1, b_dq, parts, offered, taken)
        m += 1
    return m, b_dk, b_dv


@gluon.jit
def consume(
    i_w: gl.constexpr, dk_desc, dv_desc, dk, dv, parts, offered, taken, k_tiles, v_tiles,
    column_tiles, ready, q_ring, do_ring, row_tiles, gate_tiles, ds_0, ds_1, ready_0, ready_1,
    read, row_parts, column_parts, window, steps, scale, dk_scale,
    H: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """dk and dv of keys [ROWS i_w, ROWS (i_w + 1)) of the program; of all of them half of dq."""
    D: gl.constexpr = k_tiles.shape[4]
    DTYPE: gl.constexpr = k_tiles.dtype
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    if steps.count() > 0:
        k = k_tiles.index(i_w).reshape([ROWS, D])
        v = v_tiles.index(i_w).reshape([ROWS, D])
        b_dk = gl.zeros([ROWS, D], gl.float32, ACC)
        b_dv = gl.zeros([ROWS, D], gl.float32, ACC)
        mbarrier.wait(ready.index(0), 0)
        if column_tiles is not None:
            # Narrow ones fit into registers beside all else, and need not pass at every step.
            OPERAND: gl.constexpr = gl.DotOperandLayout(0, PAIRS, 2)
            k = k.load(OPERAND)
            v = v.load(OPERAND)
        m = steps.j * 0
        for near in gl.static_range(1 if steps.BY_HEAD else 2):
            count = steps.far if near == 0 else steps.count() - steps.near()
            m, b_dk, b_dv = meet(
                i_w, m, count, b_dk, b_dv, k, v, parts, offered, taken, k_tiles, column_tiles,
                q_ring, do_ring, row_tiles, gate_tiles, ds_0, ds_1, ready_0, ready_1, read,
                row_parts, column_parts, window, steps, scale, near == 1,
            )  # fmt: skip
        other = ready_1 if i_w == 0 else ready_0
        b_dq = product_with_keys(i_w, m - 1, True, k_tiles, column_tiles, ds_0, ds_1, other)
        b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
        offer(i_w, m - 1, b_dq, parts, offered, taken)
        # v has been read by all warps
        put(i_w, dv_desc, dv, v_tiles.index(i_w), b_dv.to(DTYPE), steps, H, PACKED)
        gl.thread_barrier()
        b_dk = (b_dk * dk_scale).to(DTYPE)
        put(i_w, dk_desc, dk, v_tiles.index(i_w), b_dk, steps, H, PACKED)


@gluon.jit(do_not_specialize=["window", "N", "T", "intervals"])
def hopper_backward_kernel(
    dk, dv, turns, ticket, needed, latest, row_sums, column_sums, cu_seqlens,
    q_desc, k_desc, v_desc, columns_desc, do_desc, rows_desc, gates_desc, dk_desc, dv_desc,
    sums_desc, scale, dk_scale, window, N, T, intervals, H: gl.constexpr, G: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of KEYS keys of a key head, summed over its G query heads, and their part of dq.

    A producer reads k and v [KEYS, D], where D is 64 k again in tiles of half its columns, and of
    each later block of queries and head q and do [ROWS, D], −lse and Δ [ROWS].  Two consumers write
    dk and dv [ROWS, D]; one warp adds what they give to dq to sums [HQ, blocks, ROWS · D], one
    waits for its turn there, one passes it on.  With gates, which come with the rows, it also adds
    Σ_j dS_ij to row_sums [HQ, blocks, ROWS], and Σ_i dS_ij to column_sums, of the same shape.
    """
    q_tiles = new_tiles(q_desc, STAGES)
    do_tiles = new_tiles(do_desc, STAGES)
    row_tiles = new_tiles(rows_desc, STAGES)
    gate_tiles: gl.constexpr = None
    if gates_desc is not None:
        gate_tiles = new_tiles(gates_desc, STAGES)
    PACKED: gl.constexpr = cu_seqlens is not None
    q_ready = new_barriers(STAGES + PACKED, 1)
    do_ready = new_barriers(STAGES + PACKED, 1)
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
    column_tiles: gl.constexpr = None
    if columns_desc is not None:
        column_tiles = new_tiles(columns_desc, 4)
    come = new_barriers(TURNS, 1)
    added = new_barriers(TURNS, 1)
    told = new_barriers(TURNS, 1)
    # with heads of 128 rows' sums leave room for three parts only
    PARTS: gl.constexpr = 4 if row_sums is None else 3
    parts = new_tiles(sums_desc, PARTS)
    row_parts: gl.constexpr = None
    column_parts: gl.constexpr = None
    if row_sums is not None:
        PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        row_parts = gl.allocate_shared_memory(gl.float32, [SUMS, 8, ROWS], PLAIN)
    if column_sums is not None:
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [0])
        column_parts = gl.allocate_shared_memory(gl.float32, [SUMS, KEYS], FLAT)
    offered = new_barriers(PARTS, 1)
    taken = new_barriers(PARTS, 1)
    ready = new_barriers(1 + PACKED, 1)
    fence_async_shared()
    tile = gl.atomic_add(ticket, 1, sem="relaxed", scope="gpu")
    steps = new_steps(tile, latest, cu_seqlens, window, N, T, intervals, H, G)
    # What partitions are given goes where warps have just read the ticket, or the latest query;
    # for these accesses the compiler places no barrier.
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    0, dk_desc, dv_desc, dk, dv, parts, offered, taken, k_tiles, v_tiles,
                    column_tiles, ready, q_ring, do_ring, row_tiles, gate_tiles, ds_0, ds_1,
                    ready_0, ready_1, read, row_parts, column_parts, window, steps, scale,
                    dk_scale, H, PACKED,
                ),
            ),
            (
                consume,
                (
                    1, dk_desc, dv_desc, dk, dv, parts, offered, taken, k_tiles, v_tiles,
                    column_tiles, ready, q_ring, do_ring, row_tiles, gate_tiles, ds_0, ds_1,
                    ready_0, ready_1, read, row_parts, column_parts, window, steps, scale,
                    dk_scale, H, PACKED,
                ),
            ),
            (
                produce,
                (
                    q_desc, k_desc, v_desc, columns_desc, do_desc, rows_desc, gates_desc, k_tiles,
                    v_tiles, column_tiles, ready, q_ring, do_ring, row_tiles, gate_tiles, needed,
                    window, steps, PACKED,
                ),
            ),
            (await_turns, (come, told, turns, needed, window, steps)),
            (pass_turns, (added, told, turns, needed, window, steps)),
            (
                add,
                (
                    come, added, parts, offered, taken, row_parts, column_parts, row_sums,
                    column_sums, sums_desc, needed, window, steps,
                ),
            ),
        ],
        [4, 1, 1, 1, 1],
        [
            CONSUMER_REGISTERS, HELPER_REGISTERS, HELPER_REGISTERS, HELPER_REGISTERS,
            HELPER_REGISTERS,
        ],
    )  # fmt: skip
