# SPDX-License-Identifier: Apache-2.0
"""What arguments become that are numbers, and every refusal that needs no look at what is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attention_kernels.call_checks import DTYPES, MAX_HEAD_DIM, MAX_VALUE_DIM
from attention_kernels.checks import check_numbers, check_tensors, is_number
from attention_kernels.spans import rise_within, values_at_hand

from .positions import Window

WindowSize = Sequence[int]


def as_window(name: str, window_size: WindowSize, causal: bool, query_len: int | None = None) -> Window:
    """Where a row's keys begin and end, of `(left, right)` in which -1 is unbounded."""
    pair = isinstance(window_size, Sequence) and len(window_size) == 2
    if not pair or not all(isinstance(size, int) for size in window_size):
        raise ValueError(
            f"{name}: `window_size` must be two whole numbers (left, right), got {window_size!r}; -1 is unbounded"
        )
    left, right = (None if size < 0 else size for size in window_size)
    # The only query stands at the last key, after which there is none.
    return Window(left, 0 if causal or query_len == 1 else right)


def as_scale(name: str, softmax_scale: float | None) -> float | None:
    """As `attention` takes it, which has a shorter name for it."""
    _check_is_constant(name, "softmax_scale", softmax_scale)
    finite = softmax_scale is None or (is_number(softmax_scale) and -math.inf < float(softmax_scale) < math.inf)
    if not finite:
        raise ValueError(
            f"{name}: `softmax_scale` must be a finite number, got {softmax_scale!r}; pass None for `head_dim ** -0.5`"
        )
    return softmax_scale


def as_softcap(name: str, softcap: float | None) -> float | None:
    """As `attention` takes it: for flash-attn only positive numbers are one."""
    _check_is_constant(name, "softcap", softcap)
    if softcap is not None and not (is_number(softcap) and softcap < math.inf):
        raise ValueError(f"{name}: `softcap` must be a finite number, got {softcap!r}; pass 0 for no softcap")
    return softcap if softcap is not None and softcap > 0 else None


def _check_is_constant(name: str, argument: str, given: object) -> None:
    if isinstance(given, Tensor) and given.requires_grad:
        raise ValueError(
            f"{name}: `{argument}` must be a number, got a tensor that wants a gradient; detach it, or multiply the "
            "queries by a scale and pass 1.0"
        )


def as_num_splits(name: str, num_splits: int | None) -> int | None:
    """As `attention` takes it: for flash-attn 0 is the default. Checked before the cache is written to."""
    if is_number(num_splits) and num_splits == 0:
        return None
    check_numbers(name, None, None, num_splits)
    return num_splits


def check_dims(name: str, tensors: dict[str, Tensor], layout: str) -> None:
    """Refuse tensors of another number of dimensions than the layout, such as "[batch, seqlen]", names."""
    check_tensors(name, tensors)
    for argument, tensor in tensors.items():
        if tensor.ndim != layout.count(",") + 1:
            raise ValueError(f"{name}: `{argument}` must be {layout}, got {list(tensor.shape)}; reshape it")


def check_appended(name: str, new: dict[str, Tensor], caches: dict[str, Tensor]) -> None:
    """Refuse what would be written to a cache as something else."""
    for argument, tensor in new.items():
        cache = caches[argument]
        if tensor.shape[2:] != cache.shape[2:] or tensor.dtype != cache.dtype or tensor.device != cache.device:
            raise ValueError(
                f"{name}: `{argument}` must have the heads, head dim, dtype and device of `{argument}_cache`, "
                f"{list(cache.shape[2:])} {cache.dtype} on {cache.device}, got {list(tensor.shape[2:])} {tensor.dtype} "
                f"on {tensor.device}; make the cache like it"
            )


