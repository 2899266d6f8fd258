"""Norms and short convolutions: plain PyTorch and kernels against fp64; what modules refuse."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from compiling import compiling
from module_cases import BOUNDS, agree, draw, implementation, results

from fla.modules import (
    FusedRMSNormGated,
    L2Norm,
    RMSNorm,
    RotaryEmbedding,
    ShortConvolution,
    l2_norm,
    l2norm,
)
from fla.modules.conv import engine as conv_engine
from fla.modules.norm import engine as norm_engine
from fla.testing.compare import relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Each check runs in plain PyTorch on all dtypes, and as kernels in fp32 inside test_interpreted.
RUNS = [("triton", torch.float32)] if INTERPRETED else [("eager", dtype) for dtype in BOUNDS]
HALF = [("triton", torch.float16)] if INTERPRETED else []
runs = pytest.mark.parametrize("name, dtype", RUNS)
halves_too = pytest.mark.parametrize("name, dtype", RUNS + HALF)
outside = pytest.mark.skipif(INTERPRETED, reason="not of kernels that are interpreted")


# Norms


def activated(g, activation):
    return torch.sigmoid(g) if activation == "sigmoid" else F.silu(g)


def norm_reference(x, weight=None, g=None, residual=None, *, eps, mean, activation="swish"):
    h = x if residual is None else x + residual
    size = h.square().mean(-1, True) if mean else h.square().sum(-1, True)
    y = h / (size + eps).sqrt()
    y = y if weight is None else y * weight
    return y if g is None else y * activated(g, activation), h


NORM_SHAPES = [(0, 8), (9,), (1, 2), (3, 5, 2, 20), (70, 33), (2, 130)]


@runs
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_l2norm(name, dtype, shape):
    agree(
        lambda x: [l2norm(x)],
        lambda x: [norm_reference(x, eps=1e-6, mean=False)[0]],
        {"x": draw(*shape, dtype=dtype)},
        name,
        dtype,
    )


@runs
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize(
    "shape, eps", [*((shape, 1e-5) for shape in NORM_SHAPES), ((3, 20), 0.0)], ids=str
)
def test_gated_norm(name, dtype, shape, eps, activation, affine):
    module = FusedRMSNormGated(shape[-1], affine, eps, activation)
    inputs = {"x": draw(*shape, dtype=dtype), "g": draw(*shape, seed=1, dtype=dtype)}
    if affine:
        inputs["weight"] = draw(shape[-1], seed=2, dtype=torch.promote_types(dtype, torch.float32))

    def run(x, g, weight=None):
        return [torch.func.functional_call(module, {"weight": weight} if affine else {}, (x, g))]

    def reference(**inputs):
        return [norm_reference(**inputs, eps=eps, mean=True, activation=activation)[0]]

    agree(run, reference, inputs, name, dtype)


@runs
def test_gradient_of_a_saturated_gate(name, dtype):
    """As small as what is left to close, and as exact."""
    module = FusedRMSNormGated(20, False, 1e-5, "sigmoid")
    x, g = draw(30, 20, dtype=dtype), (draw(30, 20, seed=1) / 8 + 8).to(dtype)
    with implementation(name):
        found = results(lambda g: [module(x, g)], {"g": g})["dg"]
    wide = functools.partial(norm_reference, x.double(), eps=1e-5, mean=True, activation="sigmoid")
    expected = results(lambda g: [wide(g=g)[0]], {"g": g}, wide=True)["dg"]
    assert (found - expected).norm() < BOUNDS[dtype] * expected.norm()


@halves_too
@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_residual(name, dtype, gated, in_fp32):
    """The sum comes out too, and its gradient goes back to both."""
    D = 20
    module = FusedRMSNormGated(D) if gated else RMSNorm(D)
    sum_dtype = torch.promote_types(dtype, torch.float32) if in_fp32 else dtype
    inputs = {
        "x": draw(7, D, dtype=dtype),
        "residual": draw(7, D, seed=3, dtype=sum_dtype),
        "g": draw(7, D, seed=4, dtype=dtype) if gated else None,
    }

    def run(x, residual, g=None):
        more = (g,) if gated else ()
        y, h = module(x, *more, residual=residual, prenorm=True, residual_in_fp32=in_fp32)
        assert (y.dtype, h.dtype) == (x.dtype, sum_dtype)
        return y, h

    agree(run, lambda **given: norm_reference(**given, eps=1e-5, mean=True), inputs, name, dtype)


@runs
def test_a_residual_in_fewer_digits(name, dtype):
    """It has the sum, but the gradients keep those of x."""
    inputs = {"x": draw(30, 20, dtype=dtype)}
    residual = draw(30, 20, seed=1).bfloat16()
    agree(
        lambda x: [RMSNorm(20)(x, residual=residual)],
        lambda x: [norm_reference(x, residual=residual.double(), eps=1e-5, mean=True)[0]],
        inputs,
        name,
        dtype,
    )


@outside
def test_the_sum_without_a_residual():
    x = draw(3, 8, dtype=torch.bfloat16)
    norm = RMSNorm(8)
    assert norm(x, prenorm=True)[1] is x
    y, h = norm(x, prenorm=True, residual_in_fp32=True)
    assert torch.equal(h, x.float()) and torch.equal(y, norm(x))


@outside
def test_names_of_the_l2_norm():
    x = draw(4, 8, dtype=torch.bfloat16)
    assert l2_norm is l2norm
    assert torch.equal(L2Norm()(x), l2norm(x, 1e-6))
    assert l2norm(x, output_dtype=torch.float32).dtype == torch.float32


# Convolutions


def conv_reference(x, weight, bias=None, residual=None, cache=None, *, bounds, silu):
    """One sequence after the other, through PyTorch's own convolution."""
    D, W = weight.shape[0], weight.shape[-1]
    rows, finals = [], []
    for n, (row, start, stop) in enumerate(bounds):
        history = x.new_zeros(D, W) if cache is None else cache[n]
        whole = torch.cat([history, x[row, start:stop].T], 1)
        finals.append(whole[:, whole.shape[1] - W :])
        if stop > start:
            y = F.conv1d(whole[None, :, 1:], weight.reshape(D, 1, W), bias, groups=D)[0].T
            rows.append(F.silu(y) if silu else y)
    y = torch.cat([*rows, x.new_zeros(0, D)]).reshape(x.shape)
    return y if residual is None else y + residual, torch.stack(finals)


