"""``chunk_lightning_attn``."""

from __future__ import annotations

import torch
from torch import Tensor

from fla.ops.common import contract
from fla.ops.common.device import accumulator
from fla.ops.simple_gla.engine import linear_engine


@contract.public
def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a decay fixed by head and layer, in chunks.

    Head h of H decays by ``−(8 / H) (1 − layer_idx / num_layers) h`` a token, in natural log; the
    other arguments are those of ``chunk_simple_gla``.
    """
    o, state, _ = linear_engine(
        q,
        k,
        v,
        g_gamma=layer_decay(q, layer_idx, num_layers),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )
    return o, state


def layer_decay(q: Tensor, layer_idx: int, num_layers: int) -> Tensor:
    """g_gamma [H] of a layer, on the device of q."""
    H = contract.operands(q=(q, "B T H K"))["H"]
    layer_idx = contract.whole_number("layer_idx", layer_idx)
    num_layers = contract.whole_number("num_layers", num_layers)
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    if not 0 <= layer_idx <= num_layers:
        raise ValueError(
            f"layer_idx: expected 0 <= layer_idx <= num_layers = {num_layers}, got {layer_idx}"
        )
    slope = -8.0 * (1.0 - layer_idx / num_layers) / max(H, 1)
    return torch.arange(H, device=q.device, dtype=accumulator(q.dtype)) * slope
