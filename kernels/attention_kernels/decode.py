# SPDX-License-Identifier: Apache-2.0
"""Attention over caches: few queries against many keys, contiguous or in pages, of any dtype.

All heads of a group are rows of one tile and share one read of their keys. Keys are split over programs, whose partial
results are merged by their log-sum-exp (Flash-Decoding; Dao, Haziza, Massa and Sizov, 2023). What is split are the keys
that a sequence sees, not those that its cache has room for, so a half-empty cache costs what it holds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import DecodeConfig, architecture, choose_splits, decode_config, padded_dim
from .launch import (
    INTERPRETED,
    columns_within_reach,
    launch,
    launching_on,
    memory,
    operand,
    score_operand,
    span_operand,
    token_major_memory,
)
from .tiles import (
    FAR,
    LN2,
    LOG2E,
    NEG_INF,
    Operand,
    PageOperand,
    ScaleOperand,
    SpanOperand,
    any_nan,
    bias_and_mask,
    finish,
    key_bounds,
    product,
    rows_of,
    score_tile,
    settle_keys,
    softmax_step,
    span_mask,
)

MOST_SPLITS = 65_535
"""What CUDA allows in the second dimension of a grid."""

NARROW = tl.constexpr(16)
"""Keys per step where a tile with a NaN is computed again, as in the forward pass."""


@triton.jit
def key_rows(operand, pages, b, kv_head, k_pos, inside):
    """Pointers `[N]` to the first column of keys (or values), wherever they lie."""
    if pages is None:
        origin = operand.ptr + tl.cast(b, tl.int64) * operand.stride_b + tl.cast(kv_head, tl.int64) * operand.stride_h
        return origin + k_pos.to(tl.int64) * operand.stride_m
    else:
        entry = pages.table_ptr + tl.cast(b, tl.int64) * pages.stride_b + k_pos // pages.page_size
        page = tl.load(entry, mask=inside, other=0).to(tl.int64)
        row = operand.ptr + page * operand.stride_b + (k_pos % pages.page_size).to(tl.int64) * operand.stride_m
        return row + tl.cast(kv_head, tl.int64) * operand.stride_h


@triton.jit
def row_scales(scales, pages, b, kv_head, k_pos, inside):
    """Scales `[N]` of keys or values."""
    if pages is None:
        row = scales.ptr + tl.cast(b, tl.int64) * scales.stride_b + k_pos.to(tl.int64) * scales.stride_m
        return tl.load(row + tl.cast(kv_head, tl.int64) * scales.stride_h, mask=inside, other=0.0).to(tl.float32)
    else:
        entry = pages.table_ptr + tl.cast(b, tl.int64) * pages.stride_b + k_pos // pages.page_size
        page = tl.load(entry, mask=inside, other=0).to(tl.int64)
        row = scales.ptr + page * scales.stride_b + (k_pos % pages.page_size) * scales.stride_m
        return tl.load(row + tl.cast(kv_head, tl.int64) * scales.stride_h, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_columns(rows, stride_n, first_column, num_columns, inside, COLUMNS: tl.constexpr):
    """Tile `[R, COLUMNS]` of rows given by pointers `[R]`; 0 where a row is not `inside` or a column not there."""
    columns = first_column + tl.arange(0, COLUMNS)
    return tl.load(
        rows[:, None] + columns[None, :] * stride_n, mask=inside[:, None] & (columns < num_columns)[None, :], other=0.0
    )


@triton.jit
def unpacked(numbers, DTYPE: tl.constexpr):
    """A tile of a cache in the dtype of the queries."""
    if numbers.dtype == tl.float8e5 and tl.bfloat16 == DTYPE:
        # By way of float16: Triton would shift the bits into place, which makes a number of NaN.
        return numbers.to(tl.float16).to(DTYPE)
    else:
        return numbers.to(DTYPE)


@triton.jit
def decode_step(
    state, q, query_rows, query_stride_n, query_inside, key, value, pages, key_scales, value_scales, spans, mask_rows,
    mask_stride_n, bias_rows, bias_stride_n, scale, softcap, b, kv_head, start, end, seen_first, seen_last, first_key,
    body_first, body_last, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Softmax state after the BLOCK_N keys from `first_key` on; rows `[M]` are queries of all heads of the group.

    All rows see the keys from `body_first` to `body_last`; both are multiples of BLOCK_N.
    """
    m, l, acc = state
    k_pos = first_key + tl.arange(0, BLOCK_N)
    # Beyond what the rows see there may be no page, or another sequence's.
    inside = (k_pos >= seen_first) & (k_pos < seen_last)
    rows = key_rows(key, pages, b, kv_head, k_pos, inside)
    if CHUNK_D == BLOCK_D:
        k = unpacked(load_columns(rows, key.stride_n, 0, HEAD_DIM, inside, BLOCK_D), q.dtype)
        s = product(q, k, None, PRECISION)
    else:
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in tl.range(0, HEAD_DIM, CHUNK_D, num_stages=1):
            q_piece = load_columns(query_rows, query_stride_n, d, HEAD_DIM, query_inside, CHUNK_D)
            k_piece = unpacked(load_columns(rows, key.stride_n, d, HEAD_DIM, inside, CHUNK_D), q_piece.dtype)
            s = product(q_piece, k_piece, s, PRECISION)
    if key_scales is not None:
        s = s * row_scales(key_scales, pages, b, kv_head, k_pos, inside)[None, :]
    s = score_tile(s, scale, softcap, query_rows.dtype.element_ty == tl.float32)
    both = query_inside[:, None] & inside[None, :]
    bias_tile, mask_tile = bias_rows, mask_rows
    k_far = k_pos.to(tl.int64)
    if bias_rows is not None:
        bias_tile = tl.load(bias_rows[:, None] + k_far[None, :] * bias_stride_n, mask=both, other=0.0)
    if mask_rows is not None:
        mask_tile = tl.load(mask_rows[:, None] + k_far[None, :] * mask_stride_n, mask=both, other=0)
    s = bias_and_mask(s, bias_tile, mask_tile)
    if (first_key < body_first) | (first_key >= body_last):
        s = span_mask(s, spans, b, start[:, None], end[:, None], k_pos[None, :], seen_last)
    rows = key_rows(value, pages, b, kv_head, k_pos, inside)
    v = unpacked(load_columns(rows, value.stride_n, 0, VALUE_DIM, inside, BLOCK_DV), query_rows.dtype.element_ty)
    if value_scales is None:
        return softmax_step(m, l, acc, s, v, None, CLEAN, PRECISION)
    elif v.dtype == tl.float16:
        # A weight times a scale may be below float16's smallest numbers; a value times its scale is not.
        factor = row_scales(value_scales, pages, b, kv_head, k_pos, inside)
        v = (v.to(tl.float32) * factor[:, None]).to(v.dtype)
        return softmax_step(m, l, acc, s, v, None, CLEAN, PRECISION)
    else:
        factor = row_scales(value_scales, pages, b, kv_head, k_pos, inside)
        return softmax_step(m, l, acc, s, v, factor[None, :], CLEAN, PRECISION)


