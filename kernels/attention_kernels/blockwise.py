# SPDX-License-Identifier: Apache-2.0
"""The loop over spans in plain torch: what CPU tensors run, and devices that Triton does not serve.

The rows are cut into pieces that see a simple part of the keys: a rectangle or a causal triangle without any mask, or a
tile with a small one. On the CPU a piece runs torch's own fused attention where that can express it; everything else
(softcap, gradients of a bias, other devices, NaN among the inputs) runs a softmax over the tile, written out. Partial
results over disjoint keys are merged by their log-sum-exp. Memory grows with tokens, never with their square.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from . import tokens
from .dropout import keep_mask, threshold_and_scale
from .pieces import Group, Piece, Plan, Sharing, plan_batch, uncovered
from .spans import Spans

TILE_SCORES = 1 << 21
"""Scores that the written-out softmax holds at once, over all heads of a tile: few enough to stay in a core's cache."""

CALL_NUMBERS = 1 << 17
"""Numbers of keys and values, of whatever dtype, that take as long as one more call of fused attention takes."""

LARGE_STEP_ROWS = 768
"""Rows from which on torch's fused attention takes 256 at a time; fewer take 64 or 32, with smaller products."""

ROWS_WORTH_COPIES = 512
"""Rows from which on 16-bit operands are copied first, as `as_multiplied` says."""

STRIP_ROWS = 64
"""Rows of a strip of a causal triangle: few, to hug its diagonal, but as many as products are fast for."""

FEWEST_STRIPS = 4
"""Strips from which on they are worth their calls."""

MOST_STRIP_ROWS = 1152
"""Rows of a causal triangle up to which they are."""

WRITTEN_OUT_CALLS = 8
"""As many calls of fused attention take as long as one tile written out."""


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
    dropout_seed: Tensor | None
    scale: float
    softcap: float | None
    dropout_p: float
    trains: bool = False
    """Whether gradients follow: then no sequence's sums may depend on its neighbours, not even in their last bit."""

    @property
    def has_tiles(self) -> bool:
        """Whether every tile needs a mask of its own, beyond what spans say."""
        return self.key_mask is not None or self.mask is not None or self.bias is not None

    @property
    def fused(self) -> bool:
        """Whether torch's fused CPU attention can express this call."""
        return self.query.device.type == "cpu" and self.softcap is None and self.dropout_seed is None

    def plan(self, *, fused: bool) -> Plan:
        """How its batch is computed. What is written out has all keys of a row in one piece."""
        batch, query_len = self.query.shape[0], self.query.shape[2]
        tiles_only = self.has_tiles or not fused
        # A bias is there already; a mask is made for each tile, and small ones keep memory small.
        joins = fused and self.bias is not None and self.key_mask is self.mask is None
        sharing = None if self.trains else how_to_share(self.key, self.value, fused=fused)
        return plan_batch(self.start, self.end, batch, query_len, tiles_only=tiles_only, joins=joins, sharing=sharing)

    @cached_property
    def widened(self) -> Problem:
        """The problem in the accumulator's dtype, each head's keys together."""
        wide = accumulator(self.query.dtype)
        key, value = (
            tensor.contiguous() if tensor.dtype == wide else tensor.to(wide, memory_format=torch.contiguous_format)
            for tensor in (self.key, self.value)
        )
        return replace(self, query=self.query.to(wide), key=key, value=value)

    @cached_property
    def has_finite_values(self) -> bool:
        """Whether all values are finite. A sum tells that soonest, but that of finite ones may be infinite."""
        return math.isfinite(self.value.sum()) or bool(self.value.isfinite().all())

    def pieces(self, plan: Plan, *, fused: bool) -> list[Group]:
        """The groups of its plan, with pieces as the forward pass computes them.

        Halves of a triangle are merged, which would round results of 16 bits.
        """
        if not fused:
            return plan.groups
        return plan.halved if self.query.dtype == accumulator(self.query.dtype) else plan.in_tiles


