"""The softmax engine's backward kernel for Hopper on a GPU.

Run as a program it makes a few small calls, for compute-sanitizer.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from unittest import mock

import on_hopper
import pytest
import sanitizer
import torch
from on_gpu import check, moved
from shapes import shape_of

from fla.ops.attn import blocks, hopper_backward, parallel_attn
from fla.ops.common.dispatch import use
from fla.testing import all_specs
from fla.testing.compare import relative_error

pytestmark = on_hopper.marks
SPEC = next(spec for spec in all_specs() if spec.name == "parallel_attn")
DENSE = [(T,) for T in (1, 15, 63, 64, 65, 127, 128, 129, 500, 1025)]
PACKED = [(0, 130, 0, 257, 1, 0), (1, 0), (300, 128, 1, 1, 64, 0, 700, 128)]


@contextlib.contextmanager
def hopper():
    """Inside, the kernel takes small calls too, whether verified or not; yields its calls."""
    run, launched = hopper_backward.run_backward, []

    def counted(*arguments):  # a mock would keep all tensors
        launched.append(len(arguments))
        return run(*arguments)

    with (
        on_hopper.verified("softmax forward", "softmax backward"),
        mock.patch.multiple(hopper_backward, run_backward=counted, pays=lambda *call: True),
    ):
        yield launched


def bounds(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], device="cuda", dtype=torch.int32)


def operands(B, T, HQ, H, dtype=torch.bfloat16, gate=None, sink=False, D=128):
    """do, q, k, v, g and the sink; g is logsigmoid(N(gate, 1)), at times what nothing survives."""
    torch.manual_seed(T)

    def draw(heads):
        return torch.randn(B, T, heads, D, device="cuda", dtype=dtype)

    g = None
    if gate is not None:
        g = torch.nn.functional.logsigmoid(torch.randn(B, T, HQ, device="cuda") + gate)
        g = torch.where(torch.rand_like(g) < 1e-3, -1e4, g)
    sink_bias = torch.randn(HQ, device="cuda") if sink else None
    return draw(HQ), draw(HQ), draw(H), draw(H), g, sink_bias


def gradients(do, q, k, v, g=None, sink_bias=None, **options):
    inputs = {"q": q, "k": k, "v": v, "g": g, "sink_bias": sink_bias}
    inputs = {x: y.detach().requires_grad_() for x, y in inputs.items() if y is not None}
    o = parallel_attn(**inputs, **options)
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
        ("window", 1, torch.float16),
        ("window", 4, torch.bfloat16),
        ("gate, window, sink", 1, torch.float16),
        ("gate, window, sink", 4, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("lengths", DENSE + PACKED)
@pytest.mark.parametrize("D", [64, 128])
def test_against_fp64(D, lengths, variant, group, dtype):
    with hopper() as launched:
        shape = shape_of(lengths, K=D, V=D, group=group)
        check(SPEC, shape, variant, dtype)
    assert launched


@pytest.mark.parametrize(
    "gate, sink", [(None, False), (None, True), (12.0, False), (4.0, False), (0.0, True)]
)
@pytest.mark.parametrize(
    "scale, window", [(0.1, None), (-0.3, None), (0.0, None), (0.1, 2), (-0.3, 129), (0.1, 1000)]
)
@pytest.mark.parametrize(
    "size, lengths",
    [
        ((1, 8192, 32, 8), ()),
        ((3, 2000, 8, 2), ()),
        ((2, 4097, 8, 2), ()),
        ((1, 65, 7, 1), ()),
        ((1, 8192, 8, 2), (1300, 547, 2048, 963, 271, 3063)),
        ((1, 6000, 8, 2), (0, 1300, 1, 0, 547, 128, 3063, 100)),  # not to the end
    ],
)
def test_agrees_with_triton(size, lengths, gate, sink, scale, window):
    D = 64 if scale < 0 else 128
    given = operands(*size, gate=gate, sink=sink, D=D)
    boundaries = bounds(*lengths) if lengths else None
    options = {"scale": scale, "window_size": window, "cu_seqlens": boundaries}
    with hopper() as launched:
        found = gradients(*given, **options)
    assert launched
    with use("triton"):
        expected = gradients(*given, **options)
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 5e-3
        assert not lengths or x.dim() == 1 or not x[:, sum(lengths) :].any()


@pytest.mark.parametrize(
    "size, gate, sink, options",
    [
        ((2, 2048, 32, 8), None, False, {}),
        ((2, 2048, 32, 8), None, False, {"D": 64}),
        ((1, 4096, 32, 8), 4.0, True, {"D": 64, "lengths": (0, 1300, 1, 548, 100, 2000)}),
        ((1, 4097, 8, 8), None, True, {}),
        ((2, 2048, 32, 8), 12.0, False, {}),
        ((2, 2048, 32, 8), 4.0, False, {}),
        ((1, 4097, 8, 8), 0.0, True, {}),
        ((2, 2048, 32, 8), None, False, {"window_size": 500}),
        ((2, 2048, 32, 8), 12.0, True, {"window_size": 500}),
        ((1, 4096, 32, 8), 4.0, False, {"window_size": 1000}),
        ((1, 4096, 32, 8), None, True, {"lengths": (0, 1300, 1, 548, 100, 2000)}),
        ((1, 4096, 32, 8), 4.0, False, {"lengths": (0, 1300, 1, 548, 100, 2000)}),
        ((1, 4096, 32, 8), 4.0, False, {"lengths": (4000, 96), "window_size": 300}),
    ],
)
def test_a_thousand_times_the_same_bits(size, gate, sink, options):
    """Where a barrier is missing, or programs add when they come, they move."""
    options = dict(options)
    given = operands(*size, gate=gate, sink=sink, D=options.pop("D", 128))
    if "lengths" in options:
        options["cu_seqlens"] = bounds(*options.pop("lengths"))
    with hopper():
        assert not moved(lambda: gradients(*given, **options))


@pytest.mark.parametrize("gate", [0.0, 4.0, 12.0])
def test_what_is_left_out_does_not_show(gate):
    given = operands(1, 8192, 32, 8, gate=gate)
    with hopper():
        found = gradients(*given)
        with blocks.nothing_left_out():
            expected = gradients(*given)
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 1e-5


@pytest.mark.parametrize("D", [64, 128])
def test_keys_far_below_the_sink(D):
    """Beside it they are nothing, and are not left out: gradients are small, and as in fp64."""
    do, q, k, v, _, _ = operands(1, 1024, 4, 2, D=D)
    g = torch.full((1, 1024, 4), -0.01, device="cuda")
    given = do, q, k, v, g, torch.full((4,), 40.0, device="cuda")
    with hopper() as launched:
        found = gradients(*given)
    assert launched
    with use("eager"):
        expected = gradients(*(x.double() for x in given))
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() < 1e-2 * y.norm()  # bf16


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


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("gate", [None, 4.0])
@pytest.mark.parametrize("D", [64, 128])
def test_packed_sequences_do_not_read_each_other(D, gate, window):
    do, q, k, v, *rest = operands(1, 500, 8, 2, gate=gate, D=D)
    arguments = [x for x in (do, q, k, v, rest[0]) if x is not None]
    with hopper() as launched:
        run = functools.partial(gradients, window_size=window)
        on_hopper.check_what_lies_beside(run, arguments)
    assert len(launched) == 2


@pytest.mark.parametrize("gate", [None, 4.0])
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("packed", [False, True])
def test_capture(gate, window, packed):
    """A graph replays with other boundaries."""
    do, q, k, v, g, _ = operands(1, 4096, 32, 8, gate=gate)
    boundaries = bounds(1000, 0, 3000) if packed else None
    options = 0.1, window
    o, lse = torch.ops.fla.softmax_forward(q, k, v, g, None, boundaries, *options)

    def run():
        arguments = q, do, k, v, g, None, boundaries, o, lse, *options
        return torch.ops.fla.softmax_backward(*arguments)[: 3 if g is None else 4]

    with hopper() as launched:
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        assert len(launched) == 2
        for lengths in ((4096, 0, 0), (0, 1, 129), (2000, 96, 2000))[: 3 if packed else 1]:
            do.copy_(torch.randn_like(do))
            if packed:
                boundaries.copy_(bounds(*lengths))
                found = torch.ops.fla.softmax_forward(q, k, v, g, None, boundaries, *options)
                for x, y in zip((o, lse), found, strict=True):
                    x.copy_(y)
            graph.replay()
            for x, y in zip(captured, run(), strict=True):
                assert torch.equal(x, y)


def test_nothing_is_compiled_again():
    """Over a hundred lengths, windows and packings."""
    packed = operands(1, 640, 8, 2, gate=2.0)

    def run(T):
        gradients(*operands(1, T, 8, 2, gate=2.0))
        gradients(*operands(1, T, 8, 2, gate=2.0), window_size=T - 1)
        gradients(*operands(1, T, 8, 2), window_size=T - 1)
        gradients(*packed, window_size=T - 1, cu_seqlens=bounds(T, 640 - T))

    with hopper():
        run(639)
        before = on_hopper.compiled(hopper_backward.hopper_backward_kernel)
        for T in range(2, 102):
            run(T)
    assert on_hopper.compiled(hopper_backward.hopper_backward_kernel) == before


@sanitizer.needed
def test_stays_in_its_memory():
    assert "ERROR SUMMARY: 0 errors" in sanitizer.sanitized("memcheck", __file__)


def main() -> None:
    sizes = (1, 1, 8, 2), (2, 300, 8, 2), (1, 700, 8, 2)
    variants = {}, {"gate": 0.0}, {"gate": 12.0, "D": 64}, {"sink": True}, {"D": 64}
    with hopper() as launched:
        for size, more, window in itertools.product(sizes, variants, (None, 1, 100)):
            given = operands(*size, **more)
            gradients(*given, window_size=window)
            if size[0] == 1:
                lengths = 0, size[1] // 2, 1 % size[1], 0, size[1] // 3
                gradients(*given, window_size=window, cu_seqlens=bounds(*lengths))
            torch.cuda.synchronize()
    assert len(launched) == 75


if __name__ == "__main__":
    main()
