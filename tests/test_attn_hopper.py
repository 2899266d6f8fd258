"""The softmax engine's forward kernel for Hopper without a GPU: who gets it, and compiled."""

from __future__ import annotations

import re
import subprocess
from unittest import mock

import pytest
import torch
from compiling import compiling
from triton import knobs

from fla.ops.attn import hopper_forward
from fla.ops.attn.engine import ENGINE, Options
from fla.ops.common import device
from fla.ops.common.dispatch import Problem

LONG = hopper_forward.SHORTEST


def operands(T=LONG, D=128, dtype=torch.bfloat16):
    q, k = torch.empty(1, T, 4, D, dtype=dtype), torch.empty(1, T, 2, D, dtype=dtype)
    return q, k, k.clone()


@pytest.mark.parametrize(
    "dtype, window, sink",
    [
        (torch.bfloat16, None, None),
        (torch.bfloat16, 1000, torch.float32),
        (torch.float16, 1000, None),
        (torch.float16, None, torch.float16),
    ],
)
def test_compiles(dtype, window, sink, tmp_path):
    """Products are asynchronous, nothing is spilled, no tile is left before all warps are done."""
    sink_bias = None if sink is None else torch.zeros(4, dtype=sink)
    with compiling(90) as compiled:
        hopper_forward.forward(*operands(dtype=dtype), None, sink_bias, None, Options(1.0, window))
    (kernel,) = compiled
    assert kernel.metadata.shared <= 227 << 10
    order = re.findall(
        r"wgmma\.wait_group\S* \d|bar\.sync|mbarrier\.arrive\.shared", kernel.asm["ptx"]
    )
    assert "wgmma.wait_group.sync.aligned 1" in order
    arrivals = [i for i, each in enumerate(order) if each == "mbarrier.arrive.shared"]
    assert arrivals and all(order[i - 1] == "bar.sync" for i in arrivals)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage


def test_lengths_and_windows_share_a_kernel():
    with compiling(90) as compiled:
        for T, window in ((LONG, 100), (LONG + 1, 1), (2 * LONG, 2000)):
            hopper_forward.forward(*operands(T), None, None, None, Options(1.0, window))
    assert len(compiled) == 1


def test_what_it_does_not_take_goes_to_triton():
    q, k, v = operands()
    short, unaligned = operands(LONG - 1), torch.empty(q.numel() + 1, dtype=q.dtype)[1:]
    gate, bounds = torch.empty(1, LONG, 4), torch.tensor([0, LONG])
    with (
        mock.patch.object(hopper_forward, "run_forward", return_value="hopper"),
        mock.patch.object(hopper_forward.portable, "forward", return_value="triton"),
    ):
        options = Options(1.0)
        assert hopper_forward.forward(q, k, v, None, None, None, options) == "hopper"
        assert hopper_forward.forward(q, k, v, None, q[0, 0, :, 0], None, options) == "hopper"
        assert hopper_forward.forward(q, k, v, None, None, None, Options(-1.0, 9)) == "hopper"
        assert hopper_forward.forward(q, k, v, gate, None, None, options) == "triton"
        assert hopper_forward.forward(q, k, v, None, None, bounds, options) == "triton"
        assert hopper_forward.forward(*short, None, None, None, options) == "triton"
        moved = unaligned.view_as(q)
        assert hopper_forward.forward(moved, k, v, None, None, None, options) == "triton"


def reason(dtype=torch.bfloat16, K=128, V=128, capability=(9, 0), version="3.6.0", kind="cuda"):
    with (
        mock.patch.object(device, "capability", lambda _: capability),
        mock.patch.object(device, "triton_version", lambda: version),
        mock.patch.dict(device.HOPPER_TRITON, {"softmax forward": ("3.6",)}),
    ):
        return dict(ENGINE.explain(Problem(torch.device(kind), dtype, K, V)))["hopper"]


def test_who_gets_it():
    assert reason() is None
    assert reason(torch.float16, 96, 72) is None
    assert reason(kind="cpu") == "kernels run on CUDA tensors, these are on cpu"
    assert reason(capability=(10, 0)) == "made for sm_90 alone"
    assert reason(torch.float32) == "takes fp16 and bf16, not torch.float32"
    assert reason(version="3.7.0") == "not verified with Triton 3.7.0"
    assert reason(version="3.60.0") == "not verified with Triton 3.60.0"
    for K, V in ((64, 128), (128, 64), (256, 128), (100, 128)):
        assert reason(K=K, V=V) == f"takes heads of 72 to 128 in steps of 8, not {K} and {V}"
