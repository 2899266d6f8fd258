"""The walk over time that carries a state in registers: the output, and each gradient.

Queries x, keys y and values z of a head, chunk by chunk, with a state S [X, Z]:

    out_i = scale Σ_{j ⪯ i} w_ij (x_i·y_j) z_j          w_ij = exp of the log-decays between j and i

The output is the walk of (q, k, v).  Its gradients are walks too: dq is that of (do, v, k) in the
same order of time; dk that of (v, do, q) and dv that of (k, q, do) in the opposite order, where a
token's own decay lies behind it instead of before it.

The normaliser, of calls without a gate, is one more column of ones on v: the output's is scale q·z,
and in the products do·v of the gradients there is one more pair of factors, dnorm and 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.common.kernels import (
    LOG2E,
    cdiv,
    chunks_in,
    operand,
    power,
    product,
    sequence,
    sequences_in,
)
from fla.ops.common.launch import launch
from fla.ops.simple_gla.blocks import Call, Line, pair_weights, seen, steep, step_weights

NORMALIZER_EPS = tl.constexpr(1e-10)


@triton.jit
def load_state(p, o_x, o_z, X: tl.constexpr, Z: tl.constexpr, TURNED: tl.constexpr, m):
    """A block of a state [X, Z], or TURNED [Z, X], in fp32; zero beyond it and without m."""
    m = (o_x < X)[:, None] & (o_z < Z)[None, :] & m
    p += o_z[None, :] * X + o_x[:, None] if TURNED else o_x[:, None] * Z + o_z[None, :]
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def store_state(p, b_s, o_x, o_z, X: tl.constexpr, Z: tl.constexpr, TURNED: tl.constexpr, m):
    m = (o_x < X)[:, None] & (o_z < Z)[None, :] & m
    p += o_z[None, :] * X + o_x[:, None] if TURNED else o_x[:, None] * Z + o_z[None, :]
    tl.store(p, b_s.to(p.dtype.element_ty), mask=m)


@triton.jit
def leading(x, PRECISION: tl.constexpr):
    """The digits of x that an operand holds.

    To convert x and back would take four times as long.
    """
    kept: tl.constexpr = -0x10000 if PRECISION is None else -0x2000
    return (x.to(tl.int32, bitcast=True) & kept).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """x as an operand holds it."""
    half: tl.constexpr = 0x8000 if PRECISION is None else 0x1000
    return leading((x.to(tl.int32, bitcast=True) + half).to(tl.float32, bitcast=True), PRECISION)


@triton.jit(do_not_specialize=["N", "T", "tokens", "segment", "scale"])
def walk_kernel(
    x, y, z, out, new_norm, norm, dnorm, beside, rows, sums, rests, g_gamma,
    start, start_z, carry, end, end_z, cu_seqlens, scale, N, T, tokens, segment,
    H: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr, BX: tl.constexpr,
    BZ: tl.constexpr, GRADIENT: tl.constexpr, TURNED: tl.constexpr, V_FIRST: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The walk of one head with a block [BX, BZ] of the state, from ``start`` to ``end``.

    A program owns a sequence, or, with ``carry`` [segments, H, K V + K], the chunks of all
    sequences that begin in a segment of tokens; there it finds the state that enters.  Where X
    falls into blocks, ``out`` and ``new_norm`` are parts [blocks of X, ...] to be added.

    GRADIENT says that queries are y: for dk and dv.  TURNED says that X is V: for dq and dk.
    ``start`` and ``end`` are then gradients of states, which are held without ``scale``.

    For the gate's gradient ``rows`` [blocks, H, tokens] are out·beside.  It is what is left between
    the rows of two walks: states then keep the digits that the rounding of operands would take, and
    where decays are ``steep``, rows are without tokens' pairs with themselves.
    """
    D: tl.constexpr = x.dtype.element_ty
    NX: tl.constexpr = (X + BX - 1) // BX
    NZ: tl.constexpr = (Z + BZ - 1) // BZ
    BACK: tl.constexpr = REVERSE != GRADIENT
    GATED: tl.constexpr = (sums is not None) or (g_gamma is not None)
    SPLIT: tl.constexpr = rows is not None and PRECISION != "tf32x3"
    KV: tl.constexpr = X * Z + (Z if TURNED else X)  # of a state with z behind it
    pid = tl.program_id(0)
    i_z = pid % NZ
    i_x = pid // NZ % NX
    i_h = pid // (NX * NZ) % H
    unit = pid // (NX * NZ * H)
    o_c = tl.arange(0, C)
    o_x = i_x * BX + tl.arange(0, BX)
    o_z = i_z * BZ + tl.arange(0, BZ)
    p_x = o_c[:, None] * (H * X) + o_x[None, :]  # [C, BX]
    p_z = o_c[:, None] * (H * Z) + o_z[None, :]  # [C, BZ]
    # no mask where it could only say yes
    m_x = True if X % BX == 0 else (o_x < X)[None, :]
    m_z = True if Z % BZ == 0 else (o_z < Z)[None, :]
    s_held = scale if GRADIENT else 1.0
    begin = unit * 0
    stop = tokens
    first = unit
    last = unit + 1
    if carry is not None:
        begin = unit * segment
        stop = tl.minimum(begin + segment, tokens)
        first, last = sequences_in(cu_seqlens, N, T, tokens, begin, stop)
        carry += (unit * H + i_h).to(tl.int64) * KV
    out += i_x * tokens.to(tl.int64) * (H * Z)
    if rows is not None:
        rows += ((i_x * NZ + i_z) * H + i_h) * tokens.to(tl.int64)
    gamma = 0.0
    if g_gamma is not None:
        gamma = tl.load(g_gamma + i_h).to(tl.float32) * LOG2E
        b_w = pair_weights(None, None, gamma, 0, C, 0, C, REVERSE, GRADIENT)
    if sums is not None:
        sums += i_h.to(tl.int64) * tokens
        if rests is not None:
            rests += i_h.to(tl.int64) * tokens

    for i_n in range(first, last):
        bos, length, live = sequence(cu_seqlens, i_n, N, T, tokens)
        c_first, c_last, count = chunks_in(bos, length, begin, stop, C)
        head = (bos >= begin) & (i_n < N)
        tail = (c_last == count) & ((c_first < count) | (length == 0)) & (i_n < N)
        opens = tail if BACK else head
        closes = head if BACK else tail
        at = (i_n * H + i_h).to(tl.int64)
        b_s = tl.zeros([BX, BZ], tl.float32)
        if start is not None:
            p = start + at * (X * Z)
            b_s += load_state(p, o_x, o_z, X, Z, TURNED != V_FIRST, opens) / s_held
        if carry is not None:
            b_s += load_state(carry, o_x, o_z, X, Z, TURNED, (opens == 0) & (i_n < N))
        # z runs along the keys: X in the walk of the output, Z in those of gradients
        o_e = o_x if dnorm is None else o_z
        E: tl.constexpr = X if dnorm is None else Z
        if (new_norm is not None) or (dnorm is not None):
            b_e = tl.zeros([BX if dnorm is None else BZ], tl.float32)
            m_e = (o_e < E) & ((dnorm is None) | (i_x == 0))
            if start_z is not None:
                p = start_z + at * E
                b_e += tl.load(p + o_e, mask=m_e & opens, other=0.0).to(tl.float32) / s_held
            if carry is not None:
                m = m_e & (opens == 0) & (i_n < N)
                b_e += tl.load(carry + X * Z + o_e, mask=m, other=0.0)
        for i in tl.range(0, c_last - c_first, num_stages=STAGES):
            c = c_last - 1 - i if BACK else c_first + i
            there = tl.minimum(live - c * C, C)
            token = (bos + c * C).to(tl.int64)
            m_t = o_c < there
            at_x = (token * H + i_h) * X
            at_z = (token * H + i_h) * Z
            b_x = tl.load(x + at_x + p_x, mask=m_t[:, None] & m_x, other=0.0)
            b_y = tl.load(y + at_x + p_x, mask=m_t[:, None] & m_x, other=0.0)
            b_z = tl.load(z + at_z + p_z, mask=m_t[:, None] & m_z, other=0.0)
            if rows is not None:
                b_beside = tl.load(beside + at_z + p_z, mask=m_t[:, None] & m_z, other=0.0)
            if PRECISION is not None:
                b_x = b_x.to(tl.float32)
                b_y = b_y.to(tl.float32)
                b_z = b_z.to(tl.float32)
            b_h = operand(leading(b_s, PRECISION) if SPLIT else b_s, D, PRECISION)
            if SPLIT:
                b_l = operand(b_s - leading(b_s, PRECISION), D, PRECISION)
            b_o = product(b_x, b_h, None, PRECISION)  # [C, BZ]
            if SPLIT:
                b_o = product(b_x, b_l, b_o, PRECISION)
            if dnorm is not None:
                m_n = m_t & (i_x == 0)
                b_d = tl.load(dnorm + (token + o_c) * H + i_h, mask=m_n, other=0.0)
                b_o += b_e[None, :] if GRADIENT else b_d[:, None] * b_e[None, :]
            if norm is not None:
                b_n = 1.0 / tl.load(norm + (token + o_c) * H + i_h, mask=m_t, other=1.0)
            b_u = b_z
            if GATED:
                b_into, b_out, s_all = step_weights(sums, rests, gamma, token, there, C, REVERSE)
                b_k = b_into if GRADIENT else b_out
                b_q = b_out if GRADIENT else b_into
                if SPLIT:
                    # the other walk's states hold this row with its weight and rounded
                    b_f = b_beside * b_q[:, None]
                    b_f = rounded(b_f, PRECISION) - b_f
                    b_r = tl.sum(b_o * b_f, 1)
                b_o *= b_q[:, None]
                b_s *= power(s_all)
            if norm is not None and GRADIENT:
                b_k = b_n
            if GATED or (norm is not None and GRADIENT):
                b_u = operand(b_z * b_k[:, None], D, PRECISION)
            b_s = product(tl.trans(b_y), b_u, b_s, PRECISION)
            b_a = product(b_x, tl.trans(b_y), None, PRECISION)  # [C of x, C of y]
            if dnorm is not None:
                b_a += b_d[None, :] if GRADIENT else b_d[:, None]
            apart = 0
            if rows is not None:
                apart = steep(s_all, there).to(tl.int32)
            if not GATED:
                b_a = tl.where(seen(0, C, BACK), b_a, 0.0)
            else:
                if sums is not None:
                    b_w = pair_weights(
                        sums, rests, gamma, token, there, apart, C, REVERSE, GRADIENT
                    )
                b_a *= b_w
            if norm is not None and GRADIENT:
                b_a *= b_n[None, :]
            b_o = product(operand(b_a, D, PRECISION), b_z, b_o, PRECISION)
            if rows is not None:
                b_t = tl.sum(b_o * b_beside.to(tl.float32), 1)  # [C]
                if SPLIT:
                    b_t += b_r
                tl.store(rows + token + o_c, b_t * scale, mask=m_t)
                if apart != 0:
                    # made anew, as to keep it would take the registers of all chunks
                    b_d = product(b_x, tl.trans(b_y), None, PRECISION)
                    b_d = tl.where(o_c[:, None] == o_c[None, :], b_d, 0.0)  # [C, C]
                    b_o = product(operand(b_d, D, PRECISION), b_z, b_o, PRECISION)
            b_o *= scale
            if norm is not None and not GRADIENT:
                b_o *= b_n[:, None]
            if dnorm is not None:
                if GRADIENT:
                    b_d *= b_n
                    b_e += tl.sum(b_z.to(tl.float32) * b_d[:, None], 0)
                else:
                    b_e += tl.sum(b_u.to(tl.float32), 0)
            if new_norm is not None:
                b_n = tl.sum(b_x.to(tl.float32) * b_e[None, :], 1)  # [C]
                b_e += tl.sum(b_y.to(tl.float32), 0)
                b_n = (b_n + tl.sum(b_a, 1)) * scale
                if NX == 1:
                    b_n += NORMALIZER_EPS
                    b_o /= b_n[:, None]
                p_n = new_norm + (i_x * tokens.to(tl.int64) + token + o_c) * H + i_h
                tl.store(p_n, b_n, mask=(o_c < length - c * C) & (i_z == 0))
            m_o = (o_c < length - c * C)[:, None] & m_z
            tl.store(out + at_z + p_z, b_o.to(out.dtype.element_ty), mask=m_o)
        if end is not None:
            p = end + at * (X * Z)
            store_state(p, b_s * s_held, o_x, o_z, X, Z, TURNED != V_FIRST, closes)
        if end_z is not None:
            m = m_e & closes & ((i_z == 0) | (dnorm is not None))
            tl.store(end_z + at * E + o_e, (b_e * s_held).to(end_z.dtype.element_ty), mask=m)


