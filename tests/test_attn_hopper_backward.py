"""The softmax engine's backward kernel for Hopper without a GPU: who gets it, and compiled."""

from __future__ import annotations

import itertools
import json
import re
from unittest import mock

import pytest
import torch
from alone import run_alone
from compiling import compiling, dumped, under_way

from fla.ops.attn import hopper_backward
from fla.ops.attn.engine import Options

LONG = 8192
# What a thread may leave in memory between steps: addresses, but no block
SCRAPS = 160
# Triton's kernels run in its interpreter, that for Hopper over a stand-in for Gluon
EMULATED = """
import itertools, json, torch
from unittest import mock
from emulated_gluon import TensorDescriptor, Value, emulated
from emulated_shared import new
from fla.ops.attn import blocks, eager, hopper_backward as stage
from fla.ops.attn.engine import Options
from fla.testing.compare import relative_error

torch.set_num_threads(1)
names = "common.kernels", "attn.blocks", "common.hopper", "attn.hopper_steps", "attn.hopper_keys"
with emulated(*(f"fla.ops.{name}" for name in names), for_triton=True) as (*_, hopper, _, keys):
    keys.power_of_logit = lambda x: Value(torch.exp2(x.x))
stage.hopper_backward_kernel, stage.descriptor = keys.hopper_backward_kernel, hopper.descriptor
stage.TensorDescriptor = TensorDescriptor
stage.pays = lambda *call: True

products = 0
start = keys.product_with_keys
def counted(i_w, m, wanted, k_tiles, column_tiles, ds_0, ds_1, ready):
    global products
    products += 1
    if not wanted:  # of anything, perhaps of what another is about to store; nobody uses it
        ds_0 = ds_1 = new(ds_0.dtype, ds_0.shape)
    return start(i_w, m, wanted, k_tiles, column_tiles, ds_0, ds_1, ready)
keys.product_with_keys = counted

def poison(x):
    return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(-1)

def back_again(g):  # what some forget, others see again
    g = torch.full_like(g, -0.4)
    g[:, g.shape[1] // 2 :][:, :40] = 2.0
    return g

gates = {
    "none": lambda g: None,
    "mild": lambda g: torch.nn.functional.logsigmoid(g + 4),
    "forgetful": torch.nn.functional.logsigmoid,
    "growing": lambda g: g / 5,
    "steep": lambda g: torch.where(torch.arange(g.shape[1])[:, None] % 37 > 0, g / 1e3, -1e4),
    "back again": back_again,
}
packed = 0, 130, 0, 1, 70, 0
calls = (
    ((1, 1, 1, 1), "none", False, None, ()), ((2, 15, 2, 1), "none", False, None, ()),
    ((1, 64, 2, 2), "none", True, None, ()), ((2, 65, 2, 1), "none", False, None, ()),
    ((2, 127, 2, 1), "none", True, None, ()), ((1, 300, 4, 2), "none", False, None, ()),
    ((1, 1, 2, 1), "mild", True, None, ()), ((1, 64, 2, 1), "mild", False, None, ()),
    ((2, 129, 2, 1), "mild", True, None, ()), ((1, 300, 4, 2), "mild", False, None, ()),
    ((1, 260, 2, 1), "steep", False, None, ()), ((1, 700, 2, 1), "growing", True, None, ()),
    ((1, 700, 2, 1), "forgetful", False, None, ()),
    ((1, 1000, 2, 1), "back again", False, None, ()),
    ((2, 200, 2, 1), "none", False, 2, ()), ((1, 300, 4, 2), "mild", True, 64, ()),
    ((2, 200, 2, 1), "mild", False, 2, ()), ((1, 300, 4, 2), "none", True, 64, ()),
    ((1, 513, 2, 1), "none", False, 129, ()), ((1, 513, 6, 2), "none", False, 190, ()),
    ((1, 700, 2, 1), "none", False, 256, ()), ((1, 270, 4, 2), "none", True, 50, packed),
    ((1, 513, 2, 1), "mild", False, 129, ()), ((1, 513, 2, 1), "growing", False, 190, ()),
    ((2, 260, 2, 1), "mild", True, 70, ()), ((1, 700, 2, 1), "mild", False, 256, ()),
    ((1, 700, 2, 1), "forgetful", False, 500, ()),
    ((1, 201, 2, 1), "none", False, None, packed), ((1, 270, 2, 1), "mild", True, 50, packed),
    ((1, 330, 2, 1), "none", False, None, (0, 0, 256, 0)),
    ((1, 330, 4, 2), "mild", True, None, packed),
    ((1, 500, 2, 1), "mild", False, 90, (1, 300, 2, 129)),
    ((1, 901, 2, 1), "forgetful", True, None, (200, 700)),
)
for i, ((B, T, HQ, H), gate, sink, window, lengths) in enumerate(calls):
    D = 64 if i % 3 == 1 else 128
    torch.manual_seed(T)
    live = sum(lengths) if lengths else T
    do, q = torch.randn(2, B, T, HQ, D)
    k, v = torch.randn(2, B, T, H, D)
    sink_bias = torch.randn(HQ) if sink else None
    g = gates[gate](torch.randn(B, T, HQ))
    bounds = torch.tensor([0, *itertools.accumulate(lengths)]) if lengths else None
    options = Options(0.1, window)

    def cut(x):
        return None if x is None else x[:, :live]

    given = *map(cut, (q, k, v, g)), sink_bias, bounds
    o, lse = eager.forward(*given, options)
    expected = eager.backward(cut(do), *given, o, lse, options)
    # neither what lies behind the last sequence nor what is not written may show
    for x in (do, q, k, v, *(() if g is None else (g,))):
        x[:, live:] = torch.nan
    o = torch.nn.functional.pad(o, (0, 0, 0, 0, 0, T - live), value=torch.nan)
    lse = torch.nn.functional.pad(lse, (0, T - live), value=torch.nan)
    products = 0
    with mock.patch.object(torch, "empty_like", lambda x, **_: poison(x.clone())):
        found = stage.backward(do, q, k, v, g, sink_bias, bounds, o, lse.contiguous(), options)
    # of each step, in both partitions, and one at their ends
    sizes = lengths or B * (T,)
    programs = sum(-(-size // 128) for size in sizes)
    pairs = sum(
        i // 128 + 1 - max(i - (window or T) + 1, 0) // 128
        for size in sizes
        for i in range(0, size, 64)
    )
    steps = products // 2 - programs * H
    # the only key of one token has no gradient
    errors = [
        relative_error(cut(x) if y.dim() > 1 else x, y)
        for x, y in list(zip(found, expected))[2 if live == 1 else 0 :]
    ]
    behind = sum(float(x[:, live:].abs().sum()) for x in found if x.dim() > 1)
    case = f"{B, T, HQ, H} {D} {gate} {window} {lengths}"
    print(json.dumps([case, errors, behind, steps / max(pairs * HQ, 1)]), flush=True)
"""


