"""The softmax engine's kernels without a GPU: interpreted, and compiled."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from alone import run_alone
from compiling import compiling, overtaken
from softmax_calls import HEADS, LIMITS

from fla.ops.attn import backward, blocks, forward, split_decoding
from fla.ops.attn import triton as implementation
from fla.ops.attn.engine import DecodingOptions, Options

TABLES = {
    "forward": forward.LINES,
    "queries": backward.QUERY_LINES,
    "keys": backward.KEY_LINES,
    "decoding": split_decoding.LINES,
}
INTERPRETED = """
import json, torch
from unittest import mock
from fla.ops.attn import attn_decoding_one_step, engine, naive_parallel_attn, parallel_attn
from fla.testing import Shape, all_specs
from fla.testing.compare import measure

shapes = [
    (Shape(T=65, group=2), torch.float32),
    (Shape.packed(0, 5, 0, 0, 64, 140, 1, 0, K=33, V=20), torch.float32),
    (Shape(T=80, B=1), torch.float16),
]
torch.set_num_threads(1)
with mock.patch.object(engine, "lacks_triton", lambda device, dtype: None):
    for spec in all_specs():
        if spec.name in ("parallel_attn", "attn_decoding_one_step"):
            for i, variant in enumerate(spec.variants):
                shape, dtype = shapes[i % 3]
                found = measure(spec, shape, variant, dtype)
                print(json.dumps([spec.name, variant, str(shape), found]))

    # growth has a bound as decay has: beyond it nothing changes, and nothing overflows
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 140, 1, 16)
    results = []
    for growth in (1e7, 1e30, torch.inf):
        g = torch.full((1, 140, 1), -0.1).index_fill(1, torch.tensor([70]), growth)
        inputs = [x.clone().requires_grad_() for x in (q, k, v, g)]
        o = parallel_attn(*inputs)
        decoded = attn_decoding_one_step(q[:, -1:], k, v, g)
        results.append([o, decoded, *torch.autograd.grad(o.square().sum(), inputs)])
    for more in results[1:]:
        assert all(x.isfinite().all() and torch.equal(x, y) for x, y in zip(more, results[0]))

    # beside a sink far above them keys are nothing, but none is left out for it
    q, k, v, do = torch.randn(4, 1, 400, 1, 16)
    g, sink = torch.full((1, 400, 1), -0.01), torch.full((1,), 40.0)
    results = []
    for attn, dtype in (parallel_attn, torch.float32), (naive_parallel_attn, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v, g, sink)]
        o = attn(*inputs[:3], g=inputs[3], sink_bias=inputs[4])
        o = o[0] if isinstance(o, tuple) else o
        results.append([o, *torch.autograd.grad(o, inputs, do.to(dtype))])
    assert all((x - y).norm() < 1e-5 * y.norm() for x, y in zip(*results))
"""


def test_interpreted():
    """Every variant against the textbook, in a process where Triton interprets its kernels."""
    printed = run_alone("-c", INTERPRETED)
    calls = [json.loads(line) for line in printed.splitlines()]
    assert len(calls) > 10
    for *call, found in calls:
        assert found and all(error <= bound for error, bound in found.values()), (call, found)


def chosen(size, K, V, shared, window=None):
    """The line of each table that a call gets on a GPU with so much shared memory."""
    dtype = torch.bfloat16 if size == 2 else torch.float32
    q, v = torch.empty(1, 9, 1, K, dtype=dtype), torch.empty(1, 9, 1, V, dtype=dtype)
    with mock.patch.object(blocks, "shared_memory", lambda device: shared):
        call = blocks.Call(q, v, None, 1.0, window)
        return {name: call.choose(table) for name, table in TABLES.items()}


def cases():
    """Calls that between them get every line, each at its largest heads."""
    seen = set()
    for size, heads in HEADS.items():
        for window in (None, 8):
            for shared in reversed(LIMITS):
                for K, V in reversed(heads):
                    lines = set(chosen(size, K, V, shared, window).items())
                    if not lines <= seen:
                        seen |= lines
                        yield size, K, V, shared, window


def test_every_line_has_a_use():
    used = {line for case in cases() for line in chosen(*case).items()}
    assert used == {(name, line) for name, table in TABLES.items() for line in table}
    assert all(len(table) <= 12 for table in TABLES.values())


def test_a_block_of_queries_is_filled_before_it_is_read():
    for case in cases():
        lines = chosen(*case)
        assert lines["keys"].BM <= lines["queries"].BM, case


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(other, marks=pytest.mark.wide) for other in (80, 100))]
)
@pytest.mark.parametrize("size,K,V,shared,window", list(cases()))
def test_every_line_compiles(size, K, V, shared, window, capability):
    """With gates, which takes the most, and within the shared memory that the line states."""
    dtype = torch.bfloat16 if size == 2 else torch.float32
    q, k = torch.empty(2, 1, 9, 2, K, dtype=dtype)
    v = torch.empty(1, 9, 2, V, dtype=dtype)
    g, lse, bounds = torch.empty(1, 9, 2), torch.empty(1, 2, 9), torch.zeros(2, dtype=torch.int32)
    lines = chosen(size, K, V, shared, window)
    limited = mock.patch.object(blocks, "shared_memory", lambda device: shared)
    with limited, compiling(capability) as compiled:
        implementation.forward(q, k, v, g, None, None, Options(1.0, window))
        implementation.backward(v, q, k, v, g, None, None, v, lse, Options(1.0, window))
        implementation.decode(q[:, :1], k, v, g, None, bounds, DecodingOptions(1.0))
    stated = {f"{name}_kernel": line.shared for name, line in lines.items()}
    stated["split_kernel"] = stated.pop("decoding_kernel")
    for kernel in compiled:
        most = stated.get(kernel.metadata.name, 99) if capability <= 90 else 227
        assert kernel.metadata.shared <= most << 10, kernel.metadata
        assert not overtaken(kernel), kernel.metadata
