"""What is particular to the softmax engine: windows, sinks, packing, decoding."""

from __future__ import annotations

import itertools

import pytest
import torch
from softmax_operands import agree, call_a_device, decoding, operands, results, textbook, widened
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

from fla.ops.attn import (
    attn_decoding_one_step,
    eager,
    naive_parallel_attn,
    parallel_attn,
)
from fla.ops.attn.engine import Options
from fla.ops.attn.naive import naive_attn_decoding
from fla.ops.forgetting_attn import naive_forgetting_attn, parallel_forgetting_attn
from fla.testing.compare import relative_error


@pytest.fixture(params=["host", "device"])
def place(request, monkeypatch):
    """On a device no value may be asked for; the code for that runs on the CPU as well."""
    if request.param == "device":
        call_a_device(monkeypatch)
    return request.param


# Windows, sinks, packing


@pytest.mark.parametrize("packed", [False, True])
def test_a_window_of_zero(packed):
    tensors, draws, sink = operands(70)
    arguments = {**tensors, "g": draws, "sink_bias": sink, "window_size": 0}
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 30, 30, 70])
    assert not any(result.any() for result in results(parallel_attn, arguments).values())
    del arguments["sink_bias"]
    assert not any(result.any() for result in results(parallel_attn, arguments).values())


@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, 299, 300, 10**6])
def test_windows(window, place):
    tensors, draws, sink = operands(300)
    agree({**tensors, "window_size": window}, 1e-12)
    agree({**tensors, "g": 0.1 * draws, "sink_bias": sink, "window_size": window}, 1e-12)


def test_a_window_of_one_is_the_value():
    tensors, _, _ = operands(50, G=1)
    o = parallel_attn(**tensors, window_size=1)
    torch.testing.assert_close(o, tensors["v"])


def test_a_sink_is_a_key_without_value():
    tensors, _, sink = operands(90, H=3, G=1, K=8, V=8)
    one = {name: x[:, :1] for name, x in tensors.items()}  # a first key with that logit
    scale = 8**-0.5
    direction = torch.zeros_like(one["k"])
    direction[..., 0] = sink[:, None].T / scale
    q = torch.cat([one["q"], tensors["q"]], 1)
    q = torch.cat([torch.ones_like(q[..., :1]), q[..., 1:]], -1)
    k = torch.cat([torch.zeros_like(one["k"]), tensors["k"]], 1)
    k[..., 0] = 0
    k[:, 0] = direction[:, 0]
    v = torch.cat([torch.zeros_like(one["v"]), tensors["v"]], 1)
    expected = parallel_attn(q, k, v)[:, 1:]
    found = parallel_attn(q[:, 1:], k[:, 1:], v[:, 1:], sink_bias=sink)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sink", [-torch.inf, -1e4, 1e4])
def test_extreme_sinks(sink):
    tensors, _, _ = operands(40, K=24)
    o = parallel_attn(**tensors, sink_bias=torch.full((4,), sink))
    expected = parallel_attn(**tensors) if sink < 0 else torch.zeros_like(o)
    torch.testing.assert_close(o, expected)


