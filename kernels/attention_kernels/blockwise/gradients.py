# SPDX-License-Identifier: Apache-2.0
"""The backward pass of the torch path.

Pieces as in the forward pass run torch's own fused gradient where that is accurate and faster; everything else is the
chain rule written out, a few rows with all their keys at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .operands import additive_mask, cut_piece, equal_dims, four_dimensional, piece_operands
from .pieces import Piece, uncovered
from .plan import Group
from .problem import Problem, accumulator, has_nan
from .written_out import dropout_factor, finite_or_zero, narrow_pieces, over_group, per_group, score_tile

FEW_KEYS = 32
"""Keys per row up to which gradients are written out."""

FEW_SCORES = 1 << 18
"""Scores of a sequence, over all heads, up to which gradients are written out."""

GRADIENT_SCORES = 1 << 18
"""Scores whose gradients are written out at once, over all heads: there are several tensors of them at a time."""

Five = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Gradients of query, key, value, bias and sinks; None where not wanted."""


class Gradients:
    """What the backward pass adds up, in the accumulator's dtype or wider; None where not wanted, or nothing was added.

    Gradients of query, key and value are stored token by token, as the output is. One element of a bias or of the sinks
    may stand for millions of scores: those are float64.
    """

    def __init__(
        self, problem: Problem, wants_query: bool, wants_key_value: bool, wants_bias: bool, wants_sinks: bool
    ) -> None:
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.wants_query, self.wants_key_value = wants_query, wants_key_value
        self._problem = problem
        wide = accumulator(problem.query.dtype)
        widest = torch.float64 if problem.query.device.type == "cpu" else wide  # not every device has it
        self.bias, self.sinks = (
            tensor.new_zeros(tensor.shape, dtype=widest) if tensor is not None and wanted else None
            for tensor, wanted in ((problem.bias, wants_bias), (problem.sinks, wants_sinks))
        )

    def add_query(self, elements: slice, rows: slice, part: Tensor) -> None:
        """Add `[batch, num_heads, rows, head_dim]`, a tensor that nobody else has."""
        self.query = _sum(self.query, elements, rows, part, self._problem.query)

    def add_key(self, elements: slice, keys: slice, part: Tensor) -> None:
        """Add `[batch, num_kv_heads, keys, head_dim]`, a tensor that nobody else has."""
        self.key = _sum(self.key, elements, keys, part, self._problem.key)

    def add_value(self, elements: slice, keys: slice, part: Tensor) -> None:
        """Add `[batch, num_kv_heads, keys, value_dim]`, a tensor that nobody else has."""
        self.value = _sum(self.value, elements, keys, part, self._problem.value)

    def tainted(self, elements: slice) -> bool:
        """Whether NaN has come to gradients of these batch elements."""
        return any(total is not None and has_nan(total[elements]) for total in (self.query, self.key, self.value))

    def forget(self, elements: slice) -> None:
        """Start again for these batch elements."""
        for total in (self.query, self.key, self.value):
            if total is not None:
                total[elements] = 0

    def rounded(self) -> Five:
        """Gradients of query, key, value, bias and sinks in the dtypes of those."""
        problem = self._problem

        def like(total: Tensor | None, tensor: Tensor, wanted: bool) -> Tensor | None:
            total = _zeros(tensor) if total is None and wanted else total
            return None if total is None else total.to(tensor.dtype)

        return (
            like(self.query, problem.query, self.wants_query),
            like(self.key, problem.key, self.wants_key_value),
            like(self.value, problem.value, self.wants_key_value),
            None if self.bias is None or problem.bias is None else self.bias.to(problem.bias.dtype),
            None if self.sinks is None or problem.sinks is None else self.sinks.to(problem.sinks.dtype),
        )


def _sum(total: Tensor | None, elements: slice, tokens: slice, part: Tensor, like: Tensor) -> Tensor:
    """The gradient of a tensor after a part of it was added: the part itself, where that is all of it."""
    if total is None and part.shape == like.shape:
        return part.transpose(1, 2).contiguous().transpose(1, 2)
    total = _zeros(like) if total is None else total
    total[elements, :, tokens] += part
    return total


def _zeros(like: Tensor) -> Tensor:
    """A gradient of 0 in the accumulator's dtype, stored token by token."""
    batch, heads, tokens, dim = like.shape
    return like.new_zeros(batch, tokens, heads, dim, dtype=accumulator(like.dtype)).transpose(1, 2)


def backward(
    problem: Problem,
    output: Tensor,
    lse: Tensor,
    rounding: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    wants_query: bool,
    wants_key_value: bool,
    wants_bias: bool,
    wants_sinks: bool,
) -> Five:
    """Gradients of query, key, value, bias and sinks (None if not wanted).

    `output`, `lse` and `rounding` are what `attend.forward` returned.
    """
    gradients = Gradients(problem, wants_query, wants_key_value, wants_bias, wants_sinks)
    call = Call(problem, output, lse, rounding, grad_output, grad_lse, gradients)
    with torch.autocast(problem.query.device.type, enabled=False):  # or products of float32 would be rounded to 16 bits
        add_all(call)
    return gradients.rounded()


