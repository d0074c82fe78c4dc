# SPDX-License-Identifier: Apache-2.0
"""Decoding on the CPU: one query token per sequence, by torch's fused attention, in as few steps as possible.

Many keys in float32 may take two products and a softmax between them instead, where those read keys and values faster.

After each layer's keys and values have passed through the caches, a step of Python costs as much as reading a hundred
keys does. So the layers of a model, which make the same call with other numbers in their tensors, are checked and
planned once: `first` keeps what `again` needs.
"""

from __future__ import annotations

import math
import sys
import weakref
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from ..spans import Spans
from .fused import decodes_folded
from .pieces import Plan, versions
from .sinks import with_sinks

FEWEST_ROWS = {} if torch.cpu._is_amx_tile_supported() else {torch.bfloat16: 2}
"""Rows that torch's fused attention takes at least, by dtype. Without AMX one row of bfloat16 alone takes it two to
three times as long as two, whose products go another way; with AMX it takes half as long."""

CACHED_BYTES = (
    20 << 20
    if "AVX512" in torch.backends.cpu.get_cpu_capability() and not torch.cpu._is_amx_tile_supported()
    else sys.maxsize
)
"""Keys and values of a call, in bytes, from which on two products are faster in float32 than torch's fused attention,
by up to two fifths. It multiplies scores keys first, which reads them from memory half as fast, but has less to do
besides; that counts for more as long as keys stay in a processor's last cache from one call to the next. With AVX2 the
product of keys and queries is the slower one, however many there are, and so it is on the processors with AMX."""

MOST_SPANS = 4
"""Spans whose calls are remembered: full and windowed layers take turns, and so may two models."""


class Part(NamedTuple):
    """Sequences computed together over some keys.

    Attributes:
        elements, keys: which.
        every: whether that is all sequences.
        whole: whether that is all sequences and all keys there are.
        mask: additive `[sequences, 1, rows, keys]`, or None if they need none.
        products: whether `two_products` computes it.
    """

    elements: slice
    keys: slice
    every: bool
    whole: bool
    mask: Tensor | None
    products: bool


class Known(NamedTuple):
    """A call that has been checked: its spans and their state, what else decides about it, and its parts."""

    spans: weakref.ref[Spans]
    versions: tuple[int, int]
    kind: tuple
    parts: list[Part]


_known: dict[int, Known] = {}


