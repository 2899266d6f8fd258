"""Which chunks a program on Hopper walks over, and the warp that copies them.

It says where each chunk lies and clears what is not its sequence's, so that the others walk over
the chunks of all sequences alike.

A program owns a head, or one of its segments where the states that enter them are known.  Where
heads would leave much of the chip idle, and are more than it runs or of packed sequences, the
chunks of all heads lie in one line, of which programs have equal shares.  What a share cuts goes on
in the next one: each walks first through what the next one waits for, and last through what waits
for the one before.  A sequence longer than a share is walked in its order of time nevertheless.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fla.ops.common.hopper import Ring, clear, new_barriers, new_tiles, tell, told, wait_before
from fla.ops.simple_gla.hopper_blocks import C

# Sequences that are looked at together, by one warp or by four
_BLOCK = gl.constexpr(256)
BY_WARP = gl.constexpr(gl.BlockedLayout([8], [32], [1], [0]))
BY_FOUR = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
# Chunks whose places are known; a chunk's is until tiles have passed through all stages twice
PLACES = gl.constexpr(16)
# How many chunks that a sequence cuts may be under way to be cleared
CUT = gl.constexpr(2)
# A place: the first token, how many there are, marks, and which of all sequences' and heads' states
# is its own
TOKEN = gl.constexpr(0)
THERE = gl.constexpr(1)
MARKS = gl.constexpr(2)
WHOSE = gl.constexpr(3)
# Marks: another chunk follows; none does of this sequence, here; its walk begins, or ends, here; or
# goes on in another share
MORE = gl.constexpr(1)
LAST = gl.constexpr(2)
OPENS = gl.constexpr(4)
CLOSES = gl.constexpr(8)
GOES_ON = gl.constexpr(16)


@gluon.jit
def visit(cu_seqlens, i_n, N, T):
    """Of sequence i_n its first token, its length and its number of chunks.

    An empty sequence has one chunk, without a token, in which its state passes by.  Sequence N is
    what lies behind the last one.
    """
    bos = i_n * 0
    length = T
    if cu_seqlens is not None:
        bos = gl.minimum(gl.load(cu_seqlens + i_n).to(gl.int32), T)
        eos = gl.load(cu_seqlens + i_n + 1, mask=i_n < N, other=T).to(gl.int32)
        length = gl.minimum(eos, T) - bos
    return bos, length, gl.maximum(gl.cdiv(length, C), 1)


@gluon.jit
def _bounds(cu_seqlens, at, N, T, LAYOUT: gl.constexpr):
    """Of _BLOCK sequences from ``at`` on: whether they are there, first tokens, and chunks."""
    o_n = at + gl.arange(0, _BLOCK, LAYOUT)
    b_bos = gl.load(cu_seqlens + o_n, mask=o_n < N, other=0).to(gl.int32)
    b_eos = gl.load(cu_seqlens + o_n + 1, mask=o_n < N, other=0).to(gl.int32)
    b_bos = gl.minimum(b_bos, T)
    b_count = gl.maximum(gl.cdiv(gl.minimum(b_eos, T) - b_bos, C), 1)
    return o_n < N, b_bos, gl.where(o_n < N, b_count, 0)


@gluon.jit
def chunks_of(cu_seqlens, N, T, LAYOUT: gl.constexpr):
    """How many chunks ``visit`` finds in the sequences of a row of T tokens."""
    if cu_seqlens is None:
        count = gl.cdiv(T, C)
    else:
        count = N * 0
        for at in range(0, N, _BLOCK):
            _, _, b_count = _bounds(cu_seqlens, at, N, T, LAYOUT)
            count += gl.sum(b_count, 0)
    return count


@gluon.jit
def place_of_token(cu_seqlens, token, N, T):
    """The sequence of a row's first chunk at ``token`` or behind it, and which of its it is."""
    if cu_seqlens is None:
        n = token * 0
        c = gl.cdiv(gl.minimum(token, T), C)
    else:
        n = token * 0
        for at in range(0, N, _BLOCK):
            m, b_bos, b_count = _bounds(cu_seqlens, at, N, T, BY_WARP)
            m = m & (b_bos < token) & (b_bos + (b_count - 1) * C < token)
            n += gl.sum(m.to(gl.int32), 0)
        bos, _, _ = visit(cu_seqlens, n, N, T)
        c = gl.where(n < N, gl.cdiv(gl.maximum(token - bos, 0), C), 0)
    return n, c


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def places_of_chunks(cu_seqlens, first, last, N, T):
    """Of two chunks of a row the sequences, and which of these sequences' chunks they are.

    The chunk behind the last one is the first of sequence N, or its sequence's where it has one.
    """
    n_0 = first * 0
    n_1 = n_0
    c_0 = first
    c_1 = last
    if cu_seqlens is not None:
        before = n_0
        for at in range(0, N, _BLOCK):
            m, _, b_count = _bounds(cu_seqlens, at, N, T, BY_WARP)
            b_upto = before + gl.associative_scan(b_count, 0, _plus)
            m_0 = m & (b_upto <= first)
            m_1 = m & (b_upto <= last)
            n_0 += gl.sum(m_0.to(gl.int32), 0)
            n_1 += gl.sum(m_1.to(gl.int32), 0)
            c_0 = gl.minimum(c_0, first - gl.max(gl.where(m_0, b_upto, 0), 0))
            c_1 = gl.minimum(c_1, last - gl.max(gl.where(m_1, b_upto, 0), 0))
            before += gl.sum(b_count, 0)
    return n_0, c_0, n_1, c_1


