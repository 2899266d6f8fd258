"""Tensors, numbers and addresses of Gluon kernels on the CPU, for ``emulated_gluon``."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor


class Value:
    """A tensor, or a number, with the operators that kernels use."""

    def __init__(self, x: Any):
        self.x = x if isinstance(x, Tensor) else torch.tensor(x)

    dtype = property(lambda self: self.x.dtype)
    shape = property(lambda self: list(self.x.shape))

    type = types.SimpleNamespace(layout=types.SimpleNamespace(parent="layout"))

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        if dtype == "uint32":  # which PyTorch does not compare
            return Value(self.x.long() & 0xFFFFFFFF)
        return Value(self.x.view(dtype) if bitcast else self.x.to(dtype))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.x.reshape([int(size) for size in shape]))

    def permute(self, order: tuple[int, ...]) -> Value:
        return Value(self.x.permute(order))

    def __getitem__(self, at) -> Value:
        return Value(self.x[at])

    def __bool__(self) -> bool:
        return bool(self.x)

    def __index__(self) -> int:
        return int(self.x)

    def __neg__(self) -> Value:
        return Value(-self.x)


def raw(x: Any) -> Any:
    if isinstance(x, triton.language.constexpr):  # of a module that is not stood in for
        return x.value
    return x.x if isinstance(x, Value) else x


def _divided(a: Any, b: Any) -> Tensor:
    return torch.div(torch.as_tensor(a), b, rounding_mode="trunc")


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "truediv": lambda a, b: a / b,
    "floordiv": _divided,
    "mod": lambda a, b: torch.fmod(torch.as_tensor(a), b),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "lshift": lambda a, b: a << b,
    "rshift": lambda a, b: a >> b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
for _name, _operator in _OPERATORS.items():

    def _method(self, other, operator=_operator):
        return NotImplemented if isinstance(other, Pointer) else Value(operator(self.x, raw(other)))

    def _reflected(self, other, operator=_operator):
        return Value(operator(other, self.x))

    setattr(Value, f"__{_name}__", _method)
    setattr(Value, f"__r{_name}__", _reflected)


class Pointer:
    """Addresses inside a tensor."""

    def __init__(self, elements: Tensor, offset: Any = 0):
        self.elements, self.offset = elements, torch.as_tensor(raw(offset))

    dtype = property(lambda self: types.SimpleNamespace(element_ty=self.elements.dtype))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.elements, self.offset + raw(offset))

    def to(self, dtype: Any, bitcast: bool) -> Pointer:
        """The same addresses, of wider elements."""
        wider = dtype.itemsize // self.elements.element_size()
        return Pointer(self.elements.view(dtype), self.offset // wider)

    def at(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Where the mask says so, the addresses; they have to be the tensor's."""
        offset, mask = torch.broadcast_tensors(self.offset, torch.as_tensor(raw(mask)))
        reached = offset[mask]
        if reached.numel() and not 0 <= reached.min() <= reached.max() < len(self.elements):
            raise IndexError(f"{reached.min()} to {reached.max()} of {len(self.elements)}")
        return torch.where(mask, offset, 0), mask


def load(p: Pointer, mask: Any = True, other: Any = 0) -> Value:
    offset, mask = p.at(mask)
    other = torch.as_tensor(raw(other)).to(p.elements.dtype)
    if not len(p.elements):
        return Value(other.expand(mask.shape))
    return Value(torch.where(mask, p.elements[offset], other))


def store(p: Pointer, x: Any, mask: Any = True) -> None:
    offset, mask = p.at(mask)
    x = torch.as_tensor(raw(x)).to(p.elements.dtype).expand(mask.shape)
    p.elements[offset[mask]] = x[mask]


def atomic_add(p: Pointer, x: Any, sem: str, scope: str) -> Value:
    """What was there; programs run one behind the other."""
    old = load(p)
    store(p, old + x)
    return old


def atomic_xchg(p: Pointer, x: Any, sem: str, scope: str) -> Value:
    """Who looks for what another program leaves behind finds it, or would look for ever."""
    old = load(p)
    assert sem != "acquire" or old.x, "no program before this one has been here"
    store(p, x)
    return old
