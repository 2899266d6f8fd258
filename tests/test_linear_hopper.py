"""The linear engine's walk for Hopper without a GPU: who gets it, and compiled."""

from __future__ import annotations

import json
import re
from unittest import mock

import pytest
import torch
from alone import run_alone
from compiling import before_arrivals, compiling, dumped, under_way

from fla.ops.common import device
from fla.ops.common.dispatch import Problem
from fla.ops.common.hopper import descriptor
from fla.ops.simple_gla import blocks, hopper, hopper_turns, hopper_walk
from fla.ops.simple_gla.engine import ENGINE, Options

EMULATED = """
import itertools, json, torch
from unittest import mock
from emulated_gluon import emulated
from fla.ops.simple_gla import blocks, engine, triton as portable
from fla.testing.compare import measure
from linear_calls import gates_that_leave_little, growth_of_nothing, hopper_cases

torch.set_num_threads(1)
stages = "hopper_blocks", "hopper_chunks", "hopper_walk", "hopper_turns", "hopper"
names = "common.kernels", "common.hopper", *(f"simple_gla.{name}" for name in stages)
with emulated(*(f"fla.ops.{name}" for name in names), for_triton=True) as modules:
    *_, hopper_walk, hopper_turns, stages = modules
sums_of = portable.sums_of
for case in hopper_cases():
    if case.shape.T > 500 and not case.shape.lengths or case.shape.K * case.shape.T > 200_000:
        continue
    with (
        mock.patch.object(engine.ENGINE, "stages", lambda *_: stages),
        mock.patch.object(blocks, "multiprocessors", lambda device: 132 if case.segments else 1),
        mock.patch.object(stages, "SMALLEST", 1),
        mock.patch.object(stages, "takes", lambda q, v: case.turns),
        mock.patch.object(hopper_walk, "multiprocessors", lambda device: case.programs),
        mock.patch.object(hopper_walk, "rounded", lambda x: x),  # as operands in fp32 are not
        mock.patch.object(
            portable, "sums_of", lambda at, q, g, back: sums_of(at, q.bfloat16(), g, back)
        ),
        mock.patch.object(hopper_walk, "launch", wraps=hopper_walk.launch) as launched,
        mock.patch.object(hopper_turns, "launch", wraps=hopper_turns.launch) as in_turns,
    ):
        found = measure(case.spec, case.shape, case.variant, torch.float32)
    by_turns = case.turns == bool(in_turns.call_count)
    print(json.dumps([str(case), by_turns and launched.call_count, found]), flush=True)

hopper_walk.multiprocessors = lambda device: 7  # which share the chunks, and cut sequences

# Tokens of a second sequence, and behind the last one, that nobody may look at
torch.manual_seed(0)
q, k, v, do = torch.randn(4, 1, 300, 2, 64)
g = -torch.rand(1, 300, 2)
bounds = torch.tensor([0, 70, 150, 153, 153, 230])  # chunks are cut one after the other
for back, turns in itertools.product((False, True), (False, True)):
    options = engine.Options(1.0, reverse=back)
    with (
        mock.patch.object(stages, "SMALLEST", 1),
        mock.patch.object(stages, "takes", lambda q, v: turns),
    ):
        given = [x.clone() for x in (do, q, k, v, g)]
        results = []
        for _ in range(2):
            d_o, *operands = given
            operands = *operands, None, None, None, bounds
            o = stages.forward(*operands, options)[0]
            every = stages.backward(d_o, None, None, *operands, *[None] * 4, options)
            results.append([o, *every[:4]])
            for x in given:
                x[:, 70:150] = x[:, 230:] = torch.nan
    for expected, found in zip(*results, strict=True):
        for seen in (slice(0, 70), slice(150, None)):
            assert torch.equal(found[:, seen], expected[:, seen])
        assert not expected[:, 230:].any() and found[:, 70:150].isnan().any()
    expected = results[0][0]
    if not turns:
        walked = expected
    assert (expected - walked).norm() < 1e-4 * walked.norm()

# Fewer chunks than shares
q, k, v, do = torch.randn(4, 1, 300, 1, 64)
bounds = torch.tensor([0, 128])
with mock.patch.object(stages, "SMALLEST", 1):
    given = do, None, None, q, k, v, -torch.rand(1, 300, 1), *[None] * 3, bounds, *[None] * 4
    shared = stages.backward(*given, engine.Options(1.0))[:4]
    hopper_walk.multiprocessors = lambda device: 1
    assert all(map(torch.equal, shared, stages.backward(*given, engine.Options(1.0))[:4]))
hopper_walk.multiprocessors = lambda device: 7

# What grows is scaled when it has been weighed
inputs, expected = growth_of_nothing(torch.float32)
for turns in (False, True):
    with (
        mock.patch.object(stages, "SMALLEST", 1),
        mock.patch.object(stages, "takes", lambda q, v: turns),
    ):
        more = None, None, None, None, engine.Options(300 / 8)
        found = stages.forward(*inputs, *more)[0]
    assert (found / 300 - expected).norm() < 1e-4 * expected.norm()

# Of pairs that no gate is in its gradient has nothing
for steep in (-5.0, -20.0):
    inputs, cotangents, expected = gates_that_leave_little(steep, torch.float32)
    with mock.patch.object(stages, "SMALLEST", 1):
        given = *cotangents, None, *inputs, *[None] * 8
        dg = stages.backward(*given, engine.Options(1 / 8))[3]
    assert (dg - expected).norm() < 5e-3 * expected.norm()  # gates' sums have 16-bit digits

# The weights of tokens that are not there are as large as steep decays make them
q, k, v, do = torch.randn(4, 1, 100, 2, 64)
with mock.patch.object(stages, "SMALLEST", 1):
    given = do, None, None, q, k, v, torch.full((1, 100, 2), -150.0), *[None] * 8
    assert all(x.isfinite().all() for x in stages.backward(*given, engine.Options(4.0))[:4])
"""


