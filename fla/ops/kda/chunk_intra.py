"""Interactions inside a chunk, on tensor cores: what it computes for the scans, and its gradients.

The two blocks of 16 tokens of a chunk meet at the boundary between them, where both decays are at
most 1 if gates forget.  Tokens of one block meet at its start, the key with the inverse of its
decay, as long as that stays within fp32 up to the query; rows beyond go by halving
(``halving.py``).  A row's path depends on rows up to it alone, so an output never depends on a
later token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.kda.activations import (
    beta_backward,
    beta_of,
    decay_of,
    log_decay,
    log_decay_backward,
    unit_factor,
)
from fla.ops.kda.halving import (
    as_operand,
    level_mask,
    level_mask_transposed,
    rounded,
    segment_mask,
    segment_mask_transposed,
    sums,
)
from fla.ops.kda.slots import locate
from fla.ops.kda.wy_fast import unit_lower_inverse

# A decay of 2^-116 from the start of a block of 16 leaves its inverse, times a key, within fp32;
# 16 gates of −5 fit.
ROOM = tl.constexpr(116.0)


@triton.jit
def load_channels(p, o_t, o_k, m_t, K, stride):
    """[C, BLOCK] in fp32, zero for tokens and channels that are not there."""
    m = m_t[:, None] & (o_k < K)[None, :]
    return tl.load(p + o_t[:, None] * stride + o_k[None, :], m, 0).to(tl.float32)


@triton.jit
def load_decays(p, A_log, dt_bias, lower_bound, o_t, o_k, m_t, i_hv, HV, K, GATE: tl.constexpr):
    """Raw gates with their bias, the head's rate, and log-decays in units of log 2, [C, BLOCK]."""
    b_x = load_channels(p, o_t, o_k, m_t, K, HV * K)
    rate = 1.0
    if GATE:
        if A_log is not None:
            rate = tl.exp(tl.load(A_log + i_hv).to(tl.float32))
        if dt_bias is not None:
            b_x += tl.load(dt_bias + i_hv * K + o_k, o_k < K, 0).to(tl.float32)[None, :]
    b_g = log_decay(b_x, rate, lower_bound, GATE)
    return b_x, rate, tl.where(m_t[:, None] & (o_k < K)[None, :], b_g, 0.0)


