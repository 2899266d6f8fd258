"""Workspaces of a call: parts of one tensor, of which kernels are told addresses.

A tensor for each, its own or a view, takes the host 2 to 3 µs, and a backward pass has twenty.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fla.ops.common.once import once

# A workspace's dtype and shape
Wanted = tuple[Any, ...]
# Tiles are copied whole from addresses that are multiples of this
_ALIGNMENT = 128


class Part:
    """What a launch asks of a tensor, for a part of ``room``; contiguous."""

    __slots__ = ("address", "dtype", "room", "shape")

    def __init__(self, room: Tensor, address: int, dtype: torch.dtype, shape: tuple[int, ...]):
        self.room, self.address, self.dtype, self.shape = room, address, dtype, shape

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.room.get_device()

    def view(self, *shape: int) -> Part:
        return Part(self.room, self.address, self.dtype, shape)

    def __getitem__(self, i: int) -> Part:
        shape = self.shape[1:]
        size = math.prod(shape) * self.dtype.itemsize
        return Part(self.room, self.address + i * size, self.dtype, shape)

    def tensor(self) -> Tensor:
        start = self.address - self.room.data_ptr()
        stop = start + math.prod(self.shape) * self.dtype.itemsize
        return self.room[start:stop].view(self.dtype).view(self.shape)


def as_tensor(x: Any) -> Any:
    """A part as a tensor, what else there is as it is."""
    return x.tensor() if isinstance(x, Part) else x


def bytes_of(*wanted: Wanted) -> int:
    """How many bytes ``wanted`` workspaces take."""
    return _layout(*wanted)[1]


def room_of(like: Tensor, size: int) -> Tensor:
    """So many bytes, where ``like`` is."""
    return like.new_empty(size, dtype=torch.uint8)


def parts_of(room: Tensor, *wanted: Wanted) -> list[Part]:
    """``wanted`` workspaces, one behind the other in ``room``."""
    address = room.data_ptr()
    parts, _ = _layout(*wanted)
    return [Part(room, address + offset, dtype, shape) for offset, dtype, shape in parts]


def new_parts(like: Tensor, *wanted: Wanted) -> list[Part]:
    """``wanted`` workspaces in a new tensor where ``like`` is."""
    return parts_of(room_of(like, bytes_of(*wanted)), *wanted)


@once
def _layout(*wanted: Wanted) -> tuple[list[tuple[int, torch.dtype, tuple[int, ...]]], int]:
    """Of each workspace its offset, dtype and shape, and the bytes of all."""
    parts, offset = [], 0
    for dtype, *shape in wanted:
        parts.append((offset, dtype, tuple(shape)))
        offset += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return parts, offset
