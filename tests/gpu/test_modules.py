"""Norms, short convolutions and layers on a GPU against fp64 on the CPU.

Run as a program it makes the calls of norms and convolutions, for compute-sanitizer.
"""

from __future__ import annotations

import copy

import pytest
import sanitizer
import torch

from fla import layers
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution, l2norm
from fla.testing.compare import relative_error

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def draw(*size, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64)


def results(module, run, inputs):
    """Outputs and all gradients under a fixed cotangent."""
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    outputs = [x for x in run(module, **leaves) if x is not None]
    loss = sum((x * draw(*x.shape, seed=7).to(x)).sum() for x in outputs)
    wanted = leaves | dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    return [*outputs, *gradients]


def agree(module, run, dtype, bound=None, **inputs):
    """The module in ``dtype`` on the GPU is itself in fp64 on the CPU, and repeats bit for bit."""
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    reference = copy.deepcopy(module).double()
    expected = results(reference, run, {name: x.double() for name, x in inputs.items()})
    module = module.cuda()
    found, again = (
        results(module, run, {name: x.detach().cuda() for name, x in inputs.items()})
        for _ in range(2)
    )
    for i, (one, two, value) in enumerate(zip(found, again, expected, strict=True)):
        assert torch.equal(one, two), i
        assert relative_error(one, value) < (bound or BOUNDS[dtype]), i


NORMS = (
    ((0, 8), "swish"),
    ((3, 700, 4, 20), "swish"),
    ((70, 2048), "sigmoid"),
    ((9, 20000), "swish"),
)


@dtypes
@pytest.mark.parametrize("shape, activation", NORMS, ids=str)
def test_norms(shape, activation, dtype):
    x, g, residual = draw(*shape), draw(*shape, seed=1), draw(*shape, seed=2)
    gated = FusedRMSNormGated(shape[-1], activation=activation)
    agree(gated, lambda m, x, g: [m(x, g)], dtype, x=x, g=g)
    agree(
        RMSNorm(shape[-1]),
        lambda m, x, residual: m(x, residual, prenorm=True),
        dtype,
        x=x,
        residual=residual,
    )
    agree(torch.nn.Module(), lambda m, x: [l2norm(x)], dtype, x=x)


PACKED = (0, 5, 0, 900, 1, 2, 3, 0)
CONVOLUTIONS = (
    ((), 192, 4),
    (PACKED, 192, 4),
    (PACKED, 20, 3),
    ((0, 0), 20, 3),
    ((), 20, 1),
)


@dtypes
@pytest.mark.parametrize("lengths, D, W", CONVOLUTIONS, ids=str)
def test_convolutions(lengths, D, W, dtype):
    bounds = torch.tensor([0, *lengths]).cumsum(0) if lengths else None
    B, T, N = (1, sum(lengths), len(lengths)) if lengths else (2, 333, 2)

    def run(m, x, residual, cache):
        cu_seqlens = None if bounds is None else bounds.to(x.device)
        return m(x, residual, cache=cache, output_final_state=True, cu_seqlens=cu_seqlens)

    agree(
        ShortConvolution(D, W, bias=True),
        run,
        dtype,
        x=draw(B, T, D),
        residual=draw(B, T, D, seed=1),
        cache=draw(N, D, W, seed=2),
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
def test_on_a_gpu_that_is_not_the_current_one():
    norm, conv = RMSNorm(64), ShortConvolution(64, 4)
    x = draw(1, 300, 64).float()

    def run(device):
        return results(
            torch.nn.ModuleList([norm, conv]).to(device),
            lambda m, x: [l2norm(m[0](m[1](x)[0]))],
            {"x": x.detach().to(device)},
        )

    for one, other in zip(run("cuda:0"), run("cuda:1"), strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@sanitizer.needed
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_keep_to_their_memory(tool):
    found = sanitizer.sanitized(tool, __file__)
    assert f"{'ERROR' if tool == 'memcheck' else 'RACECHECK'} SUMMARY: 0" in found


def test_tokens_behind_the_last_boundary():
    """Nobody's tokens give zeros, whatever they hold."""
    conv, bounds = ShortConvolution(20, 4).cuda(), torch.tensor([0, 3, 7]).cuda()
    x = draw(1, 10, 20).float().cuda()
    x[:, 7:] = torch.nan
    x.requires_grad_()
    y, _ = conv(x, cu_seqlens=bounds)
    y.square().sum().backward()
    assert (y[:, 7:] == 0).all() and (x.grad[:, 7:] == 0).all()
    assert y.isfinite().all() and conv.weight.grad.isfinite().all()


LAYERS = {
    "linear": lambda: layers.LinearAttention(hidden_size=64, num_heads=2, layer_idx=0),
    "simple_gla": lambda: layers.SimpleGatedLinearAttention(
        hidden_size=64, num_heads=2, layer_idx=0
    ),
    "lightning": lambda: layers.LightningAttention(hidden_size=64, num_heads=2, layer_idx=0),
    "fox": lambda: layers.ForgettingAttention(hidden_size=64, num_heads=2, layer_idx=0),
    "attn": lambda: layers.Attention(hidden_size=64, num_heads=2, layer_idx=0),
    "kda": lambda: layers.KimiDeltaAttention(64, num_heads=2, head_dim=32, layer_idx=0),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layers(name):
    """Padded, split and decoded, in fp32 and bf16."""
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    x, mask = draw(3, 200, 64), torch.ones(3, 200).long()
    mask[1, :90], mask[2] = 0, 0
    expected = copy.deepcopy(layer).double()(x, mask)[0]
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        layer, x, cache, outputs = layer.to("cuda", dtype), x.to("cuda", dtype), None, []
        for start, stop in ((0, 150), (150, 151), (151, 152), (152, 200)):
            given = mask[:, :stop].cuda()
            o, _, cache = layer(x[:, start:stop], given, cache, use_cache=True)
            outputs.append(o)
        assert relative_error(torch.cat(outputs, 1), expected) < bound, dtype
        assert relative_error(layer(x, mask.cuda())[0], expected) < bound, dtype


def main() -> None:
    for dtype in BOUNDS:
        for shape, activation in NORMS:
            test_norms(shape, activation, dtype)
        for lengths, D, W in CONVOLUTIONS:
            test_convolutions(lengths, D, W, dtype)


if __name__ == "__main__":
    main()
