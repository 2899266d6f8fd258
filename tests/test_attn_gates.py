"""The softmax engine's gates: of any size, and those that leave little or nothing to be seen."""

from __future__ import annotations

import math

import pytest
import torch
from softmax_operands import agree, call_a_device, decoding, operands, results, textbook, widened
from torch.nn.functional import logsigmoid

from fla.ops.attn import attn_decoding_one_step, eager_blocks, parallel_attn
from fla.ops.attn.engine import Options
from fla.ops.attn.naive import naive_attn_decoding
from fla.testing.compare import relative_error


@pytest.fixture(params=["host", "device"])
def place(request, monkeypatch):
    """On a device no value may be asked for; the code for that runs on the CPU as well."""
    if request.param == "device":
        call_a_device(monkeypatch)
    return request.param


STEEP = [-1e4, -1e7, -torch.inf, torch.finfo(torch.float32).min]


@pytest.mark.parametrize("steepest", STEEP)
def test_steep_gates_beside_gentle_ones(steepest, place):
    tensors, draws, _ = operands(300, dtype=torch.float32)
    g = torch.where(draws > 1.5, steepest, -0.01 * draws.abs()).float()
    agree({**tensors, "g": g}, 1e-5)
    # in fp64 what a block adds up still costs some digits
    bound = 1e-11 if steepest == -1e4 else 1e-8
    agree(widened({**tensors, "g": g}), bound)


def test_a_gate_of_minus_infinity_begins_a_sequence(place):
    bounds = torch.tensor([0, 3, 130, 131, 260, 400])
    tensors, draws, _ = operands(400)
    gentle = logsigmoid(draws + 3)
    cut = gentle.clone()
    cut[:, bounds[1:-1]] = -torch.inf
    packed = results(parallel_attn, {**tensors, "g": gentle, "cu_seqlens": bounds})
    gated = results(parallel_attn, {**tensors, "g": cut})
    for name in packed:
        torch.testing.assert_close(gated[name], packed[name], rtol=1e-9, atol=1e-9)


def test_a_burst_of_growth_brings_old_keys_back(place):
    """A gate may be positive: what lies far behind may weigh most."""
    tensors, draws, sink = operands(1500, H=1, G=1, dtype=torch.float32)
    g = -0.05 - 0.01 * draws.abs().float()
    g[:, 700] = 55.0
    agree({**tensors, "g": g, "sink_bias": sink}, 1e-5)


def test_growth_inside_a_block_that_nothing_before_reaches(place):
    tensors, _, _ = operands(1000, H=1, G=1)
    g = torch.full((1, 1000, 1), -0.5, dtype=torch.float64)
    g[:, 256] = -1e4
    g[:, 300] = 330.0
    agree({**tensors, "g": g}, 1e-11)


def test_growth_throughout(place):
    tensors, draws, _ = operands(500, dtype=torch.float32)
    agree({**tensors, "g": (0.1 * draws + 0.05).float()}, 1e-5)


def gates_of_32768():
    T = 32768
    draws = torch.randn(1, T, 1, generator=torch.Generator().manual_seed(1))
    return {
        "logsigmoid": logsigmoid(draws + 4),
        "constant": torch.full((1, T, 1), -0.05),
        "steep ones": torch.where(draws > 2, -1e4, -0.05),
        "both signs": 0.3 * draws - 0.05,
    }


@pytest.mark.parametrize("gate", gates_of_32768())
def test_near_weights_at_32768_tokens(gate):
    """In fp32 right to 1e-6: no sum of gates is the difference of two long ones."""
    g = gates_of_32768()[gate]
    T, near = g.shape[1], 64
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, T, 1, 16, generator=generator) / 2 for _ in "qk")
    v = torch.zeros(1, T, 1, near)
    v[0, -near:, 0] = torch.eye(near)  # the last row's output is its weights
    v.requires_grad_()
    o = parallel_attn(q, k, v, g)
    (dv,) = torch.autograd.grad(o[0, -1, 0, 0], v)  # and this one's gradient too

    later = g[0, 1:, 0].double().flip(0).cumsum(0).flip(0)  # from near to far
    s = k[0, :, 0].double() @ q[0, -1, 0].double() / 4 + torch.cat([later, later.new_zeros(1)])
    expected = s.softmax(0)[-near:]
    seen = expected > 1e-30
    assert seen.sum() >= 16
    for found in (o[0, -1, 0], dv[0, -near:, 0, 0]):
        assert ((found - expected) / expected)[seen].abs().max() < 1e-6


def pairs_met(arguments, options):
    walk = eager_blocks.Walk(
        arguments["q"], arguments["k"], arguments["v"], arguments["g"], None, options
    )
    own = (walk.q * walk.k[:, None]).sum(-1)
    return sum(math.prod(block.sizes) for block in walk.blocks(own))


def test_forgotten_blocks_are_not_met():
    T = 4096
    tensors, draws, _ = operands(T, H=1, G=1, dtype=torch.float32)
    options = Options(tensors["q"].shape[-1] ** -0.5)
    remembers = pairs_met({**tensors, "g": 0 * draws}, options)
    forgets = pairs_met({**tensors, "g": draws * 0 - 0.2}, options)
    assert remembers > T * T / 2
    assert forgets < T * T / 8


