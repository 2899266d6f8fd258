"""``fused_recurrent_simple_gla``."""

from __future__ import annotations

from torch import Tensor

from fla.ops.common import contract
from fla.ops.simple_gla.engine import linear_engine


@contract.public
def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a scalar decay per head: the form for decoding and for short T.

    Arguments as for ``chunk_simple_gla``.  With ``reverse`` time runs from the end:
    ``S_t = exp(g_t) S_{t+1} + k_t v_tᵀ``; the initial state enters after the last token and the
    final state is the one at token 0.  ``transpose_state_layout`` is the old name of
    ``state_v_first``.
    """
    o, state, _ = linear_engine(
        q,
        k,
        v,
        g=g,
        g_gamma=g_gamma,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        state_v_first=contract.state_layout(state_v_first, transpose_state_layout),
        cu_seqlens=cu_seqlens,
    )
    return o, state
