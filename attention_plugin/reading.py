# SPDX-License-Identifier: Apache-2.0
"""Reading transformers' mask functions as spans: which of the known closures one is, and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from attention_kernels import Spans
from attention_kernels.spans import is_traced, values_at_hand

from .symbolic import Recognised


@dataclass(frozen=True)
class Frame:
    """Where queries and keys lie: sizes, positions of the first query and key, the device; and whether chunks count."""

    batch: int
    query_len: int
    key_len: int
    q_offset: int | Tensor
    kv_offset: int
    device: torch.device
    chunks: bool = True

    @property
    def offset(self) -> int | Tensor:
        """Key index of the first query."""
        return self.q_offset - self.kv_offset


def read_spans(mask_function: Callable | Recognised, frame: Frame, documents: Tensor | None = None) -> Spans | None:
    """Spans of one of transformers' own mask functions, or None for a function that is not known to have any.

    Every pattern read here holds the row's own position or nothing, so unions touch and need no check.

    Args:
        mask_function: the function, as it is or as it was recognised.
        frame: where queries and keys lie.
        documents: `[batch or 1, tokens]`, numbers of packed documents to which the function is confined by another
            beside it. Positions that restart in each document can be read only then.
    """
    sizes: dict[str, Any] = {"offset": frame.offset, "device": frame.device}
    lengths = (frame.query_len, frame.key_len)
    cells = closure(mask_function)
    if mask_function is masking_utils.causal_mask_function:
        return Spans.causal(*lengths, **sizes)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Spans.full(*lengths, device=frame.device)
    if made_by(mask_function, "sliding_window_overlay"):
        if cells["sliding_window"] < 1:
            return None  # not even the row's own key
        return Spans.sliding(*lengths, left=cells["sliding_window"] - 1, right=None, **sizes)
    if made_by(mask_function, "sliding_window_bidirectional_overlay"):
        if cells["sliding_window"] < 0:
            return None
        return Spans.sliding(*lengths, left=cells["sliding_window"], right=cells["sliding_window"], **sizes)
    if made_by(mask_function, "chunked_overlay"):
        if not frame.chunks:
            return Spans.full(*lengths, device=frame.device)
        first = cells["left_padding"].to(frame.device) - frame.kv_offset
        return Spans.chunked(*lengths, chunk_size=cells["chunk_size"], first=first, **sizes)
    if made_by(mask_function, "blockwise_overlay"):
        return _block_spans(cells["block_sequence_ids"], frame)
    if made_by(mask_function, "packed_sequence_mask_function"):
        return _packed_spans(cells["packed_sequence_mask"], frame)
    if made_by(mask_function, "remap_positions_for_packed_sequence"):
        return None if documents is None else _remapped_spans(**cells, documents=documents, frame=frame)
    if made_by(mask_function, "and_masks"):
        parts = cells["mask_functions"]
        documents = _documents_of(parts) if documents is None else documents
        return _combine([read_spans(part, frame, documents) for part in parts], Spans.__and__)
    if made_by(mask_function, "or_masks"):
        parts = [read_spans(part, frame, documents) for part in cells["mask_functions"]]
        return _combine(parts, Spans.union_touching)
    return None


def read_chunks(mask_function: Callable | Recognised, frame: Frame) -> tuple[int, Spans] | None:
    """Size of the chunks of a causal mask function, and its spans without them; None if it has no chunks."""
    parts = _conjuncts(mask_function)
    sizes = [closure(part)["chunk_size"] for part in parts if made_by(part, "chunked_overlay")]
    if len(sizes) != 1 or not any(part is masking_utils.causal_mask_function for part in parts):
        return None
    whole = read_spans(mask_function, replace(frame, chunks=False))
    return None if whole is None else (sizes[0], whole)


def _conjuncts(mask_function: Callable | Recognised) -> list[Callable | Recognised]:
    """What a conjunction consists of, over whichever positions."""
    if made_by(mask_function, "remap_positions_for_packed_sequence"):
        return _conjuncts(closure(mask_function)["mask_function"])
    if made_by(mask_function, "and_masks"):
        return [part for each in closure(mask_function)["mask_functions"] for part in _conjuncts(each)]
    return [mask_function]


def _documents_of(parts: Sequence[Callable | Recognised]) -> Tensor | None:
    """Numbers of the documents to which packing among the parts of a conjunction confines the others."""
    packing = next((part for part in parts if made_by(part, "packed_sequence_mask_function")), None)
    return None if packing is None else closure(packing)["packed_sequence_mask"]


def _combine(parts: list[Spans | None], operation: Callable[[Spans, Spans], Spans]) -> Spans | None:
    known = [part for part in parts if part is not None]
    return reduce(operation, known) if known and len(known) == len(parts) else None


def _block_spans(block_ids: Tensor, frame: Frame) -> Spans | None:
    """Spans of blocks, if each id is one run of tokens: an id that comes back would leave a gap between its runs.

    Only the ids can tell, so on a GPU this reads one boolean back. Under tracing nobody can tell.
    """
    if is_traced(block_ids):
        return None
    block_ids = block_ids.to(frame.device).expand(frame.batch, -1)
    if isinstance(frame.q_offset, int) and frame.q_offset + frame.query_len > block_ids.shape[1]:
        return None
    begins = torch.ones_like(block_ids, dtype=torch.bool)
    begins[:, 1:] = block_ids[:, 1:] != block_ids[:, :-1]
    # Ids at the beginnings of runs, others replaced by numbers that are unique and no id.
    unique = -1 - torch.arange(block_ids.shape[1], device=frame.device)
    ids_of_runs = torch.where(begins & (block_ids >= 0), block_ids, unique).sort(1).values
    if (ids_of_runs[:, 1:] == ids_of_runs[:, :-1]).any():
        return None
    whole = Spans.blocks(block_ids, frame.query_len, offset=frame.q_offset)
    return _window_of_keys(whole, frame)


def _window_of_keys(spans: Spans, frame: Frame) -> Spans:
    """Spans over all positions, seen from the keys `[kv_offset, kv_offset + key_len)`."""
    start, end = ((bound - frame.kv_offset).clamp(0, frame.key_len) for bound in (spans.start, spans.end))
    return Spans(start, end, frame.query_len, frame.key_len)


def _packed_spans(document_ids: Tensor, frame: Frame) -> Spans | None:
    """Spans of packed documents. transformers numbers them in order, so that each is one run of tokens."""
    square = isinstance(frame.q_offset, int) and frame.q_offset == frame.kv_offset == 0
    if not square or not document_ids.shape[1] == frame.query_len == frame.key_len:
        return None
    document_ids = document_ids.to(frame.device).expand(frame.batch, -1)
    if values_at_hand(document_ids) and (document_ids.diff(dim=1) < 0).any():
        return None
    return Spans.packed(document_ids)


def _remapped_spans(
    mask_function: Callable | Recognised, position_ids: Tensor, documents: Tensor, frame: Frame
) -> Spans | None:
    """Spans of a mask over positions that restart in each document, given that only the own document is seen.

    Inside a document positions and tokens advance together. So a row at position `p` of token `t` sees keys shifted by
    `t - p` from those that a row at `p` of a single document would see.
    """
    position_ids = position_ids.to(frame.device).expand(frame.batch, -1)
    if position_ids.shape[1] != frame.query_len or frame.query_len != frame.key_len:
        return None
    if values_at_hand(position_ids):
        same_document = documents.to(frame.device).expand(frame.batch, -1).diff(dim=1) == 0
        if (same_document & (position_ids.diff(dim=1) != 1)).any() or (position_ids < 0).any():
            return None
    shift = torch.arange(frame.query_len, device=frame.device) - position_ids
    bounds = _bounds_at(mask_function, position_ids, frame)
    if bounds is None:
        return None
    start, end = ((bound + shift).clamp(0, frame.key_len).to(torch.int32) for bound in bounds)
    return Spans(start, end, frame.query_len, frame.key_len)


FAR = 1 << 30
"""Stands for "unbounded" where positions are not yet limited by a number of keys."""


def _bounds_at(mask_function: Callable | Recognised, position: Tensor, frame: Frame) -> tuple[Tensor, Tensor] | None:
    """First and one past the last position that a query at `position` sees: the functions that packing can wrap."""
    cells = closure(mask_function)
    low, high = torch.full_like(position, -FAR), torch.full_like(position, FAR)
    if mask_function is masking_utils.causal_mask_function:
        return low, position + 1
    if mask_function is masking_utils.bidirectional_mask_function:
        return low, high
    if made_by(mask_function, "chunked_overlay") and not frame.chunks:
        return low, high
    if made_by(mask_function, "sliding_window_overlay"):
        return position - cells["sliding_window"] + 1, high
    if made_by(mask_function, "sliding_window_bidirectional_overlay"):
        return position - cells["sliding_window"], position + cells["sliding_window"] + 1
    if made_by(mask_function, "chunked_overlay"):
        first = cells["left_padding"].to(frame.device)[:, None]
        start = first + torch.div(position - first, cells["chunk_size"], rounding_mode="floor") * cells["chunk_size"]
        return start, start + cells["chunk_size"]
    if made_by(mask_function, "and_masks"):
        parts = [_bounds_at(part, position, frame) for part in cells["mask_functions"]]
        if any(part is None for part in parts):
            return None
        starts, ends = zip(*parts, strict=True)
        return torch.stack(starts).amax(0), torch.stack(ends).amin(0)
    return None


def made_by(function: Callable | Recognised, factory: str) -> bool:
    """Whether the function of this name in `masking_utils` made a closure, whose code is then one of its constants.

    By name, since older releases of transformers lack some of them.
    """
    if isinstance(function, Recognised):
        return function.factory == factory
    maker = getattr(masking_utils, factory, None)
    return maker is not None and getattr(function, "__code__", None) in maker.__code__.co_consts


def closure(function: Callable | Recognised) -> dict[str, Any]:
    """Names and values that a closure holds."""
    if isinstance(function, Recognised):
        return function.cells
    if torch.compiler.is_dynamo_compiling():
        return {}  # of a function without arguments, the only kind that is not `Recognised` here
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
