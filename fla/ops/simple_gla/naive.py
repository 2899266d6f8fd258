"""The textbook of linear attention with a scalar decay per head."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """One token after another: S ← exp(g_t) S + k_t v_tᵀ, o_t = scale q_tᵀ S.

    q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H] or None; initial_state [B, H, K, V] or [H, K, V].
    """
    dtype = q.dtype
    q, k, v, g, S, scale = _prepare(q, k, v, g, scale, initial_state)
    o = []
    for t in range(q.shape[2]):
        S = g[:, :, t, None, None].exp() * S + k[:, :, t, :, None] * v[:, :, t, None, :]
        o.append((q[:, :, t, :, None] * S).sum(-2) * scale)
    out = torch.stack(o, 2) if o else torch.zeros_like(v)
    return out.transpose(1, 2).to(dtype), S if output_final_state else None


def naive_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same, a chunk at a time: pairs inside the chunk, the state between chunks."""
    dtype = q.dtype
    q, k, v, g, S, scale = _prepare(q, k, v, g, scale, initial_state)
    o = [torch.zeros_like(v[:, :, :0])]
    for start in range(0, q.shape[2], chunk_size):
        q_c, k_c, v_c, g_c = (x[:, :, start : start + chunk_size] for x in (q, k, v, g))
        decay = _decay(g_c)
        since_start = g_c.cumsum(-1)
        to_end = torch.nn.functional.pad(g_c[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
        inside = (q_c @ k_c.mT * decay) @ v_c
        o.append(scale * (inside + since_start.exp()[..., None] * (q_c @ S)))
        added = (k_c * to_end.exp()[..., None]).mT @ v_c
        S = since_start[..., -1, None, None].exp() * S + added
    return torch.cat(o, 2).transpose(1, 2).to(dtype), S if output_final_state else None


def naive_parallel_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """All pairs at once: A_ij = scale q_i·k_j exp(g_{j+1} + … + g_i) for j ≤ i, o = A v."""
    dtype = q.dtype
    q, k, v, g, _, scale = _prepare(q, k, v, g, scale, None)
    A = scale * (q @ k.mT) * _decay(g)
    return (A @ v).transpose(1, 2).to(dtype), A.to(dtype)


def _prepare(q, k, v, g, scale, initial_state):
    """Heads before time, at least fp32; no gate is a gate of zeros."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    g = q.new_zeros(q.shape[:-1]) if g is None else g.transpose(1, 2).to(dtype)
    S = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    if initial_state is not None:
        S = S + initial_state.to(dtype)
    return q, k, v, g, S, scale


def _decay(g: Tensor) -> Tensor:
    """exp(g_{j+1} + … + g_i) for j ≤ i, else 0: every sum runs on its own, none is a difference."""
    T = g.shape[-1]
    after = torch.ones(T, T, dtype=torch.bool, device=g.device).tril(-1)  # row l after column j
    sums = torch.where(after, g[..., None], 0).cumsum(-2)
    return torch.where(after.T, 0, sums.exp())
