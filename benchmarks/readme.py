# SPDX-License-Identifier: Apache-2.0
"""The tables, sentences and the picture of README.md and docs/performance.md, drawn from the saved run on two cores."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .bars import bars
from .measure import Result
from .plots import png
from .providers import BASELINE, FALLBACK_BASELINE, OURS
from .rows import baseline_of, human_bytes, results_of, speed, sweep_of
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
        rows = [each for each in results_of(results, section) if each.provider == OURS and not sweep_of(each)]
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


def measured_on(document: dict[str, Any]) -> str:
    """The machine and the versions, in a sentence."""
    machine, versions = document["machine"], document["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    where = f"{machine['threads']} threads of {machine['processor']} ({machine['capabilities']}); {packages}"
    return f"One run of `make bench` on {where}, {document['date'][:10]}."


def small_things(document: dict[str, Any]) -> str:
    """Masks and memory, in a sentence each."""
    results = results_in(document)
    parts = []
    masks = {each.provider: each for each in results_of(results, "masks") if each.case.startswith("left_padded, ")}
    if {OURS, BASELINE} <= set(masks) and all(each.measured for each in masks.values()):
        ours, theirs = masks[OURS], masks[BASELINE]
        parts.append(
            f"The mask of {ours.case.split(', ')[1].replace(' tokens', '')} left-padded tokens takes "
            f"{1e3 * ours.median:.2f} ms and {human_bytes(ours.details['bytes'])}, against {theirs.median:.1f} s and "
            f"{human_bytes(theirs.details['bytes'])}."
        )
    peaks = {(each.provider, each.case): each.median for each in results_of(results, "memory") if each.measured}
    cases = [case for name, case in peaks if name == OURS and (BASELINE, case) in peaks]
    if cases:
        parts.append(
            f"A padded forward pass over {cases[-1]} peaks at {human_bytes(peaks[OURS, cases[-1]])} above its inputs, "
            f"against {human_bytes(peaks[BASELINE, cases[-1]])}."
        )
    return "\n".join(parts)


Draw = Callable[[dict[str, Any]], str]
PERFORMANCE = ROOT / "docs" / "performance.md"
DRAWN: tuple[tuple[Path, str, Draw], ...] = (
    (ROOT / "README.md", "machine", measured_on),
    (ROOT / "README.md", "ratios", lambda document: ratio_table(results_in(document))),
    (ROOT / "README.md", "masks and memory", small_things),
    (PERFORMANCE, "machine", measured_on),
    (PERFORMANCE, "milliseconds", lambda document: milliseconds_table(results_in(document))),
)
"""What is drawn where: a file, the name of the marks in it, and the text between them."""


def replaced(text: str, name: str, drawn: str) -> str:
    """The text with what is drawn between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    begin, end = f"<!-- {name}: drawn by `python -m benchmarks readme` -->\n", f"\n<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the marks {begin.strip()!r} and {end.strip()!r} must both be there")
    return before + begin + drawn + end + after


def run_readme(arguments: Sequence[str], parser: argparse.ArgumentParser, console: Console) -> int:
    """Draw the tables and the picture of README.md and docs/performance.md from a saved run."""
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
    for path, name, draw in DRAWN:
        path.write_text(replaced(path.read_text(encoding="utf-8"), name, draw(document)), encoding="utf-8")
    for path in dict.fromkeys(path for path, _, _ in DRAWN):
        console.print(str(path.relative_to(ROOT)))
    figure = bars(results_in(document), document["machine"], None)
    if figure is not None:
        PICTURE.write_bytes(png(figure))
    console.print(str(PICTURE.relative_to(ROOT)))
    return 0
