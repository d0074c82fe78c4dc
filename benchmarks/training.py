# SPDX-License-Identifier: Apache-2.0
"""The training section: forward and backward of every case by every provider; in sweeps, the backward pass alone.

Gradients are checked on a shorter problem of the same case: a key's gradient gathers from all rows, so that no few rows
show whether it is right, and a dense float64 reference with all rows of the timed problem would take minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attention_kernels.reference import attention_reference, error_bound

from . import cases, contest
from .cases import Case, Sizes
from .measure import Call, Effort, Result
from .problem import Problem, build_problem
from .providers import Provider
from .work import work_of

CASES = tuple(case for case in cases.CASES if not case.decode)
"""The cases that training has."""

CHECKED_TOKENS, CHECKED_SEQUENCES = 512, 2

Gradients = dict[str, Tensor]
"""By name of the input, which each has the shape of."""


@dataclass(frozen=True)
class GradientReference:
    """The right gradients of a problem.

    Attributes:
        truth: in float64.
        bounds: for each, the largest error that is no mistake, in the norm of all its elements.
    """

    truth: Gradients
    bounds: dict[str, float]


def run_case(
    case: Case,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    providers: Sequence[Provider],
    effort: Effort,
    say: Callable[[str], None] = lambda text: None,
    *,
    label: str | None = None,
    forward: bool = True,
) -> list[Result]:
    """Check every provider's gradients on a case, then time those that are right, in turns.

    What is timed is forward and backward together, section "training", or, without `forward`, the backward pass alone,
    section "backward".
    """
    short, timed = (wanting_gradients(build_problem(case, each, dtype, device)) for each in (shortened(sizes), sizes))
    reference = build_gradient_reference(short)
    work = work_of(timed, forward=forward, backward=True)
    results = contest.enter("training" if forward else "backward", timed, providers, work, label)

    def right(step: Step, result: Result) -> bool:
        return check_gradients(step(), reference, result)

    def to_call(step: Step) -> Call:
        return Call(lambda _: step()) if forward else Call(step.backward, step.forward)

    contest.admit(short, providers, results, right, say, bind_step)
    steps = contest.admit(timed, providers, results, lambda step, result: check_finite(step(), result), say, bind_step)
    contest.take_turns(steps, results, device, effort, say, to_call)
    return results


def shortened(sizes: Sizes) -> Sizes:
    """Sizes of which gradients are checked: fewer tokens, and a window that is the same share of them."""
    tokens = min(sizes.tokens, CHECKED_TOKENS)
    batch = min(sizes.batch, CHECKED_SEQUENCES)
    return replace(sizes, tokens=tokens, window=max(1, sizes.window * tokens // sizes.tokens), batch=batch)


# ---------------------------------------------------------------------- one step


def inputs_of(problem: Problem) -> Gradients:
    """The tensors of a problem that training wants gradients of, by name."""
    named = {"query": problem.query, "key": problem.key, "value": problem.value}
    named |= {"sinks": problem.sinks, "bias": problem.bias}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def wanting_gradients(problem: Problem, dtype: torch.dtype | None = None) -> Problem:
    """The problem with leaves of autograd as its inputs, in `dtype` if one is given."""
    leaves = {
        name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in inputs_of(problem).items()
    }
    return replace(problem, **leaves)


def output_gradient(problem: Problem) -> Tensor:
    """A fixed random gradient of the output, `[batch, query_len, num_heads, head_dim]`.

    It is 0 at padding, which has no loss: what attention returns there may be anything, and must not reach a gradient.
    """
    query, value_dim = problem.query.transpose(1, 2), problem.value.shape[3]
    # Not the seed of the problem's tensors: a gradient equal to the query would be no random one.
    generator = torch.Generator(query.device).manual_seed(2)
    gradient = torch.randn(*query.shape[:3], value_dim, generator=generator, device=query.device).to(query.dtype)
    return gradient.masked_fill(~problem.real[..., None, None], 0.0)


@dataclass(frozen=True)
class Step:
    """Forward and backward of a problem, together or apart; nothing of the graph is kept.

    Attributes:
        forward: a call without arguments that returns the output with its graph.
        inputs: whose gradients are wanted, by name.
        gradient: of the output.
    """

    forward: Callable[[], Tensor]
    inputs: Gradients
    gradient: Tensor

    def backward(self, output: Tensor) -> Gradients:
        """Gradients of the inputs."""
        wanted = tuple(self.inputs.values())
        return dict(zip(self.inputs, torch.autograd.grad(output, wanted, self.gradient), strict=True))

    def __call__(self) -> Gradients:
        """Both."""
        return self.backward(self.forward())


def bind_step(provider: Provider, problem: Problem, mask: Any) -> Step:
    """One provider's step on a problem."""
    return Step(provider.bind(problem, mask), inputs_of(problem), output_gradient(problem))


# ---------------------------------------------------------------------- correctness


def build_gradient_reference(problem: Problem) -> GradientReference:
    """Float64 gradients of dense attention, and bounds from the error of the same in the problem's dtype."""
    dtype = problem.query.dtype
    truth, eager = dense_gradients(problem, torch.float64), dense_gradients(problem, dtype)
    # Eager's gradient of few numbers, that of sinks, may be next to exact by chance: statistics are float32, so a unit
    # of that of the largest gradient is no mistake in any.
    chance = torch.finfo(torch.float32).eps * max(exact.norm().item() for exact in truth.values())
    bounds = {
        name: error_bound(distance(eager[name], exact), exact.norm().item(), dtype) + chance
        for name, exact in truth.items()
    }
    return GradientReference(truth, bounds)


def dense_gradients(problem: Problem, dtype: torch.dtype) -> Gradients:
    """Gradients of `attention_reference` with everything in `dtype`, the gradients too."""
    gradient = output_gradient(problem).transpose(1, 2).to(dtype)
    mask = problem.visible(torch.arange(problem.query.shape[2], device=problem.query.device))
    problem = wanting_gradients(problem, dtype)
    inputs = inputs_of(problem)
    output, _ = attention_reference(**inputs, mask=mask, softcap=problem.case.softcap, dtype=dtype)
    return dict(zip(inputs, torch.autograd.grad(output, tuple(inputs.values()), gradient), strict=True))


def distance(gradient: Tensor, truth: Tensor) -> float:
    """Norm of the difference."""
    return (gradient.double() - truth).norm().item()


def check_gradients(gradients: Gradients, reference: GradientReference, result: Result) -> bool:
    """Compare each gradient with the reference; what was found is noted in `result`. NaN is always a mistake."""
    errors = {name: distance(gradients[name], truth) for name, truth in reference.truth.items()}
    result.details |= {
        "tokens_checked": gradients["key"].shape[0] * gradients["key"].shape[2],
        "gradients": {name: {"error": error, "error_bound": reference.bounds[name]} for name, error in errors.items()},
    }
    wrong = [
        f"gradient of {name}: error {error:.2e}, bound {reference.bounds[name]:.2e}"
        for name, error in errors.items()
        if not error <= reference.bounds[name]
    ]
    if wrong:
        result.status, result.reason = "failed", f"wrong {'; '.join(wrong)}"
    return not wrong


def check_finite(gradients: Gradients, result: Result) -> bool:
    """Whether gradients hold neither NaN nor infinity, the least that the timed problem shows; noted in `result`."""
    wrong = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if wrong:
        result.status, result.reason = "failed", f"wrong result: NaN or Inf in the gradient of {', '.join(wrong)}"
    return not wrong
