"""``RMSNorm`` and what it shares with ``FusedRMSNormGated``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fla.modules.norm.engine import norm_engine


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) ∘ weight over the last dimension, of ``hidden_size`` channels."""

    weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.register_parameter("weight", None)
        if elementwise_affine:
            self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x + residual, and with ``prenorm`` that sum too.

        The sum has the dtype of the residual, of x where there is none, or fp32 if asked for.
        """
        return self._norm(x, None, "swish", residual, prenorm, residual_in_fp32)

    def _norm(self, x, g, activation, residual, prenorm, residual_in_fp32):
        sum_dtype = None
        if isinstance(x, Tensor):  # the engine says what else it expected
            if x.shape[-1:] != (self.hidden_size,):
                raise ValueError(f"x: expected [..., {self.hidden_size}], got {list(x.shape)}")
            if residual_in_fp32:
                sum_dtype = torch.promote_types(x.dtype, torch.float32)
        y, h = norm_engine(
            x,
            weight=self.weight,
            g=g,
            residual=residual,
            eps=self.eps,
            mean=True,
            activation=activation,
            sum_dtype=sum_dtype,
        )
        return (y, h) if prenorm else y

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, elementwise_affine={self.weight is not None}"
