# SPDX-License-Identifier: Apache-2.0
"""Sinks that differ from token to token, which the kernels do not know: applied to what attention without them gives.

A sink is a score without a value. The keys of a row share `exp(lse)` of a sum that the sink adds `exp(sink)` to, so
their part of it is `sigmoid(lse - sink)`, and both the output and the weights are multiplied by it. Gradients reach the
sinks through the sigmoid, and queries and keys also through the log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_kernels.checks import check_tensors, is_one_or


def keys_share(lse: Tensor, sinks: Tensor) -> Tensor:
    """What a softmax with sinks leaves to the keys, `[batch, num_heads, query_len, 1]`.

    Args:
        lse: log-sum-exp of the scores without the sinks, float32 `[batch, num_heads, query_len]`.
        sinks: floating point, broadcastable to `[batch, num_heads, query_len, 1]`.

    Raises:
        ValueError: `sinks` is not floating point or does not broadcast.
    """
    check_tensors("my_triton attention", {"sinks": sinks})
    shape = (*lse.shape, 1)
    fits = sinks.ndim == 4 and all(map(is_one_or, sinks.shape, shape))
    if not fits or not sinks.is_floating_point():
        raise ValueError(
            "my_triton attention: `sinks` must be floating point and broadcast to [batch, num_heads, query_len, 1] = "
            f"{list(shape)}, got {sinks.dtype} {list(sinks.shape)}; sinks per head are `s_aux`, [num_heads]"
        )
    return torch.sigmoid(lse[..., None] - sinks)
