"""The softmax engine's backward kernel for Hopper on a GPU.

Run as a program it makes a few small calls, for compute-sanitizer.
"""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import on_hopper
import pytest
import sanitizer
import torch

from fla.ops.attn import blocks, hopper_backward, parallel_attn
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


def operands(B, T, HQ, H, dtype=torch.bfloat16, gate=None, sink=False):
    """do, q, k, v, g and the sink; g is logsigmoid(N(gate, 1)), at times what nothing survives."""
    torch.manual_seed(T)

    def draw(heads):
        return torch.randn(B, T, heads, 128, device="cuda", dtype=dtype)

    g = None
    if gate is not None:
        g = torch.nn.functional.logsigmoid(torch.randn(B, T, HQ, device="cuda") + gate)
        g = torch.where(torch.rand_like(g) < 1e-3, -1e4, g)
    sink_bias = torch.randn(HQ, device="cuda") if sink else None
    return draw(HQ), draw(HQ), draw(H), draw(H), g, sink_bias


def gradients(do, q, k, v, g=None, sink_bias=None, scale=None):
    inputs = {"q": q, "k": k, "v": v, "g": g, "sink_bias": sink_bias}
    inputs = {x: y.detach().requires_grad_() for x, y in inputs.items() if y is not None}
    o = parallel_attn(**inputs, scale=scale)
    return torch.autograd.grad(o, list(inputs.values()), do)


@pytest.mark.parametrize(
    "variant, group, dtype",
    [
        ("plain", 1, torch.bfloat16),
        ("plain", 4, torch.bfloat16),
        ("plain", 4, torch.float16),
        ("sink", 4, torch.bfloat16),
        ("gate", 1, torch.float16),
        ("gate", 4, torch.bfloat16),
        ("growth", 4, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 127, 128, 129, 500, 1025])
def test_against_fp64(T, variant, group, dtype):
    with hopper() as launched:
        shape = Shape(T=T, K=128, V=128, group=group)
        found = measure(SPEC, shape, variant, dtype, "cuda")
    wrong = {name: pair for name, pair in found.items() if not pair[0] <= pair[1]}
    assert launched.called and found and not wrong, wrong


@pytest.mark.parametrize(
    "gate, sink", [(None, False), (None, True), (12.0, False), (4.0, False), (0.0, True)]
)
@pytest.mark.parametrize("scale", [0.1, -0.3, 0.0])
@pytest.mark.parametrize(
    "size", [(1, 8192, 32, 8), (3, 2000, 8, 2), (2, 4097, 8, 2), (1, 65, 7, 1)]
)
def test_agrees_with_triton(size, scale, gate, sink):
    given = operands(*size, gate=gate, sink=sink)
    with hopper() as launched:
        found = gradients(*given, scale)
    assert launched.called
    with use("triton"):
        expected = gradients(*given, scale)
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 5e-3


@pytest.mark.parametrize(
    "size, gate, sink",
    [
        ((2, 2048, 32, 8), None, False),
        ((1, 4097, 8, 8), None, True),
        ((2, 2048, 32, 8), 12.0, False),
        ((2, 2048, 32, 8), 4.0, False),
        ((1, 4097, 8, 8), 0.0, True),
    ],
)
def test_a_thousand_times_the_same_bits(size, gate, sink):
    """Where a barrier is missing, or programs add when they come, they move."""
    given = operands(*size, gate=gate, sink=sink)
    with hopper():
        assert not on_hopper.moved(lambda: gradients(*given))


@pytest.mark.parametrize("gate", [0.0, 4.0, 12.0])
def test_what_is_left_out_does_not_show(gate):
    given = operands(1, 8192, 32, 8, gate=gate)
    with hopper():
        found = gradients(*given)
        with blocks.nothing_left_out():
            expected = gradients(*given)
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 1e-5


@pytest.mark.parametrize("gate", [None, 4.0])
def test_what_lies_beside_a_sequence_is_not_read(gate):
    """The last block of a sequence reaches into the next one, here full of NaN."""
    given = [x for x in operands(2, 300, 8, 2, gate=gate) if x is not None]
    with hopper():
        expected = [x[0] for x in gradients(*given)]
        for x in given:
            x[1] = torch.nan
        found = gradients(*given)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x[0], y) and x[1].isnan().all()


@pytest.mark.parametrize("gate", [None, 4.0])
def test_capture(gate):
    do, q, k, v, g, _ = operands(1, 4096, 32, 8, gate=gate)
    o, lse = torch.ops.fla.softmax_forward(q, k, v, g, None, None, 0.1, None)

    def run():
        arguments = q, do, k, v, g, None, None, o, lse, 0.1, None
        return torch.ops.fla.softmax_backward(*arguments)[: 3 if g is None else 4]

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
        gradients(*operands(1, 640, 8, 2, gate=2.0))
        before = on_hopper.compiled(hopper_backward.hopper_backward_kernel)
        for T in range(2, 102):
            gradients(*operands(1, T, 8, 2, gate=2.0))
    assert on_hopper.compiled(hopper_backward.hopper_backward_kernel) == before


@sanitizer.needed
def test_stays_in_its_memory():
    assert "ERROR SUMMARY: 0 errors" in sanitizer.sanitized("memcheck", __file__)


def main() -> None:
    sizes = (1, 1, 8, 2), (2, 300, 8, 2), (1, 700, 8, 2)
    options = {}, {"gate": 0.0}, {"gate": 12.0}, {"sink": True}
    with hopper() as launched:
        for size, more in itertools.product(sizes, options):
            gradients(*operands(*size, **more))
            torch.cuda.synchronize()
    assert launched.call_count == len(sizes) * len(options)


if __name__ == "__main__":
    main()
