"""The linear engine in whole-chunk PyTorch, for any device and any precision.

Inside a chunk the masked product of queries and keys, between chunks a state S [K, V].  The
normaliser is one more column of values, all ones: the state's last column is then z, the sum of
keys, and the output's is scale q·z.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fla.ops.common.boundary import absent
from fla.ops.common.device import accumulator, on_host
from fla.ops.common.finite import apart
from fla.ops.common.sequences import Carry, Chunks, Sequences

NORMALIZER_EPS = 1e-10
# Products grow with a chunk, the scan of the states with their size over the chunk.
_LARGEST_CHUNK, _LARGEST_CHUNK_OF_SMALL_STATES, _SMALL_STATE = 64, 32, 64 * 64
# Elements of one operand in a run of chunks: small enough for a core's cache, large enough that
# PyTorch's overhead a call does not show.
_RUN = 1 << 17
_LOG2_E = math.log2(math.e)

_Run = tuple[int, int]  # slots [start, stop)


def new_sums(q, g) -> tuple[None, None]:
    """Nothing: a chunk's sums are made where they are used."""
    return None, None


def forward(q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, options):
    """Return o [B, T, H, V], the final state and z, the normaliser [B, T, H], and no sums."""
    walk = _Walk(q, k, v, g, g_gamma, cu_seqlens, options)
    V = v.shape[-1]
    o = walk.chunks.buffer(v, *v.shape[2:])
    norm = walk.chunks.buffer(v, q.shape[2], dtype=walk.dtype) if options.normalize else None
    carry = Carry(walk.chunks, walk.pack_state(initial_state, initial_z))
    runs = walk.runs()
    states = walk.states(runs)
    for run in runs:
        b_o = _output(walk, run, carry, states)
        if norm is not None:
            b_norm = b_o[..., V] + NORMALIZER_EPS
            walk.put(norm, run, b_norm)
            b_o = b_o[..., :V] / b_norm[..., None]
        walk.put(o, run, b_o)
    state, z = walk.unpack_state(carry.result) if options.output_final_state else (None, None)
    return (
        walk.chunks.tokens(o),
        absent(q) if state is None else state,
        absent(q) if z is None else z,
        absent(q) if norm is None else walk.chunks.tokens(norm),
        None,
        None,
    )


def _output(walk: _Walk, run: _Run, carry: Carry, states: Tensor) -> Tensor:
    """scale (q S + A v) of a run's chunks, A = q kᵀ with its decays: [chunks, C, V].

    A function of its own: blocks of the run before would take the cache from this one's.
    """
    b_q, b_k, b_v, decay = walk.load(run)
    before = walk.enter(carry, run, b_k, b_v, decay, states)
    b_o = decay.rest.into(torch.bmm(decay.into(b_q), before))
    attention = decay.pairs(torch.bmm(b_q, b_k.mT))
    scale = walk.options.scale
    b_v, beyond = apart(b_v)
    b_o.baddbmm_(attention, b_v, beta=scale, alpha=scale)
    return b_o if beyond is None else b_o.add_(beyond)


