# SPDX-License-Identifier: Apache-2.0
"""Forward pass over spans: one program per tile of query rows and head, one loop over the key tiles that they see.

Tiles outside are never touched. Of those inside, the ones that some rows see in part (the head and the tail of the run)
take a mask; those between, the body, take none. It is one loop with a branch and not three loops one after the other:
between two loops the compiler has to move the running output from registers to registers, and on Hopper it then waits
for each matrix instruction by itself. FlashAttention-2 (Dao, 2023) is the source of the order of work.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Arguments
from .configs import ForwardConfig, architecture, forward_config, needs_tiles, padded_dim
from .launch import (
    INTERPRETED,
    dropout_operand,
    launch,
    launching_on,
    memory,
    operand,
    score_operand,
    section_of,
    span_operand,
    tile_descriptor,
    token_major_memory,
    within_reach,
)
from .tiles import (
    LOG2E,
    NEG_INF,
    DropoutOperand,
    SpanOperand,
    add_dot,
    any_nan,
    at_head,
    bias_and_mask,
    dot_rows,
    finish,
    keep_tile,
    key_bounds,
    left_tile,
    load_scores,
    load_spans,
    load_tile,
    place_of,
    product,
    score_tile,
    settle_keys,
    softmax_step,
    softmax_weights,
    span_mask,
    store_tile,
)

NARROW = tl.constexpr(16)
"""Keys per step where a tile with a NaN is computed again: few, so that this code takes no more registers than the
usual loop."""

FILLS_REGISTERS = tl.constexpr(128 * 128)
"""Numbers of a tile's output: with more of them, more than half of the registers of 8 warps are full of it."""


