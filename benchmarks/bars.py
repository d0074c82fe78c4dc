# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: how many times as fast as the baseline each implementation is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .measure import Result
from .providers import BASELINE, FALLBACK_BASELINE, OURS, PROVIDERS
from .rows import TIMES, baseline_of, distinct, results_of, speed, sweep_of
from .tables import COMPARED
from .work import Limits

COLORS = {provider.name: f"C{index % 10}" for index, provider in enumerate(PROVIDERS)}


def panels(rows: int, columns: int, **options: Any) -> tuple[Figure, Any]:
    """A figure, and its axes `[rows, columns]`. No window and no global state: pictures are only ever saved."""
    share = {name: options.pop(name) for name in ("sharex", "sharey") if name in options}
    figure = Figure(layout="constrained", **options)
    return figure, figure.subplots(rows, columns, squeeze=False, **share)


def bars(results: Sequence[Result], machine: dict[str, Any], limits: Limits | None) -> Figure | None:
    """Speed relative to the baseline, one panel per dtype.

    Training is drawn where it ran without the kernels section: beside that it would make the picture twice as wide.
    """
    overview = [result for result in results if not sweep_of(result)]
    section = "kernels" if results_of(overview, "kernels") else "training"
    timed = results_of(overview, section)
    drawn = [result for result in timed if result.measured and result.provider != BASELINE]
    if not drawn:
        return None
    order = [provider.name for provider in PROVIDERS]
    providers = sorted(
        {result.provider for result in drawn}, key=lambda name: order.index(name) if name in order else 99
    )
    dtypes, cases = distinct(result.dtype for result in timed), distinct(result.case for result in timed)
    bar_height = 0.19  # inches
    height = len(cases) * (len(providers) + 1.2) * bar_height + 1.6
    figure, axes = panels(1, len(dtypes), figsize=(3.2 + 4.6 * len(dtypes), height), sharex=True, sharey=True)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        _draw_panel(axis, [result for result in timed if result.dtype == dtype], cases, providers, COLORS)
        axis.set_title(dtype, fontsize=13)
    _scale(axes[0, 0], drawn_speeds(timed))
    handles = [Rectangle((0, 0), 1, 1, color=COLORS.get(name, "gray")) for name in providers]
    figure.legend(
        handles, providers, loc="outside lower center", ncols=min(len(providers), 5), fontsize=11, frameon=False
    )
    figure.suptitle(
        f"{COMPARED[section]}: times as fast as {BASELINE}\non {machine['device']} ({machine['threads']} threads)\n"
        f"to the right of the line is faster; * relative to {FALLBACK_BASELINE}, where {BASELINE} cannot run",
        fontsize=13,
    )
    return figure


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
