"""The gradients of q, k and the gates of a chunk, from those of its pairs and of the states.

With x an operand decayed to where it meets its partner, D x, the gradient of the decay's exponent
is x dx, which vanishes where the decay does, and goes to all the gates that the exponent sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.common.kernels import power
from fla.ops.kda.activations import log_decay_backward
from fla.ops.kda.halving import (
    ROOM,
    TILE,
    copies,
    gates_of,
    level_mask,
    level_mask_transposed,
    load_rate,
    middle,
    replaced,
    rounded,
    segment_mask,
    segment_mask_transposed,
    sums,
)
from fla.ops.kda.slots import locate


@triton.jit(do_not_specialize=["T", "rows"])
def through_states_kernel(
    do, cu_seqlens, betas, values, solved, states, dstates, dq_in, dk_in, dk_out, through,
    T, rows, HV, V,
    C: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What tokens gain through the states around one chunk, for BLOCK channels of a value head.

        dq_in = do Sᵀ    dk_in = −β u Sᵀ    dk_out = β w dSᵀ    through = Σ_v S dS

    Reads do, and of the scans w (``values``), u (``solved``), the states before the chunk and the
    gradients of the states after it; writes [C, BLOCK] each, and [BLOCK].
    """
    BLOCKS: tl.constexpr = BK // BLOCK
    i_block = tl.program_id(0) % BLOCKS
    i_hv = tl.program_id(0) // BLOCKS % HV
    i_slot = tl.program_id(0) // BLOCKS // HV
    _, i_c, start, _, live = locate(cu_seqlens, i_slot, rows, T, C)
    if i_c * C >= live:
        return
    dtype: tl.constexpr = dq_in.dtype.element_ty
    o_c = tl.arange(0, C)
    o_k = i_block * BLOCK + tl.arange(0, BLOCK)
    m_t = i_c * C + o_c < live
    token = start + i_c * C + o_c
    place = i_slot.to(tl.int64) * HV + i_hv
    b_dq = tl.zeros([C, BLOCK], tl.float32)
    b_dk = tl.zeros([C, BLOCK], tl.float32)
    b_dk_out = tl.zeros([C, BLOCK], tl.float32)
    b_through = tl.zeros([BLOCK], tl.float32)
    for i_v in range(VP // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        o_padded = (place * C + o_c)[:, None] * VP + o_v[None, :]
        o_state = (place * VP + o_v)[:, None] * BK + o_k[None, :]
        m_v = m_t[:, None] & (o_v < V)[None, :]
        # Through registers: Triton 3.6 would let copies overtake the products of tiles that are
        # summed too
        m_s = (o_v < V)[:, None]
        b_s = tl.where(m_s, tl.load(states + o_state), 0)  # [BV, BLOCK]
        b_ds = tl.where(m_s, tl.load(dstates + o_state), 0)
        b_do = tl.load(do + (token[:, None] * HV + i_hv) * V + o_v[None, :], m_v, 0)  # [C, BV]
        b_dq = tl.dot(b_do.to(dtype), b_s, b_dq, input_precision=PRECISION)
        b_dk = tl.dot(tl.load(solved + o_padded), b_s, b_dk, input_precision=PRECISION)
        b_dk_out = tl.dot(tl.load(values + o_padded), b_ds, b_dk_out, input_precision=PRECISION)
        b_through += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), 0)
    b_beta = tl.load(betas + place * C + o_c)[:, None]
    o_channels = (place * C + o_c)[:, None] * BK + o_k[None, :]
    tl.store(dq_in + o_channels, b_dq.to(dtype))
    tl.store(dk_in + o_channels, (b_dk * -b_beta).to(dtype))
    tl.store(dk_out + o_channels, (b_dk_out * b_beta).to(dtype))
    tl.store(through + place * BK + o_k, b_through)


