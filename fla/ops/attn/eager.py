"""The softmax engine in plain PyTorch, for any device and any precision, in linear memory.

A block of query rows meets all the keys that it can see, then the next block:

    s_ij = scale q_i·k_j + (G_i − G_j)    lse_i = log(Σ_j exp s_ij + exp sink)
    p_ij = exp(s_ij − lse_i)              o_i = Σ_j p_ij v_j

Inside, logarithms are to the base 2, because exp2 is several times faster than exp.  Without a
gate, and where rows see all keys before them, PyTorch's own attention for the CPU does the work.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fla.ops.common.boundary import absent
from fla.ops.common.device import accumulator
from fla.ops.common.finite import finite

_LOG2E = math.log2(math.e)
_LN2 = math.log(2)
# Rows of a block, and elements of a block of logits: small enough for the cache, large enough that
# PyTorch's overhead a call does not show.
_ROWS = 128
_RUN = 1 << 19
_RUN_ON_DEVICES = 1 << 24
# With very many keys a block has fewer rows, for the sake of memory, down to these.
_LARGEST_RUN = 1 << 23
_FEWEST_ROWS = 16
# Keys of a block in decoding
_KEYS = 64
# A token with this gate forgets all before it; with its negative it sees nothing else.  In sums
# with anything steeper even fp64 would lose the gates beside it.
_STEEPEST_GATE = -1e6


def forward(q, k, v, g, sink_bias, cu_seqlens, options):
    """Return o [B, T, HQ, V] and lse [B, HQ, T], finite where a row sees nothing too."""
    if _to_be_parted(cu_seqlens, q, k, v, g):
        each = [forward(*x, sink_bias, None, options) for x in _parts(cu_seqlens, q, k, v, g)]
        o, lse = zip(*each, strict=True)
        return torch.cat(o, 1), torch.cat(lse, 2)
    spoilt = None
    if cu_seqlens is None and _on_host(q) and not finite(v):
        spoilt, v = ~v.isfinite(), v.nan_to_num(0, 0, 0)
    if _torch_serves(q, v, g, cu_seqlens, options):
        o, lse = _torch_forward(q, k, v, options)
    else:
        o, lse = _blocked_forward(_Walk(q, k, v, g, cu_seqlens, options))
    if sink_bias is not None:
        sink = sink_bias.to(lse.dtype)[:, None]
        o = o * (lse - sink).sigmoid_().transpose(1, 2)[..., None]
        lse = torch.logaddexp(lse, sink)
    o = o.to(q.dtype).contiguous()
    if spoilt is not None:
        _see(o, spoilt, options.window_size)
    return o, lse


def backward(do, q, k, v, g, sink_bias, cu_seqlens, o, lse, options):
    """Return the gradients of q, k, v, g and the sink.

    With D_i = do_i·o_i: dS_ij = p_ij (do_i·v_j − D_i), and the sink's share of the row is −p D_i.
    """
    if _to_be_parted(cu_seqlens, q, k, v, g, do, o, lse):
        parts = _parts(cu_seqlens, do, q, k, v, g, o, lse.mT)
        each = [backward(*x, sink_bias, None, o, lse.mT, options) for *x, o, lse in parts]
        *of_tokens, dsink = zip(*each, strict=True)
        dq, dk, dv, dg = (torch.cat(x, 1 if x[0].dim() > 1 else 0) for x in of_tokens)
        return dq, dk, dv, dg, torch.stack(dsink).sum(0)
    dg, dsink = absent(q), absent(q)
    if _torch_serves(q, v, g, cu_seqlens, options):
        dq, dk, dv, delta = _torch_backward(do, q, k, v, o, lse, options)
    else:
        walk = _Walk(q, k, v, g, cu_seqlens, options)
        dq, dk, dv, dgate, delta = _blocked_backward(walk, do, o, lse, sink_bias is not None)
        if g is not None:
            dg = walk.merge(walk.seen.zero_elsewhere(dgate)).to(g.dtype).contiguous()
    if sink_bias is not None:
        share = (sink_bias.to(lse.dtype)[:, None] - lse).exp_()
        dsink = -(share * delta).sum((0, 2)).to(sink_bias.dtype)
    dq, dk, dv = (x.to(q.dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, dg, dsink


def _to_be_parted(cu_seqlens: Tensor | None, *tensors: Tensor | None) -> bool:
    """Whether a block must not hold two sequences, lest 0 · NaN take NaN from one to the other."""
    return cu_seqlens is not None and _on_host(cu_seqlens) and not finite(*tensors)


def _parts(cu_seqlens: Tensor, *tensors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """The tokens of each sequence that has any, of tensors [1, T, ...]."""
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        if start < stop:
            yield [None if x is None else x[:, start:stop] for x in tensors]


def _see(o: Tensor, spoilt: Tensor, window: int | None) -> None:
    """NaN into o [B, T, HQ, V] where a row sees one of the values ``spoilt`` [B, T, H, V]."""
    seen = spoilt.cumsum(1)
    if window is not None and window < o.shape[1]:
        seen[:, window:] -= seen[:, :-window].clone()
    o.unflatten(2, (seen.shape[2], -1)).masked_fill_(seen[:, :, :, None] > 0, torch.nan)


def _torch_serves(q, v, g, cu_seqlens, options) -> bool:
    """Whether PyTorch's own attention for the CPU computes this; it masks before it scales."""
    T, window = q.shape[1], options.window_size
    return (
        _on_host(q)
        and q.shape[-1] == v.shape[-1]
        and g is None
        and cu_seqlens is None
        and options.scale > 0
        and (window is None or window >= T)
    )


