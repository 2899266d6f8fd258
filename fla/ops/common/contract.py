"""What may come in: operators check their arguments once, here, before anything is computed.

Shapes are written as a notation, ``"B T H K"``: a letter seen first binds its size, seen again it
must agree, and 1 stands for itself.  A leading ``?`` marks an operand that may be ``None``.
Shapes and values that are wrong raise ValueError; types, dtypes and unknown keywords TypeError.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from fla.ops.common.device import on_host

Function = TypeVar("Function", bound=Callable[..., Any])

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HINTS = {
    "head_first": "tensors are always [B, T, H, D]; pass x.transpose(1, 2) for a head-first x",
    "offsets": "packed sequences are given as cu_seqlens",
}


def public(function: Function) -> Function:
    """Make an unknown keyword, or a flag that is no flag, a TypeError that says what is meant."""
    parameters = inspect.signature(function).parameters
    names = frozenset(parameters)
    flags = {name for name, each in parameters.items() if isinstance(each.default, bool)}
    places = [(i, name) for i, name in enumerate(parameters) if name in flags]

    @functools.wraps(function)
    def face(*args, **kwargs):
        for name in kwargs:
            if name not in names:
                hint = f": {_HINTS[name]}" if name in _HINTS else ""
                raise TypeError(f"{name}: {function.__qualname__} has no such argument{hint}")
            if name in flags and not isinstance(kwargs[name], bool):
                kwargs[name] = _flag(name, kwargs[name])
        for i, name in places:
            if i >= len(args):
                break
            if not isinstance(args[i], bool):
                args = (*args[:i], _flag(name, args[i]), *args[i + 1 :])
        return function(*args, **kwargs)

    return face  # type: ignore[return-value]


def _flag(name: str, value: Any) -> bool:
    """True or False from what means it: a whole number, or NumPy's own."""
    kind = type(value)
    if isinstance(value, int) or (kind.__module__ == "numpy" and kind.__name__[:4] == "bool"):
        return bool(value)
    raise TypeError(f"{name}: expected True or False, got {kind.__name__}")


def operands(
    sizes: dict[str, int] | None = None,
    beside: tuple[str, torch.Tensor] | None = None,
    **expected: tuple[Any, str],
) -> dict[str, int]:
    """Check tensors against their notation and return the size of every letter.

    ``operands(q=(q, "B T H K"), g=(g, "?B T H"))`` also makes sure that each one is a floating
    point tensor on the device of the first, and that q, k and v share one dtype.  ``sizes`` binds
    letters beforehand; ``beside`` is the first of them if it has been checked already.
    """
    sizes = {"1": 1, **(sizes or {})}
    first = None
    if beside is not None:
        first, device, dtype = beside[0], beside[1].device, beside[1].dtype
    for name, (tensor, notation) in expected.items():
        if tensor is None and notation[0] == "?":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"{name}: expected a dense tensor, got {tensor.layout}; sequences of several "
                "lengths are packed into a batch of one, with cu_seqlens"
            )
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name}: expected a floating point tensor, got {tensor.dtype}; "
                "fp64, fp32, fp16 and bf16 are taken"
            )
        if first is None:
            first, device, dtype = name, tensor.device, tensor.dtype
        elif tensor.device != device:
            raise ValueError(
                f"{name}: expected the device of {first}, {device}, got {tensor.device}"
            )
        elif tensor.dtype != dtype and name in ("k", "v") and first == "q":
            raise TypeError(f"{name}: expected the dtype of q, {dtype}, got {tensor.dtype}")
        letters, shape = _letters(notation), tensor.shape
        fits = len(letters) == len(shape)
        if not (fits and tuple(map(sizes.setdefault, letters, shape)) == shape):
            raise ValueError(f"{name}: expected {_shape(letters, sizes)}, got {list(shape)}")
    return sizes


def _letters(notation: str) -> tuple[str, ...]:
    return tuple(notation.lstrip("?").split())


def _shape(letters: Sequence[str], sizes: dict[str, int]) -> str:
    """``[B, T]``, and where all sizes are known ``[B, T] = [2, 6]``."""
    shape = f"[{', '.join(letters)}]"
    if all(letter in sizes for letter in letters):
        shape += f" = {[sizes[letter] for letter in letters]}"
    return shape


def at_most(sizes: dict[str, int], **limits: int) -> None:
    """Head sizes have limits: ``at_most(sizes, K=256, V=512)``."""
    for letter, limit in limits.items():
        if not 1 <= sizes[letter] <= limit:
            raise ValueError(
                f"{letter}: expected a head size from 1 up to {limit}, got {sizes[letter]}"
            )


def divides(sizes: dict[str, int], many: str, few: str) -> None:
    """Grouped heads: ``divides(sizes, "HQ", "H")`` wants HQ to be a multiple of H."""
    if sizes[many] // max(sizes[few], 1) * sizes[few] != sizes[many]:
        raise ValueError(
            f"{many}: expected a multiple of {few} = {sizes[few]}, got {sizes[many]} heads"
        )


