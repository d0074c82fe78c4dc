# SPDX-License-Identifier: Apache-2.0
"""Paged attention in plain torch: keys and values are gathered from their pages first. What CPU tensors run.

Sequences with the same number of rows (one, in decoding) and similar lengths are gathered side by side and computed in
one call: a call for each sequence would take longer than reading its keys does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .blockwise import accumulator, how_to_share
from .blockwise.plan import FEW_ROWS, cut_batch
from .operators import attention
from .paths import log_once
from .scratch import Scratch
from .spans import Spans

if TYPE_CHECKING:
    from .cache import PagedCache

CALLS_PER_GROUP = 2
"""What one more group of sequences costs, gathering included: as much time as so many calls of attention."""

GATHERED_BYTES = 16 << 20
"""Keys and values gathered for one call, where sequences are short enough: they stay in a processor's cache."""

_scratch = Scratch()


@dataclass(frozen=True)
class Seen:
    """What the queries of a batch see of their sequences: on the CPU, as each token that is decoded brings other keys.

    Attributes:
        start, end: `[tokens]`, first key and one past the last key of each query, all of them keys that there are.
        sequences: `[n]`, those of the cache that have queries; the others are about them.
        first_row, rows: `[n]`, where the queries of each begin, and how many there are.
        first_page, pages: `[n]`, from which page on, and how many pages its queries see.
    """

    start: np.ndarray
    end: np.ndarray
    sequences: np.ndarray
    first_row: np.ndarray
    rows: np.ndarray
    first_page: np.ndarray
    pages: np.ndarray


