"""What a machine can do, asked only when a tensor that lives there comes in."""

from __future__ import annotations

import functools
import importlib.util

import torch

MINIMUM_CAPABILITY = (8, 0)
HOPPER = (9, 0)
# The Triton releases with which all tests of a kernel for Hopper have passed on a GPU
HOPPER_TRITON: dict[str, tuple[str, ...]] = {
    "softmax forward": ("3.6",),
    "softmax backward": ("3.6",),
    "linear walk": ("3.6",),
    "delta": ("3.6",),
}


def on_host(x: torch.Tensor) -> bool:
    """Whether values may be asked for: elsewhere that would be a copy from the device."""
    return x.is_cpu


@functools.cache
def triton_version() -> str | None:
    """The installed Triton's version, without importing it."""
    if importlib.util.find_spec("triton") is None:
        return None
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    if not torch.cuda.is_available():  # fake tensors are there alone, and ask for shapes
        return MINIMUM_CAPABILITY
    return torch.cuda.get_device_capability(device)


def lacks_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can take tensors of this device and dtype; None when one can."""
    if device.type != "cuda":
        return f"kernels run on CUDA tensors, these are on {device.type}"
    if triton_version() is None:
        return "Triton is not installed"
    if capability(device) < MINIMUM_CAPABILITY:
        major, minor = capability(device)
        return f"kernels need sm_80 or newer, this GPU is sm_{major}{minor}"
    if dtype == torch.float64:
        return "kernels take fp32, fp16 and bf16, these tensors are fp64"
    return None


def verified(kernel: str) -> bool:
    """Whether this kernel for Hopper is, with the installed Triton."""
    version = triton_version() or ""
    return any(version.startswith(f"{release}.") for release in HOPPER_TRITON[kernel])


def lacks_hopper(device: torch.device, dtype: torch.dtype, kernel: str) -> str | None:
    """Why a kernel for Hopper cannot take tensors of this device and dtype; None when it can."""
    reason = lacks_triton(device, dtype)
    if reason is not None:
        return reason
    if capability(device) != HOPPER:
        return "made for sm_90 alone"
    if dtype.itemsize != 2:
        return f"takes fp16 and bf16, not {dtype}"
    if not verified(kernel):
        return f"not verified with Triton {triton_version()}"
    return None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and states are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
