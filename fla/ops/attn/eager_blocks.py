"""Blocks of queries and keys of a call of softmax attention in plain PyTorch, one after another.

Blocks are left out that a row does not see, or that its gate has forgotten.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fla.ops.common.device import accumulator, on_host

LOG2E = math.log2(math.e)
# Rows of a block, and elements of a block of logits: small enough for the cache, large enough that
# PyTorch's overhead a call does not show.
_ROWS = 128
_RUN = 1 << 19
_RUN_ON_DEVICES = 1 << 24
# With very many keys a block has fewer rows, for the sake of memory, down to these.
_LARGEST_RUN = 1 << 23
_FEWEST_ROWS = 16
# A token with this gate forgets all before it; with its negative it sees nothing else.  In sums
# with anything steeper even fp64 would lose the gates beside it.
_STEEPEST_GATE = -1e6


def run_of(x: Tensor) -> int:
    """Elements of what is worked on at once."""
    return _RUN if on_host(x) else _RUN_ON_DEVICES


def lowest(x: Tensor) -> float:
    """The maximum of no logits: from it -inf, and another base, are still in range."""
    return torch.finfo(x.dtype).min / 2


@dataclasses.dataclass(frozen=True)
class _Block:
    """Rows [start, stop) of some lanes and the keys [first, stop) that they meet."""

    lanes: slice
    first: int
    start: int
    stop: int
    groups: int

    @property
    def keys(self) -> slice:
        return slice(self.first, self.stop)

    @property
    def sizes(self) -> tuple[int, int, int]:
        lanes, rows = self.lanes.stop - self.lanes.start, self.stop - self.start
        return lanes, self.groups * rows, self.stop - self.first

    def of_rows(self, x: Tensor) -> Tensor:
        """[all lanes, G, T, ...] -> [lanes, G, rows, ...]."""
        return x[self.lanes, :, self.start : self.stop]

    def split(self, x: Tensor) -> Tensor:
        """[lanes, G * rows, ...] -> [lanes, G, rows, ...]."""
        return x.unflatten(1, (self.groups, self.stop - self.start))


class Walk:
    """One call's operands, heads before time, and how they are worked through block by block.

    A lane is a key head of a batch row, with the G query heads that share it.
    """

    def __init__(self, q, k, v, g, cu_seqlens, options):
        self.dtype, self.scale = accumulator(q.dtype), options.scale
        self.shape = q.shape[:3]
        self.H, self.G = k.shape[2], q.shape[2] // k.shape[2]
        self.T, self.on_host = q.shape[1], on_host(q)
        self.seen = _Seen(self.T, options.window_size, cu_seqlens, q)
        self.q = self.heads(q, self.dtype) * (options.scale * LOG2E)  # [lanes, G, T, K]
        self.k = self.heads(k, self.dtype).squeeze(1)  # [lanes, T, K]
        self.v = self.heads(v, self.dtype).squeeze(1)  # [lanes, T, V]
        self.run = run_of(q)
        self.rows = _ROWS
        while self._row_block() > _LARGEST_RUN and self.rows > _FEWEST_ROWS:
            self.rows //= 2
        self.gate = None
        if g is not None:
            self.gate = _Gate(self.heads(g, torch.float64), self.rows, self.seen.alone())
        self._buffers: dict[str, Tensor] = {}

    def heads(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, heads, ...] -> [lanes, G or 1, T, ...]; zero for tokens of no sequence."""
        x = x.unflatten(2, (self.H, -1)).movedim(1, 3).to(dtype)
        return self.seen.zero_elsewhere(x.flatten(0, 1)).contiguous()

    def merge(self, x: Tensor) -> Tensor:
        """[lanes, G or 1, T, ...] -> [B, T, heads, ...]."""
        return x.unflatten(0, (self.shape[0], self.H)).movedim(3, 1).flatten(2, 3)

    def _row_block(self) -> int:
        """The most elements of a block of one lane."""
        keys = self.T if self.seen.window is None else min(self.T, self.rows + self.seen.window)
        return self.G * self.rows * keys

    def scratch(self, name: str, shape, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer that each block writes anew; new memory would cost more than the arithmetic."""
        if name not in self._buffers:
            one = self._row_block()
            most = max(one, min(self.run, one * self.q.shape[0]))
            self._buffers[name] = self.q.new_empty(most, dtype=dtype or self.dtype)
        return self._buffers[name][: math.prod(shape)].view(shape)

    def blocks(self, floor: Tensor | None = None) -> Iterator[_Block]:
        """All blocks; ``floor`` [lanes, G, T] is what each row's lse is known to reach."""
        if self.gate is not None and self.on_host:
            if floor is None:  # each row sees at least its own key
                floor = (self.q * self.k[:, None]).sum(-1)
            self.gate.bound(self.q, self.k, floor, self.T)
        for start in range(0, self.T, self.rows):
            stop = min(start + self.rows, self.T)
            first = self._first_keys(start)
            if self.gate is not None:
                self.gate.enter(start, stop, min(first))
            lane = 0
            while lane < len(first):
                end, least = lane, stop
                while end < len(first):
                    wider = min(least, first[end])
                    size = (end + 1 - lane) * self.G * (stop - start) * (stop - wider)
                    if end > lane and size > self.run:
                        break
                    end, least = end + 1, wider
                yield _Block(slice(lane, end), least, start, stop, self.G)
                lane = end

    def _first_keys(self, start: int) -> list[int]:
        """For each lane the first key that the block of rows at ``start`` has to meet."""
        seen = self.seen.first(start)
        if self.gate is None or not self.on_host:
            return [seen] * self.q.shape[0]
        return [max(seen, first) for first in self.gate.first_keys(start)]

    def logits(self, block: _Block) -> Tensor:
        """s [lanes, G * rows, keys] to the base 2, -inf where a key is not seen."""
        b_q = block.of_rows(self.q).flatten(1, 2)
        b_k = self.k[block.lanes, block.keys]
        out = self.scratch("logits", block.sizes)
        if self.gate is None:
            out = torch.bmm(b_q, b_k.mT, out=out)
        else:
            lanes, _, keys = block.sizes
            span = self.scratch(
                "span", (lanes, self.G, block.stop - block.start, keys), torch.float64
            )
            block.split(out).copy_(self.gate.span(block, out=span))
            torch.baddbmm(out, b_q, b_k.mT, out=out)
        self.seen.hide(block.split(out), block)
        return out


class _Seen:
    """Which keys a row sees: those from ``low`` to itself.

    ``low`` never decreases with the row.  Where it lies on a device its values are not asked for:
    then blocks meet more keys, and all of them are masked.
    """

    def __init__(self, T: int, window: int | None, cu_seqlens: Tensor | None, q: Tensor):
        self.window = window
        self.rows = torch.arange(T, device=q.device)
        self.low = self.there = None
        if cu_seqlens is not None:
            bounds = cu_seqlens.long()
            self.low = bounds[torch.searchsorted(bounds, self.rows, right=True) - 1]
            if not on_host(q):
                self.there = self.rows < bounds[-1]
                self.low = torch.where(self.there, self.low, T)
        if window is not None:
            low = self.rows - (window - 1)
            self.low = low.clamp_(min=0) if self.low is None else torch.maximum(self.low, low)
        self.host = self.low.tolist() if self.low is not None and on_host(q) else None

    def first(self, row: int) -> int:
        """A key before which nothing is seen from ``row`` on."""
        if self.host is not None:
            return self.host[row]
        return 0 if self.window is None else max(row - self.window + 1, 0)

    def alone(self) -> Tensor:
        """Which rows see no key but their own [T]: their gates are in no pair."""
        return self.rows == (0 if self.low is None else self.low)

    def zero_elsewhere(self, x: Tensor) -> Tensor:
        """x [lanes, groups, T, ...], zero for tokens of no sequence."""
        if self.there is None:
            return x
        return torch.where(self.there.view(-1, *[1] * (x.dim() - 3)), x, 0)

    def hide(self, logits: Tensor, block: _Block) -> None:
        """-inf into logits [.., rows, keys] where the row does not see the key."""
        rows = self.rows[block.start : block.stop]
        later = rows > rows[:, None]
        logits[..., block.start - block.first :].masked_fill_(later, -torch.inf)
        if self.low is not None:
            last = block.stop if self.host is None else self.host[block.stop - 1]
            if last > block.first:
                early = self.rows[block.first : last] < self.low[block.start : block.stop, None]
                logits[..., : last - block.first].masked_fill_(early, -torch.inf)


def bounded(g: Tensor) -> Tensor:
    return g.clamp(_STEEPEST_GATE, -_STEEPEST_GATE)


class _Gate:
    """Sums of a gate [lanes, G, T], kept so that near pairs never meet a large number.

    They run inside blocks of rows only; from a block of rows backwards, the totals of the blocks
    between are added.  All of them are to the base 2 and in fp64.
    """

    def __init__(self, g: Tensor, rows: int, alone: Tensor):
        g = bounded(g).masked_fill_(alone, 0).mul_(LOG2E)
        g = torch.nn.functional.pad(g, (0, -g.shape[-1] % rows))
        self.size = rows
        self.until = g.unflatten(-1, (-1, rows)).cumsum(-1)  # [lanes, G, blocks, rows], and itself
        self.total = self.until[..., -1]  # [lanes, G, blocks]
        self.after = self.total[..., None] - self.until  # what follows each token in its block

    def enter(self, start: int, stop: int, first: int) -> None:
        """Measure the tokens [first, stop) from ``start``, negative before it."""
        at, self.first = start // self.size, first // self.size
        before = self.after[:, :, self.first : at] + self._between(at)[:, :, self.first :, None]
        self.origin = self.first * self.size
        self.offset = torch.cat([-before.flatten(2), self.until[:, :, at, : stop - start]], -1)

    def _between(self, at: int) -> Tensor:
        """The sum of the blocks between each block before ``at`` and ``at`` itself."""
        later = self.total[:, :, 1:at].flip(-1).cumsum(-1).flip(-1)
        return torch.nn.functional.pad(later, (0, min(at, 1)))

    def span(self, block: _Block, out: Tensor) -> Tensor:
        """G_i − G_j for the rows and keys of a block: out [lanes, G, rows, keys]."""
        offset = self.offset[block.lanes, :, block.first - self.origin :]
        rows = offset[..., block.start - block.first :, None]
        return torch.sub(rows, offset[:, :, None], out=out)

    def bound(self, q: Tensor, k: Tensor, floor: Tensor, T: int) -> None:
        """Prepare ``first_keys``: for each block how large q, k and the gate's sums can be.

        A block of keys is left out where each of its pairs lies so far below its row's lse that all
        such keys together do not show in the result.  That holds for any gate.
        """
        margin = (math.log(torch.finfo(q.dtype).eps) - 1 - math.log(T)) * LOG2E
        pad = (0, -T % self.size)
        norms = (torch.nn.functional.pad(x.norm(dim=-1), pad) for x in (q, k))
        self.q, self.k = (x.unflatten(-1, (-1, self.size)).amax(-1) for x in norms)
        floor = torch.nn.functional.pad(floor, pad, value=torch.inf)
        self.reach = (self.until - floor.view_as(self.until)).amax(-1) - margin
        self.rise = self.after.amax(-1)

    def first_keys(self, start: int) -> list[int]:
        """For each lane the first key that rows at ``start`` cannot leave out."""
        at = start // self.size
        bound = self.q[:, :, at, None] * self.k[:, None, :at] + self._between(at)
        bound += self.rise[:, :, :at] + self.reach[:, :, at, None]
        needed = ~(bound < 0).all(1)  # NaN is needed too
        needed = torch.nn.functional.pad(needed, (0, 1), value=True)
        return (needed.to(torch.uint8).argmax(-1) * self.size).tolist()
