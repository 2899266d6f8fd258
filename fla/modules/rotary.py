"""``RotaryEmbedding``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fla.ops.common import contract


class RotaryEmbedding(nn.Module):
    """Positions as rotations of pairs of channels.

    Channels c and c + dim / 2 (with ``interleaved`` 2c and 2c + 1) turn by
    ``position · base^(−2c / dim)``, c < dim / 2; channels from ``dim`` on stay.

    Args:
        dim: how many channels of a head are rotated, an even number.
        base: the slowest pair turns nearly ``base`` times slower than the fastest.
        interleaved: which channels form a pair.
    """

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False):
        super().__init__()
        if contract.whole_number("dim", dim) % 2 or dim <= 0:
            raise ValueError(f"dim: expected an even number of channels, got {dim}")
        if contract.number("base", base) <= 0:
            raise ValueError(f"base: expected a number above 0, got {base}")
        self.dim, self.base, self.interleaved = dim, base, interleaved

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        seqlen_offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries ``[B, T, HQ, K]`` and keys ``[B, T, H, K]``.

        Args:
            q, k: queries and keys.
            seqlen_offset: position of the first token, of all sequences or of each ``[N]``.
            cu_seqlens: boundaries ``[N + 1]`` of sequences packed into a batch of one.
            max_seqlen: for compatibility; angles are computed where they are needed.
        """
        sizes = contract.operands(q=(q, "B T HQ K"), k=(k, "B T H K"))
        if sizes["K"] < self.dim:
            raise ValueError(f"q: expected a head of at least dim = {self.dim}, got {sizes['K']}")
        N = contract.number_of_sequences(q, cu_seqlens)
        if isinstance(seqlen_offset, Tensor) and seqlen_offset.shape not in ((), (N,)):
            raise ValueError(
                f"seqlen_offset: expected [N] = [{N}], got {list(seqlen_offset.shape)}"
            )
        if not torch.compiler.is_compiling():  # which cannot trace values
            contract.boundaries(cu_seqlens, None, q.shape[1])
            if not isinstance(seqlen_offset, Tensor):
                contract.whole_number("seqlen_offset", seqlen_offset)
        cos, sin = self._angles(q, seqlen_offset, cu_seqlens)
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin)

    def _angles(self, q: Tensor, offset: int | Tensor, cu_seqlens: Tensor | None):
        """Cosines and sines [B or 1, T, 1, dim / 2], fp32 or fp64.

        Of angles in fp64, for the digits of fp32 are those of how many times they go round.
        """
        T, device = q.shape[1], q.device
        dtype = torch.promote_types(q.dtype, torch.float32)
        positions = torch.arange(T, device=device)[None]  # [1, T]
        if isinstance(offset, Tensor) and offset.dim():
            offset = offset.to(device)[:, None]  # [N, 1]
        if cu_seqlens is not None:
            n = torch.searchsorted(cu_seqlens.long(), positions, right=True) - 1  # [1, T]
            n = n.clamp(max=cu_seqlens.shape[0] - 2)  # tokens behind the last boundary
            positions = positions - cu_seqlens[n]
            if isinstance(offset, Tensor) and offset.dim():
                offset = offset[n, 0]
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float64) / self.dim
        angles = (positions + offset)[..., None] * self.base**-exponents
        return angles.cos().to(dtype)[:, :, None], angles.sin().to(dtype)[:, :, None]

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = x[..., : self.dim].to(cos.dtype), x[..., self.dim :]
        pairs = turned.unflatten(-1, (-1, 2) if self.interleaved else (2, -1))
        axis = -1 if self.interleaved else -2
        a, b = pairs.unbind(axis)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], axis).flatten(-2)
        return torch.cat([turned.to(x.dtype), rest], -1)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"
