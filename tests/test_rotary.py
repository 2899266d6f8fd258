"""Rotary positions, against pairs of channels as complex numbers in fp64."""

from __future__ import annotations

import pytest
import torch
from module_cases import BOUNDS, agree, draw

from fla.modules import RotaryEmbedding
from fla.testing.compare import relative_error


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_rotary(dtype, interleaved):
    """Pairs of channels as complex numbers, turned by their positions."""
    dim, base = 8, 100.0
    rotary = RotaryEmbedding(dim, base, interleaved=interleaved)
    inputs = {"q": draw(2, 7, 4, 12, dtype=dtype), "k": draw(2, 7, 2, 12, seed=1, dtype=dtype)}
    offset = torch.tensor([0, 3])

    def turned(x):
        pairs = x[..., :dim].unflatten(-1, (-1, 2) if interleaved else (2, -1))
        pairs = pairs if interleaved else pairs.mT
        angles = (torch.arange(7) + offset[:, None]).double()[..., None] * base ** (
            -torch.arange(0, dim, 2).double() / dim
        )
        whole = torch.view_as_complex(pairs.contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(2)
        whole = torch.view_as_real(whole)
        whole = (whole if interleaved else whole.mT).flatten(-2)
        return torch.cat([whole, x[..., dim:]], -1)

    agree(
        lambda q, k: rotary(q, k, offset),
        lambda q, k: (turned(q), turned(k)),
        inputs,
        "eager",
        dtype,
    )


def test_rotary_of_packed_sequences():
    rotary = RotaryEmbedding(8)
    q, k = draw(1, 9, 2, 8), draw(1, 9, 2, 8, seed=1)
    cu_seqlens, offset = torch.tensor([0, 0, 4, 9]), torch.tensor([5, 2, 7])
    whole = rotary(q, k, offset, cu_seqlens)
    for (start, stop), first in zip(((0, 4), (4, 9)), (2, 7), strict=True):
        alone = rotary(q[:, start:stop], k[:, start:stop], first)
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[:, start:stop], b, rtol=1e-12, atol=1e-12)


def test_rotary_at_a_late_position():
    """Where the digits of fp32 are those of how many times an angle goes round."""
    rotary = RotaryEmbedding(64)
    q = draw(1, 9, 1, 64)
    found, expected = (rotary(x, x, 10**6)[0] for x in (q.float(), q))
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize(
    "bounds, problem",
    [([0, 3], "end at T = 5"), ([2, 5], "start at 0"), ([0, 4, 2, 5], "not to decrease")],
)
def test_rotary_wants_boundaries_that_fit(bounds, problem):
    q = torch.randn(1, 5, 2, 8)
    with pytest.raises(ValueError, match=f"cu_seqlens: expected (to )?{problem}"):
        RotaryEmbedding(8)(q, q, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(TypeError, match="seqlen_offset: expected a whole number, got float"):
        RotaryEmbedding(8)(q, q, 1.5)


def test_rotary_scores_follow_distance_alone():
    rotary = RotaryEmbedding(8)
    q, k = draw(1, 5, 1, 8), draw(1, 5, 1, 8, seed=1)
    scores = [torch.einsum("bihd,bjhd->bij", *rotary(q, k, offset)) for offset in (0, 1000)]
    torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-9)
