"""The convolution engine in plain PyTorch: one multiply-add of the whole sequence for each tap."""

from __future__ import annotations

import torch
from torch import Tensor

from fla.modules.conv.engine import Options
from fla.ops.common.boundary import absent


class Histories:
    """Sequences with W tokens of history in front of each: its cache, or zeros.

    Dense, that is [B, W + T, D].  Packed, all stand one behind the other in one row, [1, ·, D]; a
    token that belongs to no sequence, behind the last boundary, reads as zero.
    """

    def __init__(self, x: Tensor, W: int, cu_seqlens: Tensor | None):
        self.B, self.T, self.D = x.shape
        self.W = W
        self.packed = cu_seqlens is not None
        self.N = self.B
        if cu_seqlens is not None:
            self.N = cu_seqlens.shape[0] - 1
            bounds = cu_seqlens.long()
            token = torch.arange(self.T, device=x.device)
            n = torch.searchsorted(bounds[1:], token, right=True)  # [T], N where there is none
            history = torch.arange(W, device=x.device)
            starts = bounds + torch.arange(self.N + 1, device=x.device) * W  # [N + 1]
            self._there = (n < self.N)[:, None]
            self._tokens = token + (n + 1) * W
            self._heads = (starts[:-1, None] + history).flatten()  # [N W]
            self._tails = (starts[1:, None] - W + history).flatten()

    def join(self, x: Tensor, cache: Tensor | None) -> Tensor:
        """x [B, T, D] behind the histories of ``cache`` [N, D, W]."""
        heads = x.new_zeros(self.N, self.W, self.D) if cache is None else cache.mT.to(x.dtype)
        if not self.packed:
            return torch.cat([heads, x], 1)
        joined = x.new_zeros(self.T + (self.N + 1) * self.W, self.D)
        joined.index_copy_(0, self._heads, heads.flatten(0, 1))
        joined.index_copy_(0, self._tokens, x[0].masked_fill(~self._there, 0))
        return joined[None]

    def tokens(self, joined: Tensor, skipped: int = 0) -> Tensor:
        """What stands at the tokens [B, T, D]; ``skipped`` rows in front are not in ``joined``."""
        if not self.packed:
            return joined[:, self.W - skipped :]
        return joined[0, self._tokens - skipped].masked_fill(~self._there, 0)[None]

    def heads(self, joined: Tensor) -> Tensor:
        """What stands at the histories, as a cache [N, D, W]."""
        if not self.packed:
            return joined[:, : self.W].mT
        return joined[0, self._heads].unflatten(0, (self.N, self.W)).mT

    def tails(self, joined: Tensor) -> Tensor:
        """The last W rows of each sequence, as a cache [N, D, W]."""
        if not self.packed:
            return joined[:, self.T :].mT
        return joined[0, self._tails].unflatten(0, (self.N, self.W)).mT

    def add_to_tails(self, joined: Tensor, cache: Tensor) -> None:
        if not self.packed:
            joined[:, self.T :] += cache.mT
        else:
            joined[0].index_add_(0, self._tails, cache.mT.flatten(0, 1).to(joined.dtype))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    cache: Tensor | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    histories = Histories(x, weight.shape[1], cu_seqlens)
    joined = histories.join(_wide(x), cache)
    y = histories.tokens(_convolved(joined, weight, bias), histories.W)
    if options.silu:
        y = torch.nn.functional.silu(y)
    if residual is not None:
        y = y + residual
    if not options.output_final_state:
        return y.to(x.dtype), absent(x)
    return y.to(x.dtype), _own(histories.tails(joined), x.dtype)


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with time reversed for x; a sum over time of products for each tap of the weight."""
    W = weight.shape[1]
    histories = Histories(x, W, cu_seqlens)
    joined = histories.join(_wide(x), cache)
    slope = _wide(dy)
    if options.silu:
        y = histories.tokens(_convolved(joined, weight, bias), W)
        sigmoid = torch.sigmoid(y)
        slope = slope * (sigmoid * (1 + y * (1 - sigmoid)))
    dy = histories.join(slope, None)  # the histories have none
    dbias = absent(x) if bias is None else histories.tokens(dy).sum((0, 1)).to(bias.dtype)
    T = joined.shape[1] - W
    inner = dy[:, W:]
    dtaps = [(inner * joined[:, 1 + i : 1 + i + T]).sum((0, 1)) for i in range(W)]
    djoined = torch.zeros_like(joined)
    for i, tap in enumerate(_taps(weight, joined.dtype)):
        djoined[:, 1 + i : 1 + i + T].addcmul_(inner, tap)
    if dfinal is not None:
        histories.add_to_tails(djoined, dfinal)
    dcache = absent(x) if cache is None else _own(histories.heads(djoined), cache.dtype)
    dweight = torch.stack(dtaps, 1).to(weight.dtype)
    return histories.tokens(djoined).to(x.dtype).contiguous(), dweight, dbias, dcache


def _convolved(joined: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All rows but the first W, from [B, W + T, D]."""
    W = weight.shape[1]
    T = joined.shape[1] - W
    taps = _taps(weight, joined.dtype)
    y = joined[:, 1 : 1 + T] * taps[0]
    for i in range(1, W):
        y.addcmul_(joined[:, 1 + i : 1 + i + T], taps[i])
    return y if bias is None else y.add_(bias)


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[W, D], channels side by side like those of the tokens: several times faster."""
    return weight.to(dtype).T.contiguous()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _own(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of its own: an operator's results share no memory."""
    return x.to(dtype).clone(memory_format=torch.contiguous_format)
