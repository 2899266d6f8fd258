"""The gate's gradient, from the rows that the walks of dq and dk leave behind."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.common.kernels import cdiv, multiprocessors, sequence
from fla.ops.common.launch import launch
from fla.ops.simple_gla.blocks import Call

_BLOCK, _WARPS = 2048, 8


@triton.jit
def rows_at(q_rows, k_rows, p, tokens, H, m, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """k·dk − q·dq of the tokens at p: what all blocks of states have of it."""
    b_r = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(PARTS):
        at = j * H * tokens.to(tl.int64) + p
        b_r += tl.load(k_rows + at, mask=m, other=0.0)
        b_r -= tl.load(q_rows + at, mask=m, other=0.0)
    return b_r.to(tl.float64)


@triton.jit(do_not_specialize=["N", "T", "tokens", "H", "shares"])
def gate_kernel(
    q_rows, k_rows, start, dstart, dg, cu_seqlens, N, T, tokens, H, shares,
    PARTS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """dg of one of the ``shares`` of one head of one sequence, BLOCK tokens at once.

        dg_t = ⟨S, dS⟩ at the start + Σ_{i ≺ t} (k_i·dk_i − q_i·dq_i)

    A token's log-decay is in every pair that it stands between: keys before it add all pairs of
    theirs, queries before it take away those that do not reach beyond it.  From the end it would be
    what is left of the final state's pair with the last token, which no decay is in.  Rows are
    right to fp32, and what they leave is added up in fp64.
    """
    share = tl.program_id(0) % shares
    i_h = tl.program_id(0) // shares % H
    i_n = tl.program_id(0) // (shares * H)
    bos, length, live = sequence(cu_seqlens, i_n, N, T, tokens)
    o_b = tl.arange(0, BLOCK)
    s_sum = tl.full([], 0.0, tl.float64)
    if start is not None:
        b_e = tl.zeros([BLOCK], tl.float32)
        at = (i_n * H + i_h).to(tl.int64) * SIZE
        for first in range(0, SIZE, BLOCK):
            m = (first + o_b < SIZE) & (i_n < N)
            b_s = tl.load(start + at + first + o_b, mask=m, other=0.0)
            b_d = tl.load(dstart + at + first + o_b, mask=m, other=0.0)
            b_e += b_s.to(tl.float32) * b_d
        s_sum += tl.sum(b_e, 0).to(tl.float64)
    blocks = tl.cdiv(length, BLOCK)
    own = tl.cdiv(blocks, shares)
    # in the order of time: blocks of other shares before the own ones
    before = share * own
    b_sum = tl.zeros([BLOCK], tl.float64)
    for i in range(0, tl.where(before < blocks, before, 0)):
        t = (blocks - 1 - i if REVERSE else i) * BLOCK + o_b
        p = i_h * tokens.to(tl.int64) + bos + t
        b_sum += rows_at(q_rows, k_rows, p, tokens, H, t < live, PARTS, BLOCK)
    s_sum += tl.sum(b_sum, 0)
    for i in range(before, tl.minimum(before + own, blocks)):
        t = (blocks - 1 - i if REVERSE else i) * BLOCK + o_b
        token = (bos + t).to(tl.int64)
        p = i_h * tokens.to(tl.int64) + token
        b_r = rows_at(q_rows, k_rows, p, tokens, H, t < live, PARTS, BLOCK)
        b_dg = s_sum + (tl.cumsum(b_r, 0, reverse=REVERSE) - b_r)
        s_sum += tl.sum(b_r, 0)
        tl.store(dg + token * H + i_h, b_dg.to(dg.dtype.element_ty), mask=t < length)


def gate_gradient(
    call: Call, g: Tensor, q_rows, k_rows, start, dstart, cu_seqlens: Tensor | None
) -> Tensor:
    """dg of g from rows [parts, H, tokens], and the initial state with its gradient, or None."""
    dg = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    constants = {
        "PARTS": q_rows.shape[0],
        "SIZE": call.K * call.V,
        "BLOCK": _BLOCK,
        "REVERSE": call.constants["REVERSE"],
        "num_warps": _WARPS,
    }
    # shares of a sequence read what comes before them once more, but fill the GPU; packed, most of
    # the sequences may be short
    sequences = (call.N + call.packed) * call.H
    shares = min(cdiv(4 * multiprocessors(g.device), sequences), cdiv(call.T, _BLOCK))
    launch(
        gate_kernel,
        sequences * shares,
        (q_rows, k_rows, start, dstart, dg, cu_seqlens),
        (call.N, call.T, call.tokens, call.H, shares),
        constants,
    )
    return dg