def backward(
    do, dstate, dz, q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, o, norm, sums,
    rests, options,
):  # fmt: skip
    """Return the gradients of q, k, v, g, the initial state and the initial z.

    With P = dA ∘ A, a token's log-decay is in every pair that it stands between.  What pairs inside
    the chunk and queries before it contribute is the suffix sum of rows of P less its columns, and
    of q·dq through the state that enters.  A key that leaves the chunk contributes to all tokens
    behind it, the state that passes through to every token.  Sums never reach beyond a chunk.
    """
    walk = _Walk(q, k, v, g, g_gamma, cu_seqlens, options)
    chunks = walk.chunks
    runs = walk.runs()
    carry, before = Carry(chunks, walk.pack_state(initial_state, initial_z)), []
    for run in runs:
        _, b_k, b_v, decay = walk.load(run)
        before.append(walk.enter(carry, run, b_k, b_v, decay, walk.states([run])))

    dq, dk, dv = (chunks.buffer(x, *x.shape[2:]) for x in (q, k, v))
    dg = None if g is None else chunks.buffer(g, g.shape[2])
    carry = Carry(chunks, walk.pack_state(dstate, dz), backward=True)
    states = walk.states(runs)
    for run in reversed(runs):
        b_q, b_k, b_v, decay = walk.load(run)
        b_do = walk.load_gradient(run, do, o, norm)
        after = walk.enter_backward(carry, run, b_q, b_do, decay, states)
        state = before.pop()

        attention = decay.pairs(torch.bmm(b_q, b_k.mT))
        dattention = torch.bmm(b_do, b_v.mT)
        dk_out = decay.rest.out(torch.bmm(decay.out(b_v), after.mT))
        b_dq = decay.rest.into(torch.bmm(decay.into(b_do), state.mT))
        if dg is not None:
            passing = (decay.total(state) * decay.rest.total(after)).sum((-2, -1))
            leaving = (b_k * dk_out).sum(-1)  # [chunks, C]
            leaving = torch.nn.functional.pad(leaving[:, :-1], (1, 0)).cumsum(-1)
            # A token's pair with itself has no decay; taken from sums that it is in, it would leave
            # the digits that they round off, where steep decays leave little else.
            pairs = attention * dattention
            pairs.diagonal(dim1=-2, dim2=-1).zero_()
            per_token = (b_q * b_dq).sum(-1)  # [chunks, C], through the state that enters
            per_token += pairs.sum(-1) - pairs.sum(-2)
            b_dg = per_token.flip(-1).cumsum(-1).flip(-1) + leaving + passing[..., None]
            walk.put(dg, run, b_dg)
        dattention = decay.pairs(dattention)
        b_dq.baddbmm_(dattention, b_k)
        b_dk = torch.baddbmm(dk_out, dattention.mT, b_q)
        b_dv = decay.rest.out(torch.bmm(decay.out(b_k), after)).baddbmm_(attention.mT, b_do)
        walk.put(dq, run, b_dq)
        walk.put(dk, run, b_dk)
        walk.put(dv, run, b_dv[..., : v.shape[-1]])
    dstate0, dz0 = walk.unpack_state(carry.result)
    return (
        chunks.tokens(dq),
        chunks.tokens(dk),
        chunks.tokens(dv),
        absent(q) if dg is None else chunks.tokens(dg),
        absent(q) if initial_state is None else dstate0.to(initial_state.dtype),
        absent(q) if initial_z is None or dz0 is None else dz0.to(initial_z.dtype),
    )


def attention_map(q: Tensor, k: Tensor, g: Tensor | None, scale: float) -> Tensor:
    """A_ij = scale q_i·k_j exp(g_{j+1} + … + g_i) for j ≤ i, [B, H, T, T]."""
    B, T, H, _ = q.shape
    dtype = accumulator(q.dtype)
    out = q.new_zeros(B, H, T, T)
    k = k.transpose(1, 2).to(dtype)
    if g is not None:
        g = _log2(g.transpose(1, 2).to(dtype), halves=2)
        since = g.new_zeros(B, H, 0)  # decay from each earlier key to the block of rows
    for start in range(0, T, _LARGEST_CHUNK):
        stop = min(start + _LARGEST_CHUNK, T)
        rows = q[:, start:stop].transpose(1, 2).to(dtype) * scale
        pairs = rows @ k[:, :, :stop].mT
        if g is None:
            out[:, :, start:stop, :stop] = pairs.tril_(start)
            continue
        span = _spans(g[..., start:stop], _later(g, stop - start))
        into = g[..., start:stop].cumsum(-1)
        span = torch.cat([since[..., None, :] + into[..., None], span], -1)
        since = span[..., -1, :].clone()
        half = _grow(span)
        out[:, :, start:stop, :stop] = pairs.mul_(half).mul_(half).tril_(start)
    return out


def _later(like: Tensor, size: int) -> Tensor:
    """1 where a token (row) comes after a key (column): [C, C]."""
    return like.new_ones(size, size).tril_(-1)


def _spans(g: Tensor, later: Tensor) -> Tensor:
    """g_{j+1} + … + g_i for key j (column) and query i (row), 0 for j ≥ i: [.., C, C].

    Every sum runs on its own.  The difference of two sums from the start would lose a near decay
    beside a far larger one.
    """
    return (g[..., None] * later).cumsum_(-2)


def _log2(g: Tensor, halves: int) -> Tensor:
    """To base 2, each log-decay or its half: what is summed, raised by ``exp2`` and then applied.

    A log-decay of −inf becomes finite, so that 0 times it is no NaN.
    """
    return (g * (_LOG2_E / halves)).clamp_(min=torch.finfo(g.dtype).min)


