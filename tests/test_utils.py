"""``fla.utils``: what ``assert_close`` lets through and what not, and the lazy ``device``."""

import subprocess
import sys

import pytest
import torch

import fla.utils
from fla.utils import assert_close

REF = torch.randn(64, generator=torch.Generator().manual_seed(0))


def test_equal_and_nearly_equal_pass():
    assert_close("o", REF, REF, 1e-6)
    assert_close("o", REF, REF * 1.001, 2e-3)
    assert_close("o", REF.bfloat16(), REF, 1e-2)
    assert_close("o", REF[:0], REF[:0], 1e-6)


def test_the_error_is_relative_and_named():
    with pytest.raises(AssertionError, match=r"dq: error 0\.1, expected below 0\.05"):
        assert_close("dq", REF, REF * 1.1, 0.05)
    with pytest.raises(AssertionError, match="dq: error"):
        assert_close("dq", REF * 1e-3, REF * 1.1e-3, 0.05)


def test_tiny_differences_pass_whatever_the_ratio():
    small = REF * 1e-7
    assert_close("o", small, -small, 1e-6)
    with pytest.raises(AssertionError):
        assert_close("o", small, -small, 1e-6, err_atol=1e-9)


def test_warning_only_warns():
    with pytest.warns(UserWarning, match=r"o: error 0\.1"):
        assert_close("o", REF, REF * 1.1, 0.05, warning=True)


@pytest.mark.parametrize("warning", [False, True])
def test_nan_and_shapes_never_pass(warning):
    broken = REF.clone()
    broken[3] = torch.nan
    with pytest.raises(AssertionError, match="NaN in tri"):
        assert_close("o", REF, broken, 1e9, warning)
    with pytest.raises(AssertionError, match="NaN in ref"):
        assert_close("o", broken, REF, 1e9, warning)
    with pytest.raises(AssertionError, match=r"expected \[64\], got \[1, 64\]"):
        assert_close("o", REF, REF[None], 1e9, warning)


def test_device_is_a_device():
    assert isinstance(fla.utils.device, str)
    assert torch.zeros(1, device=fla.utils.device).device.type == fla.utils.device
    with pytest.raises(AttributeError, match="no attribute 'devices'"):
        _ = fla.utils.devices


def test_importing_asks_for_no_device():
    code = """
import torch
def asked(*args, **kwargs): raise RuntimeError("a device was asked for")
torch.cuda.is_available = torch.accelerator.is_available = asked
torch.accelerator.current_accelerator = asked
import fla.utils
try:
    fla.utils.device
except RuntimeError:
    raise SystemExit(0)
raise SystemExit("device did not ask")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_complex_tensors_are_not_compared():
    with pytest.raises(TypeError, match="o: expected real tensors"):
        assert_close("o", REF + 1j, REF, 1e-3)
