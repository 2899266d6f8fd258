"""Operators inside PyTorch: compiled, under autocast, without gradients, checkpointed."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from typing import ClassVar
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from alone import run_alone
from shapes import variants
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from fla import ops
from fla.modules.conv import engine as conv
from fla.modules.norm import engine as norm
from fla.ops.attn import engine as attn
from fla.ops.common.boundary import Operator
from fla.ops.kda import engine as kda
from fla.ops.kda import gate
from fla.ops.simple_gla import engine as simple_gla
from fla.testing import Shape
from fla.testing.compare import named_results, relative_error

SHAPE = Shape(T=37)


def every(*conditions):
    """One variant of each operator that has gradients: the one with the most arguments."""
    richest = {}
    for spec, variant in variants(*conditions):
        size = len(spec.arguments(SHAPE, variant))
        if spec.gradients and size > richest.get(spec.name, (0,))[0]:
            richest[spec.name] = (size, spec, variant)
    cases = [(spec, variant) for _, spec, variant in richest.values()]
    return pytest.mark.parametrize("spec, variant", cases, ids=[f"{c[0]}" for c in cases])


def compare(spec, arguments, run, bound=1e-6):
    expected = named_results(spec.outputs, arguments, spec.gradients)
    found = named_results(run, arguments, spec.gradients)
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert relative_error(found[name], expected[name]) <= bound, name


def compiles_once(spec, variant, shapes):
    """The graph of the first shape, forward and backward, serves all others."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spec.outputs, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for shape in shapes:
        compare(spec, spec.arguments(shape, variant, torch.float32), compiled)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0], counts


@every()
def test_compiles_once_for_20_lengths(spec, variant):
    compiles_once(spec, variant, [Shape(T=T, B=3) for T in range(40, 60)])


@every(lambda spec: spec.packed)
def test_compiles_once_for_other_packings(spec, variant):
    packings = ((40, 20, 31), (0, 50, 61), (44, 45, 46))
    compiles_once(spec, variant, [Shape.packed(*lengths) for lengths in packings])


@pytest.mark.parametrize("spec, variant", list(variants()), ids=lambda x: f"{x}")
def test_shapes_and_strides_are_foretold(spec, variant):
    """Of every result, forward and backward: what is compiled relies on them."""
    calls = []
    call = Operator.__call__

    def noted(operator, *args):
        operands = [x.detach() if isinstance(x, torch.Tensor) else x for x in args[:-1]]
        calls.append((operator, [*operands, *args[-1]]))
        return call(operator, *args)

    with mock.patch.object(Operator, "__call__", noted):
        arguments = spec.arguments(SHAPE, variant, torch.float32)
        named_results(spec.outputs, arguments, spec.gradients)
    assert calls
    for operator, args in calls:
        torch.library.opcheck(operator._dispatched, args, test_utils="test_faketensor")


def test_options_are_the_last_of_what_pytorch_is_shown():
    """In their order; without defaults, which the dispatcher would leave out."""
    engines = attn, simple_gla, kda, gate, conv, norm
    operators = [x for each in engines for x in vars(each).values() if isinstance(x, Operator)]
    assert len(operators) == 15
    for operator in operators:
        fields = operator._options._fields
        last = operator._dispatched._schema.arguments[-len(fields) :]
        assert tuple(x.name for x in last) == fields
        assert not any(x.has_default_value() for x in last)


def test_the_old_name_of_the_layout_compiles():
    """The warning that it gives has no place in a graph."""
    x = torch.randn(1, 5, 2, 8)

    def run(x):
        return ops.fused_recurrent_simple_gla(x, x, x, transpose_state_layout=True)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.fused_recurrent_simple_gla(x, x, x)[0])


@every()
def test_autocast_changes_nothing(spec, variant):
    def under_autocast(arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return spec.outputs(arguments)

    compare(spec, spec.arguments(SHAPE, variant, torch.float32), under_autocast, bound=0)


@every()
def test_without_gradients(spec, variant):
    arguments = spec.arguments(SHAPE, variant, torch.float32)
    expected = spec.outputs(arguments)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = spec.outputs(arguments)
        assert not any(each.requires_grad for each in found)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_trace_holds_one_call_for_all_lengths(mode):
    def run(x):
        return ops.chunk_simple_gla(x, x, x)[0]

    x = torch.randn(1, 37, 2, 8)
    with mode():
        traced = torch.jit.trace(run, (x,), check_trace=False)
        assert torch.equal(traced(x[:, :9]), run(x[:, :9]))
    assert "fla::linear_forward" in str(traced.graph)


class Wrapped(torch.Tensor):
    """A tensor around another one, which operators have to take out first."""

    calls: ClassVar[list[str]] = []
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments, keywords=None):
        cls.calls.append(str(function))
        arguments = tree_map_only(Wrapped, lambda x: x.inner, arguments)
        return function(*arguments, **keywords or {})


