"""The delta engine's gradients for Hopper on a GPU.

Run as a program it makes a few small calls, for compute-sanitizer.
"""

from __future__ import annotations

import contextlib

import kda_calls
import pytest
import sanitizer
import torch
from on_gpu import check, moved
from on_hopper import check_what_lies_beside, launched_from, marks, verified
from shapes import spec_named

from fla.ops.common.dispatch import use
from fla.ops.kda import chunk_kda, hopper_gradients, hopper_states
from fla.testing import Shape
from fla.testing.compare import relative_error

pytestmark = marks


@contextlib.contextmanager
def on_hopper():
    """Inside, the kernels count as verified and have to be launched."""
    with (
        verified("delta"),
        use("hopper"),
        launched_from(hopper_gradients, hopper_states) as launched,
    ):
        yield
    assert set(launched) == {"hopper_gradients_kernel", "hopper_states_kernel"}


def taken():
    for launch in kda_calls.chunked():
        if launch.dtype == torch.bfloat16 and launch.K in (64, 128) and launch.V in (64, 128):
            yield launch._replace(group=1)  # dq and dk come from these kernels
            yield launch._replace(group=2)  # and from one that sums them over heads


@pytest.mark.parametrize("launch", list(taken()), ids=str)
def test_against_fp64(launch):
    with launch.as_told(), on_hopper():
        check(launch.spec, launch.shape, launch.variant, torch.bfloat16)


CHUNKED = spec_named("chunk_kda")
GATES = kda_calls.gated(-1e-6, -0.05, -5.0, -80.0, -1e4, 0.05)


@pytest.mark.parametrize("gate", GATES.variants)
def test_gates(gate):
    with on_hopper():
        check(GATES, Shape(T=150, K=64, V=64), gate, torch.bfloat16)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 500])
def test_lengths(T, group):
    """Packed, for what eager does with a few tokens alone rounds nothing and bounds no chunk.

    In many heads, for each has one dA_log, and errors of few numbers are a matter of chance.
    """
    shape = Shape.packed(0, T, H=8, K=128, V=64, group=group)
    with on_hopper():
        check(CHUNKED, shape, "raw, lower bound, state", torch.bfloat16)


def operands(T, H=4, K=128):
    torch.manual_seed(T)
    q, k, v, do = torch.randn(4, 1, T, H, K, device="cuda", dtype=torch.bfloat16)
    k = torch.nn.functional.normalize(k, dim=-1)
    g = -0.05 * torch.rand(1, T, H, K, device="cuda")
    g = torch.where(torch.rand_like(g) < 0.01, -1e4, g)
    return q, k, v, g, torch.rand(1, T, H, device="cuda"), do


def run(q, k, v, g, beta, do, norms=True, **more):
    leaves = [x.detach().requires_grad_() for x in (q, k, v, g, beta)]
    o, _ = chunk_kda(*leaves, use_qk_l2norm_in_kernel=norms, **more)
    return torch.autograd.grad(o, leaves, do)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("K", [64, 128])
def test_agrees_with_triton(K, norms):
    arguments = operands(2000, K=K)
    with on_hopper():
        found = run(*arguments, norms)
    with use("triton"):
        expected = run(*arguments, norms)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 5e-3


@pytest.mark.parametrize("size", [2.0**-40, 2.0**40])
@pytest.mark.parametrize("which", ["hopper", "triton"])
def test_gradients_that_are_small_or_large(which, size):
    """As of a mean over many tokens, under gates that are nearly open."""
    more = {"use_gate_in_kernel": True, "lower_bound": -5.0}
    q, k, v, g, beta, do = operands(300)
    arguments = q, k, v, torch.randn_like(g) * 0.3 + 3, beta
    with use(which), verified("delta"):
        expected = run(*arguments, do, **more)
        found = run(*arguments, do * size, **more)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a.double() / size, b) < 1e-4


def test_a_thousand_times_the_same_bits():
    """Where a barrier is missing, they move."""
    arguments = operands(1000, H=33)
    bounds = torch.tensor([0, 0, 300, 301, 900], device="cuda")
    with on_hopper():
        assert not moved(lambda: run(*arguments, cu_seqlens=bounds))


def test_what_lies_beside_a_sequence_is_not_read():
    with on_hopper():
        check_what_lies_beside(run, operands(500))


@sanitizer.needed
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitized(tool):
    assert "SUMMARY: 0" in sanitizer.sanitized(tool, __file__)


def main() -> None:
    bounds = torch.tensor([0, 70, 70, 200, 256], device="cuda")
    for K in (64, 128):
        with on_hopper():
            run(*operands(300, 2, K), cu_seqlens=bounds)
        A_log, bias = torch.zeros(2, device="cuda"), torch.zeros(2 * K, device="cuda")
        q, k, v, g, beta, do = operands(150, 2, K)
        raw = {"A_log": A_log, "dt_bias": bias, "use_gate_in_kernel": True}
        for lower_bound in (None, -5.0):
            with on_hopper():
                g = torch.randn_like(g).bfloat16()
                run(q, k, v, g, beta, do, lower_bound=lower_bound, **raw)
        torch.cuda.synchronize()


if __name__ == "__main__":
    with sanitizer.workspaces_apart():
        main()
