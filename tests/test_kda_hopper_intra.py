"""Chunks' operands and pairs on Hopper without a GPU: emulated, compiled, and who gets them."""

from __future__ import annotations

import json
import re
from unittest import mock

import kda_operands
import pytest
import torch
from alone import run_alone
from compiling import compiling, dumped, usage_of

from fla.ops.kda import hopper, hopper_halving, hopper_intra, launches

EMULATED = """
import json, torch
from emulated_gluon import emulated
from kda_operands import call_of, errors, operands

torch.set_num_threads(1)
names = (
    "slots", "activations", "halving", "hopper_tiles", "hopper_intra", "hopper_pairs",
    "hopper_gradients",
)
names += "hopper_halving", "hopper"
names = ("common.hopper", "common.kernels", *(f"kda.{name}" for name in names))
with emulated(*(f"fla.ops.{name}" for name in names), for_triton=True) as (*_, halving, hopper):
    pass
halving.wide = lambda x: x.to(torch.float32)
halving.narrow = lambda x: (x.to(torch.bfloat16), x.to(torch.bfloat16).to(torch.float32))


def products_of_eight(m_0, m_1, b_high, b_low):
    # as the threads of a warp have masks [token, query] and results [channel, query]
    x, *masks = (
        each.to(torch.float32).x.unflatten(1, (2, 8)).unflatten(3, (-1, 8))
        for each in (b_high.to(torch.float32) + b_low.to(torch.float32), m_0, m_1)
    )
    sums = (torch.einsum("bhlni,bhlnc->bhcni", m, x) for m in masks)
    return [type(b_high)(each.reshape(b_high.shape)) for each in sums]


halving.products_of_eight = products_of_eight


def made(arguments, options, bounds=None):
    call, pairs = call_of(hopper.Call, arguments, options, bounds)
    call.make_operands(pairs=True)
    if not call.all_near:
        call.halve()
    return call, pairs


bounds = [0, 0, 65, 66, 66, 130]
for shape, at in (
    ({"T": 15, "K": 64}, None),
    ({"T": 130, "K": 64}, None),
    ({"T": 65, "K": 128, "gate": "softplus"}, None),
    ({"T": 70, "K": 64, "gate": "mixed", "HV": 2, "B": 2, "dtype": torch.float32}, None),
    ({"T": 150, "K": 64, "gate": "mixed"}, bounds),
    ({"T": 100, "K": 64, "gate": "growing"}, None),
):
    print(json.dumps([str(shape), errors(*made(*operands(**shape), at), at, True)]), flush=True)

# Operands alone are the same, and what lies beside a sequence is not read.
arguments, options = operands(150, 64, "mixed")
first, _ = made(arguments, options, bounds)
for x in arguments[:5]:
    x[:, 65:66] = x[:, 130:] = torch.nan
again, _ = call_of(hopper.Call, arguments, options, bounds)
again.make_operands(pairs=False)
for name in ("q_in", "k_in", "k_out", "decay", "betas", "factors"):
    x, y = getattr(first, name).tensor(), getattr(again, name).tensor()
    for slot in (1, 2, 5):  # of the tokens before 65, and from 66 to 130
        assert torch.equal(x[slot], y[slot]), name

# A later token changes nothing before it.
arguments, options = operands(64, 64, "mixed")
first, pairs = made(arguments, options)
for at in (1, 17, 40):
    for decay in (-1e4, 3.0):
        changed = [x if x is None else x.clone() for x in arguments]
        for i in range(5):
            changed[i][:, at] = decay if i == 3 else 3.0
        again, others = made(changed, options)
        for name in ("q_in", "k_in"):
            x, y = getattr(first, name).tensor(), getattr(again, name).tensor()
            assert torch.equal(x[..., :at, :], y[..., :at, :])
        assert torch.equal(pairs[..., :at, :], others[..., :at, :])
"""


