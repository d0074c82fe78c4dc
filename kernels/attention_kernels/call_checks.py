# SPDX-License-Identifier: Apache-2.0
"""What the arguments of `operators.attention` must be, and made ready for its passes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .arguments import Arguments, arguments_of
from .checks import check_dropout, check_numbers, check_sinks, check_tensors, is_one_or, on_scores
from .dropout import draw_seed
from .spans import Spans

MAX_HEAD_DIM = 576
MAX_VALUE_DIM = 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    num_splits: int | None,
) -> Arguments:
    """The arguments of a call that breaks no rule of `attention`, in autocast's dtype and expanded to one batch.

    Raises:
        TypeError, ValueError: as `attention` says.
    """
    check_tensors("attention", {"query": query, "key": key, "value": value})
    query, key, value = fitting_tensors(*cast_for_autocast(query, key, value))
    spans = fitting_spans(spans, query, key)
    mask = on_scores("attention", "mask", mask, query, key)
    bias = on_scores("attention", "bias", bias, query, key)
    check_sinks("attention", sinks, query)
    check_numbers("attention", scale, softcap, num_splits)
    check_dropout("attention", dropout_p)
    return arguments_of(
        query, key, value, spans, mask=mask, bias=bias, sinks=sinks, dropout_seed=dropout_seed, scale=scale,
        softcap=softcap, dropout_p=dropout_p,
    )  # fmt: skip


def fitting_tensors(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value that fit each other, expanded to one batch.

    Raises:
        TypeError: dtypes differ, or are not served.
        ValueError: shapes or devices do not fit.
    """
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if tensor.ndim != 4:
            raise ValueError(
                f"attention: `{name}` must be [batch, heads, tokens, dim], got {list(tensor.shape)}; unsqueeze what is "
                "missing"
            )
        if tensor.dtype != query.dtype or tensor.dtype not in DTYPES:
            raise TypeError(
                f"attention: query, key and value must share one dtype of {[str(dtype) for dtype in DTYPES]}, got "
                f"{[str(each.dtype) for each in named.values()]}; cast them to one"
            )
        if tensor.device != query.device:
            raise ValueError(
                "attention: query, key and value must be on one device, got "
                f"{[str(each.device) for each in named.values()]}; move them to one"
            )
    batch = max(tensor.shape[0] for tensor in named.values())
    if not all(is_one_or(tensor.shape[0], batch) for tensor in named.values()):
        raise ValueError(
            f"attention: batch sizes of {', '.join(named)} must be equal or 1, got "
            f"{[tensor.shape[0] for tensor in named.values()]}; expand or slice the others"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"attention: `query` and `key` must share the head dim, got {query.shape[-1]} and {key.shape[-1]}; pad the "
            "narrower one with zeros, and pass the `scale` of the dim before"
        )
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(
            f"attention: `key` and `value` must share heads and length, got {list(key.shape)} and "
            f"{list(value.shape)}; only their last dimension may differ"
        )
    if key.shape[1] == 0 or query.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            "attention: the number of query heads must be a multiple of the number of key heads, and neither 0, got "
            f"{query.shape[1]} and {key.shape[1]}; shard or repeat the heads so that each group is whole"
        )
    for name, dim, most in (
        ("query", query.shape[-1], MAX_HEAD_DIM),
        ("value", value.shape[-1], MAX_VALUE_DIM),
    ):
        if not 1 <= dim <= most:
            instead = 'wider heads need attn_implementation="eager"' if dim else "a head has a column at least"
            raise ValueError(f"attention: the head dim of `{name}` must be 1 to {most}, got {dim}; {instead}")
    whole = (batch, -1, -1, -1)
    return query.expand(whole), key.expand(whole), value.expand(whole)


def fitting_spans(spans: Spans | None, query: Tensor, key: Tensor) -> Spans:
    """The spans of a call, which fit its tensors; all keys where none were given.

    Raises:
        ValueError: they are for other sizes, or on another device.
    """
    (batch, _, query_len, _), key_len = query.shape, key.shape[2]
    if spans is None:
        return Spans.full(query_len, key_len, device=query.device)
    if (spans.query_len, spans.key_len) != (query_len, key_len) or not is_one_or(spans.batch, batch):
        raise ValueError(
            f"attention: `spans` is for batch {spans.batch}, {spans.query_len} queries and {spans.key_len} keys, but "
            f"the tensors have batch {batch}, {query_len} queries and {key_len} keys; build it for their lengths"
        )
    if spans.device != query.device:
        raise ValueError(f"attention: `spans` is on {spans.device}, `query` on {query.device}; use spans.to(...)")
    return spans


def checked_seed(seed: Tensor | None, device: torch.device) -> Tensor:
    """The seed of dropout, int64 `[1]` on `device`: the one that was given, or a new one.

    Raises:
        TypeError, ValueError: the one that was given is something else.
    """
    if seed is None:
        return draw_seed(device)
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"attention: `dropout_seed` must be an int64 tensor of shape [1], got {type(seed).__name__}; leave it out "
            "to have one drawn"
        )
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"attention: `dropout_seed` must be int64 of shape [1] on {device}, got {seed.dtype} {list(seed.shape)} on "
            f"{seed.device}; leave it out to have one drawn"
        )
    return seed


def cast_for_autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors in the dtype that an active `torch.autocast` asks for, as torch's own attention takes them."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return iter(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return (tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)
