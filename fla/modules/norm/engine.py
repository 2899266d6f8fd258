"""The norm engine: rows divided by their size, with a weight, a gate and a residual.

    h = x + residual        y = h / sqrt(m Σh² + eps) ∘ weight ∘ activation(g)

m is 1 for the L2 norm and 1 / D for the root mean square.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fla.ops.common import contract
from fla.ops.common.boundary import Operator, absent, differentiable
from fla.ops.common.device import lacks_triton
from fla.ops.common.dispatch import Engine, Implementation, Problem

ACTIVATIONS = {"swish": "swish", "silu": "swish", "sigmoid": "sigmoid"}
MOST_CHANNELS = 32768  # that a kernel holds of one row


class Options(NamedTuple):
    """``sum_dtype`` is what h is kept in where it is asked for."""

    eps: float
    mean: bool
    activation: str
    output_dtype: torch.dtype
    sum_dtype: torch.dtype | None = None


def _refuses(problem: Problem) -> str | None:
    if problem.K > MOST_CHANNELS:
        return f"kernels take rows of up to {MOST_CHANNELS} channels, these have {problem.K}"
    return lacks_triton(problem.device, problem.dtype)


ENGINE = Engine(
    "norm",
    Implementation("triton", "fla.modules.norm.triton", _refuses),
    Implementation("eager", "fla.modules.norm.eager"),
)


def norm_engine(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    g: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float,
    mean: bool,
    activation: str = "swish",
    output_dtype: torch.dtype | None = None,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Check the arguments and run: y, and x + residual in ``sum_dtype``."""
    letters = " ".join([*(f"D{i}" for i in range(1, _dim(x))), "D"])
    contract.operands(
        x=(x, letters),
        weight=(weight, "?D"),
        g=(g, f"?{letters}"),
        residual=(residual, f"?{letters}"),
    )
    if output_dtype is not None:
        contract.floating("output_dtype", output_dtype)
    kept = None
    if residual is not None:
        sum_dtype = residual.dtype if sum_dtype is None else sum_dtype
        # gradients are taken from it, and would lose what a narrower one rounds off
        kept = torch.promote_types(sum_dtype, x.dtype)
    elif sum_dtype not in (None, x.dtype):
        kept = sum_dtype
    y, h = _forward(
        x,
        weight,
        g,
        residual,
        Options(
            contract.number("eps", eps),
            mean,
            ACTIVATIONS[activation],
            x.dtype if output_dtype is None else output_dtype,
            kept,
        ),
    )
    return y, x if kept is None else h.to(sum_dtype)


def _dim(x: Any) -> int:
    return x.dim() if isinstance(x, Tensor) else 1


def scale_of(x: Tensor, options: Options) -> float:
    """m of the equation."""
    return 1.0 / max(x.shape[-1], 1) if options.mean else 1.0


def _run_forward(x, weight, g, residual, options):
    return ENGINE.stages(x, x, options).forward(x, weight, g, residual, options)


def _run_backward(h, dy, dh, weight, g, options):
    return ENGINE.stages(h, h, options).backward(dy, dh, h, weight, g, options)


def _fake_forward(x, weight, g, residual, options):
    y = x.new_empty(x.shape, dtype=options.output_dtype)
    if options.sum_dtype is None:
        return y, absent(x)
    return y, x.new_empty(x.shape, dtype=options.sum_dtype)


def _fake_backward(h, dy, dh, weight, g, options):
    return tuple(absent(h) if x is None else x.new_empty(x.shape) for x in (h, weight, g))


_OPTIONS = "float eps, bool mean, str activation, ScalarType output_dtype, ScalarType? sum_dtype"
_forward = Operator(
    "norm_forward(Tensor x, Tensor? weight, Tensor? g, Tensor? residual, "
    f"{_OPTIONS}) -> (Tensor y, Tensor h)",
    _run_forward,
    _fake_forward,
    Options,
)
_backward = Operator(
    "norm_backward(Tensor h, Tensor dy, Tensor? dh, Tensor? weight, Tensor? g, "
    f"{_OPTIONS}) -> (Tensor dx, Tensor dweight, Tensor dg)",
    _run_backward,
    _fake_backward,
    Options,
)


def _save(ctx, operands, output) -> None:
    x, weight, g, residual = operands
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x if ctx.options.sum_dtype is None else output[1], weight, g)


def _gradients(ctx, dy, dh):
    h, weight, g = ctx.saved_tensors
    if ctx.options.sum_dtype is None:
        dh = None
    if dy is None:
        dy = h.new_zeros(h.shape)
    dx, dweight, dg = _backward(h, dy, dh, weight, g, ctx.options)
    x_dtype, residual_dtype = ctx.dtypes
    return (
        dx.to(x_dtype),
        None if weight is None else dweight,
        None if g is None else dg,
        None if residual_dtype is None else dx.to(residual_dtype),
    )


differentiable(_forward, _backward, _save, _gradients)
