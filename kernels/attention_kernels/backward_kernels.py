# SPDX-License-Identifier: Apache-2.0
"""The kernels of the backward pass: weights are recomputed from the log-sum-exp, so no scores are stored.

`query_kernel` is for one tile of query rows over its keys, `key_value_kernel` for one tile of keys over the rows that
see them, and `bias_kernel` for a bias that wants its gradient. Each sums in a fixed order in its own program: no
atomics, so the same bits every time. Smaller ones come first: what every row subtracts, and which rows see a tile.

The chain rule is that of FlashAttention-2 (Dao, 2023, Algorithm 2), here with softcap, bias, sinks and dropout.
"""

import triton
import triton.language as tl

from .tiles import (
    FAR,
    LOG2E,
    NEG_INF,
    add_dot,
    any_nan,
    at_head,
    bias_and_mask,
    dot_rows,
    keep_tile,
    key_bounds,
    left_tile,
    load_scores,
    load_spans,
    load_tile,
    place_of,
    score_tile,
    settle_keys,
    span_mask,
    store_tile,
)

NARROW = tl.constexpr(16)
"""Keys per step where a tile with a NaN is computed again, as in the forward pass."""

ROWS_PER_SCAN = tl.constexpr(1024)
"""Rows whose spans are read at once to find which rows see a tile of keys."""


