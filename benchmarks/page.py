# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page, and a Markdown page, of the saved runs in a folder."""

from __future__ import annotations

import argparse
import base64
import html
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from .compare import load
from .measure import Result
from .report import distinct, human_bytes, write_plot

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}.failed td{color:#b00020;font-weight:bold}"
    ".unavailable td{color:#777}img{max-width:100%}code{background:#f3f3f3;padding:.1rem .3rem}"
)
HEADINGS = ("case", "dtype", "implementation", "median", "spread", "times as fast", "remark")


def results_in(document: dict[str, Any]) -> list[Result]:
    """The rows of a saved run as results."""
    names = [field.name for field in fields(Result)]
    return [Result(**{name: row[name] for name in names}) for row in document["results"]]


def cells(row: dict[str, Any]) -> list[str]:
    """One row of a table."""
    figures = ["", "", ""]
    if row["median"] is not None:
        show = human_bytes if row["unit"] == "bytes" else lambda seconds: f"{1e3 * seconds:,.3f} ms"
        ratio = row["times_as_fast"]
        figures = [show(row["median"]), show(row["iqr"]), "" if ratio is None else f"{ratio:.2f} ({row['baseline']})"]
    remark = "" if row["status"] == "ok" else f"{row['status'].upper()}: {row['reason']}"
    return [row["case"], row["dtype"], row["provider"], *figures, remark]


def picture(document: dict[str, Any]) -> str | None:
    """The run's plot as a data URI, or None where there is nothing to draw."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.png"
        if not write_plot(results_in(document), document["machine"], path):
            return None
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Machine, versions, date, and how to repeat the run."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    return [
        ("machine", f"{machine['device']}, {machine['threads']} threads, {machine['system']}"),
        ("versions", versions),
        ("date", document["date"]),
        ("repeat with", document["arguments"]["command"]),
    ]


def html_page(runs: dict[str, dict[str, Any]]) -> str:
    """The page; everything it shows is inside it."""
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Benchmarks</title><style>{STYLE}</style>'
    ]
    # Without an icon of its own a page makes browsers ask for one.
    parts.append('<link rel="icon" href="data:,"></head><body><h1>Benchmarks of attention</h1>')
    for name, document in runs.items():
        parts.append(f"<h2>{html.escape(name)}</h2><table>")
        parts += [
            f"<tr><th>{html.escape(what)}</th><td>{html.escape(text)}</td></tr>" for what, text in facts(document)
        ]
        parts.append("</table>")
        if (uri := picture(document)) is not None:
            parts.append(f'<img alt="speed relative to sdpa" src="{uri}">')
        for section in distinct(row["section"] for row in document["results"]):
            head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
            parts.append(f"<h3>{html.escape(section)}</h3><table><tr>{head}</tr>")
            for row in document["results"]:
                if row["section"] == section:
                    texts = [html.escape(text) for text in cells(row)]
                    line = "".join(
                        f'<td class="{"n" if 3 <= i < 6 else ""}">{text}</td>' for i, text in enumerate(texts)
                    )
                    parts.append(f'<tr class="{row["status"]}">{line}</tr>')
            parts.append("</table>")
    return "\n".join([*parts, "</body></html>\n"])


def markdown_page(runs: dict[str, dict[str, Any]]) -> str:
    """The same in Markdown."""
    lines = ["# Benchmarks of attention"]
    for name, document in runs.items():
        lines += ["", f"## {name}", "", *(f"- {what}: {text}" for what, text in facts(document))]
        if (uri := picture(document)) is not None:
            lines += ["", f"![speed relative to sdpa]({uri})"]
        for section in distinct(row["section"] for row in document["results"]):
            lines += ["", f"### {section}", "", f"| {' | '.join(HEADINGS)} |", "| --- " * len(HEADINGS) + "|"]
            rows = [cells(row) for row in document["results"] if row["section"] == section]
            lines += [f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def run_report(arguments: Sequence[str], parser: argparse.ArgumentParser, console: Console) -> int:
    """The command `report`; 0, or 2 with one line where there is nothing to show."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of saved runs (JSON); the pages go there too")
    folder = parser.parse_args(arguments).folder
    paths = sorted(folder.glob("*.json"))
    if not paths:
        parser.error(f"{folder} holds no saved run; `python -m benchmarks --json {folder}/run.json` writes one")
    try:
        runs = {path.stem: load(path) for path in paths}
    except ValueError as error:
        parser.error(str(error))
    for name, text in (("report.html", html_page(runs)), ("report.md", markdown_page(runs))):
        (folder / name).write_text(text, encoding="utf-8")
        console.print(f"{folder / name}")
    return 0
