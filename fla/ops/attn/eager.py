"""The softmax engine in plain PyTorch, for any device and any precision, in linear memory.

A block of query rows meets all the keys that it can see, then the next block:

    s_ij = scale q_i·k_j + (G_i − G_j)    lse_i = log(Σ_j exp s_ij + exp sink)
    p_ij = exp(s_ij − lse_i)              o_i = Σ_j p_ij v_j

Inside, logarithms are to the base 2, because exp2 is several times faster than exp.  Without a
gate, and where rows see all keys before them, PyTorch's own attention for the CPU does the work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fla.ops.attn.eager_blocks import LOG2E, Walk, lowest
from fla.ops.attn.eager_decoding import decode
from fla.ops.common.boundary import absent
from fla.ops.common.device import accumulator, on_host
from fla.ops.common.finite import finite

__all__ = ["backward", "decode", "forward"]

_LN2 = math.log(2)


def forward(q, k, v, g, sink_bias, cu_seqlens, options):
    """Return o [B, T, HQ, V] and lse [B, HQ, T], finite where a row sees nothing too."""
    o, lse = _forward(q, k, v, g, sink_bias, cu_seqlens, options)
    if _may_have_spread(cu_seqlens, o):
        each = [_forward(*x, sink_bias, None, options) for x in _parts(cu_seqlens, q, k, v, g)]
        all_o, all_lse = zip(*each, strict=True)
        return torch.cat(all_o, 1), torch.cat(all_lse, 2)
    return o, lse


def _forward(q, k, v, g, sink_bias, cu_seqlens, options):
    spoilt = None
    if cu_seqlens is None and on_host(q) and not finite(v):
        spoilt, v = ~v.isfinite(), v.nan_to_num(0, 0, 0)
    served = _torch_serves(q, v, g, cu_seqlens, options)
    if served:
        o, lse = _torch_forward(q, k, v, options)
        # where all logits of a row are NaN it may leave zeros
        served = not (lse == 0).any() or finite(q, k)
    if not served:
        o, lse = _blocked_forward(Walk(q, k, v, g, cu_seqlens, options))
    if sink_bias is not None:
        sink = sink_bias.to(lse.dtype)[:, None]
        o = o * (lse - sink).sigmoid_().transpose(1, 2)[..., None]
        lse = torch.logaddexp(lse, sink)
    o = o.to(q.dtype).contiguous()
    if spoilt is not None:
        _see(o, spoilt, options.window_size)
    return o, lse


def backward(do, q, k, v, g, sink_bias, cu_seqlens, o, lse, options):
    """Return the gradients of q, k, v, g and the sink.

    With D_i = do_i·o_i: dS_ij = p_ij (do_i·v_j − D_i), and the sink's share of the row is −p D_i.
    """
    gradients = _backward(do, q, k, v, g, sink_bias, cu_seqlens, o, lse, options)
    if _may_have_spread(cu_seqlens, *gradients[:4]):
        parts = _parts(cu_seqlens, do, q, k, v, g, o, lse.mT)
        each = [_backward(*x, sink_bias, None, o, lse.mT, options) for *x, o, lse in parts]
        *of_tokens, dsink = zip(*each, strict=True)
        dq, dk, dv, dg = (torch.cat(x, 1 if x[0].dim() > 1 else 0) for x in of_tokens)
        return dq, dk, dv, dg, torch.stack(dsink).sum(0)
    return gradients


def _backward(do, q, k, v, g, sink_bias, cu_seqlens, o, lse, options):
    dg, dsink = absent(q), absent(q)
    if _torch_serves(q, v, g, cu_seqlens, options):
        dq, dk, dv, delta = _torch_backward(do, q, k, v, o, lse, options)
    else:
        walk = Walk(q, k, v, g, cu_seqlens, options)
        dq, dk, dv, dgate, delta = _blocked_backward(walk, do, o, lse, sink_bias is not None)
        if g is not None:
            dg = walk.merge(walk.seen.zero_elsewhere(dgate)).to(g.dtype).contiguous()
    if sink_bias is not None:
        share = (sink_bias.to(lse.dtype)[:, None] - lse).exp_()
        dsink = -(share * delta).sum((0, 2)).to(sink_bias.dtype)
    dq, dk, dv = (x.to(q.dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, dg, dsink


def _may_have_spread(cu_seqlens: Tensor | None, *results: Tensor) -> bool:
    """Whether 0 · NaN may have taken NaN from one sequence to another, in a block that has both."""
    return cu_seqlens is not None and on_host(cu_seqlens) and not finite(*results)


def _parts(cu_seqlens: Tensor, *tensors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """The tokens of each sequence that has any, of tensors [1, T, ...]."""
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        if start < stop:
            yield [None if x is None else x[:, start:stop] for x in tensors]


def _see(o: Tensor, spoilt: Tensor, window: int | None) -> None:
    """NaN into o [B, T, HQ, V] where a row sees one of the values ``spoilt`` [B, T, H, V]."""
    seen = spoilt.cumsum(1)
    if window is not None and window < o.shape[1]:
        seen[:, window:] -= seen[:, :-window].clone()
    o.unflatten(2, (seen.shape[2], -1)).masked_fill_(seen[:, :, :, None] > 0, torch.nan)


def _torch_serves(q, v, g, cu_seqlens, options) -> bool:
    """Whether PyTorch's own attention for the CPU computes this; it masks before it scales."""
    T, window = q.shape[1], options.window_size
    return (
        on_host(q)
        and q.shape[-1] == v.shape[-1]
        and g is None
        and cu_seqlens is None
        and options.scale > 0
        and (window is None or window >= T)
    )


