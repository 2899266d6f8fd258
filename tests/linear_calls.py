"""Calls of the linear engine's kernels that meet every line of their launch tables."""

import torch

from fla.ops.simple_gla import triton as kernels
from fla.ops.simple_gla.engine import Options

# Sizes K, V by dtype: every line alone, sizes that are no power of two, and several blocks of both.
SIZES = {
    torch.bfloat16: ((64, 64), (128, 128), (64, 128), (128, 64), (256, 256), (40, 72), (300, 130)),
    torch.float16: ((64, 64), (96, 130)),
    torch.float32: ((64, 64), (40, 72), (130, 96)),
}
# The conditions under which kernels differ, each with and without each other.
CALLS = (
    {"gate": "token"},
    {"gate": "token", "packed": True},
    {"gate": "head", "packed": True},
    {"gate": None},
    {"gate": None, "normalize": True},
)


def call(dtype, K, V, gate=None, packed=False, normalize=False, T=130, H=2):
    """Forward and backward, on tensors of zeros that are there to be launched with."""
    q, k, v = (torch.zeros(1, T, H, size, dtype=dtype) for size in (K, K, V))
    g = torch.zeros(1, T, H) if gate == "token" else None
    g_gamma = torch.zeros(H) if gate == "head" else None
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    options = Options(1.0, normalize=normalize)
    o, _, _, norm = kernels.forward(q, k, v, g, g_gamma, None, None, cu_seqlens, options)
    kernels.backward(
        v, None, None, q, k, v, g, g_gamma, None, None, cu_seqlens, o, norm, options
    )  # fmt: skip
