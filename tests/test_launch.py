"""Launching kernels again, without a GPU and without kernels."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from triton import knobs
from triton.compiler.compiler import CompiledKernel

from fla.ops.common import launch as launching
from fla.ops.common.hopper import descriptor

STREAM = 7


@contextlib.contextmanager
def stand_ins():
    """What compiles a kernel, and what it compiled."""
    kernel = mock.MagicMock(arg_names=["x", "desc"])
    with (
        mock.patch.object(launching, "_compiled", {}),
        mock.patch.object(
            torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, create=True
        ),
    ):
        yield kernel, kernel.__getitem__.return_value.return_value


def test_each_tile_has_a_kernel():
    """Tiles of another size, or dtype, want another kernel; those of another tensor do not."""
    x = torch.zeros(1, 64, 1, 128)
    with stand_ins() as (kernel, compiled):
        for given, size in ((x, 64), (x, 128), (x.clone(), 64), (x.half(), 64), (x, 128)):
            launching.launch(kernel, 1, (x,), (descriptor(given, 64, size),), {})
    assert kernel.__getitem__.return_value.call_count == 3
    assert compiled.run.call_count == 2


def test_the_launcher_is_given_what_triton_gives_it():
    """But for what only observers need."""
    x = torch.zeros(1, 64, 1, 128)
    tile = descriptor(x, 64, 64)
    with stand_ins() as (kernel, compiled):
        for _ in range(2):
            launching.launch(kernel, 5, (x,), (tile,), {})
        given = compiled.run.call_args.args
        CompiledKernel.__getitem__(compiled, (5, 1, 1))(x.data_ptr(), tile, stream=STREAM)
        expected = compiled.run.call_args.args
    assert len(given) == len(expected)
    observers = compiled.launch_metadata.return_value, knobs.runtime.launch_enter_hook
    observers += (knobs.runtime.launch_exit_hook,)
    for a, b in zip(given, expected, strict=True):
        assert a is None if any(b is each for each in observers) else a == b


def test_what_was_found_is_launched_again():
    """For other tensors as if it was looked for, and looked for where one begins elsewhere."""
    x, y = torch.zeros(2, 64)
    with stand_ins() as (kernel, compiled):
        step = launching.Relaunch(kernel, 5, (1.0,), {"desc": 3})
        step(x, None)
        step(y, None)
        looked_for = compiled.run.call_args
        with mock.patch.object(launching, "launch", None):
            step(y, None)
            assert compiled.run.call_args == looked_for
            step(x, None)
        assert compiled.run.call_args != looked_for
        step(y[1:], None)
        step(y, None)
        launching.Relaunch(kernel, 0, (1.0,), {"desc": 3})(x, None)
    assert kernel.__getitem__.return_value.call_count == 2
    assert compiled.run.call_count == 4


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_who_listens_to_launches_hears_of_them(hook):
    x = torch.zeros(1, 64, 1, 128)
    with stand_ins() as (kernel, compiled):
        for calls in ([], [], [print], []):
            with mock.patch.object(getattr(knobs.runtime, hook), "calls", calls):
                launching.launch(kernel, 1, (x,), (descriptor(x, 64, 64),), {})
    assert kernel.__getitem__.return_value.call_count == 1
    assert compiled.__getitem__.return_value.call_count == 1
    assert compiled.run.call_count == 2
