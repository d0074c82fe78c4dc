# SPDX-License-Identifier: Apache-2.0
"""Measures tile shapes on this machine's GPU and keeps the fastest in the user's cache directory.

Each is checked against float64 before it is timed. Later processes read the file once and use it. Exit status: 0 where
everything was measured, 1 where there is no GPU, time ran out, it was interrupted, or a built-in shape or
the Gluon kernel fails, 2 for what cannot be done.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from attention_kernels import prebound, tuned
from attention_kernels.configs import unsupported_device

from ..command import PROGRAM, UsageError, require
from .ahead import Ahead, Chip, OutOfTime, chip_of, compiling_ahead
from .gluon import GluonFails, GluonHangs, GluonUntried, measure_gluon
from .measure import BuiltInFails, measure_row
from .problems import PASSES, Problem, Sizes, rows_to_measure
from .store import Measured, clear, files, rows_in, save

__all__ = ["Measured", "Outcome", "add_arguments", "run", "tune"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEAD_DIMS = (64, 128, 256, 512)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `my-triton tune`."""
    dims = [64, 128, 256]
    parser.add_argument("--head-dim", nargs="+", type=int, default=dims, metavar="N", help="default: 64 128 256")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--pass", nargs="+", dest="passes", choices=PASSES, default=list(PASSES), help="default: all")
    parser.add_argument("--device", type=int, default=0, metavar="INDEX", help="which GPU; default 0")
    parser.add_argument(
        "--seconds", type=float, default=270.0, metavar="S", help="begin no candidate after this; default 270"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="show what was measured, and where it is kept")
    instead.add_argument("--clear", action="store_true", help="delete what was measured, for all GPUs and versions")


def run(options: argparse.Namespace) -> int:
    """Measure, show or delete; returns the exit status."""
    require("platformdirs", "tune")
    if options.clear:
        try:
            deleted = clear()
        except OSError as error:
            raise UsageError(f"what was measured cannot be deleted: {error}") from error
        for file in deleted:
            print(f"deleted {file}")
        if not deleted:
            print(f"nothing measured, so nothing to delete; files would lie in {tuned.folder()}")
        return 0
    if options.show:
        show()
        return 0
    for dim in options.head_dim:
        if dim not in HEAD_DIMS:
            raise UsageError(f"--head-dim must be of 64, 128, 256, 512, got {dim}: narrower heads use the next row")
    if not options.seconds > 0:  # nor is NaN
        raise UsageError(f"--seconds must be above 0, got {options.seconds:g}")
    if not torch.cuda.is_available():
        print(f"{PROGRAM} tune: there is no GPU to measure on; built-in tile shapes stay in use", file=sys.stderr)
        return 1
    if not 0 <= options.device < torch.cuda.device_count():
        raise UsageError(
            f"--device must be below {torch.cuda.device_count()}, the number of GPUs, got {options.device}"
        )
    device = torch.device("cuda", options.device)
    if (reason := unsupported_device(device)) is not None:
        raise UsageError(reason)
    try:
        outcome = tune(device, tuple(options.passes), tuple(options.head_dim), DTYPES[options.dtype], options.seconds)
    except OSError as error:
        raise UsageError(f"what is measured cannot be kept: {error}") from error
    except KeyboardInterrupt:
        print(f"{PROGRAM} tune: interrupted; the rows that were measured are kept", file=sys.stderr)
        return 1
    show()
    for words in outcome.failed:
        print(f"{PROGRAM} tune: {words}", file=sys.stderr)
    return 0 if outcome.complete and not outcome.failed else 1


@dataclass
class Outcome:
    """What came of measuring.

    Attributes:
        measured: rows, which are kept in the device's file.
        failed: a line for each row whose built-in shape does not give the right result here.
        complete: whether time sufficed for the others.
    """

    measured: list[Measured] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    complete: bool = True


