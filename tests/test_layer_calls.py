"""What holds for every layer: padded, packed, split, decoded, compiled; and what is refused."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from layer_cases import BOUNDS, LAYERS, D, draw, every, layer, trained
from torch.utils.checkpoint import checkpoint

from fla.layers import (
    Attention,
    Cache,
    KimiDeltaAttention,
    LightningAttention,
    LinearAttention,
    SimpleGatedLinearAttention,
)
from fla.modules import RotaryEmbedding, ShortConvolution
from fla.testing.compare import relative_error

T = 80  # tokens of a row
LENGTHS = (T, 13, 0, 71)
SPLITS = ((0, 66), (66, 67), (67, 68), (68, 68), (68, 75), (75, T))


def masks():
    """Which tokens of a padded batch are real: padding left, right, in the middle."""
    column = torch.arange(T)
    lengths = torch.tensor(LENGTHS)[:, None]
    middle = (column < lengths // 2) | (column >= T - (lengths - lengths // 2))
    return {"left": column >= T - lengths, "right": column < lengths, "middle": middle}


def alone(made, x, mask):
    """Each row's tokens by themselves, and zeros where there are none."""
    o = torch.zeros_like(x)
    for row, there in enumerate(mask):
        if there.any():
            o[row, there] = made(x[row, there][None])[0][0]
    return o


def decoded(made, x, mask=None, whole_mask=True):
    """The outputs of a split run."""
    cache, outputs = Cache(), []
    for start, stop in SPLITS:
        part = None if mask is None else mask[:, 0 if whole_mask else start : stop]
        o, none, same = made(x[:, start:stop], part, cache, use_cache=True)
        assert none is None and same is cache and cache.get_seq_length(made.layer_idx) == stop
        outputs.append(o)
    return torch.cat(outputs, 1)


@every
@torch.no_grad()
def test_a_split_run_is_the_whole_run(name):
    made, x = layer(name), draw(2, T, D)
    whole = made(x)[0]
    torch.testing.assert_close(decoded(made, x), whole, rtol=1e-10, atol=1e-10)
    one_by_one, cache = [], None
    for t in range(12):
        o, _, cache = made(x[:, t : t + 1], past_key_values=cache, use_cache=True)
        one_by_one.append(o)
    torch.testing.assert_close(torch.cat(one_by_one, 1), whole[:, :12], rtol=1e-10, atol=1e-10)


@every
@pytest.mark.parametrize("side", masks())
@torch.no_grad()
def test_padding(name, side):
    """Whatever stands there, whole and split."""
    made, x, mask = layer(name), draw(len(LENGTHS), T, D), masks()[side]
    expected = alone(made, x, mask)
    x = x.masked_fill(~mask[..., None], torch.nan)
    for given in (mask, mask.long(), mask.float()):
        torch.testing.assert_close(made(x, given)[0], expected, rtol=1e-10, atol=1e-10)
    for whole_mask in (True, False):
        found = decoded(made, x, mask, whole_mask)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every
@torch.no_grad()
def test_a_mask_of_ones_is_no_mask(name):
    made, x = layer(name), draw(2, 9, D)
    assert torch.equal(made(x, torch.ones(2, 9))[0], made(x)[0])


@every
@torch.no_grad()
def test_padding_after_none(name):
    """Rows may end at different steps, and windows move on."""
    made, x = layer(name), draw(2, 30, D)
    mask = torch.ones(2, 30).long()
    mask[1, 22:27] = 0
    expected, cache = alone(made, x, mask.bool()), None
    outputs = []
    for start, stop in ((0, 20), (20, 21), (21, 24), (24, 25), (25, 29), (29, 30)):
        o, _, cache = made(x[:, start:stop], mask[:, :stop], cache, use_cache=True)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-10)