@triton.jit
def packed_tile(offsets_ptr, sequences, tile, group_size, BLOCK_M: tl.constexpr):
    """The sequence that a tile of rows belongs to, which of its tiles it is, and whether it has any rows.

    Each sequence is given one tile more than its rows fill, so that where its tiles begin follows from its own offset;
    that tile is left over if the rows need no other. Rows before the first sequence's are of none.
    """
    b, beyond = 0, sequences
    while beyond - b > 1:
        middle = (b + beyond) // 2
        begins_later = first_packed_tile(offsets_ptr, middle, group_size, BLOCK_M) > tile
        b, beyond = tl.where(begins_later, b, middle), tl.where(begins_later, middle, beyond)
    row_tile = tile - first_packed_tile(offsets_ptr, b, group_size, BLOCK_M)
    rows = (tl.load(offsets_ptr + b + 1) - tl.load(offsets_ptr + b)) * group_size
    row_tile = tl.where(row_tile < 0, tl.cdiv(rows, BLOCK_M), row_tile)
    return b, row_tile, row_tile * BLOCK_M < rows


@triton.jit
def first_packed_tile(offsets_ptr, b, group_size, BLOCK_M: tl.constexpr):
    """The first of a sequence's tiles, counted as in `packed_tiles`."""
    return tl.load(offsets_ptr + b) * group_size // BLOCK_M + b


