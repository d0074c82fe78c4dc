# SPDX-License-Identifier: Apache-2.0
"""How much work a problem is, and the least time in which this machine could do it.

Only kept pairs of a row and a key count, and only what must be read or written once; both are counted from the spans of
the mask. An implementation that computes more than that has less to show for its time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention_kernels import Spans
from attention_plugin import SpanMask

from .measure import dtype_name
from .problem import Problem
from .providers import OURS

FORWARD_PRODUCTS = (1, 1)
"""Products over a pair's head dim and value dim: scores, and the sum of values."""

BACKWARD_PRODUCTS = (3, 2)
"""Scores once more and the gradients of query and key; the gradients of weights and value."""


@dataclass(frozen=True)
class Work:
    """What has to be done for a problem.

    Attributes:
        kept_pairs: pairs of a query row and a key that the mask keeps, over the batch, for one head.
        all_pairs: pairs that there are.
        flops: floating point operations of the matrix products over kept pairs; a multiplication and an addition are
            two.
        bytes: of what must be read and written at least once.
    """

    kept_pairs: int
    all_pairs: int
    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def to_json(self) -> dict[str, int]:
        """The fields by name."""
        return dict(vars(self))


def spans_of(problem: Problem) -> Spans:
    """The spans of a problem's mask, as this project's mask function builds them from what transformers hands it."""
    mask = problem.mask_builder(OURS)()
    if isinstance(mask, SpanMask):
        return mask.spans
    return Spans.full(problem.query.shape[2], problem.key.shape[2], device=problem.query.device)


def work_of(problem: Problem, *, forward: bool = True, backward: bool = False, cache_bytes: int | None = None) -> Work:
    """The work of a problem's forward pass, backward pass, or both. `cache_bytes` is the size of a key's number."""
    spans = spans_of(problem)
    batch, num_heads, query_len, head_dim = problem.query.shape
    num_kv_heads, key_len, value_dim = problem.key.shape[1], problem.key.shape[2], problem.value.shape[3]
    copies = batch // spans.batch
    pairs = spans.visible_pairs() * copies
    products = [FORWARD_PRODUCTS[index] * forward + BACKWARD_PRODUCTS[index] * backward for index in range(2)]
    flops = 2 * pairs * num_heads * (products[0] * head_dim + products[1] * value_dim)
    size = problem.query.element_size()
    rows = batch * query_len * num_heads
    keys = seen_keys(spans) * copies * num_kv_heads
    ends = rows * (head_dim + value_dim) * size + keys * (head_dim + value_dim) * (cache_bytes or size)
    bias = 0 if problem.bias is None else problem.bias.numel() * size
    # The backward pass reads what the forward pass read and wrote, and a gradient; it writes a gradient of each input.
    return Work(
        pairs,
        batch * query_len * key_len,
        flops,
        (ends + bias) * forward + (2 * ends + rows * value_dim * size + 2 * bias) * backward,
    )


def seen_keys(spans: Spans) -> int:
    """Keys that at least one row sees, summed over the batch of the spans."""
    shape = (spans.batch, spans.query_len)
    start, end = (bound.expand(shape).long().clamp(0, spans.key_len) for bound in (spans.start, spans.end))
    end = torch.maximum(start, end)
    steps = torch.zeros(spans.batch, spans.key_len + 1, dtype=torch.long, device=start.device)
    ones = torch.ones_like(start)
    steps.scatter_add_(1, start, ones).scatter_add_(1, end, -ones)
    return int((steps.cumsum(1) > 0).sum())


# ---------------------------------------------------------------------- limits of the machine


@dataclass(frozen=True)
class Limits:
    """What this machine reaches at best, measured: a large matrix product by dtype, and a large copy.

    Attributes:
        flops_per_second: by dtype.
        bytes_per_second: read and written together.
    """

    flops_per_second: dict[str, float]
    bytes_per_second: float

    def seconds(self, flops: float, bytes_moved: float, dtype: str) -> float | None:
        """The least time in which work could be done, or None for a dtype that was not measured."""
        if dtype not in self.flops_per_second:
            return None
        return max(flops / self.flops_per_second[dtype], bytes_moved / self.bytes_per_second)

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return dict(vars(self))


def measure_limits(device: torch.device, dtypes: Sequence[torch.dtype], seconds: float = 0.4) -> Limits:
    """Time a matrix product in each dtype, and a copy, each for `seconds`; the best sample counts.

    Operands of 16 bits can be widened and multiplied in float32 as well, which is by far the faster way on a CPU
    without instructions for them: their limit is the better of the two.
    """
    side, count = (8192, 2**28) if device.type == "cuda" else (1024, 2**25)

    @functools.cache
    def product(dtype: torch.dtype) -> float:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return 2 * side**3 / _best_seconds(lambda: left @ right, device, seconds)

    flops = {
        dtype_name(dtype): max(product(dtype), product(torch.float32)) if dtype.itemsize == 2 else product(dtype)
        for dtype in dtypes
    }
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device, seconds)
    return Limits(flops, copied)


def _best_seconds(run: Callable[[], Tensor], device: torch.device, budget: float) -> float:
    """The shortest of the calls that fit the budget; the first is warm-up."""
    run()
    samples: list[float] = []
    begun = time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - begun < budget:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - started)
    return min(samples)
