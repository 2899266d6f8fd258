"""Log-decays summed inside chunks, and the gradient of a gate.

No sum reaches beyond a chunk, so none grows with T.  Sums are logs to base 2, for exp2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.common.kernels import (
    cdiv,
    chunks_in,
    power,
    power_of_two,
    sequence,
    sequences_in,
)
from fla.ops.common.sequences import Sequences

CHUNK = 64
# Chunks between the states that a backward pass leaves behind for the gate's gradient.
MARK = 4
_LOG2E = tl.constexpr(1.4426950408889634)
# A step beyond these weighs nothing, 2**-128, and the sums of a chunk stay exact enough beside it:
# to 2**-11 at worst for 16-bit operands, to 2**-24 for whole numbers.
_STEEPEST = tl.constexpr(128.0)
_TINY = tl.constexpr(1e-30)
_STEEPEST_WHOLE = tl.constexpr(100000.0)


@triton.jit
def _to_and_from(b_x, reverse):
    """Sums of steps [C, BH]: up to and with each token, and from behind it to the end."""
    b_up = tl.cumsum(b_x, 0)
    b_down = tl.cumsum(b_x, 0, reverse=True)
    return tl.where(reverse, b_down, b_up), tl.where(reverse, b_up, b_down) - b_x


@triton.jit(do_not_specialize=["reverse", "N", "T", "tokens", "H"])
def decay_kernel(
    g, g_gamma, decays, rest, cu_seqlens, reverse, N, T, tokens, H,
    C: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """decays [H, tokens, 4] of g [tokens, H] or g_gamma [H]; a program owns C tokens of BH heads.

    The four are the sum up to a token, the sum from behind it, and 2 to the power of each.  With
    ``rest`` [H, tokens, 2] a step is its nearest whole number, summed without error in ``decays``,
    and what is left of it, summed in ``rest``: near pairs stay right to fp32 beside any decay.
    """
    blocks = tl.cdiv(H, BH)
    begin = tl.program_id(0) // blocks * C
    o_h = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    o_t = tl.arange(0, C)
    first, last = sequences_in(cu_seqlens, N, T, tokens, begin, begin + C)
    for i_n in range(first, last):
        bos, length, live = sequence(cu_seqlens, i_n, N, T, tokens)
        c_first, c_last, _ = chunks_in(bos, length, begin, begin + C, C)
        for c in range(c_first, c_last):
            token = (bos + c * C + o_t).to(tl.int64)
            mask = (o_t < live - c * C)[:, None] & (o_h < H)[None, :]
            if g is not None:
                b_g = tl.load(g + token[:, None] * H + o_h[None, :], mask=mask, other=0.0)
            else:
                b_g = tl.load(g_gamma + o_h[None, :] + 0 * o_t[:, None], mask=mask, other=0.0)
            b_x = b_g.to(tl.float32) * _LOG2E  # [C, BH]
            at = o_h[None, :].to(tl.int64) * tokens + token[:, None]
            there = (o_t < length - c * C)[:, None] & (o_h < H)[None, :]
            if rest is None:
                b_x = tl.minimum(tl.maximum(b_x, -_STEEPEST), _STEEPEST)
                b_to, b_from = _to_and_from(b_x, reverse != 0)
                b_powers = tl.join(power(b_to), power(b_from))
            else:
                b_x = tl.minimum(tl.maximum(b_x, -_STEEPEST_WHOLE), _STEEPEST_WHOLE)
                b_whole = tl.floor(b_x + 0.5)
                b_to, b_from = _to_and_from(b_whole, reverse != 0)
                r_to, r_from = _to_and_from(b_x - b_whole, reverse != 0)
                b_powers = tl.join(power(b_to + r_to), power(b_from + r_from))
                p_rest = rest + at[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
                tl.store(p_rest, tl.join(r_to, r_from), mask=there[:, :, None])
            p_decays = decays + at[:, :, None] * 4 + tl.arange(0, 2)[None, None, :]
            tl.store(p_decays, tl.join(b_to, b_from), mask=there[:, :, None])
            tl.store(p_decays + 2, b_powers, mask=there[:, :, None])


def decays_of(
    sequences: Sequences, g: Tensor | None, g_gamma: Tensor | None, like: Tensor, reverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Decays [H, tokens, 4] of a gate, and for fp32 operands what whole numbers leave of them."""
    if g is None and g_gamma is None:
        return None, None
    H, tokens = like.shape[2], sequences.B * sequences.T
    decays = like.new_empty(H, tokens, 4, dtype=torch.float32)
    rest = decays.new_empty(H, tokens, 2) if like.dtype == torch.float32 else None
    BH = min(power_of_two(H), 16)
    grid = (cdiv(tokens, CHUNK) * cdiv(H, BH),)
    decay_kernel[grid](
        None if g is None else g.contiguous(),
        None if g_gamma is None else g_gamma.contiguous(),
        decays,
        rest,
        sequences.cu_seqlens,
        int(reverse),
        sequences.N,
        sequences.T,
        tokens,
        H,
        C=CHUNK,
        BH=BH,
    )
    return decays, rest