def test_emulated():
    """On fp32 operands, in a process with a stand-in for Gluon; gates' sums have 16-bit digits."""
    printed = run_alone("-c", EMULATED)
    calls = [json.loads(line) for line in printed.splitlines()]
    assert len(calls) > 12
    for case, launches, found in calls:
        assert launches and found, case
        assert all(error <= 1e-3 for error, _ in found.values()), (case, found)


def test_rows_of_tiles_are_aligned():
    """Also where a single head, or a single sequence, has a stride that nobody walks."""
    x = torch.zeros(1, 64, 128, 1, dtype=torch.bfloat16).transpose(2, 3)
    assert x.is_contiguous() and x.stride(2) == 1
    assert descriptor(x, 64, 128).strides == [64 * 128, 128, 128, 1]


def call(
    T=1024, K=128, V=128, gate="token", packed=False, states=False, reverse=False, many=1,
    programs=9, in_turns=False,
):  # fmt: skip
    """Forward and backward, on tensors of zeros that are there to be launched with.

    With ``many`` multiprocessors, in segments; else by as many ``programs`` at once.
    """
    H, dtype = 3, torch.bfloat16
    q, k, v = (torch.zeros(1, T, H, size, dtype=dtype) for size in (K, K, V))
    g = torch.zeros(1, T, H) if gate == "token" else None
    g_gamma = torch.zeros(H) if gate == "head" else None
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    kv = torch.zeros(1, H, K, V) if states else None
    arguments = q, k, v, g, g_gamma, kv, None, cu_seqlens
    options = Options(1.0, output_final_state=states, reverse=reverse)
    with (
        mock.patch.object(hopper, "SMALLEST", 1),
        mock.patch.object(hopper, "takes", lambda q, v: in_turns),
        mock.patch.object(blocks, "multiprocessors", lambda device: many),
        mock.patch.object(hopper_walk, "multiprocessors", lambda device: programs),
    ):
        hopper.forward(*arguments, options)
        hopper.backward(v, kv, None, *arguments, *[None] * 4, options)


@pytest.mark.parametrize(
    "sizes, more",
    [
        ((128, 128), {"gate": "token"}),
        ((128, 128), {"gate": "head", "packed": True, "states": True}),
        ((64, 64), {"gate": "token", "packed": True}),
        ((128, 128), {"gate": "token", "packed": True, "programs": 3}),
        ((64, 64), {"gate": None, "states": True}),
        ((128, 128), {"gate": "head", "programs": 4}),
        ((256, 512), {"gate": "token"}),
        ((128, 64), {"gate": "token", "reverse": True}),
        ((64, 128), {"gate": "token", "many": 132}),
        ((64, 64), {"gate": "token", "in_turns": True}),
        ((64, 64), {"gate": None, "reverse": True, "in_turns": True}),
        ((128, 64), {"gate": "token", "packed": True, "states": True, "in_turns": True}),
        ((128, 128), {"gate": "head", "in_turns": True}),
    ],
)
def test_compiles(sizes, more, tmp_path):
    """Products are asynchronous, little is spilled, no tile is left before all warps are done."""
    with compiling(90) as compiled:
        call(K=sizes[0], V=sizes[1], **more)
    names = ["hopper_turns_kernel"] * more.get("in_turns", False)
    names += ["hopper_walk_kernel"] * (4 - len(names) if sizes[1] <= 128 else 2)
    kernels = [each for each in compiled if each.metadata.name.startswith("hopper")]
    assert [each.metadata.name for each in kernels] == names
    for kernel in kernels:
        assert kernel.metadata.shared <= 227 << 10
        before = before_arrivals(kernel)
        assert before and not any(first.startswith("wgmma") for first in before)
        # but numbers of a chunk's place, which stay longer than its tiles: what follows it; and for
        # each turn, where no weights want it before, the first token and how many there are
        places = []
        if kernel.metadata.name == "hopper_turns_kernel":
            places = ["LDS"] if more["gate"] else ["LDS", *["LDS.64"] * 3]
        assert sorted(under_way(dumped(kernel, tmp_path, "-sass"))) == places
        usage = dumped(kernel, tmp_path, "-res-usage")
        # forward, addresses of states in two layouts, of which a sequence has one
        cut = more.get("packed") and more.get("states")
        most = 128 if cut and kernel is kernels[0] else 32
        assert int(re.search(r"STACK:(\d+)", usage).group(1)) <= most, usage


