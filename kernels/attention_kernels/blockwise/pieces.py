# SPDX-License-Identifier: Apache-2.0
"""Rows that see a simple part of the keys, and how they are cut further."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from . import processor

TILE_ROWS = 192
"""Rows of a masked tile: as few as torch's fused attention still takes 64 at a time of, to hug what its rows see."""


class BandTiles(NamedTuple):
    """Rows of a band's tiles. They share calls, so there may be many."""

    rows: int
    """As few as are worth it, to hug the band."""
    wide: int
    """Keys that a row sees, from which on `TILE_ROWS` hug the band as well, and products are larger."""


BAND_TILES = BandTiles(rows=32, wide=3072)
"""In float32: as few rows as torch's fused attention takes at a time."""

BAND_TILES_16_BITS = BandTiles(rows=96, wide=384)
"""In 16 bits, where keys are packed for each tile anew before they are multiplied: the more, the fewer heads share
them."""

SMALLEST_HALF = 384 if processor.AVX512 else 192
"""Rows of a causal triangle whose halves are not halved again; `Plan.halved` says why triangles are. The wider a
processor's instructions, the larger a product must be to be worth its call."""

LARGEST_HALVED = 1152
"""Rows of a causal triangle up to which it is halved at all: the more rows, the smaller the part of a triangle that
halves spare. Of 2,048 rows it is a twentieth at best, and beside other work the calls take longer than that."""


class Piece(NamedTuple):
    """Rows and the keys they see.

    Its kind says which: "all" of them; "causal": the last row sees all, each one before it one key less; "band": the
    first row sees the first of them, the last row the last, and each as many as the others, one key further on than the
    row before; "masked": what a mask says.
    """

    rows: slice
    keys: slice
    kind: Literal["all", "causal", "band", "masked"]
    follows: bool = False
    """Whether an earlier piece has the same rows, whose result this one's is merged into."""
    blind: bool = False
    """Whether some of its rows see nothing."""
    lone: bool = False
    """Whether it is a causal triangle and all rows of its sequence are its own, so that it may be worth many calls.
    Each waits for its slowest thread: beside other work the calls of eight packed documents would add up."""
    times: int = 1
    """How many of it there are, to be computed at once; `rows` and `keys` are those of the first."""
    step: int = 0
    """Rows, and keys, from the beginning of one to that of the next."""

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows and keys it has."""
        return self.rows.stop - self.rows.start, self.keys.stop - self.keys.start

    def each(self) -> Iterator[Piece]:
        """The pieces that it stands for, one by one."""
        for index in range(self.times):
            rows, keys = (
                slice(part.start + index * self.step, part.stop + index * self.step) for part in (self.rows, self.keys)
            )
            yield self._replace(rows=rows, keys=keys, times=1, step=0)


def joined(pieces: list[Piece]) -> list[Piece]:
    """The pieces, with neighbours that see all of the same keys as one: fewer and larger calls are faster."""
    whole: list[Piece] = []
    for piece in pieces:
        last = whole[-1] if whole else None
        if (
            last is not None
            and (last.kind, last.keys, last.rows.stop) == ("all", piece.keys, piece.rows.start)
            and piece.kind == "all"
            and not (last.blind or piece.blind or last.follows or piece.follows)
        ):
            whole[-1] = last._replace(rows=slice(last.rows.start, piece.rows.stop))
        else:
            whole.append(piece)
    return whole


def tiles_of_band(piece: Piece, tiles: BandTiles) -> Iterator[Piece]:
    """A band as equal tiles that share a call, and one of the rows that are left; any other piece as it is."""
    if piece.kind != "band":
        yield piece
        return
    rows, keys = piece.shape
    tile = tiles.rows if keys - rows < tiles.wide else TILE_ROWS
    count, rest = divmod(rows, tile)
    if count:
        yield _part_of_band(piece, 0, tile)._replace(times=count, step=tile)
    if rest:
        yield _part_of_band(piece, rows - rest, rows)


def masked_tiles(piece: Piece) -> Iterator[Piece]:
    """A band as tiles with masks."""
    rows = piece.shape[0]
    for row in range(0, rows, TILE_ROWS):
        yield _part_of_band(piece, row, min(row + TILE_ROWS, rows))._replace(kind="masked")


def _part_of_band(piece: Piece, first: int, last: int) -> Piece:
    """The rows `[first, last)` of a band, counted from its own first."""
    rows, keys = piece.shape
    row, key = piece.rows.start, piece.keys.start
    return Piece(slice(row + first, row + last), slice(key + first, key + last + keys - rows), "band")


def halves_of(piece: Piece) -> Iterator[Piece]:
    """A lone triangle as small ones of equal size, squares, and a strip of the few rows that are left.

    Any other piece as it is.
    """
    rows, first, first_key = piece.shape[0], piece.rows.start, piece.keys.start
    halvings = max(0, (rows // SMALLEST_HALF).bit_length() - 1)
    if not piece.lone or not halvings or rows > LARGEST_HALVED:
        yield piece
        return
    smallest, count = rows >> halvings, 1 << halvings

    def part(row: int, last_row: int, last_key: int) -> tuple[slice, slice]:
        return slice(first + row, first + last_row), slice(first_key, first_key + last_key)

    yield Piece(*part(0, smallest, smallest), "causal", piece.follows, lone=True, times=count, step=smallest)
    for level in range(halvings):
        half = smallest << level
        yield Piece(*part(half, 2 * half, half), "all", True, times=count >> (level + 1), step=2 * half)
    if count * smallest < rows:
        yield Piece(*part(count * smallest, rows, rows), "causal", piece.follows)


def marked_if_lone(pieces: list[Piece]) -> list[Piece]:
    """The pieces of a sequence, its causal triangle marked as lone if no other piece has other rows."""
    rows = {(piece.rows.start, piece.rows.stop) for piece in pieces}
    if len(rows) != 1:
        return pieces
    return [piece._replace(lone=True) if piece.kind == "causal" else piece for piece in pieces]


def uncovered(pieces: list[Piece], query_len: int) -> Iterator[slice]:
    """Rows that are in no piece, since they see nothing."""
    covered = 0
    for piece in [*pieces, Piece(slice(query_len, query_len), slice(0, 0), "all")]:
        if piece.rows.start > covered:
            yield slice(covered, piece.rows.start)
        covered = max(covered, piece.rows.stop)
