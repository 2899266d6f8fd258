"""``KimiDeltaAttention``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla.layers.memory import MemoryMixer
from fla.layers.mixer import Call, channels, fits, multiple
from fla.modules import FusedRMSNormGated
from fla.ops.common import contract
from fla.ops.kda import chunk_kda, fused_recurrent_kda

FORMS: dict[str, Callable[..., Any]] = {"chunk": chunk_kda, "fused_recurrent": fused_recurrent_kda}
# A new layer's rates: exp(A_log) is uniform in the first range, softplus(dt_bias) log-uniform in
# the second.
RATES = 1.0, 16.0
STEPS = 1e-3, 1e-1


class KimiDeltaAttention(MemoryMixer):
    """The layer of Kimi Linear: a memory that decays channel by channel and corrects itself.

        q, k = norm(silu(conv(W x)))    v = silu(conv(W_v x))    β = σ(W_β x)
        log α = −exp(A_log) softplus(W_f↑ W_f↓ x + dt_bias)
        o = W_o (RMSNorm(KDA(q, k, v, α, β)) ∘ σ(W_g↑ W_g↓ x))

    Args:
        hidden_size: channels of the hidden states.
        expand_v: how many times as large as ``head_dim`` a head of values is.
        head_dim: channels of a head of queries and keys.
        num_heads: heads of queries and keys.
        num_v_heads: heads of values, a multiple of ``num_heads``; as many by default.
        mode: ``chunk`` or ``fused_recurrent``, the form for training; a few tokens outside of it
            always take the recurrent one.
        use_short_conv: whether q, k and v pass a short convolution.
        allow_neg_eigval: whether β reaches up to 2.
        safe_gate: promises decays in ``[lower_bound, 0)``; it wants a bound in [−5, 0).
        lower_bound: makes the decay ``lower_bound σ(exp(A_log) (W_f↑ W_f↓ x + dt_bias))``.
        conv_size: how many tokens the short convolution sees.
        conv_bias: whether it has a bias.
        layer_idx: which layer of its model this is; wanted with a cache.
        norm_eps: added to the mean square in the norm.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ):
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        multiple("num_v_heads", num_v_heads, "num_heads", num_heads)
        contract.one_of("mode", mode, tuple(FORMS))
        if lower_bound is not None:
            lower_bound = contract.number("lower_bound", lower_bound)
        if safe_gate and (lower_bound is None or not -5 <= lower_bound < 0):
            raise ValueError(f"lower_bound: expected [-5, 0) with safe_gate, got {lower_bound}")
        head_v_dim = channels("head_dim", head_dim, "expand_v", expand_v)
        fits("head_dim", head_dim, 256)
        fits("head_dim * expand_v", head_v_dim, 512)
        super().__init__(
            hidden_size,
            heads=(num_heads, num_heads, num_v_heads),
            head_dims=(head_dim, head_v_dim),
            conv_size=contract.whole_number("conv_size", conv_size) if use_short_conv else None,
            conv_bias=conv_bias,
            layer_idx=layer_idx,
        )
        self.mode, self.allow_neg_eigval = mode, allow_neg_eigval
        self.safe_gate, self.lower_bound = safe_gate, lower_bound
        gate_dim, value_dim = num_v_heads * head_dim, num_v_heads * self.head_v_dim
        self.f_proj = _low_rank(hidden_size, self.head_v_dim, gate_dim, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.g_proj = _low_rank(hidden_size, self.head_v_dim, value_dim, bias=True)
        self.A_log = nn.Parameter(torch.empty(num_v_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(gate_dim, dtype=torch.float32))
        self.o_norm = FusedRMSNormGated(self.head_v_dim, eps=norm_eps, activation="sigmoid")
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the decay's own parameters anew."""
        self.A_log.uniform_(*RATES).log_()
        steps = torch.empty_like(self.dt_bias).uniform_(*map(math.log, STEPS)).exp_()
        self.dt_bias.copy_(steps.expm1().log())  # softplus⁻¹

    def mix(self, x: Tensor, call: Call) -> Tensor:
        (q, k, v), conv_state = self.project(x, call, F.silu)
        form = FORMS["fused_recurrent" if self.recurrent(x) else self.mode]
        more = {"safe_gate": self.safe_gate} if form is chunk_kda else {}
        state = call.state.get("recurrent_state")
        if state is not None:  # as a cache of another dtype has it
            state = state.to(torch.promote_types(q.dtype, torch.float32))
        o, state = form(
            q,
            k,
            v,
            g=self.f_proj(x).unflatten(-1, (-1, self.head_k_dim)),
            beta=self.b_proj(x),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            initial_state=state,
            output_final_state=call.keeps,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
            lower_bound=self.lower_bound,
            cu_seqlens=call.cu_seqlens,
            **more,
        )
        call.keep(recurrent_state=state, conv_state=conv_state)
        gate = self.g_proj(x).unflatten(-1, (-1, self.head_v_dim))
        return self.o_proj(self.o_norm(o, gate).flatten(2))


def _low_rank(inner: int, rank: int, outer: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inner, rank, bias=False), nn.Linear(rank, outer, bias=bias))
