# SPDX-License-Identifier: Apache-2.0
"""Proving the Gluon kernel on the GPU at hand, and measuring it beside the Triton kernel.

No GPU had run it when it was written, and its warps wait for one another. So a process of its own runs it, which is
ended when it does not come back.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from torch import Tensor

from attention_kernels import Spans, attention_reference
from attention_kernels.reference import error_bound

from .ahead import OutOfTime
from .measure import WORTH, time_of
from .problems import Problem, Sizes, call
from .store import Measured

MOST_SECONDS = 120.0
"""For a head dim: to import, to compile a dozen variants where that was not done ahead, and to run them."""

REPEATS = 5
"""How often each trial is made: what is not waited for shows now and then."""


DTYPES = (torch.bfloat16, torch.float16)
"""They share a row, so both are tried."""


@dataclass(frozen=True)
class Trial:
    """A call of the Gluon kernel whose result is compared with float64.

    Attributes:
        name: what it is about.
        spans: of the call, on a device; keys and values that they hide apart from padding are NaN.
        batch, heads: of queries; a third of the heads are key heads.
        has_sinks: whether there are some.
        trains: whether the kernel says what was lost by rounding.
    """

    name: str
    spans: Callable[[torch.device], Spans]
    batch: int = 1
    heads: int = 6
    has_sinks: bool = False
    trains: bool = False


class GluonFails(Exception):
    """The kernel must not be used on this device."""


@dataclass(frozen=True)
class Verdict:
    """What is known of the kernel for a head dim on a GPU.

    Attributes:
        wrong: why it must not be used; None if it is right.
        seconds: of a call.
        triton_seconds: of the same call by the Triton kernel, with the fastest of its shapes.
    """

    wrong: str | None = None
    seconds: float = 0.0
    triton_seconds: float = 0.0


def _documents(device: torch.device) -> Spans:
    """Of 500 keys and 430 rows, of which the last see nothing."""
    query_offsets, key_offsets = (
        torch.tensor(each, dtype=torch.int32, device=device)
        for each in ([0, 70, 71, 300, 417], [0, 129, 130, 300, 500])
    )
    return Spans.packed_offsets(query_offsets, key_offsets, 430, 500)


def _holes(device: torch.device) -> Spans:
    """A window over sequences with padding on their left and within."""
    shown = torch.rand(2, 333, generator=torch.Generator().manual_seed(0)) > 0.3
    shown[1, :150] = False
    return Spans.sliding(333, left=100, device=device) & Spans.padded(shown.to(device), 333)


TRIALS = (
    Trial("a causal prompt", lambda device: Spans.causal(333, device=device)),
    Trial("more tiles than programs", lambda device: Spans.causal(1033, device=device), batch=4, heads=27),
    Trial("documents", _documents, has_sinks=True),
    Trial("few rows and many keys", lambda device: Spans.full(33, 2049, device=device), trains=True),
    Trial("hidden keys and a window", _holes, batch=2, has_sinks=True, trains=True),
)


class Inputs(NamedTuple):
    """Of a trial: queries, keys and values, stored token by token, and the rest."""

    query: Tensor
    key: Tensor
    value: Tensor
    spans: Spans
    sinks: Tensor | None


def inputs_of(trial: Trial, device: torch.device, dtype: torch.dtype, dim: int) -> Inputs:
    """The same each time; without content on torch's meta device."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    spans, key_heads = trial.spans(device), trial.heads // 3

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    sizes = (spans.query_len, trial.heads), (spans.key_len, key_heads), (spans.key_len, key_heads)
    query, key, value = (drawn(trial.batch, tokens, heads, dim).to(dtype).transpose(1, 2) for tokens, heads in sizes)
    return Inputs(query, key, value, spans, drawn(trial.heads) if trial.has_sinks else None)


