"""``parallel_forgetting_attn``."""

from __future__ import annotations

from torch import Tensor

from fla.ops.attn.parallel import parallel_attn
from fla.ops.common import contract


@contract.public
def parallel_forgetting_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Softmax attention that forgets: each pair's logit gets the sum of the gates between.

        s_ij = scale q_i·k_j + g_{j+1} + … + g_i        o_i = Σ_{j ≤ i} softmax(s_i)_j v_j

    ``g`` ``[B, T, HQ]`` is the natural log of each forget gate, in practice ``logsigmoid`` of
    something.  The other arguments are those of ``parallel_attn``.
    """
    contract.operands(q=(q, "B T HQ K"), g=(g, "B T HQ"))
    return parallel_attn(q, k, v, g=g, scale=scale, window_size=window_size, cu_seqlens=cu_seqlens)
