"""The linear engine's kernels without a GPU: interpreted, and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from compiling import compiling
from linear_calls import CALLS, SIZES, call

from fla.ops.simple_gla import attention_map, chain
from fla.ops.simple_gla import triton as kernels

INTERPRETED = """
import json, torch
from unittest import mock
from fla.ops.common import kernels
from fla.ops.simple_gla import chain, engine
from fla.testing import Shape, all_specs
from fla.testing.compare import measure

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
        mock.patch.object(chain, "multiprocessors", lambda device: many),
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
"""


def test_interpreted():
    """Every variant against the textbook, in a process where Triton interprets its kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    calls = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(calls) > 20
    assert {many for *_, many, _ in calls} == {1, 64}
    for *where, found in calls:
        assert found and all(error <= bound for error, bound in found.values()), (where, found)


def launches():
    for dtype, sizes in SIZES.items():
        for i, (K, V) in enumerate(sizes):
            yield dtype, K, V, CALLS[i % len(CALLS)]
    for conditions in CALLS:
        yield torch.bfloat16, 128, 128, conditions


@pytest.mark.parametrize("dtype,K,V,conditions", launches())
def test_every_line_compiles_for_hopper(dtype, K, V, conditions):
    with compiling(90) as done:
        call(dtype, K, V, **conditions)
    names = [kernel.metadata.name for kernel in done]
    assert "forward_kernel" in names and "backward_kernel" in names
    assert all(kernel.metadata.shared <= 227 * 1024 for kernel in done)


def test_launches_meet_every_line():
    met = {
        chain._Walks.of(backward, dtype, *sizes, False).line
        for dtype, pairs in SIZES.items()
        for K, V in pairs
        for backward, sizes in ((False, (K, V)), (True, (V, K)), (True, (K, V)))
    }
    tables = (chain._FORWARD, chain._BACKWARD)
    assert met == {line for table in tables for lines in table.values() for line in lines}


def test_segments_and_the_map_compile_for_hopper():
    with mock.patch.object(chain, "multiprocessors", lambda device: 132), compiling(90) as done:
        call(torch.bfloat16, 128, 128, gate="token", T=1024)
        for dtype in SIZES:
            x = torch.zeros(1, 65, 2, 40, dtype=dtype)
            kernels.attention_map(x, x, torch.zeros(1, 65, 2), 1.0)
    assert len([kernel for kernel in done if kernel.metadata.name == "forward_kernel"]) == 2
    assert len([kernel for kernel in done if kernel.metadata.name == "backward_kernel"]) == 2
    name = attention_map.attention_map_kernel.fn.__name__
    assert len([kernel for kernel in done if kernel.metadata.name == name]) == len(SIZES)


def test_other_lengths_compile_nothing_new():
    with compiling(90) as done:
        for T in (64, 65, 500, 8192):
            call(torch.bfloat16, 64, 64, gate="token", T=T)
    assert len(done) == 4  # decays, forward, backward and the gate's gradient


@pytest.mark.wide
@pytest.mark.parametrize("capability,shared", [(80, 163), (86, 99), (100, 227)])
@pytest.mark.parametrize("dtype,K,V,conditions", launches())
def test_every_line_compiles_in_one_stage(dtype, K, V, conditions, capability, shared):
    lines = {
        name: {
            key: tuple(chain.dataclasses.replace(line, stages=1) for line in table)
            for key, table in getattr(chain, name).items()
        }
        for name in ("_FORWARD", "_BACKWARD")
    }
    chain._Walks.of.cache_clear()
    with mock.patch.multiple(chain, **lines), compiling(capability) as done:
        call(dtype, K, V, **conditions)
    chain._Walks.of.cache_clear()
    assert all(kernel.metadata.shared <= shared * 1024 for kernel in done)
