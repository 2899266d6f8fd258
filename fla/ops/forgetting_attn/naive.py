"""The textbook of forgetting attention."""

from __future__ import annotations

from torch import Tensor

from fla.ops.attn.naive import naive_parallel_attn


def naive_forgetting_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    window_size: int | None = None,
) -> Tensor:
    """``naive_parallel_attn`` with a gate g [B, T, HQ]."""
    return naive_parallel_attn(q, k, v, scale, window_size, g=g)[0]