def run_kernel(trial: Trial, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp, and what was lost by rounding, by the Gluon kernel."""
    from attention_kernels.hopper import launching

    query, key, value, spans, sinks = inputs
    if spans.key_mask is not None:
        hidden = ~spans.key_mask[:, None, :, None]
        key, value = (each.masked_fill(hidden, torch.nan) for each in (key, value))
    bounds = spans.start, spans.end, spans.key_mask, spans.gap_count
    return launching.forward(query, key, value, *bounds, sinks, query.shape[3] ** -0.5, wants_rounding=trial.trains)


def first_wrong(
    device: torch.device, dtype: torch.dtype, dim: int, trials: Sequence[Trial] = TRIALS, repeats: int = REPEATS
) -> str | None:
    """What is wrong with the first trial that does not go as it should; None if all do."""
    for trial in trials:
        if (words := _wrong(trial, inputs_of(trial, device, dtype, dim), repeats)) is not None:
            return f"{trial.name}, {str(dtype).removeprefix('torch.')}: {words}"
    return None


def _wrong(trial: Trial, inputs: Inputs, repeats: int) -> str | None:
    output, lse, rounding = results = run_kernel(trial, inputs)
    for _ in range(repeats - 1):
        if not all(map(torch.equal, run_kernel(trial, inputs), results)):
            return "two runs of one call differ"
    exact, exact_lse, allowed = _truth(inputs)
    error = float((output.double() - exact).norm())
    if not error <= allowed:
        return f"error {error:.2e}, allowed {allowed:.2e}"
    if not torch.allclose(lse.double(), exact_lse, rtol=1e-4, atol=1e-4):
        return "the log-sum-exp is wrong"
    if trial.trains and not float((output.double() + rounding.double() - exact).norm()) <= error:
        return "what was lost by rounding is wrong"
    return None


def _truth(inputs: Inputs) -> tuple[Tensor, Tensor, float]:
    """The exact output and log-sum-exp, and the largest error that is right."""
    query, key, value, spans, sinks = inputs
    mask = spans.to_dense()[:, None]
    exact, exact_lse = attention_reference(query, key, value, mask=mask, sinks=sinks, dtype=torch.float64)
    eager, _ = attention_reference(query, key, value, mask=mask, sinks=sinks, dtype=query.dtype)
    return exact, exact_lse, error_bound(float((eager.double() - exact).norm()), float(exact.norm()), query.dtype)


# ---------------------------------------------------------------------- a process of its own


def measure_gluon(
    problem: Problem, device: torch.device, dtype: torch.dtype, sizes: Sizes, deadline: float,
    judge: Callable[[Problem, torch.device, torch.dtype, Sizes], Verdict] | None = None,
) -> tuple[Measured | None, str]:  # fmt: skip
    """The row of a head dim if the kernel is right and worth it there, and words for what was found.

    Args:
        deadline: by `time.monotonic()`.
        judge: what the process does; for tests.

    Raises:
        OutOfTime: the deadline has passed.
        GluonFails: the kernel is wrong here, or did not come back; says so in a line.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise OutOfTime
    seconds = min(left, MOST_SECONDS)
    verdict = _asked(judge or judged, (problem, device, dtype, sizes), seconds)
    if verdict is None:
        if seconds < MOST_SECONDS:
            raise OutOfTime
        raise GluonFails(f"it did not come back within {seconds:.0f} s")
    if verdict.wrong is not None:
        raise GluonFails(verdict.wrong)
    words = f"{verdict.seconds * 1e6:.0f} us, the Triton kernel {verdict.triton_seconds * 1e6:.0f} us"
    if verdict.seconds > WORTH * verdict.triton_seconds:
        return None, words
    return Measured(problem.key, problem.default, verdict.seconds * 1e6, verdict.triton_seconds * 1e6), words


def judged(problem: Problem, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Verdict:
    """Try the kernel and time it beside the Triton kernel."""
    _, size, dim, kind = problem.key
    for each in DTYPES:
        if (wrong := first_wrong(device, each, dim)) is not None:
            return Verdict(wrong)
    triton = Problem(("forward", size, dim, kind), problem.default, ())
    seconds, triton_seconds = (time_of(call(each, device, dtype, sizes), device) for each in (problem, triton))
    return Verdict(None, seconds, triton_seconds)


def _asked(judge: Callable[..., Verdict], arguments: tuple, seconds: float) -> Verdict | None:
    """What a process of its own says within so many seconds, or None; it is ended."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, judge, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return None
        return ours.recv()
    except EOFError:
        process.join()
        return Verdict(f"its process ended with exit status {process.exitcode}")
    finally:
        process.kill()
        process.join()
        ours.close()


def _answer(connection: Connection, judge: Callable[..., Verdict], arguments: tuple) -> None:
    try:
        verdict = judge(*arguments)
    except Exception as error:  # the compiler's, the driver's
        verdict = Verdict(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no word'}")
    connection.send(verdict)
