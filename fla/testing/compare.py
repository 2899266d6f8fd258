"""How far a result is from fp64, and how far it may be."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from fla.ops.common import dispatch
from fla.testing.spec import PER_HEAD, Arguments, OpSpec, Shape, gradients_of

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
    return _rms(_squares(found, expected))


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
    """
    half = dtype.itemsize == 2
    found: dict[str, list[Tensor]] = {}
    rounded: dict[str, list[Tensor]] = {}
    for seed in range(DRAWS if half else 1):
        arguments = spec.arguments(shape, variant, dtype, device, seed)
        expected = expected_results(spec, arguments)
        results = named_results(spec.outputs, arguments, spec.gradients)
        simulated = _simulated(spec, arguments, dtype) if half else {}
        for name, value in expected.items():
            found.setdefault(name, []).append(_squares(results[name], value))
            if half:
                # What should be zero is rounding in both.
                least = ZERO_BOUND if _size(value) <= SMALLEST else spec.fp32_bound
                squares = _squares(simulated[name], value)
                squares += (least**2 - squares.mean()).clamp(min=0)
                rounded.setdefault(name, []).append(squares)
    bound = FP64_BOUND if dtype == torch.float64 else spec.fp32_bound
    measured = {}
    for name, each in found.items():
        squares = torch.cat(each)
        if half:
            bound = _bound(squares, torch.cat(rounded[name]), name[1:] in PER_HEAD)
        measured[name] = _rms(squares), bound
    return measured


def _bound(found: Tensor, rounded: Tensor, few: bool) -> float:
    """Of the RMS of errors, whose squares are given, beside those of the simulation.

    The ratio of the two is a matter of chance.  The relative variance of a mean of n squares is
    theirs over n, that of its root a quarter of it; two standard deviations of the ratio are
    allowed.  The simulation's variance stands for both, for a wrong token must not excuse itself.
    But of a parameter's gradients there are few, and of these some make up most of the error: the
    simulation alone may not show how they spread.
    """
    variance = _variance(rounded)
    both = variance + (_variance(found) if few else variance)
    return min(SLACK * (1 + (both / found.numel()) ** 0.5) * _rms(rounded), LARGEST_BOUND)


def _variance(squares: Tensor) -> float:
    """Relative to their mean, squared, and no less than that of normal errors."""
    mean = squares.mean().item()
    return max(2.0, squares.var(correction=0).item() / mean**2) if 0 < mean < math.inf else 2.0


def _squares(found: Tensor, expected: Tensor) -> Tensor:
    """Errors' squares over the square of RMS(expected).

    Channels of a token and head count as one, for what is rounded for all of them, as the weight of
    a pair of tokens is, is wrong in all of them alike.
    """
    if found.shape != expected.shape:
        return torch.full((1,), math.inf, dtype=torch.float64)
    if not expected.numel():
        return torch.zeros(1, dtype=torch.float64)
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    squares = ((found - expected) / _size(expected)).square()
    if squares.dim() == 4:
        squares = squares.mean(-1)
    return squares.flatten().nan_to_num(nan=math.inf, posinf=math.inf)


def _rms(squares: Tensor) -> float:
    return squares.mean().sqrt().item()


def _size(x: Tensor) -> float:
    """RMS, as errors are relative to it."""
    return max(x.double().norm().item() / max(x.numel(), 1) ** 0.5, SMALLEST)


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
