# SPDX-License-Identifier: Apache-2.0
"""The table of engines, models, parallelism and attention backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Cell(NamedTuple):
    """One way of serving a model, and what its tokens were compared with."""

    engine: str
    model: str
    parallel: str
    attention: str
    dtype: str
    equal_to: str


def table_of(cells: Sequence[tuple[Cell, str]]) -> str:
    """Markdown, a line each, in a fixed order; outcomes other than "passed" in capitals."""
    lines = [
        "| engine | model | parallel | attention | dtype | tokens equal to |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell, outcome in sorted(set(cells)):
        last = cell.equal_to if outcome == "passed" else f"{outcome.upper()}, not equal to {cell.equal_to}"
        lines.append("| " + " | ".join([*cell[:-1], last]) + " |")
    return "\n".join(lines) + "\n"
