"""``fused_recurrent_kda`` and the serving entry."""

from __future__ import annotations

from torch import Tensor

from fla.ops.common import contract
from fla.ops.kda.engine import Options, delta_engine, delta_serve


@contract.public
def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention, the form for decoding and for short T.

    Arguments as for ``chunk_kda``; beta may also be one for each value channel, ``[B, T, HV, V]``,
    and the initial state may have any float dtype.
    """
    o, final_state, _ = delta_engine(
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        initial_state,
        cu_seqlens,
        None,
        Options(
            scale=scale,
            qk_l2norm=use_qk_l2norm_in_kernel,
            gate=use_gate_in_kernel,
            lower_bound=lower_bound,
            beta_sigmoid=use_beta_sigmoid_in_kernel,
            neg_eigval=allow_neg_eigval,
            state_v_first=contract.state_layout(state_v_first, transpose_state_layout),
            output_final_state=output_final_state,
        ),
    )
    return o, final_state


@contract.public
def fused_recurrent_kda_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = True,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A serving step of Kimi Delta Attention: states live in a pool; there are no gradients.

    Arguments as for ``fused_recurrent_kda``, except for:

    Args:
        initial_state: the pool ``[slots, HV, K, V]``, or without ``ssm_state_indices`` one state a
            sequence ``[N, HV, K, V]``; any float dtype, any stride between slots.
        inplace_final_state: whether the states after this step overwrite ``initial_state``.
        ssm_state_indices: slots ``[N]``, for one token a sequence, or ``[N, tokens]``: sequence n
            starts from slot ``[n, 0]`` and the state after its token t goes to slot ``[n, t]``.  A
            negative slot reads as zeros and drops what is written.  Always in place.
        num_accepted_tokens: ``[N]``, at least 1: sequence n starts from slot
            ``[n, accepted[n] - 1]``, where the last token accepted of the step before left it.
        out: written and returned, if given; of the shape of v.

    Returns:
        ``o``, and the pool, or not in place the new states in fp32 if ``output_final_state``.
    """
    return delta_serve(
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        initial_state,
        cu_seqlens,
        ssm_state_indices,
        num_accepted_tokens,
        out,
        inplace_final_state,
        Options(
            scale=scale,
            qk_l2norm=use_qk_l2norm_in_kernel,
            gate=use_gate_in_kernel,
            lower_bound=lower_bound,
            beta_sigmoid=use_beta_sigmoid_in_kernel,
            neg_eigval=allow_neg_eigval,
            state_v_first=state_v_first,
            output_final_state=output_final_state,
        ),
    )