@triton.jit
def times(b_x, b_matrix, b_sum, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """sum + x [BLOCK, TILE] times the transpose of a matrix [TILE, TILE]."""
    b_matrix = tl.trans(b_matrix.to(DTYPE))
    return tl.dot(b_x.to(DTYPE), b_matrix, b_sum, input_precision=PRECISION)


@triton.jit
def through_level(
    level, b_q, b_k, b_g, b_dm, b_da, b_dq, b_dk, b_dg,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq, dk, dg [BLOCK, TILE] what comes through the pairs of one level.

    b_dm, b_da [TILE, TILE]: the gradients of M and A as symmetric matrices.  A token of a second
    half is there as query and as row of A, one of a first half as key and as column.
    """
    m_second = ((tl.arange(0, TILE) >> level) & 1 == 1)[None, :]
    m_pairs = level_mask(level, TILE) | level_mask_transposed(level, TILE)
    b_decay = power(sums(b_g, segment_mask(level, TILE), DTYPE))
    b_zero = tl.zeros_like(b_k)
    b_kd = b_k * b_decay
    b_xd = tl.where(m_second, b_q * b_decay, b_kd)
    b_dxd = times(b_xd, tl.where(m_pairs, b_dm, 0.0), b_zero, DTYPE, PRECISION)
    b_dkd = times(b_kd, tl.where(m_pairs, b_da, 0.0), b_zero, DTYPE, PRECISION)
    b_dexponent = b_xd * b_dxd + b_kd * b_dkd
    b_dq += tl.where(m_second, b_decay * b_dxd, 0.0)
    b_dk += b_decay * tl.where(m_second, b_dkd, b_dkd + b_dxd)
    b_dg += sums(b_dexponent, segment_mask_transposed(level, TILE), DTYPE, PARTS=1)
    return b_dq, b_dk, b_dg


@triton.jit(do_not_specialize=["T", "rows"])
def gradients_kernel(
    q, k, g, A_log, dt_bias, cu_seqlens, factors, dq_in, dk_in, dk_out, through,
    dqueries, dkeys, own, dg, drates, dbiases,
    scale, lower_bound, T, rows, H, HV, K,
    C: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk and value head in BLOCK channels, blocks of 16 tokens in turn.

    Tiles stand on their side, channels by tokens [BLOCK, TILE]: what a thread holds enters the next
    product as it is.  A row i of block a stands decayed from the start of its block, a key j of
    block b decayed to the end of its own, and what lies between the two is one factor a channel:

        D_ij = exp2(prefix_i) exp2(Σ_{b<c<a} total_c) exp2(suffix_j)

    Reads the raw q, k, g, what comes through the states, and the gradients of M and A as
    ``adjoint_kernel`` leaves them.  Writes dg, this block's share of A_log's gradient and of
    dt_bias's, and the gradients of activated q and k in place of ``dq_in`` and ``dk_in``.
    """
    BLOCKS: tl.constexpr = BK // BLOCK
    TILES: tl.constexpr = C // TILE
    i_block = tl.program_id(0) % BLOCKS
    i_hv = tl.program_id(0) // BLOCKS % HV
    i_slot = tl.program_id(0) // BLOCKS // HV
    i_h = i_hv // (HV // H)
    _, i_c, start, length, live = locate(cu_seqlens, i_slot, rows, T, C)
    dtype: tl.constexpr = dkeys.dtype.element_ty
    o_i = tl.arange(0, TILE)
    o_k = i_block * BLOCK + tl.arange(0, BLOCK)
    token = start + i_c * C
    place = i_slot.to(tl.int64) * HV + i_hv
    q += token * H * K + i_h * K
    k += token * H * K + i_h * K
    g += token * HV * K + i_hv * K
    dg += token * HV * K + i_hv * K
    dq_in += place * (C * BK)
    dk_in += place * (C * BK)
    dk_out += place * (C * BK)
    dqueries += place * (C * C)
    dkeys += place * (C * C)
    factors += (i_slot.to(tl.int64) * HV + i_hv) * (2 * C)

    if i_c * C >= live:  # padding has no gradient, nor has a slot that no chunk fills
        if drates is not None:
            tl.store(drates + place * BLOCKS + i_block, 0.0)
            tl.store(dbiases + place * BK + o_k, o_k * 0.0)
        for i_tile in range(TILES):
            o_t = o_i + i_tile * TILE
            m = (o_k < K)[:, None] & (i_c * C + o_t < length)[None, :]
            b_zero = tl.zeros([BLOCK, TILE], dg.dtype.element_ty)
            tl.store(dg + o_t[None, :] * (HV * K) + o_k[:, None], b_zero, m)
        return

    rate = load_rate(A_log, i_hv, GATE)
    m_after = o_i[None, :] >= o_i[:, None]
    m_before = o_i[None, :] <= o_i[:, None]
    b_zero = tl.zeros([BLOCK, TILE], tl.float32)
    # all loads far ahead of their use
    gates = copies(b_zero, TILES)
    keys = copies(b_zero, TILES)
    gains = copies(b_zero, TILES)
    for a in tl.static_range(TILES):
        o_t = o_i + a * TILE
        m = (o_k < K)[:, None] & (i_c * C + o_t < length)[None, :]
        gates = replaced(gates, a, tl.load(g + o_t[None, :] * (HV * K) + o_k[:, None], m, 0))
        keys = replaced(keys, a, tl.load(k + o_t[None, :] * (H * K) + o_k[:, None], m, 0))
    for a in tl.static_range(TILES):
        gains = replaced(gains, a, tl.load(dk_out + (o_i + a * TILE)[None, :] * BK + o_k[:, None]))
    b_before = tl.load(through + place * BK + o_k)
    # keys at the end of their blocks, and the blocks' totals
    b_whole = tl.zeros([BLOCK], tl.float32)
    ends = copies(b_zero, TILES)
    totals = copies(b_whole, TILES)
    for a in tl.static_range(TILES):
        o_t = o_i + a * TILE
        m = (o_k < K)[:, None] & (i_c * C + o_t < length)[None, :]
        _, b_g = gates_of(gates[a], rate, dt_bias, lower_bound, o_k, m, i_hv, K, GATE)
        b_k = keys[a].to(tl.float32) * tl.load(factors + C + o_t)[None, :]
        b_suffix = sums(b_g, m_before == 0, dtype)
        ends = replaced(ends, a, (b_k * power(b_suffix)).to(dtype))
        b_total = tl.sum(b_g, 1)
        totals = replaced(totals, a, b_total)
        b_whole += b_total
    # what keys gain behind their blocks; what gates gain from tokens before them
    befores = copies(b_before, TILES)
    b_before *= power(b_whole)
    for a in tl.static_range(TILES):
        b_rest = tl.zeros([BLOCK], tl.float32)
        for c in tl.static_range(a + 1, TILES):
            b_rest += totals[c]
        b_gain = gains[a].to(tl.float32) * power(b_rest)[:, None]
        gains = replaced(gains, a, b_gain)
        befores = replaced(befores, a, b_before)
        b_before += tl.sum(ends[a].to(tl.float32) * b_gain, 1)

    drate = 0.0
    b_dbias = tl.zeros([BLOCK], tl.float32)
    b_behind = tl.zeros([BLOCK], tl.float32)  # what gates gain from tokens behind them
    for a in tl.static_range(TILES - 1, -1, -1):
        o_t = o_i + a * TILE
        m = (o_k < K)[:, None] & (i_c * C + o_t < length)[None, :]
        o_channels = o_t[None, :] * BK + o_k[:, None]
        b_q = tl.load(q + o_t[None, :] * (H * K) + o_k[:, None], m, 0)
        b_k = tl.load(k + o_t[None, :] * (H * K) + o_k[:, None], m, 0)
        b_g = tl.load(g + o_t[None, :] * (HV * K) + o_k[:, None], m, 0)
        b_dq = tl.load(dq_in + o_channels)
        b_dk = tl.load(dk_in + o_channels)
        rows_dm = copies(b_zero, TILES)
        rows_da = copies(b_zero, TILES)
        columns_dm = copies(b_zero, TILES)
        columns_da = copies(b_zero, TILES)
        for b in tl.static_range(a + 1):
            o_pairs = o_t[:, None] * C + (o_i + b * TILE)[None, :]
            rows_dm = replaced(rows_dm, b, tl.load(dqueries + o_pairs))
            rows_da = replaced(rows_da, b, tl.load(dkeys + o_pairs))
        for b in tl.static_range(a):
            o_pairs = (o_i + b * TILE)[:, None] * C + o_t[None, :]
            columns_dm = replaced(columns_dm, b, tl.load(dqueries + o_pairs))
            columns_da = replaced(columns_da, b, tl.load(dkeys + o_pairs))
        b_own = tl.load(own + place * C + o_t)[None, :]

        b_x, b_g = gates_of(b_g, rate, dt_bias, lower_bound, o_k, m, i_hv, K, GATE)
        b_q = b_q.to(tl.float32) * (tl.load(factors + o_t) * scale)[None, :]
        b_k = b_k.to(tl.float32) * tl.load(factors + C + o_t)[None, :]
        b_prefix = sums(b_g, m_before, dtype)
        b_up = power(b_prefix)
        b_qd = rounded(b_q * b_up, dtype)
        b_kd = rounded(b_k * b_up, dtype)

        b_rest = tl.zeros([BLOCK], tl.float32)
        for c in tl.static_range(a):
            b_rest += totals[c]
        b_rest = power(b_rest)[:, None]
        b_dq = b_dq.to(tl.float32) * b_rest
        b_dk = b_dk.to(tl.float32) * b_rest
        b_dg = (befores[a] + b_behind)[:, None] + b_zero
        b_behind += tl.sum(b_qd * b_dq + b_kd * b_dk, 1)
        for b in tl.static_range(a):  # pairs with the blocks before
            b_key = ends[b]
            b_gain = times(b_qd, columns_dm[b], b_zero, dtype, PRECISION)
            b_gain = times(b_kd, columns_da[b], b_gain, dtype, PRECISION)
            if b + 1 < a:
                b_between = tl.zeros([BLOCK], tl.float32)
                for c in tl.static_range(b + 1, a):
                    b_between += totals[c]
                b_between = power(b_between)[:, None]
                b_gain *= b_between
                b_flow = tl.sum(b_key.to(tl.float32) * b_gain, 1)
                for c in tl.static_range(b + 1, a):
                    befores = replaced(befores, c, befores[c] + b_flow)
                b_key = (b_key.to(tl.float32) * b_between).to(dtype)
            b_dq = times(b_key, rows_dm[b], b_dq, dtype, PRECISION)
            b_dk = times(b_key, rows_da[b], b_dk, dtype, PRECISION)
            gains = replaced(gains, b, gains[b] + b_gain)

        # keys of this block, for rows behind it
        b_down = power(sums(b_g, m_before == 0, dtype))
        b_key = b_down * gains[a]
        b_dg += sums(ends[a].to(tl.float32) * gains[a], m_after == 0, dtype, PARTS=1)
        # pairs in this block
        b_dm = rows_dm[a]
        b_da = rows_da[a]
        if tl.max(tl.max(tl.abs(b_prefix), 1), 0) <= ROOM:
            # what enters a product twice is rounded once: the gradients of the two exponents of a
            # pair cancel where both sum the same gate
            b_low, b_high = middle(b_prefix)
            b_inverse = power(-b_prefix) * b_low
            b_ki = rounded(b_k * b_inverse, dtype)
            b_dq = times(b_ki, tl.where(m_before, b_dm, 0.0), b_dq * b_low, dtype, PRECISION)
            b_dk = times(b_ki, tl.where(m_before, b_da, 0.0), b_dk * b_low, dtype, PRECISION)
            b_qd *= b_high
            b_kd *= b_high
            b_up *= b_high
            b_dki = times(b_qd, tl.where(m_after, b_dm, 0.0), b_zero, dtype, PRECISION)
            b_dki = times(b_kd, tl.where(m_after, b_da, 0.0), b_dki, dtype, PRECISION)
            b_dg += sums(b_qd * b_dq + b_kd * b_dk - b_ki * b_dki, m_after, dtype)
            b_dq = b_up * b_dq + b_own * b_k
            b_dk = b_up * b_dk + b_own * b_q + b_key + b_inverse * b_dki
        else:
            b_dg += sums(b_qd * b_dq + b_kd * b_dk, m_after, dtype)
            b_dq = b_up * b_dq + b_own * b_k
            b_dk = b_up * b_dk + b_own * b_q + b_key
            for level in range(4):
                b_dq, b_dk, b_dg = through_level(
                    level, b_q, b_k, b_g, b_dm, b_da, b_dq, b_dk, b_dg, dtype, PRECISION
                )
        tl.store(dq_in + o_channels, b_dq.to(dtype))
        tl.store(dk_in + o_channels, b_dk.to(dtype))
        b_dg = tl.where(m, b_dg, 0.0)
        if GATE:
            b_dg, b_drate = log_decay_backward(b_x, b_dg, rate, lower_bound)
            drate += tl.sum(tl.sum(b_drate, 1), 0)
            b_dbias += tl.sum(b_dg, 1)
        p_dg = dg + o_t[None, :] * (HV * K) + o_k[:, None]
        tl.store(p_dg, b_dg.to(dg.dtype.element_ty), m)
    if drates is not None:
        tl.store(drates + place * BLOCKS + i_block, drate)
        tl.store(dbiases + place * BK + o_k, b_dbias)


@triton.jit
def unit_backward(
    x, dy, dx, o_x, o_y, m, b_factor, scale, stride, GROUP: tl.constexpr, QK_L2NORM: tl.constexpr
):
    """dx = |x|⁻¹ (dy − y Σ y dy), y = x / |x|, of tiles [C, BK]; dy is a sum over GROUP heads."""
    b_dy = tl.load(dy + o_y).to(tl.float32)
    for i in range(1, GROUP):
        b_dy += tl.load(dy + i * stride + o_y).to(tl.float32)
    b_dy *= scale
    if QK_L2NORM:
        b_y = tl.load(x + o_x, m, 0).to(tl.float32) * b_factor[:, None]
        b_dy = (b_dy - b_y * tl.sum(b_y * b_dy, 1)[:, None]) * b_factor[:, None]
    tl.store(dx + o_x, b_dy.to(dx.dtype.element_ty), m)


@triton.jit(do_not_specialize=["T", "rows"])
def unit_kernel(
    q, k, cu_seqlens, factors, dq_in, dk_in, dq, dk, scale, T, rows, H, HV, K,
    C: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, QK_L2NORM: tl.constexpr,
):  # fmt: skip
    """dq and dk of one chunk and query/key head from what its GROUP value heads left."""
    i_slot = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    _, i_c, start, length, live = locate(cu_seqlens, i_slot, rows, T, C)
    if i_c * C >= length:
        return
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    m = (i_c * C + o_c < length)[:, None] & (o_k < K)[None, :]
    o_x = ((start + i_c * C + o_c)[:, None] * H + i_h) * K + o_k[None, :]
    if i_c * C >= live:  # padding has no gradient
        tl.store(dq + o_x, tl.zeros([C, BK], dq.dtype.element_ty), m)
        tl.store(dk + o_x, tl.zeros([C, BK], dk.dtype.element_ty), m)
        return
    place = i_slot.to(tl.int64) * HV + i_h * GROUP
    o_y = (place * C + o_c)[:, None] * BK + o_k[None, :]
    p_factor = factors + place * (2 * C) + o_c
    b_factor = tl.load(p_factor)
    unit_backward(q, dq_in, dq, o_x, o_y, m, b_factor, scale, C * BK, GROUP, QK_L2NORM)
    b_factor = tl.load(p_factor + C)
    unit_backward(k, dk_in, dk, o_x, o_y, m, b_factor, 1.0, C * BK, GROUP, QK_L2NORM)
