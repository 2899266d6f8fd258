"""``OpSpec``: a public function beside its textbook, its inputs and what it supports."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fla.ops.common.device import accumulator

# Operands whose first dimension counts sequences, and those that belong to heads alone; whatever
# else is a tensor runs along tokens.
PER_SEQUENCE = frozenset({"initial_state"})
PER_HEAD = frozenset({"g_gamma", "A_log", "dt_bias", "sink_bias"})
SHARE_DTYPE = frozenset({"q", "k", "v"})


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call: H heads of keys and values' few, ``group`` times as many of the others."""

    T: int = 65
    B: int = 2
    H: int = 2
    K: int = 16
    V: int = 24
    group: int = 1
    lengths: tuple[int, ...] = ()  # of packed sequences; then B is 1 and T their sum

    @classmethod
    def packed(cls, *lengths: int, **sizes: int) -> Shape:
        return cls(T=sum(lengths), B=1, lengths=lengths, **sizes)

    @property
    def N(self) -> int:
        return len(self.lengths) if self.lengths else self.B

    def __str__(self) -> str:
        tokens = "+".join(map(str, self.lengths)) if self.lengths else f"{self.T}"
        return f"B{self.B} T{tokens} H{self.H}x{self.group} K{self.K} V{self.V}"


Arguments = dict[str, Any]
Draw = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """A public function and all that generic tests and checks need of it.

    ``inputs(shape, draw)`` makes its keyword arguments in fp64, ``draw(*size)`` being normal;
    ``variants`` are further arguments, or functions of (shape, draw) that make them.  ``reference``
    takes the same arguments without ``cu_seqlens`` and returns the same results.
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Shape, Draw], Arguments]
    gradients: tuple[str, ...]
    variants: Mapping[str, Mapping[str, Any] | Callable[[Shape, Draw], Arguments]]
    packed: bool = True  # takes cu_seqlens
    state: bool = True  # takes initial_state and output_final_state
    grouped: bool = False  # heads may be grouped
    along_tokens: bool = True  # takes q, k and v of the same tokens and returns one o for each
    fp32_bound: float = 1e-5  # of the error against fp64

    def __str__(self) -> str:
        return self.name

    def arguments(
        self,
        shape: Shape,
        variant: str,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> Arguments:
        """Keyword arguments of a call.  q, k and v in ``dtype``, the rest as fp32 or fp64."""
        key = zlib.crc32(f"{self.name} {variant} {shape} {seed}".encode())
        draw = functools.partial(_draw, generator=torch.Generator().manual_seed(key))
        arguments = self.inputs(shape, draw)
        more = self.variants[variant]
        arguments.update(more(shape, draw) if callable(more) else more)
        for name, value in arguments.items():
            arguments[name] = _convert(value, dtype if name in SHARE_DTYPE else None, dtype, device)
        if shape.lengths:
            bounds = torch.tensor([0, *shape.lengths]).cumsum(0)
            arguments["cu_seqlens"] = bounds.to(device, torch.int32)
        return arguments

    def expected(self, arguments: Arguments) -> list[Tensor]:
        """What the textbook returns, packed sequences one by one."""
        arguments = dict(arguments)
        bounds = arguments.pop("cu_seqlens", None) if self.along_tokens else None
        if bounds is None:
            return flatten(self.reference(**arguments))
        results = [
            flatten(self.reference(**one_sequence(arguments, n, start, stop)))
            for n, (start, stop) in enumerate(spans(bounds))
        ]
        # tokens follow each other along dimension 1, states stand one after another in dimension 0
        return [torch.cat(each, 0 if i else 1) for i, each in enumerate(zip(*results, strict=True))]

    def widened(self, arguments: Arguments) -> Arguments:
        """The same values in fp64."""
        return {name: _widen(value) for name, value in arguments.items()}

    def outputs(self, arguments: Arguments) -> list[Tensor]:
        return flatten(self.run(**arguments))


def spans(bounds: Tensor) -> Iterator[tuple[int, int]]:
    host = bounds.tolist()
    return itertools.pairwise(host)


def flatten(results: Any) -> list[Tensor]:
    """The tensors among what a function returned, in order."""
    if isinstance(results, Tensor):
        return [results]
    if results is None:
        return []
    return [tensor for each in results for tensor in flatten(each)]


def gradients_of(
    run: Callable[[Arguments], list[Tensor]], arguments: Arguments, names: tuple[str, ...]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results and the gradients of the named arguments, under a fixed cotangent of every result."""
    leaves = {
        name: _map(arguments[name], lambda x: x.detach().requires_grad_())
        for name in names
        if arguments.get(name) is not None
    }
    results = run({**arguments, **leaves})
    tensors = {
        f"{name}[{i}]" if isinstance(leaf, tuple) else name: tensor
        for name, leaf in leaves.items()
        for i, tensor in enumerate(flatten(leaf))
    }
    loss = results[0].new_zeros(())
    for result in results:
        loss = loss + (result * _cotangent(result).to(result)).sum()
    if not loss.requires_grad:  # nothing depends on the inputs, as for no tokens
        return results, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    found = torch.autograd.grad(
        loss, list(tensors.values()), allow_unused=True, materialize_grads=True
    )
    return [result.detach() for result in results], dict(zip(tensors, found, strict=True))


def _cotangent(result: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(result.numel())
    return torch.randn(result.shape, generator=generator, dtype=torch.float64)


def _draw(*size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(each, change) for each in value)
    return value


def _convert(value: Any, own: torch.dtype | None, dtype: torch.dtype, device: Any) -> Any:
    return _map(value, lambda x: x.to(device, own or accumulator(dtype)))


def _widen(value: Any) -> Any:
    return _map(value, lambda x: x.double() if x.is_floating_point() else x)


def one_sequence(arguments: Arguments, n: int, start: int, stop: int) -> Arguments:
    """The arguments of one packed sequence alone."""

    def cut(name: str, value: Any) -> Any:
        if name in PER_HEAD:
            return value
        rows = slice(n, n + 1)
        return _map(value, lambda x: x[rows] if name in PER_SEQUENCE else x[:, start:stop])

    return {name: cut(name, value) for name, value in arguments.items()}


def both(*makers: Callable[[Shape, Draw], Arguments], **more: Any) -> Any:
    """A variant made of several."""

    def make(shape: Shape, draw: Draw) -> Arguments:
        made: Arguments = {}
        for maker in makers:
            made.update(maker(shape, draw))
        return {**made, **more}

    return make


def all_specs() -> list[OpSpec]:
    """Every spec, engine by engine."""
    from fla.testing import delta, linear, softmax

    return [*linear.SPECS, *softmax.SPECS, *delta.SPECS]
