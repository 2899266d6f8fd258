"""The triangular system of a chunk and its adjoint.

Corrected values v' = β w solve (I + A β) w = v − k_in S.  With the one matrix Y = A (I + β A)⁻¹,
strictly lower, the system and the adjoint one, of the gradient p of v', are

    w = m − Y β m,  m = v − k_in S          u = p − Yᵀ β p

and nothing is ever divided by β.  The products U and W of the WY form are not needed, for the
state is applied before Y is.  The gradients are outer products over tokens:

    dv = β u    dβ_i = u_i·w_i    dM_ij = do_i·w_j β_j    dA_ij = −β_i u_i·w_j β_j
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.kda.activations import beta_backward
from fla.ops.kda.halving import TILE, level_mask
from fla.ops.kda.slots import locate


@triton.jit
def inverse(b_l, PRECISION: tl.constexpr):
    """(I − L)⁻¹ of a strictly lower L [TILE, TILE], in its dtype.

    The inverse X of the blocks of s on the diagonal grows to those of 2s: with L_s the pairs whose
    row lies in the second half and whose column in the first half of such a block,

        X ← X + X L_s X

    which is X + L_1 for s = 1.
    """
    dtype: tl.constexpr = b_l.dtype
    o_t = tl.arange(0, TILE)
    b_x = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0)
    b_x += tl.where(level_mask(0, TILE), b_l, 0.0).to(tl.float32)
    for level in tl.static_range(1, 4):
        b_pairs = tl.where(level_mask(level, TILE), b_l, 0.0).to(dtype)
        b_x16 = b_x.to(dtype)
        b_y = tl.dot(b_x16, b_pairs, input_precision=PRECISION).to(dtype)
        b_x = tl.dot(b_y, b_x16, b_x, input_precision=PRECISION)
    return b_x.to(dtype)


@triton.jit(do_not_specialize=["T", "rows"])
def solve_kernel(
    betas, cu_seqlens, keys, T, rows, HV,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """−Y [C, C] in place of A (``keys``, below the diagonal), of a chunk, in blocks of TILE.

    A warp holds all of them.  With X = (I + β A)⁻¹, Y = A X, and S without the block A_ii,

        S_ij = Σ_{k<i} A_ik X_kj    X_ij = −X_ii β_i S_ij    Y_ij = S_ij + A_ii X_ij    (i > j)
    """
    BLOCKS: tl.constexpr = C // TILE
    i_slot = tl.program_id(0) // HV
    i_hv = tl.program_id(0) % HV
    _, i_c, _, _, live = locate(cu_seqlens, i_slot, rows, T, C)
    if i_c * C >= live:
        return
    dtype: tl.constexpr = keys.dtype.element_ty
    o_t = tl.arange(0, TILE)
    place = (i_slot.to(tl.int64) * HV + i_hv) * C
    p_keys = keys + place * C + o_t[:, None] * C + o_t[None, :]
    m_lower = o_t[None, :] < o_t[:, None]
    r_a = ()  # row by row, as far as the diagonal
    r_beta = ()
    for i in tl.static_range(BLOCKS):
        for j in tl.static_range(i):
            r_a += (tl.load(p_keys + i * TILE * C + j * TILE),)
        b_own = tl.load(p_keys + i * TILE * (C + 1))
        r_a += (tl.where(m_lower, b_own, 0.0).to(dtype),)
        r_beta += (-tl.load(betas + place + i * TILE + o_t)[:, None],)
    r_own = ()
    for i in tl.static_range(BLOCKS):
        r_own += (inverse((r_a[i * (i + 3) // 2] * r_beta[i]).to(dtype), PRECISION),)
    r_x = ()
    for i in tl.static_range(BLOCKS):
        p_row = p_keys + i * TILE * C
        b_own = r_a[i * (i + 3) // 2]
        for j in tl.static_range(i):
            b_s = tl.zeros([TILE, TILE], tl.float32)
            for k in tl.static_range(j, i):
                b_s = tl.dot(
                    r_a[i * (i + 1) // 2 + k],
                    r_x[k * (k + 1) // 2 + j],
                    b_s,
                    input_precision=PRECISION,
                )
            b_x = tl.dot(r_own[i], (b_s * r_beta[i]).to(dtype), input_precision=PRECISION)
            r_x += (b_x.to(dtype),)
            b_s = tl.dot(b_own, b_x.to(dtype), b_s, input_precision=PRECISION)
            tl.store(p_row + j * TILE, (-b_s).to(dtype))
        r_x += (r_own[i],)
        b_y = tl.dot(b_own, r_own[i], input_precision=PRECISION)
        tl.store(p_row + i * TILE, (-b_y).to(dtype))
        for j in tl.static_range(i + 1, BLOCKS):
            tl.store(p_row + j * TILE, tl.zeros([TILE, TILE], dtype))


@triton.jit
def zero_rows(p, m_t, width, BLOCK: tl.constexpr):
    """Zero ``width`` elements of each row at ``p`` that is there."""
    for at in range(0, width, BLOCK):
        o_x = at + tl.arange(0, BLOCK)
        b_zero = tl.zeros([m_t.shape[0], BLOCK], p.dtype.element_ty)
        tl.store(p[:, None] + o_x[None, :], b_zero, m_t[:, None] & (o_x < width)[None, :])


@triton.jit(do_not_specialize=["T", "rows"])
def adjoint_kernel(
    do, beta, cu_seqlens, betas, values, solved, dv, dbeta, dqueries, dkeys, own,
    T, rows, HV, V,
    C: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    BETA_SIGMOID: tl.constexpr, BETA_RANGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of v and β, and of the pairs of one chunk and value head (see the module).

    Reads do, and of the scans w (``values``) and u (``solved``) [C, VP].  Writes dv, dβ, and dM and
    dA as symmetric matrices [C, C] with zero diagonals, that of dM aside as ``own`` [C].
    """
    i_slot = tl.program_id(0) // HV
    i_hv = tl.program_id(0) % HV
    _, i_c, start, length, live = locate(cu_seqlens, i_slot, rows, T, C)
    if i_c * C >= length:
        return
    dtype: tl.constexpr = dkeys.dtype.element_ty
    o_c = tl.arange(0, C)
    m_t = i_c * C + o_c < length
    token = start + i_c * C + o_c
    if i_c * C >= live:  # padding has no gradient
        zero_rows(dv + (token * HV + i_hv) * V, m_t, V, BV)
        tl.store(dbeta + token * HV + i_hv, tl.zeros([C], dbeta.dtype.element_ty), m_t)
        return

    place = (i_slot.to(tl.int64) * HV + i_hv) * C + o_c
    b_beta = tl.load(betas + place)
    b_dbeta = tl.zeros([C], tl.float32)
    b_own = tl.zeros([C], tl.float32)
    b_ow = tl.zeros([C, C], tl.float32)
    b_wo = tl.zeros([C, C], tl.float32)
    b_uw = tl.zeros([C, C], tl.float32)
    b_wu = tl.zeros([C, C], tl.float32)
    for i_v in range(VP // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = m_t[:, None] & (o_v < V)[None, :]
        o_tokens = (token[:, None] * HV + i_hv) * V + o_v[None, :]
        o_padded = place[:, None] * VP + o_v[None, :]
        b_do = tl.load(do + o_tokens, m_v, 0).to(dtype)  # [C, BV]
        b_w = tl.load(values + o_padded)
        b_u = tl.load(solved + o_padded)
        b_ow = tl.dot(b_do, tl.trans(b_w), b_ow, input_precision=PRECISION)
        b_wo = tl.dot(b_w, tl.trans(b_do), b_wo, input_precision=PRECISION)
        b_uw = tl.dot(b_u, tl.trans(b_w), b_uw, input_precision=PRECISION)
        b_wu = tl.dot(b_w, tl.trans(b_u), b_wu, input_precision=PRECISION)
        b_own += tl.sum(b_do.to(tl.float32) * b_w.to(tl.float32), 1)
        b_dbeta += tl.sum(b_u.to(tl.float32) * b_w.to(tl.float32), 1)
        b_dv = b_u.to(tl.float32) * b_beta[:, None]
        tl.store(dv + o_tokens, b_dv.to(dv.dtype.element_ty), m_v)

    tl.store(own + place, b_own * b_beta)
    b_raw = tl.load(beta + token * HV + i_hv, m_t, 0).to(tl.float32)
    b_dbeta = beta_backward(b_raw, b_dbeta, BETA_SIGMOID, BETA_RANGE)
    tl.store(dbeta + token * HV + i_hv, b_dbeta.to(dbeta.dtype.element_ty), m_t)
    m_lower = o_c[None, :] < o_c[:, None]
    m_own = o_c[None, :] == o_c[:, None]
    o_pairs = place[:, None] * C + o_c[None, :]
    b_pairs = tl.where(m_lower, b_ow * b_beta[None, :], b_wo * b_beta[:, None])
    tl.store(dqueries + o_pairs, tl.where(m_own, 0.0, b_pairs).to(dtype))
    b_pairs = tl.where(m_lower, b_uw, b_wu) * b_beta[:, None] * -b_beta[None, :]
    tl.store(dkeys + o_pairs, tl.where(m_own, 0.0, b_pairs).to(dtype))