def _grow(exponent: Tensor) -> Tensor:
    """2 to the exponent, in place, and finite."""
    return exponent.clamp_(max=math.log2(torch.finfo(exponent.dtype).max) - 1).exp2_()


class _Gate:
    """The log-decays of a call, g [slots, lanes, H, C], and all that is small of the decays.

    A gate that grows is halved, and what is raised from it applied twice.  Half of an exponent
    stays finite for as long as the product can, so that 0 · inf never turns a result that is
    representable into NaN.  Whether a gate grows is looked up on the CPU only: elsewhere the
    answer would have to be waited for.
    """

    def __init__(self, g: Tensor):
        grows = not on_host(g) or bool((g > 0).any())
        self.halves = 2 if grows else 1
        self.later = _later(g, g.shape[-1])
        log2 = _log2(g, self.halves)
        into = self.raised(log2.cumsum(-1))[..., None]
        self.totals = into[..., -1:, :].unbind()  # of each slot [lanes, H, 1, 1]
        self.heads = g.shape[1] * g.shape[2]
        self.log2, self.into = log2.flatten(0, 2), into.flatten(0, 2)  # [chunks, C], [.., C, 1]

    def raised(self, exponent: Tensor) -> Tensor:
        return _grow(exponent) if self.halves == 2 else exponent.exp2_()


class _Decay:
    """The decays of a run of chunks and how they apply; without a gate there is only the mask.

    What a method leaves to apply, if decays are halved, is left to the same method of ``rest``.
    """

    def __init__(self, gate: _Gate | None, start: int = 0, stop: int = 0):
        self.halves = 0 if gate is None else gate.halves
        self.rest = _UNGATED if self.halves == 1 else self
        if gate is not None:
            run = slice(start * gate.heads, stop * gate.heads)
            # [chunks, C, C], from key to query
            self._pairs = gate.raised(_spans(gate.log2[run], gate.later))
            self._into = gate.into[run]  # [.., C, 1], from the state before
            self._out = self._pairs[:, -1, :, None]  # [.., C, 1], to the state after
            self._total = self._into[:, -1:]  # [.., 1, 1], from state to state
            self._totals = gate.totals[start:stop]

    def pairs(self, x: Tensor) -> Tensor:
        """All of it on x [chunks, C, C], in place, and no key after its query."""
        for _ in range(self.halves):
            x.mul_(self._pairs)
        if self.halves == 2:  # a value may be 0 where a weight is more than the largest number
            largest = torch.finfo(x.dtype).max
            x.clamp_(-largest, largest)
        return x.tril_()

    def into(self, x: Tensor) -> Tensor:
        return x * self._into if self.halves else x

    def out(self, x: Tensor) -> Tensor:
        return x * self._out if self.halves else x

    def total(self, x: Tensor) -> Tensor:
        return x * self._total if self.halves else x

    def totals(self, like: Tensor, slots: int) -> tuple[Tensor, ...]:
        """Each slot's decay from state to state."""
        return self._totals if self.halves else (like.new_ones(1),) * slots


_UNGATED = _Decay(None)


