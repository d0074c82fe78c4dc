# SPDX-License-Identifier: Apache-2.0
"""The forward pass over spans for Hopper, in Gluon: one warp brings tiles, two warp groups of 64 rows each use them.

What `forward.forward_kernel` leaves to the compiler is written down here, after FlashAttention-3 (Shah et al., 2024).
The hardware copies tiles (TMA) into a ring of buffers ahead of their use; a warp group's product with values runs
beside its next weights; programs take tile after tile. Partitions of warps talk through barriers in shared memory
(mbarriers): `ready` says that a buffer has been filled, `free` that it may be filled again. The n-th use of a buffer,
from 0, waits for phase n & 1 of `ready`, and for the opposite phase of `free`, which lets the first use pass.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..tiles import FAR, LN2, LOG2E, NEG_INF, at_head, settle_keys

# These have one name in Triton 3.6 or 3.7 and another later.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

GROUP_ROWS = gl.constexpr(64)
"""Query rows of a warp group: those of its matrix instruction."""

GROUPS = gl.constexpr(2)

MANY_TURNS = gl.constexpr(1 << 30)
"""More tiles of keys than a program has time for: at a microsecond each, a quarter of an hour."""

PIECE = gl.constexpr(64)
"""Columns that are looked at together where keys are looked at one by one."""


class Work(NamedTuple):
    """What there is to do: `num_tiles` tiles of 128 query rows, in sections of so many heads."""

    num_heads: Any
    group_size: Any
    batch_heads: Any
    query_len: Any
    key_len: Any
    section: Any
    num_tiles: Any


class Buffers(NamedTuple):
    """Shared memory: tiles of queries, one per group, and rings of keys and values; barriers for each of them.

    `troubles` is how many tiles with a NaN each group has met.
    """

    q_tiles: Any
    k_tiles: Any
    v_tiles: Any
    q_ready: Any
    q_free: Any
    k_ready: Any
    k_free: Any
    v_ready: Any
    v_free: Any
    troubles: Any


# ---------------------------------------------------------------------- which tile, which keys


@gluon.jit
def place_of(tile, work):
    """Batch element, head and first row of a tile.

    `section` heads at a time, whose keys and values together stay in the last cache; of each, last rows first: under a
    causal mask they have the most to do, and short tiles at the end fill the gaps.
    """
    rows: gl.constexpr = GROUPS * GROUP_ROWS
    tiles_per_head = gl.cdiv(work.query_len, rows)
    first_head = tile // (work.section * tiles_per_head) * work.section
    heads_here = gl.minimum(work.section, work.batch_heads - first_head)
    within = tile - first_head * tiles_per_head
    batch_head = first_head + within % heads_here
    first_row = (tiles_per_head - 1 - within // heads_here) * rows
    return batch_head // work.num_heads, batch_head % work.num_heads, first_row


@gluon.jit
def load_spans(spans, b, q_pos, query_len):
    """Start and end of the rows `q_pos`, in their layout. Rows beyond the last see nothing and bound nothing."""
    inside = q_pos < query_len
    start = gl.load(spans.start_ptr + b * spans.start_stride_b + q_pos * spans.start_stride_m, mask=inside, other=0)
    end = gl.load(spans.end_ptr + b * spans.end_stride_b + q_pos * spans.end_stride_m, mask=inside, other=FAR)
    return start, end


@gluon.jit
def bounds_of(start, end, inside):
    """First key that any row sees, and the one after the last."""
    sees = inside & (end > start)
    last = gl.max(gl.where(sees, end, 0), 0)
    return gl.minimum(gl.min(gl.where(sees, start, FAR), 0), last), last


@gluon.constexpr_function
def every_warp(num_warps):
    """Rows in every warp, so that what is reduced over them takes no shared memory, no barrier and no register."""
    return gl.SliceLayout(1, gl.BlockedLayout([1, 1], [32, 1], [1, num_warps], [0, 1]))


@gluon.jit
def seen_keys(spans, b, first_row, query_len, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    """First and last key that a tile's rows see, and those that all rows of a group see.

    The first is a multiple of BLOCK_N; all partitions agree on it and on the last.
    """
    row = gl.arange(0, GROUPS * GROUP_ROWS, layout=every_warp(gl.num_warps()))
    start, end = load_spans(spans, b, first_row + row, query_len)
    first, last = bounds_of(start, end, first_row + row < query_len)
    own = row // GROUP_ROWS == GROUP
    body_first, body_last = gl.max(gl.where(own, start, 0), 0), gl.min(gl.where(own, end, FAR), 0)
    return first // BLOCK_N * BLOCK_N, last, body_first, body_last


# ---------------------------------------------------------------------- the warp that brings tiles


@gluon.jit
def produce(query, key, value, spans, buffers, work, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Fill buffers as they become free, tile after tile. `query`, `key` and `value` are descriptors."""
    turn, round_number = 0, 0
    for tile in range(gl.program_id(0), work.num_tiles, gl.num_programs(0)):
        b, h, first_row = place_of(tile, work)
        kv_head = h // work.group_size
        first, last, _, _ = seen_keys(spans, b, first_row, work.query_len, BLOCK_N, 0)
        for group in gl.static_range(GROUPS):
            mbarrier.wait(buffers.q_free.index(group), (round_number & 1) ^ 1)
            place = [b, h, first_row + group * GROUP_ROWS, 0]
            bring(query, place, buffers.q_ready.index(group), buffers.q_tiles.index(group))
        for first_key in range(first, last, BLOCK_N):
            stage, phase = turn & (STAGES - 1), (turn & STAGES) // STAGES
            place = [b, kv_head, first_key, 0]
            mbarrier.wait(buffers.k_free.index(stage), phase ^ 1)
            bring(key, place, buffers.k_ready.index(stage), buffers.k_tiles.index(stage))
            mbarrier.wait(buffers.v_free.index(stage), phase ^ 1)
            bring(value, place, buffers.v_ready.index(stage), buffers.v_tiles.index(stage))
            turn += 1
        round_number += 1  # noqa: SIM113, since Gluon has no enumerate


