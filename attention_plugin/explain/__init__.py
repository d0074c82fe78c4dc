# SPDX-License-Identifier: Apache-2.0
"""Which attention and which mask each layer of a model gets, without loading its weights.

The model is built on torch's meta device and run on prompts of given lengths, so what is shown is what its own code
asks for. Exit status: 0 where some layer is served, 1 where none is, 2 for what cannot be explained.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..command import UsageError, require
from .inputs import Layout, Prompts, check_lengths, default_lengths
from .layers import ARCHITECTURES, Target, rows_of
from .probe import probe
from .report import Report, as_json, show
from .sources import load_config

__all__ = ["Report", "UsageError", "add_arguments", "as_json", "explain", "run", "show"]


def explain(
    source: str | os.PathLike[str],
    prompt_lengths: Sequence[int] | None = None,
    *,
    layout: Layout = "left",
    architecture: str | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """What the layers of a model would get under `attn_implementation="my_triton"`.

    Args:
        source: a model's folder, the path of a `config.json`, a model type of transformers, or a hub id.
        prompt_lengths: tokens of each prompt of the batch; default two prompts, long enough to show windows.
        layout: padding on the left or right, or prompts packed into one row.
        architecture: whose Triton kernels to assume, such as "sm_90", or "torch"; default what this machine would run.
        trust_remote_code: whether to run Python files that lie beside the configuration.

    Raises:
        UsageError: there is no such model, it has no attention layers, or the lengths make no batch.
    """
    check_lengths((1,) if prompt_lengths is None else prompt_lengths, layout)
    if architecture is not None and architecture not in ARCHITECTURES:
        raise UsageError(f"--architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    config = load_config(os.fspath(source), trust_remote_code=trust_remote_code)
    prompts = Prompts(tuple(prompt_lengths or default_lengths(config)), layout)
    found = probe(config, prompts, trust_remote_code=trust_remote_code)
    if not found.calls and not found.refusals:
        reason = f"; {found.notes[0]}" if found.notes else ""
        raise UsageError(f"{found.model_class} has no attention layers, so there is nothing to explain{reason}")
    if not found.calls and not any(refusal.refused for refusal in found.refusals):
        raise UsageError(f"{'; '.join(found.notes)}{_too_long(config, prompts)}")
    notes = list(found.notes)
    if found.guesses:
        notes.append(f"{found.guesses} decisions that hang on weights were taken as if the weights were 0")
    target = Target.chosen(config, architecture)
    return Report(found.model_class, config.model_type, prompts, target, rows_of(found, target), found.refusals, notes)


def _too_long(config: Any, prompts: Prompts) -> str:
    """A hint, where prompts are longer than what a model has positions for."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or prompts.shape[1] <= limit:
        return ""
    return f"; it has {limit} positions, and the prompts take {prompts.shape[1]}: give shorter --prompt-lengths"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `my-triton explain`."""
    parser.add_argument(
        "model",
        metavar="MODEL_OR_CONFIG",
        help="a model's folder, a config.json, a model type of transformers such as gemma3, or a hub id",
    )
    parser.add_argument(
        "--prompt-lengths",
        type=int,
        nargs="*",
        metavar="N",
        help="tokens of each prompt of a batch; default: two prompts, long enough to show windows",
    )
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--padding-side", choices=("left", "right"), default="left", help="default: left")
    layout.add_argument("--packed", action="store_true", help="the prompts one after the other in one row")
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help=f"what computes attention: {', '.join(ARCHITECTURES)}; default: what this machine has",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python files beside the config.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the masks (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Explain and print; returns the exit status."""
    plot = options.plot
    if plot is not None:
        if plot.suffix != ".png" or not plot.absolute().parent.is_dir():
            raise UsageError(f"--plot must be a file ending in .png in a folder that exists, got {str(plot)!r}")
        require("matplotlib", "--plot")
    if not options.json:
        require("rich", "explain without --json")
    report = explain(
        options.model,
        options.prompt_lengths,
        layout="packed" if options.packed else options.padding_side,
        architecture=options.architecture,
        trust_remote_code=options.trust_remote_code,
    )
    if plot is not None and report.masks:
        from .plot import draw

        draw(report, plot)
    if options.json:
        print(json.dumps(as_json(report), indent=2))
    else:
        show(report)
    if plot is not None and not report.masks:
        raise UsageError("--plot: there is no mask to draw, since nothing of this model is served")
    return 0 if report.serves else 1
