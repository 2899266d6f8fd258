"""The cache by itself and between the layers of a model."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from fla.layers import (
    Attention,
    Cache,
    ForgettingAttention,
    KimiDeltaAttention,
    LinearAttention,
)

D = 16


def draw(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def model(*kinds):
    """Layers one behind the other, as a function of hidden states and a cache."""
    torch.manual_seed(0)
    makers = {
        "kda": lambda i: KimiDeltaAttention(D, num_heads=2, head_dim=8, layer_idx=i),
        "linear": lambda i: LinearAttention(
            hidden_size=D, num_heads=2, feature_map="elu", do_feature_map_norm=True, layer_idx=i
        ),
        "attn": lambda i: Attention(D, num_heads=2, layer_idx=i),
        "window": lambda i: Attention(D, num_heads=2, window_size=4, layer_idx=i),
        "fox": lambda i: ForgettingAttention(D, num_heads=2, num_kv_heads=1, layer_idx=i),
    }
    layers = [makers[kind](i).double().eval() for i, kind in enumerate(kinds)]

    @torch.no_grad()
    def run(x, cache=None, mask=None):
        for layer in run.layers:
            x = x + layer(x, mask, cache)[0]
        return x

    run.layers = layers
    return run


ALL = ("kda", "attn", "linear", "window", "fox")
LEFT = torch.tensor([[1] * 9, [0, 0] + [1] * 7, [1] * 9])


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for each in value for x in tensors(each)] if isinstance(value, list | tuple) else []


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_goes_on(padded):
    run, x, cache = model(*ALL), draw(3, 9, D), Cache()
    mask = LEFT if padded else None
    whole = run(x, mask=mask)
    parts = [
        run(x[:, a:b], cache, mask if mask is None else mask[:, :b])
        for a, b in ((0, 5), (5, 6), (6, 9))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    assert len(cache) == 5 and list(cache) == [0, 1, 2, 3, 4] and 4 in cache and 5 not in cache
    assert cache.get_seq_length() == cache.get_seq_length(4) == 9
    assert set(cache[0]) == {"recurrent_state", "conv_state"}
    assert set(cache[4]) == ({"attn_state", "attn_mask"} if padded else {"attn_state"})


@pytest.mark.parametrize("padded", [False, True])
def test_beams(padded):
    """Reordered rows go on as if they had been there from the start."""
    run, x, step, cache = model(*ALL), draw(3, 9, D), draw(4, 2, D, seed=1), Cache()
    mask = LEFT if padded else None
    run(x, cache, mask)
    beams = torch.tensor([2, 1, 1, 0])
    cache.reorder_cache(beams)
    whole = mask if mask is None else torch.cat([mask[beams], torch.ones(4, 2).long()], 1)
    found = run(step, cache, whole)
    expected = run(torch.cat([x[beams], step], 1), mask=whole)[:, 9:]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [6, -3])
@pytest.mark.parametrize("padded", [False, True])
def test_crop(padded, length):
    """Keys and values are forgotten, and another continuation takes their place."""
    run, x, other, cache = model("attn", "fox"), draw(3, 9, D), draw(3, 3, D, seed=1), Cache()
    mask = LEFT if padded else None
    run(x, cache, mask)
    cache.crop(length)
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 6
    expected = run(torch.cat([x[:, :6], other], 1), mask=mask)[:, 6:]
    torch.testing.assert_close(run(other, cache, mask), expected, rtol=1e-10, atol=1e-10)


def test_crop_to_nothing_and_beyond():
    run, x, cache = model("attn"), draw(1, 5, D), Cache()
    run(x, cache)
    cache.crop(9)
    assert cache.get_seq_length() == 5
    cache.crop(0)
    torch.testing.assert_close(run(x, cache), run(x), rtol=1e-10, atol=1e-10)


def test_what_cannot_be_cropped():
    """Nothing has changed after the error."""
    for kinds, reason in (
        (("attn", "kda"), "layer 1 holds a recurrent state"),
        (("window",), "the window of layer 0 has left some behind"),
    ):
        run, x, cache = model(*kinds), draw(1, 9, D), Cache()
        run(x, cache)
        before = copy.deepcopy(tensors(cache.state_dict()))
        with pytest.raises(ValueError, match=f"max_length: expected at least 9, .*{reason}.*got 4"):
            cache.crop(4)
        cache.crop(9)
        assert all(map(torch.equal, tensors(cache.state_dict()), before))
        assert cache.get_seq_length(0) == 9


@pytest.mark.parametrize("N", [1, 2])
def test_a_window_keeps_what_it_needs(N):
    """And so does what has been cropped."""
    run, x, cache = model("window", "attn"), draw(N, 9, D), Cache()
    run(x, cache)
    assert [len(cache[i]["attn_state"][0][0]) for i in range(2)] == [4, 9]
    cropped = Cache()
    model("attn")(x, cropped)
    cropped.crop(4)
    for each in (*cache[0]["attn_state"], *cropped[0]["attn_state"]):
        assert each.untyped_storage().nbytes() == N * 4 * D * 8


def test_what_is_not_given_stays():
    cache = Cache()
    given = {
        "recurrent_state": draw(1),
        "conv_state": draw(2),
        "attn_state": (draw(1, 3), draw(1, 3)),
    }
    for name, state in given.items():
        cache.update(**{name: state}, offset=0)
    assert cache.update(offset=0) == cache[0] == given


@pytest.mark.parametrize("padded", [False, True])
def test_saved_and_restored(padded):
    run, x, step, cache = model(*ALL), draw(3, 9, D), draw(3, 1, D, seed=1), Cache()
    mask = LEFT if padded else None
    run(x, cache, mask)
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    again = Cache()
    again.load_state_dict(torch.load(file, weights_only=True))
    assert repr(again) == repr(cache) == "Cache(layers=[0, 1, 2, 3, 4], tokens=9)"
    pairs = zip(tensors([again[i] for i in again]), tensors([cache[i] for i in cache]), strict=True)
    for one, other in pairs:
        assert one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    whole = mask if mask is None else torch.cat([mask, torch.ones(3, 1).long()], 1)
    assert torch.equal(run(step, again, whole), run(step, cache, whole))


@pytest.mark.parametrize("kind", ALL)
def test_another_dtype(kind):
    """What was read in fp32, a model in bf16 goes on from, a token, several or many."""
    run, x = model(kind), draw(2, 80, D)
    expected = run(x)[:, 6:]
    cache = Cache()
    run(x[:, :6], cache)
    for layer in run.layers:
        layer.bfloat16()
    parts = [run(x[:, a:b].bfloat16(), cache) for a, b in ((6, 7), (7, 9), (9, 80))]
    found = torch.cat(parts, 1)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=0.1, rtol=0.1)


def test_dtypes_are_kept():
    layer = KimiDeltaAttention(D, num_heads=2, head_dim=8, layer_idx=0).bfloat16()
    cache = layer(draw(2, 5, D).bfloat16(), use_cache=True)[2]
    assert cache[0]["recurrent_state"].dtype == torch.float32
    assert {each.dtype for each in cache[0]["conv_state"]} == {torch.bfloat16}
    attn = Attention(D, num_heads=2, layer_idx=0).bfloat16()
    cache = attn(draw(2, 5, D).bfloat16(), use_cache=True)[2]
    assert {each.dtype for each in cache[0]["attn_state"]} == {torch.bfloat16}


def test_update_by_hand():
    """A layer of one's own may use it: states replace, keys and values come behind."""
    cache = Cache()
    first, second = draw(2, 3, 4), draw(2, 1, 4, seed=1)
    cache.update(attn_state=(first, first), layer_idx=7, offset=3)
    state = cache.update(attn_state=(second, second), layer_idx=7, offset=1)
    assert torch.equal(state["attn_state"][0], torch.cat([first, second], 1))
    assert cache.get_seq_length() == cache.get_seq_length(7) == 4 and cache.get_seq_length(0) == 0
    cache.update(recurrent_state=first, layer_idx=0, offset=4)
    cache.update(recurrent_state=second, layer_idx=0, offset=1)
    assert cache[0] == {"recurrent_state": second} and cache.get_seq_length() == 5


