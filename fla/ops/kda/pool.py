"""A pool of states, as whole-tensor PyTorch writes it."""

from __future__ import annotations

import torch
from torch import Tensor

from fla.ops.common.device import on_host


def longest(lengths: Tensor, most: int) -> int:
    """How many tokens the longest sequence has; what a device knows is not asked for."""
    if on_host(lengths):
        return int(lengths.max()) if lengths.numel() else 0
    return most


def load(pool: Tensor, slots: Tensor) -> Tensor:
    """The states [N, ...] in the ``slots`` [N] of ``pool``, zeros where those are negative."""
    if not slots.shape[0] or not pool.shape[0]:
        return pool.new_zeros(slots.shape[0], *pool.shape[1:])
    states = pool.index_select(0, slots.clamp(min=0))
    return states.masked_fill_((slots < 0)[:, None, None, None], 0)


def store(pool: Tensor, slots: Tensor, states: Tensor) -> None:
    """Write ``states`` to the ``slots`` [N] of ``pool`` that are not negative.

    What is dropped repeats a write that is kept, or what stands in the pool already, so that no
    shape depends on how many there are.
    """
    if not slots.shape[0] or not pool.shape[0]:
        return
    kept, states = slots >= 0, states.to(pool.dtype)
    first, any_kept = kept.to(torch.uint8).argmax()[None], kept.any()
    spare = torch.where(any_kept, states.index_select(0, first), pool[:1])
    slots = torch.where(kept, slots, torch.where(any_kept, slots.index_select(0, first), 0))
    pool.index_copy_(0, slots.long(), torch.where(kept[:, None, None, None], states, spare))
