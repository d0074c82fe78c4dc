# SPDX-License-Identifier: Apache-2.0
"""Pieces by a softmax written out: what torch's fused attention cannot express, and where NaN must be looked after."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..dropout import keep_mask, threshold_and_scale
from .operands import additive_mask, piece_operands
from .pieces import Piece
from .problem import Problem, accumulator, has_nan

TILE_SCORES = 1 << 21
"""Scores that the written-out softmax holds at once, over all heads of a tile: few enough to stay in a core's cache."""


def attend_written_out(problem: Problem, elements: slice, piece: Piece) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a piece, a little at a time. NaN reaches only the rows that see it."""
    batch, num_heads = problem.query[elements].shape[:2]
    rows = piece.rows.stop - piece.rows.start
    output = problem.query.new_empty(batch, num_heads, rows, problem.value.shape[-1])
    lse = problem.query.new_empty(batch, num_heads, rows, dtype=accumulator(problem.query.dtype))
    first_element, first_row = elements.indices(problem.query.shape[0])[0], piece.rows.start
    for few, part in narrow_pieces(problem, elements, piece):
        place = (
            slice(few.start - first_element, few.stop - first_element),
            slice(None),
            slice(part.rows.start - first_row, part.rows.stop - first_row),
        )
        output[place], lse[place] = _attend_rows(problem, few, part)
    return output, lse


def _attend_rows(problem: Problem, elements: slice, piece: Piece) -> tuple[Tensor, Tensor]:
    query, key, value = piece_operands(problem, elements, piece)
    scores, largest, _ = score_tile(problem, elements, piece, query, key)
    weights = scores.sub_(largest.masked_fill(largest == -math.inf, 0.0)).exp_()
    total = weights.sum(-1, keepdim=True)
    if (factor := dropout_factor(problem, elements, piece)) is not None:
        weights.mul_(factor)
    if problem.has_finite_values or (finite := value.isfinite()).all():
        output = per_group(weights, value)
    else:
        output = per_group(weights, value.masked_fill(~finite, 0.0))
        added = additive_mask(problem, elements, piece, weights.dtype)
        visible = torch.ones_like(weights) if added is None else (added != -math.inf).expand(weights.shape)
        sees_nonfinite = per_group(visible.to(value.dtype), (~finite).to(value.dtype)) > 0
        output = output.masked_fill(sees_nonfinite, math.nan)
    output /= total.masked_fill(total == 0, 1.0)
    return output, total.log_().add_(largest)[..., 0]


def score_tile(
    problem: Problem, elements: slice, piece: Piece, query: Tensor, key: Tensor, *, wants_slope: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores `[batch, num_heads, rows, keys]`, -inf where hidden; each row's largest; the softcap's slope if wanted."""
    softcap, slope = problem.softcap, None
    scores = per_group(query * (problem.scale if softcap is None else problem.scale / softcap), key.transpose(-1, -2))
    if softcap is not None:
        scores.tanh_()
        if wants_slope:
            slope = torch.addcmul(scores.new_ones(()), scores, scores, value=-1)
        scores.mul_(softcap)
    added = additive_mask(problem, elements, piece, scores.dtype)
    if added is not None:
        scores.add_(added)
    largest = scores.amax(-1, keepdim=True)
    if added is not None and has_nan(largest):
        # NaN and -inf make NaN, but a hidden key stays hidden. Looking at each score takes longer than all the rest.
        hidden = added == -math.inf
        largest = scores.masked_fill_(hidden, -math.inf).amax(-1, keepdim=True)
        slope = None if slope is None else slope.masked_fill_(hidden, 0.0)
    return scores, largest, slope


def dropout_factor(problem: Problem, elements: slice, piece: Piece) -> Tensor | None:
    """What dropout multiplies weights by, `[batch, num_heads, rows, keys]`: 0, or what makes up for the dropped."""
    if problem.dropout_seed is None:
        return None
    batch, num_heads, query_len, _ = problem.query.shape
    heads, rows, keys = (
        torch.arange(part.start, part.stop, device=problem.query.device)
        for part in (slice(0, batch * num_heads), piece.rows, piece.keys)
    )
    heads = heads.reshape(batch, num_heads, 1, 1)[elements]
    keep = keep_mask(
        problem.dropout_seed, problem.dropout_p, heads, rows[:, None], keys, query_len, problem.key.shape[2]
    )
    return keep.to(accumulator(problem.query.dtype)).mul_(threshold_and_scale(problem.dropout_p)[1])


def narrow_pieces(
    problem: Problem, elements: slice, piece: Piece, most_scores: int = TILE_SCORES
) -> Iterator[tuple[slice, Piece]]:
    """The piece for fewer batch elements and rows at a time, so that its scores over all heads are no more than that.

    How rows are cut does not depend on the number of elements: a sequence's sums must not depend on its neighbours.
    """
    batch, num_heads = problem.query.shape[:2]
    scores_per_row = max(1, num_heads * (piece.keys.stop - piece.keys.start))
    step = max(1, most_scores // scores_per_row)
    together = max(1, most_scores // (scores_per_row * max(1, min(step, piece.rows.stop - piece.rows.start))))
    first, last, _ = elements.indices(batch)
    for element in range(first, last, together):
        for row in range(piece.rows.start, piece.rows.stop, step):
            rows = slice(row, min(row + step, piece.rows.stop))
            yield slice(element, min(element + together, last)), piece._replace(rows=rows)


def finite_or_zero(tensor: Tensor) -> Tensor:
    """The tensor with 0 in place of NaN and Inf, so that a weight of 0 times it is 0."""
    return tensor if math.isfinite(tensor.sum()) else tensor.nan_to_num(0.0, 0.0, 0.0)


def per_group(left: Tensor, right: Tensor) -> Tensor:
    """`left [batch, num_heads, rows, n] @ right [batch, num_kv_heads, n, m]`; heads of a group share one."""
    batch, num_heads, rows, inner = left.shape
    num_kv_heads = right.shape[1]
    grouped = left.reshape(batch, num_kv_heads, num_heads // num_kv_heads * rows, inner)
    return (grouped @ right).reshape(batch, num_heads, rows, right.shape[-1])


def over_group(left: Tensor, right: Tensor, num_kv_heads: int) -> Tensor:
    """`left^T @ right` summed over the heads of each group: `[batch, num_kv_heads, keys, dim]`.

    One sum for each head and then their sum is more exact than one long sum.
    """
    product = left.transpose(-1, -2) @ right
    return product if product.shape[1] == num_kv_heads else product.unflatten(1, (num_kv_heads, -1)).sum(2)
