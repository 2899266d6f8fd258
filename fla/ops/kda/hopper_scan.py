"""The scans over chunks on Hopper, warp-specialised: a state waits for products, not for memory.

One warp copies what the next chunks bring; partitions of four warps carry 64 value channels each.
A state stands as in ``chunk_inter``: transposed, [V, K], in registers, from where it enters
products.  What meets it on its way, v and do, and o, w and u, is turned between there and shared
memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fla.ops.common.hopper import CONSUMER_REGISTERS, arrive, descriptor, tile_of, wait_before
from fla.ops.common.kernels import multiprocessors
from fla.ops.common.launch import launch
from fla.ops.kda.hopper_blocks import (
    BV,
    OPERAND,
    PAIRS,
    TOKENS,
    C,
    new_memory,
    segment_of,
    state_at,
    state_layout,
)
from fla.ops.kda.slots import rows_and_slots

Strides = tuple[int, int, int, int]
NOWHERE = (0, 0, 0, 0)
# Bytes that a program may have, beside its barriers
SHARED_MEMORY = (227 << 10) - 256
COPY_REGISTERS = gl.constexpr(32)
IDLE_REGISTERS = gl.constexpr(24)
# [C, BV] as it lies in memory
_FLAT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def times(a, tile, acc, FRESH: gl.constexpr = False):
    """Start acc + a @ tile, or a @ tile, with a in registers."""
    return warpgroup_mma(a, tile, acc, use_acc=not FRESH, is_async=True)


@gluon.jit
def across(i_w: gl.constexpr, memory, n, there, MASKED: gl.constexpr):
    """The partition's channels of v or do, [BV, C]; behind a sequence may stand anything."""
    tile = tile_of(memory.x, n).slice(i_w * BV, BV, 1)
    b_x = tile.permute((1, 0)).load(PAIRS)
    if MASKED:
        b_x = gl.where((gl.arange(0, C, TOKENS) < there)[None, :], b_x, 0.0)
    return b_x


@gluon.jit
def put(i_w: gl.constexpr, memory, states_desc, rows_desc, place, o_v, b_h, b_r):
    """Write the state that meets a chunk, and w or u of it."""
    BK: gl.constexpr = memory.k_in.shape[4]
    states = memory.states.index(i_w)
    rows = memory.rows.index(i_w)
    states.reshape([BV, BK]).store(b_h)
    rows.reshape([C, BV]).permute((1, 0)).store(b_r)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(states_desc, [place, o_v, 0, 0], states)
    tma.async_copy_shared_to_global(rows_desc, [place, 0, 0, o_v], rows)


@gluon.jit
def write(o, b_o, token, there, i_hv, o_v, HV: gl.constexpr, V: gl.constexpr):
    """Write o [C, BV] of ``there`` tokens, the last ones of a sequence."""
    o_c = gl.arange(0, C, gl.SliceLayout(1, _FLAT))[:, None]
    o_d = o_v + gl.arange(0, BV, gl.SliceLayout(0, _FLAT))[None, :]
    p_o = o + (token.to(gl.int64) * HV + i_hv) * V + (o_c * (HV * V) + o_d)
    gl.store(p_o, b_o, mask=o_c < there)


