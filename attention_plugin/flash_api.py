# SPDX-License-Identifier: Apache-2.0
"""The functions of the flash-attn package, for code that was written for it.

Names, signatures, layouts and meanings are those of flash-attn 2.8 (Dao, "FlashAttention-2", 2023;
`flash_attn/flash_attn_interface.py`). What differs: float32 and float64 are served too, as is any head dim up to 512; a
row that sees no key has the log-sum-exp -inf (there +inf) beside its output of 0; the same bits come back every time,
so `deterministic` changes nothing; the log-sum-exp has gradients. What is not served is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_kernels import PagedCache, Spans, attention, merge_states, paged_attention, write_cache
from attention_kernels.cache import MAX_PAGE_SIZE
from attention_kernels.checks import check_numbers, check_tensors, is_number
from attention_kernels.shared_spans import window_spans
from attention_kernels.spans import rise_within, values_at_hand

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

WindowSize = Sequence[int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention, with gradients. The last query stands at the last key, whatever the lengths.

    Args:
        q: `[batch, seqlen_q, num_heads, head_dim]`, float16, bfloat16, float32 or float64. Any strides.
        k, v: `[batch, seqlen_k, num_kv_heads, head_dim]`; `num_kv_heads` divides `num_heads`.
        dropout_p: probability of dropping a weight, drawn from torch's generator of the device.
        softmax_scale: factor of the scores, default `head_dim ** -0.5`.
        causal: a row sees keys up to its own position; rows before the first key see nothing and give 0.
        window_size: `(left, right)`, how many keys a row sees before and after its own position; negative is unbounded.
            With `causal`, right is 0.
        softcap: if positive, scores become `softcap * tanh(scores / softcap)`.
        alibi_slopes: float32 `[num_heads]` or `[batch, num_heads]`; `-slope * distance` is added to the scores. No
            array of the size of the scores is made: keys before and after a row's own are attended to one after the
            other, each under a bias per key. Scores are then exact to float32's rounding of slope times length, which
            at 2,048 tokens costs float32 outputs a digit (1e-5) and 16-bit outputs nothing.
        deterministic: accepted; results always repeat.
        return_attn_probs: also return the log-sum-exp and, as flash-attn does without dropout, an empty tensor.

    Returns:
        Output `[batch, seqlen_q, num_heads, head_dim]`, contiguous; with `return_attn_probs` `(output, log-sum-exp,
        empty tensor)`, the log-sum-exp natural, float32 (float64 for float64) `[batch, num_heads, seqlen_q]`.

    Raises:
        TypeError, ValueError: an argument breaks a rule or is not served; the message says which, and what to do.
    """
    name = "flash_attn_func"
    _check_dims(name, {"q": q, "k": k, "v": v}, "[batch, seqlen, heads, head_dim]")
    _check_probabilities(name, return_attn_probs, dropout_p)
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
    window = _window(name, window_size, causal, q.shape[1])
    options: dict[str, Any] = {
        "scale": _scale(name, softmax_scale),
        "softcap": _softcap(name, softcap),
        "dropout_p": dropout_p,
    }
    if alibi_slopes is None:
        spans = _aligned_spans(window, q.shape[1], k.shape[1], q.device)
        output, lse = attention(query, key, value, spans, return_lse=True, **options)
    else:
        rows = _aligned_rows(q.shape[1], k.shape[1], q.device)
        alibi = _batch_alibi(name, alibi_slopes, q, rows)
        output, lse = _attend(query, key, value, rows, window, alibi, options)
    output = output.transpose(1, 2).contiguous()
    return (output, lse, q.new_empty(0)) if return_attn_probs else output


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` of keys and values in one tensor, `kv` `[batch, seqlen_k, 2, num_kv_heads, head_dim]`."""
    k, v = _unpacked("flash_attn_kvpacked_func", "kv", kv, 2, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` of queries, keys and values in one tensor, `qkv` `[batch, seqlen, 3, num_heads, head_dim]`."""
    q, k, v = _unpacked("flash_attn_qkvpacked_func", "qkv", qkv, 3, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention of sequences that lie one after the other, with gradients. Nothing is read back from a GPU.

    Args:
        q: `[total_q, num_heads, head_dim]`.
        k, v: `[total_k, num_kv_heads, head_dim]`; with `block_table` `[pages, page_size, num_kv_heads, head_dim]`.
        cu_seqlens_q, cu_seqlens_k: integer `[sequences + 1]`, where each sequence begins and the last one ends. Queries
            beyond the last sequence give 0. Numbers that fall or lie beyond the tokens are an error where looking is
            free (on the CPU), undefined elsewhere.
        max_seqlen_q: at least the most queries of a sequence. Used with `block_table` only.
        max_seqlen_k: accepted; the lengths themselves are in `cu_seqlens_k`.
        alibi_slopes: float32 `[num_heads]` or `[sequences, num_heads]`, as for `flash_attn_func`.
        block_table: int32 `[sequences, pages of the longest]`, where keys lie in pages; forward only, without dropout
            and `alibi_slopes`. Pages of more than 256 tokens are read in pieces. Entries out of range are undefined
            behaviour.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs: as for
            `flash_attn_func`; each sequence's last query stands at its last key.

    Returns:
        Output `[total_q, num_heads, head_dim]`; with `return_attn_probs` also the log-sum-exp `[num_heads, total_q]`
        and an empty tensor.

    Raises:
        TypeError, ValueError: an argument breaks a rule or is not served; the message says which, and what to do.
    """
    name = "flash_attn_varlen_func"
    _check_dims(name, {"q": q}, "[total, heads, head_dim]")
    if block_table is not None:
        check_tensors(name, {"block_table": block_table})
    layout = "[total, heads, head_dim]" if block_table is None else "[pages, page_size, heads, head_dim]"
    _check_dims(name, {"k": k, "v": v}, layout)
    _check_offsets(name, q, k, cu_seqlens_q, cu_seqlens_k, paged=block_table is not None)
    _check_probabilities(name, return_attn_probs, dropout_p)
    window = _window(name, window_size, causal)
    options: dict[str, Any] = {"scale": _scale(name, softmax_scale), "softcap": _softcap(name, softcap)}
    query = q.transpose(0, 1)[None]
    if block_table is None:
        key, value = (tensor.transpose(0, 1)[None] for tensor in (k, v))
        rows = _packed_rows(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
        alibi = _packed_alibi(name, alibi_slopes, cu_seqlens_q, cu_seqlens_k, q, k.shape[0])
        output, lse = _attend(query, key, value, rows, window, alibi, {**options, "dropout_p": dropout_p})
    else:
        _check_paged(name, q, k, v, dropout_p, alibi_slopes)
        lengths = cu_seqlens_k.diff().to(torch.int32)
        cache = _paged_cache(name, k, v, block_table, lengths)
        rows = _paged_rows(cu_seqlens_q, lengths, q.shape[0], cache.key_len)
        offsets, longest = cu_seqlens_q.to(torch.int32), max(1, int(max_seqlen_q))
        output, lse = paged_attention(
            query, cache, rows.window(window), query_offsets=offsets, max_query_len=longest, return_lse=True, **options
        )
    output = output[0].transpose(0, 1).contiguous()
    return (output, lse[0], q.new_empty(0)) if return_attn_probs else output


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` of keys and values in one tensor, `kv` `[total_k, 2, num_kv_heads, head_dim]`."""
    k, v = _unpacked("flash_attn_varlen_kvpacked_func", "kv", kv, 2, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` of queries, keys and values in one tensor, `qkv` `[total, 3, num_heads, head_dim]`."""
    q, k, v = _unpacked("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 3, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache, to which new keys and values are first appended in place. No gradients.

    Args:
        q: `[batch, seqlen_q, num_heads, head_dim]`; the last query stands at the last key of its sequence.
        k_cache, v_cache: `[batch of the cache, capacity, num_kv_heads, head_dim]`; with `block_table`
            `[pages, page_size, num_kv_heads, head_dim]`.
        k, v: `[batch, seqlen_new, num_kv_heads, head_dim]`, written from each sequence's `cache_seqlens` on.
        rotary_cos, rotary_sin: `[at least the cache's capacity, rotary_dim / 2]`. New keys are rotated at their
            positions; queries at `cache_seqlens` and on if causal or windowed, else all at `cache_seqlens`.
        cache_seqlens: tokens in the cache before this call, a number or integer `[batch]`; default: it is full. Beyond
            the capacity is an error where looking is free (a number, or a tensor on the CPU), undefined elsewhere.
        cache_batch_idx: integer `[batch]`, which row of the cache each sequence has. The rows are copied to be read.
        cache_leftpad: integer `[batch]`, the first token of each sequence in its row of the cache.
        block_table: int32 `[batch, pages of the longest]`, as for `flash_attn_varlen_func`; not with `alibi_slopes`,
            `cache_batch_idx` or `cache_leftpad`.
        rotary_interleaved: rotate columns 0 and 1, 2 and 3, ... together; else 0 and `rotary_dim / 2`, and so on.
        num_splits: in how many parts keys are computed at a time; 0 is as many as the device has room for.
        return_softmax_lse: also return the log-sum-exp.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as for `flash_attn_func`.

    Returns:
        Output `[batch, seqlen_q, num_heads, head_dim]`; with `return_softmax_lse` also the log-sum-exp
        `[batch, num_heads, seqlen_q]`.

    Raises:
        TypeError, ValueError: an argument breaks a rule or is not served; the message says which, and what to do.
    """
    name = "flash_attn_with_kvcache"
    _check_dims(name, {"q": q, "k_cache": k_cache, "v_cache": v_cache}, "[batch, seqlen, heads, head_dim]")
    _check_cache_arguments(
        name, q, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, alibi_slopes
    )
    if k is not None and v is not None:
        _check_appended(name, {"k": k, "v": v}, {"k": k_cache, "v": v_cache})
        _check_caches(name, q, k_cache, v_cache)
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    before = _cache_lengths(name, cache_seqlens, q, capacity, 0 if k is None else k.shape[1])
    if k is not None and rotary_cos is not None and rotary_sin is not None:
        _check_rotary(name, rotary_cos, rotary_sin, capacity, q.shape[3])
        moving = causal or max(window_size) >= 0
        q = _rotate(q, rotary_cos, rotary_sin, before, rotary_interleaved, moving)
        k = _rotate(k, rotary_cos, rotary_sin, before, rotary_interleaved)
    lengths = before if k is None else before + k.shape[1]
    window = _window(name, window_size, causal, q.shape[1])
    query = q.transpose(1, 2)
    options: dict[str, Any] = {
        "scale": _scale(name, softmax_scale),
        "softcap": _softcap(name, softcap),
        "num_splits": _splits(name, num_splits),
    }
    rows = _cache_rows(q.shape[1], capacity, lengths, cache_leftpad)
    if block_table is not None:
        cache = _paged_cache(name, k_cache, v_cache, block_table, lengths)
        if k is not None and v is not None:
            write_cache(k.flatten(0, 1), v.flatten(0, 1), cache, _slots(cache, before, k.shape[1]))
        output, lse = paged_attention(query, cache, rows.window(window), return_lse=True, **options)
    else:
        alibi = _batch_alibi(name, alibi_slopes, q, rows)
        key, value = _appended(name, q, k_cache, v_cache, k, v, before, cache_batch_idx)
        output, lse = _attend(query, key.transpose(1, 2), value.transpose(1, 2), rows, window, alibi, options)
    output = output.transpose(1, 2).contiguous()
    return (output, lse) if return_softmax_lse else output


# ---------------------------------------------------------------------- where rows stand


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


def _aligned_spans(window: Window, query_len: int, key_len: int, device: torch.device) -> Spans:
    """`_aligned_rows` with a window, kept for the next call."""
    far = query_len + key_len  # that far all ends, and int32 does not overflow
    left, right = (None if size is None else min(size, far) for size in window)
    return window_spans(query_len, key_len, left=left, right=right, device=device)


def _aligned_rows(query_len: int, key_len: int, device: torch.device) -> Rows:
    """The last query at the last key."""
    index = torch.arange(query_len, dtype=torch.int32, device=device)[None]
    first = torch.zeros(1, 1, dtype=torch.int32, device=device)
    return Rows(index + (key_len - query_len), first, first + key_len, key_len)


def _cache_rows(query_len: int, key_len: int, lengths: Tensor, leftpad: Tensor | None) -> Rows:
    """The last query at the last of each sequence's `lengths` keys."""
    index = torch.arange(query_len, dtype=torch.int32, device=lengths.device)[None]
    last = lengths[:, None]
    first = last.new_zeros(1, 1) if leftpad is None else leftpad.to(torch.int32)[:, None]
    return Rows(index + (last - query_len), first, last, key_len)


def _packed_rows(query_offsets: Tensor, key_offsets: Tensor, query_len: int, key_len: int) -> Rows:
    """Documents of queries and of keys one after the other; the last query of each at its last key."""
    index, document, known = _documents(query_offsets, query_len)
    first, last = key_offsets[document], key_offsets[document + 1]
    position = index + last - query_offsets[document + 1]
    return Rows(position[None], torch.where(known, first, 0)[None], torch.where(known, last, 0)[None], key_len)


def _paged_rows(query_offsets: Tensor, lengths: Tensor, query_len: int, key_len: int) -> Rows:
    """Documents of queries one after the other, whose keys are counted from 0 each."""
    index, document, known = _documents(query_offsets, query_len)
    position = index + lengths[document] - query_offsets[document + 1]
    last = torch.where(known, lengths[document], 0)[None]
    return Rows(position[None], torch.zeros_like(last[:, :1]), last, key_len)


def _documents(offsets: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number of each token, its document, and whether it has one; without one, the document is any."""
    index = torch.arange(tokens, device=offsets.device, dtype=offsets.dtype)
    document = torch.searchsorted(offsets.contiguous(), index, right=True) - 1
    known = (document >= 0) & (document < offsets.numel() - 1)
    return index, document.clamp(0, offsets.numel() - 2), known


def _window(name: str, window_size: WindowSize, causal: bool, query_len: int | None = None) -> Window:
    pair = isinstance(window_size, Sequence) and len(window_size) == 2
    if not pair or not all(isinstance(size, int) for size in window_size):
        raise ValueError(
            f"{name}: `window_size` must be two whole numbers (left, right), got {window_size!r}; -1 is unbounded"
        )
    left, right = (None if size < 0 else size for size in window_size)
    # The only query stands at the last key, after which there is none.
    return Window(left, 0 if causal or query_len == 1 else right)


def _scale(name: str, softmax_scale: float | None) -> float | None:
    """As `attention` takes it, which has a shorter name for it."""
    finite = softmax_scale is None or (is_number(softmax_scale) and -math.inf < float(softmax_scale) < math.inf)
    if not finite:
        raise ValueError(
            f"{name}: `softmax_scale` must be a finite number, got {softmax_scale!r}; pass None for `head_dim ** -0.5`"
        )
    return softmax_scale


def _softcap(name: str, softcap: float | None) -> float | None:
    """As `attention` takes it: for flash-attn only positive numbers are one."""
    if softcap is not None and (not is_number(softcap) or math.isnan(softcap)):
        raise ValueError(f"{name}: `softcap` must be a number, got {softcap!r}; pass 0 for no softcap")
    return softcap if softcap is not None and softcap > 0 else None


def _splits(name: str, num_splits: int | None) -> int | None:
    """As `attention` takes it: for flash-attn 0 is the default. Checked before the cache is written to."""
    if is_number(num_splits) and num_splits == 0:
        return None
    check_numbers(name, None, None, num_splits)
    return num_splits


# ---------------------------------------------------------------------- attention, with or without ALiBi


@dataclass(frozen=True)
class Alibi:
    """Slopes `[batch or 1, num_heads, n or 1]` of rows and of keys, and what is counted from for each key."""

    row_slopes: Tensor
    key_slopes: Tensor
    key_first: Tensor
    """The first key of the key's sequence, `[batch or 1, key_len or 1]`."""
    key_last: Tensor
    """The key after the last one of the key's sequence."""


def _attend(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, window: Window, alibi: Alibi | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in the layout of `attention`."""
    if alibi is None:
        return attention(query, key, value, rows.window(window), return_lse=True, **options)

    def part(spans: Spans, sign: int, key_anchor: Tensor, row_anchor: Tensor) -> tuple[Tensor, Tensor]:
        # On one side of a row its bias is, but for a number of the row's own, a number of each key. The former leaves
        # the softmax alone, and is added to the log-sum-exp.
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


def _batch_alibi(name: str, slopes: Tensor | None, q: Tensor, rows: Rows) -> Alibi | None:
    """Of sequences that have a row of the batch each."""
    if slopes is None:
        return None
    slopes = _checked_slopes(name, slopes, q.shape[0], q)[..., None]
    return Alibi(slopes, slopes, rows.first, rows.last)


def _packed_alibi(
    name: str, slopes: Tensor | None, query_offsets: Tensor, key_offsets: Tensor, q: Tensor, key_len: int
) -> Alibi | None:
    """Of documents that lie one after the other."""
    if slopes is None:
        return None
    sequences = query_offsets.numel() - 1
    slopes = _checked_slopes(name, slopes, sequences, q).expand(sequences, -1)
    _, of_row, _ = _documents(query_offsets, q.shape[0])
    _, of_key, _ = _documents(key_offsets, key_len)
    row_slopes, key_slopes = (slopes[documents].T[None] for documents in (of_row, of_key))
    return Alibi(row_slopes, key_slopes, key_offsets[of_key][None], key_offsets[of_key + 1][None])


def _checked_slopes(name: str, slopes: Tensor, sequences: int, q: Tensor) -> Tensor:
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


# ---------------------------------------------------------------------- caches


def _paged_cache(name: str, k: Tensor, v: Tensor, block_table: Tensor, lengths: Tensor) -> PagedCache:
    """The cache, pages that are too large for the kernels being seen as several."""
    page_size = k.shape[1]
    if page_size > MAX_PAGE_SIZE:
        piece = max(size for size in range(1, MAX_PAGE_SIZE + 1) if page_size % size == 0)
        pieces = page_size // piece
        if any(tensor.stride(0) != tensor.stride(1) * page_size for tensor in (k, v)):
            raise ValueError(
                f"{name}: pages of more than {MAX_PAGE_SIZE} tokens must lie one after the other, got {page_size} "
                f"tokens with strides {k.stride()} and {v.stride()}; use pages of at most {MAX_PAGE_SIZE} tokens"
            )
        k, v = (tensor.view(-1, piece, *tensor.shape[2:]) for tensor in (k, v))
        part = torch.arange(pieces, dtype=block_table.dtype, device=block_table.device)
        block_table = (block_table[:, :, None] * pieces + part).flatten(1)
    return PagedCache(k, v, block_table, lengths)


def _slots(cache: PagedCache, before: Tensor, new: int) -> Tensor:
    """Where the tokens that follow `before` others go in their pages, int64 `[batch * new]`."""
    position = _following(before, new)
    page = cache.block_table.gather(1, position // cache.page_size).long()
    return (page * cache.page_size + position % cache.page_size).flatten()


def _appended(
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
        place = (row[:, None], _following(before, k.shape[1]))
        k_cache[place], v_cache[place] = k, v
    if cache_batch_idx is None:
        return k_cache[:batch], v_cache[:batch]
    return k_cache[row], v_cache[row]


def _cache_lengths(name: str, seqlens: int | Tensor | None, q: Tensor, capacity: int, new: int) -> Tensor:
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


def _following(before: Tensor, new: int) -> Tensor:
    """Positions of the tokens after `before` others, int64 `[batch, new]`."""
    return before[:, None].long() + torch.arange(new, device=before.device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, before: Tensor, interleaved: bool, moving: bool = True) -> Tensor:
    """Rotary embedding of `[batch, tokens, heads, dim]` from position `before` on, or all at it unless `moving`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    place = _following(before, x.shape[1] if moving else 1)
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


# ---------------------------------------------------------------------- refusals


def _check_dims(name: str, tensors: dict[str, Tensor], layout: str) -> None:
    check_tensors(name, tensors)
    for argument, tensor in tensors.items():
        if tensor.ndim != layout.count(",") + 1:
            raise ValueError(f"{name}: `{argument}` must be {layout}, got {list(tensor.shape)}; reshape it")


def _check_appended(name: str, new: dict[str, Tensor], caches: dict[str, Tensor]) -> None:
    """Refuse what would be written to a cache as something else."""
    for argument, tensor in new.items():
        cache = caches[argument]
        if tensor.shape[2:] != cache.shape[2:] or tensor.dtype != cache.dtype or tensor.device != cache.device:
            raise ValueError(
                f"{name}: `{argument}` must have the heads, head dim, dtype and device of `{argument}_cache`, "
                f"{list(cache.shape[2:])} {cache.dtype} on {cache.device}, got {list(tensor.shape[2:])} {tensor.dtype} "
                f"on {tensor.device}; make the cache like it"
            )


def _check_caches(name: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Refuse, before they are written to, caches that queries do not fit."""
    heads, head_dim = k_cache.shape[2:]
    whole = heads > 0 and q.shape[2] % heads == 0
    if not whole or q.shape[3] != head_dim or k_cache.shape[:3] != v_cache.shape[:3] or q.device != k_cache.device:
        raise ValueError(
            f"{name}: `k_cache` and `v_cache` must have the head dim and device of `q`, {q.shape[3]} on {q.device}, a "
            f"number of heads that divides its {q.shape[2]}, and one length, got {list(k_cache.shape)} and "
            f"{list(v_cache.shape)} on {k_cache.device}; make them like it"
        )


def _unpacked(name: str, argument: str, packed: Tensor, parts: int, dims: int) -> tuple[Tensor, ...]:
    check_tensors(name, {argument: packed})
    if packed.ndim != dims or packed.shape[-3] != parts:
        raise ValueError(
            f"{name}: `{argument}` must have {dims} dimensions, of which the third from the end is {parts}, got "
            f"{list(packed.shape)}; stack the parts there"
        )
    return packed.unbind(-3)


def _check_probabilities(name: str, return_attn_probs: bool, dropout_p: float) -> None:
    if return_attn_probs and dropout_p:
        raise ValueError(
            f"{name}: `return_attn_probs` with `dropout_p`={dropout_p} is refused: weights are never stored; call it "
            "without dropout for the log-sum-exp, or attention_kernels.attention_weights for the weights"
        )


def _check_offsets(name: str, q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, paged: bool) -> None:
    check_tensors(name, {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k})
    for argument, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        wrong = offsets.dtype not in (torch.int32, torch.int64) or offsets.device != q.device
        if wrong or offsets.ndim != 1 or offsets.numel() < 2 or offsets.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"{name}: `{argument}` must be int32 of shape [sequences + 1] on {q.device}, the same for queries and "
                f"keys, got {offsets.dtype} {list(offsets.shape)} on {offsets.device}; it is 0 and the running sum of "
                "the lengths"
            )
    for argument, offsets, tokens in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0]),
        # Of keys in pages only the lengths are used, so tokens that sequences share may count more than once.
        ("cu_seqlens_k", cu_seqlens_k, torch.iinfo(torch.int32).max if paged else k.shape[0]),
    ):
        if values_at_hand(offsets) and not rise_within(offsets, tokens):
            raise ValueError(
                f"{name}: `{argument}` must never fall, from 0 to the {tokens} tokens that there are or may be, got "
                f"{offsets.tolist()}; it is 0 and the running sum of the lengths"
            )


def _check_paged(name: str, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, alibi_slopes: Tensor | None) -> None:
    if dropout_p:
        raise ValueError(
            f"{name}: `dropout_p`={dropout_p} with `block_table` is refused: attention to pages is for inference; pass "
            "keys and values one after the other"
        )
    _refuse_paged(name, "alibi_slopes", alibi_slopes)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        raise ValueError(
            f"{name}: `block_table` with tensors that require gradients is refused: attention to pages has none; call "
            "it under torch.no_grad(), or pass keys and values one after the other"
        )


def _check_rotary(name: str, cos: Tensor, sin: Tensor, capacity: int, head_dim: int) -> None:
    check_tensors(name, {"rotary_cos": cos, "rotary_sin": sin})
    if cos.ndim != 2 or cos.shape[0] < capacity or sin.shape != cos.shape or 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"{name}: `rotary_cos` and `rotary_sin` must be [tokens of the cache = {capacity} or more, rotary_dim / 2]"
            f" with a rotary_dim of at most {head_dim}, got {list(cos.shape)} and {list(sin.shape)}; compute them for "
            "the whole cache, and a column for two of the head"
        )


def _refuse_paged(name: str, argument: str, value: Tensor | None) -> None:
    if value is not None:
        raise ValueError(
            f"{name}: `{argument}` with `block_table` is refused: it is served with keys that do not lie in pages; "
            "gather them first"
        )


def _check_cache_arguments(
    name: str,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
) -> None:
    for one, other, first, second in (("k", "v", k, v), ("rotary_cos", "rotary_sin", rotary_cos, rotary_sin)):
        if (first is None) != (second is None):
            raise ValueError(f"{name}: `{one}` and `{other}` go together, got only one of them; pass both")
    if k is not None and v is not None:
        _check_dims(name, {"k": k, "v": v}, "[batch, seqlen, heads, head_dim]")
        if k.shape[:2] != v.shape[:2] or k.shape[0] != q.shape[0] or k.dtype != q.dtype:
            raise ValueError(
                f"{name}: `k` and `v` must be [batch, seqlen_new, heads, head_dim] with the batch and dtype of `q`, "
                f"{q.shape[0]} and {q.dtype}, got {k.dtype} {list(k.shape)} and {v.dtype} {list(v.shape)}; leave both "
                "out where the cache has them already"
            )
        if cache_seqlens is None:
            raise ValueError(f"{name}: `k` needs `cache_seqlens`, got None; pass the tokens already in the cache")
    elif rotary_cos is not None:
        raise ValueError(f"{name}: `rotary_cos` without `k` is refused, as by flash-attn; rotate `q` before the call")
    indices = {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    given = {**indices, "block_table": block_table}
    check_tensors(name, {argument: each for argument, each in given.items() if each is not None})
    for argument, index in indices.items():
        if index is not None and (index.shape != q.shape[:1] or index.is_floating_point()):
            raise ValueError(
                f"{name}: `{argument}` must be integers of shape [batch] = [{q.shape[0]}], got {index.dtype} "
                f"{list(index.shape)}; give one number for each sequence"
            )
    if block_table is not None:
        if block_table.ndim != 2 or block_table.dtype != torch.int32:
            raise ValueError(
                f"{name}: `block_table` must be int32 [batch, pages of the longest], got {block_table.dtype} "
                f"{list(block_table.shape)}; leave it out for a cache of a row for each sequence"
            )
        for argument, value in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
            _refuse_paged(name, argument, value)
        _refuse_paged(name, "alibi_slopes", alibi_slopes)
