"""The delta engine's kernels on small shapes, as Triton interprets them.

Run by ``test_kda_triton`` in a process of its own: whether Triton interprets is settled on import.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from kda_calls import limited_to, of_capability

from fla.ops.kda import eager
from fla.ops.kda.engine import Options
from fla.testing.compare import relative_error

pytest.importorskip("triton")

# The contract's 1e-4 leaves room for tf32×3, the interpreter is plain fp32.
FP32 = 1e-5
NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def operands(T, K, V, dtype=torch.float32, H=1, HV=1, B=1, lengths=None, gate="slow", **options):
    """What ``forward`` takes, and the gradients of o and of the final state."""
    torch.manual_seed(T + K + V)
    N = len(lengths) if lengths else B
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) if lengths else None
    options = {"scale": K**-0.5, "chunk_size": 64, "qk_l2norm": True, **options}
    options["gate"] = gate == "raw"
    options = Options(output_final_state=True, **options)
    q, k = torch.randn(2, B, T, H, K).to(dtype)
    v, do = torch.randn(2, B, T, HV, V).to(dtype)
    tail = (V, K) if options.state_v_first else (K, V)
    state, dstate = torch.randn(2, N, HV, *tail)
    g, beta = torch.randn(B, T, HV, K), torch.randn(B, T, HV)
    A_log = dt_bias = None
    if options.gate:
        A_log, dt_bias = torch.randn(HV), torch.randn(HV * K)
    elif gate == "slow":
        g = -0.1 * g.abs()
    elif gate == "mixed":
        draw = torch.rand(g.shape)
        g = torch.where(draw < 0.1, -1e4, torch.where(draw < 0.2, -1e-6, -0.05 * g.abs()))
    elif gate == "growing":
        g = 0.1 * g
    beta = beta if options.beta_sigmoid else beta.sigmoid()
    return (q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, options), do, dstate


def wide(arguments):
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]


def agree(arguments, do, dstate, bound, keep=True, again=True):
    """Compare with ``eager`` in fp64: o, the final state, and the gradient of every operand.

    Operands of chunks are kept for the backward pass or made again, and it goes ``again`` over what
    the forward pass left, as for a graph that is retained, and without that.
    """
    from fla.ops.kda import triton as kernels

    with mock.patch.object(kernels, "FEW_CHUNKS", kernels.FEW_CHUNKS if keep else 0):
        o, final, _, kept = kernels.forward(*arguments)
    found = dict(zip(NAMES, kernels.backward(do, dstate, *arguments, kept), strict=True))
    for room in (kept, None) if again and kept is not None else ():
        repeated = kernels.backward(do, dstate, *arguments, room)
        assert all(torch.equal(found[x], y) for x, y in zip(NAMES, repeated, strict=True))
    expected = dict(zip(("o", "final"), eager.forward(*wide(arguments)), strict=False))
    reference = eager.backward(do.double(), dstate.double(), *wide(arguments))
    expected.update(zip(NAMES, reference, strict=True))
    found |= {"o": o, "final": final}
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < bound, errors


CASES = {
    "one token": {"T": 1, "K": 16, "V": 16},
    "odd sizes, grouped heads": {"T": 33, "K": 20, "V": 40, "H": 1, "HV": 2},
    "mixed decays, several chunks": {"T": 70, "K": 72, "V": 24, "gate": "mixed"},
    "growing": {"T": 40, "K": 16, "V": 16, "gate": "growing"},
    "packed, empty ones, v first": {
        "T": 68, "K": 16, "V": 24, "lengths": (0, 33, 0, 34, 1, 0), "state_v_first": True,
    },
    "softplus, doubled": {
        "T": 35, "K": 20, "V": 16, "gate": "raw", "beta_sigmoid": True, "neg_eigval": True,
    },
    "lower bound": {"T": 35, "K": 20, "V": 16, "gate": "raw", "lower_bound": -5.0},
    "recurrent": {"T": 3, "K": 20, "V": 40, "B": 2, "H": 1, "HV": 2, "chunk_size": 0},
    "recurrent, v first, packed": {
        "T": 4, "K": 20, "V": 40, "lengths": (0, 3, 0, 1, 0), "chunk_size": 0,
        "state_v_first": True,
    },
    "recurrent, no token": {"T": 0, "K": 20, "V": 40, "B": 2, "chunk_size": 0},
}  # fmt: skip


@pytest.mark.parametrize("chunk", [32, 64])
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_eager(case, chunk):
    """Each case keeps operands with one size of chunks, and makes them again with the other."""
    from fla.ops.kda import launches

    keep = (list(CASES).index(case) % 2 == 0) == (chunk == 64)
    with mock.patch.object(launches, "chunk", lambda *sizes: chunk):
        agree(*operands(**CASES[case]), bound=FP32, keep=keep)


def test_where_there_is_less_shared_memory():
    """Blocks of half the value channels, and of half the channels in products between tokens."""
    with limited_to(99):
        agree(*operands(20, 200, 16, gate="mixed"), bound=FP32)


def test_on_newer_gpus():
    with of_capability(100):
        agree(*operands(20, 80, 16, gate="mixed"), bound=FP32)


@pytest.mark.parametrize("size", [2.0**-40, 2.0**40])
def test_gradients_that_are_small_or_large(size):
    """As of a mean over many tokens, under gates that are nearly open."""
    from fla.ops.kda import triton as kernels

    arguments, do, dstate = operands(35, 20, 16, gate="raw", lower_bound=-5.0)
    arguments[3].mul_(0.3).add_(3.0)
    found = kernels.backward(do * size, dstate * size, *arguments)
    expected = eager.backward(do.double(), dstate.double(), *wide(arguments))
    errors = [relative_error(x / size, y) for x, y in zip(found, expected, strict=True)]
    assert max(errors) < FP32, errors


@pytest.mark.parametrize("keep", [False, True])
def test_fp16(keep):
    agree(*operands(35, 20, 24, torch.float16, gate="mixed"), bound=1e-3, keep=keep)


def test_segments_are_joined():
    from fla.ops.kda import launches

    few = {"SHORTEST_SEGMENT": 1, "FEWEST_SEGMENTS": 2}
    with mock.patch.multiple(launches, multiprocessors=lambda device: 6, **few):
        agree(*operands(170, 16, 24), bound=FP32)
        packed = operands(150, 16, 24, lengths=(0, 100, 50, 0), gate="mixed")
        agree(*packed, bound=FP32, keep=False, again=False)
    with mock.patch.multiple(launches, multiprocessors=lambda device: 12, **few):
        agree(*operands(100, 100, 24), bound=FP32, again=False)  # of more than one piece


def test_states_before_chunks():
    from fla.ops.kda import triton as kernels

    for lengths in (None, (0, 65, 5, 0)):
        arguments, _, _ = operands(70, 16, 24, lengths=lengths, intermediate_states=True)
        found = kernels.forward(*arguments)[2]
        expected = eager.forward(*wide(arguments))[2]
        chunks = 3 if lengths else 2
        assert relative_error(found[:, :chunks], expected[:, :chunks]) < FP32


def test_a_later_token_changes_no_bit_before_it():
    from fla.ops.kda import launches
    from fla.ops.kda import triton as kernels

    for gate, chunk in (("slow", 32), ("mixed", 64)):
        arguments, _, _ = operands(40, 16, 16, gate=gate)
        with mock.patch.object(launches, "chunk", lambda *sizes, chunk=chunk: chunk):
            before = kernels.forward(*arguments)[0]
            for i in range(5):  # of q, k, v, g and beta each
                arguments[i][:, 21] = -500.0 if i == 3 else 3.0
            assert torch.equal(kernels.forward(*arguments)[0][:, :21], before[:, :21])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_serving(dtype, state_v_first):
    from fla.ops.kda import triton as kernels

    lengths, tokens = (2, 0, 1, 3), 3
    more = {"lengths": lengths, "chunk_size": 0, "state_v_first": state_v_first}
    arguments, _, _ = operands(6, 20, 40, HV=2, **more)
    pool = torch.randn(12, 2, *arguments[7].shape[1:])[:, 0].to(dtype)  # strided slots
    indices = torch.randperm(12).reshape(4, tokens)
    indices[0, 1] = indices[3, 0] = -1
    accepted = torch.tensor([1, 2, 1, 2])
    results = []
    for module, given in ((kernels, list(arguments)), (eager, wide(arguments))):
        state, out = (
            pool.clone() if module is kernels else pool.double(),
            torch.zeros_like(given[2]),
        )
        rest = given[8], indices, accepted, given[9]
        module.serve(*given[:7], state, out, *rest)
        results.append((out, state))
    (out, state), (expected_out, expected_state) = results
    assert relative_error(out, expected_out) < FP32
    assert relative_error(state, expected_state) < (FP32 if dtype == torch.float32 else 4e-3)
    untouched = torch.ones(12, dtype=torch.bool)
    for n, length in enumerate(lengths):
        untouched[[slot for slot in indices[n, :length].tolist() if slot >= 0]] = False
    assert torch.equal(state[untouched], pool[untouched])


GATES = {"(5, 3, 2, 20)": (5, 3, 2, 20), "one row": (1, 700), "no row": (2, 0, 3, 8)}


@pytest.mark.parametrize("x", [-20.0, 9.0, 15.0])
def test_gradient_of_a_saturated_gate(x):
    """As small as what is left to open or to close, and as exact."""
    from fla.ops.kda import gate, gate_kernels

    torch.manual_seed(0)
    given = x + 0.1 * torch.randn(5, 3, 2, 20), torch.randn(5, 3, 2, 20), 0.1 * torch.randn(2), None
    found = gate_kernels.backward(*given, -5.0)
    exact = gate.backward(*(each if each is None else each.double() for each in given), -5.0)
    for one, other in zip(found[:2], exact[:2], strict=True):
        assert (one - other.view(one.shape)).norm() < FP32 * other.norm()


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("size", GATES)
def test_gates(size, lower_bound):
    from fla.ops.kda import gate, gate_kernels

    torch.manual_seed(0)
    g, dy = torch.randn(2, *GATES[size])
    g, (HV, K) = 3 * g, GATES[size][-2:]
    parameters = torch.randn(HV), torch.randn(HV * K)
    rest = *(x.double() for x in parameters), lower_bound
    found = gate_kernels.forward(g, *parameters, lower_bound, torch.float32)
    assert relative_error(found, gate.forward(g.double(), *rest, torch.float64)) < FP32
    gradients = gate_kernels.backward(g, dy, *parameters, lower_bound)
    expected = gate.backward(g.double(), dy.double(), *rest)
    for found, exact in zip(gradients, expected, strict=True):
        assert relative_error(found, exact.view(found.shape)) < FP32


def test_serving_in_place_without_slots():
    """A state of any strides; that of a sequence without tokens keeps its bits."""
    from fla.ops.kda import recurrent

    arguments, _, _ = operands(5, 20, 40, lengths=(3, 0, 2), chunk_size=0)
    *tokens, given, cu_seqlens, options = arguments
    state, found = given.mT.contiguous().mT, torch.zeros_like(tokens[2])
    recurrent.serve(*tokens, state, found, cu_seqlens, None, None, options)
    o, final, *_ = eager.forward(*wide(arguments))
    assert relative_error(found, o) < FP32 and relative_error(state, final) < FP32
    assert torch.equal(state[1], given[1])


def test_tokens_without_a_slot_are_not_stored():
    """Where a packing has more tokens than slots, which only a device knows."""
    from fla.ops.kda import recurrent

    arguments, _, _ = operands(5, 20, 40, lengths=(3, 2), chunk_size=0)
    pool, indices = torch.randn(4, 1, 20, 40), torch.tensor([[1, 2], [3, 0]])
    longer = torch.tensor([[1, 2, -1], [3, 0, -1]])
    results = []
    for slots in (indices, longer):
        state, out = pool.clone(), torch.zeros_like(arguments[2])
        recurrent.serve(*arguments[:7], state, out, arguments[8], slots, None, arguments[9])
        results.append((state, out))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