def _torch_forward(q, k, v, options):
    q, k, v = (_for_torch(x, accumulator(q.dtype)) for x in (q, k, v))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o, lse = attention(q, k, v, 0.0, True, scale=options.scale)
    return o.transpose(1, 2), lse.contiguous()


def _torch_backward(do, q, k, v, o, lse, options):
    do, q, k, v, o = (_for_torch(x, lse.dtype) for x in (do, q, k, v, o))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients = attention(do, q, k, v, o, lse, 0.0, True, scale=options.scale)
    return *(x.transpose(1, 2) for x in gradients), (do * o).sum(-1)


def _for_torch(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads before time, as a view where it can be one: only the last stride must be 1.

    In 16 bits PyTorch's kernel is no faster forward, and backward it loses accuracy.
    """
    x = x.to(dtype)
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _blocked_forward(walk: Walk) -> tuple[Tensor, Tensor]:
    """o [B, T, HQ, V] and lse [B, HQ, T], without the sink."""
    o = walk.q.new_empty(*walk.q.shape[:3], walk.v.shape[-1])
    lse = walk.q.new_empty(walk.q.shape[:3])
    for block in walk.blocks():
        logits = walk.logits(block)  # [lanes, G * rows, keys]
        most = logits.amax(-1, keepdim=True).clamp_(min=lowest(logits))
        weights = logits.sub_(most).exp2_()
        total = weights.sum(-1, keepdim=True)
        total = total.masked_fill_(total == 0, 1)
        b_o = torch.bmm(weights, walk.v[block.lanes, block.keys]).div_(total)
        block.of_rows(o).copy_(block.split(b_o))
        block.of_rows(lse).copy_(block.split((most + total.log2_()).squeeze(-1)))
    B, T, HQ = walk.shape
    return walk.merge(o), lse.mul_(_LN2).view(B, HQ, T)


def _blocked_backward(walk: Walk, do, o, lse, sinks: bool):
    """dq, dk, dv, the gate's gradient [lanes, G, T] in fp64 and D [B, HQ, T].

    A token's gate is in every pair that it stands between, dg_t = Σ_{j < t ≤ i} dS_ij: over a block
    the running sum of its columns' sums less its rows' sums.  It ends at zero with the block, so
    that no sum runs further.
    """
    do = walk.heads(do, walk.dtype)
    delta = (do * walk.heads(o, walk.dtype)).sum(-1)  # [lanes, G, T]
    shape, lse = lse.shape, (lse * LOG2E).view_as(delta)
    dq, dk, dv = torch.empty_like(walk.q), torch.zeros_like(walk.k), torch.zeros_like(walk.v)
    dgate = None if walk.gate is None else torch.zeros_like(lse, dtype=torch.float64)
    # Beside a sink far above all of them keys are nothing, but not beside one another.
    for block in walk.blocks(None if sinks else lse):
        b_q, b_do, b_delta, b_lse = (
            block.of_rows(x).flatten(1, 2) for x in (walk.q, do, delta, lse)
        )
        b_k, b_v = walk.k[block.lanes, block.keys], walk.v[block.lanes, block.keys]
        weights = walk.logits(block).sub_(b_lse[..., None]).exp2_()  # [lanes, G * rows, keys]
        b_dk, b_dv = dk[block.lanes, block.keys], dv[block.lanes, block.keys]
        torch.baddbmm(b_dv, weights.mT, b_do, out=b_dv)
        dlogits = torch.bmm(b_do, b_v.mT, out=walk.scratch("dlogits", weights.shape))
        dlogits.sub_(b_delta[..., None]).mul_(weights)
        block.of_rows(dq).copy_(block.split(torch.bmm(dlogits, b_k)))
        torch.baddbmm(b_dk, dlogits.mT, b_q, alpha=_LN2, out=b_dk)
        if dgate is not None:
            dlogits = block.split(dlogits)  # [lanes, G, rows, keys]
            # no gate is in them, and beside a sink they may be all that there is
            own = dlogits[..., block.start - block.first :].diagonal(dim1=-2, dim2=-1)
            own.zero_()
            sums = dlogits.sum(-2).double()
            sums[..., block.start - block.first :] -= dlogits.sum(-1)
            dgate[block.lanes, :, block.first + 1 : block.stop] += sums.cumsum(-1)[..., :-1]
    dq, dk, dv = walk.merge(dq.mul_(walk.scale)), walk.merge(dk[:, None]), walk.merge(dv[:, None])
    return dq, dk, dv, dgate, delta.view(shape)
