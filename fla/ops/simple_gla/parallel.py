"""``parallel_simple_gla``."""

from __future__ import annotations

from torch import Tensor

from fla.ops.common import contract
from fla.ops.simple_gla.engine import attention_map, linear_engine


@contract.public
def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a scalar decay per head, and on request the map of its weights.

    Arguments as for ``chunk_simple_gla``.  With ``output_attentions``, which packed sequences do
    not offer, the second result is ``A_ij = scale q_i·k_j exp(G_i − G_j)`` for j ≤ i,
    ``[B, H, T, T]``, without a gradient.
    """
    if output_attentions and cu_seqlens is not None:
        raise ValueError("output_attentions: expected False with cu_seqlens, got True")
    o, _, _ = linear_engine(
        q, k, v, g=g, scale=scale, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu
    )
    return o, attention_map(q, k, g, scale) if output_attentions else None
