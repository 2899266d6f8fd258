"""The softmax engine's errors: each names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from fla.ops.attn import attn_decoding_one_step, parallel_attn
from fla.ops.attn.naive import naive_attn_decoding
from fla.ops.forgetting_attn import parallel_forgetting_attn


def good(T=12, HQ=4, H=2, K=8, V=8):
    return {
        "q": torch.zeros(1, T, HQ, K),
        "k": torch.zeros(1, T, H, K),
        "v": torch.zeros(1, T, H, V),
        "g": torch.zeros(1, T, HQ),
    }


def bounds(*values):
    return {"cu_seqlens": torch.tensor(values)}


BAD = [
    ({"window_size": -1}, ValueError, "window_size: expected None or at least 0, got -1"),
    (good(HQ=3), ValueError, "HQ: expected a multiple of H = 2, got 3 heads"),
    (good(K=257), ValueError, "K: expected a head size from 1 up to 256, got 257"),
    (good(V=513), ValueError, "V: expected a head size from 1 up to 512, got 513"),
    ({"k": good(T=11)["k"]}, ValueError, "k: expected [B, T, H, K]"),
    ({"g": good(HQ=2)["g"]}, ValueError, "g: expected [B, T, HQ] = [1, 12, 4], got [1, 12, 2]"),
    ({"g": good()["g"].int()}, TypeError, "g: expected a floating point tensor, got torch.int32"),
    ({"v": good()["v"].half()}, TypeError, "v: expected the dtype of q, torch.float32, got"),
    ({"k": None}, TypeError, "k: expected a tensor, got NoneType"),
    (bounds(1, 12), ValueError, "cu_seqlens: expected to start at 0, got 1"),
    (bounds(0, 5), ValueError, "cu_seqlens: expected to end at T = 12, got 5"),
    (bounds(0, 9, 5, 12), ValueError, "cu_seqlens: expected not to decrease, got 5 "),
    (bounds(0.0, 12.0), TypeError, "cu_seqlens: expected torch.int32 or torch.int64, got"),
    ({"head_first": True}, TypeError, "head_first: "),
]


@pytest.mark.parametrize("function", [parallel_attn, parallel_forgetting_attn])
@pytest.mark.parametrize("changes, error, message", BAD, ids=[case[2][:40] for case in BAD])
def test_bad_input(function, changes, error, message):
    with pytest.raises(error) as caught:
        function(**{**good(), **changes})
    assert message in str(caught.value)


def test_no_window_is_too_wide():
    leaf = good() | {"q": torch.randn(1, 12, 4, 8, requires_grad=True)}
    wide, none = (parallel_attn(**leaf, window_size=size) for size in (2**70, None))
    torch.testing.assert_close(wide, none)


def test_a_gate_is_needed_to_forget():
    with pytest.raises(TypeError, match="g: expected a tensor, got NoneType"):
        parallel_forgetting_attn(**{**good(), "g": None})


def test_bad_sinks_and_batches():
    with pytest.raises(ValueError, match=r"sink_bias: expected \[HQ\] = \[4\], got \[2\]"):
        parallel_attn(**good(), sink_bias=torch.zeros(2))
    two = {name: torch.cat([x, x]) for name, x in good().items()}
    with pytest.raises(ValueError, match="q: expected a batch of 1 with cu_seqlens, got 2"):
        parallel_attn(**two, **bounds(0, 12))


BAD_DECODING = [
    ({"window_size": -1}, "window_size: expected None or at least 0, got -1"),
    ({"q": torch.zeros(1, 2, 3, 8), "g": None}, "HQ: expected a multiple of H = 2, got 3 heads"),
    ({"q": torch.zeros(2, 1, 4, 8)}, "q: expected [1, N, HQ, K] = [1, 1, 4, 8], got [2, 1, 4, 8]"),
    ({"q": good()["q"]}, "q: expected one query for each of 2 sequences, got 12"),
    ({"cu_seqlens": None}, "q: expected one query for each of 1 sequences, got 2"),
    ({"g": good(HQ=2)["g"]}, "g: expected [1, T, HQ] = [1, 12, 4], got [1, 12, 2]"),
    (bounds(0, 9, 11), "cu_seqlens: expected to end at T = 12, got 11"),
]


@pytest.mark.parametrize("changes, message", BAD_DECODING, ids=[case[1] for case in BAD_DECODING])
def test_bad_decoding(changes, message):
    arguments = {**good(), "q": torch.zeros(1, 2, 4, 8), **bounds(0, 5, 12), **changes}
    with pytest.raises(ValueError) as caught:
        attn_decoding_one_step(**arguments)
    assert message in str(caught.value)


def test_a_negative_window_of_the_textbook():
    with pytest.raises(ValueError, match="window_size: expected None or at least 0, got -1"):
        naive_attn_decoding(**good() | {"q": torch.zeros(1, 1, 4, 8)}, window_size=-1)
