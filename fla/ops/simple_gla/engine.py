"""The linear engine: one memory with a scalar decay per head, and its optional normaliser.

    S_t = exp(g_t) S_{t-1} + k_t v_tᵀ        o_t = scale q_tᵀ S_t

Every function of simple_gla, linear_attn and lightning_attn is a face over ``linear_engine``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fla.ops.common import contract
from fla.ops.common.boundary import Operator, absent, differentiable
from fla.ops.common.device import accumulator, lacks_hopper, lacks_triton
from fla.ops.common.dispatch import Engine, Implementation, Problem
from fla.ops.common.once import finding, once

CHUNK_SIZES = (16, 32, 64, 128)
HEAD_LIMITS = {"K": 512, "V": 512}


class Options(NamedTuple):
    """What a call wants beside its tensors; ``chunk_size`` 0 lets the implementation choose.

    ``normalize`` is for calls without a gate.
    """

    scale: float
    chunk_size: int = 0
    reverse: bool = False
    normalize: bool = False
    state_v_first: bool = False
    output_final_state: bool = False


_Checked = finding(Options)


class _MapOptions(NamedTuple):
    """The same for the map of attention."""

    scale: float


def _lacks_hopper(problem: Problem) -> str | None:
    reason = lacks_hopper(problem.device, problem.dtype, "linear walk")
    if reason is not None:
        return reason
    if problem.dtype != torch.bfloat16:
        return f"takes bf16, not {problem.dtype}: intermediate results may leave its range"
    if problem.K not in (64, 128, 256) or problem.V % 64:
        return f"takes K of 64, 128 and 256 and V in steps of 64, not {problem.K} and {problem.V}"
    if problem.options is not None and problem.options.normalize:
        return "takes no normaliser"
    return None


ENGINE = Engine(
    "linear",
    # long calls; the rest it hands on
    Implementation("hopper", "fla.ops.simple_gla.hopper", _lacks_hopper),
    Implementation(
        "triton",
        "fla.ops.simple_gla.triton",
        lambda problem: lacks_triton(problem.device, problem.dtype),
    ),
    Implementation("eager", "fla.ops.simple_gla.eager"),
)


def linear_engine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    initial_z: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check the arguments and run: o, the final state and the final z."""
    operands = q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, cu_seqlens_cpu
    flags = reverse, normalize, state_v_first, output_final_state
    o, state, z, *_ = _forward(*operands, _checked(*operands, scale, chunk_size, *flags))
    if not output_final_state:
        return o, None, None
    return o, state, z if normalize else None


