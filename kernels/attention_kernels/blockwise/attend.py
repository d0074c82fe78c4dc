# SPDX-License-Identifier: Apache-2.0
"""The forward pass of the torch path."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from . import tokens
from .fused import Result, as_multiplied, attend_fused, may_have_wrong_nan, shared_results, takes_strips
from .log_sums import log_of_sum, share_of
from .pieces import Piece, uncovered
from .plan import Group
from .problem import Problem, accumulator
from .sinks import with_sinks
from .written_out import attend_written_out


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[batch, num_heads, query_len, value_dim]`, log-sum-exp `[batch, num_heads, query_len]`, and rounding.

    The output is stored token by token, as `forward.forward` stores it. The log-sum-exp is float32 (float64 for
    float64). The third is what the output lost when it was rounded to 16 bits, stored in the same way, or empty where
    that was not or no gradients follow.
    """
    with torch.autocast(problem.query.device.type, enabled=False):  # or products of float32 would be rounded to 16 bits
        with as_multiplied(problem) if problem.fused else nullcontext(problem.widened) as operands:
            output, lse = _forward(operands, fused=problem.fused)
        if problem.fused and may_have_wrong_nan(problem.value, output, lse):
            # The careful loop tells whose NaN it is.
            output, lse = _forward(problem.widened, fused=False)
    dtype = problem.query.dtype
    rounded = output.to(dtype)
    if dtype.itemsize > 2 or not problem.trains:
        return rounded, lse, output.new_empty(0, dtype=dtype)
    return rounded, lse, (output - rounded).to(dtype)


def _forward(problem: Problem, *, fused: bool) -> tuple[Tensor, Tensor]:
    query, value = problem.query, problem.value
    batch, num_heads, query_len, _ = query.shape
    if fused and not problem.has_tiles and (parts := tokens.parts_of(problem)) is not None:
        output, lse = tokens.attend(query, problem.key, value, problem.scale, parts, with_lse=True)
        return with_sinks(output, lse, problem.sinks)
    plan = problem.plan(fused=fused)
    groups = problem.pieces(plan, fused=fused)
    if is_one_call(groups, problem, fused=fused):
        # Its result is the whole answer: nothing to gather.
        output, lse = (attend_fused if fused else attend_written_out)(problem, groups[0].elements, groups[0].pieces[0])
        return with_sinks(output.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous(), problem.sinks)
    output = query.new_empty(batch, query_len, num_heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, num_heads, query_len, dtype=accumulator(query.dtype))
    for whole, (elements, pieces, _) in zip(plan.groups, groups, strict=True):
        for rows in uncovered(whole.pieces, query_len):
            output[elements, :, rows], lse[elements, :, rows] = 0, -math.inf
        for piece in pieces:
            for place, place_lse, part, part_lse in results_of(problem, elements, piece, output, lse, fused=fused):
                if piece.follows:
                    merge_into(place, place_lse, part, part_lse)
                else:
                    place.copy_(part)
                    place_lse.copy_(part_lse)
    return with_sinks(output, lse, problem.sinks)


def is_one_call(groups: list[Group], problem: Problem, *, fused: bool) -> bool:
    """Whether there is a single piece, computed at once, that has all rows."""
    pieces = groups[0].pieces if len(groups) == 1 else []
    if len(pieces) != 1 or pieces[0].rows != slice(0, problem.query.shape[2]):
        return False
    return not (fused and takes_strips(pieces[0], problem.query))


def results_of(
    problem: Problem, elements: slice, piece: Piece, output: Tensor, lse: Tensor, *, fused: bool
) -> Iterator[Result]:
    """Results of a piece, as often as it is there, by torch's fused attention or written out."""
    if piece.times > 1 or (fused and takes_strips(piece, problem.query)):
        yield from shared_results(problem, elements, piece, output, lse)
        return
    attend = attend_fused if fused else attend_written_out
    yield output[elements, :, piece.rows], lse[elements, :, piece.rows], *attend(problem, elements, piece)


def merge_into(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Make of attention over one set of keys attention over the union with another, in place.

    Where a row has no weight in either, the result is NaN: pieces that are merged leave no row without keys.
    """
    other_lse = other_lse.contiguous()  # fused attention has heads last, which takes several times as long
    other_weight = share_of(other_lse, lse)[..., None]
    if output.dtype == lse.dtype:
        output.lerp_(other, other_weight)
    else:
        output.copy_(torch.lerp(output.to(lse.dtype), other.to(lse.dtype), other_weight))  # rounded once
    lse.copy_(log_of_sum(lse, other_lse))
