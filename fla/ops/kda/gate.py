"""The decay of Kimi Delta Attention, computed from what a model's gate puts out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.ops.common import contract
from fla.ops.common.boundary import Operator, absent, differentiable
from fla.ops.common.device import lacks_triton
from fla.ops.common.dispatch import Engine, Implementation


class Options(NamedTuple):
    """What a call wants beside its tensors."""

    lower_bound: float | None
    output_dtype: torch.dtype


@contract.public
def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-decays from raw gates, the ones that ``use_gate_in_kernel`` computes.

        −exp(A_log) softplus(g + dt_bias)                without ``lower_bound``
        lower_bound sigmoid(exp(A_log) (g + dt_bias))    with it

    Args:
        g: raw gates ``[..., HV, K]``, any float dtype.
        A_log: log of each head's rate, HV elements in any shape; with ``lower_bound`` it may be
            left out, the rate is 1 then.
        dt_bias: added to ``g``, HV · K elements in any shape.
        lower_bound: selects the second formula, whose decays lie between it and 0.
        output_dtype: dtype of the result; the arithmetic is fp32, fp64 for fp64 gates.
    """
    leading = [f"D{i}" for i in range(g.dim() - 2)] if isinstance(g, Tensor) else []
    sizes = contract.operands(g=(g, " ".join([*leading, "HV", "K"])))
    lower_bound = bound(lower_bound)
    parameters = gate_parameters(sizes, A_log, dt_bias, lower_bound)
    contract.operands(sizes, ("g", g), **parameters)
    contract.floating("output_dtype", output_dtype)
    return _forward(g, A_log, dt_bias, Options(lower_bound, output_dtype))


