"""The convolution engine's kernels, one each way.

A program walks along a stretch of tokens with some channels' last W inputs in registers: each is
read once, and no sum of the weight's gradient crosses threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.modules.conv.engine import Options
from fla.ops.common.boundary import absent
from fla.ops.common.kernels import cdiv, dense, multiprocessors, power_of_two
from fla.ops.common.launch import launch

BLOCK_D = 256  # channels of a program, four in each thread
WALKS = 16  # programs for each multiprocessor
SHORTEST = 8  # tokens of a walk
AHEAD = 4  # tokens whose loads are under way together


@triton.jit
def sequence(cu_seqlens, t, N, T, steps):
    """The sequence that token t lies in, N if none, and where it begins and ends."""
    if cu_seqlens is None:
        n = t // T
        bos = n * T
        eos = bos + T
    else:
        n = t * 0  # how many sequences end at or before the token
        above = n + N
        for _ in range(steps):
            middle = (n + above) // 2
            end = tl.load(cu_seqlens + 1 + middle, mask=middle < above, other=0).to(tl.int32)
            later = (middle < above) & (end <= t)
            above = tl.where(later, above, middle)
            n = tl.where(later, middle + 1, n)
        bos = tl.load(cu_seqlens + n).to(tl.int32)
        eos = tl.load(cu_seqlens + n + 1, mask=n < N, other=2147483647).to(tl.int32)
    return n, bos, eos


@triton.jit
def rows(x, t, stop, o_d, m_d, D: tl.constexpr, COUNT: tl.constexpr):
    """x [COUNT, BD] from token t on, row by row; zero before token 0 and from ``stop`` on."""
    found = ()
    for j in tl.static_range(COUNT):
        mask = m_d & (t + j >= 0) & (t + j < stop)
        found = found + (tl.load(x + (t + j).to(tl.int64) * D + o_d, mask=mask, other=0),)
    return found


@triton.jit
def taps(window, cache, n, p, live, o_d, m_d, D: tl.constexpr, W: tl.constexpr):
    """Of the last W inputs those of its sequence; before position 0 the sequence's cache."""
    found = ()
    for i in tl.static_range(W):
        shift = W - 1 - i
        b_x = tl.where(live & (p >= shift), window[i], 0).to(tl.float32)
        if shift > 0 and cache is not None:
            at = (n.to(tl.int64) * D + o_d) * W + W + p - shift
            mask = m_d & live & (p < shift)
            b_x += tl.load(cache + at, mask=mask, other=0).to(tl.float32)
        found = found + (b_x,)
    return found


@triton.jit
def weighed(b_taps, b_w, b_bias, W: tl.constexpr):
    """Σ_i weight_i x_{t − W + 1 + i} + bias, [BD]."""
    b_y = b_bias
    for i in tl.static_range(W):
        b_y += b_taps[i] * b_w[i]
    return b_y


@triton.jit
def slope(b_dy, b_taps, b_w, b_bias, live, W: tl.constexpr, SILU: tl.constexpr):
    """The gradient of what ``weighed`` gives, [BD]."""
    b_dy = b_dy.to(tl.float32)
    if SILU:
        b_y = weighed(b_taps, b_w, b_bias, W)
        b_s = tl.sigmoid(b_y)
        b_dy *= b_s * (1 + b_y * (1 - b_s))
    return tl.where(live, b_dy, 0)


@triton.jit
def parameters(weight, bias, o_d, m_d, W: tl.constexpr):
    """The weight [W, BD], row by row, and the bias [BD]."""
    b_w = ()
    for i in tl.static_range(W):
        b_w = b_w + (tl.load(weight + o_d * W + i, mask=m_d, other=0).to(tl.float32),)
    b_bias = tl.zeros([o_d.shape[0]], tl.float32)
    if bias is not None:
        b_bias += tl.load(bias + o_d, mask=m_d, other=0).to(tl.float32)
    return b_w, b_bias


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


@triton.jit
def last(x, cache, cu_seqlens, final, n, T, o_d, m_d, D: tl.constexpr, W: tl.constexpr):
    """Write the last W inputs of sequence n, the first of which may still be its cache's."""
    bos, length = ends(cu_seqlens, n, T)
    b_xs = rows(x, bos + length - W, bos + length, o_d, m_d, D, W)
    for c in tl.static_range(W):
        kept = length + c < W
        at = (n.to(tl.int64) * D + o_d) * W + c
        b_x = tl.where(kept, 0, b_xs[c])
        if cache is not None:
            b_x += tl.load(cache + at + length, mask=m_d & kept, other=0)
        tl.store(final + at, b_x, mask=m_d)


