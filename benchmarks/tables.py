# SPDX-License-Identifier: Apache-2.0
"""One table for each kind of result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from .measure import Result
from .providers import BASELINE, FALLBACK_BASELINE, OURS
from .rows import (
    ABSENT,
    TIMES,
    baseline_of,
    distinct,
    human_bytes,
    milliseconds,
    results_of,
    share_of_limit,
    speed,
    sweep_of,
)
from .work import Limits

COMPARED = {"kernels": "Attention", "training": "Attention forward and backward", "backward": "Attention backward"}
"""What the sections that compare providers time, for headings."""


def kernel_tables(results: Sequence[Result], section: str = "kernels", limits: Limits | None = None) -> list[Table]:
    """One table per sweep and dtype: cases down, providers across.

    A cell holds median milliseconds, speed relative to the baseline, and the share of what this machine could do at
    best, where `limits` say what that is.
    """
    tables = []
    timed = results_of(results, section)
    for sweep in distinct(sweep_of(result) for result in timed):
        in_sweep = [result for result in timed if sweep_of(result) == sweep]
        for dtype in distinct(result.dtype for result in in_sweep):
            rows = [result for result in in_sweep if result.dtype == dtype]
            tables.append(_kernel_table(rows, f"{COMPARED[section]}{sweep and f', {sweep}'}, {dtype}", limits))
    return tables


def _kernel_table(results: Sequence[Result], heading: str, limits: Limits | None) -> Table:
    providers = distinct(result.provider for result in results if result.status != "unavailable")
    share = "; % of what this machine could do at best" if limits else ""
    table = Table(title=f"{heading}: milliseconds ± spread; times as fast as {BASELINE}{share}", show_lines=True)
    table.add_column("case", overflow="fold")
    for provider in providers:
        table.add_column(provider, justify="right", style="bold" if provider == OURS else "")
    described = distinct(result.description for result in results)
    for case in distinct(result.case for result in results):
        row = [result for result in results if result.case == case]
        baseline = baseline_of(row)
        by_provider = {result.provider: result for result in row}
        label = Text(case, style="bold")
        # In a sweep many cases have one description; their names say how they differ.
        if not sweep_of(row[0]) or len(described) < 2:
            label.append(f"\n{row[0].description}", style="not bold")
        table.add_row(label, *(kernel_cell(by_provider.get(provider), baseline, limits) for provider in providers))
    return table


def kernel_cell(result: Result | None, baseline: Result | None, limits: Limits | None = None) -> Text:
    """Median and spread, relative speed, and share of the machine's limit of one result."""
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
    if (reached := share_of_limit(result, limits)) is not None:
        text.append(f"{chr(10) if ratio is None else '; '}{100 * reached:.0f} %", style="dim")
    return text


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
    title = f"Peak memory of a forward pass on a prompt whose left half is padding, mask included, {memory[0].dtype}"
    table = Table(title=title)
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
    table = Table(title="A call before the device works: microseconds of Python ± spread")
    table.add_column("call")
    for description in distinct(result.description for result in calls):
        table.add_column(description, justify="right", overflow="fold")
    names = {OURS: f"{OURS} in a model", BASELINE: f"{BASELINE} in a model"}
    for provider in distinct(result.provider for result in calls):
        figures = [
            f"{1e6 * result.median:.1f} ±{1e6 * result.spread:.1f}" if result.measured else ABSENT
            for result in calls
            if result.provider == provider
        ]
        table.add_row(names.get(provider, provider), *figures)
    return table


def model_tables(results: Sequence[Result]) -> list[Table]:
    """For each dtype, tokens per second of whole models, and what was compared."""
    models = results_of(results, "models")
    return [_model_table(results_of(models, "models", dtype=dtype)) for dtype in distinct(r.dtype for r in models)]


def _model_table(models: Sequence[Result]) -> Table:
    table = Table(title=f"Whole models, {models[0].dtype}: tokens per second", show_lines=True)
    table.add_column("run", overflow="fold")
    names = distinct(result.provider for result in models)
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
        return f"{details['tokens_equal_to_eager']} of {details['tokens_total']} greedy tokens equal"
    if "relative_difference_from_eager" in details:
        return f"relative difference {details['relative_difference_from_eager']:.1e}"
    return ""
