"""The textbook of linear attention without decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 64


def naive_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, Any]:
    """One token after another: S ← S + k_t v_tᵀ, z ← z + k_t, o_t = scale q_tᵀ S.

    With ``normalize`` o_t is divided by scale q_t·z + 1e-10 and the state is the pair (S, z), z
    [B, 1, H, K].
    """
    dtype = q.dtype
    q, k, v, scale = _prepare(q, k, v, scale)
    S = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    z = q.new_zeros(q.shape[0], q.shape[1], q.shape[-1])
    if isinstance(initial_state, tuple | list):
        initial_state, initial_z = initial_state
        if initial_z is not None:
            z = z + initial_z.squeeze(1).to(z.dtype)
    if initial_state is not None:
        S = S + initial_state.to(S.dtype)
    o = []
    for t in range(q.shape[2]):
        S = S + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = z + k[:, :, t]
        o_t = scale * (q[:, :, t, :, None] * S).sum(-2)
        if normalize:
            o_t = o_t / (scale * (q[:, :, t] * z).sum(-1, keepdim=True) + 1e-10)
        o.append(o_t)
    out = torch.stack(o, 2) if o else torch.zeros_like(v)
    state = (S, z[:, None]) if normalize else S
    return out.transpose(1, 2).to(dtype), state if output_final_state else None


def naive_chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, normalize: bool = False
) -> Tensor:
    """The same from zero, 64 tokens at a time: pairs inside the chunk, the state between chunks."""
    dtype, T = q.dtype, q.shape[1]
    if T % CHUNK:
        raise ValueError(f"q: expected T to be a multiple of {CHUNK}, got {T}")
    q, k, v, scale = _prepare(q, k, v, scale)
    q, k, v = (x.unflatten(2, (-1, CHUNK)) for x in (q, k, v))  # [B, H, T / 64, 64, D]
    added = k.mT @ v
    before = added.cumsum(2) - added
    o = scale * (q @ before + (q @ k.mT).tril() @ v)
    if normalize:
        z = k.flatten(2, 3).cumsum(2).view_as(k)
        o = o / (scale * (q * z).sum(-1, keepdim=True) + 1e-10)
    return o.flatten(2, 3).transpose(1, 2).to(dtype)


def _prepare(q, k, v, scale):
    """Heads before time, at least fp32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return *(x.transpose(1, 2).to(dtype) for x in (q, k, v)), scale
