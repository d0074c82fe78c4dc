# SPDX-License-Identifier: Apache-2.0
"""Sinks: scores without values, which take a share of the softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .log_sums import log_of_sum, share_of


def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result after the sinks, which have no values, have taken their share of the softmax."""
    if sinks is None:
        return output, lse
    sinks = sinks.to(lse.dtype)[:, None]
    share = torch.where(lse == -math.inf, 0.0, share_of(lse, sinks))
    return output.mul_(share[..., None]), log_of_sum(lse, sinks)
