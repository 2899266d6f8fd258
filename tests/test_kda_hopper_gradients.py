"""The delta engine's gradients for Hopper without a GPU: emulated and compiled."""

from __future__ import annotations

import json
import re
from unittest import mock

import pytest
import torch
from alone import run_alone
from compiling import compiling, usage_of
from interpreted_kda import operands

from fla.ops.kda import hopper, launches
from fla.ops.kda.chunk_gradients import unit_kernel

# Launchers of other kernels, which are not launched here
OTHERS = dict.fromkeys(("run_intra", "run_halving", "run_scan"), mock.DEFAULT)
FP32 = 1e-4  # the contract's
# Triton's kernels run in its interpreter, those for Hopper over a stand-in for Gluon, in fp32
EMULATED = """
import json, torch
from unittest import mock
import emulated_gluon
from interpreted_kda import NAMES, operands, wide
from fla.ops.common.workspace import as_tensor
from fla.ops.kda import eager, launches, triton as portable
from fla.testing.compare import relative_error

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # so that what is never written is NaN
modules = emulated_gluon._modules()
modules["triton.experimental.gluon.language"].bfloat16 = torch.float32
stages = "kda.hopper_gradients", "kda.hopper_states", "kda.hopper"
helpers = "slots", "activations", "halving", "hopper_tiles", "hopper_intra", "hopper_pairs"
names = "common.kernels", "common.hopper", *(f"kda.{name}" for name in helpers), *stages
with (
    mock.patch.object(emulated_gluon, "_modules", lambda: modules),
    emulated_gluon.emulated(*(f"fla.ops.{name}" for name in names), for_triton=True) as loaded,
):
    within, across, hopper = loaded[-3:]
within.wide, within.narrow = lambda x: x, lambda x: (x, x)
within.launch = across.launch = (
    lambda kernel, programs, tensors, numbers, constants: kernel[(programs,)](
        *map(as_tensor, tensors), *numbers, **constants
    )
)

class Call(hopper.Call):
    def _takes_gradients(self):
        return True

    def _takes_chunks(self, *_):
        return False

    _takes_scan = _takes_chunks

cases = (
    {"T": 1, "K": 64, "V": 64},
    {"T": 63, "K": 64, "V": 128, "gate": "raw", "lower_bound": -5.0, "beta_sigmoid": True},
    {"T": 65, "K": 128, "V": 64, "gate": "mixed", "H": 1, "HV": 2},
    {"T": 130, "K": 64, "V": 64, "gate": "raw", "lower_bound": -40.0, "B": 2},
    # with tokens of no sequence
    {"T": 170, "K": 64, "V": 64, "lengths": (0, 33, 0, 64, 1, 0), "gate": "raw"},
    {"T": 35, "K": 64, "V": 64, "lengths": (20, 2), "gate": "raw", "H": 1, "HV": 2},
    {"T": 70, "K": 128, "V": 64, "gate": "growing", "beta_sigmoid": True, "neg_eigval": True},
    {"T": 70, "K": 64, "V": 64, "gate": "slow", "qk_l2norm": False},
    # gates nearly open, of gradients that are small, as of a mean over many tokens, or large
    {"T": 64, "K": 64, "V": 64, "gate": "raw", "lower_bound": -5.0, "open": 3.0, "size": 2.0**-40},
    {"T": 64, "K": 64, "V": 64, "gate": "raw", "lower_bound": -5.0, "open": 3.0, "size": 2.0**40},
    # log-decays of -1e4, which would carry digits lost in their gradients into A_log's
    {"T": 64, "K": 64, "V": 64, "gate": "raw", "open": -6.0, "steepest": 1e4, "size": 2.0**-40},
    {"T": 64, "K": 64, "V": 64, "gate": "raw", "open": -6.0, "steepest": 1e4, "size": 2.0**40},
)
for case in cases:
    size, opened, steepest = (case.pop(name, None) for name in ("size", "open", "steepest"))
    size = size or 1.0
    arguments, do, dstate = operands(**case)
    if opened is not None:
        arguments[3].mul_(0.3).add_(opened)
    if steepest is not None:
        arguments[3][:, 9::16] = steepest
    with mock.patch.object(launches, "chunk", lambda *sizes: 64):
        found = portable.backward(do * size, dstate * size, *arguments, made_by=Call)
    expected = eager.backward(do.double(), dstate.double(), *wide(arguments))
    errors = {
        name: relative_error(x / size, y) for name, x, y in zip(NAMES, found, expected) if y.numel()
    }
    print(json.dumps([str(case), errors]), flush=True)
"""


