# SPDX-License-Identifier: Apache-2.0
"""What each section of a run measures, case by case: every function here yields results as they come."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from rich.progress import Progress

from . import cases, host, kernels, memory, models, paged, serve, tensor_parallel, training
from .cases import Point, Sizes, Sweep
from .measure import Effort, Result
from .options import Run, providers_of
from .paged import PagedProvider
from .problem import build_problem
from .providers import BASELINE, FALLBACK_BASELINE, OURS, PROVIDERS, Provider

# Nine samples, where two implementations that are equally fast would differ by a few percent in three.
KERNEL_EFFORT = {"full": Effort(seconds=3.0, least=9), "quick": Effort(seconds=0.6, most=20)}
SWEEP_EFFORT = {"full": Effort(seconds=0.8, most=30), "quick": Effort(seconds=0.3, most=10)}
TRAINING_EFFORT = {"full": Effort(seconds=1.5), "quick": Effort(seconds=0.5, most=20)}
MASK_EFFORT = {"full": Effort(seconds=1.0, most=20), "quick": Effort(seconds=0.2, most=10)}
LONG_MASK_EFFORT = Effort(seconds=2.0, most=10)
MODEL_EFFORT = {"full": Effort(seconds=8.0, most=20), "quick": Effort(seconds=1.0, most=10)}
HOST_EFFORT = {"full": Effort(seconds=2.0), "quick": Effort(seconds=0.3, most=20)}
HOST_TOKENS = {"full": 4096, "quick": 512}
MEMORY_TOKENS = {"full": (1024, 2048, 4096, 8192), "quick": (1024, 4096)}
LONG_MASK_TOKENS = {"full": 32_768, "quick": 8192}

Rows = Iterator[list[Result]]
Say = Callable[[str], None]


class Task:
    """A section's progress bar."""

    def __init__(self, progress: Progress, section: str, total: int) -> None:
        self._progress, self._task = progress, progress.add_task("", section=section, total=total)

    def say(self, text: str) -> None:
        """Show what is running."""
        self._progress.update(self._task, description=text)

    def done(self) -> None:
        """One more piece is done."""
        self._progress.advance(self._task)


