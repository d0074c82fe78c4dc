# SPDX-License-Identifier: Apache-2.0
"""Compare this project's attention with the others that transformers offers, on this machine.

Every result is checked against a float64 reference before it is timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from . import (
    cases,
    compare,
    gpu_report,
    models,
    page,
    readme,
    saved,
    sections,
    serve,
    summary,
    tables,
    tensor_parallel,
)
from .options import SECTIONS, OneLineParser, Run, parse
from .providers import OWN, PROVIDERS
from .terminal import make_console, make_progress
from .work import Limits, measure_limits

COMMANDS = {
    "compare": compare.run_compare,
    "report": page.run_report,
    "readme": readme.run_readme,
    "gpu-report": gpu_report.run_gpu_report,
}
"""What is no section: the first three measure nothing and read saved runs."""

EPILOG = "\n".join(
    [
        "Without a section all of them run. One by itself (python -m benchmarks SECTION --help for its own options):",
        *(f"  {name:<9} {what}" for name, what in SECTIONS.items()),
        "Other commands (each has its own --help):",
        *(f"  {name:<10} {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()),
    ]
)


def show(results: Sequence[saved.Result], limits: Limits | None, console: Console) -> None:
    """All tables, and why anything is missing."""
    shown: list[Table | None] = [
        *tables.kernel_tables(results, "kernels", limits),
        tables.mask_table(results),
        tables.host_table(results),
        *tables.kernel_tables(results, "training", limits),
        *tables.kernel_tables(results, "backward", limits),
        *tables.model_tables(results),
        tables.memory_table(results),
        tensor_parallel.tensor_parallel_table(results),
        serve.serve_table(results),
    ]
    for table in shown:
        if table is not None:
            console.print(table)
    for line in summary.absences(results):
        console.print(line)


def list_all(console: Console) -> None:
    """Cases, sweeps and implementations with what they are."""
    listed = (("cases", cases.CASES), ("sweeps", cases.SWEEPS.values()), ("implementations", PROVIDERS))
    for heading, entries in listed:
        table = Table("name", "what it is", title=heading, title_justify="left")
        for entry in entries:
            table.add_row(entry.name, entry.description.replace("{", "<").replace("}", ">"))
        console.print(table)


def relative(path: Path) -> Path:
    """The path as seen from the current directory, where it lies below it."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def draw(recorder: saved.Recorder, limits: Limits | None, path: Path) -> dict[str, Path]:
    """The run's pictures; none, with a word, where matplotlib is missing."""
    try:
        from . import plots
    except ImportError as error:
        print(f"no pictures: {error}; pip install matplotlib")
        return {}
    return plots.write_plots(recorder.results, recorder.machine, limits, path)


def measure(run: Run, console: Console) -> int:
    """Run the sections that were asked for, and show what came out.

    Returns:
        1 if this project's own attention was wrong anywhere, 130 if it was interrupted, else 0.
    """
    transformers_logging.disable_progress_bar()
    if {"models", "tp", "serve"} & set(run.sections):
        models.ensure_checkpoint(run.checkpoint, models.SIZES[run.thoroughness].train_seconds)
    described = {"command": saved.printable_command(), "quick": run.quick, "sections": list(run.sections)}
    recorder = saved.Recorder(run.json, run.device, described)
    limits = None
    if {"kernels", "training"} & set(run.sections):
        limits = measure_limits(run.device, run.dtypes)
        recorder.limits = limits.to_json()
    ends = None if run.seconds is None else time.monotonic() + run.seconds
    stopped = False
    try:
        with make_progress(console) as progress:
            for section in run.sections:
                for results in sections.RUNNERS[section](run, progress):
                    recorder.add(results)
                    if ends is not None and (stopped := time.monotonic() > ends):
                        break
                if stopped:
                    break
    except KeyboardInterrupt:
        show(recorder.results, limits, console)
        console.print(f"Interrupted. What was measured is in {relative(run.json)}.", style="yellow")
        return 130
    if stopped:
        console.print(f"Stopped after --seconds {run.seconds:g}: not all cases were measured.", style="yellow")
    pictures = {f"picture: {name}": relative(path) for name, path in draw(recorder, limits, run.plot).items()}
    show(recorder.results, limits, console)
    if run.earlier is not None and (changes := compare.compare(run.earlier, saved.load(run.json))):
        console.print(compare.comparison_table(changes, "This run: times as fast as the earlier one"))
        console.print(compare.widest(changes))
    files = {"every sample": relative(run.json), **pictures}
    console.print(summary.closing_panel(recorder.results, recorder.machine, files))
    return int(any(r.status == "failed" and (r.section == "tp" or r.provider in OWN) for r in recorder.results))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for.

    Returns:
        0; 1 if this project's own attention failed anywhere, 2 for unusable arguments, 130 for an interruption.
    """
    console = make_console()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        command = COMMANDS[first]
        parser = OneLineParser(prog=f"python -m benchmarks {first}", description=command.__doc__)
        return command(arguments[1:], parser, console)
    section = first if first in SECTIONS else None
    run = parse(section, arguments[bool(section) :], __doc__, EPILOG)
    if run.list:
        list_all(console)
        return 0
    return measure(run, console)


if __name__ == "__main__":
    sys.exit(main())