# Inside, calls go there whether that was measured to pay or not
ALL = mock.patch.object(hopper_backward, "pays", lambda *call: True)


def operands(
    B=1, T=LONG, HQ=32, H=8, D=128, dtype=torch.bfloat16, gate=None, sink=None, lengths=()
):
    """do, q, k, v, then what a call may have beside them, o and lse."""
    q = torch.empty(B, T, HQ, D, dtype=dtype)
    k = torch.empty(B, T, H, D, dtype=dtype)
    g = None if gate is None else torch.empty(B, T, HQ, dtype=gate)
    sink_bias = None if sink is None else torch.empty(HQ, dtype=sink)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)]) if lengths else None
    return q, q, k, k, g, sink_bias, bounds, q, torch.empty(B, HQ, T)


@pytest.mark.parametrize(
    "D, dtype, gate, sink, window, lengths",
    [
        (128, torch.bfloat16, None, None, None, ()),
        (128, torch.float16, None, torch.float32, None, ()),
        (128, torch.bfloat16, None, None, 1024, ()),
        (128, torch.float16, None, torch.float32, 1024, (LONG,)),
        (128, torch.bfloat16, torch.float32, None, None, ()),
        (128, torch.bfloat16, torch.float32, None, 1024, ()),
        (128, torch.bfloat16, None, torch.float32, None, (LONG,)),
        (128, torch.bfloat16, torch.float32, None, None, (LONG,)),
        (128, torch.float16, torch.bfloat16, torch.float16, 1024, (LONG,)),
        (64, torch.bfloat16, None, None, None, ()),
        (64, torch.float16, torch.float32, torch.float16, 1024, (LONG,)),
    ],
)
def test_compiles(D, dtype, gate, sink, window, lengths, tmp_path):
    """What shared memory holds fits, and products run while others are waited for."""
    with compiling(90) as compiled, ALL:
        given = operands(D=D, dtype=dtype, gate=gate, sink=sink, lengths=lengths)
        hopper_backward.backward(*given, Options(1.0, window))
    names = ["rows_kernel", "hopper_backward_kernel", "dq_kernel"]
    if gate is not None:
        names = ["gates_kernel", *names, "gate_kernel"]
    assert [each.metadata.name for each in compiled] == names
    kernel = compiled[names.index("hopper_backward_kernel")]
    assert kernel.metadata.shared <= 227 << 10
    code, usage = (dumped(kernel, tmp_path, what) for what in ("-sass", "-res-usage"))
    assert not under_way(code)
    # where registers do not suffice, the assembler waits for every single product
    assert 0 < 4 * code.count("WARPGROUP.DEPBAR") < code.count("HGMMA")
    assert max(map(int, re.findall(r"STACK:(\d+)", usage))) <= SCRAPS, usage
    # what partitions are given is written where the last of its parts has been read by all warps
    shared = kernel.asm["ptx"].split("barrier.sync")[0].rpartition("ld.shared")[2]
    assert 0 < shared.find("bar.sync") < shared.find("st.shared")
    # both halves of dq by copies that add, what else is summed by elements
    assert code.count("UTMAREDG.4D.ADD") == 2
    assert code.count("REDG.E.ADD") == (0 if gate is None else 2)