@gluon.jit
def bring(descriptor, place, ready, buffer):
    """Have the hardware copy a tile; `ready` ends its phase once all bytes are there. Rows beyond the last are 0."""
    mbarrier.expect(ready, descriptor.block_type.nbytes)
    copy_in(descriptor, place, ready, buffer)


# ---------------------------------------------------------------------- the warp groups that use them


@gluon.jit
def wait_for(ready, turn, STAGES: gl.constexpr, pred=True):
    """Until the tile of a turn is there, if `pred`."""
    mbarrier.wait(ready.index(turn & (STAGES - 1)), (turn & STAGES) // STAGES, pred=pred)


@gluon.jit
def start_scores(
    q_tiles, k_tiles, turn, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr
):
    """Begin the product of a group's queries `[64, D]` and a tile of keys that is there."""
    # The assembler keeps from turn to turn where each sixteen columns of the queries lie, which for 256 columns takes
    # more registers than there are. There the place is made to depend on the turn: none is MANY_TURNS, but that it
    # cannot know.
    group = GROUP + (turn // MANY_TURNS if HEAD_DIM > 128 else 0)
    q = q_tiles.index(group).reshape([GROUP_ROWS, HEAD_DIM])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    keys = k_tiles.index(turn & (STAGES - 1)).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
    nothing = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, layout=layout)
    return warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def start_output(p, acc, v_tiles, turn, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """Begin adding the product of weights `[64, N]` and a tile of values that is there to the output `[64, D]`."""
    values = v_tiles.index(turn & (STAGES - 1)).reshape([BLOCK_N, HEAD_DIM])
    left = gl.convert_layout(p, gl.DotOperandLayout(0, acc.type.layout, 2))
    return warpgroup_mma(left, values, acc, is_async=True)


@gluon.jit
def mask_scores(s, scale, spans, b, start, end, first_key, key_len, body_first, body_last, BLOCK_N: gl.constexpr):
    """Scores in base 2, -inf where hidden. All rows see the keys from `body_first` to `body_last`."""
    s = s * (scale * LOG2E)
    if (first_key < body_first) | (first_key + BLOCK_N > body_last):
        k_pos = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s.type.layout))
        visible = (k_pos[None, :] >= start[:, None]) & (k_pos[None, :] < end[:, None])
        if spans.key_mask_ptr is not None:
            shown = gl.load(spans.key_mask_ptr + b * spans.key_mask_stride_b + k_pos, mask=k_pos < key_len, other=0)
            visible = visible & (shown != 0)[None, :]
        s = gl.where(visible, s, NEG_INF)
    return s


@gluon.jit
def raise_maximum(m, largest):
    """The running maximum with new scores, what exponents are relative to, and what earlier sums are multiplied by."""
    m_new = gl.maximum(m, largest)
    m_safe = gl.where(m_new == NEG_INF, 0.0, m_new)
    return m_new, m_safe, gl.exp2(m - m_safe)


