"""The map of the weights with which tokens attend to each other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.common.kernels import cdiv, power, power_of_two, product
from fla.ops.common.launch import launch
from fla.ops.simple_gla.blocks import CHUNK


@triton.jit(do_not_specialize=["T", "H", "scale"])
def attention_map_kernel(
    q, k, sums, rests, out, scale, T, H,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A_ij = scale q_i·k_j exp(G_i − G_j), C rows of one head, from the diagonal outward.

    out [B, H, T, T].  The decay between two chunks is that of the tokens behind the key, of those
    up to the query and of all chunks between, added on the way: near pairs see no long sum.
    """
    chunks = tl.cdiv(T, C)
    i_c = tl.program_id(0) % chunks
    i_b = (tl.program_id(0) // chunks // H).to(tl.int64)
    i_h = tl.program_id(0) // chunks % H
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    row = i_c * C + o_c
    m_row = row < T
    q += (i_b * T * H + i_h) * K
    k += (i_b * T * H + i_h) * K
    out += ((i_b * H + i_h) * T + i_c * C) * T
    p_out = o_c[:, None].to(tl.int64) * T + o_c[None, :]
    p_k = o_c[:, None] * (H * K) + o_k[None, :]
    m_k = o_k[None, :] < K
    OPERAND: tl.constexpr = q.dtype.element_ty if PRECISION is None else tl.float32
    b_q = tl.load(
        q + (i_c * C).to(tl.int64) * (H * K) + p_k, mask=m_row[:, None] & m_k, other=0.0
    ).to(OPERAND)  # [C, BK]
    if sums is not None:
        tokens = tl.num_programs(0) // chunks // H * T
        sums += i_h.to(tl.int64) * tokens + i_b * T
        b_to = tl.load(sums + row, mask=m_row, other=0.0)  # [C]
        b_key = tl.load(sums + row, mask=m_row, other=0.0)
        b_span = b_to[:, None] - b_key[None, :]
        if rests is not None:
            rests += i_h.to(tl.int64) * tokens + i_b * T
            b_rest = tl.load(rests + row, mask=m_row, other=0.0)
            b_span += b_rest[:, None] - b_rest[None, :]
            b_to += b_rest
    between = 0.0
    for i in range(0, i_c + 1):
        j = i_c - i
        column = j * C + o_c
        m_column = column < T
        b_k = tl.load(
            k + (j * C).to(tl.int64) * (H * K) + p_k, mask=m_column[:, None] & m_k, other=0.0
        ).to(OPERAND)
        b_a = product(b_q, tl.trans(b_k), None, PRECISION) * scale
        b_a = tl.where(row[:, None] >= column[None, :], b_a, 0.0)
        if sums is not None:
            if i > 0:  # whole chunks
                s_all = tl.load(sums + (j * C + C - 1))
                b_from = s_all - tl.load(sums + column)
                if rests is not None:
                    s_rest = tl.load(rests + (j * C + C - 1))
                    b_from += s_rest - tl.load(rests + column)
                    s_all += s_rest
                b_span = b_to[:, None] + (b_from[None, :] + between)
                between += s_all
            b_a *= power(b_span)
        tl.store(
            out + j * C + p_out,
            b_a.to(out.dtype.element_ty),
            mask=m_row[:, None] & m_column[None, :],
        )
    for j in range(i_c + 1, chunks):
        tl.store(
            out + j * C + p_out,
            tl.zeros([C, C], out.dtype.element_ty),
            mask=m_row[:, None] & (j * C + o_c < T)[None, :],
        )


def attention_map(q: Tensor, k: Tensor, sums: Tensor | None, rests: Tensor | None, scale: float):
    """The map [B, H, T, T] of q and k [B, T, H, K] in their dtype."""
    B, T, H, K = q.shape
    out = q.new_empty(B, H, T, T)
    if not out.numel():
        return out
    precision = {torch.bfloat16: None, torch.float16: None, torch.float32: "tf32x3"}[q.dtype]
    launch(
        attention_map_kernel,
        cdiv(T, CHUNK) * B * H,
        (q, k, sums, rests, out),
        (scale, T, H),
        {
            "K": K, "BK": max(power_of_two(K), 16), "C": CHUNK, "PRECISION": precision,
            "num_stages": 1 if K > 128 else 2,
        },
    )  # fmt: skip
    return out