def check_caches(name: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Refuse, before they are written to, caches that queries do not fit."""
    heads, head_dim = k_cache.shape[2:]
    whole = heads > 0 and q.shape[2] % heads == 0
    if head_dim > MAX_HEAD_DIM or v_cache.shape[3] > MAX_VALUE_DIM or q.dtype not in DTYPES:
        raise ValueError(
            f"{name}: keys must have at most {MAX_HEAD_DIM} columns and values {MAX_VALUE_DIM}, in one of the dtypes "
            f"{[str(dtype) for dtype in DTYPES]}, got {head_dim}, {v_cache.shape[3]} and {q.dtype}; cast them, or "
            'leave wide heads to attn_implementation="eager"'
        )
    if not whole or q.shape[3] != head_dim or k_cache.shape[:3] != v_cache.shape[:3] or q.device != k_cache.device:
        raise ValueError(
            f"{name}: `k_cache` and `v_cache` must have the head dim and device of `q`, {q.shape[3]} on {q.device}, a "
            f"number of heads that divides its {q.shape[2]}, and one length, got {list(k_cache.shape)} and "
            f"{list(v_cache.shape)} on {k_cache.device}; make them like it"
        )


def unpacked(name: str, argument: str, packed: Tensor, parts: int, dims: int) -> tuple[Tensor, ...]:
    """What was stacked in the third dimension from the end of a tensor of `dims` dimensions."""
    check_tensors(name, {argument: packed})
    if packed.ndim != dims or packed.shape[-3] != parts:
        raise ValueError(
            f"{name}: `{argument}` must have {dims} dimensions, of which the third from the end is {parts}, got "
            f"{list(packed.shape)}; stack the parts there"
        )
    return packed.unbind(-3)


def check_probabilities(name: str, return_attn_probs: bool, dropout_p: float) -> None:
    """Refuse the weights that flash-attn returns beside dropout."""
    if return_attn_probs and dropout_p:
        raise ValueError(
            f"{name}: `return_attn_probs` with `dropout_p`={dropout_p} is refused: weights are never stored; call it "
            "without dropout for the log-sum-exp, or attention_kernels.attention_weights for the weights"
        )


def check_offsets(name: str, q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, paged: bool) -> None:
    """Refuse what are no cumulative lengths of the queries and, unless they lie in pages, of the keys."""
    check_tensors(name, {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k})
    for argument, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        wrong = offsets.dtype not in (torch.int32, torch.int64) or offsets.device != q.device
        if wrong or offsets.ndim != 1 or offsets.numel() < 2 or offsets.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"{name}: `{argument}` must be int32 or int64 of shape [sequences + 1] on {q.device}, the same for "
                f"queries and keys, got {offsets.dtype} {list(offsets.shape)} on {offsets.device}; it is 0 and the "
                "running sum of the lengths"
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


def check_paged(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    dropout_p: float,
    alibi_slopes: Tensor | None,
) -> None:
    """Refuse what attention to pages has not: dropout, ALiBi and gradients; and a length that cuts queries off."""
    longest = int(cu_seqlens_q.diff().max()) if values_at_hand(cu_seqlens_q) else 0
    if not is_number(max_seqlen_q) or longest > max_seqlen_q:
        raise ValueError(
            f"{name}: `max_seqlen_q` must be a number of at least {longest}, the most queries of a sequence, got "
            f"{max_seqlen_q!r}; it may be larger"
        )
    if dropout_p:
        raise ValueError(
            f"{name}: `dropout_p`={dropout_p} with `block_table` is refused: attention to pages is for inference; pass "
            "keys and values one after the other"
        )
    refuse_paged(name, "alibi_slopes", alibi_slopes)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        raise ValueError(
            f"{name}: `block_table` with tensors that require gradients is refused: attention to pages has none; call "
            "it under torch.no_grad(), or pass keys and values one after the other"
        )


def check_rotary(name: str, cos: Tensor, sin: Tensor, capacity: int, head_dim: int) -> None:
    """Refuse angles that a cache of this capacity, or a head, is too large for."""
    check_tensors(name, {"rotary_cos": cos, "rotary_sin": sin})
    if cos.ndim != 2 or cos.shape[0] < capacity or sin.shape != cos.shape or 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"{name}: `rotary_cos` and `rotary_sin` must be [tokens of the cache = {capacity} or more, rotary_dim / 2]"
            f" with a rotary_dim of at most {head_dim}, got {list(cos.shape)} and {list(sin.shape)}; compute them for "
            "the whole cache, and a column for two of the head"
        )


def refuse_paged(name: str, argument: str, value: Tensor | None) -> None:
    """Refuse an argument that is served with keys side by side only."""
    if value is not None:
        raise ValueError(
            f"{name}: `{argument}` with `block_table` is refused: it is served with keys that do not lie in pages; "
            "gather them first"
        )


def check_cache_arguments(
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
    """Refuse what `flash_attn_with_kvcache` is given that does not go together, or is no index."""
    for one, other, first, second in (("k", "v", k, v), ("rotary_cos", "rotary_sin", rotary_cos, rotary_sin)):
        if (first is None) != (second is None):
            raise ValueError(f"{name}: `{one}` and `{other}` go together, got only one of them; pass both")
    if k is not None and v is not None:
        check_dims(name, {"k": k, "v": v}, "[batch, seqlen, heads, head_dim]")
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
            refuse_paged(name, argument, value)
        refuse_paged(name, "alibi_slopes", alibi_slopes)
