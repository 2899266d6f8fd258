"""The linear engine in whole-chunk PyTorch, for any device and any precision.

Inside a chunk the masked product of queries and keys, between chunks a state S [K, V].  The
normaliser is one more column of values, all ones: the state's last column is then z, the sum of
keys, and the output's is scale q·z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla.ops.common.boundary import absent
from fla.ops.common.device import accumulator
from fla.ops.common.sequences import Carry, Chunks, Sequences

NORMALIZER_EPS = 1e-10
# Products grow with a chunk, the scan of the states with their size over the chunk.
_LARGEST_CHUNK, _LARGEST_CHUNK_OF_SMALL_STATES, _SMALL_STATE = 64, 32, 64 * 64
# Elements of one operand in a run of chunks: small enough for a core's cache, large enough that
# PyTorch's overhead a call does not show.
_RUN = 1 << 17
# exp(x) is finite in fp32 up to here
_LARGEST_EXPONENT = 88.0


def forward(q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, options):
    """Return o [B, T, H, V], the final state and z, and the normaliser [B, T, H]."""
    walk = _Walk(q, k, v, g, g_gamma, cu_seqlens, options)
    V = v.shape[-1]
    o = walk.chunks.buffer(v, *v.shape[2:])
    norm = walk.chunks.buffer(v, q.shape[2], dtype=walk.dtype) if options.normalize else None
    carry = Carry(walk.chunks, walk.pack_state(initial_state, initial_z))
    for start, stop in walk.runs():
        b_q, b_k, b_v, decay = walk.load(start, stop)
        before = walk.states(carry, start, stop, b_k, b_v, decay)
        b_o = decay.into(decay.into(b_q) @ before)
        b_o = _add_product(b_o, decay.pairs(b_q @ b_k.mT), b_v, options.scale)
        if norm is not None:
            b_norm = b_o[..., V] + NORMALIZER_EPS
            walk.chunks.put(norm, start, stop, b_norm)
            b_o = b_o[..., :V] / b_norm[..., None]
        walk.chunks.put(o, start, stop, b_o)
    state, z = walk.unpack_state(carry.result) if options.output_final_state else (None, None)
    return (
        walk.chunks.tokens(o),
        absent(q) if state is None else state,
        absent(q) if z is None else z,
        absent(q) if norm is None else walk.chunks.tokens(norm),
    )


def backward(
    do, dstate, dz, q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, o, norm, options
):
    """Return the gradients of q, k, v, g, the initial state and the initial z.

    With P = dA ∘ A, a token's log-decay is in every pair that it stands between.  What pairs inside
    the chunk and queries before it contribute is the suffix sum of q·dq − k·dk; keys that leave
    the chunk and the state that passes through it contribute to all of its tokens alike.  Sums
    never reach beyond a chunk.
    """
    walk = _Walk(q, k, v, g, g_gamma, cu_seqlens, options)
    chunks = walk.chunks
    state0 = walk.pack_state(initial_state, initial_z)
    carry, before = Carry(chunks, state0), []
    for start, stop in walk.runs():
        _, b_k, b_v, decay = walk.load(start, stop)
        before.append(walk.states(carry, start, stop, b_k, b_v, decay))

    dq, dk, dv = (chunks.buffer(x, *x.shape[2:]) for x in (q, k, v))
    dg = None if g is None else chunks.buffer(g, g.shape[2])
    carry = Carry(chunks, walk.pack_state(dstate, dz), backward=True)
    for start, stop in reversed(walk.runs()):
        b_q, b_k, b_v, decay = walk.load(start, stop)
        b_do = walk.load_gradient(start, stop, do, o, norm)
        after = walk.state_gradients(carry, start, stop, b_q, b_do, decay)
        state = before.pop()

        attention = decay.pairs(b_q @ b_k.mT)
        dattention = decay.pairs(b_do @ b_v.mT)
        dk_out = decay.out(decay.out(b_v) @ after.mT)
        b_dq = dattention @ b_k + decay.into(decay.into(b_do) @ state.mT)
        b_dk = dattention.mT @ b_q + dk_out
        b_dv = attention.mT @ b_do + decay.out(decay.out(b_k) @ after)
        chunks.put(dq, start, stop, b_dq)
        chunks.put(dk, start, stop, b_dk)
        chunks.put(dv, start, stop, b_dv[..., : v.shape[-1]])
        if dg is not None:
            passing = (decay.total(state) * decay.total(after)).sum((-2, -1))
            passing += (b_k * dk_out).sum((-2, -1))
            per_token = (b_q * b_dq - b_k * b_dk).sum(-1)  # [slots, lanes, H, C]
            b_dg = per_token.flip(-1).cumsum(-1).flip(-1) + passing[..., None]
            chunks.put(dg, start, stop, b_dg)
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
        g = _half(g.transpose(1, 2).to(dtype))
        since = g.new_zeros(B, H, 0)  # decay from each earlier key to the block of rows
    for start in range(0, T, _LARGEST_CHUNK):
        stop = min(start + _LARGEST_CHUNK, T)
        rows = q[:, start:stop].transpose(1, 2).to(dtype) * scale
        pairs = rows @ k[:, :, :stop].mT
        if g is None:
            out[:, :, start:stop, :stop] = pairs.tril_(start)
            continue
        span = _spans(g[..., start:stop])
        into = g[..., start:stop].cumsum(-1)
        span = torch.cat([since[..., None, :] + into[..., None], span], -1)
        since = span[..., -1, :].clone()
        half = _grow(span)
        out[:, :, start:stop, :stop] = pairs.mul_(half).mul_(half).tril_(start)
    return out


def _add_product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale (x + a @ b), in one pass over x."""
    x_, a_, b_ = (each.flatten(0, -3) for each in (x, a, b))
    return torch.baddbmm(x_, a_, b_, beta=scale, alpha=scale).view(x.shape)


