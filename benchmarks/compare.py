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
Key = tuple[str, str, str, str]
"""Section, case, dtype and provider of a row."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast the second run is as the first, with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`faster` or `slower` where the interval leaves 1 out, else `no difference seen`."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference seen"


def ratio_of(before: Sequence[float], after: Sequence[float]) -> Ratio:
    """Ratio of the medians, and the percentile bootstrap's interval of it; each run is resampled by itself."""
    generator = np.random.default_rng(0)
    medians = [
        np.median(generator.choice(np.asarray(samples), (RESAMPLES, len(samples))), axis=1)
        for samples in (before, after)
    ]
    low, high = np.quantile(medians[0] / medians[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(np.median(before) / np.median(after)), float(low), float(high))


def timed_rows(document: dict[str, Any]) -> dict[Key, list[float]]:
    """Samples in seconds of every row that has some."""
    return {
        (row["section"], row["case"], row["dtype"], row["provider"]): row["samples"]
        for row in document["results"]
        if row["status"] == "ok" and row["unit"] == "s" and row["samples"]
    }


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[Key, Ratio]:
    """The ratio of every row that both runs timed."""
    first, second = timed_rows(before), timed_rows(after)
    return {key: ratio_of(first[key], second[key]) for key in first if key in second}


def comparison_table(ratios: dict[Key, Ratio], title: str) -> Table:
    """One line for each row."""
    table = Table("section", "case", "dtype", "implementation", title=title)
    for heading in ("times as fast", "95 % interval", ""):
        table.add_column(heading, justify="right")
    styles = {"faster": "green", "slower": "yellow"}
    for key, ratio in ratios.items():
        interval = f"{ratio.low:.2f} to {ratio.high:.2f}"
        table.add_row(*key, f"{ratio.value:.2f}{TIMES}", interval, ratio.verdict, style=styles.get(ratio.verdict))
    return table


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
    ratios = compare(*documents)
    if not ratios:
        parser.error("the two runs have no timed row in common; give runs of the same sections, cases and dtypes")
    console.print(comparison_table(ratios, f"{options.after}: times as fast as {options.before}"))
    machines = [document["machine"]["device"] for document in documents]
    if machines[0] != machines[1]:
        console.print(f"The runs are of different machines: {machines[0]}, {machines[1]}.", style="yellow")
    return 0
