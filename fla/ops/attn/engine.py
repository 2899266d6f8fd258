"""The softmax engine: causal attention with an optional gate, window and sink.

    s_ij = scale q_i·k_j + (G_i − G_j)     i − window_size < j ≤ i
    o_i  = Σ_j exp(s_ij) v_j / (Σ_j exp(s_ij) + exp(sink_bias))

``parallel_attn`` and ``parallel_forgetting_attn`` are faces over ``softmax_engine``, and
``attn_decoding_one_step`` is one over ``decoding_engine``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fla.ops.common import contract
from fla.ops.common.boundary import Operator, absent, differentiable
from fla.ops.common.device import accumulator, lacks_hopper, lacks_triton
from fla.ops.common.dispatch import Engine, Implementation, Problem
from fla.ops.common.once import finding, once

HEAD_LIMITS = {"K": 256, "V": 512}
_WIDEST = 2**30  # no sequence is longer, and kernels add to it in 32 bits


class Options(NamedTuple):
    """What a call wants beside its tensors; ``window_size`` None is no window."""

    scale: float
    window_size: int | None = None


class DecodingOptions(NamedTuple):
    """The same for decoding, and the factor on g."""

    scale: float
    window_size: int | None = None
    gate_scale: float = 1.0


_Checked, _CheckedDecoding = finding(Options), finding(DecodingOptions)


def _lacks_hopper(at: Problem) -> str | None:
    reason = lacks_hopper(at.device, at.dtype, "softmax forward")
    if reason is None and not all(64 <= size <= 128 and size % 8 == 0 for size in (at.K, at.V)):
        reason = f"takes heads of 64 to 128 in steps of 8, not {at.K} and {at.V}"
    return reason


IMPLEMENTATIONS = (
    Implementation("triton", "fla.ops.attn.triton", lambda at: lacks_triton(at.device, at.dtype)),
    Implementation("eager", "fla.ops.attn.eager"),
)
# Calls of many blocks; the rest it hands on
_HOPPER = Implementation("hopper", "fla.ops.attn.hopper", _lacks_hopper)
ENGINE = Engine("softmax", _HOPPER, *IMPLEMENTATIONS)
DECODING = Engine("decoding", *IMPLEMENTATIONS)


def softmax_engine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    sink_bias: Tensor | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Check the arguments and run: o [B, T, HQ, V]."""
    operands = q, k, v, g, sink_bias, cu_seqlens
    return _forward(*operands, _checked(*operands, scale, window_size))[0]


def decoding_engine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    sink_bias: Tensor | None = None,
    scale: float | None = None,
    do_gate_scale: bool = False,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Check the arguments and run one step: o [1, N, HQ, V], without a gradient."""
    options = _checked_decoding(
        q, k, v, g, sink_bias, cu_seqlens, scale, window_size, do_gate_scale
    )
    tensors: Iterable[Tensor | None] = (q, k, v, g, sink_bias)
    if torch.is_grad_enabled():
        tensors = (None if x is None else x.detach() for x in tensors)
    return _decoding(*tensors, cu_seqlens, options)


@once
def _checked(q, k, v, g, sink_bias, cu_seqlens, scale, window_size) -> Options:
    """The shapes, dtypes and devices that the engine takes, and the call's options."""
    sizes = _sizes(q, k, v, g, sink_bias, "B T", "B T")
    contract.number_of_sequences(q, cu_seqlens)
    return _Checked(contract.scale_or_default(scale, sizes["K"]), _window(window_size))


@once
def _checked_decoding(
    q, k, v, g, sink_bias, cu_seqlens, scale, window_size, do_gate_scale: bool
) -> DecodingOptions:
    """The same for decoding: a query for each sequence."""
    sizes = _sizes(q, k, v, g, sink_bias, "1 N", "1 T")
    N = 1 if cu_seqlens is None else contract.number_of_sequences(q, cu_seqlens)
    if sizes["N"] != N:
        raise ValueError(f"q: expected one query for each of {N} sequences, got {sizes['N']}")
    scale = contract.scale_or_default(scale, sizes["K"])
    return _CheckedDecoding(scale, _window(window_size), scale if do_gate_scale else 1.0)


