"""``LinearAttention``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers.memory import GroupedMemoryMixer
from fla.layers.mixer import Call
from fla.modules import RMSNorm
from fla.ops.common import contract
from fla.ops.linear_attn import (
    chunk_linear_attn,
    fused_chunk_linear_attn,
    fused_recurrent_linear_attn,
)

FORMS: dict[str, Callable[..., Any]] = {
    "chunk": chunk_linear_attn,
    "fused_chunk": fused_chunk_linear_attn,
    "fused_recurrent": fused_recurrent_linear_attn,
}
SMALL = 1e-4  # beside sums of features


class ElementwiseProduct(nn.Module):
    """The product of two projections of a head."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.layer1 = nn.Linear(head_dim, head_dim)
        self.layer2 = nn.Linear(head_dim, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(x) * self.layer2(x)


class Elu(nn.Module):
    """elu(x) + 1, which is positive."""

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


FEATURE_MAPS: dict[str, Any] = {
    "elementwise_product": ElementwiseProduct,
    "elu": lambda head_dim: Elu(),
    "relu": lambda head_dim: nn.ReLU(),
    "identity": lambda head_dim: nn.Identity(),
}


class LinearAttention(GroupedMemoryMixer):
    """Linear attention: every token stays in the memory.

        S_t = S_{t−1} + φ(k_t) v_tᵀ        o = W_o norm(S_tᵀ φ(q_t))

    Args:
        mode: ``chunk``, ``fused_chunk`` or ``fused_recurrent``, the form for training; a few tokens
            outside of it always take the recurrent one.
        hidden_size: channels of the hidden states.
        expand_k, expand_v: channels of all queries and of all outputs, as multiples of
            ``hidden_size``; a head of keys, and of values, has as many as one of these.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values, each for ``num_heads / num_kv_heads`` of queries; as
            many by default.
        feature_map: φ: ``elementwise_product`` of two projections, ``elu`` (plus one), ``relu`` or
            ``identity``.
        tie_feature_map_qk: whether queries and keys share φ.
        output_norm: ``rmsnorm`` or ``identity``.
        norm_q, norm_k: whether the features of a query, of a key, are divided by their sum.
        do_feature_map_norm: whether a query's weights are divided by their sum, as in softmax
            attention; φ should be positive then.
        elementwise_affine: whether the norm of the output has a weight.
        norm_eps: added to its mean square.
        layer_idx: which layer of its model this is; wanted with a cache.
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str = "elementwise_product",
        tie_feature_map_qk: bool = False,
        output_norm: str = "rmsnorm",
        norm_q: bool = False,
        norm_k: bool = False,
        do_feature_map_norm: bool = False,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ):
        contract.one_of("mode", mode, tuple(FORMS))
        contract.one_of("feature_map", feature_map, tuple(FEATURE_MAPS))
        contract.one_of("output_norm", output_norm, ("rmsnorm", "identity"))
        super().__init__(
            hidden_size, expand_k, expand_v, num_heads, num_kv_heads, None, False, layer_idx
        )
        self.mode, self.normalize = mode, do_feature_map_norm
        self.norm_q, self.norm_k = norm_q, norm_k
        self.feature_map_q = FEATURE_MAPS[feature_map](self.head_k_dim)
        self.feature_map_k = (
            self.feature_map_q if tie_feature_map_qk else FEATURE_MAPS[feature_map](self.head_k_dim)
        )
        self.norm: nn.Module = nn.Identity()
        if output_norm == "rmsnorm":
            self.norm = RMSNorm(self.head_v_dim, elementwise_affine, norm_eps)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def state_shapes(self, N: int) -> dict[str, tuple[tuple[int | None, ...], ...]]:
        memory = super().state_shapes(N)["recurrent_state"]
        sums = (N, 1, self.num_heads, self.head_k_dim)
        return {"recurrent_state": (*memory, sums) if self.normalize else memory}

    def mix(self, x: Tensor, call: Call) -> Tensor:
        (q, k, v), _ = self.project(x, call)
        q = _normed(self.feature_map_q(q), self.norm_q)
        k = _normed(self.feature_map_k(self.for_each_query(k)), self.norm_k)
        form = FORMS["fused_recurrent" if self.recurrent(x) else self.mode]
        o, state = form(
            q,
            k,
            self.for_each_query(v),
            normalize=self.normalize,
            initial_state=call.state.get("recurrent_state"),
            output_final_state=call.keeps,
            cu_seqlens=call.cu_seqlens,
        )
        call.keep(recurrent_state=state)
        return self.o_proj(self.norm(o).flatten(2))


def _normed(features: Tensor, norm: bool) -> Tensor:
    if not norm:
        return features
    total = features.sum(-1, keepdim=True).to(features.dtype)  # in fp32 under autocast on a GPU
    return features / (total + SMALL)
