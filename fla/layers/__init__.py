"""Layers that mix tokens, and the cache that they share."""

from fla.layers.attn import Attention
from fla.layers.cache import Cache
from fla.layers.forgetting_attn import ForgettingAttention
from fla.layers.kda import KimiDeltaAttention
from fla.layers.lightning_attn import LightningAttention
from fla.layers.linear_attn import LinearAttention
from fla.layers.simple_gla import SimpleGatedLinearAttention

__all__ = [
    "Attention",
    "Cache",
    "ForgettingAttention",
    "KimiDeltaAttention",
    "LightningAttention",
    "LinearAttention",
    "SimpleGatedLinearAttention",
]
