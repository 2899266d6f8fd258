"""Interactions inside a chunk, on tensor cores: what it computes for the scans.

A chunk goes in blocks of 16 tokens, tiles on their side, channels by tokens [BLOCK, TILE].  A row i
of block a stands decayed from the start of its block, a key j of an earlier block b decayed to the
end of its own, and what lies between is one factor a channel; gates that forget make all three at
most 1.  Keys of the row's own block take the inverse of their decay from its start, as long as that
stays within fp32 up to the row; rows beyond go by halving (``halving.py``).  A row's path depends
on rows up to it alone, so an output never depends on a later token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.kda.activations import decay_of, unit_factor
from fla.ops.kda.halving import (
    ROOM,
    TILE,
    copies,
    gates_of,
    load_rate,
    replaced,
    segment_mask,
    sums,
)
from fla.ops.kda.slots import locate


@triton.jit
def pairs(b_key, b_q, b_k, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Keys [BLOCK, TILE] by queries and keys as rows, [TILE, 2 TILE]: Mᵀ and Aᵀ interleaved."""
    b_rows = tl.join(b_q.to(DTYPE), b_k.to(DTYPE)).reshape([b_q.shape[0], 2 * TILE])
    return tl.dot(tl.trans(b_key.to(DTYPE)), b_rows, input_precision=PRECISION)


