# SPDX-License-Identifier: Apache-2.0
"""transformers' mask arguments to spans: the AttentionMaskInterface function.

transformers describes a mask as a `mask_function(batch, head, q_idx, kv_idx)`, a closure put together from a few known
ones. Those are recognised by their code and read as spans, row by row in closed form, without touching a
`query_len x key_len` array and without reading anything back from the device. Any other function is evaluated a few
rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from attention_kernels import Spans
from attention_kernels.checks import is_one_or
from attention_kernels.spans import is_traced

from .carried_mask import SpanMask
from .reading import Frame, read_chunks, read_spans
from .support import (
    log_once,
    may_compute_with_masks,
    measures_masks,
    needs_tensor,
    negates_masks,
    refuse_model,
    refuse_padding_mask,
)
from .symbolic import recognise

CHUNK_ELEMENTS = 1 << 22
"""Elements of an unknown mask function that are evaluated at once."""


def span_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | SpanMask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> SpanMask | Tensor | None:
    """The mask that transformers asks for, as spans. Registered in `AttentionMaskInterface`.

    Args:
        batch_size, q_length, kv_length: sizes of the scores.
        q_offset: position of the first query; a tensor with a static cache, which is never read back.
        kv_offset: position of the first key (sliding caches forget the oldest).
        mask_function: transformers' description of the mask.
        attention_mask: `[batch, tokens]`, 0 at padding, or None; a mask that was prepared in advance is returned as it
            is.
        use_vmap: whether `mask_function` holds a user's function that may not be index-based.
        config: the model's configuration; used to refuse models that compute attention themselves.
        dtype: of the additive mask that eager attention would be given.
        allow_is_bidirectional_skip: whether no mask is needed where everything is visible.
        local_size: keys of the window or chunk that `mask_function` stands for, if it does.
        kwargs: what transformers hands to other implementations.

    Raises:
        ValueError: `attention_mask` is of another shape, or the model's attention cannot be replaced.

    Returns:
        The mask; as an additive tensor for a model that would pass over anything else; None, where nothing is hidden,
        for a model that would stumble over its sizes.
    """
    refuse_model(config)
    if isinstance(attention_mask, SpanMask):  # prepared in advance, by `generate` with a static cache for example
        return attention_mask
    if isinstance(attention_mask, Tensor) and not (
        attention_mask.ndim == 2 and is_one_or(attention_mask.shape[0], batch_size)
    ):
        refuse_padding_mask(attention_mask, batch_size)
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
    mask = _read_mask(*sizes, mask_function, attention_mask, use_vmap, torch.device(device))
    # A window that is wider than there are keys hides none of them.
    shows_all = mask_function is masking_utils.bidirectional_mask_function or kv_length < (local_size or 0)
    everything = allow_is_bidirectional_skip and shows_all
    mask.batch_size, mask.everything = batch_size, everything
    if config is None or not may_compute_with_masks(config):
        return mask
    if everything and attention_mask is None and measures_masks(config):
        return None
    mask.dense_dtype = torch.bool if negates_masks(config) else dtype
    if not needs_tensor(config):
        return mask
    return mask.computed_with("columns of its own")


def _read_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable,
    attention_mask: Tensor | None,
    use_vmap: bool,
    device: torch.device,
) -> SpanMask:
    """What a mask function and a 2D mask hide together, as spans where the function is known, else as it evaluates."""
    padding = None
    if attention_mask is not None:
        padding = _key_padding(attention_mask.to(device=device, dtype=torch.bool), kv_length, kv_offset)
    frame = Frame(batch_size, q_length, kv_length, q_offset, kv_offset, device)
    # A compiler cannot look into the closures of functions that it traces; it can call them.
    known = recognise(mask_function) if torch.compiler.is_dynamo_compiling() else mask_function
    if known is not None and (spans := read_spans(known, frame)) is not None:
        # Chunks are counted anew only where lengths of documents are given, which describe a batch of 1.
        chunks = read_chunks(known, frame) if batch_size == 1 != q_length else None
        if chunks is not None:
            chunks = chunks[0], _padded(chunks[1], padding, frame)
        return SpanMask(_padded(spans, padding, frame), padding, chunks=chunks)
    name = mask_function.__qualname__ if hasattr(mask_function, "__qualname__") else type(mask_function).__qualname__
    log_once(
        f"the mask function {name!r} cannot be read as spans: it is evaluated for every query and key, some rows at a "
        "time"
    )
    return replace(evaluate(mask_function, frame, attention_mask, use_vmap), attended=padding)


def _padded(spans: Spans, padding: Tensor | None, frame: Frame) -> Spans:
    """Spans without the keys that are padding.

    For static caches their shapes do not depend on the values of the padding: a step is compiled once, and the shapes
    of its mask are part of what is compiled. Without this the step that fills the cache would be another one.
    """
    if padding is None:
        return spans
    spans = spans & Spans.padded(padding, frame.query_len)
    if not isinstance(frame.q_offset, Tensor):
        return spans
    start, end = (bound.expand(frame.batch, -1).contiguous() for bound in (spans.start, spans.end))
    return replace(spans, start=start, end=end)


def _key_padding(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The part of a 2D mask that lies over the keys, bool `[batch, kv_length]`; keys beyond it are not attended to."""
    missing = kv_offset + kv_length - attention_mask.shape[1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


# ---------------------------------------------------------------------- other mask functions


def evaluate(mask_function: Callable, frame: Frame, attention_mask: Tensor | None, use_vmap: bool) -> SpanMask:
    """Spans of any mask function, evaluated by transformers' own `sdpa_mask` a few rows at a time.

    Only where some row sees more than one run of keys is the boolean mask kept, one byte for each query and key; under
    tracing, where nobody can tell, it always is.
    """
    if is_traced(torch.empty(0, device=frame.device)):
        # The compiled code must hold for all values. For all rows at once, or their number would be part of it.
        dense = _dense_rows(mask_function, frame, attention_mask, use_vmap, 0, frame.query_len)
        return SpanMask(Spans(*_outer_bounds(dense), frame.query_len, frame.key_len), holes=dense[:, None])
    step = max(1, CHUNK_ELEMENTS // max(1, frame.batch * frame.key_len))
    pieces, starts, ends = [], [], []
    for row in range(0, frame.query_len, step):
        rows = min(step, frame.query_len - row)
        dense = _dense_rows(mask_function, frame, attention_mask, use_vmap, row, rows)
        spans = Spans.from_dense(dense)
        start, end = _outer_bounds(dense) if spans is None else (spans.start, spans.end)
        pieces.append(dense if spans is None else spans)
        starts.append(start)
        ends.append(end)
    spans = Spans(torch.cat(starts, 1), torch.cat(ends, 1), frame.query_len, frame.key_len)
    if all(isinstance(piece, Spans) for piece in pieces):
        return SpanMask(spans)
    log_once("a mask has rows that see more than one run of keys: it is kept dense, one byte for each query and key")
    holes = torch.cat([piece.to_dense() if isinstance(piece, Spans) else piece for piece in pieces], 1)
    return SpanMask(spans, holes=holes[:, None])


def _dense_rows(
    mask_function: Callable, frame: Frame, attention_mask: Tensor | None, use_vmap: bool, row: int, rows: int
) -> Tensor:
    """The boolean mask `[batch, rows, key_len]` of some rows, beginning with `row`."""
    if attention_mask is not None:
        attention_mask = attention_mask.to(frame.device, torch.bool)
    arguments: dict[str, Any] = {
        "batch_size": frame.batch,
        "q_length": rows,
        "kv_length": frame.key_len,
        "q_offset": frame.q_offset + row,
        "kv_offset": frame.kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": False,
        "use_vmap": use_vmap,
        "device": frame.device,
    }
    dense = masking_utils.sdpa_mask(**arguments)
    assert dense is not None  # it skips no mask unless asked to
    return dense[:, 0]


def _outer_bounds(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First visible key of each row and one past the last, whatever lies between; int32 `[batch, rows]`."""
    key_len = mask.shape[-1]
    index = torch.arange(key_len, device=mask.device, dtype=torch.int32)
    return torch.where(mask, index, key_len).amin(-1), torch.where(mask, index + 1, 0).amax(-1)
