"""The linear engine's walk for Hopper on a GPU.

Run as a program it makes a few small calls, for compute-sanitizer.
"""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import linear_calls
import pytest
import sanitizer
import torch
from on_gpu import check, moved
from on_hopper import check_what_lies_beside, compiled, launched_from, marks, verified
from torch.nn.functional import logsigmoid

from fla.ops import chunk_lightning_attn, chunk_simple_gla
from fla.ops.common.dispatch import use
from fla.ops.simple_gla import blocks, hopper, hopper_walk
from fla.testing.compare import relative_error

pytestmark = marks


@contextlib.contextmanager
def on_hopper(segments=False):
    """Inside, the kernel takes short calls too, whether verified or not; yields its launches."""
    with (
        verified("linear walk"),
        mock.patch.object(hopper, "SMALLEST", 1),
        mock.patch.object(blocks, "multiprocessors", lambda device: 132 if segments else 1),
        launched_from(hopper_walk) as launched,
    ):
        yield launched


@pytest.mark.parametrize("case", list(linear_calls.hopper_cases()), ids=str)
def test_against_fp64(case):
    with on_hopper(case.segments) as launched:
        check(case.spec, case.shape, case.variant, torch.bfloat16)
    assert launched


def test_growth_of_nothing():
    inputs, expected = linear_calls.growth_of_nothing(torch.bfloat16, "cuda")
    with on_hopper():
        o, _ = chunk_simple_gla(*inputs)
    assert relative_error(o, expected) < 5e-3


def operands(B, T, H=4, K=128, V=128, gated=True):
    torch.manual_seed(T)
    q, k = torch.randn(2, B, T, H, K, device="cuda", dtype=torch.bfloat16)
    v, do = torch.randn(2, B, T, H, V, device="cuda", dtype=torch.bfloat16)
    g = logsigmoid(torch.randn(B, T, H, device="cuda") + 3) if gated else None
    return q, k, v, g, do


def run(q, k, v, g, do, **more):
    """o and all gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, g) if x is not None]
    o, _ = chunk_simple_gla(*leaves, **more)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.mark.parametrize("scale", [0.1, -0.3, 0.0])
@pytest.mark.parametrize("size", [(1, 8192, 4), (3, 2000, 2), (2, 4097, 6)])
def test_agrees_with_triton(size, scale):
    arguments = operands(*size)
    with on_hopper() as launched, use("hopper"):
        found = run(*arguments, scale=scale)
    assert len(launched) == 4
    with use("triton"):
        expected = run(*arguments, scale=scale)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 5e-3


@pytest.mark.parametrize("gated", [True, False])
def test_a_thousand_times_the_same_bits(gated):
    """Where a barrier is missing, they move."""
    arguments = operands(1, 1000, 33, gated=gated)
    bounds = torch.tensor([0, 0, 300, 301, 1000], device="cuda")
    with on_hopper():
        assert not moved(lambda: run(*arguments, cu_seqlens=bounds))


def test_what_lies_beside_a_sequence_is_not_read():
    with on_hopper():
        check_what_lies_beside(run, operands(1, 500))


@pytest.mark.parametrize("gated", [True, False])
def test_a_graph_replays_with_other_boundaries(gated):
    *inputs, do = operands(1, 1000, gated=gated)
    bounds = torch.tensor([0, 300, 301, 700, 700, 1000], device="cuda")
    with on_hopper():
        leaves = [x.detach().requires_grad_() for x in inputs if x is not None]

        def call():
            o, _ = chunk_simple_gla(*leaves, cu_seqlens=bounds)
            return [o.detach(), *torch.autograd.grad(o, leaves, do)]

        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        bounds.copy_(torch.tensor([0, 0, 64, 64, 513, 900]))
        graph.replay()
        for a, b in zip(captured, call(), strict=True):
            assert torch.equal(a, b)


def test_nothing_is_compiled_again():
    with on_hopper():
        run(*operands(1, 640))
        before = compiled(hopper_walk.hopper_walk_kernel)
        for T in range(2, 102):
            run(*operands(1, T))
    assert compiled(hopper_walk.hopper_walk_kernel) == before


@sanitizer.needed
def test_stays_in_its_memory():
    """Not for racecheck, which does not follow barriers that partitions meet at."""
    assert "ERROR SUMMARY: 0 errors" in sanitizer.sanitized("memcheck", __file__)


def main() -> None:
    bounds = torch.tensor([0, 70, 70, 200, 256], device="cuda")
    for segments, (K, V) in itertools.product((False, True), ((64, 64), (128, 128), (256, 64))):
        with on_hopper(segments) as launched:
            arguments = operands(1, 300, 1, K, V)
            run(*arguments)
            run(*arguments, cu_seqlens=bounds)
            chunk_lightning_attn(*arguments[:3], 1, 2)
            torch.cuda.synchronize()
        assert launched


if __name__ == "__main__":
    main()
