# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of every shipped configuration, on every chip, without a GPU.

Registers, spills, shared memory, programs per multiprocessor, tensor-core instructions, what the inner loop is made of,
and the most that this can reach. Exit status: 0 where all limits hold, 1 where one is passed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from attention_kernels.config_tables import SHARED_MEMORY
from attention_kernels.paths import interpreting

from ..command import UsageError, check_kernel_cache, require
from .rows import HEAD_DIMS, PARTS, Row, broken_limits, draw_up
from .show import around_marks, as_json, show, write_tables

__all__ = ["Row", "add_arguments", "broken_limits", "draw_up", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `my-triton compile-report`."""
    parser.add_argument("--architecture", nargs="+", metavar="NAME", help=f"default all: {', '.join(SHARED_MEMORY)}")
    parser.add_argument("--part", nargs="+", metavar="PART", help=f"default all: {', '.join(PARTS)}")
    parser.add_argument(
        "--head-dim", nargs="+", type=int, metavar="N", help=f"default all: {', '.join(map(str, HEAD_DIMS))}"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: both")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that compile; default 1")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the tables between the marks of a file")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Compile, and print; returns the exit status."""
    require("triton", "compile-report")
    if interpreting():
        raise UsageError("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    architectures = _known("--architecture", options.architecture, tuple(SHARED_MEMORY))
    parts = _known("--part", options.part, PARTS)
    for dim in options.head_dim or ():
        if dim not in HEAD_DIMS:
            dims = ", ".join(map(str, HEAD_DIMS))
            raise UsageError(f"--head-dim must be of {dims}, got {dim}: narrower heads use the next row")
    if options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {options.jobs}")
    if options.write is not None:
        _check_whole(options)
        if not options.write.is_file():
            raise UsageError(f"--write must be a file with the marks of the tables in it, got {str(options.write)!r}")
        around_marks(options.write)  # before minutes of compiling
    if not options.json:
        require("rich", "compile-report without --json")
    check_kernel_cache("compile-report")
    rows = draw_up(architectures, parts, options.head_dim, options.dtype, jobs=options.jobs, quiet=options.json)
    if not rows:
        chosen = {"--architecture": options.architecture, "--part": options.part, "--head-dim": options.head_dim}
        chosen["--dtype"] = [options.dtype] if options.dtype else None
        words = " ".join(f"{option} {' '.join(map(str, given))}" for option, given in chosen.items() if given)
        raise UsageError(f"no configuration fits {words} together; leave one of them out")
    if options.write is not None:
        write_tables(rows, options.write)
    if options.json:
        print(json.dumps(as_json(rows), indent=2))
    else:
        show(rows)
    return 1 if broken_limits(rows) else 0


def _check_whole(options: argparse.Namespace) -> None:
    """Refuse to put a selection in the place of a file's tables, which are of every chip, part and head dim."""
    chosen = {"--architecture": options.architecture, "--part": options.part, "--head-dim": options.head_dim}
    for option, given in chosen.items():
        if given:
            raise UsageError(
                f"--write replaces all tables of the file, so it takes no {option}, got {' '.join(map(str, given))}; "
                f"leave out {option}, or print these rows without --write"
            )


def _known(option: str, given: list[str] | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    for name in given or ():
        if name not in allowed:
            raise UsageError(f"{option} must be of {', '.join(allowed)}, got {name!r}")
    return tuple(given or allowed)
