"""The specs of the delta engine."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fla import ops
from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd
from fla.ops.kda.gate import fused_kda_gate, naive_kda_gate, naive_kda_lowerbound_gate
from fla.ops.kda.naive import naive_recurrent_kda
from fla.testing.spec import Arguments, Draw, OpSpec, Shape, both


def operands(shape: Shape, draw: Draw) -> Arguments:
    """Keys of norm one, decays from −1e-3 to −1e4, β between 0 and 1."""
    B, T, H = shape.B, shape.T, shape.H
    HV = H * shape.group
    g = -torch.exp(draw(B, T, HV, shape.K) * 2 - 3)
    return {
        "q": draw(B, T, H, shape.K),
        "k": torch.nn.functional.normalize(draw(B, T, H, shape.K), dim=-1),
        "v": draw(B, T, HV, shape.V),
        "g": torch.where(draw(*g.shape) > 2.5, -1e4, g),
        "beta": draw(B, T, HV).sigmoid(),
    }


def raw(shape: Shape, draw: Draw) -> Arguments:
    """What a model's projections put out: norms, gate and sigmoid are left to the operator."""
    made = operands(shape, draw)
    HV = shape.H * shape.group
    return {
        **made,
        "k": draw(*made["k"].shape),
        "g": draw(*made["g"].shape),
        "beta": draw(*made["beta"].shape),
        "A_log": draw(HV) / 2,
        "dt_bias": draw(HV * shape.K),
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
    }


def growth(shape: Shape, draw: Draw) -> Arguments:
    return {"g": 0.05 * draw(shape.B, shape.T, shape.H * shape.group, shape.K)}


def channel_beta(shape: Shape, draw: Draw) -> Arguments:
    return {"beta": draw(shape.B, shape.T, shape.H * shape.group, shape.V)}


def state(shape: Shape, draw: Draw) -> Arguments:
    made = draw(shape.N, shape.H * shape.group, shape.K, shape.V)
    return {"initial_state": made, "output_final_state": True}


def state_v_first(shape: Shape, draw: Draw) -> Arguments:
    made = state(shape, draw)
    return {**made, "initial_state": made["initial_state"].mT.contiguous(), "state_v_first": True}


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    if use_qk_l2norm_in_kernel:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if use_gate_in_kernel:
        g = _gate_reference(g, A_log, dt_bias, lower_bound)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    o, final = naive_recurrent_kda(q, k, v, g, beta, scale, initial_state, output_final_state)
    return o, final.mT if state_v_first and final is not None else final


def _gate_reference(g, A_log=None, dt_bias=None, lower_bound=None, output_dtype=torch.float64):
    if lower_bound is None:
        return naive_kda_gate(g, A_log, dt_bias, output_dtype)
    return naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound, output_dtype)


def _serve(**arguments: Any) -> tuple[Tensor, Tensor | None]:
    return fused_recurrent_kda_fwd(**arguments, inplace_final_state=False)


def _gate(g: Tensor, **arguments: Any) -> Tensor:
    return fused_kda_gate(g, **arguments, output_dtype=g.dtype)


def gate_operands(shape: Shape, draw: Draw) -> Arguments:
    HV = shape.H * shape.group
    return {
        "g": draw(shape.B, shape.T, HV, shape.K) * 3,
        "A_log": draw(HV),
        "dt_bias": draw(HV, shape.K),
    }


_GRADIENTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
_spec = functools.partial(
    OpSpec,
    reference=_reference,
    inputs=operands,
    gradients=_GRADIENTS,
    grouped=True,
    fp32_bound=1e-4,
)
_VARIANTS = {
    "plain": {},
    "state": state,
    "growth": growth,
    "raw, lower bound, state": both(raw, state, lower_bound=-5.0),
    "raw, softplus, doubled": both(raw, allow_neg_eigval=True, scale=0.7),
    "v first": state_v_first,
}
_RECURRENT = {
    **_VARIANTS,
    "channel beta": both(channel_beta, state),
    "raw, channel beta": both(raw, channel_beta, lower_bound=-2.0),
}

SPECS = [
    _spec(
        name="chunk_kda",
        run=ops.chunk_kda,
        variants={
            **_VARIANTS,
            "chunk 32": both(raw, state_v_first, chunk_size=32, safe_gate=True, lower_bound=-5.0),
            "bound alone": both(raw, lower_bound=-3.0, A_log=None, dt_bias=None),
        },
    ),
    _spec(name="fused_recurrent_kda", run=ops.fused_recurrent_kda, variants=_RECURRENT),
    _spec(name="fused_recurrent_kda_fwd", run=_serve, variants=_RECURRENT, gradients=()),
    OpSpec(
        name="fused_kda_gate",
        run=_gate,
        reference=_gate_reference,
        inputs=gate_operands,
        gradients=("g", "A_log", "dt_bias"),
        variants={"softplus": {}, "lower bound": {"lower_bound": -5.0}},
        grouped=True,
        packed=False,
        state=False,
        along_tokens=False,
    ),
]
