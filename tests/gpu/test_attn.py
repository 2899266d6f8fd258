"""The softmax engine's kernels on a GPU: every line of the launch tables, and what they promise."""

from __future__ import annotations

import pytest
import sanitizer
import softmax_calls
import torch
from on_gpu import check_launch
from torch.nn.functional import logsigmoid

from fla.ops.attn import attn_decoding_one_step, backward, blocks, forward, parallel_attn
from fla.testing.compare import relative_error

pytestmark = pytest.mark.gpu
PARTS = 8


@pytest.mark.parametrize("launch", [*softmax_calls.training(), *softmax_calls.decoding()], ids=str)
def test_every_launch(launch):
    with launch.on_its_gpu():
        check_launch(launch.spec, launch.shape, launch.variant, launch.dtype)


@sanitizer.needed
@pytest.mark.parametrize("part", range(PARTS))
def test_every_launch_stays_in_its_memory(part):
    found = sanitizer.sanitized("memcheck", softmax_calls.__file__, part, PARTS)
    assert "ERROR SUMMARY: 0 errors" in found


@sanitizer.needed
def test_no_kernel_races():
    assert "RACECHECK SUMMARY: 0 hazards" in sanitizer.sanitized(
        "racecheck", softmax_calls.__file__
    )


def operands(T, HQ=4, H=2, D=64, gate=None, dtype=torch.bfloat16, B=1):
    torch.manual_seed(T)
    q, do = torch.randn(2, B, T, HQ, D, device="cuda", dtype=dtype)
    k, v = torch.randn(2, B, T, H, D, device="cuda", dtype=dtype)
    g = None if gate is None else logsigmoid(torch.randn(B, T, HQ, device="cuda") + gate)
    return q, k, v, g, do