def _spans(g: Tensor) -> Tensor:
    """g_{j+1} + … + g_i for key j (column) and query i (row), 0 for j ≥ i: [.., C, C].

    Every sum runs on its own.  The difference of two sums from the start would lose a near decay
    beside a far larger one.
    """
    later = g.new_ones(g.shape[-1], g.shape[-1]).tril_(-1)
    return (g[..., None] * later).cumsum(-2)


def _half(g: Tensor) -> Tensor:
    """Half of each log-decay: what is summed, raised by ``_grow`` and then applied twice.

    A gate may grow.  Half of the exponent stays finite for as long as the product can, so that
    0 · inf never turns a result that is representable into NaN.  Nor does a decay of −inf.
    """
    return (g * 0.5).clamp_(min=torch.finfo(g.dtype).min)


def _grow(exponent: Tensor) -> Tensor:
    return exponent.clamp_(max=_LARGEST_EXPONENT).exp_()


class _Decay:
    """The decays of a run of chunks, g [slots, lanes, H, C], and how they apply.

    Each of them is half of the decay and applied twice; without a gate there is only the mask.
    """

    def __init__(self, g: Tensor | None):
        self.gated = g is not None
        if g is not None:
            g = _half(g)
            self._pairs = _grow(_spans(g))  # [.., C, C], from key to query
            self._into = _grow(g.cumsum(-1))[..., None]  # [.., C, 1], from the state before
            self._out = self._pairs[..., -1, :, None]  # [.., C, 1], to the state after
            self._total = self._into[..., -1:, :]  # [.., 1, 1], from state to state

    def pairs(self, x: Tensor) -> Tensor:
        """Both halves on x [.., C, C], and no key after its query."""
        return (x.mul_(self._pairs).mul_(self._pairs) if self.gated else x).tril_()

    def into(self, x: Tensor) -> Tensor:
        return x * self._into if self.gated else x

    def out(self, x: Tensor) -> Tensor:
        return x * self._out if self.gated else x

    def total(self, x: Tensor) -> Tensor:
        return x * self._total if self.gated else x

    def totals(self) -> tuple[Tensor, ...] | None:
        """Half of each slot's decay from state to state."""
        return self._total.unbind() if self.gated else None


