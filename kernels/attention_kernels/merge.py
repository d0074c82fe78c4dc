# SPDX-License-Identifier: Apache-2.0
"""Merging attention over disjoint sets of keys into attention over all of them; prefixes that a batch shares.

A part's output and log-sum-exp are all that the whole needs of it: the "attention states" of FlashInfer (Ye et al.,
2025, section 2.2), with which Flash-Decoding (Dao et al., 2023) puts together what it has split. Attention to a shared
prefix apart from each sequence's own keys is Hydragen (Juravsky et al., 2024) and FlashInfer's cascade.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Literal, overload

import torch
from torch import Tensor

from .blockwise import accumulator
from .call_checks import cast_for_autocast
from .checks import check_sinks, check_tensors, is_one_or
from .operators import attention
from .spans import Spans, check_are_spans


def merge_states(outputs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from attention over each, in plain torch, with gradients.

    Sinks are part of one softmax only: give them to exactly one of the parts, or add a state of their own, whose output
    is 0 and whose log-sum-exp is the sink.

    Args:
        outputs: `[states, batch, num_heads, query_len, value_dim]`, or a sequence of its states; of one dtype.
        lses: float32 (float64 for float64) `[states, batch, num_heads, query_len]`, or a sequence: the natural
            log-sum-exp of each state, from `attention(..., return_lse=True)`. -inf where a row saw no key: then its
            output there, whatever it holds, has no part in the result. (FlashInfer's own are in base 2.)

    Returns:
        Output in the dtype of `outputs`, computed in that of `lses`, and log-sum-exp in the dtype of `lses`. A row that
        is blind in every state has output 0 and log-sum-exp -inf; no gradient flows through it. As `attention`'s, the
        output's transpose to `[batch, query_len, num_heads, value_dim]` is contiguous.

    Raises:
        TypeError, ValueError: there are no states, or their shapes or dtypes do not fit; the message says which.
    """
    for name, states in (("outputs", outputs), ("lses", lses)):
        if not isinstance(states, Iterable) or (isinstance(states, Tensor) and not states.ndim):
            raise TypeError(
                f"merge_states: `{name}` must be a sequence of states, or a tensor with one after the other, got "
                f"{states!r}; wrap a single state in a list"
            )
    outputs, lses = tuple(outputs), tuple(lses)
    _check_states(outputs, lses)
    stacked = torch.stack(lses)
    blind = stacked == -math.inf
    # Any number near the largest would do, so that it needs no gradient. Where all are -inf, -inf - -inf would be NaN.
    largest = stacked.detach().amax(0)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp(stacked - largest)
    total = weights.sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    shares = (
        _token_major(part.to(stacked.dtype)).masked_fill(_per_row(unseen), 0.0) * _per_row(weight)
        for part, weight, unseen in zip(outputs, weights / total, blind, strict=True)
    )
    output = reduce(torch.add, shares)
    # `masked_fill` stops gradients: a NaN that comes back for a row which saw nothing goes no further.
    output, lse = output.masked_fill(_per_row(nothing), 0.0), (total.log() + largest).masked_fill(nothing, -math.inf)
    return _token_major(output).to(outputs[0].dtype), lse


def _token_major(tensor: Tensor) -> Tensor:
    """`[batch, heads, tokens, dim]` seen as `[batch, tokens, heads, dim]`, as outputs are stored, or back."""
    return tensor.transpose(1, 2)


def _per_row(tensor: Tensor) -> Tensor:
    """`[batch, heads, tokens]` beside what is token-major."""
    return tensor.transpose(1, 2)[..., None]


def _check_states(outputs: tuple[Tensor, ...], lses: tuple[Tensor, ...]) -> None:
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            "merge_states: `outputs` and `lses` must hold the same number of states, at least one, got "
            f"{len(outputs)} and {len(lses)}; take both from attention(..., return_lse=True)"
        )
    for index, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        check_tensors("merge_states", {f"outputs[{index}]": output, f"lses[{index}]": lse})
    shape, dtype, wide = outputs[0].shape, outputs[0].dtype, accumulator(outputs[0].dtype)
    if len(shape) != 4:
        raise ValueError(
            "merge_states: each state's output must be [batch, num_heads, query_len, value_dim], got "
            f"{list(shape)}; unsqueeze what is missing, or wrap a single state in a list"
        )
    for index, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        if output.shape != shape or lse.shape != shape[:-1]:
            raise ValueError(
                f"merge_states: every output must be {list(shape)} and every log-sum-exp {list(shape[:-1])}, got "
                f"{list(output.shape)} and {list(lse.shape)} in state {index}; give all parts the same queries"
            )
        if output.dtype != dtype or lse.dtype != wide:
            raise TypeError(
                f"merge_states: every output must be {dtype} and every log-sum-exp {wide}, got {output.dtype} and "
                f"{lse.dtype} in state {index}; take both from attention(..., return_lse=True)"
            )


