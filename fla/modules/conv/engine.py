"""The convolution engine: short, causal, each channel by itself.

    y_t = activation(Σ_i weight_i x_{t − W + 1 + i} + bias) + residual_t        i = 0 … W − 1

Before a sequence's first token stands its cache, the last W inputs of the call before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fla.ops.common import contract
from fla.ops.common.boundary import Operator, absent, differentiable
from fla.ops.common.device import lacks_triton
from fla.ops.common.dispatch import Engine, Implementation


class Options(NamedTuple):
    silu: bool
    output_final_state: bool


ENGINE = Engine(
    "convolution",
    Implementation(
        "triton",
        "fla.modules.conv.triton",
        lambda problem: lacks_triton(problem.device, problem.dtype),
    ),
    Implementation("eager", "fla.modules.conv.eager"),
)


def conv_engine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    cache: Tensor | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Check the arguments and run: y, and the new cache [N, D, W] or None."""
    sizes = contract.operands({"D": weight.shape[0], "W": weight.shape[1]}, x=(x, "B T D"))
    sizes["N"] = contract.number_of_sequences(x, cu_seqlens, tokens="x")
    contract.operands(
        sizes,
        x=(x, "B T D"),
        weight=(weight, "D W"),
        bias=(bias, "?D"),
        residual=(residual, "?B T D"),
        cache=(cache, "?N D W"),
    )
    y, final = _forward(x, weight, bias, residual, cache, cu_seqlens, options)
    return y, final if options.output_final_state else None


def _run_forward(x, weight, bias, residual, cache, cu_seqlens, options):
    contract.boundaries(cu_seqlens, None, x.shape[1])
    operands = x, weight, bias, residual, cache, cu_seqlens
    return ENGINE.stages(x, x, options).forward(*operands, options)


def _run_backward(x, dy, dfinal, weight, bias, cache, cu_seqlens, options):
    if dy is None:
        dy = torch.zeros_like(x)
    operands = dy, dfinal, x, weight, bias, cache, cu_seqlens
    return ENGINE.stages(x, x, options).backward(*operands, options)


def _fake_forward(x, weight, bias, residual, cache, cu_seqlens, options):
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = x.new_empty(N, *weight.shape) if options.output_final_state else absent(x)
    return x.new_empty(x.shape), final


def _fake_backward(x, dy, dfinal, weight, bias, cache, cu_seqlens, options):
    return tuple(
        absent(x) if each is None else each.new_empty(each.shape)
        for each in (x, weight, bias, cache)
    )


_OPTIONS = "bool silu, bool output_final_state"
_forward = Operator(
    "conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? cache, "
    f"Tensor? cu_seqlens, {_OPTIONS}) -> (Tensor y, Tensor final)",
    _run_forward,
    _fake_forward,
    Options,
)
_backward = Operator(
    "conv_backward(Tensor x, Tensor? dy, Tensor? dfinal, Tensor weight, Tensor? bias, "
    f"Tensor? cache, Tensor? cu_seqlens, {_OPTIONS}) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dcache)",
    _run_backward,
    _fake_backward,
    Options,
)


def _save(ctx, operands, output) -> None:
    x, weight, bias, residual, cache, cu_seqlens = operands
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight, bias, cache, cu_seqlens)


def _gradients(ctx, dy, dfinal):
    x, weight, bias, cache, cu_seqlens = ctx.saved_tensors
    if not ctx.options.output_final_state:
        dfinal = None
    dx, dweight, dbias, dcache = _backward(
        x, dy, dfinal, weight, bias, cache, cu_seqlens, ctx.options
    )
    dresidual = None if ctx.residual_dtype is None or dy is None else dy.to(ctx.residual_dtype)
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        dresidual,
        None if cache is None else dcache,
        None,
    )


differentiable(_forward, _backward, _save, _gradients)
