"""What the suites of ``python -m benchmarks gpu`` share: what one is, and how a call is measured.

A suite is a module with a ``SUITE``.  Each of its libraries is measured in a process of its own, so
that ``fla-core``, another package called ``fla``, can stand beside this one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Found = dict[str, Any]
# An operator on keyword arguments, of which the floating point tensors have gradients.
Call = Callable[..., Tensor]
# Lengths of a packed row's sequences, 8192 tokens together
PACKED = (1300, 547, 2048, 963, 271, 3063)


@dataclasses.dataclass(frozen=True)
class Row:
    """One call with one set of inputs; ``first`` are the ms, forward and backward, to be reached.

    Suites add what tells their inputs; all fields stand in the results.
    """

    name: str
    first: tuple[float | None, float | None]

    @property
    def differentiable(self) -> bool:
        """Whether there is a backward pass."""
        return True


@dataclasses.dataclass(frozen=True)
class Suite:
    """Rows, and the libraries that each is measured in.

    A library's function measures one row: ``forward`` and ``backward`` in ms, ``errors``, and what
    else is worth keeping; nothing where the library has no such call.  ``ours`` is this package as
    it is, ``triton`` the same without its kernels for Hopper.  ``host`` runs in ``ours``
    and ``fla-core``; ``first_call`` in ``ours``, where no kernel is compiled yet.  ``remarks`` says
    in words what the rows, each with the findings of all libraries, show together.  ``settle``
    gives rows what they are to reach where that follows from what was found in ``ours``.  In what
    ``around`` gives run this package's calls of a row.
    """

    name: str  # of the file in results
    rows: Sequence[Row]
    libraries: dict[str, Callable[[Any], Found]]
    host: Callable[[], Found] | None = None
    first_call: Callable[[], Found] | None = None
    remarks: Callable[[list[Found]], Iterator[str]] = lambda rows: iter(())
    settle: Callable[[list[Any], dict[str, Found]], list[Any]] = lambda rows, found: rows
    around: Callable[[Any], AbstractContextManager[None]] = lambda row: nullcontext()


def in_triton(measure: Callable[[Any], Found]) -> Callable[[Any], Found]:
    """``measure`` without this package's kernels for Hopper, to stand beside what has them."""

    def measure_in_triton(row: Any) -> Found:
        from fla.ops.common.dispatch import use

        with use("triton"):
            return measure(row)

    return measure_in_triton


def times(call: Call, inputs: Found, do: Tensor | None = None) -> Found:
    """ms of the forward pass and, with ``do``, of the backward pass alone."""
    found = {"forward": milliseconds(torch.inference_mode()(lambda: call(**inputs)))}
    if do is not None:
        inputs, leaves = differentiable(inputs)
        o = call(**inputs)
        found["backward"] = milliseconds(
            lambda: torch.autograd.grad(o, list(leaves.values()), do, retain_graph=True)
        )
    return found


def milliseconds(run: Callable[[], Any]) -> float:
    """The least of three medians: what else disturbs a virtual machine's host comes and goes."""
    from triton.testing import do_bench

    return min(do_bench(run, warmup=100, rep=100, return_mode="median") for _ in range(3))


def results(call: Call, inputs: Found, do: Tensor | None = None) -> dict[str, Tensor]:
    """The output ``o`` and, with ``do``, every gradient, ``dq`` and so on."""
    if do is None:
        with torch.no_grad():
            return {"o": call(**inputs)}
    inputs, leaves = differentiable(inputs)
    o = call(**inputs)
    gradients = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
    return {"o": o.detach()} | dict(zip((f"d{name}" for name in leaves), gradients, strict=True))


def in_fp64(textbook: Call, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results of ``textbook`` on ``inputs``, among them ``do``, in fp64."""
    wide = {name: x.double() for name, x in inputs.items()}
    return results(textbook, wide, wide.pop("do"))


def differentiable(inputs: Found) -> tuple[Found, dict[str, Tensor]]:
    """The inputs with leaves among them, and the leaves alone."""
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    return inputs | leaves, leaves


def errors(found: dict[str, Tensor], exact: dict[str, Tensor], most: float = 0.05) -> Found:
    """RMS(found − exact) / RMS(exact); what is off by more than ``most`` is not worth its time."""
    each = {
        name: ((found[name].double() - x.double()).norm() / x.double().norm()).item()
        for name, x in exact.items()
        if x.any()
    }
    wrong = {name: error for name, error in each.items() if not error <= most}
    if wrong:
        raise ArithmeticError(f"wrong: {wrong}")
    return each


def extra_memory(run: Callable[[], Any]) -> int:
    """The most bytes that ``run`` takes beside what was there before, its results included.

    In this thread: one of autograd's own may hold the results of a run before.
    """
    with torch.autograd.set_multithreading_enabled(False):
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before


def wall_clock(run: Callable[[], Any], calls: int = 200) -> float:
    """ms of a call among many back to back; with little to compute, the time of the host."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e3)
    return min(times)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """How long one call takes, and its result."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def first_call(call: Call, inputs: Found) -> Found:
    """Seconds of a call and of its backward pass, with what they compile."""
    do = inputs.pop("do")
    inputs, leaves = differentiable(inputs)
    forward, o = seconds(lambda: call(**inputs))
    backward, _ = seconds(lambda: torch.autograd.grad(o, list(leaves.values()), do))
    return {"forward": forward, "backward": backward}


def compiled_again(calls: Sequence[tuple[Call, Found]], first: Sequence[int]) -> int:
    """Kernels that ``calls`` compile after ``first`` of them; a copy to the host is an error."""
    from triton import knobs

    def run(call: Call, inputs: Found) -> None:
        results(call, {x: y for x, y in inputs.items() if x != "do"}, inputs["do"])

    for i in first:
        run(*calls[i])
    found: list[int] = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        with mock.patch.object(knobs.runtime, "jit_cache_hook", lambda **_: found.append(1)):
            for call, inputs in calls:
                run(call, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len(found)


def reached(row: Row, found: Found) -> bool:
    """Whether a row ran and met what it is to reach."""
    return all(
        first is None or found.get(name, math.inf) <= first
        for name, first in zip(("forward", "backward"), row.first, strict=True)
    )
