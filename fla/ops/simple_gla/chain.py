"""The pass that carries the state: forward, and backward as three passes of the same kind.

A pass walks queries x, keys y and values z of a head, chunk by chunk, with a state S [X, Z]:

    out_i = Σ_{j ⪯ i} w_ij (x_i·y_j) z_j        w_ij = exp of the log-decays between j and i

The forward pass is (q, k, v).  Its gradients are passes too: dq is that of (do, v, k) in the same
order of time; dk that of (v, do, q) and dv that of (k, q, do) in the opposite order, where a
token's own decay lies behind it instead of before it.

The normaliser is one more column of ones on v: forward the output's extra column is scale q·z, and
in the products do·v of the gradients there is one more pair of factors.

Blocks may be *turned*, tokens along columns: then the tensor cores take the state from registers
and the attention block from shared memory, instead of the other way round.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.common.kernels import (
    cdiv,
    chunks_in,
    multiprocessors,
    operand,
    power,
    power_of_two,
    product,
    sequence,
    sequences_in,
)
from fla.ops.common.sequences import Sequences
from fla.ops.simple_gla.decay import CHUNK, MARK, mark_slots
from fla.ops.simple_gla.segments import join, states_between

NORMALIZER_EPS = tl.constexpr(1e-10)
# Columns of the block of ones that stands for the normaliser: the fewest that a product takes.
_ONES = tl.constexpr(16)


@triton.jit
def _load(p, mask, MASKED: tl.constexpr):
    """Zeros where the mask says so; no mask at all where it could only say yes."""
    if MASKED:
        return tl.load(p, mask=mask, other=0.0)
    return tl.load(p)


@triton.jit
def _pair(p, o_c, m_t, swap, WIDTH: tl.constexpr, FIRST: tl.constexpr, MASKED: tl.constexpr):
    """Two of a chunk's vectors [C] from rows of WIDTH at p; with ``swap`` the other one first."""
    o_2 = FIRST + tl.where(swap, 1 - tl.arange(0, 2), tl.arange(0, 2))
    b_pair = _load(p + o_c[:, None] * WIDTH + o_2[None, :], m_t[:, None], MASKED)  # [C, 2]
    return tl.split(b_pair)


@triton.jit
def _first(b, TURNED: tl.constexpr):
    """A vector along the first side of a block, its second where blocks are turned."""
    if TURNED:
        b = b[None, :]
    else:
        b = b[:, None]
    return b


@triton.jit
def _second(b, TURNED: tl.constexpr):
    """A vector along the second side of a block, its first where blocks are turned."""
    if TURNED:
        b = b[:, None]
    else:
        b = b[None, :]
    return b


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr, TURNED: tl.constexpr):
    """acc + a @ b of blocks that are as they should be, or all turned."""
    if TURNED:
        acc = product(b, a, acc, PRECISION)
    else:
        acc = product(a, b, acc, PRECISION)
    return acc


@triton.jit
def _load_state(p, p_extra, o_s, o_e, m_s, m_e, NORMALIZE: tl.constexpr):
    b_s = tl.load(p + o_s, mask=m_s, other=0.0).to(tl.float32)
    b_e = tl.zeros(o_e.shape, tl.float32)
    if NORMALIZE:
        b_e = tl.load(p_extra + o_e, mask=m_e, other=0.0).to(tl.float32)
    return b_s, b_e


@triton.jit
def _store_state(p, p_extra, o_s, o_e, m_s, m_e, b_s, b_e, NORMALIZE: tl.constexpr):
    tl.store(p + o_s, b_s.to(p.dtype.element_ty), mask=m_s)
    if NORMALIZE:
        tl.store(p_extra + o_e, b_e.to(p.dtype.element_ty), mask=m_e)


