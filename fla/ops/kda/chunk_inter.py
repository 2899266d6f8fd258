"""The memory between chunks: carried forward, and its gradient carried backward.

States are held transposed, Sᵀ [BV, BK], in fp32 accumulators.  Where sequences are few and long
they fall into segments: each is summarised (what it adds to a state and how it maps one), the
summaries are joined in order, and then all segments run at once from the right states.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.kda.slots import first_slot, locate, sequence


@triton.jit
def state_tile(o_v, o_k, stride_v, stride_k):
    return o_v[:, None] * stride_v + o_k[None, :] * stride_k


@triton.jit
def enter(state, i_row, i_hv, strides, o_v, o_k, V, K, VP: tl.constexpr, SUMMARISE: tl.constexpr):
    """The state [BV, BK] that a segment starts from.

    To summarise, columns of values start from zero and the BK columns behind them from the
    identity: they become the map that the segment applies to a state.
    """
    if SUMMARISE:
        b_s = tl.where(o_v[:, None] - VP == o_k[None, :], 1.0, 0.0)
    elif state is None:
        b_s = tl.zeros([o_v.shape[0], o_k.shape[0]], tl.float32)
    else:
        p = state + i_row.to(tl.int64) * strides[0] + i_hv.to(tl.int64) * strides[1]
        m = (o_v < V)[:, None] & (o_k < K)[None, :]
        b_s = tl.load(p + state_tile(o_v, o_k, strides[2], strides[3]), m, 0).to(tl.float32)
    return b_s


@triton.jit
def leave(state, b_s, i_row, i_hv, strides, o_v, o_k, V, K, SUMMARISE: tl.constexpr):
    """Write the state that a segment ends with; a summary has BK columns behind its VP."""
    p = state + i_row.to(tl.int64) * strides[0] + i_hv.to(tl.int64) * strides[1]
    if SUMMARISE:
        m = (o_v >= 0)[:, None] & (o_k >= 0)[None, :]
    else:
        m = (o_v < V)[:, None] & (o_k < K)[None, :]
    b_s = b_s.to(state.dtype.element_ty)
    tl.store(p + state_tile(o_v, o_k, strides[2], strides[3]), b_s, m)


@triton.jit
def chunks_before(cu_seqlens, i_n, T, C: tl.constexpr):
    """How many chunks the sequences before ``i_n`` have."""
    if cu_seqlens is None:
        count = i_n * tl.cdiv(T, C)
    else:
        count = i_n * 0
        for i in range(i_n):
            length = (tl.load(cu_seqlens + i + 1) - tl.load(cu_seqlens + i)).to(tl.int32)
            count += tl.cdiv(length, C)
    return count


@triton.jit
def advance(
    i_segment,
    i_hv,
    i_v,
    v,
    cu_seqlens,
    q_in,
    k_in,
    k_out,
    decay,
    betas,
    queries,
    solver,
    state,
    state_strides,
    o,
    states,
    states_strides,
    values,
    final,
    final_strides,
    segment,
    T,
    rows,
    HV,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    VP: tl.constexpr,
    SUMMARISE: tl.constexpr,
    EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass the state through one segment, for BV value channels of one head.

        m = v − k_in S    w = m − Y β m    v' = β w    o = q_in S + M v'    S ← decay S + k_outᵀ v'

    Reads the chunks' operands and v, writes what it is given of o, the state before each chunk
    (``states``: in the chunk's slot, or of every EVERY-th chunk in the caller's order), w
    (``values``) and the state after the sequence (``final``).
    """
    i_n, i_s, start, length, _ = locate(cu_seqlens, i_segment, rows, T, segment)
    dtype = k_in.dtype.element_ty
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    o_rows = o_c[:, None] * BK + o_k[None, :]
    o_pairs = o_c[:, None] * C + o_c[None, :]
    if cu_seqlens is not None and i_n == rows - 1:  # padding behind the sequences
        if o is not None:
            for at in range(i_s * segment, tl.minimum(i_s * segment + segment, length), C):
                p_o = o + ((start + at + o_c)[None, :] * HV + i_hv) * V + o_v[:, None]
                m_o = (at + o_c < length)[None, :] & m_v[:, None]
                tl.store(p_o, tl.zeros([BV, C], o.dtype.element_ty), m_o)
        return
    if i_s * segment >= tl.maximum(length, 1):
        return

    b_s = enter(state, i_segment, i_hv, state_strides, o_v, o_k, V, K, VP, SUMMARISE)
    slot = first_slot(cu_seqlens, i_n, T, C)
    index = slot
    if EVERY:
        index = chunks_before(cu_seqlens, i_n, T, EVERY * C)
    first = i_s * (segment // C)
    last = tl.minimum(first + segment // C, tl.cdiv(length, C))
    for i_c in range(first, last):
        place = (slot + i_c).to(tl.int64) * HV + i_hv
        token = start + i_c * C
        m_x = (i_c * C + o_c < length)[None, :] & m_v[:, None]
        if states is not None:
            if EVERY:
                if i_c % EVERY == 0:
                    at = (index + i_c // EVERY).to(tl.int64)
                    leave(states, b_s, at, i_hv, states_strides, o_v, o_k, V, K, False)
            else:
                at = (index + i_c).to(tl.int64)
                leave(states, b_s, at, i_hv, states_strides, o_v, o_k, VP, BK, False)
        b_s16 = b_s.to(dtype)  # [BV, BK]
        b_k = tl.load(k_in + place * (C * BK) + o_rows)  # [C, BK]
        b_m = tl.load(v + ((token + o_c)[None, :] * HV + i_hv) * V + o_v[:, None], m_x, 0)
        b_m = b_m.to(tl.float32) - tl.dot(b_s16, tl.trans(b_k), input_precision=PRECISION)
        b_beta = tl.load(betas + place * C + o_c)[None, :]
        b_y = tl.load(solver + place * (C * C) + o_pairs)
        b_w = (b_m * b_beta).to(dtype)  # [BV, C]
        b_w = tl.dot(b_w, tl.trans(b_y), b_m, input_precision=PRECISION)
        if values is not None:
            p_w = values + (place * C + o_c)[None, :] * VP + o_v[:, None]
            tl.store(p_w, b_w.to(dtype))
        b_v = (b_w * b_beta).to(dtype)
        if o is not None:
            b_q = tl.load(q_in + place * (C * BK) + o_rows)
            b_m = tl.load(queries + place * (C * C) + o_pairs)
            b_o = tl.dot(b_s16, tl.trans(b_q), input_precision=PRECISION)
            b_o = tl.dot(b_v, tl.trans(b_m), b_o, input_precision=PRECISION)
            p_o = o + ((token + o_c)[None, :] * HV + i_hv) * V + o_v[:, None]
            tl.store(p_o, b_o.to(o.dtype.element_ty), m_x)
        b_s *= tl.load(decay + place * BK + o_k)[None, :]
        b_k = tl.load(k_out + place * (C * BK) + o_rows)
        b_s = tl.dot(b_v, b_k, b_s, input_precision=PRECISION)

    if final is not None:
        if SUMMARISE:
            leave(final, b_s, i_segment, i_hv, final_strides, o_v, o_k, V, K, True)
        elif last * C >= length:
            leave(final, b_s, i_n, i_hv, final_strides, o_v, o_k, V, K, False)


@triton.jit
def retreat(
    i_segment,
    i_hv,
    i_v,
    do,
    cu_seqlens,
    q_in,
    k_in,
    k_out,
    decay,
    betas,
    queries,
    solver,
    state,
    state_strides,
    states,
    states_strides,
    solved,
    final,
    final_strides,
    segment,
    T,
    rows,
    HV,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    VP: tl.constexpr,
    SUMMARISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass the gradient of the state through one segment from its end, for BV value channels.

        p = Mᵀ do + k_out dS    u = p − Yᵀ β p    dS ← decay dS + q_inᵀ do − k_inᵀ β u

    Reads the chunks' operands and do, writes what it is given of the gradient of the state after
    each chunk (``states``), u (``solved``) and the gradient of the initial state (``final``).
    """
    i_n, i_s, start, length, _ = locate(cu_seqlens, i_segment, rows, T, segment)
    if cu_seqlens is not None:
        length = tl.where(i_n == rows - 1, -1, length)
    if i_s * segment >= tl.where(length == 0, 1, length):
        return
    dtype = k_in.dtype.element_ty
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    o_rows = o_c[:, None] * BK + o_k[None, :]
    o_pairs = o_c[:, None] * C + o_c[None, :]

    b_s = enter(state, i_segment, i_hv, state_strides, o_v, o_k, V, K, VP, SUMMARISE)
    slot = first_slot(cu_seqlens, i_n, T, C)
    first = i_s * (segment // C)
    last = tl.minimum(first + segment // C, tl.cdiv(length, C))
    for i in range(last - first):
        i_c = last - 1 - i
        place = (slot + i_c).to(tl.int64) * HV + i_hv
        token = start + i_c * C
        m_x = (i_c * C + o_c < length)[None, :] & m_v[:, None]
        if states is not None:
            at = (slot + i_c).to(tl.int64)
            leave(states, b_s, at, i_hv, states_strides, o_v, o_k, VP, BK, False)
        b_do = tl.load(do + ((token + o_c)[None, :] * HV + i_hv) * V + o_v[:, None], m_x, 0)
        b_do = b_do.to(dtype)  # [BV, C]
        b_k = tl.load(k_out + place * (C * BK) + o_rows)  # [C, BK]
        b_m = tl.load(queries + place * (C * C) + o_pairs)
        b_p = tl.dot(b_s.to(dtype), tl.trans(b_k), input_precision=PRECISION)
        b_p = tl.dot(b_do, b_m, b_p, input_precision=PRECISION)
        b_beta = tl.load(betas + place * C + o_c)[None, :]
        b_y = tl.load(solver + place * (C * C) + o_pairs)
        b_u = (b_p * b_beta).to(dtype)  # [BV, C]
        b_u = tl.dot(b_u, b_y, b_p, input_precision=PRECISION)
        if solved is not None:
            tl.store(solved + (place * C + o_c)[None, :] * VP + o_v[:, None], b_u.to(dtype))
        b_u *= -b_beta
        b_s *= tl.load(decay + place * BK + o_k)[None, :]
        b_q = tl.load(q_in + place * (C * BK) + o_rows)
        b_s = tl.dot(b_do, b_q, b_s, input_precision=PRECISION)
        b_k = tl.load(k_in + place * (C * BK) + o_rows)
        b_s = tl.dot(b_u.to(dtype), b_k, b_s, input_precision=PRECISION)

    if final is not None:
        if SUMMARISE:
            leave(final, b_s, i_segment, i_hv, final_strides, o_v, o_k, V, K, True)
        elif i_s == 0:
            leave(final, b_s, i_n, i_hv, final_strides, o_v, o_k, V, K, False)


@triton.jit(do_not_specialize=["segment", "T", "rows"])
def advance_kernel(
    v, cu_seqlens, q_in, k_in, k_out, decay, betas, queries, solver,
    state, o, states, values, final,
    segment, T, rows, HV, K, V, state_strides, states_strides, final_strides,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr, COLUMNS: tl.constexpr,
    SUMMARISE: tl.constexpr, EVERY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``advance`` for one segment, head and block of BV among COLUMNS columns a program."""
    blocks: tl.constexpr = COLUMNS // BV
    pid = tl.program_id(0)
    advance(
        pid // blocks // HV, pid // blocks % HV, pid % blocks,
        v, cu_seqlens, q_in, k_in, k_out, decay, betas, queries, solver,
        state, state_strides, o, states, states_strides, values, final, final_strides,
        segment, T, rows, HV, K, V, C, BK, BV, VP, SUMMARISE, EVERY, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["segment", "T", "rows"])
def scans_kernel(
    v, do, cu_seqlens, q_in, k_in, k_out, decay, betas, queries, solver,
    state, states, values, final, dstate, dstates, solved, dfinal,
    segment, T, rows, HV, K, V,
    state_strides, states_strides, final_strides, dstate_strides, dfinal_strides,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr, COLUMNS: tl.constexpr,
    SUMMARISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both scans of a backward pass: the first half of the grid goes forward, the other back."""
    blocks: tl.constexpr = COLUMNS // BV
    pid = tl.program_id(0)
    half = tl.num_programs(0) // 2
    if pid < half:
        advance(
            pid // blocks // HV, pid // blocks % HV, pid % blocks,
            v, cu_seqlens, None, k_in, k_out, decay, betas, None, solver,
            state, state_strides, None, states, states_strides, values, final, final_strides,
            segment, T, rows, HV, K, V, C, BK, BV, VP, SUMMARISE, 0, PRECISION,
        )  # fmt: skip
    else:
        pid -= half
        retreat(
            pid // blocks // HV, pid // blocks % HV, pid % blocks,
            do, cu_seqlens, q_in, k_in, k_out, decay, betas, queries, solver,
            dstate, dstate_strides, dstates, states_strides, solved, dfinal, dfinal_strides,
            segment, T, rows, HV, K, V, C, BK, BV, VP, SUMMARISE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["segment", "T", "rows"])
def join_kernel(
    summaries, cu_seqlens, state, segment, T, rows, HV, K, V, state_strides,
    BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state that every segment starts from, for BV value channels of one sequence and head.

        S_{s+1} = A_s + M_s S_s        summaries[s] = (A_sᵀ [VP, BK], M_sᵀ [BK, BK])

    S_sᵀ replaces A_sᵀ.  With ``REVERSE`` segments follow from last to first.
    """
    blocks: tl.constexpr = VP // BV
    pid = tl.program_id(0)
    i_n, i_hv, i_v = pid // blocks // HV, pid // blocks % HV, pid % blocks
    _, length, _ = sequence(cu_seqlens, i_n, rows, T)
    slot = first_slot(cu_seqlens, i_n, T, segment)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    o_block = tl.arange(0, BLOCK)
    parts: tl.constexpr = BK // BLOCK
    o_part = tl.arange(0, parts)[None, :, None]
    b_s = enter(state, i_n, i_hv, state_strides, o_v, o_k, V, K, VP, False)  # [BV, BK]
    b_next = b_s
    segments = tl.maximum(tl.cdiv(length, segment), 1)  # an empty sequence passes its state on
    # one loop, so that maps are loaded ahead, those of the next segment too
    for n in tl.range(0, segments * parts, num_stages=STAGES):
        i, part = n // parts, n % parts
        i_s = slot + (segments - 1 - i if REVERSE else i)
        p_s = summaries + (i_s.to(tl.int64) * HV + i_hv) * ((VP + BK) * BK)
        p_tile = p_s + o_v[:, None] * BK + o_k[None, :]
        b_a = tl.load(p_tile, mask=part == 0, other=0.0)
        b_m = tl.load(p_s + (VP + part * BLOCK + o_block)[:, None] * BK + o_k[None, :])
        # columns of the state that meet these rows of the map, [BV, BLOCK]
        b_part = tl.where(o_part == part, b_s.reshape(BV, parts, BLOCK), 0.0)
        b_next = tl.where(part == 0, b_a, b_next)
        b_next = tl.dot(tl.sum(b_part, 1), b_m, b_next, input_precision="tf32x3")
        # where its own A was, which is summed up by now; what is loaded ahead is other segments'
        tl.store(p_tile, b_s, mask=part == parts - 1)
        b_s = tl.where(part == parts - 1, b_next, b_s)
