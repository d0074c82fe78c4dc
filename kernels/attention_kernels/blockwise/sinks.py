# SPDX-License-Identifier: Apache-2.0
"""Sinks: scores without values, which take a share of the softmax."""

from __future__ import annotations

import math

from torch import Tensor

from .log_sums import log_of_sum, share_of


def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result after the sinks, which have no values, have taken their share of the softmax."""
    if sinks is None:
        return output, lse
    return without_share_of(sinks, output, lse), log_of_sum(lse, sinks.to(lse.dtype)[:, None])


def without_share_of(sinks: Tensor, output: Tensor, lse: Tensor) -> Tensor:
    """The output, changed in place, after the sinks have taken their share of the softmax; `lse` is that before."""
    share = share_of(lse, sinks.to(lse.dtype)[:, None]).masked_fill_(lse == -math.inf, 0.0)
    return output.mul_(share[..., None])
