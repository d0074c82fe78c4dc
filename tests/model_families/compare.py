# SPDX-License-Identifier: Apache-2.0
"""What is compared between eager and `my_triton`: outputs, padding on either side, generation, gradients."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

import attention_plugin

from .build import IMPLEMENTATION, Pair
from .inputs import tokens

TOLERANCE = 2e-4
VISIBLE = 1e-2
"""Attention that looks nowhere must move the result by far more than the tolerance, or nothing could be found out."""

FILL = 1e30
"""Numbers of this size stand for minus infinity: scores of tokens that a model rules out, say."""

UNSTEADY = 1e-7
"""Where this much noise changes the tokens of one implementation, those of two cannot be compared."""

PADDING = 4


class NotApplicable(Exception):
    """A check that means nothing for a model; says why."""


# ---------------------------------------------------------------------- running


def run(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """All floating point outputs by name. Models that draw numbers draw the same ones each time."""
    torch.manual_seed(0)
    return floats(model(**{name: copied(value) for name, value in inputs.items()}))


def copied(value: Any) -> Any:
    """Inputs are copied since some models write into them."""
    return value.clone() if isinstance(value, Tensor) else value


def floats(output: Any, prefix: str = "output") -> dict[str, Tensor]:
    """Floating point tensors of nested outputs; caches are left out."""
    if isinstance(output, Tensor):
        return {prefix: output} if output.is_floating_point() and output.numel() else {}
    if isinstance(output, dict):
        items: Any = output.items()
    elif isinstance(output, (list, tuple)):
        items = enumerate(output)
    else:
        return {}
    found: dict[str, Tensor] = {}
    for name, value in items:
        if "attentions" in str(name):
            continue  # eager attention returns its weights unasked
        found |= floats(value, str(name) if prefix == "output" else f"{prefix}.{name}")
    return found


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value.

    What is infinite, or stands for it, must be the same on both sides and does not count as the largest value.
    """
    numbers = expected.isfinite() & (expected.abs() < FILL)
    if actual.shape != expected.shape or not torch.equal(actual.isfinite() & (actual.abs() < FILL), numbers):
        return float("inf")
    if not torch.equal(actual[~numbers].nan_to_num(), expected[~numbers].nan_to_num()):
        return float("inf")
    if not numbers.any():
        return 0.0
    actual, expected = actual[numbers].double(), expected[numbers].double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of all outputs."""
    assert actual.keys() == expected.keys(), f"{sorted(actual)} instead of {sorted(expected)}"
    assert expected, "nothing to compare"
    return max(relative_error(actual[name], tensor) for name, tensor in expected.items())


@contextlib.contextmanager
def replaced(function: Callable) -> Iterator[None]:
    """Another attention function under the name of ours."""
    implementation = AttentionInterface()[IMPLEMENTATION]
    AttentionInterface.register(IMPLEMENTATION, function)
    try:
        yield
    finally:
        AttentionInterface.register(IMPLEMENTATION, implementation)


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """Names of the attention classes that call our implementation."""
    seen: set[str] = set()
    implementation = AttentionInterface()[IMPLEMENTATION]

    def record(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.add(type(module).__name__)
        return implementation(module, *args, **kwargs)

    with replaced(record):
        yield seen


def blind(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention that gives every query the mean of all values."""
    batch, heads, length, _ = query.shape
    mean = value.mean(2).repeat_interleave(heads // value.shape[1], 1)
    return mean[:, None].expand(batch, length, -1, -1).contiguous(), None


def unsteady(*args: Any, **kwargs: Any) -> Any:
    """Our attention with noise of the size of a rounding to float32."""
    output, weights = attention_plugin.attention_forward(*args, **kwargs)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return output * (1 + UNSTEADY * noise), weights


# ---------------------------------------------------------------------- checks


@torch.no_grad()
def outputs(pair: Pair) -> float:
    """Two samples of one length."""
    return worst(run(pair.ours, pair.inputs), run(pair.eager, pair.inputs))


@torch.no_grad()
def sensitivity(pair: Pair) -> float:
    """How far attention that looks nowhere moves the outputs."""
    with replaced(blind):
        return worst(run(pair.ours, pair.inputs), run(pair.eager, pair.inputs))


@torch.no_grad()
def left_padding(pair: Pair) -> float:
    """The first sample is shorter, and padded in front."""
    return _padded(pair, left=True)


@torch.no_grad()
def right_padding(pair: Pair) -> float:
    """The first sample is shorter, and padded behind."""
    return _padded(pair, left=False)


def gradients(pair: Pair) -> float:
    """Error in norm of each parameter's gradient; small ones are measured against a thousandth of all together."""
    expected = parameter_gradients(pair.eager, pair.inputs)
    return gradient_error(parameter_gradients(pair.ours, pair.inputs), expected)


def gradient_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of all parameters' gradients, as `gradients` measures it."""
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    if not total.isfinite() or not total:
        raise NotApplicable("under eager they are 0 or not finite")
    errors = [
        (actual[name] - gradient).norm() / torch.maximum(gradient.norm(), 1e-3 * total)
        for name, gradient in expected.items()
    ]
    return torch.stack(errors).nan_to_num(float("inf")).max().item()


@torch.no_grad()
def generation(pair: Pair) -> float:
    """Greedy tokens, which must be equal, and what they were chosen from."""
    if not pair.eager.can_generate():
        raise NotApplicable("does not generate")
    inputs = {name: value for name, value in pair.inputs.items() if not name.startswith("decoder_")}
    options = {"max_new_tokens": 5, "do_sample": False}
    parameters = inspect.signature(pair.eager.generate).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        options |= {"return_dict_in_generate": True, "output_logits": True}

    def generate(model: PreTrainedModel) -> Any:
        torch.manual_seed(0)
        return model.generate(**{name: copied(value) for name, value in inputs.items()}, **options)

    try:
        expected = generate(pair.eager)
    except Exception as error:
        reason = " ".join(str(error).split())[:80]
        raise NotApplicable(f"eager does not generate from these inputs ({type(error).__name__}: {reason})") from error
    actual = generate(pair.ours)
    sequences = [getattr(each, "sequences", each) for each in (actual, expected)]
    if all(isinstance(each, Tensor) and not each.is_floating_point() for each in sequences):
        if not torch.equal(*sequences):
            with replaced(unsteady):
                moved = generate(pair.ours)
            if not torch.equal(getattr(moved, "sequences", moved), sequences[0]):
                raise NotApplicable(f"tokens change where attention moves by {UNSTEADY:.0e} of itself")
        assert torch.equal(*sequences), "other tokens are generated"
    numbers = floats(expected)
    return worst(floats(actual), numbers) if numbers else 0.0


CHECKS: dict[str, Callable[[Pair], float]] = {
    "outputs": outputs,
    "left padding": left_padding,
    "right padding": right_padding,
    "generation": generation,
    "gradients": gradients,
}


def _padded(pair: Pair, left: bool) -> float:
    inputs, mask = padded_inputs(pair, left)
    real = mask.bool()

    def of_tokens(found: dict[str, Tensor]) -> dict[str, Tensor]:
        # What padding computes has no meaning. Neither has an output for all tokens that is read off the first one.
        chosen = {name: each[real] if each.shape[:2] == real.shape else each for name, each in found.items()}
        kept = {name for name, each in found.items() if each.shape[:2] == real.shape or not left or decoded}
        return {name: each for name, each in chosen.items() if name in kept}

    decoded = pair.eager.config.is_encoder_decoder
    expected = of_tokens(run(pair.eager, inputs))
    if not expected:
        raise NotApplicable("has no output for each token")
    return worst(of_tokens(run(pair.ours, inputs)), expected)


def padded_inputs(pair: Pair, left: bool) -> tuple[dict[str, Any], Tensor]:
    """Longer inputs, of which the first sample's are padding, and the mask that says so.

    Raises:
        NotApplicable: the model takes no padding, or none of this kind.
    """
    sounds = [name for name in ("input_values", "input_features") if name in pair.inputs]
    if "input_ids" in pair.inputs and "attention_mask" in pair.inputs and pair.inputs["input_ids"].ndim == 2:
        return _padded_text(pair.inputs, left)
    parameters = inspect.signature(pair.eager.forward).parameters
    masks = [name for name in ("attention_mask", "input_features_mask", "padding_mask") if name in parameters]
    if len(sounds) != 1 or not masks:
        raise NotApplicable("takes no padding")
    if left:
        raise NotApplicable("sounds are padded behind")
    sound = pair.inputs[sounds[0]]
    for length in (size for size in sound.shape[1:] if size > 1):
        mask = torch.ones(len(sound), length, dtype=torch.long)
        mask[0, 3 * length // 4 :] = 0
        inputs = {**pair.inputs, masks[0]: mask}
        with contextlib.suppress(RuntimeError, ValueError, IndexError, TypeError):
            run(pair.eager, inputs)
            return inputs, torch.ones(0, 0)
    raise NotApplicable("eager takes no padding of these inputs")


def _padded_text(inputs: dict[str, Any], left: bool) -> tuple[dict[str, Any], Tensor]:
    batch, length = inputs["input_ids"].shape
    extra = tokens(batch, PADDING)
    extra[0] = 0
    beside = {"input_ids": extra, "attention_mask": (extra != 0).long(), "mm_token_type_ids": torch.zeros_like(extra)}
    longer = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == (batch, length) and not name.startswith("decoder_"):
            edge = value[:, :1] if left else value[:, -1:]
            more = beside.get(name, edge.expand(-1, PADDING, *value.shape[2:]))
            longer[name] = torch.cat([more, value] if left else [value, more], 1)
    return longer, longer["attention_mask"]


def parameter_gradients(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of a random weighting of all outputs, by the parameters' names."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    terms = []
    for tensor in run(model, inputs).values():
        if tensor.requires_grad:
            finite = tensor[tensor.isfinite()]
            terms.append((finite * torch.randn(finite.shape, generator=generator)).sum())
    if not terms:
        raise NotApplicable("its outputs have none")
    torch.stack(terms).sum().backward()
    found = {
        name: torch.zeros_like(each) if each.grad is None else each.grad.clone()
        for name, each in model.named_parameters()
    }
    model.zero_grad()
    return found
