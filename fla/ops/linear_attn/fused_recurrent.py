"""``fused_recurrent_linear_attn``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fla.ops.common import contract
from fla.ops.linear_attn.utils import linear_attention


@contract.public
def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Linear attention without decay: the form for decoding and for short T.

    Arguments as for ``chunk_linear_attn``, but ``normalize`` is off by default.  With ``reverse``
    time runs from the end, for the state and for z.
    """
    return linear_attention(
        q,
        k,
        v,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        normalize=normalize,
        cu_seqlens=cu_seqlens,
    )
