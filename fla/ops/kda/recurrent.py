"""One token after another, for few tokens a sequence and for serving from a pool of states."""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.kda.activations import L2NORM_EPS, beta_of, decay_of, log_decay
from fla.ops.kda.slots import sequence


@triton.jit
def unit(b_x, ENABLED: tl.constexpr):
    """x / sqrt(Σx² + ε) of one vector."""
    if ENABLED:
        b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) + L2NORM_EPS)
    return b_x


@triton.jit(do_not_specialize=["T", "rows"])
def recurrent_kernel(
    q, k, v, g, beta, A_log, dt_bias, cu_seqlens,
    state, state_strides, o, final, final_strides, indices, accepted,
    scale, lower_bound, T, rows, slots, H, HV, K, V,
    BK: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    QK_L2NORM: tl.constexpr, GATE: tl.constexpr, BETA_SIGMOID: tl.constexpr,
    BETA_RANGE: tl.constexpr, CHANNELWISE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """BV value channels of one head through all tokens of one sequence.

        S ← Diag(exp(g)) S    v' = β (v − Sᵀk)    o = scale (Sᵀq + (q·k) v')    S ← S + k v'ᵀ

    The decayed state answers k and q in one pass.  With ``indices`` [N, slots] the state comes from
    the slot of the last accepted token and goes, after each token, to that token's slot; a negative
    one means zeros, or nowhere.  Without, row n of ``state`` and of ``final`` is sequence n's.
    """
    i_v = tl.program_id(0) % BLOCKS
    i_hv = tl.program_id(0) // BLOCKS % HV
    i_n = tl.program_id(0) // BLOCKS // HV
    i_h = i_hv // (HV // H)
    start, length = sequence(cu_seqlens, i_n, rows, T)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    if cu_seqlens is not None and i_n == rows - 1:  # padding behind the sequences
        for t in range(length):
            p_o = o + ((start + t) * HV + i_hv) * V + o_v
            tl.store(p_o, tl.zeros([BV], o.dtype.element_ty), m_v)
        return

    if state is None:
        b_s = tl.zeros([BK, BV], tl.float32)
    else:
        i_row = i_n.to(tl.int64)
        if indices is not None:
            last = 0
            if accepted is not None:
                last = tl.load(accepted + i_n).to(tl.int32) - 1
            i_row = tl.load(indices + i_n * slots + last, length > 0, -1).to(tl.int64)
        p_s = state + i_row * state_strides[0] + i_hv * state_strides[1]
        p_s += o_v[None, :] * state_strides[2] + o_k[:, None] * state_strides[3]
        b_s = tl.load(p_s, m_s & (i_row >= 0), 0).to(tl.float32)  # [BK, BV]

    rate = 1.0
    b_bias = tl.zeros([BK], tl.float32)
    if GATE:
        if A_log is not None:
            rate = tl.exp(tl.load(A_log + i_hv).to(tl.float32))
        if dt_bias is not None:
            b_bias = tl.load(dt_bias + i_hv * K + o_k, m_k, 0).to(tl.float32)
    for t in range(length):
        token = start + t
        b_k = tl.load(k + (token * H + i_h) * K + o_k, m_k, 0).to(tl.float32)
        b_q = tl.load(q + (token * H + i_h) * K + o_k, m_k, 0).to(tl.float32)
        b_g = tl.load(g + (token * HV + i_hv) * K + o_k, m_k, 0).to(tl.float32) + b_bias
        b_v = tl.load(v + (token * HV + i_hv) * V + o_v, m_v, 0).to(tl.float32)
        if CHANNELWISE:
            b_beta = tl.load(beta + (token * HV + i_hv) * V + o_v, m_v, 0).to(tl.float32)
        else:
            b_beta = tl.load(beta + token * HV + i_hv).to(tl.float32)
        b_beta = beta_of(b_beta, BETA_SIGMOID, BETA_RANGE)
        b_k = unit(b_k, QK_L2NORM)
        b_q = unit(b_q, QK_L2NORM) * scale
        b_s *= decay_of(log_decay(b_g, rate, lower_bound, GATE))[:, None]
        b_v = b_beta * (b_v - tl.sum(b_s * b_k[:, None], 0))
        b_o = tl.sum(b_s * b_q[:, None], 0) + tl.sum(b_q * b_k, 0) * b_v
        tl.store(o + (token * HV + i_hv) * V + o_v, b_o.to(o.dtype.element_ty), m_v)
        b_s += b_k[:, None] * b_v[None, :]
        if indices is not None:
            i_row = tl.load(indices + i_n * slots + t).to(tl.int64)
            p_s = final + i_row * final_strides[0] + i_hv * final_strides[1]
            p_s += o_v[None, :] * final_strides[2] + o_k[:, None] * final_strides[3]
            tl.store(p_s, b_s.to(final.dtype.element_ty), m_s & (i_row >= 0))
    if final is not None and indices is None:
        p_s = final + i_n.to(tl.int64) * final_strides[0] + i_hv * final_strides[1]
        p_s += o_v[None, :] * final_strides[2] + o_k[:, None] * final_strides[3]
        m_s = m_s & ((length > 0) | (not IN_PLACE))
        tl.store(p_s, b_s.to(final.dtype.element_ty), m_s)
