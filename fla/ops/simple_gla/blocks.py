"""What the stages of the linear engine share: their launches, and how a chunk's tokens weigh.

Log-decays are summed inside chunks, and no sum reaches beyond one, so that none grows with T.  Sums
are logs to base 2, for exp2.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.common.kernels import (
    LOG2E,
    cdiv,
    chunks_in,
    first_line,
    multiprocessors,
    power,
    power_of_two,
    sequence,
    sequences_in,
    shared_memory,
)
from fla.ops.common.launch import launch
from fla.ops.common.sequences import Sequences

CHUNK = 64
# Intermediate results of fp16 operands may leave the range of fp16: they are tf32, as exact.
_PRECISION = {torch.bfloat16: None, torch.float16: "tf32", torch.float32: "tf32x3"}
# To be summarised, a segment is read once more, by programs that share it.  A piece has four chunks
# at least, for what it is summarised into has the size of one or two.
_PIECES, _SHORTEST_PIECE = 4, 4


@dataclasses.dataclass(frozen=True)
class Line:
    """One launch configuration, for operands of up to ``bytes`` and states [X, Z] of up to X.

    ``shared`` is the most shared memory, in KiB, that it takes up to sm_90.
    """

    bytes: int
    X: int
    BX: int
    BZ: int
    warps: int
    stages: int
    shared: int

    @property
    def constants(self) -> dict[str, int]:
        return {
            "BX": self.BX,
            "BZ": self.BZ,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Call:
    """What one call's kernels are launched with, beside its tensors."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, options):
        self.sequences = Sequences.of(q, cu_seqlens)
        self.H, self.K, self.V = q.shape[2], q.shape[3], v.shape[3]
        self.N, self.T = self.sequences.N, self.sequences.T
        self.tokens = self.sequences.B * self.T
        self.packed = cu_seqlens is not None
        self.device, self._wide = q.device, _PRECISION[q.dtype] is not None
        self.constants = {
            "H": self.H,
            "C": CHUNK,
            "REVERSE": options.reverse,
            "PRECISION": _PRECISION[q.dtype],
        }

    def choose(self, lines: tuple[Line, ...], X: int) -> Line:
        """The first line that takes this call on its GPU."""
        shared, size = shared_memory(self.device), 4 if self._wide else 2
        return first_line(lines, shared, lambda line: size <= line.bytes and X <= line.X)

    def segment(self, line: Line, X: int, Z: int, at_once: int, walks: int) -> int:
        """Tokens a segment, or 0 for whole sequences where these alone are programs enough.

        As many segments as make ``at_once`` programs for each multiprocessor, if any.  A summary of
        wide keys saves a single walk in two segments less than it costs.
        """
        many = multiprocessors(self.device)
        programs = self.H * cdiv(X, line.BX) * cdiv(Z, line.BZ)
        segments = 0 if programs * self.sequences.B * 2 > many else at_once * many // programs
        if segments < 2 or (segments == 2 and walks == 1 and X > CHUNK):
            return 0
        chunks = cdiv(cdiv(self.tokens, CHUNK), segments)
        piece = self.piece(chunks * CHUNK)
        segment = cdiv(chunks * CHUNK, piece) * piece
        return 0 if segment >= self.T else segment

    @staticmethod
    def piece(segment: int) -> int:
        """Tokens that are summarised by one program: a quarter of a segment, if that is enough."""
        return max(cdiv(segment, _PIECES * CHUNK), _SHORTEST_PIECE) * CHUNK

    def units(self, segment: int) -> int:
        """Segments, or sequences."""
        return cdiv(self.tokens, segment) if segment else self.N


# A step beyond these weighs nothing, 2**-200, and a chunk's sums stay exact enough beside it:
# alone to 2**-11 for 16-bit operands, with their rests to fp64.
_STEEPEST = tl.constexpr(200.0)
_STEEPEST_WITH_REST = tl.constexpr(1e7)


