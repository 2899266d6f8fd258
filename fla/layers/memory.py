"""What layers with a recurrent memory share: projections to q, k and v, and short convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fla.layers.mixer import Call, Mixer, channels, fits, multiple
from fla.modules import ShortConvolution


class MemoryMixer(Mixer):
    """Projections to heads of queries, keys and values, each with an optional short convolution."""

    def __init__(
        self,
        hidden_size: int,
        heads: tuple[int, int, int],
        head_dims: tuple[int, int],
        conv_size: int | None,
        conv_bias: bool,
        layer_idx: int | None,
    ):
        """``heads`` of q, k and v; ``head_dims`` K and V; no convolution without ``conv_size``."""
        super().__init__(hidden_size, layer_idx)
        self.head_k_dim, self.head_v_dim = head_dims
        self.num_heads, self.state_heads = heads[0], max(heads)
        self._head_dims = (*head_dims[:1], *head_dims)
        dims = [number * size for number, size in zip(heads, self._head_dims, strict=True)]
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(hidden_size, dim, bias=False) for dim in dims
        )
        self.conv_size, self._dims = conv_size, dims
        if conv_size is not None:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                ShortConvolution(dim, conv_size, bias=conv_bias) for dim in dims
            )

    def state_shapes(self, N: int) -> dict[str, tuple[tuple[int | None, ...], ...]]:
        shapes: dict[str, Any] = {
            "recurrent_state": ((N, self.state_heads, self.head_k_dim, self.head_v_dim),)
        }
        if self.conv_size is not None:
            shapes["conv_state"] = tuple((N, dim, self.conv_size) for dim in self._dims)
        return shapes

    def project(
        self, x: Tensor, call: Call, otherwise: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[list[Tensor], tuple[Tensor, ...] | None]:
        """q, k and v [B, T, heads, ·] and the convolutions' new states.

        Convolutions end in a SiLU; where there are none, projections end in ``otherwise``.
        """
        projected = [each(x) for each in (self.q_proj, self.k_proj, self.v_proj)]
        states = None
        if self.conv_size is not None:
            projected, states = self._convolve(projected, call)
        elif otherwise is not None:
            projected = [otherwise(each) for each in projected]
        heads = [
            each.unflatten(-1, (-1, size))
            for each, size in zip(projected, self._head_dims, strict=True)
        ]
        return heads, states

    def _convolve(self, projected: list[Tensor], call: Call):
        past = call.state.get("conv_state", (None, None, None))
        results = [
            convolution(
                each, cache=state, output_final_state=call.keeps, cu_seqlens=call.cu_seqlens
            )
            for convolution, each, state in zip(
                (self.q_conv1d, self.k_conv1d, self.v_conv1d), projected, past, strict=True
            )
        ]
        outputs, states = zip(*results, strict=True)
        return list(outputs), states if call.keeps else None


class GroupedMemoryMixer(MemoryMixer):
    """One size for all heads, stated by how it relates to ``hidden_size``; grouped keys, values."""

    def __init__(
        self,
        hidden_size: int,
        expand_k: float,
        expand_v: float,
        num_heads: int,
        num_kv_heads: int | None,
        conv_size: int | None,
        conv_bias: bool,
        layer_idx: int | None,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        multiple("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        dims = []
        for name, expand in (("expand_k", expand_k), ("expand_v", expand_v)):
            dim = channels("hidden_size", hidden_size, name, expand)
            multiple(f"hidden_size * {name}", dim, "num_heads", num_heads)
            dims.append(dim // num_heads)
            fits(f"hidden_size * {name} / num_heads", dims[-1], 512)
        super().__init__(
            hidden_size,
            heads=(num_heads, num_kv_heads, num_kv_heads),
            head_dims=(dims[0], dims[1]),
            conv_size=conv_size,
            conv_bias=conv_bias,
            layer_idx=layer_idx,
        )
        self.value_dim = num_heads * self.head_v_dim
        self._group = num_heads // num_kv_heads

    def for_each_query(self, x: Tensor) -> Tensor:
        """Keys or values [B, T, num_kv_heads, ·] repeated for the queries that share them."""
        return x if self._group == 1 else x.repeat_interleave(self._group, 2)
