"""The softmax engine's forward kernel for Hopper without a GPU: who gets it, and compiled."""

from __future__ import annotations

import json
import re
from unittest import mock

import pytest
import torch
from alone import run_alone
from compiling import compiling, dumped, under_way

from fla.ops.attn import hopper_forward
from fla.ops.attn.engine import ENGINE, Options
from fla.ops.common import device
from fla.ops.common.dispatch import Problem

LONG = 4096
# What a thread may leave in memory from tile to tile; a block would take 256 bytes
SCRAPS = 64


def operands(T=LONG, D=128, dtype=torch.bfloat16):
    q, k = torch.empty(1, T, 16, D, dtype=dtype), torch.empty(1, T, 2, D, dtype=dtype)
    return q, k, k.clone()


@pytest.mark.parametrize(
    "dtype, D, gate, bounds, window, sink",
    [
        (torch.bfloat16, 128, None, None, None, None),
        (torch.bfloat16, 128, None, None, 1000, torch.float32),
        (torch.float16, 128, None, torch.int32, 1000, None),
        (torch.float16, 128, torch.float32, None, None, torch.float16),
        (torch.bfloat16, 128, torch.float32, torch.int32, None, None),
        (torch.bfloat16, 128, torch.bfloat16, torch.int64, 1000, torch.float32),
        (torch.bfloat16, 64, torch.float32, torch.int32, 1000, torch.float32),
        (torch.bfloat16, 64, None, None, None, None),
    ],
)
def test_compiles(dtype, D, gate, bounds, window, sink, tmp_path):
    """Products are asynchronous, no block is spilled, no tile left before all warps are done."""
    g = None if gate is None else torch.zeros(1, LONG, 16, dtype=gate)
    sink_bias = None if sink is None else torch.zeros(4, dtype=sink)
    cu_seqlens = None if bounds is None else torch.zeros(3, dtype=bounds)
    options = Options(1.0, window)
    with compiling(90) as compiled:
        hopper_forward.forward(*operands(D=D, dtype=dtype), g, sink_bias, cu_seqlens, options)
    kernel = compiled[-1]
    assert len(compiled) == (1 if g is None else 3) and kernel.metadata.shared <= 227 << 10
    order = re.findall(
        r"wgmma\.wait_group\S* \d|bar\.(?:warp\.)?sync|mbarrier\.arrive\.shared", kernel.asm["ptx"]
    )
    assert "wgmma.wait_group.sync.aligned 1" in order
    arrivals = [i for i, each in enumerate(order) if each == "mbarrier.arrive.shared"]
    # but the single warp that says where tiles lie, and that there are no more
    assert len(arrivals) > 2 and sum(order[i - 1] == "bar.warp.sync" for i in arrivals) == 2
    assert all(order[i - 1].startswith("bar.") for i in arrivals)
    # but gates' sums, which stay longer than the keys whose place is given back
    assert under_way(dumped(kernel, tmp_path, "-sass")) in ([], ["LDS.64"] * (gate is not None))
    usage = dumped(kernel, tmp_path, "-res-usage")
    stack = max(map(int, re.findall(r"STACK:(\d+)", usage)))
    tight = gate is not None or (bounds is not None and window is not None)
    assert stack <= (SCRAPS if tight else 0) and "LOCAL:0" in usage, usage


def test_lengths_and_windows_share_a_kernel():
    with compiling(90) as compiled:
        for T, window in ((LONG, 100), (LONG + 1, 1), (2 * LONG, 2000)):
            hopper_forward.forward(*operands(T), None, None, None, Options(1.0, window))
    assert len(compiled) == 1


