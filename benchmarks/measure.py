# SPDX-License-Identifier: Apache-2.0
"""How it is measured: check first, warm up, then take turns, and keep every sample."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from attention_kernels.reference import attention_reference, error_bound

from .problem import Problem

CHECKED_ROWS = 128
"""Query rows compared with the reference; the dense float64 reference of all rows would take minutes."""

CHECKED_KEYS = 2**17
"""Keys of all sequences that are compared, likewise: fewer sequences where they are long, but at least one."""

Status = Literal["ok", "failed", "unavailable"]


@dataclass
class Result:
    """One row of the outcome: one provider on one case.

    Attributes:
        section: "kernels", "masks", "memory", "host", "training", "backward", "models", "tp" or "serve".
        case, dtype, provider: what ran.
        description: the case in words, with its sizes.
        status: "failed" is a wrong result, which is never timed; "unavailable" did not run, `reason` says why.
        unit: of the samples, "s" or "bytes".
        samples: every one that was taken, in order.
        work: tokens processed in one sample, or None.
        details: what was compared, and other numbers that belong to the row.
    """

    section: str
    case: str
    provider: str
    dtype: str = ""
    description: str = ""
    status: Status = "ok"
    reason: str = ""
    unit: str = "s"
    samples: list[float] = field(default_factory=list)
    work: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median sample. Only where there are samples."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the quartiles of the samples (interquartile range), 0 for a single sample."""
        if len(self.samples) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.samples, n=4, method="inclusive")
        return upper - lower

    @property
    def measured(self) -> bool:
        """Whether there is a correct result with samples."""
        return self.status == "ok" and bool(self.samples)

    def to_json(self) -> dict[str, Any]:
        """All fields, with median and spread beside the samples."""
        summary = {"median": self.median, "iqr": self.spread} if self.measured else {"median": None, "iqr": None}
        return asdict(self) | summary


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def brief(error: Exception) -> str:
    """The first line of an error, with its kind."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= 200 else text[:197] + "..."


# ---------------------------------------------------------------------- correctness


@dataclass(frozen=True)
class Reference:
    """The right answer of a problem on some rows of some of its sequences.

    Attributes:
        sequences: int64 `[batch]`, those that are compared.
        rows: int64 `[n]`.
        compared: bool `[batch, n]`, which of them count.
        truth: float64 `[batch, n, num_heads, value_dim]`, zero where not compared.
        bound: the largest error that is no mistake, in the norm of all compared elements.
    """

    sequences: Tensor
    rows: Tensor
    compared: Tensor
    truth: Tensor
    bound: float

    def error(self, output: Tensor) -> float:
        """Norm of the difference between `output` `[all sequences, query_len, num_heads, value_dim]` and the truth."""
        return self._distance(output[self.sequences][:, self.rows])

    def _distance(self, rows: Tensor) -> float:
        difference = (rows.double() - self.truth).masked_fill(~self.compared[..., None, None], 0.0)
        return difference.norm().item()


def build_reference(problem: Problem, checked_rows: int = CHECKED_ROWS) -> Reference:
    """The reference on at most `checked_rows` rows: the first and last of all, and others drawn at random.

    Of many or long sequences some are compared: the last, the first, and others drawn at random.
    """
    batch, key_len, query_len = problem.query.shape[0], problem.key.shape[2], problem.query.shape[2]
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(query_len, generator=generator)[: max(0, checked_rows - 2)]
    rows = torch.cat([order, torch.tensor([0, query_len - 1])]).unique().to(problem.query.device)
    ends = torch.tensor([batch - 1, 0])
    count = max(1, min(batch, CHECKED_KEYS // key_len))
    order = torch.cat([ends, torch.randperm(batch, generator=generator)])
    sequences = torch.tensor(list(dict.fromkeys(order.tolist()))[:count], device=problem.query.device)
    options = {"sinks": problem.sinks, "softcap": problem.case.softcap}
    options |= {"mask": problem.visible(rows).expand(batch, -1, -1, -1)[sequences]}
    if problem.bias is not None:
        options |= {"bias": problem.bias[:, :, rows]}
    tensors = (problem.query[sequences][:, :, rows], problem.key[sequences], problem.value[sequences])
    truth = attention_reference(*tensors, **options)[0].transpose(1, 2)
    eager = [attention_reference(*tensors, **options, dtype=problem.query.dtype)[0].transpose(1, 2)]
    if problem.bias is not None:
        eager.append(eager_as_t5_adds_a_bias(*tensors, options["bias"], options["mask"]).transpose(1, 2))
    compared = problem.compared(rows).expand(batch, -1)[sequences]
    truth = truth.masked_fill(~compared[..., None, None], 0.0)
    exact = Reference(sequences, rows, compared, truth, 0.0)
    bound = error_bound(max(map(exact._distance, eager)), truth.norm().item(), problem.query.dtype)
    return replace(exact, bound=bound)


def eager_as_t5_adds_a_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Eager attention whose sum of scores and bias is rounded to the problem's dtype, `[batch, heads, rows, dim]`."""
    group_size = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(group_size, 1) for each in (key, value))
    scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ value