@gluon.jit
def softmax_weights(m, l, s, dtype: gl.constexpr):
    """`tiles.softmax_weights`, whose weights are rounded at once: until they are used they take registers."""
    m, m_safe, alpha = raise_maximum(m, gl.max(s, 1))
    p = gl.exp2(s - m_safe[:, None])
    return m, l * alpha + gl.sum(p, 1), alpha, p.to(dtype)


@gluon.jit
def initial_statistics(sinks_ptr, h, layout: gl.constexpr):
    """Running maximum and sum `[64]` before the first key; a sink is a score without a value."""
    m = gl.full([GROUP_ROWS], NEG_INF, gl.float32, layout=layout)
    l = gl.zeros([GROUP_ROWS], gl.float32, layout=layout)
    if sinks_ptr is not None:
        sink = gl.load(sinks_ptr + h).to(gl.float32) * LOG2E
        m = gl.full([GROUP_ROWS], 0.0, gl.float32, layout=layout) + sink
        l += gl.where(sink == NEG_INF, 0.0, 1.0)
    return m, l


@gluon.jit
def finish(m, l):
    """What the output is divided by, and the natural log-sum-exp. A row whose sum is 0 saw nothing."""
    empty = l == 0.0
    total = gl.where(empty, 1.0, l)
    return total, gl.where(empty, NEG_INF, (m + gl.log2(total)) * LN2)


