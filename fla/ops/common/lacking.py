"""Kernels that a call lacks, compiled side by side.

A launch that finds its kernel missing cannot know those that follow.  So its call goes on without
launching, to gather what it lacks, and when all of that is there begins anew.  What it had done is
done again: an operator of several kernels launches by ``launch`` alone, and what it changes beside
that, if it reads it too, it leaves as it is while it ``begins_anew``.
"""

from __future__ import annotations

import contextlib
import contextvars
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
    # Triton's mode is a variable of the context; whatever ends this one ends the mode
    contextvars.Context().run(_compile, lacks, args[0].device)
    return run(*args)


def gathering() -> list[Callable[[], Any]] | None:
    """What the call lacks so far; None where launches compile one by one, as under capture."""
    lacks = _call.lacks
    if lacks is None or lacks or not torch.cuda.is_available():
        return lacks
    return None if torch.cuda.is_current_stream_capturing() else lacks


def begins_anew() -> bool:
    """Whether the call lacks a kernel, so that nothing more of it counts."""
    return bool(_call.lacks)


def _compile(lacks: list[Callable[[], Any]], device: torch.device) -> None:
    """What is wrong with a kernel is said when it is launched."""
    import triton

    if not hasattr(triton, "AsyncCompileMode"):  # before 3.5: one by one, when they are launched
        return lacks.clear()
    with (
        _on(device),
        _Pool(len(lacks), device) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        while lacks:
            lacks.pop(0)()


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Pool(ThreadPoolExecutor):
    """Threads that compile, for which Triton lets go of Python's lock, and load on ``device``."""

    def __init__(self, threads: int, device: torch.device):
        super().__init__(threads)
        self._device = device

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def compile_and_load() -> Any:
            with _on(self._device):
                kernel = fn(*args, **kwargs)
                kernel.run  # noqa: B018, made when it is asked for
            return kernel

        return super().submit(compile_and_load)
