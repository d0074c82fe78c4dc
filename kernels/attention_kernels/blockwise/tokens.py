# SPDX-License-Identifier: Apache-2.0
"""Decoding on the CPU: one query token per sequence, by torch's fused attention, in as few steps as possible.

Many keys in float32 may take two products and a softmax between them instead, where those read keys and values faster.
"""

from __future__ import annotations

import math
import operator
import sys
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from . import processor
from .fused import decodes_folded, flash
from .plan import check_bounds, cut_batch
from .problem import Problem, accumulator, how_to_share

FEWEST_ROWS = {} if processor.AMX else {torch.bfloat16: 2}
"""Rows that torch's fused attention takes at least, by dtype. Without AMX one row of bfloat16 alone takes it two to
three times as long as two, whose products go another way; with AMX it takes half as long."""

CACHED_BYTES = 20 << 20 if processor.AVX512 and not processor.AMX else sys.maxsize
"""Keys and values of a call, in bytes, from which on two products are faster in float32 than torch's fused attention,
by up to two fifths. It multiplies scores keys first, which reads them from memory half as fast, but has less to do
besides; that counts for more as long as keys stay in a processor's last cache from one call to the next. With AVX2 the
product of keys and queries is the slower one, however many there are, and so it is on the processors with AMX."""


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


def parts_of(problem: Problem) -> list[Part] | None:
    """In which parts `attend` computes a call without masks of its own; None if it does not serve it.

    It serves one query token each, which sees something, and heads as torch's fused attention takes them. Every token
    that is decoded brings new spans: they are few numbers, which Python's own lists are the fastest for.

    Raises:
        ValueError: a row sees keys that there are not.
    """
    query, key, value = problem.query, problem.key, problem.value
    batch, key_len = query.shape[0], key.shape[2]
    if query.shape[2:] != (1, value.shape[3]) or not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        return None
    firsts, lasts = problem.start.flatten().tolist(), problem.end.flatten().tolist()
    same_spans = len(firsts) == len(lasts) == 1
    firsts, lasts = (bounds if len(bounds) == batch else bounds * batch for bounds in (firsts, lasts))
    if not batch or any(map(operator.ge, firsts, lasts)):
        return None
    if min(firsts) < 0 or max(lasts) > key_len:
        check_bounds(problem.start, problem.end, key_len)
    everything = slice(0, batch)
    if same_spans:
        groups = [everything]
    elif problem.apart:
        groups = [slice(index, index + 1) for index in range(batch)]
    else:
        groups = list(cut_batch(firsts, lasts, everything, how_to_share(key, value, fused=True)))
    _, rows = heads_and_rows(query, key)
    parts = []
    for elements in groups:
        own_firsts, own_lasts = firsts[elements], lasts[elements]
        keys = slice(min(own_firsts), max(own_lasts))
        mask = None
        if max(own_firsts) != keys.start or min(own_lasts) != keys.stop:
            mask = padding_mask(own_firsts, own_lasts, keys, accumulator(query.dtype), rows)
        every = elements == everything
        parts.append(Part(elements, keys, every, every and keys == slice(0, key_len), mask, products=False))
    if not problem.apart and streams(key, value, parts):  # which goes by the keys of the whole batch
        return [part._replace(products=True) for part in parts]
    return parts


def padding_mask(firsts: list[int], lasts: list[int], keys: slice, dtype: torch.dtype, rows: int) -> Tensor:
    """What is added to scores `[sequences, 1, rows, keys]`: -inf at keys outside of what a sequence sees.

    Args:
        firsts, lasts: the first key that each sequence sees, and one past the last.
        keys: those of the whole part.
    """
    mask = np.zeros((len(firsts), keys.stop - keys.start), np.float64 if dtype == torch.float64 else np.float32)
    for own, first, last in zip(mask, firsts, lasts, strict=True):
        if first > keys.start:
            own[: first - keys.start] = -math.inf
        if last < keys.stop:
            own[last - keys.start :] = -math.inf
    return torch.from_numpy(mask)[:, None, None].expand(-1, -1, rows, -1)


def streams(key: Tensor, value: Tensor, parts: list[Part]) -> bool:
    """Whether a call takes two products: it reads that many keys, and all heads are one batch of matrices."""
    if key.dtype != torch.float32 or not (is_batch_of_matrices(key) and is_batch_of_matrices(value)):
        return False
    tokens = sum((part.keys.stop - part.keys.start) * (part.elements.stop - part.elements.start) for part in parts)
    return tokens * key.shape[1] * (key.shape[3] + value.shape[3]) * key.element_size() >= CACHED_BYTES


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
        output, lse = output[:, :, :own_rows].contiguous(), lse[:, :, :own_rows].contiguous()
    if own_rows > 1:
        output, lse = output.reshape(batch, num_heads, 1, dim), lse.reshape(batch, num_heads, 1) if with_lse else lse
    # One token: what is stored head by head is stored token by token as well.
    return output.contiguous(), lse.contiguous() if with_lse else None


def attend_part(query: Tensor, key: Tensor, value: Tensor, scale: float, part: Part) -> tuple[Tensor, Tensor]:
    """Output `[sequences, heads, rows, dim]` and log-sum-exp `[sequences, heads, rows]` of a part."""
    if not part.every:
        query = query[part.elements]
    if not part.whole:
        key, value = shown(key, part), shown(value, part)
    if part.products:
        return two_products(query, key, value, part.mask, scale)
    return flash(query, key, value, causal=False, mask=part.mask, scale=scale)


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
