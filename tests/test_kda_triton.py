"""The delta engine's kernels without a GPU: interpreted on small shapes, and compiled for sm_90."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from interpreted_kda import operands
from kda_calls import CASES, divided, limited_to, of_capability

from fla.ops import chunk_kda
from fla.ops.kda.engine import Checked, Options

pytest.importorskip("triton")

INTERPRETED = Path(__file__).with_name("interpreted_kda.py")
SHARED_MEMORY = 227 * 1024  # of one program on sm_90
LEAST_SHARED_MEMORY = 99 * 1024  # and on sm_86 and sm_89


@contextlib.contextmanager
def compiling_for(capability: int) -> Iterator[dict[str, int]]:
    """Inside, launches compile their kernels and run nothing; yields who takes how much memory."""
    from compiling import overtaken
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    gpu = mock.Mock()
    gpu.get_current_target.return_value = GPUTarget("cuda", capability, 32)
    gpu.get_current_device.return_value = capability  # what is compiled is kept by device
    shared: dict[str, int] = {}

    def warmup(kernel, grid):
        def launch(*arguments, **more):
            name = kernel.fn.__name__
            done = kernel.run(*arguments, grid=grid, warmup=True, **more)
            shared[name] = max(shared.get(name, 0), done.metadata.shared)
            assert not overtaken(done), done.metadata

        return launch

    with (
        mock.patch.object(JITFunction, "__getitem__", warmup),
        mock.patch.object(driver, "_active", gpu),
        of_capability(capability),
    ):
        yield shared


def stated(call) -> dict[str, int]:
    """The shared memory that the lines of a call state for its kernels, in bytes."""
    from fla.ops.kda import launches

    pairs = call.choose(launches.PAIRS).shared << 10
    return {
        "advance_kernel": call.scan.shared << 10,
        "scans_kernel": call.both.shared << 10,
        "intra_kernel": pairs,
        "halving_kernel": pairs,
    }


def test_interpreted():
    """The tests of that file, in a process that interprets kernels."""
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def launch_what_has_no_chunks(arguments):
    from fla.ops.kda import gate_kernels
    from fla.ops.kda import triton as kernels

    kernels.forward(*arguments[:9], arguments[9]._replace(chunk_size=0))
    raw = arguments[3], arguments[5], arguments[6], -5.0
    gate_kernels.forward(*raw, torch.float32)
    gate_kernels.backward(raw[0], *raw)


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
    from fla.ops.kda import triton as kernels

    arguments, do, dstate = operands(64, K, V, dtype, gate="raw", beta_sigmoid=True)
    packed, *_ = operands(64, K, V, dtype, lengths=(0, 40, 24), gate="raw", state_v_first=True)
    with compiling_for(90) as shared:
        kernels.forward(*arguments)
        kernels.forward(*packed)
        kernels.backward(do, dstate, *arguments)
        with mock.patch.object(kernels, "FEW_CHUNKS", 0):
            room = kernels.kept(*arguments[:3:2], None, arguments[9])
            kernels.backward(do, dstate, *arguments, room)
        with divided(True):
            kernels.forward(*arguments)
        for given in (arguments, packed):
            launch_what_has_no_chunks(given)
    assert {"recurrent_kernel", "gate_kernel", "gate_backward_kernel"} < shared.keys()
    assert max(shared.values()) <= SHARED_MEMORY, shared


@pytest.mark.parametrize("case", [case for case in CASES if case[3] == 99], ids=str)
def test_lines_for_the_least_shared_memory_keep_to_it(case):
    """Scans, and of pairs what takes most; ``make test-compile`` has the other lines."""
    from fla.ops.kda import launches

    dtype, K, V, limit = case
    arguments, do, dstate = operands(64, K, V, dtype, gate="raw", state_v_first=True)
    with limited_to(limit), compiling_for(80) as shared:
        call = launches.Call(*arguments[:7], None, arguments[9])
        call.take(None)
        call.scans(do, arguments[7], dstate, None)
        if dtype == torch.float32 and K == 256:
            call.halve()
        most = stated(call)
    assert shared
    assert all(size <= most[name] <= limit << 10 for name, size in shared.items()), shared


@pytest.mark.wide
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    "case",
    [*CASES, *((torch.float16, K, V, 99) for K, V in ((64, 64), (128, 128), (256, 512)))],
    ids=str,
)
def test_every_line_compiles(case, capability):
    """And what has no lines, within the shared memory that every GPU has."""
    from fla.ops.kda import launches
    from fla.ops.kda import triton as kernels

    dtype, K, V, limit = case
    more = {"lengths": (0, 130, 62), "gate": "raw", "beta_sigmoid": True}
    arguments, do, dstate = operands(192, K, V, dtype, **more)
    with limited_to(limit), divided(True), compiling_for(capability) as shared:
        kernels.forward(*arguments)
        kernels.backward(do, dstate, *arguments)
        launch_what_has_no_chunks(arguments)
        most = stated(launches.Call(*arguments[:7], *arguments[8:]))
    for name, size in shared.items():
        least = most.get(name, LEAST_SHARED_MEMORY)
        assert size <= (least if capability == 80 else SHARED_MEMORY), (name, size)


def test_every_line_has_a_use():
    from fla.ops.kda import launches

    used = set()
    for dtype, K, V, limit in CASES:
        arguments, *_ = operands(1, K, V, dtype)
        with limited_to(limit):
            call = launches.Call(*arguments[:7], None, arguments[9])
            used |= {call.scan, call.both, call.choose(launches.PAIRS)}
    assert used == {*launches.SCANS, launches.BOTH, *launches.PAIRS}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("K", [64, 128, 256])
def test_joining_takes_no_more_than_every_gpu_has(K, reverse):
    from fla.ops.kda.launches import Call

    arguments, *_ = operands(64, K, K, torch.bfloat16)
    with compiling_for(90) as shared:
        call = Call(*arguments[:7], None, arguments[9])
        call._join(call._summaries(2, K)[0], K, call.new_state(), 32, reverse)
    assert 0 < shared["join_kernel"] <= LEAST_SHARED_MEMORY, shared


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("few", [0, 2])
def test_operands_are_made_again_unless_they_are_kept(keep, few):
    from fla.ops.kda import launches
    from fla.ops.kda import triton as kernels

    arguments, do, dstate = operands(128, 64, 64, keep_operands=keep)
    launched = []
    with (
        mock.patch.object(launches, "launch", lambda kernel, *_: launched.append(kernel)),
        mock.patch.object(kernels, "FEW_CHUNKS", few),
    ):
        room = kernels.kept(*arguments[:3:2], None, arguments[9])
        kernels.backward(do, dstate, *arguments, room)
    kept = keep or few >= 2
    assert (launches.intra_kernel in launched) == (not kept)
    assert room.numel() > 5 * 128 * 64 * 4 * kept


def test_serving_writes_nothing_while_a_call_begins_anew():
    """``out`` may be where v is, which is read again then."""
    from fla.ops.kda import recurrent

    q, k, v = torch.randn(2, 1, 3, 2, 16).unbind(2)
    g, beta, state = torch.zeros(2, 1, 2, 16), torch.zeros(2, 1, 2), torch.zeros(2, 2, 16, 16)
    before = v.clone()
    with mock.patch.multiple(recurrent, Relaunch=mock.DEFAULT, begins_anew=lambda: True):
        recurrent.serve(q, k, v, g, beta, None, None, state, v, None, None, None, Options(1.0))
    assert torch.equal(v, before)


def test_wherever_the_output_lies_the_kernel_writes_its_dtype():
    from fla.ops.kda import recurrent

    x, pool = torch.zeros(2, 1, 1, 16), torch.zeros(2, 1, 16, 16)
    out = torch.ones(2, 2, 1, 16, dtype=torch.float64)
    written = []

    def write(*tensors):
        written.append(tensors[9].dtype)
        tensors[9].zero_()

    with mock.patch.object(recurrent, "Relaunch", lambda *_: write):
        for given in (out[:, :1].contiguous(), out[:, :1]):
            operands = x, x, x, x, x[..., 0], None, None, pool, given, None, None, None
            recurrent.serve(*operands, Options(1.0))
            assert not given.any()
    assert written == [torch.float64] * 2


def test_a_step_like_one_before_is_not_described_again():
    """Where shapes and strides are the same, and only if a call's arguments have been checked."""
    from fla.ops.kda import recurrent

    x, states = torch.zeros(2, 1, 1, 16), torch.zeros(4, 1, 16, 16)
    described = []

    def describe(kernel, programs, numbers, constants):
        described.append(constants["STATE"])
        return lambda *tensors: None

    with mock.patch.object(recurrent, "Relaunch", describe):
        for options in (Checked(1.0), Options(1.0)):
            for pool in (states[:2], states[2:], states[::2], states[::2]):
                recurrent.forward(x, x, x, x, x[..., 0], None, None, pool, None, options)
    assert described == [256, 512, 256, 256, 512, 512]


def test_lengths_on_both_sides_of_what_is_kept_export_as_one():
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Model(torch.nn.Module):
        def forward(self, *operands):
            return chunk_kda(*operands)[0]

    with FakeTensorMode():
        q, k, v = (torch.empty(1, 256, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in "qkv")
        g, beta = (torch.empty(1, 256, 2, *K, device="cuda") for K in ([64], []))
        operands = q, k, v, g, beta
    T = torch.export.Dim("T", min=65, max=1 << 20)
    torch.export.export(Model(), operands, dynamic_shapes={"operands": ({1: T},) * 5})
