"""``attn_decoding_one_step``."""

from __future__ import annotations

from torch import Tensor

from fla.ops.attn.engine import decoding_engine
from fla.ops.common import contract


@contract.public
def attn_decoding_one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    do_gate_scale: bool = False,
    *,
    window_size: int | None = None,
    sink_bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention of one new query a sequence over that sequence's keys, without a gradient.

    The query stands at the last key of its sequence.  A sequence without keys gives zeros.

    Args:
        q: queries ``[1, N, HQ, K]``, one for each of N sequences.
        k, v: packed keys ``[1, T, H, K]`` and values ``[1, T, H, V]``, T over all sequences.
        g: gate in natural log ``[1, T, HQ]``.
        scale: factor on q·k; ``K ** -0.5`` by default.
        cu_seqlens: boundaries ``[N + 1]`` of the sequences; a single one by default.
        do_gate_scale: whether ``g`` is multiplied by ``scale`` too.
        window_size: how many of its last keys a query sees; all by default, with 0 none.
        sink_bias: one more logit a head ``[HQ]``, in the denominator only.

    Returns:
        ``o`` ``[1, N, HQ, V]`` in the dtype of q.
    """
    return decoding_engine(
        q,
        k,
        v,
        g=g,
        sink_bias=sink_bias,
        scale=scale,
        do_gate_scale=do_gate_scale,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
    )
