"""How far numbers that are not finite may go: products with a mask's zeros would spread them."""

from __future__ import annotations

import math

from torch import Tensor

from fla.ops.common.device import accumulator, on_host


def finite(*tensors: Tensor | None) -> bool:
    """Whether the sum of each is, for which a device would have to be waited for.

    Where it is, so are all elements.
    """
    return all(x is None or math.isfinite(x.sum(dtype=accumulator(x.dtype))) for x in tensors)


def apart(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x [.., C, D] made finite, and what to add where it is seen: zero, or NaN from there on.

    None on the CPU where nothing is to be added.
    """
    if on_host(x) and finite(x):
        return x, None
    return x.nan_to_num(0, 0, 0), (x * 0).cumsum(-2)
