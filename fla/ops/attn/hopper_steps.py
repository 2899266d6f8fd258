"""The steps of the softmax engine's backward on Hopper, and the warps beside those that compute.

One copies what a step needs.  Three see to dq: one waits for the turn of a step, one adds then what
is offered, and one passes the turn on.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.core import _aggregate as aggregate

from fla.ops.attn.blocks import SPAN, first_interval_seen, place_of
from fla.ops.common.hopper import (
    along,
    arrive,
    begin_to_add,
    clear,
    wait_before,
    wait_for,
    wait_until_written,
)
from fla.ops.common.kernels import SEARCH, first_slot, sequence, sequence_at

# A step is 64 queries of a head that meet 128 keys, an interval of gates.
ROWS = gl.constexpr(64)
KEYS = SPAN
# Steps whose rows' and columns' sums are kept: when a fifth comes, the parts of the first have been
# taken.
SUMS = gl.constexpr(4)


@aggregate
class Steps:
    """What a program goes through: blocks of queries, the last one first, each for G heads.

    Only those that need the program's keys: so many ``far`` ones, and then those that lie in the
    keys' own interval j, up to block ``top``.  BY_HEAD all blocks of a head come one after another,
    and all are called far: where programs are of one length, as in a window, each meets a block of
    queries two steps after the one before it, and finds it in the second-level cache.  The sequence
    has ``live`` tokens from token ``bos`` of ``row`` on, and intervals from ``slot`` on, of the
    ``intervals`` that a head has.
    """

    i_h: gl.tensor
    row: gl.tensor
    bos: gl.tensor
    live: gl.tensor
    slot: gl.tensor
    j: gl.tensor
    last: gl.tensor
    top: gl.tensor
    far: gl.tensor
    intervals: gl.tensor
    G: gl.constexpr
    BY_HEAD: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, i_h, row, bos, live, slot, j, last, top, far, intervals, G, BY_HEAD):
        self.i_h = i_h
        self.row = row
        self.bos = bos
        self.live = live
        self.slot = slot
        self.j = j
        self.last = last
        self.top = top
        self.far = far
        self.intervals = intervals
        self.G = gl.constexpr(G)
        self.BY_HEAD = gl.constexpr(BY_HEAD)

    @gluon.jit
    def blocks(self):
        """How many blocks of queries a head has; none where the interval has no keys."""
        return self.last + 1 - self.j * (KEYS // ROWS)

    @gluon.jit
    def count(self):
        """How many steps there are, needed or not."""
        return self.blocks() * self.G

    @gluon.jit
    def cut(self, queries, window):
        """Whether some of a block of queries do not see all of the keys."""
        return (queries <= self.top) | (queries >= (self.j * KEYS + window) // ROWS)

    @gluon.jit
    def near(self):
        """The first of those in the keys' interval."""
        return (self.last - self.top) * self.G

    @gluon.jit
    def queries(self, n):
        """The block of queries of step n."""
        if self.BY_HEAD:
            i = n % gl.maximum(self.blocks(), 1)
        else:
            i = n // self.G
        return self.last - i

    @gluon.jit
    def head(self, n):
        """The query head of step n."""
        if self.BY_HEAD:
            i = n // gl.maximum(self.blocks(), 1)
        else:
            i = n % self.G
        return self.i_h * self.G + i

    @gluon.jit
    def interval(self, n):
        """The number of the first interval of step n's head among those of all."""
        return self.head(n) * self.intervals + self.slot

    @gluon.jit
    def block(self, n):
        """The number of step n's block of queries."""
        return self.interval(n) * (KEYS // ROWS) + self.queries(n)

    @gluon.jit
    def next(self, n, needed, window):
        """The first step from n on whose queries need the keys, and the first keys that they do."""
        first = self.j * 0
        if needed is None:
            if window is not None:
                first = first_interval_seen(self.queries(n) * ROWS, window)
        else:
            first = gl.load(needed + self.block(n), mask=n < self.count(), other=0)
            while first > self.j:
                n += 1
                first = gl.load(needed + self.block(n), mask=n < self.count(), other=0)
        return n, first


@gluon.jit
def new_steps(tile, latest, cu_seqlens, window, N, T, intervals, H: gl.constexpr, G: gl.constexpr):
    """What a program does, which takes a ``tile``: of a sequence, the first keys come first.

    ``latest`` [2, H, intervals] says which block of queries is the last that needs no keys before
    an interval, and how many of all heads there are.
    """
    i_h = tile % H
    if cu_seqlens is None:
        n = tile // H % N
        j = tile // H // N
    else:
        j = tile // H
        n = sequence_at(cu_seqlens, j, N, KEYS, gl.arange(0, SEARCH, along(gl.num_warps())))
        j -= n + gl.load(cu_seqlens + n).to(gl.int32) // KEYS
    bos, _, live = sequence(cu_seqlens, n, N, T, T)
    slot = first_slot(cu_seqlens, n, bos, T, KEYS)
    row, bos = place_of(cu_seqlens, n, bos)
    last = gl.cdiv(live, ROWS) - 1
    top = gl.minimum((j + 1) * (KEYS // ROWS) - 1, last)
    BY_HEAD: gl.constexpr = (latest is None) and (window is not None)
    if BY_HEAD:
        last = gl.minimum(last, (j * KEYS + KEYS - 2 + window) // ROWS)
        far = (last + 1 - j * (KEYS // ROWS)) * G
    elif latest is None:
        far = (last - top) * G
    else:
        last = top
        far = -(top + 1) * G
        p = latest + i_h * intervals + slot
        for at in range(0, j + 1, SEARCH):
            o_x = at + gl.arange(0, SEARCH, along(gl.num_warps()))
            m_x = (o_x <= j) & (live > 0)
            last = gl.maximum(last, gl.max(gl.load(p + o_x, mask=m_x, other=-1), 0))
            far += gl.sum(gl.load(p + H * intervals + o_x, mask=m_x, other=0), 0)
    return Steps(i_h, row, bos, live, slot, j, last, top, far, intervals, G, BY_HEAD)


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, columns_desc, do_desc, rows_desc, gates_desc, k_tiles, v_tiles,
    column_tiles, ready, q_ring, do_ring, row_tiles, gate_tiles, needed, window, steps,
    PACKED: gl.constexpr,
):  # fmt: skip
    """Copy the program's keys and values; then of each step q with its rows and gates, and do.

    Of PACKED sequences a tile may reach into the next one.  Such copies arrive at the last barrier
    of their ring, and the tile is ready when what is not the sequence's has been cleared.
    """
    if steps.count() > 0:
        arrived = ready.index(0)
        left = steps.live - steps.j * KEYS
        if PACKED:
            arrived = ready.index((left < KEYS).to(gl.int32))
        again: gl.constexpr = 0 if columns_desc is None else k_desc.block_type.nbytes
        mbarrier.expect(arrived, 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes + again))
        for i_w in gl.static_range(2):
            first = steps.bos + steps.j * KEYS + i_w * ROWS
            place = [steps.row, first, steps.i_h, 0]
            tma.async_copy_global_to_shared(k_desc, place, arrived, k_tiles.index(i_w))
            tma.async_copy_global_to_shared(v_desc, place, arrived, v_tiles.index(i_w))
            if columns_desc is not None:
                for half in gl.static_range(2):
                    column = half * columns_desc.block_type.shape[3]
                    tma.async_copy_global_to_shared(
                        columns_desc, [steps.row, first, steps.i_h, column], arrived,
                        column_tiles.index(2 * i_w + half),
                    )  # fmt: skip
        if PACKED:
            if left < KEYS:
                mbarrier.wait(arrived, 0)
                for i_w in gl.static_range(2):
                    clear(k_tiles, i_w, left - i_w * ROWS)
                    clear(v_tiles, i_w, left - i_w * ROWS)
                    if columns_desc is not None:
                        for half in gl.static_range(2):
                            clear(column_tiles, 2 * i_w + half, left - i_w * ROWS)
                fence_async_shared()
                gl.thread_barrier()
                mbarrier.arrive(ready.index(0), count=1)
    STAGES: gl.constexpr = q_ring.tiles.shape[0]
    m = steps.j * 0
    cleared = steps.j * 0
    n, _ = steps.next(m, needed, window)
    while n < steps.count():
        place = [steps.row, steps.bos + steps.queries(n) * ROWS, steps.head(n), 0]
        left = steps.live - steps.queries(n) * ROWS
        i_r = steps.block(n)
        i_g = steps.interval(n) + steps.j
        later, _ = steps.next(n + 1, needed, window)
        stage = m % STAGES
        at = stage
        if PACKED:
            at = gl.where(left < ROWS, STAGES, stage)
        wait_before(q_ring.empty, m)
        arrived = q_ring.ready.index(at)
        if gates_desc is None:
            mbarrier.expect(arrived, q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
        else:
            more: gl.constexpr = rows_desc.block_type.nbytes + gates_desc.block_type.nbytes
            mbarrier.expect(arrived, q_desc.block_type.nbytes + more)
            far = (n < steps.near()).to(gl.int32)
            i_r = 2 * i_r + far
            i_g = 2 * i_g + far
            tma.async_copy_global_to_shared(
                gates_desc, [i_g, 0, 0, 0], arrived, gate_tiles.index(stage)
            )
        tma.async_copy_global_to_shared(q_desc, place, arrived, q_ring.tiles.index(stage))
        tma.async_copy_global_to_shared(rows_desc, [i_r, 0, 0, 0], arrived, row_tiles.index(stage))
        arrived = do_ring.ready.index(at)
        mbarrier.expect(arrived, do_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(do_desc, place, arrived, do_ring.tiles.index(stage))
        if PACKED:
            if left < ROWS:
                mbarrier.wait(q_ring.ready.index(STAGES), cleared % 2)
                mbarrier.wait(do_ring.ready.index(STAGES), cleared % 2)
                cleared += 1
                clear(q_ring.tiles, m, left)
                clear(do_ring.tiles, m, left)
                fence_async_shared()
                gl.thread_barrier()
                mbarrier.arrive(q_ring.ready.index(stage), count=1)
                mbarrier.arrive(do_ring.ready.index(stage), count=1)
        n = later
        m += 1


@gluon.jit
def await_turns(come, told, turns, needed, window, steps):
    """Say of each step when all programs before this one have added to its dq."""
    m = steps.j * 0
    n, _ = steps.next(m, needed, window)
    while n < steps.count():
        while gl.atomic_add(turns + steps.block(n), 0, sem="acquire", scope="gpu") < steps.j:
            pass
        n, _ = steps.next(n + 1, needed, window)
        wait_before(told, m)
        arrive(come, m)
        m += 1


@gluon.jit
def pass_turns(added, told, turns, needed, window, steps):
    """Tell the next program of each step that has been added."""
    m = steps.j * 0
    n, _ = steps.next(m, needed, window)
    while n < steps.count():
        later, _ = steps.next(n + 1, needed, window)
        wait_for(added, m)
        gl.atomic_xchg(turns + steps.block(n), steps.j + 1, sem="release", scope="gpu")
        arrive(told, m)
        n = later
        m += 1


@gluon.jit
def add(
    come, added, parts, offered, taken, row_parts, column_parts, row_sums, column_sums, sums_desc,
    needed, window, steps,
):  # fmt: skip
    """Add to the sums what both consumers offer of a step, when its turn has come."""
    m = steps.j * 0
    n, first = steps.next(m, needed, window)
    while n < steps.count():
        block = steps.block(n)
        p_row = block.to(gl.int64) * ROWS
        p_column = (steps.interval(n) + steps.j).to(gl.int64) * KEYS
        opens = first == steps.j
        n, first = steps.next(n + 1, needed, window)
        wait_for(come, m)
        for i_w in gl.static_range(2):
            wait_for(offered, 2 * m + i_w)
            tile = parts.index((2 * m + i_w) % parts.shape[0])
            place = [2 * block + i_w, 0, 0, 0]
            if opens:
                tma.async_copy_shared_to_global(sums_desc, place, tile)
            else:
                begin_to_add(sums_desc, place, tile)
            if row_parts is not None and i_w == 1:
                TALL: gl.constexpr = gl.BlockedLayout([8, 2], [1, 32], [1, 1], [1, 0])
                b_row = gl.sum(row_parts.index(m % SUMS).load(TALL), 0)
                o_r = gl.arange(0, ROWS, gl.SliceLayout(0, TALL))
                gl.atomic_add(row_sums + p_row + o_r, b_row, sem="relaxed", scope="gpu")
            if column_parts is not None and i_w == 1:
                LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
                b_column = column_parts.index(m % SUMS).load(LAYOUT)
                o_c = gl.arange(0, KEYS, LAYOUT)
                gl.atomic_add(column_sums + p_column + o_c, b_column, sem="relaxed", scope="gpu")
        for i_w in gl.static_range(2):
            tma.store_wait(1 - i_w)
            gl.thread_barrier()
            arrive(taken, 2 * m + i_w)
        wait_until_written()
        arrive(added, m)
        m += 1
