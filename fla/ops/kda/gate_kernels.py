"""``fused_kda_gate`` on a GPU: one kernel each way, and one for the sums that parameters get."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fla.ops.common.kernels import cdiv, dense, multiprocessors, power_of_two
from fla.ops.common.launch import launch
from fla.ops.kda.activations import log_decay_backward, sigmoid, softplus

# A tile is 4096 gates: 32 a thread of 4 warps, read and written 16 bytes at a time.
_TILE, _WIDEST = 4096, 512
# Programs a multiprocessor in the backward pass, each of which leaves a row of sums.
_WAVES = 8
# Rows and channels that a program adds up at a time
_SUMS, _CHANNELS = 256, 16


@triton.jit
def load_parameters(A_log, dt_bias, o_d, m_d, K):
    """The rate and the bias of channels o_d, counted over all heads."""
    b_rate = tl.full(o_d.shape, 1.0, tl.float32)
    b_bias = tl.zeros(o_d.shape, tl.float32)
    if A_log is not None:
        b_rate = tl.exp(tl.load(A_log + o_d // K, m_d, 0).to(tl.float32))
    if dt_bias is not None:
        b_bias = tl.load(dt_bias + o_d, m_d, 0).to(tl.float32)
    return b_rate, b_bias


@triton.jit(do_not_specialize=["rows"])
def gate_kernel(
    g, A_log, dt_bias, out, lower_bound, rows, D, K, BR: tl.constexpr, BD: tl.constexpr
):
    """out = −rate softplus(g + bias), or lower_bound sigmoid(rate (g + bias)), on a tile [BR, BD].

    g and out are [rows, D], all channels of all heads side by side.
    """
    blocks = tl.cdiv(D, BD)
    o_d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    o_r = tl.program_id(0) // blocks * BR + tl.arange(0, BR)
    m = (o_r < rows)[:, None] & (o_d < D)[None, :]
    o = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    b_rate, b_bias = load_parameters(A_log, dt_bias, o_d, o_d < D, K)
    b_x = tl.load(g + o, m, 0).to(tl.float32) + b_bias[None, :]  # [BR, BD]
    if lower_bound is None:
        b_y = -b_rate[None, :] * softplus(b_x)
    else:
        b_y = lower_bound * sigmoid(b_rate[None, :] * b_x)
    tl.store(out + o, b_y.to(out.dtype.element_ty), m)


@triton.jit(do_not_specialize=["rows", "programs"])
def gate_backward_kernel(
    g, dy, A_log, dt_bias, dg, drates, dbiases, lower_bound, rows, programs, D, K,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of g, and of a program's rows the sums that those of the parameters add up.

    Program i of ``programs`` takes every ``programs``-th tile [BR, BD] of BD channels, and writes
    row i of drates and dbiases [programs, D].
    """
    blocks = tl.cdiv(D, BD)
    i_program = tl.program_id(0) // blocks
    o_d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_rate, b_bias = load_parameters(A_log, dt_bias, o_d, m_d, K)
    b_drates = tl.zeros([BD], tl.float32)
    b_dbiases = tl.zeros([BD], tl.float32)
    for i in range(i_program * BR, rows, programs * BR):
        o_r = i + tl.arange(0, BR)
        m = (o_r < rows)[:, None] & m_d[None, :]
        o = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
        b_x = tl.load(g + o, m, 0).to(tl.float32) + b_bias[None, :]  # [BR, BD]
        b_dy = tl.load(dy + o, m, 0).to(tl.float32)
        b_dx, b_drate = log_decay_backward(b_x, b_dy, b_rate[None, :], lower_bound)
        tl.store(dg + o, b_dx.to(dg.dtype.element_ty), m)
        b_drates += tl.sum(b_drate, 0)
        b_dbiases += tl.sum(b_dx, 0)
    if drates is not None:
        tl.store(drates + i_program * D + o_d, b_drates, m_d)
        tl.store(dbiases + i_program * D + o_d, b_dbiases, m_d)


@triton.jit
def sum_of_rows(x, o_d, m_d, rows, stride, BR: tl.constexpr):
    """The sums [BD] of columns o_d over rows that lie ``stride`` apart, in a fixed order."""
    o_r = tl.arange(0, BR)
    b_sums = tl.zeros([BR, o_d.shape[0]], tl.float32)
    for i in range(0, rows, BR):
        o = (i + o_r).to(tl.int64)[:, None] * stride + o_d[None, :]
        b_sums += tl.load(x + o, (i + o_r < rows)[:, None] & m_d[None, :], 0)
    return tl.sum(b_sums, 0)


