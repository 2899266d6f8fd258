"""``parallel_attn``."""

from __future__ import annotations

from torch import Tensor

from fla.ops.attn.engine import softmax_engine
from fla.ops.common import contract


@contract.public
def parallel_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    *,
    sink_bias: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention with an optional gate, window and sink.

        s_ij = scale q_i·k_j + (G_i − G_j)     i − window_size < j ≤ i
        o_i  = Σ_j exp(s_ij) v_j / (Σ_j exp(s_ij) + exp(sink_bias))

    Args:
        q: queries ``[B, T, HQ, K]``, K up to 256.
        k: keys ``[B, T, H, K]``; HQ a multiple of H, each head serves HQ / H queries.
        v: values ``[B, T, H, V]``, V up to 512.
        g: gate in natural log ``[B, T, HQ]``, G its running sum in time; any float dtype, any sign.
        scale: factor on q·k; ``K ** -0.5`` by default.
        window_size: how many keys a row sees, its own included; all before it by default.  With 0
            the output and all gradients are zero.
        cu_seqlens: boundaries ``[N + 1]`` of sequences packed into a batch of one.
        chunk_indices: accepted for compatibility and not used.
        sink_bias: one more logit a head ``[HQ]``, in the denominator only.

    Returns:
        ``o`` ``[B, T, HQ, V]`` in the dtype of q.
    """
    return softmax_engine(
        q,
        k,
        v,
        g=g,
        sink_bias=sink_bias,
        scale=scale,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
    )