def test_emulated():
    """In a process with a stand-in for Gluon."""
    printed = run_alone("-c", EMULATED)
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("[")]
    assert len(found) == 6
    for shape, errors in found:
        wrong = {name: x for name, x in errors.items() if not x <= kda_operands.BOUNDS[name]}
        assert not wrong, (shape, wrong)


def compiled_for(T=128, bounds=None, **more):
    arguments, options = kda_operands.operands(T, **more)
    call, _ = kda_operands.call_of(hopper.Call, arguments, options, bounds)
    call.make_operands(pairs=True)
    call.make_operands(pairs=False)


@pytest.mark.parametrize(
    "more",
    [
        {"K": 128},
        {"K": 128, "gate": "softplus", "dtype": torch.float32, "bounds": [0, 128]},
        {"K": 64, "gate": "mixed", "HV": 2},
        {"K": 64, "gate": "growing", "dtype": torch.float16},
    ],
)
def test_compiles(more, tmp_path):
    """Two programs, or four, share a multiprocessor, and products follow without a wait."""
    with compiling(90) as compiled:
        compiled_for(**more)
    side_by_side = 256 // more["K"]
    assert len(compiled) == 2
    for kernel in compiled:
        assert kernel.metadata.shared <= (227 << 10) // side_by_side - 1024
        registers, stack = usage_of(kernel, tmp_path)
        assert registers <= hopper_intra.REGISTERS and stack <= 64
        code = dumped(kernel, tmp_path, "-sass")
        assert len(re.findall(r"WARPGROUP\.DEPBAR", code)) <= 4  # one a product
        # a part of an allocation lies elsewhere when it is looked at as another type
        looked_at = re.findall(r"memdesc_reinterpret .*?mutable(.*?)> ->", kernel.asm["ttgir"])
        assert looked_at and not any(looked_at)


@pytest.mark.parametrize(
    "more",
    [
        {"K": 128, "gate": "softplus", "dtype": torch.float32, "bounds": [0, 128]},
        {"K": 64, "gate": "mixed", "HV": 2},
    ],
)
def test_halving_compiles(more, tmp_path):
    """Nothing but what is copied, and biases, passes through shared memory."""
    bounds = more.pop("bounds", None)
    call, _ = kda_operands.call_of(hopper.Call, *kda_operands.operands(128, **more), bounds)
    with compiling(90) as compiled:
        call.halve()
    (kernel,) = compiled
    side_by_side = 4 if call.g.dtype == torch.bfloat16 else 3
    assert kernel.metadata.shared <= (227 << 10) // side_by_side - 1024
    assert kernel.asm["ttgir"].count("ttg.local_store") == (call.dt_bias is not None)
    registers, stack = usage_of(kernel, tmp_path)
    assert registers <= hopper_halving.REGISTERS and stack <= 64


def test_other_lengths_compile_nothing_new():
    with compiling(90) as compiled:
        for T in (1, 64, 65, 500):
            compiled_for(T, K=64)
    assert len(compiled) == 2


def test_what_it_does_not_take_goes_to_triton():
    def maker(K=128, move=None, dtype=torch.bfloat16):
        arguments, options = kda_operands.operands(70, K)
        arguments = [x.to(dtype) if i < 3 else x for i, x in enumerate(arguments)]
        if move is not None:
            x = arguments[move]
            arguments[move] = x.new_zeros(x.numel() + 1)[1:].view_as(x)
        call, _ = kda_operands.call_of(hopper.Call, arguments, options)
        with (
            mock.patch.object(hopper, "run_intra") as by_hopper,
            mock.patch.object(launches, "launch") as by_triton,
        ):
            call.make_operands(pairs=True)
        assert by_hopper.called != by_triton.called
        return "hopper" if by_hopper.called else "triton"

    assert maker() == maker(K=64) == "hopper"
    assert maker(K=96) == maker(K=256) == maker(dtype=torch.float16) == "triton"
    assert maker(move=0) == maker(move=1) == maker(move=3) == "triton"
