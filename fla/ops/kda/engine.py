"""The delta engine: one memory that forgets by channel and corrects itself.

    S ← Diag(exp(g_t)) S        S ← S + β_t k_t (v_t − Sᵀk_t)ᵀ        o_t = scale Sᵀq_t

``chunk_kda`` and ``fused_recurrent_kda`` are faces over ``delta_engine``; serving is an operator of
its own.  The operators take raw operands: norms, gates and sigmoids are their own work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fla.ops.common import contract
from fla.ops.common.boundary import Operator, absent, differentiable
from fla.ops.common.device import accumulator, lacks_hopper, lacks_triton, on_host
from fla.ops.common.dispatch import Engine, Implementation, Problem
from fla.ops.common.once import finding, once
from fla.ops.common.sequences import Sequences
from fla.ops.kda.gate import bound, gate_parameters

HEAD_LIMITS = {"K": 256, "V": 512}


class Options(NamedTuple):
    """What a call wants beside its tensors; ``chunk_size`` 0 is the recurrent form."""

    scale: float | None = None
    chunk_size: int = 0
    qk_l2norm: bool = False
    gate: bool = False
    lower_bound: float | None = None
    beta_sigmoid: bool = False
    neg_eigval: bool = False
    state_v_first: bool = False
    output_final_state: bool = False
    intermediate_states: bool = False
    keep_operands: bool = False


Checked = finding(Options)


def _lacks_triton(at: Problem) -> str | None:
    reason = lacks_triton(at.device, at.dtype)
    if reason is None and at.options is not None:
        if at.options.intermediate_states and at.options.chunk_size == 32:
            return "kernels keep states before chunks of 64, not of 32"
    return reason


def _lacks_hopper(at: Problem) -> str | None:
    reason = _lacks_triton(at) or lacks_hopper(at.device, at.dtype, "delta")
    if reason is not None:
        return reason
    if at.dtype != torch.bfloat16:
        return f"takes bf16, not {at.dtype}: decayed operands leave its range"
    if at.K not in (64, 128) or at.V % 64:
        return f"takes K of 64 and 128 and V in steps of 64, not {at.K} and {at.V}"
    if at.options is not None and not at.options.chunk_size:
        return "takes chunks, not the recurrent form"
    return None


ENGINE = Engine(
    "delta",
    # operands and gradients of chunks, and the scans of long calls; the rest it hands on
    Implementation("hopper", "fla.ops.kda.hopper", _lacks_hopper),
    Implementation("triton", "fla.ops.kda.triton", _lacks_triton),
    Implementation("eager", "fla.ops.kda.eager"),
)
# A beta for each channel has no triangular system in common, so no chunks; token by token, a
# backward pass would keep a state a token.
CHANNELWISE_BACKWARD = Engine(
    "channelwise delta backward",
    Implementation(
        "triton",
        "fla.ops.kda.triton",
        lambda at: (
            lacks_triton(at.device, at.dtype)
            or "a beta for each channel has no chunks, so kernels would keep a state a token"
        ),
    ),
    Implementation("eager", "fla.ops.kda.eager"),
)


def delta_engine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check the arguments and run: o, the final state and the states before the chunks."""
    if not options.gate:
        A_log = dt_bias = None
    operands = q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu
    options = _checked(*operands, options)
    o, final_state, h, _ = _forward(*operands, options)
    return (
        o,
        final_state if options.output_final_state else None,
        _known(h, cu_seqlens, cu_seqlens_cpu, options) if options.intermediate_states else None,
    )


def delta_serve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    indices: Tensor | None,
    accepted: Tensor | None,
    out: Tensor | None,
    inplace: bool,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Check the arguments of a serving step and run it: o and the state that was written."""
    if not options.gate:
        A_log = dt_bias = None
    operands = q, k, v, g, beta, A_log, dt_bias
    state_shape, options = _checked_serving(
        *operands, initial_state, cu_seqlens, indices, accepted, out, inplace, options
    )
    contract.written(initial_state=initial_state if inplace else None, out=out)
    with torch.no_grad():
        written = initial_state
        if not inplace:
            written = q.new_zeros(state_shape, dtype=accumulator(q.dtype))
            if initial_state is not None:
                written.copy_(initial_state)
        out = v.new_empty(v.shape) if out is None else out
        others = written, out, cu_seqlens, indices, accepted
        _serve(*operands, *others, options)
    return out, written if inplace or options.output_final_state else None


@once
def _checked(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu, options: Options
) -> Options:
    """What a call wants of its arguments; its options with their numbers."""
    sizes = _sizes(q, k, v, g, beta, A_log, dt_bias, options)
    sizes["N"] = contract.number_of_sequences(q, cu_seqlens, cu_seqlens_cpu)
    state = (initial_state, f"?N HV {_tail(options)}")
    contract.operands(sizes, ("q", q), initial_state=state)
    return _with_numbers(options, sizes["K"])


@once
def _checked_serving(
    q, k, v, g, beta, A_log, dt_bias,
    initial_state, cu_seqlens, indices, accepted, out, inplace: bool, options: Options,
) -> tuple[tuple[int, ...], Options]:  # fmt: skip
    """What a serving step wants of its arguments; the shape of its sequences' states; options."""
    sizes = _sizes(q, k, v, g, beta, A_log, dt_bias, options)
    sizes["N"] = contract.number_of_sequences(q, cu_seqlens)
    _check_slots(sizes["N"], q.device, indices, accepted, inplace)
    if initial_state is None and inplace:
        raise ValueError("initial_state: expected a tensor to update in place, got None")
    rows = "N" if indices is None else "slots"
    state = (initial_state, f"?{rows} HV {_tail(options)}")
    contract.operands(sizes, ("q", q), initial_state=state, out=(out, "?B T HV V"))
    shape = tuple(sizes[letter] for letter in ("N", "HV", *_tail(options).split()))
    return shape, _with_numbers(options, sizes["K"])


