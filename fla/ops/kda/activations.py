"""What the kernels make of raw gates and betas: log-decays and betas, and their adjoints.

Log-decays are in units of log 2, so that a decay is ``exp2`` of a sum of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.common.kernels import LOG2E

L2NORM_EPS = tl.constexpr(1e-6)
# no decay survives this; it keeps −inf out of sums that are taken as products with 0 and 1
STEEPEST = tl.constexpr(-1e30)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), right for small results too."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    series = e * (1 - e * (0.5 - e * (0.3333333 - e * 0.25)))
    return tl.maximum(x, 0.0) + tl.where(e < 0.01, series, tl.log2(1 + e) / LOG2E)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(−x)), without a division, which takes four times as many instructions."""
    y = 1 + tl.exp2(-x * LOG2E)
    return tl.rsqrt(y * y)


@triton.jit
def log_decay(x, rate, lower_bound, GATE: tl.constexpr):
    """Log-decays in units of log 2 from x, the raw gate with its bias.

    −rate softplus(x), or with ``lower_bound`` lower_bound sigmoid(rate x); without a gate, x.
    """
    if GATE:
        if lower_bound is None:
            x = -rate * softplus(x)
        else:
            x = lower_bound * sigmoid(rate * x)
    return tl.maximum(x * LOG2E, STEEPEST)


@triton.jit
def log_decay_backward(x, dg, rate, lower_bound):
    """From the gradient of the (natural) log-decay: that of x and that of log rate."""
    if lower_bound is None:
        dx = -dg * rate * sigmoid(x)
        drate = dg * tl.maximum(-rate * softplus(x), STEEPEST)
    else:
        # what is shut over what is open: 1 less this one has no digits left where the gate is open
        ratio = tl.exp2(tl.minimum(-rate * x * LOG2E, 60.0))
        opened = tl.rsqrt((1 + ratio) * (1 + ratio))
        dangle = dg * lower_bound * opened * (ratio * opened)
        dx = dangle * rate
        drate = dangle * rate * x
    return dx, drate


@triton.jit
def beta_of(x, SIGMOID: tl.constexpr, RANGE: tl.constexpr):
    """beta, or ``RANGE`` times the sigmoid of its logits."""
    if SIGMOID:
        x = sigmoid(x) * RANGE
    return x


@triton.jit
def beta_backward(x, dbeta, SIGMOID: tl.constexpr, RANGE: tl.constexpr):
    if SIGMOID:
        dbeta = dbeta * sigmoid(x) * sigmoid(-x) * RANGE
    return dbeta
