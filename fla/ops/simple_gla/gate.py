"""The gate's gradient, from the rows that the walks of dq and dk leave behind."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.common.kernels import sequence
from fla.ops.common.launch import launch
from fla.ops.simple_gla.blocks import Call

_BLOCK, _WARPS = 2048, 8


@triton.jit(do_not_specialize=["N", "T", "tokens", "H"])
def gate_kernel(
    q_rows, k_rows, final, dfinal, dg, cu_seqlens, N, T, tokens, H,
    PARTS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """dg of one head of one sequence, BLOCK tokens after BLOCK tokens from the end of time.

        dg_t = ⟨S, dS⟩ at the end + Σ_{i ⪰ t} (q_i·dq_i − k_i·dk_i)

    A token's log-decay is in every pair that it stands between: queries after it add all pairs of
    theirs, keys after it take away those that do not reach back beyond it.  Rows are right to fp32,
    and what they leave is added up in fp64.
    """
    i_n = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    bos, length, live = sequence(cu_seqlens, i_n, N, T, tokens)
    o_b = tl.arange(0, BLOCK)
    s_sum = tl.full([], 0.0, tl.float64)
    if final is not None:
        b_e = tl.zeros([BLOCK], tl.float32)
        at = (i_n * H + i_h).to(tl.int64) * SIZE
        for first in range(0, SIZE, BLOCK):
            m = (first + o_b < SIZE) & (i_n < N)
            b_s = tl.load(final + at + first + o_b, mask=m, other=0.0)
            b_d = tl.load(dfinal + at + first + o_b, mask=m, other=0.0)
            b_e += b_s * b_d.to(tl.float32)
        s_sum += tl.sum(b_e, 0).to(tl.float64)
    blocks = tl.cdiv(length, BLOCK)
    for i in range(0, blocks):
        i_b = i if REVERSE else blocks - 1 - i
        m_b = i_b * BLOCK + o_b < live
        token = (bos + i_b * BLOCK + o_b).to(tl.int64)
        b_r = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(PARTS):
            p = (j * H + i_h) * tokens.to(tl.int64) + token
            b_r += tl.load(q_rows + p, mask=m_b, other=0.0)
            b_r -= tl.load(k_rows + p, mask=m_b, other=0.0)
        b_dg = s_sum + tl.cumsum(b_r.to(tl.float64), 0, reverse=not REVERSE)
        s_sum += tl.sum(b_r.to(tl.float64), 0)
        m_b = i_b * BLOCK + o_b < length
        tl.store(dg + token * H + i_h, b_dg.to(dg.dtype.element_ty), mask=m_b)


def gate_gradient(
    call: Call, g: Tensor, q_rows, k_rows, final, dfinal, cu_seqlens: Tensor | None
) -> Tensor:
    """dg of g from rows [parts, H, tokens], and the final state with its gradient, or None."""
    dg = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    constants = {
        "PARTS": q_rows.shape[0],
        "SIZE": call.K * call.V,
        "BLOCK": _BLOCK,
        "REVERSE": call.constants["REVERSE"],
        "num_warps": _WARPS,
    }
    launch(
        gate_kernel,
        (call.N + call.packed) * call.H,
        (q_rows, k_rows, final, dfinal, dg, cu_seqlens),
        (call.N, call.T, call.tokens, call.H),
        constants,
    )
    return dg
