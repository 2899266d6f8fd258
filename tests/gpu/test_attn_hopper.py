"""The softmax engine's forward kernel for Hopper on a GPU.

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
from on_gpu import check, moved
from shapes import shape_of
from torch.nn.functional import logsigmoid

from fla.ops.attn import blocks, hopper_forward, parallel_attn
from fla.ops.common.dispatch import use
from fla.testing import all_specs
from fla.testing.compare import relative_error

pytestmark = on_hopper.marks
SPEC = next(spec for spec in all_specs() if spec.name == "parallel_attn")
DENSE = [(T,) for T in (1, 15, 63, 64, 65, 127, 128, 129, 500, 1025)]
PACKED = [(0, 130, 0, 257, 1, 0), (1, 0), (300, 128, 1, 1, 64, 0, 700, 128)]


@contextlib.contextmanager
def hopper():
    """Inside, the kernel takes short calls too, whether verified or not; yields its calls."""
    with (
        on_hopper.verified("softmax forward"),
        mock.patch.object(hopper_forward, "pays", return_value=True),
        mock.patch.object(
            hopper_forward, "run_forward", wraps=hopper_forward.run_forward
        ) as launched,
    ):
        yield launched


def operands(B, T, HQ, H, K=128, V=128, dtype=torch.bfloat16, gate=None):
    """q, k, v and g, which is None or logsigmoid(N(gate, 1)), with steps that nothing survives."""
    torch.manual_seed(T)

    def draw(heads, size):
        return torch.randn(B, T, heads, size, device="cuda", dtype=dtype)

    g = None
    if gate is not None:
        g = logsigmoid(torch.randn(B, T, HQ, device="cuda") + gate)
        g = torch.where(torch.rand_like(g) < 1e-3, -1e4, g)
    return draw(HQ, K), draw(H, K), draw(H, V), g


def bounds(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], device="cuda", dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "variant, lengths",
    [
        *itertools.product(("plain", "gate"), DENSE + PACKED),
        *itertools.product(("sink", "window", "growth"), [DENSE[4], DENSE[-1], *PACKED]),
        *itertools.product(("gate, window", "gate, window, sink"), [DENSE[-2], *PACKED]),
    ],
)
def test_against_fp64(variant, lengths, dtype):
    for K, V in ((128, 128), (96, 72), (64, 64)):
        with hopper() as launched:
            shape = shape_of(lengths, K=K, V=V, group=2)
            check(SPEC, shape, variant, dtype)
        assert launched.called


@pytest.mark.parametrize("window", [None, 1, 64, 100, 128, 129, 1000, 5000])
@pytest.mark.parametrize(
    "scale, gate", [(0.1, None), (-0.3, None), (0.0, None), (0.1, 4.0), (-0.3, 0.0), (0.0, 12.0)]
)
@pytest.mark.parametrize(
    "size, lengths",
    [
        ((1, 8192, 4, 1), ()),
        ((1, 8192, 4, 1, 64, 64), ()),
        ((3, 2000, 6, 2), ()),
        ((2, 4097, 2, 2), ()),
        ((1, 6000, 4, 1), (0, 1300, 1, 0, 547, 128, 3063, 100)),  # not to the end
        ((1, 6000, 4, 1, 64, 64), (0, 1300, 1, 0, 547, 128, 3063, 100)),
    ],
)
def test_agrees_with_triton(size, lengths, scale, gate, window):
    """o and lse, which the backward takes as it finds it."""
    q, k, v, g = operands(*size, gate=gate)
    boundaries = bounds(*lengths) if lengths else None
    read = slice(sum(lengths) if lengths else size[1])
    sink = torch.randn(size[2], device="cuda")
    for sink_bias in (None, sink):
        arguments = q, k, v, g, sink_bias, boundaries, scale, window
        with hopper() as launched:
            o, lse = torch.ops.fla.softmax_forward(*arguments)
        assert launched.called
        with use("triton"):
            expected, expected_lse = torch.ops.fla.softmax_forward(*arguments)
        assert relative_error(o, expected) < 5e-3 and not o[:, read.stop :].any()
        assert relative_error(lse[..., read], expected_lse[..., read]) < 1e-5


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("gate", [None, 4.0])
@pytest.mark.parametrize("lengths", [(), (0, 1300, 1, 548, 100, 2000, 147)])
@pytest.mark.parametrize("D", [64, 128])
def test_a_thousand_times_the_same_bits(D, lengths, gate, window):
    """Where a barrier is missing, they move."""
    q, k, v, g = operands(*((1, 4096) if lengths else (2, 2048)), 16, 4, D, D, gate=gate)
    more = {"window_size": window, "cu_seqlens": bounds(*lengths) if lengths else None}
    with hopper():
        assert not moved(lambda: [parallel_attn(q, k, v, g, **more)])


@pytest.mark.parametrize("gate", [0.0, 4.0])
def test_what_is_left_out_does_not_show(gate):
    q, k, v, g = operands(1, 8192, 4, 2, gate=gate)
    with hopper():
        found = parallel_attn(q, k, v, g)
        with blocks.nothing_left_out():
            expected = parallel_attn(q, k, v, g)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("gate", [None, 4.0])
def test_what_lies_beside_a_sequence_is_not_read(gate):
    """The last block of a sequence reaches into the next one, here full of NaN."""
    q, k, v, g = operands(2, 300, 4, 2, gate=gate)
    with hopper():
        expected = parallel_attn(q, k, v, g)[0]
        for x in (q, k, v):
            x[1] = torch.nan
        found = parallel_attn(q, k, v, g)
    assert torch.equal(found[0], expected) and found[1].isnan().all()


@pytest.mark.parametrize("gate", [None, 4.0])
@pytest.mark.parametrize("D", [64, 128])
def test_packed_sequences_do_not_read_each_other(D, gate):
    """Nor what lies behind the last one, where all is zero."""
    q, k, v, g = operands(1, 900, 40, 20, D, D, gate=gate)
    boundaries = bounds(200, 300, 0, 300)
    with hopper():
        expected = parallel_attn(q, k, v, g, cu_seqlens=boundaries)
        for x in (q, k, v):
            x[:, 200:500] = torch.nan
            x[:, 800:] = torch.nan
        found = parallel_attn(q, k, v, g, cu_seqlens=boundaries)
    for rows in (slice(200), slice(500, 800)):
        assert torch.equal(found[:, rows], expected[:, rows])
    assert found[:, 200:500].isnan().all() and not found[:, 800:].any()


def test_capture_and_replay_with_other_boundaries():
    q, k, v, g = operands(1, 4096, 8, 2, gate=2.0)
    boundaries = bounds(1000, 0, 3000)
    with hopper():
        parallel_attn(q, k, v, g, cu_seqlens=boundaries)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = parallel_attn(q, k, v, g, cu_seqlens=boundaries)
        for lengths in ((4096, 0, 0), (0, 1, 129), (2000, 96, 2000)):
            boundaries.copy_(bounds(*lengths))
            for x in (q, k, v):
                x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(captured, parallel_attn(q, k, v, g, cu_seqlens=boundaries))


def test_nothing_is_compiled_again():
    """Over a hundred lengths, and as many packings."""

    def compiled():
        kernels = hopper_forward.hopper_forward_kernel, hopper_forward.needed_kernel
        return [on_hopper.compiled(kernel) for kernel in kernels]

    packed = operands(1, 640, 4, 2, gate=2.0)
    with hopper():
        parallel_attn(*operands(1, 640, 4, 2, gate=2.0), window_size=7)
        parallel_attn(*packed, window_size=7, cu_seqlens=bounds(0, 640))
        before = compiled()
        for T in range(2, 102):
            parallel_attn(*operands(1, T, 4, 2, gate=2.0), window_size=T - 1)
            parallel_attn(*packed, window_size=7, cu_seqlens=bounds(T, 640 - T))
    assert compiled() == before


@sanitizer.needed
def test_stays_in_its_memory():
    assert "ERROR SUMMARY: 0 errors" in sanitizer.sanitized("memcheck", __file__)


def main() -> None:
    sizes = (1, 1, 1, 1, 128, 128), (2, 300, 4, 2, 128, 128), (1, 700, 2, 1, 96, 72)
    sizes += ((1, 700, 40, 20, 64, 64),)  # of which some programs have two tiles
    with hopper() as launched:
        for size, gate, window in itertools.product(sizes, (None, 4.0), (None, 50, 200)):
            q, k, v, g = operands(*size, gate=gate)
            lengths = (), (0, q.shape[1] // 2, 1, 0, q.shape[1] // 3)
            for each in lengths[: 2 if q.shape[0] == 1 and q.shape[1] > 1 else 1]:
                boundaries = bounds(*each) if each else None
                parallel_attn(q, k, v, g, window_size=window, cu_seqlens=boundaries)
                torch.cuda.synchronize()
    assert launched.call_count == 36


if __name__ == "__main__":
    main()
