"""What is looked for in compiled kernels is found where it is, and only there."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from compiling import compiling, overtaken

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
