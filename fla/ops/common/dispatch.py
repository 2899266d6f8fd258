"""The only place that chooses an implementation, and that can say why.

An engine lists its implementations best first; each says what it cannot do.  The first one without
an objection runs.  ``use`` forces one, for tests and benchmarks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch

from fla.ops.common.once import found_by, once

# Names given to ``use``, innermost last.  For all threads: autograd runs backwards in its own.
_forced: list[str] = []


class Problem(NamedTuple):
    """What an implementation may object to: where the tensors are, what they hold, the options."""

    device: torch.device
    dtype: torch.dtype
    K: int
    V: int
    options: Any = None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A named module of stages; ``refuses`` says why it cannot take a problem, or None."""

    name: str
    module: str
    refuses: Callable[[Problem], str | None] = lambda problem: None

    @functools.cached_property
    def stages(self) -> ModuleType:
        return importlib.import_module(self.module)


class Engine:
    """Implementations of one operator, best first; the last one takes everything."""

    registry: ClassVar[dict[str, Engine]] = {}

    def __init__(self, name: str, *implementations: Implementation):
        self.name, self.implementations = name, implementations
        self._warned: set[str] = set()
        self._best = once(self._search)  # what a machine can do does not change
        Engine.registry[name] = self

    def explain(self, problem: Problem) -> list[tuple[str, str | None]]:
        """Every implementation with its objection, None where it has none."""
        return [(each.name, each.refuses(problem)) for each in self.implementations]

    def stages(self, q: torch.Tensor, v: torch.Tensor, options: Any) -> Any:
        """The module to call for heads of q and v, which calls that share ``options`` find once."""
        stages = None if _forced else found_by(options).get(self)
        if stages is None:
            stages = self.choose(Problem(q.device, q.dtype, q.shape[-1], v.shape[-1], options))
        return stages

    def choose(self, problem: Problem) -> Any:
        """The module to call."""
        if _forced:
            return self._named(_forced[-1], problem)
        best, reason = self._best(problem)
        if reason is not None:
            self._warn(reason)
        found_by(problem.options)[self] = best.stages
        return best.stages

    def _search(self, problem: Problem) -> tuple[Implementation, str | None]:
        """The first without an objection, and why a GPU falls back on it where one does."""
        reason = "it has no kernels"
        for each in self.implementations:
            objection = each.refuses(problem)
            if objection is None:
                falls_back = each.name == "eager" and problem.device.type not in ("cpu", "meta")
                return each, reason if falls_back else None
            reason = objection
        raise RuntimeError(f"{self.name}: no implementation takes {problem}")

    def _named(self, name: str, problem: Problem) -> ModuleType:
        for each in self.implementations:
            if each.name == name:
                reason = each.refuses(problem)
                if reason is not None:
                    raise RuntimeError(f"{self.name}: {name} cannot run here: {reason}")
                return each.stages
        names = ", ".join(each.name for each in self.implementations)
        raise ValueError(f"{self.name}: expected one of {names}, got {name}")

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"{self.name} runs in plain PyTorch: {reason}", stacklevel=2)


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Inside, every engine runs its implementation ``name`` or says why it cannot."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