# A step is a chain of small products that wait for each other: three stages keep memory a chunk
# ahead of it, and no line may spill a register inside it, which costs more than all else.
LINES = (
    Line(2, 64, 64, 64, 4, 3, shared=99),
    Line(2, 128, 128, 64, 4, 3, shared=162),  # 128 programs for 64 heads of 128
    Line(2, 512, 256, 64, 8, 2, shared=227),  # eight warps hold the state without spilling
    Line(2, 512, 64, 64, 4, 2, shared=99),  # for GPUs with little shared memory
    Line(4, 512, 64, 64, 4, 2, shared=99),  # tf32x3 holds each operand twice
)


def walk(
    call: Call, x, y, z, out_dtype: torch.dtype, *, starts, carry, ends, decays, cu_seqlens, scale,
    segment: int, v_first: bool, gradient: bool = False, turned: bool = False,
    new_norm: bool = False, norm: Tensor | None = None, dnorm: Tensor | None = None,
    beside: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Launch ``walk_kernel``: out in the shape of z, the new normaliser, and rows.

    ``starts`` and ``ends`` are a state and a z.
    """
    X, Z = x.shape[-1], z.shape[-1]
    line = call.choose(LINES, X)
    parts, blocks = cdiv(X, line.BX), cdiv(X, line.BX) * cdiv(Z, line.BZ)
    several = () if parts == 1 else (parts,)
    out = z.new_empty(*several, *z.shape, dtype=torch.float32 if several else out_dtype)
    norms = z.new_empty(*several, *z.shape[:3], dtype=torch.float32) if new_norm else None
    rows = None
    if beside is not None:
        rows = z.new_empty(blocks, call.H, call.tokens, dtype=torch.float32)
    units = call.units(segment) + (call.packed and not segment)  # tokens behind the last sequence
    tensors = x, y, z, out, norms, norm, dnorm, beside, rows
    launch(
        walk_kernel,
        units * call.H * blocks,
        (*tensors, *decays, *starts, carry, *ends, cu_seqlens),
        (scale, call.N, call.T, call.tokens, segment),
        call.constants
        | line.constants
        | {"X": X, "Z": Z, "GRADIENT": gradient, "TURNED": turned, "V_FIRST": v_first},
    )
    if not several:
        return out, norms, rows
    out = out.sum(0)
    if norms is not None:
        norms = norms.sum(0) + NORMALIZER_EPS.value
        out /= norms[..., None]
    return out.to(out_dtype), norms, rows