# The Triton kernels beside it are interpreted.
EMULATED = """
import dataclasses, json, types
from unittest import mock
import torch
from emulated_gluon import emulated
from shapes import shape_of, spec_named
from fla.ops.attn import blocks, engine, hopper_forward as interpreted, triton as portable
from fla.testing.compare import measure

torch.set_num_threads(1)
files = "blocks", "hopper_queries", "hopper_forward"
names = "common.kernels", "common.hopper", *(f"attn.{name}" for name in files)
with emulated(*(f"fla.ops.{name}" for name in names), for_triton=True) as (*_, stage):
    pass
stage.gates, stage.Call, stage.portable = blocks.gates, blocks.Call, portable
needed = {stage.needed_kernel: interpreted.needed_kernel}
stage.launch = lambda kernel, *more: interpreted.launch(needed.get(kernel, kernel), *more)
stage.pays = lambda *call: True
spec = dataclasses.replace(spec_named("parallel_attn"), gradients=())
heads = (128, 128), (96, 72), (64, 64)
calls = [(variant, lengths) for variant in spec.variants if variant != "no window"
         for lengths in ((1,), (129,), (300,), (0, 130, 0, 257, 1, 0), (300, 128, 1, 64, 0, 30))]
for i, (variant, lengths) in enumerate(calls):
    shape = shape_of(lengths, H=1, K=heads[i % 3][0], V=heads[i % 3][1], group=2)
    with (
        mock.patch.object(engine.ENGINE, "stages", lambda *_: stage),
        mock.patch.object(stage, "multiprocessors", lambda device: 1 + i % 4),
        mock.patch.object(stage, "run_forward", wraps=stage.run_forward) as launched,
    ):
        found = measure(spec, shape, variant, torch.float32)
    print(json.dumps([variant, str(shape), launched.call_count, found]), flush=True)

# Tokens of a second sequence, and behind the last one, that nobody may look at
torch.manual_seed(0)
boundaries = torch.tensor([0, 70, 250, 410])
for g in (None, -torch.rand(1, 500, 1)):
    q, k, v = torch.randn(3, 1, 500, 1, 64)
    expected = stage.forward(q, k, v, g, None, boundaries, engine.Options(1.0))[0]
    for x in (q, k, v):
        x[:, 70:250] = x[:, 410:] = torch.nan
    found = stage.forward(q, k, v, g, None, boundaries, engine.Options(1.0))[0]
    for seen in (slice(0, 70), slice(250, None)):
        assert torch.equal(found[:, seen], expected[:, seen])
    assert found[:, 70:250].isnan().all() and not found[:, 410:].any()
"""


def test_emulated():
    """Over a stand-in for Gluon, on operands in fp32, every variant against fp64."""
    calls = [json.loads(line) for line in run_alone("-c", EMULATED).splitlines()]
    assert len(calls) == 40
    for *call, launches, found in calls:
        assert launches and all(error <= bound for error, bound in found.values()), (call, found)


NEEDED = """
from unittest import mock
import torch
from fla.ops.attn import hopper_forward
from fla.ops.attn.blocks import SPAN
from fla.ops.attn.engine import Options

torch.manual_seed(0)
torch.set_num_threads(1)
T, HQ, K, span = 1300, 2, 16, SPAN.value
bounds = torch.tensor([0, 700, 700, 701, 1300], dtype=torch.int32)
fading = torch.nn.functional.logsigmoid(torch.randn(1, T, HQ) + 1)
back_again = torch.full((1, T, HQ), -0.3).index_fill_(1, torch.arange(600, 700), 2.0)
lasting = torch.zeros(1, T, HQ)
tensors = dict.fromkeys(("hopper_forward_kernel", "descriptor", "vectors"), mock.DEFAULT)
for g in (fading, back_again, lasting):
    q, k = torch.randn(1, T, HQ, K), torch.randn(1, T, 1, K)
    with mock.patch.multiple(hopper_forward, pays=lambda *call: True, **tensors) as mocked:
        hopper_forward.forward(q, k, k, g, None, bounds, Options(K**-0.5))
    launched = mocked["hopper_forward_kernel"].__getitem__.return_value.call_args.args
    needed = next(x for x in launched if getattr(x, "dtype", None) == torch.int32)
    assert needed[-1] == 0  # no tile has been taken
    needed = needed[:-1].view(HQ, -1)
    left_out = 0
    for n, (bos, eos) in enumerate(zip(bounds.tolist(), bounds.tolist()[1:])):
        sums = g[0, bos:eos].double().cumsum(0).T
        pair = q[0, bos:eos].double(), k[0, bos:eos, 0].double()
        s = K**-0.5 * torch.einsum("ihd,jd->hij", *pair)
        s += sums[:, :, None] - sums[:, None, :]
        p = s.masked_fill_(torch.ones_like(s).triu(1).bool(), -torch.inf).softmax(-1)
        for h in range(HQ):
            for i in range(0, eos - bos, span):
                first = span * needed[h, bos // span + n + i // span].item()
                left_out += first
                assert 0 <= first <= i and (p[h, i : i + span, :first].sum(-1) < 1e-7).all()
    assert (left_out > 0) == (g is not lasting), left_out
"""