def naive_kda_gate(
    g: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """−exp(A_log) softplus(g + dt_bias), the textbook."""
    x, A_log = _naive_operands(g, A_log, dt_bias)
    return (A_log.exp() * F.logsigmoid(-x)).to(output_dtype)  # softplus(x) = −log sigmoid(−x)


def naive_kda_lowerbound_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """lower_bound sigmoid(exp(A_log) (g + dt_bias)), the textbook."""
    x, A_log = _naive_operands(g, A_log, dt_bias)
    return (lower_bound * torch.sigmoid(A_log.exp() * x)).to(output_dtype)


def _naive_operands(g, A_log, dt_bias):
    dtype = torch.promote_types(g.dtype, torch.float32)
    HV, K = g.shape[-2:]
    x = g.to(dtype)
    if dt_bias is not None:
        x = x + dt_bias.to(dtype).reshape(HV, K)
    return x, x.new_zeros(HV, 1) if A_log is None else A_log.to(dtype).reshape(HV, 1)


def gate_parameters(
    sizes: dict[str, int], A_log: Any, dt_bias: Any, lower_bound: float | None
) -> dict[str, tuple[Any, str]]:
    """A_log and dt_bias as ``contract.operands`` wants them: of any shape, so flat."""
    if A_log is None and lower_bound is None:
        raise ValueError("A_log: expected a tensor where no lower_bound is given, got None")
    sizes["HV*K"] = sizes["HV"] * sizes["K"]
    A_log, dt_bias = _flat(A_log, sizes["HV"]), _flat(dt_bias, sizes["HV*K"])
    return {"A_log": (A_log, "?HV"), "dt_bias": (dt_bias, "?HV*K")}


def _flat(x: Any, size: int) -> Any:
    """x in one dimension, or as it came where it does not fit, for the error."""
    fits = isinstance(x, Tensor) and x.dim() != 1 and x.numel() == size
    return x.flatten() if fits else x


def bound(lower_bound: float | None) -> float | None:
    """``lower_bound``, checked."""
    return None if lower_bound is None else contract.number("lower_bound", lower_bound)


class Gate:
    """One call's gate: the parameters broadcast against raw gates, both formulas and their adjoint.

    With ``heads_first`` raw gates are [.., HV, C, K], else [.., HV, K].
    """

    def __init__(self, HV, K, A_log, dt_bias, lower_bound, dtype, heads_first=False):
        shape = (HV, 1) if heads_first else (HV,)
        self.lower_bound = lower_bound
        self.rate = None
        if A_log is not None:
            self.rate = _finite(A_log.to(dtype).exp()).reshape(*shape, 1)
        self.bias = None if dt_bias is None else dt_bias.to(dtype).reshape(*shape, K)

    def decay(self, x: Tensor) -> Tensor:
        """The log-decay of raw gates x."""
        if self.lower_bound is None:
            return F.logsigmoid(-self._shifted(x)).mul_(self.rate)
        return torch.sigmoid(self._angle(x)).mul_(self.lower_bound)

    def backward(self, x: Tensor, dg: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of the log-decay: that of x, and of A_log before it is summed.

        Where the gate is infinite dg is zero and so are both.
        """
        if self.lower_bound is None:
            x = self._shifted(x)
            dx = -dg * (self.rate * torch.sigmoid(x))  # a steep rate may be nothing beside it
            return dx, dg * _finite(F.logsigmoid(-x).mul_(self.rate))
        angle = self._angle(x)
        opened = torch.sigmoid(angle)
        dangle = dg * self.lower_bound * opened * torch.sigmoid(-angle)
        return dangle if self.rate is None else dangle * self.rate, dangle * _finite(angle)

    def _shifted(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + self.bias

    def _angle(self, x: Tensor) -> Tensor:
        x = self._shifted(x)
        return x if self.rate is None else x * self.rate


def _finite(x: Tensor) -> Tensor:
    limits = torch.finfo(x.dtype)
    return x.clamp(limits.min, limits.max)


def forward(g, A_log, dt_bias, lower_bound, output_dtype):
    dtype = torch.promote_types(g.dtype, torch.float32)
    gate = Gate(*g.shape[-2:], A_log, dt_bias, lower_bound, dtype)
    return gate.decay(g.to(dtype)).to(output_dtype)


def backward(g, dy, A_log, dt_bias, lower_bound):
    """The gradient of g, and where the parameter is there, of A_log [HV] and dt_bias [HV, K]."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    gate = Gate(*g.shape[-2:], A_log, dt_bias, lower_bound, dtype)
    dx, drate = gate.backward(g.to(dtype), dy.to(dtype))
    rates, biases = (x[None].flatten(0, -3) for x in (drate, dx))  # [rows, HV, K]
    return (
        dx.to(g.dtype),
        None if A_log is None else rates.sum((0, 2)),
        None if dt_bias is None else biases.sum(0),
    )


ENGINE = Engine(
    "gate",
    Implementation(
        "triton", "fla.ops.kda.gate_kernels", lambda at: lacks_triton(at.device, at.dtype)
    ),
    Implementation("eager", "fla.ops.kda.gate"),
)


def _run_forward(g, A_log, dt_bias, options):
    return ENGINE.stages(g, g, options).forward(g, A_log, dt_bias, *options)


def _run_backward(g, dy, A_log, dt_bias, options):
    stages = ENGINE.stages(g, g, options)
    dg, dA_log, ddt_bias = stages.backward(g, dy, A_log, dt_bias, options.lower_bound)
    return (
        dg,
        absent(g) if A_log is None else like(A_log, dA_log),
        absent(g) if dt_bias is None else like(dt_bias, ddt_bias),
    )


def like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in the shape and dtype of what it belongs to."""
    return gradient.reshape(parameter.shape).to(parameter.dtype)


def _fake_backward(g, dy, A_log, dt_bias, options):
    return tuple(absent(g) if x is None else x.new_empty(x.shape) for x in (g, A_log, dt_bias))


_OPTIONS = "float? lower_bound, ScalarType output_dtype"
_forward = Operator(
    f"delta_gate(Tensor g, Tensor? A_log, Tensor? dt_bias, {_OPTIONS}) -> Tensor",
    _run_forward,
    lambda g, A_log, dt_bias, options: g.new_empty(g.shape, dtype=options.output_dtype),
    Options,
)
_backward = Operator(
    f"delta_gate_backward(Tensor g, Tensor dy, Tensor? A_log, Tensor? dt_bias, {_OPTIONS}) "
    "-> (Tensor dg, Tensor dA_log, Tensor ddt_bias)",
    _run_backward,
    _fake_backward,
    Options,
)


def _save(ctx, operands, output) -> None:
    ctx.save_for_backward(*operands)


def _gradients(ctx, dy):
    if dy is None:  # what comes behind the gate does not depend on it
        return None, None, None
    g, A_log, dt_bias = ctx.saved_tensors
    dg, dA_log, ddt_bias = _backward(g, dy, A_log, dt_bias, ctx.options)
    dA_log = None if A_log is None else dA_log
    ddt_bias = None if dt_bias is None else ddt_bias
    return dg, dA_log, ddt_bias


differentiable(_forward, _backward, _save, _gradients)
