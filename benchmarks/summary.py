# SPDX-License-Identifier: Apache-2.0
"""The last screen: why anything is missing, and what it all comes to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .measure import Result
from .providers import BASELINE, FALLBACK_BASELINE, OURS
from .rows import ABSENT, TIMES, baseline_of, distinct, results_of, speed, sweep_of
from .tables import COMPARED

NAMED = 8
"""Cases that a line of absences names; more are counted."""


def absences(results: Sequence[Result]) -> list[Text]:
    """Why results are missing, one line per reason; failed ones first and in red.

    What holds for training as it does for the kernels is said once.
    """
    lines: dict[str, Text] = {}
    for status, style in (("failed", "bold red"), ("unavailable", "dim")):
        missing = [result for result in results if result.status == status]
        for section, reason in dict.fromkeys((result.section, result.reason) for result in missing):
            rows = results_of(missing, section, reason=reason)
            providers, where = distinct(row.provider for row in rows), distinct(row.case for row in rows)
            everywhere = set(where) == {result.case for result in results_of(results, section)}
            text = ", ".join(providers)
            if not everywhere:
                named = where if status == "failed" or len(where) <= NAMED else [f"{len(where)} cases"]
                text += f" in {', '.join(named)}"
            text += (
                f" ({', '.join(distinct(row.dtype for row in rows))})" if status == "failed" and rows[0].dtype else ""
            )
            line = f"{status}: {text}: {reason}"
            if section in ("training", "backward") and line not in lines:
                line = f"{status} in {section}: {text}: {reason}"
            lines[line] = Text(line, style=style)
    return list(lines.values())


def closing_panel(results: Sequence[Result], machine: dict[str, Any], files: dict[str, Path]) -> Panel:
    """What was compared, the main ratios, and where the figures are, for someone who sees this for the first time."""
    failed = [result for result in results if result.status == "failed"]
    checked = sum(bool({"error", "gradients", "bound", "tokens_total"} & set(r.details)) for r in results)
    parts: list[Any] = [
        Text(f"{OURS} is this project's attention. It ran on {machine['device']} with {machine['threads']} threads.")
    ]
    if any(result.section in (*COMPARED, "models") for result in results):
        explanation = Text(
            "It took turns with the other attention implementations of Hugging Face transformers, on the same tensors. "
            f"Below is how many times as fast it is: 2.00{TIMES} is twice as fast as {BASELINE}, which transformers "
            f"uses by default; where {BASELINE} cannot run, {FALLBACK_BASELINE} stands in its place. A {ABSENT} in the "
            "tables above is something that could not run; the reasons are below the tables.\n"
        )
        parts += [explanation, main_ratios(results)]
    if (load := machine["load_before"]) is not None and load > 0.5:
        busy = (
            f"The load average was {load:.1f} before this began (programs that ran or waited for one of "
            f"{machine['cores']} cores, in the last minute); on a quiet machine figures are steadier."
        )
        parts.append(Text(busy, style="yellow"))
    if failed:
        parts.append(Text(f"{len(failed)} results FAILED; they are listed above and were not timed.", style="bold red"))
    elif checked:
        parts.append(Text(f"All {checked} results that were compared with the right answer are right.", style="green"))
    parts += [Text(f"{name}: {path}", overflow="fold") for name, path in files.items()]
    return Panel(Group(*parts), title="Summary", border_style="red" if failed else "green")


def main_ratios(results: Sequence[Result]) -> Table:
    """How many times as fast as the baseline this project is: one row per case or model, one column per dtype.

    Training has one row for all its cases, which are those of the kernels, and so has each sweep: the slowest and the
    fastest.
    """
    mine = [result for result in results if result.provider == OURS]
    ours = [result for result in mine if result.section in ("kernels", "models") and not sweep_of(result)]
    ranges = distinct_pairs(
        (result.section, sweep_of(result))
        for result in mine
        if result.section in COMPARED and (sweep_of(result) or result.section == "training")
    )
    dtypes = distinct(result.dtype for result in mine if result.section in (*COMPARED, "models"))
    table = Table(box=None, padding=(0, 1))
    for dtype in dtypes:
        table.add_column(dtype, justify="right", style="bold")
    table.add_column("than")
    table.add_column("at")
    for section, case in dict.fromkeys((result.section, result.case) for result in ours):
        cells, row, than = [], results_of(ours, section, case=case), ""
        for dtype in dtypes:
            baseline = baseline_of(results_of(results, section, case=case, dtype=dtype))
            mine = [result for result in row if result.dtype == dtype]
            ratio = speed(mine[0], baseline) if mine else None
            cells.append(ABSENT if ratio is None else f"{ratio:.2f}{TIMES}")
            than = than if ratio is None else baseline.provider
        table.add_row(*cells, than, row[0].description)
    for section, sweep in ranges:
        cells = [speed_range(results, section, sweep, dtype) for dtype in dtypes]
        what = {"kernels": "forward", "training": "forward and backward", "backward": "backward"}[section]
        where = f"the sweep {sweep}, {what}" if sweep else what
        table.add_row(*cells, BASELINE, f"{where}, wherever {BASELINE} runs: slowest and fastest case")
    return table


def distinct_pairs(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs without repetition, in order."""
    return list(dict.fromkeys(pairs))


def speed_range(results: Sequence[Result], section: str, sweep: str, dtype: str) -> str:
    """This project's smallest and largest speed relative to the baseline, without its stand-in."""
    rows = [result for result in results_of(results, section, dtype=dtype) if sweep_of(result) == sweep]
    bases = {result.case: result for result in rows if result.provider == BASELINE and result.measured}
    speeds = [speed(result, bases.get(result.case)) for result in rows if result.provider == OURS]
    ratios = [ratio for ratio in speeds if ratio is not None]
    return f"{min(ratios):.2f} to {max(ratios):.2f}{TIMES}" if ratios else ""