def test_a_wrapped_tensor_among_others():
    x = torch.randn(1, 37, 2, 8)
    Wrapped.calls.clear()
    o = ops.chunk_simple_gla(x, x, Wrapped(x))[0]
    assert Wrapped.calls == ["fla.linear_forward.default"]
    assert torch.equal(o, ops.chunk_simple_gla(x, x, x)[0])


@every()
def test_a_graph_from_before_dispatch_holds_calls_too(spec, variant):
    arguments = spec.arguments(SHAPE, variant, torch.float32)

    def run(v):
        return spec.outputs({**arguments, "v": v})

    if "v" in arguments:
        graph = make_fx(run, pre_dispatch=True)(arguments["v"])
        assert "torch.ops.fla." in graph.code
        assert torch.equal(graph(arguments["v"])[0], run(arguments["v"])[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("device", ["meta", "cuda"])
@every(lambda spec: "lightning" not in spec.name)
def test_shapes_alone_want_no_device(spec, variant, device):
    """Neither one that is there nor a word about what runs on it."""

    def elsewhere(x):
        return torch.empty(x.shape, dtype=x.dtype, device=device)

    arguments = spec.arguments(SHAPE, variant, torch.float32)
    expected = spec.outputs(arguments)
    with contextlib.nullcontext() if device == "meta" else FakeTensorMode():
        shapes = spec.outputs(tree_map_only(torch.Tensor, elsewhere, arguments))
    assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in expected]


@every()
def test_activation_checkpointing(spec, variant):
    run = functools.partial(checkpoint, spec.outputs, use_reentrant=False)
    compare(spec, spec.arguments(SHAPE, variant, torch.float32), run, bound=0)


@every()
def test_some_gradients_alone(spec, variant):
    """Asking for one gradient gives what asking for all gives."""
    arguments = spec.arguments(SHAPE, variant, torch.float32)
    together = named_results(spec.outputs, arguments, spec.gradients)
    for name in spec.gradients:
        alone = named_results(spec.outputs, arguments, (name,))
        assert all(torch.equal(alone[each], together[each]) for each in alone)


@every()
def test_the_final_state_alone_has_gradients(spec, variant):
    if not spec.state:
        return
    arguments = {**spec.arguments(SHAPE, variant), "output_final_state": True}
    wide = {**arguments}
    found = named_results(lambda a: spec.outputs(a)[1:], arguments, ("k", "v"))
    expected = named_results(lambda a: spec.expected(a)[1:], wide, ("k", "v"))
    for name in ("dk", "dv"):
        assert relative_error(found[name], expected[name]) < 1e-11, name


class Cut(torch.autograd.Function):
    """The identity, through which no gradient comes back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return None


@every()
def test_an_output_that_nothing_asks_about(spec, variant):
    arguments = spec.arguments(SHAPE, variant)
    found = named_results(
        lambda a: [Cut.apply(x) for x in spec.outputs(a)], arguments, spec.gradients
    )
    assert not any(value.any() for name, value in found.items() if name.startswith("d"))


def called(name, q, **more):
    if "kda" in name:
        more |= {"g": -q.detach().abs(), "beta": q.detach()[..., 0].sigmoid()}
    return getattr(ops, name)(q, q.detach(), q.detach(), **more)


@pytest.mark.parametrize("T, lengths", [(1, None), (37, None), (37, [0, 0, 20, 37])])
@pytest.mark.parametrize(
    "name", ["chunk_simple_gla", "fused_recurrent_simple_gla", "chunk_kda", "fused_recurrent_kda"]
)
def test_results_may_be_written_over(name, T, lengths):
    q = torch.randn(1, T, 2, 8, requires_grad=True)
    bounds = torch.tensor(lengths) if lengths else None
    results = called(name, q, output_final_state=True, cu_seqlens=bounds)
    (expected,) = torch.autograd.grad(sum((x * 2).sum() for x in results), q, retain_graph=True)
    (found,) = torch.autograd.grad(sum(x.mul_(2).sum() for x in results), q)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("T", [1, 37])
@pytest.mark.parametrize("name", ["chunk_simple_gla", "chunk_kda", "parallel_attn"])
def test_results_without_gradients_may_be_written_over(name, T):
    q, weight = torch.randn(1, T, 2, 8), torch.ones(8, requires_grad=True)
    with torch.no_grad():
        results = called(name, q, **({} if "attn" in name else {"output_final_state": True}))
    for x in results if isinstance(results, tuple) else (results,):
        x.mul_(weight).sum().backward()
    assert weight.grad.any()


def test_compiles_few_times_for_many_windows():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.parallel_attn, fullgraph=True, backend=counter)
    q = torch.randn(1, 37, 2, 8)
    for window in range(3, 20):
        found = compiled(q, q, q, window_size=window)
        assert torch.equal(found, ops.parallel_attn(q, q, q, window_size=window))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["chunk_simple_gla", "chunk_kda", "parallel_attn"])
def test_several_gradients_at_once(name):
    def o(q):
        results = called(name, q)
        return results[0] if isinstance(results, tuple) else results

    q = torch.randn(1, 5, 2, 4, dtype=torch.float64)
    found, expected = (
        torch.autograd.functional.jacobian(o, q, vectorize=at_once) for at_once in (True, False)
    )
    torch.testing.assert_close(found, expected)


def test_first_calls_in_the_context_of_a_device():
    """What implementations keep from their import is not on the caller's default device."""
    code = """
import torch
from fla import ops
x, beta = torch.randn(1, 20, 2, 8), torch.rand(1, 20, 2)
with torch.no_grad(), torch.device("meta"):
    ops.chunk_simple_gla(x, x, x, -beta)
    ops.parallel_attn(x, x, x, -beta)
    ops.chunk_kda(x, x, x, -x.abs(), beta, use_qk_l2norm_in_kernel=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@every()
def test_a_second_derivative_is_an_error(spec, variant):
    arguments = spec.arguments(SHAPE, variant)
    x = arguments[spec.gradients[0]].requires_grad_()
    o = spec.outputs(arguments)[0]
    (dx,) = torch.autograd.grad(o.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


@every()
def test_a_forward_mode_derivative_is_an_error(spec, variant):
    arguments = spec.arguments(SHAPE, variant)
    x = arguments[spec.gradients[0]]
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="forward-mode derivative"),
    ):
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        spec.outputs({**arguments, spec.gradients[0]: dual})


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        lambda run: lambda x: torch.func.vjp(run, x),
        torch.func.jacrev,
        lambda run: lambda x: torch.vmap(torch.func.grad(run))(torch.stack([x, x])),
        lambda run: torch.func.grad(lambda x: torch.vmap(run)(torch.stack([x, x])).sum()),
    ],
    ids=["grad", "vjp", "jacrev", "vmap of grad", "grad of vmap"],
)
@every()
def test_a_derivative_of_torch_func_is_an_error(spec, variant, transform):
    arguments = spec.arguments(SHAPE, variant)
    name = spec.gradients[0]
    with pytest.raises(RuntimeError, match=r"fla::\w+ has no derivative in torch\.func"):
        transform(lambda x: spec.outputs({**arguments, name: x})[0].sum())(arguments[name])


@every()
def test_torch_func_around_what_it_does_not_differentiate(spec, variant):
    arguments = spec.arguments(SHAPE, variant)
    name = spec.gradients[0]

    def run(x):
        return spec.outputs({**arguments, name: x})[0]

    x = arguments[name]
    expected = run(x)
    rows = torch.vmap(run)(torch.stack([x, x]))
    assert relative_error(rows, torch.stack([expected, expected])) < 1e-11
    factor = torch.ones((), dtype=x.dtype)
    found = torch.func.grad(lambda c: (c * run(x)).sum())(factor)
    assert relative_error(found, expected.sum()) < 1e-11
    detached = torch.func.grad(lambda x: (x.sum() * run(x.detach())).sum())(x)
    assert relative_error(detached, expected.sum().expand_as(x)) < 1e-11


COLD = """
import torch
from fla import ops

q = torch.randn(1, 64, 2, 8)
arguments = q, q, q, -q.abs(), q[..., 0].sigmoid()
run = lambda *x: ops.chunk_kda(*x, use_qk_l2norm_in_kernel=True)[0]
compiled = torch.compile(run, fullgraph=True, backend="eager")(*arguments)
torch.testing.assert_close(compiled, run(*arguments))
"""


def test_the_first_call_of_a_process_may_be_compiled():
    """What its graph imports is imported for all calls."""
    run_alone("-c", COLD)
