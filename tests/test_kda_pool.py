"""The pool of states in serving: what of it, and of its indices, is looked at."""

from __future__ import annotations

import pytest
import torch
from test_kda import POOL, draw, operands, pool_of

from fla import ops
from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd
from fla.testing.compare import relative_error


@pytest.mark.parametrize("slots", [torch.tensor([-1, -2]), torch.tensor([[-1], [-1]])], ids=str)
def test_serving_without_a_pool(slots):
    """No slot is ever named, so there need not be any."""
    x, none = operands(1, B=2), draw(0, 4, 24, 40)
    o, returned = fused_recurrent_kda_fwd(*x, initial_state=none, ssm_state_indices=slots)
    assert returned is none
    assert relative_error(o, ops.fused_recurrent_kda(*x)[0]) < 1e-6


@pytest.mark.parametrize("columns", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_serving_no_tokens(packed, columns):
    """Whatever stands in entries of tokens that are not there."""
    x = operands(0, B=1 if packed else 3)
    pool = pool_of(torch.float32, False)
    before = pool.clone()
    o, _ = fused_recurrent_kda_fwd(
        *x,
        initial_state=pool,
        cu_seqlens=torch.zeros(4).long() if packed else None,
        ssm_state_indices=torch.full((3, columns), POOL),
        num_accepted_tokens=torch.tensor([0, 1, 9]),
    )
    assert o.shape == x[2].shape and torch.equal(pool, before)


def test_serving_looks_only_at_what_it_uses():
    """Slots below the length and the one to read, which may lie behind it; none if there is none.

    The state of the second sequence comes from the third token of the step before.
    """
    bounds, x = torch.tensor([0, 0, 1, 3]), operands(3)
    slots = torch.tensor([[POOL, 99, POOL], [4, POOL, 6], [5, -1, POOL]])
    settings = {"cu_seqlens": bounds, "ssm_state_indices": slots}
    pool = pool_of(torch.float32, False)
    before = pool.clone()
    accepted = torch.tensor([0, 3, 1])
    o, _ = fused_recurrent_kda_fwd(*x, initial_state=pool, num_accepted_tokens=accepted, **settings)
    for start, stop, slot in ((0, 1, 6), (1, 3, 5)):
        tokens = (each[:, start:stop] for each in x)
        expected, _ = ops.fused_recurrent_kda(*tokens, initial_state=before[slot, None])
        assert relative_error(o[:, start:stop], expected) < 1e-6
    changed = [slot for slot in range(POOL) if not torch.equal(pool[slot], before[slot])]
    assert changed == [4, 5]
    for n, count in ((1, 2), (2, 3)):
        with pytest.raises(ValueError, match="ssm_state_indices: expected slots below 9, got 9"):
            fused_recurrent_kda_fwd(
                *x,
                initial_state=pool,
                num_accepted_tokens=accepted.index_fill(0, torch.tensor(n), count),
                **settings,
            )
    with pytest.raises(ValueError, match=r"num_accepted_tokens: expected 1 to 3, got \[0, 0, 1\]"):
        fused_recurrent_kda_fwd(
            *x, initial_state=pool, num_accepted_tokens=torch.tensor([0, 0, 1]), **settings
        )
