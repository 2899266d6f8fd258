"""The textbook of Kimi Delta Attention."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One token after another: decay the memory, correct what it says of k, read it with q.

        S ← Diag(exp(g_t)) S        S ← S + k_t (β_t (v_t − Sᵀk_t))ᵀ        o_t = scale Sᵀq_t

    q, k [B, T, H, K]; v [B, T, HV, V]; g [B, T, HV, K]; beta [B, T, HV] or [B, T, HV, V];
    initial_state [B, HV, K, V] or [HV, K, V].
    """
    dtype = q.dtype
    q, k, v, g, beta, S = _prepare(q, k, v, g, beta, scale, initial_state)
    o = [torch.zeros_like(v[:, :, :0])]
    for t in range(q.shape[2]):
        S = g[:, :, t, :, None].exp() * S
        seen = (k[:, :, t, :, None] * S).sum(-2)
        S = S + k[:, :, t, :, None] * (beta[:, :, t] * (v[:, :, t] - seen))[:, :, None, :]
        o.append((q[:, :, t, :, None] * S).sum(-2)[:, :, None])
    return torch.cat(o, 2).transpose(1, 2).to(dtype), S if output_final_state else None


def naive_chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The same, a chunk at a time: the corrections of a chunk solve a triangular system.

    With D_ij = exp(g_{j+1} + … + g_i), one decay for each channel, and S the memory before the
    chunk, the corrected values obey v'_i = β_i (v_i − Sᵀ(D_i0 k_i) − Σ_{j<i} (k_i·D_ij k_j) v'_j).

    T is a multiple of ``chunk_size``; beta is [B, T, HV].
    """
    if q.shape[1] % chunk_size:
        raise ValueError(f"q: expected T to be a multiple of {chunk_size}, got T = {q.shape[1]}")
    dtype = q.dtype
    q, k, v, g, beta, S = _prepare(q, k, v, g, beta, scale, initial_state)
    o = [torch.zeros_like(v[:, :, :0])]
    for start in range(0, q.shape[2], chunk_size):
        chunk = slice(start, start + chunk_size)
        q_c, k_c, v_c, g_c, beta_c = (x[:, :, chunk] for x in (q, k, v, g, beta))
        since_start = g_c.cumsum(-2).exp()
        after = torch.nn.functional.pad(g_c[:, :, 1:], (0, 0, 0, 1))
        to_end = after.flip(-2).cumsum(-2).flip(-2).exp()
        decay = _decay(g_c)  # [B, HV, C, C, K]
        keys = torch.einsum("bhik,bhijk,bhjk->bhij", k_c, decay, k_c).tril(-1)
        queries = torch.einsum("bhik,bhijk,bhjk->bhij", q_c, decay, k_c)
        wanted = beta_c * (v_c - (k_c * since_start) @ S)
        system = torch.eye(chunk_size, dtype=keys.dtype, device=keys.device) + beta_c * keys
        values = torch.linalg.solve_triangular(system, wanted, upper=False)
        o.append((q_c * since_start) @ S + queries @ values)
        S = since_start[:, :, -1, :, None] * S + (k_c * to_end).mT @ values
    return torch.cat(o, 2).transpose(1, 2).to(dtype), S if output_final_state else None


def _prepare(q, k, v, g, beta, scale, initial_state):
    """Heads before time, q and k once for each value head, at least fp32; q takes the scale."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    beta = beta[..., None] if beta.dim() == 3 else beta
    q, k, v, g, beta = (x.transpose(1, 2).to(dtype) for x in (q, k, v, g, beta))
    q, k = (x.repeat_interleave(v.shape[1] // q.shape[1], 1) for x in (q, k))
    S = q.new_zeros(*v.shape[:2], q.shape[-1], v.shape[-1])
    if initial_state is not None:
        S = S + initial_state.to(dtype)
    return q * scale, k, v, g, beta, S


def _decay(g: Tensor) -> Tensor:
    """D_ij for j ≤ i, else 0, from g [.., C, K]: every sum on its own, none a difference."""
    C = g.shape[-2]
    after = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)  # row l after column j
    sums = torch.where(after[..., None], g[..., :, None, :], 0).cumsum(-3)
    return torch.where(after.T[..., None], 0, sums.exp())
