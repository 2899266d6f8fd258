"""Chunks' operands and pairs on Hopper on a GPU.

Run as a program it makes a few small calls, for compute-sanitizer.
"""

from __future__ import annotations

import contextlib

import kda_calls
import kda_operands
import pytest
import sanitizer
import torch
from on_gpu import check
from on_hopper import launched_from, marks, verified

from fla.ops import chunk_kda
from fla.ops.common.dispatch import use
from fla.ops.kda import hopper, hopper_halving, hopper_intra
from fla.ops.kda import triton as portable
from fla.testing.compare import relative_error

pytestmark = marks
CALLS = [
    call
    for call in kda_calls.chunked()
    if call.dtype == torch.bfloat16 and call.K in (64, 128) and not call.segments
]
GATES = ("bound", "softplus", "mixed", "growing")
BOUNDS = (None, [0, 0, 65, 66, 66, 300])


@contextlib.contextmanager
def on_hopper():
    """Inside, the kernel runs, whether verified or not; yields its launches."""
    with (
        verified("delta"),
        launched_from(hopper_intra, hopper_halving) as launched,
    ):
        yield launched


def made(bounds=None, made=False, **more):
    arguments, options = kda_operands.operands(device="cuda", **more)
    call, pairs = kda_operands.call_of(hopper.Call, arguments, options, bounds)
    call.make_operands(pairs=not made)
    if not made and not call.all_near:
        call.halve()
    return call, pairs


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operands(gate, bounds, K, dtype):
    more = {"T": 310, "K": K, "gate": gate, "H": 2, "HV": 4, "dtype": dtype, "bounds": bounds}
    call, pairs = made(**more)
    found = kda_operands.errors(call, pairs, bounds, halved=True)
    wrong = {name: x for name, x in found.items() if not x <= kda_operands.BOUNDS[name]}
    assert not wrong, wrong


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_against_fp64(call):
    with call.as_told(), on_hopper() as launched:
        check(call.spec, call.shape, call.variant, call.dtype)
    assert launched


def run(arguments, options, **more):
    """o and all gradients."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments]
    more |= {"A_log": leaves[5], "dt_bias": leaves[6]}
    more |= {"use_gate_in_kernel": options.gate, "lower_bound": options.lower_bound}
    more |= {"use_qk_l2norm_in_kernel": options.qk_l2norm}
    more |= {"use_beta_sigmoid_in_kernel": options.beta_sigmoid}
    more |= {"allow_neg_eigval": options.neg_eigval}
    o, _ = chunk_kda(*leaves[:5], **more)
    given = [x for x in leaves if x is not None]
    return [o.detach(), *torch.autograd.grad(o, given, torch.ones_like(o))]


@pytest.mark.parametrize("few_chunks", [0, portable.FEW_CHUNKS])
@pytest.mark.parametrize("gate", GATES[:3])
def test_agrees_with_triton(gate, few_chunks, monkeypatch):
    """Whether operands are made again or kept."""
    monkeypatch.setattr(portable, "FEW_CHUNKS", few_chunks)
    arguments, options = kda_operands.operands(2100, 128, gate, H=4, device="cuda")
    with on_hopper() as launched, use("hopper"):
        found = run(arguments, options)
    assert launched.count("hopper_intra_kernel") == (1 if few_chunks else 2)
    assert launched.count("hopper_halving_kernel") == (gate != "bound")
    with use("triton"):
        expected = run(arguments, options)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize("gate", ["bound", "mixed"])
def test_a_thousand_times_the_same_bits(gate):
    """Where a barrier is missing, they move."""
    call, pairs = made(T=2000, K=128, gate=gate, H=16)
    tensors = call.operands.tensor(), call.decay.tensor(), pairs
    first = [x.clone() for x in tensors]
    moved = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(1000):
        call.make_operands(pairs=True)
        if not call.all_near:
            call.halve()
        for a, b in zip(first, tensors, strict=True):
            moved += (a != b).logical_and(~(a.isnan() & b.isnan())).sum()
    assert not moved.item()


@pytest.mark.parametrize("at", [1, 15, 16, 40, 65, 127])
def test_a_later_token_changes_no_bit_before_it(at):
    arguments, options = kda_operands.operands(130, 128, "mixed", device="cuda")
    with on_hopper():
        before = run(arguments, options)[0]
        for decay in (-500.0, -1e4, 3.0):
            for i in range(5):
                arguments[i][:, at] = decay if i == 3 else 3.0
            assert torch.equal(run(arguments, options)[0][:, :at], before[:, :at])


@sanitizer.needed
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_under_the_sanitizer(tool):
    assert "SUMMARY: 0" in sanitizer.sanitized(tool, __file__)


def main() -> None:
    for K in (64, 128):
        for gate, bounds in zip(GATES[::2], BOUNDS, strict=True):
            for alone in (False, True):
                made(bounds, alone, T=140 if bounds is None else 310, K=K, gate=gate)
    torch.cuda.synchronize()


if __name__ == "__main__":
    with sanitizer.workspaces_apart():
        main()