@gluon.jit
def consume(
    results, spans, sinks_ptr, scale, buffers, work, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The rows `GROUP * 64` to `GROUP * 64 + 63` of tile after tile; results are two descriptors and a pointer."""
    output, rounding, lse_ptr = results
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    score_rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    q_tiles, k_tiles, v_tiles = buffers.q_tiles, buffers.k_tiles, buffers.v_tiles
    q = q_tiles.index(GROUP).reshape([GROUP_ROWS, HEAD_DIM])
    turn, round_number, bad_tiles = 0, 0, 0
    for tile in range(gl.program_id(0), work.num_tiles, gl.num_programs(0)):
        b, h, first_row = place_of(tile, work)
        first, last, body_first, body_last = seen_keys(spans, b, first_row, work.query_len, BLOCK_N, GROUP)
        q_pos = first_row + GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, layout=score_rows)
        start, end = load_spans(spans, b, q_pos, work.query_len)
        if spans.gap_count_ptr is not None:
            has_gaps = gl.load(spans.gap_count_ptr + b * spans.gap_count_stride_b) != 0
            body_last = gl.where(has_gaps, 0, body_last)

        m, l = initial_statistics(sinks_ptr, h, score_rows)
        acc = gl.zeros([GROUP_ROWS, HEAD_DIM], gl.float32, layout=layout)
        mbarrier.wait(buffers.q_ready.index(GROUP), round_number & 1)
        if first < last:
            wait_for(buffers.k_ready, turn, STAGES)
            s = start_scores(q_tiles, k_tiles, turn, GROUP, BLOCK_N, HEAD_DIM, STAGES)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(buffers.k_free.index(turn & (STAGES - 1)), count=1)
            s = mask_scores(
                s, scale, spans, b, start, end, first, work.key_len, body_first, body_last, BLOCK_N
            )  # fmt: skip
            m, l, alpha, p = softmax_weights(m, l, s, v_tiles.dtype)
            wait_for(buffers.k_ready, turn + 1, STAGES, first + BLOCK_N < last)
            for first_key in range(first + BLOCK_N, last, BLOCK_N):
                turn += 1
                s = start_scores(q_tiles, k_tiles, turn, GROUP, BLOCK_N, HEAD_DIM, STAGES)
                wait_for(buffers.v_ready, turn - 1, STAGES)
                running = start_output(p, acc, v_tiles, turn - 1, BLOCK_N, HEAD_DIM, STAGES)
                s = warpgroup_mma_wait(1, deps=(s,))
                mbarrier.arrive(buffers.k_free.index(turn & (STAGES - 1)), count=1)
                s = mask_scores(
                    s, scale, spans, b, start, end, first_key, work.key_len, body_first, body_last, BLOCK_N
                )  # fmt: skip
                m, l, alpha, p = softmax_weights(m, l, s, v_tiles.dtype)
                # The next keys are waited for here and not where they are used: the assembler moves no wait for
                # products above this loop, and so not above the exponentials either.
                wait_for(buffers.k_ready, turn + 1, STAGES, first_key + BLOCK_N < last)
                acc = warpgroup_mma_wait(0, deps=(running,))
                mbarrier.arrive(buffers.v_free.index((turn - 1) & (STAGES - 1)), count=1)
                acc *= gl.convert_layout(alpha, rows)[:, None]
            wait_for(buffers.v_ready, turn, STAGES)
            acc = warpgroup_mma_wait(0, deps=(start_output(p, acc, v_tiles, turn, BLOCK_N, HEAD_DIM, STAGES),))
            mbarrier.arrive(buffers.v_free.index(turn & (STAGES - 1)), count=1)
            turn += 1

        total, lse = finish(m, l)
        # A NaN may have come from a key that its row does not see (0 x NaN). Such tiles are left to `mend`.
        bad = any_nan(acc)
        lse = gl.where(bad > 0, float("nan"), lse)
        gl.store(lse_row(lse_ptr, b, h, work) + q_pos, lse, mask=q_pos < work.query_len)
        bad_tiles += bad
        if bad == 0:
            acc *= gl.convert_layout(1.0 / total, rows)[:, None]
            # The queries have been read: the output leaves through their buffer.
            place = [b, h, first_row + GROUP * GROUP_ROWS, 0]
            take_away(output, place, acc, q, q_tiles.index(GROUP))
            if rounding is not None:
                take_away(rounding, place, acc - acc.to(q.dtype).to(gl.float32), q, q_tiles.index(GROUP))
        mbarrier.arrive(buffers.q_free.index(GROUP), count=1)
        round_number += 1  # noqa: SIM113, since Gluon has no enumerate
    flags: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    buffers.troubles.index(GROUP).store(gl.full([1], 0, gl.int32, layout=flags) + bad_tiles)


@gluon.jit
def any_nan(acc):
    """1 if a group's output has a NaN, else 0; all of its warps agree."""
    of_row = gl.max((acc != acc).to(gl.int32), 1)
    return gl.max(gl.convert_layout(of_row, every_warp(gl.num_warps())), 0)


@gluon.jit
def lse_row(lse_ptr, b, h, work):
    """Pointer to the log-sum-exp of a head's first row."""
    return lse_ptr + (b * work.num_heads + h).to(gl.int64) * work.query_len


@gluon.jit
def take_away(descriptor, place, numbers, tile, buffer):
    """Write numbers `[64, D]` through a buffer, of which `tile` is the two-dimensional view; it is free afterwards."""
    tile.store(numbers.to(tile.dtype))
    fence_async_shared()
    copy_out(descriptor, place, buffer)
    tma.store_wait(0)
    thread_barrier()


# ---------------------------------------------------------------------- tiles with a NaN


@gluon.jit
def mend(query, key, value, output, rounding, lse_ptr, spans, sinks_ptr, scale, work, HEAD_DIM: gl.constexpr):
    """Compute those of a program's tiles anew, with care, whose log-sum-exp says that their output has a NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    for tile in range(gl.program_id(0), work.num_tiles, gl.num_programs(0)):
        b, h, tile_row = place_of(tile, work)
        kv_head = h // work.group_size
        for first_row in range(tile_row, tile_row + GROUPS * GROUP_ROWS, GROUP_ROWS):
            q_pos = first_row + gl.arange(0, GROUP_ROWS, layout=layout)
            lse = gl.load(lse_row(lse_ptr, b, h, work) + q_pos, mask=q_pos < work.query_len, other=0.0)
            if gl.max((lse != lse).to(gl.int32), 0) > 0:
                attend_one_by_one(
                    at_head(query, b, h), at_head(key, b, kv_head), at_head(value, b, kv_head), at_head(output, b, h),
                    None if rounding is None else at_head(rounding, b, h), lse_row(lse_ptr, b, h, work), sinks_ptr,
                    spans, scale, b, h, first_row, work.query_len, HEAD_DIM,
                )  # fmt: skip


@gluon.jit
def attend_one_by_one(
    query, key, value, output, rounding, lse_ptr, sinks_ptr, spans, scale, b, h, first_row, query_len,
    HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """All that a group's rows need, key by key, so that a value reaches only rows that see its key.

    PIECE columns at a time, for each of which scores are computed anew: this hardly ever runs, and must not take
    registers from what does. The operands point at their heads.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    q_pos = first_row + gl.arange(0, GROUP_ROWS, layout=rows)
    inside = q_pos < query_len
    start, end = load_spans(spans, b, q_pos, query_len)
    first, last = bounds_of(start, end, inside)
    columns = gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout))
    for first_column in range(0, HEAD_DIM, PIECE):
        m, l = initial_statistics(sinks_ptr, h, rows)
        acc = gl.zeros([GROUP_ROWS, PIECE], gl.float32, layout=layout)
        for k_pos in range(first, last):
            s = gl.zeros([GROUP_ROWS], gl.float32, layout=rows)
            for column in range(0, HEAD_DIM, PIECE):
                q = gl.load(row_pointers(query, q_pos, column + columns), mask=inside[:, None], other=0.0)
                s += gl.sum(q.to(gl.float32) * load_row(key, k_pos, column + columns)[None, :], 1)
            visible = (k_pos >= start) & (k_pos < end)
            if spans.key_mask_ptr is not None:
                visible = visible & (gl.load(spans.key_mask_ptr + b * spans.key_mask_stride_b + k_pos) != 0)
            s = gl.where(visible, s * (scale * LOG2E), NEG_INF)
            m, m_safe, alpha = raise_maximum(m, s)
            p = gl.exp2(s - m_safe)
            l = l * alpha + p
            v = load_row(value, k_pos, first_column + columns)
            acc = acc * alpha[:, None] + gl.where(visible[:, None], p[:, None] * v[None, :], 0.0)
        total, lse = finish(m, l)
        acc = acc / total[:, None]
        gl.store(lse_ptr + q_pos, lse, mask=inside)
        rounded = acc.to(output.ptr.dtype.element_ty)
        gl.store(row_pointers(output, q_pos, first_column + columns), rounded, mask=inside[:, None])
        if rounding is not None:
            lost = (acc - rounded.to(gl.float32)).to(output.ptr.dtype.element_ty)
            gl.store(row_pointers(rounding, q_pos, first_column + columns), lost, mask=inside[:, None])