def add_all(call: Call) -> None:
    """Add the gradients of all batch elements, by torch's fused ones where those serve."""
    problem, gradients = call.problem, call.gradients
    plain, tiled = problem.plan(fused=True).masked, problem.plan(fused=False).groups
    for group, tiles in zip(plain, tiled, strict=True):
        if call.fuses(group):
            add_fused(call, group)
            if not gradients.tainted(group.elements):
                add_sinks(call, group.elements)
                continue
            # The fused gradient multiplies hidden values by 0, and 0 x NaN is NaN.
            gradients.forget(group.elements)
        add_written_out(call, tiles)


@dataclass(frozen=True)
class Call:
    """A backward pass: its arguments, and where gradients are added up."""

    problem: Problem
    output: Tensor
    lse: Tensor
    rounding: Tensor
    grad_output: Tensor
    grad_lse: Tensor | None
    gradients: Gradients

    def fuses(self, group: Group) -> bool:
        """Whether torch's fused gradient can express the call, is accurate, and is faster.

        Its weights, which come from a log-sum-exp, do not quite add up to 1, which shows where rows see few keys.
        """
        if not self.problem.fused or self.gradients.bias is not None or self.grad_lse is not None:
            return False
        _, num_heads, query_len, _ = self.problem.query.shape
        large = num_heads * query_len * self.problem.key.shape[2] > FEW_SCORES
        return large and group.keys_per_row > FEW_KEYS

    @cached_property
    def exact(self) -> Call:
        """The call with all tensors in float32 or wider, for the fused gradient.

        That takes a row's sum of weight times gradient from the output, whose rounding to 16 bits would be the sum's
        error. So what the output lost is added again.
        """
        lse, output, problem = self.lse, self.output, self.problem
        wide = accumulator(problem.query.dtype)
        if problem.query.dtype != wide:
            problem, output = problem.widened, output.to(wide) + self.rounding
        # A row that saw nothing has no weights: exp(score - inf) is 0, where exp(score + inf) is not.
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        return replace(self, problem=problem, output=output, lse=lse, grad_output=self.grad_output.to(wide))

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing but a softmax of scores, with something added to them or not."""
        problem = self.problem
        extras = problem.softcap, problem.dropout_seed, problem.sinks, self.gradients.bias, self.grad_lse
        return all(extra is None for extra in extras)

    @cached_property
    def widened(self) -> Problem:
        """The problem with keys and values as the written-out chain rule takes them.

        A weight of 0 times a hidden NaN must be 0. The scores see to NaN themselves, so keys keep it.
        """
        problem = self.problem.widened
        return replace(problem, value=finite_or_zero(problem.value))


def add_fused(call: Call, group: Group) -> None:
    """Add the gradients of query, key and value of some batch elements by torch's fused ones."""
    exact = call.exact
    for piece in group.pieces:
        _add_piece(exact.problem, group.elements, piece, exact.output, exact.lse, exact.grad_output, call.gradients)


def add_sinks(call: Call, elements: slice) -> None:
    """Add the sinks' gradient: a sink has a weight in every row, and a value of 0."""
    exact, total = call.exact, call.gradients.sinks
    if total is None or exact.problem.sinks is None:
        return
    delta = (exact.grad_output[elements] * exact.output[elements]).sum(-1)  # [batch, num_heads, query_len]
    weights = torch.exp(exact.problem.sinks.to(delta.dtype)[:, None] - exact.lse[elements])
    total.sub_((weights * delta).to(total.dtype).sum((0, 2)))


def add_written_out(call: Call, group: Group) -> None:
    """Add all gradients of some batch elements by the chain rule, in the accumulator's dtype.

    The weights are computed anew and not from a log-sum-exp: so they sum to 1 and fit the scores that they belong to,
    whatever path and dtype that comes from.
    """
    for rows in uncovered(group.pieces, call.problem.query.shape[2]):
        if call.gradients.sinks is not None and call.grad_lse is not None:
            # Rows that see no key have their sink alone, whose weight is 1.
            call.gradients.sinks.add_(call.grad_lse[group.elements, :, rows].to(call.gradients.sinks.dtype).sum((0, 2)))
    for piece in group.pieces:
        for elements, few in narrow_pieces(call.problem, group.elements, piece, GRADIENT_SCORES):
            if call.is_plain and _add_plain_rows(call.problem.widened, elements, few, call.grad_output, call.gradients):
                continue
            _add_rows(call.widened, elements, few, call.grad_output, call.grad_lse, call.gradients)


