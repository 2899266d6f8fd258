"""``LightningAttention``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers.memory import GroupedMemoryMixer
from fla.layers.mixer import Call
from fla.modules import FusedRMSNormGated
from fla.ops.common import contract
from fla.ops.lightning_attn import chunk_lightning_attn, fused_recurrent_lightning_attn

FORMS: dict[str, Callable[..., Any]] = {
    "chunk": chunk_lightning_attn,
    "fused_recurrent": fused_recurrent_lightning_attn,
}


class LightningAttention(GroupedMemoryMixer):
    """Linear attention whose memory decays at a rate fixed by head and layer.

        q, k, v = silu(W x)        o = W_o (RMSNorm(lightning(q, k, v)) ∘ activation(W_g x))

    Head h of H forgets ``(8 / H) (1 − layer_idx / num_layers) h`` a token, in natural log: the
    first remembers all, and later layers remember longer.

    Args:
        mode: ``chunk`` or ``fused_recurrent``, the form for training; a few tokens outside of it
            always take the recurrent one.
        hidden_size: channels of the hidden states.
        expand_k, expand_v: channels of all queries and of all outputs, as multiples of
            ``hidden_size``; a head of keys, and of values, has as many as one of these.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values, each for ``num_heads / num_kv_heads`` of queries; as
            many by default.
        use_short_conv: whether q, k and v pass a short convolution.
        conv_size: how many tokens it sees.
        conv_bias: whether it has a bias.
        gate_fn: activation of the output gate: ``sigmoid`` or ``swish``.
        elementwise_affine: whether the norm of the output has a weight.
        norm_eps: added to its mean square.
        layer_idx: which layer of its model this is; wanted with a cache.
        num_layers: how many layers its model has; by default every layer forgets like the first.
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_fn: str = "sigmoid",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        num_layers: int | None = None,
    ):
        contract.one_of("mode", mode, tuple(FORMS))
        if num_layers is not None and not (layer_idx is not None and 0 <= layer_idx < num_layers):
            raise ValueError(
                f"layer_idx: expected 0 <= layer_idx < num_layers = {num_layers}, got {layer_idx}"
            )
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
        self.mode, self.num_layers = mode, num_layers
        self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.g_norm = FusedRMSNormGated(self.head_v_dim, elementwise_affine, norm_eps, gate_fn)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        (q, k, v), conv_state = self.project(x, call, F.silu)
        position = (0, 1) if self.num_layers is None else (self.layer_idx, self.num_layers)
        form = FORMS["fused_recurrent" if self.recurrent(x) else self.mode]
        o, state = form(
            q,
            self.for_each_query(k),
            self.for_each_query(v),
            *position,
            initial_state=call.state.get("recurrent_state"),
            output_final_state=call.keeps,
            cu_seqlens=call.cu_seqlens,
        )
        call.keep(recurrent_state=state, conv_state=conv_state)
        g = self.g_proj(x).unflatten(-1, (-1, self.head_v_dim))
        return self.o_proj(self.g_norm(o, g).flatten(2))
