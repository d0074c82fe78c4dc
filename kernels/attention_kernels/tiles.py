# SPDX-License-Identifier: Apache-2.0
"""Pieces of attention kernels: locate a tile, load it, score it, take one online-softmax step, finish.

Shapes in comments: M query rows and N keys of a tile, D head dim, V value dim, both padded to a power of two. Softmax
statistics are float32 in base 2 (scores carry a factor log2(e)), as exp2 is what the hardware has.

The online softmax is that of Milakov and Gimelshein (2018) as used by FlashAttention (Dao et al., 2022).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .dropout import BITS
from .interpreter import mend_loop_bounds

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
LOWEST_BIAS = tl.constexpr(-2.3e38)
"""The lowest bias that is still finite once it is multiplied by log2(e)."""
FAR = tl.constexpr(2**31 - 1)
"""A position beyond every key: the largest int32."""
DROPOUT_BITS = tl.constexpr(BITS)
# The finaliser of SplitMix64, as in `dropout._irregular`.
SPLITMIX_STEP = tl.constexpr(0x9E3779B97F4A7C15)
SPLITMIX_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
SPLITMIX_SECOND = tl.constexpr(0x94D049BB133111EB)


class Operand(NamedTuple):
    """A four-dimensional tensor as kernels take it: `[batch, heads, rows, columns]`; stride 0 where it is broadcast."""

    ptr: object
    stride_b: int
    stride_h: int
    stride_m: int
    stride_n: int


class OperandInUnits(NamedTuple):
    """An `Operand` whose strides are multiples of 16 bytes, where Triton cannot tell that they are.

    Triton only looks at whether 16 divides an integer. It does not divide the stride of heads of 72 columns, so Triton
    would read them 2 bytes at a time; `rows_of` shows it that it can read 16. Kernels tell the two kinds apart by the
    number of fields (a field that may be None would not do: Triton 3.6 compares no tuple with None that holds one).
    """

    ptr: object
    stride_b: int
    stride_h: int
    stride_m: int
    stride_n: int
    in_units: int


class SpanOperand(NamedTuple):
    """`Spans` as kernels take them; `key_mask_ptr` (uint8) and `gap_count_ptr` are None where no key is hidden."""

    start_ptr: object
    end_ptr: object
    start_stride_b: int
    start_stride_m: int
    end_stride_b: int
    end_stride_m: int
    key_mask_ptr: object
    key_mask_stride_b: int
    gap_count_ptr: object
    gap_count_stride_b: int


class DropoutOperand(NamedTuple):
    """Dropout as kernels take it: the seed, and `dropout.threshold_and_scale`."""

    seed_ptr: object
    threshold: int
    scale: float


class PageOperand(NamedTuple):
    """Where pages of keys and values lie: `block_table` int32 `[batch, pages of a sequence]`."""

    table_ptr: object
    stride_b: int
    page_size: int


class ScaleOperand(NamedTuple):
    """Scales of quantised keys or values, `[batch or pages, heads, rows]`; stride 0 where broadcast."""

    ptr: object
    stride_b: int
    stride_h: int
    stride_m: int


@triton.jit
def place_of(program, num_tiles, section):
    """Which tile a program computes, and of which head, counted over the batch.

    Programs run in this order: the first tiles of `section` heads, their second tiles, and so on, then the next heads.
    If first tiles have the most to do, the last ones are short, and fill processors that would be idle at the end.
    """
    row = program // section
    return row % num_tiles, row // num_tiles * section + program % section


@triton.jit
def rows_of(operand):
    """An `Operand` of either kind: strides of `OperandInUnits` are divided and multiplied, which tells Triton of 16."""
    stride_b, stride_h, stride_m = operand.stride_b, operand.stride_h, operand.stride_m
    if len(operand) == 6:
        UNIT: tl.constexpr = 128 // operand.ptr.dtype.element_ty.primitive_bitwidth
        stride_b, stride_h, stride_m = stride_b // UNIT * UNIT, stride_h // UNIT * UNIT, stride_m // UNIT * UNIT
    return Operand(operand.ptr, stride_b, stride_h, stride_m, operand.stride_n)


@triton.jit
def at_head(operand, b, h):
    """The operand with its pointer at batch element `b` and head `h`."""
    rows = rows_of(operand)
    offset = tl.cast(b, tl.int64) * rows.stride_b + tl.cast(h, tl.int64) * rows.stride_h
    return Operand(rows.ptr + offset, rows.stride_b, rows.stride_h, rows.stride_m, rows.stride_n)


INTERPRETED = tl.constexpr(not isinstance(at_head, triton.runtime.jit.JITFunction))
"""Whether Triton runs its kernels in its interpreter (TRITON_INTERPRET=1 when they were imported)."""

if INTERPRETED.value:
    mend_loop_bounds()


def settle_keys(module: dict[str, Any]) -> None:
    """Have Triton compute the keys of a module's functions now, in the order of the module.

    A compiled kernel is found again by its key, and Triton makes the key of a function of which constants the functions
    that it calls are known to use by then: it would depend on which kernel a process launches first. In the
    interpreter there is nothing to find; Gluon's functions have no keys there, as they call functions of its own.
    """
    if INTERPRETED.value:
        return
    for function in list(module.values()):
        if isinstance(function, triton.runtime.jit.JITFunction) and function.__module__ == module["__name__"]:
            _ = function.cache_key


@triton.jit
def tile_pointers(ptr, stride_m, stride_n, first_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers `[ROWS, COLUMNS]`. Offsets in the tile are 32-bit, which `launch.within_reach` makes enough."""
    origin = ptr + tl.cast(first_row, tl.int64) * stride_m
    return origin + (tl.arange(0, ROWS)[:, None] * stride_m + tl.arange(0, COLUMNS)[None, :] * stride_n)


