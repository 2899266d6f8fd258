"""The layers that tests run, in configurations that between them use every argument."""

from __future__ import annotations

import pytest
import torch

from fla.layers import (
    Attention,
    ForgettingAttention,
    KimiDeltaAttention,
    LightningAttention,
    LinearAttention,
    SimpleGatedLinearAttention,
)

D = 24  # channels of hidden states
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}
LAYERS = {
    "linear": lambda i: LinearAttention(hidden_size=D, num_heads=4, num_kv_heads=2, layer_idx=i),
    "linear, normalised": lambda i: LinearAttention(
        mode="fused_chunk",
        hidden_size=D,
        num_heads=2,
        feature_map="elu",
        norm_q=True,
        norm_k=True,
        do_feature_map_norm=True,
        output_norm="identity",
        layer_idx=i,
    ),
    "simple_gla": lambda i: SimpleGatedLinearAttention(
        hidden_size=D, expand_k=0.5, expand_v=2, num_heads=4, num_kv_heads=2, layer_idx=i
    ),
    "simple_gla, bare": lambda i: SimpleGatedLinearAttention(
        mode="fused_recurrent",
        hidden_size=D,
        num_heads=3,
        use_short_conv=False,
        gate_fn="sigmoid",
        layer_idx=i,
    ),
    "lightning": lambda i: LightningAttention(
        hidden_size=D, num_heads=3, layer_idx=i, num_layers=4
    ),
    "lightning, convolution": lambda i: LightningAttention(
        hidden_size=D, num_heads=3, use_short_conv=True, conv_size=3, conv_bias=True, layer_idx=i
    ),
    "fox": lambda i: ForgettingAttention(hidden_size=D, num_heads=3, layer_idx=i),
    "fox, pro": lambda i: ForgettingAttention(
        hidden_size=D,
        num_heads=4,
        num_kv_heads=2,
        qkv_bias=True,
        qk_norm=True,
        window_size=9,
        use_output_gate=True,
        layer_idx=i,
    ),
    "attn": lambda i: Attention(hidden_size=D, num_heads=3, layer_idx=i),
    "attn, window": lambda i: Attention(
        hidden_size=D, num_heads=4, num_kv_heads=2, qk_norm=True, window_size=7, layer_idx=i
    ),
    "kda": lambda i: KimiDeltaAttention(hidden_size=D, num_heads=2, head_dim=8, layer_idx=i),
    "kda, everything": lambda i: KimiDeltaAttention(
        hidden_size=D,
        expand_v=2,
        head_dim=6,
        num_heads=2,
        num_v_heads=4,
        mode="fused_recurrent",
        allow_neg_eigval=True,
        safe_gate=True,
        lower_bound=-5.0,
        conv_bias=True,
        layer_idx=i,
    ),
    "kda, bare": lambda i: KimiDeltaAttention(
        hidden_size=D, num_heads=2, head_dim=8, use_short_conv=False, layer_idx=i
    ),
}
every = pytest.mark.parametrize("name", LAYERS)


def layer(name, dtype=torch.float64, layer_idx=1, train=False):
    torch.manual_seed(0)
    made = LAYERS[name](layer_idx).to(dtype).train(train)
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms that do something
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def draw(*size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def trained(run, made, x):
    """The output and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    o = run(x)
    leaves = [x, *made.parameters()]
    gradients = torch.autograd.grad((o * draw(*o.shape, seed=5).to(o)).sum(), leaves)
    names = ["dx", *(name for name, _ in made.named_parameters())]
    return {"o": o.detach(), **dict(zip(names, gradients, strict=True))}
