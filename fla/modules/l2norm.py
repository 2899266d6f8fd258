"""``l2norm``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fla.modules.norm.engine import norm_engine
from fla.ops.common import contract


@contract.public
def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(Σx² + eps) over the last dimension; the dtype of x, or ``output_dtype``."""
    return norm_engine(x, eps=eps, mean=False, output_dtype=output_dtype)[0]


l2_norm = l2norm


class L2Norm(nn.Module):
    """``l2norm`` as a module."""

    def __init__(self, eps: float = 1e-6, output_dtype: torch.dtype | None = None):
        super().__init__()
        self.eps, self.output_dtype = eps, output_dtype

    def forward(self, x: Tensor) -> Tensor:
        return l2norm(x, self.eps, self.output_dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