class _Walk:
    """One call's tensors and how they are read, run by run."""

    def __init__(self, q, k, v, g, g_gamma, cu_seqlens, options):
        self.dtype = accumulator(q.dtype)
        self.q, self.k, self.v = q, k, v
        self.options = options
        sequences = Sequences.of(q, cu_seqlens)
        self.N, (self.K, self.V) = sequences.N, (k.shape[-1], v.shape[-1])
        small = self.K * self.V <= _SMALL_STATE
        largest = _LARGEST_CHUNK_OF_SMALL_STATES if small else _LARGEST_CHUNK
        size = options.chunk_size or sequences.fitting_chunk(largest)
        self.chunks: Chunks = sequences.chunks(size, options.reverse)
        if g is None and g_gamma is not None:
            g = g_gamma.to(self.dtype).expand(q.shape[:3])
        slots = self.chunks.slots
        self.gate = None if g is None else _Gate(self.chunks.take(g, 0, slots, self.dtype))

    def runs(self) -> list[_Run]:
        H, K, V = self.q.shape[2], self.K, self.V
        return self.chunks.segments(H * max(K, V, self.chunks.size), _RUN)

    def take(self, x: Tensor, run: _Run) -> Tensor:
        """Tokens of a run, [chunks, C, ...]: chunks of all its slots, lanes and heads."""
        return self.chunks.take(x, *run, self.dtype).flatten(0, 2)

    def put(self, buffer: Tensor, run: _Run, values: Tensor) -> None:
        chunks = (run[1] - run[0], self.chunks.lanes, self.q.shape[2])
        self.chunks.put(buffer, *run, values.unflatten(0, chunks))

    def load(self, run: _Run) -> tuple[Tensor, Tensor, Tensor, _Decay]:
        q, k, v = (self.take(x, run) for x in (self.q, self.k, self.v))
        if self.options.normalize:
            v = torch.cat([v, v.new_ones(1).expand(*v.shape[:-1], 1)], -1)
        return q, k, v, _UNGATED if self.gate is None else _Decay(self.gate, *run)

    def load_gradient(self, run: _Run, do: Tensor, o: Tensor, norm: Tensor) -> Tensor:
        """scale · do, and behind the normaliser the gradient of its column too."""
        b_do = self.take(do, run)
        if self.options.normalize:
            b_o = self.take(o, run)
            b_norm = self.take(norm, run)[..., None]
            b_norm = b_norm.masked_fill(b_norm == 0, 1)  # tokens that are not there
            b_do = torch.cat([b_do, -(b_do * b_o).sum(-1, keepdim=True)], -1) / b_norm
        return b_do * self.options.scale

    def states(self, runs: list[_Run]) -> Tensor:
        """Room for the states between the slots of any one of the runs, at either end too."""
        slots = max((stop - start for start, stop in runs), default=0)
        shape = (self.chunks.lanes, self.q.shape[2], self.K, self.V + self.options.normalize)
        return self.q.new_empty(slots + 1, *shape, dtype=self.dtype)

    def enter(self, carry: Carry, run: _Run, b_k, b_v, decay: _Decay, states: Tensor) -> Tensor:
        """The state before each chunk of a run, [chunks, K, V], in the room of ``states``."""
        return _scan(carry, range(*run), decay.out(b_k).mT, decay.rest.out(b_v), decay, states)

    def enter_backward(self, carry, run: _Run, b_q, b_do, decay: _Decay, states: Tensor) -> Tensor:
        """The gradient of the state after each chunk of a run, likewise."""
        slots = range(*run)[::-1]
        return _scan(carry, slots, decay.into(b_q).mT, decay.rest.into(b_do), decay, states)

    def pack_state(self, state: Tensor | None, z: Tensor | None) -> Tensor:
        """A new [N, H, K, V] of a state in the caller's layout, z its last column."""
        shape = (self.N, self.q.shape[2], self.K, self.V)
        packed = self.q.new_zeros(*shape[:-1], shape[-1] + self.options.normalize, dtype=self.dtype)
        if state is not None:
            packed[..., : self.V] = state.mT if self.options.state_v_first else state
        if z is not None:
            packed[..., self.V] = z.squeeze(1)
        return packed

    def unpack_state(self, packed: Tensor) -> tuple[Tensor, Tensor | None]:
        state = packed[..., : self.V]
        state = state.mT if self.options.state_v_first else state
        z = packed[..., self.V].unsqueeze(1).clone() if self.options.normalize else None
        return state.clone(memory_format=torch.contiguous_format), z


def _scan(
    carry: Carry, slots: range, a: Tensor, b: Tensor, decay: _Decay, states: Tensor
) -> Tensor:
    """S ← total ∘ S + a @ b, slot by slot; returns the S that each slot was entered with.

    In place: what a slot adds is written where its result will stand.
    """
    each = states[: len(slots) + 1].unbind()
    entered, left = states[: len(slots)], states[1 : len(slots) + 1]
    totals = decay.totals(a, len(slots))
    if slots.step < 0:
        each, totals, entered, left = each[::-1], totals[::-1], left, entered
    each[0].copy_(carry.enter(slots[0]))
    torch.bmm(a, b, out=left.flatten(0, 2))
    for slot, state, after, total in zip(slots, each, each[1:], totals, strict=False):
        if slot != slots[0]:
            state.copy_(carry.enter(slot))  # nothing to do but where a sequence begins
        after.addcmul_(state * total if decay.halves == 2 else state, total)
        carry.leave(slot, after)
    return entered.flatten(0, 2)
