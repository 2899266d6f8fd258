"""``ShortConvolution``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fla.modules.conv.engine import Options, conv_engine
from fla.ops.common import contract


class ShortConvolution(nn.Conv1d):
    """A causal convolution over a few tokens, each channel by itself.

        y_t = activation(Σ_i weight_i x_{t − W + 1 + i} + bias)        i = 0 … W − 1

    Args:
        hidden_size: how many channels D there are.
        kernel_size: how many tokens W an output sees, its own included.
        bias: whether there is a bias.
        activation: ``silu`` (or ``swish``), or None.
        backend: ``triton`` or ``cuda``, for compatibility; the tensors' device decides what runs.
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str = "triton",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        if contract.whole_number("kernel_size", kernel_size) < 1:
            raise ValueError(f"kernel_size: expected at least 1, got {kernel_size}")
        contract.one_of("activation", activation, ("silu", "swish", None))
        contract.one_of("backend", backend, ("triton", "cuda"))
        super().__init__(
            hidden_size,
            hidden_size,
            kernel_size,
            groups=hidden_size,
            padding=kernel_size - 1,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.hidden_size, self.activation = hidden_size, activation

    @contract.public
    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve a sequence, or the next tokens of one.

        Args:
            x: inputs ``[B, T, D]``.
            residual: added to the result ``[B, T, D]``.
            mask: 0 where an input counts as zero ``[B, T]``.
            cache: the last W inputs before these ``[N, D, W]``; zeros by default.  It stays as it
                is: the next call wants the one that this call returns.
            output_final_state: whether to return the last W inputs after these.
            cu_seqlens: boundaries ``[N + 1]`` of sequences packed into a batch of one.

        Returns:
            ``y`` ``[B, T, D]`` in the dtype of x, and the new cache ``[N, D, W]`` or None.
        """
        if mask is not None:
            contract.operands(x=(x, "B T D"))
            _check_mask(mask, x)
            x = x.masked_fill(mask[..., None] == 0, 0)
        options = Options(self.activation is not None, output_final_state)
        weight = self.weight.squeeze(1)
        return conv_engine(x, weight, self.bias, residual, cache, cu_seqlens, options)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return (
            f"{self.hidden_size}, {self.kernel_size[0]}, bias={bias}, activation={self.activation}"
        )


def _check_mask(mask: Tensor, x: Tensor) -> None:
    """Of any dtype, with one entry for each token."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    if mask.device != x.device:
        raise ValueError(f"mask: expected the device of x, {x.device}, got {mask.device}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mask: expected [B, T] = {list(x.shape[:2])}, got {list(mask.shape)}")
