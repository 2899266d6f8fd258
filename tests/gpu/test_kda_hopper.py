"""The delta engine's scans for Hopper on a GPU.

Run as a program it makes a few small calls, for compute-sanitizer.
"""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import kda_calls
import pytest
import sanitizer
import torch
from on_gpu import check, moved
from on_hopper import check_what_lies_beside, compiled, launched_from, marks, verified

from fla.ops import chunk_kda
from fla.ops.common.dispatch import use
from fla.ops.kda import hopper, hopper_scan
from fla.testing.compare import relative_error

pytestmark = marks


@contextlib.contextmanager
def on_hopper():
    """Inside, the kernel takes short calls too, whether verified or not; yields its launches."""
    with (
        verified("delta"),
        mock.patch.object(hopper, "SMALLEST", 1),
        launched_from(hopper_scan) as launched,
    ):
        yield launched


@pytest.mark.parametrize("case", list(kda_calls.hopper_cases()), ids=str)
def test_against_fp64(case):
    with case.as_told(hopper_scan), on_hopper() as launched:
        check(case.spec, case.shape, case.variant, torch.bfloat16)
    assert launched


def operands(B, T, H=4, K=128, V=128):
    torch.manual_seed(T)
    q, k = torch.randn(2, B, T, H, K, device="cuda", dtype=torch.bfloat16)
    v, do = torch.randn(2, B, T, H, V, device="cuda", dtype=torch.bfloat16)
    g = -0.1 * torch.rand(B, T, H, K, device="cuda")
    return q, torch.nn.functional.normalize(k, dim=-1), v, g, torch.rand(B, T, H, device="cuda"), do


def run(*arguments, state=None, **more):
    """o, the final state and all gradients."""
    *arguments, do = arguments
    leaves = [x.detach().requires_grad_() for x in (*arguments, state) if x is not None]
    if state is not None:
        more |= {"initial_state": leaves[-1], "output_final_state": True}
    found = [x for x in chunk_kda(*leaves[:5], **more) if x is not None]
    ends = do, torch.ones_like(found[-1])
    return [x.detach() for x in found] + list(
        torch.autograd.grad(found, leaves, ends[: len(found)])
    )


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("size", [(1, 8192, 4), (1, 8192, 70), (3, 2000, 2), (2, 4097, 6)])
def test_agrees_with_triton(size, state):
    """In segments, in two partitions a program, and in one."""
    arguments = operands(*size)
    B, _, H = size
    state = torch.randn(B, H, 128, 128, device="cuda") if state else None
    with on_hopper() as launched, use("hopper"):
        found = run(*arguments, state=state)
    assert len(launched) >= 2
    with use("triton"):
        expected = run(*arguments, state=state)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 5e-3


@pytest.mark.parametrize("heads", [5, 33])
def test_a_thousand_times_the_same_bits(heads):
    """Where a barrier is missing, they move."""
    arguments = operands(1, 1000, heads)
    bounds = torch.tensor([0, 0, 300, 301, 1000], device="cuda")
    with on_hopper():
        assert not moved(lambda: run(*arguments, cu_seqlens=bounds))


def test_what_lies_beside_a_sequence_is_not_read():
    with on_hopper():
        check_what_lies_beside(run, operands(1, 500))


def test_nothing_is_compiled_again():
    with on_hopper():
        run(*operands(1, 640))
        before = compiled(hopper_scan.hopper_scan_kernel)
        for T in range(2, 102):
            run(*operands(1, T))
    assert compiled(hopper_scan.hopper_scan_kernel) == before


@sanitizer.needed
def test_stays_in_its_memory():
    """Not for racecheck, which does not follow barriers that partitions meet at."""
    assert "ERROR SUMMARY: 0 errors" in sanitizer.sanitized("memcheck", __file__)


def main() -> None:
    bounds = torch.tensor([0, 70, 70, 200, 256], device="cuda")
    sizes = (64, 64), (128, 128), (64, 128)
    for segments, partitions, (K, V) in itertools.product((False, True), (1, 2), sizes):
        case = kda_calls.HopperCase("", (), K, V, segments, partitions)
        state = torch.randn(1, 1, K, V, device="cuda")
        with case.as_told(hopper_scan), on_hopper() as launched:
            arguments = operands(1, 300, 1, K, V)
            run(*arguments, state=state)
            run(*arguments, state=state.repeat(4, 1, 1, 1), cu_seqlens=bounds)
            torch.cuda.synchronize()
        assert launched


if __name__ == "__main__":
    with sanitizer.workspaces_apart():
        main()
