"""The softmax engine's backward kernel for Hopper without a GPU: who gets it, and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from compiling import compiling, dumped

from fla.ops.attn import hopper_backward
from fla.ops.attn.engine import Options

LONG = 8192
# Triton's kernels run in its interpreter, that for Hopper over a stand-in for Gluon
EMULATED = """
import json, torch
from emulated_gluon import Value, emulated
from fla.ops.attn import blocks, eager
from fla.ops.attn.engine import Options
from fla.testing.compare import relative_error

torch.set_num_threads(1)
with emulated("fla.ops.common.hopper", "fla.ops.attn.hopper_backward") as (*_, stage):
    stage.power = lambda x: Value(torch.exp2(x.x))

for B, T, HQ, H in (
    (1, 1, 1, 1), (2, 15, 2, 1), (1, 63, 2, 2), (1, 64, 2, 1), (1, 65, 2, 1), (2, 127, 2, 1),
    (1, 128, 3, 1), (1, 129, 2, 1), (1, 300, 4, 2),
):
    torch.manual_seed(T)
    do, q = torch.randn(2, B, T, HQ, 128)
    k, v = torch.randn(2, B, T, H, 128)
    given = q, k, v, None, None, None
    o, lse = eager.forward(*given, Options(0.1))
    expected = eager.backward(do, *given, o, lse, Options(0.1))[:3]
    call = blocks.Call(q, v, None, 0.1, None)
    found = stage.run_backward(call, do, q, k, v, o, lse.contiguous())
    # the only key of one token has no gradient
    pairs = list(zip(found, expected))[2 if T == 1 else 0 :]
    print(json.dumps([str((B, T, HQ, H)), [relative_error(x, y) for x, y in pairs]]))
"""


def operands(B=1, T=LONG, HQ=32, H=8, D=128, dtype=torch.bfloat16):
    """do, q, k, v, then what a call may have beside them, o and lse."""
    q = torch.empty(B, T, HQ, D, dtype=dtype)
    k = torch.empty(B, T, H, D, dtype=dtype)
    return q, q, k, k, None, None, None, q, torch.empty(B, HQ, T)


def test_compiles(tmp_path):
    """What shared memory holds fits, and products run while others are waited for."""
    with compiling(90) as compiled:
        hopper_backward.backward(*operands(), Options(1.0))
    names = [each.metadata.name for each in compiled]
    assert names == ["rows_kernel", "hopper_backward_kernel", "dq_kernel"]
    kernel = compiled[1]
    assert kernel.metadata.shared <= 227 << 10
    code = dumped(kernel, tmp_path, "-sass")
    # where registers do not suffice, the assembler waits for every single product
    assert 0 < 4 * code.count("WARPGROUP.DEPBAR") < code.count("HGMMA")
    # what partitions are given is written where the ticket has been read by all warps
    shared = kernel.asm["ptx"].split("barrier.sync")[0].rpartition("ld.shared")[2]
    assert 0 < shared.find("bar.sync") < shared.find("st.shared")
    # four elements of a sum at once
    assert code.count("REDG.E.ADD.F32x4") == 2 * 4096 // (4 * 32)


def test_emulated():
    """Partitions meet as they should, and what they compute together is right."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    command = [sys.executable, "-c", EMULATED]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == 9
    for case, errors in found:
        assert errors and all(error < 1e-5 for error in errors), (case, errors)


def test_lengths_share_a_kernel():
    with compiling(90) as compiled:
        for T in (LONG, LONG + 1, 2 * LONG):
            hopper_backward.backward(*operands(T=T), Options(1.0))
    assert len(compiled) == 3


@pytest.mark.parametrize(
    "sizes, options, takes",
    [
        ({}, Options(1.0), True),
        ({}, Options(-1.0, LONG), True),
        ({"B": 2, "T": 4097, "HQ": 8}, Options(1.0), True),
        ({}, Options(1.0, LONG - 1), False),
        ({"T": 4095, "H": 32}, Options(1.0), False),
        ({"T": 4096}, Options(1.0), False),
        ({"D": 96}, Options(1.0), False),
        ({"dtype": torch.float16}, Options(1.0), False),
    ],
)
def test_who_gets_it(sizes, options, takes):
    assert chosen(*operands(**sizes), options) == ("hopper" if takes else "triton")


@pytest.mark.parametrize("place", [4, 5, 6])
def test_options_go_to_triton(place):
    given = list(operands())
    given[place] = torch.empty(1)
    assert chosen(*given, Options(1.0)) == "triton"


def test_what_begins_anywhere_goes_to_triton():
    given = list(operands())
    given[2] = torch.empty(given[2].numel() + 1, dtype=torch.bfloat16)[1:].view_as(given[2])
    assert chosen(*given, Options(1.0)) == "triton"


def chosen(*arguments):
    made = []

    def run(_, do, q, k, v, *rest):
        made.append("hopper")
        return q.clone(), k, v

    with (
        mock.patch.object(hopper_backward, "run_backward", run),
        mock.patch.object(hopper_backward.portable, "backward", lambda *_: made.append("triton")),
    ):
        hopper_backward.backward(*arguments)
    (name,) = made
    return name