@pytest.mark.parametrize("limit", ["_LARGEST_RUN", "_RUN"])
def test_blocks_are_as_small_as_they_have_to_be(limit, monkeypatch):
    """Of fewer rows for the sake of memory, or of fewer heads for that of the cache."""
    tensors, draws, _ = operands(300, dtype=torch.float32)
    arguments = {**tensors, "g": logsigmoid(draws).float()}
    met = []

    def blocks(walk, *floor, blocks=eager_blocks.Walk.blocks):
        for block in blocks(walk, *floor):
            met.append(math.prod(block.sizes))
            yield block

    monkeypatch.setattr(eager_blocks.Walk, "blocks", blocks)
    agree(arguments, 1e-5)
    before = max(met)
    monkeypatch.setattr(eager_blocks, limit, 1 << 15)
    met.clear()
    agree(arguments, 1e-5)
    assert max(met) <= before / 2


def test_skipping_changes_nothing(monkeypatch):
    """Blocks that are left out do not show in the result."""
    tensors, draws, sink = operands(2000, H=1, dtype=torch.float32)
    arguments = {**tensors, "g": logsigmoid(draws + 2).float(), "sink_bias": sink.float()}
    skipped = results(parallel_attn, arguments)
    call_a_device(monkeypatch)
    whole = results(parallel_attn, arguments)
    for name in whole:
        assert relative_error(skipped[name], whole[name]) < 1e-6, name


@pytest.mark.parametrize("decay", [-0.02, -0.05, -0.1, -0.3])
def test_skipping_loses_less_than_rounding(decay, monkeypatch):
    """Where the bounds are as tight as they can be, and the values left out very large."""
    T, large = 2048, 1e8
    q = k = torch.ones(1, T, 1, 1, dtype=torch.float64)
    v = torch.ones(1, T, 1, 1, dtype=torch.float64)
    v[:, : T // 2] = large
    arguments = {"q": q, "k": k, "v": v, "g": torch.full((1, T, 1), decay).double()}
    skipped = results(parallel_attn, arguments)
    call_a_device(monkeypatch)
    whole = results(parallel_attn, arguments)
    for name in ("o", "dv"):
        scale = large if name == "o" else 1.0
        lost = (skipped[name] - whole[name]).abs().max()
        assert lost < 4 * torch.finfo(torch.float64).eps * scale, name


@pytest.mark.parametrize("first", [1e30, -torch.inf, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("bounds", [[0, 300], [0, 0, 1, 100, 128, 128, 300]], ids=str)
def test_the_first_gate_of_a_sequence_is_in_no_pair(bounds, first, place):
    tensors, draws, _ = operands(300)
    g = 0.2 * draws - 0.1
    changed = g.clone()
    changed[:, bounds[:-2] if len(bounds) > 2 else 0] = first  # the start of an empty one too
    for window in (None, 1, 40):
        more = {**tensors, "window_size": window}
        if len(bounds) > 2:
            more["cu_seqlens"] = torch.tensor(bounds)
        found, expected = (results(parallel_attn, {**more, "g": x}) for x in (changed, g))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("most", [1e8, 1e30, torch.inf])
def test_growth_that_leaves_nothing_else_to_see(most, place):
    """It costs the gates beside it no more digits than the steepest decay does."""
    tensors, draws, _ = operands(300)
    grown = []
    for growth in (most, 1e4):
        g = 0.2 * draws - 0.1
        g[:, 70] = growth
        grown.append(results(parallel_attn, {**tensors, "g": g}))
    for name, value in grown[0].items():
        assert relative_error(value, grown[1][name]) < 1e-8, name


@pytest.mark.parametrize("sink", [20.0, 100.0])
def test_keys_far_below_the_sink(sink, place):
    """Beside it they are nothing, and are not left out: their gradients are small, and exact."""
    tensors, draws, _ = operands(600)
    more = {**tensors, "g": 0.02 * draws - 0.01, "sink_bias": torch.full_like(draws[0, 0], sink)}
    found, expected = results(parallel_attn, more), results(textbook, more)
    for name, x in expected.items():
        assert (found[name] - x).norm() < 1e-9 * x.norm(), name


@pytest.mark.parametrize("steep", [-5.0, -20.0])
def test_gradient_of_gates_that_leave_little(steep, place):
    """Beside a sink it is as small as what they leave, and as exact."""
    tensors, draws, sink = operands(300, dtype=torch.float32)
    more = {**tensors, "g": torch.full_like(draws, steep).float(), "sink_bias": sink.float()}
    found = results(parallel_attn, more)["dg"]
    expected = results(textbook, widened(more))["dg"]
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("first", [1e30, -torch.inf, torch.inf])
def test_decoding_without_the_first_gate(first, place):
    arguments, draws, _ = decoding([0, 5, 70, 134, 400])
    found, expected = (
        attn_decoding_one_step(
            **arguments, g=(0.2 * draws).index_fill(1, arguments["cu_seqlens"][:-1], gate)
        )
        for gate in (first, 0.0)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_decoding_near_weights_at_32768_tokens():
    g = gates_of_32768()["steep ones"]
    near, T = 64, g.shape[1]
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(1, 1, 1, 16, generator=generator) / 2
    k = torch.randn(1, T, 1, 16, generator=generator) / 2
    v = torch.zeros(1, T, 1, near)
    v[0, -near:, 0] = torch.eye(near)
    found = attn_decoding_one_step(q, k, v, g)[0, 0, 0]
    expected = naive_attn_decoding(q.double(), k.double(), v.double(), g.double())[0, 0, 0]
    seen = expected > 1e-30
    assert ((found - expected) / expected)[seen].abs().max() < 1e-6
