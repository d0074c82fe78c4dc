# SPDX-License-Identifier: Apache-2.0
"""The table of engines, models, parallelism and attention backends, and its copy in docs/engines.md.

python tests/engines/engine_table.py check    # whether the copy is what the last complete run found
python tests/engines/engine_table.py write    # make it so
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
FOUND = REPOSITORY / "build" / "engines.md"
"""Where a complete run of the tests leaves its table."""

DOCUMENT = REPOSITORY / "docs" / "engines.md"
BEGIN, END = "<!-- table of make test-engines -->\n", "<!-- end of the table -->"


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


def main() -> int:
    """Compare or copy; 1 where they differ, 2 for a call that makes no sense."""
    if sys.argv[1:] not in (["check"], ["write"]) or not FOUND.exists():
        print(f"usage: engine_table.py check|write, after a complete run has left {FOUND}", file=sys.stderr)
        return 2
    table, document = FOUND.read_text(), DOCUMENT.read_text()
    updated = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: BEGIN + table + END, document, flags=re.DOTALL)
    if sys.argv[1] == "write":
        DOCUMENT.write_text(updated)
    elif document != updated:
        print(f"the table in {DOCUMENT} is not what the tests found; run `engine_table.py write`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
