"""What has been found of a call's shapes is kept, and nothing else is."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from fla import ops
from fla.ops.common import contract, dispatch, once
from fla.ops.kda import engine as kda


def test_a_check_that_passed_is_not_made_again():
    made = []

    @once.once
    def check(x, size):
        made.append(1)
        return contract.operands(x=(x, "T 3" if size else "T"))["T"]

    x = torch.zeros(2, 3)
    assert [check(x, 1), check(torch.ones(2, 3), 1), check(x.half(), 1), check(x, 1)] == [2] * 4
    assert len(made) == 2
    for wrong in (x, x, [x], None, (x.shape, x.dtype, x.device)):
        with pytest.raises((TypeError, ValueError), match="x: expected"):
            check(wrong, 0)
    assert len(made) == 7
    assert check(x[:1], 1) == 1 and check(torch.nn.Parameter(x), 1) == 2 and len(made) == 8


def test_answers_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(once, "KEPT", 4)
    made = []
    check = once.once(made.append)
    for i in (0, 1, 2, 3, 3, 4, 0):
        check(i)
    assert made == [0, 1, 2, 3, 4, 0]
    answers = dict(zip(check.__code__.co_freevars, check.__closure__, strict=True))["answers"]
    threads = [
        threading.Thread(target=lambda i=i: [check((i, j)) for j in range(500)]) for i in range(8)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    check(-1)
    check(-2)
    assert len(answers.cell_contents) <= 4


def test_no_tensor_of_a_caller_is_kept():
    x = torch.zeros(1, 4, 1, 8)
    scale = torch.ones(())
    kept = weakref.ref(scale)
    with pytest.raises(TypeError, match="scale: expected a number"):
        ops.fused_recurrent_kda(x, x, x, x, x[..., 0], scale=scale)
    del scale
    gc.collect()
    assert kept() is None


def test_a_problem_that_has_no_hash_is_met_anew():
    engine = dispatch.Engine("some", dispatch.Implementation("eager", "fla.ops.kda.eager"))
    del dispatch.Engine.registry["some"]
    asked = []
    engine._best = once.once(lambda problem: asked.append(1) or engine._search(problem))
    problem = dispatch.Problem(torch.device("cpu"), torch.float32, 8, 8)
    for each in (problem, problem, problem._replace(options=[1]), problem._replace(options=[1])):
        assert engine.choose(each).__name__ == "fla.ops.kda.eager"
    assert len(asked) == 3


def test_what_calls_of_the_same_shapes_find_they_share():
    """But not what another implementation was found, by force."""
    x = torch.zeros(1, 4, 1, 8)
    engine, options = kda.ENGINE, [
        kda._checked(*[each] * 4, each[..., 0], *[None] * 5, kda.Options(scale))
        for each, scale in ((x, None), (x.clone(), None), (x, 2.0), (x.half(), None))
    ]  # fmt: skip
    assert options[0] is options[1] and len({id(once.found_by(each)) for each in options}) == 3
    with dispatch.use("eager"):
        assert engine.stages(x, x, options[0]).__name__ == "fla.ops.kda.eager"
    assert not once.found_by(options[0])
    stages = engine.stages(x, x, options[0])
    assert once.found_by(options[1]) == {engine: stages}
    assert not once.found_by(options[0]._replace(scale=1.0)) and not once.found_by(kda.Options())


def test_head_sizes_stay_symbols_in_a_graph():
    def run(q, v):
        return ops.chunk_kda(q, q, v, q, q[..., 0])[0]

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    q = torch.randn(1, 8, 2, 16)
    for V in (9, 12, 70):
        v = torch.randn(1, 8, 2, V)
        torch.testing.assert_close(compiled(q, v), run(q, v))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
