# SPDX-License-Identifier: Apache-2.0
"""How rows with given spans are cut into pieces that see a simple part of the keys."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .pieces import (
    BAND_TILES,
    BAND_TILES_16_BITS,
    TILE_ROWS,
    Piece,
    halves_of,
    joined,
    marked_if_lone,
    masked_tiles,
    tiles_of_band,
)

SHORTEST_RUN = 64
"""Rows that must share one simple pattern to be worth a call of their own."""

SHORTEST_RUNS = {(0, 0): SHORTEST_RUN, (0, 1): SHORTEST_RUN, (1, 1): TILE_ROWS}
"""The same by what `start` and `end` grow by from row to row: of rectangles, triangles, and bands, of which few rows
are better a part of a masked tile."""

FEW_ROWS = 16
"""Rows of an element up to which neighbours may be computed together, in the time of reading their keys."""

UNSEEN = 1 << 30
"""Beyond every key."""


class Sharing(NamedTuple):
    """When neighbours of a batch that have few rows and spans of their own are computed together."""

    heads: int
    """Heads of an element. A call shares the heads of all of its elements among the threads."""
    threads: int
    worth: int
    """Keys of a head that one more call must spare each thread to be worth making."""

    def heads_per_thread(self, elements: int) -> int:
        """How many heads of so many elements the busiest thread has."""
        return -(-elements * self.heads // self.threads)


class Group(NamedTuple):
    """Batch elements that share a mask, their pieces, and how many keys a row of theirs sees on average."""

    elements: slice
    pieces: list[Piece]
    keys_per_row: float


@dataclass(frozen=True)
class Plan:
    """How a batch is computed.

    Attributes:
        groups: the batch, in parts that share a mask.
        tile_masks: the additive masks of the last tiles, by dtype, size, and what the rows see relative to the tile.
            All tiles of a sliding window share one, and so do all layers of a model.
        seen_by_tiles: what that is, by place of the tile.
    """

    groups: list[Group]
    tile_masks: dict[tuple, Tensor] = field(default_factory=dict)
    seen_by_tiles: dict[tuple[int, ...], tuple] = field(default_factory=dict)

    @cached_property
    def in_tiles(self) -> list[Group]:
        """The groups, with bands in tiles that share a call, as they are computed in 16 bits."""
        return self._cut(lambda piece: tiles_of_band(piece, BAND_TILES_16_BITS))

    @cached_property
    def in_narrow_tiles(self) -> list[Group]:
        """The same in float32."""
        return self._cut(lambda piece: tiles_of_band(piece, BAND_TILES))

    @cached_property
    def halved(self) -> list[Group]:
        """The groups, with bands likewise, and lone triangles of few rows as two and a square, again and again.

        Torch's fused attention computes 512 keys at a time, seen or not: of a triangle of 1,024 rows half as much again
        as is seen, of one of 4,096 an eighth. A square wastes nothing, and small triangles have ways of their own,
        but calls and merging take time: `LARGEST_HALVED`. Squares of one size share a call, and so do small triangles.
        """
        return self._cut(lambda piece: halves_of(piece) if piece.kind == "causal" else tiles_of_band(piece, BAND_TILES))

    @cached_property
    def masked(self) -> list[Group]:
        """The groups, with bands as masked tiles, each by itself."""
        return self._cut(lambda piece: masked_tiles(piece) if piece.kind == "band" else [piece])

    def _cut(self, cut: Callable[[Piece], Iterable[Piece]]) -> list[Group]:
        return [group._replace(pieces=[part for piece in group.pieces for part in cut(piece)]) for group in self.groups]


def plan_batch(
    start: Tensor,
    end: Tensor,
    batch: int,
    query_len: int,
    *,
    tiles_only: bool,
    joins: bool = False,
    sharing: Sharing | None = None,
    key_len: int | None = None,
) -> Plan:
    """The plan for spans `start` and `end`, int32 `[batch or 1, query_len or 1]`.

    With `tiles_only` all keys of a row are in one piece; with `joins` tiles that see all of the same keys become one.
    Without `sharing` sequences with spans of their own are never computed together. The layers of a model share their
    spans, so the last few plans are remembered, by the identity of the tensors.

    Raises:
        ValueError: a row sees keys beyond `key_len`, if that is given.
    """
    request = (batch, query_len, tiles_only, joins, sharing, key_len, versions(start, end))
    for known_start, known_end, known_request, plan in tuple(_recent_plans):  # other threads add theirs
        if known_start() is start and known_end() is end and known_request == request:
            return plan
    if key_len is not None:
        check_bounds(start, end, key_len)
    groups = _groups(start, end, batch, query_len, tiles_only, sharing)
    plan = Plan([group._replace(pieces=joined(group.pieces)) if joins else group for group in groups])
    _recent_plans.appendleft((weakref.ref(start), weakref.ref(end), request, plan))
    return plan


def check_bounds(start: Tensor, end: Tensor, key_len: int) -> None:
    """See to it that rows see keys that there are: behind a slice of a cache, say, lie others.

    Raises:
        ValueError: they do not.
    """
    firsts, lasts = start.cpu().numpy(), end.cpu().numpy()
    if not firsts.size or not lasts.size or (firsts.min() >= 0 and lasts.max() <= key_len):
        return
    firsts, lasts = np.broadcast_arrays(firsts, lasts)
    sees = firsts < lasts  # the bounds of other rows mean nothing
    if sees.any() and (firsts[sees].min() < 0 or lasts[sees].max() > key_len):
        raise ValueError(
            f"attention: `spans` must lie within the {key_len} keys that there are, got rows that see keys from "
            f"{firsts[sees].min()} to {lasts[sees].max()}; clamp `start` and `end`"
        )


def versions(start: Tensor, end: Tensor) -> tuple[int | bytes, int | bytes]:
    """What tells whether the tensors were changed in place: how often, which torch counts but for inference tensors.

    Those are told by their content. Changes by way of NumPy or `Tensor.data` are not counted either, and not seen.
    """
    return _version(start), _version(end)


def _version(tensor: Tensor) -> int | bytes:
    return tensor.cpu().numpy().tobytes() if tensor.is_inference() else tensor._version


_recent_plans: deque[tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple, Plan]] = deque(maxlen=8)


def _groups(
    start: Tensor, end: Tensor, batch: int, query_len: int, tiles_only: bool, sharing: Sharing | None
) -> Iterator[Group]:
    shared = max(start.shape[0], end.shape[0]) == 1
    start = start.cpu().expand(1 if shared else batch, query_len)
    end = end.cpu().expand(start.shape)
    if batch and 0 < query_len <= FEW_ROWS and (shared or sharing is not None):
        yield from plan_few_rows(start, end, batch, sharing)
        return
    seen = (end - start).clamp(min=0).float()
    for index in range(start.shape[0]):
        elements = slice(0, batch) if shared else slice(index, index + 1)
        pieces = plan_rows(start[index], end[index], tiles_only=tiles_only)
        yield Group(elements, pieces, float(seen[index].mean()) if query_len else 0.0)


def plan_rows(start: Tensor, end: Tensor, *, tiles_only: bool = False) -> list[Piece]:
    """Pieces that cover the visible keys of rows with the given spans, each int32 `[query_len]` on the CPU.

    Rows whose spans are constant see a rectangle; rows whose end grows by one from row to row see a rectangle and a
    causal triangle, or a band where the start grows as well. Other rows are cut into masked tiles. Rows that see
    nothing are in no piece, unless their neighbours' tile has them.
    """
    empty = end <= start
    start, end = start.masked_fill(empty, 0), end.masked_fill(empty, 0)
    query_len = start.numel()
    pieces: list[Piece] = []
    planned = 0
    if not tiles_only and query_len > SHORTEST_RUN:
        for first, last, slopes in _linear_runs(start, end):
            first = max(first, planned)
            if end[first] <= start[first] and slopes == (0, 1):
                first += 1  # the row before the one that sees the first key
            if slopes not in SHORTEST_RUNS or last - first < SHORTEST_RUNS[slopes]:
                continue
            pieces += _tiles(start, end, planned, first)
            if slopes == (1, 1):
                pieces.append(Piece(slice(first, last), slice(int(start[first]), int(end[last - 1])), "band"))
            else:
                pieces += _run(first, last, int(start[first]), int(end[first]), grows=slopes == (0, 1))
            planned = last
    return marked_if_lone([*pieces, *_tiles(start, end, planned, query_len)])


def plan_few_rows(start: Tensor, end: Tensor, batch: int, sharing: Sharing | None) -> Iterator[Group]:
    """Groups of neighbours with few rows (decoding), one piece each, cut where that spares keys that are padding.

    Args:
        start, end: int32 `[batch, query_len]` on the CPU, or `[1, query_len]` if all elements share them; then nothing
            is cut, and `sharing` not needed.
    """
    # Few numbers, one by one: each step of decoding brings new spans, and calls of torch take longer.
    rows = [list(zip(*pair, strict=True)) for pair in zip(start.tolist(), end.tolist(), strict=True)]
    seen = [[bounds for bounds in own if bounds[0] < bounds[1]] for own in rows]
    firsts = [min((first for first, _ in own), default=UNSEEN) for own in seen]
    lasts = [max((last for _, last in own), default=0) for own in seen]
    everything = slice(0, batch)
    parts: Iterable[slice] = [everything]
    if sharing is not None and len(rows) > 1:
        parts = cut_batch(firsts, lasts, everything, sharing)
    for elements in parts:
        keys = slice(min(firsts[elements]), max(lasts[elements]))
        yield _whole_group([bounds for own in rows[elements] for bounds in own], start.shape[1], elements, keys)


def cut_batch(firsts: list[int], lasts: list[int], elements: slice, sharing: Sharing) -> Iterator[slice]:
    """Parts of `elements`, each to be computed over all keys that any of its own sees, from `firsts` to `lasts`.

    They are halved where that spares most keys, as long as it spares enough.
    """
    most = elements.stop - elements.start
    own_firsts, own_lasts = firsts[elements], lasts[elements]
    # The keys that the busiest thread reads.
    together = sharing.heads_per_thread(most) * max(0, max(own_lasts) - min(own_firsts))
    at_best = sharing.heads * (sum(own_lasts) - sum(own_firsts)) // sharing.threads
    if together - at_best <= sharing.worth:  # then no cut is worth it, and none need be searched for
        yield elements
        return
    before = _running_lengths(own_firsts, own_lasts)
    after = _running_lengths(own_firsts[::-1], own_lasts[::-1])
    apart, cut = min(
        ((sharing.heads_per_thread(size) * before[size - 1]
          + sharing.heads_per_thread(most - size) * after[most - size - 1], size)
         for size in range(1, most)),
        default=(together, 0),
    )  # fmt: skip
    if together - apart <= sharing.worth:
        yield elements
        return
    middle = elements.start + cut
    yield from cut_batch(firsts, lasts, slice(elements.start, middle), sharing)
    yield from cut_batch(firsts, lasts, slice(middle, elements.stop), sharing)


def _running_lengths(firsts: list[int], lasts: list[int]) -> list[int]:
    """From the smallest of the first n `firsts` to the greatest of the first n `lasts`, for every n from 1 on."""
    bounds = zip(accumulate(firsts, min), accumulate(lasts, max), strict=True)
    return [max(0, last - first) for first, last in bounds]


def _whole_group(bounds: list[tuple[int, int]], query_len: int, elements: slice, keys: slice) -> Group:
    """The group of `elements`, whose rows see `keys` or, by their `bounds`, parts of them."""
    if keys.stop <= keys.start:
        return Group(elements, [], 0.0)
    lengths = [max(0, last - first) for first, last in bounds]
    same = all(each == (keys.start, keys.stop) for each in bounds)
    piece = Piece(slice(0, query_len), keys, "all" if same else "masked", blind=not all(lengths))
    return Group(elements, [piece], sum(lengths) / len(lengths))


def _linear_runs(start: Tensor, end: Tensor) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """First row, one past the last row, and slopes of start and end, for every stretch of rows with constant slopes."""
    slopes = torch.stack([start.diff(), end.diff()])
    changes = (slopes[:, 1:] != slopes[:, :-1]).any(0).nonzero()[:, 0] + 1
    firsts = [0, *changes.tolist()]
    for first, following in zip(firsts, [*firsts[1:], start.numel() - 1], strict=True):
        yield first, following + 1, (int(slopes[0, first]), int(slopes[1, first]))


def _run(first: int, last: int, start: int, end: int, *, grows: bool) -> Iterator[Piece]:
    """Pieces of rows `[first, last)` that all start at `start`; the first ends at `end`, each next one key later."""
    rows = slice(first, last)
    if not grows:
        if end > start:
            yield Piece(rows, slice(start, end), "all")
        return
    has_rectangle = end - 1 > start
    if has_rectangle:
        yield Piece(rows, slice(start, end - 1), "all")
    yield Piece(rows, slice(end - 1, end - 1 + last - first), "causal", follows=has_rectangle)


def _tiles(start: Tensor, end: Tensor, first: int, last: int) -> Iterator[Piece]:
    for row in range(first, last, TILE_ROWS):
        rows = slice(row, min(row + TILE_ROWS, last))
        sees = end[rows] > start[rows]
        if not sees.any():
            continue
        keys = slice(int(start[rows][sees].min()), int(end[rows].max()))
        same = bool((start[rows] == keys.start).all() and (end[rows] == keys.stop).all())
        yield Piece(rows, keys, "all" if same else "masked", blind=not bool(sees.all()))
