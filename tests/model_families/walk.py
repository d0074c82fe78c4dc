# SPDX-License-Identifier: Apache-2.0
"""One family after the other: which of its classes are built, what they were compared in, and what came out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from attention_plugin import support

from . import compare
from .build import CROSS, Pair, pair
from .discover import Family, family
from .overrides import CHOSEN, IMPLEMENTATIONS

Row = dict[str, Any]


def examine(folder: str, checks: dict[str, Callable[[Pair], float]] | None = None) -> Row:
    """Compare as many classes of a family as it takes to see all of its attention classes at work.

    Returns:
        `folder`; `models`, one entry for each class that was compared; `unseen`, attention classes that were not
        reached; `obstacles`, why classes could not be built or run, by name.
    """
    about = family(folder)
    seen: set[str] = set()
    row: Row = {"folder": folder, "models": [], "unseen": [], "obstacles": {}}
    for name in candidates(about):
        wanted = about.attention_classes - seen
        if row["models"] and (not wanted or (name.endswith(CROSS) and not any("Cross" in each for each in wanted))):
            continue
        try:
            entry, reached = examine_class(folder, name, checks)
        except Exception as error:
            row["obstacles"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        if reached and (not row["models"] or reached & wanted):
            row["models"].append(entry)
            seen |= reached
    row["unseen"] = sorted(about.attention_classes - seen)
    return row


def candidates(about: Family) -> list[str]:
    """Classes to try; those that switch cross attention on come last."""
    if about.folder in CHOSEN:
        return CHOSEN[about.folder]
    names = [name for name in about.model_classes if not name.endswith("MultipleChoice")]
    cross = [name + CROSS for name in names if name.endswith(("ForCausalLM", "LMHeadModel", "Decoder"))]
    return names + cross


def examine_class(
    folder: str, name: str, checks: dict[str, Callable[[Pair], float]] | None = None
) -> tuple[Row, set[str]]:
    """Compare one class in everything that applies to it."""
    support.log_once.cache_clear()
    with said() as messages:
        built = pair(folder, name)
        entry: Row = {"class": name, "checks": {}}
        with compare.recorded() as reached:
            for check, function in (checks or compare.CHECKS).items():
                entry["checks"][check] = result(function, built)
        if reached and checks is None:
            entry["sensitivity"] = result(compare.sensitivity, built)
    entry["dense"] = any("dense" in message for message in messages)
    if name in IMPLEMENTATIONS:
        entry["implementation"] = IMPLEMENTATIONS[name]
    return entry, reached


def result(check: Callable[[Pair], float], built: Pair) -> float | str:
    """The error of a check, or in words why there is none."""
    try:
        error = check(built)
        if not error < compare.TOLERANCE and check in compare.CHECKS.values():
            return in_float64(check, built) or error
        return error
    except compare.NotApplicable as reason:
        return f"not applicable: {reason}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def in_float64(check: Callable[[Pair], float], built: Pair) -> str | None:
    """The error in float64, where it is small there: random weights can make a model too sensitive for float32."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    models = (built.eager, built.ours)
    try:
        for model in models:
            model.double()
        inputs = {name: double(value) for name, value in built.inputs.items()}
        error = check(Pair(built.name, *models, inputs))
    finally:
        for model in models:
            model.float()
    return f"float64: {error:.0e}" if error < 1e-8 else None


def passed(row: Row) -> bool:
    """Whether a family was compared, and everything that applies to it was equal."""
    return bool(row["models"]) and all(
        value < compare.TOLERANCE if isinstance(value, float) else value.startswith(("not applicable", "float64"))
        for entry in row["models"]
        for value in entry["checks"].values()
    )


@contextmanager
def said() -> Iterator[list[str]]:
    """What the plugin logs."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect()
    support.logger.addHandler(handler)
    try:
        yield messages
    finally:
        support.logger.removeHandler(handler)
