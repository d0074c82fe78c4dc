# SPDX-License-Identifier: Apache-2.0
"""Where queries stand among keys, and what a window around them shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attention_kernels import Spans
from attention_kernels.shared_spans import window_spans


class Window(NamedTuple):
    """How many keys a row sees before and after its own position; None is unbounded."""

    left: int | None
    right: int | None


@dataclass(frozen=True)
class Rows:
    """Where queries stand among keys. Integer tensors `[batch or 1, query_len or 1]`, in numbers of keys."""

    position: Tensor
    """The key that a row stands at; `query_len` columns."""
    first: Tensor
    """The first key of the row's sequence."""
    last: Tensor
    """The key after the last one of the row's sequence."""
    key_len: int

    def spans(self, low: int | None, high: int | None) -> Spans:
        """Each row sees the keys of its sequence from `low` to `high` beyond its position, both included."""
        far = self.position.shape[1] + self.key_len  # that far all ends, and int32 does not overflow
        start, end = self.first, self.last
        if low is not None:
            start = torch.maximum(start, self.position + max(low, -far))
        if high is not None:
            end = torch.minimum(end, self.position + min(high + 1, far))
        start, end = (bound.clamp(0, self.key_len).to(torch.int32) for bound in (start, end))
        return Spans(start, end, self.position.shape[1], self.key_len)

    def window(self, window: Window) -> Spans:
        """Each row sees a window around its position."""
        return self.spans(None if window.left is None else -window.left, window.right)


def aligned_spans(window: Window, query_len: int, key_len: int, device: torch.device) -> Spans:
    """The spans of `aligned_rows` with a window; they are kept, and the next call with these lengths gets the same."""
    far = query_len + key_len  # that far all ends, and int32 does not overflow
    left, right = (None if size is None else min(size, far) for size in window)
    return window_spans(query_len, key_len, left=left, right=right, device=device)


def aligned_rows(query_len: int, key_len: int, device: torch.device) -> Rows:
    """The last of `query_len` queries stands at the last of `key_len` keys."""
    index = torch.arange(query_len, dtype=torch.int32, device=device)[None]
    first = torch.zeros(1, 1, dtype=torch.int32, device=device)
    return Rows(index + (key_len - query_len), first, first + key_len, key_len)


def cache_rows(query_len: int, key_len: int, lengths: Tensor, leftpad: Tensor | None) -> Rows:
    """The last query of each sequence stands at the last of its keys.

    Args:
        key_len: keys that the cache has room for.
        lengths: integer `[batch]`, keys of each sequence.
        leftpad: integer `[batch]`, the first key of each, or None for 0.
    """
    index = torch.arange(query_len, dtype=torch.int32, device=lengths.device)[None]
    last = lengths[:, None]
    first = last.new_zeros(1, 1) if leftpad is None else leftpad.to(torch.int32)[:, None]
    return Rows(index + (last - query_len), first, last, key_len)


def packed_rows(query_offsets: Tensor, key_offsets: Tensor, query_len: int, key_len: int) -> Rows:
    """Documents of queries, and of keys, one after the other; the last query of each stands at its last key.

    Args:
        query_offsets, key_offsets: integer `[documents + 1]`, cumulative lengths.
        query_len, key_len: queries and keys of all documents together.
    """
    index, document, known = documents(query_offsets, query_len)
    first, last = key_offsets[document], key_offsets[document + 1]
    position = index + last - query_offsets[document + 1]
    return Rows(position[None], torch.where(known, first, 0)[None], torch.where(known, last, 0)[None], key_len)


def paged_rows(query_offsets: Tensor, lengths: Tensor, query_len: int, key_len: int) -> Rows:
    """Documents of queries one after the other, each with keys of its own that count from 0, as in pages.

    Args:
        query_offsets: integer `[documents + 1]`, cumulative lengths.
        lengths: integer `[documents]`, keys of each.
        query_len: queries of all documents together.
        key_len: keys that a block table has room for.
    """
    index, document, known = documents(query_offsets, query_len)
    position = index + lengths[document] - query_offsets[document + 1]
    last = torch.where(known, lengths[document], 0)[None]
    return Rows(position[None], torch.zeros_like(last[:, :1]), last, key_len)


def documents(offsets: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's index, its document, and whether it has one (if not, the document means nothing), all `[tokens]`."""
    index = torch.arange(tokens, device=offsets.device, dtype=offsets.dtype)
    document = torch.searchsorted(offsets.contiguous(), index, right=True) - 1
    known = (document >= 0) & (document < offsets.numel() - 1)
    return index, document.clamp(0, offsets.numel() - 2), known
