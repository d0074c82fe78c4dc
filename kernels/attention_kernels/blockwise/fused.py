# SPDX-License-Identifier: Apache-2.0
"""Pieces by torch's fused CPU attention, in the calls that it is fastest in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..scratch import Scratch
from . import processor
from .operands import additive_mask, equal_dims, four_dimensional, is_square, piece_operands, shows_all
from .pieces import Piece
from .problem import Problem, accumulator, has_nan

LARGE_STEP_ROWS = 768
"""Rows from which on torch's fused attention takes 256 at a time; fewer take 64 or 32, with smaller products."""

ROWS_WORTH_COPIES = 512
"""Rows from which on 16-bit operands are copied first, as `as_multiplied` says."""

FEWEST_FOLDED = {torch.bfloat16: 3} if processor.AMX else {}
"""Query heads per key head from which on they are better the rows of one head in decoding, by dtype; 1 for others. With
AMX several rows are a matrix product, for which keys and values are copied; one row of bfloat16 is a product of vectors
that reads them as they are, twice in the time of that copy."""

STRIP_ROWS = 64
"""Rows of a strip of a causal triangle: few, to hug its diagonal, but as many as products are fast for."""

FEWEST_STRIPS = 4
"""Strips from which on they are worth their calls."""

FEWEST_STRIP_NUMBERS = 1 << 18 if processor.AMX else 0
"""Numbers in a sequence's queries (heads x rows x columns) from which on strips are worth their calls. On processors
with AMX products of float32 are so fast that beside those of fewer each call counts."""

MOST_STRIP_ROWS = LARGE_STEP_ROWS - 1 if processor.AMX else 1152
"""Rows of a causal triangle up to which they are."""

FEWEST_FOUND = 16
"""Keys from which on torch's fused attention finds a NaN that is all a row sees: numbers in a processor's vector. What
is left over after whole vectors it searches in another way, which finds no NaN, and gives such a row an output of 0."""

LEAST_KEPT_BYTES = 4 << 20
"""Copies from which on filling new memory may take longer than finding the memory that is kept."""

_scratch = Scratch()

Result = tuple[Tensor, Tensor, Tensor, Tensor]
"""Views of an output and a log-sum-exp, and what belongs there."""


@contextmanager
def as_multiplied(problem: Problem) -> Iterator[Problem]:
    """The problem with its operands as torch's fused attention multiplies them fastest.

    Where a processor's products of 16 bits are not faster than those of float32, all of it is faster in float32, and
    triangles can be halved. Gradients need an output that was not rounded. A bias of 16 bits would have to be widened
    for every tile, so it stays; then there each head's tokens are laid together, as keys and values are packed anew for
    every block of rows, which takes 3 to 15 % longer where other heads lie between.

    Copies are good within the block only, where they are large: then they lie in memory that the thread keeps.
    """
    if is_multiplied_as_given(problem):
        yield problem
    elif problem.trains or problem.bias is None:
        by_token = problem.query.transpose(1, 2)  # as the output is stored, for which torch takes the queries' layout
        tensors, wide = (by_token, problem.key, problem.value), accumulator(problem.query.dtype)
        shapes = [tensor.shape for tensor in tensors]
        large = sum(tensor.numel() for tensor in tensors) * wide.itemsize >= LEAST_KEPT_BYTES
        with _scratch.lent(shapes, wide) if large else nullcontext() as kept:
            if kept is None:
                yield problem.widened
            else:
                query, key, value = (place.copy_(tensor) for place, tensor in zip(kept, tensors, strict=True))
                yield replace(problem, query=query.transpose(1, 2), key=key, value=value)
    else:
        yield replace(problem, **{name: getattr(problem, name).contiguous() for name in ("query", "key", "value")})


def is_multiplied_as_given(problem: Problem) -> bool:
    """Whether operands are best as they are; to say so copies nothing."""
    if problem.query.element_size() != 2:
        return True
    if problem.trains:
        return False
    if processor.MULTIPLIES_16_BITS or problem.query.shape[2] < ROWS_WORTH_COPIES:
        return True
    # A batch that shares its keys need not have a copy for each element.
    return any(tensor.stride(0) == 0 for tensor in (problem.query, problem.key, problem.value))


def may_have_wrong_nan(value: Tensor, output: Tensor, lse: Tensor, *, last_sees_all: bool = False) -> bool:
    """Whether a row of a fused result may be NaN for a key that it does not see.

    Fused attention adds -inf to a hidden score, and multiplies a hidden value by 0: either may make NaN, in the output.
    Where values are finite, the log-sum-exp, which is NaN where a score is, is less to look at. They are if their sum
    is (that of large ones may not be), or, with `last_sees_all`, if the last row of each head is: a weight of 0 makes
    NaN of a value that is not.
    """
    if last_sees_all and math.isfinite(output[:, :, -1].sum()):
        return has_nan(lse)
    if value.numel() < output.numel() and math.isfinite(value.sum()):
        return has_nan(lse)
    return has_nan(output)