def run(q, k, v, g, do, **more):
    """o and all gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, g) if x is not None]
    o = parallel_attn(*leaves, **more)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.mark.parametrize("gate", [None, 4.0])
@pytest.mark.parametrize("window", [None, 100])
def test_repeats_bit_for_bit(gate, window):
    arguments = operands(1000, gate=gate)
    bounds = torch.tensor([0, 0, 300, 301, 1000, 1000], device="cuda")
    more = {"window_size": window, "cu_seqlens": bounds}
    first, second = run(*arguments, **more), run(*arguments, **more)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gate", [0.0, 4.0])
def test_what_is_left_out_does_not_show(gate):
    q, k, v, g, do = operands(4096, gate=gate, dtype=torch.float32)
    found = run(q, k, v, g, do)
    with blocks.nothing_left_out():
        expected = run(q, k, v, g, do)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


def test_keys_far_below_the_sink():
    """Beside it they are nothing, and are not left out: their gradients are small, and exact."""
    q, k, v, _, do = operands(1024, dtype=torch.float32)
    g = torch.full((1, 1024, 4), -0.01, device="cuda")
    sink = torch.full((4,), 40.0, device="cuda")
    found = run(q, k, v, g, do, sink_bias=sink)
    with blocks.nothing_left_out():
        expected = run(q, k, v, g, do, sink_bias=sink)
    assert all((a - b).norm() < 1e-6 * b.norm() for a, b in zip(found, expected, strict=True))


def test_gates_that_grow_leave_nothing_visible_out():
    """A document that nothing survives at first, and that a later gate brings back."""
    q, k, v, _, do = operands(1024, dtype=torch.float32)
    g = torch.full((1, 1024, 4), -0.3, device="cuda")
    g[:, 700:] = 0.6
    found = run(q, k, v, g, do)
    with blocks.nothing_left_out():
        expected = run(q, k, v, g, do)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


def test_capture_and_replay_with_other_boundaries():
    q, k, v, g, do = operands(777, gate=2.0, dtype=torch.float32)
    q, k, v, g = (x.requires_grad_() for x in (q, k, v, g))
    bounds = torch.tensor([0, 100, 100, 640, 700], device="cuda", dtype=torch.int32)

    def step():
        o = parallel_attn(q, k, v, g, cu_seqlens=bounds)
        return [o, *torch.autograd.grad(o, (q, k, v, g), do)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for other in ([0, 777, 777, 777, 777], [0, 0, 1, 65, 129], [0, 300, 301, 301, 777]):
        bounds.copy_(torch.tensor(other))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_decoding_is_captured():
    torch.manual_seed(0)
    q = torch.randn(1, 3, 8, 64, device="cuda")
    k, v = torch.randn(2, 1, 3000, 2, 64, device="cuda")
    bounds = torch.tensor([0, 1000, 1000, 3000], device="cuda", dtype=torch.int32)
    attn_decoding_one_step(q, k, v, cu_seqlens=bounds)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attn_decoding_one_step(q, k, v, cu_seqlens=bounds)
    for other in ([0, 0, 0, 3000], [0, 17, 2000, 2500]):
        bounds.copy_(torch.tensor(other))
        graph.replay()
        assert torch.equal(captured, attn_decoding_one_step(q, k, v, cu_seqlens=bounds))


def test_nothing_is_copied_to_the_host_and_nothing_compiled_again():
    """Over a hundred lengths, and as many packings, all other than the first one."""
    kernels = (forward.forward_kernel, backward.queries_kernel, backward.keys_kernel)

    def packing(first: int) -> torch.Tensor:
        return torch.tensor([0, first, first, 400], device="cuda")

    def compiled() -> list[int]:
        return [len(kernel.device_caches[0][0]) for kernel in kernels]

    packings = [packing(first) for first in range(101)]
    lengths = [operands(T, gate=2.0) for T in (640, *range(1, 101))]
    packed = operands(400, gate=2.0)
    run(*lengths[0])
    run(*packed, cu_seqlens=packings[0])
    before = compiled()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for arguments, bounds in zip(lengths[1:], packings[1:], strict=True):
            run(*arguments)
            run(*packed, cu_seqlens=bounds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled() == before


def test_tensors_may_begin_anywhere():
    """Kernels compiled for multiples of 16 bytes are not launched on others."""
    q, k, v, g, do = operands(300, gate=2.0)
    expected = run(q, k, v, g, do)
    moved = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in (q, k, v, g, do)]
    assert all(x.data_ptr() % 16 for x in moved)
    found = run(*moved)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
def test_on_a_gpu_that_is_not_the_current_one():
    arguments = operands(300, gate=2.0)
    expected = run(*arguments)
    found = run(*(x.to("cuda:1") for x in arguments))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("gate", [None, 2.0])
def test_torch_compile(gate):
    """One graph, forward and backward, with the values of the uncompiled call."""
    arguments = operands(300, gate=gate)
    leaves = [x.requires_grad_() for x in arguments[:-1] if x is not None]

    def loss(*leaves):
        return (parallel_attn(*leaves) * arguments[-1]).float().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_tokens_behind_the_last_sequence():
    """They are not read, and what belongs to them is zero."""
    arguments = [x.clone() for x in operands(500, gate=2.0, dtype=torch.float32)]
    for x in arguments:
        x[:, 300:] = float("nan")
    bounds = torch.tensor([0, 120, 300], device="cuda")
    found = run(*arguments, cu_seqlens=bounds)
    expected = run(*(x[:, :300] for x in arguments), cu_seqlens=bounds)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[:, :300], b) and not a[:, 300:].any()


def test_memory():
    """Beside inputs, outputs and gradients, only vectors along time."""
    q, k, v, g, do = operands(8192, 16, 4, 128, gate=4.0)
    run(q, k, v, g, do)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(q, k, v, g, do)
    extra = torch.cuda.max_memory_allocated() - before
    o, *gradients = (x.numel() * x.element_size() for x in results)
    assert extra < o + 4 * q[..., 0].numel() + 3 * sum(gradients)


def test_beyond_two_to_the_31_elements():
    T, last = 2**19 + 2**14, 1000
    q, k, v, _, do = operands(T, 32, 8, 128)
    found = run(q, k, v, None, do, window_size=100)
    tail = slice(T - 1024, None)
    expected = run(*(x[:, tail] for x in (q, k, v)), None, do[:, tail], window_size=100)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a[:, -(last - 100) :], b[:, -(last - 100) :]) < 5e-3  # bf16
