"""``fused_recurrent_lightning_attn``."""

from __future__ import annotations

from torch import Tensor

from fla.ops.common import contract
from fla.ops.lightning_attn.chunk import layer_decay
from fla.ops.simple_gla.engine import linear_engine


@contract.public
def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``chunk_lightning_attn`` for decoding and for short T; with ``reverse`` from the end."""
    o, state, _ = linear_engine(
        q,
        k,
        v,
        g_gamma=layer_decay(q, layer_idx, num_layers),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
    )
    return o, state