def flash(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, in whatever layout, by torch's fused attention; NaN where that may have lost a NaN.

    It gives rows of few keys whose scores are all NaN the log-sum-exp 0, which a row can have otherwise, and in 16 bits
    rows with a score of Inf an output of 0. It hides a score of a causal triangle before it multiplies by the scale, so
    that a negative one would show it.
    """
    if causal and scale < 0:
        query, scale = -query, -scale
    # torch's own name for it takes two thirds of the time that torch.ops takes.
    output, lse = torch._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=causal, attn_mask=mask, scale=scale
    )
    if key.shape[2] < FEWEST_FOUND and not lse.all():
        lose(output, lse, lse == 0)
    if query.element_size() == 2 and not math.isfinite(lse.sum()):
        lose(output, lse, lse == math.inf)
    return output, lse


def lose(output: Tensor, lse: Tensor, rows: Tensor) -> None:
    """Make NaN of rows of a result, in place."""
    output.masked_fill_(rows[..., None], math.nan)
    lse.masked_fill_(rows, math.nan)


class FusedCall(NamedTuple):
    """How torch's fused attention is called.

    Attributes:
        causal: whether each row sees one key more than the one before it, and the first sees one.
        group_size: how many heads become the rows of one head, one head's rows after the other's.
        mask: additive, four-dimensional, for those rows; None if they need none.
    """

    causal: bool
    group_size: int
    mask: Tensor | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output `[batch, num_heads, rows, dim]` and log-sum-exp `[batch, num_heads, rows]`, in whatever layout."""
        batch, num_heads, rows, dim = query.shape
        if self.group_size > 1:
            query = query.reshape(batch, num_heads // self.group_size, self.group_size * rows, dim)
        output, lse = flash(query, key, value, causal=self.causal, mask=self.mask, scale=scale)
        if self.group_size > 1:
            return output.reshape(batch, num_heads, rows, dim), lse.reshape(batch, num_heads, rows)
        return output, lse


def fused_call(problem: Problem, elements: slice, piece: Piece, query: Tensor, key: Tensor) -> FusedCall:
    """The call for a piece with these operands."""
    group_size = query.shape[1] // key.shape[1] if folds_groups(problem, query, key, piece) else 1
    if is_square(piece):
        return FusedCall(group_size == 1, group_size, None)  # the one row of a triangle sees its one key
    # Beside 16-bit queries a mask may be of 16 bits as well: a bias that is need not be widened.
    own = problem.bias is not None and problem.bias.dtype == query.dtype and shows_all(problem, piece)
    added = additive_mask(problem, elements, piece, query.dtype if own else accumulator(query.dtype), group_size)
    return FusedCall(False, group_size, four_dimensional(added, group_size * query.shape[2], piece))


def attend_fused(problem: Problem, elements: slice, piece: Piece) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a piece by torch's fused CPU attention."""
    query, key, value = equal_dims(*piece_operands(problem, elements, piece))
    call = fused_call(problem, elements, piece, query, key)
    output, lse = call(query, key, value, problem.scale)
    output = output[..., : problem.value.shape[-1]]
    if call.mask is not None and (piece.blind or problem.has_tiles):
        output, lse = without_blind_rows(output, lse, call.mask[:, :, : query.shape[2]])
    return output, lse


def folds_groups(problem: Problem, query: Tensor, key: Tensor, piece: Piece) -> bool:
    """Whether the heads of a group become the rows of one head, which then reads its keys once.

    For a single row where `decodes_folded` says so; for more where that makes as many rows as fused attention takes
    large steps for, and leaves each thread heads to work on.
    """
    _, num_heads, rows, _ = query.shape
    num_kv_heads = key.shape[1]
    if num_heads == num_kv_heads or any(
        each is not None and each.shape[1] != 1 for each in (problem.bias, problem.mask)
    ):
        return False
    if rows == 1:
        return decodes_folded(query.dtype, num_heads // num_kv_heads)
    folded = num_heads // num_kv_heads * rows
    steps = num_kv_heads * (folded // LARGE_STEP_ROWS)  # whatever the batch, as for strips
    worth = rows < LARGE_STEP_ROWS <= folded and steps >= torch.get_num_threads()
    return worth and piece.kind != "causal"


def decodes_folded(dtype: torch.dtype, group_size: int) -> bool:
    """Whether the heads of a group that have one row each become the rows of one head."""
    return group_size >= FEWEST_FOLDED.get(dtype, 1)


def without_blind_rows(output: Tensor, lse: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The result with output 0 and log-sum-exp -inf in rows of which `added` hides all keys.

    Fused attention gives such rows a log-sum-exp of 0, or none that is a number; only where there is one need the mask
    be looked at, which takes long.
    """
    suspicious = (lse == 0) | ~lse.isfinite()
    if not suspicious.any():
        return output, lse
    nothing = suspicious & (added.amax(-1) == -math.inf)
    return output.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, -math.inf)


def shared_results(problem: Problem, elements: slice, piece: Piece, output: Tensor, lse: Tensor) -> Iterator[Result]:
    """Results of a piece that is there several times, or is computed in strips."""
    added = additive_mask(problem, elements, piece, accumulator(problem.query.dtype))
    in_strips = takes_strips(piece, problem.query)
    for (query, key, value), place, place_lse in shared_calls(problem, elements, piece, output, lse):
        if in_strips:
            yield from strips(query, key, value, place, place_lse, problem.scale)
            continue
        # The same call whatever shares it, or a sequence's bits would depend on its neighbours.
        part, part_lse = flash(query, key, value, causal=is_square(piece), mask=added, scale=problem.scale)
        yield place, place_lse, part[..., : output.shape[-1]], part_lse


def shared_calls(
    problem: Problem, elements: slice, piece: Piece, output: Tensor, lse: Tensor
) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor]]:
    """Operands of a piece, as often as it is there, and views of output and log-sum-exp for what they make.

    Either all elements of the batch share a call or all repetitions of the piece do: whichever are more.
    """
    batch = range(*elements.indices(output.shape[0]))
    if piece.times > 1 and piece.times >= len(batch):
        for element in batch:
            place, place_lse = (spread(each[element], piece.rows, piece) for each in (output, lse))
            yield spread_operands(problem, element, piece), place, place_lse
        return
    for each in piece.each():
        operands = equal_dims(*piece_operands(problem, elements, each))
        yield operands, output[elements, :, each.rows], lse[elements, :, each.rows]


def spread(tensor: Tensor, part: slice, piece: Piece) -> Tensor:
    """Where a piece and its repetitions have `part` of `[heads, tokens, ...]`: a view `[times, heads, part, ...]`."""
    windows = tensor[:, reach_of(part, piece)].unfold(1, part.stop - part.start, piece.step)
    return windows.movedim(-1, 2).transpose(0, 1)  # what was [heads, times, ..., part]


def reach_of(part: slice, piece: Piece) -> slice:
    """From the beginning of `part` of a piece to its end in the last repetition."""
    return slice(part.start, part.stop + (piece.times - 1) * piece.step)


def spread_operands(problem: Problem, element: int, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    """Query rows, keys and values of a piece and its repetitions, `[times, heads, rows or keys, dim]`."""
    reach = piece._replace(rows=reach_of(piece.rows, piece), keys=reach_of(piece.keys, piece))
    # Padded before they are spread, as the keys of repetitions overlap.
    query, key, value = equal_dims(*piece_operands(problem, slice(element, element + 1), reach))
    rows, keys = (slice(0, extent) for extent in piece.shape)
    return spread(query[0], rows, piece), spread(key[0], keys, piece), spread(value[0], keys, piece)


def takes_strips(piece: Piece, query: Tensor) -> bool:
    """Whether a piece is a lone triangle, or halves of one, that is computed in strips.

    Whatever the batch: a sequence's bits must not depend on its neighbours.
    """
    rows = piece.shape[0]
    if not (piece.lone and is_square(piece)) or not STRIP_ROWS < rows <= MOST_STRIP_ROWS:
        return False
    if query.element_size() == 2 and processor.MULTIPLIES_16_BITS:
        return False  # keys and values are packed before such products, which each strip would do anew
    heads, all_rows = query.shape[1], piece.times * rows
    if all_rows < FEWEST_STRIPS * STRIP_ROWS or heads * all_rows * query.shape[3] < FEWEST_STRIP_NUMBERS:
        return False
    return fill_threads(piece.times * heads)


def fill_threads(num_heads: int) -> bool:
    """Whether strips of few rows, which torch's fused attention takes 32 at a time, keep all threads equally busy."""
    steps, threads = num_heads * (STRIP_ROWS // 32), torch.get_num_threads()
    return steps >= 8 * threads or steps % threads == 0


def strips(query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float) -> Iterator[Result]:
    """Results of a causal triangle, a strip of few rows at a time, with no more keys than it sees.

    Torch's fused attention computes 512 keys at a time, whether any row sees them or not.
    """
    tokens = query.shape[2]
    for first in range(0, tokens, STRIP_ROWS):
        rows, keys = slice(first, first + STRIP_ROWS), slice(0, min(first + STRIP_ROWS, tokens))
        diagonal = None if first == 0 else diagonal_mask(first, keys.stop, accumulator(query.dtype))
        operands = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        part, part_lse = flash(*operands, causal=first == 0, mask=diagonal, scale=scale)
        yield output[:, :, rows], lse[:, :, rows], part[..., : output.shape[-1]], part_lse


def diagonal_mask(first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Additive mask `[1, 1, last - first, last]` of the rows `[first, last)` of a causal triangle."""
    return _widest_diagonal_mask(dtype)[:, :, : last - first, MOST_STRIP_ROWS - first : MOST_STRIP_ROWS - first + last]


@lru_cache
def _widest_diagonal_mask(dtype: torch.dtype) -> Tensor:
    """Zeros `[1, 1, STRIP_ROWS, MOST_STRIP_ROWS]`, and a causal triangle to the right of them."""
    shape = (1, 1, STRIP_ROWS, MOST_STRIP_ROWS + STRIP_ROWS)
    return torch.full(shape, -math.inf, dtype=dtype, device="cpu").triu_(MOST_STRIP_ROWS + 1)
