# SPDX-License-Identifier: Apache-2.0
"""What the reader gets: progress while it runs, tables, a closing summary, JSON and a picture."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .measure import Result
from .providers import BASELINE, FALLBACK_BASELINE, OURS, PROVIDERS

FORMAT = 1
"""Version of the JSON's layout."""

TIMES = "\N{MULTIPLICATION SIGN}"
ABSENT = "-"
"""Stands in tables where there is no figure."""

COMPARED = {"kernels": "Attention", "training": "Attention forward and backward"}
"""What the sections that compare providers time, for headings."""

PACKAGES = ("torch", "triton", "transformers", "my-triton-attention", "flash-attn", "flash-attn-4", "numpy")


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


# ---------------------------------------------------------------------- results in groups


def results_of(results: Iterable[Result], section: str, **fields: str) -> list[Result]:
    """The results of a section whose fields have the given values."""
    return [
        result
        for result in results
        if result.section == section and all(getattr(result, name) == value for name, value in fields.items())
    ]


def distinct(values: Iterable[str]) -> list[str]:
    """Values without repetition, in order."""
    return list(dict.fromkeys(values))


def baseline_of(row: Sequence[Result]) -> Result | None:
    """What the other results of a row are relative to: sdpa, or eager where sdpa cannot run it."""
    for name in (BASELINE, FALLBACK_BASELINE):
        for result in row:
            if result.provider == name and result.measured:
                return result
    return None


def speed(result: Result, baseline: Result | None) -> float | None:
    """How many times as fast as the baseline, or None where either has no figures."""
    if baseline is None or not result.measured:
        return None
    return baseline.median / result.median


# ---------------------------------------------------------------------- tables


def kernel_tables(results: Sequence[Result], section: str = "kernels") -> list[Table]:
    """One table per dtype: cases down, providers across, median milliseconds and speed relative to the baseline."""
    tables = []
    timed = results_of(results, section)
    for dtype in distinct(result.dtype for result in timed):
        of_dtype = [result for result in timed if result.dtype == dtype]
        providers = distinct(r.provider for r in of_dtype if r.status != "unavailable")
        table = Table(
            title=f"{COMPARED[section]}, {dtype}: milliseconds ± spread, and times as fast as {BASELINE}",
            show_lines=True,
        )
        table.add_column("case", overflow="fold")
        for provider in providers:
            table.add_column(provider, justify="right", style="bold" if provider == OURS else "")
        for case in distinct(result.case for result in of_dtype):
            row = [result for result in of_dtype if result.case == case]
            baseline = baseline_of(row)
            by_provider = {result.provider: result for result in row}
            label = Text.assemble((case, "bold"), f"\n{row[0].description}")
            table.add_row(label, *(kernel_cell(by_provider.get(provider), baseline) for provider in providers))
        tables.append(table)
    return tables


def kernel_cell(result: Result | None, baseline: Result | None) -> Text:
    """Median, spread and relative speed of one result."""
    if result is None or result.status == "unavailable":
        return Text(ABSENT, style="dim")
    if result.status == "failed":
        return Text("FAILED", style="bold red")
    text = Text(milliseconds(result))
    ratio = speed(result, baseline)
    if ratio is not None:
        versus = "" if baseline.provider == BASELINE else f" {baseline.provider}"
        style = "green" if ratio >= 1.05 else "yellow" if ratio < 0.95 else ""
        text.append(f"\n{ratio:.2f}{TIMES}{versus}", style=style)
    return text


def milliseconds(result: Result) -> str:
    """Median and spread, with three digits of the median."""
    median, spread = 1000 * result.median, 1000 * result.spread
    digits = max(0, 2 - math.floor(math.log10(median))) if median > 0 else 2
    digits = min(digits, 3)
    return f"{median:,.{digits}f} ±{spread:.{digits}f}"


def mask_table(results: Sequence[Result]) -> Table | None:
    """Time to build each case's mask, and its size, by implementation."""
    masks = results_of(results, "masks")
    if not masks:
        return None
    names = distinct(result.provider for result in masks if result.measured)
    table = Table(title="Building the mask, once per forward pass: milliseconds, and what it holds")
    table.add_column("case")
    for name in names:
        table.add_column(f"{name} mask", justify="right", style="bold" if name == OURS else "")
    for case in distinct(result.case for result in masks):
        by_name = {result.provider: result for result in results_of(masks, "masks", case=case)}
        cells = [
            f"{milliseconds(by_name[name])}  {human_bytes(by_name[name].details['bytes']):>8}"
            if name in by_name and by_name[name].measured
            else ABSENT
            for name in names
        ]
        table.add_row(case, *cells)
    return table


