"""What is looked for in compiled kernels is found where it is, and only there."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from compiling import compiling, overtaken, under_way
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fla.ops.common.hopper import VECTOR, arrive, new_barriers, wait_for

C = tl.constexpr(64)


@triton.jit(do_not_specialize=["turns"])
def products_kernel(x, y, out, sums, turns, TWICE: tl.constexpr, SUMMED: tl.constexpr):
    """Σ xᵀy over tiles [C, C], where TWICE also Σ yᵀx, and where SUMMED the sums of x over rows."""
    o = tl.arange(0, C)
    b_o = tl.zeros([C, C], tl.float32)
    b_p = tl.zeros([C, C], tl.float32)
    b_s = tl.zeros([C], tl.float32)
    for i in tl.range(0, turns, num_stages=3):
        p = (i * C + o)[:, None] * C + o[None, :]
        b_x = tl.load(x + p)
        b_y = tl.load(y + p)
        if SUMMED:
            b_s += tl.sum(b_x.to(tl.float32), 0)
        b_o = tl.dot(tl.trans(b_x), b_y, b_o)
        if TWICE:
            b_p = tl.dot(tl.trans(b_y), b_x, b_p)
    tl.store(out + o[:, None] * C + o[None, :], b_o + b_p)
    tl.store(sums + o, b_s)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_a_tile_that_is_overtaken(twice, summed):
    x = torch.zeros(8, 64, 64, dtype=torch.bfloat16)
    with compiling(90) as compiled:
        products_kernel[(1,)](
            x, x, x[0].float(), torch.zeros(64), 8, TWICE=twice, SUMMED=summed, num_warps=4
        )
    assert bool(overtaken(compiled[0])) == summed


@gluon.jit
def barriers_kernel(out, UNUSED: gl.constexpr):
    """Through a tile in shared memory, behind a barrier; another one nobody waits at."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if UNUSED:
        new_barriers(1, 1)
    tile = gl.allocate_shared_memory(gl.float32, [64], VECTOR)
    used = new_barriers(1, 1)
    o = gl.arange(0, 64, LAYOUT)
    tile.store(o.to(gl.float32))
    arrive(used, 0)
    wait_for(used, 0)
    gl.store(out + o, tile.load(LAYOUT))


def test_a_barrier_in_a_tile():
    with compiling(90) as compiled:
        barriers_kernel[(1,)](torch.zeros(64), UNUSED=False, num_warps=1)
    assert len(compiled) == 1
    with compiling(90), pytest.raises(AssertionError):
        barriers_kernel[(1,)](torch.zeros(64), UNUSED=True, num_warps=1)


def instructions(*each):
    """Of text, the counter that tells of a result, and the counters that are waited for."""
    lines = []
    for i, (text, counter, awaited) in enumerate(each):
        word = counter << 46 | awaited << 52
        lines += [f"/*{16 * i:04x}*/  {text} ;  /* 0x0 */", f"  /* 0x{word:016x} */"]
    return "\n".join(lines)


LOAD = "LDSM.16.M88.4 R4, [R2]", 3, 0
MEET = "BAR.SYNC.DEFER_BLOCKING 0x1", 7, 0
USE = "FADD R4, R4, R5", 7, 1 << 3
GIVE = "@!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x40], RZ", 7, 0


def test_loads_under_way():
    """One warp gives back for all: it is not enough that it has what it loaded itself."""
    assert under_way(instructions(LOAD, USE, MEET, GIVE)) == []
    for each in ((LOAD, MEET, GIVE), (LOAD, MEET, USE, GIVE), (LOAD, MEET, GIVE, GIVE, USE)):
        assert under_way(instructions(*each)) == ["LDSM.16.M88.4"]
    another = "FADD R4, R4, R5", 7, 1 << 2
    assert under_way(instructions(LOAD, another, MEET, GIVE)) == ["LDSM.16.M88.4"]
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+0x48], R3", 7, 1 << 3
    assert under_way(instructions(LOAD, MEET, wait, GIVE)) == []