@gluon.jit
def row_pointers(operand, q_pos, columns):
    """Pointers to columns of rows."""
    return operand.ptr + (q_pos.to(gl.int64) * operand.stride_m)[:, None] + columns[None, :]


@gluon.jit
def load_row(operand, k_pos, columns):
    """Columns of a key or a value."""
    return gl.load(operand.ptr + gl.cast(k_pos, gl.int64) * operand.stride_m + columns).to(gl.float32)


# ---------------------------------------------------------------------- the kernel


@gluon.jit
def new_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """Barriers whose phases end once COUNT have arrived."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(index), count=COUNT)
    return barriers


@gluon.jit
def forward_kernel(
    query_tiles,
    key_tiles,
    value_tiles,
    output_tiles,
    rounding_tiles,
    query,
    key,
    value,
    output,
    rounding,
    lse_ptr,
    spans,
    sinks_ptr,
    scale,
    work,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Output and log-sum-exp of all tiles. The grid is as many programs as there are processors, at most the tiles.

    The first five arguments are descriptors, the next five the same tensors as operands, for tiles with a NaN.
    """
    q_shape: gl.constexpr = [GROUPS, 1, 1, GROUP_ROWS, HEAD_DIM]
    shape: gl.constexpr = [STAGES, 1, 1, BLOCK_N, HEAD_DIM]
    buffers = Buffers(
        q_tiles=gl.allocate_shared_memory(query_tiles.dtype, q_shape, query_tiles.layout),
        k_tiles=gl.allocate_shared_memory(key_tiles.dtype, shape, key_tiles.layout),
        v_tiles=gl.allocate_shared_memory(value_tiles.dtype, shape, value_tiles.layout),
        q_ready=new_barriers(GROUPS, 1),
        q_free=new_barriers(GROUPS, 1),
        k_ready=new_barriers(STAGES, 1),
        k_free=new_barriers(STAGES, GROUPS),
        v_ready=new_barriers(STAGES, 1),
        v_free=new_barriers(STAGES, GROUPS),
        troubles=gl.allocate_shared_memory(gl.int32, [GROUPS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    fence_async_shared()
    results = (output_tiles, rounding_tiles, lse_ptr)
    gl.warp_specialize(
        [
            (consume, (results, spans, sinks_ptr, scale, buffers, work, gl.constexpr(0), HEAD_DIM, BLOCK_N, STAGES)),
            (consume, (results, spans, sinks_ptr, scale, buffers, work, gl.constexpr(1), HEAD_DIM, BLOCK_N, STAGES)),
            (produce, (query_tiles, key_tiles, value_tiles, spans, buffers, work, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [232, 40],  # registers per thread of the second group and of the warp; the first group has the rest
    )
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    if gl.max(buffers.troubles.index(0).load(layout) + buffers.troubles.index(1).load(layout), 0) > 0:
        mend(query, key, value, output, rounding, lse_ptr, spans, sinks_ptr, scale, work, HEAD_DIM)


settle_keys(globals())
