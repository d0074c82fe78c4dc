# SPDX-License-Identifier: Apache-2.0
"""What a piece is computed from: its rows, keys and values, and what is added to its scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .pieces import Piece
from .plan import Plan
from .problem import Problem, has_nan

KEPT_SCORES = 1 << 21
"""Numbers of tiles' masks that are kept for the tiles after them."""


def piece_operands(problem: Problem, elements: slice, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    """The piece's query rows, and its keys and values."""
    keys = (elements, slice(None), piece.keys)
    return problem.query[elements, :, piece.rows], problem.key[keys], problem.value[keys]


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
    plan = problem.plan(fused=problem.fused)
    tile_masks = plan.tile_masks
    pattern: tuple = (dtype, repeats, piece.kind, piece.shape)
    if piece.kind == "masked":
        pattern += _seen_by_tile(problem, plan, elements, piece)
    mask = tile_masks.get(pattern)
    if mask is None:
        if piece.kind == "masked":
            visible = visible_keys(problem, elements, piece)
        else:
            visible = visible_by_kind(piece, problem.query.device)
        visible = visible.repeat(1, 1, repeats, 1)
        if sum(tile.numel() for tile in tuple(tile_masks.values())) + visible.numel() > KEPT_SCORES:
            tile_masks.clear()  # neighbours share a pattern, distant tiles rarely do
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)
        tile_masks[pattern] = mask
    return mask


def _seen_by_tile(problem: Problem, plan: Plan, elements: slice, piece: Piece) -> tuple:
    """What the rows of a masked piece see relative to it, as shape and bytes."""
    rows, keys = piece.rows, piece.keys
    place = (elements.start, elements.stop, rows.start, rows.stop, keys.start, keys.stop)
    seen = plan.seen_by_tiles.get(place)
    if seen is None:
        bounds = torch.broadcast_tensors(*(_rows(bound, elements, rows) for bound in (problem.start, problem.end)))
        relative = (torch.stack(bounds) - keys.start).cpu().numpy()
        seen = plan.seen_by_tiles[place] = (relative.shape, relative.tobytes())
    return seen


def visible_by_kind(piece: Piece, device: torch.device) -> Tensor:
    """Boolean mask `[1, 1, rows, keys]` of a causal piece or a band."""
    rows, keys = piece.shape
    visible = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=device).tril_(keys - rows)
    return visible.triu_() if piece.kind == "band" else visible


def is_square(piece: Piece) -> bool:
    """Whether a piece is a causal triangle that torch's fused attention computes without a mask."""
    rows, keys = piece.shape
    return piece.kind == "causal" and rows == keys


def shows_all(problem: Problem, piece: Piece) -> bool:
    """Whether rows of a piece see all of its keys, as far as masks say; a bias may still hide some."""
    return piece.kind == "all" and problem.key_mask is problem.mask is None


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
