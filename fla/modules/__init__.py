"""What layers are built of: norms, short convolutions, rotary positions."""

from fla.modules.convolution import ShortConvolution
from fla.modules.fused_norm_gate import FusedRMSNormGated
from fla.modules.l2norm import L2Norm, l2_norm, l2norm
from fla.modules.layernorm import RMSNorm
from fla.modules.rotary import RotaryEmbedding

__all__ = [
    "FusedRMSNormGated",
    "L2Norm",
    "RMSNorm",
    "RotaryEmbedding",
    "ShortConvolution",
    "l2_norm",
    "l2norm",
]