@triton.jit
def row_bounds_kernel(
    spans, bounds_ptr, query_len, key_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr
):
    """First and last row that see a tile of keys and, between them, the body of rows that see all of it.

    The mirror image of `key_bounds`: int32 `(first, body_first, body_last, last)` for each batch element and key tile,
    all but the last multiples of BLOCK_M. The grid is (key tiles x batch,).
    """
    num_tiles = tl.cdiv(key_len, BLOCK_N)
    b = tl.program_id(0) // num_tiles
    first_key = tl.program_id(0) % num_tiles * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, key_len)
    offsets = tl.arange(0, ROWS)
    touch_first, whole_first = tl.full([ROWS], FAR, tl.int32), tl.full([ROWS], FAR, tl.int32)
    touch_last, whole_last = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    whole_count = tl.zeros([ROWS], tl.int32)
    for first_row in tl.range(0, query_len, ROWS):
        q_pos = first_row + offsets
        start, end = load_spans(spans, b, q_pos, query_len)
        inside = (q_pos < query_len) & (end > start)
        touches = inside & (start < last_key) & (end > first_key)
        whole = inside & (start <= first_key) & (end >= last_key)
        touch_first = tl.minimum(touch_first, tl.where(touches, q_pos, FAR))
        touch_last = tl.maximum(touch_last, tl.where(touches, q_pos + 1, 0))
        whole_first = tl.minimum(whole_first, tl.where(whole, q_pos, FAR))
        whole_last = tl.maximum(whole_last, tl.where(whole, q_pos + 1, 0))
        whole_count += whole.to(tl.int32)
    last, body_last = tl.max(touch_last, 0), tl.max(whole_last, 0)
    first, body_first = tl.minimum(tl.min(touch_first, 0), last), tl.minimum(tl.min(whole_first, 0), body_last)
    # A body needs an unbroken run of rows that see all keys of the tile.
    unbroken = tl.sum(whole_count, 0) == body_last - body_first
    if spans.gap_count_ptr is not None:
        unbroken = unbroken & (tl.load(spans.gap_count_ptr + b * spans.gap_count_stride_b) == 0)
    first = (first // BLOCK_M) * BLOCK_M
    body_first, body_last = tl.cdiv(body_first, BLOCK_M) * BLOCK_M, (body_last // BLOCK_M) * BLOCK_M
    has_body = unbroken & (body_first < body_last)
    place = bounds_ptr + tl.program_id(0) * 4
    tl.store(place, first)
    tl.store(place + 1, tl.where(has_body, body_first, first))
    tl.store(place + 2, tl.where(has_body, body_last, first))
    tl.store(place + 3, last)


@triton.jit
def load_statistics(lse2_ptr, delta_ptr, batch_head, q_pos, query_len):
    """Log-sum-exp in base 2 and delta `[M]`, as `store_statistics` left them."""
    inside = q_pos < query_len
    place = tl.cast(batch_head, tl.int64) * query_len + q_pos
    lse = tl.load(lse2_ptr + place, mask=inside, other=-NEG_INF)
    return lse, tl.load(delta_ptr + place, mask=inside, other=0.0)


@triton.jit
def score_gradients(
    x, x_value, left, left_value, right, right_value, first_left, left_inside, left_len, first_right, right_inside,
    right_len, partial, q_pos, k_pos, start, end, lse, delta, spans, mask, bias, dropout, scale, softcap, b, batch_head,
    query_len, key_len, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, CHUNK_D: tl.constexpr, CHUNK_DV: tl.constexpr, BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of weights and of the gradients of its scores, in either orientation.

    For tiles `[M, N]` the left operands are query and output gradient and the right ones key and value; positions,
    bounds and statistics of rows are `[M, 1]`, `k_pos` is `[1, N]`. For tiles `[N, M]` all that is the other way round,
    `bias` and `mask` included. `partial`: whether a row of the tile may not see all of its keys. CHECK: whether right
    rows may not be inside.

    Returns:
        Weights; weights after dropout; gradients of the scores as the softmax sees them, which are those of a bias;
        gradients of the scores before the softcap; and the two right tiles, for the product that follows.
    """
    s, y = dot_rows(
        x, left, right, first_left, left_inside, first_right, right_inside, HEAD_DIM, BLOCK_LEFT, BLOCK_RIGHT, BLOCK_D,
        CHUNK_D, CHECK, PRECISION,
    )  # fmt: skip
    capped = score_tile(s, scale, softcap, left.ptr.dtype.element_ty == tl.float32)
    mask_tile, bias_tile = mask, bias
    if mask is not None:
        mask_tile = load_scores(mask, first_left, first_right, left_len, right_len, BLOCK_LEFT, BLOCK_RIGHT, CHECK)
    if bias is not None:
        bias_tile = load_scores(bias, first_left, first_right, left_len, right_len, BLOCK_LEFT, BLOCK_RIGHT, CHECK)
    s = bias_and_mask(capped, bias_tile, mask_tile)
    if partial:
        s = span_mask(s, spans, b, start, end, k_pos, key_len)
    p = tl.exp2(s - lse)
    dp, y_value = dot_rows(
        x_value, left_value, right_value, first_left, left_inside, first_right, right_inside, VALUE_DIM, BLOCK_LEFT,
        BLOCK_RIGHT, BLOCK_DV, CHUNK_DV, CHECK, PRECISION,
    )  # fmt: skip
    weights = p
    if dropout is not None:
        keep = keep_tile(dropout, batch_head, q_pos, k_pos, query_len, key_len)
        weights = tl.where(keep, p * dropout.scale, 0.0)
        dp = tl.where(keep, dp * dropout.scale, 0.0)
    # A weight of 0 passes no gradient on, not even where a value that its row does not see is NaN.
    ds = tl.where(p == 0.0, 0.0, p * (dp - delta))
    if softcap is None:
        return p, weights, ds, ds, y, y_value
    else:
        tanh = capped * (1.0 / (softcap * LOG2E))
        return p, weights, ds, tl.where(ds == 0.0, 0.0, ds * (1.0 - tanh * tanh)), y, y_value


@triton.jit
def statistics_kernel(
    output, rounding, grad_output, grad_lse_ptr, lse_ptr, lse2_ptr, delta_ptr, num_heads, query_len,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Row statistics of 16-bit problems, from the output: see `store_statistics`.

    The mean of a row's weight gradients is the product of output and output gradient. `rounding` restores the digits
    that the output lost: where one weight is close to 1, a difference of close numbers is all that is left of the rest.
    """
    num_tiles = tl.cdiv(query_len, BLOCK_M)
    first_row = (tl.program_id(0) % num_tiles) * BLOCK_M
    batch_head = tl.program_id(0) // num_tiles
    b, h = batch_head // num_heads, batch_head % num_heads
    q_pos = first_row + tl.arange(0, BLOCK_M)
    inside = q_pos < query_len
    output, grad_output = at_head(output, b, h), at_head(grad_output, b, h)
    out = left_tile(output, first_row, inside, VALUE_DIM, BLOCK_M, BLOCK_DV, BLOCK_DV).to(tl.float32)
    if rounding is not None:
        rounding = at_head(rounding, b, h)
        out += left_tile(rounding, first_row, inside, VALUE_DIM, BLOCK_M, BLOCK_DV, BLOCK_DV).to(tl.float32)
    g = left_tile(grad_output, first_row, inside, VALUE_DIM, BLOCK_M, BLOCK_DV, BLOCK_DV).to(tl.float32)
    place = batch_head.to(tl.int64) * query_len + q_pos
    lse = tl.load(lse_ptr + place, mask=inside, other=NEG_INF) * LOG2E
    lse = tl.where(lse == NEG_INF, -NEG_INF, lse)
    store_statistics(lse, tl.sum(out * g, 1), grad_lse_ptr, lse2_ptr, delta_ptr, place, inside)


@triton.jit
def store_statistics(lse, mean, grad_lse_ptr, lse2_ptr, delta_ptr, place, inside):
    """Store what the other kernels need of each row `[M]`.

    That is the log-sum-exp in base 2, +inf for a row that sees nothing, so that its weights are 0; and delta, which is
    subtracted from the gradient of each of the row's weights: the weighted mean of these gradients, less the gradient
    of the log-sum-exp.
    """
    if grad_lse_ptr is not None:
        mean -= tl.load(grad_lse_ptr + place, mask=inside, other=0.0)
    tl.store(lse2_ptr + place, lse, mask=inside)
    tl.store(delta_ptr + place, mean, mask=inside)


@triton.jit(do_not_specialize=["section"])
def exact_statistics_kernel(
    query, key, value, grad_output, grad_lse_ptr, lse_ptr, lse2_ptr, delta_ptr, sinks_ptr, spans, mask, bias, dropout,
    scale, softcap, num_heads, group_size, section, query_len, key_len, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK_D: tl.constexpr, CHUNK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Row statistics from the very weights and gradients that the other kernels recompute: see `store_statistics`.

    For float32, and for the gradient of a bias: the gradients of a row's scores then add up to 0 as they should, and a
    row that sees one key gets none. The weights' sum, 1 but for rounding, corrects the log-sum-exp.
    """
    num_tiles = tl.cdiv(query_len, BLOCK_M)
    tile, batch_head = place_of(tl.program_id(0), num_tiles, section)
    first_row = (num_tiles - 1 - tile) * BLOCK_M
    b, h = batch_head // num_heads, batch_head % num_heads
    query, grad_output = at_head(query, b, h), at_head(grad_output, b, h)
    key, value = at_head(key, b, h // group_size), at_head(value, b, h // group_size)
    if mask is not None:
        mask = at_head(mask, b, h)
    if bias is not None:
        bias = at_head(bias, b, h)
    q_pos = first_row + tl.arange(0, BLOCK_M)
    inside = q_pos < query_len
    q = left_tile(query, first_row, inside, HEAD_DIM, BLOCK_M, BLOCK_D, CHUNK_D)
    g = left_tile(grad_output, first_row, inside, VALUE_DIM, BLOCK_M, BLOCK_DV, CHUNK_DV)
    place = batch_head.to(tl.int64) * query_len + q_pos
    lse = tl.load(lse_ptr + place, mask=inside, other=NEG_INF) * LOG2E
    lse = tl.where(lse == NEG_INF, -NEG_INF, lse)
    start, end = load_spans(spans, b, q_pos, query_len)
    bounds = key_bounds(spans, b, start, end, inside, BLOCK_N)
    total, mean = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for first_key in tl.range(bounds[0], bounds[3], BLOCK_N):
        k_pos = first_key + tl.arange(0, BLOCK_N)
        p, _, ds, _, _, _ = score_gradients(
            q, g, query, grad_output, key, value, first_row, inside, query_len, first_key, k_pos < key_len, key_len,
            True, q_pos[:, None], k_pos[None, :], start[:, None], end[:, None], lse[:, None], 0.0, spans, mask, bias,
            dropout, scale, softcap, b, batch_head, query_len, key_len, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CHUNK_D,
            CHUNK_DV, BLOCK_M, BLOCK_N, True, PRECISION,
        )  # fmt: skip
        total += tl.sum(p, 1)
        mean += tl.sum(ds, 1)
    if sinks_ptr is not None:
        total += tl.exp2(tl.load(sinks_ptr + h).to(tl.float32) * LOG2E - lse)
    total = tl.where(total == 0.0, 1.0, total)
    # Rounded to the nearest, or a row that sees one key would have a gradient: there both are that key's, and as `/` is
    # compiled for a GPU, `p * d / p` need not be `d`.
    store_statistics(lse + tl.log2(total), tl.div_rn(mean, total), grad_lse_ptr, lse2_ptr, delta_ptr, place, inside)


@triton.jit
def add_product(
    acc, weights, whole, operand, first_row, inside, first_column, DIM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr, CHECK_ROWS: tl.constexpr, CLEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc [A, PIECE] + weights [A, ROWS] @ tile [ROWS, PIECE]`, whose columns begin at `first_column`.

    `whole` is the tile with all its columns, where it is at hand.
    """
    if CHUNK == BLOCK_DIM and PIECE == BLOCK_DIM:
        tile = whole
    else:
        tile = load_tile(
            operand.ptr + first_column * operand.stride_n, operand.stride_m, operand.stride_n, first_row, inside,
            DIM - first_column, ROWS, PIECE, CHECK_ROWS, True,
        )  # fmt: skip
    if CLEAN:
        tile = tl.where(tile - tile == 0, tile, 0.0)
    return add_dot(acc, weights.to(tile.dtype), tile, PRECISION)


@triton.jit
def query_step(
    acc, q, g, query, grad_output, key, value, start, end, lse, delta, spans, mask, bias, dropout, scale, softcap, b,
    batch_head, first_row, first_key, body_first, body_last, first_column, query_len, key_len, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK_D: tl.constexpr,
    CHUNK_DV: tl.constexpr, PIECE_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Gradient `[M, PIECE_D]` of a tile of queries after the BLOCK_N keys from `first_key` on.

    All rows see the keys from `body_first` to `body_last`; both are multiples of BLOCK_N.
    """
    q_pos, k_pos = first_row + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    key_inside = k_pos < key_len
    partial = (first_key < body_first) | (first_key >= body_last)
    _, _, _, ds, k, _ = score_gradients(
        q, g, query, grad_output, key, value, first_row, q_pos < query_len, query_len, first_key, key_inside, key_len,
        partial, q_pos[:, None], k_pos[None, :], start[:, None], end[:, None], lse[:, None], delta[:, None], spans,
        mask, bias, dropout, scale, softcap, b, batch_head, query_len, key_len, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
        CHUNK_D, CHUNK_DV, BLOCK_M, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    return add_product(
        acc, ds, k, key, first_key, key_inside, first_column, HEAD_DIM, BLOCK_N, BLOCK_D, CHUNK_D, PIECE_D, True,
        CLEAN, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["section"])
def query_kernel(
    query, key, value, grad_output, grad_query, lse2_ptr, delta_ptr, spans, mask, bias, dropout, scale, softcap,
    num_heads, group_size, section, query_len, key_len, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK_D: tl.constexpr, CHUNK_DV: tl.constexpr,
    PIECE_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of PIECE_D columns of a tile of queries; the grid is (tiles x batch x heads, pieces)."""
    num_tiles = tl.cdiv(query_len, BLOCK_M)
    tile, batch_head = place_of(tl.program_id(0), num_tiles, section)
    first_row = (num_tiles - 1 - tile) * BLOCK_M
    first_column = tl.program_id(1) * PIECE_D
    b, h = batch_head // num_heads, batch_head % num_heads
    query, grad_output, grad_query = at_head(query, b, h), at_head(grad_output, b, h), at_head(grad_query, b, h)
    key, value = at_head(key, b, h // group_size), at_head(value, b, h // group_size)
    if mask is not None:
        mask = at_head(mask, b, h)
    if bias is not None:
        bias = at_head(bias, b, h)

    q_pos = first_row + tl.arange(0, BLOCK_M)
    inside = q_pos < query_len
    q = left_tile(query, first_row, inside, HEAD_DIM, BLOCK_M, BLOCK_D, CHUNK_D)
    g = left_tile(grad_output, first_row, inside, VALUE_DIM, BLOCK_M, BLOCK_DV, CHUNK_DV)
    lse, delta = load_statistics(lse2_ptr, delta_ptr, batch_head, q_pos, query_len)
    start, end = load_spans(spans, b, q_pos, query_len)
    first, body_first, body_last, last = key_bounds(spans, b, start, end, inside, BLOCK_N)

    acc = tl.zeros([BLOCK_M, PIECE_D], tl.float32)
    # One loop, for the reason that the forward pass has one.
    for first_key in tl.range(first, last, BLOCK_N):
        acc = query_step(
            acc, q, g, query, grad_output, key, value, start, end, lse, delta, spans, mask, bias, dropout, scale,
            softcap, b, batch_head, first_row, first_key, body_first, body_last, first_column, query_len, key_len,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CHUNK_D, CHUNK_DV, PIECE_D, BLOCK_M, PRECISION, BLOCK_N,
            CLEAN=False,
        )  # fmt: skip
    # A NaN may have come from a key that its row does not see (0 x NaN), as in the forward pass.
    if any_nan(acc):
        acc = tl.zeros([BLOCK_M, PIECE_D], tl.float32)
        for first_key in tl.range(first, last, NARROW, num_stages=1):
            # Without a body, every tile takes a mask.
            acc = query_step(
                acc, q, g, query, grad_output, key, value, start, end, lse, delta, spans, mask, bias, dropout, scale,
                softcap, b, batch_head, first_row, first_key, first, first, first_column, query_len, key_len, HEAD_DIM,
                VALUE_DIM, BLOCK_D, BLOCK_DV, CHUNK_D, CHUNK_DV, PIECE_D, BLOCK_M, PRECISION, NARROW, CLEAN=True,
            )  # fmt: skip
    store_tile(grad_query, acc * scale, first_row, inside, first_column, HEAD_DIM, BLOCK_M, PIECE_D)


@triton.jit
def key_value_step(
    grads, k, v, query, grad_output, key, value, lse2_ptr, delta_ptr, spans, mask, bias, dropout, scale, softcap, b, h,
    num_heads, first_row, first_key, body_first, body_last, piece, query_len, key_len, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK_D: tl.constexpr,
    CHUNK_DV: tl.constexpr, PIECE_D: tl.constexpr, PIECE_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of tiles of keys `[N, PIECE_D]` and values `[N, PIECE_DV]` after BLOCK_M rows from `first_row` on.

    The rows from `body_first` to `body_last`, both multiples of BLOCK_M, see all of the keys.
    """
    grad_key, grad_value = grads
    query, grad_output = at_head(query, b, h), at_head(grad_output, b, h)
    if mask is not None:
        mask = at_head(mask, b, h)
    if bias is not None:
        bias = at_head(bias, b, h)
    batch_head = b * num_heads + h
    q_pos, k_pos = first_row + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    partial = (first_row < body_first) | (first_row >= body_last)
    lse, delta = load_statistics(lse2_ptr, delta_ptr, batch_head, q_pos, query_len)
    start, end = load_spans(spans, b, q_pos, query_len)
    # Rows that see nothing, or are beyond the last, are not read: what they hold must not reach a key (0 x NaN).
    row_inside = (q_pos < query_len) & (end > start) & (lse != -NEG_INF)
    end = tl.where(row_inside, end, 0)
    _, weights, _, ds, q, g = score_gradients(
        k, v, key, value, query, grad_output, first_key, k_pos < key_len, key_len, first_row, row_inside, query_len,
        partial, q_pos[None, :], k_pos[:, None], start[None, :], end[None, :], lse[None, :], delta[None, :], spans,
        mask, bias, dropout, scale, softcap, b, batch_head, query_len, key_len, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
        CHUNK_D, CHUNK_DV, BLOCK_N, BLOCK_M, True, PRECISION,
    )  # fmt: skip
    grad_value = add_product(
        grad_value, weights, g, grad_output, first_row, row_inside, piece * PIECE_DV, VALUE_DIM, BLOCK_M, BLOCK_DV,
        CHUNK_DV, PIECE_DV, True, False, PRECISION,
    )  # fmt: skip
    grad_key = add_product(
        grad_key, ds, q, query, first_row, row_inside, piece * PIECE_D, HEAD_DIM, BLOCK_M, BLOCK_D, CHUNK_D, PIECE_D,
        True, False, PRECISION,
    )  # fmt: skip
    return grad_key, grad_value


@triton.jit
def key_value_kernel(
    query, key, value, grad_output, grad_key, grad_value, lse2_ptr, delta_ptr, bounds_ptr, bounds_stride_b, spans, mask,
    bias, dropout, scale, softcap, num_kv_heads, group_size, query_len, key_len, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK_D: tl.constexpr,
    CHUNK_DV: tl.constexpr, PIECE_D: tl.constexpr, PIECE_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a piece of the columns of a tile of keys and values, summed over the heads of their group.

    The grid is (tiles x batch x key heads, pieces). First keys first: under a causal mask most rows see them. `mask`
    and `bias` come with rows and columns exchanged.
    """
    num_tiles = tl.cdiv(key_len, BLOCK_N)
    tile = tl.program_id(0) % num_tiles
    batch_head = tl.program_id(0) // num_tiles
    piece = tl.program_id(1)
    b, kv_head = batch_head // num_kv_heads, batch_head % num_kv_heads
    first_key = tile * BLOCK_N
    key, value = at_head(key, b, kv_head), at_head(value, b, kv_head)
    grad_key, grad_value = at_head(grad_key, b, kv_head), at_head(grad_value, b, kv_head)
    bounds_ptr += b * bounds_stride_b + tile * 4
    first, body_first = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
    body_last, last = tl.load(bounds_ptr + 2), tl.load(bounds_ptr + 3)

    k_pos = first_key + tl.arange(0, BLOCK_N)
    inside = k_pos < key_len
    k = left_tile(key, first_key, inside, HEAD_DIM, BLOCK_N, BLOCK_D, CHUNK_D)
    v = left_tile(value, first_key, inside, VALUE_DIM, BLOCK_N, BLOCK_DV, CHUNK_DV)
    grads = (tl.zeros([BLOCK_N, PIECE_D], tl.float32), tl.zeros([BLOCK_N, PIECE_DV], tl.float32))
    num_heads = num_kv_heads * group_size
    tiles_of_head = tl.cdiv(last - first, BLOCK_M)
    # One loop, over the rows of all heads: a second one would cost registers, and double the time of compiling.
    for index in tl.range(0, group_size * tiles_of_head):
        grads = key_value_step(
            grads, k, v, query, grad_output, key, value, lse2_ptr, delta_ptr, spans, mask, bias, dropout, scale,
            softcap, b, kv_head * group_size + index // tiles_of_head, num_heads,
            first + index % tiles_of_head * BLOCK_M, first_key, body_first, body_last, piece, query_len, key_len,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CHUNK_D, CHUNK_DV, PIECE_D, PIECE_DV, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    store_tile(grad_key, grads[0] * scale, first_key, inside, piece * PIECE_D, HEAD_DIM, BLOCK_N, PIECE_D)
    store_tile(grad_value, grads[1], first_key, inside, piece * PIECE_DV, VALUE_DIM, BLOCK_N, PIECE_DV)


@triton.jit
def bias_kernel(
    query, key, value, grad_output, grad_bias, lse2_ptr, delta_ptr, spans, mask, bias, dropout, scale, softcap, batch,
    num_heads, group_size, query_len, key_len, OVER_BATCH: tl.constexpr, OVER_HEADS: tl.constexpr,
    OVER_ROWS: tl.constexpr, OVER_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK_D: tl.constexpr, CHUNK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of a bias, summed over the dimensions in which the bias is broadcast (OVER_...).

    The grid is (key tiles x row tiles x batch x heads), with 1 for what is summed over.
    """
    key_tiles = 1 if OVER_KEYS else tl.cdiv(key_len, BLOCK_N)
    row_tiles = 1 if OVER_ROWS else tl.cdiv(query_len, BLOCK_M)
    key_first = tl.program_id(0) % key_tiles * BLOCK_N
    row_first = tl.program_id(0) // key_tiles % row_tiles * BLOCK_M
    batch_head = tl.program_id(0) // key_tiles // row_tiles
    batches = 1 if OVER_BATCH else batch
    b_first, h_first = batch_head % batches, batch_head // batches
    b_last, h_last = (batch if OVER_BATCH else b_first + 1), (num_heads if OVER_HEADS else h_first + 1)
    row_last = query_len if OVER_ROWS else row_first + BLOCK_M
    key_last = key_len if OVER_KEYS else key_first + BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in tl.range(b_first, b_last, num_stages=1):
        for first_row in tl.range(row_first, row_last, BLOCK_M, num_stages=1):
            q_pos = first_row + tl.arange(0, BLOCK_M)
            start, end = load_spans(spans, b, q_pos, query_len)
            end = tl.where(q_pos < query_len, end, 0)
            first_seen = tl.min(tl.where(end > start, start, FAR), 0)
            last_seen = tl.max(tl.where(end > start, end, 0), 0)
            for first_key in tl.range(key_first, key_last, BLOCK_N, num_stages=1):
                if (first_seen < first_key + BLOCK_N) & (last_seen > first_key):
                    for h in tl.range(h_first, h_last, num_stages=1):
                        acc += bias_step(
                            query, key, value, grad_output, lse2_ptr, delta_ptr, spans, mask, bias, dropout, scale,
                            softcap, start, end, b, h, first_row, first_key, num_heads, group_size, query_len, key_len,
                            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CHUNK_D, CHUNK_DV, BLOCK_M, BLOCK_N, PRECISION,
                        )  # fmt: skip
    grad_bias = at_head(grad_bias, b_first, h_first)
    rows, columns = row_first + tl.arange(0, BLOCK_M), key_first + tl.arange(0, BLOCK_N)
    dtype = grad_bias.ptr.dtype.element_ty
    if OVER_ROWS and OVER_KEYS:
        tl.store(grad_bias.ptr, tl.sum(acc).to(dtype))
    elif OVER_ROWS:
        tl.store(grad_bias.ptr + columns * grad_bias.stride_n, tl.sum(acc, 0).to(dtype), mask=columns < key_len)
    elif OVER_KEYS:
        pointers = grad_bias.ptr + rows.to(tl.int64) * grad_bias.stride_m
        tl.store(pointers, tl.sum(acc, 1).to(dtype), mask=rows < query_len)
    else:
        store_tile(grad_bias, acc, row_first, rows < query_len, key_first, key_len, BLOCK_M, BLOCK_N)


@triton.jit
def bias_step(
    query, key, value, grad_output, lse2_ptr, delta_ptr, spans, mask, bias, dropout, scale, softcap, start, end, b, h,
    first_row, first_key, num_heads, group_size, query_len, key_len, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK_D: tl.constexpr, CHUNK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients `[M, N]` of the scores of one head's tile, 0 where hidden."""
    query, grad_output = at_head(query, b, h), at_head(grad_output, b, h)
    key, value = at_head(key, b, h // group_size), at_head(value, b, h // group_size)
    if mask is not None:
        mask = at_head(mask, b, h)
    bias = at_head(bias, b, h)
    q_pos, k_pos = first_row + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    inside = q_pos < query_len
    batch_head = b * num_heads + h
    lse, delta = load_statistics(lse2_ptr, delta_ptr, batch_head, q_pos, query_len)
    q = left_tile(query, first_row, inside, HEAD_DIM, BLOCK_M, BLOCK_D, CHUNK_D)
    g = left_tile(grad_output, first_row, inside, VALUE_DIM, BLOCK_M, BLOCK_DV, CHUNK_DV)
    _, _, ds, _, _, _ = score_gradients(
        q, g, query, grad_output, key, value, first_row, inside, query_len, first_key, k_pos < key_len, key_len, True,
        q_pos[:, None], k_pos[None, :], start[:, None], end[:, None], lse[:, None], delta[:, None], spans, mask, bias,
        dropout, scale, softcap, b, batch_head, query_len, key_len, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CHUNK_D,
        CHUNK_DV, BLOCK_M, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    return ds


settle_keys(globals())
