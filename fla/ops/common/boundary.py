"""The boundary to PyTorch: a forward and a backward operator, one differentiable pair.

To torch.compile, CUDA graphs and autograd each engine is two opaque calls.  ``Library`` rather than
``custom_op`` because it costs a third of the time a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_library = torch.library.Library("fla", "FRAGMENT")


class Operator:
    """``fla::name``, from its schema, what it does and the shapes it returns."""

    def __init__(self, schema: str, run: Callable[..., Any], fake: Callable[..., Any]):
        name = schema.split("(")[0]
        self.name = f"fla::{name}"

        def below_autocast(*args):
            device = args[0].device.type
            if not torch.is_autocast_enabled(device):
                return run(*args)
            with torch.autocast(device, enabled=False):  # the engines choose their own precision
                return run(*args)

        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, below_autocast, "CompositeExplicitAutograd")
        torch.library.register_fake(self.name, fake, lib=_library)
        self._run = below_autocast
        self._dispatched = getattr(torch.ops.fla, name).default

    def __call__(self, *args):
        if not _watched(args[0]):
            return self._run(*args)
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise RuntimeError(f"{self.name} has no forward-mode derivative")
        return self._dispatched(*args)


def _has_tangent(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _watched(x: torch.Tensor) -> bool:
    """Whether PyTorch may want to know of a call.

    Where nothing differentiates, traces or transforms it, its way through the dispatcher would only
    cost what a step of decoding notices.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_grad_enabled()
        or type(x) not in (torch.Tensor, torch.nn.Parameter)
        or x.is_meta
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def differentiable(
    forward: Operator,
    backward: Operator,
    save: Callable[..., None],
    gradients: Callable[..., tuple[Any, ...]],
) -> None:
    """Make ``backward`` the derivative of ``forward``, and its own derivative an error.

    ``save(ctx, inputs, output)`` keeps what the backward wants; ``gradients(ctx, *grads)`` calls it
    and returns a gradient, or None, for each input of ``forward``.
    """

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    torch.library.register_autograd(forward.name, gradients, setup_context=setup, lib=_library)

    def refuse(ctx, *grads):
        raise RuntimeError(f"{forward.name} has no second derivative")

    torch.library.register_autograd(backward.name, refuse, lib=_library)


def absent(like: torch.Tensor) -> torch.Tensor:
    """What an operator returns in place of a result that was not asked for."""
    return like.new_empty(0)