@triton.jit(do_not_specialize=["rows"])
def parameters_kernel(
    drates, dbiases, dA_log, ddt_bias, rows,
    HV: tl.constexpr, K: tl.constexpr, RATES: tl.constexpr, BIASES: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """dA_log [HV], ddt_bias [HV, K] from drates [rows, HV, RATES], dbiases [rows, HV, BIASES]."""
    blocks = tl.num_programs(0) // HV
    RATE_ROWS: tl.constexpr = BR * BD // BA if BA < BR * BD else 1
    i_hv = tl.program_id(0) // blocks
    i_d = tl.program_id(0) % blocks
    if ddt_bias is not None:
        o_d = i_d * BD + tl.arange(0, BD)
        b_bias = sum_of_rows(dbiases + i_hv * BIASES, o_d, o_d < K, rows, HV * BIASES, BR)
        tl.store(ddt_bias + i_hv * K + o_d, b_bias.to(ddt_bias.dtype.element_ty), o_d < K)
    if dA_log is not None:
        if i_d == 0:
            o_a = tl.arange(0, BA)
            b_rates = sum_of_rows(
                drates + i_hv * RATES, o_a, o_a < RATES, rows, HV * RATES, RATE_ROWS
            )
            tl.store(dA_log + i_hv, tl.sum(b_rates, 0).to(dA_log.dtype.element_ty))


def forward(g, A_log, dt_bias, lower_bound, output_dtype):
    g, A_log, dt_bias = dense(g, A_log, dt_bias)
    out = g.new_empty(g.shape, dtype=output_dtype)
    rows, D, BR, BD = _tiles(g)
    if rows * D:
        launch(
            gate_kernel,
            cdiv(rows, BR) * cdiv(D, BD),
            (g, A_log, dt_bias, out),
            (lower_bound, rows),
            {"D": D, "K": g.shape[-1], "BR": BR, "BD": BD},
        )
    return out


def backward(g, dy, A_log, dt_bias, lower_bound):
    """The gradient of g, and where the parameter is there, of A_log [HV] and dt_bias [HV, K]."""
    g, dy, A_log, dt_bias = dense(g, dy, A_log, dt_bias)
    dg = g.new_empty(g.shape)
    rows, D, BR, BD = _tiles(g)
    blocks = cdiv(D, BD)
    programs = min(cdiv(rows, BR), cdiv(_WAVES * multiprocessors(g.device), max(blocks, 1)))
    drates = dbiases = None
    if A_log is not None or dt_bias is not None:
        drates, dbiases = g.new_empty(2, programs, *g.shape[-2:], dtype=torch.float32).unbind(0)
    if rows * D:
        launch(
            gate_backward_kernel,
            programs * blocks,
            (g, dy, A_log, dt_bias, dg, drates, dbiases),
            (lower_bound, rows, programs),
            {"D": D, "K": g.shape[-1], "BR": BR, "BD": BD},
        )
    return dg, *parameters_backward(A_log, dt_bias, drates, dbiases)


def parameters_backward(A_log, dt_bias, drates, dbiases):
    """The gradients of A_log and dt_bias, None where they are not there.

    They are what drates [rows, HV, any] add up to over rows and the last axis, and over rows the
    first columns of dbiases [rows, HV, K or more]; both are None where neither parameter is there.
    """
    dA_log, ddt_bias = (None if x is None else x.new_empty(x.shape) for x in (A_log, dt_bias))
    if drates is not None:
        (rows, HV, RATES), BIASES = drates.shape, dbiases.shape[2]
        K = BIASES if dt_bias is None else dt_bias.numel() // max(HV, 1)
        launch(
            parameters_kernel,
            HV * max(cdiv(K, _CHANNELS), 1),
            (drates, dbiases, dA_log, ddt_bias),
            (rows,),
            {
                "HV": HV, "K": K, "RATES": RATES, "BIASES": BIASES, "BR": _SUMS, "BD": _CHANNELS,
                "BA": power_of_two(RATES),
            },
        )  # fmt: skip
    return dA_log, ddt_bias


def _tiles(g):
    """g as rows of D channels, and the tiles that it falls into."""
    D = g.shape[-2] * g.shape[-1]
    BD = min(power_of_two(D), _WIDEST)
    return g.numel() // max(D, 1), D, _TILE // BD, BD
