# SPDX-License-Identifier: Apache-2.0
"""Measuring: each candidate is first made to fit the chip and to give the right result, and only then timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from attention_kernels import tuned

from .ahead import Ahead, OutOfTime
from .problems import Problem, Sizes, call, is_right
from .store import Measured

FLUSHED_BYTES = 256 << 20
"""Written before each sample on a GPU, so that nothing of its operands is left in the last cache."""

ASLEEP_CYCLES = 2_000_000
"""For how many cycles a GPU sleeps before each sample: about a millisecond, in which Python launches any kernel."""

GPU_SECONDS = 0.1
"""Time for the samples of a shape on a GPU."""

WORTH = 0.97
"""A shape replaces the built-in one where it takes at most this share of its time: noise does not decide."""


class BuiltInFails(Exception):
    """The built-in shape of a row does not give the right result on this device; says so in a line."""


def measure_row(
    problem: Problem, device: torch.device, dtype: torch.dtype, sizes: Sizes, ahead: Ahead, deadline: float,
    advance: Callable[[str], None],
) -> Measured | None:  # fmt: skip
    """The best shape for a row: the built-in one, unless a candidate that fits and is right is faster.

    Args:
        ahead: says which candidates are out before they are tried.
        deadline: when no shape is begun any more, by `time.monotonic()`.
        advance: called with words after each candidate.

    Returns:
        None if not even the built-in shape was begun.

    Raises:
        BuiltInFails: there is nothing to compare candidates with.
    """
    try:
        ahead.why_not(problem, problem.default, deadline)
    except OutOfTime:
        return None
    default, words = _check_and_time(problem, problem.default, device, dtype, sizes)
    if default is None:
        raise BuiltInFails(f"the built-in tile shape of {problem.key} fails here ({words}); see `my-triton doctor`")
    best, config = default, problem.default
    for candidate in problem.candidates:
        try:
            reason = ahead.why_not(problem, candidate, deadline)
        except OutOfTime:
            return Measured(problem.key, config, best * 1e6, default * 1e6, complete=False)
        found, words = (None, reason) if reason else _check_and_time(problem, candidate, device, dtype, sizes)
        if found is not None and found < best and found <= WORTH * default:
            best, config = found, candidate
        flags = [name for name in tuned.FLAGS if getattr(candidate, name, False)]
        advance(f"{problem.key} {(*candidate[:4], *flags)}: {words}")
    return Measured(problem.key, config, best * 1e6, default * 1e6)


def _check_and_time(
    problem: Problem, config: tuned.Config, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> tuple[float | None, str]:
    """Seconds of a call with a shape and words for them, or None and why it is out."""
    # No other row that was measured before: what comes of one does not hang on what is left of an earlier run.
    with tuned.using(device, {problem.key: config}):
        try:
            if not is_right(problem, device, dtype):
                return None, "wrong result"
            seconds = time_of(call(problem, device, dtype, sizes), device)
        except Exception as error:  # the compiler refuses some shapes, each line of Triton others
            return None, type(error).__name__
    return seconds, f"{seconds * 1e6:.0f} us"


def time_of(run: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call."""
    if device.type == "cuda":
        return _time_on_gpu(run, device)
    samples = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)


def _time_on_gpu(run: Callable[[], Any], device: torch.device) -> float:
    """Median seconds that the GPU takes for a call, with nothing in its cache.

    It sleeps until the call is on its way: what Python takes to launch a small kernel is many times what that runs for.
    """
    with torch.cuda.device(device):  # whose stream events are of
        return _median_on_current(run, device)


def _median_on_current(run: Callable[[], Any], device: torch.device) -> float:
    flush = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    samples: list[float] = []
    run()  # loads what was compiled ahead, or compiles: the time is for samples
    began = time.perf_counter()
    while len(samples) < 5 or (time.perf_counter() - began < GPU_SECONDS and len(samples) < 50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(ASLEEP_CYCLES)
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples)
