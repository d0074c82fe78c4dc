# SPDX-License-Identifier: Apache-2.0
"""The table of all families: run them, keep what came out as JSON, and write docs/models.md from it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from . import discover, walk
from .overrides import IMPLEMENTATIONS, REFERENCES

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


TIMM = "its image tower is a model of the package timm, which is not installed"
SESSION = "takes a session object with its own memory of frames, not tensors"
NO_TINY_SIZES = "no tiny sizes found: those of its parts depend on each other"
REASONS = {
    "edgetam": TIMM,
    "pe_audio_video": TIMM,
    "pe_video": TIMM,
    "edgetam_video": SESSION,
    "sam2_video": SESSION,
    "sam3_tracker_video": SESSION,
    "esmfold2": "takes a dozen descriptions of atoms and bonds that no generic inputs give",
    "pp_ocrv6_small_rec": "its configuration names fields that its default backbone lacks",
    "sam2": NO_TINY_SIZES,
    "unlimited_ocr": "the width of its image features is written into its code",
}
"""Why families are not compared, where the error that building them gives does not say it well."""


COMMON_TESTS = """
## What transformers' common tests ask

transformers' wheel holds no tests, so `tests/model_families/test_common.py` asks what its common tests ask of `sdpa`,
of twelve families (llama, gemma2, gpt2, mistral, qwen3, opt, bart, t5, whisper, bert, vit, qwen3_vl): saving under one
implementation and loading under the other, switching a model that is loaded, an implementation for each part,
generation with a static cache and with beams, assisted generation, prefix tuning, gradient checkpointing. No test
found a difference from eager beyond 2e-4. What differs from `sdpa` by intent:

- `output_attentions=True` returns weights, where `sdpa` returns none and warns.
- Dispatch to torch's flash kernel (`test_sdpa_can_dispatch_on_flash` and its kin) is not asked: there are no back ends
  to choose from.
- A model that cannot be served raises while it is built; transformers' own implementations raise likewise, by another
  flag (`_supports_sdpa`).
- Masks are objects with a shape, not tensors; code that computes with one gets a dense tensor, which is logged.
""".strip().splitlines()
"""A section of the page, with the tests that it describes beside this file."""


DIFFERENCES = {
    "efficientloftr": "outputs agree; a gradient is 3.5e-4 away, in float64 1.1e-5, where it still rounds to float32",
    "voxtral_realtime": "only at positions that see no key: 0 here, the mean of all values under eager",
}
"""What is known of families that differ."""


def measure(only: Sequence[str] = ()) -> dict[str, Any]:
    """Examine all families; with `only`, these, beside what is on record of the others."""
    recorded = {row["folder"]: row for row in json.loads(RESULTS.read_text())["families"]} if only else {}
    rows = []
    for folder in discover.folders():
        if only and folder not in only:
            rows.append(recorded[folder])
            continue
        try:
            row = walk.examine(folder)
        except Exception as error:
            row = {"folder": folder, "models": [], "unseen": [], "obstacles": {folder: repr(error)[:300]}}
        rows.append(row)
        print(f"{folder}: {status(row)}", file=sys.stderr, flush=True)
    return {
        "transformers": transformers.__version__,
        "families": [compact(row) for row in rows],
        "refused": discover.folders_without_call(),
    }


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what differs from run to run: errors to one digit, and no obstacles where models were compared."""
    models = [
        {
            **entry,
            "checks": {
                name: float(f"{value:.0e}") if isinstance(value, float) else value
                for name, value in entry["checks"].items()
            },
            **sensitivity(entry),
        }
        for entry in row["models"]
    ]
    kept = {} if models else row["obstacles"]
    return {"folder": row["folder"], "models": models, "unseen": row["unseen"], "obstacles": kept}


def sensitivity(entry: dict[str, Any]) -> dict[str, Any]:
    """That attention moves the outputs visibly, or how little."""
    moved = entry.get("sensitivity")
    if not isinstance(moved, float):
        return {}
    return {"sensitivity": "shown" if moved > walk.compare.VISIBLE else float(f"{moved:.0e}")}


