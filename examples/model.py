"""A language model over bytes, of any mixer in ``fla.layers``.

model = LanguageModel(Config(mixer="kda"))
logits = model(tokens)                          # [B, T] → [B, T, 256]
logits = model(packed, cu_seqlens=cu_seqlens)   # documents behind one another, [1, T]

cache = Cache()                                 # the state, for any number of tokens
logits = model(prompt, cache=cache)
logits = model(next_token, cache=cache)         # [B, 1]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from fla.layers import (
    Attention,
    Cache,
    ForgettingAttention,
    KimiDeltaAttention,
    LightningAttention,
    LinearAttention,
    SimpleGatedLinearAttention,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a model is made of; a checkpoint fits a model of the same configuration."""

    mixer: str = "kda"
    width: int = 128
    layers: int = 2
    heads: int = 2
    short_conv: bool = True  # before the memories that have one
    vocabulary: int = 256  # bytes; 0 stands where a document begins and ends

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer: expected one of {', '.join(MIXERS)}, got {self.mixer}")
        for name in ("width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of {self.heads} heads, got {self.width}")


def kda(config: Config, layer_idx: int) -> nn.Module:
    return KimiDeltaAttention(
        hidden_size=config.width,
        head_dim=config.width // config.heads,
        num_heads=config.heads,
        use_short_conv=config.short_conv,
        layer_idx=layer_idx,
    )


def simple_gla(config: Config, layer_idx: int) -> nn.Module:
    return SimpleGatedLinearAttention(
        hidden_size=config.width,
        num_heads=config.heads,
        use_short_conv=config.short_conv,
        layer_idx=layer_idx,
    )


def lightning(config: Config, layer_idx: int) -> nn.Module:
    return LightningAttention(
        hidden_size=config.width,
        num_heads=config.heads,
        use_short_conv=config.short_conv,
        layer_idx=layer_idx,
        num_layers=config.layers,
    )


def linear(config: Config, layer_idx: int) -> nn.Module:
    """As first proposed: features elu + 1, and weights that sum to one."""
    return LinearAttention(
        hidden_size=config.width,
        num_heads=config.heads,
        feature_map="elu",
        do_feature_map_norm=True,
        output_norm="identity",
        layer_idx=layer_idx,
    )


def fox(config: Config, layer_idx: int) -> nn.Module:
    return ForgettingAttention(
        hidden_size=config.width, num_heads=config.heads, layer_idx=layer_idx
    )


def attn(config: Config, layer_idx: int) -> nn.Module:
    return Attention(hidden_size=config.width, num_heads=config.heads, layer_idx=layer_idx)


MIXERS: dict[str, Callable[[Config, int], nn.Module]] = {
    mixer.__name__: mixer for mixer in (kda, lightning, simple_gla, linear, fox, attn)
}


class Block(nn.Module):
    """Mix tokens, then channels; each after a norm and added to what came in."""

    def __init__(self, config: Config, layer_idx: int):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width)
        self.mixer = MIXERS[config.mixer](config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = GatedMLP(config.width, 2 * config.width)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, cache: Cache | None) -> Tensor:
        mixed, _, _ = self.mixer(
            self.mixer_norm(x),
            past_key_values=cache,
            use_cache=cache is not None,
            cu_seqlens=cu_seqlens,
        )
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x))


class GatedMLP(nn.Module):
    """``W_down (silu(W_gate x) ∘ W_up x)``."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Blocks(nn.Module):
    """The blocks of a model and the norm behind them: ``[B, T, D]`` in and out."""

    def __init__(self, config: Config):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.width)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        for block in self.blocks:
            x = block(x, cu_seqlens, cache)
        return self.norm(x)


class LanguageModel(nn.Module):
    """Tokens to logits; one matrix is embedding and head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)  # logits of size 1
        self.body = Blocks(config)

    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        x = self.body(self.embedding(tokens), cu_seqlens, cache)
        return F.linear(x, self.embedding.weight)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
