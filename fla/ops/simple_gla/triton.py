"""The linear engine in Triton, for every GPU from sm_80."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fla.ops.common.boundary import absent
from fla.ops.common.kernels import dense
from fla.ops.common.sequences import Sequences
from fla.ops.simple_gla import attention_map as maps
from fla.ops.simple_gla import eager
from fla.ops.simple_gla.blocks import Call, new_sums, sums_of
from fla.ops.simple_gla.gate import gate_gradient
from fla.ops.simple_gla.normalizer import normalizer_gradient
from fla.ops.simple_gla.segments import summarise
from fla.ops.simple_gla.walk import LINES, walk


def forward(
    q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, options, walk=walk, at_once=2
):
    """Return o [B, T, H, V], the final state and z, the normaliser [B, T, H], and a gate's sums.

    Of the ``walk``'s programs ``at_once`` run side by side on a multiprocessor.
    """
    if not q.numel() or not v.numel():  # nothing to launch
        results = eager.forward(q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, options)
        return *results[:4], *new_sums(q, g)
    q, k, v, g_gamma, initial_state, initial_z, cu_seqlens = dense(
        q, k, v, g_gamma, initial_state, initial_z, cu_seqlens
    )
    call = Call(q, v, cu_seqlens, options)
    sums, rests = sums_of(call.sequences, q, g, options.reverse)
    decays = sums, rests, g_gamma
    starts = initial_state, initial_z
    final = final_z = None
    if options.output_final_state:
        sizes = (call.V, call.K) if options.state_v_first else (call.K, call.V)
        final = q.new_empty(call.N, call.H, *sizes, dtype=torch.float32)
        if options.normalize:
            final_z = q.new_empty(call.N, 1, call.H, call.K, dtype=torch.float32)
    segment = call.segment(call.choose(LINES, call.K), call.K, call.V, at_once, walks=1)
    carry = None
    if segment:
        operands = k, v, k, v, None, None
        carry = summarise(
            call, segment, operands, decays, (*starts, None, None), cu_seqlens, 1.0, options
        )
    o, norm, _ = walk(
        call, q, k, v, v.dtype, starts=starts, carry=carry, ends=(final, final_z), decays=decays,
        cu_seqlens=cu_seqlens, scale=options.scale, segment=segment, v_first=options.state_v_first,
        new_norm=options.normalize,
    )  # fmt: skip
    return o, final, final_z, norm, sums, rests


def backward(
    do, dstate, dz, q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, o, norm, sums, rests,
    options, walk=walk, at_once=2,
):  # fmt: skip
    """Return the gradients of q, k, v, g, the initial state and the initial z."""
    if not q.numel() or not v.numel():
        return eager.backward(
            do, dstate, dz, q, k, v, g, g_gamma, initial_state, initial_z, cu_seqlens, o, norm,
            sums, rests, options,
        )  # fmt: skip
    do, dstate, dz, q, k, v, g_gamma, initial_state, initial_z, cu_seqlens = dense(
        do, dstate, dz, q, k, v, g_gamma, initial_state, initial_z, cu_seqlens
    )
    call = Call(q, v, cu_seqlens, options)
    sums, rests = (None if x is None or not x.numel() else x for x in (sums, rests))
    if sums is None:  # no gate, or the forward pass was another implementation's
        sums, rests = sums_of(call.sequences, q, g, options.reverse)
    decays = sums, rests, g_gamma
    norm, dnorm = (norm, normalizer_gradient(do, o)) if options.normalize else (None, None)
    starts, dstarts = (initial_state, initial_z), (dstate, dz)
    # the gate's gradient begins with what comes through the initial state, in fp32
    wide = None if g is None else torch.float32
    ends = tuple(None if x is None else torch.empty_like(x, dtype=wide) for x in starts)
    scale = options.scale or 1e-30  # gradients of states are divided by it on their way
    segment = call.segment(call.choose(LINES, call.V), call.V, call.K, at_once, walks=3)
    carry = dcarry = None
    if segment:
        operands = k, v, q, do, norm, dnorm
        carry, dcarry = summarise(
            call, segment, operands, decays, (*starts, *dstarts), cu_seqlens, scale, options, 2
        )
    run = functools.partial(
        walk, call, out_dtype=q.dtype, decays=decays, cu_seqlens=cu_seqlens, scale=scale,
        segment=segment, v_first=options.state_v_first, norm=norm,
    )  # fmt: skip
    dq, _, q_rows = run(
        x=do, y=v, z=k, starts=starts, carry=carry, ends=(None, None), dnorm=dnorm, turned=True,
        beside=None if g is None else q,
    )  # fmt: skip
    dk, _, k_rows = run(
        x=v, y=do, z=q, starts=dstarts, carry=dcarry, ends=ends, dnorm=dnorm, turned=True,
        gradient=True, beside=None if g is None else k,
    )  # fmt: skip
    dv, _, _ = run(
        x=k, y=q, z=do, starts=(dstate, None), carry=dcarry, ends=(None, None), gradient=True
    )
    dg = None
    if g is not None:
        dg = gate_gradient(call, g, q_rows, k_rows, initial_state, ends[0], cu_seqlens)
    ends = tuple(
        None if x is None else end.to(x.dtype) for x, end in zip(starts, ends, strict=True)
    )
    return tuple(absent(q) if x is None else x for x in (dq, dk, dv, dg, *ends))


def attention_map(q: Tensor, k: Tensor, g: Tensor | None, scale: float) -> Tensor:
    """A_ij = scale q_i·k_j exp(G_i − G_j) for j ≤ i, [B, H, T, T]."""
    sums, rests = sums_of(Sequences.of(q, None), q, g, False)
    return maps.attention_map(q.contiguous(), k.contiguous(), sums, rests, scale)
