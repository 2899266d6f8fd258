"""The delta engine on Hopper without a GPU: who gets it, and its scans, emulated and compiled."""

from __future__ import annotations

import os
import re
from unittest import mock

import kda_calls
import pytest
import torch
from alone import run_alone
from compiling import before_arrivals, compiling, dumped, under_way

from fla.ops.common import device
from fla.ops.common.dispatch import Problem
from fla.ops.kda import hopper, hopper_scan, launches
from fla.ops.kda.engine import ENGINE, Options

# Launchers of other kernels, which are not launched here
OTHERS = dict.fromkeys(("run_intra", "run_halving", "run_states", "run_gradients"), mock.DEFAULT)
EMULATED = os.path.join(os.path.dirname(__file__), "emulated_kda.py")


def test_emulated():
    """In a process with a stand-in for Gluon."""
    printed = run_alone(EMULATED)
    assert printed.count("HopperCase") == len(list(kda_calls.hopper_cases()))


def call(T=1024, K=128, V=128, packed=False, states=False, segments=False, partitions=1):
    """Both scans and the output, on tensors of zeros that are there to be launched with."""
    H = 2
    q, k, g = (torch.zeros(1, T, H, K, dtype=torch.bfloat16) for _ in range(3))
    v, beta = torch.zeros(1, T, H, V, dtype=torch.bfloat16), torch.zeros(1, T, H)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    kv = torch.zeros(1, H, K, V) if states else None
    options = Options(1.0, chunk_size=64, output_final_state=states)
    many, few = (1 << 20, {"SHORTEST_SEGMENT": 4}) if segments else (1, {})
    with (
        mock.patch.multiple(hopper, SMALLEST=1, **OTHERS),
        mock.patch.object(
            hopper_scan, "multiprocessors", lambda _: 0 if partitions == 2 else 1 << 20
        ),
        mock.patch.multiple(
            launches, launch=lambda *_: None, multiprocessors=lambda device: many, **few
        ),
    ):
        _, _, _, pairs = hopper.forward(q, k, v, g, beta, None, None, kv, cu_seqlens, options)
        operands = v, kv, q, k, v, g, beta, None, None, kv, cu_seqlens
        hopper.backward(*operands, options, pairs)


@pytest.mark.parametrize(
    "more",
    [
        {"partitions": 2},
        {"packed": True, "states": True},
        {"packed": True, "states": True, "partitions": 2},
        {"segments": True, "partitions": 2},
        {"K": 64, "V": 64, "segments": True},
    ],
    ids=str,
)
def test_compiles(more, tmp_path):
    """Products are asynchronous, little is spilled, no tile is left before all warps are done."""
    with compiling(90) as compiled:
        call(**more)
    assert len(compiled) == (4 if more.get("segments") else 2)
    for kernel in compiled:
        assert kernel.metadata.name == "hopper_scan_kernel"
        assert kernel.metadata.shared <= 227 << 10
        before = before_arrivals(kernel)
        assert before and not any(first.startswith("wgmma") for first in before)
        usage = dumped(kernel, tmp_path, "-res-usage", "-sass")
        assert not under_way(usage)
        # addresses that are made before the loop, for behind it
        assert int(re.search(r"STACK:(\d+)", usage).group(1)) <= 96, usage
        # the assembler has added no wait to those of the source
        waits = len(re.findall("WARPGROUP.DEPBAR", usage))
        assert waits == kernel.asm["ptx"].count("wgmma.wait_group")


def test_other_lengths_compile_nothing_new():
    with compiling(90) as compiled:
        for T in (64, 65, 500, 8192):
            call(T)
    assert len(compiled) == 2


def test_what_it_does_not_take_goes_to_triton():
    made: list = []

    def launched(T=1024, K=128, V=128, dtype=torch.bfloat16, **more):
        q, v = torch.zeros(1, T, 2, K, dtype=dtype), torch.zeros(1, T, 2, V, dtype=dtype)
        q, v = more.pop("q", q), more.pop("v", v)
        made.clear()
        with (
            mock.patch.multiple(hopper, SMALLEST=1 << 19, **OTHERS),
            mock.patch.object(hopper, "run_scan", lambda *_, **__: made.append("hopper")),
            mock.patch.object(launches, "launch", lambda *_: made.append("triton")),
        ):
            options = Options(1.0, chunk_size=64, **more)
            hopper.forward(q, q, v, q, torch.zeros(1, T, 2), None, None, None, None, options)
        return made[-1]

    v = torch.zeros(1, 1024, 2, 128, dtype=torch.bfloat16)
    moved = torch.zeros(v.numel() + 1, dtype=torch.bfloat16)[1:].view_as(v)
    assert launched() == launched(K=64, V=192) == "hopper"
    assert launched(K=256) == launched(K=96) == launched(V=96) == "triton"
    assert launched(dtype=torch.float16) == launched(T=1023) == launched(v=moved) == "triton"
    assert launched(intermediate_states=True) == "triton"


def reason(dtype=torch.bfloat16, K=128, V=128, options=None, verified=("3.6",)):
    with (
        mock.patch.object(device, "capability", lambda _: (9, 0)),
        mock.patch.object(device, "triton_version", lambda: "3.6.0"),
        mock.patch.dict(device.HOPPER_TRITON, {"delta": verified}),
    ):
        problem = Problem(torch.device("cuda"), dtype, K, V, options)
        return dict(ENGINE.explain(problem))["hopper"]


def test_who_gets_it():
    assert reason() is reason(K=64) is reason(V=512) is None
    assert reason(torch.float16).startswith("takes bf16, not torch.float16")
    assert reason(verified=("3.5", "3.60")) == "not verified with Triton 3.6.0"
    assert reason(options=Options(1.0)) == "takes chunks, not the recurrent form"
    for K, V in ((96, 128), (128, 96), (256, 512)):
        assert reason(K=K, V=V).endswith(f"not {K} and {V}")
