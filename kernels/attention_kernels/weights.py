# SPDX-License-Identifier: Apache-2.0
"""Attention weights written down, for those who ask to see them: recomputed from each row's log-sum-exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .call_checks import cast_for_autocast
from .checks import check_dropout, check_numbers, check_tensors, is_one_or, on_scores
from .dropout import keep_mask, threshold_and_scale
from .spans import Spans, check_are_spans


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    spans: Spans | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """The weights with which `attention` has averaged the values, in plain torch, with gradients.

    They take `batch x num_heads x query_len x key_len` elements, some times over while they are computed.

    Args:
        query: `[batch, num_heads, query_len, head_dim]`, as given to `attention`.
        key: `[batch, num_kv_heads, key_len, head_dim]`. A batch of 1 beside a larger one is broadcast.
        lse: float32 (float64 for float64) `[batch, num_heads, query_len]`, from `attention(..., return_lse=True)` of
            the same arguments; sinks are contained in it. Gradients flow through it.
        spans, mask, bias, scale, softcap: as given to `attention`.
        dropout_p, dropout_seed: as given to `attention`; the weights are those after dropout.

    Returns:
        `[batch, num_heads, query_len, key_len]` in the dtype of `query`, computed in that of `lse`. A row adds up to 1
        without sinks and dropout. Hidden keys have weight 0, whatever their scores, and a row that sees no key is 0.
        A row in which every key is visible under a bias near the lowest number of float32 is not exact: its `lse` no
        longer tells how many keys there are.

    Raises:
        ValueError, TypeError: an argument is not what `attention` takes or gave, or dropout has no seed.
    """
    check_tensors("attention_weights", {"query": query, "key": key, "lse": lse})
    query, key = cast_for_autocast(query, key)
    _check(query, key, lse, spans, dropout_p, dropout_seed)
    check_numbers("attention_weights", scale, softcap, None)
    whole = query.expand(lse.shape[0], -1, -1, -1)
    mask = on_scores("attention_weights", "mask", mask, whole, key)
    bias = on_scores("attention_weights", "bias", bias, whole, key)
    scores = _scores(query, key, lse.dtype, scale, softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    visible = _visible(spans, mask, bias)
    exponents = scores - lse[..., None]
    if visible is not None:
        # What a hidden key's score and a blind row's log-sum-exp make together may be NaN. Choosing after the
        # difference keeps it out of the gradient too: the exponential of -inf has none.
        exponents = torch.where(visible, exponents, -math.inf)
    weights = torch.exp(exponents)
    if dropout_p and dropout_seed is not None:
        weights = weights * _dropout_factor(weights, dropout_p, dropout_seed)
    return weights.to(query.dtype)


def _check(
    query: Tensor, key: Tensor, lse: Tensor, spans: Spans | None, dropout_p: float, dropout_seed: Tensor | None
) -> None:
    if query.ndim != 4 or key.ndim != 4 or query.shape[3] != key.shape[3]:
        raise ValueError(
            "attention_weights: `query` and `key` must be [batch, heads, tokens, head_dim], got "
            f"{list(query.shape)} and {list(key.shape)}; pass what `attention` was given"
        )
    batch = max(query.shape[0], key.shape[0])
    if not (is_one_or(query.shape[0], batch) and is_one_or(key.shape[0], batch)):
        raise ValueError(
            "attention_weights: batch sizes of `query` and `key` must be equal or 1, got "
            f"{query.shape[0]} and {key.shape[0]}; pass what `attention` was given"
        )
    if query.dtype != key.dtype or not query.is_floating_point():
        raise TypeError(
            "attention_weights: `query` and `key` must share one floating-point dtype, got "
            f"{query.dtype} and {key.dtype}; pass what `attention` was given"
        )
    rows = (batch, *query.shape[1:3])
    wide = torch.promote_types(query.dtype, torch.float32)
    if tuple(lse.shape) != rows or lse.dtype != wide:
        raise ValueError(
            f"attention_weights: `lse` must be {wide} of shape [batch, num_heads, query_len] = {list(rows)}, got "
            f"{lse.dtype} {list(lse.shape)}; take it from attention(..., return_lse=True)"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            "attention_weights: the number of query heads must be a multiple of the number of key heads, got "
            f"{query.shape[1]} and {key.shape[1]}; pass what `attention` was given"
        )
    if spans is not None:
        check_are_spans("attention_weights", "spans", spans, "pass a dense mask as `mask`")
        sizes = query.shape[2], key.shape[2]
        if (spans.query_len, spans.key_len) != sizes or not is_one_or(spans.batch, batch):
            raise ValueError(
                f"attention_weights: `spans` is for batch {spans.batch}, {spans.query_len} queries and {spans.key_len} "
                f"keys, but the tensors have batch {batch}, {sizes[0]} queries and {sizes[1]} keys; pass what "
                "`attention` was given"
            )
    check_dropout("attention_weights", dropout_p)
    if dropout_p and dropout_seed is None:
        raise ValueError(
            f"attention_weights: `dropout_p`={dropout_p} needs the `dropout_seed` that `attention` was given; draw one "
            "for both with attention_kernels.draw_seed"
        )


def _scores(query: Tensor, key: Tensor, dtype: torch.dtype, scale: float | None, softcap: float | None) -> Tensor:
    """Scaled and capped scores `[batch, num_heads, query_len, key_len]`; heads of a group share their keys."""
    num_heads, query_len, head_dim = query.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    # Rows that see a NaN have it in their log-sum-exp. Elsewhere it must not come back as the gradient 0 x NaN.
    query, key = (tensor.to(dtype).nan_to_num(0.0, math.inf, -math.inf) for tensor in (query, key))
    grouped = query.reshape(query.shape[0], key.shape[1], num_heads // key.shape[1] * query_len, head_dim)
    with torch.autocast(query.device.type, enabled=False):  # which would round the scores to 16 bits
        scores = (grouped @ key.transpose(-1, -2)) * scale
    scores = scores.reshape(scores.shape[0], num_heads, query_len, key.shape[2])
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _visible(spans: Spans | None, mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """bool, broadcastable to the scores, True where a key is visible; None if every key is."""
    parts = [] if spans is None else [spans.to_dense()[:, None]]
    if mask is not None:
        parts.append(mask)
    if bias is not None:
        parts.append(bias != -math.inf)
    visible = None
    for part in parts:
        visible = part if visible is None else visible & part
    return visible


def _dropout_factor(weights: Tensor, dropout_p: float, dropout_seed: Tensor) -> Tensor:
    """What dropout multiplies weights by: 0, or what makes up for the dropped."""
    batch, num_heads, query_len, key_len = weights.shape
    heads, rows, keys = (torch.arange(size, device=weights.device) for size in (batch * num_heads, query_len, key_len))
    heads = heads.reshape(batch, num_heads, 1, 1)
    keep = keep_mask(dropout_seed, dropout_p, heads, rows[:, None], keys, query_len, key_len)
    return keep.to(weights.dtype) * threshold_and_scale(dropout_p)[1]
