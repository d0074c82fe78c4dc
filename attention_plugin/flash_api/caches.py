# SPDX-License-Identifier: Apache-2.0
"""Caches as flash-attn keeps them: new tokens appended, rotated, or found in pages."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

from attention_kernels import PagedCache
from attention_kernels.spans import values_at_hand


def slots(cache: PagedCache, before: Tensor, new: int) -> Tensor:
    """Where the tokens that follow `before` others go in their pages, int64 `[batch * new]`."""
    position = following(before, new)
    page = cache.block_table.gather(1, position // cache.page_size).long()
    return (page * cache.page_size + position % cache.page_size).flatten()


def clear_unused_rows(output: Tensor, lse: Tensor, query_offsets: Tensor) -> None:
    """Write output 0 and log-sum-exp -inf for rows beyond the last sequence, which the kernel for pages leaves out.

    Args:
        output, lse: `[1, num_heads, tokens, dim]` and `[1, num_heads, tokens]`.
        query_offsets: integer `[sequences + 1]`, cumulative lengths.
    """
    if values_at_hand(query_offsets) and query_offsets[-1] == output.shape[2]:
        return
    unused = torch.arange(output.shape[2], device=output.device) >= query_offsets[-1]
    output.masked_fill_(unused[:, None], 0.0)
    lse.masked_fill_(unused, -math.inf)


def appended(
    name: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    before: Tensor,
    cache_batch_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of each sequence, `[batch, capacity, num_kv_heads, dim]`, the new ones written to the cache."""
    batch = q.shape[0]
    if cache_batch_idx is None and k_cache.shape[0] < batch:
        raise ValueError(
            f"{name}: `k_cache` must have a row for each of the {batch} sequences, got {k_cache.shape[0]}; pass "
            "`cache_batch_idx` for sequences that share rows"
        )
    row = torch.arange(batch, device=q.device) if cache_batch_idx is None else cache_batch_idx.long()
    if values_at_hand(row) and ((row < 0) | (row >= k_cache.shape[0])).any():
        raise ValueError(
            f"{name}: `cache_batch_idx` must be 0 to {k_cache.shape[0] - 1}, rows of the cache, got {row.tolist()}; "
            "make the cache larger"
        )
    if k is not None and v is not None:
        place = (row[:, None], following(before, k.shape[1]))
        k_cache[place], v_cache[place] = k, v
    if cache_batch_idx is None:
        return k_cache[:batch], v_cache[:batch]
    return k_cache[row], v_cache[row]


def cache_lengths(name: str, seqlens: int | Tensor | None, q: Tensor, capacity: int, new: int) -> Tensor:
    """Tokens of each sequence before this call, int32 `[batch]`."""
    if not isinstance(seqlens, Tensor):
        known = capacity if seqlens is None else seqlens
        if not isinstance(known, Integral):
            raise TypeError(
                f"{name}: `cache_seqlens` must be a number, a tensor of integers or None, got {type(known).__name__}; "
                "torch.as_tensor makes a tensor of numbers"
            )
        lengths = torch.full((q.shape[0],), known, dtype=torch.int32, device=q.device)
        least = most = known
    else:
        if seqlens.shape != q.shape[:1] or seqlens.is_floating_point() or seqlens.device != q.device:
            raise ValueError(
                f"{name}: `cache_seqlens` must be a number or integers of shape [batch] = [{q.shape[0]}] on "
                f"{q.device}, got {seqlens.dtype} {list(seqlens.shape)} on {seqlens.device}; count the tokens that are "
                "in the cache before the call"
            )
        lengths = seqlens.to(torch.int32)
        if not values_at_hand(seqlens) or not seqlens.numel():
            return lengths
        least, most = int(seqlens.min()), int(seqlens.max())
    if least < 0 or most + new > capacity:
        raise ValueError(
            f"{name}: `cache_seqlens` must be 0 to {capacity} (what the cache has room for) less {new} new tokens, got "
            f"{least} to {most}; make the cache, or the block table, larger"
        )
    return lengths


def check_leftpad(name: str, leftpad: Tensor | None, lengths: Tensor) -> None:
    """Refuse first tokens that lie before a sequence or behind it, where looking at them is free.

    Args:
        lengths: tokens of each sequence with those of this call, those to the left of the first included.
    """
    if leftpad is None or not values_at_hand(leftpad) or not values_at_hand(lengths):
        return
    if ((leftpad < 0) | (leftpad > lengths)).any():
        raise ValueError(
            f"{name}: `cache_leftpad` must be from 0 to the {lengths.tolist()} tokens of each sequence, got "
            f"{leftpad.tolist()}; it is the first token's place in its row of the cache"
        )


def following(before: Tensor, new: int) -> Tensor:
    """Positions of the tokens after `before` others, int64 `[batch, new]`."""
    return before[:, None].long() + torch.arange(new, device=before.device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, before: Tensor, interleaved: bool, moving: bool = True) -> Tensor:
    """Rotary embedding of `[batch, tokens, heads, dim]` from position `before` on, or all at it unless `moving`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    place = following(before, x.shape[1] if moving else 1)
    cos, sin = (table[place][:, :, None].to(wide) for table in (cos, sin))
    columns = 2 * cos.shape[-1]
    turned = x[..., :columns].to(wide)
    if interleaved:
        real, imaginary = turned[..., ::2], turned[..., 1::2]
    else:
        real, imaginary = turned.chunk(2, -1)
    pair = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), x[..., columns:]], -1)
