"""The linear engine in Triton, for every GPU from sm_80."""

from __future__ import annotations

from torch import Tensor

from fla.ops.common.boundary import absent
from fla.ops.common.sequences import Sequences
from fla.ops.simple_gla import attention_map as maps
from fla.ops.simple_gla import eager
from fla.ops.simple_gla.chain import run_backward, run_forward
from fla.ops.simple_gla.decay import decays_of, gate_gradient


def forward(q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, options):
    """Return o [B, T, H, V], the final state and z, and the normaliser [B, T, H]."""
    if not q.numel() or not v.numel():  # nothing to launch
        return eager.forward(q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, options)
    q, k, v = (x.contiguous() for x in (q, k, v))
    sequences = Sequences.of(q, cu_seqlens)
    decays, rest = decays_of(sequences, g, g_gamma, q, options.reverse)
    o, state, z, norm = run_forward(
        sequences, q, k, v, decays, rest, initial_state, initial_z, options
    )
    state, z, norm = (absent(q) if x is None else x for x in (state, z, norm))
    return o, state, z, norm


def backward(
    do, dstate, dz, q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, o, norm, options
):
    """Return the gradients of q, k, v, g, the initial state and the initial z."""
    if not q.numel() or not v.numel():
        return eager.backward(
            do, dstate, dz, q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, o, norm,
            options,
        )  # fmt: skip
    do, q, k, v = (x.contiguous() for x in (do, q, k, v))
    sequences = Sequences.of(q, cu_seqlens)
    decays, rest = decays_of(sequences, g, g_gamma, q, options.reverse)
    dq, dk, dv, dstate0, dz0, for_gate = run_backward(
        sequences, do, dstate, dz, q, k, v, decays, rest, initial_state, initial_z, o,
        norm if options.normalize else None, options, g is not None,
    )  # fmt: skip
    dg = None if g is None else gate_gradient(sequences, *for_gate, g, options.reverse)
    return (
        dq,
        dk,
        dv,
        absent(q) if dg is None else dg,
        absent(q) if initial_state is None else dstate0.to(initial_state.dtype),
        absent(q) if initial_z is None else dz0.to(initial_z.dtype),
    )


def attention_map(q: Tensor, k: Tensor, g: Tensor | None, scale: float) -> Tensor:
    """A_ij = scale q_i·k_j exp(G_i − G_j) for j ≤ i, [B, H, T, T]."""
    q, k = q.contiguous(), k.contiguous()
    decays, rest = decays_of(Sequences.of(q, None), g, None, q, False)
    return maps.attention_map(q, k, decays, rest, scale)
