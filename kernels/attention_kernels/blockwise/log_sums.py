# SPDX-License-Identifier: Apache-2.0
"""Sums of exponentials by their logarithms, with the same bits wherever in a tensor a number lies.

`torch.sigmoid` and `torch.logaddexp` compute what is left over after a processor's whole vectors in another way, and so
a sequence's result would depend on how many neighbours it has. `exp` and `log1p` do not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def share_of(log: Tensor, other: Tensor) -> Tensor:
    """What share of exp(log) + exp(other) is exp(log); NaN where both are 0."""
    return torch.sub(other, log).exp_().add_(1.0).reciprocal_()


def log_of_sum(log: Tensor, other: Tensor) -> Tensor:
    """log(exp(log) + exp(other)); -inf where both are."""
    # Infinities of one sign have no difference, and are their own sum.
    smaller = torch.sub(log, other).abs_().nan_to_num_(0.0).neg_().exp_().log1p_()
    return smaller.add_(torch.maximum(log, other))
