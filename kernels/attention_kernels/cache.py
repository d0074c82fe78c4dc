# SPDX-License-Identifier: Apache-2.0
"""Where keys and values live while a model generates: in pages behind a block table, plain or quantised.

Contiguous caches need nothing of this: `attention` takes them as they are, and reads no key outside of the spans. Pages
are those of PagedAttention (Kwon et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from . import gathered, prebound
from .call_checks import MAX_HEAD_DIM
from .checks import check_no_transform, check_numbers, check_sinks, check_tensors, is_number, is_one_or
from .configs import unsupported_dtype
from .paths import runs_triton
from .quantised import QUANTISED, quantise
from .spans import Spans, check_are_spans, rise_within, values_at_hand


@dataclass(frozen=True, eq=False)
class PagedCache:
    """Keys and values of several sequences, in pages of equal size that may lie, and be shared, in any order.

    Attributes:
        key: `[pages, page_size, num_kv_heads, head_dim]`, of the queries' dtype, or float8_e4m3fn, float8_e5m2 or int8.
        value: `[pages, page_size, num_kv_heads, value_dim]`, of the key's dtype. Any strides.
        block_table: int32 `[batch, pages of the longest sequence]`; entry `j` is the page of the tokens from
            `j * page_size` on. Entries beyond a sequence's length are not read.
        seq_lens: int32 `[batch]`, number of tokens of each sequence, those of the current queries included.
        key_scale, value_scale: what quantised numbers are multiplied by, floating point, broadcastable to
            `[pages, page_size, num_kv_heads]`: one number, one for each head, or one for each token and head.

    Raises:
        ValueError, TypeError: an attribute breaks a rule above.
    """

    key: Tensor
    value: Tensor
    block_table: Tensor
    seq_lens: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def __post_init__(self) -> None:
        scales = {"key_scale": self.key_scale, "value_scale": self.value_scale}
        needed = {"key": self.key, "value": self.value, "block_table": self.block_table, "seq_lens": self.seq_lens}
        check_tensors("PagedCache", needed | {name: each for name, each in scales.items() if each is not None})
        if self.key.ndim != 4 or self.value.ndim != 4 or self.value.shape[:3] != self.key.shape[:3]:
            raise ValueError(
                "PagedCache: `key` and `value` must be [pages, page_size, num_kv_heads, dim] with equal first three "
                f"sizes, got {list(self.key.shape)} and {list(self.value.shape)}; take both from one allocation"
            )
        pages, page_size, num_kv_heads = self.key.shape[:3]
        if not page_size:
            raise ValueError("PagedCache: a page must hold at least one token, got 0; see page_size")
        if not num_kv_heads:
            raise ValueError("PagedCache: `key` and `value` must have at least one head, got 0; see num_kv_heads")
        if self.key.dtype != self.value.dtype:
            raise TypeError(
                f"PagedCache: `key` and `value` must share a dtype, got {self.key.dtype}, {self.value.dtype}; cast one"
            )
        for name, tensor, ndim in (("block_table", self.block_table, 2), ("seq_lens", self.seq_lens, 1)):
            if tensor.dtype != torch.int32 or tensor.ndim != ndim:
                raise ValueError(
                    f"PagedCache: `{name}` must be int32 with {ndim} dimensions, got {tensor.dtype} "
                    f"{list(tensor.shape)}; convert it with `.to(torch.int32)`"
                )
        if len(self.block_table) != len(self.seq_lens):
            raise ValueError(
                "PagedCache: `block_table` and `seq_lens` must have a row and a number for each sequence, got "
                f"{len(self.block_table)} and {len(self.seq_lens)}; leave out what belongs to no sequence"
            )
        for name, scale in scales.items():
            if (scale is not None) != self.quantised:
                raise ValueError(
                    f"PagedCache: `{name}` belongs to quantised keys and values ({[str(d) for d in QUANTISED]}), and "
                    f"to them only; got {'one' if scale is not None else 'none'} for {self.key.dtype}"
                )
            rows = (pages, page_size, num_kv_heads)
            if scale is not None and not _broadcasts(scale.shape, rows):
                raise ValueError(
                    f"PagedCache: `{name}` must broadcast to [pages, page_size, num_kv_heads] = {list(rows)}, got "
                    f"{list(scale.shape)}; give one number, one for each head, or one for each token and head"
                )
        tensors = self.key, self.value, self.block_table, self.seq_lens, self.key_scale, self.value_scale
        if len({each.device for each in tensors if each is not None}) > 1:
            names = (each.name for each in fields(self))
            where = [
                f"`{name}` on {each.device}" for name, each in zip(names, tensors, strict=True) if each is not None
            ]
            raise ValueError(f"PagedCache: all tensors must be on one device, got {', '.join(where)}; move them to one")

    @property
    def quantised(self) -> bool:
        """Whether keys and values are quantised."""
        return self.key.dtype in QUANTISED

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[1]

    @property
    def key_len(self) -> int:
        """Tokens that the block table has room for."""
        return self.block_table.shape[1] * self.page_size

    def check(self) -> None:
        """Look at the block table and the lengths, which on a GPU is a synchronisation.

        Raises:
            IndexError: an entry that a sequence needs is not the number of a page, or a length exceeds the table.
        """
        pages = self.key.shape[0]
        lengths = self.seq_lens[:, None]
        needed = torch.arange(self.block_table.shape[1], device=lengths.device)[None] * self.page_size < lengths
        wrong = needed & ((self.block_table < 0) | (self.block_table >= pages))
        if wrong.any():
            sequence, entry = wrong.nonzero()[0].tolist()
            raise IndexError(
                f"PagedCache: `block_table`[{sequence}, {entry}] = {int(self.block_table[sequence, entry])} is needed "
                f"by {int(self.seq_lens[sequence])} tokens and must be 0 to {pages - 1}; write the page's number there"
            )
        if ((self.seq_lens < 0) | (self.seq_lens > self.key_len)).any():
            raise IndexError(
                f"PagedCache: `seq_lens` must be 0 to {self.key_len} (pages of the block table times page size), got "
                f"{self.seq_lens.tolist()}; widen the block table"
            )

    def take(self, pages: Tensor, dtype: torch.dtype, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """A copy of some pages, dequantised: keys and values `[len(pages), page_size, num_kv_heads, dim]` of `dtype`.

        Args:
            pages: int64 `[n]`, their numbers.
            out: where to copy keys and values to, of the cache's dtype.
        """

        def taken(tensor: Tensor, scale: Tensor | None, out: Tensor | None) -> Tensor:
            copy = torch.index_select(tensor, 0, pages, out=out)
            if scale is not None:
                copy = copy.float() * scale.expand(tensor.shape[:3]).index_select(0, pages)[..., None].float()
            return copy.to(dtype)

        key, value = (None, None) if out is None else out
        return taken(self.key, self.key_scale, key), taken(self.value, self.value_scale, value)

    def gather(self, sequence: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence, dequantised: `[1, num_kv_heads, seq_len, dim]` of `dtype`."""
        length = int(self.seq_lens[sequence])
        pages = self.block_table[sequence, : -(-length // self.page_size)].long()
        key, value = (taken.flatten(0, 1)[:length].transpose(0, 1)[None] for taken in self.take(pages, dtype))
        return key, value


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
    _check_is_cache("paged_attention", cache)
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
    if runs_triton(query):
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


def write_cache(key: Tensor, value: Tensor, cache: PagedCache, slots: Tensor) -> None:
    """Put new keys and values into pages, quantised on the way where the cache is.

    Args:
        key: `[tokens, num_kv_heads, head_dim]`.
        value: `[tokens, num_kv_heads, value_dim]`.
        cache: whose `key` and `value` are written. Scales are not: they must be set before.
        slots: int64 or int32 `[tokens]`, `page * page_size + place in the page`; a negative slot is left out (padding).
            Slots that come twice, or beyond the pages, are undefined behaviour.

    Raises:
        ValueError: shapes or devices do not fit, or slots are no integers.
        TypeError: an argument is no tensor or no cache, or the GPU has not the dtype of the cache.
    """
    check_tensors("write_cache", {"key": key, "value": value, "slots": slots})
    _check_is_cache("write_cache", cache)
    if slots.dtype not in (torch.int64, torch.int32) or slots.ndim != 1:
        raise ValueError(
            f"write_cache: `slots` must be int64 or int32 [tokens], got {slots.dtype} {list(slots.shape)}; a slot is "
            "`page * page_size + place in the page`"
        )
    for name, new, old in (("key", key, cache.key), ("value", value, cache.value)):
        if new.shape != (slots.numel(), *old.shape[2:]):
            raise ValueError(
                f"write_cache: `{name}` must be [tokens, num_kv_heads, dim] = {[slots.numel(), *old.shape[2:]]} for "
                f"{slots.numel()} slots and this cache, got {list(new.shape)}; give each token a slot of its own"
            )
    _check_devices("write_cache", cache, {"key": key, "value": value, "slots": slots})
    if runs_triton(key):
        from .write import write  # not before it is needed: importing Triton takes time

        if (reason := unsupported_dtype(key.device, cache.key.dtype)) is not None:
            raise TypeError(f"write_cache: {reason}")
        slots = slots.contiguous()
        for new, old, scale in ((key, cache.key, cache.key_scale), (value, cache.value, cache.value_scale)):
            inputs = new.resolve_neg(), old, scale, slots
            prebound.launched(partial(write, *inputs), prebound.NO_SPANS, inputs, ("write",))
        return
    _write_in_torch(key, value, cache, slots)


@torch.no_grad()  # or the cache would be part of every later pass's graph; kernels leave no trace in one
def _write_in_torch(key: Tensor, value: Tensor, cache: PagedCache, slots: Tensor) -> None:
    """`write_cache` without kernels."""
    kept = slots >= 0
    page, place = slots[kept].long() // cache.page_size, slots[kept].long() % cache.page_size
    for new, old, scale in ((key, cache.key, cache.key_scale), (value, cache.value, cache.value_scale)):
        rows = new[kept]
        if scale is not None:
            rows = quantise(rows.float() / scale.expand(old.shape[:3])[page, place][..., None].float(), old.dtype)
        old[page, place] = rows.to(old.dtype)


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of this shape can be expanded to the other."""
    own = (1,) * (len(to) - len(shape)) + tuple(shape)
    return len(own) == len(to) and all(map(is_one_or, own, to))


def _by_head(scale: Tensor, tensor: Tensor) -> Tensor:
    """Scales `[pages, num_kv_heads, page_size]`, expanded."""
    return scale.expand(tensor.shape[:3]).transpose(1, 2)


def _check_is_cache(function: str, cache: object) -> None:
    if not isinstance(cache, PagedCache):
        raise TypeError(
            f"{function}: `cache` must be a PagedCache, got {type(cache).__name__}; keys and values that lie side by "
            "side belong to `attention`"
        )


def _check_devices(function: str, cache: PagedCache, given: dict[str, Tensor | None]) -> None:
    for name, each in given.items():
        if each is not None and each.device != cache.key.device:
            raise ValueError(
                f"{function}: `{name}` is on {each.device}, the cache on {cache.key.device}; move it there"
            )


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
    _check_devices("paged_attention", cache, {"query": query, "query_offsets": query_offsets})
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
