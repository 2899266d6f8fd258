"""The delta engine's kernels on a GPU: every launch against fp64, and what they promise."""

from __future__ import annotations

import contextlib
import warnings
from unittest import mock

import kda_calls
import pytest
import sanitizer
import torch
import triton
from on_gpu import check, check_launch

from fla.ops.kda import chunk_kda, fused_recurrent_kda
from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd
from fla.ops.kda.gate import fused_kda_gate
from fla.ops.kda.naive import naive_recurrent_kda
from fla.testing import Shape
from fla.testing.compare import relative_error

pytestmark = pytest.mark.gpu
PARTS = 8


@pytest.mark.parametrize(
    "launch", [*kda_calls.chunked(), *kda_calls.elsewhere(), *kda_calls.recurrent()], ids=str
)
def test_every_launch(launch):
    with launch.as_told():
        check_launch(launch.spec, launch.shape, launch.variant, launch.dtype)


@pytest.mark.parametrize("launch", [*kda_calls.gates()], ids=str)
def test_every_gate(launch):
    check_launch(launch.spec, launch.shape, launch.variant, launch.dtype)


@sanitizer.needed
@pytest.mark.parametrize("part", range(PARTS))
def test_every_launch_stays_in_its_memory(part):
    found = sanitizer.sanitized("memcheck", kda_calls.__file__, part, PARTS)
    assert "ERROR SUMMARY: 0 errors" in found


@sanitizer.needed
def test_no_kernel_races():
    found = sanitizer.sanitized("racecheck", kda_calls.__file__)
    assert "RACECHECK SUMMARY: 0 hazards" in found


