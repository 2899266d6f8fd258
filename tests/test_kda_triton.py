"""The delta engine's kernels without a GPU: interpreted on small shapes, and compiled for sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from fla.ops.kda import eager
from fla.ops.kda.engine import Options
from fla.testing.compare import relative_error

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARED_MEMORY = 227 * 1024  # of one program on sm_90
# The contract's 1e-4 leaves room for tf32×3, the interpreter is plain fp32.
FP32 = 1e-5
NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_interpreted")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def operands(T, K, V, dtype=torch.float32, H=1, HV=1, B=1, lengths=None, gate="slow", **options):
    """What ``forward`` takes, and the gradients of o and of the final state."""
    torch.manual_seed(T + K + V)
    N = len(lengths) if lengths else B
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) if lengths else None
    options = {"scale": K**-0.5, "chunk_size": 64, "qk_l2norm": True, **options}
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


def agree(arguments, do, dstate, bound):
    """Compare with ``eager`` in fp64: o, the final state, and the gradient of every operand."""
    from fla.ops.kda import triton as kernels

    found = dict(zip(("o", "final"), kernels.forward(*arguments), strict=False))
    expected = dict(zip(("o", "final"), eager.forward(*wide(arguments)), strict=False))
    found.update(zip(NAMES, kernels.backward(do, dstate, *arguments), strict=True))
    reference = eager.backward(do.double(), dstate.double(), *wide(arguments))
    expected.update(zip(NAMES, reference, strict=True))
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
        "T": 35, "K": 20, "V": 16, "gate": None, "beta_sigmoid": True, "neg_eigval": True,
    },
    "lower bound": {"T": 35, "K": 20, "V": 16, "gate": None, "lower_bound": -5.0},
    "recurrent": {"T": 3, "K": 20, "V": 40, "B": 2, "H": 1, "HV": 2, "chunk_size": 0},
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_eager(case):
    arguments = dict(CASES[case])
    if arguments.get("gate", "") is None:
        arguments["gate"] = True
    agree(*operands(**arguments), bound=FP32)


@interpreted
def test_fp16():
    agree(*operands(35, 20, 24, torch.float16, gate="mixed"), bound=1e-3)


@interpreted
def test_segments_are_joined():
    from fla.ops.kda import triton as kernels

    with mock.patch.multiple(kernels, FILLS_CHIP=6, SHORTEST_SEGMENT=1):
        agree(*operands(170, 16, 24), bound=FP32)
        agree(*operands(150, 16, 24, lengths=(0, 100, 50, 0), gate="mixed"), bound=FP32)


@interpreted
def test_states_before_chunks():
    from fla.ops.kda import triton as kernels

    for lengths in (None, (0, 65, 5, 0)):
        arguments, _, _ = operands(70, 16, 24, lengths=lengths, intermediate_states=True)
        found = kernels.forward(*arguments)[2]
        expected = eager.forward(*wide(arguments))[2]
        chunks = 3 if lengths else 2
        assert relative_error(found[:, :chunks], expected[:, :chunks]) < FP32


@interpreted
def test_a_later_token_changes_no_bit_before_it():
    from fla.ops.kda import triton as kernels

    for gate in ("slow", "mixed"):
        arguments, _, _ = operands(40, 16, 16, gate=gate)
        before = kernels.forward(*arguments)[0]
        for i in range(5):  # of q, k, v, g and beta each
            arguments[i][:, 21] = -500.0 if i == 3 else 3.0
        assert torch.equal(kernels.forward(*arguments)[0][:, :21], before[:, :21])


@interpreted
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


@compiled
def test_interpreted():
    """The tests above, in a process that interprets kernels."""
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@compiled
@pytest.mark.parametrize(
    "dtype,K,V",
    [
        (torch.bfloat16, 64, 64),
        (torch.bfloat16, 128, 128),
        (torch.bfloat16, 256, 512),
        (torch.float16, 128, 128),
    ],
)
def test_every_launch_compiles_for_hopper(dtype, K, V):
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from fla.ops.kda import triton as kernels

    hopper = mock.Mock()
    hopper.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    hopper.get_current_device.return_value = 0
    shared = {}

    def warmup(kernel, grid):
        def launch(*arguments, **more):
            done = kernel.run(*arguments, grid=grid, warmup=True, **more)
            shared[kernel.fn.__name__] = done.metadata.shared

        return launch

    arguments, do, dstate = operands(64, K, V, dtype, gate=True, beta_sigmoid=True)
    recurrent = [*arguments[:9], arguments[9]._replace(chunk_size=0)]
    with (
        mock.patch.object(JITFunction, "__getitem__", warmup),
        mock.patch.object(driver, "_active", hopper),
    ):
        kernels.forward(*arguments)
        kernels.backward(do, dstate, *arguments)
        kernels.forward(*recurrent)
        with mock.patch.multiple(kernels, FILLS_CHIP=32, SHORTEST_SEGMENT=1):
            kernels.forward(*arguments)
    assert len(shared) == 7 and max(shared.values()) <= SHARED_MEMORY, shared
