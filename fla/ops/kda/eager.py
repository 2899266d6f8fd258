"""Kimi Delta Attention in whole-chunk PyTorch, for any device and any precision.

With D_ij = exp(g_{j+1} + … + g_i), one decay for each channel, and S the memory before a chunk:

    A_ij = k_i·D_ij k_j, j < i      M_ij = q_i·D_ij k_j, j ≤ i      X = (I + β A)⁻¹
    v' = X β (v − (D_i0 k_i)ᵀS)     o_i = scale ((D_i0 q_i)ᵀS + M_i v')
    S ← D_C0 S + Σ_j (D_Cj k_j) v'_jᵀ

A and M hold pairs of tokens of a chunk (``eager_pairs.py``).
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from fla.ops.common.boundary import absent
from fla.ops.common.device import accumulator
from fla.ops.common.sequences import Carry, Chunks, Sequences
from fla.ops.kda.eager_pairs import Pairs, Run, causal
from fla.ops.kda.gate import Gate, like
from fla.ops.kda.pool import load, longest, store

_LARGEST_CHUNK = 64
# Elements of one operand in a run of chunks: small enough for a core's cache, large enough that
# PyTorch's overhead a call does not show.
_RUN = 1 << 18
# Up to here, one token after another is faster than a chunk.
_SHORT = 8


def forward(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options):
    """Return o [B, T, HV, V], the final state, the states before the chunks and nothing kept."""
    walk = _Walk(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, options)
    state = walk.pack_state(initial_state)
    if walk.stepwise:
        o, state = walk.step_through(state)
        final = walk.unpack_state(state) if options.output_final_state else absent(q)
        return o, final, absent(q), kept(q)
    chunks = walk.chunks
    o = chunks.buffer(v, *v.shape[2:])
    carry, h = Carry(chunks, state), []
    for start, stop in walk.runs():
        x = walk.load(start, stop)
        pairs = Pairs(x)
        before, _, values = _advance(carry, start, x, pairs.solver)
        seen = x.into(x.q) @ before + causal(pairs.queries, values)
        chunks.put(o, start, stop, walk.lanes(seen.mul_(options.scale)))
        if options.intermediate_states:
            h.append(walk.lanes(before).to(k.dtype))
    return (
        chunks.tokens(o),
        walk.unpack_state(carry.result) if options.output_final_state else absent(q),
        walk.pack_intermediate(h) if options.intermediate_states else absent(q),
        kept(q),
    )


def kept(q, *_):
    """A backward pass makes all again."""
    return absent(q)


def backward(
    do, dstate, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options, _=None
):
    """Return the gradients of all that has one.

    Every decay is applied as a factor on q or k, D x; the gradient of its exponent is x D dx, which
    vanishes where the decay does, and goes to all the gates that the exponent sums.
    """
    walk = _Walk(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, options)
    carry, resume = Carry(walk.chunks, walk.pack_state(initial_state)), []
    for start, stop in walk.runs():
        resume.append(copy.copy(carry))
        x = walk.load(start, stop)
        _advance(carry, start, x, Pairs(x).solver)

    gradients = _Gradients(walk)
    carry = Carry(walk.chunks, walk.pack_state(dstate), backward=True)
    for start, stop in reversed(walk.runs()):
        x = walk.load(start, stop)
        pairs = Pairs(x)
        before, missing, values = _advance(resume.pop(), start, x, pairs.solver)
        b_do = walk.load_gradient(do, start, stop)
        q_in, k_in, k_out = x.into(x.q), x.into(x.k), x.out(x.k)
        after, dsolved = _retreat(
            carry, start, x, pairs.solver, pairs.queries.mT @ b_do, q_in.mT @ b_do
        )
        dmissing = x.beta * dsolved
        dbeta = dsolved * (missing - pairs.keys @ values)
        dq_in, dk_in, dk_out = b_do @ before.mT, -dmissing @ before.mT, values @ after.mT
        dg_in = q_in * dq_in + k_in * dk_in
        dg_in[..., -1, :] += torch.linalg.vecdot(x.whole(before), after)
        dq, dk = x.into(dq_in), x.into(dk_in) + x.out(dk_out)
        dg = pairs.backward(b_do @ values.mT, -dmissing @ values.mT, dq, dk, dg_in, k_out * dk_out)
        gradients.put(start, stop, x, dq, dk, dmissing, dg, dbeta)
    if initial_state is None:
        return *gradients.results(), absent(q)
    return *gradients.results(), walk.unpack_state(carry.result).to(initial_state.dtype)


def serve(q, k, v, g, beta, A_log, dt_bias, state, out, cu_seqlens, indices, accepted, options):
    """One token after another, all sequences at once; ``state`` and ``out`` are written."""
    walk = _Walk(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, options)
    (B, T), N = q.shape[:2], walk.N
    rows = torch.arange(N, device=q.device)
    starts = rows * T if cu_seqlens is None else cu_seqlens[:-1].long()
    lengths = torch.full_like(rows, T) if cu_seqlens is None else cu_seqlens.diff()
    read = rows
    if indices is not None:
        last = torch.zeros_like(rows) if accepted is None else accepted.long() - 1
        # one column more, of no slot, for sequences without tokens
        last = torch.where(lengths > 0, last, indices.shape[1])
        read = torch.nn.functional.pad(indices, (0, 1), value=-1).gather(1, last[:, None])[:, 0]
    S = walk.pack_state(load(state, read))
    states, S = S.shape, S.flatten(0, 1)
    tokens = [x.flatten(0, 1) for x in walk.tokens()]  # [B · T, HV, ·]
    o = out.new_zeros(B * T + 1, *out.shape[2:], dtype=walk.dtype)  # a row for what is not there
    for t in range(longest(lengths, T if indices is None else indices.shape[1])):
        there = lengths > t
        token = torch.where(there, starts + t, 0)
        seen, after = _step(S, options.scale, *(x.index_select(0, token) for x in tokens))
        S = torch.where(there.repeat_interleave(walk.HV)[:, None, None], after, S)
        o.index_copy_(0, torch.where(there, token, B * T), seen.view(N, walk.HV, walk.V))
        if indices is not None:
            store(state, torch.where(there, indices[:, t], -1), walk.unpack_state(S.view(states)))
    if indices is None:
        store(state, torch.where(lengths > 0, rows, -1), walk.unpack_state(S.view(states)))
    out.copy_(o[:-1].view(out.shape))


def _step(S: Tensor, scale: float, k, q, v, decay, beta) -> tuple[Tensor, Tensor]:
    """One token for X memories S [X, K, V]: its o [X, 1, V], and S after it.

    The token's operands are [N, HV, ·] with X = N · HV.
    """
    X, K, V = S.shape
    q, k, v = q.reshape(X, 1, K), k.reshape(X, 1, K), v.reshape(X, 1, V)
    S = S * decay.reshape(X, K, 1)
    value = torch.baddbmm(v, k, S, alpha=-1).mul_(beta.reshape(X, 1, beta.shape[-1]))
    S.addcmul_(k.mT, value)
    return torch.baddbmm(value, q, S, beta=0, alpha=scale), S


def _advance(carry: Carry, start: int, x: Run, solver: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pass the state through a run.

    Return for each chunk the state before it [slots, X, K, V], and [slots, X, C, V] each the values
    that this state was missing, v − (D_i0 k_i)ᵀS, and the corrected values v'.
    """
    k_in, k_out = x.into(x.k), x.out(x.k)
    before = x.v.new_empty(*x.v.shape[:2], x.k.shape[-1], x.v.shape[-1])
    missing, values = torch.empty_like(x.v), torch.empty_like(x.v)
    for at in range(x.v.shape[0]):
        entered = carry.enter(start + at)
        S = before[at] = entered.flatten(0, 1)
        missing[at] = torch.baddbmm(x.v[at], k_in[at], S, alpha=-1)
        values[at] = causal(solver[at], x.beta[at] * missing[at])
        S = torch.baddbmm(x.whole(S, at), k_out[at].mT, values[at])
        carry.leave(start + at, S.view(entered.shape))
    return before, missing, values