GATES = kda_calls.gated(-1e-6, -0.05, -5.0, -80.0, -1e4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate", GATES.variants)
def test_gates(gate, dtype):
    check(GATES, Shape(T=150, K=64, V=64), gate, dtype)


def operands(T, H=2, D=128, gate="slow", B=1, dtype=torch.bfloat16):
    torch.manual_seed(T)
    q, k, v, do = torch.randn(4, B, T, H, D, device="cuda", dtype=dtype)
    k = torch.nn.functional.normalize(k, dim=-1)
    g = -0.05 * torch.rand(B, T, H, D, device="cuda")
    draw = torch.rand_like(g)
    if gate == "mixed":
        g = torch.where(draw < 0.05, -1e4, torch.where(draw < 0.1, -80.0, g))
    return q, k, v, g, torch.rand(B, T, H, device="cuda"), do


def run(q, k, v, g, beta, do, call=chunk_kda, **more):
    """o and all gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, g, beta)]
    o, _ = call(*leaves, **more)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("gate", ["slow", "mixed"])
def test_repeats_bit_for_bit(gate):
    arguments = operands(700, gate=gate)
    bounds = torch.tensor([0, 0, 300, 301, 700, 700], device="cuda")
    for more in ({}, {"cu_seqlens": bounds}):
        assert equal(run(*arguments, **more), run(*arguments, **more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk_size", [32, 64])
@pytest.mark.parametrize("bounds", [None, (0, 0, 65, 300, 300)])
def test_states_before_chunks(chunk_size, dtype, bounds):
    q, k, v, g, beta, _ = operands(300, gate="mixed", dtype=dtype)
    wide = [x.double().cpu() for x in (q, k, v, g, beta)]
    ends = None if bounds is None else torch.tensor(bounds)
    more = {"chunk_size": chunk_size, "return_intermediate_states": True}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # chunks of 32 take plain PyTorch
        given = None if ends is None else ends.cuda()
        found = chunk_kda(q, k, v, g, beta, cu_seqlens=given, cu_seqlens_cpu=ends, **more)[2]
        expected = chunk_kda(*wide, cu_seqlens=ends, **more)[2]
    assert relative_error(found, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate", ["slow", "mixed"])
@pytest.mark.parametrize("at", [1, 15, 16, 40, 65, 127])
def test_a_later_token_changes_no_bit_before_it(gate, at, dtype):
    *arguments, _ = operands(130, gate=gate, dtype=dtype)
    before = chunk_kda(*arguments)[0]
    for decay in (-500.0, -1e4, 3.0):
        for i in range(5):
            arguments[i][:, at] = decay if i == 3 else 3.0
        assert torch.equal(chunk_kda(*arguments)[0][:, :at], before[:, :at])


@pytest.mark.parametrize("T,at", [(300, 130), (300, 1), (2100, 1024)])
def test_split_with_a_state_against_whole(T, at):
    """A single head in 2100 tokens falls into segments."""
    q, k, v, g, beta, do = operands(T, H=1, gate="mixed", dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta)]
    o, final = chunk_kda(*leaves, output_final_state=True)
    dfinal = torch.randn_like(final)
    whole = [o, final, *torch.autograd.grad((o, final), leaves, (do, dfinal))]
    first, state = chunk_kda(*(x[:, :at] for x in leaves), output_final_state=True)
    second, final = chunk_kda(
        *(x[:, at:] for x in leaves), initial_state=state, output_final_state=True
    )
    o = torch.cat([first, second], 1)
    parts = [o, final, *torch.autograd.grad((o, final), leaves, (do, dfinal))]
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(parts, whole, strict=True))


def test_a_captured_graph_replays_with_other_boundaries():
    arguments = operands(400)
    bounds = torch.tensor([0, 100, 100, 400], device="cuda")
    run(*arguments, cu_seqlens=bounds)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*arguments, cu_seqlens=bounds)
    for values in ((0, 7, 300, 400), (0, 0, 0, 333), (0, 400, 400, 400)):
        bounds.copy_(torch.tensor(values))
        graph.replay()
        assert equal(captured, run(*arguments, cu_seqlens=bounds))


@pytest.mark.parametrize("call,T", [(chunk_kda, 300), (fused_recurrent_kda, 4)])
def test_compiles_as_one_graph(call, T):
    more = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    compiled = torch.compile(call, fullgraph=True)
    for tokens in (T, T + 1):
        arguments = operands(tokens)
        expected = run(*arguments, call=call, **more)
        assert equal(run(*arguments, call=compiled, **more), expected)


@contextlib.contextmanager
def compilations():
    """Inside, counts the kernels that Triton compiles, or finds compiled on disk."""
    found = []

    def hook(**_):
        found.append(1)

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook):
        yield found


def test_nothing_is_copied_to_the_host_and_nothing_compiled_again():
    def calls(T, bounds=None):
        run(*operands(T), cu_seqlens=bounds)
        *arguments, _ = operands(T)
        fused_recurrent_kda(*arguments, cu_seqlens=bounds, output_final_state=True)
        fused_kda_gate(arguments[3], lower_bound=-5.0)

    packings = [torch.tensor([0, at, 333], device="cuda") for at in range(0, 333, 20)]
    for T in (640, 4200):  # the longer one in segments
        calls(T)
        calls(T, packings[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        with compilations() as found:
            for T in (1, 15, 16, 17, 64, 333, 1024, *range(100, 1100, 100), 4300, 5000):
                calls(T)
            for bounds in packings:
                calls(333, bounds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not found


def test_tokens_behind_the_last_sequence():
    """They are not read, and what belongs to them is zero."""
    arguments = [x.clone() for x in operands(500)]
    for x in arguments:
        x[:, 300:] = float("nan")
    bounds = torch.tensor([0, 120, 300], device="cuda")
    for call in (chunk_kda, fused_recurrent_kda):
        found = run(*arguments, call=call, cu_seqlens=bounds)
        expected = run(*(x[:, :300] for x in arguments), call=call, cu_seqlens=bounds)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a[:, :300], b) and not a[:, 300:].any()


LENGTHS = (2, 0, 1, 3)


def serving(dtype, state_v_first, H=2, K=96, V=64):
    """A pool whose slots do not follow each other, and tokens of sequences of ``LENGTHS``."""
    torch.manual_seed(0)
    T = sum(LENGTHS)
    q, k = torch.randn(2, 1, T, H, K, device="cuda")
    v = torch.randn(1, T, 2 * H, V, device="cuda")
    g = -torch.rand(1, T, 2 * H, K, device="cuda")
    arguments = {"q": q, "k": k / 8, "v": v, "g": g, "beta": torch.rand(1, T, 2 * H, device="cuda")}
    tail = (V, K) if state_v_first else (K, V)
    pool = torch.randn(16, 3, 2 * H, *tail, device="cuda")[:, 1].to(dtype)
    bounds = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0)
    return arguments, pool, bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_serving_against_the_recurrence(dtype, state_v_first):
    """Tokens accepted and rejected, slots not stored; all other slots keep their bits."""
    arguments, pool, bounds = serving(dtype, state_v_first)
    before = pool.double()
    indices = torch.randperm(16, device="cuda")[:12].view(4, 3)
    accepted = torch.tensor([1, 2, 3, 2], device="cuda")
    indices[0, 1] = indices[2, 2] = -1
    first = indices.gather(1, accepted[:, None] - 1)[:, 0].tolist()
    given = pool.clone(memory_format=torch.preserve_format)
    o, returned = fused_recurrent_kda_fwd(
        **arguments,
        initial_state=pool,
        state_v_first=state_v_first,
        cu_seqlens=bounds,
        ssm_state_indices=indices,
        num_accepted_tokens=accepted,
    )
    assert returned is pool
    untouched = torch.ones(16, dtype=torch.bool)
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    for n, length in enumerate(LENGTHS):
        start = sum(LENGTHS[:n])
        state = before[first[n]] if first[n] >= 0 else torch.zeros_like(before[0])
        state = (state.mT if state_v_first else state)[None]
        for t in range(start, start + length):
            token = [x[:, t : t + 1].double() for x in arguments.values()]
            expected, state = naive_recurrent_kda(
                *token, initial_state=state, output_final_state=True
            )
            assert relative_error(o[:, t : t + 1], expected) < 1e-5
            slot = indices[n, t - start].item()
            if slot >= 0:
                untouched[slot] = False
                found = pool[slot].mT if state_v_first else pool[slot]
                assert relative_error(found, state[0]) < bound
    assert untouched.sum() == 16 - (sum(LENGTHS) - 1)
    assert torch.equal(pool[untouched.cuda()], given[untouched.cuda()])


def test_serving_wants_a_slot_for_each_token():
    arguments, pool, _ = serving(torch.float32, False)
    with pytest.raises(ValueError, match="a slot for each of 6 tokens, got 1"):
        fused_recurrent_kda_fwd(
            **arguments,
            initial_state=pool,
            ssm_state_indices=torch.tensor([0], device="cuda"),
        )


def test_serving_is_captured():
    arguments, pool, bounds = serving(torch.float32, False)
    indices = torch.arange(12, device="cuda").view(4, 3)
    given = pool.clone()

    def step(state):
        more = {"cu_seqlens": bounds, "ssm_state_indices": indices}
        return fused_recurrent_kda_fwd(**arguments, initial_state=state, **more)[0]

    step(pool.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(pool)
    for lengths in ((3, 3, 0, 0), (0, 0, 1, 2), (1, 1, 1, 1)):
        bounds.copy_(torch.tensor([0, *lengths]).cumsum(0))
        indices.copy_(torch.randperm(16)[:12].view(4, 3))
        pool.copy_(given)
        graph.replay()
        expected = given.clone()
        assert torch.equal(captured, step(expected)) and torch.equal(pool, expected)


def test_a_pool_beyond_two_to_the_31_elements():
    slots, last = 8200, 8199  # of 2^18 elements
    pool = torch.zeros(slots, 16, 128, 128, device="cuda")
    q, k, v = torch.randn(3, 1, 1, 16, 128, device="cuda")
    g, beta = torch.zeros(1, 1, 16, 128, device="cuda"), torch.ones(1, 1, 16, device="cuda")
    fused_recurrent_kda_fwd(
        q, k, v, g, beta, initial_state=pool, ssm_state_indices=torch.tensor([last], device="cuda")
    )
    assert torch.allclose(pool[last], k[0, 0, :, :, None] * v[0, 0, :, None, :])
    assert not pool[:last].any()


def test_beyond_two_to_the_31_elements():
    """What the last tokens see lies behind the first 2^31 elements."""
    T, H = 2**17 + 2048, 128
    q, k, v, g, beta, _ = operands(T, H)
    g.fill_(-1.0)
    with torch.inference_mode():
        found = chunk_kda(q, k, v, g, beta)[0][:, -512:].clone()
        tail = (x[:, -1024:].contiguous() for x in (q, k, v, g, beta))
        expected = chunk_kda(*tail)[0][:, -512:]
    assert relative_error(found, expected) < 1e-3


def test_gates_repeat_bit_for_bit():
    g = torch.randn(1, 3000, 4, 128, device="cuda", requires_grad=True)
    A_log, dt_bias = (torch.randn(n, device="cuda", requires_grad=True) for n in (4, 512))
    dy = torch.randn_like(g)

    def gradients():
        return torch.autograd.grad(fused_kda_gate(g, A_log, dt_bias), (g, A_log, dt_bias), dy)

    assert equal(gradients(), gradients())