def dense(B, T):
    return (B, T), [(row, 0, T) for row in range(B)], None


def packed(*lengths):
    cu_seqlens = [0, *itertools.accumulate(lengths)]
    spans = [(0, *span) for span in itertools.pairwise(cu_seqlens)]
    return (1, cu_seqlens[-1]), spans, torch.tensor(cu_seqlens, dtype=torch.int32)


CONV_SHAPES = {
    "none": dense(2, 0),
    "one": dense(3, 1),
    "two": dense(1, 2),
    "some": dense(2, 45),
    "packed": packed(0, 5, 0, 0, 30, 1, 2, 3, 0),
    "packed ones": packed(1, 1, 1, 1, 1),
    "packed, no tokens": packed(0, 0),
}


@runs
@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("W", [1, 3, 4])
@pytest.mark.parametrize("shape", CONV_SHAPES)
def test_convolution(name, dtype, shape, W, everything):
    (B, T), spans, cu_seqlens = CONV_SHAPES[shape]
    D = 20
    wide = torch.promote_types(dtype, torch.float32)
    module = ShortConvolution(D, W, bias=everything, activation="silu" if everything else None)
    inputs = {"x": draw(B, T, D, dtype=dtype), "weight": draw(D, 1, W, seed=1, dtype=wide)}
    if everything:
        inputs["bias"] = draw(D, seed=2, dtype=wide)
        inputs["residual"] = draw(B, T, D, seed=3, dtype=dtype)
        inputs["cache"] = draw(len(spans), D, W, seed=4, dtype=dtype)

    def run(x, weight, bias=None, residual=None, cache=None):
        parameters = {"weight": weight, **({"bias": bias} if everything else {})}
        given = {"cache": cache, "output_final_state": True, "cu_seqlens": cu_seqlens}
        return torch.func.functional_call(module, parameters, (x, residual), given)

    def reference(**inputs):
        return conv_reference(**inputs, bounds=spans, silu=everything)

    agree(run, reference, inputs, name, dtype)


@halves_too
def test_convolution_token_by_token(name, dtype):
    """A split run is the whole run."""
    module = ShortConvolution(20, 4, bias=True, dtype=dtype)
    x = draw(2, 9, 20, dtype=dtype)
    with implementation(name), torch.no_grad():
        whole, last = module(x, output_final_state=True)
        assert module(x)[1] is None
        steps, cache = [], None
        for start, stop in ((0, 1), (1, 2), (2, 5), (5, 5), (5, 6), (6, 9)):
            y, cache = module(x[:, start:stop], cache=cache, output_final_state=True)
            steps.append(y)
    assert relative_error(torch.cat(steps, 1), whole) < BOUNDS[dtype]
    assert torch.equal(cache, last)
    assert torch.equal(last, x[:, 5:].mT) and last.dtype == dtype


