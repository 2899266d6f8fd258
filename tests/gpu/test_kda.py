"""The delta engine's kernels on a GPU: every launch against fp64, and what they promise."""

from __future__ import annotations

import pytest
import torch

from fla.ops.common.dispatch import Implementation
from fla.ops.kda import chunk_kda, fused_recurrent_kda
from fla.ops.kda.engine import ENGINE
from fla.testing import Shape, all_specs
from fla.testing.compare import measure

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """Dispatch chooses these kernels only when all of this has passed."""
    kernels = Implementation("triton", "fla.ops.kda.triton")
    monkeypatch.setattr(ENGINE, "implementations", (kernels, *ENGINE.implementations))


SPECS = {spec.name: spec for spec in all_specs()}
HEADS = ((64, 64), (128, 128), (256, 512), (20, 33), (96, 130))
PACKED = (0, 130, 0, 257, 1, 0)


def launches():
    for K, V in HEADS:
        yield torch.bfloat16, K, V, "raw, lower bound, state", {"T": 200}
        yield torch.bfloat16, K, V, "state", {"lengths": PACKED}
    for dtype in (torch.float16, torch.float32):
        yield dtype, 64, 64, "raw, softplus, doubled", {"T": 200}
        yield dtype, 128, 128, "v first", {"lengths": PACKED}
    yield torch.float16, 256, 64, "plain", {"T": 70}
    yield torch.float32, 256, 64, "growth", {"T": 70}


@pytest.mark.parametrize("dtype,K,V,variant,sizes", [*launches()])
def test_every_launch(dtype, K, V, variant, sizes):
    more = {"K": K, "V": V, "group": 2}
    lengths = sizes.get("lengths")
    shape = Shape.packed(*lengths, **more) if lengths else Shape(**sizes, **more)
    found = measure(SPECS["chunk_kda"], shape, variant, dtype, "cuda")
    assert all(error <= bound for error, bound in found.values()), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", ["state", "v first", "raw, channel beta"])
def test_recurrent(dtype, variant):
    for shape in (Shape(T=3, K=128, V=128, group=2), Shape.packed(0, 3, 1, 0, K=96, V=130)):
        found = measure(SPECS["fused_recurrent_kda"], shape, variant, dtype, "cuda")
        assert all(error <= bound for error, bound in found.values()), found


def operands(T, H=2, D=128, gate="slow", B=1):
    torch.manual_seed(T)
    q, k, v, do = torch.randn(4, B, T, H, D, device="cuda", dtype=torch.bfloat16)
    k = torch.nn.functional.normalize(k, dim=-1)
    g = -0.05 * torch.rand(B, T, H, D, device="cuda")
    draw = torch.rand_like(g)
    if gate == "mixed":
        g = torch.where(draw < 0.05, -1e4, torch.where(draw < 0.1, -80.0, g))
    return q, k, v, g, torch.rand(B, T, H, device="cuda"), do


def run(q, k, v, g, beta, do, **more):
    """o and all gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, g, beta)]
    o, _ = chunk_kda(*leaves, **more)
    return o, *torch.autograd.grad(o, leaves, do)


@pytest.mark.parametrize("gate", ["slow", "mixed"])
def test_repeatable(gate):
    arguments = operands(700, gate=gate)
    for first, second in zip(run(*arguments), run(*arguments), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("gate", ["slow", "mixed"])
@pytest.mark.parametrize("at", [1, 15, 16, 40, 65])
def test_a_later_token_changes_no_bit_before_it(gate, at):
    *arguments, _ = operands(130, gate=gate)
    before = chunk_kda(*arguments)[0]
    for i in range(5):
        arguments[i][:, at] = -500.0 if i == 3 else 3.0
    assert torch.equal(chunk_kda(*arguments)[0][:, :at], before[:, :at])


def test_segments_agree_with_one_pass():
    """Few heads and a long sequence fall into segments; the recurrence does not."""
    *arguments, _ = operands(1100, H=1)
    state = torch.randn(1, 1, 128, 128, device="cuda")
    o, final = chunk_kda(*arguments, initial_state=state, output_final_state=True)
    wide = [x.double().cpu() for x in arguments]
    expected = fused_recurrent_kda(
        *wide, initial_state=state.double().cpu(), output_final_state=True
    )
    for found, reference in zip((o, final), expected, strict=True):
        found = found.double().cpu()
        assert (found - reference).norm() < 1e-2 * reference.norm()


def test_a_captured_graph_replays_with_other_boundaries():
    arguments = operands(400)
    bounds = torch.tensor([0, 100, 100, 400], device="cuda")
    run(*arguments, cu_seqlens=bounds)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*arguments, cu_seqlens=bounds)
    for values in ((0, 7, 300, 400), (0, 0, 0, 333)):
        bounds.copy_(torch.tensor(values))
        graph.replay()
        for found, expected in zip(captured, run(*arguments, cu_seqlens=bounds), strict=True):
            assert torch.equal(found, expected)