@every
def test_packed(name):
    """Documents do not see each other, in outputs and in gradients, and decoding goes on."""
    made = layer(name)
    bounds = [0, *itertools.accumulate((5, 0, 70, 2))]
    x = draw(1, bounds[-1], D).requires_grad_()
    cu_seqlens = torch.tensor(bounds)
    found, _, cache = made(x, cu_seqlens=cu_seqlens, use_cache=True)
    spans = list(itertools.pairwise(bounds))
    expected = torch.cat([made(x[:, start:stop])[0] for start, stop in spans], 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = (torch.autograd.grad(o.square().sum(), x)[0] for o in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        step = draw(len(spans), 1, D, seed=3)
        next_o, _, _ = made(step, past_key_values=cache)
        for n, (start, stop) in enumerate(spans):
            o, _, _ = made(torch.cat([x[:, start:stop], step[n : n + 1]], 1))
            torch.testing.assert_close(next_o[n, 0], o[0, -1], rtol=1e-10, atol=1e-10)


@every
def test_gradients_through_a_cache(name):
    """Truncation is the caller's choice: a split run has the gradients of the whole."""
    made = layer(name, train=True)

    def split(x):
        first, _, cache = made(x[:, :9], use_cache=True)
        second, _, cache = made(x[:, 9:10], past_key_values=cache)
        third, _, _ = made(x[:, 10:], past_key_values=cache)
        return torch.cat([first, second, third], 1)

    x = draw(2, 14, D)
    found, expected = trained(split, made, x), trained(lambda x: made(x)[0], made, x)
    for key, value in expected.items():
        assert relative_error(found[key], value) < BOUNDS[torch.float64], key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@every
@torch.no_grad()
def test_a_cache_in_another_dtype(name, dtype):
    """Stored in fewer digits, or in more, it goes on whatever form is taken."""
    made, x = layer(name, torch.float32, layer_idx=0), draw(2, T, D).float()
    expected = made(x)[0][:, 9:]
    kept = made(x[:, :9], use_cache=True)[2].state_dict()["layers"][0]
    for last in (10, T):
        cache = Cache()
        cache.load_state_dict({"layers": {0: in_dtype(kept, dtype)}})
        found = made(x[:, 9:last], past_key_values=cache)[0]
        assert relative_error(found, expected[:, : last - 9]) < 2e-2


def in_dtype(state, dtype):
    if isinstance(state, dict):
        return {kind: in_dtype(each, dtype) for kind, each in state.items()}
    if isinstance(state, tuple):
        return tuple(in_dtype(each, dtype) for each in state)
    return state.to(dtype) if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "name, compiled", [*((name, False) for name in LAYERS), ("kda", True), ("attn", True)]
)
def test_a_cache_is_not_gone_on_from_twice(name, compiled, reentrant):
    """To compute tokens again where a backward pass wants them would begin at their own end."""
    torch._dynamo.reset()
    made, x = layer(name, layer_idx=0), draw(2, 9, D)
    cache = made(x[:, :4], use_cache=True)[2]

    def run(y):
        return made(y, past_key_values=cache)[0]

    run = torch.compile(run, backend="aot_eager") if compiled else run
    o = checkpoint(run, x[:, 4:].requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="past_key_values: expected None where a backward pass"):
        o.sum().backward()
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("name", ["attn", "attn, window", "fox"])
def test_gradients_past_a_query_that_has_none(name):
    made = layer(name, train=True)
    made.q_proj.requires_grad_(False)
    x = draw(2, 6, D)

    def split(x):
        _, _, cache = made(x[:, :5], use_cache=True)
        return made(x[:, 5:], past_key_values=cache)[0]

    weights = [each for each in made.parameters() if each.requires_grad]
    found, expected = (torch.autograd.grad(o.sum(), weights) for o in (split(x), made(x)[0][:, 5:]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@every
@torch.no_grad()
def test_no_tokens(name):
    made = layer(name)
    assert made(draw(2, 0, D))[0].shape == (2, 0, D)
    assert made(draw(0, 3, D))[0].shape == (0, 3, D)


@pytest.mark.parametrize("name", [name for name in LAYERS if "," not in name])
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    made = layer(name, torch.float32)

    def run(x):
        return made(x, use_cache=True)[0]

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    x = draw(2, 5, D, dtype=torch.float32)
    torch.testing.assert_close(compiled(x), run(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if "," not in name])
def test_any_length_exports_as_one_graph(name):
    made, (few, many) = layer(name), (draw(2, T, D) for T in (5, 70))
    sizes = {1: torch.export.Dim("T", min=2, max=1 << 20)}
    exported = torch.export.export(made, (few,), dynamic_shapes=(sizes,), strict=False)
    for x in (few, many):
        torch.testing.assert_close(exported.module()(x)[0], made(x)[0], rtol=1e-10, atol=1e-10)


def test_any_number_of_packed_sequences_exports_as_one_graph():
    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.made = layer("attn")

        def forward(self, x, cu_seqlens):
            return self.made(x, cu_seqlens=cu_seqlens)[0]

    model = Packed()
    T, N = torch.export.Dim("T", min=2, max=1 << 20), torch.export.Dim("N", min=2, max=1 << 10)
    many, one = (draw(1, 9, D), torch.tensor([0, 3, 3, 9])), (draw(1, 5, D), torch.tensor([0, 5]))
    exported = torch.export.export(model, many, dynamic_shapes=({1: T}, {0: N}))
    for call in (many, one):
        torch.testing.assert_close(exported.module()(*call), model(*call), rtol=1e-10, atol=1e-10)


# What does not fit


def refusals():
    made, window = layer("kda", layer_idx=0), layer("attn, window", layer_idx=0)
    stateless = layer("kda", layer_idx=None)
    x, mask = draw(2, 5, D), torch.ones(2, 5)
    seen = made(x, use_cache=True)[2]
    keys = window(x, use_cache=True)[2]
    other = KimiDeltaAttention(hidden_size=D, num_heads=4, head_dim=8, layer_idx=0).double()
    deeper = layer("kda", layer_idx=1)
    later = made(x[:, :3], past_key_values=made(x, use_cache=True)[2])[2]
    bounds = torch.tensor([0, 5])
    made_of = {"hidden_size": 24, "num_heads": 2}
    return [
        ("hidden_states: expected [B, T, 24], got [2, 5, 20]", lambda: made(x[..., :20])),
        ("hidden_states: expected [B, T, 24], got [5, 24]", lambda: made(x[0])),
        ("attention_mask: expected [2, 5], got [2, 4]", lambda: made(x, mask[:, :4])),
        ("attention_mask: expected [2, 5], got [2, 1, 5]", lambda: made(x, mask[:, None])),
        (
            "attention_mask: expected [2, 5] or [2, 10], got [2, 7]",
            lambda: made(x, torch.ones(2, 7), seen),
        ),
        (
            "attention_mask: expected 1 where a token is and 0 elsewhere, got other values",
            lambda: made(x, mask * -1e9),
        ),
        (
            "attention_mask: expected None with cu_seqlens, got a tensor",
            lambda: made(x[:1], mask[:1], cu_seqlens=bounds),
        ),
        (
            "hidden_states: expected a batch of 1 with cu_seqlens, got 2",
            lambda: made(x, cu_seqlens=bounds),
        ),
        (
            "cu_seqlens: expected to end at T = 5, got 4",
            lambda: window(x[:1], cu_seqlens=bounds.clamp(max=4), use_cache=True),
        ),
        (
            "layer_idx: expected a number for a KimiDeltaAttention with a cache, got None",
            lambda: stateless(x, use_cache=True),
        ),
        (
            "past_key_values: expected layer 0's recurrent_state for 2 sequences to be "
            "[2, 4, 8, 8], got [2, 2, 8, 8]",
            lambda: other(x, past_key_values=seen),
        ),
        (
            "past_key_values: expected layer 0's recurrent_state for 1 sequences to be "
            "[1, 2, 8, 8], got [2, 2, 8, 8]",
            lambda: made(x[:1], past_key_values=seen),
        ),
        (
            "past_key_values: expected layer 0's attn_state, got recurrent_state and conv_state",
            lambda: window(x, past_key_values=seen),
        ),
        (
            "past_key_values: expected layer 0's recurrent_state and conv_state, got attn_state",
            lambda: made(x, past_key_values=keys),
        ),
        (
            "past_key_values: expected 3 tokens seen by layer 0, beside 0 by layer 1, got 8; "
            "a cache is of one model and grows layer by layer",
            lambda: deeper(x[:, :3], past_key_values=later),
        ),
        ("output_attentions: expected False", lambda: made(x, output_attentions=True)),
        (
            "num_v_heads: expected a multiple of num_heads = 2, got 3",
            lambda: KimiDeltaAttention(num_heads=2, num_v_heads=3),
        ),
        (
            "num_v_heads: expected a multiple of num_heads = 2, got 0",
            lambda: KimiDeltaAttention(num_heads=2, num_v_heads=0),
        ),
        (
            "head_dim * expand_v: expected a whole number of channels, got 10.4",
            lambda: KimiDeltaAttention(**made_of, head_dim=8, expand_v=1.3),
        ),
        (
            "hidden_size * expand_k: expected a whole number of channels, got 0",
            lambda: LinearAttention(**made_of, expand_k=0),
        ),
        (
            "kernel_size: expected at least 1, got 0",
            lambda: KimiDeltaAttention(**made_of, conv_size=0),
        ),
        (
            "window_size: expected None or at least 0, got -1",
            lambda: Attention(**made_of, window_size=-1),
        ),
        (
            "hidden_size: expected at least 1, got 0",
            lambda: KimiDeltaAttention(hidden_size=0),
        ),
        (
            "attention_mask: expected the device of hidden_states, cpu, got meta",
            lambda: made(x, mask.to("meta")),
        ),
        (
            "mode: expected one of chunk, fused_recurrent, got parallel",
            lambda: KimiDeltaAttention(mode="parallel"),
        ),
        (
            "lower_bound: expected [-5, 0) with safe_gate, got None",
            lambda: KimiDeltaAttention(safe_gate=True),
        ),
        (
            "hidden_size / num_heads: expected a head of 1 to 256 channels, got 512",
            lambda: Attention(hidden_size=1024, num_heads=2),
        ),
        (
            "hidden_size / num_heads: expected an even number of channels with rope_theta, got 3",
            lambda: Attention(hidden_size=24, num_heads=8),
        ),
        (
            "state_dict: expected what Cache.state_dict returned, got something else",
            lambda: Cache().load_state_dict({"layers": [1]}),
        ),
        (
            "hidden_size * expand_v / num_heads: expected a head of 1 to 512 channels, got 513",
            lambda: LinearAttention(hidden_size=1026, num_heads=4, expand_k=2 / 3, expand_v=2),
        ),
        (
            "head_dim * expand_v: expected a head of 1 to 512 channels, got 514",
            lambda: KimiDeltaAttention(**made_of, head_dim=256, expand_v=514 / 256),
        ),
        (
            "head_dim: expected a head of 1 to 256 channels, got 257",
            lambda: KimiDeltaAttention(hidden_size=24, num_heads=2, head_dim=257),
        ),
        (
            "hidden_size: expected a multiple of num_heads = 3, got 8",
            lambda: Attention(hidden_size=8, num_heads=3),
        ),
        (
            "hidden_size * expand_k: expected a multiple of num_heads = 4, got 10",
            lambda: LinearAttention(hidden_size=20, num_heads=4, expand_k=0.5),
        ),
        (
            "feature_map: expected one of elementwise_product, elu, relu, identity, got cos",
            lambda: LinearAttention(feature_map="cos"),
        ),
        (
            "layer_idx: expected 0 <= layer_idx < num_layers = 4, got 4",
            lambda: LightningAttention(layer_idx=4, num_layers=4),
        ),
    ]


def test_refusals():
    for message, call in refusals():
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(message)


def test_refusals_of_types():
    made = layer("kda")
    x = draw(2, 5, D)
    with pytest.raises(TypeError, match="cu_seqlen: KimiDeltaAttention has no such argument"):
        made(x, cu_seqlen=None)
    with pytest.raises(TypeError, match=r"past_key_values: expected a fla\.layers\.Cache, got tup"):
        made(x, past_key_values=())
    with pytest.raises(TypeError, match="attention_mask: expected a tensor, got list"):
        made(x, [[1]])
    with pytest.raises(TypeError, match="hidden_states: expected a tensor, got list"):
        made([[1]])
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        KimiDeltaAttention(head_size=3)


@pytest.mark.parametrize(
    "name, make, value",
    [
        ("num_heads", Attention, 2.0),
        ("num_kv_heads", SimpleGatedLinearAttention, 2.0),
        ("hidden_size", LinearAttention, "24"),
        ("window_size", Attention, 4.0),
        ("head_dim", KimiDeltaAttention, 8.0),
        ("hidden_size", KimiDeltaAttention, 32.0),
        ("layer_idx", KimiDeltaAttention, "0"),
        ("conv_size", KimiDeltaAttention, None),
        ("conv_size", SimpleGatedLinearAttention, None),
        ("conv_size", functools.partial(LightningAttention, use_short_conv=True), None),
        ("kernel_size", functools.partial(ShortConvolution, 8), 4.0),
        ("dim", RotaryEmbedding, 4.0),
    ],
)
def test_sizes_are_whole_numbers(name, make, value):
    expected = f"{name}: expected a whole number, got {type(value).__name__}"
    with pytest.raises(TypeError, match=expected):
        make(**{name: value})


def test_factors_of_sizes_are_numbers():
    with pytest.raises(TypeError, match="expand_k: expected a number, got NoneType"):
        LinearAttention(expand_k=None)
    with pytest.raises(TypeError, match="lower_bound: expected a number, got str"):
        KimiDeltaAttention(lower_bound="-5", safe_gate=True)


def test_a_refused_call_leaves_the_cache_alone():
    made, other = layer("kda", layer_idx=0), layer("attn", layer_idx=0)
    x = draw(2, 5, D)
    cache = made(x, use_cache=True)[2]
    before = {kind: each for kind, each in cache[0].items()}
    with pytest.raises(ValueError):
        other(x, past_key_values=cache)
    assert cache[0] == before and cache.get_seq_length() == 5