def test_emulated():
    printed = run_alone("-c", EMULATED)
    calls = [json.loads(line) for line in printed.splitlines()]
    assert len(calls) == 12
    for case, errors in calls:
        assert {"q", "k", "v", "g", "beta"} <= errors.keys() and max(errors.values()) < FP32, (
            case,
            errors,
        )


# Kernels that are not made for Hopper
NO_OTHERS = mock.patch.multiple(
    launches, launch=mock.DEFAULT, parameters_backward=lambda *_: (None, None)
)


def call(T=64, K=128, **more):
    """A backward pass whose kernels for Hopper alone are launched."""
    arguments, do, dstate = operands(T, K, K, torch.bfloat16, **more)
    with NO_OTHERS, mock.patch.multiple(hopper, **OTHERS):
        hopper.backward(do, dstate, *arguments)


@pytest.mark.parametrize(
    "more",
    [
        {"gate": "raw", "lower_bound": -5.0},
        {"gate": "raw", "lengths": (0, 40, 24), "HV": 2},
        {"K": 64, "gate": "slow"},
        {"K": 64, "gate": "slow", "qk_l2norm": False},
    ],
)
def test_compiles(more, tmp_path):
    """Two programs fit, little is spilled, and warps seldom wait for each other."""
    with compiling(90) as compiled:
        call(**more)
    names = [kernel.metadata.name for kernel in compiled]
    assert names == ["hopper_states_kernel", "hopper_gradients_kernel"]
    for kernel in compiled:
        assert 2 * (kernel.metadata.shared + 1024) <= 228 << 10
        assert "mma.sync.aligned.m16n8k16" in kernel.asm["ptx"]
        assert len(re.findall(r"bar\S*\.sync", kernel.asm["ptx"])) < 32
        assert usage_of(kernel, tmp_path)[1] <= 64


def test_other_lengths_compile_nothing_new():
    with compiling(90) as compiled:
        for T in (1, 64, 65, 500):
            call(T)
    assert len(compiled) == 2


def test_norms_need_no_kernel_of_their_own():
    """Unless value heads share a key, whose gradients they sum."""

    def launched(**more):
        arguments, do, dstate = operands(64, 64, 64, torch.bfloat16, **more)
        with (
            mock.patch.object(launches, "launch") as launch,
            mock.patch.multiple(hopper, **OTHERS),
            mock.patch.multiple(hopper, run_states=mock.DEFAULT, run_gradients=mock.DEFAULT),
        ):
            hopper.backward(do, dstate, *arguments)
        return unit_kernel in [call.args[0] for call in launch.call_args_list]

    assert launched(HV=2) and not launched() and not launched(qk_l2norm=False)


def test_what_it_does_not_take_goes_to_triton():
    def launched(K=128, V=64, dtype=torch.bfloat16, moved=False, **more):
        (q, *rest), do, dstate = operands(64, K, V, dtype, **more)
        if moved:
            q = torch.zeros(q.numel() + 1, dtype=dtype)[1:].view_as(q)
        with (
            mock.patch.multiple(hopper, **OTHERS),
            mock.patch.multiple(hopper, run_states=mock.DEFAULT, run_gradients=mock.DEFAULT) as own,
            NO_OTHERS,
        ):
            hopper.backward(do, dstate, q, *rest)
        across, within = (own[name].called for name in ("run_states", "run_gradients"))
        assert across == within
        return within

    assert launched() and launched(K=64, V=128)
    assert not (launched(K=96) or launched(K=256) or launched(V=256))
    assert not (launched(dtype=torch.float16) or launched(moved=True))
