"""Segments of long sequences, side by side where the heads are too few to fill a chip.

Three steps: *summarise* what each segment adds to a state and how much it keeps of one that enters,
*join* these into the state that enters each segment, and *run* all of them.  The first and the last
are walks of ``chain``.  The same steps serve segments that lie on different devices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.common.kernels import cdiv

_BLOCK = 1024


@triton.jit(do_not_specialize=["segments", "heads", "reverse"])
def join_kernel(carry, kept, segments, heads, reverse, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """S ← kept S + added, segment by segment; what a segment adds gives way to what enters it.

    A program owns BLOCK elements of one head's state.  carry [segments, heads, SIZE].
    """
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i_h = tl.program_id(0) // blocks
    o = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b_s = tl.zeros([BLOCK], tl.float32)
    for i in range(0, segments):
        at = (tl.where(reverse != 0, segments - 1 - i, i) * heads + i_h).to(tl.int64)
        b_added = tl.load(carry + at * SIZE + o, mask=o < SIZE, other=0.0)
        s_kept = tl.load(kept + at)
        tl.store(carry + at * SIZE + o, b_s, mask=o < SIZE)
        b_s = b_s * s_kept + b_added


def join(carry: Tensor, kept: Tensor, reverse: bool) -> None:
    """Join the summaries [segments, heads, size] of one pass, in its order of time."""
    segments, heads, size = carry.shape
    join_kernel[(heads * cdiv(size, _BLOCK),)](
        carry, kept, segments, heads, int(reverse), SIZE=size, BLOCK=_BLOCK
    )


def states_between(
    segments: int, heads: int, size: int, passes: int, nothing: Tensor
) -> tuple[Tensor, Tensor | None]:
    """States [passes, segments, heads, size], and what each segment keeps; no need of one alone."""
    if segments == 1:
        return nothing, None
    # zeros: a segment in which no sequence goes on adds nothing and keeps nothing
    states = torch.zeros(passes, segments, heads, size, dtype=torch.float32, device=nothing.device)
    return states, states.new_zeros(passes, segments, heads)
