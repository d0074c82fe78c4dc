# SPDX-License-Identifier: Apache-2.0
"""All pictures of a run, each drawn where the run has what it shows."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .bars import COLORS, bars, panels
from .measure import Result
from .providers import BASELINE, OURS
from .rows import distinct, human_bytes, results_of, sweep_of
from .work import Limits

Draw = Callable[[Sequence[Result], dict[str, Any], Limits | None], Figure | None]


def lines(axis: Any, results: Sequence[Result], x: Callable[[Result], float], y: Callable[[Result], float]) -> None:
    """One line per provider over `x`."""
    for provider in distinct(result.provider for result in results):
        points = sorted((x(result), y(result)) for result in results if result.provider == provider)
        bold = {"linewidth": 2.5, "zorder": 3} if provider == OURS else {"linewidth": 1.2}
        axis.plot(*zip(*points, strict=True), marker="o", color=COLORS.get(provider, "gray"), label=provider, **bold)


def count_axis(axis: Any, values: Iterable[int]) -> None:
    """A logarithmic axis of numbers of tokens, with a tick at each value: 512, 1k, 2k, ..."""
    ticks = sorted(set(values))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 and tick % 1024 == 0 else str(tick) for tick in ticks])
    axis.minorticks_off()


def finish(figure: Figure, axes: Any, title: str) -> Figure:
    """Grid, one legend for all panels, and a title."""
    labels: dict[str, Any] = {}
    for axis in axes.flat:
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(
        list(labels.values()), list(labels), loc="outside lower center", ncols=min(5, len(labels)), frameon=False
    )
    figure.suptitle(title)
    return figure


def flops_per_second(result: Result) -> float:
    """What a result reached."""
    return result.details["work"]["flops"] / result.median


def bytes_per_second(result: Result) -> float:
    """What a result reached, of bytes that must be moved."""
    return result.details["work"]["bytes"] / result.median


def key_len(result: Result) -> int:
    """Keys of a sequence."""
    return result.details["shape"]["key_len"]


def where(machine: dict[str, Any]) -> str:
    """The machine, for titles."""
    return f"{machine['device']}, {machine['threads']} threads"


def over_lengths(section: str) -> Draw:
    """Speed over sequence length, one panel per head dim and kind of mask."""

    def draw(results: Sequence[Result], machine: dict[str, Any], limits: Limits | None) -> Figure | None:
        rows = [each for each in results_of(results, section) if sweep_of(each) == "lengths" and each.measured]
        if not rows:
            return None
        kinds = distinct(each.case.split()[0] for each in rows)
        dims = sorted({each.details["shape"]["head_dim"] for each in rows})
        dtypes = distinct(each.dtype for each in rows)
        unit, name = (1e12, "TFLOP/s") if machine["device_type"] == "cuda" else (1e9, "GFLOP/s")
        grid = [(kind, dtype) for kind in kinds for dtype in dtypes]
        size = (1.5 + 3.6 * len(dims), 1.2 + 2.8 * len(grid))
        figure, axes = panels(len(grid), len(dims), figsize=size, sharex=True)
        for line, (kind, dtype) in zip(axes, grid, strict=True):
            for axis, dim in zip(line, dims, strict=True):
                own = [
                    each
                    for each in rows
                    if (each.case.split()[0], each.dtype, each.details["shape"]["head_dim"]) == (kind, dtype, dim)
                ]
                lines(axis, own, key_len, lambda each: flops_per_second(each) / unit)
                if limits is not None and dtype in limits.flops_per_second:
                    best = limits.flops_per_second[dtype] / unit
                    axis.axhline(best, color="black", linestyle="--", label="a matrix product here")
                count_axis(axis, map(key_len, own))
                axis.set_title(f"{kind}, head dim {dim}, {dtype}", fontsize=10)
                axis.set_ylim(bottom=0)
            line[0].set_ylabel(f"{name} of kept pairs")
        for axis in axes[-1]:
            axis.set_xlabel("tokens of a sequence")
        what = {"kernels": "Forward", "backward": "Backward"}[section]
        return finish(figure, axes, f"{what}: speed over sequence length\n{where(machine)}")

    return draw


def roofline(results: Sequence[Result], machine: dict[str, Any], limits: Limits | None) -> Figure | None:
    """What was reached over how much there is to compute for each byte, under what this machine could do."""
    rows = [
        each
        for each in results
        if each.measured and each.provider in (OURS, BASELINE) and each.details.get("work", {}).get("bytes")
    ]
    if not rows or limits is None:
        return None
    dtypes = [dtype for dtype in distinct(each.dtype for each in rows) if dtype in limits.flops_per_second]
    figure, axes = panels(1, max(1, len(dtypes)), figsize=(1.5 + 4.5 * max(1, len(dtypes)), 4.6), sharey=True)
    for axis, dtype in zip(axes[0], dtypes, strict=False):
        peak = limits.flops_per_second[dtype]
        ridge = peak / limits.bytes_per_second
        own = [each for each in rows if each.dtype == dtype]
        intensities = [each.details["work"]["flops"] / each.details["work"]["bytes"] for each in own]
        ends = (min(*intensities, ridge) / 2, max(*intensities, ridge) * 2)
        axis.plot(
            [ends[0], ridge, ends[1]],
            [ends[0] * limits.bytes_per_second / 1e9, peak / 1e9, peak / 1e9],
            "k--",
            label="a copy and a matrix product here",
        )
        for provider, marker in ((BASELINE, "x"), (OURS, "o")):
            points = [
                (each.details["work"]["flops"] / each.details["work"]["bytes"], flops_per_second(each) / 1e9)
                for each in own
                if each.provider == provider
            ]
            if points:
                axis.scatter(*zip(*points, strict=True), marker=marker, s=24, color=COLORS[provider], label=provider)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(dtype, fontsize=10)
        axis.set_xlabel("floating point operations for each byte")
    axes[0, 0].set_ylabel("GFLOP/s of kept pairs")
    return finish(figure, axes, f"Roofline: every case, forward and backward\n{where(machine)}")


KINDS = {"": "one block for each sequence", "pages": "pages", "pages fp8": "pages in float8"}


def decode_bandwidth(results: Sequence[Result], machine: dict[str, Any], limits: Limits | None) -> Figure | None:
    """Bytes of the cache read in a second, over its length, one panel per kind of cache."""
    rows = [each for each in results_of(results, "kernels") if sweep_of(each) == "decode" and each.measured]
    if not rows:
        return None

    def kind(result: Result) -> str:
        return " ".join(result.case.split()[2:])

    dtype = distinct(each.dtype for each in rows)[-1]
    rows = [each for each in rows if each.dtype == dtype]
    kinds = [each for each in KINDS if any(kind(row) == each for row in rows)]
    figure, axes = panels(1, len(kinds), figsize=(1.5 + 4 * len(kinds), 4.6), sharey=True)
    styles = ("-", "--", ":", "-.")
    for axis, name in zip(axes[0], kinds, strict=True):
        own = [each for each in rows if kind(each) == name]
        batches = sorted({each.details["shape"]["batch"] for each in own})
        shown = batches if len(batches) <= 4 else [batches[0], batches[len(batches) // 3], batches[-3], batches[-1]]
        for style, batch in zip(styles, shown, strict=False):
            for provider in (BASELINE, OURS):
                points = sorted(
                    (key_len(each), bytes_per_second(each) / 1e9)
                    for each in own
                    if each.provider == provider and each.details["shape"]["batch"] == batch
                )
                if points:
                    label = f"{provider}, {batch} sequence{'s' * (batch > 1)}"
                    axis.plot(
                        *zip(*points, strict=True), style, marker="o", color=COLORS[provider], label=label, markersize=4
                    )
        if limits is not None:
            axis.axhline(limits.bytes_per_second / 1e9, color="black", linewidth=1, label="a copy here")
        count_axis(axis, map(key_len, own))
        axis.set_title(KINDS[name], fontsize=10)
        axis.set_xlabel("keys of a sequence")
    axes[0, 0].set_ylabel("GB/s")
    return finish(figure, axes, f"Decoding, {dtype}: bytes of keys and values in a second\n{where(machine)}")


def memory_over_tokens(results: Sequence[Result], machine: dict[str, Any], limits: Limits | None) -> Figure | None:
    """Peak memory of a padded forward pass over its tokens."""
    rows = [each for each in results_of(results, "memory") if each.measured and each.details.get("tokens")]
    if not rows:
        return None
    figure, axes = panels(1, 1, figsize=(6.4, 4.6))
    lines(axes[0, 0], rows, lambda each: each.details["tokens"], lambda each: max(each.median, 1.0))
    count_axis(axes[0, 0], [each.details["tokens"] for each in rows])
    axes[0, 0].set_yscale("log", base=2)
    axes[0, 0].yaxis.set_major_formatter(lambda value, _: human_bytes(value))
    axes[0, 0].set_xlabel("tokens of a prompt whose left half is padding")
    axes[0, 0].set_ylabel("peak above the inputs, mask included")
    return finish(figure, axes, f"Memory of one forward pass\n{where(machine)}")


def rank_scaling(results: Sequence[Result], machine: dict[str, Any], limits: Limits | None) -> Figure | None:
    """Tokens per second over ranks, prefill and decoding, beside what perfect sharing would give."""
    rows = [each for each in results_of(results, "tp") if each.measured and each.details.get("ranks")]
    if not rows:
        return None
    cases = distinct(each.case for each in rows)
    figure, axes = panels(1, len(cases), figsize=(1.5 + 4 * len(cases), 4.4))
    for axis, case in zip(axes[0], cases, strict=True):
        points = sorted((each.details["ranks"], each.work / each.median) for each in rows if each.case == case)
        axis.plot(*zip(*points, strict=True), marker="o", color=COLORS[OURS], label=OURS)
        ranks = [rank for rank, _ in points]
        # On a CPU ranks share the cores of one; more of them cannot be faster.
        if machine["device_type"] == "cuda":
            first = points[0][1] / points[0][0]
            axis.plot(ranks, [first * rank for rank in ranks], "k--", label="shared perfectly")
        axis.set_xticks(ranks)
        axis.set_ylim(bottom=0)
        axis.set_title(case, fontsize=10)
        axis.set_xlabel("ranks")
    axes[0, 0].set_ylabel("tokens/s")
    return finish(figure, axes, f"Tensor parallel\n{where(machine)}")


def skipped_work(results: Sequence[Result], machine: dict[str, Any], limits: Limits | None) -> Figure | None:
    """For each mask, the share of pairs that it keeps, and the share of time, of full attention over as many tokens."""
    rows = [
        each
        for each in results_of(results, "kernels", provider=OURS)
        if each.measured and not sweep_of(each) and each.details.get("work") and not each.case.startswith("decode")
    ]
    full = {each.dtype: each for each in rows if each.case == "bidirectional"}
    rows = [each for each in rows if each.dtype in full and each.case in SKIPPING]
    if not rows:
        return None
    dtype = distinct(each.dtype for each in rows)[-1]
    rows = [each for each in rows if each.dtype == dtype]
    whole = full[dtype]
    figure, axes = panels(1, 1, figsize=(7, 1.4 + 0.6 * len(rows)))
    axis = axes[0, 0]
    for index, each in enumerate(rows):
        kept = each.details["work"]["kept_pairs"] / whole.details["work"]["kept_pairs"]
        axis.barh(index - 0.2, kept, 0.38, color="0.7", label="pairs of a row and a key that the mask keeps")
        axis.barh(index + 0.2, each.median / whole.median, 0.38, color=COLORS[OURS], label=f"time of {OURS}")
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), [each.case for each in rows])
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("share of full attention over as many tokens")
    return finish(figure, axes, f"Work that masks save, {dtype}\n{where(machine)}")


SKIPPING = ("causal", "left_padded", "sliding", "packed", "image_blocks", "encoder_padded")


def plain_bars(section: str, title: str, unit: str, value: Callable[[Result], float]) -> Draw:
    """One bar for each row of a section."""

    def draw(results: Sequence[Result], machine: dict[str, Any], limits: Limits | None) -> Figure | None:
        rows = [each for each in results_of(results, section) if each.measured]
        if not rows:
            return None
        figure, axes = panels(1, 1, figsize=(7, 1.4 + 0.4 * len(rows)))
        labels = [f"{each.case} {each.dtype} {each.provider}" for each in rows]
        colors = [COLORS.get(each.provider, "gray") for each in rows]
        axes[0, 0].barh(range(len(rows)), [value(each) for each in rows], color=colors)
        axes[0, 0].set_yticks(range(len(rows)), labels, fontsize=8)
        axes[0, 0].invert_yaxis()
        axes[0, 0].set_xlabel(unit)
        figure.suptitle(f"{title}\n{where(machine)}")
        return figure

    return draw


FIGURES: dict[str, Draw] = {
    "speed": bars,
    "lengths": over_lengths("kernels"),
    "lengths-backward": over_lengths("backward"),
    "roofline": roofline,
    "decode": decode_bandwidth,
    "skipped": skipped_work,
    "memory": memory_over_tokens,
    "ranks": rank_scaling,
    "models": plain_bars("models", "Whole models", "tokens/s", lambda each: (each.work or 0) / each.median),
    "serve": plain_bars("serve", "Serving", "tokens/s", lambda each: (each.work or 0) / each.median),
    "host": plain_bars("host", "A call before the device works", "microseconds", lambda each: 1e6 * each.median),
}
"""By name; a run's main picture is the first that it has."""


def figures_of(results: Sequence[Result], machine: dict[str, Any], limits: Limits | None) -> dict[str, Figure]:
    """Every picture that the results have something for."""
    drawn = {name: draw(results, machine, limits) for name, draw in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()


def write_plots(
    results: Sequence[Result], machine: dict[str, Any], limits: Limits | None, path: Path
) -> dict[str, Path]:
    """The main picture at `path`, the others beside it with their names: `run.png`, `run-roofline.png`, ..."""
    written: dict[str, Path] = {}
    for name, figure in figures_of(results, machine, limits).items():
        target = path.with_name(f"{path.stem}-{name}.png") if written else path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(png(figure))
        written[name] = target
    return written
