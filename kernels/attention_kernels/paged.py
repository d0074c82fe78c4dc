# SPDX-License-Identifier: Apache-2.0
"""Attention to keys and values in pages."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import gathered, prebound
from .cache import PagedCache, check_is_cache, check_on_its_device
from .call_checks import MAX_HEAD_DIM
from .checks import check_no_transform, check_numbers, check_sinks, check_tensors, is_number, is_one_or
from .configs import unsupported_dtype
from .paths import runs_triton
from .spans import Spans, check_are_spans, rise_within, values_at_hand


@overload
def paged_attention(
    query: Tensor,
    cache: PagedCache,
    spans: Spans | None = None,
    *,
    query_offsets: Tensor | None = None,
    max_query_len: int | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    num_splits: int | None = None,
    check: bool = False,
    return_lse: Literal[False] = False,
    out: Tensor | None = None,
) -> Tensor: ...


@overload
def paged_attention(
    query: Tensor,
    cache: PagedCache,
    spans: Spans | None = None,
    *,
    query_offsets: Tensor | None = None,
    max_query_len: int | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    num_splits: int | None = None,
    check: bool = False,
    return_lse: Literal[True],
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def paged_attention(
    query: Tensor,
    cache: PagedCache,
    spans: Spans | None = None,
    *,
    query_offsets: Tensor | None = None,
    max_query_len: int | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    num_splits: int | None = None,
    check: bool = False,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of new queries to keys and values in pages: prefill, decoding, and both in one batch.

    Args:
        query: `[batch, num_heads, query_len, head_dim]`, the last `query_len` tokens of each sequence; or, with
            `query_offsets`, `[1, num_heads, tokens, head_dim]`: the queries of all sequences one after the other.
        cache: where the keys are, those of the queries included (`write_cache` puts them there).
        spans: which keys of its own sequence each row sees, `key_len` being that of the cache; the default is causal.
            Of what they say beyond the sequence's keys nothing is seen.
        query_offsets: int32 `[batch + 1]`; sequence `b` has the queries `[query_offsets[b], query_offsets[b + 1])`.
            Results of queries beyond the last are undefined.
        max_query_len: with `query_offsets`, at least the most queries of a sequence. Default: all tokens. One that is
            too small is an error where looking is free (on the CPU) or asked for (`check`), undefined elsewhere.
        sinks: floating point `[num_heads]`, as for `attention`.
        scale, softcap: as for `attention`.
        num_splits: in how many parts the keys are computed at a time; a fixed number makes bits independent of the
            batch.
        check: look at the block table (`PagedCache.check`) and the offsets first; otherwise entries out of range are
            undefined behaviour, as looking would be a synchronisation.
        return_lse: also return the log-sum-exp.
        out: where to write the output, of its shape and dtype; token by token (its transpose of dimensions 1 and 2 is
            contiguous) it is written to without a copy.

    Returns:
        Output as `query`, with value's last dimension, or `out` if that was given; with `return_lse` also the natural
        log-sum-exp, float32 `[batch or 1, num_heads, query_len or tokens]`.

    Raises:
        ValueError, TypeError: an argument breaks a rule above, or wants a gradient: there is none.
        RuntimeError: as for `attention`.
        IndexError: `check` found a wrong entry.
    """
    check_tensors("paged_attention", {"query": query})
    check_is_cache("paged_attention", cache)
    check_no_transform("paged_attention", query, cache.key, cache.value, sinks, scale)
    _check_query(query, cache, query_offsets, max_query_len)
    check_sinks("paged_attention", sinks, query)
    check_numbers("paged_attention", scale, softcap, num_splits)
    if out is not None:
        check_tensors("paged_attention", {"out": out})
        _check_out(out, query, cache)
    if check:
        cache.check()
    if query_offsets is not None and (check or values_at_hand(query_offsets)):
        _check_offsets(query_offsets, query.shape[2], max_query_len)
    query_offsets = None if query_offsets is None else query_offsets.contiguous()
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if spans is not None:
        _check_spans(spans, query, cache)
    if runs_triton(query) and len(cache.seq_lens):  # no sequences leave nothing to launch for
        if (reason := unsupported_dtype(query.device, cache.key.dtype)) is not None:
            raise TypeError(f"paged_attention: {reason}")
        spans = causal_spans(cache, query.shape[2], query_offsets) if spans is None else spans
        output, lse = _launch(query, cache, spans, query_offsets, max_query_len, sinks, scale, softcap, num_splits, out)
    else:
        options = {"sinks": sinks, "scale": scale, "softcap": softcap}
        # Quantised numbers times their scales fit float32, not 16 bits.
        wide = query.detach().to(torch.promote_types(query.dtype, torch.float32) if cache.quantised else query.dtype)
        alone = num_splits is not None
        output, lse = gathered.forward(wide, cache, spans, query_offsets, options, alone=alone)
        output = output.to(query.dtype) if out is None else out.copy_(output)
    return (output, lse) if return_lse else output