@once
def _checked(
    q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, cu_seqlens_cpu,
    scale, chunk_size, reverse: bool, normalize: bool, state_v_first: bool,
    output_final_state: bool,
) -> Options:  # fmt: skip
    """The shapes, dtypes and devices that the engine takes, and the call's options."""
    sizes = contract.operands(
        q=(q, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T H V"),
        g=(g, "?B T H"),
        g_gamma=(g_gamma, "?H"),
    )
    contract.at_most(sizes, **HEAD_LIMITS)
    if g is not None and g_gamma is not None:
        raise ValueError("g_gamma: expected None beside g, got a tensor; only one decay can hold")
    sizes["N"] = contract.number_of_sequences(q, cu_seqlens, cu_seqlens_cpu)
    contract.operands(
        sizes,
        ("q", q),
        initial_state=(initial_state, "?N H V K" if state_v_first else "?N H K V"),
        **{"initial_state[1]": (initial_z, "?N 1 H K")},
    )
    if chunk_size is not None:
        contract.one_of("chunk_size", chunk_size, CHUNK_SIZES)
    scale = contract.scale_or_default(scale, sizes["K"])
    flags = reverse, normalize, state_v_first, output_final_state
    return _Checked(scale, chunk_size or 0, *flags)


def attention_map(q: Tensor, k: Tensor, g: Tensor | None, scale: float | None) -> Tensor:
    """A_ij = scale q_i·k_j exp(G_i − G_j) for j ≤ i, [B, H, T, T], without a gradient."""
    options = _MapOptions(contract.scale_or_default(scale, q.shape[-1]))
    return _attention_map(q.detach(), k.detach(), None if g is None else g.detach(), options)


def _run_forward(
    q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, cu_seqlens_cpu, options
):
    contract.boundaries(cu_seqlens, cu_seqlens_cpu, q.shape[1])
    stages = ENGINE.stages(q, v, options)
    return stages.forward(q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, options)


def _run_backward(
    q, do, dstate, dz, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, o, norm, sums,
    rests, options,
):  # fmt: skip
    stages = ENGINE.stages(q, v, options)
    if do is None:
        do = v.new_zeros(v.shape)
    return stages.backward(
        do, dstate, dz, q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, o, norm, sums,
        rests, options,
    )  # fmt: skip


def _run_attention_map(q, k, g, options):
    scale = options.scale
    return ENGINE.stages(q, k, Options(scale)).attention_map(q, k, g, scale)


def _fake_forward(q, k, v, g, g_gamma, state, z, cu_seqlens, cu_seqlens_cpu, options):
    B, T, H, K = q.shape
    V = v.shape[-1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulator(q.dtype)
    final, final_z, norm = absent(q), absent(q), absent(q)
    if options.output_final_state:
        tail = (V, K) if options.state_v_first else (K, V)
        final = q.new_empty(N, H, *tail, dtype=dtype)
        if options.normalize:
            final_z = q.new_empty(N, 1, H, K, dtype=dtype)
    if options.normalize:
        norm = q.new_empty(B, T, H, dtype=dtype)
    sums = (absent(q) if x is None else x for x in ENGINE.stages(q, v, options).new_sums(q, g))
    return v.new_empty(v.shape), final, final_z, norm, *sums


def _fake_backward(q, do, dstate, dz, k, v, g, g_gamma, state, z, *others):
    return tuple(
        absent(q) if each is None else each.new_empty(each.shape) for each in (q, k, v, g, state, z)
    )


_OPTIONS = (
    "float scale, int chunk_size, bool reverse, bool normalize, bool state_v_first, "
    "bool output_final_state"
)
_forward = Operator(
    "linear_forward(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? g_gamma, "
    "Tensor? initial_state, Tensor? initial_z, Tensor? cu_seqlens, Tensor? cu_seqlens_cpu, "
    f"{_OPTIONS}) -> (Tensor o, Tensor state, Tensor z, Tensor norm, Tensor sums, "
    "Tensor rests)",
    _run_forward,
    _fake_forward,
    Options,
)
_backward = Operator(
    "linear_backward(Tensor q, Tensor? do, Tensor? dstate, Tensor? dz, Tensor k, Tensor v, "
    "Tensor? g, Tensor? g_gamma, Tensor? initial_state, Tensor? initial_z, Tensor? cu_seqlens, "
    f"Tensor? o, Tensor norm, Tensor sums, Tensor rests, {_OPTIONS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dstate, Tensor dz)",
    _run_backward,
    _fake_backward,
    Options,
)
_attention_map = Operator(
    "linear_attention_map(Tensor q, Tensor k, Tensor? g, float scale) -> Tensor",
    _run_attention_map,
    lambda q, *others: q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[1]),
    _MapOptions,
)


def _save(ctx, operands, output) -> None:
    q, k, v, g, g_gamma, state, z, cu_seqlens, _ = operands
    o, _, _, *kept = output
    if not ctx.options.normalize:
        o = None  # only the normaliser asks for it, and callers may want to write over it
    ctx.save_for_backward(q, k, v, g, g_gamma, state, z, cu_seqlens, o, *kept)
    ctx.mark_non_differentiable(*kept)


def _gradients(ctx, do, dstate, dz, *_):
    q, k, v, g, g_gamma, state, z, cu_seqlens, o, *kept = ctx.saved_tensors
    dq, dk, dv, dg, dstate, dz = _backward(
        q, do, dstate, dz, k, v, g, g_gamma, state, z, cu_seqlens, o, *kept, ctx.options
    )
    dg, dstate, dz = (
        None if given is None else gradient
        for given, gradient in ((g, dg), (state, dstate), (z, dz))
    )
    return dq, dk, dv, dg, None, dstate, dz, None, None


differentiable(_forward, _backward, _save, _gradients)