@runs
def test_masked_convolution(name, dtype):
    module = ShortConvolution(8, 3, dtype=dtype)
    x, mask = draw(2, 6, 8, dtype=dtype), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    with implementation(name), torch.no_grad():
        y, _ = module(x, mask=mask)
        alone, _ = module(x[:1, 2:])
    assert torch.equal(y[:1, 2:], alone)


@runs
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32], ids=str)
def test_what_is_masked_does_not_matter(name, dtype, kind):
    """Not even NaN, in the output, in the cache and in the gradients."""
    module = ShortConvolution(8, 3, dtype=dtype)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).to(kind)
    zeros = draw(2, 6, 8, dtype=dtype).masked_fill(mask[..., None] == 0, 0)
    unknown = zeros.masked_fill(mask[..., None] == 0, torch.nan)
    found = []
    for x in (unknown, zeros):
        x.requires_grad_()
        with implementation(name):
            y, cache = module(x, mask=mask, output_final_state=True)
            found.append((y, cache, *torch.autograd.grad(y.sum(), [x, module.weight])))
    assert all(map(torch.equal, *found))
    assert not found[0][2][0, :2].any() and not found[0][2][1, 5].any()


@runs
def test_strides_and_untouched_inputs(name, dtype):
    inputs = {
        "x": draw(2, 20, 9, dtype=dtype).mT,  # time last in memory
        "residual": draw(1, 1, 20, dtype=dtype).expand(2, 9, 20),
    }
    conv, norm = ShortConvolution(20, 4, dtype=dtype), FusedRMSNormGated(20, dtype=dtype)
    copies = {key: x.clone() for key, x in inputs.items()}
    with implementation(name), torch.no_grad():
        for run in (conv, lambda x, residual: norm(x, x, residual, True)):
            found = run(**inputs)
            expected = run(**{key: x.contiguous() for key, x in inputs.items()})
            for a, b in zip(found, expected, strict=True):
                assert a is b or relative_error(a, b) < BOUNDS[dtype]
    assert all(torch.equal(x, copies[key]) for key, x in inputs.items())


@halves_too
def test_repeats_bit_for_bit(name, dtype):
    conv, norm = ShortConvolution(40, 4, bias=True, dtype=dtype), RMSNorm(40, dtype=dtype)
    x = draw(2, 90, 40, dtype=dtype).requires_grad_()
    with implementation(name):
        first, second = (
            torch.autograd.grad(
                norm(conv(x)[0]).square().sum(), [x, *conv.parameters(), *norm.parameters()]
            )
            for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@outside
def test_interpreted():
    """The tests above, in a process that interprets kernels."""
    pytest.importorskip("triton")
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@outside
@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(other, marks=pytest.mark.wide) for other in (80, 100))]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_compile(dtype, capability):
    pytest.importorskip("triton")
    from fla.modules.conv import triton as conv
    from fla.modules.norm import triton as norm

    x, state = torch.empty(1, 64, 128, dtype=dtype), torch.empty(2, 128, 4, dtype=dtype)
    weight, bias, cu_seqlens = torch.empty(128, 4), torch.empty(128), torch.zeros(3).int()
    with compiling(capability) as compiled:
        options = conv_engine.Options(True, True)
        conv.forward(x, weight, bias, x, state, cu_seqlens, options)
        conv.backward(x, state, x, weight, bias, state, cu_seqlens, options)
        options = conv_engine.Options(False, False)
        conv.forward(x, weight, None, None, None, None, options)
        conv.backward(x, None, x, weight, None, None, None, options)
        for D in (128, 4096, 32768):
            x, weight = torch.empty(4, D, dtype=dtype), torch.empty(D)
            options = norm_engine.Options(1e-5, True, "swish", dtype, torch.float32)
            norm.forward(x, weight, x, x, options)
            norm.backward(x, x, x, weight, x, options)
        options = norm_engine.Options(1e-6, False, "sigmoid", dtype)
        norm.forward(x, None, None, None, options)
        norm.backward(x, None, x, None, None, options)
    assert len(compiled) == 12
    assert max(kernel.metadata.shared for kernel in compiled) <= 48 << 10


# What does not fit


