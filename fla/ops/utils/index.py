"""Where packed sequences, their tokens and their chunks lie, as index tensors.

Boundaries ``cu_seqlens`` are ``[N + 1]``, begin at 0 and may enclose empty sequences.  The size of
most results depends on their values: without the host copy ``cu_seqlens_cpu`` they are read from
the device, with it nothing is.  Results are on the device of ``cu_seqlens``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla.ops.common import contract
from fla.ops.common.device import on_host


def prepare_lens(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Length of each sequence, [N]."""
    return _bounds(cu_seqlens, cu_seqlens_cpu).diff().to(cu_seqlens.device)


def prepare_lens_from_mask(mask: Tensor) -> Tensor:
    """Number of tokens in each row of a mask [B, T], [B] in int32."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    if mask.dim() != 2:
        raise ValueError(f"mask: expected [B, T], got {list(mask.shape)}")
    return mask.sum(-1, dtype=torch.int32)


def prepare_cu_seqlens_from_lens(lens: Tensor, dtype: torch.dtype | None = torch.int32) -> Tensor:
    """Boundaries of sequences of these lengths, [N + 1]."""
    contract.index_tensor("lens", lens)
    if lens.dim() != 1:
        raise ValueError(f"lens: expected [N], got {list(lens.shape)}")
    return torch.cat([lens.new_zeros(1), lens]).cumsum(0, dtype=dtype)


def prepare_cu_seqlens_from_mask(mask: Tensor, dtype: torch.dtype | None = torch.int32) -> Tensor:
    """Boundaries of the rows of a mask [B, T] once their padding is taken out, [B + 1]."""
    return prepare_cu_seqlens_from_lens(prepare_lens_from_mask(mask), dtype)


def prepare_position_ids(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Position of each token in its sequence, [T] in the dtype of ``cu_seqlens``."""
    _, positions = _count(_bounds(cu_seqlens, cu_seqlens_cpu).diff())
    return positions.to(cu_seqlens)


def prepare_sequence_ids(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Sequence of each token, [T] in int64; empty sequences are not counted."""
    return prepare_position_ids(cu_seqlens, cu_seqlens_cpu).eq(0).cumsum(0) - 1


def prepare_token_indices(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Sequence and position of each token, [T, 2]; empty sequences are not counted."""
    positions = prepare_position_ids(cu_seqlens, cu_seqlens_cpu)
    return torch.stack([positions.eq(0).cumsum(0) - 1, positions], 1).to(cu_seqlens)


def prepare_chunk_indices(
    cu_seqlens: Tensor, chunk_size: int, cu_seqlens_cpu: Tensor | None = None
) -> Tensor:
    """Sequence and rank in it of each chunk, [chunks, 2].

    Callers look the sequence up in ``cu_seqlens``: empty ones, though they have no chunk, count.
    """
    lens = _bounds(cu_seqlens, cu_seqlens_cpu).diff()
    return torch.stack(_count(_chunks(lens, chunk_size)), 1).to(cu_seqlens)


def prepare_chunk_offsets(
    cu_seqlens: Tensor, chunk_size: int, cu_seqlens_cpu: Tensor | None = None
) -> Tensor:
    """Number of chunks before each sequence, and before the end, [N + 1] in int64."""
    chunks = _chunks(prepare_lens(cu_seqlens, cu_seqlens_cpu), chunk_size)
    return prepare_cu_seqlens_from_lens(chunks, torch.int64)


def _bounds(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None) -> Tensor:
    contract.boundary_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens_cpu is None:
        return cu_seqlens
    contract.boundary_tensor("cu_seqlens_cpu", cu_seqlens_cpu)
    contract.alike(cu_seqlens, cu_seqlens_cpu)
    return cu_seqlens_cpu


def _chunks(lens: Tensor, chunk_size: int) -> Tensor:
    if contract.whole_number("chunk_size", chunk_size) < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    return (lens + chunk_size - 1) // chunk_size


def _count(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Groups of these sizes laid one after another: the group and the rank in it of each member."""
    if on_host(sizes) and (sizes < 0).any():
        raise ValueError("cu_seqlens: expected not to decrease, got a sequence of negative length")
    group = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    first = sizes.cumsum(0) - sizes
    return group, torch.arange(len(group), device=sizes.device) - first[group]
