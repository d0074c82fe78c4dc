# SPDX-License-Identifier: Apache-2.0
"""Proving the Gluon kernel on the GPU at hand, and measuring it beside the Triton kernel.

No GPU had run it when it was written, and its warps wait for one another. So a process of its own runs it, which ends
when this one does, and is ended when it does not come back.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from torch import Tensor

from attention_kernels import Spans, attention, attention_reference, tuned
from attention_kernels.arguments import arguments_of
from attention_kernels.config_tables import ForwardConfig
from attention_kernels.reference import error_bound

from ..command import one_line
from .ahead import Chip, OutOfTime, compile_shape, end_with
from .measure import WORTH, time_of
from .problems import Problem, Sizes, call
from .store import Measured

MOST_SECONDS = 60.0
"""For a head dim, once its kernels are compiled: trials and times take a few."""

REPEATS = 5
"""How often each trial is made: what is not waited for shows now and then."""


DTYPES = (torch.bfloat16, torch.float16)
"""They share a row, so both are tried."""


@dataclass(frozen=True)
class Trial:
    """A call of the Gluon kernel whose result is compared with float64.

    Attributes:
        name: what it is about.
        spans: of the call, on a device.
        batch, heads, kv_heads: of queries and of keys.
        by_head: whether keys are stored head by head, as in a cache, and not token by token.
        has_sinks: whether there are some.
        trains: whether the kernel says what was lost by rounding.
        poisoned: whether hidden keys and values are NaN; then the kernel computes their tiles again.
    """

    name: str
    spans: Callable[[torch.device], Spans]
    batch: int = 1
    heads: int = 6
    kv_heads: int = 2
    by_head: bool = False
    has_sinks: bool = False
    trains: bool = False
    poisoned: bool = False


class GluonFails(Exception):
    """The kernel must not be used on this device."""


class GluonHangs(GluonFails):
    """It does not come back."""


class GluonUntried(Exception):
    """No process could try it, which says nothing of it."""


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


def _masked(shown: Tensor, left: int | None, device: torch.device) -> Spans:
    """A window over sequences of which some keys are shown; the mask is kept, as `Spans.padded` does on a GPU."""
    tokens = shown.shape[1]
    first = shown.int().argmax(1)
    gap_count = (tokens - first - shown.sum(1)).to(device, torch.int32)
    start = first[:, None].to(device, torch.int32)
    padded = Spans(start, torch.full_like(start, tokens), tokens, tokens, shown.to(device), gap_count)
    return Spans.sliding(tokens, left=left, device=device) & padded


def _holes(device: torch.device) -> Spans:
    """Padding on the left and within."""
    shown = torch.rand(2, 333, generator=torch.Generator().manual_seed(0)) > 0.3
    shown[1, :150], shown[:, -1] = False, True
    return _masked(shown, 100, device)


def _left_padding(device: torch.device) -> Spans:
    return _masked(torch.arange(333) >= torch.tensor([[0], [150]]), None, device)


_HIDDEN = Trial("hidden keys and a window", _holes, batch=2, has_sinks=True, trains=True)
TRIALS = (
    Trial("a causal prompt", lambda device: Spans.causal(333, device=device)),
    Trial("more tiles than programs", lambda device: Spans.causal(1033, device=device), batch=4, heads=27, kv_heads=9),
    Trial("documents", _documents, has_sinks=True),
    Trial("few rows and many keys", lambda device: Spans.full(33, 2049, device=device), trains=True),
    Trial("left padding", _left_padding, batch=2, heads=3, kv_heads=3, by_head=True),
    _HIDDEN,
    replace(_HIDDEN, name="hidden keys that are NaN", poisoned=True),
)


class Inputs(NamedTuple):
    """Of a trial."""

    query: Tensor
    key: Tensor
    value: Tensor
    spans: Spans
    sinks: Tensor | None


def inputs_of(trial: Trial, device: torch.device, dtype: torch.dtype, dim: int) -> Inputs:
    """The same each time; without content on torch's meta device."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    spans = trial.spans(device)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    sizes = (spans.query_len, trial.heads), (spans.key_len, trial.kv_heads), (spans.key_len, trial.kv_heads)
    query, key, value = (drawn(trial.batch, tokens, heads, dim).to(dtype).transpose(1, 2) for tokens, heads in sizes)
    if trial.by_head:
        key, value = key.contiguous(), value.contiguous()
    return Inputs(query, key, value, spans, drawn(trial.heads) if trial.has_sinks else None)


