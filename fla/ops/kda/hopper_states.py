"""What a chunk's backward pass makes of do, w and u on Hopper, which are read once for all of it.

``adjoint_kernel`` and ``through_states_kernel`` as one, with products of warps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from fla.ops.common.hopper import along
from fla.ops.common.kernels import SEARCH
from fla.ops.common.launch import launch
from fla.ops.kda.activations import beta_backward
from fla.ops.kda.hopper_tiles import C, copied, in_lines, lines
from fla.ops.kda.slots import locate

# Value channels that a step of a product takes
STEP = gl.constexpr(32)
# Two programs on a multiprocessor
WARPS = 8
REGISTERS = 128
_ACC = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 2], [16, 8]))
_LEFT = gl.constexpr(gl.DotOperandLayout(0, _ACC, 2))
_RIGHT = gl.constexpr(gl.DotOperandLayout(1, _ACC, 2))
_ROW = gl.constexpr(gl.SliceLayout(1, _ACC))
_LINES = gl.constexpr(in_lines(WARPS))
_LINE = gl.constexpr(gl.SliceLayout(1, _LINES))
_ALONG = gl.constexpr(gl.SliceLayout(0, _LINES))


@gluon.jit
def put(p, x, COLUMNS: gl.constexpr):
    """Store an accumulator [C, COLUMNS] in lines, by way of shared memory, and return these."""
    x = gl.convert_layout(x.to(p.dtype.element_ty), _LINES)
    gl.store(p + lines(C, COLUMNS, COLUMNS)[0], x)
    return x


@gluon.jit(do_not_specialize=["T", "rows"])
def hopper_states_kernel(
    do, v, beta, cu_seqlens, betas, queries, q_in, values, solved, states, dstates,
    dv, dbeta, dqueries, dkeys, own, dq_in, dk_in, dk_out, through, radial,
    T, rows,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    BETA_SIGMOID: gl.constexpr, BETA_RANGE: gl.constexpr,
):  # fmt: skip
    """What ``adjoint_kernel`` and ``through_states_kernel`` make, of one chunk and value head.

    But dM and dA as lower triangles, dM with its diagonal, as the next kernel multiplies them, and
    in ``radial``, unless that is None, how much of q and k, as norms leave them, norms take away
    from dq and dk:

        q·dq = Σ_j M_ij dM_ij + q_in·dq_in    k·dk = β u·(2 w − v)

    A key gains −β u·(v − w) as a row of A and of k_in, β u·w from what comes behind it.  ``dq_in``
    may take the place of ``q_in``, which is read before.
    """
    i_slot = gl.program_id(0) // HV
    i_hv = gl.program_id(0) % HV
    o_s = gl.arange(0, SEARCH, along(gl.num_warps()))
    _, i_c, start, length, live = locate(cu_seqlens, i_slot, rows, T, C, o_s)
    left = length - i_c * C
    if left <= 0:
        return
    token = start + i_c * C
    place = i_slot.to(gl.int64) * HV + i_hv
    o_line = gl.arange(0, C, _LINE)
    m_line = gl.expand_dims(o_line < left, 1)
    p_dv = dv + (token * HV + i_hv) * V + lines(C, V, HV * V)[0]
    o_c = gl.arange(0, C, _ROW)
    p_dbeta = dbeta + (token + o_line) * HV + i_hv
    if i_c * C >= live:  # padding has no gradient
        gl.store(p_dv, gl.zeros([C, V], dv.dtype.element_ty, _LINES), m_line)
        gl.store(p_dbeta, gl.zeros([C], dbeta.dtype.element_ty, _LINE), o_line < left)
        return

    do_tile = copied(do + (token * HV + i_hv) * V, C, V, HV * V, left)
    w_tile = copied(values + place * (C * V), C, V, V, C)
    u_tile = copied(solved + place * (C * V), C, V, V, C)
    async_copy.commit_group()
    ds_tile = copied(dstates + place * (V * K), V, K, K, V)
    async_copy.commit_group()
    s_tile = copied(states + place * (V * K), V, K, K, V)
    async_copy.commit_group()
    betas += place * C
    b_beta = gl.load(betas + o_c)
    b_line = gl.load(betas + o_line)
    b_column = gl.expand_dims(gl.load(betas + gl.arange(0, C, gl.SliceLayout(0, _ACC))), 0)
    b_raw = gl.load(beta + (token + o_line) * HV + i_hv, o_line < left, 0).to(gl.float32)
    o_row = gl.expand_dims(o_c, 1)
    o_column = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, _ACC)), 0)
    p_pairs = place * (C * C) + o_row * C + o_column
    if radial is not None:
        radial += place * (2 * C) + o_line
        b_v = gl.load(v + (token * HV + i_hv) * V + lines(C, V, HV * V)[0], m_line, 0)
        b_m = gl.load(queries + p_pairs)

    async_copy.wait_group(2)
    b_ow = gl.zeros([C, C], gl.float32, _ACC)
    b_uw = gl.zeros([C, C], gl.float32, _ACC)
    for i in gl.static_range(V // STEP):
        b_w = w_tile.slice(i * STEP, STEP, 1).permute((1, 0)).load(_RIGHT)
        b_ow = mma_v2(do_tile.slice(i * STEP, STEP, 1).load(_LEFT), b_w, b_ow)
        b_uw = mma_v2(u_tile.slice(i * STEP, STEP, 1).load(_LEFT), b_w, b_uw)
    b_u = u_tile.load(_LINES).to(gl.float32)
    gl.store(p_dv, (b_u * gl.expand_dims(b_line, 1)).to(dv.dtype.element_ty), m_line)
    b_dbeta = gl.sum(b_u * w_tile.load(_LINES).to(gl.float32), 1)
    if radial is not None:
        b_radial = b_line * (2 * b_dbeta - gl.sum(b_u * b_v.to(gl.float32), 1))
        gl.store(radial + C, b_radial)
    b_dbeta = beta_backward(b_raw, b_dbeta, BETA_SIGMOID, BETA_RANGE)
    gl.store(p_dbeta, b_dbeta.to(dbeta.dtype.element_ty), o_line < left)
    b_ow *= b_column
    gl.store(own + place * C + o_c, gl.sum(gl.where(o_row == o_column, b_ow, 0.0), 1))
    # as they are: room to lay them in lines would leave one program a multiprocessor
    dtype: gl.constexpr = dkeys.dtype.element_ty
    b_dm = gl.where(o_row >= o_column, b_ow, 0.0).to(dtype)
    gl.store(dqueries + p_pairs, b_dm)
    if radial is not None:
        b_radial = gl.sum(b_dm.to(gl.float32) * b_m.to(gl.float32), 1)
        b_radial = gl.convert_layout(b_radial, _LINE)
    b_uw *= gl.expand_dims(b_beta, 1) * -b_column
    gl.store(dkeys + p_pairs, gl.where(o_row > o_column, b_uw, 0.0).to(dtype))

    async_copy.wait_group(1)
    b_dk = gl.zeros([C, K], gl.float32, _ACC)
    for i in gl.static_range(V // STEP):
        b_ds = ds_tile.slice(i * STEP, STEP).load(_RIGHT)
        b_dk = mma_v2(w_tile.slice(i * STEP, STEP, 1).load(_LEFT), b_ds, b_dk)
    put(dk_out + place * (C * K), b_dk * gl.expand_dims(b_beta, 1), K)
    if radial is not None:
        # where w was; it arrives while states are multiplied
        q_tile = copied(q_in + place * (C * K), C, K, K, C)
    async_copy.commit_group()

    async_copy.wait_group(1)
    b_dq = gl.zeros([C, K], gl.float32, _ACC)
    b_dk = gl.zeros([C, K], gl.float32, _ACC)
    for i in gl.static_range(V // STEP):
        b_s = s_tile.slice(i * STEP, STEP).load(_RIGHT)
        b_dq = mma_v2(do_tile.slice(i * STEP, STEP, 1).load(_LEFT), b_s, b_dq)
        b_dk = mma_v2(u_tile.slice(i * STEP, STEP, 1).load(_LEFT), b_s, b_dk)
    put(dk_in + place * (C * K), b_dk * -gl.expand_dims(b_beta, 1), K)
    async_copy.wait_group(0)
    b_dq = put(dq_in + place * (C * K), b_dq, K)
    if radial is not None:
        b_q = q_tile.load(_LINES).to(gl.float32)
        gl.store(radial, b_radial + gl.sum(b_q * b_dq.to(gl.float32), 1))
    b_through = s_tile.load(_LINES).to(gl.float32) * ds_tile.load(_LINES).to(gl.float32)
    gl.store(through + place * K + gl.arange(0, K, _ALONG), gl.sum(b_through, 0))


def run_states(call, do, dv, dbeta) -> None:
    """``launches.Call.across`` for Hopper; pairs' gradients are lower triangles."""
    launch(
        hopper_states_kernel,
        call.slots * call.HV,
        (
            do, call.v, call.beta, call.cu_seqlens, call.betas, call.queries, call.q_in,
            call.values, call.solved, call.states, call.dstates,
            dv, dbeta, call.dqueries, call.dkeys, call.own, call.dq_in, call.dk_in, call.dk_out,
            call.through, call.radial,
        ),
        (call.T, call.rows),
        {
            "HV": call.HV, "K": call.K, "V": call.V, **call.beta_flags,
            "num_warps": WARPS, "maxnreg": REGISTERS,
        },
    )  # fmt: skip