class _Walk:
    """One call's tensors and how they are read, run by run."""

    def __init__(self, q, k, v, g, g_gamma, cu_seqlens, options):
        self.dtype = accumulator(q.dtype)
        self.q, self.k, self.v, self.g, self.g_gamma = q, k, v, g, g_gamma
        self.options = options
        sequences = Sequences.of(q, cu_seqlens)
        self.N, (self.K, self.V) = sequences.N, (k.shape[-1], v.shape[-1])
        small = self.K * self.V <= _SMALL_STATE
        largest = _LARGEST_CHUNK_OF_SMALL_STATES if small else _LARGEST_CHUNK
        size = options.chunk_size or sequences.fitting_chunk(largest)
        self.chunks: Chunks = sequences.chunks(size, options.reverse)

    def runs(self) -> list[tuple[int, int]]:
        H, K, V = self.q.shape[2], self.K, self.V
        return self.chunks.segments(H * max(K, V, self.chunks.size), _RUN)

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, _Decay]:
        q, k, v = (self.chunks.take(x, start, stop, self.dtype) for x in (self.q, self.k, self.v))
        if self.options.normalize:
            v = torch.cat([v, v.new_ones(1).expand(*v.shape[:-1], 1)], -1)
        return q, k, v, _Decay(self._gate(start, stop))

    def _gate(self, start: int, stop: int) -> Tensor | None:
        if self.g is not None:
            return self.chunks.take(self.g, start, stop, self.dtype)
        if self.g_gamma is not None:
            g = self.g_gamma.to(self.dtype).expand(self.q.shape[:3])
            return self.chunks.take(g, start, stop)
        return None

    def load_gradient(self, start: int, stop: int, do: Tensor, o: Tensor, norm: Tensor) -> Tensor:
        """scale · do, and behind the normaliser the gradient of its column too."""
        b_do = self.chunks.take(do, start, stop, self.dtype)
        if self.options.normalize:
            b_o = self.chunks.take(o, start, stop, self.dtype)
            b_norm = self.chunks.take(norm, start, stop)[..., None]
            b_norm = b_norm.masked_fill_(b_norm == 0, 1)  # tokens that are not there
            b_do = torch.cat([b_do, -(b_do * b_o).sum(-1, keepdim=True)], -1) / b_norm
        return b_do * self.options.scale

    def states(self, carry: Carry, start: int, stop: int, b_k, b_v, decay: _Decay) -> Tensor:
        """The state before each chunk of a run, [slots, lanes, H, K, V]."""
        added = decay.out(b_k).mT @ decay.out(b_v)
        return _scan(carry, range(start, stop), added, decay)

    def state_gradients(self, carry: Carry, start: int, stop: int, b_q, b_do, decay) -> Tensor:
        """The gradient of the state after each chunk of a run, [slots, lanes, H, K, V]."""
        added = decay.into(b_q).mT @ decay.into(b_do)
        return _scan(carry, range(start, stop)[::-1], added, decay)

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
        return state.contiguous(), z


def _scan(carry: Carry, slots: range, added: Tensor, decay: _Decay) -> Tensor:
    """S ← total ∘ S + added, slot by slot; returns the S that each slot was entered with."""
    states, totals = list(added.unbind()), decay.totals()
    for slot in slots:
        i = slot - min(slots[0], slots[-1])
        state = carry.enter(slot)
        if totals is None:
            after = states[i] + state
        else:
            after = torch.addcmul(states[i], state * totals[i], totals[i])
        states[i] = state
        carry.leave(slot, after)
    return torch.stack(states)