def memory_table(results: Sequence[Result]) -> Table | None:
    """Peak memory beyond the inputs."""
    memory = results_of(results, "memory")
    if not memory:
        return None
    names = distinct(result.provider for result in memory)
    table = Table(title="Peak memory of a forward pass on a prompt whose left half is padding, mask included, float32")
    table.add_column("prompt")
    for name in names:
        table.add_column(name, justify="right", style="bold" if name == OURS else "")
    for case in distinct(result.case for result in memory):
        row = results_of(memory, "memory", case=case)
        table.add_row(case, *(human_bytes(result.median) if result.measured else ABSENT for result in row))
    return table


def host_table(results: Sequence[Result]) -> Table | None:
    """What a call costs in Python."""
    calls = results_of(results, "host")
    if not any(result.measured for result in calls):
        return None
    table = Table(title="A decoding call before the device works: microseconds of Python ± spread")
    table.add_column("call")
    table.add_column("", justify="right")
    names = {OURS: f"{OURS} in a model", BASELINE: f"{BASELINE} in a model"}
    for result in calls:
        figures = f"{1e6 * result.median:.1f} ±{1e6 * result.spread:.1f}" if result.measured else ABSENT
        table.add_row(names.get(result.provider, result.provider), figures)
    return table


def model_table(results: Sequence[Result]) -> Table | None:
    """Tokens per second of whole models, and what was compared."""
    models = results_of(results, "models")
    if not models:
        return None
    table = Table(title="Whole models, float32: tokens per second", show_lines=True)
    table.add_column("run", overflow="fold")
    names = [name for name in (OURS, BASELINE, FALLBACK_BASELINE) if any(r.provider == name for r in models)]
    for name in names:
        table.add_column(name, justify="right", style="bold" if name == OURS else "")
    table.add_column(f"{OURS} against {FALLBACK_BASELINE}", overflow="fold")
    for case in distinct(result.case for result in models):
        row = results_of(models, "models", case=case)
        by_name = {result.provider: result for result in row}
        label = Text.assemble((case, "bold"), f"\n{row[0].description}")
        cells = [model_cell(by_name[name], baseline_of(row)) for name in names]
        ours = by_name.get(OURS)
        table.add_row(label, *cells, agreement(ours.details) if ours else "")
    return table


def model_cell(result: Result, baseline: Result | None) -> Text:
    """Tokens per second and relative speed of one result."""
    if not result.measured:
        return kernel_cell(result, None)
    text = Text(f"{result.work / result.median:,.0f}")
    if (ratio := speed(result, baseline)) is not None:
        text.append(f"\n{ratio:.2f}{TIMES}")
    return text


def agreement(details: dict[str, Any]) -> str:
    """What the comparison with another implementation found, in words."""
    if "tokens_total" in details:
        equal = details.get("tokens_equal_to_eager", details.get("tokens_equal_to_one_rank"))
        return f"{equal} of {details['tokens_total']} greedy tokens equal"
    if "relative_difference_from_eager" in details:
        return f"relative difference {details['relative_difference_from_eager']:.1e}"
    return ""


def tensor_parallel_table(results: Sequence[Result]) -> Table | None:
    """Generation on one rank and on several."""
    ranks = results_of(results, "tp")
    if not ranks:
        return None
    table = Table(title="Tensor parallel: the reference model, sharded by its own plan", caption=ranks[0].description)
    for heading in ("ranks", "threads each", "query heads each", "seconds ± spread", "tokens/s", "against one rank"):
        table.add_column(heading, justify="right")
    for result in ranks:
        if not result.measured:
            table.add_row(
                result.provider, ABSENT, ABSENT, Text("FAILED", style="bold red"), ABSENT, agreement(result.details)
            )
            continue
        table.add_row(
            result.provider,
            str(result.details["threads_per_rank"]),
            str(result.details["heads_per_rank"]),
            f"{result.median:.2f} ±{result.spread:.2f}",
            f"{result.work / result.median:,.0f}",
            agreement(result.details),
        )
    return table


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
            text += "" if everywhere else f" in {', '.join(where)}"
            text += (
                f" ({', '.join(distinct(row.dtype for row in rows))})" if status == "failed" and rows[0].dtype else ""
            )
            line = f"{status}: {text}: {reason}"
            if section == "training" and line not in lines:
                line = f"{status} in training: {text}: {reason}"
            lines[line] = Text(line, style=style)
    return list(lines.values())


