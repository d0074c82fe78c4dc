# SPDX-License-Identifier: Apache-2.0
"""Compiling shapes ahead of measuring them, in as many processes as there are cores to spare.

Compiling takes most of a measurement, and no GPU. What the processes compile is in Triton's cache on disk when the one
that measures asks for it: they make the same calls through the same launchers.
"""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection

import torch

from attention_kernels import configs, tuned

from .problems import CHECKED, Problem, Sizes, call

NOWHERE = torch.device("meta")
"""Where tensors have no content: all that decides what is compiled is their shapes, strides and dtypes."""

MOST_PROCESSES = 16
"""Each imports torch and Triton, which takes some hundred megabytes."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chip:
    """What compiling for a GPU takes.

    Attributes:
        target: what Triton compiles for, such as "sm_103".
        architecture: whose rows of the tables serve it, such as "sm_100".
        processors: how many it has; the keys of a cache are split by them.
    """

    target: str
    architecture: str
    processors: int


def chip_of(device: torch.device) -> Chip:
    """The chip of a GPU."""
    from triton.runtime import driver

    with torch.cuda.device(device):
        name = driver.active.get_current_target().arch
    target = name if isinstance(name, str) else f"sm_{name}"
    return Chip(target, configs.architecture(device), configs.processors(device))


class OutOfTime(Exception):
    """The deadline has passed."""


class Ahead:
    """Shapes that other processes compile."""

    def __init__(self, chip: Chip | None, futures: dict[tuple[tuned.Key, tuned.Config], Future[str | None]]) -> None:
        """Of a chip, or None for the interpreter, which compiles nothing; `futures` are answers to `why_not`."""
        self._chip, self._futures = chip, futures

    def why_not(self, problem: Problem, config: tuned.Config, deadline: float) -> str | None:
        """Why a shape is out, or None; then what measuring it launches is in Triton's cache, if processes compile.

        Raises:
            OutOfTime: it is not compiled by `deadline`, as `time.monotonic()` counts.
        """
        left = deadline - time.monotonic()
        if left < 0:
            raise OutOfTime
        future = self._futures.get((problem.key, config))
        if future is not None:
            try:
                return future.result(min(left, threading.TIMEOUT_MAX))
            except concurrent.futures.TimeoutError as error:
                raise OutOfTime from error
            except Exception as error:  # whatever has become of the processes, this one can compile
                _log_missing_processes(error)
                self._futures.clear()
        if self._chip is None or config == problem.default:
            return None
        return unfit(problem.key, config, self._chip.architecture)


@contextmanager
def compiling_ahead(wanted: Sequence[Problem], chip: Chip | None, dtype: torch.dtype, sizes: Sizes) -> Iterator[Ahead]:
    """Have the built-in shapes and the candidates compiled while this holds, in the order in which they are measured.

    Where processes cannot be started, or with one core, the one that measures compiles by itself.
    """
    shapes = [(problem, config) for problem in wanted for config in (problem.default, *problem.candidates)]
    count = min(len(shapes), _cores() - 1, MOST_PROCESSES)
    if chip is None or count < 1:
        yield Ahead(chip, {})
        return
    # Triton's compiler is a library with threads of its own: processes are started afresh.
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool, futures = None, {}
    try:
        pool = ProcessPoolExecutor(count, context, initializer=end_with, initargs=(theirs,))
        for problem, config in shapes:
            futures[problem.key, config] = pool.submit(compile_shape, problem, config, chip, dtype, sizes)
    except (ImportError, NotImplementedError, OSError, BrokenExecutor) as error:  # some systems have no semaphores
        _log_missing_processes(error)
        futures.clear()
    try:
        yield Ahead(chip, futures)
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        ours.close()  # what they still compile is of no use any more
        theirs.close()


def compile_shape(problem: Problem, config: tuned.Config, chip: Chip, dtype: torch.dtype, sizes: Sizes) -> str | None:
    """Compile what measuring a shape launches. Why it is out, or None."""
    from attention_kernels.ahead_of_time import absent_device

    from ..warmup.calls import compiling_only

    if config != problem.default and (reason := unfit(problem.key, config, chip.architecture)) is not None:
        return reason
    with (
        absent_device(chip.target),
        configs.assuming(chip.architecture, chip.processors),
        compiling_only({}),
        tuned.using(NOWHERE, {problem.key: config}),
    ):
        try:
            if problem.key[0] == "gluon":
                _compile_trials(problem.key[2])
            for each in (CHECKED, sizes):
                call(problem, NOWHERE, dtype, each)()
        except Exception as error:
            return f"does not compile: {type(error).__name__}"
    return None


def _compile_trials(dim: int) -> None:
    from .gluon import DTYPES, TRIALS, inputs_of, run_kernel

    for dtype, trial in product(DTYPES, TRIALS):
        run_kernel(trial, inputs_of(trial, NOWHERE, dtype, dim))


def unfit(key: tuned.Key, config: tuned.Config, architecture: str) -> str | None:
    """Why a shape cannot serve every call of its row on a chip, or None: it is compiled with every extra."""
    from attention_kernels.ahead_of_time import Case, compile_ahead
    from attention_kernels.config_tables import SHARED_MEMORY

    part, size, dim, kind = key
    for extra in {"forward": (" (softcap)", " (hidden keys)"), "backward": (" (spans)",)}.get(part, ("",)):
        case = Case(architecture, part, size, dim, kind + extra, config)
        try:
            kernel, arguments = case.kernel()
            compiled = compile_ahead(kernel, case.architecture, arguments)
            spills = compiled.spills
        except Exception as error:
            return f"does not compile: {type(error).__name__}"
        if compiled.shared_memory > SHARED_MEMORY[case.architecture]:
            return "over the shared memory"
        if spills:
            return "spills"
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with(pipe: Connection) -> None:
    """What a process does first: it is to end on Ctrl-C, without a traceback, and once a pipe's other end is closed.

    That is so too when the process that holds it has died.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_wait_for_end, args=(pipe,), daemon=True).start()


def _wait_for_end(pipe: Connection) -> None:
    with suppress(EOFError, OSError):
        pipe.recv_bytes()
    os._exit(1)


def _log_missing_processes(error: Exception) -> None:
    _log.warning("attention: processes that compile ahead do not run here (%s), so `tune` takes longer", error)