def test_what_is_not_needed_does_not_show():
    """Also where a gate grows again."""
    run_alone("-c", NEEDED)


def test_what_it_does_not_take_goes_to_triton():
    q, k, v = operands()
    unaligned = torch.empty(q.numel() + 1, dtype=q.dtype)[1:]
    gate, bounds = torch.empty(1, LONG, 16), torch.tensor([0, LONG])
    with (
        mock.patch.object(hopper_forward, "run_forward", return_value="hopper"),
        mock.patch.object(hopper_forward, "gates", return_value=(None, None)),
        mock.patch.object(hopper_forward.portable, "forward", return_value="triton"),
    ):
        options = Options(1.0)
        assert hopper_forward.forward(q, k, v, None, None, None, options) == "hopper"
        assert hopper_forward.forward(q, k, v, None, q[0, 0, :, 0], None, options) == "hopper"
        assert hopper_forward.forward(q, k, v, None, None, None, Options(-1.0, 9)) == "hopper"
        assert hopper_forward.forward(q, k, v, gate, None, None, options) == "hopper"
        assert hopper_forward.forward(q, k, v, None, None, bounds, options) == "hopper"
        few = (x[:, :, :2] for x in (q, k, v))
        assert hopper_forward.forward(*few, None, None, None, options) == "triton"
        moved = unaligned.view_as(q)
        assert hopper_forward.forward(moved, k, v, None, None, None, options) == "triton"


@pytest.mark.parametrize(
    "B, T, K, V, gated, sequences, takes",
    [
        (1, 4096, 128, 128, False, None, True),
        (1, 4096, 128, 128, True, None, True),
        (8, 512, 128, 96, True, None, True),
        (9, 511, 128, 128, False, None, False),
        (7, 512, 128, 128, False, None, False),
        (2, 4096, 64, 64, False, None, True),
        (2, 4095, 64, 64, False, None, False),
        (2, 4095, 128, 64, False, None, False),
        (2, 2048, 64, 64, True, None, True),
        (3, 2047, 64, 128, True, None, False),
        (1, 4096, 128, 128, False, 64, True),
        (1, 4096, 128, 128, True, 16, True),
        (1, 4096, 128, 128, True, 17, False),
        (1, 4096, 64, 64, False, 64, True),
        (1, 4096, 64, 64, True, 8, True),
        (1, 4096, 64, 64, True, 9, False),
    ],
)
def test_which_calls_it_takes(B, T, K, V, gated, sequences, takes):
    q, v = torch.empty(B, T, 16, K, device="meta"), torch.empty(B, T, 2, V, device="meta")
    bounds = None if sequences is None else torch.empty(sequences + 1, device="meta")
    assert hopper_forward.pays(q, v, q if gated else None, bounds) == takes


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
    assert reason(K=64, V=128) is None
    assert reason(kind="cpu") == "kernels run on CUDA tensors, these are on cpu"
    assert reason(capability=(10, 0)) == "made for sm_90 alone"
    assert reason(torch.float32) == "takes fp16 and bf16, not torch.float32"
    assert reason(version="3.7.0") == "not verified with Triton 3.7.0"
    assert reason(version="3.60.0") == "not verified with Triton 3.60.0"
    for K, V in ((56, 128), (128, 32), (256, 128), (100, 128)):
        assert reason(K=K, V=V) == f"takes heads of 64 to 128 in steps of 8, not {K} and {V}"
