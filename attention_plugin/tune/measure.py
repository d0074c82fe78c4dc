# SPDX-License-Identifier: Apache-2.0
"""Measuring: each candidate is first made to fit the chip and to give the right result, and only then timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from attention_kernels import tuned

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
    problem: Problem, device: torch.device, dtype: torch.dtype, sizes: Sizes, deadline: float,
    advance: Callable[[str], None],
) -> Measured:  # fmt: skip
    """The best shape for a row: the built-in one, unless a candidate that fits and is right is faster.

    Args:
        deadline: when no candidate is begun any more, by `time.monotonic()`.
        advance: called with words after each candidate.

    Raises:
        BuiltInFails: there is nothing to compare candidates with.
    """
    default, words = _check_and_time(problem, problem.default, device, dtype, sizes)
    if default is None:
        raise BuiltInFails(f"the built-in tile shape of {problem.key} fails here ({words}); see `my-triton doctor`")
    best, config = default, problem.default
    for candidate in problem.candidates:
        if time.monotonic() > deadline:
            return Measured(problem.key, config, best * 1e6, default * 1e6, complete=False)
        found, words = _try(problem, candidate, device, dtype, sizes)
        if found is not None and found < best and found <= WORTH * default:
            best, config = found, candidate
        flags = [name for name in tuned.FLAGS if getattr(candidate, name, False)]
        advance(f"{problem.key} {(*candidate[:4], *flags)}: {words}")
    return Measured(problem.key, config, best * 1e6, default * 1e6)


def _try(
    problem: Problem, candidate: tuned.Config, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> tuple[float | None, str]:
    """Seconds of a candidate and words for them, or None and why it is out."""
    if device.type == "cuda" and (reason := unfit(problem, candidate, device)) is not None:
        return None, reason
    return _check_and_time(problem, candidate, device, dtype, sizes)


def _check_and_time(
    problem: Problem, config: tuned.Config, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> tuple[float | None, str]:
    """The same of any shape, whatever it takes of the chip."""
    # No other row that was measured before: what comes of one does not hang on what is left of an earlier run.
    with tuned.using(device, {problem.key: config}):
        try:
            if not is_right(problem, device, dtype):
                return None, "wrong result"
            seconds = _time(call(problem, device, dtype, sizes), device)
        except Exception as error:  # the compiler refuses some shapes, each line of Triton others
            return None, type(error).__name__
    return seconds, f"{seconds * 1e6:.0f} us"


def unfit(problem: Problem, candidate: tuned.Config, device: torch.device) -> str | None:
    """Why a shape cannot serve every call of its row on a chip, or None: it is compiled with every extra."""
    from attention_kernels.ahead_of_time import Case, compile_ahead
    from attention_kernels.config_tables import SHARED_MEMORY
    from attention_kernels.configs import architecture

    part, size, dim, kind = problem.key
    name = architecture(device)
    kind += {"forward": " (softcap)", "backward": " (spans)"}.get(part, "")
    case = Case(name, part, size, dim, kind, candidate)
    try:
        kernel, arguments = case.kernel()
        compiled = compile_ahead(kernel, case.architecture, arguments)
        spills = compiled.spills
    except Exception as error:
        return f"does not compile: {type(error).__name__}"
    if compiled.shared_memory > SHARED_MEMORY[case.architecture]:
        return "over the shared memory"
    return "spills" if spills else None


def _time(run: Callable[[], Any], device: torch.device) -> float:
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
    flush = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    samples: list[float] = []
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
