"""The specs of the softmax engine and its face."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fla import ops
from fla.ops.attn.naive import naive_attn_decoding, naive_parallel_attn
from fla.testing.spec import Arguments, Draw, OpSpec, Shape, both


def qkv(shape: Shape, draw: Draw) -> Arguments:
    B, T, H = shape.B, shape.T, shape.H
    return {
        "q": draw(B, T, H * shape.group, shape.K),
        "k": draw(B, T, H, shape.K),
        "v": draw(B, T, H, shape.V),
    }


def one_query(shape: Shape, draw: Draw) -> Arguments:
    """A query for each sequence, and all of their keys in one row."""
    row = Shape(T=shape.T, B=1, H=shape.H, K=shape.K, V=shape.V)
    q = draw(1, max(len(shape.lengths), 1), shape.H * shape.group, shape.K)
    return {**qkv(row, draw), "q": q}


def gate(shape: Shape, draw: Draw) -> Arguments:
    """Decays as a model has them, and some that nothing survives."""
    g = torch.nn.functional.logsigmoid(draw(shape.B, shape.T, shape.H * shape.group) + 2)
    return {"g": torch.where(draw(*g.shape) > 2, -1e4, g)}


def growth(shape: Shape, draw: Draw) -> Arguments:
    return {"g": 0.3 * draw(shape.B, shape.T, shape.H * shape.group)}


def sink(shape: Shape, draw: Draw) -> Arguments:
    return {"sink_bias": draw(shape.H * shape.group)}


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    sink_bias: Tensor | None = None,
) -> Tensor:
    return naive_parallel_attn(q, k, v, scale, window_size, g=g, sink_bias=sink_bias)[0]


_spec = functools.partial(OpSpec, state=False, grouped=True)
_GATED = {
    "gate": gate,
    "growth": growth,
    "gate, window": both(gate, window_size=20),
    "growth, scale": both(growth, scale=-0.2),
}

SPECS = [
    _spec(
        name="parallel_attn",
        run=ops.parallel_attn,
        reference=_reference,
        inputs=qkv,
        gradients=("q", "k", "v", "g", "sink_bias"),
        variants={
            **_GATED,
            "plain": {},
            "window": {"window_size": 33},
            "no window": both(gate, sink, window_size=0),
            "sink": sink,
            "gate, window, sink": both(gate, sink, window_size=70),
        },
    ),
    _spec(
        name="parallel_forgetting_attn",
        run=ops.parallel_forgetting_attn,
        reference=_reference,
        inputs=qkv,
        gradients=("q", "k", "v", "g"),
        variants=_GATED,
    ),
    _spec(
        name="attn_decoding_one_step",
        run=ops.attn_decoding_one_step,
        reference=naive_attn_decoding,
        inputs=one_query,
        gradients=(),
        variants={
            "plain": {},
            "window": {"window_size": 33},
            "sink": sink,
            "gate": both(lambda shape, draw: gate(_row(shape), draw), do_gate_scale=True),
            "growth, window, sink": both(
                lambda shape, draw: growth(_row(shape), draw), sink, window_size=20, scale=-0.5
            ),
        },
        along_tokens=False,
    ),
]


def _row(shape: Shape) -> Shape:
    return Shape(T=shape.T, B=1, H=shape.H, group=shape.group)
