# SPDX-License-Identifier: Apache-2.0
"""What this machine has, which kernels it will use, what is registered, what is missing, and whether attention works.

Exit status: 0 where attention works, shown by calls that are compared with float64; 1 where something is broken.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from ..command import require
from .findings import Finding, all_findings

__all__ = ["Finding", "add_arguments", "all_findings", "run", "show"]

STYLES = {"ok": "green", "note": "cyan", "missing": "yellow", "broken": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `my-triton doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Look, and print; returns the exit status."""
    if not options.json:
        require("rich", "doctor without --json")
    findings = all_findings()
    works = not any(finding.status == "broken" for finding in findings)
    if options.json:
        print(json.dumps({"works": works, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        show(findings, works)
    return 0 if works else 1


def show(findings: Sequence[Finding], works: bool) -> None:
    """Print findings as a table, and what to do."""
    rich_console = require("rich.console", "doctor")
    text = require("rich.text", "doctor")
    console = rich_console.Console()
    if not console.is_terminal:
        console = rich_console.Console(width=120)
    table = require("rich.table", "doctor").Table(box=None, pad_edge=False, show_header=False)
    table.add_column("subject", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("found", overflow="fold")
    area = None
    for finding in findings:
        if finding.area != area:
            area = finding.area
            table.add_row(text.Text(area, style="bold"), "", "")
        status = text.Text(finding.status, style=STYLES[finding.status])
        advice = f"\n-> {finding.advice}" if finding.advice else ""
        table.add_row(f"  {finding.subject}", status, text.Text(finding.found + advice))
    console.print(table)
    verdict = "Attention works here." if works else "Attention does not work here: see what is marked broken."
    console.print(text.Text(f"\n{verdict}", style="bold green" if works else "bold red"))