@triton.jit(do_not_specialize=["tokens", "N", "T", "programs", "stretch", "steps"])
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
    programs,
    stretch,
    steps,
    D: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    AHEAD: tl.constexpr,
    SILU: tl.constexpr,
):
    """y_t = activation(Σ_i weight_i x_{t − W + 1 + i} + bias) + residual_t.

    The first ``programs`` programs walk along ``stretch`` tokens each, of BD channels; the others
    own one sequence's ``final`` each, its last W inputs.
    """
    i = tl.program_id(0)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    if i < programs:
        start = i * stretch
        stop = tl.minimum(start + stretch, tokens)
        b_w, b_bias = parameters(weight, bias, o_d, m_d, W)
        window = rows(x, start - (W - 1), stop, o_d, m_d, D, W - 1)
        n, bos, eos = sequence(cu_seqlens, start, N, T, steps)
        for step in range(tl.cdiv(stop - start, AHEAD)):
            t_0 = start + step * AHEAD
            b_xs = rows(x, t_0, stop, o_d, m_d, D, AHEAD)
            if residual is not None:
                b_rs = rows(residual, t_0, stop, o_d, m_d, D, AHEAD)
            for j in tl.static_range(AHEAD):
                t = t_0 + j
                if t >= eos:
                    n, bos, eos = sequence(cu_seqlens, t, N, T, steps)
                window = window + (b_xs[j],)
                b_taps = taps(window, cache, n, t - bos, n < N, o_d, m_d, D, W)
                b_y = weighed(b_taps, b_w, b_bias, W)
                if SILU:
                    b_y *= tl.sigmoid(b_y)
                if residual is not None:
                    b_y += b_rs[j].to(tl.float32)
                b_y = tl.where(n < N, b_y, 0)
                tl.store(y + t.to(tl.int64) * D + o_d, b_y, mask=m_d & (t < stop))
                window = window[1:]
    elif final is not None:
        last(x, cache, cu_seqlens, final, i - programs, T, o_d, m_d, D, W)


@triton.jit
def add(b_dw, b_dy, b_taps, W: tl.constexpr):
    """The weight's gradient with one token's share."""
    found = ()
    for i in tl.static_range(W):
        found = found + (b_dw[i] + b_dy * b_taps[i],)
    return found


@triton.jit
def spread(b_dxs, b_dy, b_w, p, W: tl.constexpr):
    """The gradients of a token and those before it with what it gives them."""
    found = ()
    for i in tl.static_range(W):
        found = found + (b_dxs[i] + tl.where(p >= W - 1 - i, b_dy * b_w[i], 0),)
    return found


@triton.jit
def unseen(b_dcs, b_dy, b_w, p: tl.constexpr, W: tl.constexpr):
    """The cache's gradient with what the token at position p gives it."""
    found = ()
    for c in tl.static_range(W):
        if c > p:
            found = found + (b_dcs[c] + b_dy * b_w[c - 1 - p],)
        else:
            found = found + (b_dcs[c],)
    return found


