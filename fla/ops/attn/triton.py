"""The softmax engine in Triton, for every GPU from sm_80."""

from __future__ import annotations

import torch
from torch import Tensor

from fla.ops.attn.backward import run_backward
from fla.ops.attn.blocks import Call, gates, rising
from fla.ops.attn.forward import run_forward
from fla.ops.attn.split_decoding import run_decoding
from fla.ops.common.boundary import absent
from fla.ops.common.kernels import dense

# Values of 32 bits beyond this size come in parts: a program cannot hold more.
_PART = 256


def forward(q, k, v, g, sink_bias, cu_seqlens, options):
    """Return o [B, T, HQ, V] and lse [B, HQ, T], the least number where a row sees nothing."""
    if _too_wide(v):
        parts = [forward(q, k, x, g, sink_bias, cu_seqlens, options) for x in v.split(_PART, -1)]
        return torch.cat([o for o, _ in parts], -1), parts[0][1]
    q, scale = rising(q, options.scale)
    q, k, v, g, sink_bias, cu_seqlens = dense(q, k, v, g, sink_bias, cu_seqlens)
    call = Call(q, v, cu_seqlens, scale, options.window_size)
    return run_forward(call, q, k, v, *gates(call, g, k, cu_seqlens), sink_bias, cu_seqlens)


def backward(do, q, k, v, g, sink_bias, cu_seqlens, o, lse, options):
    """Return the gradients of q, k, v, g and the sink."""
    if _too_wide(v):
        parts = [
            backward(b_do, q, k, b_v, g, sink_bias, cu_seqlens, b_o, lse, options)
            for b_do, b_v, b_o in zip(*(x.split(_PART, -1) for x in (do, v, o)), strict=True)
        ]
        # each part of v adds its products to the logits' gradients
        dq, dk, dv, dg, dsink = zip(*parts, strict=True)
        return sum(dq), sum(dk), torch.cat(dv, -1), sum(dg), sum(dsink)
    signed, scale = rising(q, options.scale)
    do, q, k, v, g, sink_bias, cu_seqlens, o = dense(do, signed, k, v, g, sink_bias, cu_seqlens, o)
    call = Call(q, v, cu_seqlens, scale, options.window_size)
    dq, dk, dv, dg, dsink = run_backward(
        call, do, q, k, v, *gates(call, g, k, cu_seqlens), sink_bias, cu_seqlens, o, lse, g
    )
    dq = dq if scale == options.scale else dq.neg_()
    return dq, dk, dv, absent(q) if dg is None else dg, absent(q) if dsink is None else dsink


def decode(q, k, v, g, sink_bias, cu_seqlens, options):
    """Return o [1, N, HQ, V] of one query a sequence."""
    if _too_wide(v):
        parts = [decode(q, k, x, g, sink_bias, cu_seqlens, options) for x in v.split(_PART, -1)]
        return torch.cat(parts, -1)
    q, k, v, g, sink_bias, cu_seqlens = dense(q, k, v, g, sink_bias, cu_seqlens)
    return run_decoding(q, k, v, g, sink_bias, cu_seqlens, options)


def _too_wide(v: Tensor) -> bool:
    return v.element_size() > 2 and v.shape[-1] > _PART