@triton.jit(do_not_specialize=["T", "rows"])
def intra_kernel(
    q,
    k,
    g,
    beta,
    A_log,
    dt_bias,
    cu_seqlens,
    q_in,
    k_in,
    k_out,
    decay,
    betas,
    factors,
    keys,
    queries,
    solver,
    scale,
    lower_bound,
    T,
    rows,
    H,
    HV,
    K,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    GATE: tl.constexpr,
    BETA_SIGMOID: tl.constexpr,
    BETA_RANGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a chunk is to the state and its tokens to one another, for one chunk of one value head.

        q_in_i = scale D_i0 q_i    k_in_i = D_i0 k_i    k_out_j = D_Cj k_j    decay = D_C0
        A_ij = k_i·D_ij k_j, j < i      M_ij = scale q_i·D_ij k_j, j ≤ i      X = (I + β A)⁻¹

    Reads the chunk's raw q, k [C, K], g [C, K] and beta [C]; writes q_in, k_in, k_out [C, BK],
    decay [BK], activated betas [C], M and X [C, C], and for a backward pass the norms' factors of
    q and k [2, C] and A [C, C] (``keys``), zero where tokens or channels are not there.
    """
    i_slot = tl.program_id(0) // HV
    i_hv = tl.program_id(0) % HV
    i_n, i_c, start, length = locate(cu_seqlens, i_slot, rows, T, C)
    if cu_seqlens is not None:
        length = tl.where(i_n == rows - 1, 0, length)
    if i_c * C >= length:
        return
    dtype = k_in.dtype.element_ty
    i_h = i_hv // (HV // H)
    o_c = tl.arange(0, C)
    m_t = i_c * C + o_c < length
    token = start + i_c * C
    place = (i_slot.to(tl.int64) * HV + i_hv) * C  # of the chunk's first row in what is written
    q += token * H * K + i_h * K
    k += token * H * K + i_h * K
    g += token * HV * K + i_hv * K

    BLOCKS: tl.constexpr = BK // BLOCK
    b_qf = unit_factor(q + o_c * (H * K), m_t, K, BLOCK, BLOCKS, QK_L2NORM)  # [C]
    b_kf = unit_factor(k + o_c * (H * K), m_t, K, BLOCK, BLOCKS, QK_L2NORM)
    if factors is not None:
        tl.store(factors + place * 2 + o_c, b_qf)
        tl.store(factors + place * 2 + C + o_c, b_kf)
    b_qf *= scale
    b_beta = tl.load(beta + (token + o_c) * HV + i_hv, m_t, 0).to(tl.float32)
    b_beta = tl.where(m_t, beta_of(b_beta, BETA_SIGMOID, BETA_RANGE), 0.0)
    tl.store(betas + place + o_c, b_beta)

    b_keys = tl.zeros([C, C], tl.float32)
    b_queries = tl.zeros([C, C], tl.float32)
    b_own = tl.zeros([C], tl.float32)
    m_before = o_c[None, :] <= o_c[:, None]
    m_block = (o_c // 16)[None, :] == (o_c // 16)[:, None]
    b_into = as_operand(m_before, dtype)
    b_out = as_operand(m_before == 0, dtype)
    b_prefix_of = as_operand(m_block & m_before, dtype)
    b_suffix_of = as_operand(m_block & (m_before == 0), dtype)
    for block in range(BLOCKS):
        o_k = block * BLOCK + tl.arange(0, BLOCK)
        _, _, b_g = load_decays(
            g, A_log, dt_bias, lower_bound, o_c, o_k, m_t, i_hv, HV, K, GATE
        )  # [C, BLOCK]
        b_k = load_channels(k, o_c, o_k, m_t, K, H * K) * b_kf[:, None]
        b_q = load_channels(q, o_c, o_k, m_t, K, H * K) * b_qf[:, None]
        o_out = (place + o_c)[:, None] * BK + o_k[None, :]
        b_decay = decay_of(sums(b_into, b_g))
        tl.store(k_in + o_out, (b_k * b_decay).to(dtype))
        tl.store(q_in + o_out, (b_q * b_decay).to(dtype))
        b_decay = decay_of(sums(b_out, b_g))
        tl.store(k_out + o_out, (b_k * b_decay).to(dtype))
        p_decay = decay + (i_slot.to(tl.int64) * HV + i_hv) * BK + o_k
        tl.store(p_decay, decay_of(tl.sum(b_g, 0)))
        b_own += tl.sum(b_q * b_k, 1)
        b_prefix = sums(b_prefix_of, b_g)
        b_suffix = sums(b_suffix_of, b_g)
        # tokens of the two blocks of 16 meet at the boundary between them
        b_decay = decay_of(tl.where((o_c >= 16)[:, None], b_prefix, b_suffix))
        b_kd = (b_k * b_decay).to(dtype)
        b_qd = (b_q * b_decay).to(dtype)
        b_kk = tl.dot(b_kd, tl.trans(b_kd), input_precision=PRECISION)
        b_qk = tl.dot(b_qd, tl.trans(b_kd), input_precision=PRECISION)
        # tokens of one block of 16 at its start, where the decay up to the query leaves room
        m_far = tl.max(tl.abs(b_prefix), 1) > ROOM  # [C]
        m_far = tl.max((m_block & m_before & m_far[None, :]).to(tl.int32), 1) > 0
        b_decay = decay_of(b_prefix)
        b_kd = (b_k * decay_of(-b_prefix)).to(dtype)
        b_near = tl.dot((b_k * b_decay).to(dtype), tl.trans(b_kd), input_precision=PRECISION)
        b_kk = tl.where(m_block, b_near, b_kk)
        b_near = tl.dot((b_q * b_decay).to(dtype), tl.trans(b_kd), input_precision=PRECISION)
        b_qk = tl.where(m_block, b_near, b_qk)
        if tl.max(m_far.to(tl.int32), 0) > 0:  # else by halving
            for level in range(4):
                b_decay = decay_of(sums(as_operand(segment_mask(level, C), dtype), b_g))
                m_pairs = level_mask(level, C) & m_far[:, None]
                b_kd = (b_k * b_decay).to(dtype)
                b_near = tl.dot(b_kd, tl.trans(b_kd), input_precision=PRECISION)
                b_kk = tl.where(m_pairs, b_near, b_kk)
                b_qd = (b_q * b_decay).to(dtype)
                b_near = tl.dot(b_qd, tl.trans(b_kd), input_precision=PRECISION)
                b_qk = tl.where(m_pairs, b_near, b_qk)
        b_keys += tl.where(m_before, b_kk, 0.0)
        b_queries += tl.where(m_before, b_qk, 0.0)

    m_own = o_c[:, None] == o_c[None, :]
    b_keys = tl.where(m_own, 0.0, b_keys)
    b_queries = tl.where(m_own, b_own[:, None], b_queries)
    o_pairs = (place + o_c)[:, None] * C + o_c[None, :]
    tl.store(queries + o_pairs, b_queries.to(dtype))
    if keys is not None:
        tl.store(keys + o_pairs, b_keys.to(dtype))
    b_x = unit_lower_inverse(b_beta[:, None] * b_keys, C, LEVELS, dtype, PRECISION)
    tl.store(solver + o_pairs, b_x.to(dtype))


@triton.jit
def zero_rows(p, m_t, width, BLOCK: tl.constexpr):
    """Zero ``width`` elements of each row at ``p`` that is there."""
    for at in range(0, width, BLOCK):
        o_x = at + tl.arange(0, BLOCK)
        b_zero = tl.zeros([m_t.shape[0], BLOCK], p.dtype.element_ty)
        tl.store(p[:, None] + o_x[None, :], b_zero, m_t[:, None] & (o_x < width)[None, :])


@triton.jit
def halving_gradients(
    b_q, b_k, b_g, b_dq, b_dk, b_dg, b_dm, b_dmt, b_da,
    C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq, dk, dg [C, BLOCK] what comes through pairs in one block of 16, by halving.

    b_dm, b_dmt [C, C]: the gradient of M and its transpose; b_da: that of A plus its transpose.
    With x the operand decayed to the boundary of its level, the gradient of the exponent is x dx;
    it goes to all the gates that the exponent sums.
    """
    b_zero = tl.zeros([C, C], DTYPE)
    for level in range(4):
        b_decay = decay_of(sums(as_operand(segment_mask(level, C), DTYPE), b_g))  # [C, BLOCK]
        m_pairs = level_mask(level, C)
        m_keys = level_mask_transposed(level, C)
        b_kd = (b_k * b_decay).to(DTYPE)
        b_dqd = tl.dot(tl.where(m_pairs, b_dm, b_zero), b_kd, input_precision=PRECISION)
        b_qd = b_q * b_decay
        b_dexponent = b_qd * b_dqd
        b_dq += b_decay * b_dqd
        b_pairs = tl.where(m_keys, b_dmt, b_zero)
        b_dkd = tl.dot(b_pairs, b_qd.to(DTYPE), input_precision=PRECISION)
        b_pairs = tl.where(m_pairs | m_keys, b_da, b_zero)
        b_dkd = tl.dot(b_pairs, b_kd, b_dkd, input_precision=PRECISION)
        b_dexponent += b_k * b_decay * b_dkd
        b_dk += b_decay * b_dkd
        b_dg += sums(as_operand(segment_mask_transposed(level, C), DTYPE), b_dexponent)
    return b_dq, b_dk, b_dg


@triton.jit(do_not_specialize=["T", "rows"])
def gradients_kernel(
    q, k, v, g, beta, A_log, dt_bias, cu_seqlens, do,
    betas, factors, keys, values, solved, states, dstates,
    dq, dk, dv, dg, along, dbetas, dA_log, ddt_bias,
    scale, lower_bound, T, rows, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    GROUP: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk, one query/key head and BLOCK channels; GROUP value heads in turn.

        dM = do v'ᵀ    dA = −β u v'ᵀ    dv = β u    dβ = u·(v − k_in S − A v')
        dq_in = do Sᵀ    dk_in = −β u Sᵀ    dk_out = v' dSᵀ

    Reads the raw operands, do, and of the scans A (``keys``), v' (``values``), u (``solved``), the
    states before the chunk and the gradients of the states after it.  Writes dv, dg, the gradients
    of activated q and k, and this block's share of Σ y dy for both (``along`` [2, C]), of dβ [C],
    of A_log's gradient and of dt_bias's, which ``finish_kernel`` or a sum complete.
    """
    BLOCKS: tl.constexpr = BK // BLOCK
    i_block = tl.program_id(0) % BLOCKS
    i_h = tl.program_id(0) // BLOCKS % H
    i_slot = tl.program_id(0) // BLOCKS // H
    i_n, i_c, start, length = locate(cu_seqlens, i_slot, rows, T, C)
    dtype = keys.dtype.element_ty
    o_c = tl.arange(0, C)
    o_k = i_block * BLOCK + tl.arange(0, BLOCK)
    token = start + i_c * C
    there = i_c * C < length
    if cu_seqlens is not None:
        there = there & (i_n < rows - 1)
    m_t = i_c * C + o_c < length
    m_k = m_t[:, None] & (o_k < K)[None, :]
    o_channels = ((token + o_c)[:, None] * H + i_h) * K + o_k[None, :]

    if not there:  # padding has no gradient, nor has a slot that no chunk fills
        tl.store(dq + o_channels, tl.zeros([C, BLOCK], dq.dtype.element_ty), m_k)
        tl.store(dk + o_channels, tl.zeros([C, BLOCK], dk.dtype.element_ty), m_k)
        for i_r in range(GROUP):
            i_hv = i_h * GROUP + i_r
            i_place = i_slot.to(tl.int64) * HV + i_hv
            if dA_log is not None:
                tl.store(dA_log + i_place * BLOCKS + i_block, 0.0)
            if ddt_bias is not None:
                tl.store(ddt_bias + i_place * BK + o_k, o_k * 0.0)
            p_dg = dg + ((token + o_c)[:, None] * HV + i_hv) * K + o_k[None, :]
            tl.store(p_dg, tl.zeros([C, BLOCK], dg.dtype.element_ty), m_k)
            if i_block == 0:
                p_dv = dv + ((token + o_c) * HV + i_hv) * V
                zero_rows(p_dv, m_t, V, BV)
        return

    m_before = o_c[None, :] <= o_c[:, None]
    m_after = o_c[None, :] >= o_c[:, None]
    m_own = m_before & m_after
    m_block = (o_c // 16)[None, :] == (o_c // 16)[:, None]
    m_second = (o_c >= 16)[:, None]
    b_zero = tl.zeros([C, C], dtype)
    p_factor = factors + (i_slot.to(tl.int64) * HV + i_h * GROUP) * (2 * C) + o_c
    b_qf = tl.load(p_factor) * scale
    b_kf = tl.load(p_factor + C)
    b_dq_sum = tl.zeros([C, BLOCK], tl.float32)  # over value heads
    b_dk_sum = tl.zeros([C, BLOCK], tl.float32)
    for i_r in range(GROUP):
        i_hv = i_h * GROUP + i_r
        i_place = i_slot.to(tl.int64) * HV + i_hv
        b_beta = tl.load(betas + i_place * C + o_c)
        b_dbeta = tl.zeros([C], tl.float32)
        b_own = tl.zeros([C], tl.float32)  # the diagonal of dM
        b_dm = tl.zeros([C, C], tl.float32)
        b_dmt = tl.zeros([C, C], tl.float32)
        b_uv = tl.zeros([C, C], tl.float32)
        b_uvt = tl.zeros([C, C], tl.float32)
        b_dq = tl.zeros([C, BLOCK], tl.float32)
        b_us = tl.zeros([C, BLOCK], tl.float32)
        b_dk_out = tl.zeros([C, BLOCK], tl.float32)
        b_through = tl.zeros([BLOCK], tl.float32)
        for i_v in range(VP // BV):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = m_t[:, None] & (o_v < V)[None, :]
            o_tokens = ((token + o_c)[:, None] * HV + i_hv) * V + o_v[None, :]
            o_padded = (i_place * C + o_c)[:, None] * VP + o_v[None, :]
            o_state = (i_place * VP + o_v)[:, None] * BK + o_k[None, :]
            b_do = tl.load(do + o_tokens, m_v, 0).to(dtype)  # [C, BV]
            b_v = tl.load(values + o_padded)
            b_u = tl.load(solved + o_padded)
            b_s = tl.load(states + o_state)  # [BV, BLOCK]
            b_ds = tl.load(dstates + o_state)
            b_dm = tl.dot(b_do, tl.trans(b_v), b_dm, input_precision=PRECISION)
            b_dmt = tl.dot(b_v, tl.trans(b_do), b_dmt, input_precision=PRECISION)
            b_uv = tl.dot(b_u, tl.trans(b_v), b_uv, input_precision=PRECISION)
            b_uvt = tl.dot(b_v, tl.trans(b_u), b_uvt, input_precision=PRECISION)
            b_dq = tl.dot(b_do, b_s, b_dq, input_precision=PRECISION)
            b_us = tl.dot(b_u, b_s, b_us, input_precision=PRECISION)
            b_dk_out = tl.dot(b_v, b_ds, b_dk_out, input_precision=PRECISION)
            b_through += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), 0)
            b_own += tl.sum(b_do.to(tl.float32) * b_v.to(tl.float32), 1)
            if i_block == 0:
                b_dw = b_u.to(tl.float32)
                b_dbeta += tl.sum(b_dw * tl.load(v + o_tokens, m_v, 0).to(tl.float32), 1)
                b_dw *= b_beta[:, None]
                tl.store(dv + o_tokens, b_dw.to(dv.dtype.element_ty), m_v)
        if i_block == 0:  # A is zero off its triangle
            b_keys = tl.load(keys + (i_place * C + o_c)[:, None] * C + o_c[None, :])
            b_dbeta -= tl.sum(b_keys.to(tl.float32) * b_uv, 1)
        b_da = tl.where(m_before, b_beta[:, None] * b_uv, b_beta[None, :] * b_uvt)
        b_da = tl.where(m_own, 0.0, -b_da).to(dtype)  # with its transpose
        b_dm = tl.where(m_before & (m_own == 0), b_dm, 0.0).to(dtype)
        b_dmt = tl.where(m_before, 0.0, b_dmt).to(dtype)

        p_g = g + token * HV * K + i_hv * K
        _, _, b_g = load_decays(
            p_g, A_log, dt_bias, lower_bound, o_c, o_k, m_t, i_hv, HV, K, GATE
        )  # [C, BLOCK]

        b_q = tl.load(q + o_channels, m_k, 0).to(tl.float32) * b_qf[:, None]
        b_k = tl.load(k + o_channels, m_k, 0).to(tl.float32) * b_kf[:, None]

        # the state before the chunk, and the one after it
        b_decay = decay_of(sums(as_operand(m_before, dtype), b_g))
        b_dq *= b_decay
        b_us *= b_decay
        b_dbeta -= tl.sum(b_k * b_us, 1)
        tl.store(dbetas + (i_place * BLOCKS + i_block) * C + o_c, b_dbeta)
        b_dk = -b_beta[:, None] * b_us
        b_dg = sums(as_operand(m_after, dtype), b_q * b_dq + b_k * b_dk)
        b_decay = decay_of(sums(as_operand(m_before == 0, dtype), b_g))
        b_dk_out *= b_decay
        b_dg += sums(as_operand(m_after == 0, dtype), b_k * b_dk_out)
        b_dg += (b_through * decay_of(tl.sum(b_g, 0)))[None, :]
        b_dq += b_own[:, None] * b_k
        b_dk += b_own[:, None] * b_q + b_dk_out

        # pairs of the two blocks of 16
        b_prefix = sums(as_operand(m_block & m_before, dtype), b_g)
        b_suffix = sums(as_operand(m_block & (m_before == 0), dtype), b_g)
        b_decay = decay_of(tl.where(m_second, b_prefix, b_suffix))
        b_qd = b_q * b_decay
        b_kd = b_k * b_decay
        b_pairs = tl.where(m_block, b_zero, b_dm)
        b_dqd = tl.dot(b_pairs, b_kd.to(dtype), input_precision=PRECISION)
        b_pairs = tl.where(m_block, b_zero, b_dmt)
        b_dkd = tl.dot(b_pairs, b_qd.to(dtype), input_precision=PRECISION)
        b_pairs = tl.where(m_block, b_zero, b_da)
        b_dkd = tl.dot(b_pairs, b_kd.to(dtype), b_dkd, input_precision=PRECISION)
        b_dq += b_decay * b_dqd
        b_dk += b_decay * b_dkd
        b_dexponent = b_qd * b_dqd + b_kd * b_dkd
        b_mask = as_operand(m_block & (m_after == 0), dtype)
        b_dg += sums(b_mask, tl.where(m_second, 0.0, b_dexponent))
        b_dprefix = tl.where(m_second, b_dexponent, 0.0)

        # pairs in one of them
        if tl.max(tl.max(tl.abs(b_prefix), 1), 0) <= ROOM:
            # what enters a product twice is rounded once: the gradients of the two exponents of a
            # pair cancel where both sum the same gate
            b_decay = decay_of(b_prefix)
            b_qd = rounded(b_q * b_decay, dtype)
            b_kd = rounded(b_k * b_decay, dtype)
            b_inverse = decay_of(-b_prefix)
            b_ki = rounded(b_k * b_inverse, dtype)
            b_pairs = tl.where(m_block, b_dm, b_zero)
            b_dqd = tl.dot(b_pairs, b_ki.to(dtype), input_precision=PRECISION)
            b_dq += b_decay * b_dqd
            b_pairs = tl.where(m_block & m_before, b_da, b_zero)
            b_dkd = tl.dot(b_pairs, b_ki.to(dtype), input_precision=PRECISION)
            b_dk += b_decay * b_dkd
            b_pairs = tl.where(m_block & (m_before == 0), b_da, b_zero)
            b_dki = tl.dot(b_pairs, b_kd.to(dtype), input_precision=PRECISION)
            b_pairs = tl.where(m_block, b_dmt, b_zero)
            b_dki = tl.dot(b_pairs, b_qd.to(dtype), b_dki, input_precision=PRECISION)
            b_dk += b_inverse * b_dki
            b_dprefix += b_qd * b_dqd + b_kd * b_dkd - b_ki * b_dki
        else:
            b_dq, b_dk, b_dg = halving_gradients(
                b_q, b_k, b_g, b_dq, b_dk, b_dg, b_dm, b_dmt, b_da, C, dtype, PRECISION
            )
        b_dg += sums(as_operand(m_block & m_after, dtype), b_dprefix)

        b_dg = tl.where(m_k, b_dg, 0.0)
        if GATE:
            b_x, rate, _ = load_decays(
                p_g, A_log, dt_bias, lower_bound, o_c, o_k, m_t, i_hv, HV, K, GATE
            )
            b_dg, b_drate = log_decay_backward(b_x, b_dg, rate, lower_bound)
            if dA_log is not None:
                tl.store(dA_log + i_place * BLOCKS + i_block, tl.sum(tl.sum(b_drate, 1), 0))
            if ddt_bias is not None:
                tl.store(ddt_bias + i_place * BK + o_k, tl.sum(b_dg, 0))
        p_dg = dg + ((token + o_c)[:, None] * HV + i_hv) * K + o_k[None, :]
        tl.store(p_dg, b_dg.to(dg.dtype.element_ty), m_k)
        b_dq_sum += b_dq
        b_dk_sum += b_dk

    b_q = tl.load(q + o_channels, m_k, 0).to(tl.float32) * b_qf[:, None]
    b_k = tl.load(k + o_channels, m_k, 0).to(tl.float32) * b_kf[:, None]
    p_along = along + ((i_slot.to(tl.int64) * H + i_h) * BLOCKS + i_block) * (2 * C)
    tl.store(p_along + o_c, tl.sum(b_q * b_dq_sum, 1))
    tl.store(p_along + C + o_c, tl.sum(b_k * b_dk_sum, 1))
    b_dq_sum *= b_qf[:, None]
    b_dk_sum *= b_kf[:, None]
    tl.store(dq + o_channels, b_dq_sum.to(dq.dtype.element_ty), m_k)
    tl.store(dk + o_channels, b_dk_sum.to(dk.dtype.element_ty), m_k)


@triton.jit(do_not_specialize=["T", "rows"])
def finish_kernel(
    q, k, beta, cu_seqlens, factors, along, dbetas, dq, dk, dbeta,
    T, rows, H, HV, K,
    C: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    QK_L2NORM: tl.constexpr, BETA_SIGMOID: tl.constexpr, BETA_RANGE: tl.constexpr,
):  # fmt: skip
    """What takes whole rows of one chunk and query/key head: dx = |x|⁻¹ (dy − y Σ y dy), and dβ.

    ``along`` and ``dbetas`` hold the shares of the BLOCKS blocks of channels; dq and dk are
    completed in place.
    """
    i_slot = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_n, i_c, start, length = locate(cu_seqlens, i_slot, rows, T, C)
    if i_c * C >= length:
        return
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    m_t = i_c * C + o_c < length
    token = start + i_c * C + o_c
    there = True
    if cu_seqlens is not None:
        there = i_n < rows - 1
    for i_r in range(GROUP):
        i_hv = i_h * GROUP + i_r
        b_dbeta = tl.zeros([C], tl.float32)
        if there:
            i_place = i_slot.to(tl.int64) * HV + i_hv
            for block in range(BLOCKS):
                b_dbeta += tl.load(dbetas + (i_place * BLOCKS + block) * C + o_c)
            b_raw = tl.load(beta + token * HV + i_hv, m_t, 0).to(tl.float32)
            b_dbeta = beta_backward(b_raw, b_dbeta, BETA_SIGMOID, BETA_RANGE)
        tl.store(dbeta + token * HV + i_hv, b_dbeta.to(dbeta.dtype.element_ty), m_t)
    if QK_L2NORM and there:
        m_k = m_t[:, None] & (o_k < K)[None, :]
        o_channels = (token[:, None] * H + i_h) * K + o_k[None, :]
        p_factor = factors + (i_slot.to(tl.int64) * HV + i_h * GROUP) * (2 * C) + o_c
        p_along = along + (i_slot.to(tl.int64) * H + i_h) * BLOCKS * (2 * C) + o_c
        b_q_along = tl.zeros([C], tl.float32)
        b_k_along = tl.zeros([C], tl.float32)
        for block in range(BLOCKS):
            b_q_along += tl.load(p_along + block * (2 * C))
            b_k_along += tl.load(p_along + block * (2 * C) + C)
        b_qf = tl.load(p_factor)
        b_kf = tl.load(p_factor + C)
        b_q = tl.load(q + o_channels, m_k, 0).to(tl.float32)  # [C, BK]
        b_dq = tl.load(dq + o_channels, m_k, 0).to(tl.float32)
        b_k = tl.load(k + o_channels, m_k, 0).to(tl.float32)
        b_dk = tl.load(dk + o_channels, m_k, 0).to(tl.float32)
        b_dq -= b_q * (b_qf * b_qf * b_q_along)[:, None]
        b_dk -= b_k * (b_kf * b_kf * b_k_along)[:, None]
        tl.store(dq + o_channels, b_dq.to(dq.dtype.element_ty), m_k)
        tl.store(dk + o_channels, b_dk.to(dk.dtype.element_ty), m_k)
