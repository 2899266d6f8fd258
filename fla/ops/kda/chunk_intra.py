"""Interactions inside a chunk, on tensor cores: what it computes for the scans.

A chunk is blocks of 16 tokens.  Token t of every block is a row [BLOCKS, BK], so that a thread has
all tokens of its channels and sums log-decays one after another; rows become tiles [C, BK] where
products want them.  Between blocks pairs go by halving, each exponent a sum of its own segment.
Keys of a row's own block take the inverse of their decay from its start, as long as that stays
within fp32 up to the row; rows beyond go by halving too (``halving.py``).  A row's path depends
on rows up to it alone, so an output never depends on a later token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.common.kernels import power
from fla.ops.kda.activations import L2NORM_EPS, beta_of
from fla.ops.kda.halving import (
    ROOM,
    TILE,
    between,
    decays,
    gates_of,
    joined,
    level_mask,
    load_bias,
    load_rate,
    load_rows,
    parts,
    segment_mask,
    sums,
    tile,
    weight_of,
)
from fla.ops.kda.slots import locate


@triton.jit
def unit(b_x, ENABLED: tl.constexpr):
    """1 / sqrt(Σx² + ε) over axis 1; 1 where norms are not asked for."""
    b_x = b_x.to(tl.float32)
    b_sum = tl.sum(b_x * b_x, 1)
    if ENABLED:
        b_sum = tl.rsqrt(b_sum + L2NORM_EPS)
    else:
        b_sum = tl.full(b_sum.shape, 1.0, tl.float32)
    return b_sum


@triton.jit
def over_channels(b_x, b_y, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """x [C, BK] y [BK, C], in products over BLOCK channels: all of them, or half.

    A product has its operands in shared memory, those of tf32×3 twice.
    """
    if BLOCK < b_x.shape[1]:
        b_x0, b_x1 = tl.split(b_x.reshape([b_x.shape[0], 2, BLOCK]).permute(0, 2, 1))
        b_y0, b_y1 = tl.split(b_y.reshape([2, BLOCK, b_y.shape[1]]).permute(1, 2, 0))
        b_sum = tl.dot(b_x0, b_y0, input_precision=PRECISION)
        b_sum = tl.dot(b_x1, b_y1, b_sum, input_precision=PRECISION)
    else:
        b_sum = tl.dot(b_x, b_y, input_precision=PRECISION)
    return b_sum


@triton.jit
def pairs(r_x, r_y, b_inverse, b_x, b_y, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of M or A [C, C]: with keys of their own block, of the one before, and of two before."""
    C: tl.constexpr = b_x.shape[1]
    o_c = tl.arange(0, C)
    block = o_c // TILE
    m_own = (block[:, None] == block[None, :]) & (o_c[:, None] >= o_c[None, :])
    b_rows = tl.trans(tile(r_x))  # [C, BK]
    b_own = over_channels(b_rows, b_inverse, BLOCK, PRECISION)
    b_pairs = over_channels(b_rows, b_x, BLOCK, PRECISION)
    b_pairs = tl.where(m_own, b_own, tl.where(level_mask(4, C), b_pairs, 0.0))
    if C == 64:
        b_far = over_channels(tl.trans(tile(r_y)), b_y, BLOCK, PRECISION)
        b_pairs = tl.where(level_mask(5, C), b_far, b_pairs)
    return b_pairs


