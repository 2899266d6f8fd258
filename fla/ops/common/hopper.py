"""What warp-specialised kernels for Hopper share.

One warp, the producer, copies tiles from global to shared memory; partitions of four warps each
consume them there.  Tiles pass through rings: a stage is filled when all readers have left it, and
read when its bytes have arrived.  Programs stay on their multiprocessor and take turns at tiles of
the output, so that the copies of the next begin while the last is still at work.
"""

import functools
from typing import Any

from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from fla.ops.common.workspace import Part

# Registers a thread: of 64 Ki, a producer's four warps (three idle) and two consumers' may have.
# More than 24 for the one leave the others eight less for every 16.
CONSUMER_REGISTERS = gl.constexpr(240)
# Of vectors in shared memory, however many lie there
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


class Tiles(TensorDescriptor):
    """A descriptor that does not check again, on every call, what its engine has: 2 µs each."""

    def __post_init__(self):
        pass


@functools.cache
def _layout(bits: int, columns: int) -> Any:
    return gl.NVMMASharedLayout(min(columns * bits // 8, 128), bits, rank=4)


def descriptor(x: Tensor | Part, rows: int, columns: int) -> TensorDescriptor:
    """x [B, T, H, D] in tiles [1, rows, 1, columns]; beyond T and D lie zeros, not written to.

    x is contiguous.  Where B or H is one its own strides may still be any, and the copies take
    multiples of 16 bytes only.
    """
    layout = _layout(8 * x.dtype.itemsize, columns)
    _, T, H, D = x.shape
    return Tiles(x, list(x.shape), [T * H * D, H * D, D, 1], [1, rows, 1, columns], layout)


def vectors(x: Tensor, size: int) -> TensorDescriptor:
    """All of x as one vector, in pieces of ``size``."""
    layout: Any = gl.NVMMASharedLayout(0, 8 * x.element_size(), rank=1)
    return TensorDescriptor(x.view(-1), [x.numel()], [1], [size], layout)


@builtin
def begin_to_add(desc, place, tile, _semantic=None):
    """Begin to add a tile of shared memory to what stands at ``place``, as a store is begun."""
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, desc.handle, place, tile.handle)


@gluon.jit
def wait_until_written():
    """Until all that this warp has begun to store, or to add, is there for others to see.

    ``store_wait`` is over when it has been read.
    """
    WARP: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, $1;",
        "=r,r",
        [gl.arange(0, 32, WARP)],
        gl.int32,
        is_pure=False,
        pack=1,
    )
    gl.thread_barrier()


