# SPDX-License-Identifier: Apache-2.0
"""Dense attention in any dtype: what the tests and the benchmarks compare with.

Run in float64 it is the truth; run in the dtype of the inputs it is "eager", whose own rounding error sets the error
bound of every kernel. It never uses the span logic that it checks: a mask is a dense tensor here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with every intermediate in `dtype` (the softmax itself in at least float32).

    Args:
        query: `[batch, num_heads, query_len, head_dim]`.
        key: `[batch, num_kv_heads, key_len, head_dim]`.
        value: `[batch, num_kv_heads, key_len, value_dim]`.
        mask: bool, broadcastable to `[batch, num_heads, query_len, key_len]`, True where visible.
        bias: added to the scaled scores, broadcastable likewise. -inf hides a key.
        sinks: `[num_heads]`, a score per head that takes part in the softmax and has no value (GPT-OSS).
        scale: factor of the scores, default `head_dim ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        keep: bool, broadcastable to the scores; weights of the softmax where it is False are dropped.
        keep_scale: factor of the weights that are kept.

    Returns:
        Output `[batch, num_heads, query_len, value_dim]` and log-sum-exp `[batch, num_heads, query_len]`, sinks
        included. A row that sees nothing has output 0; its log-sum-exp is -inf (the sink, where there is one).
    """
    group_size = query.shape[1] // key.shape[1]
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    key, value = key.repeat_interleave(group_size, 1), value.repeat_interleave(group_size, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # As eager implementations do, the product is rounded to `dtype` before the softmax widens it again.
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(dtype, torch.float32))
    if bias is not None:
        # A key hidden by -inf stays hidden even where its score is NaN.
        scores = torch.where(bias == -math.inf, -math.inf, scores + bias)
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])[..., : key.shape[2]]
    if keep is not None:
        weights = torch.where(keep, weights * keep_scale, 0.0)
    return _weighted_sum(weights.to(dtype), value), lse


def error_bound(eager_error: float, size: float, dtype: torch.dtype) -> float:
    """The largest error of a result in `dtype` that is no mistake, all three in the Euclidean norm.

    Args:
        eager_error: that of `attention_reference` with every intermediate in `dtype`.
        size: norm of the right result, of which a quarter of a unit in the last place is allowed, as eager may happen
            to be exact.
        dtype: of the result.
    """
    return 2 * eager_error + torch.finfo(dtype).eps / 4 * size


def _weighted_sum(weights: Tensor, value: Tensor) -> Tensor:
    """`weights @ value` in which a weight of exactly 0 takes nothing from a value, not even NaN."""
    if value.isfinite().all():
        return weights @ value
    products = weights[..., None] * value[..., None, :, :]
    return torch.where(weights[..., None] == 0, torch.zeros_like(products), products).sum(-2)