def closing_panel(results: Sequence[Result], machine: dict[str, Any], files: dict[str, Path]) -> Panel:
    """What was compared, the main ratios, and where the figures are, for someone who sees this for the first time."""
    failed = [result for result in results if result.status == "failed"]
    checked = sum(bool({"error", "gradients", "bound", "tokens_total"} & set(r.details)) for r in results)
    parts: list[Any] = [
        Text(f"{OURS} is this project's attention. It ran on {machine['device']} with {machine['threads']} threads.")
    ]
    if any(result.section in ("kernels", "training", "models") for result in results):
        explanation = Text(
            "It took turns with the other attention implementations of Hugging Face transformers, on the same tensors. "
            f"Below is how many times as fast it is: 2.00{TIMES} is twice as fast as {BASELINE}, which transformers "
            f"uses by default; where {BASELINE} cannot run, {FALLBACK_BASELINE} stands in its place. A {ABSENT} in the "
            "tables above is something that could not run; the reasons are below the tables.\n"
        )
        parts += [explanation, main_ratios(results)]
    ranks = [result for result in results_of(results, "tp") if result.measured]
    if len(ranks) == 2:
        one, several = ranks
        parts.append(
            Text(f"\nSharded over {several.provider}: {one.median / several.median:.2f}{TIMES} one rank's speed.")
        )
    if (load := machine["load_before"]) is not None and load > 0.5:
        busy = f"Other programs kept {load:.1f} cores busy before this began; on a quiet machine figures are steadier."
        parts.append(Text(busy, style="yellow"))
    if failed:
        parts.append(Text(f"{len(failed)} results FAILED; they are listed above and were not timed.", style="bold red"))
    elif checked:
        parts.append(Text(f"All {checked} results that were compared with the right answer are right.", style="green"))
    parts += [Text(f"{name}: {path}", overflow="fold") for name, path in files.items()]
    return Panel(Group(*parts), title="Summary", border_style="red" if failed else "green")


def main_ratios(results: Sequence[Result]) -> Table:
    """How many times as fast as the baseline this project is: one row per case or model, one column per dtype.

    Training has one row for all its cases, which are those of the kernels: the slowest and the fastest.
    """
    ours = [result for result in results if result.provider == OURS and result.section in ("kernels", "models")]
    trained = [result for result in results if result.provider == OURS and result.section == "training"]
    dtypes = distinct(result.dtype for result in (*ours, *trained))
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
            cells.append("" if ratio is None else f"{ratio:.2f}{TIMES}")
            than = than if ratio is None else baseline.provider
        table.add_row(*cells, than, row[0].description)
    if trained:
        cells = [training_range(results, dtype) for dtype in dtypes]
        table.add_row(*cells, BASELINE, f"forward and backward, wherever {BASELINE} runs: slowest and fastest case")
    return table


def training_range(results: Sequence[Result], dtype: str) -> str:
    """This project's smallest and largest speed relative to the baseline in training, without its stand-in."""
    training = results_of(results, "training", dtype=dtype)
    bases = {result.case: result for result in training if result.provider == BASELINE and result.measured}
    speeds = [speed(result, bases.get(result.case)) for result in training if result.provider == OURS]
    ratios = [ratio for ratio in speeds if ratio is not None]
    return f"{min(ratios):.2f} to {max(ratios):.2f}{TIMES}" if ratios else ""


def human_bytes(count: float) -> str:
    """`1.5 MB` and the like, in powers of 1,024."""
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GB"


