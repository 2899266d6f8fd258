"""The convolution engine's kernels, one each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.modules.conv.engine import Options
from fla.ops.common.boundary import absent
from fla.ops.common.kernels import cdiv, multiprocessors, power_of_two

BLOCK_T, BLOCK_D = 32, 64
PROGRAMS = 16  # of the backward for each multiprocessor; each has a share of the weight's gradient


@triton.jit
def places(cu_seqlens, o_t, N, T, steps):
    """For tokens o_t: their sequence, N if none, their position in it, and how many end it."""
    if cu_seqlens is None:
        n = o_t // T
        p = o_t - n * T
        left = T - p
    else:
        n = o_t * 0  # how many sequences end at or before the token
        above = n + N
        for _ in range(steps):
            middle = (n + above) // 2
            end = tl.load(cu_seqlens + 1 + middle, mask=middle < above, other=0).to(tl.int32)
            later = (middle < above) & (end <= o_t)
            above = tl.where(later, above, middle)
            n = tl.where(later, middle + 1, n)
        p = o_t - tl.load(cu_seqlens + n).to(tl.int32)
        left = tl.load(cu_seqlens + n + 1, mask=n < N, other=0).to(tl.int32) - o_t
    return n, p, left


@triton.jit
def tap(x, cache, o_t, n, p, m, o_d, m_d, shift, D: tl.constexpr, W: tl.constexpr):
    """The inputs ``shift`` tokens before tokens o_t, [BT, BD]; before a sequence its cache."""
    there = m & (p >= shift)
    at = (o_t - shift).to(tl.int64)[:, None] * D + o_d[None, :]
    b_x = tl.load(x + at, mask=there[:, None] & m_d[None, :], other=0).to(tl.float32)
    if cache is not None:
        kept = m & (p < shift)
        at = (n.to(tl.int64)[:, None] * D + o_d[None, :]) * W + (W + p - shift)[:, None]
        b_x += tl.load(cache + at, mask=kept[:, None] & m_d[None, :], other=0).to(tl.float32)
    return b_x


@triton.jit
def weighed(x, weight, bias, cache, o_t, n, p, m, o_d, m_d, D: tl.constexpr, W: tl.constexpr):
    """Σ_i weight_i x_{t − W + 1 + i} + bias, [BT, BD]."""
    b_y = tl.zeros([o_t.shape[0], o_d.shape[0]], tl.float32)
    for i in tl.static_range(W):
        b_w = tl.load(weight + o_d * W + i, mask=m_d, other=0).to(tl.float32)
        b_y += tap(x, cache, o_t, n, p, m, o_d, m_d, W - 1 - i, D, W) * b_w[None, :]
    if bias is not None:
        b_y += tl.load(bias + o_d, mask=m_d, other=0).to(tl.float32)[None, :]
    return b_y


@triton.jit
def slope(
    dy, x, weight, bias, cache, o_t, n, p, m, o_d, m_d, D: tl.constexpr, W: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """The gradient of what ``weighed`` gives at tokens o_t, [BT, BD]."""
    at = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
    b_dy = tl.load(dy + at, mask=m[:, None] & m_d[None, :], other=0).to(tl.float32)
    if SILU:
        b_y = weighed(x, weight, bias, cache, o_t, n, p, m, o_d, m_d, D, W)
        b_s = tl.sigmoid(b_y)
        b_dy *= b_s * (1 + b_y * (1 - b_s))
    return b_dy


@triton.jit
def ends(cu_seqlens, n, T):
    """Where sequence n begins, and its length."""
    if cu_seqlens is None:
        bos = n * T
        length = T
    else:
        bos = tl.load(cu_seqlens + n).to(tl.int32)
        length = tl.load(cu_seqlens + n + 1).to(tl.int32) - bos
    return bos, length


@triton.jit(do_not_specialize=["tokens", "N", "T", "blocks", "steps"])
def forward_kernel(
    x,
    weight,
    bias,
    residual,
    cache,
    cu_seqlens,
    y,
    final,
    tokens,
    N,
    T,
    blocks,
    steps,
    D: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    SILU: tl.constexpr,
):
    """y_t = activation(Σ_i weight_i x_{t − W + 1 + i} + bias) + residual_t.

    The first ``blocks`` programs own BT tokens each, of BD channels; the others one sequence's
    ``final`` each, its last W inputs.
    """
    i_t = tl.program_id(0)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    if i_t < blocks:
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < tokens
        n, p, _ = places(cu_seqlens, o_t, N, T, steps)
        m = m_t & (n < N)
        b_y = weighed(x, weight, bias, cache, o_t, n, p, m, o_d, m_d, D, W)
        if SILU:
            b_y *= tl.sigmoid(b_y)
        at = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
        if residual is not None:
            mask = m[:, None] & m_d[None, :]
            b_y += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
        b_y = tl.where(m[:, None], b_y, 0)
        tl.store(y + at, b_y, mask=m_t[:, None] & m_d[None, :])
    elif final is not None:
        i_n = i_t - blocks
        bos, length = ends(cu_seqlens, i_n, T)
        o_c = tl.arange(0, BT)  # columns of the cache
        m_c = o_c < W
        o_p = length - W + o_c
        zero = o_c * 0
        b_x = tap(x, cache, bos + o_p, zero + i_n, o_p, m_c, o_d, m_d, 0, D, W)  # [BT, BD]
        at = (i_n.to(tl.int64) * D + o_d[None, :]) * W + o_c[:, None]
        tl.store(final + at, b_x, mask=m_c[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["tokens", "N", "T", "programs", "steps"])
def backward_kernel(
    dy,
    dfinal,
    x,
    weight,
    bias,
    cache,
    cu_seqlens,
    dx,
    dweights,
    dbiases,
    dcache,
    tokens,
    N,
    T,
    programs,
    steps,
    D: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BW: tl.constexpr,
    SILU: tl.constexpr,
):
    """dx_t = Σ_s weight_{W−1−s} dy'_{t+s} + dfinal, dy' the gradient before the activation.

    The first ``programs`` programs take turns at blocks of BT tokens, of BD channels; each sums its
    share of the weight's gradient into ``dweights`` [programs, D, W], and of the bias' into
    ``dbiases`` [programs, D].  The others own one sequence's ``dcache`` each.
    """
    i = tl.program_id(0)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    o_w = tl.arange(0, BW)
    if i < programs:
        b_dw = tl.zeros([BW, BD], tl.float32)
        b_db = tl.zeros([BD], tl.float32)
        for i_t in range(i, tl.cdiv(tokens, BT), programs):
            o_t = i_t * BT + tl.arange(0, BT)
            m_t = o_t < tokens
            n, p, left = places(cu_seqlens, o_t, N, T, steps)
            m = m_t & (n < N)
            b_dx = tl.zeros([BT, BD], tl.float32)
            for s in tl.static_range(W):
                b_dy = slope(
                    dy, x, weight, bias, cache, o_t + s, n, p + s, m & (left > s), o_d, m_d, D, W,
                    SILU,
                )  # fmt: skip
                b_w = tl.load(weight + o_d * W + W - 1 - s, mask=m_d, other=0).to(tl.float32)
                b_dx += b_dy * b_w[None, :]
                if s == 0:
                    b_db += tl.sum(b_dy, 0)
                    for j in tl.static_range(W):
                        b_x = tap(x, cache, o_t, n, p, m, o_d, m_d, W - 1 - j, D, W)
                        share = tl.sum(b_dy * b_x, 0)[None, :]
                        b_dw += tl.where(o_w[:, None] == j, share, 0)
            if dfinal is not None:
                column = (n.to(tl.int64)[:, None] * D + o_d[None, :]) * W + (W - left)[:, None]
                mask = (m & (left <= W))[:, None] & m_d[None, :]
                b_dx += tl.load(dfinal + column, mask=mask, other=0).to(tl.float32)
            at = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
            tl.store(dx + at, b_dx, mask=m_t[:, None] & m_d[None, :])
        at = (i.to(tl.int64) * D + o_d[None, :]) * W + o_w[:, None]
        tl.store(dweights + at, b_dw, mask=(o_w < W)[:, None] & m_d[None, :])
        if dbiases is not None:
            tl.store(dbiases + i.to(tl.int64) * D + o_d, b_db, mask=m_d)
    elif dcache is not None:
        i_n = i - programs
        bos, length = ends(cu_seqlens, i_n, T)
        o_p = tl.arange(0, BT)  # the sequence's first tokens, that see its cache
        zero = o_p * 0
        m_p = o_p < tl.minimum(length, W - 1)
        b_dy = slope(
            dy, x, weight, bias, cache, bos + o_p, zero + i_n, o_p, m_p, o_d, m_d, D, W, SILU
        )
        for c in tl.static_range(W):
            o_i = c - 1 - o_p  # the tap through which a token sees column c
            m_w = (o_i >= 0)[:, None] & m_d[None, :]
            b_w = tl.load(weight + o_d[None, :] * W + o_i[:, None], mask=m_w, other=0)
            b_dc = tl.sum(b_dy * b_w.to(tl.float32), 0)
            o_c = (i_n.to(tl.int64) * D + o_d) * W + c
            if dfinal is not None:
                b_dc += tl.load(dfinal + o_c - length, mask=m_d & (c >= length), other=0)
            tl.store(dcache + o_c, b_dc, mask=m_d)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    cache: Tensor | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    N, sizes, shape = _shape(x, weight, cu_seqlens)
    y, final = torch.empty_like(x, memory_format=torch.contiguous_format), None
    if options.output_final_state:
        final = x.new_empty(N, *weight.shape)
    blocks = cdiv(sizes["tokens"], shape["BT"])
    grid = (blocks + (0 if final is None else N), cdiv(shape["D"], shape["BD"]))
    if all(grid):
        forward_kernel[grid](
            *_contiguous(x, weight, bias, residual, cache, cu_seqlens),
            y,
            final,
            **sizes,
            blocks=blocks,
            **shape,
            SILU=options.silu,
        )
    return y, absent(x) if final is None else final


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, sizes, shape = _shape(x, weight, cu_seqlens)
    D, W = weight.shape
    across = cdiv(D, shape["BD"])
    most = max(PROGRAMS * multiprocessors(x.device) // max(across, 1), 1)
    programs = min(cdiv(sizes["tokens"], shape["BT"]), most)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweights = x.new_empty(programs, D, W, dtype=torch.float32)
    dbiases = None if bias is None else x.new_empty(programs, D, dtype=torch.float32)
    dcache = None
    if cache is not None:
        dcache = torch.empty_like(cache, memory_format=torch.contiguous_format)
    grid = (programs + (0 if cache is None else N), across)
    if all(grid):
        backward_kernel[grid](
            *_contiguous(dy, dfinal, x, weight, bias, cache, cu_seqlens),
            dx,
            dweights,
            dbiases,
            dcache,
            **sizes,
            programs=programs,
            **shape,
            BW=power_of_two(W),
            SILU=options.silu,
        )
    return (
        dx,
        dweights.sum(0).to(weight.dtype),
        absent(x) if bias is None or dbiases is None else dbiases.sum(0).to(bias.dtype),
        absent(x) if dcache is None else dcache,
    )


def _shape(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None):
    """N, the sizes that vary from call to call, and those that a kernel is compiled for."""
    B, T, D = x.shape
    W = weight.shape[1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # ``steps`` of a binary search find a token's sequence
    sizes = {"tokens": B * T, "N": N, "T": T, "steps": N.bit_length()}
    BT, BD = max(BLOCK_T, power_of_two(W)), min(power_of_two(D), BLOCK_D)
    return N, sizes, {"D": D, "W": W, "BT": BT, "BD": BD, "num_warps": 4}


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]