@triton.jit(do_not_specialize=["T", "rows"])
def intra_kernel(
    q, k, g, beta, A_log, dt_bias, cu_seqlens, q_in, k_in, k_out, decay, betas, factors, near,
    queries, keys, scale, lower_bound, T, rows, H, HV, K,
    C: tl.constexpr, BK: tl.constexpr,
    QK_L2NORM: tl.constexpr, GATE: tl.constexpr, FORGETS: tl.constexpr,
    BETA_SIGMOID: tl.constexpr, BETA_RANGE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk is to the state and its tokens to one another, for one chunk of one value head.

        q_in_i = scale D_i0 q_i    k_in_i = D_i0 k_i    k_out_j = D_Cj k_j    decay = D_C0
        A_ij = k_i·D_ij k_j, j < i      M_ij = scale q_i·D_ij k_j, j ≤ i

    Reads the chunk's raw q, k, g [C, K] and beta; writes q_in, k_in, k_out [C, BK], decay [BK],
    activated betas [C], the norms' factors of q and k [2, C], all zero where tokens or channels are
    not there, how many rows of each block are ``near``, and, unless ``queries`` is None, M there
    and A, below the diagonal, in ``keys`` [C, C].
    """
    BLOCKS: tl.constexpr = C // TILE
    i_slot = tl.program_id(0) // HV
    i_hv = tl.program_id(0) % HV
    _, i_c, start, _, live = locate(cu_seqlens, i_slot, rows, T, C)
    if i_c * C >= live:
        return
    dtype: tl.constexpr = k_in.dtype.element_ty
    i_h = i_hv // (HV // H)
    token = start + i_c * C
    place = i_slot.to(tl.int64) * HV + i_hv
    o_b = tl.arange(0, BLOCKS)
    o_k = tl.arange(0, BK)
    o_q = (o_b * TILE)[:, None] * (H * K) + o_k[None, :]
    o_g = (o_b * TILE)[:, None] * (HV * K) + o_k[None, :]
    o_out = (o_b * TILE)[:, None] * BK + o_k[None, :]
    p_q = q + token * H * K + i_h * K + o_q
    p_k = k + token * H * K + i_h * K + o_q
    p_g = g + token * HV * K + i_hv * K + o_g
    p_q_in = q_in + place * (C * BK) + o_out
    p_k_in = k_in + place * (C * BK) + o_out
    p_k_out = k_out + place * (C * BK) + o_out
    factors += place * (2 * C)
    m_k = (o_k < K)[None, :]
    left = live - i_c * C
    left_b = (left - o_b * TILE)[:, None]
    o_c = tl.arange(0, C)
    b_beta = tl.load(beta + (token + o_c) * HV + i_hv, o_c < left, 0).to(tl.float32)
    b_beta = tl.where(o_c < left, beta_of(b_beta, BETA_SIGMOID, BETA_RANGE), 0.0)
    tl.store(betas + place * C + o_c, b_beta)

    # loads far ahead of their use
    r_g = load_rows(p_g, HV * K, m_k, left_b)
    r_k = load_rows(p_k, H * K, m_k, left_b)

    rate = load_rate(A_log, i_hv, GATE)
    b_bias = load_bias(dt_bias, o_k, i_hv, K, GATE)
    r_decay, b_total = decays(r_g, m_k, left_b, b_bias, rate, lower_bound, GATE)
    b_zero = tl.zeros_like(b_total)
    b_before, b_behind, b_far, b_whole = between(b_total, o_b[:, None])
    tl.store(decay + place * BK + o_k[None, :], power(b_whole))

    # keys at the end of their blocks
    b_factor = unit(joined(r_k), QK_L2NORM)
    tl.store(factors + C + o_c, b_factor.reshape([C]))
    r_unit = parts(b_factor)
    r_x = ()
    r_y = ()
    b_sum = b_zero
    for t in tl.static_range(TILE - 1, -1, -1):
        b_end = r_k[t].to(tl.float32) * r_unit[t][:, None] * weight_of(b_sum, FORGETS)
        tl.store(p_k_out + t * BK, (b_end * b_behind).to(dtype))
        b_sum += r_decay[t]
        r_x = (b_end.to(dtype),) + r_x  # noqa: RUF005, jit functions know no *
        r_y = ((b_end * b_far).to(dtype),) + r_y  # noqa: RUF005
    if queries is not None:
        b_x = tile(r_x)
        b_y = tile(r_y)
    r_q = load_rows(p_q, H * K, m_k, left_b)
    r_x = ()
    r_y = ()
    r_ki = ()
    b_sum = b_zero
    b_largest = b_zero
    b_near = b_zero
    for t in tl.static_range(TILE):
        b_sum += r_decay[t]
        b_largest = tl.maximum(b_largest, tl.abs(b_sum))
        b_near += tl.where(b_largest <= ROOM, 1.0, 0.0)
        b_k = r_k[t].to(tl.float32) * r_unit[t][:, None]
        b_kd = b_k * weight_of(b_sum, FORGETS)
        tl.store(p_k_in + t * BK, (b_kd * b_before).to(dtype))
        r_x += (b_kd.to(dtype),)
        r_y += ((b_kd * b_far).to(dtype),)
        r_ki += ((b_k * weight_of(-b_sum, FORGETS)).to(dtype),)
    tl.store(near + place * BLOCKS + o_b, tl.min(b_near, 1).to(tl.int32))
    o_pairs = place * (C * C) + o_c[:, None] * C + o_c[None, :]
    if queries is not None:
        b_ki = tile(r_ki)
        b_a = pairs(r_x, r_y, b_ki, b_x, b_y, BLOCK, PRECISION)
        tl.store(keys + o_pairs, b_a.to(dtype))
    b_factor = unit(joined(r_q), QK_L2NORM)
    tl.store(factors + o_c, b_factor.reshape([C]))
    r_unit = parts(b_factor * scale)
    r_x = ()
    r_y = ()
    b_sum = b_zero
    for t in tl.static_range(TILE):
        b_sum += r_decay[t]
        b_qd = r_q[t].to(tl.float32) * r_unit[t][:, None] * weight_of(b_sum, FORGETS)
        tl.store(p_q_in + t * BK, (b_qd * b_before).to(dtype))
        r_x += (b_qd.to(dtype),)
        r_y += ((b_qd * b_far).to(dtype),)
    if queries is not None:
        b_m = pairs(r_x, r_y, b_ki, b_x, b_y, BLOCK, PRECISION)
        tl.store(queries + o_pairs, b_m.to(dtype))


@triton.jit(do_not_specialize=["T", "rows"])
def halving_kernel(
    q, k, g, A_log, dt_bias, cu_seqlens, factors, near, queries, keys,
    scale, lower_bound, T, rows, H, HV, K,
    C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pairs in blocks of ``intra_kernel`` again, for rows behind the first ``near`` of each.

    They are summed up over BLOCK channels at a time.
    """
    BLOCKS: tl.constexpr = C // TILE
    i_slot = tl.program_id(0) // HV
    i_hv = tl.program_id(0) % HV
    _, i_c, start, _, live = locate(cu_seqlens, i_slot, rows, T, C)
    if i_c * C >= live:
        return
    place = i_slot.to(tl.int64) * HV + i_hv
    b_near = tl.load(near + place * BLOCKS + tl.arange(0, BLOCKS))
    if tl.min(b_near, 0) == TILE:
        return
    dtype: tl.constexpr = keys.dtype.element_ty
    i_h = i_hv // (HV // H)
    o_c = tl.arange(0, C)
    token = start + i_c * C
    b_near = b_near[:, None] + tl.zeros([BLOCKS, TILE], tl.int32)
    m_far = (o_c % TILE >= b_near.reshape([C]))[:, None]
    factors += place * (2 * C)
    rate = load_rate(A_log, i_hv, GATE)
    o_pairs = place * (C * C) + o_c[:, None] * C + o_c[None, :]
    block = o_c // TILE
    m_block = m_far & (block[:, None] == block[None, :]) & (o_c[:, None] >= o_c[None, :])
    m_own = m_far & (o_c[:, None] == o_c[None, :])
    b_a = tl.where(m_block, 0.0, tl.load(keys + o_pairs).to(tl.float32))
    b_m = tl.where(m_block, 0.0, tl.load(queries + o_pairs).to(tl.float32))
    for at in tl.static_range(0, BK, BLOCK):
        o_k = at + tl.arange(0, BLOCK)
        m = (o_k < K)[:, None] & (i_c * C + o_c < live)[None, :]
        o_x = (token + o_c)[None, :] * (H * K) + i_h * K + o_k[:, None]
        o_g = (token + o_c)[None, :] * (HV * K) + i_hv * K + o_k[:, None]
        b_raw = tl.load(g + o_g, m, 0)  # [BLOCK, C]
        _, b_g = gates_of(b_raw, rate, dt_bias, lower_bound, o_k, m, i_hv, K, GATE)
        b_q = tl.load(q + o_x, m, 0).to(tl.float32) * (tl.load(factors + o_c) * scale)[None, :]
        b_k = tl.load(k + o_x, m, 0).to(tl.float32) * tl.load(factors + C + o_c)[None, :]
        b_m = tl.where(m_own, b_m + tl.sum(b_q * b_k, 0)[:, None], b_m)
        for level in range(4):
            b_decay = power(sums(b_g, segment_mask(level, C), dtype))
            b_key = (b_k * b_decay).to(dtype)
            b_query = (b_q * b_decay).to(dtype)
            m_level = level_mask(level, C) & m_far
            b_pairs = tl.dot(tl.trans(b_key), b_key, input_precision=PRECISION)
            b_a = tl.where(m_level, b_a + b_pairs, b_a)
            b_pairs = tl.dot(tl.trans(b_query), b_key, input_precision=PRECISION)
            b_m = tl.where(m_level, b_m + b_pairs, b_m)
    tl.store(keys + o_pairs, b_a.to(dtype))
    tl.store(queries + o_pairs, b_m.to(dtype))
