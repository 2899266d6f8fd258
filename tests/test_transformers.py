"""Real clients: Hugging Face's Kimi-Linear finds the package by itself and runs on it, and its
``generate`` drives a model of the layers."""

from __future__ import annotations

import collections
import inspect

import pytest
import torch

from fla.layers import Attention, Cache, KimiDeltaAttention
from fla.ops.kda import chunk, fused_recurrent
from fla.testing.compare import relative_error

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
OWN = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
LAYERS = 3
DELTA_LAYERS = 2


@pytest.fixture
def model():
    config = modeling.KimiLinearConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        linear_head_dim=16,
        linear_num_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_layer_types=["dense"] * LAYERS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return modeling.KimiLinearForCausalLM(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(97, (2, 80), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    """How often the model reaches our operators."""
    counted: collections.Counter[str] = collections.Counter()
    for face, name in ((chunk, "chunk_kda"), (fused_recurrent, "fused_recurrent_kda")):

        def counting(*operands, name=name, engine=face.delta_engine):
            counted[name] += 1
            return engine(*operands)

        monkeypatch.setattr(face, "delta_engine", counting)
    return counted


@pytest.fixture
def fallback(monkeypatch):
    """Give the model its own PyTorch code, what it runs where no such package is installed."""

    def use():
        for name in OWN:
            monkeypatch.setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))

    return use


def trained(model, tokens):
    """Logits, loss and the gradient of every parameter."""
    model.zero_grad()
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits, "loss": output.loss, **gradients}


def decoded(model, tokens, count):
    """The logits of the last ``count`` tokens, each fed alone after the others."""
    with torch.no_grad():
        output = model(input_ids=tokens[:, :-count], use_cache=True)
        steps = []
        for at in range(-count, 0):
            token = tokens[:, at, None]
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits)
    return torch.cat(steps, 1)


def test_training_agrees_with_its_fallback(model, tokens, calls, fallback):
    found = trained(model, tokens)
    assert calls == {"chunk_kda": DELTA_LAYERS}
    fallback()
    expected = trained(model, tokens)
    assert calls == {"chunk_kda": DELTA_LAYERS}  # it was the other code this time
    assert found.keys() == expected.keys()
    assert any("A_log" in name for name in found) and any("dt_bias" in name for name in found)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-4, name


def test_decoding_agrees_with_its_fallback(model, tokens, calls, fallback):
    found = decoded(model, tokens, count=3)
    assert calls == {"chunk_kda": DELTA_LAYERS, "fused_recurrent_kda": 3 * DELTA_LAYERS}
    whole = model(input_ids=tokens, use_cache=False).logits[:, -3:]
    assert relative_error(found, whole) < 1e-4
    fallback()
    assert relative_error(found, decoded(model, tokens, count=3)) < 1e-4


def test_generation(model, tokens, calls, fallback):
    settings = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(tokens, **settings)
    assert found.shape == (2, 85)
    assert calls == {"chunk_kda": DELTA_LAYERS, "fused_recurrent_kda": 4 * DELTA_LAYERS}
    fallback()
    assert torch.equal(found, model.generate(tokens, **settings))


def test_bf16(model, tokens, calls, fallback):
    """As near to fp32 as its fallback is, give or take what one draw of roundings does."""
    expected = trained(model, tokens)
    model.bfloat16()
    found = trained(model, tokens)
    assert calls == {"chunk_kda": 2 * DELTA_LAYERS}
    assert found["logits"].dtype == torch.bfloat16
    assert decoded(model, tokens, count=2).dtype == torch.bfloat16
    fallback()
    other = trained(model, tokens)
    for name in expected:
        error, usual = (relative_error(x[name], expected[name]) for x in (found, other))
        assert error < 1.5 * usual + 1e-4, name


class Hybrid(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A layer with a recurrent memory and one with keys and values."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(
            [
                KimiDeltaAttention(config.hidden_size, num_heads=2, head_dim=8, layer_idx=0),
                Attention(config.hidden_size, num_heads=2, layer_idx=1),
            ]
        )
        self.post_init()

    def forward(
        self, input_ids, attention_mask=None, past_key_values=None, use_cache=False, **unused
    ):
        if use_cache and past_key_values is None:
            past_key_values = Cache()
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x, attention_mask, past_key_values, use_cache)[0]
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=x @ self.embedding.weight.T, past_key_values=past_key_values
        )

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, use_cache=True, **unused
    ):
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, seen:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
        }

    def _supports_default_dynamic_cache(self):
        return False


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_a_cache(beams):
    """Padded on the left, as one does; the cache makes no difference."""
    torch.manual_seed(0)
    config = transformers.PretrainedConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2)
    model = Hybrid(config).eval()
    tokens, mask = torch.randint(1, 50, (2, 7)), torch.ones(2, 7).long()
    mask[0, :3] = 0
    settings = {
        "attention_mask": mask, "num_beams": beams, "do_sample": False, "max_new_tokens": 6,
        "pad_token_id": 0,
    }  # fmt: skip
    cache = Cache()
    expected = model.generate(tokens, use_cache=False, **settings)
    assert torch.equal(model.generate(tokens, use_cache=True, **settings), expected)
    found = model.generate(tokens, use_cache=True, past_key_values=cache, **settings)
    assert torch.equal(found, expected)
    assert cache.get_seq_length() == 12  # nobody asked for what follows the last
