# SPDX-License-Identifier: Apache-2.0
"""Where it is shown: the console, and progress while it runs."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def make_console() -> Console:
    """A console wide enough for the tables where no terminal says how wide it is."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def make_progress(console: Console) -> Progress:
    """Progress bars, one per section, which name what is running at the moment."""
    return Progress(
        TextColumn("{task.fields[section]:<8}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:>3.0f} of {task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
