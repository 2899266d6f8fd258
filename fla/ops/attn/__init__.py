"""Softmax attention."""

from fla.ops.attn.decoding import attn_decoding_one_step
from fla.ops.attn.naive import naive_parallel_attn
from fla.ops.attn.parallel import parallel_attn

__all__ = ["attn_decoding_one_step", "naive_parallel_attn", "parallel_attn"]
