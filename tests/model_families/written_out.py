# SPDX-License-Identifier: Apache-2.0
"""Attention written out over boolean masks: the reference for models whose own eager attention misreads its masks.

Comparing those with sdpa would say little: on the CPU both it and `my_triton` end in the same function of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "written_out"


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention; a row without keys gives 0. Float masks are added to the scores."""
    assert not dropout
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores = scores + position_bias
    least = torch.finfo(scores.dtype).min
    if attention_mask is None:
        assert query.shape[2] in (1, key.shape[2]) or is_causal is False or not getattr(module, "is_causal", True)
        hidden = torch.zeros_like(scores, dtype=torch.bool)
        if query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            hidden = torch.ones_like(hidden).triu(1)
    elif attention_mask.dtype == torch.bool:
        hidden = ~attention_mask
    else:
        hidden = attention_mask == -torch.inf
        scores = scores + attention_mask.masked_fill(hidden, 0.0)
    weights = scores.masked_fill(hidden, least).softmax(-1).masked_fill(hidden, 0.0)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The boolean mask of sdpa, also where sdpa would do without one."""
    return sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False}))


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
