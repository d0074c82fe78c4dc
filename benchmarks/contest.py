# SPDX-License-Identifier: Apache-2.0
"""What the sections that compare providers share: each must be right before it may take turns on the clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .measure import Call, Effort, Result, brief, dtype_name, interleaved
from .providers import OWN, Provider
from .work import Work

Run = Callable[[], Any]
"""What is timed: one provider on one problem."""

Judge = Callable[[Run, Result], bool]
"""Runs a provider once and says whether it is right; notes in the result what it found."""


def enter(section: str, problem: Any, providers: Sequence[Any], work: Work, label: str | None = None) -> list[Result]:
    """An empty result for each provider, with how much there is to do; `label` in place of the case's name.

    The problem is a `Problem`, or beside a label of another kind that has a query, a description and a shape.
    """
    dtype, description = dtype_name(problem.query.dtype), problem.description
    details = {"work": work.to_json(), "shape": problem.shape}
    return [
        Result(section, label or problem.case.name, provider.name, dtype, description, details=dict(details))
        for provider in providers
    ]


def admit(
    problem: Any,
    providers: Sequence[Any],
    results: Sequence[Result],
    judge: Judge,
    say: Callable[[str], None],
    bind: Callable[[Any, Any, Any], Run] = Provider.bind,
) -> dict[str, Run]:
    """What may be timed, by provider's name: those that can run the problem, and are right.

    The problem is a `Problem` and the providers are `Provider`s, or both of another kind that `bind` knows.

    Why others are not is noted in their results, one per provider; a provider whose result already says so is left out.
    Masks are built here, off the clock; their own time is in the section "masks".
    """
    masks: dict[str, Any] = {}
    runs: dict[str, Run] = {}
    # What was compiled for other problems only leads to slower guards, to kernels for any length in place of this one,
    # and in the end to torch's limit of variants.
    torch.compiler.reset()
    for provider, result in zip(providers, results, strict=True):
        if result.status != "ok":
            continue
        say(f"{result.case} {result.dtype}: checking {provider.name}")
        if (reason := provider.unavailable(problem)) is not None:
            result.status, result.reason = "unavailable", reason
            continue
        try:
            name = provider.mask_name
            if name is not None and name not in masks:
                masks[name] = problem.mask_builder(name)()
            run = bind(provider, problem, masks.get(name))
            if judge(run, result):
                runs[provider.name] = run
        except Exception as error:
            note_reason(result, brief(error))
    return runs


def take_turns(
    runs: dict[str, Any],
    results: Sequence[Result],
    device: torch.device,
    effort: Effort,
    say: Callable[[str], None] = lambda text: None,
    to_call: Callable[[Any], Call] = lambda run: Call(lambda _: run()),
) -> None:
    """Time what was admitted; the samples go into the results, and so does what is raised meanwhile."""
    calls = {name: to_call(run) for name, run in runs.items()}
    where = f"{results[0].case} {results[0].dtype}" if results else ""
    errors: dict[str, str] = {}
    samples = interleaved(calls, device, effort, lambda text: say(f"{where}: {text}"), errors)
    for result in results:
        result.samples = samples.get(result.provider, [])
        if result.provider in errors:
            note_reason(result, f"while it was timed: {errors[result.provider]}")


def note_reason(result: Result, reason: str) -> None:
    """Whatever a peer raises is the reason why it has no figures; what this project raises is a failure."""
    result.status, result.reason = "failed" if result.provider in OWN else "unavailable", reason