@triton.jit
def right_tile(
    operand, descriptor, b, h, first, inside, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Tile `[ROWS, BLOCK_DIM]` of keys or values: by the descriptor, or by the operand at its head where it is None."""
    if descriptor is None:
        return load_tile(
            operand.ptr, operand.stride_m, operand.stride_n, first, inside, DIM, ROWS, BLOCK_DIM, True, BLOCK_DIM > DIM
        )
    else:
        # The hardware fills in 0 beyond the last row and column.
        return descriptor.load([b, h, first, 0]).reshape(ROWS, BLOCK_DIM)


@triton.jit
def mask_scores(
    s, spans, mask_tile, bias_tile, scale, softcap, b, start, end, key_len, first_key, body_first, body_last,
    BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Scores `[M, N]` in base 2 from products, -inf where hidden. All rows see keys `body_first` to `body_last`."""
    s = score_tile(s, scale, softcap, EXACT)
    s = bias_and_mask(s, bias_tile, mask_tile)
    if (first_key < body_first) | (first_key >= body_last):
        k_pos = first_key + tl.arange(0, BLOCK_N)
        s = span_mask(s, spans, b, start[:, None], end[:, None], k_pos[None, :], key_len)
    return s


@triton.jit
def keep_factor(
    dropout, batch_head, first_row, first_key, query_len, key_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """What dropout multiplies weights `[M, N]` by: 0, or `dropout.scale`."""
    q_pos, k_pos = first_row + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    keep = keep_tile(dropout, batch_head, q_pos[:, None], k_pos[None, :], query_len, key_len)
    return tl.where(keep, dropout.scale, 0.0)


@triton.jit
def attend_keys(
    state, q, query, key, value, spans, mask, bias, dropout, scale, softcap, b, batch_head, start, end, first_row,
    query_len, key_len, first_key, body_first, body_last, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Softmax state after the BLOCK_N keys from `first_key` on; the operands point at this program's head.

    All rows see the keys from `body_first` to `body_last`; both are multiples of BLOCK_N.
    """
    m, l, acc = state
    key_inside = first_key + tl.arange(0, BLOCK_N) < key_len
    row_inside = first_row + tl.arange(0, BLOCK_M) < query_len
    # Before the products: where something is read between them and the softmax, the assembler waits for each of
    # Hopper's matrix instructions by itself.
    mask_tile, bias_tile = mask, bias
    if mask is not None:
        mask_tile = load_scores(mask, first_row, first_key, query_len, key_len, BLOCK_M, BLOCK_N, True)
    if bias is not None:
        bias_tile = load_scores(bias, first_row, first_key, query_len, key_len, BLOCK_M, BLOCK_N, True)
    s, _ = dot_rows(
        q, query, key, first_row, row_inside, first_key, key_inside, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, True,
        PRECISION,
    )  # fmt: skip
    s = mask_scores(
        s, spans, mask_tile, bias_tile, scale, softcap, b, start, end, key_len, first_key, body_first, body_last,
        BLOCK_N, value.ptr.dtype.element_ty == tl.float32,
    )  # fmt: skip
    v = load_tile(
        value.ptr, value.stride_m, value.stride_n, first_key, key_inside, VALUE_DIM, BLOCK_N, BLOCK_DV, True,
        BLOCK_DV > VALUE_DIM,
    )  # fmt: skip
    if dropout is None:  # here, as Triton 3.6 compiles no function that returns None
        return softmax_step(m, l, acc, s, v, None, CLEAN, PRECISION)
    else:
        factor = keep_factor(dropout, batch_head, first_row, first_key, query_len, key_len, BLOCK_M, BLOCK_N)
        return softmax_step(m, l, acc, s, v, factor, CLEAN, PRECISION)


@triton.jit
def attend_overlapped(
    state, q, key, value, key_descriptor, value_descriptor, spans, dropout, scale, softcap, b, batch_head, kv_head,
    start, end, first_row, query_len, key_len, first, body_first, body_last, last, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Softmax state after the keys from `first` to `last`, as by `attend_keys` tile by tile, to the last bit.

    A turn multiplies the weights of the turn before with their values while it computes its own: the matrix units have
    work beside the exponentials. With a mask or a bias the compiler computes the exponentials twice, in two layouts, so
    such calls have the plain loop. FlashAttention-3 (Shah et al., 2024) calls it pipelining within a warp group.
    """
    m, l, acc = state
    alpha = tl.full([BLOCK_M], 1.0, tl.float32)
    # Carried in float32: what is rounded within the turn stays in registers, what comes in rounded would pass through
    # shared memory, of which there is one copy, and the product would have to end before the next weights are written.
    p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_key in tl.range(first, last, BLOCK_N):
        k = right_tile(
            key, key_descriptor, b, kv_head, first_key, first_key + tl.arange(0, BLOCK_N) < key_len, HEAD_DIM, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
        s = product(q, k, None, PRECISION)
        previous = tl.maximum(first_key - BLOCK_N, first)
        v = right_tile(
            value, value_descriptor, b, kv_head, previous, previous + tl.arange(0, BLOCK_N) < key_len, VALUE_DIM,
            BLOCK_N, BLOCK_DV,
        )  # fmt: skip
        acc = add_dot(acc * alpha[:, None], p.to(v.dtype), v, PRECISION)
        s = mask_scores(
            s, spans, None, None, scale, softcap, b, start, end, key_len, first_key, body_first, body_last, BLOCK_N,
            value.ptr.dtype.element_ty == tl.float32,
        )  # fmt: skip
        m, l, alpha, p = softmax_weights(m, l, s)
        if dropout is not None:
            p = p * keep_factor(dropout, batch_head, first_row, first_key, query_len, key_len, BLOCK_M, BLOCK_N)
    previous = tl.maximum((last - 1) // BLOCK_N * BLOCK_N, first)
    v = right_tile(
        value, value_descriptor, b, kv_head, previous, previous + tl.arange(0, BLOCK_N) < key_len, VALUE_DIM, BLOCK_N,
        BLOCK_DV,
    )  # fmt: skip
    return m, l, add_dot(acc * alpha[:, None], p.to(v.dtype), v, PRECISION)


@triton.jit
def initial_state(sinks_ptr, h, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Running maximum `[M]`, sum `[M]` and output `[M, V]` before the first key."""
    m = tl.full([BLOCK_M], NEG_INF, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        # A sink is a score without a value: the softmax starts from it instead of from nothing.
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        m = tl.full([BLOCK_M], 0.0, tl.float32) + sink
        l += tl.where(sink == NEG_INF, 0.0, 1.0)
    return m, l, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)


@triton.jit
def store_output(
    output, rounding, out, first_row, inside, first_column, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Store the output `[M, COLUMNS]` and, unless `rounding` is None, what rounding takes from it.

    In pieces of MOST columns, so that only one piece at a time is in registers both exact and rounded.
    """
    if COLUMNS > MOST:
        left, right = out.reshape(BLOCK_M, 2, COLUMNS // 2).permute(0, 2, 1).split()
        half: tl.constexpr = COLUMNS // 2
        store_output(output, rounding, left, first_row, inside, first_column, VALUE_DIM, BLOCK_M, half, MOST)
        store_output(output, rounding, right, first_row, inside, first_column + half, VALUE_DIM, BLOCK_M, half, MOST)
    else:
        store_tile(output, out, first_row, inside, first_column, VALUE_DIM, BLOCK_M, COLUMNS)
        if rounding is not None:
            lost = out - out.to(output.ptr.dtype.element_ty).to(tl.float32)
            store_tile(rounding, lost, first_row, inside, first_column, VALUE_DIM, BLOCK_M, COLUMNS)


@triton.jit(do_not_specialize=["section"])
def forward_kernel(
    query,
    key,
    value,
    output,
    rounding,
    lse_ptr,
    spans,
    mask,
    bias,
    sinks_ptr,
    dropout,
    key_descriptor,
    value_descriptor,
    scale,
    softcap,
    num_heads,
    group_size,
    section,
    query_len,
    key_len,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Output and log-sum-exp of one tile of BLOCK_M rows of one head; the grid is (tiles x batch x heads,)."""
    num_tiles = tl.cdiv(query_len, BLOCK_M)
    # Last rows first: under a causal mask they have the most keys.
    tile, batch_head = place_of(tl.program_id(0), num_tiles, section)
    first_row = (num_tiles - 1 - tile) * BLOCK_M
    b, h = batch_head // num_heads, batch_head % num_heads

    kv_head = h // group_size
    query, key, value = at_head(query, b, h), at_head(key, b, kv_head), at_head(value, b, kv_head)
    output = at_head(output, b, h)
    if rounding is not None:
        rounding = at_head(rounding, b, h)
    if mask is not None:
        mask = at_head(mask, b, h)
    if bias is not None:
        bias = at_head(bias, b, h)

    q_pos = first_row + tl.arange(0, BLOCK_M)
    q = left_tile(query, first_row, q_pos < query_len, HEAD_DIM, BLOCK_M, BLOCK_D, CHUNK_D)
    start, end = load_spans(spans, b, q_pos, query_len)
    first, body_first, body_last, last = key_bounds(spans, b, start, end, q_pos < query_len, BLOCK_N)

    state = initial_state(sinks_ptr, h, BLOCK_M, BLOCK_DV)
    if OVERLAP:
        state = attend_overlapped(
            state, q, key, value, key_descriptor, value_descriptor, spans, dropout, scale, softcap, b, batch_head,
            kv_head, start, end, first_row, query_len, key_len, first, body_first, body_last, last,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION, BLOCK_N,
        )  # fmt: skip
    else:
        for first_key in tl.range(first, last, BLOCK_N):
            state = attend_keys(
                state, q, query, key, value, spans, mask, bias, dropout, scale, softcap, b, batch_head, start, end,
                first_row, query_len, key_len, first_key, body_first, body_last, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                CHUNK_D, BLOCK_M, PRECISION, BLOCK_N, CLEAN=False,
            )  # fmt: skip
    # A NaN may have come from a key that its row does not see (0 x NaN). Only then is it worth the care to find out.
    if any_nan(state[2]):
        state = initial_state(sinks_ptr, h, BLOCK_M, BLOCK_DV)
        for first_key in tl.range(first, last, NARROW, num_stages=1):
            # Without a body, every tile takes a mask.
            state = attend_keys(
                state, q, query, key, value, spans, mask, bias, dropout, scale, softcap, b, batch_head, start, end,
                first_row, query_len, key_len, first_key, first, first, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                CHUNK_D, BLOCK_M, PRECISION, NARROW, CLEAN=True,
            )  # fmt: skip

    m, l, acc = state
    out, lse = finish(m, l, acc)
    inside = q_pos < query_len
    tl.store(lse_ptr + batch_head.to(tl.int64) * query_len + q_pos, lse, mask=inside)
    # In quarters if they are 64 columns, in halves of 512 columns: that is what spills least.
    parts: tl.constexpr = 1 if BLOCK_M * BLOCK_DV <= FILLS_REGISTERS else (4 if BLOCK_DV <= 256 else 2)
    store_output(output, rounding, out, first_row, inside, 0, VALUE_DIM, BLOCK_M, BLOCK_DV, BLOCK_DV // parts)


def forward(arguments: Arguments, *, wants_rounding: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel on checked arguments.

    Returns:
        Output `[batch, num_heads, query_len, value_dim]` in the dtype of `query`, stored token by token so that its
        transpose to `[batch, query_len, num_heads, value_dim]` is contiguous; log-sum-exp
        `[batch, num_heads, query_len]` float32; and, if wanted, what the output lost when it was rounded to its 16-bit
        dtype, in that dtype and layout (else empty).
    """
    query, key, value = arguments[:3]
    if INTERPRETED and query.dtype == torch.bfloat16:
        # The interpreter computes bf16 products from the bits as if they were integers; float32 holds every bf16.
        wide = arguments._replace(query=query.float(), key=key.float(), value=value.float())
        exact, lse, _ = forward(wide, wants_rounding=False)
        output = exact.to(query.dtype)
        return output, lse, (exact - output).to(query.dtype) if wants_rounding else query.new_empty(0)
    query, key, value, mask, bias = within_reach(query, key, value, arguments.mask, arguments.bias)
    batch, num_heads, query_len, _ = query.shape
    output = token_major_memory(query, value.shape[-1])
    rounding = token_major_memory(output) if wants_rounding else query.new_empty(0)
    lse = memory(query, batch, num_heads, query_len, dtype=torch.float32)
    if query_len and batch:
        has_tiles = needs_tiles(
            mask=mask is not None, bias=bias is not None, hidden_keys=arguments.key_mask is not None,
            softcap=arguments.softcap is not None,
        )  # fmt: skip
        config = forward_config(
            architecture(query.device), query.dtype, query.shape[-1], value.shape[-1], query_len,
            has_tiles=has_tiles, has_dropout=arguments.dropout_seed is not None, device=query.device,
        )  # fmt: skip
        given = kernel_arguments(
            query, key, value, output, rounding if wants_rounding else None, lse, spans=span_operand(*arguments.spans),
            mask=mask, bias=bias, sinks=arguments.sinks, scale=arguments.scale, softcap=arguments.softcap,
            dropout=dropout_operand(arguments.dropout_seed, arguments.dropout_p), config=config,
        )  # fmt: skip
        grid = (triton.cdiv(query_len, config.block_m) * batch * num_heads,)
        with launching_on(query):
            launch(forward_kernel, grid, given)
    return output, lse, rounding


def kernel_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    rounding: Tensor | None,
    lse: Tensor,
    *,
    spans: SpanOperand,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout: DropoutOperand | None,
    scale: float,
    softcap: float | None,
    config: ForwardConfig,
) -> dict[str, Any]:
    """Everything `forward_kernel` is called with but its grid; compiling ahead of time takes the same."""
    batch, num_heads, query_len, head_dim = query.shape
    key_len, value_dim = value.shape[2:]
    scores = (batch, num_heads, query_len, key_len)
    overlap = config.overlap and not config.chunk_d and mask is bias is None
    block_n = config.block_n if overlap and config.descriptors else None
    return dict(
        query=operand(query),
        key=operand(key),
        value=operand(value),
        output=operand(output),
        rounding=None if rounding is None else operand(rounding),
        lse_ptr=lse,
        spans=spans,
        mask=score_operand(mask, scores),
        bias=score_operand(bias, scores),
        sinks_ptr=None if sinks is None else sinks.contiguous(),
        dropout=dropout,
        key_descriptor=None if block_n is None else tile_descriptor(key, block_n),
        value_descriptor=None if block_n is None else tile_descriptor(value, block_n),
        scale=scale,
        softcap=softcap,
        num_heads=num_heads,
        group_size=num_heads // key.shape[1],
        section=section_of(batch * num_heads, num_heads // key.shape[1], key_len, key, value),
        query_len=query_len,
        key_len=key_len,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_DV=padded_dim(value_dim),
        CHUNK_D=config.chunk_d or padded_dim(head_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        # float32 means float32: no tf32 products.
        PRECISION="ieee",
        OVERLAP=overlap,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


settle_keys(globals())
