"""``assert_close``, for tests of the operators, and ``device``, the device to run them on."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    device: str


def assert_close(
    prefix: str,
    ref: Tensor,
    tri: Tensor,
    ratio: float,
    warning: bool = False,
    err_atol: float = 1e-6,
) -> None:
    """Raise AssertionError unless ``tri`` is ``ref`` up to a relative error of ``ratio``.

    The error is RMS(ref − tri) / RMS(ref); differences of at most ``err_atol`` always pass.  With
    ``warning`` an error too large only warns; shapes that differ and NaN are never let through.
    """
    if ref.shape != tri.shape:
        raise AssertionError(
            f"{prefix}: shapes differ, expected {list(ref.shape)}, got {list(tri.shape)}"
        )
    if ref.is_complex() or tri.is_complex():
        raise TypeError(f"{prefix}: expected real tensors, got {ref.dtype} and {tri.dtype}")
    if ref.numel() == 0:
        return
    ref, tri = ref.detach().double(), tri.detach().double()
    difference = ref - tri
    largest = difference.abs().max().item()
    if largest <= err_atol:
        return
    for name, tensor in (("ref", ref), ("tri", tri)):
        if tensor.isnan().any():
            raise AssertionError(f"{prefix}: NaN in {name}")
    error = (_rms(difference) / (_rms(ref) + 1e-8)).item()
    if error < ratio:
        return
    message = f"{prefix}: error {error:.3g}, expected below {ratio:.3g}; differs by {largest:.3g}"
    if not warning:
        raise AssertionError(message)
    warnings.warn(message, stacklevel=2)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def __getattr__(name: str) -> str:
    # asked for, not imported: importing the package queries no device
    if name != "device":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return "cpu"
    return accelerator.type
