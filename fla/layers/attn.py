"""``Attention``, and what layers of softmax attention share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fla.layers.cache import State
from fla.layers.mixer import Call, Mixer, fits, multiple
from fla.layers.tokens import Tokens
from fla.modules import RMSNorm, RotaryEmbedding
from fla.ops.attn import parallel_attn
from fla.ops.attn.decoding import attn_decoding_one_step
from fla.ops.common import contract


class SoftmaxMixer(Mixer):
    """Projections to queries, keys and values of grouped heads, and attention that keeps them."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None,
        qkv_bias: bool,
        qk_norm: bool,
        window_size: int | None,
        layer_idx: int | None,
    ):
        super().__init__(hidden_size, layer_idx)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        multiple("hidden_size", hidden_size, "num_heads", num_heads)
        multiple("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        self.window_size = contract.window(window_size)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = hidden_size // num_heads
        fits("hidden_size / num_heads", self.head_dim, 256)
        kv_dim = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()

    def state_shapes(self, N: int) -> dict[str, tuple[tuple[int | None, ...], ...]]:
        return {"attn_state": ((N, None, self.num_kv_heads, self.head_dim),) * 2}

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, T, heads, head_dim]."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(q), self.k_norm(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, call: Call) -> Tensor:
        """Attention over these tokens and those kept before, [B, T, hidden_size]."""
        if call.keeps:
            rows = tuple(call.tokens.rows(x) for x in (k, v, g) if x is not None)
            whole = call.keep(
                attn_state=rows, attn_mask=call.tokens.mask, window_size=self.window_size
            )
            if call.state:
                o = self._last(call.tokens.rows(q), whole)
                return call.tokens.of_rows(o).flatten(2)
        o = parallel_attn(q, k, v, g=g, window_size=self.window_size, cu_seqlens=call.cu_seqlens)
        return o.flatten(2)

    def _last(self, q: Tensor, state: State) -> Tensor:
        """Queries of the last columns [N, columns, ...] over all that is kept."""
        k, v, g = (*state["attn_state"], None)[:3]
        kept = Tokens(k, state.get("attn_mask"))
        learns = any(x is not None and x.requires_grad for x in (q, k, v, g))
        if q.shape[1] == 1 and not (torch.is_grad_enabled() and learns):
            return self._decode(q, k, v, g, kept)
        before = k.shape[1] - q.shape[1]
        q = torch.cat([q.new_zeros(kept.N, before, *q.shape[2:]), q], 1)  # nobody reads those
        o = parallel_attn(
            kept.pack(q),
            kept.pack(k),
            kept.pack(v),
            g=None if g is None else kept.pack(g),
            window_size=self.window_size,
            cu_seqlens=kept.cu_seqlens,
        )
        return kept.unpack(o)[:, before:]

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, kept: Tokens) -> Tensor:
        """One query a sequence; the operator wants its keys packed."""

        def packed(x: Tensor) -> Tensor:
            return x.flatten(0, 1)[None] if kept.cu_seqlens is None else kept.pack(x)

        cu_seqlens = kept.cu_seqlens
        if cu_seqlens is None:
            cu_seqlens = torch.arange(kept.N + 1, device=q.device) * kept.columns
        o = attn_decoding_one_step(
            q.transpose(0, 1),
            packed(k),
            packed(v),
            g=None if g is None else packed(g),
            cu_seqlens=cu_seqlens,
            window_size=self.window_size,
        )
        return o.transpose(0, 1)


class Attention(SoftmaxMixer):
    """Causal softmax attention with rotary positions.

    Args:
        hidden_size: channels of the hidden states; a head has ``hidden_size / num_heads``.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values, each for ``num_heads / num_kv_heads`` of queries; as
            many by default.
        qkv_bias: whether the projections have a bias.
        qk_norm: whether queries and keys pass an RMS norm.
        window_size: how many tokens a query sees, its own included; all before it by default.
        rope_theta: base of the rotary positions; None for none.
        max_position_embeddings: for compatibility; positions have no end.
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
        rope_theta: float | None = 10000.0,
        max_position_embeddings: int | None = None,
        layer_idx: int | None = None,
    ):
        super().__init__(
            hidden_size, num_heads, num_kv_heads, qkv_bias, qk_norm, window_size, layer_idx
        )
        if rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                "hidden_size / num_heads: expected an even number of channels with rope_theta, "
                f"got {self.head_dim}"
            )
        self.rotary = None if rope_theta is None else RotaryEmbedding(self.head_dim, rope_theta)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self.project(x)
        if self.rotary is not None:
            q, k = self.rotary(q, k, call.past_tokens(), call.cu_seqlens)
        return self.o_proj(self.attend(q, k, v, None, call))
