"""``chunk_kda``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla.ops.common import contract
from fla.ops.kda.engine import Options, delta_engine
from fla.ops.kda.gate import bound


@contract.public
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
    transpose_state_layout: bool | None = None,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """Kimi Delta Attention in chunks: the form for training and prefill.

        S ← Diag(exp(g_t)) S        S ← S + β_t k_t (v_t − Sᵀk_t)ᵀ        o_t = scale Sᵀq_t

    Args:
        q, k: queries and keys ``[B, T, H, K]``, K up to 256.
        v: values ``[B, T, HV, V]``, HV a multiple of H, V up to 512.
        g: natural log of each channel's decay ``[B, T, HV, K]``, or the raw gate.
        beta: how much of the new value replaces the old ``[B, T, HV]``, or its logits.
        scale: factor on the output; ``K ** -0.5`` by default.
        initial_state: state before the first token ``[N, HV, K, V]``, fp32; zeros by default.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: whether q and k are divided by ``sqrt(Σx² + 1e-6)`` first.
        use_gate_in_kernel: whether ``g`` is raw: the decay is ``fused_kda_gate`` of it.
        use_beta_sigmoid_in_kernel: whether ``beta`` is logits.
        allow_neg_eigval: whether the sigmoid of beta is doubled.
        safe_gate: promises decays in ``[lower_bound, 0)``; with ``use_gate_in_kernel`` it wants a
            ``lower_bound`` in ``[-5, 0)``.  The result is the same.
        lower_bound: selects the gate's formula, see ``fused_kda_gate``.
        disable_recompute: whether the backward pass finds decayed q and k kept, three tensors of
            ``[B, T, HV, K]``, in fp32 unless inputs are bf16, and takes as much again while it
            runs, instead of making them anew; small calls do so anyway.  The result is the same.
        return_intermediate_states: whether to return the state before each chunk as well; only
            under ``torch.inference_mode()``, entered outside of what torch.compile sees.
        state_v_first: whether states are ``[N, HV, V, K]``, in and out.
        cu_seqlens: boundaries ``[N + 1]`` of sequences packed into a batch of one.
        cu_seqlens_cpu: a host copy of ``cu_seqlens``, if there is one.
        cp_context: context parallelism, not offered yet.
        use_graph, max_num_seqs: accepted; every packed call can be captured in a CUDA graph.
        A_log, dt_bias: the gate's parameters, HV and HV · K elements in any shape.
        chunk_size: 32 or 64, of plain PyTorch and of ``h``; kernels choose their own, and leave
            ``h`` of chunks of 32 to plain PyTorch.  The results are the same.
        transpose_state_layout: the old name of ``state_v_first``.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of q, and the final state, fp32 (fp64 for fp64 inputs),
        or None.  With ``return_intermediate_states`` also ``h`` ``[B, ceil(T / chunk_size), HV, K,
        V]`` in the dtype of k; packed, the chunks of all sequences in order, followed by unused
        ones if the boundaries are not on the host.
    """
    _check(
        q,
        initial_state,
        use_gate_in_kernel,
        safe_gate,
        lower_bound,
        disable_recompute,
        return_intermediate_states,
        cp_context,
        chunk_size,
    )
    o, final_state, h = delta_engine(
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        initial_state,
        cu_seqlens,
        cu_seqlens_cpu,
        Options(
            scale=scale,
            chunk_size=chunk_size,
            qk_l2norm=use_qk_l2norm_in_kernel,
            gate=use_gate_in_kernel,
            lower_bound=lower_bound,
            beta_sigmoid=use_beta_sigmoid_in_kernel,
            neg_eigval=allow_neg_eigval,
            state_v_first=contract.state_layout(state_v_first, transpose_state_layout),
            output_final_state=output_final_state,
            intermediate_states=return_intermediate_states,
            keep_operands=disable_recompute,
        ),
    )
    return (o, final_state) if h is None else (o, final_state, h)


def _check(
    q,
    initial_state,
    use_gate_in_kernel,
    safe_gate,
    lower_bound,
    disable_recompute,
    return_intermediate_states,
    cp_context,
    chunk_size,
) -> None:
    """What only the chunked form asks for."""
    contract.whole_number("chunk_size", chunk_size)
    if chunk_size not in (32, 64):
        raise ValueError(f"chunk_size: `chunk_size` must be either 32 or 64, got {chunk_size}")
    if cp_context is not None:
        raise ValueError(
            "cp_context: expected None, context parallelism is not offered yet, "
            f"got {type(cp_context).__name__}"
        )
    lower_bound = bound(lower_bound)
    if safe_gate and use_gate_in_kernel and (lower_bound is None or not -5 <= lower_bound < 0):
        raise ValueError(f"lower_bound: expected [-5, 0) with safe_gate, got {lower_bound}")
    if return_intermediate_states and disable_recompute:
        raise ValueError(
            "disable_recompute: expected False with return_intermediate_states, got True"
        )
    if isinstance(initial_state, Tensor) and isinstance(q, Tensor):
        wide = initial_state.dtype == q.dtype == torch.float64
        if initial_state.dtype != torch.float32 and not wide:
            raise TypeError(f"initial_state: expected torch.float32, got {initial_state.dtype}")
