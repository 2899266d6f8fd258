"""Layers against their equations: outputs and the gradient of every parameter."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from layer_cases import BOUNDS, LAYERS, D, draw, every, layer, trained

from fla.layers import Attention, ForgettingAttention, KimiDeltaAttention
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from fla.testing.compare import relative_error

# The equations, in loops and whole maps


def heads(x, dim):
    return x.unflatten(-1, (-1, dim))


def rms(x, norm):
    return x / (x.square().mean(-1, True) + norm.eps).sqrt() * norm.weight


def projected(layer, x, otherwise):
    """q, k and v, through the convolution if there is one."""
    found = []
    for name in "qkv":
        y = getattr(layer, f"{name}_proj")(x)
        if layer.conv_size:
            conv = getattr(layer, f"{name}_conv1d")
            W = conv.kernel_size[0]
            y = F.pad(y.mT, (W - 1, 0))
            y = F.silu(F.conv1d(y, conv.weight, conv.bias, groups=y.shape[1])).mT
        else:
            y = otherwise(y)
        found.append(heads(y, layer.head_v_dim if name == "v" else layer.head_k_dim))
    return found


def grouped(q, *few):
    return [x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in few]


def linear_reference(layer, x):
    q, k, v = projected(layer, x, lambda y: y)
    q, k = layer.feature_map_q(q), layer.feature_map_k(k)
    k, v = grouped(q, k, v)
    q = q / (q.sum(-1, True) + 1e-4) if layer.norm_q else q
    k = k / (k.sum(-1, True) + 1e-4) if layer.norm_k else k
    weights = torch.einsum("bihd,bjhd->bhij", q, k).tril() * q.shape[-1] ** -0.5
    if layer.normalize:
        weights = weights / (weights.sum(-1, True) + 1e-10)
    o = torch.einsum("bhij,bjhd->bihd", weights, v)
    o = o if isinstance(layer.norm, torch.nn.Identity) else rms(o, layer.norm)
    return layer.o_proj(o.flatten(2))


def gated(layer, norm, x, o, activation):
    g = heads(layer.g_proj(x), layer.head_v_dim)
    return layer.o_proj((rms(o, norm) * activation(g)).flatten(2))


def simple_gla_reference(layer, x):
    q, k, v = projected(layer, x, lambda y: y)
    g = F.logsigmoid(layer.gk_proj(x)) / 16
    o, _ = naive_recurrent_simple_gla(q, *grouped(q, k, v), g)
    norm = layer.g_norm_swish_gate
    return gated(layer, norm, x, o, F.silu if norm.activation == "swish" else torch.sigmoid)


def lightning_reference(layer, x):
    q, k, v = projected(layer, x, F.silu)
    H, still = q.shape[2], 1.0
    if layer.num_layers is not None:
        still = 1 - layer.layer_idx / layer.num_layers
    decay = -8 / H * still * torch.arange(H, dtype=x.dtype)
    o, _ = naive_recurrent_simple_gla(q, k, v, decay.to(q).expand(q.shape[:3]))
    return gated(layer, layer.g_norm, x, o, torch.sigmoid)


def softmax_reference(layer, x):
    q, k, v = (
        heads(projection(x), layer.head_dim)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if not isinstance(layer.q_norm, torch.nn.Identity):
        q, k = rms(q, layer.q_norm), rms(k, layer.k_norm)
    T = x.shape[1]
    position = torch.arange(T)
    if isinstance(layer, Attention):
        c = torch.arange(layer.head_dim // 2)
        angle = position[:, None] * 10000.0 ** (-2 * c.to(x) / layer.head_dim)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]

        def rotate(y):
            y = torch.complex(*y.chunk(2, -1)) * turn
            return torch.cat([y.real, y.imag], -1)

        q, k = rotate(q), rotate(k)
    k, v = grouped(q, k, v)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * layer.head_dim**-0.5
    if isinstance(layer, ForgettingAttention):
        sums = F.logsigmoid(layer.f_proj(x)).cumsum(1).mT  # [B, H, T]
        scores = scores + sums[..., :, None] - sums[..., None, :]
    behind = position[:, None] - position
    seen = (behind >= 0) & (behind < (layer.window_size or T))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    o = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    if getattr(layer, "g_proj", None) is not None:
        o = o * torch.sigmoid(layer.g_proj(x))
    return layer.o_proj(o)


def kda_reference(layer, x):
    q, k, v = projected(layer, x, F.silu)
    q, k = (y / (y.square().sum(-1, True) + 1e-6).sqrt() for y in (q, k))
    down, up = layer.f_proj
    raw = heads(up(down(x)) + layer.dt_bias, layer.head_k_dim)
    rate = layer.A_log.exp()[:, None]
    if layer.lower_bound is None:
        g = -rate * F.softplus(raw, threshold=100)
    else:
        g = layer.lower_bound * torch.sigmoid(rate * raw)
    beta = layer.b_proj(x).sigmoid() * (2 if layer.allow_neg_eigval else 1)
    o, _ = naive_recurrent_kda(q, k, v, g, beta)
    return gated(layer, layer.o_norm, x, o, torch.sigmoid)


REFERENCES = {
    "linear": linear_reference,
    "simple_gla": simple_gla_reference,
    "lightning": lightning_reference,
    "fox": softmax_reference,
    "attn": softmax_reference,
    "kda": kda_reference,
}


@every
@pytest.mark.parametrize("T", [1, 70])
def test_output_and_gradients(name, T):
    """In fp64, where the order of sums is all that differs."""
    made, x = layer(name, train=True), draw(2, T, D)
    reference = REFERENCES[name.split(",")[0]]
    found = trained(lambda x: made(x)[0], made, x)
    expected = trained(lambda x: reference(made, x), made, x)
    for key, value in expected.items():
        assert relative_error(found[key], value) < BOUNDS[torch.float64], key


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(name, dtype):
    made, x = layer(name, dtype, train=True), draw(2, 70, D, dtype=dtype)
    found = trained(lambda x: made(x)[0], made, x)
    made = made.double()
    expected = trained(lambda x: made(x)[0], made, x.double())
    for key, value in found.items():
        assert value.dtype == dtype and value.isfinite().all(), key
    assert relative_error(found["o"], expected["o"]) < BOUNDS[dtype]


@every
def test_autocast(name):
    """Projections in bf16, parameters in fp32."""
    made, x = layer(name, torch.float32, train=True), draw(2, 20, D, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = trained(lambda x: made(x)[0], made, x)
    assert relative_error(found["o"], made(x)[0]) < 2 * BOUNDS[torch.bfloat16]
    assert all(found[key].dtype == torch.float32 for key, _ in made.named_parameters())


def test_sums_in_fp32_under_autocast():
    """As on a GPU."""
    made, x = layer("linear, normalised", torch.float32), draw(2, 20, D, dtype=torch.float32)

    def wide(x, *dims, **more):
        return total(x.float(), *dims, **more)

    total = torch.Tensor.sum
    with torch.autocast("cpu", torch.bfloat16), mock.patch.object(torch.Tensor, "sum", wide):
        o, _, _ = made(x)
    assert relative_error(o, made(x)[0]) < 2 * BOUNDS[torch.bfloat16]


@every
def test_parameters_survive_a_round_trip(name):
    made = layer(name, torch.float32)
    again = LAYERS[name](1).eval()
    again.load_state_dict(made.state_dict())
    x = draw(1, 7, D, dtype=torch.float32)
    assert torch.equal(made(x)[0], again(x)[0])


# Kimi Linear's own


def test_parameters_of_a_checkpoint():
    """The layer with the weights of Hugging Face's Kimi-Linear is that model's layer."""
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    config = modeling.KimiLinearConfig(
        hidden_size=32, linear_head_dim=8, linear_num_heads=4, layer_types=["linear_attention"],
        mlp_layer_types=["dense"], num_hidden_layers=1, vocab_size=7, intermediate_size=8,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = modeling.KimiLinearForCausalLM(config).model.layers[0].self_attn
    weights = theirs.state_dict()
    weights["forget_gate.A_log"].uniform_(-1, 1)
    weights["forget_gate.dt_bias"].uniform_(-1, 1)
    ours = KimiDeltaAttention(hidden_size=32, head_dim=8, num_heads=4, norm_eps=config.rms_norm_eps)
    q, k, v = weights["conv1d.weight"].chunk(3)
    renamed = {
        "q_conv1d.weight": q,
        "k_conv1d.weight": k,
        "v_conv1d.weight": v,
        "A_log": weights["forget_gate.A_log"].flatten(),
        "dt_bias": weights["forget_gate.dt_bias"],
        "f_proj.0.weight": weights["forget_gate.f_a_proj.weight"],
        "f_proj.1.weight": weights["forget_gate.f_b_proj.weight"],
        "g_proj.0.weight": weights["g_a_proj.weight"],
        "g_proj.1.weight": weights["g_b_proj.weight"],
        "g_proj.1.bias": torch.zeros(32),
    }
    for name in ("q_proj", "k_proj", "v_proj", "b_proj", "o_norm", "o_proj"):
        renamed[f"{name}.weight"] = weights[f"{name}.weight"]
    ours.load_state_dict(renamed)
    x = draw(2, 70, 32, dtype=torch.float32)
    expected = theirs(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert relative_error(ours(x)[0], expected) < 1e-5


def test_a_new_layer_forgets_slowly():
    made = KimiDeltaAttention(hidden_size=D, num_heads=4, head_dim=64)
    rates, steps = made.A_log.exp(), F.softplus(made.dt_bias)
    assert rates.min() >= 1 and rates.max() <= 16
    assert steps.min() >= 0.99e-3 and steps.max() <= 0.101
    assert steps.log().std() > 0.5 * math.log(100) / math.sqrt(12)