@triton.jit(do_not_specialize=["N", "T", "tokens", "H"])
def decay_kernel(
    g, sums, rests, cu_seqlens, N, T, tokens, H,
    C: tl.constexpr, BH: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """sums [H, tokens] of g [tokens, H] from each chunk's first token on; of C tokens, BH heads.

    REVERSE: from its last token back.  ``rests`` [H, tokens] is what fp32 cannot hold of a sum, so
    that differences are right to fp32 beside any decay.
    """
    blocks = tl.cdiv(H, BH)
    begin = tl.program_id(0) // blocks * C
    o_h = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    o_c = tl.arange(0, C)
    first, last = sequences_in(cu_seqlens, N, T, tokens, begin, begin + C)
    for i_n in range(first, last):
        bos, length, live = sequence(cu_seqlens, i_n, N, T, tokens)
        c_first, c_last, _ = chunks_in(bos, length, begin, begin + C, C)
        for c in range(c_first, c_last):
            token = (bos + c * C + o_c).to(tl.int64)
            mask = (o_c < live - c * C)[:, None] & (o_h < H)[None, :]
            b_g = tl.load(g + token[:, None] * H + o_h[None, :], mask=mask, other=0.0)
            at = o_h[None, :].to(tl.int64) * tokens + token[:, None]  # [C, BH]
            if rests is None:
                b_x = b_g.to(tl.float32) * LOG2E
                b_x = tl.maximum(b_x, -_STEEPEST)
                tl.store(sums + at, tl.cumsum(b_x, 0, reverse=REVERSE), mask=mask)
            else:
                b_x = tl.maximum(b_g.to(tl.float32), -_STEEPEST_WITH_REST).to(tl.float64)
                b_x = tl.cumsum(b_x * LOG2E, 0, reverse=REVERSE)
                b_sum = b_x.to(tl.float32)
                tl.store(sums + at, b_sum, mask=mask)
                tl.store(rests + at, b_x - b_sum.to(tl.float64), mask=mask)


def new_sums(q: Tensor, g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Room for the sums [H, tokens] of a gate, and for fp32 operands for their rests."""
    if g is None:
        return None, None
    B, T, H = g.shape
    sums = g.new_empty(H, B * T, dtype=torch.float32)
    return sums, torch.empty_like(sums) if q.dtype == torch.float32 else None


def sums_of(
    sequences: Sequences, q: Tensor, g: Tensor | None, reverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``new_sums``, made."""
    sums, rests = new_sums(q, g)
    if g is None or sums is None:
        return None, None
    H, tokens = sums.shape
    BH = min(power_of_two(H), 16)
    launch(
        decay_kernel,
        cdiv(tokens, CHUNK) * cdiv(H, BH),
        (g.contiguous(), sums, rests, sequences.cu_seqlens),
        (sequences.N, sequences.T, tokens, H),
        {"C": CHUNK, "BH": BH, "REVERSE": reverse},
    )
    return sums, rests


@triton.jit
def sums_at(sums, gamma, token, there, C: tl.constexpr, REVERSE: tl.constexpr):
    """A chunk's sums up to each of its ``there`` tokens, b_to [C], and over all of them.

    ``sums`` (or rests) are those of one head; without, ``gamma`` is its constant decay.
    """
    o_c = tl.arange(0, C)
    if sums is None:
        b_to = gamma * (there - o_c if REVERSE else o_c + 1)
        s_all = gamma * there
    else:
        b_to = tl.load(sums + token + o_c, mask=o_c < there, other=0.0)
        s_all = tl.load(sums + token + (0 if REVERSE else there - 1), mask=there > 0, other=0.0)
    return b_to, s_all


@triton.jit
def seen(apart, C: tl.constexpr, REVERSE: tl.constexpr):
    """Which keys (columns) a chunk's queries (rows) see: [C, C].

    Those that are ``apart`` by as many tokens, 0 for their own too.
    """
    o_c = tl.arange(0, C)
    if REVERSE:
        m = o_c[:, None] + apart <= o_c[None, :]
    else:
        m = o_c[:, None] >= o_c[None, :] + apart
    return m


@triton.jit
def pair_weights(
    sums, rests, gamma, token, there, apart, C: tl.constexpr, REVERSE: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """2 to the power of the decay from key (column) to query (row), zero where it sees nothing.

    TURNED: from key (row) to query (column).
    """
    b_to, _ = sums_at(sums, gamma, token, there, C, REVERSE)
    b_span = b_to[:, None] - b_to[None, :]  # [C, C]
    if rests is not None:
        b_rest, _ = sums_at(rests, gamma, token, there, C, REVERSE)
        b_span += b_rest[:, None] - b_rest[None, :]
    if TURNED:
        b_span = -b_span
    return power(tl.where(seen(apart, C, REVERSE != TURNED), b_span, float("-inf")))


@triton.jit
def steep(s_all, there):
    """Whether a chunk's tokens decay to less than a sixteenth each, on average.

    What they leave is then small beside a token's pair with itself, which has no decay, and in a
    sum with it would lose the digits that the gate's gradient is made of.
    """
    return s_all < -4.0 * there


@triton.jit
def step_weights(sums, rests, gamma, token, there, C: tl.constexpr, REVERSE: tl.constexpr):
    """2 to the power of the decays into each token and from behind it to the end; that over all.

    The last is a logarithm.
    """
    b_to, s_all = sums_at(sums, gamma, token, there, C, REVERSE)
    b_from = s_all - b_to
    if rests is not None:
        b_rest, s_rest = sums_at(rests, gamma, token, there, C, REVERSE)
        b_to += b_rest
        b_from += s_rest - b_rest
        s_all += s_rest
    return power(b_to), power(b_from), s_all
