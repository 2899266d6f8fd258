"""The softmax engine's forward kernel for Hopper on a GPU.

Run as a program it makes a few small calls, for compute-sanitizer.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import on_hopper
import pytest
import sanitizer
import torch

from fla.ops.attn import hopper_forward, parallel_attn
from fla.ops.common.dispatch import use
from fla.testing import Shape, all_specs
from fla.testing.compare import measure, relative_error

pytestmark = on_hopper.marks
SPEC = next(spec for spec in all_specs() if spec.name == "parallel_attn")


@contextlib.contextmanager
def hopper():
    """Inside, the kernel takes short calls too, whether verified or not; yields its calls."""
    with (
        on_hopper.verified("softmax forward"),
        mock.patch.object(hopper_forward, "SHORTEST", 1),
        mock.patch.object(
            hopper_forward, "run_forward", wraps=hopper_forward.run_forward
        ) as launched,
    ):
        yield launched


def operands(B, T, HQ, H, K=128, V=128, dtype=torch.bfloat16):
    torch.manual_seed(T)

    def draw(heads, size):
        return torch.randn(B, T, heads, size, device="cuda", dtype=dtype)

    return draw(HQ, K), draw(H, K), draw(H, V)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["plain", "sink"])
@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 127, 128, 129, 500, 1025])
def test_against_fp64(T, variant, dtype):
    for K, V in ((128, 128), (96, 72)):
        with hopper() as launched:
            found = measure(SPEC, Shape(T=T, K=K, V=V, group=2), variant, dtype, "cuda")
        wrong = {name: pair for name, pair in found.items() if not pair[0] <= pair[1]}
        assert launched.called and found and not wrong, wrong


@pytest.mark.parametrize("window", [None, 1, 64, 100, 128, 129, 1000, 5000])
@pytest.mark.parametrize("scale", [0.1, -0.3, 0.0])
@pytest.mark.parametrize("size", [(1, 8192, 4, 1), (3, 2000, 6, 2), (2, 4097, 2, 2)])
def test_agrees_with_triton(size, scale, window):
    """o and lse, which the backward takes as it finds it."""
    q, k, v = operands(*size)
    sink = torch.randn(size[2], device="cuda")
    for sink_bias in (None, sink):
        arguments = q, k, v, None, sink_bias, None, scale, window
        with hopper() as launched:
            o, lse = torch.ops.fla.softmax_forward(*arguments)
        assert launched.called
        with use("triton"):
            expected, expected_lse = torch.ops.fla.softmax_forward(*arguments)
        assert relative_error(o, expected) < 5e-3
        assert relative_error(lse, expected_lse) < 1e-5


@pytest.mark.parametrize("window", [None, 300])
def test_a_thousand_times_the_same_bits(window):
    """Where a barrier is missing, they move."""
    q, k, v = operands(2, 2048, 16, 4)
    with hopper():
        first = parallel_attn(q, k, v, window_size=window)
        moved = torch.zeros((), device="cuda", dtype=torch.int64)
        for _ in range(1000):
            moved += (parallel_attn(q, k, v, window_size=window) != first).sum()
    assert not moved.item()


def test_what_lies_beside_a_sequence_is_not_read():
    """The last block of a sequence reaches into the next one, here full of NaN."""
    q, k, v = operands(2, 300, 4, 2)
    with hopper():
        expected = parallel_attn(q, k, v)[0]
        for x in (q, k, v):
            x[1] = torch.nan
        found = parallel_attn(q, k, v)
    assert torch.equal(found[0], expected) and found[1].isnan().all()


def test_capture():
    q, k, v = operands(1, 4096, 8, 2)
    with hopper():
        parallel_attn(q, k, v)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = parallel_attn(q, k, v)
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, parallel_attn(q, k, v))


def test_nothing_is_compiled_again():
    def compiled():
        return len(hopper_forward.hopper_forward_kernel.device_caches[0][0])

    with hopper():
        parallel_attn(*operands(1, 640, 4, 2), window_size=7)
        before = compiled()
        for T in range(2, 102):
            parallel_attn(*operands(1, T, 4, 2), window_size=T - 1)
    assert compiled() == before


@sanitizer.needed
def test_stays_in_its_memory():
    assert "ERROR SUMMARY: 0 errors" in sanitizer.sanitized("memcheck", __file__)


def main() -> None:
    sizes = ((1, 1, 1, 1, 128, 128), (2, 300, 4, 2, 128, 128), (1, 700, 2, 1, 96, 72))
    with hopper() as launched:
        for size in sizes:
            for window in (None, 50, 200):
                parallel_attn(*operands(*size), window_size=window)
                torch.cuda.synchronize()
    assert launched.call_count == 9


if __name__ == "__main__":
    main()
