# SPDX-License-Identifier: Apache-2.0
"""Packed documents, as positions show them."""

from __future__ import annotations

import torch
from torch import Tensor


def document_ids(position_ids: Tensor, attended: Tensor | None) -> Tensor:
    """Number of the document that each token belongs to, int64 `[batch, tokens]`.

    A document begins where the position is 0 once more, or that of the row's first token, in rows whose positions count
    on by one everywhere else: other positions that go back (branches of a tree, groups of tokens that share one) are no
    packing. Positions of padding mean nothing and begin no document.
    """
    tokens = position_ids.shape[1]
    if attended is None:
        attended = torch.ones_like(position_ids, dtype=torch.bool)
    batch = max(position_ids.shape[0], attended.shape[0])
    position_ids, attended = position_ids.expand(batch, -1), attended.expand(batch, -1)
    index = torch.arange(tokens, device=position_ids.device)
    last_attended = torch.where(attended, index, -1).cummax(1).values
    before = torch.where(index == 0, -1, last_attended.roll(1, 1))
    previous = position_ids.gather(1, before.clamp(min=0))
    first = position_ids.gather(1, attended.int().argmax(1, keepdim=True))
    has_previous = attended & (before >= 0)
    restarts = has_previous & ((position_ids == 0) | (position_ids == first)) & (position_ids <= previous)
    step = position_ids - previous  # one, or more where padding between them was counted
    regular = ~has_previous | restarts | (step == 1) | (step == index - before)
    counts = attended & (position_ids > first.clamp(min=0))  # as positions that are all the same do not
    is_packed = regular.all(1, keepdim=True) & counts.any(1, keepdim=True)
    return (restarts & is_packed).cumsum(1)
