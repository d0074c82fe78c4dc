# SPDX-License-Identifier: Apache-2.0
"""The host section: what a call of attention costs in Python, before a device has anything to do.

On a GPU calls are real and nobody waits for them. On the CPU kernels and torch's operator are replaced by nothing, so
that what is left is the same: checks, the choice of kernels, memory for results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from attention_kernels import attention, paths, prebound
from attention_kernels.paths import interpreting, triton_installed

from .cases import Sizes, case_named
from .measure import Call, Effort, Result, dtype_name, interleaved
from .problem import Problem, build_problem
from .providers import BASELINE, OURS, PROVIDERS
from .training import Step, bind_step, inputs_of, output_gradient, wanting_gradients

OPERATOR = "attention"
CALLS = 100
"""Calls in a sample; few enough that a GPU's queue never fills."""

PROMPT_TOKENS = 64
"""Of the prompt: so few that a GPU is done with them sooner than Python."""

PROCESSORS = 132
"""Of the GPU that the CPU stands for (H100): they decide whether keys are split, which takes a second kernel."""


def run_host(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, effort: Effort, say: Callable[[str], None]
) -> list[Result]:
    """Time calls of the operator, of this project's attention function and of transformers' sdpa function.

    A decoding call of these sizes, and a short prompt, without and with gradients.
    """
    prompt = build_problem(case_named("causal"), replace(sizes, tokens=PROMPT_TOKENS), dtype, device)
    problems = build_problem(case_named("decode"), sizes, dtype, device), prompt, wanting_gradients(prompt)
    return [result for problem in problems for result in time_calls(problem, effort, say)]


def time_calls(problem: Problem, effort: Effort, say: Callable[[str], None]) -> list[Result]:
    """As `run_host`, of a problem."""
    device, case, dtype = problem.query.device, problem.case.name, dtype_name(problem.query.dtype)
    description, trains = problem.description, problem.query.requires_grad
    if trains:
        case, description = f"{case}, with gradients", f"{description}, forward and backward"
    runs = calls(problem)
    results = [Result("host", case, name, dtype, description) for name in (OPERATOR, OURS, BASELINE)]
    if device.type == "cpu" and not can_launch_nothing():
        for result in results[:2]:
            result.status, result.reason = "unavailable", "Triton is not installed, or runs in its interpreter"
            del runs[result.provider]
    if device.type == "cpu" and trains:
        results[2].status, results[2].reason = "unavailable", "torch's own gradient cannot be left out"
        del runs[BASELINE]
    say(f"{case}: calls that launch nothing")
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(without_launching(ours=OURS in runs))
        stack.enter_context(torch.set_grad_enabled(trains))
        for run in runs.values():
            run()  # a GPU's kernels are compiled by it, which is no part of what calls cost
        timed = {name: Call(lambda _, run=run: repeat(run), lambda: finish(device)) for name, run in runs.items()}
        samples = interleaved(timed, torch.device("cpu"), effort)  # by the clock on the wall, on a GPU too
    for result in results:
        result.samples = [seconds / CALLS for seconds in samples.get(result.provider, [])]
    return results


def calls(problem: Problem) -> dict[str, Callable[[], Any]]:
    """A call of the operator, of this project's attention function and of sdpa's, by name."""
    masks = {name: problem.mask_builder(name)() for name in (OURS, BASELINE)}

    def operator() -> Tensor:
        return attention(problem.query, problem.key, problem.value, masks[OURS].spans).transpose(1, 2)

    providers = [provider for provider in PROVIDERS if provider.name in masks]
    if problem.query.requires_grad:
        steps: dict[str, Callable[[], Any]] = {
            each.name: bind_step(each, problem, masks[each.name]) for each in providers
        }
        return steps | {OPERATOR: Step(operator, inputs_of(problem), output_gradient(problem))}
    return {each.name: each.bind(problem, masks[each.name]) for each in providers} | {OPERATOR: operator}


def can_launch_nothing() -> bool:
    """Whether the launch of kernels can be left out on the CPU: Triton is there, and compiles."""
    return triton_installed() and not interpreting()


def repeat(run: Callable[[], Any]) -> None:
    """Make the call as often as a sample has it."""
    for _ in range(CALLS):
        run()


def finish(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Nothing:
    """In place of a kernel: takes its arguments, does nothing, and is its own compiled form."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Nothing:
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> Nothing:
        """Launch nothing."""
        return self


@contextmanager
def without_launching(*, ours: bool) -> Iterator[None]:
    """CPU tensors take the path of GPU tensors, up to the launch of a kernel (ours) or of torch's operator."""
    with ExitStack() as stack:
        if ours:
            from attention_kernels import backward, configs, decode, forward  # imports Triton

            places = [(decode, "decode_kernel"), (decode, "merge_kernel"), (forward, "forward_kernel")]
            places += [(backward, name) for name in vars(backward) if name.endswith("_kernel")]
            for module, name in places:
                stack.enter_context(patch.object(module, name, Nothing(getattr(module, name))))
            stack.enter_context(patch.object(configs, "processors", lambda device: PROCESSORS))
            stack.enter_context(patch.object(paths, "interpreting", lambda: True))
            # What is remembered of these calls computes nothing.
            stack.callback(prebound.forget)
        stack.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", like_query))
        yield


def like_query(query: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    """In place of torch's operator: memory for the result."""
    return torch.empty_like(query)
