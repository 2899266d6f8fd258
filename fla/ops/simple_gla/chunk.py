"""``chunk_simple_gla``."""

from __future__ import annotations

from torch import Tensor

from fla.ops.common import contract
from fla.ops.simple_gla.engine import linear_engine


@contract.public
def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a scalar decay per head, in chunks: the form for training and prefill.

        S_t = exp(g_t) S_{t-1} + k_t v_tᵀ        o_t = scale q_tᵀ S_t

    Args:
        q, k: queries and keys ``[B, T, H, K]``, K up to 512.
        v: values ``[B, T, H, V]``, V up to 512.
        g: natural log of each token's decay ``[B, T, H]``; any float dtype.
        g_gamma: natural log of a decay constant in time ``[H]``, instead of ``g``; no gradient.
        scale: factor on the output; ``K ** -0.5`` by default.
        initial_state: state before the first token ``[N, H, K, V]``; zeros by default.
        output_final_state: whether to return the state after the last token.
        state_v_first: whether states are ``[N, H, V, K]``, in and out.
        cu_seqlens: boundaries ``[N + 1]`` of sequences packed into a batch of one.
        cu_seqlens_cpu: a host copy of ``cu_seqlens``, if there is one; only checked.
        chunk_size: 16, 32, 64 or 128, in plain PyTorch; kernels take 64.  Results are the same.

    Returns:
        ``o`` ``[B, T, H, V]`` in the dtype of q, and the final state in fp32 (fp64 for fp64 inputs)
        or None.
    """
    o, state, _ = linear_engine(
        q,
        k,
        v,
        g=g,
        g_gamma=g_gamma,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
        chunk_size=chunk_size,
    )
    return o, state
