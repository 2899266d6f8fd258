"""A call compiles all kernels that it lacks side by side, and only then launches any."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from fla.ops.common import launch as launching  # noqa: E402
from fla.ops.common.lacking import begins_anew, complete  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def kernels():
    """Two that nobody has compiled."""

    @triton.jit
    def first(x, SIZE: tl.constexpr):
        tl.store(x + tl.arange(0, SIZE), 1.0)

    @triton.jit
    def second(x, SIZE: tl.constexpr):
        tl.static_assert(SIZE < 64, "too large")
        tl.store(x + tl.arange(0, SIZE), 2.0)

    return first, second


@contextlib.contextmanager
def hopper():
    """A GPU to compile for, on which launches are counted; yields what was compiled, launched."""
    events: list[str] = []
    gpu = mock.Mock()
    gpu.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    gpu.get_current_device.return_value = 0
    gpu.utils.get_device_properties.return_value = {"max_shared_mem": 1 << 17}
    gpu.utils.load_binary.return_value = 0, 0, 0, 0, 1024
    gpu.launcher_cls = lambda source, _: lambda *_: events.append(f"launch {source.name}")

    def hook(fn, **_):
        events.append(f"compile {fn.name.split('.')[-1]}")

    with (
        mock.patch.object(driver, "_active", gpu),
        mock.patch.object(launching, "_compiled", {}),
        mock.patch.object(knobs.runtime, "jit_cache_hook", hook),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True),
    ):
        yield events


def call(x, first, second, size=32):
    launching.launch(first, 1, (x,), (), {"SIZE": 16})
    launching.launch(second, 1, (x,), (), {"SIZE": size})
    return x


COMPILED = ["compile first", "compile second"]
LAUNCHED = ["launch first", "launch second"]


def test_everything_is_compiled_before_anything_is_launched():
    x = torch.zeros(64)
    with hopper() as events:
        two = kernels()
        assert complete(call, x, *two) is x
        assert events == COMPILED + LAUNCHED
        complete(call, x, *two)
        assert events[4:] == LAUNCHED


def test_what_came_before_the_first_missing_kernel_is_launched_again():
    x = torch.zeros(64)
    with hopper() as events:
        two = kernels()
        complete(call, x, *two)
        events.clear()
        complete(call, x, *two, 16)
    assert events == ["launch first", "compile second", *LAUNCHED]


def test_outside_of_an_operator_kernels_are_compiled_one_by_one():
    with hopper() as events:
        call(torch.zeros(64), *kernels())
    assert events == [COMPILED[0], LAUNCHED[0], COMPILED[1], LAUNCHED[1]]


def test_a_kernel_that_does_not_compile_says_so():
    with hopper() as events:
        with pytest.raises(triton.CompilationError, match="too large"):
            complete(call, torch.zeros(64), *kernels(), 64)
        assert not begins_anew()
    assert events.count("launch first") == 1


def test_kernels_are_loaded_side_by_side():
    both = threading.Barrier(2, timeout=60)
    with hopper() as events:
        driver.active.utils.load_binary.side_effect = lambda *_: (both.wait(), 0, 0, 0, 1024)
        complete(call, torch.zeros(64), *kernels())
    assert not both.broken
    assert events == COMPILED + LAUNCHED


def test_a_compilation_that_is_broken_off_leaves_nothing_behind():
    x = torch.zeros(64)
    with hopper() as events:
        two = kernels()
        with (
            mock.patch.object(triton.AsyncCompileMode, "__exit__", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            complete(call, x, *two)
        events.clear()
        complete(call, x, *two)
    assert events[-2:] == LAUNCHED


def test_a_caller_may_compile_so_himself():
    with hopper() as events, ThreadPoolExecutor(1) as pool, triton.AsyncCompileMode(pool):
        complete(call, torch.zeros(64), *kernels())
    assert events == COMPILED + LAUNCHED


def test_before_triton_can_kernels_are_compiled_one_by_one(monkeypatch):
    monkeypatch.delattr(triton, "AsyncCompileMode")
    with hopper() as events:
        complete(call, torch.zeros(64), *kernels())
    assert events == [COMPILED[0], LAUNCHED[0], COMPILED[1], LAUNCHED[1]]


def test_calls_within_a_call_begin_anew_together():
    x = torch.zeros(64)
    with hopper() as events:
        two = kernels()
        complete(lambda x: complete(call, x, *two), x)
    assert events == COMPILED + LAUNCHED


def test_under_capture_kernels_are_compiled_one_by_one():
    captured = {"is_available": lambda: True, "is_current_stream_capturing": lambda: True}
    with hopper() as events, mock.patch.multiple(torch.cuda, **captured):
        complete(call, torch.zeros(64), *kernels())
    assert events == [COMPILED[0], LAUNCHED[0], COMPILED[1], LAUNCHED[1]]