@triton.jit
def load_tile(
    ptr,
    stride_m,
    stride_n,
    first_row,
    inside,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,  # constexpr: an unchecked load is a different, faster instruction
    CHECK_COLUMNS: tl.constexpr,
):
    """Tile `[ROWS, COLUMNS]` from `first_row` on, 0 in rows not `inside` `[ROWS]` and from column `num_columns` on."""
    pointers = tile_pointers(ptr, stride_m, stride_n, first_row, ROWS, COLUMNS)
    column_inside = (tl.arange(0, COLUMNS) < num_columns)[None, :]
    if CHECK_ROWS and CHECK_COLUMNS:
        return tl.load(pointers, mask=inside[:, None] & column_inside, other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    elif CHECK_COLUMNS:
        return tl.load(pointers, mask=column_inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(operand, tile, first_row, inside, first_column, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a tile `[ROWS, COLUMNS]` where rows are `inside` `[ROWS]` and columns below `num_columns`."""
    origin = operand.ptr + tl.cast(first_column, tl.int64) * operand.stride_n
    pointers = tile_pointers(origin, operand.stride_m, operand.stride_n, first_row, ROWS, COLUMNS)
    columns = first_column + tl.arange(0, COLUMNS) < num_columns
    tl.store(pointers, tile.to(operand.ptr.dtype.element_ty), mask=inside[:, None] & columns[None, :])


@triton.jit
def load_spans(spans, b, q_pos, query_len):
    """Start and end `[M]` of the rows `q_pos`. Rows beyond the last get 0 and FAR, which bound nothing."""
    inside = q_pos < query_len
    start = tl.load(spans.start_ptr + b * spans.start_stride_b + q_pos * spans.start_stride_m, mask=inside, other=0)
    end = tl.load(spans.end_ptr + b * spans.end_stride_b + q_pos * spans.end_stride_m, mask=inside, other=FAR)
    return start, end


@triton.jit
def key_bounds(spans, b, start, end, inside, BLOCK_N: tl.constexpr):
    """`first, body_first, body_last, last`: rows see keys `[first, last)`, and all of them those of the body between.

    All but `last` are multiples of BLOCK_N.

    Counting key tiles from key 0, not from the first visible key, keeps the order of summation of a row the same
    whatever the other rows of its tile see.
    """
    sees = inside & (end > start)
    first = tl.min(tl.where(sees, start, FAR), 0)
    last = tl.max(tl.where(sees, end, 0), 0)
    first = (tl.minimum(first, last) // BLOCK_N) * BLOCK_N
    # Rows beyond the last must not bound the body: their start is 0 and their end is far.
    body_first = ((tl.max(start, 0) + BLOCK_N - 1) // BLOCK_N) * BLOCK_N
    body_first = tl.maximum(tl.minimum(body_first, last), first)
    body_last = tl.maximum((tl.minimum(tl.min(end, 0), last) // BLOCK_N) * BLOCK_N, body_first)
    if spans.gap_count_ptr is not None:
        has_gaps = tl.load(spans.gap_count_ptr + b * spans.gap_count_stride_b) != 0
        body_last = tl.where(has_gaps, body_first, body_last)
    return first, body_first, body_last, last


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh in exp2 (libdevice has none that the interpreter can run).

    EXACT: to a few units in the last place. Else to about 5e-7, however small it is itself, in half the instructions.
    """
    if not EXACT:
        return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = tl.where(x < 0, -1.0, 1.0) * (1.0 - t) / (1.0 + t)
    # Near 0 the quotient cancels; the Taylor series does not.
    y = x * x
    series = -0.021869488536155203 + y * (0.008863235529902197 + y * -0.0035921280365724813)
    small = x + x * y * (-0.3333333333333333 + y * (0.13333333333333333 + y * (-0.05396825396825397 - y * series)))
    return tl.where(y < 0.1, small, large)


@triton.jit
def product(x, y, acc, PRECISION: tl.constexpr):
    """`acc + x @ y^T`, without `acc` if it is None.

    The backward pass computes scores in both orientations and counts on the same bits. On a GPU the place in the tile
    does not decide in what order an element's terms are added. In the interpreter it does on some processors, whose
    library for linear algebra NumPy calls: there float32 is added in float64 and rounded once.
    """
    if INTERPRETED and x.dtype == tl.float32:
        exact = tl.dot(x.to(tl.float64), tl.trans(y.to(tl.float64)), out_dtype=tl.float64).to(tl.float32)
        return exact if acc is None else acc + exact
    elif acc is None:
        return tl.dot(x, tl.trans(y), input_precision=PRECISION)
    else:
        return add_dot(acc, x, tl.trans(y), PRECISION)


@triton.jit
def add_dot(acc, x, y, PRECISION: tl.constexpr):
    """`acc + x @ y`.

    In float32 the terms of a tile are added up before they are added to others: one sum of thousands, term after term,
    is less exact than eager's, which are of blocks. Stated as a product with 1, or Triton would make one sum of it.
    Matrix units, which 16 bits go to, add several terms at a time.
    """
    if x.dtype == tl.float32:
        return tl.fma(tl.dot(x, y, input_precision=PRECISION), 1.0, acc)
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def dot_rows(
    x, left, right, first_left, left_inside, first_right, right_inside, DIM: tl.constexpr, BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr, BLOCK_DIM: tl.constexpr, CHUNK: tl.constexpr, CHECK_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products `[BLOCK_LEFT, BLOCK_RIGHT]` of rows of two operands, and the right tile `[BLOCK_RIGHT, BLOCK_DIM]`.

    `x` is the left tile. Heads too wide to hold whole (float32, where a product needs its operands in registers; 512
    columns, where they fill the shared memory) are multiplied in pieces of CHUNK columns; then `x` is not looked at and
    what is returned for the right tile stands for nothing.
    """
    if CHUNK == BLOCK_DIM:
        y = load_tile(
            right.ptr, right.stride_m, right.stride_n, first_right, right_inside, DIM, BLOCK_RIGHT, BLOCK_DIM,
            CHECK_RIGHT, BLOCK_DIM > DIM,
        )  # fmt: skip
        return product(x, y, None, PRECISION), y
    else:
        s = tl.zeros([BLOCK_LEFT, BLOCK_RIGHT], tl.float32)
        for d in tl.range(0, DIM, CHUNK, num_stages=1):
            x_piece = load_tile(
                left.ptr + d * left.stride_n, left.stride_m, left.stride_n, first_left, left_inside, DIM - d,
                BLOCK_LEFT, CHUNK, True, DIM % CHUNK != 0,
            )  # fmt: skip
            y_piece = load_tile(
                right.ptr + d * right.stride_n, right.stride_m, right.stride_n, first_right, right_inside, DIM - d,
                BLOCK_RIGHT, CHUNK, CHECK_RIGHT, DIM % CHUNK != 0,
            )  # fmt: skip
            s = product(x_piece, y_piece, s, PRECISION)
        return s, right.ptr


@triton.jit
def left_tile(
    operand, first_row, inside, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The left tile for `dot_rows`: rows of an operand, unless they are read in pieces where they are multiplied."""
    if CHUNK == BLOCK_DIM:
        return load_tile(
            operand.ptr, operand.stride_m, operand.stride_n, first_row, inside, DIM, ROWS, BLOCK_DIM, True,
            BLOCK_DIM > DIM,
        )  # fmt: skip
    else:
        return operand.ptr


@triton.jit
def score_tile(s, scale, softcap, EXACT: tl.constexpr):
    """Scores `[M, N]` in base 2 from products of queries and keys.

    Unless EXACT, softcap moves them by its own size times what `tanh` is off: next to nothing of what rounding weights
    to 16 bits does.
    """
    if softcap is None:
        return s * (scale * LOG2E)
    else:
        return tanh(s * (scale / softcap), EXACT) * (softcap * LOG2E)


@triton.jit
def load_scores(
    operand, first_row, first_key, query_len, key_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHECK_KEYS: tl.constexpr,
):  # fmt: skip
    """Tile `[M, N]` of a mask or a bias; 0 beyond the last row and, with CHECK_KEYS, the last key."""
    inside = (first_row + tl.arange(0, BLOCK_M) < query_len)[:, None]
    if CHECK_KEYS:
        inside = inside & (first_key + tl.arange(0, BLOCK_N) < key_len)[None, :]
    origin = operand.ptr + tl.cast(first_key, tl.int64) * operand.stride_n
    pointers = tile_pointers(origin, operand.stride_m, operand.stride_n, first_row, BLOCK_M, BLOCK_N)
    return tl.load(pointers, mask=inside, other=0)


@triton.jit
def bias_and_mask(s, bias_tile, mask_tile):
    """Scores `[M, N]` plus a bias, and -inf where the mask is 0 or the bias is -inf; None where there is none."""
    if bias_tile is not None:
        added = bias_tile.to(tl.float32)
        # A key hidden by -inf stays hidden where its score is NaN. The lowest number of a dtype, with which models fill
        # masks, hides none: a row of nothing else is the mean of its values. A NaN stays one.
        raised = tl.maximum(added, LOWEST_BIAS, propagate_nan=tl.PropagateNan.ALL)
        s = tl.where(added == NEG_INF, NEG_INF, s + raised * LOG2E)
    if mask_tile is not None:
        s = tl.where(mask_tile != 0, s, NEG_INF)
    return s


@triton.jit
def span_mask(s, spans, b, start, end, k_pos, key_len):
    """Scores, -inf where the row does not see the key.

    For scores `[M, N]` the bounds are `[M, 1]` and `k_pos` is `[1, N]`; for scores `[N, M]` the other way round.
    """
    visible = (k_pos >= start) & (k_pos < end)
    if spans.key_mask_ptr is not None:
        shown = tl.load(spans.key_mask_ptr + b * spans.key_mask_stride_b + k_pos, mask=k_pos < key_len, other=0)
        visible = visible & (shown != 0)
    # Rows beyond the last have a far end; the keys themselves end at key_len.
    return tl.where(visible & (k_pos < key_len), s, NEG_INF)


@triton.jit
def keep_tile(dropout, head, q_pos, k_pos, query_len, key_len):
    """Whether dropout keeps each weight: `dropout.keep_mask`, which explains it, in Triton.

    `head` counts over the whole batch; `q_pos` and `k_pos` are two-dimensional and broadcast to the tile's shape.
    """
    seed = tl.load(dropout.seed_ptr).to(tl.uint64) + SPLITMIX_STEP
    seed = (seed ^ (seed >> 30)) * SPLITMIX_FIRST
    seed = (seed ^ (seed >> 27)) * SPLITMIX_SECOND
    seed = (seed ^ (seed >> 31)) | 1
    row = tl.cast(head, tl.int64) * query_len + q_pos
    y = (row * key_len + k_pos).to(tl.uint64) * seed
    z = y + seed
    x = swap_halves(y * y + y)
    x = swap_halves(x * x + z)
    x = swap_halves(x * x + y)
    return ((x * x + z) >> (64 - DROPOUT_BITS)).to(tl.int32) >= dropout.threshold


@triton.jit
def swap_halves(x):
    """The two 32-bit halves of 64-bit numbers, exchanged."""
    return (x >> 32) | (x << 32)


@triton.jit
def softmax_weights(m, l, s):
    """One online-softmax step without the values: state m `[M]` and l `[M]` before and after the scores s `[M, N]`.

    Also what the output so far is to be multiplied by `[M]`, and the weights `[M, N]`, float32.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    m_safe = tl.where(m_new == NEG_INF, 0.0, m_new)
    alpha = tl.exp2(m - m_safe)
    p = tl.exp2(s - m_safe[:, None])
    return m_new, l * alpha + tl.sum(p, 1), alpha, p


@triton.jit
def softmax_step(m, l, acc, s, v, factor, CLEAN: tl.constexpr, PRECISION: tl.constexpr):
    """One online-softmax step: state m `[M]`, l `[M]`, acc `[M, V]`, scores s `[M, N]`, values v `[N, V]`.

    `factor`, broadcastable to `[M, N]`, is what weights are multiplied by on their way to the values (dropout, the
    scales of quantised values); None is 1. With CLEAN, a NaN or Inf in a value reaches only
    the rows that see its key: 0 x NaN is NaN, so such values are taken out of the product and the rows that see one are
    made NaN as a whole.
    """
    m, l, alpha, p = softmax_weights(m, l, s)
    if factor is not None:
        p = p * factor
    acc = acc * alpha[:, None]
    if CLEAN:
        difference = v - v  # 0 where finite, NaN where not
        poison = tl.sum(difference.to(tl.float32), 1)
        acc += tl.sum(tl.where(s == NEG_INF, 0.0, poison[None, :]), 1)[:, None]
        v = tl.where(difference == 0, v, 0.0)
    acc = add_dot(acc, p.to(v.dtype), v, PRECISION)
    return m, l, acc


@triton.jit
def any_nan(acc):
    """Whether a tile `[M, V]` holds a NaN, as a scalar."""
    return tl.max((acc != acc).to(tl.int32)) > 0


@triton.jit
def finish(m, l, acc):
    """Output `[M, V]` and natural log-sum-exp `[M]`. A row whose sum is 0 saw nothing: output 0, log-sum-exp -inf."""
    empty = l == 0.0
    total = tl.where(empty, 1.0, l)
    # One division for a row. Its sum is about 1 or more, since the largest weight is 1: the inverse is no infinity.
    # Accumulators that fill the registers are divided one number after the other: this the compiler does in place.
    out = acc * (1.0 / total)[:, None] if acc.shape[1] <= 256 else acc / total[:, None]
    return out, tl.where(empty, NEG_INF, (m + tl.log2(total)) * LN2)


settle_keys(globals())
