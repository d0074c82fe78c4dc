# SPDX-License-Identifier: Apache-2.0
"""Compiles ahead of serving the kernels that a model will need, into Triton's cache.

Which calls a model makes is what `my-triton explain` finds out: its code is run without weights. Exit status: 0 where
all compiled, 2 for what cannot be done.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from attention_kernels.config_tables import SHARED_MEMORY
from attention_kernels.configs import architecture, unsupported_device
from attention_kernels.paths import interpreting

from ..command import UsageError, check_kernel_cache, require
from ..explain import explain
from .calls import Kind, compile_calls, kinds_of

__all__ = ["add_arguments", "run", "warm_up"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `my-triton warmup`."""
    parser.add_argument("model", metavar="MODEL_OR_CONFIG", help="as for `my-triton explain`")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: the configuration's")
    parser.add_argument("--prompt-lengths", type=int, nargs="+", metavar="N", help="tokens of prompts; default 512")
    parser.add_argument("--training", action="store_true", help="the backward pass, too")
    parser.add_argument("--target", metavar="NAME", help="a chip that is not here, such as sm_90, for the same Triton")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python files beside the config.json")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Compile and print; returns the exit status."""
    require("triton", "warmup")
    if not options.json:
        require("rich", "warmup without --json")
    target = _target(options.target)
    for length in options.prompt_lengths or ():
        if length < 1:
            raise UsageError(f"--prompt-lengths must be positive, got {length}")
    check_kernel_cache("warmup")
    report = explain(options.model, architecture=target, trust_remote_code=options.trust_remote_code)
    dtype = DTYPES[options.dtype] if options.dtype else report.target.dtype
    kinds = kinds_of(report)
    if not kinds:
        raise UsageError(f"no layer of {report.model} is served; see `my-triton explain {options.model}`")
    compiled = warm_up(kinds, dtype, tuple(options.prompt_lengths or (512,)), target, options.target, options.training)
    if options.json:
        print(json.dumps({"architecture": target, "kernels": compiled}, indent=2))
    else:
        _show(compiled, target)
    return 0


def _target(name: str | None) -> str:
    """The architecture to compile for.

    Raises:
        UsageError: there is none, or kernels do not run on it.
    """
    if interpreting():
        raise UsageError("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    if name is not None:
        if name not in SHARED_MEMORY:
            raise UsageError(f"--target must be one of {', '.join(SHARED_MEMORY)}, got {name!r}")
        return name
    if not torch.cuda.is_available():
        raise UsageError("there is no GPU to compile for; name a chip with --target, such as --target sm_90")
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := unsupported_device(device)) is not None:
        raise UsageError(reason)
    return architecture(device)


def warm_up(
    kinds: list[Kind], dtype: torch.dtype, lengths: tuple[int, ...], target: str, absent: str | None, training: bool
) -> list[dict[str, Any]]:
    """Compile what the calls need; a dictionary per kernel: its name, for which calls, and the seconds it took.

    Args:
        kinds: of calls.
        dtype: of queries, keys and values.
        lengths: of prompts.
        target: the architecture.
        absent: the same, if its GPU is not here.
        training: whether gradients are wanted.
    """
    device = torch.device("cpu") if absent else torch.device("cuda", torch.cuda.current_device())
    return compile_calls(kinds, dtype, lengths, target, device, training)


def _show(compiled: list[dict[str, Any]], target: str) -> None:
    console = require("rich.console", "warmup").Console()
    table = require("rich.table", "warmup").Table(box=None, pad_edge=False)
    for column in ("kernel", "for", "variants", "seconds"):  # variants: of lengths, batches and parts
        table.add_column(column, overflow="fold")
    seconds: dict[tuple[str, str], list[float]] = {}
    for row in compiled:
        seconds.setdefault((row["kernel"], row["for"]), []).append(row["seconds"])
    for (kernel, calls), own in seconds.items():
        table.add_row(kernel, calls, str(len(own)), f"{sum(own):.2f}")
    console.print(table)
    total, slowest = sum(row["seconds"] for row in compiled), max(row["seconds"] for row in compiled)
    words = (
        f"{len(compiled)} kernels for {target} in {total:.1f} s, the slowest {slowest:.1f} s, are in Triton's cache."
    )
    console.print(words, markup=False)
