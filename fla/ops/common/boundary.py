"""The boundary to PyTorch: a forward and a backward operator, one differentiable pair.

To torch.compile, CUDA graphs and autograd each engine is two opaque calls.  ``Library`` rather than
``custom_op`` because it costs a third of the time a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("fla", "FRAGMENT")


def operator(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define ``fla::name`` from its schema, what it does and the shapes it returns."""
    name = schema.split("(")[0]

    def below_autocast(*args):
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return run(*args)
        with torch.autocast(device, enabled=False):  # the engines choose their own precision
            return run(*args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, below_autocast, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fla::{name}", fake, lib=_library)
    return getattr(torch.ops.fla, name).default


def differentiable(
    forward: Any,
    backward: Any,
    save: Callable[..., None],
    gradients: Callable[..., tuple[Any, ...]],
) -> Callable[..., Any]:
    """Make ``backward`` the derivative of ``forward``, and its own derivative an error.

    Returns what an engine calls in place of ``forward``.

    ``save(ctx, inputs, output)`` keeps what the backward wants; ``gradients(ctx, *grads)`` calls it
    and returns a gradient, or None, for each input of ``forward``.
    """
    name = forward.name()

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    torch.library.register_autograd(name, gradients, setup_context=setup, lib=_library)

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name} has no second derivative")

    torch.library.register_autograd(backward.name(), refuse, lib=_library)

    def call(*args):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return forward(*args)
        with torch._C._AutoDispatchBelowAutograd():  # its Python layer costs a decoding step dear
            return forward(*args)

    return call


def absent(like: torch.Tensor) -> torch.Tensor:
    """What an operator returns in place of a result that was not asked for."""
    return like.new_empty(0)
