"""Operands of the softmax engine, its textbook, and how the two are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from fla.ops.attn import eager, eager_blocks, naive_parallel_attn, parallel_attn
from fla.testing.compare import relative_error


def operands(T, B=1, H=2, G=2, K=16, V=24, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T)
    sizes = {"q": (H * G, K), "k": (H, K), "v": (H, V)}
    made = {
        name: torch.randn(B, T, *size, generator=generator, dtype=torch.float64).to(dtype)
        for name, size in sizes.items()
    }
    gates = torch.randn(B, T, H * G, generator=generator, dtype=torch.float64)
    sink = torch.randn(H * G, generator=generator, dtype=torch.float64)
    return made, gates, sink


def results(run, arguments):
    """The output and the gradient of every floating-point argument under a fixed cotangent."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    o = run(**{**arguments, **leaves})
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(o)
    found = torch.autograd.grad(o, list(leaves.values()), cotangent)
    return {"o": o.detach()} | {f"d{n}": g for n, g in zip(leaves, found, strict=True)}


def textbook(q, k, v, g=None, scale=None, window_size=None, sink_bias=None):
    return naive_parallel_attn(q, k, v, scale, window_size, g=g, sink_bias=sink_bias)[0]


def widened(arguments):
    return {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def agree(arguments, bound, run=parallel_attn, reference=textbook):
    found, expected = results(run, arguments), results(reference, widened(arguments))
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= bound, errors


def call_a_device(monkeypatch):
    """Have no value asked for."""
    for module in (eager, eager_blocks):
        monkeypatch.setattr(module, "on_host", lambda x: False)


def decoding(bounds, dtype=torch.float64, **sizes):
    tensors, draws, sink = operands(bounds[-1], dtype=dtype, **sizes)
    HQ, K = tensors["q"].shape[2:]
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, len(bounds) - 1, HQ, K, generator=generator, dtype=torch.float64).to(dtype)
    return {**tensors, "q": q, "cu_seqlens": torch.tensor(bounds)}, draws, sink
