"""Where segments lie, and what a scan keeps on the chip, for warp-specialised kernels on Hopper."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from fla.ops.common.hopper import Ring, along, new_barriers, new_tiles
from fla.ops.common.kernels import SEARCH, sequence_at
from fla.ops.kda.hopper_tiles import C

# Value channels of a partition
BV = gl.constexpr(64)
# [BV, C], as products leave it and as they take it from registers
PAIRS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OPERAND = gl.constexpr(gl.DotOperandLayout(0, PAIRS, 2))
TOKENS = gl.constexpr(gl.SliceLayout(0, PAIRS))


@gluon.constexpr_function
def state_layout(BK):
    """The layout of a state, [BV, BK]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])


@aggregate
class Segment:
    """The tokens of one head that a program's scan goes through."""

    unit: gl.tensor  # its number
    sequence: gl.tensor
    i_b: gl.tensor  # where tokens lie: row,
    token: gl.tensor  # and the first one in it
    i_hv: gl.tensor
    row: gl.tensor  # of its first chunk among those of workspaces
    before: gl.tensor  # tokens of the sequence before it,
    left: gl.tensor  # and from its first on
    steps: gl.tensor  # chunks
    real: gl.tensor  # not what is behind the last sequence

    @gluon.constexpr_function
    def __init__(self, unit, sequence, i_b, token, i_hv, row, before, left, steps, real):
        self.unit = unit
        self.sequence = sequence
        self.i_b = i_b
        self.token = token
        self.i_hv = i_hv
        self.row = row
        self.before = before
        self.left = left
        self.steps = steps
        self.real = real


@gluon.jit
def segment_of(cu_seqlens, unit, i_hv, rows, T, size, HV: gl.constexpr):
    """Segment ``unit`` of ``size`` tokens, as ``locate`` of ``slots.py`` numbers them."""
    if cu_seqlens is None:
        pieces = gl.cdiv(T, size)
        i_n = unit // pieces
        i_b = i_n
        bos = unit * 0
        length = T
        before = unit % pieces * size
        slot = i_n * gl.cdiv(T, C)
        real = unit >= 0
    else:
        i_n = sequence_at(cu_seqlens, unit, rows - 1, size, gl.arange(0, SEARCH, along(4)))
        i_b = unit * 0
        bos = gl.load(cu_seqlens + i_n).to(gl.int32)
        slot = bos // C + i_n
        before = (unit - i_n - bos // size) * size
        bos = gl.minimum(bos, T)
        eos = gl.load(cu_seqlens + i_n + 1, mask=i_n < rows - 1, other=T).to(gl.int32)
        length = gl.minimum(eos, T) - bos
        real = i_n < rows - 1
    left = length - before
    steps = gl.where(real, gl.maximum(gl.cdiv(gl.minimum(left, size), C), 0), 0)
    row = (slot + before // C) * HV + i_hv
    return Segment(unit, i_n, i_b, bos + before, i_hv, row, before, left, steps, real)


@gluon.jit
def state_at(STRIDES: gl.constexpr, row, i_hv, o_v, LAYOUT: gl.constexpr, BK: gl.constexpr):
    """Offsets of a state [BV, BK], whose values begin at o_v, in memory."""
    o_v = o_v + gl.arange(0, BV, gl.SliceLayout(1, LAYOUT))[:, None]
    o_k = gl.arange(0, BK, gl.SliceLayout(0, LAYOUT))[None, :]
    place = row.to(gl.int64) * STRIDES[0] + i_hv.to(gl.int64) * STRIDES[1]
    return place + (o_v * STRIDES[2] + o_k * STRIDES[3])


@aggregate
class Memory:
    """What is copied for a chunk, in stages, and room for what a partition writes.

    Tiles arrive in three groups, in the order in which a scan needs them.
    """

    q_in: gl.shared_memory_descriptor  # [stages, 1, C, 1, BK]
    k_in: gl.shared_memory_descriptor
    k_out: gl.shared_memory_descriptor
    queries: gl.shared_memory_descriptor  # [stages, 1, C, 1, C]
    solver: gl.shared_memory_descriptor
    x: gl.shared_memory_descriptor  # v or do: [stages, 1, C, 1, BV a partition]
    decay: gl.shared_memory_descriptor  # [stages, 1, BK]
    betas: gl.shared_memory_descriptor  # [stages, 1, C]
    rows: gl.shared_memory_descriptor  # [partitions, 1, C, 1, BV]
    states: gl.shared_memory_descriptor  # [partitions, 1, BV, 1, BK]
    ready_0: gl.shared_memory_descriptor
    ready_1: gl.shared_memory_descriptor
    ready_2: gl.shared_memory_descriptor
    empty_0: gl.shared_memory_descriptor
    empty_1: gl.shared_memory_descriptor
    empty_2: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self, q_in, k_in, k_out, queries, solver, x, decay, betas, rows, states,
        ready_0, ready_1, ready_2, empty_0, empty_1, empty_2,
    ):  # fmt: skip
        self.q_in = q_in
        self.k_in = k_in
        self.k_out = k_out
        self.queries = queries
        self.solver = solver
        self.x = x
        self.decay = decay
        self.betas = betas
        self.rows = rows
        self.states = states
        self.ready_0 = ready_0
        self.ready_1 = ready_1
        self.ready_2 = ready_2
        self.empty_0 = empty_0
        self.empty_1 = empty_1
        self.empty_2 = empty_2

    @gluon.jit
    def group(self, i: gl.constexpr, tiles):
        """Group i, led by its ``tiles``."""
        if i == 0:
            ring = Ring(tiles, self.ready_0, self.empty_0)
        elif i == 1:
            ring = Ring(tiles, self.ready_1, self.empty_1)
        else:
            ring = Ring(tiles, self.ready_2, self.empty_2)
        return ring


@gluon.jit
def new_memory(
    wide_desc, pairs_desc, x_desc, rows_desc, states_desc, BK: gl.constexpr,
    STAGES: gl.constexpr, READERS: gl.constexpr,
):  # fmt: skip
    """Before the partitions part; a fence has to follow."""
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    q_in = new_tiles(wide_desc, STAGES)
    k_in = new_tiles(wide_desc, STAGES)
    k_out = new_tiles(wide_desc, STAGES)
    queries = new_tiles(pairs_desc, STAGES)
    solver = new_tiles(pairs_desc, STAGES)
    x = new_tiles(x_desc, STAGES)
    decay = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BK], VECTOR)
    betas = gl.allocate_shared_memory(gl.float32, [STAGES, 1, C], VECTOR)
    # these stand for what a call does not write
    rows = x
    states = x
    if rows_desc is not None:
        rows = new_tiles(rows_desc, READERS)
    if states_desc is not None:
        states = new_tiles(states_desc, READERS)
    return Memory(
        q_in, k_in, k_out, queries, solver, x, decay, betas, rows, states,
        new_barriers(STAGES, 1), new_barriers(STAGES, 1), new_barriers(STAGES, 1),
        new_barriers(STAGES, READERS), new_barriers(STAGES, READERS),
        new_barriers(STAGES, READERS),
    )  # fmt: skip