def tune(
    device: torch.device,
    passes: tuple[str, ...] = PASSES,
    head_dims: tuple[int, ...] = (64, 128, 256),
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 270.0,
    sizes: Sizes | None = None,
    quiet: bool = False,
) -> Outcome:
    """Measure rows of the tables on a device, save each as it is found, and use them in this process, too.

    Args:
        device: a GPU; a CPU where Triton's interpreter runs the kernels (for tests).
        sizes: of the calls; default what keeps a GPU busy.
        quiet: whether to show no progress.

    Raises:
        OSError: the cache directory cannot be written, which is found out first.
    """
    name, sizes, outcome = tuned.device_name(device), sizes or Sizes(), Outcome()
    save(name, [])
    deadline = time.monotonic() + seconds
    wanted = rows_to_measure(device, passes, head_dims, dtype)
    chip = chip_of(device) if device.type == "cuda" else None
    try:
        with (
            compiling_ahead(wanted, chip, dtype, sizes) as ahead,
            _progress(sum(max(1, len(each.candidates)) for each in wanted), quiet) as advance,
        ):
            for problem in (each for each in wanted if each.key[0] != "gluon"):
                try:
                    row = measure_row(problem, device, dtype, sizes, ahead, deadline, advance)
                except BuiltInFails as error:
                    outcome.failed.append(str(error))
                    continue
                if row is None:
                    outcome.complete = False
                    break
                outcome.complete &= row.complete
                # Of a row that was cut, the built-in shape takes the place of nothing that an earlier run has found.
                if row.complete or row.config != problem.default:
                    save(name, [row])
                    outcome.measured.append(row)
            gluon = [each for each in wanted if each.key[0] == "gluon"]
            _prove(gluon, name, device, dtype, sizes, chip, ahead, deadline, advance, outcome)
    finally:
        tuned.forget()
        prebound.forget()
    return outcome


def _prove(
    wanted: list[Problem], name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes, chip: Chip | None,
    ahead: Ahead, deadline: float, advance: Callable[[str], None], outcome: Outcome,
) -> None:  # fmt: skip
    """Have the Gluon kernel serve each head dim that it is right and faster for here, and no other any more."""
    for problem in wanted:
        try:
            if (reason := ahead.why_not(problem, problem.default, deadline)) is not None:
                raise GluonFails(reason)
            row, words = measure_gluon(problem, device, dtype, sizes, chip, deadline)
            _keep(name, problem, row, outcome)
        except OutOfTime:
            outcome.complete = False
            return
        except GluonUntried as error:  # what an earlier run has found is kept
            words = f"not tried: {error}"
        except GluonFails as error:
            words = str(error)
            outcome.failed.append(f"the Gluon kernel is not used for head dim {problem.key[2]}: {error}")
            _keep(name, problem, None, outcome)
            if isinstance(error, GluonHangs):  # as it would for others
                return
        advance(f"{problem.key}: {words}")


def _keep(device: str, problem: Problem, row: Measured | None, outcome: Outcome) -> None:
    """Put a row in the place of an earlier run's, or nothing."""
    rows = [] if row is None else [row]
    save(device, rows, without=[problem.key])
    outcome.measured += rows


def show() -> None:
    """Print every file's rows."""
    found = files()
    if not found:
        print(f"nothing measured; files would lie in {tuned.folder()}")
        return
    current = {tuned.tuned_file(tuned.device_name(torch.device("cuda", index))) for index in range(_gpus())}
    console = require("rich.console", "tune").Console()
    for file in found:
        table = require("rich.table", "tune").Table(box=None, pad_edge=False)
        for column in ("pass", "bits", "dim", "row", "tile", "warps", "stages", "loop", "us", "built-in us"):
            table.add_column(column, no_wrap=True)
        for row in rows_in(file):
            (part, size, dim, kind), config = row["key"], row["config"]
            tile = f"{config['block_m']}x{config['block_n']}"
            loop = ", ".join(name for name in tuned.FLAGS if config.get(name))
            table.add_row(
                part, str(8 * size), str(dim), kind, tile, str(config["num_warps"]), str(config["num_stages"]), loop,
                *(_rounded(row.get(name)) for name in ("microseconds", "default_microseconds")),
            )  # fmt: skip
        print(f"{file}{'' if file in current else ', which is not of a GPU of this machine and these kernels'}")
        console.print(table)


def _rounded(microseconds: Any) -> str:
    """A time for the table. Calls do without times, so a row that serves them may have none."""
    try:
        return f"{microseconds:.0f}"
    except (TypeError, ValueError, OverflowError):
        return "?"


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[str], None]]:
    if quiet:
        yield lambda words: None
        return
    console = require("rich.console", "tune").Console(stderr=True)
    with require("rich.progress", "tune").Progress(console=console) as progress:
        task = progress.add_task("measuring", total=total)

        def advance(words: str) -> None:
            progress.console.print(words, markup=False)
            progress.advance(task)

        yield advance
