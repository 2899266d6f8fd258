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
from fla.ops.simple_gla import blocks, hopper, hopper_turns, hopper_walk
from fla.testing.compare import relative_error

pytestmark = marks


@contextlib.contextmanager
def on_hopper(segments=False, turns=False, programs=132):
    """Inside, kernels take short calls too, whether verified or not; yields their launches.

    With ``turns`` the outputs of whole sequences are put out in turns; what is not falls into
    shares, where heads would leave some of the ``programs`` idle.
    """
    with (
        verified("linear walk"),
        mock.patch.object(hopper, "SMALLEST", 1),
        mock.patch.object(hopper, "takes", lambda q, v: turns),
        mock.patch.object(blocks, "multiprocessors", lambda device: 132 if segments else 1),
        mock.patch.object(hopper_walk, "multiprocessors", lambda device: programs),
        launched_from(hopper_walk, hopper_turns) as launched,
    ):
        yield launched


in_turns_or_not = pytest.mark.parametrize("turns", [False, True])


@pytest.mark.parametrize("case", list(linear_calls.hopper_cases()), ids=str)
def test_against_fp64(case):
    with on_hopper(case.segments, case.turns, case.programs) as launched:
        check(case.spec, case.shape, case.variant, torch.bfloat16)
    assert "hopper_walk_kernel" in launched
    assert ("hopper_turns_kernel" in launched) == case.turns


@pytest.mark.parametrize("factor", [1, 1024])
@in_turns_or_not
def test_growth_of_nothing(turns, factor):
    """Nor does the scale make too much of it."""
    inputs, expected = linear_calls.growth_of_nothing(torch.bfloat16, "cuda")
    with on_hopper(turns=turns):
        o, _ = chunk_simple_gla(*inputs, scale=factor / 8)  # K ** -0.5 is what is expected
    assert relative_error(o / factor, expected) < 5e-3


@pytest.mark.parametrize("steep", [-5.0, -20.0])
def test_gradient_of_gates_that_leave_little(steep):
    *given, expected = linear_calls.gates_that_leave_little(steep, torch.bfloat16, "cuda")
    with on_hopper() as launched:
        dg = linear_calls.gradient_of_gates(*given)
    assert launched and (dg - expected).norm() < 5e-3 * expected.norm()


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
@pytest.mark.parametrize("size", [(1, 8192, 4), (3, 2000, 2), (2, 4097, 6), (2, 1000, 3, 64, 64)])
@in_turns_or_not
def test_agrees_with_triton(turns, size, scale):
    arguments = operands(*size)
    with on_hopper(turns=turns) as launched, use("hopper"):
        found = run(*arguments, scale=scale)
    assert len(launched) == 4
    with use("triton"):
        expected = run(*arguments, scale=scale)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 5e-3


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("turns, K", [(False, 128), (True, 128), (True, 64)])
def test_a_thousand_times_the_same_bits(turns, K, gated):
    """Where a barrier is missing, they move."""
    arguments = operands(1, 1000, 33, K, gated=gated)
    bounds = torch.tensor([0, 0, 300, 301, 1000], device="cuda")
    with on_hopper(turns=turns):
        assert not moved(lambda: run(*arguments, cu_seqlens=bounds))


@in_turns_or_not
def test_what_lies_beside_a_sequence_is_not_read(turns):
    with on_hopper(turns=turns):
        check_what_lies_beside(run, operands(1, 500))


@pytest.mark.parametrize("segments, turns", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("n", [0, 4, 5])
def test_sequences_have_nothing_of_each_other(n, segments, turns):
    """Also where segments begin, in them and between them."""
    bounds = torch.tensor([0, 700, 700, 701, 765, 1500, 2200, 3000], device="cuda")
    poisoned = slice(*bounds[n : n + 2].tolist())
    inputs = operands(1, 3000)
    with on_hopper(segments, turns):
        clean = run(*inputs, cu_seqlens=bounds)
        for x in inputs:
            x[:, poisoned] = torch.nan
        found = run(*inputs, cu_seqlens=bounds)
    for a, b in zip(clean, found, strict=True):
        assert b[:, poisoned].isnan().any()
        a[:, poisoned] = b[:, poisoned] = 0
        assert torch.equal(a, b)


@pytest.mark.parametrize("gated", [True, False])
@in_turns_or_not
def test_a_graph_replays_with_other_boundaries(turns, gated):
    *inputs, do = operands(1, 1000, gated=gated)
    bounds = torch.tensor([0, 300, 301, 700, 700, 1000], device="cuda")
    with on_hopper(turns=turns):
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


@in_turns_or_not
def test_nothing_is_compiled_again(turns):
    kernels = hopper_walk.hopper_walk_kernel, hopper_turns.hopper_turns_kernel
    with on_hopper(turns=turns):
        run(*operands(1, 640))
        before = [compiled(kernel) for kernel in kernels]
        for T in range(2, 102):
            run(*operands(1, T))
    assert [compiled(kernel) for kernel in kernels] == before


@sanitizer.needed
def test_stays_in_its_memory():
    """Not for racecheck, which does not follow barriers that partitions meet at."""
    assert "ERROR SUMMARY: 0 errors" in sanitizer.sanitized("memcheck", __file__)


def main() -> None:
    bounds = torch.tensor([0, 70, 70, 200, 256], device="cuda")
    sizes = (64, 64), (128, 128), (256, 64)
    for way, (K, V) in itertools.product(({}, {"segments": True}, {"turns": True}), sizes):
        if way == {"turns": True} and K > 128:
            continue
        with on_hopper(**way) as launched:
            arguments = operands(1, 300, 1, K, V)
            run(*arguments)
            run(*arguments, cu_seqlens=bounds)
            chunk_lightning_attn(*arguments[:3], 1, 2)
            torch.cuda.synchronize()
        assert launched


if __name__ == "__main__":
    main()
