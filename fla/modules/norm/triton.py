"""The norm engine's kernels, one each way: a program holds whole rows, so they are read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.modules.norm.engine import Options, scale_of
from fla.ops.common.boundary import absent
from fla.ops.common.kernels import cdiv, dense, multiprocessors, power_of_two
from fla.ops.common.launch import launch

BLOCK = 4096  # elements of a program's rows, more only where one row has more
PROGRAMS = 4  # of the backward for each multiprocessor; each has a share of the weight's gradient


@triton.jit
def opened(g, SWISH: tl.constexpr):
    """activation(g) and its derivative."""
    s = tl.sigmoid(g)
    if SWISH:
        return g * s, s * (1 + g * (1 - s))
    else:
        return s, s * tl.sigmoid(-g)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x,
    weight,
    g,
    residual,
    y,
    h,
    rows,
    scale,
    eps,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    SWISH: tl.constexpr,
):
    """y = h / sqrt(scale Σh² + eps) ∘ weight ∘ activation(g), h = x + residual.

    One program owns BR rows.
    """
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    mask = (o_r < rows)[:, None] & m_d[None, :]
    at = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    b_h = tl.load(x + at, mask=mask, other=0).to(tl.float32)  # [BR, BD]
    if residual is not None:
        b_h += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
    if h is not None:
        tl.store(h + at, b_h, mask=mask)
    b_y = b_h * tl.rsqrt(tl.sum(b_h * b_h, 1) * scale + eps)[:, None]
    if weight is not None:
        b_y *= tl.load(weight + o_d, mask=m_d, other=0).to(tl.float32)[None, :]
    if g is not None:
        b_y *= opened(tl.load(g + at, mask=mask, other=0).to(tl.float32), SWISH)[0]
    tl.store(y + at, b_y, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dy,
    dh,
    h,
    weight,
    g,
    dx,
    dg,
    dweights,
    rows,
    scale,
    eps,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    SWISH: tl.constexpr,
):
    """With x̂ = h r and r = 1 / sqrt(scale Σh² + eps): dx = r (dx̂ − x̂ scale Σ dx̂ x̂) + dh.

    Programs take turns at blocks of BR rows; each sums its share of the weight's gradient into a
    row of ``dweights`` [programs, D].
    """
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    if weight is not None:
        b_w = tl.load(weight + o_d, mask=m_d, other=0).to(tl.float32)[None, :]
        b_dw = tl.zeros([BR, BD], tl.float32)
    for i in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        o_r = i * BR + tl.arange(0, BR)
        mask = (o_r < rows)[:, None] & m_d[None, :]
        at = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
        b_h = tl.load(h + at, mask=mask, other=0).to(tl.float32)  # [BR, BD]
        b_dy = tl.load(dy + at, mask=mask, other=0).to(tl.float32)
        # 0 where there is no row: without eps it would be infinite
        b_r = tl.where(o_r < rows, tl.rsqrt(tl.sum(b_h * b_h, 1) * scale + eps), 0.0)[:, None]
        b_unit = b_h * b_r
        if g is not None:
            b_open, b_slope = opened(tl.load(g + at, mask=mask, other=0).to(tl.float32), SWISH)
            b_dg = b_dy * b_unit * b_slope
            if weight is not None:
                b_dg *= b_w
            tl.store(dg + at, b_dg, mask=mask)
            b_dy *= b_open
        if weight is not None:
            b_dw += b_dy * b_unit
            b_dy *= b_w
        b_dx = (b_dy - b_unit * (tl.sum(b_dy * b_unit, 1) * scale)[:, None]) * b_r
        if dh is not None:
            b_dx += tl.load(dh + at, mask=mask, other=0).to(tl.float32)
        tl.store(dx + at, b_dx, mask=mask)
    if weight is not None:
        tl.store(dweights + tl.program_id(0).to(tl.int64) * D + o_d, tl.sum(b_dw, 0), mask=m_d)


def forward(
    x: Tensor, weight: Tensor | None, g: Tensor | None, residual: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, device=x.device, dtype=options.output_dtype)
    h = None
    if options.sum_dtype is not None:
        h = torch.empty(x.shape, device=x.device, dtype=options.sum_dtype)
    if x.numel():
        rows, blocks, shape = _shape(x)
        launch(
            forward_kernel,
            blocks,
            (*dense(x, weight, g, residual), y, h),
            (rows, scale_of(x, options), options.eps),
            shape | {"SWISH": options.activation == "swish"},
        )
    return y, absent(x) if h is None else h


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    g: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(h.shape, device=h.device, dtype=h.dtype)
    dg = absent(h) if g is None else torch.empty(g.shape, device=h.device, dtype=g.dtype)
    rows, blocks, shape = _shape(h)
    programs = min(blocks, PROGRAMS * multiprocessors(h.device))
    dweights = None
    if weight is not None:
        dweights = h.new_empty(programs, h.shape[-1], dtype=torch.float32)
    if h.numel():
        launch(
            backward_kernel,
            programs,
            (*dense(dy, dh, h, weight, g), dx, dg, dweights),
            (rows, scale_of(h, options), options.eps),
            shape | {"SWISH": options.activation == "swish"},
        )
    if weight is None or dweights is None:
        return dx, absent(h), dg
    return dx, dweights.sum(0).to(weight.dtype), dg


def _shape(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows, blocks of rows, and the sizes of a block."""
    D = x.shape[-1]
    rows = x.numel() // max(D, 1)
    BD = power_of_two(D)
    BR = max(BLOCK // BD, 1)
    warps = max(BR * BD // 1024, 4)
    return rows, cdiv(rows, BR), {"D": D, "BR": BR, "BD": BD, "num_warps": warps}