def again(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None,
    sinks: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Output and, if asked for, log-sum-exp of a call without gradients as one that is remembered; None if none is.

    None as well if the output has a NaN: whose it is takes care to find out.
    """
    known = _known.get(id(spans))
    if known is None or spans is None or known.spans() is not spans:
        return None
    if known.versions != versions(spans.start, spans.end) or known.kind != kind_of(query, key, value, sinks, scale):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    scale = query.shape[3] ** -0.5 if scale is None else scale
    output, lse = attend(query, key, value, scale, known.parts, with_lse=return_lse or sinks is not None)
    # Without masks every row sees all keys of its part, and a NaN is its own.
    if any(part.mask is not None for part in known.parts) and math.isnan(output.sum()):
        return None
    return (output, lse) if lse is None else with_sinks(output, lse, sinks)


def first(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    sinks: Tensor | None,
    scale: float | None,
    plan: Plan,
) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp of a checked call without gradients; `again` then serves its repeats.

    None if it is no call for `attend`, or if the output has a NaN.
    """
    if not serves(query, key, value, plan):
        return None
    parts = parts_of(query, key, value, spans.start, spans.end, plan)
    output, lse = attend(query, key, value, query.shape[3] ** -0.5 if scale is None else scale, parts, with_lse=True)
    if math.isnan(output.sum()):
        return None
    for oldest in list(_known)[: max(0, len(_known) - MOST_SPANS + 1)]:
        _known.pop(oldest, None)  # another thread may have been faster
    state = versions(spans.start, spans.end)
    _known[id(spans)] = Known(weakref.ref(spans), state, kind_of(query, key, value, sinks, scale), parts)
    return with_sinks(output, lse, sinks)


def kind_of(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float | None) -> tuple:
    """All that decides whether a call is allowed and how it is computed, besides its spans."""
    return (
        query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(), query.dtype, key.dtype,
        value.dtype, query.device, key.device, value.device, scale,
        None if sinks is None else (sinks.shape, sinks.dtype, sinks.device),
    )  # fmt: skip


def serves(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> bool:
    """Whether `attend` computes a call: one query token each, which sees something, and heads as it takes them."""
    return (
        query.shape[2] == 1
        and query.shape[3] == value.shape[3]
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and all(group.pieces and not group.pieces[0].blind for group in plan.groups)
    )


def parts_of(query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, plan: Plan) -> list[Part]:
    """The parts of a plan, with their masks; kept with the plan, which all layers share."""
    _, rows = heads_and_rows(query, key)
    dtype = torch.promote_types(query.dtype, torch.float32)
    kind = (key.dtype, rows, key.shape, key.stride(), value.shape, value.stride())
    parts = plan.token_parts.get(kind)
    if parts is None:
        batch, key_len = query.shape[0], key.shape[2]
        products = streams(key, value, batch, plan)
        parts = []
        for elements, (piece,), _ in plan.groups:
            mask = None
            if piece.kind == "masked":
                mask = additive_mask(
                    start.expand(batch, 1)[elements], end.expand(batch, 1)[elements], piece.keys, dtype
                )
                mask = mask[:, None, None].expand(-1, -1, rows, -1)
            every = len(range(*elements.indices(batch))) == batch
            whole = every and piece.keys == slice(0, key_len)
            parts.append(Part(elements, piece.keys, every, whole, mask, products))
        plan.token_parts[kind] = parts
    return parts


def additive_mask(start: Tensor, end: Tensor, keys: slice, dtype: torch.dtype) -> Tensor:
    """`[sequences, keys]`, -inf where a key is hidden, for spans `[sequences, 1]`.

    By NumPy, as few numbers take torch longer, and each token that is decoded brings new spans.
    """
    mask = np.zeros((start.shape[0], keys.stop - keys.start), np.float64 if dtype == torch.float64 else np.float32)
    for own, (first,), (last,) in zip(mask, start.tolist(), end.tolist(), strict=True):
        own[: max(0, first - keys.start)] = -math.inf
        own[max(0, last - keys.start) :] = -math.inf
    return torch.from_numpy(mask)


def streams(key: Tensor, value: Tensor, batch: int, plan: Plan) -> bool:
    """Whether a call takes two products: it reads that many keys, and all heads are one batch of matrices."""
    if key.dtype != torch.float32 or not (is_batch_of_matrices(key) and is_batch_of_matrices(value)):
        return False
    num_kv_heads, dim = key.shape[1], key.shape[3]
    tokens = sum(
        (piece.keys.stop - piece.keys.start) * len(range(*elements.indices(batch)))
        for elements, (piece,), _ in plan.groups
    )
    return tokens * num_kv_heads * (dim + value.shape[3]) * key.element_size() >= CACHED_BYTES


def is_batch_of_matrices(tensor: Tensor) -> bool:
    """Whether batch and heads of `[batch, heads, tokens, dim]` are one dimension without a copy."""
    batch, heads = tensor.shape[:2]
    return batch == 1 or heads == 1 or tensor.stride(0) == heads * tensor.stride(1)


def heads_and_rows(query: Tensor, key: Tensor) -> tuple[int, int]:
    """As how many heads, of how many rows each, queries go to torch's fused attention."""
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    heads = num_kv_heads if decodes_folded(query.dtype, num_heads // num_kv_heads) else num_heads
    return heads, max(num_heads // heads, FEWEST_ROWS.get(query.dtype, 1))


@overload
def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, parts: list[Part], *, with_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...


@overload
def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, parts: list[Part], *, with_lse: bool
) -> tuple[Tensor, Tensor | None]: ...


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, parts: list[Part], *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output `[batch, num_heads, 1, dim]`, stored token by token, and log-sum-exp `[batch, num_heads, 1]` if wanted."""
    batch, num_heads, _, dim = query.shape
    heads, rows = heads_and_rows(query, key)
    own_rows = num_heads // heads
    if own_rows > 1:
        query = query.reshape(batch, heads, own_rows, dim)
    if rows > own_rows:
        query = query.repeat(1, 1, rows, 1)
    results = [attend_part(query, key, value, scale, part) for part in parts]
    output, lse = results[0]
    if len(results) > 1:
        output = torch.cat([each for each, _ in results])
        lse = torch.cat([each for _, each in results]) if with_lse else lse
    if rows > own_rows:
        output, lse = output[:, :, :own_rows], lse[:, :, :own_rows]
    if own_rows > 1:
        # One token: what is stored head by head is stored token by token as well.
        output, lse = output.reshape(batch, num_heads, 1, dim), lse.reshape(batch, num_heads, 1) if with_lse else lse
    return output, lse if with_lse else None


def attend_part(query: Tensor, key: Tensor, value: Tensor, scale: float, part: Part) -> tuple[Tensor, Tensor]:
    """Output `[sequences, heads, rows, dim]` and log-sum-exp `[sequences, heads, rows]` of a part."""
    if not part.every:
        query = query[part.elements]
    if not part.whole:
        key, value = shown(key, part), shown(value, part)
    if part.products:
        return two_products(query, key, value, part.mask, scale)
    # torch's own name for it takes two thirds of the time that torch.ops takes.
    return torch._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=part.mask, scale=scale)


def shown(tensor: Tensor, part: Part) -> Tensor:
    """`tensor[part.elements, :, part.keys]` of keys or values, in one step of torch where indexing takes two."""
    _, heads, _, dim = tensor.shape
    stride = tensor.stride()
    elements, keys = part.elements, part.keys
    size = (elements.stop - elements.start, heads, keys.stop - keys.start, dim)
    first = tensor.storage_offset() + elements.start * stride[0] + keys.start * stride[2]
    return tensor.as_strided(size, stride, first)


def two_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The same as torch's fused attention, with the scores of all keys in memory."""
    sequences, num_kv_heads, rows, _ = query.shape
    queries = query.flatten(0, 1).transpose(1, 2)
    scores = torch.baddbmm(query.new_empty(1), key.flatten(0, 1), queries, beta=0.0, alpha=scale)
    scores = scores.transpose(1, 2).contiguous()
    if mask is not None:
        scores.unflatten(0, (sequences, num_kv_heads)).add_(mask[:, :, :1])
    weights = torch.softmax(scores, -1)
    # The greatest weight is exp(greatest score) / sum.
    lse = scores.amax(-1) - weights.amax(-1).log()
    output = torch.bmm(weights, value.flatten(0, 1))
    return output.unflatten(0, (sequences, num_kv_heads)), lse.view(sequences, num_kv_heads, rows)