@triton.jit
def _border(marks, slot, H, i_h, SIZE: tl.constexpr, distance, BLOCK: tl.constexpr):
    """⟨S, dS⟩ where two blocks meet: the pairs of tokens that it stands between."""
    p = marks + (slot.to(tl.int64) * H + i_h) * SIZE
    b_e = tl.zeros([BLOCK], tl.float32)
    for at in range(0, SIZE, BLOCK):
        o = at + tl.arange(0, BLOCK)
        b_s = tl.load(p + o, mask=o < SIZE, other=0.0).to(tl.float32)
        b_d = tl.load(p + distance + o, mask=o < SIZE, other=0.0).to(tl.float32)
        b_e += b_s * b_d
    return tl.sum(b_e)


@triton.jit
def _end(ends, which, splits, stride):
    """⟨S, dS⟩ where a sequence begins or ends, of states that were given or are returned."""
    s_e = 0.0
    for i in range(0, splits):
        s_e += tl.load(ends + (which * splits + i) * stride)
    return s_e


@triton.jit(do_not_specialize=["N", "T", "tokens", "H", "slots", "reverse", "splits"])
def gate_gradient_kernel(
    rows, marks, ends, dg, cu_seqlens, N, T, tokens, H, slots, reverse, splits,
    SIZE: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dg of a block of L tokens of one head.

    A log-decay is in every pair that it stands between, so that

        dg_t = ⟨S, dS⟩ at the block's end + Σ_{i ⪰ t in the block} (q_i·dq_i − k_i·dk_i)

    which at the block's first token must be ⟨S, dS⟩ at its beginning.  What rounding leaves between
    the two is taken off where it arose, so that errors do not add up over the block.
    """
    i_h = tl.program_id(0) % H
    begin = tl.program_id(0) // H * L
    o_l = tl.arange(0, L)
    first, last = sequences_in(cu_seqlens, N, T, tokens, begin, begin + L)
    for i_n in range(first, last):
        bos, length, live = sequence(cu_seqlens, i_n, N, T, tokens)
        m_first, m_last, blocks = chunks_in(bos, length, begin, begin + L, L)
        for m in range(m_first, m_last):
            there = tl.minimum(live - m * L, L)
            token = (bos + m * L).to(tl.int64)
            p_rows = rows + i_h.to(tl.int64) * tokens + token + o_l
            size = tokens.to(tl.int64) * H
            b_q = tl.zeros([L], tl.float32)
            b_k = tl.zeros([L], tl.float32)
            for i in range(0, splits):
                b_q += tl.load(p_rows + i * size, mask=o_l < there, other=0.0)
                b_k += tl.load(p_rows + (splits + i) * size, mask=o_l < there, other=0.0)
            b_r = b_q - b_k
            # the share of each token in the errors of the sum
            b_share = tl.where(o_l < there, b_q * b_q + b_k * b_k + _TINY, 0.0)
            b_share /= tl.sum(b_share)
            slot = bos // L + 2 * i_n + m
            distance = slots.to(tl.int64) * H * SIZE
            s_low = 0.0
            s_high = 0.0
            if there > 0:
                # the forward pass ends at the last block's end, or reversed at the first one's
                p_ends = ends + i_n * H + i_h
                if m > 0:
                    s_low = _border(marks, slot, H, i_h, SIZE, distance, BLOCK)
                else:
                    s_low = _end(p_ends, tl.where(reverse != 0, 0, 1), splits, N * H)
                if m < blocks - 1:
                    s_high = _border(marks, slot + 1, H, i_h, SIZE, distance, BLOCK)
                else:
                    s_high = _end(p_ends, tl.where(reverse != 0, 1, 0), splits, N * H)
            s_sum = tl.sum(b_r)
            if reverse != 0:
                b_dg = s_low + tl.cumsum(b_r, 0)
                b_dg += (s_high - s_low - s_sum) * tl.cumsum(b_share, 0)
            else:
                b_dg = s_high + tl.cumsum(b_r, 0, reverse=True)
                b_dg += (s_low - s_high - s_sum) * tl.cumsum(b_share, 0, reverse=True)
            b_dg = tl.where(o_l < there, b_dg, 0.0)
            p_dg = dg + (token + o_l) * H + i_h
            tl.store(p_dg, b_dg.to(dg.dtype.element_ty), mask=o_l < length - m * L)


def mark_slots(sequences: Sequences) -> int:
    """How many states at the borders of blocks there may be, whatever the boundaries."""
    return sequences.B * sequences.T // (MARK * CHUNK) + 2 * (sequences.N + 1)


def gate_gradient(
    sequences: Sequences, rows: Tensor, marks: Tensor, ends: Tensor, g: Tensor, reverse: bool
) -> Tensor:
    """dg of g, from the passes' rows [2, splits, H, tokens], marks [2, slots, H, size]
    and ends [2, splits, N, H]."""
    dg = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    H, tokens, L = g.shape[2], sequences.B * sequences.T, MARK * CHUNK
    gate_gradient_kernel[(cdiv(tokens, L) * H,)](
        rows,
        marks,
        ends,
        dg,
        sequences.cu_seqlens,
        sequences.N,
        sequences.T,
        tokens,
        H,
        marks.shape[1],
        int(reverse),
        rows.shape[1],
        SIZE=marks.shape[3],
        L=L,
        BLOCK=1024,
    )
    return dg