PACKINGS = {
    "many short": list(range(0, 301, 5)),
    "empty ones": [0, 0, 5, 5, 64, 65, 300, 300],
    "across blocks": [0, 127, 129, 257, 300],
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("window", [None, 40])
def test_packed_equals_looped(packing, window, place):
    bounds = PACKINGS[packing]
    tensors, draws, sink = operands(300)
    arguments = {**tensors, "g": 0.2 * draws - 0.1, "sink_bias": sink, "window_size": window}

    def looped(g, sink_bias, window_size, **tensors):
        parts = [
            parallel_attn(
                **{name: x[:, a:b] for name, x in tensors.items()},
                g=g[:, a:b],
                sink_bias=sink_bias,
                window_size=window_size,
            )
            for a, b in itertools.pairwise(bounds)
        ]
        return torch.cat(parts, 1)

    found = results(parallel_attn, {**arguments, "cu_seqlens": torch.tensor(bounds)})
    expected = results(looped, arguments)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-12, name


@pytest.mark.parametrize("name", "qk")
@pytest.mark.parametrize("T", [1, 5, 300])
def test_logits_that_are_all_nan_are_seen(T, name):
    """PyTorch's attention for the CPU would make zeros of some of them."""
    tensors, *_ = operands(T, V=16)
    expected = parallel_attn(**tensors)
    tensors[name][:, -1] = torch.nan
    o = parallel_attn(**tensors)
    assert o[:, -1].isnan().all()
    torch.testing.assert_close(o[:, :-1], expected[:, :-1])


def test_what_overflows_stays_in_its_sequence():
    """A value may be finite, and its product with a gradient that it has no part in not."""
    tensors, draws, _ = operands(100, dtype=torch.float32)
    tensors["v"][0, 49, 0, 0] = 3e38
    arguments = {**tensors, "g": logsigmoid(draws + 2).float()}
    without = {**arguments, "v": tensors["v"].index_fill(1, torch.tensor(49), 0)}
    found, expected = (
        results(parallel_attn, {**each, "cu_seqlens": torch.tensor([0, 50, 100])})
        for each in (arguments, without)
    )
    for name, x in expected.items():
        torch.testing.assert_close(found[name][:, 50:], x[:, 50:])


def test_tokens_of_no_sequence_on_a_device(monkeypatch):
    """A padded buffer, whatever it holds: zero outputs and gradients."""
    call_a_device(monkeypatch)
    monkeypatch.setattr("fla.ops.common.contract.boundaries", lambda *_: None)
    tensors, draws, sink = operands(200)
    arguments = {**tensors, "g": logsigmoid(draws + 2), "sink_bias": sink}
    bounds = torch.tensor([0, 60, 150])
    short = {name: x if name == "sink_bias" else x[:, :150] for name, x in arguments.items()}
    poisoned = {name: x.clone() for name, x in arguments.items()}
    for name in ("q", "k", "v", "g"):
        poisoned[name][:, 150:] = torch.nan

    def padded(**arguments):
        return torch.nn.functional.pad(parallel_attn(**arguments), (0, 0, 0, 0, 0, 50))

    found = results(parallel_attn, {**poisoned, "cu_seqlens": bounds})
    expected = results(padded, {**short, "cu_seqlens": bounds})
    for name, value in found.items():
        if name != "dsink_bias":
            assert not value[:, 150:].any(), name
            value = value[:, :150]
        wanted = expected[name] if name == "dsink_bias" else expected[name][:, :150]
        assert relative_error(value, wanted) < 1e-12, name


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("packed", [False, True])
def test_a_value_that_is_not_finite_is_lost_where_it_is_seen(packed, window):
    tensors, _, _ = operands(200)
    bounds = torch.tensor([0, 50, 150, 200]) if packed else None
    expected = parallel_attn(**tensors, window_size=window, cu_seqlens=bounds)
    tensors["v"][:, 70, 1, 3] = torch.inf
    found = parallel_attn(**tensors, window_size=window, cu_seqlens=bounds)
    seeing = torch.zeros_like(found, dtype=torch.bool)
    stop = 100 if window else 150 if packed else 200
    seeing[:, 70:stop, 2:, 3] = True
    assert torch.equal(found.isnan(), seeing)
    torch.testing.assert_close(found[~seeing], expected[~seeing])


# Ways to compute it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_own_blocks_agree_with_torchs_attention(dtype, monkeypatch):
    tensors, _, sink = operands(300, H=2, G=3, K=24, V=24, dtype=dtype)
    arguments = {**tensors, "sink_bias": sink}
    torchs = results(parallel_attn, arguments)
    monkeypatch.setattr(eager, "_torch_serves", lambda *_: False)
    own = results(parallel_attn, arguments)
    for name in own:
        bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-3}[dtype]
        assert relative_error(own[name], torchs[name]) < bound, name