# ---------------------------------------------------------------------- JSON


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads and, on a GPU, which one."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = [
            line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        processor = models[0] if models else processor
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or processor,
        "device_type": device.type,
        "processor": processor,
        "capabilities": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0]
        if hasattr(os, "getloadavg")
        else None,  # cores that were busy, in the last minute
        "gpu": gpu,
        "gpu_count": torch.cuda.device_count() if gpu else 0,
        "system": platform.platform(),
    }


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and of every package that matters here; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def write_json(results: Sequence[Result], machine: dict[str, Any], arguments: dict[str, Any], path: Path) -> None:
    """Every result with every sample, and what is needed to repeat them."""
    rows = []
    for result in results:
        peers = [
            other
            for other in results_of(results, result.section, case=result.case, dtype=result.dtype)
            if other.unit == result.unit
        ]
        baseline = baseline_of(peers) if result.unit == "s" else None
        ratio = speed(result, baseline)
        relative = {"baseline": baseline.provider if ratio is not None else None, "times_as_fast": ratio}
        rows.append(result.to_json() | relative)
    document = {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "arguments": arguments,
        "machine": machine,
        "versions": describe_versions(),
        "results": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------- picture


def write_plot(results: Sequence[Result], machine: dict[str, Any], path: Path) -> bool:
    """Bars of speed relative to the baseline, one panel per dtype. False where there is nothing to draw.

    Training is drawn where it ran without the kernels section: beside that it would make the picture twice as wide.
    """
    section = "kernels" if results_of(results, "kernels") else "training"
    timed = results_of(results, section)
    drawn = [result for result in timed if result.measured and result.provider != BASELINE]
    if not drawn:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = [provider.name for provider in PROVIDERS]
    providers = sorted(
        {result.provider for result in drawn}, key=lambda name: order.index(name) if name in order else 99
    )
    colors = {name: f"C{index}" for index, name in enumerate(order)}
    dtypes, cases = distinct(result.dtype for result in timed), distinct(result.case for result in timed)
    bar_height = 0.19  # inches
    height = len(cases) * (len(providers) + 1.2) * bar_height + 1.6
    figure, axes = pyplot.subplots(
        1,
        len(dtypes),
        figsize=(3.2 + 4.6 * len(dtypes), height),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        _draw_panel(axis, [result for result in timed if result.dtype == dtype], cases, providers, colors)
        axis.set_title(dtype, fontsize=13)
    _scale(axes[0, 0], drawn_speeds(timed))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors.get(name, "gray")) for name in providers]
    figure.legend(
        handles, providers, loc="outside lower center", ncols=min(len(providers), 5), fontsize=11, frameon=False
    )
    figure.suptitle(
        f"{COMPARED[section]}: times as fast as {BASELINE}\non {machine['device']} ({machine['threads']} threads)\n"
        f"to the right of the line is faster; * relative to {FALLBACK_BASELINE}, where {BASELINE} cannot run",
        fontsize=13,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _draw_panel(axis: Any, results: Sequence[Result], cases: list[str], providers: list[str], colors: dict) -> None:
    """One dtype: horizontal bars that begin at 1, on a logarithmic axis, with their value at the end."""
    group = len(providers) + 1.2
    labels = []
    for index, case in enumerate(cases):
        row = [result for result in results if result.case == case]
        baseline = baseline_of(row)
        starred = baseline is not None and baseline.provider != BASELINE
        labels.append(f"{case} *" if starred else case)
        # Only what ran gets a bar, so that no group has gaps; groups are centred on their label.
        bars = [(result, speed(result, baseline)) for name in providers for result in row if result.provider == name]
        bars = [(result, ratio) for result, ratio in bars if ratio is not None and result is not baseline]
        for place, (result, ratio) in enumerate(bars):
            y = index * group + place - (len(bars) - 1) / 2
            axis.barh(y, ratio - 1, left=1, height=0.85, color=colors.get(result.provider, "gray"))
            bold = "bold" if result.provider == OURS else "normal"
            axis.annotate(
                f"{ratio:.2f}{TIMES}" if ratio < 10 else f"{ratio:.1f}{TIMES}",
                (ratio, y),
                xytext=(4 if ratio >= 1 else -4, 0),
                textcoords="offset points",
                ha="left" if ratio >= 1 else "right",
                va="center",
                fontsize=10,
                fontweight=bold,
            )
    axis.set_yticks([index * group for index in range(len(cases))], labels, fontsize=12)
    axis.set_ylim(len(cases) * group - group / 2, -group / 2)
    axis.set_xlabel(f"times as fast as {BASELINE}, logarithmic", fontsize=11)
    axis.tick_params(axis="x", labelsize=10)
    axis.axvline(1, color="black", linewidth=1)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def drawn_speeds(timed: Sequence[Result]) -> list[float]:
    """All relative speeds of the picture, and 1."""
    rows = dict.fromkeys((result.section, result.case, result.dtype) for result in timed)
    speeds = [1.0]
    for section, case, dtype in rows:
        row = results_of(timed, section, case=case, dtype=dtype)
        speeds += [ratio for result in row if (ratio := speed(result, baseline_of(row))) is not None]
    return speeds


def _scale(axis: Any, ratios: Sequence[float]) -> None:
    """A logarithmic axis with room for the labels at the ends of the bars."""
    axis.set_xscale("log", base=2)
    low, high = math.floor(math.log2(min(ratios) / 1.6)), math.ceil(math.log2(max(ratios) * 1.6))
    axis.set_xlim(2.0**low, 2.0**high)
    step = max(1, (high - low) // 6)
    ticks = [2.0**exponent for exponent in range(low, high + 1) if exponent % step == 0]
    axis.set_xticks(ticks, [f"{tick:g}{TIMES}" if tick >= 1 else f"1/{1 / tick:g}" for tick in ticks])
    axis.minorticks_off()


def printable_command() -> str:
    """The command that was typed, for the JSON."""
    return " ".join(["python -m benchmarks", *sys.argv[1:]])
