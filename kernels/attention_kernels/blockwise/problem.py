# SPDX-License-Identifier: Apache-2.0
"""One attention call of the torch path: its arguments, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..arguments import Arguments
from . import processor
from .plan import Group, Plan, Sharing, plan_batch

CALL_NUMBERS = 1 << 18
"""What one more call of fused attention costs: as much time as reading so many numbers of keys and values."""

WRITTEN_OUT_CALLS = 8
"""What one more tile that is written out costs: as much time as so many calls of fused attention."""


@dataclass(frozen=True)
class Problem:
    """The arguments of one attention call, as `operators.attention` has checked them."""

    query: Tensor
    key: Tensor
    value: Tensor
    start: Tensor
    end: Tensor
    key_mask: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    dropout_seed: Tensor | None
    scale: float
    softcap: float | None
    dropout_p: float
    trains: bool = False
    """Whether gradients follow."""
    fixed_splits: bool = False
    """Whether the caller has fixed the number of splits. There are none here, but what that number promises holds."""

    @classmethod
    def of(cls, arguments: Arguments, *, trains: bool, fixed_splits: bool = False) -> Problem:
        """The call with these arguments. The count of gaps is for kernels alone."""
        given = arguments._asdict()
        del given["gap_count"]
        return cls(**given, trains=trains, fixed_splits=fixed_splits)

    @property
    def apart(self) -> bool:
        """Whether no sequence's sums may depend on its neighbours, not even in their last bit."""
        return self.trains or self.fixed_splits

    @property
    def has_tiles(self) -> bool:
        """Whether every tile needs a mask of its own, beyond what spans say."""
        return self.key_mask is not None or self.mask is not None or self.bias is not None

    @property
    def fused(self) -> bool:
        """Whether torch's fused CPU attention can express this call."""
        return self.query.device.type == "cpu" and self.softcap is None and self.dropout_seed is None

    def plan(self, *, fused: bool) -> Plan:
        """How its batch is computed. What is written out has all keys of a row in one piece."""
        return self._fused_plan if fused else self._written_out_plan

    @cached_property
    def _fused_plan(self) -> Plan:
        return self._plan(fused=True)

    @cached_property
    def _written_out_plan(self) -> Plan:
        return self._plan(fused=False)

    def _plan(self, *, fused: bool) -> Plan:
        batch, query_len = self.query.shape[0], self.query.shape[2]
        tiles_only = self.has_tiles or not fused
        # A bias is there already; a mask is made for each tile, and small ones keep memory small.
        joins = fused and self.bias is not None and self.key_mask is self.mask is None
        sharing = None if self.apart else how_to_share(self.key, self.value, fused=fused)
        return plan_batch(
            self.start, self.end, batch, query_len, tiles_only=tiles_only, joins=joins, sharing=sharing,
            key_len=self.key.shape[2],
        )  # fmt: skip

    @cached_property
    def widened(self) -> Problem:
        """The problem in the accumulator's dtype, each head's keys together."""
        wide = accumulator(self.query.dtype)
        key, value = (
            tensor.contiguous() if tensor.dtype == wide else tensor.to(wide, memory_format=torch.contiguous_format)
            for tensor in (self.key, self.value)
        )
        return replace(self, query=self.query.to(wide), key=key, value=value)

    @cached_property
    def has_finite_values(self) -> bool:
        """Whether all values are finite, as far as their sum tells: that of large ones may not be."""
        return math.isfinite(self.value.sum())

    def pieces(self, plan: Plan, *, fused: bool) -> list[Group]:
        """The groups of its plan, with pieces as the forward pass computes them.

        Halves of a triangle are merged, which would round results of 16 bits. With AMX they are not worth it where each
        head has keys of its own, which then come from memory once for each square.
        """
        if not fused:
            return plan.groups
        if self.query.dtype != accumulator(self.query.dtype):
            return plan.in_tiles
        own_keys = self.query.shape[1] == self.key.shape[1]
        return plan.in_narrow_tiles if own_keys and processor.AMX else plan.halved


def how_to_share(key: Tensor, value: Tensor, *, fused: bool) -> Sharing:
    """What decides which sequences are decoded in one call."""
    threads, numbers_per_key = torch.get_num_threads(), key.shape[3] + value.shape[3]
    call_numbers = CALL_NUMBERS * (1 if fused else WRITTEN_OUT_CALLS)
    return Sharing(key.shape[1], threads, call_numbers // (threads * numbers_per_key))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of softmax statistics and of sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def has_nan(tensor: Tensor) -> bool:
    """Whether a tensor may hold NaN, in one pass over it: a sum is NaN if a term is."""
    return math.isnan(tensor.sum())