def _sizes(q, k, v, g, sink_bias, queries: str, keys: str) -> dict[str, int]:
    """What both want of operands and heads; ``queries`` and ``keys`` are how many there are."""
    sizes = contract.operands(
        q=(q, f"{queries} HQ K"),
        k=(k, f"{keys} H K"),
        v=(v, f"{keys} H V"),
        g=(g, f"?{keys} HQ"),
        sink_bias=(sink_bias, "?HQ"),
    )
    contract.at_most(sizes, **HEAD_LIMITS)
    contract.divides(sizes, "HQ", "H")
    return sizes


def _window(size: int | None) -> int | None:
    size = contract.window(size)
    return None if size is None else min(size, _WIDEST)


def _nothing_to_see(q: Tensor, k: Tensor, v: Tensor, options: Options | DecodingOptions) -> bool:
    """Every output and gradient is zero or empty; no implementation needs to know such calls."""
    return options.window_size == 0 or not (q.numel() and k.numel() and v.numel())


def _run_forward(q, k, v, g, sink_bias, cu_seqlens, options):
    contract.boundaries(cu_seqlens, None, q.shape[1])
    if _nothing_to_see(q, k, v, options):
        return tuple(x.zero_() for x in _fake_forward(q, k, v))
    stages = ENGINE.stages(q, v, options)
    return stages.forward(q, k, v, g, sink_bias, cu_seqlens, options)


def _run_backward(q, do, k, v, g, sink_bias, cu_seqlens, o, lse, options):
    if _nothing_to_see(q, k, v, options):
        return tuple(x.zero_() for x in _fake_backward(q, do, k, v, g, sink_bias))
    stages = ENGINE.stages(q, v, options)
    return stages.backward(do, q, k, v, g, sink_bias, cu_seqlens, o, lse, options)


def _run_decoding(q, k, v, g, sink_bias, cu_seqlens, options):
    contract.boundaries(cu_seqlens, None, k.shape[1])
    if _nothing_to_see(q, k, v, options):
        return _fake_decoding(q, k, v).zero_()
    stages = DECODING.stages(q, v, options)
    return stages.decode(q, k, v, g, sink_bias, cu_seqlens, options)


def _fake_forward(q, k, v, *_):
    B, T, HQ, _ = q.shape
    return (
        q.new_empty(B, T, HQ, v.shape[-1]),
        q.new_empty(B, HQ, T, dtype=accumulator(q.dtype)),
    )


def _fake_backward(q, do, k, v, g, sink_bias, *_):
    return tuple(
        absent(q) if each is None else each.new_empty(each.shape)
        for each in (q, k, v, g, sink_bias)
    )


def _fake_decoding(q, k, v, *_):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


_OPERANDS = "Tensor k, Tensor v, Tensor? g, Tensor? sink_bias, Tensor? cu_seqlens"
_OPTIONS = "float scale, SymInt? window_size"
_forward = Operator(
    f"softmax_forward(Tensor q, {_OPERANDS}, {_OPTIONS}) -> (Tensor o, Tensor lse)",
    _run_forward,
    _fake_forward,
    Options,
)
_backward = Operator(
    f"softmax_backward(Tensor q, Tensor do, {_OPERANDS}, Tensor o, Tensor lse, {_OPTIONS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dsink)",
    _run_backward,
    _fake_backward,
    Options,
)
_decoding = Operator(
    f"decoding(Tensor q, {_OPERANDS}, {_OPTIONS}, float gate_scale) -> Tensor",
    _run_decoding,
    _fake_decoding,
    DecodingOptions,
)


def _save(ctx, operands, output) -> None:
    ctx.save_for_backward(*operands, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, do, _):
    if do is None:  # what comes behind o does not depend on it
        return (None,) * 6
    q, k, v, g, sink_bias, cu_seqlens, o, lse = ctx.saved_tensors
    dq, dk, dv, dg, dsink = _backward(q, do, k, v, g, sink_bias, cu_seqlens, o, lse, ctx.options)
    dg = None if g is None else dg
    dsink = None if sink_bias is None else dsink
    return dq, dk, dv, dg, dsink, None


differentiable(_forward, _backward, _save, _gradients)