@gluon.jit
def advance(
    i_w: gl.constexpr, memory, o_desc, states_desc, rows_desc, o, b_s, at, o_v,
    HV: gl.constexpr, V: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """``advance`` of ``chunk_inter``: the state after the last chunk.

    A chunk's output is made while the state waits: for the system, and for its own last product.
    """
    OUT: gl.constexpr = o_desc is not None
    DTYPE: gl.constexpr = memory.k_in.dtype
    LAYOUT: gl.constexpr = state_layout(memory.k_in.shape[4])
    first = memory.group(0, memory.k_in)
    second = memory.group(1, memory.solver)
    third = memory.group(2, memory.k_out)
    b_0 = gl.zeros([BV, C], gl.float32, PAIRS)
    for n in range(at.steps):
        stage = n % memory.x.shape[0]
        there = at.left - n * C
        b_h = b_s.to(DTYPE)
        b_a = gl.convert_layout(b_h, OPERAND)
        first.wait(n)
        b_m = times(b_a, first.tile(n).permute((1, 0)), b_0, True)
        if OUT:
            b_o = times(b_a, tile_of(memory.q_in, n).permute((1, 0)), b_0, True)
        second.wait(n)
        b_x = across(i_w, memory, n, there, PACKED).to(gl.float32)
        b_beta = memory.betas.index(stage).load(PAIRS)
        b_m = warpgroup_mma_wait(1 if OUT else 0, deps=(b_m,))
        b_m = b_x - b_m
        b_w = gl.convert_layout((b_m * b_beta).to(DTYPE), OPERAND)
        b_w = times(b_w, second.tile(n).permute((1, 0)), b_m)
        third.wait(n)
        b_s = b_s * memory.decay.index(stage).load(LAYOUT)
        if OUT:
            b_w, b_o, b_a = warpgroup_mma_wait(0, deps=(b_w, b_o, b_a))
        else:
            b_w, b_a = warpgroup_mma_wait(0, deps=(b_w, b_a))
        b_v = gl.convert_layout((b_w * b_beta).to(DTYPE), OPERAND)
        b_s = times(b_v, third.tile(n), b_s)
        if OUT:
            b_o = times(b_v, tile_of(memory.queries, n).permute((1, 0)), b_o)
        tma.store_wait(0)  # of the last chunk
        gl.thread_barrier()
        arrive(first.empty, n)
        arrive(second.empty, n)
        if OUT:
            rows = memory.rows.index(i_w)
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            b_o, b_v = warpgroup_mma_wait(0, deps=(b_o, b_v))
            rows.reshape([C, BV]).permute((1, 0)).store(b_o.to(DTYPE))
            fence_async_shared()
        else:
            if rows_desc is not None:
                place = at.row + n * HV
                put(i_w, memory, states_desc, rows_desc, place, o_v, b_h, b_w.to(DTYPE))
            b_s, b_v = warpgroup_mma_wait(0, deps=(b_s, b_v))
        gl.thread_barrier()
        arrive(third.empty, n)
        if OUT:
            token = at.token + n * C
            if there >= C or not PACKED:
                tma.async_copy_shared_to_global(o_desc, [at.i_b, token, at.i_hv, o_v], rows)
            else:
                write(o, rows.reshape([C, BV]).load(_FLAT), token, there, at.i_hv, o_v, HV, V)
    tma.store_wait(0)
    return b_s


@gluon.jit
def retreat(
    i_w: gl.constexpr, memory, states_desc, rows_desc, b_s, at, size, o_v,
    HV: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """``retreat`` of ``chunk_inter``: the gradient of the state before the first chunk.

    What it writes stands ``size`` rows behind what ``advance`` does.
    """
    DTYPE: gl.constexpr = memory.k_in.dtype
    LAYOUT: gl.constexpr = state_layout(memory.k_in.shape[4])
    first = memory.group(0, memory.k_out)
    second = memory.group(1, memory.solver)
    third = memory.group(2, memory.k_in)
    b_0 = gl.zeros([BV, C], gl.float32, PAIRS)
    for n in range(at.steps):
        stage = n % memory.x.shape[0]
        i_c = at.steps - 1 - n
        b_h = b_s.to(DTYPE)
        b_a = gl.convert_layout(b_h, OPERAND)
        first.wait(n)
        b_x = gl.convert_layout(across(i_w, memory, n, at.left - i_c * C, PACKED), OPERAND)
        b_p = times(b_x, tile_of(memory.queries, n), b_0, True)
        b_p = times(b_a, first.tile(n).permute((1, 0)), b_p)
        second.wait(n)
        # Nothing to wait for; else the assembler would wait for both products here
        b_s = warpgroup_mma_wait(2, deps=(b_s,))
        b_s = b_s * memory.decay.index(stage).load(LAYOUT)
        b_s = times(b_x, tile_of(memory.q_in, n), b_s)
        b_beta = memory.betas.index(stage).load(PAIRS)
        b_p, b_a = warpgroup_mma_wait(1, deps=(b_p, b_a))
        b_u = gl.convert_layout((b_p * b_beta).to(DTYPE), OPERAND)
        b_u = times(b_u, second.tile(n), b_p)
        tma.store_wait(0)  # of the last chunk
        gl.thread_barrier()
        arrive(first.empty, n)
        b_u, b_s, b_x = warpgroup_mma_wait(0, deps=(b_u, b_s, b_x))
        b_v = gl.convert_layout((b_u * -b_beta).to(DTYPE), OPERAND)
        third.wait(n)
        b_s = times(b_v, third.tile(n), b_s)
        if rows_desc is not None:
            place = size + at.row + i_c * HV
            put(i_w, memory, states_desc, rows_desc, place, o_v, b_h, b_u.to(DTYPE))
        b_s, b_v = warpgroup_mma_wait(0, deps=(b_s, b_v))
        gl.thread_barrier()
        arrive(second.empty, n)
        arrive(third.empty, n)
    tma.store_wait(0)
    return b_s


@gluon.jit
def enter(state, STRIDES: gl.constexpr, at, o_v, BK: gl.constexpr):
    """The state [BV, BK] that a segment starts from."""
    b_s = gl.zeros([BV, BK], gl.float32, state_layout(BK))
    if state is not None:
        p = state + state_at(STRIDES, at.unit, at.i_hv, o_v, state_layout(BK), BK)
        b_s = gl.load(p, mask=at.real).to(gl.float32)
    return b_s


@gluon.jit
def leave(state, b_s, STRIDES: gl.constexpr, row, ends, at, o_v):
    """Write the state that a segment ends with, if it is to be."""
    if state is not None:
        BK: gl.constexpr = b_s.shape[1]
        p = state + state_at(STRIDES, row, at.i_hv, o_v, state_layout(BK), BK)
        gl.store(p, b_s.to(state.dtype.element_ty), mask=ends)


@gluon.jit
def carry(
    i_w: gl.constexpr, memory, o_desc, states_desc, rows_desc, o, state, final, dstate, dfinal,
    at, back, span, size, i_v, HV: gl.constexpr, V: gl.constexpr, STRIDES: gl.constexpr,
    FINAL: gl.constexpr, DSTRIDES: gl.constexpr, DFINAL: gl.constexpr, WARPGROUPS: gl.constexpr,
    PACKED: gl.constexpr, BOTH: gl.constexpr, SUMMARISE: gl.constexpr,
):  # fmt: skip
    """Carry the state, or its gradient, of BV value channels through a segment.

    The second partition may have nothing to do.
    """
    if i_w < WARPGROUPS:
        BK: gl.constexpr = memory.k_in.shape[4]
        o_v = i_v + i_w * BV
        row = at.sequence
        starts = at.real & (at.before == 0)
        ends = at.real & (at.left <= span) & ((at.left > 0) | (at.before == 0))
        if SUMMARISE:
            row = at.unit
            starts = at.real & ((at.left > 0) | (at.before == 0))
            ends = starts
        if BOTH:
            if back:
                b_s = enter(dstate, DSTRIDES, at, o_v, BK)
                b_s = retreat(i_w, memory, states_desc, rows_desc, b_s, at, size, o_v, HV, PACKED)
                leave(dfinal, b_s, DFINAL, row, starts, at, o_v)
        if back == 0:
            b_s = enter(state, STRIDES, at, o_v, BK)
            b_s = advance(
                i_w, memory, o_desc, states_desc, rows_desc, o, b_s, at, o_v, HV, V, PACKED
            )
            leave(final, b_s, FINAL, row, ends, at, o_v)
        if o_desc is not None and PACKED:
            if at.real == 0:  # tokens behind the sequences
                b_0 = gl.zeros([C, BV], o.dtype.element_ty, _FLAT)
                for n in range(gl.cdiv(gl.minimum(at.left, span), C)):
                    write(o, b_0, at.token + n * C, at.left - n * C, at.i_hv, o_v, HV, V)


@gluon.jit
def vectors_of(decay, betas, place, wanted, BK: gl.constexpr):
    """A chunk's decay [BK] and betas [C], by one warp."""
    o_k = gl.arange(0, BK, gl.BlockedLayout([BK // 32], [32], [1], [0]))
    o_c = gl.arange(0, C, gl.BlockedLayout([C // 32], [32], [1], [0]))
    b_decay = gl.load(decay + place.to(gl.int64) * BK + o_k, mask=wanted, other=0.0)
    b_betas = gl.load(betas + place.to(gl.int64) * C + o_c, mask=wanted, other=0.0)
    return b_decay, b_betas


@gluon.jit
def lay(ring, n, tiles, vector):
    """Lay a vector beside a tile that is to be filled, once the stage is empty."""
    wait_before(ring.empty, n)
    tiles.index(n % tiles.shape[0]).reshape([tiles.shape[2]]).store(vector)
    gl.thread_barrier()


@gluon.jit
def produce(
    memory, wide_desc, pairs_desc, v_desc, do_desc, decay, betas, at, back, size, i_v,
    HV: gl.constexpr, BOTH: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Copy what each chunk brings, in the order of the scan, groups as they are needed.

    ``wide_desc`` has rows of q_in, k_in and k_out, ``pairs_desc`` those of M and Y, ``size`` each.
    """
    BK: gl.constexpr = memory.k_in.shape[4]
    WIDE: gl.constexpr = wide_desc.block_type.nbytes
    PAIRS: gl.constexpr = pairs_desc.block_type.nbytes
    X: gl.constexpr = v_desc.block_type.nbytes
    second = memory.group(1, memory.solver)
    if BOTH:
        if back:
            first = memory.group(0, memory.k_out)
            third = memory.group(2, memory.k_in)
            last = at.row + (at.steps - 1) * HV
            b_decay, b_betas = vectors_of(decay, betas, last, at.steps > 0, BK)
            for n in range(at.steps):
                place = last - n * HV
                token = at.token + (at.steps - 1 - n) * C
                first.fill(wide_desc, [2 * size + place, 0, 0, 0], n, PAIRS + X)
                first.join(pairs_desc, [place, 0, 0, 0], n, memory.queries)
                first.join(do_desc, [at.i_b, token, at.i_hv, i_v], n, memory.x)
                lay(second, n, memory.decay, b_decay)
                lay(second, n, memory.betas, b_betas)
                second.fill(pairs_desc, [size + place, 0, 0, 0], n, WIDE)
                second.join(wide_desc, [place, 0, 0, 0], n, memory.q_in)
                third.fill(wide_desc, [size + place, 0, 0, 0], n)
                b_decay, b_betas = vectors_of(decay, betas, place - HV, n + 1 < at.steps, BK)
    if back == 0:
        first = memory.group(0, memory.k_in)
        third = memory.group(2, memory.k_out)
        b_decay, b_betas = vectors_of(decay, betas, at.row, at.steps > 0, BK)
        for n in range(at.steps):
            place = at.row + n * HV
            first.fill(wide_desc, [size + place, 0, 0, 0], n, WIDE if OUT else 0)
            if OUT:
                first.join(wide_desc, [place, 0, 0, 0], n, memory.q_in)
            lay(second, n, memory.betas, b_betas)
            second.fill(pairs_desc, [size + place, 0, 0, 0], n, X)
            second.join(v_desc, [at.i_b, at.token + n * C, at.i_hv, i_v], n, memory.x)
            lay(third, n, memory.decay, b_decay)
            third.fill(wide_desc, [2 * size + place, 0, 0, 0], n, PAIRS if OUT else 0)
            if OUT:
                third.join(pairs_desc, [place, 0, 0, 0], n, memory.queries)
            b_decay, b_betas = vectors_of(decay, betas, place + HV, n + 1 < at.steps, BK)


@gluon.jit(do_not_specialize=["span", "T", "rows", "size"])
def hopper_scan_kernel(
    decay, betas, cu_seqlens, o, state, final, dstate, dfinal,
    wide_desc, pairs_desc, v_desc, do_desc, o_desc, states_desc, rows_desc, span, T, rows, size,
    HV: gl.constexpr, BK: gl.constexpr, V: gl.constexpr, COLUMNS: gl.constexpr,
    WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, STRIDES: gl.constexpr, FINAL: gl.constexpr,
    DSTRIDES: gl.constexpr, DFINAL: gl.constexpr,
):  # fmt: skip
    """What ``advance_kernel`` does, or, given do, ``scans_kernel``.

    A program owns the state, or its gradient, of one head in a segment of ``span`` tokens, BV of
    COLUMNS columns for each of WARPGROUPS partitions.  Values behind the last channel are zeros.
    """
    BOTH: gl.constexpr = do_desc is not None
    OUT: gl.constexpr = o_desc is not None
    PACKED: gl.constexpr = cu_seqlens is not None
    SUMMARISE: gl.constexpr = COLUMNS > V
    BLOCKS: gl.constexpr = COLUMNS // (BV * WARPGROUPS)
    pid = gl.program_id(0)
    back = pid * 0
    if BOTH:
        half = gl.num_programs(0) // 2
        back = (pid >= half).to(gl.int32)
        pid -= back * half
    i_v = pid % BLOCKS * (BV * WARPGROUPS)
    at = segment_of(cu_seqlens, pid // BLOCKS // HV, pid // BLOCKS % HV, rows, T, span, HV)
    written = o_desc if OUT else rows_desc
    memory = new_memory(wide_desc, pairs_desc, v_desc, written, states_desc, BK, STAGES, WARPGROUPS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                carry,
                (
                    0, memory, o_desc, states_desc, rows_desc, o, state, final, dstate, dfinal,
                    at, back, span, size, i_v, HV, V, STRIDES, FINAL, DSTRIDES, DFINAL,
                    WARPGROUPS, PACKED, BOTH, SUMMARISE,
                ),
            ),
            (
                carry,
                (
                    1, memory, o_desc, states_desc, rows_desc, o, state, final, dstate, dfinal,
                    at, back, span, size, i_v, HV, V, STRIDES, FINAL, DSTRIDES, DFINAL,
                    WARPGROUPS, PACKED, BOTH, SUMMARISE,
                ),
            ),
            (
                produce,
                (
                    memory, wide_desc, pairs_desc, v_desc, do_desc, decay, betas, at, back, size,
                    i_v, HV, BOTH, OUT,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS if WARPGROUPS == 2 else IDLE_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def _stages(BK: int, warpgroups: int, wrote: bool) -> int:
    """Chunks on their way, as many as shared memory holds."""
    tile = 2 * C.value
    stage = tile * (3 * BK + 2 * C.value + BV.value * warpgroups) + 4 * (BK + C.value)
    out = tile * (BV.value + (BK if wrote else 0)) * warpgroups
    return min(3, (SHARED_MEMORY - out) // stage)


def run_scan(
    call: Any, span: int, columns: int, state: Tensor | None, strides: Strides,
    final: Tensor | None, final_strides: Strides, *, o: Tensor | None = None,
    do: Tensor | None = None, dstate: Tensor | None = None, dstrides: Strides = NOWHERE,
    dfinal: Tensor | None = None, dfinal_strides: Strides = NOWHERE, keep: bool = False,
) -> None:  # fmt: skip
    """Launch ``hopper_scan_kernel``: forward, or, given do, both scans.

    They write o, or ``keep`` states, w and u in the call's workspaces, and the last states.
    """
    size, BK, V = call.slots * call.HV, call.BK, call.V
    tokens, channels = C.value, BV.value
    if columns > V:  # zeros, and behind them what becomes the map that a segment applies to a state
        state = dstate = call.v.new_zeros(columns, BK, dtype=torch.float32)
        state.diagonal(-V).fill_(1)
        strides = dstrides = 0, 0, BK, 1
    _, units = rows_and_slots(call.B, call.T, call.cu_seqlens, span)
    programs = (2 if do is not None else 1) * units * call.HV * (columns // channels)
    # Two partitions read what is copied once; one is faster where two leave multiprocessors idle
    warpgroups = 1
    if columns % (2 * channels) == 0 and programs > multiprocessors(call.v.device):
        warpgroups = 2
    written = None, None
    if keep:
        written = (
            descriptor(call.both_states.view(2 * size, V, 1, BK), channels, BK),
            descriptor(call.both_values.view(2 * size, tokens, 1, V), tokens, channels),
        )
    launch(
        hopper_scan_kernel,
        programs // warpgroups,
        (call.decay, call.betas, call.cu_seqlens, o, state, final, dstate, dfinal),
        (
            descriptor(call.operands.view(3 * size, tokens, 1, BK), tokens, BK),
            descriptor(call.pairs.view(2 * size, tokens, 1, tokens), tokens, tokens),
            descriptor(call.v, tokens, channels * warpgroups),
            None if do is None else descriptor(do, tokens, channels * warpgroups),
            None if o is None else descriptor(o, tokens, channels),
            *written, span, call.T, call.rows, size,
        ),
        {
            "HV": call.HV, "BK": BK, "V": V, "COLUMNS": columns, "WARPGROUPS": warpgroups,
            "STAGES": _stages(BK, warpgroups, keep), "STRIDES": strides, "FINAL": final_strides,
            "DSTRIDES": dstrides, "DFINAL": dfinal_strides, "num_warps": 4,
        },
    )  # fmt: skip