def _sizes(q, k, v, g, beta, A_log, dt_bias, options: Options) -> dict[str, int]:
    """The shapes, dtypes and devices that the engine takes, and what flags want of each other."""
    per_channel = options.chunk_size == 0 and isinstance(beta, Tensor) and beta.dim() == 4
    sizes = contract.operands(
        q=(q, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T HV V"),
        g=(g, "B T HV K"),
        beta=(beta, "B T HV V" if per_channel else "B T HV"),
    )
    contract.divides(sizes, "HV", "H")
    contract.at_most(sizes, **HEAD_LIMITS)
    if options.gate:
        parameters = gate_parameters(sizes, A_log, dt_bias, options.lower_bound)
        contract.operands(sizes, ("q", q), **parameters)
    if options.neg_eigval and not options.beta_sigmoid:
        raise ValueError(
            "allow_neg_eigval: expected False without use_beta_sigmoid_in_kernel, got True; "
            "it doubles the sigmoid"
        )
    return sizes


def _check_slots(N: int, device: torch.device, indices, accepted, inplace: bool) -> None:
    if indices is None:
        if accepted is not None:
            raise ValueError(
                "num_accepted_tokens: expected None without ssm_state_indices, got a tensor"
            )
        return
    if not inplace:
        raise ValueError("inplace_final_state: expected True with ssm_state_indices, got False")
    for name, tensor, dims in (
        ("ssm_state_indices", indices, (1, 2)),
        ("num_accepted_tokens", accepted, (1,)),
    ):
        if tensor is None:
            continue
        contract.index_tensor(name, tensor)
        if tensor.device != device:
            raise ValueError(f"{name}: expected the device of q, {device}, got {tensor.device}")
        if tensor.dim() not in dims or tensor.shape[0] != N:
            shapes = f"[N] = [{N}]" + (f" or [N, tokens] = [{N}, tokens]" if 2 in dims else "")
            raise ValueError(f"{name}: expected {shapes}, got {list(tensor.shape)}")


def _check_slot_values(state, cu_seqlens, T: int, indices, accepted) -> None:
    """Check what the host knows, of the entries that are used; devices are never asked."""
    if indices is None or not indices.shape[0]:
        return
    known = on_host(indices)
    (N, tokens), slots, longest = indices.shape, state.shape[0], T
    if cu_seqlens is not None:
        longest = int(cu_seqlens.diff().max()) if known else 0
    if longest > tokens:
        raise ValueError(
            f"ssm_state_indices: expected a slot for each of {longest} tokens, got {tokens}"
        )
    if not known or not longest:
        return
    lengths = indices.new_full((N,), T) if cu_seqlens is None else cu_seqlens.diff()
    column = torch.arange(tokens, device=indices.device)
    used = column < lengths[:, None]  # written; [N, tokens]
    if accepted is not None:
        there = accepted[lengths > 0]
        if not 1 <= int(there.min()) <= int(there.max()) <= tokens:
            raise ValueError(
                f"num_accepted_tokens: expected 1 to {tokens}, got {accepted.tolist()}"
            )
        used |= (column == accepted[:, None] - 1) & (lengths[:, None] > 0)  # read
    highest = int(indices[used].max())
    if highest >= slots:
        raise ValueError(f"ssm_state_indices: expected slots below {slots}, got {highest}")


def _tail(options: Options) -> str:
    return "V K" if options.state_v_first else "K V"


def _with_numbers(options: Options, K: int) -> Options:
    scale = contract.scale_or_default(options.scale, K)
    return Checked(*options._replace(scale=scale, lower_bound=bound(options.lower_bound)))


def _known(h: Tensor, cu_seqlens, cu_seqlens_cpu, options: Options) -> Tensor:
    """The states of the chunks that there are, where the host can count them."""
    if cu_seqlens_cpu is None and cu_seqlens is not None and on_host(cu_seqlens):
        cu_seqlens_cpu = cu_seqlens
    if cu_seqlens_cpu is None:
        return h
    C = options.chunk_size
    return h[:, : int(((cu_seqlens_cpu.diff() + C - 1) // C).sum())]


def _run_forward(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu, options
):
    contract.boundaries(cu_seqlens, cu_seqlens_cpu, q.shape[1])
    # Here, because torch.compile cannot trace the question
    if options.intermediate_states and not torch.is_inference_mode_enabled():
        raise ValueError(
            "return_intermediate_states: expected False outside of torch.inference_mode(), got True"
        )
    operands = q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens
    return ENGINE.stages(q, v, options).forward(*operands, options)


def _run_backward(
    q, do, dstate, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, kept, options
):
    if do is None:
        do = v.new_zeros(v.shape)
    operands = q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens
    engine = CHANNELWISE_BACKWARD if beta.dim() == 4 else ENGINE
    return engine.stages(q, v, options).backward(do, dstate, *operands, options, kept)


def _run_serve(
    q, k, v, g, beta, A_log, dt_bias, state, out, cu_seqlens, indices, accepted, options
):
    contract.boundaries(cu_seqlens, None, q.shape[1])
    if indices is not None and indices.dim() == 1:
        indices = indices[:, None]
    _check_slot_values(state, cu_seqlens, q.shape[1], indices, accepted)
    operands = q, k, v, g, beta, A_log, dt_bias, state, out, cu_seqlens, indices, accepted
    ENGINE.stages(q, v, options).serve(*operands, options)


def _fake_forward(q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, cu_seqlens_cpu, options):
    B, K, (HV, V) = q.shape[0], q.shape[-1], v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tail = (V, K) if options.state_v_first else (K, V)
    final, h = absent(q), absent(q)
    if options.output_final_state:
        final = q.new_empty(N, HV, *tail, dtype=accumulator(q.dtype))
    if options.intermediate_states:
        chunks = Sequences.of(q, cu_seqlens).most_chunks(options.chunk_size)
        h = k.new_empty(B, chunks, HV, *tail)
    kept = ENGINE.stages(q, v, options).kept(q, v, cu_seqlens, options)
    return v.new_empty(v.shape), final, h, kept


def _fake_backward(q, do, dstate, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, kept, options):
    return tuple(
        absent(q) if each is None else each.new_empty(each.shape)
        for each in (q, k, v, g, beta, A_log, dt_bias, state)
    )


_OPERANDS = "Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias"
_OPTIONS = (
    "float scale, int chunk_size, bool qk_l2norm, bool gate, float? lower_bound, "
    "bool beta_sigmoid, bool neg_eigval, bool state_v_first, bool output_final_state, "
    "bool intermediate_states, bool keep_operands"
)
_forward = Operator(
    f"delta_forward(Tensor q, {_OPERANDS}, Tensor? initial_state, Tensor? cu_seqlens, "
    f"Tensor? cu_seqlens_cpu, {_OPTIONS}) -> (Tensor o, Tensor state, Tensor h, Tensor kept)",
    _run_forward,
    _fake_forward,
    Options,
)
_backward = Operator(
    f"delta_backward(Tensor q, Tensor? do, Tensor? dstate, {_OPERANDS}, Tensor? initial_state, "
    f"Tensor? cu_seqlens, Tensor kept, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, "
    "Tensor dbeta, Tensor dA_log, Tensor ddt_bias, Tensor dstate)",
    _run_backward,
    _fake_backward,
    Options,
)
_serve = Operator(
    f"delta_serve(Tensor q, {_OPERANDS}, Tensor(a!) state, Tensor(b!) out, Tensor? cu_seqlens, "
    f"Tensor? indices, Tensor? accepted, {_OPTIONS}) -> ()",
    _run_serve,
    lambda *operands: None,
    Options,
)


def _save(ctx, operands, output) -> None:
    q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, _ = operands
    h, kept = output[2:]
    ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, kept)
    ctx.mark_non_differentiable(h, kept)


def _gradients(ctx, do, dstate, *_):
    q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, kept = ctx.saved_tensors
    gradients = _backward(
        q, do, dstate, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, kept, ctx.options
    )
    optional = (A_log, dt_bias, state)
    gradients = (
        *gradients[:5],
        *(
            None if given is None else gradient
            for given, gradient in zip(optional, gradients[5:], strict=True)
        ),
    )
    return *gradients, None, None


differentiable(_forward, _backward, _save, _gradients)