def _retreat(
    carry: Carry, start: int, x: Run, solver: Tensor, dvalues: Tensor, added: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass the gradient of the state through a run, from its end.

    ``dvalues`` [slots, X, C, V] and ``added`` [slots, X, K, V] are what the outputs of each chunk
    contribute to the gradients of v' and of the state before it.  Return the gradient of the state
    after each chunk, and that of β (v − (D_i0 k_i)ᵀS).
    """
    k_in, k_out = x.into(x.k), x.out(x.k)
    after, dsolved = torch.empty_like(added), torch.empty_like(dvalues)
    for at in reversed(range(x.v.shape[0])):
        entered = carry.enter(start + at)
        dS = after[at] = entered.flatten(0, 1)
        dsolved[at] = solver[at].mT @ torch.baddbmm(dvalues[at], k_out[at], dS)
        dmissing = x.beta[at] * dsolved[at]
        dS = torch.baddbmm(added[at] + x.whole(dS, at), k_in[at].mT, dmissing, alpha=-1)
        carry.leave(start + at, dS.view(entered.shape))
    return after, dsolved


class _Walk:
    """One call's tensors and how they are read, run by run."""

    def __init__(self, q, k, v, g, beta, A_log, dt_bias, cu_seqlens, options):
        self.dtype = accumulator(q.dtype)
        self.q, self.k, self.v, self.g, self.beta = q, k, v, g, beta
        self.A_log, self.dt_bias, self.options = A_log, dt_bias, options
        self.T, self.H, self.K = q.shape[1:]
        self.HV, self.V = v.shape[2:]
        self.sequences = Sequences.of(q, cu_seqlens)
        self.N = self.sequences.N
        # a beta for each channel has no triangular system in common, it takes a token at a time
        self.channelwise = beta.dim() == 4
        short = self.T <= _SHORT and not options.intermediate_states
        self.stepwise = cu_seqlens is None and (short or self.channelwise)

    @functools.cached_property
    def chunks(self) -> Chunks:
        return self.sequences.chunks(self._chunk_size())

    def _chunk_size(self) -> int:
        if self.channelwise:
            return 1
        largest = self.options.chunk_size or _LARGEST_CHUNK
        if self.options.intermediate_states:
            return largest
        return 1 << (self.sequences.fitting_chunk(largest) - 1).bit_length()

    def runs(self) -> list[tuple[int, int]]:
        C = self.chunks.size
        a_chunk = max(C * self.K, C * self.V, C * C, self.K * self.V)
        return self.chunks.segments(self.HV * a_chunk // C, _RUN)

    def load(self, start: int, stop: int) -> Run:
        """The operands of a run, activated; q and k once for each value head."""
        q, k, v, g, beta = raw = tuple(
            self._take(x, start, stop) for x in (self.q, self.k, self.v, self.g, self.beta)
        )
        missing = None
        if self.options.gate:
            there = self.q.new_ones(1).expand(*self.q.shape[:2], 1)
            missing = self._take(there, start, stop)[..., None] == 0
            g = self.gate(heads_first=True).decay(g).masked_fill_(missing, 0)
        q, k = self.spread(self.unit(q), 2), self.spread(self.unit(k), 2)
        beta = self.strength(beta)
        q, k, v, g, beta = (x.flatten(1, 2) for x in (q, k, v, g, beta))
        return Run(q, k, v, g, beta, raw, missing)

    def load_gradient(self, do: Tensor, start: int, stop: int) -> Tensor:
        """scale · do."""
        return self._take(do, start, stop).flatten(1, 2) * self.options.scale

    def lanes(self, x: Tensor) -> Tensor:
        """[slots, X, ...] as [slots, lanes, HV, ...]."""
        return x.unflatten(1, (self.chunks.lanes, self.HV))

    def _take(self, x: Tensor, start: int, stop: int) -> Tensor:
        return self.chunks.take(x, start, stop, self.dtype)

    def unit(self, x: Tensor) -> Tensor:
        return x / _length(x) if self.options.qk_l2norm else x

    def spread(self, x: Tensor, dim: int) -> Tensor:
        """Keys or queries once for each value head."""
        return x if self.H == self.HV else x.repeat_interleave(self.HV // self.H, dim)

    def strength(self, beta: Tensor) -> Tensor:
        """beta [.., 1 or V]."""
        if self.options.beta_sigmoid:
            beta = torch.sigmoid(beta)
            beta = beta * 2 if self.options.neg_eigval else beta
        return beta if self.channelwise else beta[..., None]

    def gate(self, heads_first: bool) -> Gate:
        parameters = self.A_log, self.dt_bias, self.options.lower_bound
        return Gate(self.HV, self.K, *parameters, self.dtype, heads_first)

    def step_through(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """One token after another, dense: o and the final state."""
        states, S = S.shape, S.flatten(0, 1)
        tokens, steps = self.tokens(), []
        for t in range(self.T):
            # a single token needs no taking apart
            token = tokens if self.T == 1 else [x[:, t] for x in tokens]
            seen, S = _step(S, self.options.scale, *token)
            steps.append(seen.view(self.N, 1, self.HV, self.V))
        o = steps[0] if self.T == 1 else torch.cat([self.v[:, :0], *steps], 1)
        return o if o.dtype == self.v.dtype else o.to(self.v.dtype), S.view(states)

    def tokens(self) -> tuple[Tensor, ...]:
        """The operands of ``_step`` for all tokens, [B, T, HV, ·]."""
        keys_queries = self.unit(self._wide(torch.stack((self.k, self.q))))
        g = self._wide(self.g)
        if self.options.gate:
            g = self.gate(heads_first=False).decay(g)
        beta = self.strength(self._wide(self.beta))
        # finite, so that an empty memory stays empty
        decay = g.exp().clamp_(max=torch.finfo(g.dtype).max)
        return *self.spread(keys_queries, 3).unbind(), self._wide(self.v), decay, beta

    def _wide(self, x: Tensor) -> Tensor:
        return x if x.dtype == self.dtype else x.to(self.dtype)  # ``to`` costs even when idle

    def pack_state(self, state: Tensor | None) -> Tensor:
        """[N, HV, K, V] of a state in the caller's layout."""
        if state is None:
            return self.q.new_zeros(self.N, self.HV, self.K, self.V, dtype=self.dtype)
        return self._wide(self._swap(state))

    def unpack_state(self, state: Tensor) -> Tensor:
        """The caller's layout again, never the caller's tensor."""
        state = self._swap(state).contiguous()
        return state if self.T else state.clone()

    def pack_intermediate(self, before: list[Tensor]) -> Tensor:
        """[lanes, slots, HV, K, V] in the caller's layout."""
        empty = self.k.new_empty(0, self.chunks.lanes, self.HV, self.K, self.V)
        return self._swap(torch.cat([empty, *before]).transpose(0, 1)).contiguous()

    def _swap(self, state: Tensor) -> Tensor:
        return state.mT if self.options.state_v_first else state


class _Gradients:
    """Where the gradients of all operands come together."""

    def __init__(self, walk: _Walk):
        self.walk = walk
        self.buffers = [
            walk.chunks.buffer(x, *x.shape[2:]) for x in (walk.q, walk.k, walk.v, walk.g, walk.beta)
        ]
        self.A_log = walk.q.new_zeros(walk.HV, dtype=walk.dtype)
        self.dt_bias = walk.q.new_zeros(walk.HV, walk.K, dtype=walk.dtype)

    def put(self, start: int, stop: int, x: Run, dq, dk, dv, dg, dbeta) -> None:
        """Take the gradients of a run's operands back through their activation."""
        walk = self.walk
        q, k, _, g, beta = x.raw
        dq, dk, dv, dg, dbeta = (walk.lanes(each) for each in (dq, dk, dv, dg, dbeta))
        if walk.H != walk.HV:
            dq, dk = (each.unflatten(2, (walk.H, -1)).sum(3) for each in (dq, dk))
        dbeta = dbeta if walk.channelwise else dbeta.sum(-1)
        if walk.options.qk_l2norm:
            dq, dk = _unit_backward(q, dq), _unit_backward(k, dk)
        if walk.options.beta_sigmoid:
            dbeta = dbeta * torch.sigmoid(beta) * torch.sigmoid(-beta)
            dbeta = dbeta * 2 if walk.options.neg_eigval else dbeta
        if walk.options.gate:
            dg, drate = walk.gate(heads_first=True).backward(g, dg.masked_fill(x.missing, 0))
            self.A_log += drate.sum((0, 1, 3, 4))
            self.dt_bias += dg.sum((0, 1, 3))
        for buffer, each in zip(self.buffers, (dq, dk, dv, dg, dbeta), strict=True):
            walk.chunks.put(buffer, start, stop, each)

    def results(self) -> tuple[Tensor, ...]:
        walk = self.walk
        return (
            *(walk.chunks.tokens(buffer) for buffer in self.buffers),
            absent(walk.q) if walk.A_log is None else like(walk.A_log, self.A_log),
            absent(walk.q) if walk.dt_bias is None else like(walk.dt_bias, self.dt_bias),
        )


def _length(x: Tensor) -> Tensor:
    """sqrt(Σx² + ε); a constant tensor of the module would be a fake one if a graph imports it."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(x.new_full((), 1e-3))


def _unit_backward(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x from that of y = x / length."""
    length = _length(x)
    y = x / length
    return torch.addcmul(dy, y, (y * dy).sum(-1, keepdim=True), value=-1).div_(length)
