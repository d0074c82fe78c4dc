# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of every kernel that ships, for every chip, without a GPU.

Registers, spills, shared memory, programs that one processor holds, matrix instructions and what else the inner loop is
made of, and how near to the matrix units' peak that loop can come. The last two are read from the machine code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from attention_kernels.configs import SHARED_MEMORY
from attention_kernels.operators import triton_installed

from .command import UsageError, require

KERNELS = ("forward", "query", "key_value", "bias", "statistics", "decode")
MARKS = ("<!-- compiled: drawn by `make compile-report` -->\n", "\n<!-- end of compiled -->")


@dataclass(frozen=True)
class Row:
    """One configuration, compiled.

    Attributes:
        name, tile: which; the tile's rows, keys, warps and stages.
        registers, spills, shared_memory: of a thread, of a thread, of a program.
        programs: that one processor holds at a time.
        seconds: that compiling took.
        matrix: matrix instructions of the inner loop by name.
        counts: all its instructions by kind.
        copies: how keys and values come to shared memory: "TMA", "cp.async" or "loads".
        in_flight: whether exponentials are computed while a matrix product is under way; None: not asynchronous.
        waits: barriers on matrix products in the inner loop.
        narrowest: the unit that takes longest in it; empty where there is no estimate.
        overlapped, in_turn: share of the matrix units' peak at best, with all units side by side and one by one.
        fits: whether shared memory is within the chip's.
    """

    name: str
    tile: str
    registers: int
    spills: int
    shared_memory: int
    programs: int
    seconds: float
    matrix: dict[str, int]
    counts: dict[str, int]
    copies: str
    in_flight: bool | None
    waits: int
    narrowest: str
    overlapped: float | None
    in_turn: float | None
    fits: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `my-triton compile-report`."""
    parser.add_argument("--chip", nargs="+", choices=tuple(SHARED_MEMORY), help="default: all")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, help="default: all")
    parser.add_argument("--head-dim", type=int, nargs="+", choices=(64, 128, 256, 512), help="default: all")
    parser.add_argument("--bits", type=int, nargs="+", choices=(16, 32), help="of a number; default: both")
    parser.add_argument("--json", type=Path, metavar="PATH", help="every figure")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="replace the table between its marks in a file")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes; default: 2")


def run(options: argparse.Namespace) -> int:
    """Compile and print; 1 where a limit is passed or something spills on sm_90 up to head dim 256."""
    if not triton_installed():
        raise UsageError("Triton is not installed; pip install triton")
    names = list(chosen(options))
    if not names:
        raise UsageError("no configuration is left by these options; leave one of them out")
    rows = []
    progress = require("rich.progress", "compile-report")
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for row in progress.track(pool.map(compile_row, names), description="compiling", total=len(names)):
            rows.append(row)
    show(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if options.markdown is not None:
        text = options.markdown.read_text(encoding="utf-8")
        options.markdown.write_text(replaced(text, markdown(rows)), encoding="utf-8")
    return int(any(not row.fits or (row.spills and must_not_spill(row.name)) for row in rows))


def chosen(options: argparse.Namespace) -> Iterator[str]:
    """Names of the configurations that were asked for."""
    from attention_kernels.compiled.shipped import shipped

    for chip in options.chip or SHARED_MEMORY:
        for each in shipped(chip):
            if (
                (options.kernel is None or each.kernel in options.kernel)
                and (options.head_dim is None or each.dim in options.head_dim)
                and (options.bits is None or 8 * each.element_size in options.bits)
            ):
                yield each.name


def must_not_spill(name: str) -> bool:
    """Whether a spill of this configuration is a failure."""
    return name.startswith("sm_90") and " d512 " not in name


def compile_row(name: str) -> Row:
    """Compile one configuration, given by its name, and read its machine code."""
    from attention_kernels.compiled.chips import CHIPS, estimate, programs_at_a_time
    from attention_kernels.compiled.machine_code import inner_loop
    from attention_kernels.compiled.shipped import shipped

    each = next(one for one in shipped(name.split()[0]) if one.name == name)
    compiled, chip = each.compile(), CHIPS[each.architecture]
    loop = inner_loop(compiled.code)
    found = None if loop is None else estimate(compiled, loop, chip)
    instructions = [] if loop is None else loop.instructions
    copies = {one.name.split(".")[0] for one in instructions if one.kind == "asynchronous copy"}
    tile = each.config
    return Row(
        name=name,
        tile=f"{tile.block_m}x{tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages",
        registers=compiled.registers,
        spills=compiled.spills,
        shared_memory=compiled.shared_memory,
        programs=programs_at_a_time(compiled, chip),
        seconds=compiled.seconds,
        matrix={} if loop is None else loop.matrix_names(),
        counts={} if loop is None else loop.counts,
        copies="TMA" if "UTMALDG" in copies else "cp.async" if copies else "loads",
        in_flight=None if loop is None else loop.in_flight,
        waits=sum(one.name.startswith("WARPGROUP.DEPBAR") for one in instructions),
        narrowest="" if found is None else found.narrowest,
        overlapped=None if found is None else found.overlapped,
        in_turn=None if found is None else found.in_turn,
        fits=compiled.shared_memory <= SHARED_MEMORY[each.architecture],
    )


HEADINGS = (
    "configuration", "tile", "registers", "spills", "shared KB", "programs", "matrix (waits)", "exp", "float32",
    "other", "copies", "in flight", "narrowest", "share of peak",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row of the table."""
    matrix = sum(row.matrix.values())
    rest = sum(row.counts.values()) - matrix - row.counts.get("exponential", 0) - row.counts.get("float32", 0)
    share = "" if row.overlapped is None else f"{100 * (row.in_turn or 0):.0f} to {100 * row.overlapped:.0f} %"
    return [
        row.name, row.tile, str(row.registers), str(row.spills), f"{row.shared_memory / 1024:.0f}", str(row.programs),
        f"{matrix} ({row.waits})" if row.waits else str(matrix), str(row.counts.get("exponential", 0)),
        str(row.counts.get("float32", 0)), str(rest), row.copies,
        {None: "", True: "yes", False: "no"}[row.in_flight], row.narrowest, share,
    ]  # fmt: skip


def show(rows: list[Row]) -> None:
    """Print the table."""
    console = require("rich.console", "compile-report").Console()
    if not console.is_terminal:
        console = require("rich.console", "compile-report").Console(width=200)
    table = require("rich.table", "compile-report").Table(*HEADINGS)
    for row in rows:
        wrong = not row.fits or (row.spills and must_not_spill(row.name))
        table.add_row(*cells(row), style="bold red" if wrong else None)
    console.print(table)
    slowest = max(rows, key=lambda row: row.seconds)
    console.print(f"{len(rows)} configurations; the slowest, {slowest.name}, took {slowest.seconds:.1f} s to compile.")


def markdown(rows: list[Row]) -> str:
    """The table in Markdown."""
    lines = [f"| {' | '.join(HEADINGS)} |", "| --- " * len(HEADINGS) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} |" for row in rows)])


def replaced(text: str, table: str) -> str:
    """The text with the table between its marks.

    Raises:
        UsageError: a mark is missing.
    """
    before, found, rest = text.partition(MARKS[0])
    _, closed, after = rest.partition(MARKS[1])
    if not found or not closed:
        raise UsageError(f"--markdown: the file must hold the marks {MARKS[0].strip()!r} and {MARKS[1].strip()!r}")
    return before + MARKS[0] + table + MARKS[1] + after
