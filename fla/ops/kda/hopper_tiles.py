"""What kernels for Hopper share that take a chunk at a time: its size, copies, conversions."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from fla.ops.kda.halving import TILE

# Tokens of a chunk, and its blocks of TILE tokens
C = gl.constexpr(64)
BLOCKS = gl.constexpr(C.value // TILE.value)
# A tile in shared memory whose rows and columns products of warps read without conflicts
SHARED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
# Numbers one after the other, in rows
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.constexpr_function
def in_lines(warps):
    """The layout of what is copied to and from global memory: 16 bytes of bf16 a thread."""
    return gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])


@gluon.jit
def lines(ROWS: gl.constexpr, COLUMNS: gl.constexpr, stride):
    """Where the elements of a tile lie, and the rows."""
    LAYOUT: gl.constexpr = in_lines(gl.num_warps())
    o_r = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), 1)
    o_c = gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT)), 0)
    return o_r * stride + o_c, o_r


@gluon.jit
def copied(p, ROWS: gl.constexpr, COLUMNS: gl.constexpr, stride, left):
    """A tile on its way to shared memory; zeros from row ``left`` on."""
    o_x, o_r = lines(ROWS, COLUMNS, stride)
    tile = gl.allocate_shared_memory(p.dtype.element_ty, [ROWS, COLUMNS], SHARED)
    async_copy.async_copy_global_to_shared(tile, p + o_x, o_r < left)
    return tile


@gluon.jit
def as_mask(m):
    return gl.where(m, 1.0, 0.0).to(gl.bfloat16)


@gluon.jit
def wide(x):
    """bf16 in fp32: two numbers that share a register, without moving them apart first."""
    return gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], gl.float32, True, 2
    )


@gluon.jit
def narrow(x):
    """fp32 in bf16, and that in fp32; a conversion there and back takes four times as long."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
        "=&r,=r,=r,r,r", [x], (gl.bfloat16, gl.float32), True, 2,
    )  # fmt: skip
