"""One call's workspaces, and the launches over them.

In order: operands of chunks and their pairs, the triangular system, the scans over chunks, which
fall into segments where they are long and few, and the gradients of what the scans read.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fla.ops.common.boundary import absent
from fla.ops.common.device import capability
from fla.ops.common.kernels import (
    cdiv,
    dense,
    first_line,
    multiprocessors,
    power_of_two,
    shared_memory,
)
from fla.ops.common.launch import launch
from fla.ops.common.sequences import Sequences
from fla.ops.common.workspace import Wanted, bytes_of, new_parts, parts_of
from fla.ops.kda.chunk_gradients import gradients_kernel, through_states_kernel, unit_kernel
from fla.ops.kda.chunk_inter import advance_kernel, join_kernel, scans_kernel
from fla.ops.kda.chunk_intra import halving_kernel, intra_kernel
from fla.ops.kda.gate_kernels import parameters_backward
from fla.ops.kda.halving import ROOM, TILE
from fla.ops.kda.slots import rows_and_slots
from fla.ops.kda.wy_fast import adjoint_kernel, solve_kernel


class Launch(NamedTuple):
    """Channels in a block, warps, and how many blocks are in flight."""

    block: int
    warps: int
    stages: int = 1


class Line(NamedTuple):
    """A launch for workspaces of elements of up to ``bytes`` and of up to BK channels.

    ``shared`` is the most shared memory, in KiB, that it takes on GPUs with less than 227; what the
    tensor cores of sm_90 and sm_100 take beyond it, these have.
    """

    bytes: int
    BK: int
    block: int
    warps: int
    stages: int
    shared: int


# Blocks of value channels: Sᵀ [64, BK] is one warpgroup's accumulator, and with V split in two, 64
# heads fill the chip.  As many chunks are in flight as shared memory holds.
SCANS = (
    Line(2, 64, 64, 4, 3, shared=106),
    Line(2, 64, 64, 4, 2, shared=58),
    Line(2, 128, 64, 4, 3, shared=170),
    Line(2, 128, 64, 4, 2, shared=98),
    Line(2, 256, 64, 4, 2, shared=94),
    # tf32x3 holds each operand twice
    Line(4, 64, 64, 4, 3, shared=210),
    Line(4, 64, 64, 4, 2, shared=114),
    Line(4, 128, 64, 4, 2, shared=130),
    Line(4, 128, 64, 4, 1, shared=65),
    Line(4, 256, 64, 8, 1, shared=129),  # four warps would spill half of a token's 1 KB
    Line(4, 256, 32, 4, 1, shared=65),  # for GPUs with little shared memory
)
# Both scans at once fill the chip with V whole: two warpgroups, and operands are read once.
BOTH = Line(2, 128, 128, 8, 2, shared=114)
# On rows [4, BK], one token of each block of 16, a thread has all tokens of its channels.  Blocks
# of these are what products between tokens take at once: all, where shared memory holds them.
PAIRS = (
    Line(2, 256, 256, 4, 1, shared=65),
    Line(4, 128, 128, 4, 1, shared=97),
    Line(4, 256, 256, 4, 1, shared=193),
    Line(4, 256, 128, 4, 1, shared=97),  # for GPUs with little shared memory
)
# The next block of V is on its way while one is multiplied.
THROUGH = Launch(64, 4, 2)
# Tiles [64, 16], one warpgroup's rows.
GRADIENTS = Launch(64, 4)
# The tensor cores of sm_100 have memory of their own, in which Triton 3.6 finds no place for those.
NARROW_GRADIENTS = Launch(32, 4)
# Chunks below which a segment's summary costs more than it saves.
SHORTEST_SEGMENT = 16
# In fewer segments, summaries and runs take as long as one run of all chunks.
FEWEST_SEGMENTS = 4


def chunk(BK: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk, whatever the caller says: 64 where a scan's operands fit on the chip."""
    return 64 if BK * dtype.itemsize <= 256 else 32


def _tiles(q: Tensor, options) -> tuple[torch.dtype, int, int]:
    """What workspaces hold, and how many channels and tokens a tile has.

    The recurrent form is short and, token by token, exact: so is its gradient.  fp16 has as many
    bits as tf32, which tensor cores cut off rather than round.
    """
    exact = q.dtype != torch.bfloat16 or options.chunk_size == 0
    dtype = torch.float32 if exact else torch.bfloat16
    BK = max(power_of_two(q.shape[-1]), 64)
    return dtype, BK, chunk(BK, dtype)