def _torch_forward(q, k, v, options):
    q, k, v = (_for_torch(x, accumulator(q.dtype)) for x in (q, k, v))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o, lse = attention(q, k, v, 0.0, True, scale=options.scale)
    return o.transpose(1, 2), lse.contiguous()


def _torch_backward(do, q, k, v, o, lse, options):
    do, q, k, v, o = (_for_torch(x, lse.dtype) for x in (do, q, k, v, o))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients = attention(do, q, k, v, o, lse, 0.0, True, scale=options.scale)
    return *(x.transpose(1, 2) for x in gradients), (do * o).sum(-1)


def _for_torch(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads before time, as a view where it can be one: only the last stride must be 1.

    In 16 bits PyTorch's kernel is no faster forward, and backward it loses accuracy.
    """
    x = x.to(dtype)
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _blocked_forward(walk: _Walk) -> tuple[Tensor, Tensor]:
    """o [B, T, HQ, V] and lse [B, HQ, T], without the sink."""
    o = walk.q.new_empty(*walk.q.shape[:3], walk.v.shape[-1])
    lse = walk.q.new_empty(walk.q.shape[:3])
    for block in walk.blocks():
        logits = walk.logits(block)  # [lanes, G * rows, keys]
        most = logits.amax(-1, keepdim=True).clamp_(min=_lowest(logits))
        weights = logits.sub_(most).exp2_()
        total = weights.sum(-1, keepdim=True)
        total = total.masked_fill_(total == 0, 1)
        b_o = torch.bmm(weights, walk.v[block.lanes, block.keys]).div_(total)
        block.of_rows(o).copy_(block.split(b_o))
        block.of_rows(lse).copy_(block.split((most + total.log2_()).squeeze(-1)))
    B, T, HQ = walk.shape
    return walk.merge(o), lse.mul_(_LN2).view(B, HQ, T)


def _blocked_backward(walk: _Walk, do, o, lse, sinks: bool):
    """dq, dk, dv, the gate's gradient [lanes, G, T] in fp64 and D [B, HQ, T].

    A token's gate is in every pair that it stands between, dg_t = Σ_{j < t ≤ i} dS_ij: over a block
    the running sum of its columns' sums less its rows' sums.  It ends at zero with the block, so
    that no sum runs further.
    """
    do = walk.heads(do, walk.dtype)
    delta = (do * walk.heads(o, walk.dtype)).sum(-1)  # [lanes, G, T]
    shape, lse = lse.shape, (lse * _LOG2E).view_as(delta)
    dq, dk, dv = torch.empty_like(walk.q), torch.zeros_like(walk.k), torch.zeros_like(walk.v)
    dgate = None if walk.gate is None else torch.zeros_like(lse, dtype=torch.float64)
    # Beside a sink far above all of them keys are nothing, but not beside one another.
    for block in walk.blocks(None if sinks else lse):
        b_q, b_do, b_delta, b_lse = (
            block.of_rows(x).flatten(1, 2) for x in (walk.q, do, delta, lse)
        )
        b_k, b_v = walk.k[block.lanes, block.keys], walk.v[block.lanes, block.keys]
        weights = walk.logits(block).sub_(b_lse[..., None]).exp2_()  # [lanes, G * rows, keys]
        b_dk, b_dv = dk[block.lanes, block.keys], dv[block.lanes, block.keys]
        torch.baddbmm(b_dv, weights.mT, b_do, out=b_dv)
        dlogits = torch.bmm(b_do, b_v.mT, out=walk.scratch("dlogits", weights.shape))
        dlogits.sub_(b_delta[..., None]).mul_(weights)
        block.of_rows(dq).copy_(block.split(torch.bmm(dlogits, b_k)))
        torch.baddbmm(b_dk, dlogits.mT, b_q, alpha=_LN2, out=b_dk)
        if dgate is not None:
            dlogits = block.split(dlogits)  # [lanes, G, rows, keys]
            sums = dlogits.sum(-2).double()
            sums[..., block.start - block.first :] -= dlogits.sum(-1)
            dgate[block.lanes, :, block.first + 1 : block.stop] += sums.cumsum(-1)[..., :-1]
    dq, dk, dv = walk.merge(dq.mul_(walk.scale)), walk.merge(dk[:, None]), walk.merge(dv[:, None])
    return dq, dk, dv, dgate, delta.view(shape)


def _on_host(x: Tensor) -> bool:
    """Whether values may be asked for: elsewhere that would be a copy from the device."""
    return x.device.type == "cpu"


def _run(x: Tensor) -> int:
    """Elements of what is worked on at once."""
    return _RUN if _on_host(x) else _RUN_ON_DEVICES


def _lowest(x: Tensor) -> float:
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


class _Walk:
    """One call's operands, heads before time, and how they are worked through block by block.

    A lane is a key head of a batch row, with the G query heads that share it.
    """

    def __init__(self, q, k, v, g, cu_seqlens, options):
        self.dtype, self.scale = accumulator(q.dtype), options.scale
        self.shape = q.shape[:3]
        self.H, self.G = k.shape[2], q.shape[2] // k.shape[2]
        self.T, self.on_host = q.shape[1], _on_host(q)
        self.seen = _Seen(self.T, options.window_size, cu_seqlens, q)
        self.q = self.heads(q, self.dtype) * (options.scale * _LOG2E)  # [lanes, G, T, K]
        self.k = self.heads(k, self.dtype).squeeze(1)  # [lanes, T, K]
        self.v = self.heads(v, self.dtype).squeeze(1)  # [lanes, T, V]
        self.run = _run(q)
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
            if not _on_host(q):
                self.there = self.rows < bounds[-1]
                self.low = torch.where(self.there, self.low, T)
        if window is not None:
            low = self.rows - (window - 1)
            self.low = low.clamp_(min=0) if self.low is None else torch.maximum(self.low, low)
        self.host = self.low.tolist() if self.low is not None and _on_host(q) else None

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


def _bounded(g: Tensor) -> Tensor:
    return g.clamp(_STEEPEST_GATE, -_STEEPEST_GATE)


class _Gate:
    """Sums of a gate [lanes, G, T], kept so that near pairs never meet a large number.

    They run inside blocks of rows only; from a block of rows backwards, the totals of the blocks
    between are added.  All of them are to the base 2 and in fp64.
    """

    def __init__(self, g: Tensor, rows: int, alone: Tensor):
        g = _bounded(g).masked_fill_(alone, 0).mul_(_LOG2E)
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
        margin = (math.log(torch.finfo(q.dtype).eps) - 1 - math.log(T)) * _LOG2E
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
    heads = (q[0].to(dtype) * (options.scale * _LOG2E)).unflatten(1, (H, -1))  # [N, H, G, K]
    most = heads.new_empty(where.count, H, HQ // H)
    total, o = torch.empty_like(most), heads.new_empty(*most.shape, V)
    run = max(_run(q) // (where.size * H * max(k.shape[-1], V)), 1)
    for start in range(0, where.count, run):
        at = slice(start, start + run)
        tokens = where.tokens[at]
        # [run, H, size, ...], in memory too: the products want it so
        b_k, b_v = (x[0, tokens].to(dtype).transpose(1, 2).contiguous() for x in (k, v))
        logits = heads[where.sequence[at]] @ b_k.mT  # [run, H, G, size]
        if gate is not None:
            logits += gate[at].transpose(1, 2).unflatten(1, (H, -1))
        logits.masked_fill_(~where.there[at, None, None], -torch.inf)
        most[at] = logits.amax(-1).clamp_(min=_lowest(logits))
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
        g = _bounded(g[self.tokens].double() * scale).mul_(_LOG2E)
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
        highest = most.new_full((self.N, *most.shape[1:]), _lowest(most))  # [N, H, G]
        if sink_bias is not None:
            sink = sink_bias.to(most.dtype).view(most.shape[1:]) * _LOG2E
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
