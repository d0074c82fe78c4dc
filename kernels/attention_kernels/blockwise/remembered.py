# SPDX-License-Identifier: Apache-2.0
"""Calls that differ from an earlier one only in the values of their tensors: `first` makes one, `again` its repeats.

The layers of a model make such calls one after the other. On the CPU checking and planning one takes longer than
computing a short prompt does, and after each layer's keys and values have passed through the caches a step of Python
costs as much as reading a hundred keys. So calls are checked and planned once: `first` keeps what `again` needs. Steps
of decoding, and rows that torch's fused attention computes in one call, have short ways of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..spans import Spans
from . import tokens
from .attend import forward, is_one_call
from .fused import FEWEST_FOUND, FusedCall, fused_call, is_multiplied_as_given, may_have_wrong_nan
from .operands import KEPT_SCORES
from .plan import Group, versions
from .problem import Problem, has_nan
from .sinks import with_sinks, without_share_of

MOST_SPANS = 4
"""Spans whose calls are remembered: full and windowed layers take turns, and so may two models."""

Compute = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None] | None]
"""Output and, if the last argument says so, log-sum-exp of query, key, value and scale.

None if the output may have a NaN of a key that its row does not see: whose it is takes care to find out.
"""


class Known(NamedTuple):
    """A call that has been checked: its spans and their state, what else decides about it, and how it is computed."""

    spans: weakref.ref[Spans]
    versions: tuple[int | bytes, int | bytes]
    kind: tuple
    compute: Compute


_known: dict[int, Known] = {}


def again(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None,
    sinks: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Output and, if asked for, log-sum-exp of a call without gradients that is like a remembered one.

    None if no such call is remembered, or if its short way found a NaN that may not be the row's own.
    """
    known = _known.get(id(spans))
    if known is None or spans is None or known.spans() is not spans:
        return None
    if known.versions != versions(spans.start, spans.end) or known.kind != kind_of(query, key, value, sinks, scale):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    scale = query.shape[3] ** -0.5 if scale is None else scale
    result = known.compute(query, key, value, scale, return_lse or sinks is not None)
    if result is None:
        return None
    output, lse = result
    if lse is None or return_lse:
        return (output, None) if lse is None else with_sinks(output, lse, sinks)
    return output if sinks is None else without_share_of(sinks, output, lse), None


def first(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, sinks: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp of a checked call without gradients and masks; `again` then serves its repeats.

    None if it is not served, or a short way found NaN.
    """
    if query.device.type != "cpu" or spans.key_mask is not None or not query.numel():
        return None
    given_scale, scale = scale, query.shape[3] ** -0.5 if scale is None else scale
    compute = compute_of(problem_of(spans.start, spans.end, query, key, value, scale))
    result = compute(query, key, value, scale, True)
    if result is None or result[1] is None:
        return None
    for oldest in list(_known)[: max(0, len(_known) - MOST_SPANS + 1)]:
        _known.pop(oldest, None)  # another thread may have been faster
    kind = kind_of(query, key, value, sinks, given_scale)
    _known[id(spans)] = Known(weakref.ref(spans), versions(spans.start, spans.end), kind, compute)
    return with_sinks(result[0], result[1], sinks)


def kind_of(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float | None) -> tuple:
    """All that decides whether a call is allowed and how it is computed, besides its spans."""
    return (
        query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(), query.dtype, key.dtype,
        value.dtype, query.device, key.device, value.device, scale,
        None if sinks is None else (sinks.shape, sinks.dtype, sinks.device),
    )  # fmt: skip


def problem_of(start: Tensor, end: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Problem:
    """A call with spans alone."""
    nothing_else = (None,) * 5
    return Problem(query, key, value, start, end, *nothing_else, scale, None, 0.0)


def compute_of(problem: Problem) -> Compute:
    """How a call is computed: the shortest way that serves it."""
    if (parts := tokens.parts_of(problem)) is not None:
        # Without masks every row sees all keys of its part, and a NaN is its own.
        may_be_wrong = any(part.mask is not None or part.keys.stop - part.keys.start < FEWEST_FOUND for part in parts)
        return partial(decode, parts, may_be_wrong)
    plan = problem.plan(fused=True)
    return at_once(problem, problem.pieces(plan, fused=True)) or partial(attend_planned, problem.start, problem.end)


def at_once(problem: Problem, groups: list[Group]) -> Compute | None:
    """How to compute a call that is a single call of torch's fused attention; None for other calls."""
    query, key, value = problem.query, problem.key, problem.value
    if not is_multiplied_as_given(problem) or query.shape[3] != value.shape[3]:
        return None
    if not is_one_call(groups, problem, fused=True):
        return None
    elements, (piece,), _ = groups[0]
    dense = query.stride(3) == key.stride(3) == value.stride(3) == 1
    if piece.blind or not dense:
        return None
    call = fused_call(problem, elements, piece, query, key)
    if call.mask is not None and call.mask.numel() > KEPT_SCORES:
        return None  # it would outlive its plan
    keys = None if piece.keys == slice(0, key.shape[2]) else piece.keys
    return partial(attend_at_once, call, keys)


def decode(
    parts: list[tokens.Part],
    may_be_wrong: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """A step of decoding: see `Compute`."""
    output, lse = tokens.attend(query, key, value, scale, parts, with_lse=with_lse)
    return None if may_be_wrong and has_nan(output) else (output, lse)


def attend_at_once(
    call: FusedCall, keys: slice | None, query: Tensor, key: Tensor, value: Tensor, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Rows that one call of torch's fused attention computes over some `keys`, or all: see `Compute`."""
    if keys is not None:
        key, value = key[:, :, keys], value[:, :, keys]
    output, lse = call(query, key, value, scale)
    hides = call.causal or call.mask is not None or key.shape[2] < FEWEST_FOUND
    if hides and may_have_wrong_nan(value, output, lse, last_sees_all=call.causal):
        return None
    by_token = output.transpose(1, 2)
    if not by_token.is_contiguous():  # the output is stored as the queries are
        output = by_token.contiguous().transpose(1, 2)
    return output, lse.contiguous() if with_lse else None


def attend_planned(
    start: Tensor, end: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows with spans from `start` to `end` in the pieces of their plan: see `Compute`."""
    output, lse, _ = forward(problem_of(start, end, query, key, value, scale))
    return output, lse if with_lse else None
