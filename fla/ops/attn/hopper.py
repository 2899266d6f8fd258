"""The softmax engine on Hopper; what its kernels do not take, Triton does."""

from fla.ops.attn import hopper_backward
from fla.ops.attn import triton as portable
from fla.ops.attn.hopper_forward import forward
from fla.ops.common.device import verified

__all__ = ["backward", "forward"]


def backward(*arguments):
    """Return the gradients of q, k, v, g and the sink."""
    stage = hopper_backward if verified("softmax backward") else portable
    return stage.backward(*arguments)
