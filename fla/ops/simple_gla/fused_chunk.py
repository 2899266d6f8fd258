"""``fused_chunk_simple_gla``."""

from __future__ import annotations

from torch import Tensor

from fla.ops.common import contract
from fla.ops.simple_gla.engine import linear_engine


@contract.public
def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``chunk_simple_gla`` under its other name; the engine fuses wherever that pays."""
    o, state, _ = linear_engine(
        q,
        k,
        v,
        g=g,
        g_gamma=g_gamma,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
    return o, state
