"""Where sequences lie in a batch, dense or packed, and how they fall into chunks.

Everything is sized from shapes alone and found on the device: nothing is copied to the host and
nothing is kept behind the caller's back, so that a captured CUDA graph replays with other
boundaries.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Sequences:
    """A dense batch of B rows of T tokens, or N sequences packed into one row of T tokens."""

    B: int
    T: int
    cu_seqlens: Tensor | None = None

    @classmethod
    def of(cls, q: Tensor, cu_seqlens: Tensor | None) -> Sequences:
        return cls(q.shape[0], q.shape[1], cu_seqlens)

    @property
    def N(self) -> int:
        """How many sequences, and so how many states, there are."""
        return self.B if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def most_chunks(self, chunk: int) -> int:
        """The most chunks that one row can fall into, whatever the boundaries."""
        chunks = -(-self.T // chunk)
        return chunks if self.cu_seqlens is None or not chunks else chunks + self.N - 1

    def fitting_chunk(self, largest: int) -> int:
        """The chunk for which the padding of short sequences costs little, up to ``largest``."""
        if self.cu_seqlens is None:
            return max(min(self.T, largest), 1)
        mean = -(-self.T // max(self.N, 1))
        return next((size for size in (16, 32, 64) if mean <= size < largest), largest)

    def chunks(self, chunk: int, reverse: bool = False) -> Chunks:
        return Chunks(self, chunk, reverse)


class Chunks:
    """The chunks of all sequences in order, as whole-chunk PyTorch code walks them.

    Chunks stand in ``slots``, one behind the other in time; a slot holds one chunk of each of the
    ``lanes``: the rows of a dense batch, or the single row of packed sequences, where a slot may
    begin another sequence or stay empty.  With ``reverse`` time runs from each sequence's end.
    """

    def __init__(self, sequences: Sequences, chunk: int, reverse: bool = False):
        self.sequences, self.size, self.reverse = sequences, chunk, reverse
        self.slots = sequences.most_chunks(chunk)
        self.packed = sequences.cu_seqlens is not None
        self.lanes = 1 if self.packed else sequences.B
        if sequences.cu_seqlens is not None:
            self._find(sequences.cu_seqlens)

    def _find(self, cu_seqlens: Tensor) -> None:
        """For each slot its sequence and tokens; a token that is not there points at T."""
        N, T, C = self.sequences.N, self.sequences.T, self.size
        device = cu_seqlens.device
        bounds = cu_seqlens.long()
        ends = ((bounds.diff() + C - 1) // C).cumsum(0)  # [N], where each one's slots end
        slot = torch.arange(self.slots, device=device)
        sequence = torch.searchsorted(ends, slot, right=True)  # N where a slot stays empty
        used = sequence < N
        sequence_or_last = sequence.clamp(max=max(N - 1, 0))
        ends = torch.cat([ends.new_zeros(1), ends])
        start, stop = bounds[sequence_or_last], bounds[sequence_or_last + 1]  # [slots]
        rank = slot - ends[sequence_or_last]
        offset = rank[:, None] * C + torch.arange(C, device=device)  # [slots, C]
        token = stop[:, None] - 1 - offset if self.reverse else start[:, None] + offset
        there = (offset < (stop - start)[:, None]) & used[:, None]
        self._tokens = torch.where(there, token, T)
        self._there = there
        self.first = used & (rank == 0)  # [slots], a sequence begins here
        self.last = used & (slot + 1 == ends[sequence_or_last + 1])  # and ends here
        self.sequence = sequence  # [slots]

    def segments(self, elements: int, most: int) -> list[tuple[int, int]]:
        """Runs of slots in time order, each of at most ``most`` elements at ``elements`` a token.

        Work done run by run stays in the cache, and its temporaries do not grow with T.
        """
        run = max(most // max(elements * self.lanes * self.size, 1), 1)
        return [(at, min(at + run, self.slots)) for at in range(0, self.slots, run)]

    def buffer(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An output [B, T, *shape] for ``put``; packed, one token more for those not there."""
        dtype = dtype or like.dtype
        if self.packed:
            return like.new_zeros(1, self.sequences.T + 1, *shape, dtype=dtype)
        return like.new_empty(self.lanes, self.sequences.T, *shape, dtype=dtype)

    def tokens(self, buffer: Tensor) -> Tensor:
        """The real tokens of a filled ``buffer``, which keeps no others.

        Not a view of them: an operator's output may be written over, a view under autograd not.
        """
        return buffer.resize_(1, self.sequences.T, *buffer.shape[2:]) if self.packed else buffer

    def take(self, x: Tensor, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Tokens of slots [start, stop) of ``x`` [B, T, H, ...] as [slots, lanes, H, C, ...].

        Tokens that are not there read as zero.
        """
        dtype = dtype or x.dtype
        C = self.size
        if self.packed:
            padded = self._tokens[start:stop].clamp(max=self.sequences.T - 1)
            taken = x[0, padded]  # [slots, C, H, ...]
            mask = self._there[start:stop].reshape(*padded.shape, *[1] * (taken.dim() - 2))
            taken = taken.masked_fill(~mask, 0).unsqueeze(1)
        else:
            taken = self._window(x, start, stop)  # [B, n * C, H, ...]
            missing = (stop - start) * C - taken.shape[1]
            if self.reverse:
                taken = taken.flip(1)
            if missing:
                taken = torch.cat([taken, taken.new_zeros(self.lanes, missing, *x.shape[2:])], 1)
            taken = taken.reshape(self.lanes, stop - start, C, *x.shape[2:]).transpose(0, 1)
        # [slots, lanes, C, H, ...] -> heads before time, in memory too: matmul wants it so
        return taken.transpose(2, 3).to(dtype, memory_format=torch.contiguous_format).contiguous()

    def put(self, buffer: Tensor, start: int, stop: int, values: Tensor) -> None:
        """Write ``values`` [slots, lanes, H, C, ...] to where ``take`` reads them."""
        values = values.transpose(2, 3)  # [slots, lanes, C, H, ...]
        if self.packed:
            where = self._tokens[start:stop].flatten()
            buffer[0].index_copy_(0, where, values.flatten(0, 2).to(buffer.dtype))
            return
        window = self._window(buffer, start, stop)
        values = values.transpose(0, 1)  # [B, slots, C, H, ...]
        if not self.reverse and window.shape[1] == (stop - start) * self.size:
            window.unflatten(1, (stop - start, self.size)).copy_(values)
            return
        values = values.flatten(1, 2)[:, : window.shape[1]]  # [B, tokens, H, ...]
        window.copy_(values.flip(1) if self.reverse else values)

    def _window(self, x: Tensor, start: int, stop: int) -> Tensor:
        T, C = self.sequences.T, self.size
        first, last = start * C, min(stop * C, T)
        return x[:, T - last : T - first] if self.reverse else x[:, first:last]


class Carry:
    """A state that runs along the slots of ``chunks`` and starts anew with each sequence.

    Forward it starts from ``states`` [N, ...] where a sequence begins and is kept where it ends;
    backward, over slots in descending order, the other way round.  ``result`` [N, ...] is what was
    kept: for a sequence without tokens, what it started from.
    """

    def __init__(self, chunks: Chunks, states: Tensor, backward: bool = False):
        self._packed = chunks.packed
        self._state = states
        if self._packed:
            # one more row, for slots that stay empty and states that nobody keeps
            self._states = torch.cat([states, states.new_zeros(1, *states.shape[1:])])
            self._kept = self._states.clone()
            self._state = self._states[-1:]
            self._opens, closes = chunks.first, chunks.last
            if backward:
                self._opens, closes = closes, self._opens
            self._sequence = chunks.sequence
            self._row = torch.where(closes, chunks.sequence, states.shape[0])

    def enter(self, slot: int) -> Tensor:
        """The state [lanes, ...] before a slot."""
        if self._packed:
            states = self._states.index_select(0, self._sequence[slot : slot + 1])
            self._state = torch.where(self._opens[slot], states, self._state)
        return self._state

    def leave(self, slot: int, state: Tensor) -> None:
        """Take the state after a slot."""
        self._state = state
        if self._packed:
            self._kept.index_copy_(0, self._row[slot : slot + 1], state)

    @property
    def result(self) -> Tensor:
        return self._kept[:-1] if self._packed else self._state