def pairs_and_operands(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, options) -> list[Wanted]:
    """M and Y, then q_in, k_in and k_out, decays, betas, the factors of norms, and near rows."""
    dtype, BK, C = _tiles(q, options)
    _, slots = rows_and_slots(q.shape[0], q.shape[1], cu_seqlens, C)
    HV = v.shape[2]
    return [
        (dtype, 2, slots, HV, C, C),
        (dtype, 3, slots, HV, C, BK),
        (torch.float32, slots, HV, BK),
        (torch.float32, slots, HV, C),
        (torch.float32, slots, HV, 2, C),
        (torch.int32, slots, HV, C // TILE.value),
    ]


class Call:
    """One call's operands, its workspaces and the launches over them.

    Workspaces are padded: [slots, HV, C, BK], so that scans read whole tiles without masks.  They
    are bf16 for bf16 operands, else fp32: decayed operands leave the range of fp16.
    """

    def __init__(self, q, k, v, g, beta, A_log, dt_bias, cu_seqlens, options):
        self.q, self.k, self.v, self.g, self.beta = dense(q, k, v, g, beta)
        self.A_log, self.dt_bias, self.cu_seqlens = dense(A_log, dt_bias, cu_seqlens)
        self.options = options
        self.B, self.T, self.H, self.K = q.shape
        self.HV, self.V = v.shape[2:]
        self.N = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.tail = (self.V, self.K) if options.state_v_first else (self.K, self.V)  # of a state
        self.empty = q.numel() == 0 or v.numel() == 0
        self.dtype, self.BK, self.C = _tiles(q, options)
        self.scan, pairs = self.choose(SCANS), self.choose(PAIRS)
        whole = self.BK == cdiv(self.V, 64) * 64 == BOTH.block
        self.both = self.choose((BOTH, *SCANS)) if whole else self.scan
        newer = capability(self.q.device) >= (10, 0)
        self.gradient_line = NARROW_GRADIENTS if newer else GRADIENTS
        self.of_pairs = {
            "BLOCK": min(pairs.block, self.BK),
            "num_warps": pairs.warps,
            "num_stages": pairs.stages,
        }
        self.rows, self.slots = rows_and_slots(self.B, self.T, cu_seqlens, self.C)
        self.common = {
            "C": self.C,
            "BK": self.BK,
            "PRECISION": "tf32" if self.dtype == torch.bfloat16 else "tf32x3",
        }
        self.beta_flags = {
            "BETA_SIGMOID": options.beta_sigmoid,
            "BETA_RANGE": 2 if options.neg_eigval else 1,
        }
        self.lower_bound = options.lower_bound if options.gate else None
        steepest = math.inf if self.lower_bound is None else abs(self.lower_bound)
        self.all_near = TILE.value * steepest * math.log2(math.e) < ROOM.value
        self.forgets = options.gate and (self.lower_bound is None or self.lower_bound <= 0)

    def choose(self, lines: tuple[Line, ...]) -> Line:
        """The first line that takes this call on its GPU."""
        size, shared = self.dtype.itemsize, shared_memory(self.q.device)
        return first_line(lines, shared, lambda line: size <= line.bytes and self.BK <= line.BK)

    def new_state(self) -> Tensor:
        return self.q.new_empty(self.N, self.HV, *self.tail, dtype=torch.float32)

    def new_intermediate(self) -> Tensor:
        chunks = Sequences.of(self.q, self.cu_seqlens).most_chunks(self.options.chunk_size)
        return self.k.new_empty(self.B, chunks, self.HV, *self.tail)

    def strides(self, state: Tensor | None) -> tuple[int, int, int, int]:
        """Strides of a state [rows, HV, ...] over rows, heads, values and keys."""
        if state is None:
            return 0, 0, 0, 0
        n, h, first, second = state.stride()
        return (n, h, first, second) if self.options.state_v_first else (n, h, second, first)

    def take(self, room: Tensor | None) -> None:
        """Workspaces of ``intra``, in ``room``, if any, those that are kept: what fits there."""
        wanted = pairs_and_operands(self.q, self.v, self.cu_seqlens, self.options)
        # whether gradients of operands may take their place
        self.in_place = room is None or room.numel() < bytes_of(*wanted)
        if room is None:
            parts = new_parts(self.q, *wanted)
        elif self.in_place:
            parts = parts_of(room, *wanted[:1]) + new_parts(self.q, *wanted[1:])
        else:
            parts = parts_of(room, *wanted)
        self.pairs, self.operands, self.decay, self.betas, self.factors, self.near = parts
        self.queries, self.solver = self.pairs[0], self.pairs[1]
        self.q_in, self.k_in, self.k_out = (self.operands[i] for i in range(3))

    def intra_again(self, room: Tensor) -> None:
        """``intra`` where ``room`` holds what it kept."""
        self.take(room)
        if self.in_place:
            self.make_operands(pairs=False)

    def intra(self, room: Tensor | None) -> None:
        """What the scans read of each chunk; what is kept of it goes to ``room``."""
        self.take(room)
        self.make_operands(pairs=True)
        if not self.all_near:
            self.halve()
        launch(
            solve_kernel,
            self.slots * self.HV,
            (self.betas, self.cu_seqlens, self.solver),
            (self.T, self.rows),
            {
                "HV": self.HV, "C": self.C, "PRECISION": self.common["PRECISION"],
                "num_warps": 1, "num_stages": 1,
            },
        )  # fmt: skip

    def make_operands(self, pairs: bool) -> None:
        """The first of ``intra``: operands, betas and norms, and with ``pairs`` M and A."""
        launch(
            intra_kernel,
            self.slots * self.HV,
            (*self.into_operands(), *((self.queries, self.solver) if pairs else (None, None))),
            (self.options.scale, self.lower_bound, self.T, self.rows),
            {
                "H": self.H, "HV": self.HV, "K": self.K, **self.common, **self.beta_flags,
                "QK_L2NORM": self.options.qk_l2norm, "GATE": self.options.gate,
                "FORGETS": self.forgets, **self.of_pairs,
            },
        )  # fmt: skip

    def into_operands(self):
        """Operands of ``intra_kernel``, and its results but for pairs."""
        return (
            self.q, self.k, self.g, self.beta, self.A_log, self.dt_bias, self.cu_seqlens,
            self.q_in, self.k_in, self.k_out, self.decay, self.betas, self.factors, self.near,
        )  # fmt: skip

    def into_halving(self):
        """Operands of ``halving_kernel``, and its results."""
        return (
            self.q, self.k, self.g, self.A_log, self.dt_bias, self.cu_seqlens,
            self.factors, self.near, self.queries, self.solver,
        )  # fmt: skip

    def halve(self) -> None:
        """M and A of rows too steep for the anchor of their block."""
        launch(
            halving_kernel,
            self.slots * self.HV,
            self.into_halving(),
            (self.options.scale, self.lower_bound, self.T, self.rows),
            {
                "H": self.H, "HV": self.HV, "K": self.K, **self.common,
                "GATE": self.options.gate, **self.of_pairs,
            },
        )  # fmt: skip

    def _segment(self, programs: int) -> int:
        """Tokens of a segment, where ``programs`` would run without segments.

        So many that runs of all segments fill the chip, but not so few that a summary, which costs
        two runs, does not pay; longer than any sequence where one segment is enough.
        """
        chunks = cdiv(self.T, self.C)
        most = multiprocessors(self.q.device) // max(programs, 1)
        pieces = min(most, chunks // SHORTEST_SEGMENT)
        return self.C * (cdiv(chunks, pieces) if pieces >= FEWEST_SEGMENTS else chunks + 1)

    def _operands(self):
        return (
            self.cu_seqlens, self.q_in, self.k_in, self.k_out, self.decay, self.betas,
            self.queries, self.solver,
        )  # fmt: skip

    def _sizes(self) -> dict[str, int]:
        return {"HV": self.HV, "K": self.K, "V": self.V}

    def _summaries(self, segments: int, VP: int) -> tuple[Tensor, tuple[int, int, int, int]]:
        rows, columns = VP + self.BK, self.BK
        summaries = self.q.new_empty(segments, self.HV, rows, columns, dtype=torch.float32)
        return summaries, (self.HV * rows * columns, rows * columns, columns, 1)

    def _join(self, summaries, VP, state, segment, reverse: bool) -> None:
        wide = self.BK > 128  # what is loaded ahead fits into 99 KiB, which every GPU has
        launch(
            join_kernel,
            self.N * self.HV * (VP // 16),
            (summaries, self.cu_seqlens, state),
            (segment, self.T, self.rows),
            {
                **self._sizes(), "state_strides": self.strides(state), "BK": self.BK, "BV": 16,
                "VP": VP, "BLOCK": 64, "STAGES": 2 if wide else 3, "REVERSE": reverse,
                "num_warps": 8 if wide else 4,
            },
        )  # fmt: skip

    def advance(self, o, state, final, h) -> None:
        VP = cdiv(self.V, 64) * 64
        segment = self._segment(self.N * self.HV * (VP // self.scan.block))
        strides, nowhere = self.strides(state), (0, 0, 0, 0)
        if segment <= self.T:
            _, segments = rows_and_slots(self.B, self.T, self.cu_seqlens, segment)
            summaries, inner = self._summaries(segments, VP)
            self.run_advance(segment, VP + self.BK, None, nowhere, None, None, summaries, inner)
            self._join(summaries, VP, state, segment, reverse=False)
            state, strides = summaries, inner
        self.run_advance(segment, VP, state, strides, o, h, final, self.strides(final))

    def run_advance(self, segment, columns, state, strides, o, h, final, final_strides) -> None:
        """All segments at once; with more columns than there are value channels, summaries."""
        BV, VP = self.scan.block, cdiv(self.V, 64) * 64
        _, segments = rows_and_slots(self.B, self.T, self.cu_seqlens, segment)
        launch(
            advance_kernel,
            segments * self.HV * (columns // BV),
            (self.v, *self._operands(), state, o, h, None, final),
            (segment, self.T, self.rows),
            {
                **self._sizes(), "state_strides": strides,
                "states_strides": (0, 0, 0, 0) if h is None else self.strides(h[0]),
                "final_strides": final_strides, **self.common, "BV": BV, "VP": VP,
                "COLUMNS": columns, "SUMMARISE": columns > VP,
                "EVERY": 0 if h is None else self.options.chunk_size // self.C,
                "num_warps": self.scan.warps, "num_stages": self.scan.stages,
            },
        )  # fmt: skip

    def scans(self, do, state, dstate, dinitial) -> None:
        VP = cdiv(self.V, 64) * 64
        segment = self._segment(2 * self.N * self.HV * (VP // self.both.block))
        self.both_values, self.both_states = new_parts(
            self.q,
            (self.dtype, 2, self.slots, self.HV, self.C, VP),
            (self.dtype, 2, self.slots, self.HV, VP, self.BK),
        )
        self.values, self.solved = self.both_values[0], self.both_values[1]
        self.states, self.dstates = self.both_states[0], self.both_states[1]
        strides, dstrides, nowhere = self.strides(state), self.strides(dstate), (0, 0, 0, 0)
        if segment <= self.T:
            _, segments = rows_and_slots(self.B, self.T, self.cu_seqlens, segment)
            (ahead, inner), (back, _) = (self._summaries(segments, VP) for _ in range(2))
            starts = nowhere, inner
            summary, dsummary = (None, None, None, ahead), (None, None, None, back)
            self.run_scans(segment, VP + self.BK, do, summary, starts, dsummary, starts)
            self._join(ahead, VP, state, segment, reverse=False)
            self._join(back, VP, dstate, segment, reverse=True)
            state, strides, dstate, dstrides = ahead, inner, back, inner
        self.run_scans(
            segment, VP, do,
            (state, self.states, self.values, None), (strides, nowhere),
            (dstate, self.dstates, self.solved, dinitial), (dstrides, self.strides(dinitial)),
        )  # fmt: skip

    def run_scans(self, segment, columns, do, forward, strides, backward, dstrides) -> None:
        """``forward`` is the state, the states to write, w and the last state, and so on."""
        VP = cdiv(self.V, 64) * 64
        _, segments = rows_and_slots(self.B, self.T, self.cu_seqlens, segment)
        tile = self.HV * VP * self.BK, VP * self.BK, self.BK, 1
        launch(
            scans_kernel,
            2 * segments * self.HV * (columns // self.both.block),
            (self.v, do, *self._operands(), *forward, *backward),
            (segment, self.T, self.rows),
            {
                **self._sizes(), "state_strides": strides[0], "states_strides": tile,
                "final_strides": strides[1], "dstate_strides": dstrides[0],
                "dfinal_strides": dstrides[1], **self.common, "BV": self.both.block, "VP": VP,
                "COLUMNS": columns, "SUMMARISE": columns > VP,
                "num_warps": self.both.warps, "num_stages": self.both.stages,
            },
        )  # fmt: skip

    def new_gradients(self) -> None:
        """Workspaces of ``gradients``."""
        chunks = self.slots, self.HV
        has_parameters = self.A_log is not None or self.dt_bias is not None
        of_parameters = (self.slots if has_parameters else 0), self.HV
        dpairs, doperands, self.own, self.through, drates, dbiases = new_parts(
            self.q,
            (self.dtype, 2, *chunks, self.C, self.C),
            (self.dtype, 0 if self.in_place else 3, *chunks, self.C, self.BK),
            (torch.float32, *chunks, self.C),
            (torch.float32, *chunks, self.BK),
            (torch.float32, *of_parameters, self.BK // self.gradient_line.block),
            (torch.float32, *of_parameters, self.BK),
        )
        self.drates = drates if has_parameters else None
        self.dbiases = dbiases if has_parameters else None
        self.dqueries, self.dkeys = dpairs[0], dpairs[1]
        if self.in_place:
            doperands = self.operands
        self.dq_in, self.dk_in, self.dk_out = (doperands[i] for i in range(3))

    def gradients(self, do):
        self.new_gradients()
        dv, dg, dbeta = (torch.empty_like(x) for x in (self.v, self.g, self.beta))
        self.across(do, dv, dbeta)
        del self.values, self.solved, self.states, self.dstates, self.both_values, self.both_states
        dq, dk = self.within(dg)
        parameters = parameters_backward(self.A_log, self.dt_bias, self.drates, self.dbiases)
        parameters = (absent(self.q) if x is None else x for x in parameters)
        return dq, dk, dv, dg, dbeta, *parameters

    def across(self, do, dv, dbeta) -> None:
        """What comes through pairs and through states, from do and what the scans left."""
        C, VP, PRECISION = self.C, self.values.shape[-1], self.common["PRECISION"]
        launch(
            adjoint_kernel,
            self.slots * self.HV,
            (
                do, self.beta, self.cu_seqlens, self.betas, self.values, self.solved,
                dv, dbeta, self.dqueries, self.dkeys, self.own,
            ),
            (self.T, self.rows),
            {
                "HV": self.HV, "V": self.V, "C": C, "VP": VP, "BV": C, **self.beta_flags,
                "PRECISION": PRECISION, "num_warps": 4, "num_stages": 1,
            },
        )  # fmt: skip
        launch(
            through_states_kernel,
            self.slots * self.HV * (self.BK // THROUGH.block),
            (
                do, self.cu_seqlens, self.betas, self.values, self.solved, self.states,
                self.dstates, self.dq_in, self.dk_in, self.dk_out, self.through,
            ),
            (self.T, self.rows),
            {
                "HV": self.HV, "V": self.V, **self.common, "BLOCK": THROUGH.block, "VP": VP,
                "BV": 64, "num_warps": THROUGH.warps * C // 64, "num_stages": THROUGH.stages,
            },
        )  # fmt: skip

    def within(self, dg) -> tuple[Tensor, Tensor]:
        """Gradients of gates, and of q and k, which are returned."""
        launch(
            gradients_kernel,
            self.slots * self.HV * (self.BK // self.gradient_line.block),
            (
                self.q, self.k, self.g, self.A_log, self.dt_bias, self.cu_seqlens, self.factors,
                *self.into_gradients(dg),
            ),
            (self.options.scale, self.lower_bound, self.T, self.rows),
            {
                "H": self.H, "HV": self.HV, "K": self.K, **self.common,
                "BLOCK": self.gradient_line.block, "GATE": self.options.gate,
                "num_warps": self.gradient_line.warps, "num_stages": self.gradient_line.stages,
            },
        )  # fmt: skip
        return self.units()

    def into_gradients(self, dg):
        """Operands of ``gradients_kernel`` that ``across`` left, and its results."""
        return (
            self.dq_in, self.dk_in, self.dk_out, self.through, self.dqueries, self.dkeys, self.own,
            dg, self.drates, self.dbiases,
        )  # fmt: skip

    def units(self) -> tuple[Tensor, Tensor]:
        """dq and dk of those of activated q and k, which stand in ``dq_in`` and ``dk_in``."""
        dq, dk = torch.empty_like(self.q), torch.empty_like(self.k)
        launch(
            unit_kernel,
            self.slots * self.H,
            (self.q, self.k, self.cu_seqlens, self.factors, self.dq_in, self.dk_in, dq, dk),
            (self.options.scale, self.T, self.rows),
            {
                "H": self.H, "HV": self.HV, "K": self.K, "C": self.C, "BK": self.BK,
                "GROUP": self.HV // self.H, "QK_L2NORM": self.options.qk_l2norm,
                "num_warps": 4, "num_stages": 1,
            },
        )  # fmt: skip
        return dq, dk

    def no_gradients(self):
        zeros = (torch.zeros_like(x) for x in (self.q, self.k, self.v, self.g, self.beta))
        parameters = (
            absent(self.q) if x is None else torch.zeros_like(x) for x in (self.A_log, self.dt_bias)
        )
        return *zeros, *parameters