@torch.no_grad()
def forward(
    query: Tensor, cache: PagedCache, spans: Spans | None, query_offsets: Tensor | None, options: dict, *, alone: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp as those of `paged_attention`, for its arguments.

    Args:
        options: sinks, scale and softcap, as for `attention`.
        alone: whether no sequence's bits may depend on its neighbours.
    """
    log_once(f"{query.device.type} tensors run paged attention in torch, over keys gathered from their pages")
    batch, num_heads, query_len, _ = query.shape
    tokens = query.transpose(1, 2).flatten(0, 1)
    seen = what_is_seen(cache, spans, query_len, query_offsets)
    results: list[tuple[np.ndarray, Tensor, Tensor]] = []
    for group in groups(seen, cache, alone=alone):
        rows = seen.first_row[group, None] + np.arange(seen.rows[group[0]])
        everything = rows.size == tokens.shape[0]
        own = tokens if everything else tokens.index_select(0, torch.from_numpy(rows.ravel()).to(query.device))
        own = own.unflatten(0, rows.shape).transpose(1, 2)
        pages = group.size * int(seen.pages[group].max())
        # Without autocast: the kernels that read pages know nothing of it either.
        with torch.autocast(query.device.type, enabled=False), room(cache, pages) as kept:
            operands = gather(seen, group, rows, cache, query.dtype, kept)
            part, part_lse = attention(own, *operands, return_lse=True, **options)
        results.append((rows.ravel(), part.transpose(1, 2).flatten(0, 1), part_lse.transpose(1, 2).flatten(0, 1)))
    if len(results) == 1 and results[0][0].size == tokens.shape[0]:
        output, lse = results[0][1:]
    else:
        output = tokens.new_zeros(tokens.shape[0], num_heads, cache.value.shape[3])
        lse = tokens.new_full(tokens.shape[:2], -torch.inf, dtype=accumulator(query.dtype))
        for places, part, part_lse in results:
            index = torch.from_numpy(places).to(query.device)
            output.index_copy_(0, index, part)
            lse.index_copy_(0, index, part_lse)
    output, lse = (each.unflatten(0, (batch, query_len)).transpose(1, 2) for each in (output, lse))
    return output, lse.contiguous()


def what_is_seen(cache: PagedCache, spans: Spans | None, query_len: int, query_offsets: Tensor | None) -> Seen:
    """What queries see, from the lengths of their sequences and their spans; without spans, all up to themselves."""
    lengths = cache.seq_lens.cpu().numpy()
    offsets = np.arange(lengths.size + 1) * query_len if query_offsets is None else query_offsets.cpu().numpy()
    rows = np.diff(offsets)
    (sequences,) = rows.nonzero()
    lengths, rows, first_row = lengths[sequences], rows[sequences], offsets[sequences].astype(np.int64)
    own = slice(offsets[0], offsets[-1])  # rows before and behind belong to no sequence
    start, end = np.zeros((2, own.stop), np.int64)
    if spans is None:
        end[own] = np.arange(own.start + 1, own.stop + 1) + np.repeat(lengths - first_row - rows, rows)
    else:
        shape = (cache.seq_lens.shape[0] if query_offsets is None else 1, query_len)
        given = (bound.cpu().expand(shape).flatten().numpy() for bound in (spans.start, spans.end))
        start[own], end[own] = (bound[own] for bound in given)
        start[own], end[own] = np.maximum(start[own], 0), np.minimum(end[own], np.repeat(lengths, rows))
    if not sequences.size:
        return Seen(start, end, sequences, first_row, rows, sequences, sequences)
    visible = start < end
    first = np.minimum.reduceat(np.where(visible, start, cache.key_len), first_row)
    last = np.maximum.reduceat(np.where(visible, end, 0), first_row)
    first_page = np.minimum(first, last) // cache.page_size
    return Seen(start, end, sequences, first_row, rows, first_page, -(-last // cache.page_size) - first_page)


def groups(seen: Seen, cache: PagedCache, *, alone: bool) -> Iterator[np.ndarray]:
    """Sequences that are computed together: of equally many rows, few, and about equally many pages.

    They are in order if all are computed together.
    """
    sharing = how_to_share(cache.key.transpose(1, 2), cache.value.transpose(1, 2), fused=True)
    sharing = sharing._replace(worth=CALLS_PER_GROUP * sharing.worth // cache.page_size)
    page_bytes = sum(tensor[0].numel() * tensor.element_size() for tensor in (cache.key, cache.value))
    for rows in sorted(set(seen.rows.tolist())):
        (several,) = (seen.rows == rows).nonzero()
        if alone or rows > FEW_ROWS or several.size == 1:
            yield from several[:, None]
            continue
        by_size = several[seen.pages[several].argsort(kind="stable")]
        sizes = seen.pages[by_size].tolist()
        parts = list(cut_batch([0] * len(sizes), sizes, slice(0, len(sizes)), sharing))
        for part in parts:
            group = by_size[part] if parts[1:] else several
            together = max(1, GATHERED_BYTES // max(1, sizes[part.stop - 1] * page_bytes))
            yield from (group[first : first + together] for first in range(0, group.size, together))


def room(cache: PagedCache, pages: int) -> AbstractContextManager[list[Tensor] | None]:
    """Where to gather some pages of keys and values: memory that the thread has used before, or None (`Scratch.lent`).

    On the CPU only: elsewhere torch keeps memory itself.
    """
    if cache.key.device.type != "cpu":
        return nullcontext()
    return _scratch.lent([(pages, *tensor.shape[1:]) for tensor in (cache.key, cache.value)], cache.key.dtype)


def gather(
    seen: Seen, group: np.ndarray, rows: np.ndarray, cache: PagedCache, dtype: torch.dtype, kept: list[Tensor] | None
) -> tuple[Tensor, Tensor, Spans]:
    """Keys and values `[members, num_kv_heads, keys, dim]` of a group, in `kept`, and what its `rows` see of them."""
    first_page, pages = seen.first_page[group, None], seen.pages[group, None]
    start, end = (np.maximum(bound[rows] - first_page * cache.page_size, 0) for bound in (seen.start, seen.end))
    ends = (end * (start < end)).max(1, keepdims=True)
    places = np.arange(pages.max())
    key_len = places.size * cache.page_size
    places = np.minimum(first_page + places, first_page + pages - 1)  # a sequence of fewer pages has its last one again
    numbers = cache.block_table.cpu().numpy()[seen.sequences[group, None], places].astype(np.int64)
    numbers = np.where(pages, numbers, 0).ravel()  # entries of a sequence without keys may be anything
    # What lies behind a sequence may be anything, also NaN, for which a careful loop would look.
    behind = np.flatnonzero(np.arange(key_len) >= ends) if ends.min() < key_len else ends[:0]
    operands = []
    for taken in cache.take(torch.from_numpy(numbers).to(cache.key.device), dtype, kept):
        if behind.size:
            taken.flatten(0, 1).index_fill_(0, torch.from_numpy(behind).to(taken.device), 0.0)
        operands.append(taken.view(len(group), -1, *taken.shape[2:])[:, : ends.max()].transpose(1, 2))
    start, end = (torch.from_numpy(bound.astype(np.int32)).to(cache.key.device) for bound in (start, end))
    key, value = operands
    return key, value, Spans(start, end, rows.shape[1], key.shape[2])