def test_emulated():
    """Partitions meet as they should, what they compute is right, and what is not needed left."""
    printed = run_alone("-c", EMULATED)
    found = [json.loads(line) for line in printed.splitlines()]
    assert len(found) == 33
    for case, errors, behind, share in found:
        assert errors and all(error < 1e-5 for error in errors), (case, errors)
        assert behind == 0, case
        left_out = "forgetful" in case or "back again" in case or "steep" in case
        assert share < 1 if left_out else share == 1, (case, share)


def test_lengths_share_a_kernel():
    with compiling(90) as compiled:
        for T in (LONG, LONG + 1, 2 * LONG):
            hopper_backward.backward(*operands(T=T), Options(1.0))
    assert len(compiled) == 3
    with compiling(90) as compiled, ALL:
        for T in (LONG, LONG + 1, 2 * LONG):
            given = operands(T=T, gate=torch.float32, lengths=(T // 2, 0))
            hopper_backward.backward(*given, Options(1.0, T // 4))
    assert len(compiled) == 5


@pytest.mark.parametrize(
    "sizes, options, takes",
    [
        ({}, Options(1.0), True),
        ({}, Options(-1.0, LONG), True),
        ({}, Options(1.0, 128), True),
        ({}, Options(1.0, 127), False),
        ({"lengths": (1300, 0, 6892)}, Options(1.0), True),
        ({"lengths": (1300, 0, 6892)}, Options(1.0, 128), True),
        ({"lengths": 17 * (0,)}, Options(1.0), False),
        ({"B": 2, "T": 4097, "HQ": 8}, Options(1.0), True),
        ({"gate": torch.float32}, Options(1.0), True),
        ({"gate": torch.float32}, Options(1.0, 512), True),
        ({"gate": torch.float32}, Options(1.0, 511), False),
        ({"lengths": 16 * (0,), "gate": torch.float32}, Options(1.0), True),
        ({"lengths": 17 * (0,), "gate": torch.float32}, Options(1.0), False),
        ({"B": 8, "T": 512}, Options(1.0), True),
        ({"B": 16, "T": 511}, Options(1.0), False),
        ({"T": 4096}, Options(1.0), True),
        ({"T": 3968}, Options(1.0), False),
        ({"D": 64}, Options(1.0), True),
        ({"D": 64, "T": 4096, "H": 16}, Options(1.0), True),
        ({"D": 64, "T": 4096, "H": 8}, Options(1.0), False),
        ({"D": 64, "T": 4095, "H": 32}, Options(1.0), False),
        ({"D": 64}, Options(1.0, 1024), False),
        ({"D": 64, "lengths": 8 * (0,)}, Options(1.0), True),
        ({"D": 64, "lengths": 9 * (0,)}, Options(1.0), False),
        ({"D": 64, "gate": torch.float32}, Options(1.0, 1024), True),
        ({"D": 64, "gate": torch.float32}, Options(1.0, 1023), False),
        ({"D": 96}, Options(1.0), False),
        ({"dtype": torch.float16}, Options(1.0), True),
        ({"sink": torch.float32}, Options(1.0), True),
    ],
)
def test_who_gets_it(sizes, options, takes):
    assert chosen(*operands(**sizes), options) == ("hopper" if takes else "triton")


def test_what_begins_anywhere_goes_to_triton():
    given = list(operands())
    given[2] = torch.empty(given[2].numel() + 1, dtype=torch.bfloat16)[1:].view_as(given[2])
    assert chosen(*given, Options(1.0)) == "triton"


def chosen(*arguments):
    made = []

    def run(_, do, q, k, v, *rest):
        made.append("hopper")
        return q.clone(), k, v, None, None

    with (
        mock.patch.object(hopper_backward, "gates", lambda *_: (None, None)),
        mock.patch.object(hopper_backward, "run_backward", run),
        mock.patch.object(hopper_backward.portable, "backward", lambda *_: made.append("triton")),
    ):
        hopper_backward.backward(*arguments)
    (name,) = made
    return name
