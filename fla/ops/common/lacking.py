"""Kernels that a call lacks, compiled side by side.

A launch that finds its kernel missing cannot know those that follow.  So its call goes on without
launching, to gather what it lacks, and when all of that is there begins anew.  What it had done is
done again: an operator changes nothing that it has yet to read before it launches.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class _Call(threading.local):
    """Of the call that this thread is in, what would compile a kernel that it lacks."""

    lacks: list[Callable[[], Any]] | None = None


_call = _Call()


def complete(run: Callable[..., Any], *args: Any) -> Any:
    """``run(*args)``, an operator where its first argument is, with all of its kernels there."""
    if _call.lacks is not None:  # part of another call
        return run(*args)
    lacks: list[Callable[[], Any]] = []
    _call.lacks = lacks
    try:
        result = run(*args)
    finally:
        _call.lacks = None
    if not lacks:
        return result
    del result  # what was not computed need not take memory beside what will be
    _compile(lacks, args[0].device)
    return run(*args)


def gathering() -> list[Callable[[], Any]] | None:
    """What the call lacks so far; None where launches compile one by one, as under capture."""
    lacks = _call.lacks
    if lacks is None or lacks or not torch.cuda.is_available():
        return lacks
    return None if torch.cuda.is_current_stream_capturing() else lacks


def begins_anew() -> bool:
    """Whether nothing need be launched, as the call lacks a kernel."""
    return bool(_call.lacks)


def _compile(lacks: list[Callable[[], Any]], device: torch.device) -> None:
    """What is wrong with a kernel is said when it is launched."""
    import triton

    on_gpu = device.type == "cuda"
    use = (torch.cuda.set_device, (device,)) if on_gpu else (None, ())
    with (
        torch.cuda.device(device) if on_gpu else contextlib.nullcontext(),
        _Pool(len(lacks), "compile", *use) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        while lacks:
            lacks.pop(0)()


class _Pool(ThreadPoolExecutor):
    """Threads, of which Triton lets go while it compiles; they load kernels too."""

    def submit(self, compile: Callable[[], Any], /, *_: Any, **__: Any) -> Future[Any]:
        def compile_and_load() -> Any:
            kernel = compile()
            kernel.run  # noqa: B018, made when it is asked for
            return kernel

        return super().submit(compile_and_load)
