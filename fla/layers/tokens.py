"""``Tokens``: which places of a batch hold tokens, and the way between rows and packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fla.ops.common import contract
from fla.ops.utils.index import prepare_cu_seqlens_from_mask


class Tokens:
    """N sequences: the rows of a dense batch, those of a padded one, or packed by the caller.

    Layers see dense rows ``[N, T, ...]`` as they are, and tokens of padded rows packed into one,
    with their boundaries in ``cu_seqlens``.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seen: int = 0,
    ):
        self.N, self._T = hidden_states.shape[:2]
        self.cu_seqlens = cu_seqlens
        self._padded = False
        self._mask: Tensor | None = None  # these two are found when they are asked for:
        self._places: Tensor | None = None  # where boundaries are on a device, that waits for it
        if cu_seqlens is not None:
            if attention_mask is not None:
                raise ValueError("attention_mask: expected None with cu_seqlens, got a tensor")
            self.N = contract.number_of_sequences(hidden_states, cu_seqlens, None, "hidden_states")
        elif attention_mask is not None:
            mask = _last_columns(attention_mask, hidden_states, seen)
            if not mask.all():
                self._padded, self._mask = True, mask
                self.cu_seqlens = prepare_cu_seqlens_from_mask(mask)

    @property
    def mask(self) -> Tensor | None:
        """Where tokens are if each sequence has a row, [N, columns]; None if everywhere."""
        if self._mask is None and self.cu_seqlens is not None:
            contract.boundaries(self.cu_seqlens, None, self._T)
            lens = self.cu_seqlens.diff()
            columns = int(lens.max()) if self.N else 0
            self._mask = torch.arange(columns, device=lens.device) < lens[:, None]
        return self._mask

    @property
    def columns(self) -> int:
        return self._T if self.mask is None else self.mask.shape[1]

    def pack(self, x: Tensor) -> Tensor:
        """What came in as the layer sees it: [N, columns, ...] without its padding."""
        return x if not self._padded else self.of_rows(x)

    def unpack(self, x: Tensor) -> Tensor:
        """What the layer gave as it came in: its padding back as zeros."""
        return x if not self._padded else self.rows(x)

    def rows(self, x: Tensor) -> Tensor:
        """What the layer sees with a row for each sequence, [N, columns, ...]."""
        if self.mask is None:
            return x
        rows = x.new_zeros(self.N * self.columns, *x.shape[2:])
        rows = rows.index_copy(0, self._where(self.mask), x[0])
        return rows.unflatten(0, (self.N, self.columns))

    def of_rows(self, x: Tensor) -> Tensor:
        """The other way round."""
        return x if self.mask is None else x.flatten(0, 1)[self._where(self.mask)][None]

    def _where(self, mask: Tensor) -> Tensor:
        """The place of each token among those of all rows, [M]."""
        if self._places is None:
            self._places = mask.flatten().nonzero().flatten()
        return self._places


def _last_columns(attention_mask: Tensor, hidden_states: Tensor, seen: int) -> Tensor:
    """The mask of these T tokens as bool, checked."""
    B, T = hidden_states.shape[:2]
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}")
    widths = sorted({T, seen + T})
    if attention_mask.dim() != 2 or attention_mask.shape not in [(B, width) for width in widths]:
        expected = " or ".join(f"[{B}, {width}]" for width in widths)
        raise ValueError(f"attention_mask: expected {expected}, got {list(attention_mask.shape)}")
    if attention_mask.device != hidden_states.device:
        raise ValueError(
            f"attention_mask: expected the device of hidden_states, {hidden_states.device}, "
            f"got {attention_mask.device}"
        )
    mask = attention_mask[:, attention_mask.shape[1] - T :]
    tokens = mask.bool()
    if mask.dtype != torch.bool and not torch.equal(mask, tokens.to(mask.dtype)):
        raise ValueError(
            "attention_mask: expected 1 where a token is and 0 elsewhere, got other values"
        )
    return tokens
