# SPDX-License-Identifier: Apache-2.0
"""Drawing masks: a panel for each, with what is computed, what is computed under a mask, and what is skipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..command import require
from .layers import Mask, Target, Work, element_of, pieces_of, tile_columns, tile_of, work_of
from .report import Report, elements_to_draw, share

RESOLUTION = 512
"""Pixels of a panel's raster, at most, on each side."""

MOST_MASKS = 12
"""Masks in a picture."""

SKIPPED, MASKED, WHOLE = 0, 1, 2
COLOURS = ("#eceff1", "#f5b35c", "#3b7ea1")
LABELS = ("skipped", "computed under a mask", "computed without a mask")


def draw(report: Report, path: Path) -> None:
    """Write a PNG with one row of panels for each distinct mask, and a column for each prompt that is drawn."""
    require("matplotlib", "--plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    masks = report.masks[:MOST_MASKS]
    panels = [(mask, element) for mask in masks for element in elements_to_draw(mask)]
    columns = max(len(elements_to_draw(mask)) for mask in masks) if len(masks) > 1 else len(panels)
    if columns == 1:
        columns = min(3, len(panels))
        places = {id(panel): divmod(index, columns) for index, panel in enumerate(panels)}
    else:
        index = {mask.label: row for row, mask in enumerate(masks)}
        places = {id(panel): (index[panel[0].label], panel[1]) for panel in panels}
    rows = 1 + max(row for row, _ in places.values())
    figure = Figure(figsize=(0.6 + 4.4 * columns, 1.3 + 4.6 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for panel in panels:
        _draw_panel(grid[places[id(panel)]], *panel, report)
    more = f" (the first {len(masks)} of {len(report.masks)} masks)" if len(masks) < len(report.masks) else ""
    figure.suptitle(f"{report.model}: what attention computes, {report.target.words}{more}", fontsize=12)
    handles = [Patch(facecolor=c, edgecolor="#90a4ae", label=name) for c, name in zip(COLOURS, LABELS, strict=True)]
    handles.append(Patch(facecolor="none", edgecolor="#b3261e", label="edge of what rows see"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, 2 * columns), frameon=False, fontsize=9)
    figure.savefig(path)


def _draw_panel(axes: Any, mask: Mask, element: int, report: Report) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    spans = element_of(mask.call, element)
    query_len, key_len = spans.query_len, spans.key_len
    raster = rasterize(mask, element, report.target)
    axes.set_visible(True)
    axes.imshow(
        raster, cmap=ListedColormap(COLOURS), norm=BoundaryNorm([0, 1, 2, 3], 3), interpolation="nearest",
        extent=(0, key_len, query_len, 0), aspect="auto" if not 0.25 < query_len / key_len < 4 else "equal",
    )  # fmt: skip
    rows = torch.linspace(0, query_len - 1, min(query_len, 2 * RESOLUTION)).long().unique()
    start, end = (bound.expand(1, query_len)[0, rows] for bound in (spans.start, spans.end))
    seen = end > start
    hidden = np.where(seen.numpy(), 0.0, np.nan)
    for bound in (start, end):  # the middle of a row, and no line where rows see nothing
        axes.plot(bound.numpy() + hidden, rows.numpy() + 0.5, color="#b3261e", linewidth=1.0, solid_joinstyle="miter")
    axes.set_xlim(0, key_len)
    axes.set_ylim(query_len, 0)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    layers = next(row.layers for row in report.rows if row.mask is mask)
    layers = layers if len(layers) <= 54 else f"...{layers[-51:]}"
    name = f"{mask.label}: {mask.name}{_prompt(mask, element, report)}"
    axes.set_title(f"{name}\n{layers}\n{_shares(mask, element, report)}", fontsize=9)
    axes.tick_params(labelsize=8)
    for spine in axes.spines.values():
        spine.set_color("#90a4ae")


def _prompt(mask: Mask, element: int, report: Report) -> str:
    """Which prompt of the batch a panel shows, where they differ."""
    lengths = report.prompts.lengths
    if mask.call.spans is None or mask.call.spans.batch == 1 or mask.call.spans.batch != len(lengths):
        return ""
    return f" ({lengths[element]} tokens)"


def _shares(mask: Mask, element: int, report: Report) -> str:
    spans = element_of(mask.call, element)
    dense = None if mask.call.dense is None else mask.call.dense[min(element, len(mask.call.dense) - 1)][None]
    scores = (1, *mask.call.scores[1:])
    call = replace(mask.call, spans=spans, scores=scores, dense=dense)
    work: Work = work_of(call, report.target)
    return f"{share(work.visible, work.dense)} seen, {share(work.computed, work.dense)} computed"


def rasterize(mask: Mask, element: int, target: Target) -> np.ndarray:
    """What becomes of the scores of one element: `SKIPPED`, `MASKED` or `WHOLE`, int8 of at most 512 x 512 pixels."""
    spans = element_of(mask.call, element)
    height, width = min(spans.query_len, RESOLUTION), min(spans.key_len, RESOLUTION)
    raster = np.zeros((height, width), dtype=np.int8)
    row_scale, key_scale = height / spans.query_len, width / spans.key_len
    rows = (np.arange(height) + 0.5) / row_scale  # what lies in the middle of each pixel
    keys = (np.arange(width) + 0.5) / key_scale
    tiled = mask.call.dense is not None or spans.key_mask is not None  # every tile has a mask
    if target.architecture is None:
        for piece in pieces_of(mask.call, element):
            down = (rows >= piece.rows.start) & (rows < piece.rows.stop)
            across = (keys >= piece.keys.start) & (keys < piece.keys.stop)
            place = down[:, None] & across
            if piece.kind == "causal":
                place &= keys - piece.keys.start <= rows[:, None] - piece.rows.start + 0.5
            raster[place] = MASKED if piece.kind in ("masked", "band") or tiled else WHOLE
        return raster
    block_m, block_n = tile_of(mask.call, target)
    bounds = spans.tile_bounds(block_m)
    first, last = tile_columns(spans, block_m, block_n)
    tile = torch.from_numpy(rows).long() // block_m
    column = keys[None]
    inside = (column >= (first[tile] * block_n).numpy()[:, None]) & (column < (last[tile] * block_n).numpy()[:, None])
    body_first = -(-bounds.body_first[0][tile].numpy() // block_n) * block_n
    body_last = bounds.body_last[0][tile].numpy() // block_n * block_n
    body = inside & (column >= body_first[:, None]) & (column < body_last[:, None])
    raster[inside] = MASKED
    if not tiled:
        raster[body] = WHOLE
    return raster
