"""The linear engine's kernels without a GPU: interpreted, and compiled."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from alone import run_alone
from compiling import compiling, overtaken
from linear_calls import CASES

from fla.ops.simple_gla import attention_map, blocks, segments, walk
from fla.ops.simple_gla import triton as kernels
from fla.ops.simple_gla.engine import Options

INTERPRETED = """
import json, torch
from unittest import mock
from fla.ops import chunk_simple_gla
from fla.ops.common import kernels
from fla.ops.simple_gla import blocks, engine
from fla.testing import Shape, all_specs
from fla.testing.compare import measure, relative_error
from linear_calls import gates_that_leave_little, gradient_of_gates, growth_of_nothing

shapes = [
    (Shape(T=65), torch.float32),
    (Shape.packed(0, 5, 0, 0, 64, 70, 1, 0, K=20, V=33), torch.float32),
    (Shape(T=130, B=1, K=72, V=16), torch.float16),
    (Shape.packed(0, 200, 0, 3, 130, 0), torch.float32),
]
torch.set_num_threads(1)
for many in (1, 64):  # many idle multiprocessors: sequences fall into segments
    with (
        mock.patch.object(engine, "lacks_triton", lambda device, dtype: None),
        mock.patch.object(blocks, "multiprocessors", lambda device: many),
    ):
        for spec in all_specs():
            if spec.run.__module__.split(".")[2] not in ("simple_gla", "linear_attn"):
                continue
            if spec.run.__name__.startswith("fused_chunk"):
                continue
            for i, variant in enumerate(spec.variants):
                shape, dtype = shapes[(i + (many > 1)) % 4]
                if many > 1 and shape.T < 128 or shape.lengths and not spec.packed:
                    continue
                found = measure(spec, shape, variant, dtype)
                print(json.dumps([spec.name, variant, str(shape), many, found]))

        inputs, o = growth_of_nothing(torch.float32)
        assert relative_error(chunk_simple_gla(*inputs)[0], o) < 1e-5

        for steep in (-5.0, -20.0):
            *given, expected = gates_that_leave_little(steep, torch.float32)
            dg = gradient_of_gates(*given)
            assert (dg - expected).norm() < 1e-5 * expected.norm()
"""


# Two pieces of a chunk to a segment, and a sequence's gate shared by several programs
IN_PIECES = """
import json, torch
from unittest import mock
from fla.ops.simple_gla import blocks, engine, gate, segments
from fla.testing import Shape, all_specs
from fla.testing.compare import measure

specs = {spec.name: spec for spec in all_specs()}
calls = (
    ("chunk_simple_gla", "gate, state"),
    ("fused_recurrent_simple_gla", "reverse, head gate, v first"),
    ("fused_recurrent_simple_gla", "reverse"),
    ("chunk_linear_attn", "normalised, state"),
)
torch.set_num_threads(1)
with (
    mock.patch.object(engine, "lacks_triton", lambda device, dtype: None),
    mock.patch.object(blocks, "multiprocessors", lambda device: 4),
    mock.patch.object(blocks, "_SHORTEST_PIECE", 1),
    mock.patch.object(gate, "multiprocessors", lambda device: 64),
    mock.patch.object(gate, "_BLOCK", 64),
    mock.patch.object(segments, "join", wraps=segments.join) as joined,
):
    for name, variant in calls:
        for shape in (Shape(T=333, B=1), Shape.packed(0, 200, 0, 3, 130, 0)):
            if variant not in specs[name].variants:
                continue
            found = measure(specs[name], shape, variant, torch.float32)
            print(json.dumps([name, variant, str(shape), joined.call_args.args[2], found]))
"""


# NaN of one sequence, in segments whose borders lie in sequences and between them
APART = """
import json, torch
from unittest import mock
from fla.ops import fused_recurrent_simple_gla
from fla.ops.simple_gla import blocks, engine, segments

bounds = torch.tensor([0, 60, 60, 200, 210, 330, 390])
torch.set_num_threads(1)
torch.manual_seed(0)
with (
    mock.patch.object(engine, "lacks_triton", lambda device, dtype: None),
    mock.patch.object(blocks, "multiprocessors", lambda device: 64),
    mock.patch.object(blocks, "_SHORTEST_PIECE", 1),
    mock.patch.object(segments, "join", wraps=segments.join) as joined,
):
    for reverse, n in ((False, 0), (False, 4), (True, 2), (True, 4)):
        poisoned = slice(*bounds[n : n + 2])
        q, k, v, do = torch.randn(4, 1, 390, 1, 16)
        g, state, dstate = -torch.rand(1, 390, 1), *torch.randn(2, 6, 1, 16, 16)
        found = []
        for poison in (False, True):
            leaves = [x.clone() for x in (q, k, v, g)] + [state.clone()]
            if poison:
                for x in leaves[:-1]:
                    x[:, poisoned] = torch.nan
            leaves = [x.requires_grad_() for x in leaves]
            o, final = fused_recurrent_simple_gla(
                *leaves[:4], initial_state=leaves[4], output_final_state=True, reverse=reverse,
                cu_seqlens=bounds,
            )
            every = torch.autograd.grad((o, final), leaves, (do, dstate))
            found.append([x.detach() for x in (o, *every[:4], final, every[4])])
        named = {}
        for name, clean, x in zip(("o", "dq", "dk", "dv", "dg", "final", "dstate"), *found):
            of = n if len(x) > 1 else (slice(None), poisoned)
            assert x[of].isnan().any(), (name, n)
            clean[of] = x[of] = 0
            named[name] = float((clean - x).abs().max()), 0.0
        print(json.dumps([reverse, n, joined.call_args.args[0].shape[1], named]))