def status(row: dict[str, Any]) -> str:
    """One word, or a few."""
    if not row["models"]:
        return "not compared"
    if not walk.passed(row):
        return "differs"
    if any(entry["class"] in IMPLEMENTATIONS for entry in row["models"]):
        return "served in part"
    return "dense mask" if any(entry["dense"] for entry in row["models"]) else "served"


def page(results: dict[str, Any]) -> str:
    """docs/models.md."""
    rows = results["families"]
    counts: dict[str, int] = {}
    for row in rows:
        counts[status(row)] = counts.get(status(row), 0) + 1
    summary = ", ".join(f"{number} {name}" for name, number in sorted(counts.items(), key=lambda item: -item[1]))
    lines = [
        "# Models",
        "",
        f"The {len(rows)} model folders of transformers {results['transformers']} that call its attention interface,",
        "each built tiny from its configuration classes with random weights and compared with eager attention in",
        f"float32 on the CPU: {summary}. Written by `make models`, which runs them all.",
        "",
        "- **served**: every figure is below 2e-4. It is the largest difference relative to the largest value, and for",
        "  gradients the error in norm of the worst parameter's.",
        "  Where random weights make a model too sensitive for that, the figure is of float64 and below 1e-8.",
        "- **dense mask**: the same, with a mask of a number for each score, which the log says.",
        "- **served in part**: a part of the model chooses its attention from a table of its own and stays eager; the",
        "  others are ours, with a dict as `attn_implementation`.",
        "- **differs**: some figure is too large, or a run failed.",
        "- **not compared**: could not be built or run here, for the reason given.",
        "",
        "Where a model's eager attention misreads its masks, the reference is attention over boolean masks:",
        ", ".join(sorted(REFERENCES)) + ".",
        "",
        "Padding: the first of two samples is shorter. A dash: does not apply (no padding, no generation, no",
        "gradients; generation whose tokens change where attention moves by 1e-7 of itself), or eager attention",
        "fails, too.",
        "",
        "| folder | | class | outputs | left padding | right padding | generation | gradients |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if not row["models"]:
            lines.append(f"| {row['folder']} | {status(row)} | {reason(row)} | | | | | |")
        for entry in row["models"]:
            cells = [cell(entry["checks"].get(name)) for name in walk.compare.CHECKS]
            lines.append(f"| {row['folder']} | {status(row)} | {entry['class']} | " + " | ".join(cells) + " |")
    lines += ["", "## Families that differ", ""]
    lines += [f"- {row['folder']}: {DIFFERENCES.get(row['folder'], 'not understood')}" for row in rows if differs(row)]
    lines += ["", "## Attention layers that no comparison reached", ""]
    lines += [f"- {row['folder']}: {', '.join(row['unseen'])}" for row in rows if row["models"] and row["unseen"]]
    lines += ["", *COMMON_TESTS]
    lines += [
        "",
        "## Refused",
        "",
        f"{len(results['refused'])} folders define attention layers and do not call the interface. They compute",
        "attention themselves and are refused while they are built, by name:",
        ", ".join(results["refused"]) + ".",
        "",
    ]
    return "\n".join(lines)


def differs(row: dict[str, Any]) -> bool:
    """Whether a comparison was made and failed."""
    return status(row) == "differs"


def cell(value: float | str | None) -> str:
    """A figure, a dash, or what went wrong."""
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.0e}"
    return "-" if value is None or value.startswith("not applicable") else value[:80].replace("|", "/")


def reason(row: dict[str, Any]) -> str:
    """Why a family was not compared."""
    if row["folder"] in REASONS:
        return REASONS[row["folder"]]
    return next(iter(row["obstacles"].values()), "no class runs")[:160].replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_families.report", description=__doc__)
    parser.add_argument("folders", nargs="*", help="examine only these; the rest stays as it is on record")
    folders = parser.parse_args().folders
    if unknown := sorted(set(folders) - set(discover.folders())):
        parser.error(f"no folders that call the interface: {', '.join(unknown)}")
    results = measure(folders)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