def test_another_models_cache():
    """One with fewer layers is noticed at the first that is missing, one with more a call later."""
    small, large, x = model("kda"), model("kda", "kda"), draw(1, 4, D)
    cache = Cache()
    small(x, cache)
    with pytest.raises(ValueError, match="past_key_values: expected 1 tokens seen by layer 0"):
        large(x[:, :1], cache)
    cache = Cache()
    large(x, cache)
    small(x[:, :1], cache)
    with pytest.raises(ValueError, match=r"expected 5 tokens seen by layer 1, .* got 4;"):
        small(x[:, :1], cache)


@pytest.mark.parametrize(
    "order, expected, other",
    [((0, 0), 5, 2), ((0, 1, 1), 6, 0), ((0, 1, 2, 2), 6, 0), ((1,), 5, 0), ((0, 2, 1), 4, 2)],
    ids=str,
)
def test_layers_out_of_step(order, expected, other):
    """A layer that is called twice, or out of turn, is noticed before it spoils the next step."""
    run, x, cache = model("kda", "attn", "linear"), draw(1, 4, D), Cache()
    run(x, cache)
    *fitting, last = order
    for layer_idx in fitting:
        run.layers[layer_idx](x[:, :1], None, cache)
    message = f"past_key_values: expected {expected} tokens seen by layer {other}, "
    with pytest.raises(ValueError, match=message):
        run.layers[last](x[:, :1], None, cache)


def test_refusals():
    cache = Cache()
    with pytest.raises(KeyError, match=r"layer 3 has no state here, layers \[\] have one"):
        cache[3]
    with pytest.raises(ValueError, match=r"state_dict: expected what Cache\.state_dict returned"):
        cache.load_state_dict({0: {}})
    with pytest.raises(ValueError, match=r"state_dict: expected what Cache\.state_dict returned"):
        cache.load_state_dict({"layers": {"0": {"seen": 1}}})  # as JSON would bring it back
    with pytest.raises(
        ValueError, match=r"state_dict: expected seen and some of .* for layer 0, go"
    ):
        cache.load_state_dict({"layers": {0: {"seen": 1, "ssm_state": draw(1)}}})


def test_arguments_that_are_none():
    cache = Cache()
    with pytest.raises(TypeError, match="beam_idx: expected a tensor, got list"):
        cache.reorder_cache([1, 0])
    with pytest.raises(ValueError, match=r"beam_idx: expected \[N\], got \[\]"):
        cache.reorder_cache(torch.tensor(1))
    with pytest.raises(TypeError, match=r"beam_idx: expected int32 or int64, got torch\.float32"):
        cache.reorder_cache(torch.ones(2))
    cache.update(recurrent_state=draw(2, 3))
    for rows in ([2, 0], [-1, 0]):
        with pytest.raises(ValueError, match="beam_idx: expected rows from 0 to 1, got"):
            cache.reorder_cache(torch.tensor(rows))
    with pytest.raises(TypeError, match="max_length: expected a whole number, got float"):
        cache.crop(1.5)
