"""One token after another, for few tokens a sequence and for serving from a pool of states."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.common.kernels import cdiv, dense, power, power_of_two
from fla.ops.common.lacking import begins_anew
from fla.ops.common.launch import Relaunch
from fla.ops.common.once import found_by
from fla.ops.kda.activations import L2NORM_EPS, beta_of, log_decay
from fla.ops.kda.slots import sequence

# Elements of a program's state, all of K by some of V: one warp holds them in half of its registers
# and adds over K without a barrier; what hides latency is how many programs run side by side.
_TILE = 4096


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=["T", "rows", "slots"])
def recurrent_kernel(
    q, k, v, g, beta, A_log, dt_bias, cu_seqlens, state, o, final, indices, accepted,
    scale, lower_bound, T, rows, slots,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, KEYS: tl.constexpr,
    STATE: tl.constexpr, FINAL: tl.constexpr,
    QK_L2NORM: tl.constexpr, GATE: tl.constexpr, BETA_SIGMOID: tl.constexpr,
    BETA_RANGE: tl.constexpr, CHANNELWISE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """BV value channels of one head through all tokens of one sequence.

        S ← Diag(exp(g)) S    v' = β (v − Sᵀk)    o = scale (Sᵀq + (q·k) v')    S ← S + k v'ᵀ

    The decayed state answers k and q in one pass, and both stay as they came: norms are factors on
    what they answer.  Axis KEYS of a state is K, the other one V; rows of ``state`` lie STATE
    elements apart, those of ``final`` FINAL.  With ``indices`` [N, slots] the state comes from the
    slot of the last accepted token and goes, after each token, to that token's slot; a negative one
    means zeros, or nowhere.  Without, row n is sequence n's.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % BLOCKS
    i_hv = tl.program_id(0) // BLOCKS % HV
    i_n = tl.program_id(0) // BLOCKS // HV
    i_h = i_hv // (HV // H)
    start, length, _ = sequence(cu_seqlens, i_n, rows, T)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_s = tl.expand_dims(m_k, 1 - KEYS) & tl.expand_dims(m_v, KEYS)
    if KEYS == 0:
        o_s = i_hv * K * V + o_k[:, None] * V + o_v[None, :]  # [BK, BV]
    else:
        o_s = i_hv * K * V + o_v[:, None] * K + o_k[None, :]  # [BV, BK]
    if cu_seqlens is not None and i_n == rows - 1:  # padding behind the sequences
        for t in range(length):
            p_o = o + ((start + t) * HV + i_hv) * V + o_v
            tl.store(p_o, tl.zeros([BV], o.dtype.element_ty), m_v)
        return

    if state is None:
        b_s = tl.zeros(o_s.shape, tl.float32)
    else:
        i_row = i_n.to(tl.int64)
        if indices is not None:
            last = 0
            if accepted is not None:
                last = tl.load(accepted + i_n).to(tl.int32) - 1
            i_row = tl.load(indices + i_n * slots + last, length > 0, -1).to(tl.int64)
        b_s = tl.load(state + i_row * STATE + o_s, m_s & (i_row >= 0), 0).to(tl.float32)

    rate = 1.0
    b_bias = tl.zeros([BK], tl.float32)
    if GATE:
        if A_log is not None:
            rate = tl.exp(tl.load(A_log + i_hv).to(tl.float32))
        if dt_bias is not None:
            b_bias = tl.load(dt_bias + i_hv * K + o_k, m_k, 0).to(tl.float32)
    for t in range(length):
        token = start + t
        b_k = tl.load(k + (token * H + i_h) * K + o_k, m_k, 0).to(tl.float32)  # [BK]
        b_q = tl.load(q + (token * H + i_h) * K + o_k, m_k, 0).to(tl.float32)
        b_g = tl.load(g + (token * HV + i_hv) * K + o_k, m_k, 0).to(tl.float32) + b_bias
        b_v = tl.load(v + (token * HV + i_hv) * V + o_v, m_v, 0).to(tl.float32)  # [BV]
        if CHANNELWISE:
            b_beta = tl.load(beta + (token * HV + i_hv) * V + o_v, m_v, 0).to(tl.float32)
        else:
            b_beta = tl.load(beta + token * HV + i_hv).to(tl.float32)
        b_beta = beta_of(b_beta, BETA_SIGMOID, BETA_RANGE)
        q_factor = scale
        k_factor = 1.0
        if QK_L2NORM:
            qq, kk = tl.reduce((b_q * b_q, b_k * b_k), 0, _add)
            q_factor *= tl.rsqrt(qq + L2NORM_EPS)
            k_factor = tl.rsqrt(kk + L2NORM_EPS)
        qk = tl.sum(b_q * b_k, 0)
        b_k = tl.expand_dims(b_k, 1 - KEYS)
        b_q = tl.expand_dims(b_q, 1 - KEYS)
        b_s *= tl.expand_dims(power(log_decay(b_g, rate, lower_bound, GATE)), 1 - KEYS)
        b_old, b_o = tl.reduce((b_s * b_k, b_s * b_q), KEYS, _add)  # [BV]
        b_v = k_factor * b_beta * (b_v - k_factor * b_old)
        b_o = q_factor * (b_o + qk * b_v)
        tl.store(o + (token * HV + i_hv) * V + o_v, b_o.to(o.dtype.element_ty), m_v)
        b_s += b_k * tl.expand_dims(b_v, KEYS)
        if indices is not None:
            i_row = tl.load(indices + i_n * slots + t, t < slots, -1).to(tl.int64)
            p_s = final + i_row * FINAL + o_s
            tl.store(p_s, b_s.to(final.dtype.element_ty), m_s & (i_row >= 0))
    if final is not None and indices is None:
        p_s = final + i_n.to(tl.int64) * FINAL + o_s
        m_s = m_s & ((length > 0) | (not IN_PLACE))
        tl.store(p_s, b_s.to(final.dtype.element_ty), m_s)


