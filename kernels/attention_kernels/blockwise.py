# SPDX-License-Identifier: Apache-2.0
"""The loop over spans in plain torch: what CPU tensors run, and devices that Triton does not serve.

The rows are cut into pieces that see a simple part of the keys: a rectangle or a causal triangle without any mask, or a
tile with a small one. On the CPU a piece runs torch's own fused attention where that can express it; everything else
(softcap, gradients of a bias, other devices, NaN among the inputs) runs a softmax over the tile, written out. Partial
results over disjoint keys are merged by their log-sum-exp. Memory grows with tokens, never with their square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .pieces import Piece, Plan, plan_batch, uncovered

TILE_SCORES = 1 << 22
"""Scores that the written-out softmax holds at once, over all heads of a tile."""


@dataclass(frozen=True)
class Problem:
    """The arguments of one attention call, validated by `operators.attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    start: Tensor
    end: Tensor
    key_mask: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    scale: float
    softcap: float | None

    @property
    def has_tiles(self) -> bool:
        """Whether every tile needs a mask of its own, beyond what spans say."""
        return self.key_mask is not None or self.mask is not None or self.bias is not None

    @property
    def fused(self) -> bool:
        """Whether torch's fused CPU attention can express this call."""
        return self.query.device.type == "cpu" and self.softcap is None

    @property
    def plan(self) -> Plan:
        """How its batch is computed."""
        batch, query_len = self.query.shape[0], self.query.shape[2]
        return plan_batch(self.start, self.end, batch, query_len, tiles_only=self.has_tiles)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output `[batch, num_heads, query_len, value_dim]` and log-sum-exp `[batch, num_heads, query_len]`.

    The output is stored token by token, as `forward.forward` stores it. The log-sum-exp is float32 (float64 for
    float64).
    """
    output, lse = _forward(problem, fused=problem.fused)
    if problem.fused and has_nan(output):
        # Fused attention multiplies masked values by 0, and 0 x NaN is NaN. The careful loop tells whose NaN it is.
        output, lse = _forward(problem, fused=False)
    return output, lse


def _forward(problem: Problem, *, fused: bool) -> tuple[Tensor, Tensor]:
    attend = attend_fused if fused else attend_written_out
    query, value = problem.query, problem.value
    batch, num_heads, query_len, _ = query.shape
    groups = problem.plan.groups
    if len(groups) == 1 and len(groups[0][1]) == 1 and groups[0][1][0].rows == slice(0, query_len):
        # One piece is the whole answer: nothing to gather.
        output, lse = attend(problem, groups[0][0], groups[0][1][0])
        return with_sinks(output.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous(), problem.sinks)
    output = query.new_empty(batch, query_len, num_heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, num_heads, query_len, dtype=accumulator(query.dtype))
    for elements, pieces in groups:
        for rows in uncovered(pieces, query_len):
            output[elements, :, rows], lse[elements, :, rows] = 0, -math.inf
        for piece in pieces:
            part, part_lse = attend(problem, elements, piece)
            place = (elements, slice(None), piece.rows)
            if piece.follows:
                part, part_lse = merge(output[place], lse[place], part, part_lse)
            output[place], lse[place] = part, part_lse
    return with_sinks(output, lse, problem.sinks)


def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result after the sinks, which have no values, have taken their share of the softmax."""
    if sinks is None:
        return output, lse
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    share = torch.where(lse == -math.inf, 0.0, torch.exp(lse - total))
    return output.mul_(share[..., None]), total


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from attention over each."""
    total = torch.logaddexp(lse, other_lse)
    safe = total.masked_fill(total == -math.inf, 0.0)
    weight, other_weight = torch.exp(lse - safe)[..., None], torch.exp(other_lse - safe)[..., None]
    return (output * weight + other * other_weight).to(output.dtype), total


def visible_keys(problem: Problem, elements: slice, piece: Piece) -> Tensor:
    """Boolean mask of a piece, broadcastable to `[batch, num_heads, rows, keys]`."""
    keys = torch.arange(piece.keys.start, piece.keys.stop, device=problem.query.device, dtype=torch.int32)
    start, end = (_rows(bound, elements, piece.rows) for bound in (problem.start, problem.end))
    visible = ((keys >= start[..., None]) & (keys < end[..., None]))[:, None]
    if problem.key_mask is not None:
        visible = visible & _cut(problem.key_mask[:, None, None], elements, piece)
    if problem.mask is not None:
        visible = visible & _cut(problem.mask, elements, piece)
    return visible


def additive_mask(problem: Problem, elements: slice, piece: Piece, dtype: torch.dtype) -> Tensor | None:
    """Bias and mask of a piece as one tensor to add to scores, -inf where hidden; None if there is nothing to add."""
    if problem.has_tiles:
        visible = visible_keys(problem, elements, piece)
        bias = torch.zeros((), dtype=dtype, device=problem.query.device)
        if problem.bias is not None:
            bias = _cut(problem.bias, elements, piece).to(dtype)
        return torch.where(visible, bias, -math.inf)
    if piece.kind == "all":
        return None
    start, end = torch.broadcast_tensors(
        *(_rows(bound, elements, piece.rows) for bound in (problem.start, problem.end))
    )
    relative = (torch.stack((start, end)) - piece.keys.start).cpu().numpy()
    pattern = (dtype, piece.keys.stop - piece.keys.start, relative.shape, relative.tobytes())
    tile_masks = problem.plan.tile_masks
    if pattern not in tile_masks:
        visible = visible_keys(problem, elements, piece)
        tile_masks.clear()  # neighbours share a pattern, distant tiles rarely do
        tile_masks[pattern] = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        tile_masks[pattern].masked_fill_(~visible, -math.inf)
    return tile_masks[pattern]


def attend_fused(problem: Problem, elements: slice, piece: Piece) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a piece by torch's fused CPU attention."""
    query, key, value = _equal_dims(*_operands(problem, elements, piece))
    added = None
    if piece.kind != "causal":
        added = _four_dimensional(additive_mask(problem, elements, piece, accumulator(query.dtype)), piece)
    batch, num_heads, rows, dim = query.shape
    # A single query token: the heads of a group become the rows of one head, which then reads its keys once.
    as_rows = rows == 1 and (added is None or added.shape[1] == 1)
    if as_rows:
        query = query.reshape(batch, key.shape[1], -1, dim)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key,
        value,
        0.0,
        piece.kind == "causal" and not as_rows,  # the one row of a triangle sees its one key
        attn_mask=added if added is None or not as_rows else added.expand(-1, -1, query.shape[2], -1),
        scale=problem.scale,
    )
    if as_rows:
        output, lse = output.reshape(batch, num_heads, 1, dim), lse.reshape(batch, num_heads, 1)
    output = output[..., : problem.value.shape[-1]]
    if added is not None and (piece.blind or problem.has_tiles):
        # What fused attention makes of rows that see nothing is not specified.
        nothing = added.amax(-1) == -math.inf
        output, lse = output.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, -math.inf)
    return output, lse


def attend_written_out(problem: Problem, elements: slice, piece: Piece) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a piece, a few rows at a time. NaN reaches only the rows that see it."""
    parts = [_attend_rows(problem, elements, rows) for rows in _narrow(problem, piece)]
    return torch.cat([output for output, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _attend_rows(problem: Problem, elements: slice, piece: Piece) -> tuple[Tensor, Tensor]:
    query, key, value = (tensor.to(accumulator(tensor.dtype)) for tensor in _operands(problem, elements, piece))
    scores, visible = _scores(problem, elements, piece, query, key)
    largest = scores.amax(-1)
    weights = scores.sub_(largest.masked_fill(largest == -math.inf, 0.0)[..., None]).exp_()
    total = weights.sum(-1)
    finite = value.isfinite()
    if finite.all():
        output = _per_group(weights, value)
    else:
        output = _per_group(weights, value.masked_fill(~finite, 0.0))
        sees_nonfinite = _per_group(visible.expand(scores.shape).to(value.dtype), (~finite).to(value.dtype)) > 0
        output = output.masked_fill(sees_nonfinite, math.nan)
    output /= total.masked_fill(total == 0, 1.0)[..., None]
    return output.to(problem.query.dtype), total.log_() + largest


def _scores(problem: Problem, elements: slice, piece: Piece, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `[batch, num_heads, rows, keys]`, -inf where hidden, and where they are not hidden."""
    scores = _per_group(query, key.transpose(-1, -2)).mul_(problem.scale)
    if problem.softcap is not None:
        scores.div_(problem.softcap).tanh_().mul_(problem.softcap)
    added = additive_mask(problem, elements, piece, scores.dtype)
    if added is None:
        return scores, torch.ones((), dtype=torch.bool, device=scores.device)
    visible = added != -math.inf
    # A hidden key stays hidden where its score is NaN, which a sum with -inf would not see to.
    return scores.add_(added).masked_fill_(~visible, -math.inf), visible


def backward(
    problem: Problem,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    *,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, bias (if wanted) and sinks (if given), recomputed from `lse`."""
    fused = problem.fused and not wants_bias and grad_lse is None
    gradients = _backward(problem, output, lse, grad_output, grad_lse, fused=fused, wants_bias=wants_bias)
    if fused and any(has_nan(gradient) for gradient in gradients[:3]):
        return _backward(problem, output, lse, grad_output, grad_lse, fused=False, wants_bias=wants_bias)
    return gradients


def _backward(
    problem: Problem,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    *,
    fused: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    wide = accumulator(problem.query.dtype)
    inputs = (problem.query, problem.key, problem.value)
    gradients = tuple(torch.zeros(tensor.shape, dtype=wide, device=tensor.device) for tensor in inputs)
    grad_bias = None
    if problem.bias is not None and wants_bias:
        grad_bias = torch.zeros(problem.bias.shape, dtype=wide, device=problem.bias.device)
    # A row that saw nothing has no weights: exp(score - inf) is 0, where exp(score + inf) is not.
    safe_lse = lse.masked_fill(lse == -math.inf, math.inf)
    delta = (grad_output.to(wide) * output.to(wide)).sum(-1)  # [batch, num_heads, query_len]
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide)
    grad_sinks = None
    if problem.sinks is not None:
        grad_sinks = -(torch.exp(problem.sinks.to(wide)[:, None] - safe_lse) * delta).sum((0, 2))
        grad_sinks = grad_sinks.to(problem.sinks.dtype)
    for elements, pieces in problem.plan.groups:
        for piece in pieces:
            if fused:
                _backward_fused(problem, elements, piece, output, safe_lse, grad_output, gradients)
            else:
                for rows in _narrow(problem, piece):
                    _backward_rows(
                        problem, elements, rows, safe_lse, grad_output, grad_lse, delta, gradients, grad_bias
                    )
    grad_query, grad_key, grad_value = (
        gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, inputs, strict=True)
    )
    if problem.bias is not None and grad_bias is not None:
        grad_bias = grad_bias.to(problem.bias.dtype)
    return grad_query, grad_key, grad_value, grad_bias, grad_sinks


def _backward_fused(
    problem: Problem,
    elements: slice,
    piece: Piece,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """Add a piece's gradients. Given the whole row's output and log-sum-exp, the fused backward yields its share."""
    query, key, value = _operands(problem, elements, piece)
    group_size = query.shape[1] // key.shape[1]
    wide_key, wide_value = (tensor.repeat_interleave(group_size, 1) for tensor in (key, value))
    place = (elements, slice(None), piece.rows)
    query, wide_key, wide_value, part, grad = _equal_dims(
        query, wide_key, wide_value, output[place], grad_output[place]
    )
    added = None
    if piece.kind != "causal":
        added = _four_dimensional(additive_mask(problem, elements, piece, accumulator(query.dtype)), piece)
    parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad.contiguous(), query, wide_key, wide_value, part.contiguous(), lse[place].contiguous(), 0.0,
        piece.kind == "causal", attn_mask=added, scale=problem.scale,
    )  # fmt: skip
    grad_query, grad_key, grad_value = gradients
    grad_query[place] += parts[0][..., : problem.query.shape[-1]]
    for total, part in ((grad_key, parts[1]), (grad_value, parts[2])):
        share = part[..., : total.shape[-1]].to(total.dtype).unflatten(1, (-1, group_size)).sum(2)
        total[elements, :, piece.keys] += share


def _backward_rows(
    problem: Problem,
    elements: slice,
    piece: Piece,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    delta: Tensor,
    gradients: tuple[Tensor, ...],
    grad_bias: Tensor | None,
) -> None:
    """Add the gradients of a few rows, by the chain rule written out (FlashAttention-2, Algorithm 2)."""
    query, key, value = (tensor.to(accumulator(tensor.dtype)) for tensor in _operands(problem, elements, piece))
    grad_query, grad_key, grad_value = gradients
    place = (elements, slice(None), piece.rows)
    scores, visible = _scores(problem, elements, piece, query, key)
    weights = torch.exp(scores - lse[place][..., None])
    grad = grad_output[place].to(weights.dtype)
    clean = value.nan_to_num(0.0, 0.0, 0.0)
    grad_weights = _per_group(grad, clean.transpose(-1, -2))
    row_delta = delta[place][..., None]
    if problem.has_tiles:
        # The piece has all keys of its rows: their sum is exact, where `delta` has the rounding of the output.
        lse_share = 0.0 if grad_lse is None else grad_lse[place][..., None]
        row_delta = (weights * grad_weights).sum(-1, keepdim=True) - lse_share
    grad_scores = torch.where(visible, weights * (grad_weights - row_delta), 0.0)
    if grad_bias is not None:
        _cut(grad_bias, elements, piece).add_(grad_scores.sum_to_size(_cut(grad_bias, elements, piece).shape))
    if problem.softcap is not None:
        raw = _per_group(query, key.transpose(-1, -2)) * problem.scale
        slope = 1 - torch.tanh(raw / problem.softcap).square()
        grad_scores = torch.where(visible, grad_scores * slope, 0.0)
    # A key that no row of the tile sees takes no part in the product, so a NaN in it harms nobody.
    grad_query[place] += _per_group(grad_scores, key.nan_to_num(0.0, 0.0, 0.0)) * problem.scale
    grad_key[elements, :, piece.keys] += _over_group(grad_scores, query, key.shape[1]) * problem.scale
    grad_value[elements, :, piece.keys] += _over_group(weights, grad, key.shape[1])


def has_nan(tensor: Tensor) -> bool:
    """Whether a tensor may hold NaN, in one pass over it: a sum is NaN if a term is."""
    return math.isnan(tensor.sum())


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of softmax statistics and of sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _operands(problem: Problem, elements: slice, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    keys = (elements, slice(None), piece.keys)
    return problem.query[elements, :, piece.rows], problem.key[keys], problem.value[keys]


def _narrow(problem: Problem, piece: Piece) -> Iterator[Piece]:
    """The piece in fewer rows at a time, so that its scores over all heads fit TILE_SCORES."""
    scores_per_row = problem.query.shape[0] * problem.query.shape[1] * (piece.keys.stop - piece.keys.start)
    step = max(1, TILE_SCORES // max(1, scores_per_row))
    for row in range(piece.rows.start, piece.rows.stop, step):
        rows = slice(row, min(row + step, piece.rows.stop))
        beyond = piece.rows.stop - rows.stop if piece.kind == "causal" else 0  # keys that only later rows see
        yield piece._replace(rows=rows, keys=slice(piece.keys.start, piece.keys.stop - beyond))


def _rows(bound: Tensor, elements: slice, rows: slice) -> Tensor:
    bound = bound if bound.shape[0] == 1 else bound[elements]
    return bound if bound.shape[1] == 1 else bound[:, rows]


def _cut(tensor: Tensor, elements: slice, piece: Piece) -> Tensor:
    """The piece's part of a `[batch, heads, rows, keys]` tensor; dimensions of size 1 are broadcast and stay."""
    tensor = tensor if tensor.shape[0] == 1 else tensor[elements]
    tensor = tensor if tensor.shape[2] == 1 else tensor[:, :, piece.rows]
    return tensor if tensor.shape[3] == 1 else tensor[..., piece.keys]


def _four_dimensional(added: Tensor | None, piece: Piece) -> Tensor | None:
    """Fused attention broadcasts a mask over batch and heads, not over rows and keys."""
    if added is None:
        return None
    rows, keys = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
    added = added.reshape((1,) * (4 - added.ndim) + added.shape)
    return added.expand(*added.shape[:2], rows, keys)


def _equal_dims(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as fused attention takes them: of one head dim (padded with zeros) and with dense columns."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    tensors = tuple(
        tensor if tensor.shape[-1] == widest else torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1]))
        for tensor in tensors
    )
    # Fused attention itself does not look at the stride of the columns: it would read others' elements.
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)


def _per_group(left: Tensor, right: Tensor) -> Tensor:
    """`left [batch, num_heads, rows, n] @ right [batch, num_kv_heads, n, m]`; heads of a group share one."""
    batch, num_heads, rows, inner = left.shape
    num_kv_heads = right.shape[1]
    grouped = left.reshape(batch, num_kv_heads, num_heads // num_kv_heads * rows, inner)
    return (grouped @ right).reshape(batch, num_heads, rows, right.shape[-1])


def _over_group(left: Tensor, right: Tensor, num_kv_heads: int) -> Tensor:
    """`left^T @ right` summed over the heads of each group: `[batch, num_kv_heads, keys, dim]`."""
    batch, num_heads, rows, _ = left.shape
    grouped_rows = num_heads // num_kv_heads * rows
    left = left.reshape(batch, num_kv_heads, grouped_rows, left.shape[-1])
    right = right.reshape(batch, num_kv_heads, grouped_rows, right.shape[-1])
    return left.transpose(-1, -2) @ right
