# SPDX-License-Identifier: Apache-2.0
"""What is known of a model's attention, as one object, as JSON, and as tables in a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attention_kernels.spans import map_of

from ..command import require
from .inputs import Prompts
from .layers import Mask, Row, Target, Work, element_of
from .probe import Refusal

PICTURES = 3
"""How many prompts of a batch are drawn side by side."""

WIDEST_NAME = 48
"""Characters up to which the names of layers are not broken."""


@dataclass(frozen=True)
class Report:
    """What `my-triton explain` found.

    Attributes:
        model: class of the model.
        model_type: as the configuration calls it.
        prompts: what it was run on.
        target: what would compute attention.
        rows: equal layers together.
        refusals: parts that are not served, or could not be run.
        notes: what else to know about the run.
    """

    model: str
    model_type: str
    prompts: Prompts
    target: Target
    rows: list[Row]
    refusals: list[Refusal]
    notes: list[str]

    @property
    def masks(self) -> list[Mask]:
        """The distinct masks, in the order in which they appear."""
        return list({row.mask.label: row.mask for row in self.rows if row.mask is not None}.values())

    @property
    def serves(self) -> bool:
        """Whether any layer is served."""
        return any(row.mask is not None for row in self.rows)

    @property
    def total(self) -> Work:
        """Scores of all heads of all layers."""
        counted = [(row.work, row.count * row.calls * row.call.scores[1]) for row in self.rows if row.work is not None]
        parts = [[getattr(w, n) * times for w, times in counted] for n in ("dense", "visible", "computed")]
        return Work(*(sum(part) for part in parts))


def share(part: int, whole: int) -> str:
    """A share in percent, with a digit where it is small."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"


# ---------------------------------------------------------------------- pictures


def elements_to_draw(mask: Mask) -> list[int]:
    """Numbers of the first few elements of the batch, or 0 alone where all share one mask."""
    spans = mask.call.spans
    assert spans is not None
    return list(range(min(spans.batch, PICTURES)))


def picture(mask: Mask, element: int) -> list[str]:
    """Lines of a small map of what an element's rows see: `#` all, `+` some, `.` none; without values, `?`."""
    spans, dense = element_of(mask.call, element), mask.call.dense
    if dense is None:
        return str(spans).splitlines()[1:]
    if dense.is_meta:
        return ["?"]
    return map_of(dense[min(element, len(dense) - 1), 0] & spans.to_dense()[0])


# ---------------------------------------------------------------------- JSON