@triton.jit
def before(
    dy, dfinal, x, cache, cu_seqlens, dcache, b_w, b_bias, n, T, o_d, m_d, D: tl.constexpr,
    W: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Write the gradient of sequence n's cache, which its first W − 1 tokens see."""
    bos, length = ends(cu_seqlens, n, T)
    b_xs = rows(x, bos, bos + length, o_d, m_d, D, W)
    b_dys = rows(dy, bos, bos + length, o_d, m_d, D, W)
    b_zero = tl.zeros([o_d.shape[0]], tl.float32)
    window = (b_zero.to(x.dtype.element_ty),) * (W - 1)  # the cache stands in its place
    b_dcs = (b_zero,) * W
    for p in tl.static_range(W - 1):
        window = window + (b_xs[p],)
        b_taps = taps(window, cache, n, n * 0 + p, p < length, o_d, m_d, D, W)
        b_dy = slope(b_dys[p], b_taps, b_w, b_bias, p < length, W, SILU)
        b_dcs = unseen(b_dcs, b_dy, b_w, p, W)
        window = window[1:]
    for c in tl.static_range(W):
        b_dc = b_dcs[c]
        at = (n.to(tl.int64) * D + o_d) * W + c
        if dfinal is not None:
            b_dc += tl.load(dfinal + at - length, mask=m_d & (c >= length), other=0)
        tl.store(dcache + at, b_dc, mask=m_d)


@triton.jit(do_not_specialize=["tokens", "N", "T", "programs", "stretch", "steps"])
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
    stretch,
    steps,
    D: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    AHEAD: tl.constexpr,
    SILU: tl.constexpr,
):
    """dx_t = Σ_s weight_{W−1−s} dy'_{t+s} + dfinal, dy' the gradient before the activation.

    The first ``programs`` programs walk along ``stretch`` tokens each, of BD channels, and W − 1
    behind them, which see them too; each leaves its share of the weight's gradient in ``dweights``
    [programs, W, D] and of the bias' in ``dbiases`` [programs, D].  The others own one sequence's
    ``dcache`` each.
    """
    i = tl.program_id(0)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_w, b_bias = parameters(weight, bias, o_d, m_d, W)
    b_zero = tl.zeros([BD], tl.float32)
    if i < programs:
        start = i * stretch
        stop = tl.minimum(start + stretch, tokens)
        window = rows(x, start - (W - 1), stop, o_d, m_d, D, W - 1)
        b_dw = (b_zero,) * W
        b_db = b_zero
        b_dxs = (b_zero,) * (W - 1)  # of the tokens before t, as far as it is known
        n, bos, eos = sequence(cu_seqlens, start, N, T, steps)
        for step in range(tl.cdiv(stop + W - 1 - start, AHEAD)):
            t_0 = start + step * AHEAD
            b_xs = rows(x, t_0, tokens, o_d, m_d, D, AHEAD)
            b_dys = rows(dy, t_0, tokens, o_d, m_d, D, AHEAD)
            for j in tl.static_range(AHEAD):
                t = t_0 + j
                if t >= eos:
                    n, bos, eos = sequence(cu_seqlens, t, N, T, steps)
                p = t - bos
                window = window + (b_xs[j],)
                b_taps = taps(window, cache, n, p, n < N, o_d, m_d, D, W)
                b_dy = slope(b_dys[j], b_taps, b_w, b_bias, n < N, W, SILU)
                b_own = tl.where(t < stop, b_dy, 0)
                b_db += b_own
                b_dw = add(b_dw, b_own, b_taps, W)
                b_dx = b_zero
                if dfinal is not None:
                    at = (n.to(tl.int64) * D + o_d) * W + W - (eos - t)
                    mask = m_d & (n < N) & (eos - t <= W)
                    b_dx += tl.load(dfinal + at, mask=mask, other=0).to(tl.float32)
                b_dxs = spread(b_dxs + (b_dx,), b_dy, b_w, p, W)
                done = t - (W - 1)
                mask = m_d & (done >= start) & (done < stop)
                tl.store(dx + done.to(tl.int64) * D + o_d, b_dxs[0], mask=mask)
                b_dxs = b_dxs[1:]
                window = window[1:]
        for c in tl.static_range(W):
            at = (i.to(tl.int64) * W + c) * D + o_d
            tl.store(dweights + at, b_dw[c], mask=m_d)
        if dbiases is not None:
            tl.store(dbiases + i.to(tl.int64) * D + o_d, b_db, mask=m_d)
    elif dcache is not None:
        before(
            dy, dfinal, x, cache, cu_seqlens, dcache, b_w, b_bias, i - programs, T, o_d, m_d, D, W,
            SILU,
        )  # fmt: skip


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    cache: Tensor | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    N, programs, across, numbers, constants = _shape(x, weight, cu_seqlens)
    y, final = torch.empty_like(x, memory_format=torch.contiguous_format), None
    if options.output_final_state:
        final = x.new_empty(N, *weight.shape)
    grid = programs + (0 if final is None else N), across
    if all(grid):
        launch(
            forward_kernel,
            grid,
            (*dense(x, weight, bias, residual, cache, cu_seqlens), y, final),
            numbers,
            constants | {"SILU": options.silu},
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
    N, programs, across, numbers, constants = _shape(x, weight, cu_seqlens)
    D, W = weight.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweights = x.new_empty(programs, W, D, dtype=torch.float32)
    dbiases = None if bias is None else x.new_empty(programs, D, dtype=torch.float32)
    dcache = None
    if cache is not None:
        dcache = torch.empty_like(cache, memory_format=torch.contiguous_format)
    grid = programs + (0 if cache is None else N), across
    if all(grid):
        launch(
            backward_kernel,
            grid,
            (*dense(dy, dfinal, x, weight, bias, cache, cu_seqlens), dx, dweights, dbiases, dcache),
            numbers,
            constants | {"SILU": options.silu},
        )
    return (
        dx,
        dweights.sum(0).T.to(weight.dtype).contiguous(),
        absent(x) if bias is None or dbiases is None else dbiases.sum(0).to(bias.dtype),
        absent(x) if dcache is None else dcache,
    )


def _shape(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None):
    """N, programs along the tokens and across the channels, a kernel's numbers and constants."""
    B, T, D = x.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    BD = min(power_of_two(D), BLOCK_D)
    across = cdiv(D, BD)
    most = max(WALKS * multiprocessors(x.device) // max(across, 1), 1)
    stretch = max(cdiv(B * T, most), SHORTEST)
    programs = cdiv(B * T, stretch)
    steps = N.bit_length()  # of a binary search for a token's sequence
    numbers = B * T, N, T, programs, stretch, steps
    constants = {"D": D, "W": weight.shape[1], "BD": BD, "AHEAD": AHEAD}
    return N, programs, across, numbers, constants | {"num_warps": max(BD // 128, 1)}
