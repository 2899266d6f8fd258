"""The linear engine's kernels on a GPU: every line of the launch tables, and what they promise."""

from __future__ import annotations

import linear_calls
import pytest
import sanitizer
import torch
from on_gpu import check_launch
from torch.nn.functional import logsigmoid

from fla.ops import chunk_linear_attn, chunk_simple_gla, parallel_simple_gla
from fla.ops.common.dispatch import use
from fla.ops.simple_gla import gate, walk
from fla.testing.compare import relative_error

pytestmark = pytest.mark.gpu
PARTS = 8


@pytest.mark.parametrize("each", list(linear_calls.launches()), ids=str)
def test_every_launch(each):
    with each.on_its_gpu():
        check_launch(each.spec, each.shape, each.variant, each.dtype)


@sanitizer.needed
@pytest.mark.parametrize("part", range(PARTS))
def test_every_launch_stays_in_its_memory(part):
    found = sanitizer.sanitized("memcheck", linear_calls.__file__, part, PARTS)
    assert "ERROR SUMMARY: 0 errors" in found


@sanitizer.needed
def test_no_kernel_races():
    found = sanitizer.sanitized("racecheck", linear_calls.__file__)
    assert "RACECHECK SUMMARY: 0 hazards" in found


def operands(T, H=4, K=64, V=64, gated=True, dtype=torch.bfloat16, B=1):
    torch.manual_seed(T)
    q, k = torch.randn(2, B, T, H, K, device="cuda", dtype=dtype)
    v, do = torch.randn(2, B, T, H, V, device="cuda", dtype=dtype)
    g = logsigmoid(torch.randn(B, T, H, device="cuda") + 3) if gated else None
    return q, k, v, g, do


def run(q, k, v, g, do, function=chunk_simple_gla, **more):
    """o and all gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, g) if x is not None]
    o, _ = function(*leaves, **more)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def test_growth_of_nothing():
    inputs, expected = linear_calls.growth_of_nothing(torch.bfloat16, "cuda")
    with use("triton"):
        o, _ = chunk_simple_gla(*inputs)
    assert relative_error(o, expected) < 5e-3


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("steep", [-5.0, -20.0])
def test_gradient_of_gates_that_leave_little(steep, dtype, bound):
    *given, expected = linear_calls.gates_that_leave_little(steep, dtype, "cuda")
    with use("triton"):
        dg = linear_calls.gradient_of_gates(*given)
    assert (dg - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("T", [1000, 8192])
def test_repeats_bit_for_bit(gated, T):
    arguments = operands(T, gated=gated)
    more = {"cu_seqlens": torch.tensor([0, 0, 300, 301, T, T], device="cuda")}
    if not gated:
        more |= {"function": chunk_linear_attn}
    first, second = run(*arguments, **more), run(*arguments, **more)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradient_of_a_gate_over_a_long_time():
    """Against fp64, and against what rounding the operands of whole-chunk PyTorch costs."""
    from fla.ops.common.dispatch import use
    from fla.testing.compare import rounded_products

    arguments = operands(8192, H=2)
    exact = run(*(x.double() for x in arguments))
    with use("eager"), rounded_products(torch.bfloat16):
        simulated = run(*arguments)
    for a, b, c in zip(run(*arguments), simulated, exact, strict=True):
        assert relative_error(a, c) <= 1.5 * relative_error(b, c)


@pytest.mark.parametrize("T,H", [(777, 2), (4096, 1)])
def test_capture_and_replay_with_other_boundaries(T, H):
    q, k, v, g, do = operands(T, H, dtype=torch.float32)
    q, k, v, g = (x.requires_grad_() for x in (q, k, v, g))
    bounds = torch.tensor([0, 100, 100, 640, 700], device="cuda", dtype=torch.int32)
    state = torch.randn(4, H, 64, 64, device="cuda", requires_grad=True)
    leaves = q, k, v, g, state

    def step():
        o, final = chunk_simple_gla(
            q, k, v, g, initial_state=state, output_final_state=True, cu_seqlens=bounds
        )
        return [o, final, *torch.autograd.grad([o, final], leaves, [do, state.detach()])]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for other in ([0, T, T, T, T], [0, 0, 1, 65, 129], [0, 300, 301, 301, T]):
        bounds.copy_(torch.tensor(other))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_compiles_whole():
    q, k, v, g, do = operands(200)
    compiled = torch.compile(chunk_simple_gla, fullgraph=True)
    expected, found = run(q, k, v, g, do), run(q, k, v, g, do, compiled)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_is_copied_to_the_host_and_nothing_compiled_again():
    kernels = (walk.walk_kernel, gate.gate_kernel)
    run(*operands(100))  # whole sequences
    run(*operands(640))  # segments
    compiled = [len(kernel.device_caches[0][0]) for kernel in kernels]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for T in (*range(1, 1500, 15), 4096, 5000):
            run(*operands(T))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled == [len(kernel.device_caches[0][0]) for kernel in kernels]


@pytest.mark.parametrize("T", [500, 4000])
def test_tokens_behind_the_last_sequence(T):
    """They are not read, and what belongs to them is zero."""
    arguments = [x.clone() for x in operands(T, H=1, dtype=torch.float32)]
    for x in arguments:
        x[:, 300:] = float("nan")
    bounds = torch.tensor([0, 120, 300], device="cuda")
    found = run(*arguments, cu_seqlens=bounds)
    expected = run(*(x[:, :300] for x in arguments), cu_seqlens=bounds)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a[:, :300], b) < 1e-6 and not a[:, 300:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_map(dtype):
    q, k, v, g, _ = operands(200, dtype=dtype)
    _, found = parallel_simple_gla(q, k, v, g, output_attentions=True)
    wide = (x.double().cpu() for x in (q, k, v, g))
    _, expected = parallel_simple_gla(*wide, output_attentions=True)
    assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_memory():
    """Beside inputs, outputs and gradients: vectors along time, and a state every few chunks."""
    q, k, v, g, do = operands(8192, 16, 128, 128)
    run(q, k, v, g, do)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(q, k, v, g, do)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 2 * sum(x.numel() * x.element_size() for x in results)


def test_beyond_two_to_the_31_elements():
    T = 2**18 + 2**14
    q, k, v, g, do = operands(T, 64, 128, 128)
    g -= 1.0  # what lies far back has no part in the end
    found = run(q, k, v, g, do)
    tail = slice(T - 1024, None)
    # in fp64, for what all tokens before have rounded off is in dg
    expected = run(*(x[:, tail].double() for x in (q, k, v, g, do)))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a[:, -512:], b[:, -512:]) < 5e-3
