"""One step of decoding in plain PyTorch: one query a sequence, over all keys of that sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fla.ops.attn.eager_blocks import LOG2E, bounded, lowest, run_of
from fla.ops.common.device import accumulator

# Keys of a block
_KEYS = 64


def decode(q, k, v, g, sink_bias, cu_seqlens, options):
    """o [1, N, HQ, V] of one query a sequence, the keys cut into blocks of one sequence each.

    Every block gives its own maximum, sum and output; a sequence then joins those of its blocks.
    """
    dtype = accumulator(q.dtype)
    HQ = q.shape[2]
    H, V = v.shape[2:]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(2, device=q.device) * k.shape[1]
    where = _KeyBlocks(cu_seqlens, k.shape[1], options.window_size)
    gate = None if g is None else where.sums_after(g[0], options.gate_scale)
    heads = (q[0].to(dtype) * (options.scale * LOG2E)).unflatten(1, (H, -1))  # [N, H, G, K]
    most = heads.new_empty(where.count, H, HQ // H)
    total, o = torch.empty_like(most), heads.new_empty(*most.shape, V)
    run = max(run_of(q) // (where.size * H * max(k.shape[-1], V)), 1)
    for start in range(0, where.count, run):
        at = slice(start, start + run)
        tokens = where.tokens[at]
        # [run, H, size, ...], in memory too: the products want it so
        b_k, b_v = (x[0, tokens].to(dtype).transpose(1, 2).contiguous() for x in (k, v))
        logits = heads[where.sequence[at]] @ b_k.mT  # [run, H, G, size]
        if gate is not None:
            logits += gate[at].transpose(1, 2).unflatten(1, (H, -1))
        logits.masked_fill_(~where.there[at, None, None], -torch.inf)
        most[at] = logits.amax(-1).clamp_(min=lowest(logits))
        weights = logits.sub_(most[at, ..., None]).exp2_()
        total[at], o[at] = weights.sum(-1), weights @ b_v
    return where.join(most, total, o, sink_bias).flatten(1, 2)[None].to(q.dtype)


class _KeyBlocks:
    """The last ``window`` keys of each sequence in blocks, found on the device.

    How many there are follows from shapes alone, so that some may stay empty.
    """

    def __init__(self, cu_seqlens: Tensor, tokens: int, window: int | None):
        N, device = cu_seqlens.shape[0] - 1, cu_seqlens.device
        longest = tokens if window is None else min(window, tokens)
        self.N, self.size = N, max(min(longest, _KEYS), 1)
        self.count = min(-(-tokens // self.size) + N - 1, N * -(-longest // self.size))
        bounds = cu_seqlens.long()
        lengths = bounds.diff().clamp(max=longest)  # [N]
        ends = ((lengths + self.size - 1) // self.size).cumsum(0)
        block = torch.arange(self.count, device=device)
        sequence = torch.searchsorted(ends, block, right=True)  # N where a block stays empty
        self.sequence = sequence.clamp(max=N - 1)
        # counted from the sequence's last key backwards
        rank = ends[self.sequence] - 1 - block
        after = rank[:, None] * self.size + torch.arange(self.size, device=device).flip(0)
        self.there = (after < lengths[self.sequence, None]) & (sequence < N)[:, None]
        last = (bounds[self.sequence + 1, None] - 1).clamp_(min=0)
        self.tokens = torch.where(self.there, last - after, last)  # [count, size]

    def sums_after(self, g: Tensor, scale: float) -> Tensor:
        """scale times the sum of g [tokens, HQ] after each key, [count, size, HQ] to the base 2.

        Inside a block, then over the blocks that follow by doubling their number: nothing is
        subtracted that was added before.
        """
        g = bounded(g[self.tokens].double() * scale).mul_(LOG2E)
        g = g.masked_fill_(~self.there[..., None], 0)
        inside = g.flip(1).cumsum(1).flip(1)  # itself included
        later = self._shift(inside[:, 0], 1)
        step = 1
        while step < self.count:
            later += self._shift(later, step)
            step *= 2
        return torch.nn.functional.pad(inside[:, 1:], (0, 0, 0, 1)) + later[:, None]

    def _shift(self, x: Tensor, step: int) -> Tensor:
        """What stands ``step`` blocks later, zero where that is another sequence."""
        x = torch.nn.functional.pad(x[step:], (0, 0, 0, min(step, self.count)))
        other = torch.nn.functional.pad(self.sequence[step:], (0, min(step, self.count)), value=-1)
        return x.masked_fill((self.sequence != other)[:, None], 0)

    def join(self, most: Tensor, total: Tensor, o: Tensor, sink_bias: Tensor | None) -> Tensor:
        """The output of each sequence from the parts of its blocks."""
        highest = most.new_full((self.N, *most.shape[1:]), lowest(most))  # [N, H, G]
        if sink_bias is not None:
            sink = sink_bias.to(most.dtype).view(most.shape[1:]) * LOG2E
            highest = torch.maximum(highest, sink)
        index = self.sequence[:, None, None].expand_as(most)
        highest = highest.scatter_reduce(0, index, most, "amax")
        weight = (most - highest[self.sequence]).exp2_()
        sums = torch.zeros_like(highest).index_add_(0, self.sequence, total * weight)
        if sink_bias is not None:
            sums += (sink - highest).exp2_()
        out = o.new_zeros(self.N, *o.shape[1:])
        # what a block without keys has read belongs to others
        o = (o * weight[..., None]).masked_fill_(~self.there.any(1)[:, None, None, None], 0)
        out.index_add_(0, self.sequence, o)
        return out / sums.masked_fill_(sums == 0, 1)[..., None]
