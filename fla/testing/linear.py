"""The specs of the linear engine and its faces."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fla import ops
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.simple_gla.naive import naive_parallel_simple_gla, naive_recurrent_simple_gla
from fla.testing.spec import Arguments, Draw, OpSpec, Shape, both

LAYER = {"layer_idx": 1, "num_layers": 4}


def qkv(shape: Shape, draw: Draw) -> Arguments:
    B, T, H = shape.B, shape.T, shape.H
    return {
        "q": draw(B, T, H, shape.K),
        "k": draw(B, T, H, shape.K),
        "v": draw(B, T, H, shape.V),
    }


def gate(shape: Shape, draw: Draw) -> Arguments:
    """Decays as a model has them, and some that nothing survives."""
    g = torch.nn.functional.logsigmoid(draw(shape.B, shape.T, shape.H) + 2)
    return {"g": torch.where(draw(*g.shape) > 2, -1e4, g)}


def growth(shape: Shape, draw: Draw) -> Arguments:
    return {"g": 0.1 * draw(shape.B, shape.T, shape.H)}


def head_gate(shape: Shape, draw: Draw) -> Arguments:
    return {"g_gamma": -draw(shape.H).abs() / 8}


def state(shape: Shape, draw: Draw) -> Arguments:
    return {
        "initial_state": draw(shape.N, shape.H, shape.K, shape.V),
        "output_final_state": True,
    }


def state_v_first(shape: Shape, draw: Draw) -> Arguments:
    return {
        "initial_state": draw(shape.N, shape.H, shape.V, shape.K),
        "output_final_state": True,
        "state_v_first": True,
    }


def state_pair(shape: Shape, draw: Draw) -> Arguments:
    z = draw(shape.N, 1, shape.H, shape.K).abs() + 1
    return {"initial_state": (state(shape, draw)["initial_state"], z), "output_final_state": True}


def positive_qkv(shape: Shape, draw: Draw) -> Arguments:
    """Queries and keys for which the normaliser stays away from zero."""
    made = qkv(shape, draw)
    return {**made, "q": made["q"].abs() + 0.1, "k": made["k"].abs() + 0.1}


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    if g_gamma is not None:
        g = g_gamma.expand(q.shape[:3])
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    if reverse:
        q, k, v = (x.flip(1) for x in (q, k, v))
        g = None if g is None else g.flip(1)
    o, final = naive_recurrent_simple_gla(q, k, v, g, scale, initial_state, output_final_state)
    if state_v_first and final is not None:
        final = final.mT
    return o.flip(1) if reverse else o, final


def _lightning_reference(q, k, v, layer_idx, num_layers, **more):
    heads = torch.arange(q.shape[2], dtype=q.dtype, device=q.device)
    g_gamma = -8.0 / q.shape[2] * (1 - layer_idx / num_layers) * heads
    return _reference(q, k, v, g_gamma=g_gamma, **more)


def _linear_reference(q, k, v, reverse=False, **more):
    if reverse:
        q, k, v = (x.flip(1) for x in (q, k, v))
    o, final = naive_recurrent_linear_attn(q, k, v, **more)
    return o.flip(1) if reverse else o, final


def _parallel_reference(q, k, v, g=None, scale=None, output_attentions=False):
    o, A = naive_parallel_simple_gla(q, k, v, g, scale)
    return o, A.detach() if output_attentions else None


_spec = functools.partial(OpSpec, inputs=qkv)
_gated = functools.partial(
    _spec, reference=_reference, gradients=("q", "k", "v", "g", "initial_state")
)
_lightning = functools.partial(
    _spec, reference=_lightning_reference, gradients=("q", "k", "v", "initial_state")
)
_linear = functools.partial(
    _spec, reference=_linear_reference, gradients=("q", "k", "v", "initial_state")
)
_GATES = {
    "plain": {},
    "gate": gate,
    "gate, state": both(gate, state),
    "growth": growth,
    "head gate, state": both(head_gate, state),
}
_NORMALIZED = {
    "state": both(state, normalize=False),
    "normalised": both(positive_qkv, normalize=True, output_final_state=True),
    "normalised, state": both(positive_qkv, state_pair, normalize=True),
    "normalised, kv state": both(positive_qkv, state, normalize=True),
}

SPECS = [
    _gated(
        name="chunk_simple_gla",
        run=ops.chunk_simple_gla,
        variants={
            **_GATES,
            "v first": both(gate, state_v_first),
            "chunk 16": both(gate, state, chunk_size=16),
            "chunk 128": both(gate, state, chunk_size=128, scale=0.3),
        },
    ),
    _gated(name="fused_chunk_simple_gla", run=ops.fused_chunk_simple_gla, variants=_GATES),
    _gated(
        name="fused_recurrent_simple_gla",
        run=ops.fused_recurrent_simple_gla,
        variants={
            **_GATES,
            "v first": both(gate, state_v_first),
            "reverse": both(gate, state, reverse=True),
            "reverse, head gate, v first": both(head_gate, state_v_first, reverse=True),
        },
    ),
    _spec(
        name="parallel_simple_gla",
        run=ops.parallel_simple_gla,
        reference=_parallel_reference,
        gradients=("q", "k", "v", "g"),
        variants={"plain": {}, "gate": gate},
        state=False,
    ),
    _spec(
        name="parallel_simple_gla, map",
        run=ops.parallel_simple_gla,
        reference=_parallel_reference,
        gradients=("q", "k", "v", "g"),
        variants={
            "plain": {"output_attentions": True},
            "gate": both(gate, output_attentions=True, scale=0.5),
        },
        state=False,
        packed=False,
    ),
    _linear(name="chunk_linear_attn", run=ops.chunk_linear_attn, variants=_NORMALIZED),
    _linear(name="fused_chunk_linear_attn", run=ops.fused_chunk_linear_attn, variants=_NORMALIZED),
    _linear(
        name="fused_recurrent_linear_attn",
        run=ops.fused_recurrent_linear_attn,
        variants={
            **_NORMALIZED,
            "reverse": both(positive_qkv, state_pair, normalize=True, reverse=True),
        },
    ),
    _lightning(
        name="chunk_lightning_attn",
        run=ops.chunk_lightning_attn,
        variants={"plain": LAYER, "state": both(state, **LAYER)},
    ),
    _lightning(
        name="fused_recurrent_lightning_attn",
        run=ops.fused_recurrent_lightning_attn,
        variants={
            "state": both(state, **LAYER),
            "reverse": both(state, reverse=True, **LAYER),
        },
    ),
]
