"""``FusedRMSNormGated``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla.modules.layernorm import RMSNorm
from fla.modules.norm.engine import ACTIVATIONS
from fla.ops.common import contract


class FusedRMSNormGated(RMSNorm):
    """x / sqrt(mean(x²) + eps) ∘ weight ∘ activation(g) over the last dimension.

    Args:
        hidden_size: how many channels the last dimension has.
        elementwise_affine: whether there is a weight.
        eps: added to the mean square.
        activation: ``swish`` (or ``silu``) or ``sigmoid``.
    """

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        contract.one_of("activation", activation, tuple(ACTIVATIONS))
        super().__init__(hidden_size, elementwise_affine, eps, device, dtype)
        self.activation = activation

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The gated norm of x + residual, and with ``prenorm`` that sum too; g has x's shape."""
        if not isinstance(g, Tensor):  # the engine would leave the gate out
            raise TypeError(f"g: expected a tensor, got {type(g).__name__}")
        return self._norm(x, g, self.activation, residual, prenorm, residual_in_fp32)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
