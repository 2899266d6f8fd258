"""Tests of kernels for Hopper on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fla.ops.common import device

marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != device.HOPPER,
        reason="no Hopper GPU",
    ),
]


@contextlib.contextmanager
def verified(*kernels: str):
    """Inside, these kernels count as verified with the installed Triton.

    They are compiled one by one, so that no call begins anew and its launches count once.
    """
    from fla.ops.common import launch

    release = (device.triton_version() or "").rsplit(".", 1)[0]
    with (
        mock.patch.dict(device.HOPPER_TRITON, dict.fromkeys(kernels, (release,))),
        mock.patch.object(launch, "gathering", lambda: None),
    ):
        yield


@contextlib.contextmanager
def launched_from(*stages: Any):
    """Yields what these modules launch inside, by the kernels' names; a mock would keep tensors."""
    launched: list[str] = []

    def counted(kernel, *arguments, launch=stages[0].launch):
        launched.append(kernel.fn.__name__)
        return launch(kernel, *arguments)

    with contextlib.ExitStack() as stack:
        for stage in stages:
            stack.enter_context(mock.patch.object(stage, "launch", counted))
        yield launched


def check_what_lies_beside(run: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor]):
    """The last chunk of a sequence reaches into the next one, or behind all, here full of NaN.

    ``run`` returns what 500 tokens, of which 300 are in sequences, have in each result.
    """
    arguments = [x.clone() for x in arguments]
    bounds = torch.tensor([0, 100, 230, 300], device=arguments[0].device)
    expected = run(*(x[:, :300] for x in arguments), cu_seqlens=bounds)
    for x in arguments:
        x[:, 100:230] = torch.nan
        x[:, 300:] = torch.nan
    found = run(*arguments, cu_seqlens=bounds)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[:, :100], b[:, :100]) and torch.equal(a[:, 230:300], b[:, 230:])
        assert a[:, 100:230].isnan().any() and not a[:, 300:].any()


def compiled(kernel: Any) -> int:
    """How often a kernel has been compiled in this process."""
    return len(kernel.device_caches[0][0])
