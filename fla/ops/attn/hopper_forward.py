"""The softmax engine's forward on Hopper: what goes before ``hopper_queries``; who gets it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.attn import triton as portable
from fla.ops.attn.blocks import (
    SPAN,
    Call,
    first_interval_needed,
    gate_marks,
    gate_sums,
    gates,
    largest_norm,
    own,
    own_logits,
    rising,
    tile,
)
from fla.ops.attn.hopper_queries import BLOCK, ROWS, hopper_forward_kernel
from fla.ops.common.hopper import descriptor, vectors
from fla.ops.common.kernels import cdiv, dense, first_slot, multiprocessors, power_of_two
from fla.ops.common.launch import launch


def forward(q, k, v, g, sink_bias, cu_seqlens, options):
    """Return o [B, T, HQ, V] and lse [B, HQ, T]."""
    if not pays(q, v, g, cu_seqlens):
        return portable.forward(q, k, v, g, sink_bias, cu_seqlens, options)
    signed, scale = rising(q, options.scale)
    tensors = dense(signed, k, v)
    if any(x.data_ptr() % 16 for x in tensors):
        return portable.forward(q, k, v, g, sink_bias, cu_seqlens, options)
    q, k, v = tensors
    g, sink_bias, cu_seqlens = dense(g, sink_bias, cu_seqlens)
    call = Call(q, v, cu_seqlens, scale, options.window_size)
    return run_forward(call, q, k, v, *gates(call, g, k, cu_seqlens), sink_bias, cu_seqlens)


def pays(q, v, g, cu_seqlens) -> bool:
    """Whether calls like it are faster here than in Triton: benchmarks/NOTES.md has the times."""
    B, T, HQ, K = q.shape
    wide = min(K, v.shape[-1]) > 64
    least = 512 if wide else 4096 if g is None else 2048
    if T < least or cdiv(T, BLOCK.value) * HQ * B < 512:  # too few tiles to share out
        return False
    if g is None or cu_seqlens is None:
        return True
    return T >= (256 if wide else 512) * (cu_seqlens.shape[0] - 1)


@triton.jit(do_not_specialize=["window", "N", "T", "intervals"])
def needed_kernel(
    q, k, sums, marks, cu_seqlens, needed, scale, floor, window, N, T, intervals,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The first interval of keys that the queries of an interval need, for one head.

    That a query reaches the logit of its own key is known before it has met any.  Reads q, k
    [SPAN, K] and what ``gates_kernel`` says of all before.  Writes needed [HQ, intervals], and
    behind it that no tile has been taken yet.
    """
    if tl.program_id(0) == 0:
        tl.store(needed + H * G * intervals, 0)
    i_h, n, i_b, bos, _length, live = own(cu_seqlens, tl.program_id(0), N, T, H * G, SPAN, False)
    if i_b * SPAN >= live:
        return
    i_kh = i_h // G
    o_t = tl.arange(0, SPAN)
    m_t = i_b * SPAN + o_t < live
    row = bos.to(tl.int64) + i_b * SPAN
    b_q = tile(q + row * (H * G * K) + i_h * K, o_t, m_t, H * G * K, K, BK)  # [SPAN, BK]
    b_own = own_logits(b_q, k + row * (H * K) + i_kh * K, o_t, m_t, scale, H * K, K, BK)
    slot = first_slot(cu_seqlens, n, bos, T, SPAN)
    p_since, _, _ = gate_sums(sums, i_h, slot + i_b, intervals, H * G)
    reach = tl.max(tl.load(p_since + o_t) - b_own, 0)
    p_total, p_rise, p_norm = gate_marks(marks, i_h, i_kh, slot, intervals, H * G)
    norm = largest_norm(b_q) * scale
    first = first_interval_needed(p_total, p_rise, p_norm, i_b, norm, reach, floor)
    tl.store(needed + i_h * intervals + slot + i_b, first)


def run_forward(call: Call, q, k, v, sums, marks, sink, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Launch ``hopper_forward_kernel``: o [B, T, HQ, V] and lse [B, HQ, T]."""
    B, T, HQ, _ = q.shape
    H, V = v.shape[2:]
    o = q.new_empty(B, T, HQ, V)
    lse = q.new_empty(B, HQ, T, dtype=torch.float32)
    rows, block = ROWS.value, BLOCK.value
    operands = ((q, rows), (k, block), (v, block), (o, rows))
    sizes = [max(power_of_two(x.shape[-1]), 64) for x, _ in operands]
    descriptors = [descriptor(x, n, size) for (x, n), size in zip(operands, sizes, strict=True)]
    until, needed = None, None
    if sums is not None:
        until = vectors(sums, block)
        needed = marks.new_empty(HQ * call.intervals + 1, dtype=torch.int32)
        launch(
            needed_kernel,
            call.intervals * HQ,
            (q, k, sums, marks, cu_seqlens, needed),
            call.numbers,
            {name: call.constants[name] for name in ("H", "G", "K", "BK")} | {"num_warps": 4},
        )
    scale, _floor, *numbers = call.numbers
    launch(
        hopper_forward_kernel,
        min(call.blocks(block) * HQ, multiprocessors(q.device)),
        (o, lse, sink, sums, marks, needed, cu_seqlens),
        (*descriptors, until, scale, *numbers),
        {"H": H, "HQ": HQ, "V": V, "STAGES": 4 if max(sizes) == 64 else 2, "num_warps": 4},
    )
    return o, lse
