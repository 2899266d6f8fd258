"""The softmax engine's gates that no pair's weight may show, or that leave one key to see."""

from __future__ import annotations

import pytest
import torch
from test_attn import call_a_device, decoding, operands, results, textbook, widened

from fla.ops.attn import attn_decoding_one_step, parallel_attn
from fla.testing.compare import relative_error


@pytest.fixture(params=["host", "device"], autouse=True)
def place(request, monkeypatch):
    """On a device no value may be asked for; the code for that runs on the CPU as well."""
    if request.param == "device":
        call_a_device(monkeypatch)


@pytest.mark.parametrize("first", [1e30, -torch.inf, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("bounds", [[0, 300], [0, 0, 1, 100, 128, 128, 300]], ids=str)
def test_the_first_gate_of_a_sequence_is_in_no_pair(bounds, first):
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
def test_growth_that_leaves_nothing_else_to_see(most):
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
def test_keys_far_below_the_sink(sink):
    """Beside it they are nothing, and are not left out: their gradients are small, and exact."""
    tensors, draws, _ = operands(600)
    more = {**tensors, "g": 0.02 * draws - 0.01, "sink_bias": torch.full_like(draws[0, 0], sink)}
    found, expected = results(parallel_attn, more), results(textbook, more)
    for name, x in expected.items():
        assert (found[name] - x).norm() < 1e-9 * x.norm(), name


@pytest.mark.parametrize("steep", [-5.0, -20.0])
def test_gradient_of_gates_that_leave_little(steep):
    """Beside a sink it is as small as what they leave, and as exact."""
    tensors, draws, sink = operands(300, dtype=torch.float32)
    more = {**tensors, "g": torch.full_like(draws, steep).float(), "sink_bias": sink.float()}
    found = results(parallel_attn, more)["dg"]
    expected = results(textbook, widened(more))["dg"]
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("first", [1e30, -torch.inf, torch.inf])
def test_decoding_without_the_first_gate(first):
    arguments, draws, _ = decoding([0, 5, 70, 134, 400])
    found, expected = (
        attn_decoding_one_step(
            **arguments, g=(0.2 * draws).index_fill(1, arguments["cu_seqlens"][:-1], gate)
        )
        for gate in (first, 0.0)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
