"""``ForgettingAttention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers.attn import SoftmaxMixer
from fla.layers.mixer import Call


class ForgettingAttention(SoftmaxMixer):
    """The Forgetting Transformer's attention: softmax attention whose scores fade by a gate.

        f_t = σ(W_f x_t + b_f)        s_ij = q_i·k_j / √d + Σ_{l = j+1 … i} log f_l

    Args:
        hidden_size: channels of the hidden states; a head has ``hidden_size / num_heads``.
        num_heads: heads of queries, each with a gate of its own.
        num_kv_heads: heads of keys and values, each for ``num_heads / num_kv_heads`` of queries; as
            many by default.
        qkv_bias: whether the projections have a bias.
        qk_norm: whether queries and keys pass an RMS norm.
        window_size: how many tokens a query sees, its own included; all before it by default.
        use_output_gate: whether the result is multiplied by σ(W_g x).
        layer_idx: which layer of its model this is; wanted with a cache.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        window_size: int | None = None,
        use_output_gate: bool = False,
        layer_idx: int | None = None,
    ):
        super().__init__(
            hidden_size, num_heads, num_kv_heads, qkv_bias, qk_norm, window_size, layer_idx
        )
        self.f_proj = nn.Linear(hidden_size, num_heads, bias=True)
        self.g_proj = nn.Linear(hidden_size, hidden_size, bias=False) if use_output_gate else None

    def state_shapes(self, N: int) -> dict[str, tuple[tuple[int | None, ...], ...]]:
        keys_and_values = super().state_shapes(N)["attn_state"]
        return {"attn_state": (*keys_and_values, (N, None, self.num_heads))}

    def mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self.project(x)
        gate = self.f_proj(x)
        g = F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))
        o = self.attend(q, k, v, g, call)
        if self.g_proj is not None:
            o = o * torch.sigmoid(self.g_proj(x))
        return self.o_proj(o)