@overload
def cascade_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None = None,
    *,
    prefix_spans: Spans | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def cascade_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None = None,
    *,
    prefix_spans: Spans | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def cascade_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None = None,
    *,
    prefix_spans: Spans | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a prefix that all sequences of the batch share, and over each sequence's own keys, with gradients.

    Equal to `attention` over each sequence's keys after the prefix's, to rounding. The queries of the whole batch
    attend to the prefix as if they were one sequence, so its keys are neither repeated nor read for each sequence anew.

    Args:
        query: `[batch, num_heads, query_len, head_dim]`.
        prefix_key: `[1, num_kv_heads, prefix_len, head_dim]`. Its gradient is the sum over the batch.
        prefix_value: `[1, num_kv_heads, prefix_len, value_dim]`.
        key, value: each sequence's own, as for `attention`.
        spans: which of its own keys each row sees, for `query_len` rows and `key_len` keys; None means all.
        prefix_spans: which keys of the prefix each row sees, for `query_len` rows and `prefix_len` keys; None means
            all. Padding in the middle of the prefix must be the same for the whole batch, as the prefix is.
        sinks, scale, softcap: as for `attention`.
        return_lse: also return the log-sum-exp of each row over all keys.

    Returns:
        As `attention` does. A prefix of several levels is `merge_states` of as many parts.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or one of `attention`'s.
    """
    own, prefix = {"query": query, "key": key, "value": value}, {"prefix_key": prefix_key, "prefix_value": prefix_value}
    check_tensors("cascade_attention", own | prefix)
    query, prefix_key, prefix_value, key, value = cast_for_autocast(query, prefix_key, prefix_value, key, value)
    _check_prefix(query, prefix_key, prefix_value, prefix_spans, sinks)
    batch, num_heads, query_len, head_dim = query.shape
    output, lse = attention(query, key, value, spans, scale=scale, softcap=softcap, return_lse=True)
    # Token by token, as projections leave queries, this is a view.
    folded = query.transpose(1, 2).reshape(1, batch * query_len, num_heads, head_dim).transpose(1, 2)
    prefix_spans = None if prefix_spans is None else _folded(prefix_spans, batch)
    prefix_output, prefix_lse = attention(
        folded, prefix_key, prefix_value, prefix_spans, scale=scale, softcap=softcap, return_lse=True
    )
    prefix_output = (
        prefix_output.transpose(1, 2).reshape(batch, query_len, num_heads, prefix_output.shape[3]).transpose(1, 2)
    )
    prefix_lse = prefix_lse.reshape(num_heads, batch, query_len).transpose(0, 1)
    states = [(output, lse), (prefix_output, prefix_lse)]
    if sinks is not None:
        # A score without a value is a state by itself.
        states.append((output.new_zeros(()).expand(output.shape), sinks.to(lse.dtype)[:, None].expand(lse.shape)))
    output, lse = merge_states(*zip(*states, strict=True))
    return (output, lse) if return_lse else output


def _check_prefix(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, prefix_spans: Spans | None, sinks: Tensor | None
) -> None:
    for name, tensor in (("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        if tensor.ndim != 4 or tensor.shape[0] != 1:
            raise ValueError(
                f"cascade_attention: `{name}` must be [1, num_kv_heads, prefix_len, dim], one prefix for the whole "
                f"batch, got {list(tensor.shape)}; keys that differ between sequences belong in `key` and `value`"
            )
    if query.ndim != 4:
        raise ValueError(
            f"cascade_attention: `query` must be [batch, num_heads, query_len, head_dim], got {list(query.shape)}; "
            "unsqueeze what is missing"
        )
    check_sinks("cascade_attention", sinks, query)
    if prefix_spans is None:
        return
    check_are_spans("cascade_attention", "prefix_spans", prefix_spans, "leave it out where all of the prefix is seen")
    if prefix_spans.query_len != query.shape[2] or not is_one_or(prefix_spans.batch, query.shape[0]):
        raise ValueError(
            f"cascade_attention: `prefix_spans` is for batch {prefix_spans.batch} and {prefix_spans.query_len} "
            f"queries, but `query` has batch {query.shape[0]} and {query.shape[2]} queries; build it for their lengths"
        )
    if prefix_spans.key_mask is not None and prefix_spans.key_mask.shape[0] != 1:
        raise ValueError(
            "cascade_attention: padding in the middle of the shared prefix must be the same for the whole batch, got "
            f"`prefix_spans` with a key mask for {prefix_spans.key_mask.shape[0]} sequences; leave the padding out of "
            "the prefix"
        )


def _folded(spans: Spans, batch: int) -> Spans:
    """The spans of the batch's rows, one sequence's after the other's."""
    rows = (batch, spans.query_len)
    start, end = (bound.expand(rows).reshape(1, -1) for bound in (spans.start, spans.end))
    return Spans(start, end, batch * spans.query_len, spans.key_len, spans.key_mask, spans.gap_count)
