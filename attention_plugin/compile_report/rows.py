# SPDX-License-Identifier: Apache-2.0
"""The rows of the report: each shipped configuration, compiled and looked at."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from attention_kernels.config_tables import SHARED_MEMORY

from ..command import require

if TYPE_CHECKING:  # these import Triton, which need not be installed for the program to start
    from attention_kernels.ahead_of_time import Case
    from attention_kernels.ahead_of_time.machine_code import MachineCode
    from attention_kernels.ahead_of_time.roofline import Roofline

PARTS = ("forward", "gluon", "backward", "decode", "merge", "statistics")
HEAD_DIMS = (64, 128, 256, 512)
"""Of the rows of the tables; a call with narrower heads uses the next."""

DTYPES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Row:
    """What the compiler makes of one configuration.

    Attributes:
        case: the configuration.
        code: what its machine code says.
        shared_memory: bytes per program.
        threads: per program.
        resident: programs that a multiprocessor holds at a time.
        roofline: the most that its loop can reach, where it can be counted.
        seconds: what compiling took; next to nothing where Triton's cache had it.
    """

    case: Case
    code: MachineCode
    shared_memory: int
    threads: int
    resident: int
    roofline: Roofline | None
    seconds: float


def draw_up(
    architectures: Sequence[str],
    parts: Sequence[str] = PARTS,
    head_dims: Sequence[int] | None = None,
    dtype: str | None = None,
    *,
    jobs: int = 1,
    quiet: bool = True,
) -> list[Row]:
    """Compile and look, in the order of the tables.

    Args:
        architectures, parts, head_dims, dtype: which rows; None is all.
        jobs: processes that compile.
        quiet: whether to show no progress.
    """
    from attention_kernels.ahead_of_time import shipped_cases

    cases = [
        case
        for architecture in architectures
        for case in shipped_cases(architecture)
        if case.part in parts
        and (head_dims is None or case.dim in head_dims)
        and (dtype is None or case.element_size == DTYPES[dtype])
    ]
    if not cases:  # nor a bar of their progress
        return []
    rows = []
    with _each(cases, jobs) as results, _progress(len(cases), quiet) as advance:
        for row in results:
            rows.append(row)
            advance()
    return rows


def row_of(case: Case) -> Row:
    """Compile one configuration."""
    from attention_kernels.ahead_of_time import compile_ahead
    from attention_kernels.ahead_of_time.chips import resident
    from attention_kernels.ahead_of_time.roofline import roofline

    kernel, arguments = case.kernel()
    compiled = compile_ahead(kernel, case.architecture, arguments)
    held = resident(case.architecture, compiled.registers, compiled.threads, compiled.shared_memory)
    return Row(
        case, compiled.code, compiled.shared_memory, compiled.threads, held, roofline(case, compiled), compiled.seconds
    )


def broken_limits(rows: Sequence[Row]) -> list[str]:
    """What must hold and does not: shared memory everywhere; no spills on sm_90 up to head dim 256."""
    broken = []
    for row in rows:
        limit = SHARED_MEMORY[row.case.architecture]
        if row.shared_memory > limit:
            broken.append(f"{row.case.name}: {row.shared_memory} bytes of shared memory, at most {limit}")
        if row.case.architecture == "sm_90" and row.case.dim <= 256 and row.code.spills:
            broken.append(f"{row.case.name}: {row.code.spills} instructions that spill registers")
    return broken


@contextmanager
def _each(cases: Sequence[Case], jobs: int) -> Iterator[Iterator[Row]]:
    if jobs == 1:
        yield map(row_of, cases)
        return
    # Triton's compiler is a library with threads of its own: processes are started afresh.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map(row_of, cases)


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Any]:
    if quiet:
        yield lambda: None
        return
    progress = require("rich.progress", "compile-report").Progress(
        console=require("rich.console", "compile-report").Console(stderr=True)
    )
    with progress:
        task = progress.add_task("compiling", total=total)
        yield partial(progress.advance, task)