def _add_piece(
    problem: Problem,
    elements: slice,
    piece: Piece,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    gradients: Gradients,
) -> None:
    """Add a piece's gradients. Given the whole row's output and log-sum-exp, the fused backward yields its share."""
    query, key, value = piece_operands(problem, elements, piece)
    group_size = query.shape[1] // key.shape[1]
    wide_key, wide_value = key, value
    if group_size > 1:
        wide_key, wide_value = (tensor.repeat_interleave(group_size, 1) for tensor in (key, value))
    place = (elements, slice(None), piece.rows)
    query, wide_key, wide_value, part, grad = equal_dims(query, wide_key, wide_value, output[place], grad_output[place])
    added = None
    if piece.kind != "causal":
        rows = piece.rows.stop - piece.rows.start
        added = four_dimensional(additive_mask(problem, elements, piece, query.dtype), rows, piece)
    parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, wide_key, wide_value, part, lse[place], 0.0, piece.kind == "causal", attn_mask=added,
        scale=problem.scale,
    )  # fmt: skip
    grad_query, grad_key, grad_value = parts
    if gradients.wants_query:
        gradients.add_query(elements, piece.rows, grad_query[..., : problem.query.shape[-1]])
    if gradients.wants_key_value:
        if group_size > 1:
            grad_key, grad_value = (part.unflatten(1, (-1, group_size)).sum(2) for part in (grad_key, grad_value))
        gradients.add_key(elements, piece.keys, grad_key[..., : key.shape[-1]])
        gradients.add_value(elements, piece.keys, grad_value[..., : value.shape[-1]])


def _add_plain_rows(problem: Problem, elements: slice, piece: Piece, grad_output: Tensor, gradients: Gradients) -> bool:
    """As `_add_rows` where a softmax has nothing but scores, by torch's own softmax and the gradient of that.

    Nothing is added where that made NaN, which may not be the row's own. Returns whether it was added.
    """
    query, key, value = piece_operands(problem, elements, piece)
    place = (elements, slice(None), piece.rows)
    grad, query = grad_output[place].to(key.dtype), query * problem.scale
    scores = per_group(query, key.transpose(-1, -2))
    added = additive_mask(problem, elements, piece, scores.dtype)
    weights = torch.softmax(scores if added is None else scores.add_(added), -1)
    grad_weights = per_group(grad, value.transpose(-1, -2))
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    # A product passes NaN on, and makes NaN of a hidden key that is Inf.
    grad_query = per_group(grad_scores, key).mul_(problem.scale) if gradients.wants_query else None
    if has_nan(grad_scores if grad_query is None else grad_query):
        return False
    if grad_query is not None:
        gradients.add_query(elements, piece.rows, grad_query)
    if gradients.wants_key_value:
        gradients.add_key(elements, piece.keys, over_group(grad_scores, query, key.shape[1]))
        gradients.add_value(elements, piece.keys, over_group(weights, grad, value.shape[1]))
    return True


def _add_rows(
    problem: Problem,
    elements: slice,
    piece: Piece,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    gradients: Gradients,
) -> None:
    """Add the gradients of a few rows (FlashAttention-2, Algorithm 2, for rows with all their keys)."""
    query, key, value = piece_operands(problem, elements, piece)
    query, place = query.to(key.dtype), (elements, slice(None), piece.rows)
    grad = grad_output[place].to(key.dtype)
    scores, largest, slope = score_tile(problem, elements, piece, query, key, wants_slope=True)
    if not (math.isfinite(query.sum()) and math.isfinite(grad.sum())):
        # What a row that sees nothing holds, or gets back, must not reach the keys: 0 x NaN is NaN, and so is 0 x Inf.
        blind = largest == -math.inf
        query, grad = query.masked_fill(blind, 0.0), grad.masked_fill(blind, 0.0)
    weights, sink_weights = _softmax(scores, largest, problem.sinks)
    factor = dropout_factor(problem, elements, piece)
    if gradients.wants_key_value:
        kept = weights if factor is None else weights * factor
        gradients.add_value(elements, piece.keys, over_group(kept, grad, value.shape[1]))
    grad_scores = per_group(grad, value.transpose(-1, -2))
    if factor is not None:
        grad_scores.mul_(factor)
    # The piece has all keys of its rows: their sum is exact, where output times its gradient has the output's rounding.
    delta = (weights * grad_scores).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta -= grad_lse[place][..., None]
    if gradients.sinks is not None:
        gradients.sinks.sub_((sink_weights * delta).to(gradients.sinks.dtype).sum((0, 2, 3)))
    grad_scores.sub_(delta).mul_(weights)
    if gradients.bias is not None:
        total = cut_piece(gradients.bias, elements, piece)
        total += grad_scores.to(total.dtype).sum_to_size(total.shape)
    if slope is not None:
        grad_scores.mul_(slope)
    if gradients.wants_query:
        part = per_group(grad_scores, finite_or_zero(key)).mul_(problem.scale)
        gradients.add_query(elements, piece.rows, part)
    if gradients.wants_key_value:
        gradients.add_key(elements, piece.keys, over_group(grad_scores, query * problem.scale, key.shape[1]))


def _softmax(scores: Tensor, largest: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights of the keys, in place of the scores, and `[batch, num_heads, rows, 1]` of the sinks (0 without)."""
    column = torch.full_like(largest, -math.inf) if sinks is None else sinks.to(scores.dtype)[:, None, None]
    largest = torch.maximum(largest, column)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    sink_weights = torch.exp(column - largest)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True) + sink_weights
    total.masked_fill_(total == 0, 1.0)
    return weights.div_(total), sink_weights.div_(total)