def number_of_sequences(
    q: torch.Tensor, cu_seqlens: Any, cu_seqlens_cpu: Any = None, tokens: str = "q"
) -> int:
    """N, from shapes alone: the batch, or the packed sequences, which want a batch of one.

    ``tokens`` is what errors call q.
    """
    if cu_seqlens is None:
        if cu_seqlens_cpu is not None:
            raise ValueError("cu_seqlens_cpu: expected None without cu_seqlens, got a tensor")
        return q.shape[0]
    for name, bounds in (("cu_seqlens", cu_seqlens), ("cu_seqlens_cpu", cu_seqlens_cpu)):
        if bounds is not None:
            boundary_tensor(name, bounds)
    if cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens: expected the device of {tokens}, {q.device}, got {cu_seqlens.device}"
        )
    if cu_seqlens_cpu is not None and cu_seqlens_cpu.device.type != "cpu":
        raise ValueError(f"cu_seqlens_cpu: expected the device cpu, got {cu_seqlens_cpu.device}")
    if cu_seqlens_cpu is not None:
        alike(cu_seqlens, cu_seqlens_cpu)
    if q.shape[0] != 1:
        raise ValueError(f"{tokens}: expected a batch of 1 with cu_seqlens, got {q.shape[0]}")
    return cu_seqlens.shape[0] - 1


def index_tensor(name: str, value: Any) -> None:
    """A tensor of whole numbers."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected torch.int32 or torch.int64, got {value.dtype}")


def boundary_tensor(name: str, bounds: Any) -> None:
    """Boundaries of sequences, whatever their values."""
    index_tensor(name, bounds)
    if bounds.dim() != 1 or bounds.shape[0] < 1:
        raise ValueError(f"{name}: expected [N + 1], got {list(bounds.shape)}")


def alike(cu_seqlens: torch.Tensor, cu_seqlens_cpu: torch.Tensor) -> None:
    """The host copy has as many boundaries."""
    if cu_seqlens_cpu.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_cpu: expected {list(cu_seqlens.shape)}, got {list(cu_seqlens_cpu.shape)}"
        )


def boundaries(
    cu_seqlens: torch.Tensor | None, cu_seqlens_cpu: torch.Tensor | None, tokens: int
) -> None:
    """Check the values of the boundaries where they lie on the host; devices are never asked."""
    if cu_seqlens is None:
        return
    known = on_host(cu_seqlens)
    host = cu_seqlens if known else cu_seqlens_cpu
    if host is None:
        return
    values = host.tolist()
    if values[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {values[0]}")
    for before, after in itertools.pairwise(values):
        if after < before:
            raise ValueError(f"cu_seqlens: expected not to decrease, got {after} after {before}")
    if values[-1] > tokens or (known and values[-1] != tokens):
        raise ValueError(f"cu_seqlens: expected to end at T = {tokens}, got {values[-1]}")
    if known and cu_seqlens_cpu is not None and values != cu_seqlens_cpu.tolist():
        raise ValueError("cu_seqlens_cpu: expected the values of cu_seqlens, got others")


def number(name: str, value: Any) -> float:
    """A number as a float: of an int, which may be 1, Triton would make a constant."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    value = float(value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def whole_number(name: str, value: Any) -> int:
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    return int(value)


def window(size: Any) -> int | None:
    """``window_size``: how many keys a query sees, or None for all."""
    if size is None:
        return None
    size = whole_number("window_size", size)
    if size < 0:
        raise ValueError(f"window_size: expected None or at least 0, got {size}")
    return size


def floating(name: str, dtype: Any) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating point dtype, got {dtype}")


def written(**tensors: torch.Tensor | None) -> None:
    """What is written to has each element once; strides are no part of what is checked ``once``."""
    for name, x in tensors.items():
        if x is not None and 0 in x.stride() and x.squeeze().stride().count(0):
            raise ValueError(
                f"{name}: expected a tensor to write to, got one that is expanded, "
                f"{list(x.shape)} with strides {list(x.stride())}"
            )


def scale_or_default(scale: float | None, K: int) -> float:
    """The factor on scores, ``K ** -0.5`` by default."""
    return K**-0.5 if scale is None else number("scale", scale)


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if isinstance(allowed[0], int):
        whole_number(name, value)
    if value not in allowed:
        listed = ", ".join(str(item) for item in allowed)
        raise ValueError(f"{name}: expected one of {listed}, got {value}")


def state_layout(state_v_first: bool, transpose_state_layout: bool | None) -> bool:
    """``transpose_state_layout`` is the old name of ``state_v_first``."""
    if transpose_state_layout is None:
        return bool(state_v_first)
    transpose_state_layout = _flag("transpose_state_layout", transpose_state_layout)
    if state_v_first:
        raise ValueError(
            "transpose_state_layout: expected None beside state_v_first, its new name, "
            f"got {transpose_state_layout}"
        )
    if not torch.compiler.is_compiling():  # a graph cannot hold a warning
        warnings.warn(
            "transpose_state_layout is now called state_v_first", DeprecationWarning, stacklevel=4
        )
    return transpose_state_layout
