# SPDX-License-Identifier: Apache-2.0
"""The report as a table for a terminal, as JSON, and as the tables of a Markdown file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from attention_kernels.config_tables import SHARED_MEMORY

from ..command import UsageError, require
from .rows import Row, broken_limits

COLUMNS = (
    "kernel", "bits", "dim", "tile", "registers", "spills", "shared", "resident", "matrix", "waits", "TMA", "in flight",
    "loop",
    "binding", "share",
)  # fmt: skip
BEGIN, END = "<!-- compile report: drawn by `make compile-report` -->", "<!-- end of the compile report -->"


def cells(row: Row) -> tuple[str, ...]:
    """One row as text, in the order of `COLUMNS`."""
    case, code, loop = row.case, row.code, row.code.loop
    config = case.config
    tile = "-" if config is None else f"{config.block_m}x{config.block_n}, {config.num_warps}w, {config.num_stages}s"
    if config is not None and config.chunk_d:
        tile += f", d/{config.chunk_d}"
    with_scores = case.work in ("tiles", "dropout")  # calls with masks and biases, which have the plain loop
    tile += ", overlap" if getattr(config, "overlap", False) and not with_scores else ""
    roof = row.roofline
    share = "-" if roof is None else f"{roof.share_serial:.0%} to {roof.share_overlapped:.0%}"
    products = sum(loop.matrix.values()) if loop else 0
    waits = "-" if loop is None or loop.waits is None else f"{loop.waits} for {products}"
    flying = "-" if loop is None or loop.in_flight is None else f"{loop.in_flight} of {loop.counts['special']}"
    return (
        f"{case.part} {case.work}".strip(), str(8 * case.element_size), str(case.dim), tile, str(code.registers),
        str(code.spills), f"{row.shared_memory / 1024:.0f} KB", str(row.resident), matrix_words(row), waits,
        str(code.bulk_copies or "-"), flying, loop_words(row), roof.binding if roof else "-", share,
    )  # fmt: skip


def matrix_words(row: Row) -> str:
    """The kinds of matrix instructions, with how many there are in the whole kernel."""
    families: dict[str, int] = {}
    for name, number in row.code.matrix.items():
        family = name.split(".")[0] if not name.startswith("v_") else "MFMA"
        families[family] = families.get(family, 0) + number
    return ", ".join(f"{number} {family}" for family, number in families.items()) or "-"


def loop_words(row: Row) -> str:
    """Instructions of a turn of the loop: matrix / exp / float / simple / shared / global / waiting."""
    loop = row.code.loop
    if loop is None:
        return "-"
    simple = sum(loop.counts.get(kind, 0) for kind in ("integer", "compare", "convert"))
    first = [loop.counts.get(kind, 0) for kind in ("matrix", "special", "float")]
    last = [loop.counts.get(kind, 0) for kind in ("shared", "global", "waiting")]
    return "/".join(map(str, [*first, simple, *last])) + (" nested" if loop.nested else "")


def show(rows: Sequence[Row]) -> None:
    """Print a table per chip, and what is broken."""
    console_module = require("rich.console", "compile-report")
    console = console_module.Console()
    if not console.is_terminal:
        console = console_module.Console(width=190)
    for architecture, own in groupby(rows, key=lambda row: row.case.architecture):
        title = f"{architecture}, at most {SHARED_MEMORY[architecture] // 1024} KB of shared memory a program"
        table = require("rich.table", "compile-report").Table(title=title, box=None, pad_edge=False)
        for column in COLUMNS:
            table.add_column(column, no_wrap=True)
        for row in own:
            table.add_row(*cells(row), style="red" if broken_limits([row]) else None)
        console.print(table)
    console.print("loop: matrix/exp/float/simple/shared/global/waiting instructions of a warp in one turn")
    for words in broken_limits(rows) or ["Every limit holds."]:
        console.print(words, markup=False)


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that is known, as JSON."""
    return {"limits_broken": broken_limits(rows), "rows": [_row_as_json(row) for row in rows]}


def _row_as_json(row: Row) -> dict[str, Any]:
    case, code, roof = row.case, row.code, row.roofline
    return {
        "name": case.name,
        "architecture": case.architecture,
        "kernel": case.part,
        "work": case.work,
        "element_size": case.element_size,
        "head_dim": case.dim,
        "config": None if case.config is None else case.config._asdict(),
        "registers": code.registers,
        "spills": code.spills,
        "shared_memory": row.shared_memory,
        "threads": row.threads,
        "resident": row.resident,
        "matrix": code.matrix,
        "bulk_copies": code.bulk_copies,
        "counts": code.counts,
        "loop": None if code.loop is None else vars(code.loop) | {"instructions": code.loop.instructions},
        "roofline": None if roof is None else vars(roof),
        "seconds": row.seconds,
    }


def markdown(rows: Sequence[Row]) -> str:
    """A table per chip, folded."""
    parts = []
    for architecture, group in groupby(rows, key=lambda row: row.case.architecture):
        own = list(group)
        spilling = sum(row.code.spills > 0 for row in own)
        parts += [
            f"<details><summary>{architecture}: {len(own)} rows, {spilling} of them spill, at most "
            f"{max(row.shared_memory for row in own) / 1024:.0f} of {SHARED_MEMORY[architecture] // 1024} KB</summary>",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "| " + " | ".join("---" for _ in COLUMNS) + " |",
            *("| " + " | ".join(cells(row)) + " |" for row in own),
            "",
            "</details>",
            "",
        ]
    return "\n".join(parts)


def write_tables(rows: Sequence[Row], path: Path) -> None:
    """Put the tables between the marks of a file.

    Raises:
        UsageError: the file has no marks.
    """
    before, after = around_marks(path)
    path.write_text(f"{before}{BEGIN}\n{markdown(rows)}{after}", encoding="utf-8")


def around_marks(path: Path) -> tuple[str, str]:
    """What a file has before the first mark, and from the last on.

    Raises:
        UsageError: the file has no marks.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--write: {str(path)!r} is no text ({error})") from error
    if BEGIN not in text or END not in text:
        raise UsageError(f"--write: {str(path)!r} must have the lines {BEGIN!r} and {END!r}, between which tables go")
    return text[: text.index(BEGIN)], text[text.index(END) :]