def run_kernel(trial: Trial, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp, and what was lost by rounding, by the Gluon kernel."""
    from attention_kernels.hopper import launching

    query, key, value, spans, sinks = inputs
    if trial.poisoned and spans.key_mask is not None:
        hidden = ~spans.key_mask[:, None, :, None]
        key, value = (each.masked_fill(hidden, torch.nan) for each in (key, value))
    with filling_memory():
        return launching.forward(arguments_of(query, key, value, spans, sinks=sinks), wants_rounding=trial.trains)


@contextmanager
def filling_memory() -> Iterator[None]:
    """While this holds, memory is NaN until it is written to."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.utils.deterministic fills memory then
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


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


def wrong_again(device: torch.device, dtype: torch.dtype, dim: int, config: ForwardConfig) -> str | None:
    """What is wrong where `attention` launches the kernel, and launches it again for other tensors; None if nothing."""
    first, key, value = (torch.randn(2, heads, 200, dim, device=device).to(dtype) for heads in (4, 2, 2))
    spans = Spans.causal(200, device=device)
    with tuned.using(device, {tuned.gluon_key(dtype, dim): config}):
        for query in (first, first.flip(2)):
            output = attention(query, key, value, spans)
            exact, _, allowed = _truth(Inputs(query, key, value, spans, None))
            if not (error := float((output.double() - exact).norm())) <= allowed:
                return f"a launch that was remembered: error {error:.2e}, allowed {allowed:.2e}"
    return None


# ---------------------------------------------------------------------- a process of its own

Judge = Callable[[Problem, torch.device, torch.dtype, Sizes], Verdict]


def measure_gluon(
    problem: Problem, device: torch.device, dtype: torch.dtype, sizes: Sizes, chip: Chip | None, deadline: float,
    judge: Judge | None = None,
) -> tuple[Measured | None, str]:  # fmt: skip
    """The row of a head dim if the kernel is right and worth it there, and words for what was found.

    Args:
        chip: for which the process first compiles what was not compiled ahead; None to compile nothing.
        deadline: when no process is begun any more, by `time.monotonic()`.
        judge: what the process does; for tests.

    Raises:
        OutOfTime: the deadline has passed.
        GluonFails: the kernel is wrong here, or did not come back; says so in a line.
        GluonUntried: no process could try it, likewise.
    """
    if time.monotonic() >= deadline:
        raise OutOfTime
    verdict = _asked((judge or judged, problem, device, dtype, sizes, chip), deadline)
    if verdict.wrong is not None:
        raise GluonFails(verdict.wrong)
    words = f"{verdict.seconds * 1e6:.0f} us, the Triton kernel {verdict.triton_seconds * 1e6:.0f} us"
    if verdict.seconds > WORTH * verdict.triton_seconds:
        return None, words
    return Measured(problem.key, problem.default, verdict.seconds * 1e6, verdict.triton_seconds * 1e6), words


def judged(problem: Problem, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Verdict:
    """Try the kernel and time it beside the Triton kernel."""
    _, size, dim, kind = problem.key
    config = problem.default
    assert isinstance(config, ForwardConfig)
    for each in DTYPES:
        if (wrong := first_wrong(device, each, dim) or wrong_again(device, each, dim, config)) is not None:
            return Verdict(wrong)
    triton = Problem(("forward", size, dim, kind), config, ())
    seconds, triton_seconds = (time_of(call(each, device, dtype, sizes), device) for each in (problem, triton))
    return Verdict(None, seconds, triton_seconds)


def _asked(arguments: tuple, deadline: float) -> Verdict:
    """What a process of its own says, which is ended then; see `measure_gluon`."""
    context = multiprocessing.get_context("spawn")
    (said, says), (until, alive) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(until, says, *arguments), daemon=True)
    try:
        process.start()
        says.close()
        if not said.poll(max(0.0, deadline - time.monotonic())):
            raise OutOfTime
        if (why_not := said.recv()) is not None:
            raise GluonUntried(why_not)
        if not said.poll(MOST_SECONDS):
            raise GluonHangs(f"it did not come back within {MOST_SECONDS:.0f} s")
        return said.recv()
    except EOFError:
        process.join(10)
        return Verdict(f"its process ended with exit status {process.exitcode}")
    except OSError as error:
        raise GluonUntried(f"no process: {error}") from error
    finally:
        if process.pid is not None:
            process.kill()
            process.join(10)
        for end in (said, says, until, alive):
            end.close()


def _answer(
    until: Connection, says: Connection, judge: Judge, problem: Problem, device: torch.device, dtype: torch.dtype,
    sizes: Sizes, chip: Chip | None,
) -> None:  # fmt: skip
    """What the process does: first it says why it cannot try, or None, and then the verdict."""
    end_with(until)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # a GPU may be another process's alone
    except Exception as error:
        says.send(_in_a_line(error))
        return
    wrong = None if chip is None else compile_shape(problem, problem.default, chip, dtype, sizes)
    says.send(None)
    try:
        verdict = judge(problem, device, dtype, sizes) if wrong is None else Verdict(wrong)
    except Exception as error:  # the compiler's, the driver's
        verdict = Verdict(_in_a_line(error))
    says.send(verdict)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
