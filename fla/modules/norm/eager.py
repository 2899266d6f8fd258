"""The norm engine in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fla.modules.norm.engine import Options, scale_of
from fla.ops.common.boundary import absent


def forward(
    x: Tensor, weight: Tensor | None, g: Tensor | None, residual: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    h = _wide(x)
    if residual is not None:
        h = h + residual
    y = h * _reciprocal(h, options)
    if weight is not None:
        y = y * weight
    if g is not None:
        y = y * _opened(_wide(g), options)[0]
    kept = absent(x) if options.sum_dtype is None else h.to(options.sum_dtype, copy=True)
    return y.to(options.output_dtype), kept


def backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, g: Tensor | None, options
) -> tuple[Tensor, Tensor, Tensor]:
    """With x̂ = h r and r = 1 / sqrt(m Σh² + eps): dx = r (dx̂ − x̂ m Σ dx̂ x̂) + dh."""
    wide, dy = _wide(h), _wide(dy)
    reciprocal = _reciprocal(wide, options)
    unit = wide * reciprocal
    dweight, dg = absent(h), absent(h)
    if g is not None:
        opened, slope = _opened(_wide(g), options)
        dg = (_times(dy * unit, weight) * slope).to(g.dtype)
        dy = dy * opened
    if weight is not None:
        dweight = (dy * unit).sum_to_size(weight.shape).to(weight.dtype)
    dunit = _times(dy, weight)
    inner = (dunit * unit).sum(-1, keepdim=True) * scale_of(h, options)
    dx = (dunit - unit * inner) * reciprocal
    if dh is not None:
        dx = dx + dh
    return dx.to(h.dtype), dweight, dg


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _times(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def _reciprocal(h: Tensor, options: Options) -> Tensor:
    return (h.square().sum(-1, keepdim=True) * scale_of(h, options) + options.eps).rsqrt()


def _opened(g: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """activation(g) and its derivative."""
    sigmoid = torch.sigmoid(g)
    if options.activation == "sigmoid":
        return sigmoid, sigmoid * torch.sigmoid(-g)
    return g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
