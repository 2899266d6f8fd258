"""The normaliser's own gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.common.kernels import cdiv, power_of_two
from fla.ops.common.launch import launch

_ELEMENTS = 4096  # a program's


@triton.jit(do_not_specialize=["rows"])
def normalizer_kernel(do, o, dnorm, rows, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr):
    """dnorm = −do·o of BR rows, what is left to be divided by the normaliser."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    mask = (o_r < rows)[:, None] & (o_v < V)[None, :]
    p = o_r[:, None] * V + o_v[None, :]  # [BR, BV]
    b_do = tl.load(do + p, mask=mask, other=0.0).to(tl.float32)
    b_o = tl.load(o + p, mask=mask, other=0.0).to(tl.float32)
    tl.store(dnorm + o_r, -tl.sum(b_do * b_o, 1), mask=o_r < rows)


def normalizer_gradient(do: Tensor, o: Tensor) -> Tensor:
    """−do·o, [B, T, H] in fp32."""
    dnorm = do.new_empty(do.shape[:-1], dtype=torch.float32)
    V, rows = do.shape[-1], dnorm.numel()
    BV = power_of_two(V)
    BR = _ELEMENTS // BV
    launch(normalizer_kernel, cdiv(rows, BR), (do, o, dnorm), (rows,), {"V": V, "BR": BR, "BV": BV})
    return dnorm