def refusals():
    conv = ShortConvolution(8, 4)
    norm = FusedRMSNormGated(8)
    rotary = RotaryEmbedding(8)
    x, bounds = torch.zeros(2, 5, 8), torch.tensor([0, 2, 5])
    heads = x[:, :, None]
    return {
        "x: expected [B, T, D], got [5, 8]": lambda: conv(x[0]),
        "x: expected [B, T, D] = [2, 5, 8], got [2, 5, 7]": lambda: conv(x[..., :7]),
        "x: expected a batch of 1 with cu_seqlens, got 2": lambda: conv(x, cu_seqlens=bounds),
        "cache: expected [N, D, W] = [2, 8, 4], got [2, 8, 3]": lambda: conv(
            x, cache=torch.zeros(2, 8, 3)
        ),
        "mask: expected [B, T] = [2, 5], got [2, 4]": lambda: conv(x, mask=torch.ones(2, 4)),
        "x: expected [B, T, D], got [2, 5]": lambda: conv(x[..., 0], mask=torch.ones(2, 5)),
        "mask: expected the device of x, cpu, got meta": lambda: conv(
            x, mask=torch.ones(2, 5, device="meta")
        ),
        "residual: expected [B, T, D] = [2, 5, 8], got [2, 4, 8]": lambda: conv(x, x[:, :4]),
        "kernel_size: expected at least 1, got 0": lambda: ShortConvolution(8, 0),
        "activation: expected one of silu, swish, None, got relu": lambda: ShortConvolution(
            8, 4, activation="relu"
        ),
        "backend: expected one of triton, cuda, got torch": lambda: ShortConvolution(
            8, 4, backend="torch"
        ),
        "x: expected [..., 8], got [2, 5, 7]": lambda: norm(x[..., :7], x),
        "g: expected [D1, D2, D] = [2, 5, 8], got [2, 5, 7]": lambda: norm(x, x[..., :7]),
        "activation: expected one of swish, silu, sigmoid, got relu": lambda: FusedRMSNormGated(
            8, activation="relu"
        ),
        "dim: expected an even number of channels, got 7": lambda: RotaryEmbedding(7),
        "k: expected [B, T, H, K], got [2, 5, 8]": lambda: rotary(heads, x),
        "q: expected a head of at least dim = 8, got 4": lambda: rotary(
            heads[..., :4], heads[..., :4]
        ),
        "seqlen_offset: expected [N] = [2], got [3]": lambda: rotary(heads, heads, torch.zeros(3)),
    }


@outside
@pytest.mark.parametrize("message", refusals())
def test_refusals(message):
    with pytest.raises(ValueError) as caught:
        refusals()[message]()
    assert str(caught.value).startswith(message)


@outside
def test_refusals_of_types():
    with pytest.raises(TypeError, match="x: expected a tensor, got float"):
        l2norm(1.0)
    with pytest.raises(TypeError, match="g: expected a tensor, got NoneType"):
        FusedRMSNormGated(8)(torch.zeros(3, 8), None)
    with pytest.raises(TypeError, match="x: expected a tensor, got NoneType"):
        RMSNorm(8)(None, residual_in_fp32=True)
    with pytest.raises(TypeError, match=r"x: expected a floating point tensor, got torch\.int64"):
        l2norm(torch.zeros(3, 4).long())
    with pytest.raises(TypeError, match=r"output_dtype: expected a floating point dtype, got t"):
        l2norm(torch.zeros(3, 4), output_dtype=torch.int32)
    with pytest.raises(TypeError, match="mask: expected a tensor, got list"):
        ShortConvolution(8, 4)(torch.zeros(1, 2, 8), mask=[[0, 1]])
    with pytest.raises(TypeError, match=r"head_first: .* no such argument"):
        ShortConvolution(8, 4)(torch.zeros(1, 2, 8), head_first=True)


@outside
def test_compiles_as_one_graph():
    conv, norm = ShortConvolution(8, 4), FusedRMSNormGated(8)
    compiled = torch.compile(
        lambda x: norm(conv(x)[0], x), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for T in (5, 9):
        x = draw(2, T, 8, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), norm(conv(x)[0], x))


def test_modules_say_how_they_were_made():
    made = RMSNorm(16), FusedRMSNormGated(16), L2Norm(), RotaryEmbedding(16), ShortConvolution(8, 4)
    assert [repr(each) for each in made] == [
        "RMSNorm(16, eps=1e-05, elementwise_affine=True)",
        "FusedRMSNormGated(16, eps=1e-05, elementwise_affine=True, activation=swish)",
        "L2Norm(eps=1e-06)",
        "RotaryEmbedding(16, base=10000.0, interleaved=False)",
        "ShortConvolution(8, 4, bias=False, activation=silu)",
    ]
