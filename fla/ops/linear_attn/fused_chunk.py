"""``fused_chunk_linear_attn``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fla.ops.common import contract
from fla.ops.linear_attn.utils import linear_attention


@contract.public
def fused_chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """``chunk_linear_attn`` under its other name; the engine fuses wherever that pays."""
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
