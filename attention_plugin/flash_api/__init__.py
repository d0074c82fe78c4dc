# SPDX-License-Identifier: Apache-2.0
"""The functions of the flash-attn package, for code that was written for it.

Names, signatures, layouts and meanings are those of flash-attn 2.8 (Dao, "FlashAttention-2", 2023;
`flash_attn/flash_attn_interface.py`). What differs: float32 and float64 are served too, as is any head dim up to 576; a
row that sees no key has the log-sum-exp -inf (there +inf) beside its output of 0; the same bits come back every time,
so `deterministic` changes nothing; the log-sum-exp has gradients. What is not served is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention_kernels import PagedCache, attention, paged_attention, write_cache
from attention_kernels.checks import check_tensors

from .alibi import attend, batch_alibi, packed_alibi
from .arguments import (
    WindowSize,
    as_num_splits,
    as_scale,
    as_softcap,
    as_window,
    check_appended,
    check_cache_arguments,
    check_caches,
    check_dims,
    check_offsets,
    check_paged,
    check_probabilities,
    check_rotary,
    unpacked,
)
from .caches import appended, cache_lengths, check_leftpad, clear_unused_rows, rotate, slots
from .positions import aligned_rows, aligned_spans, cache_rows, packed_rows, paged_rows

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


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
    check_dims(name, {"q": q, "k": k, "v": v}, "[batch, seqlen, heads, head_dim]")
    check_probabilities(name, return_attn_probs, dropout_p)
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
    window = as_window(name, window_size, causal, q.shape[1])
    options: dict[str, Any] = {
        "scale": as_scale(name, softmax_scale),
        "softcap": as_softcap(name, softcap),
        "dropout_p": dropout_p,
    }
    if alibi_slopes is None:
        spans = aligned_spans(window, q.shape[1], k.shape[1], q.device)
        output, lse = attention(query, key, value, spans, return_lse=True, **options)
    else:
        rows = aligned_rows(q.shape[1], k.shape[1], q.device)
        alibi = batch_alibi(name, alibi_slopes, q, rows)
        output, lse = attend(query, key, value, rows, window, alibi, options)
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
    k, v = unpacked("flash_attn_kvpacked_func", "kv", kv, 2, 5)
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
    q, k, v = unpacked("flash_attn_qkvpacked_func", "qkv", qkv, 3, 5)
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
        max_seqlen_q: at least the most queries of a sequence. Used with `block_table` only; one that is too small is an
            error where looking is free, undefined elsewhere.
        max_seqlen_k: accepted; the lengths themselves are in `cu_seqlens_k`.
        alibi_slopes: float32 `[num_heads]` or `[sequences, num_heads]`, as for `flash_attn_func`.
        block_table: int32 `[sequences, pages of the longest]`, where keys lie in pages; forward only, without dropout
            and `alibi_slopes`. Entries out of range are undefined behaviour.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs: as for
            `flash_attn_func`; each sequence's last query stands at its last key.

    Returns:
        Output `[total_q, num_heads, head_dim]`; with `return_attn_probs` also the log-sum-exp `[num_heads, total_q]`
        and an empty tensor.

    Raises:
        TypeError, ValueError: an argument breaks a rule or is not served; the message says which, and what to do.
    """
    name = "flash_attn_varlen_func"
    check_dims(name, {"q": q}, "[total, heads, head_dim]")
    if block_table is not None:
        check_tensors(name, {"block_table": block_table})
    layout = "[total, heads, head_dim]" if block_table is None else "[pages, page_size, heads, head_dim]"
    check_dims(name, {"k": k, "v": v}, layout)
    check_offsets(name, q, k, cu_seqlens_q, cu_seqlens_k, paged=block_table is not None)
    check_probabilities(name, return_attn_probs, dropout_p)
    window = as_window(name, window_size, causal)
    options: dict[str, Any] = {"scale": as_scale(name, softmax_scale), "softcap": as_softcap(name, softcap)}
    query = q.transpose(0, 1)[None]
    if block_table is None:
        key, value = (tensor.transpose(0, 1)[None] for tensor in (k, v))
        rows = packed_rows(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
        alibi = packed_alibi(name, alibi_slopes, cu_seqlens_q, cu_seqlens_k, q, k.shape[0])
        output, lse = attend(query, key, value, rows, window, alibi, {**options, "dropout_p": dropout_p})
    else:
        check_paged(name, q, k, v, cu_seqlens_q, max_seqlen_q, dropout_p, alibi_slopes)
        lengths = cu_seqlens_k.diff().to(torch.int32)
        cache = PagedCache(k, v, block_table, lengths)
        rows = paged_rows(cu_seqlens_q, lengths, q.shape[0], cache.key_len)
        offsets, longest = cu_seqlens_q.to(torch.int32), max(1, int(max_seqlen_q))
        output, lse = paged_attention(
            query, cache, rows.window(window), query_offsets=offsets, max_query_len=longest, return_lse=True, **options
        )
        clear_unused_rows(output, lse, cu_seqlens_q)
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
    k, v = unpacked("flash_attn_varlen_kvpacked_func", "kv", kv, 2, 4)
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
    q, k, v = unpacked("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 3, 4)
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
    check_dims(name, {"q": q, "k_cache": k_cache, "v_cache": v_cache}, "[batch, seqlen, heads, head_dim]")
    check_cache_arguments(
        name, q, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, alibi_slopes
    )
    if k is not None and v is not None:
        check_appended(name, {"k": k, "v": v}, {"k": k_cache, "v": v_cache})
        check_caches(name, q, k_cache, v_cache)
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    before = cache_lengths(name, cache_seqlens, q, capacity, 0 if k is None else k.shape[1])
    window = as_window(name, window_size, causal, q.shape[1])
    if k is not None and rotary_cos is not None and rotary_sin is not None:
        check_rotary(name, rotary_cos, rotary_sin, capacity, q.shape[3])
        moving = causal or max(window_size) >= 0
        q = rotate(q, rotary_cos, rotary_sin, before, rotary_interleaved, moving)
        k = rotate(k, rotary_cos, rotary_sin, before, rotary_interleaved)
    lengths = before if k is None else before + k.shape[1]
    check_leftpad(name, cache_leftpad, lengths)
    query = q.transpose(1, 2)
    options: dict[str, Any] = {
        "scale": as_scale(name, softmax_scale),
        "softcap": as_softcap(name, softcap),
        "num_splits": as_num_splits(name, num_splits),
    }
    rows = cache_rows(q.shape[1], capacity, lengths, cache_leftpad)
    if block_table is not None:
        cache = PagedCache(k_cache, v_cache, block_table, lengths)
        if k is not None and v is not None:
            write_cache(k.flatten(0, 1), v.flatten(0, 1), cache, slots(cache, before, k.shape[1]))
        output, lse = paged_attention(query, cache, rows.window(window), return_lse=True, **options)
    else:
        alibi = batch_alibi(name, alibi_slopes, q, rows)
        key, value = appended(name, q, k_cache, v_cache, k, v, before, cache_batch_idx)
        output, lse = attend(query, key.transpose(1, 2), value.transpose(1, 2), rows, window, alibi, options)
    output = output.transpose(1, 2).contiguous()
    return (output, lse) if return_softmax_lse else output
