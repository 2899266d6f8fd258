"""How modules are compared with fp64, in plain PyTorch and as kernels that are interpreted."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch

from fla.modules.conv import engine as conv_engine
from fla.modules.norm import engine as norm_engine
from fla.ops.common import dispatch
from fla.testing.compare import relative_error

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@contextlib.contextmanager
def implementation(name):
    """Run this one; the interpreter takes tensors on the CPU."""
    with contextlib.ExitStack() as stack:
        for engine in (norm_engine, conv_engine) if name == "triton" else ():
            stack.enter_context(mock.patch.object(engine, "lacks_triton", lambda *_: None))
        stack.enter_context(dispatch.use(name))
        yield


def draw(*size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def results(run, inputs, wide=False):
    """Outputs and gradients under a fixed cotangent of each output."""
    leaves = {
        name: (x.double() if wide else x).detach().requires_grad_()
        for name, x in inputs.items()
        if x is not None
    }
    outputs = [x for x in run(**leaves) if x is not None]
    loss = sum((x * draw(*x.shape, seed=7).to(x.dtype)).sum() for x in outputs)
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    named = dict(zip((f"d{name}" for name in leaves), gradients, strict=True))
    return {f"out[{i}]": x.detach() for i, x in enumerate(outputs)} | named


def agree(run, reference, inputs, name, dtype, bound=None):
    """Outputs and gradients within rounding of fp64 on the same values; dtypes are kept."""
    with implementation(name):
        found = results(run, inputs)
    expected = results(reference, inputs, wide=True)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(found[key], value) < (bound or BOUNDS[dtype]), key
        if key.startswith("d"):
            assert found[key].dtype == inputs[key[1:]].dtype, key
