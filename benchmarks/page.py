# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page, and a Markdown page, of the saved runs in a folder."""

from __future__ import annotations

import argparse
import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .plots import figures_of, png
from .rows import distinct, human_bytes
from .saved import limits_of, load, results_in
from .work import Limits

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}.failed td{color:#b00020;font-weight:bold}"
    ".unavailable td{color:#777}img{max-width:100%}code{background:#f3f3f3;padding:.1rem .3rem}"
)
HEADINGS = ("case", "dtype", "implementation", "median", "spread", "times as fast", "rate", "of the limit", "remark")
NUMBERS = range(3, 8)
"""Columns of figures."""


def cells(row: dict[str, Any], limits: Limits | None) -> list[str]:
    """One row of a table."""
    figures = [""] * len(NUMBERS)
    if row["median"] is not None:
        show = human_bytes if row["unit"] == "bytes" else lambda seconds: f"{1e3 * seconds:,.3f} ms"
        ratio, work = row["times_as_fast"], row["details"].get("work")
        figures[:3] = show(row["median"]), show(row["iqr"]), f"{ratio:.2f} ({row['baseline']})" if ratio else ""
        if work is not None:
            flops, moved = work["flops"] / row["median"], work["bytes"] / row["median"]
            figures[3] = f"{flops / 1e12:,.2f} TFLOP/s, {moved / 1e9:,.1f} GB/s"
            least = None if limits is None else limits.seconds(work["flops"], work["bytes"], row["dtype"])
            figures[4] = "" if least is None else f"{100 * least / row['median']:.0f} %"
        elif row["work"]:
            figures[3] = f"{row['work'] / row['median']:,.0f} tokens/s"
    remark = "" if row["status"] == "ok" else f"{row['status'].upper()}: {row['reason']}"
    return [row["case"], row["dtype"], row["provider"], *figures, remark]


def pictures(document: dict[str, Any]) -> dict[str, str]:
    """The run's plots by name, as data URIs."""
    drawn = figures_of(results_in(document), document["machine"], limits_of(document))
    return {name: "data:image/png;base64," + base64.b64encode(png(figure)).decode() for name, figure in drawn.items()}


def facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Machine, versions, date, and how to repeat the run."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    found = [
        ("machine", f"{machine['device']}, {machine['threads']} threads, {machine['system']}"),
        ("versions", versions),
        ("date", document["date"]),
        ("repeat with", document["arguments"]["command"]),
    ]
    if (limits := limits_of(document)) is not None:
        products = ", ".join(f"{dtype} {1e-12 * best:,.2f} TFLOP/s" for dtype, best in limits.flops_per_second.items())
        text = f"a matrix product: {products}; a copy: {1e-9 * limits.bytes_per_second:,.1f} GB/s"
        found.append(("limits measured here", text))
    if (clocks := (machine.get("clocks") or {}).get("after")) is not None:
        found.append(("clocks as found", ", ".join(f"{name} {value}" for name, value in clocks.items())))
    return found


def html_page(runs: dict[str, dict[str, Any]]) -> str:
    """The page; everything it shows is inside it."""
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Benchmarks</title><style>{STYLE}</style>'
    ]
    # Without an icon of its own a page makes browsers ask for one.
    parts.append('<link rel="icon" href="data:,"></head><body><h1>Benchmarks of attention</h1>')
    for name, document in runs.items():
        limits = limits_of(document)
        parts.append(f"<h2>{html.escape(name)}</h2><table>")
        parts += [
            f"<tr><th>{html.escape(what)}</th><td>{html.escape(text)}</td></tr>" for what, text in facts(document)
        ]
        parts.append("</table>")
        parts += [f'<img alt="{html.escape(kind)}" src="{uri}">' for kind, uri in pictures(document).items()]
        for section in distinct(row["section"] for row in document["results"]):
            head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
            parts.append(f"<h3>{html.escape(section)}</h3><table><tr>{head}</tr>")
            for row in document["results"]:
                if row["section"] == section:
                    texts = [html.escape(text) for text in cells(row, limits)]
                    line = "".join(
                        f'<td class="{"n" if i in NUMBERS else ""}">{text}</td>' for i, text in enumerate(texts)
                    )
                    parts.append(f'<tr class="{row["status"]}">{line}</tr>')
            parts.append("</table>")
    return "\n".join([*parts, "</body></html>\n"])


def markdown_page(runs: dict[str, dict[str, Any]]) -> str:
    """The same in Markdown."""
    lines = ["# Benchmarks of attention"]
    for name, document in runs.items():
        limits = limits_of(document)
        lines += ["", f"## {name}", "", *(f"- {what}: {text}" for what, text in facts(document))]
        for kind, uri in pictures(document).items():
            lines += ["", f"![{kind}]({uri})"]
        for section in distinct(row["section"] for row in document["results"]):
            lines += ["", f"### {section}", "", f"| {' | '.join(HEADINGS)} |", "| --- " * len(HEADINGS) + "|"]
            rows = [cells(row, limits) for row in document["results"] if row["section"] == section]
            lines += [f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def write_pages(folder: Path, console: Console) -> None:
    """Write `report.html` and `report.md` of all runs in a folder.

    Raises:
        ValueError: a file there is no saved run, or there is none.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"{folder} holds no saved run; `python -m benchmarks --json {folder}/run.json` writes one")
    runs = {path.stem: load(path) for path in paths}
    for name, text in (("report.html", html_page(runs)), ("report.md", markdown_page(runs))):
        (folder / name).write_text(text, encoding="utf-8")
        console.print(f"{folder / name}")


def run_report(arguments: Sequence[str], parser: argparse.ArgumentParser, console: Console) -> int:
    """Write one HTML page and one Markdown page of the saved runs in a folder.

    0, or 2 with one line where there is nothing to show.
    """
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of saved runs (JSON); the pages go there too")
    try:
        write_pages(parser.parse_args(arguments).folder, console)
    except ValueError as error:
        parser.error(str(error))
    return 0