class Largest(TorchDispatchMode):
    """The most elements that any result below has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(result):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("gated", [False, True])
def test_memory_is_linear(gated):
    T = 8192
    tensors, draws, _ = operands(T, H=1, G=1, K=8, V=16, dtype=torch.float32)
    q, k, v = tensors.values()
    g = -draws.abs().float() if gated else None
    options = Options(0.3, window_size=None if gated else 500)
    with Largest() as largest:
        o, lse = eager.forward(q, k, v, g, None, None, options)
        eager.backward(torch.ones_like(o), q, k, v, g, None, None, o, lse, options)
    assert 0 < largest.elements <= T * T // 16


def test_chunk_indices_are_accepted():
    tensors, _, _ = operands(20)
    found = parallel_attn(**tensors, chunk_indices=torch.zeros(3, 2, dtype=torch.int32))
    assert torch.equal(found, parallel_attn(**tensors))


def test_forgetting_attention_is_attention_with_a_gate():
    tensors, draws, _ = operands(140)
    g = logsigmoid(draws + 3)
    o = parallel_forgetting_attn(**tensors, g=g, scale=0.2, window_size=90)
    assert torch.equal(o, parallel_attn(**tensors, g=g, scale=0.2, window_size=90))
    torch.testing.assert_close(o, naive_forgetting_attn(**tensors, g=g, scale=0.2, window_size=90))


# The textbook


def test_the_textbook_without_a_mask():
    tensors, draws, _ = operands(30, G=1)
    q, k, v = (x.transpose(1, 2) for x in tensors.values())
    G = draws.cumsum(1).transpose(1, 2)
    s = q @ k.mT / 4 + G[..., None] - G[..., None, :]
    o, most = naive_parallel_attn(**tensors, g=draws, causal=False)
    torch.testing.assert_close(o, (s.softmax(-1) @ v).transpose(1, 2))
    torch.testing.assert_close(most, s.amax(-1).transpose(1, 2))


def test_max_logits():
    tensors, _, sink = operands(30)
    k = tensors["k"].repeat_interleave(2, 2)
    own = (tensors["q"] * k).sum(-1) / 4
    _, most = naive_parallel_attn(**tensors, window_size=1)
    torch.testing.assert_close(most, own)
    _, most = naive_parallel_attn(**tensors, window_size=1, sink_bias=sink)
    torch.testing.assert_close(most, torch.maximum(own, sink))
    _, most = naive_parallel_attn(**tensors, window_size=0)
    assert (most == -torch.inf).all()


def test_the_textbooks_gradients_of_rows_without_keys():
    tensors, draws, sink = operands(10)
    arguments = {**tensors, "g": draws, "window_size": 0}
    assert not any(result.any() for result in results(textbook, arguments).values())
    with_sink = results(textbook, {**arguments, "sink_bias": sink})
    assert not any(result.any() for result in with_sink.values())


# Decoding


RAGGED = {
    "empty ones": [0, 0, 5, 5, 69, 133, 134, 400, 400],
    "one long": [0, 1000],
    "many short": list(range(0, 61, 3)),
    "nothing": [0, 0, 0],
    "no sequence": [0],
}


@pytest.mark.parametrize("bounds", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("window", [None, 1, 64, 70, 10**6])
def test_decoding(bounds, window, place):
    arguments, draws, sink = decoding(bounds)
    for more in (
        {},
        {"sink_bias": sink},
        {"g": logsigmoid(draws + 1), "do_gate_scale": True},
        {"g": 0.2 * draws, "sink_bias": sink, "scale": 0.3},
        {"g": torch.where(draws > 1, -1e4, 0.01 * draws)},
    ):
        call = {**arguments, **more, "window_size": window}
        found, expected = attn_decoding_one_step(**call), naive_attn_decoding(**call)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_decoding_is_the_last_row():
    tensors, draws, sink = operands(700, dtype=torch.float32)
    g = logsigmoid(draws + 3).float()
    more = {"g": g, "sink_bias": sink, "window_size": 500}
    o = attn_decoding_one_step(tensors["q"][:, -1:], tensors["k"], tensors["v"], **more)
    assert not o.requires_grad
    torch.testing.assert_close(o, parallel_attn(**tensors, **more)[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.bfloat16, 3e-3)], ids=str)
def test_decoding_in_lower_precision(dtype, bound):
    arguments, draws, _ = decoding(RAGGED["empty ones"], dtype)
    arguments["g"] = logsigmoid(draws + 3).bfloat16()
    found, expected = (
        attn_decoding_one_step(**arguments),
        naive_attn_decoding(**{**widened(arguments), "cu_seqlens": arguments["cu_seqlens"]}),
    )
    assert found.dtype == dtype
    assert relative_error(found, expected) < bound


def test_decoding_with_nothing_to_see_is_zero():
    arguments, _, sink = decoding([0, 0, 40])
    assert not attn_decoding_one_step(**arguments, window_size=0, sink_bias=sink).any()
    o = attn_decoding_one_step(**arguments)
    assert not o[:, 0].any()
    assert o[:, 1].any()


def test_decoding_reads_its_window_only(place):
    arguments, draws, _ = decoding([0, 100, 300])
    g = -draws.abs()
    expected = attn_decoding_one_step(**arguments, g=g, window_size=30)
    for name in ("k", "v"):
        arguments[name][:, :70] = torch.nan
        arguments[name][:, 100:270] = torch.nan
    g[:, :70] = g[:, 100:270] = torch.nan
    found = attn_decoding_one_step(**arguments, g=g, window_size=30)
    assert torch.equal(found, expected)
