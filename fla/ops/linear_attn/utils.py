"""The normaliser of linear attention and the state that carries it from call to call.

The engine normalises by itself; the two functions do so with outputs that come without.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fla.ops.common import contract
from fla.ops.simple_gla.engine import linear_engine

EPS = 1e-10


def normalize_output(q: Tensor, k: Tensor, o: Tensor) -> Tensor:
    """o_t / (q_t·(k_0 + … + k_t) + 1e-10); no scale is applied here."""
    return normalize_with_z_state(o, q, k, 1.0, None, False, None)[0]


def normalize_with_z_state(
    o: Tensor,
    q: Tensor,
    k: Tensor,
    scale: float,
    z_init: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o_t / (scale q_t·z_t + 1e-10) and the final z [N, 1, H, K].

    z is the running sum of keys from ``z_init``, from the end when reversed: the engine's state for
    values that are all one.
    """
    sizes = contract.operands(q=(q, "B T H K"), k=(k, "B T H K"), o=(o, "B T H V"))
    sizes["N"] = contract.number_of_sequences(q, cu_seqlens)
    contract.operands(sizes, ("q", q), z_init=(z_init, "?N 1 H K"))
    dtype = torch.promote_types(q.dtype, torch.float32)
    norm, z, _ = linear_engine(
        q.to(dtype),
        k.to(dtype),
        k.new_ones(1, dtype=dtype).expand(*k.shape[:-1], 1),
        scale=scale,
        initial_state=None if z_init is None else z_init.permute(0, 2, 3, 1),
        output_final_state=True,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
    )
    return (o / (norm + EPS)).to(o.dtype), cast(Tensor, z).permute(0, 3, 1, 2)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: Any,
    normalize: bool,
    **arguments: Any,
) -> tuple[Tensor, Any]:
    """Run the engine without decay; its state is the pair (kv, z) if it normalises, else kv."""
    initial_z = None
    if isinstance(initial_state, (tuple, list)):
        if not normalize:
            raise TypeError("initial_state: expected a tensor without normalize, got a pair")
        if len(initial_state) != 2:
            raise ValueError(f"initial_state: expected (kv, z), got {len(initial_state)} items")
        initial_state, initial_z = initial_state
    o, kv, z = linear_engine(
        q,
        k,
        v,
        initial_state=initial_state,
        initial_z=initial_z,
        normalize=normalize,
        **arguments,
    )
    return o, (kv, z) if normalize and kv is not None else kv
