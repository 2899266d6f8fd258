"""How far a result is from fp64, and how far it may be."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import torch
from torch import Tensor

from fla.ops.common import dispatch
from fla.testing.spec import Arguments, OpSpec, Shape, gradients_of

# 16-bit results may be this much worse than the simulation of ``measure``, over so many draws.
SLACK = 1.5
DRAWS = 3
LARGEST_BOUND = 5e-2  # what the simulation gets wrong itself, rounding does not excuse
FP64_BOUND = 1e-11
# Inputs and cotangents have unit size; a result below this RMS is zero but for rounding.
SMALLEST = 1e-3
ZERO_BOUND = 1e-3  # of it, in 16 bits


def relative_error(found: Tensor, expected: Tensor) -> float:
    """RMS(found − expected) / RMS(expected); infinite where shapes differ or NaN appears."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    difference = (found - expected).norm().item()
    if difference == 0:
        return 0.0
    error = difference / expected.numel() ** 0.5 / _size(expected)
    return error if error == error else float("inf")


def named_results(
    run: Callable[[Arguments], list[Tensor]], arguments: Arguments, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """Outputs ``o``, ``final[0]``, … and gradients ``dq``, … under one name each."""
    results, gradients = gradients_of(run, arguments, names)
    named = {"o" if i == 0 else f"final[{i - 1}]": result for i, result in enumerate(results)}
    return named | {f"d{name}": gradient for name, gradient in gradients.items()}


def expected_results(spec: OpSpec, arguments: Arguments) -> dict[str, Tensor]:
    """Outputs and gradients of the textbook in fp64 on the same values."""
    wide = spec.widened(arguments)
    return named_results(spec.expected, wide, spec.gradients)


def measure(
    spec: OpSpec,
    shape: Shape,
    variant: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> dict[str, tuple[float, float]]:
    """The error of each output and gradient of the public function, and how large it may be.

    In fp64 and fp32 that is a constant.  In 16 bits it follows the error of whole-chunk PyTorch
    with every product's operands rounded to 16 bits and fp32 sums; both are taken over a few draws.
    The ratio of two such errors, each of n numbers, is a matter of chance, of standard deviation
    1/√n around what it would be of many: it may be off by two of these.  The channels of a token
    and head count as one, for what is rounded for all of them, as the weight of a pair of tokens
    is, is wrong in all of them alike.
    """
    half = dtype.itemsize == 2
    draws: dict[str, list[tuple[float, float]]] = {}
    for seed in range(DRAWS if half else 1):
        arguments = spec.arguments(shape, variant, dtype, device, seed)
        expected = expected_results(spec, arguments)
        found = named_results(spec.outputs, arguments, spec.gradients)
        simulated = _simulated(spec, arguments, dtype) if half else {}
        for name, value in expected.items():
            bound = FP64_BOUND if dtype == torch.float64 else spec.fp32_bound
            if half:
                # What should be zero is rounding in both.
                least = ZERO_BOUND if _size(value) <= SMALLEST else bound
                bound = SLACK * max(relative_error(simulated[name], value), least)
                many = value.numel() // (value.shape[-1] if value.dim() == 4 else 1)
                bound *= 1 + 2 / max(DRAWS * many, 1) ** 0.5
                bound = min(bound, LARGEST_BOUND)
            draws.setdefault(name, []).append((relative_error(found[name], value), bound))
    return {
        name: (_pooled(error for error, _ in pairs), _pooled(bound for _, bound in pairs))
        for name, pairs in draws.items()
    }


def _size(x: Tensor) -> float:
    """RMS, as errors are relative to it."""
    return max(x.double().norm().item() / max(x.numel(), 1) ** 0.5, SMALLEST)


def _pooled(errors: Iterable[float]) -> float:
    return torch.tensor(list(errors), dtype=torch.float64).square().mean().sqrt().item()


def _simulated(spec: OpSpec, arguments: Arguments, dtype: torch.dtype) -> dict[str, Tensor]:
    with dispatch.use("eager"), rounded_products(dtype):
        return named_results(spec.outputs, arguments, spec.gradients)


@contextlib.contextmanager
def rounded_products(dtype: torch.dtype) -> Iterator[None]:
    """Round the operands of every matrix product to ``dtype``."""

    def rounded(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(product)
        def run(*operands, **more):
            *summands, a, b = operands  # baddbmm has what it adds to in front
            return product(*summands, a.to(dtype).to(a.dtype), b.to(dtype).to(b.dtype), **more)

        return run

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (Tensor, "__matmul__"),
            (Tensor, "matmul"),
            (torch, "matmul"),
            (torch, "bmm"),
            (torch, "baddbmm"),
            (Tensor, "baddbmm_"),
            (torch.linalg, "vecdot"),
        ):
            stack.enter_context(mock.patch.object(owner, name, rounded(getattr(owner, name))))
        yield