def chosen_sizes(run: Run, defaults: dict[tuple[str, str], Sizes]) -> Sizes:
    """The default sizes of this device and thoroughness, with the tokens that were asked for."""
    sizes = defaults[run.device.type, run.thoroughness]
    if run.tokens is None:
        return sizes
    return replace(sizes, tokens=run.tokens, window=min(sizes.window, run.tokens // 4))


def chosen_providers(run: Run, *, slow: bool = True) -> list[Provider]:
    """Those that the run compares; those that there is no time for say so."""
    names = providers_of(run, slow=slow)
    chosen = [provider for provider in PROVIDERS if provider.name in names]
    if run.quick:
        chosen = [left_out(each, COMPILING) if each.compiles else each for each in chosen]
    if run.device.type == "cpu" and not run.peers:
        chosen = [left_out(each, WRITING_SCORES) if each.name == "sdpa_math" else each for each in chosen]
    return chosen


COMPILING = "left out by --quick: compiling it takes seconds for every case"
WRITING_SCORES = "left out on a CPU: it writes all scores to memory, as eager does; --against sdpa_math measures it"


def chosen_paged(run: Run) -> list[PagedProvider]:
    """Those of the implementations over pages that the run compares."""
    names = providers_of(run, slow=False)
    return [provider for provider in paged.PROVIDERS if provider.name in names]


def left_out(provider: Provider, reason: str) -> Provider:
    """In place of a provider one that says why it is not measured."""
    return replace(provider, unavailable=lambda problem: reason)


def run_kernels(run: Run, progress: Progress) -> Rows:
    """Attention by itself: all cases and the masks they need, or the sweeps that were asked for."""
    if run.sweep:
        for name in run.sweep:
            yield from run_sweep(run, cases.SWEEPS[name], progress)
        return
    sizes, providers = chosen_sizes(run, cases.SIZES), chosen_providers(run)
    task = Task(progress, "kernels", len(cases.CASES) * (len(run.dtypes) + 1) + 1)
    effort = KERNEL_EFFORT[run.thoroughness]
    for dtype in run.dtypes:
        for case in cases.CASES:
            yield kernels.run_case(case, sizes, dtype, run.device, providers, effort, task.say)
            task.done()
    mask_names = [OURS, BASELINE, FALLBACK_BASELINE]
    for case in cases.CASES:
        task.say(f"{case.name}: building masks")
        yield kernels.run_masks(case, sizes, run.device, mask_names, MASK_EFFORT[run.thoroughness])
        task.done()
    tokens = LONG_MASK_TOKENS[run.thoroughness] if run.tokens is None else 8 * run.tokens
    yield long_masks(tokens, run.device, task.say)
    task.done()
    task.say("done")


def long_masks(tokens: int, device: torch.device, say: Say) -> list[Result]:
    """The mask of a long prompt whose left half is padding. A dense one needs up to four bytes per pair on the way."""
    say(f"building masks for {tokens:,} tokens")
    problem = build_problem(memory.MEMORY_CASE, Sizes(tokens, 1, 1, 1), torch.float32, device)
    available = memory.available_bytes()
    tight = device.type == "cpu" and available is not None and available < 6 * tokens * tokens
    results = kernels.time_masks(problem, [OURS] if tight else [OURS, BASELINE], LONG_MASK_EFFORT)
    if tight:
        results.append(
            Result("masks", "", BASELINE, status="unavailable", reason="too little free memory for a dense mask")
        )
    for result in results:
        result.case = f"left_padded, {tokens:,} tokens"
    return results


def points_of(run: Run, sweep: Sweep) -> tuple[Point, ...]:
    """The sweep's points on this device, those of the models and degrees that were asked for."""
    points = sweep.points[run.device.type, run.thoroughness]
    if sweep.name != "ranks" or run.shapes_of is None:
        return points
    prefill = next(point.sizes for point in points if not point.case.decode)
    decode = next(point.sizes for point in points if point.case.decode)
    return cases.ranks_of(run.shapes_of, run.degrees, prefill.tokens, decode.tokens, decode.decode_batch)


def run_sweep(run: Run, sweep: Sweep, progress: Progress) -> Rows:
    """All points of a sweep, as the sweep says: with keys in one block and in pages, and backward."""
    providers, effort = chosen_providers(run, slow=False), SWEEP_EFFORT[run.thoroughness]
    points = list(points_of(run, sweep))
    if run.seconds is not None:
        # What time is left for is then spread over the sweep.
        random.Random(0).shuffle(points)
    passes = sweep.one_block + sweep.backward + 2 * sweep.pages
    task = Task(progress, sweep.name, len(points) * len(run.dtypes) * passes)
    over_pages = (run.device, effort, task.say, chosen_paged(run))
    for dtype in run.dtypes:
        for point in points:
            place = (point.case, point.sizes, dtype, run.device, providers, effort, task.say)
            if sweep.one_block:
                yield of_sweep(sweep, kernels.run_case(*place, label=point.label))
                task.done()
            if sweep.pages:
                for kept in (dtype, paged.FLOAT8):
                    yield of_sweep(sweep, paged.run_point(point, dtype, kept, *over_pages))
                    task.done()
            if sweep.backward:
                yield of_sweep(sweep, training.run_case(*place, label=point.label, forward=False))
                task.done()
    task.say("done")


def of_sweep(sweep: Sweep, results: list[Result]) -> list[Result]:
    """The results, with the sweep's name noted."""
    for result in results:
        result.details["sweep"] = sweep.name
    return results


def run_host(run: Run, progress: Progress) -> Rows:
    """What a call costs in Python."""
    # One dtype tells: Python does the same for all.
    dtype = run.dtypes[-1] if run.dtype else torch.bfloat16
    sizes = Sizes(HOST_TOKENS[run.thoroughness], num_heads=32, num_kv_heads=8, head_dim=128)
    task = Task(progress, "host", 1)
    yield host.run_host(sizes, dtype, run.device, HOST_EFFORT[run.thoroughness], task.say)
    task.done()
    task.say("done")


def run_training(run: Run, progress: Progress) -> Rows:
    """Attention by itself, forward and backward."""
    sizes, providers = chosen_sizes(run, cases.TRAINING_SIZES), chosen_providers(run)
    effort = TRAINING_EFFORT[run.thoroughness]
    task = Task(progress, "training", len(training.CASES) * len(run.dtypes))
    for dtype in run.dtypes:
        for case in training.CASES:
            yield training.run_case(case, sizes, dtype, run.device, providers, effort, task.say)
            task.done()
    task.say("done")


def run_memory(run: Run, progress: Progress) -> Rows:
    """Peak memory over the length of a padded prompt."""
    names = run.peers or [BASELINE]
    tokens = MEMORY_TOKENS[run.thoroughness]
    dtype = run.dtypes[0] if run.dtype else torch.float32
    task = Task(progress, "memory", len(tokens) * (1 + len(names)))
    for count in tokens:
        for name in dict.fromkeys((OURS, *names)):
            task.say(f"{name}, {count:,} tokens")
            yield [memory.measure_peak(name, count, dtype, run.device)]
            task.done()
    task.say("done")


def run_models(run: Run, progress: Progress) -> Rows:
    """Whole models."""
    sizes, effort = models.SIZES[run.thoroughness], MODEL_EFFORT[run.thoroughness]
    dtypes = run.dtypes if run.dtype else (torch.float32,)
    names = tuple(dict.fromkeys((OURS, *(run.peers or models.IMPLEMENTATIONS))))
    task = Task(progress, "models", 2 * len(dtypes))
    for dtype in dtypes:
        for measured in (models.run_reference_model, models.run_embeddings):
            folder = (run.checkpoint,) if measured is models.run_reference_model else ()
            yield measured(*folder, sizes, dtype, run.device, effort, task.say, names)
            task.done()
    task.say("done")


def run_tp(run: Run, progress: Progress) -> Rows:
    """A model over several ranks."""
    dtypes = run.dtypes if run.dtype else (torch.float32,)
    task = Task(progress, "tp", len(dtypes))
    sizes = replace(models.SIZES[run.thoroughness], prompt_tokens=256)
    for dtype in dtypes:
        yield tensor_parallel.run_tensor_parallel(run.model, run.ranks, sizes, dtype, run.device, task.say)
        task.done()
    task.say("done")


def run_serve(run: Run, progress: Progress) -> Rows:
    """Requests in a queue."""
    dtypes = run.dtypes if run.dtype else (torch.float32,)
    task = Task(progress, "serve", len(dtypes))
    load, names = serve.LOADS[run.thoroughness], run.peers or (BASELINE, FALLBACK_BASELINE)
    names = tuple(dict.fromkeys((OURS, *names)))
    for dtype in dtypes:
        yield serve.run_serve(run.checkpoint, load, dtype, run.device, task.say, names, run.engines)
        task.done()
    task.say("done")


RUNNERS: dict[str, Callable[[Run, Progress], Rows]] = {
    "kernels": run_kernels,
    "host": run_host,
    "training": run_training,
    "models": run_models,
    "memory": run_memory,
    "tp": run_tp,
    "serve": run_serve,
}