def how_to_share(key: Tensor, value: Tensor, *, fused: bool) -> Sharing:
    """What decides which sequences are decoded in one call."""
    num_kv_heads, value_dim = value.shape[1], value.shape[3]
    numbers_per_key = num_kv_heads * (key.shape[3] + value_dim)
    call_numbers = CALL_NUMBERS * (1 if fused else WRITTEN_OUT_CALLS)
    return Sharing(-(-torch.get_num_threads() // num_kv_heads), call_numbers // numbers_per_key)


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[batch, num_heads, query_len, value_dim]`, log-sum-exp `[batch, num_heads, query_len]`, and rounding.

    The output is stored token by token, as `forward.forward` stores it. The log-sum-exp is float32 (float64 for
    float64). The third is what the output lost when it was rounded to 16 bits, stored in the same way, or empty where
    that was not or no gradients follow.
    """
    output, lse = _forward(as_multiplied(problem) if problem.fused else problem.widened, fused=problem.fused)
    if problem.fused and may_have_wrong_nan(problem, output, lse):
        # The careful loop tells whose NaN it is.
        output, lse = _forward(problem.widened, fused=False)
    dtype = problem.query.dtype
    rounded = output.to(dtype)
    if dtype.itemsize > 2 or not problem.trains:
        return rounded, lse, output.new_empty(0, dtype=dtype)
    return rounded, lse, (output - rounded).to(dtype)


def may_have_wrong_nan(problem: Problem, output: Tensor, lse: Tensor) -> bool:
    """Whether a row of a fused result may be NaN for a key that it does not see.

    Fused attention adds -inf to a hidden score, and multiplies a hidden value by 0: either may make NaN. A score that
    is NaN makes the log-sum-exp NaN.
    """
    if output.numel() <= problem.value.numel():
        return has_nan(output)
    return has_nan(lse) or not problem.has_finite_values


def as_multiplied(problem: Problem) -> Problem:
    """The problem with its operands as torch's fused attention multiplies them fastest.

    Where a processor's products of 16 bits are not faster than those of float32, all of it is faster in float32, and
    triangles can be halved. Gradients need an output that was not rounded. A bias of 16 bits would have to be widened
    for every tile, so it stays; then there each head's tokens are laid together, as keys and values are packed anew for
    every block of rows, which takes 3 to 15 % longer where other heads lie between.
    """
    if problem.query.element_size() != 2:
        return problem
    if problem.trains:
        return problem.widened
    tensors = {name: getattr(problem, name) for name in ("query", "key", "value")}
    if multiplies_16_bits() or problem.query.shape[2] < ROWS_WORTH_COPIES:
        return problem
    if any(tensor.stride(0) == 0 for tensor in tensors.values()):
        return problem  # a batch that shares its keys need not have a copy for each element
    if problem.bias is None:
        return problem.widened
    return replace(problem, **{name: tensor.contiguous() for name, tensor in tensors.items()})


@lru_cache
def multiplies_16_bits() -> bool:
    """Whether this processor has instructions for products of 16 bits that are faster than those of float32.

    On x86 those are AMX. AVX-512 has some for bfloat16, with which torch's fused attention is no faster. Others are not
    known: they are taken to have them.
    """
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_amx_tile_supported()


def one_token(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, sinks: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp of a checked call without gradients and masks, which `tokens.again` then repeats.

    None if it is no step of decoding on the CPU, or needs the careful loop.
    """
    if query.shape[2] != 1 or query.device.type != "cpu" or spans.key_mask is not None:
        return None
    sharing = how_to_share(key, value, fused=True)
    plan = plan_batch(spans.start, spans.end, query.shape[0], 1, tiles_only=False, sharing=sharing)
    first = tokens.first(query, key, value, spans, sinks, scale, plan)
    return None if first is None else with_sinks(*first, sinks)


def _forward(problem: Problem, *, fused: bool) -> tuple[Tensor, Tensor]:
    query, value = problem.query, problem.value
    batch, num_heads, query_len, _ = query.shape
    plan = problem.plan(fused=fused)
    if fused and not problem.has_tiles and tokens.serves(query, problem.key, value, plan):
        parts = tokens.parts_of(query, problem.key, value, problem.start, problem.end, plan)
        return with_sinks(*tokens.attend(query, problem.key, value, problem.scale, parts), problem.sinks)
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
    return not (fused and takes_strips(pieces[0], problem.query.shape[1]))


Result = tuple[Tensor, Tensor, Tensor, Tensor]
"""Views of an output and a log-sum-exp, and what belongs there."""


def results_of(
    problem: Problem, elements: slice, piece: Piece, output: Tensor, lse: Tensor, *, fused: bool
) -> Iterator[Result]:
    """Results of a piece, as often as it is there, by torch's fused attention or written out."""
    in_strips = fused and takes_strips(piece, output.shape[1])
    if piece.times == 1 and not in_strips:
        attend = attend_fused if fused else attend_written_out
        yield output[elements, :, piece.rows], lse[elements, :, piece.rows], *attend(problem, elements, piece)
        return
    added = additive_mask(problem, elements, piece, accumulator(problem.query.dtype))
    for (query, key, value), place, place_lse in shared_calls(problem, elements, piece, output, lse):
        if in_strips:
            yield from strips(query, key, value, place, place_lse, problem.scale)
            continue
        # The same call whatever shares it, or a sequence's bits would depend on its neighbours.
        part, part_lse = torch._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, is_causal=is_square(piece), attn_mask=added, scale=problem.scale
        )
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


def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result after the sinks, which have no values, have taken their share of the softmax."""
    if sinks is None:
        return output, lse
    sinks = sinks.to(lse.dtype)[:, None]
    share = torch.where(lse == -math.inf, 0.0, torch.sigmoid(lse - sinks))
    return output.mul_(share[..., None]), torch.logaddexp(lse, sinks)


def merge_into(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Make of attention over one set of keys attention over the union with another, in place.

    Where a row has no weight in either, the result is NaN: pieces that are merged leave no row without keys.
    """
    other_share = torch.sigmoid(other_lse - lse)
    other_weight = other_share[..., None]
    if output.dtype == lse.dtype:
        output.lerp_(other, other_weight)
    else:
        output.copy_(torch.lerp(output.to(lse.dtype), other.to(lse.dtype), other_weight))  # rounded once
    # As `torch.logaddexp`, in a sixth of its time: the greater one has at least half of the weight.
    greater_share = torch.maximum(other_share, 1 - other_share)
    torch.maximum(lse, other_lse, out=lse)
    lse.sub_(greater_share.log_())


def visible_keys(problem: Problem, elements: slice, piece: Piece) -> Tensor:
    """Boolean mask of a piece, broadcastable to `[batch, num_heads, rows, keys]`."""
    keys = torch.arange(piece.keys.start, piece.keys.stop, device=problem.query.device, dtype=torch.int32)
    start, end = (_rows(bound, elements, piece.rows) for bound in (problem.start, problem.end))
    visible = ((keys >= start[..., None]) & (keys < end[..., None]))[:, None]
    if problem.key_mask is not None:
        visible = visible & cut_piece(problem.key_mask[:, None, None], elements, piece)
    if problem.mask is not None:
        visible = visible & cut_piece(problem.mask, elements, piece)
    return visible


def additive_mask(
    problem: Problem, elements: slice, piece: Piece, dtype: torch.dtype, repeats: int = 1
) -> Tensor | None:
    """Bias and mask of a piece as one tensor to add to scores, -inf where hidden; None if there is nothing to add.

    Its rows are there `repeats` times, one copy after the other.
    """
    if repeats > 1 and problem.has_tiles:
        once = additive_mask(problem, elements, piece, dtype)
        return once if once is None or once.shape[-2] == 1 else once.repeat(1, 1, repeats, 1)
    if problem.has_tiles:
        if problem.bias is not None and shows_all(problem, piece):
            return cut_piece(problem.bias, elements, piece).to(dtype)
        visible = visible_keys(problem, elements, piece)
        bias = torch.zeros((), dtype=dtype, device=problem.query.device)
        if problem.bias is not None:
            bias = cut_piece(problem.bias, elements, piece).to(dtype)
        # A sum is much faster than a choice for each element.
        added = bias + torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)
        return torch.where(visible, bias, -math.inf) if problem.bias is not None and has_nan(added) else added
    if piece.kind == "all" or is_square(piece):
        return None
    pattern: tuple = (dtype, repeats, piece.kind, piece.shape)
    if piece.kind == "masked":
        start, end = torch.broadcast_tensors(
            *(_rows(bound, elements, piece.rows) for bound in (problem.start, problem.end))
        )
        relative = (torch.stack((start, end)) - piece.keys.start).cpu().numpy()
        pattern += (relative.shape, relative.tobytes())
    tile_masks = problem.plan(fused=problem.fused).tile_masks
    mask = tile_masks.get(pattern)
    if mask is None:
        visible = visible_keys(problem, elements, piece) if piece.kind == "masked" else visible_by_kind(piece)
        visible = visible.repeat(1, 1, repeats, 1)
        if sum(tile.numel() for tile in tuple(tile_masks.values())) + visible.numel() > TILE_SCORES:
            tile_masks.clear()  # neighbours share a pattern, distant tiles rarely do
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)
        tile_masks[pattern] = mask
    return mask


def visible_by_kind(piece: Piece) -> Tensor:
    """Boolean mask `[1, 1, rows, keys]` of a causal piece or a band."""
    rows, keys = piece.shape
    visible = torch.ones(1, 1, rows, keys, dtype=torch.bool).tril_(keys - rows)
    return visible.triu_() if piece.kind == "band" else visible


def is_square(piece: Piece) -> bool:
    """Whether a piece is a causal triangle that torch's fused attention computes without a mask."""
    rows, keys = piece.shape
    return piece.kind == "causal" and rows == keys


def shows_all(problem: Problem, piece: Piece) -> bool:
    """Whether rows of a piece see all of its keys, as far as masks say; a bias may still hide some."""
    return piece.kind == "all" and problem.key_mask is problem.mask is None


def attend_fused(problem: Problem, elements: slice, piece: Piece) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a piece by torch's fused CPU attention."""
    query, key, value = equal_dims(*piece_operands(problem, elements, piece))
    batch, num_heads, rows, dim = query.shape
    group_size = num_heads // key.shape[1] if folds_groups(problem, query, key, piece) else 1
    added = None
    if not is_square(piece):
        # Beside 16-bit queries a mask may be of 16 bits as well: a bias that is need not be widened.
        own = problem.bias is not None and problem.bias.dtype == query.dtype and shows_all(problem, piece)
        dtype = query.dtype if own else accumulator(query.dtype)
        added = additive_mask(problem, elements, piece, dtype, group_size)
        added = four_dimensional(added, group_size * rows, piece)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query if group_size == 1 else query.reshape(batch, key.shape[1], group_size * rows, dim),
        key,
        value,
        0.0,
        is_square(piece) and group_size == 1,  # the one row of a triangle sees its one key
        attn_mask=added,
        scale=problem.scale,
    )
    if group_size > 1:
        output, lse = output.reshape(batch, num_heads, rows, dim), lse.reshape(batch, num_heads, rows)
        added = None if added is None else added[:, :, :rows]
    output = output[..., : problem.value.shape[-1]]
    if added is not None and (piece.blind or problem.has_tiles):
        output, lse = without_blind_rows(output, lse, added)
    return output, lse


def takes_strips(piece: Piece, num_heads: int) -> bool:
    """Whether a piece is a causal triangle, or some, that is computed in strips.

    Whatever the batch: a sequence's bits must not depend on its neighbours.
    """
    rows = piece.shape[0]
    if not is_square(piece) or not STRIP_ROWS < rows <= MOST_STRIP_ROWS:
        return False
    return piece.times * rows >= FEWEST_STRIPS * STRIP_ROWS and fill_threads(piece.times * num_heads)


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
        part, part_lse = torch._scaled_dot_product_flash_attention_for_cpu(
            query[:, :, rows], key[:, :, keys], value[:, :, keys], is_causal=first == 0, attn_mask=diagonal, scale=scale
        )
        yield output[:, :, rows], lse[:, :, rows], part[..., : output.shape[-1]], part_lse


def diagonal_mask(first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Additive mask `[1, 1, last - first, last]` of the rows `[first, last)` of a causal triangle."""
    return _widest_diagonal_mask(dtype)[:, :, : last - first, MOST_STRIP_ROWS - first : MOST_STRIP_ROWS - first + last]


@lru_cache
def _widest_diagonal_mask(dtype: torch.dtype) -> Tensor:
    """Zeros `[1, 1, STRIP_ROWS, MOST_STRIP_ROWS]`, and a causal triangle to the right of them."""
    shape = (1, 1, STRIP_ROWS, MOST_STRIP_ROWS + STRIP_ROWS)
    return torch.full(shape, -math.inf, dtype=dtype).triu_(MOST_STRIP_ROWS + 1)


def folds_groups(problem: Problem, query: Tensor, key: Tensor, piece: Piece) -> bool:
    """Whether the heads of a group become the rows of one head, which then reads its keys once.

    Always for a single row; for more where that makes as many rows as fused attention takes large steps for, and leaves
    each thread heads to work on.
    """
    _, num_heads, rows, _ = query.shape
    num_kv_heads = key.shape[1]
    if num_heads == num_kv_heads or any(
        each is not None and each.shape[1] != 1 for each in (problem.bias, problem.mask)
    ):
        return False
    folded = num_heads // num_kv_heads * rows
    steps = num_kv_heads * (folded // LARGE_STEP_ROWS)  # whatever the batch, as for strips
    worth = rows < LARGE_STEP_ROWS <= folded and steps >= torch.get_num_threads()
    return rows == 1 or (worth and piece.kind != "causal")


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


def finite_or_zero(tensor: Tensor) -> Tensor:
    """The tensor with 0 in place of NaN and Inf, so that a weight of 0 times it is 0."""
    return tensor if math.isfinite(tensor.sum()) else tensor.nan_to_num(0.0, 0.0, 0.0)


def has_nan(tensor: Tensor) -> bool:
    """Whether a tensor may hold NaN, in one pass over it: a sum is NaN if a term is."""
    return math.isnan(tensor.sum())


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of softmax statistics and of sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def piece_operands(problem: Problem, elements: slice, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    """The piece's query rows, and its keys and values."""
    keys = (elements, slice(None), piece.keys)
    return problem.query[elements, :, piece.rows], problem.key[keys], problem.value[keys]


def narrow_pieces(problem: Problem, elements: slice, piece: Piece) -> Iterator[tuple[slice, Piece]]:
    """The piece for fewer batch elements and rows at a time, so that its scores over all heads fit TILE_SCORES.

    How rows are cut does not depend on the number of elements: a sequence's sums must not depend on its neighbours.
    """
    batch, num_heads = problem.query.shape[:2]
    scores_per_row = max(1, num_heads * (piece.keys.stop - piece.keys.start))
    step = max(1, TILE_SCORES // scores_per_row)
    together = max(1, TILE_SCORES // (scores_per_row * max(1, min(step, piece.rows.stop - piece.rows.start))))
    first, last, _ = elements.indices(batch)
    for element in range(first, last, together):
        for row in range(piece.rows.start, piece.rows.stop, step):
            rows = slice(row, min(row + step, piece.rows.stop))
            yield slice(element, min(element + together, last)), piece._replace(rows=rows)


def _rows(bound: Tensor, elements: slice, rows: slice) -> Tensor:
    bound = bound if bound.shape[0] == 1 else bound[elements]
    return bound if bound.shape[1] == 1 else bound[:, rows]


def cut_piece(tensor: Tensor, elements: slice, piece: Piece) -> Tensor:
    """The piece's part of a `[batch, heads, rows, keys]` tensor; dimensions of size 1 are broadcast and stay."""
    tensor = tensor if tensor.shape[0] == 1 else tensor[elements]
    tensor = tensor if tensor.shape[2] == 1 else tensor[:, :, piece.rows]
    return tensor if tensor.shape[3] == 1 else tensor[..., piece.keys]


def four_dimensional(added: Tensor | None, rows: int, piece: Piece) -> Tensor | None:
    """Fused attention broadcasts a mask over batch and heads, not over rows and keys."""
    if added is None:
        return None
    added = added.reshape((1,) * (4 - added.ndim) + added.shape)
    return added.expand(*added.shape[:2], rows, piece.keys.stop - piece.keys.start)


def equal_dims(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as fused attention takes them: of one head dim (padded with zeros) and with dense columns."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    tensors = tuple(
        tensor if tensor.shape[-1] == widest else torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1]))
        for tensor in tensors
    )
    # Fused attention itself does not look at the stride of the columns: it would read others' elements.
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)


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
    return (left.transpose(-1, -2) @ right).unflatten(1, (num_kv_heads, -1)).sum(2)
