"""Forgetting attention: softmax attention with a gate."""

from fla.ops.forgetting_attn.naive import naive_forgetting_attn
from fla.ops.forgetting_attn.parallel import parallel_forgetting_attn

__all__ = ["naive_forgetting_attn", "parallel_forgetting_attn"]
