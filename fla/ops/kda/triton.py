"""Kimi Delta Attention in Triton, the same calls as ``eager``.

Forward: what each chunk is to the state and its tokens to one another (``chunk_intra``), its
triangular system (``wy_fast``), then the scan over chunks with the output fused into it
(``chunk_inter``).  Backward: the chunks' operands again, the scan of the states and that of their
gradients in one grid, the products over value channels, and what they mean for q, k and the gates
(``chunk_gradients``).  Saved in between are the inputs, M and Y; where a call asks for it, or is
small, the operands too.
"""

from __future__ import annotations

import torch

from fla.ops.common.boundary import absent
from fla.ops.common.workspace import bytes_of, room_of
from fla.ops.kda import recurrent
from fla.ops.kda.launches import Call, pairs_and_operands

# Chunks of all heads, eight for each of an H200's 132 multiprocessors, up to which the host takes
# longer than the chip.  It need not launch again what made operands: these wait for the backward
# pass, 50 MB of a call in bf16 with K of 128.  A number, for what is kept has a size without a GPU.
FEW_CHUNKS = 1056

serve = recurrent.serve


def forward(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options, made_by=None
):  # fmt: skip
    """Return o [B, T, HV, V], the final state, the states before the chunks, and what is kept."""
    if not options.chunk_size:
        operands = q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens
        return recurrent.forward(*operands, options)
    call = (made_by or Call)(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, options)
    o = torch.empty_like(call.v)
    final = call.new_state() if options.output_final_state else None
    h = call.new_intermediate() if options.intermediate_states else None
    room = kept(q, v, cu_seqlens, options)
    if call.empty:
        if final is not None:
            final.copy_(initial_state) if initial_state is not None else final.zero_()
    else:
        call.intra(room)
        call.advance(o, initial_state, final, h)
    return o, final, h, room


def kept(q, v, cu_seqlens, options):
    """Room for what a backward pass reads again of all chunks."""
    if options.chunk_size == 0 or q.numel() == 0 or v.numel() == 0:
        return absent(q)
    wanted = pairs_and_operands(q, v, cu_seqlens, options)
    size = bytes_of(*wanted)
    if not options.keep_operands:  # chosen without a question to sizes that are symbols
        _, _, slots, HV, *_ = wanted[0]
        size = torch.sym_ite(slots * HV <= FEW_CHUNKS, size, bytes_of(*wanted[:1]))
    return room_of(q, size)


def backward(
    do, dstate, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options, room=None,
    made_by=None,
):  # fmt: skip
    """Return the gradients of all that has one; ``room`` holds what the forward pass kept."""
    call = (made_by or Call)(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, options)
    dinitial = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    if call.empty:
        if dinitial is not None:
            dinitial.copy_(dstate) if dstate is not None else dinitial.zero_()
        gradients = call.no_gradients()
    else:
        do = do.contiguous()
        if room is None or room.numel() == 0:
            call.intra(None)
        else:
            call.intra_again(room)
        call.scans(do, initial_state, dstate, dinitial)
        gradients = call.gradients(do)
    return *gradients, absent(q) if dinitial is None else dinitial
