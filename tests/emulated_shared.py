"""The stand-in for Gluon's shared memory: tiles, and who has stored there without a fence."""

from __future__ import annotations

import collections
import math
import threading
from typing import Any

import torch
from emulated_values import Value
from torch import Tensor

# Where each thread of a program has stored since its last fence: first and last byte
unfenced: dict[int, set[tuple[int, int]]] = collections.defaultdict(set)


def _extent(x: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + last * x.itemsize


def fence() -> None:
    unfenced[threading.get_ident()].clear()


def read_asynchronously(tile: Any) -> None:
    """What products and copies begin with."""
    if not isinstance(tile, Shared):
        return
    first, last = _extent(tile.x)
    for places in list(unfenced.values()):
        assert not any(a <= last and first <= b for a, b in list(places)), "stored without a fence"


def new(dtype: torch.dtype, shape: list[int]) -> Shared:
    unset = torch.nan if dtype.is_floating_point else 1 << 20
    return Shared(torch.full([int(size) for size in shape], unset, dtype=dtype))


class Shared:
    """Shared memory, at first NaN."""

    def __init__(self, x: Tensor):
        self.x = x

    dtype = property(lambda self: self.x.dtype)
    shape = property(lambda self: list(self.x.shape))

    def index(self, i: Any) -> Shared:
        return Shared(self.x[int(i)])

    def slice(self, start: Any, length: Any, dim: int = 0) -> Shared:
        return Shared(self.x.narrow(dim, int(start), int(length)))

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.x.view([int(size) for size in shape]))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.x.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        shape = [int(size) for size in shape]
        if self.x.dim() == 5:
            return Rows(self.x, shape)
        if math.prod(shape) * dtype.itemsize < self.x.nbytes:
            # fp32 stands in for bf16, and what would share its memory has a place of its own: that
            # one overwrites the other too early is not seen here
            return new(dtype, shape)
        return Shared(self.x.view(dtype).view(shape))

    def load(self, layout: Any = None) -> Value:
        return Value(self.x.clone())

    def store(self, value: Value) -> None:
        assert value.dtype == self.dtype and value.shape == self.shape
        self.x.copy_(value.x)
        unfenced[threading.get_ident()].add(_extent(self.x))


class Rows(Shared):
    """Tiles [stages, 1, rows, 1, columns] as shared memory has them, 64 columns before the next."""

    def __init__(self, x: Tensor, shape: list[int]):
        assert math.prod(shape) == x.numel() and shape[1] == min(x.shape[-1], 64)
        blocks = x.unflatten(4, (-1, shape[1]))
        super().__init__(blocks.permute(0, 4, 2, 1, 3, 5)[:, :, :, 0, 0])

    def index(self, i: Any) -> Shared:
        i, row = divmod(int(i), self.x.shape[2])
        stage, block = divmod(i, self.x.shape[1])
        return Shared(self.x[stage, block, row])