@triton.jit
def _mark(
    marks, c, chunks, role, reverse, o_s, o_e, m_s, m_e, b_s, b_e,
    STRIDE: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Before chunk c, leave the state behind where a block of M chunks begins on the way."""
    border = tl.where(reverse, (c % M == M - 1) | (c == chunks - 1), c % M == 0)
    if border & (role < 2):
        at = marks + tl.where(reverse, c // M + 1, c // M).to(tl.int64) * STRIDE
        _store_state(at, at + SIZE, o_s, o_e, m_s, m_e, b_s, b_e, NORMALIZE)


@triton.jit
def _silence(
    out, new_norm, t, there, i_x, i_z, tokens,
    H: tl.constexpr, Z: tl.constexpr, C: tl.constexpr, BZ: tl.constexpr,
):  # fmt: skip
    """Zeros for tokens that belong to no sequence."""
    o_c = tl.arange(0, C)
    o_z = i_z * BZ + tl.arange(0, BZ)
    token = (t + o_c).to(tl.int64)
    p_out = out + o_z[:, None] + token[None, :] * (H * Z)  # [BZ, C]
    mask = (o_z < Z)[:, None] & (o_c < there)[None, :]
    tl.store(p_out, tl.zeros([BZ, C], out.dtype.element_ty), mask=mask)
    if new_norm is not None:
        p_norm = new_norm + (i_x * tokens.to(tl.int64) + token) * H
        tl.store(p_norm, tl.zeros([C], tl.float32), mask=(o_c < there) & (i_z == 0))


@triton.jit
def _step(
    b_s, b_e, s_kept, x, y, z, out, beside, rows, factors, new_norm, decays, rest, t, there,
    query_factor, pair_factor, key_factor, role, reverse, i_x, i_z, tokens,
    H: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr, BX: tl.constexpr,
    BZ: tl.constexpr, PRECISION: tl.constexpr, NORMALIZE: tl.constexpr, RUN: tl.constexpr,
    TURNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One chunk, of ``there`` tokens from t: write its output, take its keys into the state."""
    D: tl.constexpr = y.dtype.element_ty
    SIZES: tl.constexpr = 0 if TURNED else 1  # the side of a block that is not tokens
    after = role > 0
    token = t.to(tl.int64)
    o_c = tl.arange(0, C)
    o_x = i_x * BX + tl.arange(0, BX)
    o_z = i_z * BZ + tl.arange(0, BZ)
    m_t = o_c < there
    m_xt = m_t[:, None] & (o_x < X)[None, :]
    m_zt = _first(m_t, TURNED) & _second(o_z < Z, TURNED)
    p_x = o_c[:, None] * (H * X) + o_x[None, :]  # [C, BX]
    p_z = _first(o_c, TURNED) * (H * Z) + _second(o_z, TURNED)  # [C, BZ]
    MASK_X: tl.constexpr = MASKED or X % BX != 0
    MASK_Z: tl.constexpr = MASKED or Z % BZ != 0
    b_y = _load(y + token * (H * X) + p_x, m_xt, MASK_X)
    b_z = _load(z + token * (H * Z) + p_z, m_zt, MASK_Z)
    if PRECISION is not None:
        b_y, b_z = b_y.to(tl.float32), b_z.to(tl.float32)
    if decays is not None:
        p_decays = decays + token * 4
        o_4 = tl.arange(0, 4)
        o_4 = tl.where(after, o_4 ^ 1, o_4)
        b_four = _load(p_decays + o_c[:, None] * 4 + o_4[None, :], m_t[:, None], MASKED)  # [C, 4]
        b_even, b_odd = tl.split(tl.reshape(b_four, [C, 2, 2]))
        b_to, w_to = tl.split(b_even)
        _, w_from = tl.split(b_odd)
        s_all = tl.load(p_decays + 2) * tl.load(p_decays + 3)  # the same from every token
        b_span = _first(b_to, TURNED) - _second(b_to, TURNED)
        if rest is not None:
            b_rest, _ = _pair(rest + token * 2, o_c, m_t, after, 2, 0, MASKED)
            b_span += _first(b_rest, TURNED) - _second(b_rest, TURNED)
    b_ones = tl.full([C, _ONES], 1.0, D if PRECISION is None else tl.float32)
    b_key = tl.full([C], 1.0, tl.float32)
    if key_factor is not None:
        b_key *= key_factor
    if factors is not None:
        b_n, b_d = _pair(factors + token * 2, o_c, m_t, False, 2, 0, MASKED)
        b_key *= tl.where(role == 0, 1.0, b_n)
        b_x_extra = tl.where(role == 0, b_d, tl.where(role == 1, 1.0, 0.0))
        b_y_extra = tl.where(role == 1, b_d, tl.where(role == 0, 1.0, 0.0))
        b_x_extra = tl.where(i_x == 0, b_x_extra, 0.0)

    if RUN:
        b_x = _load(x + token * (H * X) + p_x, m_xt, MASK_X)
        if PRECISION is not None:
            b_x = b_x.to(tl.float32)
        if rows is not None:
            m_w = m_zt & (role < 2)
            b_w = tl.load(beside + token * (H * Z) + p_z, mask=m_w, other=0.0)
        if TURNED:
            b_a = product(b_y, tl.trans(b_x), None, PRECISION)  # [C keys, C queries]
            b_o = product(operand(b_s, D, PRECISION), tl.trans(b_x), None, PRECISION)  # [BZ, C]
        else:
            b_o = product(b_x, operand(b_s, D, PRECISION), None, PRECISION)  # [C, BZ]
            b_a = product(b_x, tl.trans(b_y), None, PRECISION)  # [C queries, C keys]
        if factors is not None:
            b_a += _second(b_y_extra, TURNED) * _first(b_x_extra, TURNED)
            b_a *= _second(tl.where(role == 0, 1.0, b_n), TURNED)
            b_o += _second(b_e, TURNED) * _first(b_x_extra, TURNED)
        # dq and dk round the same products, so that these cancel in the gate's gradient
        b_a *= pair_factor
        o_i = tl.where(reverse, C - 1 - o_c, o_c)  # [C] in the order of the pass
        b_a = tl.where(_second(o_i, TURNED) <= _first(o_i, TURNED), b_a, 0.0)
        if decays is not None:
            b_a *= power(b_span)
            b_o *= _first(w_to * query_factor, TURNED)
        else:
            b_o *= query_factor
        b_o = _product(operand(b_a, D, PRECISION), b_z, b_o, PRECISION, TURNED)
        if factors is not None:
            b_o *= _first(tl.where(role == 0, b_n, 1.0), TURNED)
        if new_norm is not None:
            b_n = product(b_x, operand(b_e, D, PRECISION), None, PRECISION)  # [C, ONES]
            b_n *= query_factor
            if decays is not None:
                b_n *= w_to[:, None]
            b_n = product(operand(b_a, D, PRECISION), b_ones, b_n, PRECISION)
            b_n = tl.max(b_n, 1)  # [C], all columns are the same
            if X <= BX:
                b_n += NORMALIZER_EPS
                b_o /= b_n[:, None]
            if i_z == 0:
                tl.store(new_norm + (i_x * tokens.to(tl.int64) + token + o_c) * H, b_n, mask=m_t)
        p_out = out + token * (H * Z) + p_z
        if MASK_Z:
            tl.store(p_out, b_o.to(out.dtype.element_ty), mask=m_zt)
        else:
            tl.store(p_out, b_o.to(out.dtype.element_ty))
        if rows is not None:
            b_r = tl.sum(b_o * b_w.to(tl.float32), SIZES)  # [C]
            tl.store(rows + token + o_c, b_r, mask=m_t & (role < 2))

    if decays is not None:
        b_key *= w_from
        b_s *= s_all
        s_kept *= s_all
        if NORMALIZE:
            b_e *= s_all
    b_v = b_z
    if (decays is not None) or (key_factor is not None):
        b_v = operand(b_z * _first(b_key, TURNED), D, PRECISION)
    if NORMALIZE:
        if factors is None:
            b_k = operand(b_ones * b_key[:, None], D, PRECISION)
            b_e = product(tl.trans(b_y), b_k, b_e, PRECISION)  # [BX, ONES]
        else:
            b_z_extra = b_z.to(tl.float32) * _first(b_key * b_y_extra, TURNED)
            b_e += tl.sum(b_z_extra, 1 - SIZES)
    b_y = b_y if TURNED else tl.trans(b_y)
    if rows is not None:
        b_l = operand(b_z * _first(b_key, TURNED) - b_v.to(tl.float32), D, PRECISION)
        b_s = _product(b_y, b_l, b_s, PRECISION, TURNED)
    b_s = _product(b_y, b_v, b_s, PRECISION, TURNED)
    return b_s, b_e, s_kept


@triton.jit
def _walk(
    x, y, z, out, beside, rows, marks, ends, against, against_extra, has_against,
    factors, new_norm, decays, rest, start, start_extra, has_start, end, end_extra, has_end, carry, kept, has_carry, cu_seqlens,
    query_factor, pair_factor, key_factor, role, reverse, by_rows,
    N, T, tokens, i_h, i_x, i_z, i_s, segment,
    H: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """One pass of one head: a block of the state [BZ, BX] in registers, over one segment.

    role: 0 in the forward order of time (o, dq), 1 for dk and 2 for dv in the opposite one.
    ``kept`` says that the segment is summarised, not run: its state goes to ``carry``.
    For the gate's gradient there are ``rows``, Σ out ∘ beside, and states of the forward pass beside
    those of the gradient: ``marks`` along the way and, at the end of it, ⟨S, against⟩ in ``ends``.
    The output of several blocks of x is left for ``combine_kernel`` to add up.
    """
    RUN: tl.constexpr = kept is None
    FORWARD: tl.constexpr = factors is None  # where normalised: keys are y, backward they are z
    E: tl.constexpr = K if NORMALIZE else 0
    SIZE: tl.constexpr = X * Z + E  # of a state with its extra vector behind it
    o_x = i_x * BX + tl.arange(0, BX)
    o_z = i_z * BZ + tl.arange(0, BZ)
    # The state is [BX, BZ], turned [BZ, BX].
    b_ox, b_oz = _first(o_x, TURNED), _second(o_z, TURNED)
    m_s = (b_ox < X) & (b_oz < Z)
    p_s = tl.where(by_rows, b_oz * X + b_ox, b_ox * Z + b_oz)
    p_m = b_oz * X + b_ox if TURNED else b_ox * Z + b_oz
    if FORWARD:  # the same in every column
        o_ones = tl.arange(0, _ONES)
        o_e = o_x[:, None] + 0 * o_ones[None, :]  # [BX, ONES]
        m_e = o_e < X
        m_e_store = m_e & (o_ones == 0)[None, :] & (i_z == 0)
    else:
        o_e = o_z
        m_e = (o_z < Z) & (role < 2)
        m_e_store = m_e & (i_x == 0)
    y += i_h * X
    z += i_h * Z
    carry += (i_s * H + i_h).to(tl.int64) * SIZE
    if decays is not None:
        decays += i_h.to(tl.int64) * tokens * 4
    if rest is not None:
        rest += i_h.to(tl.int64) * tokens * 2
    if factors is not None:
        factors += i_h.to(tl.int64) * tokens * 2
    if RUN:
        x += i_h * X
        out += i_x * tokens.to(tl.int64) * (H * Z) + i_h * Z
    if new_norm is not None:
        new_norm += i_h
    if rows is not None:
        beside += i_h * Z
        rows += i_h.to(tl.int64) * tokens

    first, last = sequences_in(cu_seqlens, N, T, tokens, i_s * segment, (i_s + 1) * segment)
    for i_n in range(first, last):
        bos, length, live = sequence(cu_seqlens, i_n, N, T, tokens)
        c_first, c_last, chunks = chunks_in(bos, length, i_s * segment, (i_s + 1) * segment, C)
        here = (c_first < c_last) | (chunks == 0)
        opens = here & tl.where(reverse, c_last == chunks, c_first == 0)
        closes = here & tl.where(reverse, c_first == 0, c_last == chunks)
        o_n = (i_n * H + i_h).to(tl.int64)
        m_start = opens & (has_start != 0) & (i_n < N)
        b_s, b_e = _load_state(
            start + o_n * (X * Z), start_extra + o_n * E, p_s, o_e, m_s & m_start, m_e & m_start,
            NORMALIZE,
        )  # fmt: skip
        s_kept = tl.where(opens, 0.0, 1.0)
        if RUN:
            if here & (opens == 0) & (has_carry != 0):
                b_s, b_e = _load_state(carry, carry + X * Z, p_s, o_e, m_s, m_e, NORMALIZE)
        else:
            c_last = tl.where(here & (closes == 0), c_last, c_first)  # nobody asks for the others
        if marks is not None:
            mark = marks + ((bos // (M * C) + 2 * i_n).to(tl.int64) * H + i_h) * SIZE

        # A chunk that is not full is the sequence's last: the first one on the way back.
        tail = (c_first < c_last) & (c_last * C > length)
        full = tl.where(live > 0, tl.maximum(c_last - c_first - tail.to(tl.int32), 0), 0)
        for turn in range(0, 2):
            if (turn == 0) == reverse:
                if tail & (live > 0):
                    c = c_last - 1
                    if marks is not None:
                        _mark(
                            mark, c, chunks, role, reverse, p_m, o_e, m_s, m_e_store, b_s, b_e,
                            H * SIZE, X * Z, M, NORMALIZE,
                        )  # fmt: skip
                    b_s, b_e, s_kept = _step(
                        b_s, b_e, s_kept, x, y, z, out, beside, rows, factors, new_norm, decays,
                        rest, bos + c * C, length - c * C, query_factor, pair_factor, key_factor, role, reverse,
                        i_x, i_z, tokens, H, X, Z, C, BX, BZ, PRECISION, NORMALIZE, RUN, TURNED,
                        True,
                    )  # fmt: skip
            else:
                for i in range(0, full):
                    c = tl.where(reverse, c_first + full - 1 - i, c_first + i)
                    if marks is not None:
                        _mark(
                            mark, c, chunks, role, reverse, p_m, o_e, m_s, m_e_store, b_s, b_e,
                            H * SIZE, X * Z, M, NORMALIZE,
                        )  # fmt: skip
                    b_s, b_e, s_kept = _step(
                        b_s, b_e, s_kept, x, y, z, out, beside, rows, factors, new_norm, decays,
                        rest, bos + c * C, C, query_factor, pair_factor, key_factor, role, reverse,
                        i_x, i_z, tokens, H, X, Z, C, BX, BZ, PRECISION, NORMALIZE, RUN, TURNED,
                        False,
                    )  # fmt: skip
        if RUN and cu_seqlens is not None:
            if i_n == N:
                for c in range(c_first, c_last):
                    _silence(
                        out, new_norm, bos + c * C, length - c * C, i_x, i_z, tokens,
                        H, Z, C, BZ,
                    )  # fmt: skip

        if RUN:
            if closes & (has_end != 0) & (i_n < N):
                at = end + o_n * (X * Z)
                _store_state(at, end_extra + o_n * E, p_s, o_e, m_s, m_e_store, b_s, b_e, NORMALIZE)
            if ends is not None:
                if closes & (role < 2) & (i_n < N):
                    b_t, b_f = _load_state(
                        against + o_n * (X * Z), against_extra + o_n * E, p_s, o_e,
                        m_s & (has_against != 0), m_e_store & (has_against != 0), NORMALIZE,
                    )  # fmt: skip
                    s_end = tl.sum(b_s * b_t)
                    if NORMALIZE:
                        s_end += tl.sum(b_e * b_f)
                    tl.store(ends + i_n * H + i_h, s_end)
        else:
            if here & (closes == 0):
                _store_state(carry, carry + X * Z, p_s, o_e, m_s, m_e_store, b_s, b_e, NORMALIZE)
                if (i_z == 0) & (i_x == 0):
                    tl.store(kept + i_s * H + i_h, s_kept)


@triton.jit
def _place(pid, X: tl.constexpr, Z: tl.constexpr, heads, BX: tl.constexpr, BZ: tl.constexpr):
    """Which block of z and of x, which head and which segment; neighbours read the same tokens."""
    blocks: tl.constexpr = (Z + BZ - 1) // BZ
    parts: tl.constexpr = (X + BX - 1) // BX
    i_x = 0 if parts == 1 else pid // blocks % parts
    rest = pid // (blocks * parts)
    return pid % blocks, i_x, rest % heads, rest // heads


_VARYING = [
    "N", "T", "tokens", "segment", "reverse", "scale", "has_start", "has_end", "has_carry",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    q, k, v, o, norm, decays, rest, start, start_z, has_start, end, end_z, has_end,
    carry, kept, has_carry, cu_seqlens, scale, reverse, N, T, tokens, segment,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, V_FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o, the normaliser and final states; with ``kept`` the summary of each segment instead."""
    pid = tl.program_id(0)
    i_z, i_x, i_h, i_s = _place(pid, K, V, H, BX, BZ)
    _walk(
        q, k, v, o, None, None, None, None, None, None, 0, None, norm, decays, rest,
        start, start_z, has_start, end, end_z, has_end, carry, kept, has_carry, cu_seqlens,
        scale, scale, None, 0, reverse != 0, V_FIRST,
        N, T, tokens, i_h, i_x, i_z, i_s, segment,
        H, K, V, K, C, 1, BX, BZ, PRECISION, NORMALIZE, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_VARYING, "has_dstart", "first_role", "roles", "slots"])
def backward_kernel(
    q, k, v, do, dq, dk, dv, rows, marks, ends, factors, decays, rest, start, start_z, has_start,
    dend, dend_z, has_end, dstart, dstart_z, has_dstart, carry, kept, has_carry,
    cu_seqlens, scale, reverse, first_role, roles, N, T, tokens, segment, slots,
    H: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, K: tl.constexpr, V_FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr, C: tl.constexpr, M: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """``roles`` of dq, dk and dv from ``first_role`` on, side by side in one grid.

    dq and dk have the sizes X = V, Z = K, dv has X = K, Z = V; so all are one launch where K = V.
    """
    pid = tl.program_id(0)
    i_z, i_x, i_h, i_s = _place(pid, X, Z, H * roles, BX, BZ)
    i_h, role = i_h % H, first_role + i_h // H  # dv, which is lighter, fills up at the end
    x, y, z, out, beside = do, v, k, dq, q
    state, extra, has_state = start, start_z, has_start
    against, against_extra, has_against = dend, dend_z, has_end
    if role > 0:
        state, extra, has_state = dend, dend_z, has_end
        against, against_extra, has_against = start, start_z, has_start
    if role == 1:
        x, y, z, out, beside = v, do, q, dk, k
    if role == 2:
        x, y, z, out, beside = k, q, do, dv, v
    query_factor = tl.where(role == 0, scale, 1.0)
    key_factor = tl.where(role == 0, 1.0, scale)
    PARTS: tl.constexpr = (X + BX - 1) // BX
    BLOCKS: tl.constexpr = (Z + BZ - 1) // BZ * PARTS
    # dk and dv carry the same state, dv the transposed one
    which = tl.minimum(role, 1).to(tl.int64)
    SIZE: tl.constexpr = X * Z + (K if NORMALIZE else 0)
    carry += which * tl.cdiv(tokens, segment) * H * SIZE
    if kept is not None:
        kept += which * tl.cdiv(tokens, segment) * H
    if rows is not None:
        rows += (which * BLOCKS + i_z * PARTS + i_x) * H * tokens
        marks += which * slots * H * SIZE
        ends += (which * BLOCKS + i_z * PARTS + i_x) * N * H
    _walk(
        x, y, z, out, beside, rows, marks, ends, against, against_extra, has_against,
        factors, None, decays, rest,
        state, extra, has_state, dstart, dstart_z, (role == 1) & (has_dstart != 0),
        carry, kept, has_carry, cu_seqlens,
        query_factor, scale, key_factor, role, (reverse != 0) != (role > 0), (role < 2) != V_FIRST,
        N, T, tokens, i_h, i_x, i_z, i_s, segment,
        H, X, Z, K, C, M, BX, BZ, PRECISION, NORMALIZE, TURNED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    parts, norm_parts, out, norm, rows,
    Z: tl.constexpr, PARTS: tl.constexpr, BR: tl.constexpr, BZ: tl.constexpr,
):  # fmt: skip
    """out [rows, Z] from its parts [PARTS, rows, Z], normalised where there is a normaliser."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_z = tl.arange(0, BZ)
    m_r = o_r < rows
    mask = m_r[:, None] & (o_z < Z)[None, :]
    size = rows.to(tl.int64)
    b_o = tl.zeros([BR, BZ], tl.float32)
    b_n = tl.zeros([BR], tl.float32)
    for i in tl.static_range(PARTS):
        p_part = parts + (i * size + o_r)[:, None] * Z + o_z[None, :]
        b_o += tl.load(p_part, mask=mask, other=0.0)
        if norm is not None:
            b_n += tl.load(norm_parts + i * size + o_r, mask=m_r, other=0.0)
    if norm is not None:
        b_n += NORMALIZER_EPS
        tl.store(norm + o_r, b_n, mask=m_r)
        b_o /= b_n[:, None]
    tl.store(out + o_r[:, None] * Z + o_z[None, :], b_o.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "H"])
def factors_kernel(
    do, o, norm, factors, tokens, H, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """factors [H, tokens, 2]: 1 / normaliser, and −do·o, its gradient but for that factor."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    m_r = o_r < tokens.to(tl.int64) * H
    p = o_r[:, None] * V + o_v[None, :]  # [BR, BV]
    mask = m_r[:, None] & (o_v < V)[None, :]
    b_do = tl.load(do + p, mask=mask, other=0.0).to(tl.float32)
    b_o = tl.load(o + p, mask=mask, other=0.0).to(tl.float32)
    b_n = tl.load(norm + o_r, mask=m_r, other=1.0)
    p_factors = factors + (o_r % H * tokens + o_r // H) * 2
    tl.store(p_factors, 1.0 / b_n, mask=m_r)
    tl.store(p_factors + 1, -tl.sum(b_do * b_o, 1), mask=m_r)


@dataclasses.dataclass(frozen=True)
class Line:
    """How walks are launched: their block of the state, whether blocks are turned, warps, stages.

    Where shared memory is short there are fewer stages.  ``together`` is how many programs share a
    multiprocessor, ``Z`` the largest z that the line is for.
    """

    BX: int
    BZ: int
    turned: bool
    warps: int
    stages: int
    together: int
    Z: int = 512


# By dtype, the smallest size of x that a line is for first; a larger x falls into blocks of BX.
#
# A step is a chain of small products that wait for each other: three stages keep memory a chunk
# ahead of it, and no line may spill a register inside it, which costs more than all else.
_FORWARD = {
    torch.bfloat16: (
        Line(64, 64, False, 4, 3, 2),
        Line(128, 64, False, 4, 3, 1),  # 128 programs for 64 heads of V = 128
        Line(256, 64, False, 8, 2, 1),  # eight warps hold the state without spilling
    ),
    # Three products for one, or operands of twice the size: blocks of 64 are what registers hold.
    torch.float16: (Line(64, 64, False, 4, 2, 1),),
    torch.float32: (Line(64, 32, False, 4, 2, 1),),
}
_BACKWARD = {
    torch.bfloat16: (
        Line(64, 64, True, 4, 3, 2),
        # a smaller z, and registers for what a normaliser adds
        Line(128, 64, False, 8, 3, 1, Z=64),
        Line(128, 128, True, 8, 3, 1),  # x and y are read once for all of z
        Line(256, 32, False, 8, 2, 1),
    ),
    torch.float16: (Line(64, 64, True, 4, 2, 1),),
    torch.float32: (Line(64, 32, False, 4, 2, 1),),
}
# Intermediate results of fp16 operands may leave the range of fp16: they are tf32, as exact.
_PRECISION = {torch.bfloat16: None, torch.float16: "tf32", torch.float32: "tf32x3"}
_fitting: dict[tuple, int] = {}


@dataclasses.dataclass(frozen=True)
class _Walks:
    """The walks of one launch, of sizes X and Z."""

    line: Line
    dtype: torch.dtype
    X: int
    Z: int

    @classmethod
    @functools.cache
    def of(cls, backward: bool, dtype: torch.dtype, X: int, Z: int, normalize: bool) -> _Walks:
        lines = (_BACKWARD if backward else _FORWARD)[dtype]
        fitting = (line for line in lines if line.BX >= X and (line.Z >= Z or normalize))
        return cls(next(fitting, lines[-1]), dtype, X, Z)

    @functools.cached_property
    def parts(self) -> int:
        """Into how many blocks x falls; each leaves a part of the output."""
        return cdiv(self.X, self.line.BX)

    @functools.cached_property
    def blocks(self) -> int:
        """Into how many blocks a state falls."""
        return self.parts * cdiv(self.Z, self.line.BZ)

    def segment(self, sequences: Sequences, heads: int, device: torch.device) -> int:
        """Tokens a segment: a whole row, or less where that leaves half of the chip idle."""
        many, programs = multiprocessors(device), sequences.B * heads * self.blocks
        chunks = cdiv(sequences.T, CHUNK)
        if programs * 2 <= many:
            chunks = cdiv(chunks, self.line.together * many // programs)
        return min(chunks * CHUNK, sequences.T)

    def launch(self, kernel, programs: int, *arguments, **constants) -> None:
        line = self.line
        key = kernel, line, arguments[0].device
        for stages in range(_fitting.get(key, line.stages), 0, -1):
            try:
                kernel[(programs * self.blocks,)](
                    *arguments,
                    **constants,
                    C=CHUNK,
                    BX=line.BX,
                    BZ=line.BZ,
                    PRECISION=_PRECISION[self.dtype],
                    num_warps=line.warps,
                    num_stages=stages,
                )
                return
            except triton.OutOfResources:
                if stages == 1:
                    raise
                _fitting[key] = stages - 1

    def outputs(self, *outs: Tensor) -> tuple[Tensor, ...]:
        """What walks write: ``outs``, or fp32 parts of each for ``combine``."""
        if self.parts == 1:
            return outs
        return tuple(out.new_empty(self.parts, *out.shape, dtype=torch.float32) for out in outs)

    def combine(
        self,
        parts: Tensor,
        out: Tensor,
        norm_parts: Tensor | None = None,
        norm: Tensor | None = None,
    ) -> None:
        if self.parts == 1:
            return
        rows, BZ = out.numel() // self.Z, power_of_two(self.Z)
        BR = max(2048 // BZ, 1)
        combine_kernel[(cdiv(rows, BR),)](
            parts, norm_parts, out, norm, rows, Z=self.Z, PARTS=self.parts, BR=BR, BZ=BZ
        )


def run_forward(sequences: Sequences, q, k, v, decays, rest, state, z, options):
    """Return o [B, T, H, V], the final state and z and the normaliser; None for what is not."""
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    tokens = sequences.B * sequences.T
    walks = _Walks.of(False, q.dtype, K, V, options.normalize)
    segment = walks.segment(sequences, H, q.device)
    segments = cdiv(tokens, segment)
    nothing = q.new_empty(0, dtype=torch.float32)
    o = torch.empty_like(v)
    (o_out,) = walks.outputs(o)
    norm = norm_out = end = end_z = None
    if options.normalize:
        norm = q.new_empty(q.shape[:3], dtype=torch.float32)
        (norm_out,) = walks.outputs(norm)
    if options.output_final_state:
        end, end_z = _states(q, sequences.N, V, options)
    start, start_z = _start(state, z, q, sequences.N, V, options, nothing)
    carry, kept = states_between(segments, H, K * V + K * options.normalize, 1, nothing)

    def walk(norm, kept):
        walks.launch(
            forward_kernel, segments * H,
            q, k, v, o_out, norm, decays, rest, start, start_z, int(start is not nothing),
            nothing if end is None else end, nothing if end_z is None else end_z,
            int(end is not None), carry, kept, int(segments > 1), sequences.cu_seqlens,
            options.scale, int(options.reverse), sequences.N, sequences.T, tokens, segment,
            H=H, K=K, V=V, V_FIRST=options.state_v_first, NORMALIZE=options.normalize,
        )  # fmt: skip

    if kept is not None:
        walk(None, kept)
        join(carry[0], kept[0], options.reverse)
    walk(norm_out, None)
    walks.combine(o_out, o, norm_out, norm)
    return o, end, end_z, norm


def run_backward(
    sequences: Sequences, do, dend, dend_z, q, k, v, decays, rest, state, z, o, norm, options, gate
):
    """Return dq, dk, dv, the gradients of initial state and z in fp32, and what is for the gate.

    That is rows, marks and ends, None without ``gate``.
    """
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    tokens = sequences.B * sequences.T
    # (first pass, how many, X, Z) of each launch
    launches = [(0, 3, V, K)] if K == V else [(0, 2, V, K), (2, 1, K, V)]
    walks = _Walks.of(True, q.dtype, V, K, options.normalize)
    segment = walks.segment(sequences, launches[0][1] * H, q.device)
    segments = cdiv(tokens, segment)
    nothing = q.new_empty(0, dtype=torch.float32)
    size = K * V + K * options.normalize
    dstart = dstart_z = factors = rows = marks = ends = None
    if state is not None or z is not None:
        dstart, dstart_z = _states(q, sequences.N, V, options)
    start, start_z = _start(_wide(state), _wide(z), q, sequences.N, V, options, nothing)
    end, end_z = _start(dend, dend_z, q, sequences.N, V, options, nothing)
    if options.normalize:
        factors = q.new_empty(H, tokens, 2, dtype=torch.float32)
        BV = power_of_two(V)
        BR = max(2048 // BV, 1)
        factors_kernel[(cdiv(tokens * H, BR),)](do, o, norm, factors, tokens, H, V=V, BR=BR, BV=BV)
    if gate:
        rows = q.new_empty(2, walks.blocks, H, tokens, dtype=torch.float32)
        marks = q.new_empty(2, mark_slots(sequences), H, size)
        ends = q.new_empty(2, walks.blocks, sequences.N, H, dtype=torch.float32)
    carry, kept = states_between(segments, H, size, 2, nothing)

    def walk(walks, first, passes, outs, for_gate, kept):
        walks.launch(
            backward_kernel, segments * H * passes,
            q, k, v, do, *outs, *for_gate, factors, decays, rest,
            start, start_z, int(start is not nothing), end, end_z, int(end is not nothing),
            nothing if dstart is None else dstart, nothing if dstart_z is None else dstart_z,
            int(dstart is not None), carry, kept, int(segments > 1), sequences.cu_seqlens,
            options.scale, int(options.reverse), first, passes, sequences.N, sequences.T,
            tokens, segment, 0 if marks is None else marks.shape[1],
            H=H, X=walks.X, Z=walks.Z, K=K, V_FIRST=options.state_v_first,
            NORMALIZE=options.normalize, M=MARK, TURNED=walks.line.turned,
        )  # fmt: skip

    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if kept is not None:
        walk(walks, 0, 2, grads, (None, None, None), kept)
        join(carry[0], kept[0], options.reverse)
        join(carry[1], kept[1], not options.reverse)
    for first, passes, X, Z in launches:
        walks = _Walks.of(True, q.dtype, X, Z, options.normalize)
        outs = walks.outputs(*grads[first : first + passes])
        # a pass that is not in this launch writes nothing, but wants a tensor like the others
        places = [outs[max(0, min(i - first, passes - 1))] for i in range(3)]
        for_gate = (rows, marks, ends) if first == 0 else (None, None, None)
        walk(walks, first, passes, places, for_gate, None)
        for parts, grad in zip(outs, grads[first:], strict=False):
            walks.combine(parts, grad)
    return *grads, dstart, dstart_z, (rows, marks, ends)


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _states(q: Tensor, N: int, V: int, options) -> tuple[Tensor, Tensor | None]:
    """New fp32 states in the caller's layout, and their z where there is a normaliser."""
    H, K = q.shape[2:]
    tail = (V, K) if options.state_v_first else (K, V)
    state = q.new_empty(N, H, *tail, dtype=torch.float32)
    return state, q.new_empty(N, 1, H, K, dtype=torch.float32) if options.normalize else None


def _start(state, z, q: Tensor, N: int, V: int, options, nothing: Tensor):
    """The state and z to start from, zeros for a missing one; ``nothing`` where both are."""
    if state is None and z is None:
        return nothing, nothing
    H, K = q.shape[2:]
    if state is None:
        state = z.new_zeros(N, H, K, V)
    if options.normalize and z is None:
        z = state.new_zeros(N, 1, H, K)
    return state.contiguous(), nothing if z is None else z.contiguous()