@gluon.jit
def share_of(cu_seqlens, i, shares, N, T, H: gl.constexpr):
    """The i-th of ``shares`` of the chunks of all heads: from (head, sequence, chunk) to another.

    Heads are those of all rows.  Shares that are empty are the last ones, for the one before each
    is to have the chunk before.
    """
    chunks = chunks_of(cu_seqlens, N, T, BY_WARP)
    every = chunks * (H if cu_seqlens is not None else H * N)
    size = gl.cdiv(every, shares)
    begin = gl.minimum(i * size, every)
    stop = gl.minimum(begin + size, every)
    chunks = gl.maximum(chunks, 1)
    h_0 = begin // chunks
    h_1 = gl.maximum(stop - 1, 0) // chunks
    first, last = begin - h_0 * chunks, stop - h_1 * chunks
    n_0, c_0, n_1, c_1 = places_of_chunks(cu_seqlens, first, last, N, T)
    return h_0, n_0, c_0, h_1, n_1, c_1


@gluon.jit
def interval_of(cu_seqlens, h, begin, stop, N, T):
    """``share_of`` for the chunks of head h that begin in [begin, stop)."""
    n_0, c_0 = place_of_token(cu_seqlens, begin, N, T)
    n_1, c_1 = place_of_token(cu_seqlens, stop, N, T)
    return h, n_0, c_0, h, n_1, c_1


@gluon.jit
def new_rings(x_desc, y_desc, z_desc, STAGES: gl.constexpr, PACKED: gl.constexpr):
    """Rings of x, y and z, whose tiles arrive and are left together; a fence has to follow.

    A chunk has arrived when its bytes and its place have.  PACKED sequences may cut chunks, which
    have CUT barriers of their own, behind those of the stages; where the tensor ends, copies bring
    zeros.
    """
    ready = new_barriers(STAGES + (CUT if PACKED else 0), 2)
    empty = new_barriers(STAGES, 2)
    x_ring = Ring(new_tiles(x_desc, STAGES), ready, empty)
    y_ring = Ring(new_tiles(y_desc, STAGES), ready, empty)
    return x_ring, y_ring, Ring(new_tiles(z_desc, STAGES), ready, empty)


