"""``SimpleGatedLinearAttention``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers.memory import GroupedMemoryMixer
from fla.layers.mixer import Call
from fla.modules import FusedRMSNormGated
from fla.ops.common import contract
from fla.ops.simple_gla import (
    chunk_simple_gla,
    fused_chunk_simple_gla,
    fused_recurrent_simple_gla,
)

FORMS: dict[str, Callable[..., Any]] = {
    "chunk": chunk_simple_gla,
    "fused_chunk": fused_chunk_simple_gla,
    "fused_recurrent": fused_recurrent_simple_gla,
}


class SimpleGatedLinearAttention(GroupedMemoryMixer):
    """Linear attention whose memory decays by a gate of each head.

        log α = logsigmoid(W_gk x + b) / gate_logit_normalizer
        o = W_o (RMSNorm(simple_gla(q, k, v, log α)) ∘ activation(W_g x))

    Args:
        mode: ``chunk``, ``fused_chunk`` or ``fused_recurrent``, the form for training; a few tokens
            outside of it always take the recurrent one.
        hidden_size: channels of the hidden states.
        expand_k, expand_v: channels of all queries and of all outputs, as multiples of
            ``hidden_size``; a head of keys, and of values, has as many as one of these.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values, each for ``num_heads / num_kv_heads`` of queries; as
            many by default.
        use_short_conv: whether q, k and v pass a short convolution.
        conv_size: how many tokens it sees.
        conv_bias: whether it has a bias.
        gate_fn: activation of the output gate: ``swish`` or ``sigmoid``.
        elementwise_affine: whether the norm of the output has a weight.
        norm_eps: added to its mean square.
        gate_logit_normalizer: the larger, the slower a new layer forgets.
        fuse_norm: for compatibility; the norm and its gate are always one.
        layer_idx: which layer of its model this is; wanted with a cache.
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: float = 16,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ):
        contract.one_of("mode", mode, tuple(FORMS))
        super().__init__(
            hidden_size,
            expand_k,
            expand_v,
            num_heads,
            num_kv_heads,
            contract.whole_number("conv_size", conv_size) if use_short_conv else None,
            conv_bias,
            layer_idx,
        )
        self.mode, self.gate_logit_normalizer = mode, gate_logit_normalizer
        self.gk_proj = nn.Linear(hidden_size, num_heads, bias=True)
        self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.g_norm_swish_gate = FusedRMSNormGated(
            self.head_v_dim, elementwise_affine, norm_eps, gate_fn
        )
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        (q, k, v), conv_state = self.project(x, call)
        gate = self.gk_proj(x)
        gate = F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))
        form = FORMS["fused_recurrent" if self.recurrent(x) else self.mode]
        o, state = form(
            q,
            self.for_each_query(k),
            self.for_each_query(v),
            g=gate / self.gate_logit_normalizer,
            initial_state=call.state.get("recurrent_state"),
            output_final_state=call.keeps,
            cu_seqlens=call.cu_seqlens,
        )
        call.keep(recurrent_state=state, conv_state=conv_state)
        g = self.g_proj(x).unflatten(-1, (-1, self.head_v_dim))
        return self.o_proj(self.g_norm_swish_gate(o, g).flatten(2))