@triton.jit(do_not_specialize=["num_groups", "sequences"])
def decode_kernel(
    query, key, value, pages, key_scales, value_scales, output_ptr, output_lse, spans, mask, bias, sinks_ptr,
    offsets_ptr, lengths_ptr, scale, softcap, num_groups, sequences, num_kv_heads, group_size, query_len, tokens,
    lse_stride_split,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the keys for a tile of rows of one group of heads; the grid is (batch x key heads x tiles, parts).

    There are `num_groups` groups of heads in the batch. What may be many comes first in the grid, since CUDA takes
    65,535 programs at most in its other dimensions. With `sequences`, whose queries are unequally many, the grid has
    only as many tiles as there are queries for (`packed_tiles`), and each program finds the sequence of its own.

    Rows are (query, head of the group) in this order, so that the rows of a tile see much the same keys. With
    `offsets_ptr` the queries of all sequences lie one after the other, those of sequence b from `offsets[b]` on. With
    `lengths_ptr` sequence b has the keys 0 to `lengths[b]`, whatever spans say: elsewhere there need not be a page.
    """
    query, key, value = rows_of(query), rows_of(key), rows_of(value)
    # Tiles of the last queries come first: the more keys they see, the longer they take.
    if sequences is None:
        group, row_tile = tl.program_id(0) % num_groups, (tl.num_programs(0) - 1 - tl.program_id(0)) // num_groups
        b, kv_head = group // num_kv_heads, group % num_kv_heads
    else:
        kv_head = tl.program_id(0) % num_kv_heads
        tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // num_kv_heads
        b, row_tile, has_rows = packed_tile(offsets_ptr, sequences, tile, group_size, BLOCK_M)
        if BLOCK_DV < 512:  # noqa: SIM102 (wider tiles spill registers where programs may end early)
            if not has_rows:
                return
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    first_token, own_batch = 0, b
    if offsets_ptr is not None:
        first_token = tl.load(offsets_ptr + b)
        query_len = tl.load(offsets_ptr + b + 1) - first_token
        own_batch = 0
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < query_len * group_size
    q_pos = first_token + tl.where(inside, row // group_size, 0)
    h = kv_head * group_size + row % group_size
    place = tl.cast(own_batch, tl.int64) * query.stride_b + h.to(tl.int64) * query.stride_h
    query_rows = query.ptr + place + q_pos.to(tl.int64) * query.stride_m
    mask_rows, mask_stride_n, bias_rows, bias_stride_n = None, None, None, None
    if mask is not None:
        place = tl.cast(own_batch, tl.int64) * mask.stride_b + h.to(tl.int64) * mask.stride_h
        mask_rows, mask_stride_n = mask.ptr + place + q_pos.to(tl.int64) * mask.stride_m, mask.stride_n
    if bias is not None:
        place = tl.cast(own_batch, tl.int64) * bias.stride_b + h.to(tl.int64) * bias.stride_h
        bias_rows, bias_stride_n = bias.ptr + place + q_pos.to(tl.int64) * bias.stride_m, bias.stride_n
    place = spans.start_ptr + own_batch * spans.start_stride_b + q_pos * spans.start_stride_m
    start = tl.load(place, mask=inside, other=0)
    end = tl.load(spans.end_ptr + own_batch * spans.end_stride_b + q_pos * spans.end_stride_m, mask=inside, other=FAR)
    if lengths_ptr is not None:
        start, end = tl.maximum(start, 0), tl.minimum(end, tl.load(lengths_ptr + b))
    first, body_first, body_last, last = key_bounds(spans, b, start, end, inside, BLOCK_N)
    seen_first = tl.min(tl.where(inside & (end > start), start, FAR), 0)
    end = tl.where(inside, end, 0)
    # Each part has as many tiles of the keys that are seen; what the batch's other sequences see plays no role.
    part = tl.cdiv(tl.cdiv(last - first, BLOCK_N), num_splits) * BLOCK_N
    part_first = first + split * part
    part_last = tl.minimum(part_first + part, last)

    if CHUNK_D == BLOCK_D:
        q = load_columns(query_rows, query.stride_n, 0, HEAD_DIM, inside, BLOCK_D)
    else:
        q = query.ptr  # read in pieces where it is multiplied
    state = group_state(sinks_ptr, h, split, BLOCK_M, BLOCK_DV)
    for first_key in tl.range(part_first, part_last, BLOCK_N):
        state = decode_step(
            state, q, query_rows, query.stride_n, inside, key, value, pages, key_scales, value_scales, spans, mask_rows,
            mask_stride_n, bias_rows, bias_stride_n, scale, softcap, b, kv_head, start, end, seen_first, last,
            first_key, body_first, body_last, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CHUNK_D, BLOCK_M, PRECISION,
            BLOCK_N, CLEAN=False,
        )  # fmt: skip
    # A NaN may have come from a key that its row does not see, as in the forward pass: another sequence's old page.
    if any_nan(state[2]):
        state = group_state(sinks_ptr, h, split, BLOCK_M, BLOCK_DV)
        for first_key in tl.range(part_first, part_last, NARROW, num_stages=1):
            state = decode_step(
                state, q, query_rows, query.stride_n, inside, key, value, pages, key_scales, value_scales, spans,
                mask_rows, mask_stride_n, bias_rows, bias_stride_n, scale, softcap, b, kv_head, start, end, seen_first,
                last, first_key, part_first, part_first, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CHUNK_D, BLOCK_M,
                PRECISION, NARROW, CLEAN=True,  # without a body, every tile takes a mask
            )  # fmt: skip

    m, l, acc = state
    out, lse = finish(m, l, acc)
    if offsets_ptr is None:
        token = own_batch * query_len + q_pos
    else:
        token = q_pos
    place = (split.to(tl.int64) * tokens + token) * (num_kv_heads * group_size) + h
    columns = tl.arange(0, BLOCK_DV)
    pointers = output_ptr + place[:, None] * VALUE_DIM + columns[None, :]
    tl.store(pointers, out.to(output_ptr.dtype.element_ty), mask=inside[:, None] & (columns < VALUE_DIM)[None, :])
    place = split.to(tl.int64) * lse_stride_split + own_batch * output_lse.stride_b
    tl.store(output_lse.ptr + place + h * output_lse.stride_h + q_pos * output_lse.stride_m, lse, mask=inside)


@triton.jit
def group_state(sinks_ptr, h, split, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Softmax state before the first key. Each row has the sink of its head, in the first part of the keys only."""
    m = tl.full([BLOCK_M], NEG_INF, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sink = tl.where(split == 0, tl.load(sinks_ptr + h).to(tl.float32) * LOG2E, NEG_INF)
        m = sink
        l = tl.where(sink == NEG_INF, 0.0, 1.0)
    return m, l, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)


@triton.jit
def merge_kernel(
    parts_ptr, part_lse_ptr, output_ptr, output_lse, num_splits, num_heads, query_len, tokens, lse_stride_split,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """The whole from its parts, for one query of one head; the grid is (tokens, heads).

    BLOCK_SPLITS parts are read at once: one after the other, each would be a wait for memory.
    """
    token, h = tl.program_id(0), tl.program_id(1)
    b, q_pos = token // query_len, token % query_len
    columns = tl.arange(0, BLOCK_DV)
    lse_place = b * output_lse.stride_b + h * output_lse.stride_h + q_pos * output_lse.stride_m
    m = tl.full([], NEG_INF, tl.float32)
    l = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in tl.range(0, num_splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        inside, far = split < num_splits, split.to(tl.int64)
        lse = tl.load(part_lse_ptr + far * lse_stride_split + lse_place, mask=inside, other=NEG_INF) * LOG2E
        place = (far * tokens + token) * num_heads + h
        both = inside[:, None] & (columns < VALUE_DIM)[None, :]
        parts = tl.load(parts_ptr + place[:, None] * VALUE_DIM + columns[None, :], mask=both, other=0.0)
        m_new = tl.maximum(m, tl.max(lse, 0))
        m_safe = tl.where(m_new == NEG_INF, 0.0, m_new)
        alpha, weights = tl.exp2(m - m_safe), tl.exp2(lse - m_safe)
        # A part that sees nothing is 0, and stays 0 whatever the others are.
        seen = tl.where((weights == 0.0)[:, None], 0.0, parts * weights[:, None])
        acc = acc * alpha + tl.sum(seen, 0)
        l = l * alpha + tl.sum(weights, 0)
        m = m_new
    total = tl.where(l == 0.0, 1.0, l)
    place = (tl.cast(token, tl.int64) * num_heads + h) * VALUE_DIM
    tl.store(output_ptr + place + columns, (acc / total).to(output_ptr.dtype.element_ty), mask=columns < VALUE_DIM)
    tl.store(output_lse.ptr + lse_place, tl.where(l == 0.0, NEG_INF, (m + tl.log2(total)) * LN2))


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    key_mask: Tensor | None = None,
    gap_count: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    query_offsets: Tensor | None = None,
    max_query_len: int | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels on validated arguments (`operators.attention` and `paged.paged_attention` say what they are).

    Args:
        key, value: `[batch, num_kv_heads, key_len, dim]`; with `block_table` `[pages, num_kv_heads, page_size, dim]`.
        key_scale, value_scale: of quantised keys and values, of their shape without the last dimension.
        out: what the output is written to; it lies token by token.

    Returns:
        Output, stored token by token, and log-sum-exp, as `forward.forward` gives them.
    """
    if INTERPRETED and query.dtype == torch.bfloat16:
        # As in the forward pass: the interpreter cannot multiply bf16.
        key, value = (each.float() if each.dtype == torch.bfloat16 else each for each in (key, value))
        output, lse = decode(
            query.float(), key, value, start, end, key_mask, gap_count, mask, bias, sinks, scale=scale, softcap=softcap,
            block_table=block_table, seq_lens=seq_lens, query_offsets=query_offsets, max_query_len=max_query_len,
            key_scale=key_scale, value_scale=value_scale, num_splits=num_splits,
        )  # fmt: skip
        return output.to(torch.bfloat16) if out is None else out.copy_(output), lse
    query, key, value = columns_within_reach(query, key, value)
    batch, num_heads, query_len, _ = query.shape
    num_kv_heads, value_dim = value.shape[1], value.shape[3]
    output = token_major_memory(query, value_dim) if out is None else out
    lse = memory(query, batch, num_heads, query_len, dtype=torch.float32)
    if not lse.numel():
        return output, lse
    sequences = batch if query_offsets is None else query_offsets.numel() - 1
    longest = query_len if max_query_len is None else max_query_len
    rows = longest * (num_heads // num_kv_heads)
    # The longest sequence would choose the tile shape here. With a number of splits that was asked for, a sequence's
    # bits must not depend on others, so one query chooses it.
    choosing = rows if num_splits is None or query_offsets is None else rows // longest
    config = decode_config(
        architecture(query.device), query.dtype, query.shape[3], value_dim, choosing, query.device,
        in_pages=block_table is not None,
    )  # fmt: skip
    key_len = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
    tiles = triton.cdiv(rows, config.block_m)
    # A long prompt beside many sequences of one new token each would have them all take as many tiles as it takes.
    searching = query_offsets is not None and tiles > 1 and sequences > 1
    all_rows = query_len * (num_heads // num_kv_heads)
    tiles = packed_tiles(all_rows, sequences, config.block_m) if searching else tiles * sequences
    programs = tiles * num_kv_heads
    splits = num_splits or choose_splits(programs, key_len, config.block_n, query.device)
    if splits > MOST_SPLITS:  # more parts than there are tiles of keys would be empty
        splits = min(MOST_SPLITS, max(1, triton.cdiv(key_len, config.block_n)))
    parts, part_lse = output, lse
    if splits > 1:
        parts = memory(lse, splits, batch, query_len, num_heads, value_dim)
        part_lse = memory(lse, splits, *lse.shape)
    arguments = decode_arguments(
        query, key, value, parts, part_lse, spans=span_operand(start, end, key_mask, gap_count), mask=mask, bias=bias,
        sinks=sinks, scale=scale, softcap=softcap, block_table=block_table, seq_lens=seq_lens,
        query_offsets=query_offsets, key_scale=key_scale, value_scale=value_scale, key_len=key_len,
        sequences=sequences, searching=searching, config=config,
    )  # fmt: skip
    with launching_on(query):
        launch(decode_kernel, (programs, splits), arguments)
        if splits > 1:
            launch(merge_kernel, (batch * query_len, num_heads), merge_arguments(parts, part_lse, output, lse))
    return output, lse


def packed_tiles(rows: int, sequences: int, block_m: int) -> int:
    """Tiles of `block_m` rows, no row of two sequences in one, that `rows` rows of `sequences` need at most."""
    return rows // block_m + sequences


def merge_arguments(parts: Tensor, part_lse: Tensor, output: Tensor, lse: Tensor) -> dict[str, Any]:
    """Everything `merge_kernel` is called with but its grid; compiling ahead of time takes the same."""
    batch, num_heads, query_len, value_dim = output.shape
    return dict(
        parts_ptr=parts, part_lse_ptr=part_lse, output_ptr=output, output_lse=row_operand(lse),
        num_splits=parts.shape[0], num_heads=num_heads, query_len=query_len, tokens=batch * query_len,
        lse_stride_split=part_lse.stride(0), VALUE_DIM=value_dim, BLOCK_DV=padded_dim(value_dim),
        BLOCK_SPLITS=min(16, 4096 // padded_dim(value_dim)),
    )  # fmt: skip


def row_operand(lse: Tensor) -> Operand:
    """A log-sum-exp `[batch, num_heads, query_len]` as kernels take it."""
    stride_b, stride_h, stride_m = lse.stride()[-3:]
    return Operand(lse, stride_b, stride_h, stride_m, 0)


def decode_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    spans: SpanOperand,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    query_offsets: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    key_len: int,
    sequences: int,
    searching: bool,
    config: DecodeConfig,
) -> dict[str, Any]:
    """Everything `decode_kernel` is called with but its grid; compiling ahead of time takes the same.

    Args:
        searching: whether the grid has `packed_tiles`, of which each program finds its own.
    """
    batch, num_heads, query_len, head_dim = query.shape
    scores = (batch, num_heads, query_len, key_len)
    pages = None if block_table is None else PageOperand(block_table, block_table.stride(0), key.shape[2])
    block_d, block_dv = padded_dim(head_dim), padded_dim(value.shape[3])
    return dict(
        query=operand(query), key=operand(key), value=operand(value), pages=pages,
        key_scales=scale_operand(key_scale, key), value_scales=scale_operand(value_scale, value), output_ptr=output,
        output_lse=row_operand(lse), spans=spans, mask=score_operand(mask, scores), bias=score_operand(bias, scores),
        sinks_ptr=None if sinks is None else sinks.contiguous(), offsets_ptr=query_offsets,
        lengths_ptr=seq_lens, scale=scale, softcap=softcap, num_groups=sequences * key.shape[1],
        sequences=sequences if searching else None, num_kv_heads=key.shape[1], group_size=num_heads // key.shape[1],
        query_len=query_len, tokens=batch * query_len, lse_stride_split=lse.stride(0) if lse.ndim == 4 else 0,
        HEAD_DIM=head_dim, VALUE_DIM=value.shape[3], BLOCK_D=block_d, BLOCK_DV=block_dv,
        CHUNK_D=min(config.chunk_d or block_d, block_d), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PRECISION="ieee", num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def scale_operand(scale: Tensor | None, tensor: Tensor) -> ScaleOperand | None:
    """Scales as kernels take them, broadcast to the rows of the tensor that they belong to."""
    return None if scale is None else ScaleOperand(scale, *scale.expand(tensor.shape[:3]).stride())


settle_keys(globals())