def as_json(report: Report) -> dict[str, Any]:
    """The report in plain types."""
    prompts, total = report.prompts, report.total
    return {
        "model": report.model,
        "model_type": report.model_type,
        "prompt_lengths": list(prompts.lengths),
        "layout": prompts.layout,
        "target": {"architecture": report.target.architecture, "dtype": str(report.target.dtype).split(".")[-1]},
        "serves": report.serves,
        "layers": [_row_as_json(row) for row in report.rows],
        "masks": [
            {
                "label": mask.label,
                "mask": mask.name,
                "query_len": mask.call.scores[2],
                "key_len": mask.call.scores[3],
                "pictures": [picture(mask, element) for element in elements_to_draw(mask)],
            }
            for mask in report.masks
        ],
        "refused": [{"part": each.part, "reason": each.reason} for each in report.refusals if each.refused],
        "not_run": [{"part": each.part, "reason": each.reason} for each in report.refusals if not each.refused],
        "notes": report.notes,
        "total": vars(total),
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    batch, num_heads, query_len, key_len = row.call.scores
    return {
        "layers": row.layers,
        "names": list(row.names),
        "count": row.count,
        "calls_per_layer": row.calls,
        "path": row.path,
        "reason": row.call.refused,
        "batch": batch,
        "num_heads": num_heads,
        "num_kv_heads": row.call.num_kv_heads,
        "head_dim": row.call.head_dim,
        "value_dim": row.call.value_dim,
        "query_len": query_len,
        "key_len": key_len,
        "mask": row.call.mask_name if row.mask is None else row.mask.name,
        "mask_label": None if row.mask is None else row.mask.label,
        "softcap": row.call.softcap,
        "sinks": row.call.has_sinks,
        "bias": None if row.call.bias is None else list(row.call.bias),
        "scores_per_head": None if row.work is None else vars(row.work),
    }


# ---------------------------------------------------------------------- tables


def show(report: Report) -> None:
    """Print the report."""
    console = _console()
    text = require("rich.text", "explain", "cli")
    lengths = ", ".join(map(str, report.prompts.lengths))
    layout = "packed into one row" if report.prompts.layout == "packed" else f"padded on the {report.prompts.layout}"
    if len(report.prompts.lengths) == 1:
        layout = "alone"
    console.print(text.Text(f"{report.model} ({report.model_type})", style="bold"))
    console.print(
        f"prompts of {lengths} tokens, {layout}; {report.target.words}; no weights are loaded", highlight=False
    )
    if report.rows:
        console.print(_layer_table(report.rows))
    _show_masks(console, report)
    _show_refusals(console, report)
    if report.serves:
        total = report.total
        console.print(
            f"Of the scores that dense attention computes, {share(total.computed, total.dense)} are computed, "
            f"{share(total.dense - total.computed, total.dense)} are skipped (all layers and heads).",
            highlight=False,
        )
    else:
        console.print(text.Text("Nothing of this model can be served.", style="bold red"))


def _console() -> Any:
    console = require("rich.console", "explain", "cli").Console()
    if not console.is_terminal:
        console = require("rich.console", "explain", "cli").Console(width=120)
    return console


def _layer_table(rows: list[Row]) -> Any:
    box = require("rich.box", "explain", "cli")
    table = require("rich.table", "explain", "cli").Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layers", overflow="fold", no_wrap=max(len(row.layers) for row in rows) <= WIDEST_NAME)
    for heading in ("number", "heads / kv", "dim"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("path", no_wrap=True)
    table.add_column("mask", overflow="fold")
    for heading in ("seen", "computed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        call = row.call
        dim = str(call.head_dim) if call.head_dim == call.value_dim else f"{call.head_dim} / {call.value_dim}"
        mask = call.mask_name if row.mask is None else f"{row.mask.label}: {row.mask.name}"
        mask += f"; softcap {call.softcap:g}" if call.softcap is not None else ""
        mask += "; sinks" if call.has_sinks else ""
        work = row.work
        shares = ["", ""] if work is None else [share(work.visible, work.dense), share(work.computed, work.dense)]
        if call.dense is not None and call.dense.is_meta:
            shares[0] = f"<= {shares[0]}"
        number = str(row.count) if row.calls == 1 else f"{row.count} x {row.calls} calls"
        path = f"[red]{row.path}[/red]" if call.refused is not None else row.path
        cells = [row.layers, number, f"{call.scores[1]} / {call.num_kv_heads}", dim, path, mask]
        table.add_row(*cells, *shares)
    return table


def _show_masks(console: Any, report: Report) -> None:
    text = require("rich.text", "explain", "cli")
    colours = {"#": "cyan", "+": "yellow", ".": "bright_black"}
    if report.masks:
        console.print("Masks, queries down and keys across: # all seen, + some, . none", highlight=False)
    for mask in report.masks:
        _, _, query_len, key_len = mask.call.scores
        pictures = [picture(mask, element) for element in elements_to_draw(mask)]
        fitting = max(1, (console.width + 3) // (len(pictures[0][0]) + 3)) if pictures and pictures[0] else 1
        pictures = pictures[:fitting]
        many = mask.call.spans is not None and mask.call.spans.batch > 1
        heading = f"\n{mask.label}: {mask.name}, {query_len} queries x {key_len} keys"
        console.print(text.Text(heading + (f", the first {len(pictures)} of the batch" if many else ""), style="bold"))
        if pictures[0] == ["?"]:
            console.print("which keys each row sees depends on the weights", highlight=False)
            continue
        for lines in zip(*pictures, strict=True):
            row = text.Text()
            for character in "   ".join(lines):
                row.append(character, style=colours.get(character))
            console.print(row, no_wrap=True, overflow="crop")
    if report.masks:
        console.print()


def _show_refusals(console: Any, report: Report) -> None:
    text = require("rich.text", "explain", "cli")
    for part in report.refusals:
        words, style = ("refused", "bold red") if part.refused else ("not run", "bold yellow")
        console.print(text.Text.assemble((f"{words}: ", style), f"{part.part or 'the whole model'}: {part.reason}"))
    for row in report.rows:
        if row.call.refused is not None:
            console.print(text.Text.assemble(("refused: ", "bold red"), f"{row.layers}: {row.call.refused}"))
    for note in report.notes:
        console.print(text.Text.assemble(("note: ", "bold"), note))
