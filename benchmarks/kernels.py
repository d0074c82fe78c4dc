# SPDX-License-Identifier: Apache-2.0
"""The kernels section: every case by every provider, and the time and size of the masks they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from attention_plugin import SpanMask

from . import contest
from .cases import Case, Sizes
from .measure import Call, Effort, Result, brief, build_reference, check
from .problem import Problem, build_problem
from .providers import Provider
from .work import work_of


@torch.no_grad()
def run_case(
    case: Case,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    providers: Sequence[Provider],
    effort: Effort,
    say: Callable[[str], None] = lambda text: None,
    label: str | None = None,
) -> list[Result]:
    """Check every provider on a case, then time those that are right, in turns.

    Masks are built beforehand, off the clock; their own time is in the section "masks".
    """
    problem = build_problem(case, sizes, dtype, device)
    reference = build_reference(problem)
    results = contest.enter("kernels", problem, providers, work_of(problem), label)
    runs = contest.admit(problem, providers, results, lambda run, result: check(run(), reference, result), say)
    contest.take_turns(runs, results, device, effort, say)
    return results


@torch.no_grad()
def run_masks(
    case: Case, sizes: Sizes, device: torch.device, mask_names: Sequence[str], effort: Effort
) -> list[Result]:
    """Time how long transformers takes to build a case's mask for each implementation, and count its bytes."""
    problem = build_problem(case, sizes, torch.float32, device)
    return time_masks(problem, mask_names, effort)


def time_masks(problem: Problem, mask_names: Sequence[str], effort: Effort) -> list[Result]:
    """As `run_masks`, of a problem."""
    results, calls = [], {}
    for name in mask_names:
        result = Result("masks", problem.case.name, name, description=problem.description)
        results.append(result)
        build = problem.mask_builder(name)
        try:
            result.details["bytes"] = mask_bytes(build())
        except Exception as error:  # a peer without a mask for this case
            contest.note_reason(result, brief(error))
            continue
        calls[name] = Call(lambda _, build=build: build(), repeatable=True, bound_by_python=True)
    contest.take_turns(calls, results, problem.query.device, effort, to_call=lambda call: call)
    return results


def mask_bytes(mask: Any) -> int:
    """Bytes that a mask holds; 0 for no mask."""
    if mask is None:
        return 0
    if isinstance(mask, SpanMask):
        return mask.spans.nbytes
    if isinstance(mask, BlockMask):
        return sum(part.nbytes for part in mask.as_tuple() if isinstance(part, torch.Tensor))
    return mask.nbytes