@triton.jit
def pairs_of_block(
    b_q, b_k, b_g, b_prefix, b_qd, b_kd, b_pairs, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):
    """Add the pairs j ≤ i of one block of tokens."""
    o_i = tl.arange(0, TILE)
    o_j = o_i[:, None]  # keys
    o_r = (tl.arange(0, 2 * TILE) // 2)[None, :]  # rows
    b_near = pairs(b_k * decay_of(-b_prefix), b_qd, b_kd, DTYPE, PRECISION)
    b_near = tl.where(o_j <= o_r, b_near, 0.0)
    if tl.max(tl.max(tl.abs(b_prefix), 1), 0) <= ROOM:
        b_pairs += b_near
    else:
        b_far = (tl.max(tl.abs(b_prefix), 0) > ROOM).to(tl.int32)
        b_far = tl.max(tl.where(o_i[None, :] <= o_i[:, None], b_far[None, :], 0), 1)
        m_far = (tl.join(b_far, b_far).reshape([2 * TILE]) > 0)[None, :]
        b_own = tl.sum(b_q * b_k, 0)
        b_own = tl.join(b_own, b_own).reshape([2 * TILE])[None, :]
        b_pairs += tl.where(m_far, tl.where(o_j == o_r, b_own, 0.0), b_near)
        for level in range(4):
            b_decay = decay_of(sums(b_g, segment_mask(level, TILE), DTYPE))
            m_pairs = ((o_j >> level) + 1 == o_r >> level) & ((o_r >> level) & 1 == 1)
            b_key = b_k * b_decay
            b_near = pairs(b_key, b_q * b_decay, b_key, DTYPE, PRECISION)
            b_pairs += tl.where(m_pairs & m_far, b_near, 0.0)
    return b_pairs


@triton.jit(do_not_specialize=["T", "rows"])
def intra_kernel(
    q, k, g, A_log, dt_bias, cu_seqlens, q_in, k_in, k_out, decay, factors, queries, keys,
    scale, lower_bound, T, rows, H, HV, K,
    C: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
    QK_L2NORM: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk is to the state and its tokens to one another, for one chunk of one value head.

        q_in_i = scale D_i0 q_i    k_in_i = D_i0 k_i    k_out_j = D_Cj k_j    decay = D_C0
        A_ij = k_i·D_ij k_j, j < i      M_ij = scale q_i·D_ij k_j, j ≤ i

    Reads the chunk's raw q, k, g [C, K]; writes q_in, k_in, k_out [C, BK], decay [BK], M
    (``queries``) and, below the diagonal, A (``keys``) [C, C], and the norms' factors of q and k
    [2, C], zero where tokens or channels are not there.
    """
    TILES: tl.constexpr = C // TILE
    i_slot = tl.program_id(0) // HV
    i_hv = tl.program_id(0) % HV
    i_n, i_c, start, length = locate(cu_seqlens, i_slot, rows, T, C)
    if cu_seqlens is not None:
        length = tl.where(i_n == rows - 1, 0, length)
    if i_c * C >= length:
        return
    dtype: tl.constexpr = k_in.dtype.element_ty
    i_h = i_hv // (HV // H)
    o_i = tl.arange(0, TILE)
    token = start + i_c * C
    place = i_slot.to(tl.int64) * HV + i_hv
    q += token * H * K + i_h * K
    k += token * H * K + i_h * K
    g += token * HV * K + i_hv * K
    q_in += place * (C * BK)
    k_in += place * (C * BK)
    k_out += place * (C * BK)
    queries += place * (C * C)
    keys += place * (C * C)
    factors += place * (2 * C)

    o_c = tl.arange(0, C)
    m_c = i_c * C + o_c < length
    b_factor = unit_factor(q + o_c * (H * K), m_c, K, BLOCK, BK // BLOCK, QK_L2NORM)
    tl.store(factors + o_c, b_factor)
    b_factor = unit_factor(k + o_c * (H * K), m_c, K, BLOCK, BK // BLOCK, QK_L2NORM)
    tl.store(factors + C + o_c, b_factor)
    tl.debug_barrier()  # other threads read them
    rate = load_rate(A_log, i_hv, GATE)
    m_before = o_i[None, :] <= o_i[:, None]

    # of the blocks a and b ≤ a at a (a + 1) / 2 + b
    found = copies(tl.zeros([TILE, 2 * TILE], tl.float32), TILES * (TILES + 1) // 2)
    for block in range(BK // BLOCK):
        o_k = block * BLOCK + tl.arange(0, BLOCK)
        b_zero = tl.zeros([BLOCK, TILE], tl.float32)
        raws = copies(b_zero, 3 * TILES)  # loads go far ahead of their use
        for a in tl.static_range(TILES):
            o_t = o_i + a * TILE
            m = (o_k < K)[:, None] & (i_c * C + o_t < length)[None, :]
            o_x = o_t[None, :] * (H * K) + o_k[:, None]
            b_raw = tl.load(g + o_t[None, :] * (HV * K) + o_k[:, None], m, 0)
            raws = replaced(raws, 3 * a, b_raw)
            raws = replaced(raws, 3 * a + 1, tl.load(k + o_x, m, 0))
            raws = replaced(raws, 3 * a + 2, tl.load(q + o_x, m, 0))
        ends = copies(b_zero, TILES)
        totals = copies(tl.zeros([BLOCK], tl.float32), TILES)
        b_before = tl.zeros([BLOCK], tl.float32)
        for a in tl.static_range(TILES):
            o_t = o_i + a * TILE
            m = (o_k < K)[:, None] & (i_c * C + o_t < length)[None, :]
            o_out = o_t[None, :] * BK + o_k[:, None]
            _, b_g = gates_of(raws[3 * a], rate, dt_bias, lower_bound, o_k, m, i_hv, K, GATE)
            b_k = raws[3 * a + 1].to(tl.float32) * tl.load(factors + C + o_t)[None, :]
            b_q = raws[3 * a + 2].to(tl.float32) * (tl.load(factors + o_t) * scale)[None, :]
            b_prefix = sums(b_g, m_before, dtype)
            b_end = b_k * decay_of(sums(b_g, m_before == 0, dtype))
            b_decay = decay_of(b_prefix)
            b_qd = b_q * b_decay
            b_kd = b_k * b_decay
            b_decay = decay_of(b_before)[:, None]
            tl.store(q_in + o_out, (b_qd * b_decay).to(dtype))
            tl.store(k_in + o_out, (b_kd * b_decay).to(dtype))
            for b in tl.static_range(a):
                b_key = ends[b]
                if b + 1 < a:
                    b_between = tl.zeros([BLOCK], tl.float32)
                    for c in tl.static_range(b + 1, a):
                        b_between += totals[c]
                    b_key = b_key * decay_of(b_between)[:, None]
                b_pairs = found[a * (a + 1) // 2 + b] + pairs(b_key, b_qd, b_kd, dtype, PRECISION)
                found = replaced(found, a * (a + 1) // 2 + b, b_pairs)
            b_pairs = pairs_of_block(
                b_q, b_k, b_g, b_prefix, b_qd, b_kd, found[a * (a + 1) // 2 + a], dtype, PRECISION
            )
            found = replaced(found, a * (a + 1) // 2 + a, b_pairs)
            ends = replaced(ends, a, b_end)
            b_total = tl.sum(b_g, 1)
            totals = replaced(totals, a, b_total)
            b_before += b_total
        tl.store(decay + place * BK + o_k, decay_of(b_before))
        b_behind = tl.zeros([BLOCK], tl.float32)
        for a in tl.static_range(TILES - 1, -1, -1):
            o_out = (o_i + a * TILE)[None, :] * BK + o_k[:, None]
            tl.store(k_out + o_out, (ends[a] * decay_of(b_behind)[:, None]).to(dtype))
            b_behind += totals[a]

    for a in tl.static_range(TILES):
        for b in tl.static_range(TILES):
            o_pairs = (o_i + a * TILE)[None, :] * C + (o_i + b * TILE)[:, None]
            if b > a:
                tl.store(queries + o_pairs, tl.zeros([TILE, TILE], dtype))
            else:
                b_pairs = found[a * (a + 1) // 2 + b].reshape([TILE, TILE, 2])
                b_queries, b_keys = tl.split(b_pairs)  # transposed
                tl.store(queries + o_pairs, b_queries.to(dtype))
                tl.store(keys + o_pairs, b_keys.to(dtype))
