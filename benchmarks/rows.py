# SPDX-License-Identifier: Apache-2.0
"""Results in groups, and figures as text: what tables, pages and pictures share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .measure import Result
from .providers import BASELINE, FALLBACK_BASELINE
from .work import Limits

TIMES = "\N{MULTIPLICATION SIGN}"
ABSENT = "-"
"""Stands in tables where there is no figure."""


def results_of(results: Iterable[Result], section: str, **fields: str) -> list[Result]:
    """The results of a section whose fields have the given values."""
    return [
        result
        for result in results
        if result.section == section and all(getattr(result, name) == value for name, value in fields.items())
    ]


def distinct(values: Iterable[str]) -> list[str]:
    """Values without repetition, in order."""
    return list(dict.fromkeys(values))


def baseline_of(row: Sequence[Result]) -> Result | None:
    """What the other results of a row are relative to: sdpa, or eager where sdpa cannot run it."""
    for name in (BASELINE, FALLBACK_BASELINE):
        for result in row:
            if result.provider == name and result.measured:
                return result
    return None


def speed(result: Result, baseline: Result | None) -> float | None:
    """How many times as fast as the baseline, or None where either has no figures."""
    if baseline is None or not result.measured:
        return None
    return baseline.median / result.median


def sweep_of(result: Result) -> str:
    """The sweep that a result belongs to, or an empty text."""
    return result.details.get("sweep", "")


def share_of_limit(result: Result, limits: Limits | None) -> float | None:
    """How near a result came to the least time in which its work could be done here; 1 is the limit."""
    work = result.details.get("work")
    if limits is None or work is None or not result.measured:
        return None
    least = limits.seconds(work["flops"], work["bytes"], result.dtype)
    return None if least is None else least / result.median


def milliseconds(result: Result) -> str:
    """Median and spread, with three digits of the median."""
    median, spread = 1000 * result.median, 1000 * result.spread
    digits = max(0, 2 - math.floor(math.log10(median))) if median > 0 else 2
    digits = min(digits, 3)
    return f"{median:,.{digits}f} ±{spread:.{digits}f}"


def human_bytes(count: float) -> str:
    """`1.5 MB` and the like, in powers of 1,024."""
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GB"
