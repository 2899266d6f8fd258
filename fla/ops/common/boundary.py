"""The boundary to PyTorch: a forward and a backward operator, one differentiable pair.

To torch.compile, CUDA graphs and autograd each engine is two opaque calls.  ``Library`` rather than
``custom_op`` because it costs a third of the time a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.jit import is_tracing

from fla.ops.common.lacking import complete

# What operands are where nothing wraps tensors
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_library = torch.library.Library("fla", "FRAGMENT")


class Operator:
    """``fla::name``, from its schema, what it does and the shapes it returns.

    It is called with operands and, last, what the call wants beside them, an ``options``, which is
    a NamedTuple without tensors.  PyTorch knows nothing but its fields, the schema's last.
    """

    def __init__(
        self, schema: str, run: Callable[..., Any], fake: Callable[..., Any], options: Any
    ):
        name = schema.split("(")[0]
        self.name, self._options = f"fla::{name}", options

        def below_autocast(*args):
            if not torch._C._is_any_autocast_enabled():
                return complete(run, *args)
            # the engines choose their own precision
            with torch.autocast(args[0].device.type, enabled=False):
                return complete(run, *args)

        def whole(*args):
            """An implementation gives None for a result that was not asked for, PyTorch cannot."""
            results = below_autocast(*args)
            if isinstance(results, tuple):
                results = tuple(absent(args[0]) if x is None else x for x in results)
            return _own(results)

        def flat(function):
            return lambda *args: function(*self.together(args))

        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, flat(whole), "CompositeExplicitAutograd")
        torch.library.register_fake(self.name, flat(fake), lib=_library)
        self._run, self.whole = below_autocast, whole
        self._dispatched = getattr(torch.ops.fla, name).default
        self.recorded: Callable[..., Any] | None = None  # where autograd listens

    def __call__(self, *args):
        *operands, options = args
        if _watched(operands):
            if forward_ad._current_level >= 0 and any(map(_has_tangent, operands)):
                raise RuntimeError(f"{self.name} has no forward-mode derivative")
            if _transformed() and torch.is_grad_enabled() and any(map(_in_torch_func, operands)):
                raise RuntimeError(f"{self.name} has no derivative in torch.func, only in autograd")
            return self._dispatched(*operands, *options)
        if self.recorded and torch.is_grad_enabled() and any(map(_requires_grad, operands)):
            return self.recorded(*args)
        results = self._run(*args)
        return results if torch.is_inference_mode_enabled() else _own(results)

    def together(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Operands and options, where the schema's arguments stand one by one."""
        operands = len(args) - len(self._options._fields)
        return *args[:operands], self._options(*args[operands:])


def _own(results: Any) -> Any:
    """Results that may be written over, as views may not that were made where autograd is off."""
    if isinstance(results, tuple):
        return tuple(map(_own, results))
    return results.data if results is not None and results._is_view() else results


def _has_tangent(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _transformed() -> bool:
    """Whether torch.func is at work; what torch.compile traces it cannot look into."""
    return not is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _in_torch_func(x: Any) -> bool:
    """Whether torch.func wants x's gradient, which may lie below levels of vmap."""
    if not isinstance(x, torch.Tensor):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_gradtrackingtensor(x) and x.requires_grad:
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def _requires_grad(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def _is_batched(x: Any) -> bool:
    """Whether x is several gradients, which PyTorch asks for at once."""
    return isinstance(x, torch.Tensor) and torch._C._functorch.is_legacy_batchedtensor(x)


def _watched(operands: list[Any]) -> bool:
    """Whether PyTorch may want to know of a call, beside autograd.

    Where nothing traces or transforms it, its way through the dispatcher would only cost: 8 µs,
    which a step of decoding notices, and 20 µs more where autograd records.
    """
    return (
        is_compiling()
        or is_tracing()
        or forward_ad._current_level >= 0
        or not _PLAIN.issuperset(map(type, operands))
        or operands[0].is_meta
        or (torch._C._current_graph_task_id() >= 0 and any(map(_is_batched, operands)))
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def differentiable(
    forward: Operator,
    backward: Operator,
    save: Callable[..., None],
    gradients: Callable[..., tuple[Any, ...]],
) -> None:
    """Make ``backward`` the derivative of ``forward``, and its own derivative an error.

    ``save(ctx, operands, output)`` keeps what the backward wants beside ``ctx.options``;
    ``gradients(ctx, *grads)`` calls it and returns a gradient, or None, for each operand.
    """

    def refuse(ctx, *grads):
        raise RuntimeError(f"{forward.name} has no second derivative")

    _derive(forward, gradients, save)
    _derive(backward, refuse, lambda ctx, operands, output: None)


def _derive(operator: Operator, gradients: Callable[..., Any], save: Callable[..., None]) -> None:
    """Tell the dispatcher of a derivative, and ``operator`` for calls past the dispatcher."""

    def setup(ctx, args, output):
        *operands, ctx.options = args
        ctx.set_materialize_grads(False)
        save(ctx, operands, output)

    torch.library.register_autograd(
        operator.name,
        lambda ctx, *grads: (*gradients(ctx, *grads), *[None] * len(ctx.options)),
        setup_context=lambda ctx, inputs, output: setup(ctx, operator.together(inputs), output),
        lib=_library,
    )

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = operator.whole(*args)
            setup(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return *gradients(ctx, *grads), None

    operator.recorded = Recorded.apply


def absent(like: torch.Tensor) -> torch.Tensor:
    """What crosses the boundary in place of a result that was not asked for."""
    return like.new_empty(0)
