# SPDX-License-Identifier: Apache-2.0
"""Masks as spans: every query row sees one run of keys.

A dense mask costs `query_len x key_len` elements; the same mask as spans costs two integers per row. Spans are also
what the kernels need to skip work: the keys that a tile of rows can see lie between its smallest start and its largest
end, and between its largest start and its smallest end no mask is needed at all.

Positions are key indices: row `i` stands at key index `i + offset`, so that `offset` is the number of keys that precede
the first query (the length of the cache).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_tensors, check_whole, is_one_or

Offset = int | Tensor
Device = torch.device | str | None

FARTHEST = 2**30
"""A window or chunk of more keys hides none: int32 positions end there."""


class TileBounds(NamedTuple):
    """Key ranges of tiles of rows, each int32 `[batch or 1, tiles]`, with `first <= body_first <= body_last <= last`.

    Keys outside `[first, last)` are seen by no row of the tile; keys in `[body_first, body_last)` are seen by all of
    them.
    """

    first: Tensor
    body_first: Tensor
    body_last: Tensor
    last: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Spans:
    """One half-open run of visible keys per query row.

    Attributes:
        start: int32 `[batch or 1, query_len or 1]`, first visible key of each row.
        end: int32 `[batch or 1, query_len or 1]`, one past the last visible key; a row with `end <= start` is blind.
        query_len: number of query rows.
        key_len: number of keys; `0 <= start` and `end <= key_len` hold.
        key_mask: bool `[batch or 1, key_len]` or None. Keys that no row sees although they lie inside spans: padding in
            the middle of a sequence. O(keys), so a batch with such padding still needs no dense mask.
        gap_count: int32 `[batch or 1]` beside `key_mask`: how many keys `key_mask` hides between the first and the last
            key that it shows, between which spans must lie. The kernel reads it on the device to treat a batch element
            without gaps at full speed: it does not look at that element's `key_mask` then.

    `start` and `end` may each be broadcast, so a left-padded causal batch shares one `end` row between its elements.

    Raises:
        TypeError: a tensor or a length is something else. All constructors do so.
        ValueError: a tensor has another dtype or shape, a length is negative, only one of `key_mask` and `gap_count` is
            there, or the tensors are on several devices.
    """

    start: Tensor
    end: Tensor
    query_len: int
    key_len: int
    key_mask: Tensor | None = None
    gap_count: Tensor | None = None

    def __post_init__(self) -> None:
        bounds = {"start": self.start, "end": self.end}
        check_tensors("Spans", bounds)
        for name, tensor in bounds.items():
            if tensor.ndim != 2 or not is_one_or(tensor.shape[1], self.query_len) or tensor.dtype != torch.int32:
                raise ValueError(
                    f"Spans: `{name}` must be int32 of shape [batch or 1, {self.query_len} or 1], got "
                    f"{tensor.dtype} {list(tensor.shape)}; build spans with a constructor such as Spans.causal"
                )
        if (self.key_mask is None) != (self.gap_count is None):
            raise ValueError("Spans: `key_mask` and `gap_count` go together; build them with Spans.padded")
        if not torch.compiler.is_compiling():  # sizes may be symbols there, and comparing them would fix their values
            self._check_sizes()

    def _check_sizes(self) -> None:
        _check_lengths(self.query_len, self.key_len)
        given = {"start": self.start, "end": self.end}
        if self.key_mask is not None and self.gap_count is not None:
            self._check_padding(self.key_mask, self.gap_count)
            given |= {"key_mask": self.key_mask, "gap_count": self.gap_count}
        sizes = [tensor.shape[0] for tensor in given.values()]
        if not all(is_one_or(size, max(sizes)) for size in sizes):
            raise ValueError(
                f"Spans: {_listed(given)} must have one batch or a batch of 1, got {sizes}; slice or expand them"
            )
        if any(tensor.device != self.start.device for tensor in given.values()):
            devices = [str(tensor.device) for tensor in given.values()]
            raise ValueError(f"Spans: {_listed(given)} must be on one device, got {devices}; see Tensor.to")

    def _check_padding(self, key_mask: Tensor, gap_count: Tensor) -> None:
        check_tensors("Spans", {"key_mask": key_mask, "gap_count": gap_count})
        if key_mask.dtype != torch.bool or key_mask.ndim != 2 or key_mask.shape[1] != self.key_len:
            raise ValueError(
                f"Spans: `key_mask` must be bool [batch or 1, key_len] with {self.key_len} keys, got {key_mask.dtype} "
                f"{list(key_mask.shape)}; build it with Spans.padded"
            )
        if gap_count.dtype != torch.int32 or gap_count.ndim != 1:
            raise ValueError(
                f"Spans: `gap_count` must be int32 [batch or 1], got {gap_count.dtype} {list(gap_count.shape)}; build "
                "it with Spans.padded"
            )

    # ------------------------------------------------------------------ constructors

    @classmethod
    def full(cls, query_len: int, key_len: int | None = None, *, device: Device = None) -> Spans:
        """Every row sees every key (bidirectional and cross attention)."""
        key_len = query_len if key_len is None else key_len
        _check_lengths(query_len, key_len)
        return cls(_constant(0, device), _constant(key_len, device), query_len, key_len)

    @classmethod
    def causal(
        cls, query_len: int, key_len: int | None = None, *, offset: Offset | None = None, device: Device = None
    ) -> Spans:
        """Row `i` sees the keys up to its own position `i + offset`.

        `offset` defaults to `key_len - query_len`: the last row stands at the last key, as with a growing cache.

        Raises:
            ValueError: a length is negative.
        """
        return cls.sliding(query_len, key_len, left=None, right=0, offset=offset, device=device)

    @classmethod
    def sliding(
        cls,
        query_len: int,
        key_len: int | None = None,
        *,
        left: int | None,
        right: int | None = 0,
        offset: Offset | None = None,
        device: Device = None,
    ) -> Spans:
        """Row at position `p` sees keys `p - left .. p + right`, both included; None is unbounded.

        A causal window of `w` keys, the row's own included, is `left=w - 1, right=0`.

        Raises:
            ValueError: a length, `left` or `right` is negative.
        """
        for name, size in (("left", left), ("right", right)):
            if size is None:
                continue
            check_whole("Spans.sliding", name, size)
            if size < 0:
                raise ValueError(f"Spans.sliding: `{name}` must be None or at least 0, got {size}; None is no limit")
        key_len = query_len if key_len is None else key_len
        _check_lengths(query_len, key_len)  # here, or `_positions` would fail first with an error of torch's
        if query_len == 1 and isinstance(offset, int) and not torch.compiler.is_compiling():  # each step of decoding
            first = 0 if left is None else min(max(0, offset - left), key_len)
            last = key_len if right is None else min(max(0, offset + right + 1), key_len)
            return cls(_constant(first, device), _constant(last, device), query_len, key_len)
        # Sums of positions and limits are int32.
        left, right = (None if size is None else min(size, FARTHEST) for size in (left, right))
        position = _positions(query_len, key_len, offset, device)
        start = _constant(0, device) if left is None else (position - left).clamp_(0, key_len)
        end = _constant(key_len, device) if right is None else (position + (right + 1)).clamp_(0, key_len)
        return cls(start, end, query_len, key_len)

    @classmethod
    def chunked(
        cls,
        query_len: int,
        key_len: int | None = None,
        *,
        chunk_size: int,
        first: Offset = 0,
        offset: Offset | None = None,
        device: Device = None,
    ) -> Spans:
        """Row sees the keys of its own chunk; chunks of `chunk_size` keys are counted from key `first`.

        `first` may be an integer tensor `[batch]`: the number of left-padding tokens of each sequence. Llama 4's
        chunked attention is this `&` `Spans.causal`.

        Raises:
            ValueError: a length is negative, or `chunk_size` is less than 1.
        """
        check_whole("Spans.chunked", "chunk_size", chunk_size)
        if chunk_size < 1:
            raise ValueError(f"Spans.chunked: `chunk_size` must be at least 1, got {chunk_size}; see Spans.causal")
        key_len = query_len if key_len is None else key_len
        _check_lengths(query_len, key_len)
        chunk_size = min(chunk_size, FARTHEST)
        position = _positions(query_len, key_len, offset, device)
        check_whole("Spans.chunked", "first", first, or_tensor=True)
        if isinstance(first, Tensor):
            first = first.to(position.device, torch.int32).reshape(-1, 1)
        start = first + torch.div(position - first, chunk_size, rounding_mode="floor") * chunk_size
        end = start + chunk_size
        return cls(start.clamp(0, key_len), end.clamp(0, key_len), query_len, key_len)

    @classmethod
    def blocks(cls, block_ids: Tensor, query_len: int | None = None, *, offset: Offset | None = None) -> Spans:
        """Row sees the block that holds its position; a row whose id is negative sees nothing.

        Args:
            block_ids: integer `[batch, key_len]`; consecutive equal ids form one block. Block-bidirectional attention
                of image tokens inside causal text is `Spans.causal(...) | Spans.blocks(...)`.

        Raises:
            ValueError: `block_ids` have not two dimensions.
        """
        run_start, run_end = _runs("Spans.blocks: `block_ids`", block_ids)
        key_len = block_ids.shape[1]
        query_len = key_len if query_len is None else query_len
        _check_lengths(query_len, key_len)
        if not key_len:
            return cls(_constant(0, block_ids.device), _constant(0, block_ids.device), query_len, 0)
        position = _positions(query_len, key_len, offset, block_ids.device).long().clamp_(0, max(key_len - 1, 0))
        position = position.expand(block_ids.shape[0], -1)
        inside = block_ids.gather(1, position) >= 0
        start = torch.where(inside, run_start.gather(1, position), 0).to(torch.int32)
        end = torch.where(inside, run_end.gather(1, position), 0).to(torch.int32)
        return cls(start, end, query_len, key_len)

    @classmethod
    def packed(cls, document_ids: Tensor) -> Spans:
        """Several documents in one row of the batch, each seeing only itself.

        Args:
            document_ids: integer `[batch, tokens]`, constant within a document and different in neighbouring ones.

        Raises:
            ValueError: `document_ids` have not two dimensions.
        """
        run_start, run_end = _runs("Spans.packed: `document_ids`", document_ids)
        tokens = document_ids.shape[1]
        return cls(run_start.to(torch.int32), run_end.to(torch.int32), tokens, tokens)

    @classmethod
    def packed_lengths(cls, lengths: Sequence[int], *, device: Device = None) -> Spans:
        """Documents of the given lengths, one after the other, in a batch of one.

        Raises:
            ValueError: there are no lengths, or one is negative.
        """
        if not isinstance(lengths, Iterable) or (isinstance(lengths, Tensor) and not lengths.ndim):
            raise TypeError(
                f"Spans.packed_lengths: `lengths` must be a sequence, got {lengths!r}; put a single length in a list"
            )
        lengths = list(lengths)
        for index, length in enumerate(lengths):
            check_whole("Spans.packed_lengths", f"lengths[{index}]", length)
        if not lengths or min(lengths) < 0:
            raise ValueError(
                f"Spans.packed_lengths: `lengths` must hold numbers of at least 0, got {lengths}; they are the "
                "tokens of each document"
            )
        counts = torch.tensor(lengths, device=device)
        return cls.packed(torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)[None])

    @classmethod
    def packed_offsets(cls, query_offsets: Tensor, key_offsets: Tensor, query_len: int, key_len: int) -> Spans:
        """Documents given by cumulative lengths, as the `cu_seq_lens` of variable-length attention.

        Args:
            query_offsets: integer `[documents + 1]`, row `i` belongs to document `d` if it lies in
                `[query_offsets[d], query_offsets[d + 1])`. Rows beyond the last offset see nothing.
            key_offsets: integer `[documents + 1]`, likewise for keys.

        Raises:
            ValueError: the offsets have not one dimension, one length and at least 2 numbers.
        """
        given = {"query_offsets": query_offsets, "key_offsets": key_offsets}
        check_tensors("Spans.packed_offsets", given)
        for name, offsets in given.items():
            check_whole("Spans.packed_offsets", name, offsets, or_tensor=True)
        if query_offsets.ndim != 1 or query_offsets.shape != key_offsets.shape or query_offsets.numel() < 2:
            raise ValueError(
                "Spans.packed_offsets: `query_offsets` and `key_offsets` must have one dimension and one length of "
                f"at least 2, got {list(query_offsets.shape)} and {list(key_offsets.shape)}; begin both with 0"
            )
        _check_lengths(query_len, key_len)
        rows = torch.arange(query_len, device=query_offsets.device, dtype=query_offsets.dtype)
        document = torch.searchsorted(query_offsets.contiguous(), rows, right=True) - 1
        known = (document >= 0) & (document < query_offsets.numel() - 1)
        document = document.clamp(0, query_offsets.numel() - 2)
        start = torch.where(known, key_offsets[document], 0).clamp(0, key_len).to(torch.int32)
        end = torch.where(known, key_offsets[document + 1], 0).clamp(0, key_len).to(torch.int32)
        return cls(start[None], end[None], query_len, key_len)

    @classmethod
    def padded(cls, key_mask: Tensor, query_len: int) -> Spans:
        """Every row sees the keys that `key_mask` marks.

        Args:
            key_mask: bool `[batch, key_len]`, True where the key is a token. Padding on the left, on the right or on
                both sides is spans alone; padding in the middle is kept as `Spans.key_mask`. On a device other than the
                CPU, and under a compiler's tracing, the mask is always kept, with its count of gaps: looking would cost
                a synchronisation, or cannot be done.

        Raises:
            ValueError: `key_mask` is not bool or has not two dimensions.
        """
        check_tensors("Spans.padded", {"key_mask": key_mask})
        if key_mask.dtype != torch.bool or key_mask.ndim != 2:
            raise ValueError(
                f"Spans.padded: `key_mask` must be bool [batch, key_len], got {key_mask.dtype} {list(key_mask.shape)}; "
                "True is a token"
            )
        key_len = key_mask.shape[1]
        if values_at_hand(key_mask):
            return cls._padded_at_hand(key_mask, query_len)
        index = torch.arange(key_len, device=key_mask.device, dtype=torch.int32)
        first = torch.where(key_mask, index, key_len).amin(1) if key_len else index.new_zeros(key_mask.shape[0])
        last = torch.where(key_mask, index + 1, 0).amax(1) if key_len else first
        gap_count = ((last - first).clamp_(min=0) - key_mask.sum(1)).to(torch.int32)
        return cls(first[:, None], last[:, None], query_len, key_len, key_mask, gap_count)

    @classmethod
    def _padded_at_hand(cls, key_mask: Tensor, query_len: int) -> Spans:
        """`padded` where the mask can be looked at: as bytes, since each token that is decoded brings a new mask."""
        key_len = key_mask.shape[1]
        sequences = [shown.tobytes() for shown in key_mask.numpy()]
        firsts = [key_len - len(sequence.lstrip(b"\0")) for sequence in sequences]
        lasts = [len(sequence.rstrip(b"\0")) for sequence in sequences]
        hides = any(
            sequence.find(b"\0", first, last) >= 0
            for sequence, first, last in zip(sequences, firsts, lasts, strict=True)
        )
        # What is constant stays one number.
        starts = [0] if not any(firsts) else firsts
        ends = [key_len] if all(last == key_len for last in lasts) else lasts
        device = key_mask.device  # not the default one
        start, end = (torch.tensor(bounds, dtype=torch.int32, device=device)[:, None] for bounds in (starts, ends))
        if not hides:
            return cls(start, end, query_len, key_len)
        runs = [max(0, last - first) for first, last in zip(firsts, lasts, strict=True)]
        gap_count = (torch.tensor(runs, device=device) - key_mask.sum(1)).to(torch.int32)
        return cls(start, end, query_len, key_len, key_mask, gap_count)

    @classmethod
    def from_dense(cls, mask: Tensor) -> Spans | None:
        """Spans of a mask, or None if a row sees more than one run of keys.

        Args:
            mask: bool `[batch, query_len, key_len]`, True where a row sees a key.

        Raises:
            ValueError: `mask` is not bool or has not three dimensions.
        """
        check_tensors("Spans.from_dense", {"mask": mask})
        if mask.dtype != torch.bool or mask.ndim != 3:
            raise ValueError(
                f"Spans.from_dense: `mask` must be bool [batch, query_len, key_len], got {mask.dtype} "
                f"{list(mask.shape)}; of an additive mask pass `mask == 0`, of one with heads one head's"
            )
        key_len = mask.shape[-1]
        index = torch.arange(key_len, device=mask.device, dtype=torch.int32)
        count = mask.sum(-1, dtype=torch.int32)
        end = torch.where(mask, index + 1, 0).amax(-1) if key_len else count
        start = end - count
        contiguous = (mask == ((index >= start[..., None]) & (index < end[..., None]))).all()
        return cls(start, end, mask.shape[1], key_len) if contiguous else None

    # ------------------------------------------------------------------ composition

    def __and__(self, other: Spans) -> Spans:
        """Keys that both let a row see. Always spans again.

        Raises:
            TypeError: the other is something else.
            ValueError: the two differ in the number of queries or keys, or in the batch where neither has a batch of 1.
        """
        self._require_same_sizes(other)
        start, end = torch.maximum(self.start, other.start), torch.minimum(self.end, other.end)
        if self.key_mask is None or other.key_mask is None:
            masked = self if self.key_mask is not None else other
            return replace(self, start=start, end=end, key_mask=masked.key_mask, gap_count=masked.gap_count)
        padded = Spans.padded(self.key_mask & other.key_mask, self.query_len)
        return replace(self, start=start, end=end, key_mask=None, gap_count=None) & padded

    def __or__(self, other: Spans) -> Spans:
        """Keys that either lets a row see.

        Raises:
            ValueError: the union of some row has a gap (it is no span then: use a dense mask), one side hides keys in
                the middle, or the two do not fit each other, as for `&`. The check reads the spans, which on a GPU is a
                synchronisation.
        """
        union = self.union_touching(other)
        both = (self.end > self.start) & (other.end > other.start)
        if (both & (torch.maximum(self.start, other.start) > torch.minimum(self.end, other.end))).any():
            raise ValueError("Spans: the union leaves a gap between the two runs of a row; pass a dense `mask` instead")
        return union

    def union_touching(self, other: Spans) -> Spans:
        """Union of spans known to touch or overlap wherever neither is empty (causal and the row's own block, say).

        No check and so no synchronisation: rows whose runs do not touch would silently gain the keys between them.

        Raises:
            ValueError: one side hides keys in the middle, or the two do not fit each other, as for `&`.
        """
        self._require_same_sizes(other)
        if self.key_mask is not None or other.key_mask is not None:
            raise ValueError("Spans: a union with padding in the middle is no span; apply Spans.padded after the union")
        ours, theirs = self.end > self.start, other.end > other.start
        start = torch.minimum(
            torch.where(ours, self.start, self.key_len), torch.where(theirs, other.start, self.key_len)
        )
        end = torch.maximum(torch.where(ours, self.end, 0), torch.where(theirs, other.end, 0))
        return replace(self, start=start, end=end)

    def _require_same_sizes(self, other: Spans) -> None:
        if not isinstance(other, Spans):
            raise TypeError(
                f"Spans: spans combine with spans only, got {type(other).__name__}; Spans.from_dense makes some of a "
                "mask, and `attention` takes a dense `mask` beside them"
            )
        if (self.query_len, self.key_len) != (other.query_len, other.key_len):
            raise ValueError(
                f"Spans: cannot combine query_len x key_len of {self.query_len} x {self.key_len} with "
                f"{other.query_len} x {other.key_len}; build both for the same lengths"
            )
        if not is_one_or(self.batch, other.batch) and not is_one_or(other.batch, self.batch):
            raise ValueError(
                f"Spans: cannot combine spans of {self.batch} samples with those of {other.batch}; build both for the "
                "same batch, or one of them for a batch of 1"
            )

    def cut(self, rows: slice, keys: slice) -> Spans:
        """The mask of some consecutive rows and keys, whose numbers then count from the first row and key kept.

        Of a whole sequence's mask it is what a device needs that holds those queries and those keys.

        Raises:
            TypeError: what is given is no slice.
            ValueError: a slice has a step.
        """
        for name, part in (("rows", rows), ("keys", keys)):
            if not isinstance(part, slice):
                raise TypeError(f"Spans.cut: `{name}` must be a slice, got {type(part).__name__}; pass slice(a, b)")
        row, last_row, row_step = rows.indices(self.query_len)
        first, last, key_step = keys.indices(self.key_len)
        if row_step != 1 or key_step != 1:
            raise ValueError(
                f"Spans.cut: `rows` and `keys` must be slices of step 1, got {rows} and {keys}; cut runs one by one"
            )
        query_len, key_len = max(last_row - row, 0), max(last - first, 0)
        start, end = (
            ((bound if bound.shape[1] == 1 else bound[:, row : row + query_len]) - first).clamp_(0, key_len)
            for bound in (self.start, self.end)
        )
        spans = Spans(start, end, query_len, key_len)
        if self.key_mask is None:
            return spans
        return spans & Spans.padded(self.key_mask[:, first : first + key_len], query_len)

    # ------------------------------------------------------------------ views

    @property
    def batch(self) -> int:
        """1 if all batch elements share the mask."""
        parts = (self.start, self.end, self.key_mask)
        return next((len(part) for part in parts if part is not None and len(part) != 1), 1)

    @property
    def device(self) -> torch.device:
        """Where the spans live."""
        return self.start.device

    @property
    def nbytes(self) -> int:
        """Bytes that the mask holds."""
        parts = (self.start, self.end, self.key_mask, self.gap_count)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def to(self, device: torch.device | str) -> Spans:
        """The same spans on another device."""
        key_mask, gap_count = (None if part is None else part.to(device) for part in (self.key_mask, self.gap_count))
        return Spans(self.start.to(device), self.end.to(device), self.query_len, self.key_len, key_mask, gap_count)

    def to_dense(self) -> Tensor:
        """Boolean mask `[batch or 1, query_len, key_len]`, True where the row sees the key. For people and tests."""
        index = torch.arange(self.key_len, device=self.device, dtype=torch.int32)
        dense = (index >= self.start[..., None]) & (index < self.end[..., None])
        if self.key_mask is not None:
            dense = dense & self.key_mask[:, None]
        return dense.expand(self.batch, self.query_len, self.key_len)

    def visible_pairs(self) -> int:
        """Number of (row, key) pairs inside the spans, summed over `batch`; what a kernel that skips has to compute."""
        pairs = (self.end - self.start).clamp(min=0).expand(self.batch, self.query_len)
        return int(pairs.sum(dtype=torch.int64))

    def tile_bounds(self, block_m: int) -> TileBounds:
        """Key ranges of tiles of `block_m` rows. Rows that see nothing do not widen them, but leave no body.

        Raises:
            TypeError, ValueError: `block_m` is no whole number of at least 1.
        """
        check_whole("Spans.tile_bounds", "block_m", block_m)
        if block_m < 1:
            raise ValueError(f"Spans.tile_bounds: `block_m` must be at least 1, got {block_m}; a tile has a row")
        tiles = -(-self.query_len // block_m)
        shape = (self.batch, self.query_len)
        start, end = self.start.expand(shape), self.end.expand(shape)
        empty = end <= start
        pad = (0, tiles * block_m - self.query_len)

        def tiled(values: Tensor, neutral: int) -> Tensor:
            padded = torch.nn.functional.pad(values, pad, value=neutral)
            return padded.view(self.batch, tiles, block_m)

        first = tiled(start.masked_fill(empty, self.key_len), self.key_len).amin(-1)
        last = tiled(end.masked_fill(empty, 0), 0).amax(-1)
        first = torch.minimum(first, last)
        body_first = torch.minimum(tiled(start, 0).amax(-1).clamp(min=first), last)
        body_last = torch.maximum(torch.minimum(tiled(end, self.key_len).amin(-1), last), body_first)
        hidden = tiled(empty.to(torch.int32), 0).amax(-1) > 0
        return TileBounds(first, body_first, torch.where(hidden, body_first, body_last), last)

    def __repr__(self) -> str:
        gaps = "" if self.key_mask is None else ", with a key mask"
        return f"Spans(batch={self.batch}, query_len={self.query_len}, key_len={self.key_len}{gaps})"

    def __str__(self) -> str:
        """A small map of the first batch element: `#` all visible, `+` some, `.` none."""
        if self.query_len == 0 or self.key_len == 0:
            return repr(self)
        dense = self._first().to_dense()[0] if self.query_len * self.key_len <= 1 << 20 else self._coarse()
        return "\n".join([repr(self), *map_of(dense)])

    def _first(self) -> Spans:
        """The first batch element alone."""
        mask = None if self.key_mask is None else self.key_mask[:1]
        gaps = None if self.gap_count is None else self.gap_count[:1]
        return replace(self, start=self.start[:1], end=self.end[:1], key_mask=mask, gap_count=gaps)

    def _coarse(self) -> Tensor:
        """Every n-th row and key of the first batch element: enough for a picture of a mask too large to write out."""
        rows = torch.linspace(0, self.query_len - 1, min(self.query_len, 960), device=self.device).long()
        keys = torch.linspace(0, self.key_len - 1, min(self.key_len, 960), device=self.device).long()
        shape = (1, self.query_len)
        start, end = (bound[:1].expand(shape)[0, rows, None] for bound in (self.start, self.end))
        dense = (keys >= start) & (keys < end)
        return dense if self.key_mask is None else dense & self.key_mask[:1][:, keys]


def map_of(dense: Tensor) -> list[str]:
    """Lines of a map of a boolean mask `[query_len, key_len]`, neither 0: `#` all visible, `+` some, `.` none.

    It has at most 24 lines of 48 characters, each of which stands for an equal part of the mask.
    """
    shape = (min(dense.shape[0], 24), min(dense.shape[1], 48))
    visible = dense.float()[None]
    lowest = -torch.nn.functional.adaptive_max_pool2d(-visible, shape)[0]
    highest = torch.nn.functional.adaptive_max_pool2d(visible, shape)[0]
    return [
        "".join("#" if low else "+" if high else "." for low, high in zip(low_row, high_row, strict=True))
        for low_row, high_row in zip(lowest.tolist(), highest.tolist(), strict=True)
    ]


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler or exporter traces what is done with a tensor, for any values that it may have."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return traced or type(tensor) not in (Tensor, torch.nn.Parameter)


def values_at_hand(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be looked at, and at no cost: on the CPU, and not under tracing."""
    return tensor.device.type == "cpu" and not is_traced(tensor)


def rise_within(offsets: Tensor, tokens: int) -> bool:
    """Whether cumulative lengths, one at least, never fall and lie from 0 to `tokens`. It looks at them."""
    return not ((offsets[:1] < 0).any() or (offsets.diff() < 0).any() or (offsets[-1:] > tokens).any())


def _constant(value: int, device: Device) -> Tensor:
    return torch.full((1, 1), value, dtype=torch.int32, device=device)


def check_are_spans(function: str, name: str, spans: object, instead: str) -> None:
    """Refuse an argument that is no `Spans`, in the name of the function that was called."""
    if not isinstance(spans, Spans):
        raise TypeError(f"{function}: `{name}` must be Spans, got {type(spans).__name__}; {instead}")


def _listed(given: Iterable[str]) -> str:
    """Names of arguments, as an error lists them."""
    *others, last = (f"`{name}`" for name in given)
    return f"{', '.join(others)} and {last}"


def _check_lengths(query_len: int, key_len: int) -> None:
    if torch.compiler.is_compiling():
        return
    for name, given in (("query_len", query_len), ("key_len", key_len)):
        check_whole("Spans", name, given)
    if min(query_len, key_len) < 0:
        raise ValueError(
            f"Spans: `query_len` and `key_len` must be at least 0, got {query_len} and {key_len}; pass the numbers of "
            "tokens"
        )


def _positions(query_len: int, key_len: int, offset: Offset | None, device: Device) -> Tensor:
    """Key index of each row, int32 `[1, query_len]`. A tensor `offset` (a static cache's length) is never read back."""
    offset = key_len - query_len if offset is None else offset
    check_whole("Spans", "offset", offset)
    if isinstance(offset, Tensor):
        offset = offset.to(device or offset.device, torch.int32)
        device = offset.device
    return (torch.arange(query_len, dtype=torch.int32, device=device) + offset)[None]


def _runs(name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end, each int64 `[batch, tokens]`, of the run of equal ids that each token lies in."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}; see torch.as_tensor and Tensor.long")
    if ids.ndim != 2:
        raise ValueError(f"{name} must be [batch, tokens], got {list(ids.shape)}; put a batch of one before them")
    tokens = ids.shape[1]
    index = torch.arange(tokens, device=ids.device)
    # Not slices of one token less: a compiler would have to tell two tokens, whose slice broadcasts, from more.
    begins = (ids != ids.roll(1, 1)) | (index == 0)
    start = torch.where(begins, index, 0).cummax(1).values if tokens else index.expand(ids.shape)
    # The place behind the last token of the same run. (The least end from the right on would be two flips around a
    # scan, of which torch 2.13's inductor makes code that fails at the next length.)
    run = begins.cumsum(1)
    return start, torch.searchsorted(run, run, right=True)