def _launch(
    query: Tensor,
    cache: PagedCache,
    spans: Spans,
    query_offsets: Tensor | None,
    max_query_len: int | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    num_splits: int | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`paged_attention` by the kernel."""
    from .decode import decode  # not before it is needed: importing Triton takes time

    in_place = out if out is not None and out.transpose(1, 2).is_contiguous() else None
    query, key, value = query.resolve_neg(), cache.key.transpose(1, 2), cache.value.transpose(1, 2)
    max_query_len, num_splits = (None if each is None else int(each) for each in (max_query_len, num_splits))
    key_scale = None if cache.key_scale is None else _by_head(cache.key_scale, cache.key)
    value_scale = None if cache.value_scale is None else _by_head(cache.value_scale, cache.value)
    table, seq_lens = cache.block_table, cache.seq_lens.contiguous()
    block_table = table if table.stride(1) == 1 else table.contiguous()  # a part of a wider one is read as it is

    def launch() -> tuple[Tensor, Tensor]:
        return decode(
            query, key, value, spans.start, spans.end, sinks=sinks, scale=scale, softcap=softcap,
            block_table=block_table, seq_lens=seq_lens, query_offsets=query_offsets, max_query_len=max_query_len,
            num_splits=num_splits, key_scale=key_scale, value_scale=value_scale, out=in_place,
        )  # fmt: skip

    inputs = query, key, value, key_scale, value_scale, block_table, seq_lens, query_offsets, sinks, in_place
    asked = ("paged", scale, softcap, max_query_len, num_splits)
    known = None if torch.compiler.is_compiling() else prebound.known_spans(spans)
    output, lse = prebound.launched(launch, known, inputs, asked)
    return output if out is None or in_place is not None else out.copy_(output), lse


def causal_spans(cache: PagedCache, query_len: int, query_offsets: Tensor | None) -> Spans:
    """Each row sees its sequence up to its own position: the queries are the sequence's last tokens."""
    index = torch.arange(query_len, device=cache.seq_lens.device, dtype=torch.int32)[None]
    start = torch.zeros(1, 1, dtype=torch.int32, device=index.device)
    if query_offsets is None:
        end = cache.seq_lens[:, None] - query_len + index + 1
    else:
        sequence = torch.searchsorted(query_offsets, index[0], right=True) - 1
        sequence = sequence.clamp(0, cache.seq_lens.shape[0] - 1)
        end = (cache.seq_lens - query_offsets[1:])[sequence][None] + index + 1
    return Spans(start, end.clamp(0, cache.key_len).to(torch.int32), query_len, cache.key_len)


def _by_head(scale: Tensor, tensor: Tensor) -> Tensor:
    """Scales `[pages, num_kv_heads, page_size]`, expanded."""
    return scale.expand(tensor.shape[:3]).transpose(1, 2)


def _check_spans(spans: Spans, query: Tensor, cache: PagedCache) -> None:
    check_are_spans("paged_attention", "spans", spans, "leave it out for causal attention")
    fits = (spans.query_len, spans.key_len) == (query.shape[2], cache.key_len)
    if not fits or not is_one_or(spans.batch, query.shape[0]) or spans.key_mask is not None:
        raise ValueError(
            f"paged_attention: `spans` must be for {query.shape[2]} queries and the cache's {cache.key_len} keys, of a "
            f"batch of {query.shape[0]} or 1, without hidden keys, got {spans!r}; leave it out for causal attention"
        )
    if spans.device != query.device:
        raise ValueError(f"paged_attention: `spans` is on {spans.device}, `query` on {query.device}; use spans.to(...)")


def _check_out(out: Tensor, query: Tensor, cache: PagedCache) -> None:
    shape = (*query.shape[:3], cache.value.shape[3])
    if out.shape != shape or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(
            f"paged_attention: `out` must be {query.dtype} {list(shape)} on {query.device} like the output, got "
            f"{out.dtype} {list(out.shape)} on {out.device}; leave it out to have it made"
        )


def _check_query(
    query: Tensor,
    cache: PagedCache,
    query_offsets: Tensor | None,
    max_query_len: int | None,
) -> None:
    if torch.is_grad_enabled() and (query.requires_grad or cache.key.requires_grad or cache.value.requires_grad):
        raise ValueError(
            "paged_attention: tensors that require gradients are refused, got one while gradients are enabled: "
            "attention to pages has none; call it under torch.no_grad(), or `attention` with keys side by side"
        )
    if query.ndim != 4 or query.shape[-1] != cache.key.shape[-1] or query.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"paged_attention: `query` must be [batch, num_heads, query_len, {cache.key.shape[-1]}] like the cache's "
            f"keys, of at most {MAX_HEAD_DIM} columns, got {list(query.shape)}; transpose or unsqueeze it"
        )
    if query.shape[1] % cache.key.shape[2]:
        raise ValueError(
            "paged_attention: the number of query heads must be a multiple of the cache's key heads, got "
            f"{query.shape[1]} and {cache.key.shape[2]}; shard the heads so that each group is whole"
        )
    if not cache.quantised and query.dtype != cache.key.dtype:
        raise TypeError(f"paged_attention: `query` is {query.dtype}, the cache {cache.key.dtype}; cast one of them")
    sequences = cache.seq_lens.shape[0]
    if query_offsets is None and query.shape[0] != sequences:
        raise ValueError(
            f"paged_attention: `query` has a batch of {query.shape[0]}, the cache {sequences} sequences; pass "
            "`query_offsets` for queries that lie one after the other"
        )
    if query_offsets is not None:
        check_tensors("paged_attention", {"query_offsets": query_offsets})
    check_on_its_device("paged_attention", cache, {"query": query, "query_offsets": query_offsets})
    if query_offsets is not None and (
        query_offsets.shape != (sequences + 1,) or query_offsets.dtype != torch.int32 or query.shape[0] != 1
    ):
        raise ValueError(
            f"paged_attention: `query_offsets` must be int32 [sequences + 1] = [{sequences + 1}] beside a `query` with "
            f"a batch of 1, got {query_offsets.dtype} {list(query_offsets.shape)} and a batch of {query.shape[0]}; "
            "leave it out for queries of equal number"
        )
    if max_query_len is not None and not (is_number(max_query_len) and max_query_len >= 1 and max_query_len % 1 == 0):
        raise ValueError(
            f"paged_attention: `max_query_len` must be whole and at least 1, got {max_query_len!r}; leave it out if "
            "not known"
        )


def _check_offsets(query_offsets: Tensor, tokens: int, max_query_len: int | None) -> None:
    if not rise_within(query_offsets, tokens):
        raise ValueError(
            f"paged_attention: `query_offsets` must never fall, from 0 to the {tokens} tokens there are, got "
            f"{query_offsets.tolist()}; it is 0 and the running sum of the queries of each sequence"
        )
    longest = int(query_offsets.diff().max()) if query_offsets.numel() > 1 else 0
    if max_query_len is not None and longest > max_query_len:
        raise ValueError(
            f"paged_attention: `max_query_len` must be at least {longest}, the most queries of a sequence, got "
            f"{max_query_len}; leave it out if not known"
        )