"""


def interpreted(program):
    """What it prints, in a process where Triton interprets its kernels."""
    printed = run_alone("-c", program)
    calls = [json.loads(line) for line in printed.splitlines()]
    for *where, found in calls:
        assert found and all(error <= bound for error, bound in found.values()), (where, found)
    return calls


def test_interpreted():
    """Every variant against the textbook."""
    calls = interpreted(INTERPRETED)
    assert len(calls) > 20
    assert {many for *_, many, _ in calls} == {1, 64}


def test_segments_in_pieces():
    calls = interpreted(IN_PIECES)
    assert len(calls) > 5 and {pieces for *_, pieces, _ in calls} == {2}


def test_sequences_have_nothing_of_each_other():
    calls = interpreted(APART)
    assert len(calls) == 4 and all(segments > 2 for *_, segments, _ in calls)


def call(case, gate=None, packed=False, normalize=False, states=None, T=130, H=2):
    """Forward and backward, on tensors of zeros that are there to be launched with."""
    dtype, K, V, shared = case
    q, k, v = (torch.zeros(1, T, H, size, dtype=dtype) for size in (K, K, V))
    g = torch.zeros(1, T, H) if gate == "token" else None
    g_gamma = torch.zeros(H) if gate == "head" else None
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    options = Options(1.0, normalize=normalize, output_final_state=states is not None)
    kv = torch.zeros(1, H, K, V, dtype=states) if states else None
    z = torch.zeros(1, 1, H, K, dtype=states) if states and normalize else None
    dkv, dz = (None if x is None else x.float() for x in (kv, z))
    with mock.patch.object(blocks, "shared_memory", lambda device: shared):
        o, _, _, *kept = kernels.forward(q, k, v, g, g_gamma, kv, z, cu_seqlens, options)
        kernels.backward(
            v, dkv, dz, q, k, v, g, g_gamma, kv, z, cu_seqlens, o, *kept, options
        )  # fmt: skip


# The conditions under which kernels differ
CONDITIONS = (
    {"gate": "token"},
    {"gate": "token", "packed": True},
    {"gate": "head", "packed": True},
    {"gate": None},
    {"gate": None, "normalize": True},
    {"gate": "token", "states": torch.float32},
    {"gate": None, "normalize": True, "states": torch.float32},
    {"gate": None, "normalize": True, "states": torch.float64},
)
COMPILED = [
    *((case, CONDITIONS[0]) for case in CASES),
    *((CASES[1], conditions) for conditions in CONDITIONS[1:]),
]


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(other, marks=pytest.mark.wide) for other in (80, 100))]
)
@pytest.mark.parametrize("case,conditions", COMPILED, ids=str)
def test_every_line_compiles(case, conditions, capability):
    """Within the shared memory that the line states."""
    with (
        mock.patch.object(blocks, "multiprocessors", lambda device: 132),
        compiling(capability) as done,
    ):
        call(case, **conditions, T=1024)
    wide = case[0] != torch.bfloat16
    for kernel in done:
        assert not overtaken(kernel), kernel.metadata
        name, sizes = kernel.metadata.name, case[1:3]
        if name in ("walk_kernel", "summary_kernel"):
            table = walk.LINES if name == "walk_kernel" else segments.LINES
            lines = (chosen(table, wide, X, case[3]) for X in sizes)
            most = max(line.shared for line in lines) if capability <= 90 else 227
            assert kernel.metadata.shared <= most << 10


def chosen(table, wide, X, shared):
    """The line for an X of operands that are wide, or not."""
    size = 4 if wide else 2
    fits = (line for line in table if size <= line.bytes and X <= line.X)
    return next(line for line in fits if line.shared <= shared)


def test_two_segments_of_wide_keys_want_more_than_one_walk():
    def segment(K, walks, H=64):
        x = torch.zeros(1, 8192, H, K, dtype=torch.bfloat16)
        at = blocks.Call(x, x[..., :64], None, Options(1.0))
        line = at.choose(walk.LINES, K)
        return at.segment(line, K, 64, 1, walks)

    with mock.patch.multiple(
        blocks, multiprocessors=lambda device: 132, shared_memory=lambda device: 227
    ):
        assert segment(64, 1) == segment(64, 3) == segment(128, 3) == 4096
        assert segment(128, 1) == 0
        assert segment(128, 1, H=8) > 0


def test_every_line_has_a_use():
    for table in (walk.LINES, segments.LINES):
        used = {
            chosen(table, dtype != torch.bfloat16, X, shared)
            for dtype, K, V, shared in CASES
            for X in (K, V)
        }
        assert used == set(table) and len(table) <= 12


def test_the_map_compiles():
    with compiling(90) as done:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.zeros(1, 65, 2, 40, dtype=dtype)
            kernels.attention_map(x, x, torch.zeros(1, 65, 2), 1.0)
    name = attention_map.attention_map_kernel.fn.__name__
    assert len([kernel for kernel in done if kernel.metadata.name == name]) == 3


def test_other_lengths_compile_nothing_new():
    with compiling(90) as done:
        for T in (64, 65, 500, 8192):
            call(CASES[0], gate="token", T=T)
    names = sorted(kernel.metadata.name for kernel in done)
    assert names == ["decay_kernel", "gate_kernel", *["walk_kernel"] * 4]
