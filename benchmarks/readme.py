# SPDX-License-Identifier: Apache-2.0
"""The tables and the picture of README.md and docs/performance.md, drawn from the saved run on two cores."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .bars import bars
from .measure import Result
from .plots import png
from .providers import BASELINE, FALLBACK_BASELINE, OURS
from .rows import baseline_of, results_of, speed
from .saved import load, results_in

ROOT = Path(__file__).resolve().parents[1]
SAVED = ROOT / "benchmarks" / "results" / "cpu-2-cores.json"
PICTURE = ROOT / "docs" / "benchmark.png"
DTYPES = ("float32", "bfloat16")
COLUMNS = (OURS, BASELINE, "flex_attention", FALLBACK_BASELINE)


def ratio(results: Sequence[Result], section: str, case: str, dtype: str) -> str:
    """This project's speed relative to the baseline; empty where either has no figure."""
    row = results_of(results, section, case=case, dtype=dtype)
    ours = next((result for result in row if result.provider == OURS), None)
    value = None if ours is None else speed(ours, baseline_of(row))
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def ratio_table(results: Sequence[Result]) -> str:
    """Times as fast as the baseline, for README.md."""
    lines = [
        f"| times as fast as `{BASELINE}`, as transformers calls it | {' | '.join(DTYPES)} |",
        "| --- | --- | --- |",
    ]
    for section in ("kernels", "models"):
        rows = [result for result in results_of(results, section) if result.provider == OURS]
        for case, description in {result.case: result.description for result in rows}.items():
            base = baseline_of(results_of(results, section, case=case))
            note = "" if base is None or base.provider == BASELINE else f" (against {base.provider})"
            cells = " | ".join(ratio(results, section, case, dtype) for dtype in DTYPES)
            lines.append(f"| {description}{note} | {cells} |")
    return "\n".join(lines)


def milliseconds_table(results: Sequence[Result]) -> str:
    """Medians of each implementation, for docs/performance.md."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for case in dict.fromkeys(result.case for result in results_of(results, "kernels")):
        for dtype in DTYPES:
            row = {result.provider: result for result in results_of(results, "kernels", case=case, dtype=dtype)}
            if row:
                found = [row.get(name) for name in COLUMNS]
                cells = [f"{1e3 * each.median:,.1f}" if each is not None and each.measured else "-" for each in found]
                lines.append(f"| {next(iter(row.values())).description}, {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = (
    (ROOT / "README.md", "ratios", ratio_table),
    (ROOT / "docs" / "performance.md", "milliseconds", milliseconds_table),
)


def replaced(text: str, name: str, table: str) -> str:
    """The text with the table between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    begin, end = f"<!-- {name}: drawn by `python -m benchmarks readme` -->\n", f"\n<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the marks {begin.strip()!r} and {end.strip()!r} must both be there")
    return before + begin + table + end + after


def run_readme(arguments: Sequence[str], parser: argparse.ArgumentParser, console: Console) -> int:
    """The command `readme`: 0, or 2 with one line where the run cannot be used."""
    parser.add_argument("--take", type=Path, metavar="PATH", help="JSON of a run to save in place of the saved one")
    options = parser.parse_args(arguments)
    try:
        document = load(options.take or SAVED)
    except ValueError as error:
        parser.error(str(error))
    if options.take is not None:
        missing = {"kernels", "models"} - {row["section"] for row in document["results"]}
        if missing or document["machine"]["device_type"] != "cpu" or document["arguments"]["quick"]:
            parser.error(f"--take: {options.take} must be a whole run on the CPU, not --quick; run `make bench`")
        SAVED.write_bytes(options.take.read_bytes())
    results = results_in(document)
    for path, name, table in TABLES:
        path.write_text(replaced(path.read_text(encoding="utf-8"), name, table(results)), encoding="utf-8")
        console.print(str(path.relative_to(ROOT)))
    figure = bars(results, document["machine"], None)
    if figure is not None:
        PICTURE.write_bytes(png(figure))
    console.print(str(PICTURE.relative_to(ROOT)))
    return 0
