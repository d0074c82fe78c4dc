# SPDX-License-Identifier: Apache-2.0
"""The kernels section: every case by every provider, and the time and size of the masks they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from attention_plugin import SpanMask

from .cases import Case, Problem, Sizes, build_problem
from .measure import Call, Effort, Result, build_reference, check, interleaved
from .providers import OURS, Provider


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def run_case(
    case: Case,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    providers: Sequence[Provider],
    effort: Effort,
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Check every provider on a case, then time those that are right, in turns.

    Masks are built beforehand, off the clock; their own time is in the section "masks".
    """
    problem = build_problem(case, sizes, dtype, device)
    reference = build_reference(problem)
    masks: dict[str, Any] = {}
    results: list[Result] = []
    calls: dict[str, Call] = {}
    # What was compiled for other cases only leads to slower guards, and in the end to torch's limit of variants.
    torch.compiler.reset()
    for provider in providers:
        say(f"{case.name} {dtype_name(dtype)}: checking {provider.name}")
        result = Result("kernels", case.name, provider.name, dtype_name(dtype), problem.description)
        results.append(result)
        if (reason := provider.unavailable(problem)) is not None:
            result.status, result.reason = "unavailable", reason
            continue
        try:
            if provider.mask_name not in masks:
                masks[provider.mask_name] = problem.mask_builder(provider.mask_name)()
            run = provider.bind(problem, masks[provider.mask_name])
            right = check(run(), reference, result)
        except Exception as error:  # whatever a peer raises is the reason why it has no figures
            result.status = "failed" if provider.name == OURS else "unavailable"
            result.reason = brief(error)
            continue
        if right:
            calls[provider.name] = Call(lambda _, run=run: run())
    samples = interleaved(calls, device, effort, lambda text: say(f"{case.name} {dtype_name(dtype)}: {text}"))
    for result in results:
        result.samples = samples.get(result.provider, [])
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
        except Exception as error:  # an implementation without a mask for this case
            result.status, result.reason = "unavailable", brief(error)
            continue
        calls[name] = Call(lambda _, build=build: build())
    samples = interleaved(calls, problem.query.device, effort)
    for result in results:
        result.samples = samples.get(result.provider, [])
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


def brief(error: Exception) -> str:
    """The first line of an error, with its kind."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= 200 else text[:197] + "..."
