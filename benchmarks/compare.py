# SPDX-License-Identifier: Apache-2.0
"""Compare two saved runs row by row: the ratio of medians, with a confidence interval from the samples themselves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .rows import TIMES
from .saved import load

RESAMPLES = 2000
CONFIDENCE = 0.95
UNSEEN = "no difference seen"
Key = tuple[str, str, str, str]
"""Section, case, dtype and provider of a row."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast the second run is as the first, with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def described(self) -> str:
        """The ratio and both ends, for a table."""
        return f"{self.value:.2f}{TIMES} ({self.low:.2f} to {self.high:.2f})"

    @property
    def verdict(self) -> str:
        """`faster` or `slower` where the interval leaves 1 out, else `no difference seen`."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else UNSEEN


def medians_of(samples: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    """Medians of `RESAMPLES` samples of the samples."""
    return np.median(generator.choice(np.asarray(samples), (RESAMPLES, len(samples))), axis=1)


def interval(value: float, resampled: np.ndarray) -> Ratio:
    """A ratio with the percentile bootstrap's interval."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(value, float(low), float(high))


def ratio_of(before: Sequence[float], after: Sequence[float]) -> Ratio:
    """Ratio of the medians; each run is resampled by itself."""
    generator = np.random.default_rng(0)
    first, second = (medians_of(samples, generator) for samples in (before, after))
    return interval(float(np.median(before) / np.median(after)), first / second)


def relative_ratio_of(
    before: tuple[Sequence[float], Sequence[float]], after: tuple[Sequence[float], Sequence[float]]
) -> Ratio:
    """Ratio of what two runs found as a provider's speed relative to its baseline.

    Each pair is the provider's samples and its baseline's, which took turns: noise of the machine meets both.
    """
    generator = np.random.default_rng(0)
    speeds = [medians_of(base, generator) / medians_of(own, generator) for own, base in (before, after)]
    values = [np.median(base) / np.median(own) for own, base in (before, after)]
    return interval(float(values[1] / values[0]), speeds[1] / speeds[0])


@dataclass(frozen=True)
class Row:
    """A timed row of a saved run: samples in seconds, its own and its baseline's (None for the baseline itself)."""

    samples: list[float]
    baseline: list[float] | None


def timed_rows(document: dict[str, Any]) -> dict[Key, Row]:
    """Every row that has samples."""
    timed = {
        (row["section"], row["case"], row["dtype"], row["provider"]): row
        for row in document["results"]
        if row["status"] == "ok" and row["unit"] == "s" and row["samples"]
    }
    rows = {}
    for key, row in timed.items():
        base = None if row["baseline"] in (None, row["provider"]) else timed.get((*key[:3], row["baseline"]))
        rows[key] = Row(row["samples"], None if base is None else base["samples"])
    return rows


@dataclass(frozen=True)
class Change:
    """What became of a row: in itself, and relative to its baseline where both runs have one."""

    ratio: Ratio
    relative: Ratio | None


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[Key, Change]:
    """The change of every row that both runs timed."""
    first, second = timed_rows(before), timed_rows(after)
    changes = {}
    for key in first:
        if key in second:
            one, two = first[key], second[key]
            relative = None
            if one.baseline is not None and two.baseline is not None:
                relative = relative_ratio_of((one.samples, one.baseline), (two.samples, two.baseline))
            changes[key] = Change(ratio_of(one.samples, two.samples), relative)
    return changes


def comparison_table(changes: dict[Key, Change], title: str) -> Table:
    """One line for each row."""
    table = Table("section", "case", "dtype", "implementation", title=title)
    for heading in ("times as fast, 95 % interval", "", "relative to its baseline"):
        table.add_column(heading, justify="right")
    styles = {"faster": "green", "slower": "yellow"}
    for key, change in changes.items():
        verdict = change.ratio.verdict
        shown = [change.ratio.described, "" if verdict == UNSEEN else verdict]
        if change.relative is not None:
            shown.append(change.relative.described)
        # Noise of the machine is in the first ratio, not in the second.
        table.add_row(*key, *shown, style=styles.get((change.relative or change.ratio).verdict))
    return table


def widest(changes: dict[Key, Change]) -> str:
    """By how much the two runs differ at most, in a sentence."""
    relative = [change.relative.value for change in changes.values() if change.relative is not None]
    if not relative:
        return ""
    far = max(relative, key=lambda value: abs(np.log(value)))
    near = sum(abs(value - 1) <= 0.15 for value in relative)
    agree = f"{near} of {len(relative)} rows agree within 15 %"
    return f"Relative to their baselines {agree}; the furthest is {far:.2f}{TIMES}."


def run_compare(arguments: Sequence[str], parser: argparse.ArgumentParser, console: Console) -> int:
    """Compare two saved runs row by row, with confidence intervals.

    0, or 2 with one line where a file cannot be used.
    """
    parser.add_argument("before", type=Path, help="JSON of the run that is 1.00")
    parser.add_argument("after", type=Path, help="JSON of the run to compare with it")
    options = parser.parse_args(arguments)
    try:
        documents = [load(path) for path in (options.before, options.after)]
    except ValueError as error:
        parser.error(str(error))
    changes = compare(*documents)
    if not changes:
        parser.error("the two runs have no timed row in common; give runs of the same sections, cases and dtypes")
    console.print(comparison_table(changes, f"{options.after}: times as fast as {options.before}"))
    console.print(widest(changes))
    machines = [document["machine"]["device"] for document in documents]
    if machines[0] != machines[1]:
        console.print(f"The runs are of different machines: {machines[0]}, {machines[1]}.", style="yellow")
    return 0
