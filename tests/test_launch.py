"""Launching kernels again, without a GPU and without kernels."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from triton import knobs

from fla.ops.common import launch as launching
from fla.ops.common.hopper import descriptor


@contextlib.contextmanager
def stand_ins():
    """What compiles a kernel, and what it compiled."""
    kernel = mock.MagicMock(arg_names=["x", "desc"])
    with (
        mock.patch.object(launching, "_compiled", {}),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True),
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


def test_who_listens_to_launches_hears_of_them():
    x = torch.zeros(1, 64, 1, 128)
    with stand_ins() as (kernel, compiled):
        for calls in ([], [], [print], []):
            with mock.patch.object(knobs.runtime.launch_exit_hook, "calls", calls):
                launching.launch(kernel, 1, (x,), (descriptor(x, 64, 64),), {})
    assert kernel.__getitem__.return_value.call_count == 1
    assert compiled.__getitem__.return_value.call_count == 1
    assert compiled.run.call_count == 2
