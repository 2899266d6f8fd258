"""Serving: tokens one by one, or some at once, from a pool of states of which slots are named."""

from __future__ import annotations

import re

import pytest
import torch
from test_kda import draw, operands

from fla import ops
from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd
from fla.ops.kda.naive import naive_recurrent_kda
from fla.testing.compare import relative_error

POOL = 9
# Slots of four sequences of 3, 0, 1 and 2 tokens: distinct, some not to be stored.
LENGTHS = (3, 0, 1, 2)
SLOTS = ((1, 5, 2), (3, 3, 3), (7, -1, -1), (-1, 8, 0))
ACCEPTED = (2, 1, 1, 1)


def pool_of(dtype, state_v_first):
    """Slots apart in memory, as beside the cache of another layer."""
    tail = (40, 24) if state_v_first else (24, 40)
    return draw(POOL, 7, *tail).to(dtype)[:, 1:5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("accepted", [None, ACCEPTED])
def test_serving_with_speculation(accepted, state_v_first, dtype):
    x = operands(sum(LENGTHS))
    pool = pool_of(dtype, state_v_first)
    expected = pool.clone()
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    o, returned = fused_recurrent_kda_fwd(
        *x,
        initial_state=pool,
        cu_seqlens=bounds,
        ssm_state_indices=torch.tensor(SLOTS, dtype=torch.int32),
        num_accepted_tokens=None if accepted is None else torch.tensor(accepted),
        state_v_first=state_v_first,
    )
    assert returned is pool
    before = expected.clone()
    for n, slots in enumerate(SLOTS):
        start = slots[0 if accepted is None else accepted[n] - 1]
        state = torch.zeros_like(before[0]) if start < 0 else before[start]
        state = (state.mT if state_v_first else state).float()
        for t in range(LENGTHS[n]):
            token = [each[:, bounds[n] + t, None] for each in x]
            o_t, state = naive_recurrent_kda(*token, None, state, True)
            assert relative_error(o[:, bounds[n] + t, None], o_t) < 1e-5
            if slots[t] >= 0:
                expected[slots[t]] = state[0].mT if state_v_first else state[0]
    named = [slots[t] for n, slots in enumerate(SLOTS) for t in range(LENGTHS[n])]
    for slot in range(POOL):
        if slot in named:
            bound = 4e-3 if dtype == torch.bfloat16 else 1e-5
            assert relative_error(pool[slot], expected[slot]) < bound, slot
        else:
            assert torch.equal(pool[slot], expected[slot]), slot


@pytest.mark.parametrize("slots", [(4, -1, 2), (-1, -1, -1)])
def test_serving_one_token_each(slots):
    x = operands(1, B=3)
    pool = pool_of(torch.bfloat16, False)
    before = pool.clone()
    out = torch.empty_like(x[2])
    o, _ = fused_recurrent_kda_fwd(
        *x, initial_state=pool, ssm_state_indices=torch.tensor(slots), out=out
    )
    assert o is out
    states = torch.stack([before[0] * 0 if slot < 0 else before[slot] for slot in slots])
    expected, _ = ops.fused_recurrent_kda(*x, initial_state=states)
    assert relative_error(o, expected) < 1e-6
    changed = [slot for slot in range(POOL) if not torch.equal(pool[slot], before[slot])]
    assert changed == sorted(slot for slot in slots if slot >= 0)


def test_serving_without_slots():
    x, state = operands(5, B=3), draw(3, 4, 24, 40)
    before = state.clone()
    expected, final = ops.fused_recurrent_kda(*x, initial_state=state, output_final_state=True)
    apart, made = fused_recurrent_kda_fwd(
        *x, initial_state=state, inplace_final_state=False, output_final_state=True
    )
    assert torch.equal(state, before)
    o, returned = fused_recurrent_kda_fwd(*x, initial_state=state)
    assert returned is state
    for one, other in ((o, expected), (apart, expected), (state, final), (made, final)):
        assert relative_error(one, other) < 1e-6
    assert fused_recurrent_kda_fwd(*x, inplace_final_state=False)[1] is None


def test_serving_compiles():
    x, pool, slots = operands(1, B=2), pool_of(torch.float32, False), torch.tensor([3, 1])

    def step(pool):
        return fused_recurrent_kda_fwd(*x, initial_state=pool, ssm_state_indices=slots)[0]

    copy = pool.clone()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(copy), step(pool))
    assert torch.equal(copy, pool)


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


BAD_SERVING = [
    ({"ssm_state_indices": torch.tensor([9])}, "ssm_state_indices: expected slots below 9, got 9"),
    (
        {"ssm_state_indices": torch.tensor([1, 2])},
        "ssm_state_indices: expected [N] = [1] or [N, tokens] = [1, tokens], got [2]",
    ),
    (
        {"ssm_state_indices": torch.tensor([1]), "inplace_final_state": False},
        "inplace_final_state: expected True with ssm_state_indices, got False",
    ),
    (
        {"ssm_state_indices": torch.tensor([1]), "num_accepted_tokens": torch.tensor([2])},
        "num_accepted_tokens: expected 1 to 1, got [2]",
    ),
    (
        {"num_accepted_tokens": torch.tensor([1])},
        "num_accepted_tokens: expected None without ssm_state_indices, got a tensor",
    ),
    ({"initial_state": None}, "initial_state: expected a tensor to update in place, got None"),
    ({}, "initial_state: expected [N, HV, K, V] = [1, 4, 24, 40], got [9, 4, 24, 40]"),
    ({"out": torch.zeros(1, 1, 4, 24)}, "out: expected [B, T, HV, V] = [1, 1, 4, 40]"),
    (
        {"out": torch.zeros(1, 1, 1, 40).expand(1, 1, 4, 40)},
        "out: expected a tensor to write to, got one that is expanded, [1, 1, 4, 40] with strides",
    ),
]


@pytest.mark.parametrize("changes, message", BAD_SERVING, ids=[x for _, x in BAD_SERVING])
def test_bad_serving(changes, message):
    arguments = {"initial_state": pool_of(torch.float32, False), **changes}
    if "out" in changes:
        arguments["ssm_state_indices"] = torch.tensor([1])
    with pytest.raises(ValueError, match=re.escape(message)):
        fused_recurrent_kda_fwd(*operands(1), **arguments)


@pytest.mark.parametrize(
    "slots, message",
    [
        ([1], "ssm_state_indices: expected a tensor, got list"),
        (torch.tensor([1.0]), "ssm_state_indices: expected torch.int32 or torch.int64, got torch."),
    ],
)
def test_slots_are_whole_numbers(slots, message):
    pool = pool_of(torch.float32, False)
    with pytest.raises(TypeError, match=re.escape(message)):
        fused_recurrent_kda_fwd(*operands(1), initial_state=pool, ssm_state_indices=slots)


def test_more_tokens_than_slots():
    pool, slots = pool_of(torch.float32, False), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="expected a slot for each of 3 tokens, got 2"):
        fused_recurrent_kda_fwd(*operands(3), initial_state=pool, ssm_state_indices=slots)
