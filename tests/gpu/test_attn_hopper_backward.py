"""The softmax engine's backward kernel for Hopper on a GPU.

Run as a program it makes a few small calls, for compute-sanitizer.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import on_hopper
import pytest
import sanitizer
import torch

from fla.ops.attn import hopper_backward, parallel_attn
from fla.ops.common.dispatch import use
from fla.testing import Shape, all_specs
from fla.testing.compare import measure, relative_error

pytestmark = on_hopper.marks
SPEC = next(spec for spec in all_specs() if spec.name == "parallel_attn")


@contextlib.contextmanager
def hopper():
    """Inside, the kernel takes small calls too, whether verified or not; yields its calls."""
    with (
        on_hopper.verified("softmax forward", "softmax backward"),
        mock.patch.object(hopper_backward, "SHORTEST", 1),
        mock.patch.object(hopper_backward, "FEWEST", 1),
        mock.patch.object(
            hopper_backward, "run_backward", wraps=hopper_backward.run_backward
        ) as launched,
    ):
        yield launched


def operands(B, T, HQ, H):
    """do, q, k and v."""
    torch.manual_seed(T)

    def draw(heads):
        return torch.randn(B, T, heads, 128, device="cuda", dtype=torch.bfloat16)

    return draw(HQ), draw(HQ), draw(H), draw(H)


def gradients(do, q, k, v, scale=None):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(parallel_attn(*inputs, scale=scale), inputs, do)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 127, 128, 129, 500, 1025])
def test_against_fp64(T, group):
    with hopper() as launched:
        shape = Shape(T=T, K=128, V=128, group=group)
        found = measure(SPEC, shape, "plain", torch.bfloat16, "cuda")
    wrong = {name: pair for name, pair in found.items() if not pair[0] <= pair[1]}
    assert launched.called and found and not wrong, wrong


@pytest.mark.parametrize("scale", [0.1, -0.3, 0.0])
@pytest.mark.parametrize(
    "size", [(1, 8192, 32, 8), (3, 2000, 6, 2), (2, 4097, 2, 2), (1, 65, 7, 1)]
)
def test_agrees_with_triton(size, scale):
    given = operands(*size)
    with hopper() as launched:
        found = gradients(*given, scale)
    assert launched.called
    with use("triton"):
        expected = gradients(*given, scale)
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 5e-3


@pytest.mark.parametrize("size", [(2, 2048, 16, 4), (1, 4097, 8, 8)])
def test_a_thousand_times_the_same_bits(size):
    """Where a barrier is missing, or programs add when they come, they move."""
    given = operands(*size)
    with hopper():
        assert not on_hopper.moved(lambda: gradients(*given))


def test_what_lies_beside_a_sequence_is_not_read():
    """The last block of a sequence reaches into the next one, here full of NaN."""
    given = operands(2, 300, 4, 2)
    with hopper():
        expected = [x[0] for x in gradients(*given)]
        for x in given:
            x[1] = torch.nan
        found = gradients(*given)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x[0], y) and x[1].isnan().all()


def test_capture():
    do, q, k, v = operands(1, 4096, 8, 2)
    o, lse = torch.ops.fla.softmax_forward(q, k, v, None, None, None, 0.1, None)

    def run():
        arguments = q, do, k, v, None, None, None, o, lse, 0.1, None
        return torch.ops.fla.softmax_backward(*arguments)[:3]

    with hopper() as launched:
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        do.copy_(torch.randn_like(do))
        graph.replay()
        assert launched.call_count == 2
        for x, y in zip(captured, run(), strict=True):
            assert torch.equal(x, y)


def test_nothing_is_compiled_again():
    with hopper():
        gradients(*operands(1, 640, 4, 2))
        before = on_hopper.compiled(hopper_backward.hopper_backward_kernel)
        for T in range(2, 102):
            gradients(*operands(1, T, 4, 2))
    assert on_hopper.compiled(hopper_backward.hopper_backward_kernel) == before


@sanitizer.needed
def test_stays_in_its_memory():
    assert "ERROR SUMMARY: 0 errors" in sanitizer.sanitized("memcheck", __file__)


def main() -> None:
    sizes = ((1, 1, 1, 1), (2, 300, 4, 2), (1, 700, 4, 1))
    with hopper() as launched:
        for size in sizes:
            gradients(*operands(*size))
            torch.cuda.synchronize()
    assert launched.call_count == len(sizes)


if __name__ == "__main__":
    main()
