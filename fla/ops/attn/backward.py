"""The backward stage of the softmax engine: queries, then keys and values, then the gate.

    p_ij = exp(s_ij − lse_i)    Δ_i = do_i·o_i    dS_ij = p_ij (do_i·v_j − Δ_i)
    dq_i = scale Σ_j dS_ij k_j    dk_j = scale Σ_i dS_ij q_i    dv_j = Σ_i p_ij do_i
    dg_t = Σ_{j < t ≤ i} dS_ij = Σ_{t' ≥ t} (Σ_j dS_t'j − Σ_i dS_it')

Seven products a pair of blocks, in two kernels of which each owns what it writes.  Five would do if
dq were accumulated over the key blocks, but then in their order: no sum may depend on who comes
first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fla.ops.attn.backward_keys import LINES as KEY_LINES
from fla.ops.attn.backward_keys import keys_kernel
from fla.ops.attn.backward_queries import LINES as QUERY_LINES
from fla.ops.attn.backward_queries import queries_kernel
from fla.ops.attn.blocks import SPAN, Call, own
from fla.ops.common.kernels import cdiv, first_slot
from fla.ops.common.launch import launch

# Heads of a program that sums a gate's gradient: it writes them side by side.
_HEADS = 16


@triton.jit(do_not_specialize=["N", "T", "intervals", "blocks"])
def gate_kernel(
    dgate,
    dgate_sum,
    cu_seqlens,
    dg,
    N,
    T,
    intervals,
    blocks,
    HQ: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
):
    """dg of BN tokens of BH heads: the sum of dgate from each token to its sequence's end.

    Reads dgate [BH, BN] and dgate_sum of all later blocks; writes dg [BN, BH] of [B, T, HQ].
    """
    HEADS: tl.constexpr = (HQ + BH - 1) // BH
    i_h, n, i_b, bos, length, _live = own(cu_seqlens, tl.program_id(0), N, T, HEADS, BN, False)
    if i_b * BN >= length:
        return
    o_h = i_h * BH + tl.arange(0, BH)
    m_h = o_h < HQ
    o_t = i_b * BN + tl.arange(0, BN)
    m_t = o_t < length
    slot = first_slot(cu_seqlens, n, bos, T, BN)
    b_later = tl.zeros([BH], tl.float64)
    for at in range(i_b + 1, tl.cdiv(length, BN), 64):
        o_b = at + tl.arange(0, 64)
        m = m_h[:, None] & (o_b < tl.cdiv(length, BN))[None, :]
        b_sums = tl.load(dgate_sum + o_h[:, None] * blocks + slot + o_b[None, :], mask=m, other=0.0)
        b_later += tl.sum(b_sums.to(tl.float64), 1)
    at = (o_h * intervals + first_slot(cu_seqlens, n, bos, T, SPAN)).to(tl.int64) * SPAN
    b_dgate = tl.load(dgate + at[:, None] + o_t[None, :], mask=m_h[:, None], other=0.0)  # [BH, BN]
    b_dg = tl.cumsum(b_dgate.to(tl.float64), 1, reverse=True) + b_later[:, None]
    p_dg = dg + (bos.to(tl.int64) + o_t)[:, None] * HQ + o_h[None, :]
    tl.store(p_dg, tl.trans(b_dg).to(dg.dtype.element_ty), mask=m_t[:, None] & m_h[None, :])


def run_backward(call: Call, do, q, k, v, sums, marks, sink, cu_seqlens, o, lse, g):
    """Launch the kernels: dq, dk, dv, dg and the sink's gradient, None for what there is not."""
    HQ, H = q.shape[2], k.shape[2]
    query_line, key_line = call.choose(QUERY_LINES), call.choose(KEY_LINES)
    query_blocks, blocks = call.blocks(query_line.BM), call.blocks(key_line.BN)
    part = SPAN.value // query_line.BM
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rows = lse.new_empty(2 if g is None else 3, HQ, call.intervals, SPAN.value)
    dgate = dgate_sum = reach = dg = dsink = None
    if g is not None:
        dg = torch.empty_like(g)
        dgate = torch.empty_like(rows[0])
        dgate_sum = lse.new_empty(HQ, blocks)
        reach = lse.new_empty(2, HQ, call.intervals * part)
    if sink is not None:
        dsink = lse.new_zeros(query_blocks, HQ)  # slots may stay empty
    launch(
        queries_kernel,
        query_blocks * HQ,
        (q, k, v, sink, o, do, lse, sums, marks, cu_seqlens, dq, rows, dgate, dsink, reach),
        call.numbers,
        call.constants | query_line.constants,
    )
    launch(
        keys_kernel,
        blocks * H,
        (q, k, v, do, rows, sums, marks, reach, cu_seqlens, dk, dv, dgate, dgate_sum),
        (*call.numbers, blocks),
        call.constants | key_line.constants | {"PART": part},
    )
    if g is not None:
        launch(
            gate_kernel,
            blocks * cdiv(HQ, _HEADS),
            (dgate, dgate_sum, cu_seqlens, dg),
            (call.N, call.T, call.intervals, blocks),
            {"HQ": HQ, "BN": key_line.BN, "BH": _HEADS},
        )
    if dsink is not None:
        dsink = dsink.sum(0).to(sink.dtype)
    return dq, dk, dv, dg, dsink