def forward(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options):
    """Return o [B, T, HV, V], the final state, and nothing in place of states before chunks."""
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = None
    if options.output_final_state and initial_state is not None:  # as in a step, whose host counts
        final = torch.empty_like(
            initial_state, dtype=torch.float32, memory_format=torch.contiguous_format
        )
    elif options.output_final_state:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        K, V = q.shape[-1], v.shape[-1]
        tail = (V, K) if options.state_v_first else (K, V)
        final = q.new_empty(rows, v.shape[2], *tail, dtype=torch.float32)
    if initial_state is not None and not _whole_rows(initial_state):
        initial_state = initial_state.contiguous()
    operands = q, k, v, g, beta, A_log, dt_bias, cu_seqlens
    _launch(*operands, initial_state, o, final, None, None, options, in_place=False)
    return o, final, None, None


def serve(q, k, v, g, beta, A_log, dt_bias, state, out, cu_seqlens, indices, accepted, options):
    """One token after another for all sequences at once; ``state`` and ``out`` are written."""
    o = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    pool = state if _whole_rows(state) else state.contiguous()
    operands = q, k, v, g, beta, A_log, dt_bias, cu_seqlens
    _launch(*operands, pool, o, pool, indices, accepted, options, in_place=True)
    if begins_anew():  # ``out`` may be where operands are
        return
    if o is not out:
        out.copy_(o)
    if pool is not state:
        state.copy_(pool)


def _whole_rows(state: Tensor) -> bool:
    """Whether each state lies in one piece; the pieces may lie anywhere."""
    _, _, first, second = state.shape
    return state.is_contiguous() or state.stride()[1:] == (first * second, second, 1)


def _launch(
    q, k, v, g, beta, A_log, dt_bias, cu_seqlens,
    state, o, final, indices, accepted, options, in_place,
):  # fmt: skip
    # Shapes and dtypes follow from the arguments, which were checked; where states lie does not
    stride = 0 if state is None else state.stride(0)
    found = found_by(options)
    step = found.get((_step, stride))
    if step is None:
        slots = 0 if indices is None else indices.shape[1]
        step = _step(q, v, beta, cu_seqlens, stride, final, slots, options, in_place)
        found[_step, stride] = step
    if indices is not None:
        indices = indices.contiguous()
        accepted = None if accepted is None else accepted.contiguous()
    read = dense(q, k, v, g, beta, A_log, dt_bias, cu_seqlens)
    step(*read, state, o, final, indices, accepted)


def _step(q, v, beta, cu_seqlens, stride, final, slots, options, in_place) -> Relaunch:
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    rows = B if cu_seqlens is None else cu_seqlens.shape[0]  # one more than there are sequences
    BK = power_of_two(K)
    BV = min(power_of_two(V), _TILE // BK)
    return Relaunch(
        recurrent_kernel,
        rows * HV * cdiv(V, BV),
        (options.scale, options.lower_bound if options.gate else None, T, rows, slots),
        {
            "H": H, "HV": HV, "K": K, "V": V, "BK": BK, "BV": BV,
            "KEYS": 1 if options.state_v_first else 0,
            "STATE": stride, "FINAL": 0 if final is None else final.stride(0),
            "QK_L2NORM": options.qk_l2norm, "GATE": options.gate,
            "BETA_SIGMOID": options.beta_sigmoid, "BETA_RANGE": 2 if options.neg_eigval else 1,
            "CHANNELWISE": beta.dim() == 4, "IN_PLACE": in_place, "num_warps": 1,
        },
    )  # fmt: skip
