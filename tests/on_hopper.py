"""Tests of kernels for Hopper on a GPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fla.ops.common import device

marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != device.HOPPER,
        reason="no Hopper GPU",
    ),
]


def verified(*kernels: str):
    """Inside, these kernels count as verified with the installed Triton."""
    release = (device.triton_version() or "").rsplit(".", 1)[0]
    return mock.patch.dict(device.HOPPER_TRITON, dict.fromkeys(kernels, (release,)))
