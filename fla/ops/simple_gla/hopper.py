"""The linear engine on Hopper: the walks of long calls; what it does not take, Triton does."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from fla.ops.simple_gla import triton as portable
from fla.ops.simple_gla.blocks import Call
from fla.ops.simple_gla.hopper_turns import run_turns, takes
from fla.ops.simple_gla.hopper_walk import BZ, run_walk

# Calls of fewer elements are short beside the host's time to describe their tensors
SMALLEST = 3 << 24


def walk(
    call: Call, x, y, z, out_dtype, *, segment: int, new_norm: bool = False,
    norm: Tensor | None = None, dnorm: Tensor | None = None, beside: Tensor | None = None,
    in_turns: bool = False, **more,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``triton.walk``, by a kernel for Hopper where one takes it; outputs alone ``in_turns``."""
    B, X = x.shape[0], x.shape[-1]
    Z = z.shape[-1]
    if (
        X not in (64, 128, 256)
        or Z % BZ.value
        or (X == 256 and beside is not None)  # more than registers hold
        or (segment and B > 1)  # segments are a row's
        or new_norm
        or norm is not None
        or any(each is not None and each.data_ptr() % 16 for each in (x, y, z, beside))
    ):
        return portable.walk(
            call, x, y, z, out_dtype, segment=segment, new_norm=new_norm, norm=norm, dnorm=dnorm,
            beside=beside, **more,
        )  # fmt: skip
    if in_turns:
        return run_turns(call, x, y, z, **more)
    return run_walk(call, x, y, z, segment=segment, beside=beside, **more)


def _kernels(q: Tensor, v: Tensor, backward: bool = False) -> dict[str, Any]:
    """What long calls run: walks of which a multiprocessor holds one program, or in one piece."""
    if q.numel() + v.numel() < SMALLEST:
        return {}
    if takes(q, v) and not backward:
        return {"walk": functools.partial(walk, in_turns=True), "at_once": 0}
    return {"walk": walk, "at_once": 1}


def forward(q, k, v, *more):
    return portable.forward(q, k, v, *more, **_kernels(q, v))


def backward(do, dstate, dz, q, k, v, *more):
    return portable.backward(do, dstate, dz, q, k, v, *more, **_kernels(q, v, backward=True))


attention_map, new_sums = portable.attention_map, portable.new_sums
