"""Answers that are kept: what a call's shapes have been found to be is not asked again.

A step of decoding takes the host as long to check, and to find who runs it, as to launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.compiler import is_compiling
from torch.jit import is_tracing

Options = TypeVar("Options", bound=tuple)
Function = TypeVar("Function", bound=Callable[..., Any])

# Answers of a function: lengths differ from batch to batch
KEPT = 1024
_NOTHING = object()


def once(function: Function) -> Function:
    """Call ``function`` once for arguments that are equal, and for tensors of equal shapes,
    dtypes, devices and layouts: of a tensor it may look at nothing else.

    What it raises is raised every time.  Arguments are kept, so none may be large.
    """
    answers: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(function)
    def answer(*args):
        if is_compiling() or is_tracing():  # sizes are no numbers
            return function(*args)
        known = tuple(
            [(x.shape, x.dtype, x.device, x.layout) if isinstance(x, Tensor) else x for x in args]
        )
        try:
            found = answers.get(known, _NOTHING)
        except TypeError:  # without a hash: sizes that are symbols, or what no call takes
            return function(*args)
        if found is _NOTHING:
            found = function(*args)
            if len(answers) >= KEPT:
                answers.clear()
            answers[known] = found
        return found

    return answer  # type: ignore[return-value]


def finding(options: type[Options]) -> type[Options]:
    """``options``, a NamedTuple, for arguments that are checked ``once``: calls of the same shapes,
    dtypes and devices then have one object in common, by which they share what they find."""

    class Checked(options):  # type: ignore[valid-type, misc]
        def __init__(self, *_):
            self.found: dict[Any, Any] = {}

    return Checked


def found_by(options: Any) -> dict[Any, Any]:
    """What calls have found; nothing where PyTorch has had the options in between."""
    found = getattr(options, "found", None)
    return {} if found is None else found