def check(output: Tensor, reference: Reference, result: Result) -> bool:
    """Compare an output with the reference; what was found is noted in `result`. NaN is always a mistake."""
    error = reference.error(output)
    result.details |= {
        "error": error,
        "error_bound": reference.bound,
        "rows_checked": reference.rows.numel(),
        "rows_total": output.shape[1],
        "sequences_checked": reference.sequences.numel(),
    }
    if error <= reference.bound:
        return True
    result.status = "failed"
    result.reason = f"wrong result: error {error:.2e}, bound {reference.bound:.2e}"
    return False


# ---------------------------------------------------------------------- time


@dataclass(frozen=True)
class Effort:
    """How many samples to take: as many as fit a call's share of `seconds`, up to `most`.

    To get `least` samples a call may use up to three times its share.
    """

    seconds: float
    least: int = 3
    most: int = 50


@dataclass(frozen=True)
class Call:
    """Something to time. `prepare` runs before each sample, off the clock, and its value is handed to `run`.

    What is `repeatable` needs no preparation, and where it takes microseconds a sample is the mean of several runs.
    What is `bound_by_python` is timed by the clock on the wall on a GPU, too, until that has done what was asked of it.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    repeatable: bool = False
    bound_by_python: bool = False


SAMPLE_SECONDS = 2e-3
"""A sample of something repeatable takes this long: single microseconds are the clock's and the caches' chance."""


ASLEEP_CYCLES = 2_000_000
"""For how many cycles a GPU sleeps before a call: about a millisecond, in which Python launches any."""


def timed(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds that one call takes: CUDA events on a GPU, but for Python; the clock on the wall elsewhere."""
    if repeats > 1:
        started = time.perf_counter()
        for _ in range(repeats):
            call.run(None)
        return (time.perf_counter() - started) / repeats
    prepared = call.prepare()
    if device.type == "cuda" and not call.bound_by_python:
        flush = cache_flusher(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(ASLEEP_CYCLES)  # until the call is on its way: the section host times what Python takes
        flush.zero_()
        start.record()
        call.run(prepared)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    output = call.run(prepared)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - started
    del output  # giving memory back is not part of the work
    return elapsed


@cache
def cache_flusher(device: torch.device) -> Tensor:
    """Memory thrice the size of a GPU's last cache. Writing to it leaves nothing of a call's inputs in there.

    A model does the same: between two calls of a layer's attention lie the weights of all other layers.
    """
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
    return torch.empty(3 * size, dtype=torch.int8, device=device)


def interleaved(
    calls: dict[str, Call],
    device: torch.device,
    effort: Effort,
    on_round: Callable[[str], None] = lambda text: None,
    errors: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Samples in seconds of several calls that take turns, so that noise of the machine meets all of them alike.

    Each call must have run before, when it was checked. It runs once more to warm up; where that takes longer than the
    call's share of the time it already is a sample. The order is shuffled in every round. A call leaves the rounds when
    it has used its share and has enough samples, or thrice its share, so that slow calls do not starve fast ones.

    Where `errors` is given, what a call raises is put there in words, and the others go on without it.
    """
    share = effort.seconds / max(1, len(calls))
    samples: dict[str, list[float]] = {}
    repeats = {}

    @contextmanager
    def leaving_the_rounds(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if errors is None:
                raise
            errors[name] = brief(error)  # the error itself would keep what the call had in memory
            samples.pop(name, None)

    for name, call in calls.items():
        with leaving_the_rounds(name):
            seconds = timed(call, device)
            samples[name] = [seconds] if seconds > share else []
            several = call.repeatable and device.type == "cpu"
            repeats[name] = max(1, int(SAMPLE_SECONDS / max(seconds, 1e-6))) if several else 1
    shuffler = random.Random(0)
    for round_number in range(effort.most):
        playing = [name for name, taken in samples.items() if _plays_on(taken, share, effort)]
        if not playing:
            break
        on_round(f"round {round_number + 1}")
        for name in shuffler.sample(playing, len(playing)):
            with leaving_the_rounds(name):
                samples[name].append(timed(calls[name], device, repeats[name]))
    return samples


def _plays_on(taken: list[float], share: float, effort: Effort) -> bool:
    if len(taken) >= effort.most:
        return False
    return not taken or sum(taken) < (share if len(taken) >= effort.least else 3 * share)
