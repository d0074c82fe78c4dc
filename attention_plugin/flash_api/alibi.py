# SPDX-License-Identifier: Apache-2.0
"""Attention with ALiBi, or without: linear biases as a bias for each key, never an array of the size of the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention_kernels import Spans, attention, merge_states
from attention_kernels.checks import check_tensors

from .positions import Rows, Window, documents


@dataclass(frozen=True)
class Alibi:
    """Slopes `[batch or 1, num_heads, n or 1]` of rows and of keys, and what is counted from for each key."""

    row_slopes: Tensor
    key_slopes: Tensor
    key_first: Tensor
    """The first key of the key's sequence, `[batch or 1, key_len or 1]`."""
    key_last: Tensor
    """The key after the last one of the key's sequence."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, window: Window, alibi: Alibi | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in the layout of `attention`."""
    if alibi is None:
        return attention(query, key, value, rows.window(window), return_lse=True, **options)

    def part(spans: Spans, sign: int, key_anchor: Tensor, row_anchor: Tensor) -> tuple[Tensor, Tensor]:
        # -slope * |row - key| on one side of the row is a term of the key, which is passed as a bias, plus a term of
        # the row. The latter is the same for all keys, so it does not change the softmax: it is added to the lse.
        index = torch.arange(rows.key_len, device=query.device)
        bias = sign * alibi.key_slopes * (index - key_anchor)[:, None]
        output, lse = attention(query, key, value, spans, bias=bias[:, :, None], return_lse=True, **options)
        return output, lse + sign * alibi.row_slopes * (row_anchor - rows.position)[:, None]

    low = None if window.left is None else -window.left
    before = part(rows.spans(low, 0), 1, alibi.key_last - 1, rows.last - 1)
    if window.right == 0:
        return before
    after = part(rows.spans(1, window.right), -1, alibi.key_first, rows.first)
    return merge_states(*zip(before, after, strict=True))


def batch_alibi(name: str, slopes: Tensor | None, q: Tensor, rows: Rows) -> Alibi | None:
    """The slopes of a batch whose sequences have a row each; None without slopes."""
    if slopes is None:
        return None
    slopes = checked_slopes(name, slopes, q.shape[0], q)[..., None]
    return Alibi(slopes, slopes, rows.first, rows.last)


def packed_alibi(
    name: str, slopes: Tensor | None, query_offsets: Tensor, key_offsets: Tensor, q: Tensor, key_len: int
) -> Alibi | None:
    """The slopes of documents that lie one after the other; None without slopes."""
    if slopes is None:
        return None
    sequences = query_offsets.numel() - 1
    slopes = checked_slopes(name, slopes, sequences, q).expand(sequences, -1)
    _, of_row, _ = documents(query_offsets, q.shape[0])
    _, of_key, _ = documents(key_offsets, key_len)
    row_slopes, key_slopes = (slopes[own].T[None] for own in (of_row, of_key))
    return Alibi(row_slopes, key_slopes, key_offsets[of_key][None], key_offsets[of_key + 1][None])


def checked_slopes(name: str, slopes: Tensor, sequences: int, q: Tensor) -> Tensor:
    """Slopes `[sequences or 1, num_heads]`, in the dtype of statistics."""
    check_tensors(name, {"alibi_slopes": slopes})
    num_heads = q.shape[-2]
    shapes = ((num_heads,), (sequences, num_heads))
    if tuple(slopes.shape) not in shapes or not slopes.is_floating_point() or slopes.device != q.device:
        raise ValueError(
            f"{name}: `alibi_slopes` must be floating point of shape [num_heads] = [{num_heads}] or [batch, num_heads] "
            f"= {list(shapes[1])} on {q.device}, got {slopes.dtype} {list(slopes.shape)} on {slopes.device}; give a "
            "slope for each query head"
        )
    return slopes.to(torch.promote_types(q.dtype, torch.float32)).reshape(-1, num_heads)