def test_other_lengths_compile_nothing_new():
    with compiling(90) as compiled:
        for T in (64, 65, 500, 8192):
            call(T)
    names = [kernel.metadata.name for kernel in compiled]
    assert names.count("hopper_walk_kernel") == 4


def test_what_it_does_not_take_goes_to_triton():
    made: dict = {}

    def launched(T=1024, H=4, K=128, V=128, **more):
        x, y, z = (torch.zeros(1, T, H, size, dtype=torch.bfloat16) for size in (K, K, V))
        x = more.pop("x", x)
        made.clear()
        with (
            mock.patch.object(hopper, "run_walk", lambda *_, **__: made.update(by="hopper")),
            mock.patch.object(hopper, "run_turns", lambda *_, **__: made.update(by="turns")),
            mock.patch.object(hopper.portable, "walk", lambda *_, **__: made.update(by="triton")),
        ):
            at = blocks.Call(x, z, None, Options(1.0))
            hopper.walk(at, x, y, z, z.dtype, **{"segment": 0} | more)
        return made["by"]

    beside = torch.zeros(1, 1024, 4, 128, dtype=torch.bfloat16)
    moved = torch.zeros(beside.numel() + 1, dtype=torch.bfloat16)[1:].view_as(beside)
    norm = torch.zeros(1, 1024, 4)
    assert launched() == launched(segment=128) == launched(beside=beside) == "hopper"
    assert launched(K=256) == launched(K=64, V=192) == "hopper"
    assert launched(segment=128, beside=beside) == "hopper"
    assert launched(K=256, beside=beside) == "triton"
    assert launched(in_turns=True) == "turns" and launched(in_turns=True, x=moved) == "triton"
    assert launched(K=96) == launched(V=96) == "triton"
    assert launched(x=moved) == launched(norm=norm) == "triton"
    assert launched(new_norm=True) == launched(dnorm=norm, norm=norm) == "triton"


def test_short_calls_go_to_triton():
    ran = []

    def run(*arguments, walk=None, at_once=2):
        ran.append((walk, at_once))

    q = torch.zeros(1, 1024, 4, 128)
    with (
        mock.patch.object(hopper, "SMALLEST", 1 << 20),
        mock.patch.object(hopper.portable, "forward", run),
        mock.patch.object(hopper.portable, "backward", run),
    ):
        for T in (1024, 1023):
            short = q[:, :T]
            hopper.forward(short, short, short)
            hopper.backward(short, None, None, short, short, short)
    assert ran == [(hopper.walk, 1)] * 2 + [(None, 2)] * 2


def test_who_takes_turns():
    """Programs of 32 columns, where those of 64 leave half of 132 multiprocessors idle."""

    def taken(B, H, K=64, V=64):
        ran = []
        q, v = torch.zeros(B, 1, H, K, device="meta"), torch.zeros(B, 1, H, V, device="meta")
        with (
            mock.patch.object(hopper, "SMALLEST", 1),
            mock.patch.object(hopper_turns, "multiprocessors", lambda device: 132),
            mock.patch.object(
                hopper.portable, "forward", lambda *_, walk, at_once: ran.append((walk, at_once))
            ),
        ):
            hopper.forward(q, q, v)
        (walk, at_once) = ran[0]
        in_turns = walk is not hopper.walk and walk.keywords["in_turns"]
        assert at_once == (0 if in_turns else 1)
        return in_turns

    assert (
        taken(1, 64) and taken(1, 34) and taken(1, 66) and taken(4, 16, 128) and taken(1, 32, V=128)
    )
    assert not taken(1, 33) and not taken(1, 67) and not taken(1, 64, V=128)
    assert not taken(1, 64, K=256)


@pytest.mark.parametrize("B", [0, 1])
def test_nothing_to_walk_over(B):
    q = torch.zeros(B, 0, 64, 64)
    with mock.patch.object(hopper_turns, "multiprocessors", lambda device: 132):
        o, *_ = hopper.forward(q, q, q, None, None, None, None, None, Options(1.0))
    assert o.shape == q.shape


def reason(dtype=torch.bfloat16, K=128, V=128, options=None, verified=("3.6",)):
    with (
        mock.patch.object(device, "capability", lambda _: (9, 0)),
        mock.patch.object(device, "triton_version", lambda: "3.6.0"),
        mock.patch.dict(device.HOPPER_TRITON, {"linear walk": verified}),
    ):
        problem = Problem(torch.device("cuda"), dtype, K, V, options)
        return dict(ENGINE.explain(problem))["hopper"]


def test_who_gets_it():
    assert reason() is reason(K=64) is reason(K=256, V=512) is None
    assert reason(torch.float16).startswith("takes bf16, not torch.float16")
    assert reason(verified=("3.5", "3.60")) == "not verified with Triton 3.6.0"
    assert reason(options=Options(1.0, normalize=True)) == "takes no normaliser"
    for K, V in ((96, 128), (128, 96), (512, 512)):
        assert reason(K=K, V=V).endswith(f"not {K} and {V}")
