"""The textbook of softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_parallel_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    window_size: int | None = None,
    causal: bool = True,
    *,
    g: Tensor | None = None,
    sink_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All pairs at once: s_ij = scale q_i·k_j + (G_i − G_j), o_i = Σ_j softmax(s_i)_j v_j.

    q [B, T, HQ, K]; k [B, T, H, K]; v [B, T, H, V]; g [B, T, HQ], G its running sum; sink_bias [HQ]
    one more logit of each row, for a key without a value.  Row i sees the keys j > i − window_size,
    up to its own when causal.

    Returns o [B, T, HQ, V] and without a gradient the largest logit of each row [B, T, HQ], -inf
    where a row sees nothing.
    """
    dtype = q.dtype
    T, groups = q.shape[1], q.shape[2] // max(k.shape[2], 1)
    q, k, v = _heads(q), _heads(k, groups), _heads(v, groups)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = scale * (q @ k.mT)  # [B, HQ, T, T]
    if g is not None:
        s = s + _span(g.transpose(1, 2).to(s.dtype), causal)
    row, column = torch.arange(T, device=q.device)[:, None], torch.arange(T, device=q.device)
    hidden = (column > row) & causal
    if window_size is not None:
        hidden = hidden | (column <= row - window_size)
    o, most = _attend(s.masked_fill(hidden, -torch.inf), v, sink_bias)
    return o.transpose(1, 2).to(dtype), most.transpose(1, 2)


def naive_attn_decoding(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    do_gate_scale: bool = False,
    *,
    window_size: int | None = None,
    sink_bias: Tensor | None = None,
) -> Tensor:
    """One sequence after another, its single query standing at its last key.

    q [1, N, HQ, K]; k [1, ΣT, H, K]; v [1, ΣT, H, V]; g [1, ΣT, HQ].
    """
    if window_size is not None and window_size < 0:
        raise ValueError(f"window_size: expected None or at least 0, got {window_size}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[2] // max(k.shape[2], 1)
    bounds = [0, k.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    o = [q.new_zeros(1, 0, q.shape[2], v.shape[-1])]
    for n in range(len(bounds) - 1):
        start, stop = bounds[n], bounds[n + 1]
        if window_size is not None:
            start = max(start, stop - window_size)
        k_n, v_n = (_heads(x[:, start:stop], groups) for x in (k, v))
        s = scale * (_heads(q[:, n : n + 1]) @ k_n.mT)  # [1, HQ, 1, T]
        if g is not None:
            later = g[:, start + 1 : stop].transpose(1, 2).to(s.dtype)
            to_end = later.flip(-1).cumsum(-1).flip(-1)  # g_{j+1} + … for every key but the last
            to_end = torch.cat([to_end, s.new_zeros(*s.shape[:2], min(stop - start, 1))], -1)
            s = s + to_end[:, :, None] * (scale if do_gate_scale else 1.0)
        o.append(_attend(s, v_n, sink_bias)[0].transpose(1, 2).to(q.dtype))
    return torch.cat(o, 1)


def _heads(x: Tensor, groups: int = 1) -> Tensor:
    """Heads before time, each repeated for its group of queries, at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.transpose(1, 2).to(dtype).repeat_interleave(groups, 1)


def _span(g: Tensor, causal: bool) -> Tensor:
    """G_i − G_j = g_{j+1} + … + g_i: every sum runs on its own, none is a difference."""
    T = g.shape[-1]
    after = torch.ones(T, T, dtype=torch.bool, device=g.device).tril(-1)  # row l after column j
    sums = torch.where(after, g[..., None], 0).cumsum(-2)
    return sums if causal else sums - torch.where(after, sums, 0).mT


def _attend(s: Tensor, v: Tensor, sink_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the keys and the sink; a row of -inf alone gives zeros."""
    sink = s.new_full((s.shape[1],), -torch.inf) if sink_bias is None else sink_bias.to(s.dtype)
    s = torch.cat([sink[None, :, None, None].expand(*s.shape[:3], 1), s], -1)
    most = s.detach().amax(-1, keepdim=True)
    weights = (s - most.clamp(min=torch.finfo(s.dtype).min)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1, total)
    return weights[..., 1:] @ v, most[..., 0]
