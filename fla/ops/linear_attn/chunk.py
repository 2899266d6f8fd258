"""``chunk_linear_attn``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fla.ops.common import contract
from fla.ops.linear_attn.utils import linear_attention


@contract.public
def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Linear attention without decay, in chunks: the form for training and prefill.

        S_t = S_{t-1} + k_t v_tᵀ     z_t = z_{t-1} + k_t     o_t = scale q_tᵀ S_t

    Args:
        q, k: queries and keys ``[B, T, H, K]``, K up to 512.
        v: values ``[B, T, H, V]``, V up to 512.
        scale: factor on the output; ``K ** -0.5`` by default.
        initial_state: kv ``[N, H, K, V]``, or with ``normalize`` the pair (kv, z), z
            ``[N, 1, H, K]``; a missing z is zero.
        output_final_state: whether to return the state after the last token.
        normalize: whether to divide ``o_t`` by ``scale q_t·z_t + 1e-10``.
        cu_seqlens: boundaries ``[N + 1]`` of sequences packed into a batch of one.

    Returns:
        ``o`` ``[B, T, H, V]`` in the dtype of q, and the final state in fp32 or None: the pair
        (kv, z) with ``normalize``, kv without.
    """
    return linear_attention(
        q,
        k,
        v,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        normalize=normalize,
        cu_seqlens=cu_seqlens,
    )