@gluon.constexpr_function
def along(warps):
    """The layout of a vector over all threads."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def scalar(place):
    """What lies in a piece [1] of shared memory, for a partition of four warps."""
    return gl.max(place.load(along(4)), 0)


@gluon.jit
def tell(places, i, b_p):
    """Lay down the numbers of the i-th place, by one warp, whose arrival has to follow."""
    places.index(i & places.shape[0] - 1).store(b_p.to(gl.int32))
    gl.thread_barrier()


@gluon.jit
def told(places, i, WHAT: gl.constexpr):
    """Number WHAT of the i-th place that a producer has laid down in ``places`` [2^n, numbers]."""
    return scalar(places.index(i & places.shape[0] - 1).slice(WHAT, 1))


@gluon.jit
def tile_of(tiles, i):
    """The i-th tile that passes through [stages, 1, rows, 1, columns], as [rows, columns]."""
    return tiles.index(i % tiles.shape[0]).reshape([tiles.shape[2], tiles.shape[4]])


@gluon.jit
def clear(tiles, i, there):
    """Zero the rows of the i-th of ``tiles`` but the first, which are ``there``, by one warp.

    They are another sequence's, or nobody's, and have no weight; but zero times NaN is not zero.
    """
    # 64 columns of all rows come before the next ones, and a swizzle stays within a row
    ROWS: gl.constexpr = tiles.shape[2]
    WIDE: gl.constexpr = min(tiles.shape[4], 64)
    BLOCKS: gl.constexpr = tiles.shape[4] // WIDE
    rows = tiles._reinterpret(tiles.dtype, [tiles.shape[0] * BLOCKS * ROWS, WIDE], VECTOR)
    b = gl.zeros([WIDE], tiles.dtype, gl.BlockedLayout([2], [32], [1], [0]))
    first = i % tiles.shape[0] * (BLOCKS * ROWS)
    for row in range(gl.maximum(there, 0), ROWS):
        for block in gl.static_range(BLOCKS):
            rows.index(first + block * ROWS + row).store(b)


@aggregate
class Ring:
    """Stages of shared memory for one kind of tile; the i-th tile goes through stage i % stages."""

    tiles: gl.shared_memory_descriptor  # [stages, 1, rows, 1, columns]
    ready: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, tiles, ready, empty):
        self.tiles = tiles
        self.ready = ready
        self.empty = empty

    @gluon.jit
    def fill(self, desc, place, i, MORE: gl.constexpr = 0):
        """The producer: once the stage is empty, copy what stands at ``place`` there.

        The tile arrives together with MORE bytes that ``join`` copies.
        """
        stages: gl.constexpr = self.tiles.shape[0]
        stage = i % stages
        mbarrier.wait(self.empty.index(stage), i // stages % 2 ^ 1)
        mbarrier.expect(self.ready.index(stage), desc.block_type.nbytes + MORE)
        self.join(desc, place, i, self.tiles)

    @gluon.jit
    def join(self, desc, place, i, tiles):
        """Copy to a stage of other ``tiles``, of as many or more; it arrives with tile i."""
        ready = self.ready.index(i % self.tiles.shape[0])
        tma.async_copy_global_to_shared(desc, place, ready, tiles.index(i % tiles.shape[0]))

    @gluon.jit
    def wait(self, i, wanted=True):
        """Until tile i has arrived; at once where it is not wanted."""
        stages: gl.constexpr = self.tiles.shape[0]
        mbarrier.wait(self.ready.index(i % stages), i // stages % 2, pred=wanted)

    @gluon.jit
    def tile(self, i):
        """Tile i as [rows, columns]."""
        return tile_of(self.tiles, i)

    @gluon.jit
    def release(self, i):
        """A reader is done with tile i: all of its warps, for whom one thread arrives."""
        stages: gl.constexpr = self.tiles.shape[0]
        gl.thread_barrier()
        mbarrier.arrive(self.empty.index(i % stages), count=1)


@gluon.jit
def new_tiles(desc, COUNT: gl.constexpr):
    """Shared memory for tiles as ``desc`` describes them."""
    shape: gl.constexpr = [COUNT] + desc.block_type.shape  # noqa: RUF005, stars are not compiled
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


@gluon.jit
def new_barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier a stage; the i-th use is of stage i % stages, and over after so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def new_ring(desc, STAGES: gl.constexpr, READERS: gl.constexpr):
    """Before the partitions part; a fence has to follow."""
    return Ring(new_tiles(desc, STAGES), new_barriers(STAGES, 1), new_barriers(STAGES, READERS))


@gluon.jit
def wait_for(barriers, i, wanted=True):
    """Until the i-th use is over; at once where it is not wanted."""
    stages: gl.constexpr = barriers.shape[0]
    mbarrier.wait(barriers.index(i % stages), i // stages % 2, pred=wanted)


@gluon.jit
def wait_before(barriers, i):
    """Until the use before the i-th, of the same stage, is over; at once where there is none."""
    stages: gl.constexpr = barriers.shape[0]
    mbarrier.wait(barriers.index(i % stages), i // stages % 2 ^ 1)


@gluon.jit
def arrive(barriers, i):
    """One thread arrives for its partition, whose warps have to have met."""
    mbarrier.arrive(barriers.index(i % barriers.shape[0]), count=1)


@gluon.jit
def at_turn(turn):
    """The tile that this program takes; every other turn runs backwards, which evens out."""
    slot = gl.program_id(0)
    if turn % 2 == 1:
        slot = gl.num_programs(0) - 1 - slot
    return slot + turn * gl.num_programs(0)