@gluon.jit
def complete(x_ring, y_ring, z_ring, n, cut, there):
    """When chunk n has come, the cut-th that is cut, clear y and z of what is not there."""
    STAGES: gl.constexpr = x_ring.tiles.shape[0]
    mbarrier.wait(x_ring.ready.index(STAGES + cut % CUT), cut // CUT % 2)
    clear(y_ring.tiles, n, there)
    clear(z_ring.tiles, n, there)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(x_ring.ready.index(n % STAGES), count=2)  # for bytes and place


@gluon.jit
def begin_copies(
    x_desc, y_desc, z_desc, b_desc, x_ring, y_ring, z_ring, b_ring, n, arrived, i_b, token, i_h, i_z
):  # fmt: skip
    """Copy the tiles of chunk n, which begins at ``token``, as soon as there is room."""
    COLUMNS: gl.constexpr = z_desc.block_type.shape[3]
    BYTES: gl.constexpr = (
        x_desc.block_type.nbytes
        + y_desc.block_type.nbytes
        + z_desc.block_type.nbytes
        + (0 if b_desc is None else b_desc.block_type.nbytes)
    )
    stage = n % x_ring.tiles.shape[0]
    wide = [i_b, token, i_h, 0]
    block = [i_b, token, i_h, i_z * COLUMNS]
    wait_before(x_ring.empty, n)
    mbarrier.expect(arrived, BYTES)
    tma.async_copy_global_to_shared(x_desc, wide, arrived, x_ring.tiles.index(stage))
    tma.async_copy_global_to_shared(y_desc, wide, arrived, y_ring.tiles.index(stage))
    tma.async_copy_global_to_shared(z_desc, block, arrived, z_ring.tiles.index(stage))
    if b_desc is not None:
        tma.async_copy_global_to_shared(b_desc, block, arrived, b_ring.tiles.index(stage))


@gluon.jit
def produce(
    x_desc, y_desc, z_desc, b_desc, sums, flags, x_ring, y_ring, z_ring, b_ring, s_tiles,
    places, cu_seqlens, h_0, n_0, c_0, h_1, n_1, c_1, i_z, N, T, H: gl.constexpr,
    NZ: gl.constexpr, BACK: gl.constexpr,
):  # fmt: skip
    """Copy the tiles of each chunk in the order of the walk, all to arrive at one barrier.

    Chunks are those from (h_0, n_0, c_0) to (h_1, n_1, c_1), of heads of all rows, of their
    sequences and of these.  Where there is none a chunk without tokens stands for them.

    And lay beside them the chunk's place.  Its gate's sums are copied one by one: a copy of all of
    them begins at multiples of 16 bytes, a chunk at any token.

    Where a sequence ends inside a chunk another one may follow.  Such a chunk arrives at a barrier
    of its own, and is ready when what is not the sequence's has been cleared, for which the copies
    of the next chunk do not wait.
    """
    STAGES: gl.constexpr = x_ring.tiles.shape[0]
    PACKED: gl.constexpr = cu_seqlens is not None
    WARP: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    o_c = gl.arange(0, C, WARP)
    o_p = gl.arange(0, 4, WARP)
    n = 0
    # how many chunks have been cut, and how many tokens the last chunk has
    cuts = 0
    before = C
    nothing = (h_0 > h_1) | ((h_0 == h_1) & ((n_0 > n_1) | ((n_0 == n_1) & (c_0 >= c_1))))
    h_1 = gl.where(nothing, h_0, h_1)
    n_1 = gl.where(nothing, n_0, n_1)
    c_1 = gl.where(nothing, c_0 + 1, c_1)
    for i_l in range(h_1 - h_0 + 1):
        h = h_0 + i_l if BACK else h_1 - i_l
        i_b = h // H
        i_h = h % H
        # sequences of its row
        first = gl.where(h == h_0, n_0, 0)
        last = gl.where(h == h_1, n_1 + gl.where(c_1 > 0, 1, 0), N if PACKED else 1)
        if sums is not None:
            p_sums = sums + (i_h * (1 if PACKED else N) + i_b).to(gl.int64) * T
        for i_s in range(last - first):
            i_n = first + i_s if BACK else last - 1 - i_s
            s_from = gl.where((h == h_0) & (i_n == n_0), c_0, 0)
            is_last = (h == h_1) & (i_n == n_1)
            i_n = i_n if PACKED else i_b
            bos, length, chunks = visit(cu_seqlens, i_n, N, T)
            s_to = gl.where(is_last, c_1, chunks)
            opens = ((s_to == chunks) if BACK else (s_from == 0)) & (nothing == 0)
            closes = (s_from == 0) if BACK else (s_to == chunks)
            for i in range(s_to - s_from):
                c = s_to - 1 - i if BACK else s_from + i
                token = bos + c * C
                there = gl.where(nothing, 0, gl.minimum(length - c * C, C))
                follows = (i_l < h_1 - h_0) | (i_s + 1 < last - first) | (i + 1 < s_to - s_from)
                marks = gl.where(follows, MORE, 0) + gl.where(i + 1 == s_to - s_from, LAST, 0)
                marks += gl.where(opens, OPENS, 0)
                marks += gl.where(nothing, 0, gl.where(closes, CLOSES, GOES_ON))
                b_p = gl.where(o_p == TOKEN, token, there)
                b_p = gl.where(o_p == MARKS, marks, gl.where(o_p == WHOSE, i_n * H + i_h, b_p))
                stage = n % STAGES
                arrived = x_ring.ready.index(stage)
                if PACKED:
                    arrived = x_ring.ready.index(gl.where(there < C, STAGES + cuts % CUT, stage))
                begin_copies(
                    x_desc, y_desc, z_desc, b_desc, x_ring, y_ring, z_ring, b_ring, n, arrived,
                    i_b, token, i_h, i_z,
                )  # fmt: skip
                if sums is not None:
                    async_copy.async_copy_global_to_shared(
                        s_tiles.index(stage), p_sums + token + o_c, mask=o_c < there
                    )
                    async_copy.mbarrier_arrive(arrived)
                if PACKED:
                    if before < C:
                        complete(x_ring, y_ring, z_ring, n - 1, cuts - 1, before)
                    before = there
                    cuts += (there < C).to(gl.int32)
                if flags is not None:
                    if (i == 0) & ((opens | nothing) == 0):  # its state is of the share before
                        p_flag = flags + (gl.program_id(0) - NZ)
                        # there is no load that acquires
                        while gl.atomic_xchg(p_flag, 0, sem="acquire", scope="gpu") == 0:
                            pass
                tell(places, n, b_p)
                mbarrier.arrive(arrived, count=1)
                n += 1
    if PACKED:
        if before < C:
            complete(x_ring, y_ring, z_ring, n - 1, cuts - 1, before)


@gluon.jit
def produce_own(
    x_desc, y_desc, z_desc, b_desc, sums, flags, x_ring, y_ring, z_ring, b_ring, s_tiles,
    places, cu_seqlens, i_z, unit, units, N, T, begin, stop, H: gl.constexpr, NZ: gl.constexpr,
    BACK: gl.constexpr, SEGMENTED: gl.constexpr,
):  # fmt: skip
    """``produce`` for a program's segment, its share, or its head."""
    own = unit, 0, 0, unit, 1 if cu_seqlens is None else N, 0
    if SEGMENTED:
        own = interval_of(cu_seqlens, unit % H, begin, stop, N, T)
    elif flags is not None:
        # programs begin in their order, and wait for states of those before alone
        i = units - 1 - unit if BACK else unit
        own = share_of(cu_seqlens, i, units, N, T, H)
    h_0, n_0, c_0, h_1, n_1, c_1 = own
    produce(
        x_desc, y_desc, z_desc, b_desc, sums, flags, x_ring, y_ring, z_ring, b_ring,
        s_tiles, places, cu_seqlens, h_0, n_0, c_0, h_1, n_1, c_1, i_z, N, T, H, NZ, BACK,
    )  # fmt: skip


@gluon.jit
def row_and_head(places, n, H: gl.constexpr, PACKED: gl.constexpr):
    """Those of the n-th chunk."""
    whose = told(places, n, WHOSE)
    return whose * 0 if PACKED else whose // H, whose % H


@gluon.jit
def forget(out, p_o, o_c, STRIDE: gl.constexpr, cu_seqlens, N, T, begin, stop):
    """Zeros for tokens of no sequence; p_o is where elements of their chunks' rows o_c lie."""
    bos, length, chunks = visit(cu_seqlens, N, N, T)
    first = gl.cdiv(gl.maximum(begin - bos, 0), C)
    last = gl.minimum(gl.cdiv(gl.maximum(stop - bos, 0), C), chunks)
    for c in range(first, last):
        p = out + (bos + c * C).to(gl.int64) * STRIDE + p_o
        b_0 = gl.zeros_like(p_o).to(out.dtype.element_ty)
        gl.store(p, b_0, mask=(o_c < length - c * C)[:, None])
