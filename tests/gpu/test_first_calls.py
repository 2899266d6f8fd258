"""First calls of a process, with no kernel compiled yet, on a GPU.

Run as a program with an engine's name it makes the first calls, and the same again.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fla import ops
from fla.ops.simple_gla.engine import attention_map

pytestmark = pytest.mark.gpu
PATIENCE = 300  # seconds; a kernel that reads what was never written may wait for ever
# Long enough for the kernels for Hopper
HEADS = {"attn": 8, "attn, gated": 8, "simple_gla": 24, "map": 2, "kda": 8}


@pytest.mark.parametrize("engine", HEADS)
def test_are_like_all_others(engine, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    subprocess.run(
        [sys.executable, __file__, engine], env=environment, timeout=PATIENCE, check=True
    )


def call(engine: str, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and all gradients that there are."""
    q, k, v, g, beta = leaves
    if engine == "map":  # on its own, for the operator beside it would find its first kernel there
        return [attention_map(q, k, g, None)]
    if engine == "simple_gla":
        o, _ = ops.chunk_simple_gla(q, k, v, g)
    elif engine == "kda":
        decay = g[..., None].expand_as(k)
        o, _ = ops.chunk_kda(q, k, v, decay, beta, use_qk_l2norm_in_kernel=True)
    else:
        o = ops.parallel_attn(q, k, v, g if "gated" in engine else None)
    return [o, *torch.autograd.grad(o.sum(), leaves, allow_unused=True)]


def main(engine: str) -> None:
    # so that what is never written is NaN, or large
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    T = 1024 if engine == "map" else 8192
    size = 1, T, HEADS[engine], 128
    q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    g, beta = (torch.rand(size[:3], device="cuda") for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v, -g, beta)]
    first, second = call(engine, leaves), call(engine, leaves)
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.isfinite().all()
            assert torch.equal(a, b)


if __name__ == "__main__":
    main(*sys.argv[1:])
