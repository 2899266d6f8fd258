"""The steps of the softmax engine's backward on Hopper, and the warps beside those that compute.

One copies what a step needs.  Three see to dq: one waits for the turn of a step, one adds then what
is offered, and one passes the turn on.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

from fla.ops.attn.blocks import SEARCH, SPAN
from fla.ops.common.hopper import along, arrive, wait_before, wait_for

# A step is 64 queries of a head that meet 128 keys, an interval of gates.
ROWS = gl.constexpr(64)
KEYS = SPAN
# Stages of q and do
STAGES = gl.constexpr(2)
# Steps whose rows' and columns' sums are kept: when a fifth comes, the parts of the first have been
# taken.
SUMS = gl.constexpr(4)
# Elements of dq that a warp moves at once
LINE = gl.constexpr(512)


@aggregate
class Steps:
    """What a program goes through: blocks of queries, the last one first, each for G heads.

    Where there are gates, only those that need the program's keys: so many ``far`` ones, and then
    those that lie in the keys' own interval, up to block ``top``.
    """

    i_h: gl.tensor
    i_b: gl.tensor
    j: gl.tensor
    last: gl.tensor
    top: gl.tensor
    far: gl.tensor
    B: gl.tensor
    T: gl.tensor
    G: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, i_h, i_b, j, last, top, far, B, T, G):
        self.i_h = i_h
        self.i_b = i_b
        self.j = j
        self.last = last
        self.top = top
        self.far = far
        self.B = B
        self.T = T
        self.G = gl.constexpr(G)

    @gluon.jit
    def count(self):
        """How many there are, needed or not."""
        return (self.last + 1 - self.j * (KEYS // ROWS)) * self.G

    @gluon.jit
    def near(self):
        """The first of those in the keys' interval."""
        return (self.last - self.top) * self.G

    @gluon.jit
    def queries(self, n):
        """The block of queries of step n."""
        return self.last - n // self.G

    @gluon.jit
    def head(self, n):
        """The query head of step n."""
        return self.i_h * self.G + n % self.G

    @gluon.jit
    def interval(self, n):
        """The number of the first interval of step n's head among those of all."""
        return (self.head(n) * self.B + self.i_b) * gl.cdiv(self.T, KEYS)

    @gluon.jit
    def block(self, n):
        """The number of step n's block of queries."""
        return self.interval(n) * (KEYS // ROWS) + self.queries(n)

    @gluon.jit
    def next(self, n, needed):
        """The first step from n on whose queries need the keys, and the first keys that they do."""
        first = self.j * 0
        if needed is not None:
            first = gl.load(needed + self.block(n), mask=n < self.count(), other=0)
            while first > self.j:
                n += 1
                first = gl.load(needed + self.block(n), mask=n < self.count(), other=0)
        return n, first


@gluon.jit
def new_steps(tile, latest, B, T, H: gl.constexpr, G: gl.constexpr):
    """What a program does, which takes a ``tile``: the first keys come first.

    ``latest`` [2, B, H, intervals of keys] says which block of queries is the last that needs no
    keys before an interval, and how many of all heads there are.
    """
    i_h = tile % H
    i_b = tile // H % B
    j = tile // H // B
    last = gl.cdiv(T, ROWS) - 1
    top = gl.minimum((j + 1) * (KEYS // ROWS) - 1, last)
    far = (last - top) * G
    if latest is not None:
        last = top
        far = -(top + 1) * G
        intervals = gl.cdiv(T, KEYS)
        p = latest + (i_b * H + i_h) * intervals
        for at in range(0, j + 1, SEARCH):
            o_x = at + gl.arange(0, SEARCH, along(gl.num_warps()))
            m_x = o_x <= j
            last = gl.maximum(last, gl.max(gl.load(p + o_x, mask=m_x, other=0), 0))
            far += gl.sum(gl.load(p + B * H * intervals + o_x, mask=m_x, other=0), 0)
    return Steps(i_h, i_b, j, last, top, far, B, T, G)


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, do_desc, rows_desc, gates_desc, k_tiles, v_tiles, ready,
    q_ring, do_ring, row_tiles, gate_tiles, needed, steps,
):  # fmt: skip
    """Copy the program's keys and values; then of each step q with its rows and gates, and do."""
    mbarrier.expect(ready, 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for i_w in gl.static_range(2):
        place = [steps.i_b, steps.j * KEYS + i_w * ROWS, steps.i_h, 0]
        tma.async_copy_global_to_shared(k_desc, place, ready, k_tiles.index(i_w))
        tma.async_copy_global_to_shared(v_desc, place, ready, v_tiles.index(i_w))
    m = steps.j * 0
    n, _ = steps.next(m, needed)
    while n < steps.count():
        place = [steps.i_b, steps.queries(n) * ROWS, steps.head(n), 0]
        i_r = steps.block(n)
        i_g = steps.interval(n) + steps.j
        later, _ = steps.next(n + 1, needed)
        stage = m % STAGES
        wait_before(q_ring.empty, m)
        arrived = q_ring.ready.index(stage)
        if gates_desc is None:
            mbarrier.expect(arrived, q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
        else:
            more: gl.constexpr = rows_desc.block_type.nbytes + gates_desc.block_type.nbytes
            mbarrier.expect(arrived, q_desc.block_type.nbytes + more)
            far = (n < steps.near()).to(gl.int32)
            i_r = 2 * i_r + far
            at = [2 * i_g + far, 0, 0, 0]
            tma.async_copy_global_to_shared(gates_desc, at, arrived, gate_tiles.index(stage))
        tma.async_copy_global_to_shared(q_desc, place, arrived, q_ring.tiles.index(stage))
        tma.async_copy_global_to_shared(rows_desc, [i_r, 0, 0, 0], arrived, row_tiles.index(stage))
        arrived = do_ring.ready.index(stage)
        mbarrier.expect(arrived, do_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(do_desc, place, arrived, do_ring.tiles.index(stage))
        n = later
        m += 1


@gluon.jit
def await_turns(come, told, turns, needed, steps):
    """Say of each step when all programs before this one have added to its dq."""
    m = steps.j * 0
    n, _ = steps.next(m, needed)
    while n < steps.count():
        while gl.atomic_add(turns + steps.block(n), 0, sem="acquire", scope="gpu") < steps.j:
            pass
        n, _ = steps.next(n + 1, needed)
        wait_before(told, m)
        arrive(come, m)
        m += 1


@gluon.jit
def pass_turns(added, told, turns, needed, steps):
    """Tell the next program of each step that has been added."""
    m = steps.j * 0
    n, _ = steps.next(m, needed)
    while n < steps.count():
        later, _ = steps.next(n + 1, needed)
        wait_for(added, m)
        gl.atomic_xchg(turns + steps.block(n), steps.j + 1, sem="release", scope="gpu")
        arrive(told, m)
        n = later
        m += 1


@gluon.jit
def add(
    come, added, parts, offered, taken, row_parts, column_parts, row_sums, column_sums, sums,
    needed, steps,
):  # fmt: skip
    """Add to the sums what both consumers offer of a step, when its turn has come."""
    SIZE: gl.constexpr = parts.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    o_x = gl.arange(0, LINE, LAYOUT)
    m = steps.j * 0
    n, first = steps.next(m, needed)
    while n < steps.count():
        block = steps.block(n)
        p = sums + block.to(gl.int64) * (2 * SIZE)
        p_row = block.to(gl.int64) * ROWS
        p_column = (steps.interval(n) + steps.j).to(gl.int64) * KEYS
        opens = first == steps.j
        n, first = steps.next(n + 1, needed)
        wait_for(come, m)
        for i_w in gl.static_range(2):
            wait_for(offered, 2 * m + i_w)
            tile = parts.index((2 * m + i_w) % parts.shape[0])
            if opens:
                for at in gl.static_range(0, SIZE, LINE):
                    gl.store(p + (i_w * SIZE + at) + o_x, tile.slice(at, LINE).load(LAYOUT))
            else:
                for at in gl.static_range(0, SIZE, LINE):
                    b_x = tile.slice(at, LINE).load(LAYOUT)
                    gl.atomic_add(p + (i_w * SIZE + at) + o_x, b_x, sem="relaxed", scope="gpu")
            if row_parts is not None and i_w == 1:
                TALL: gl.constexpr = gl.BlockedLayout([8, 2], [1, 32], [1, 1], [1, 0])
                b_row = gl.sum(row_parts.index(m % SUMS).load(TALL), 0)
                o_r = gl.arange(0, ROWS, gl.SliceLayout(0, TALL))
                gl.atomic_add(row_sums + p_row + o_r, b_row, sem="relaxed", scope="gpu")
            if column_parts is not None and i_w == 1:
                b_column = column_parts.index(m % SUMS).load(LAYOUT)
                o_c = gl.arange(0, KEYS, LAYOUT)
                gl.atomic_add(column_sums + p_column + o_c, b_column, sem="relaxed", scope="gpu")
            gl.thread_barrier()
            arrive(taken, 2 * m + i_w)
        arrive(added, m)
        m += 1
