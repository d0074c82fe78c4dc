# SPDX-License-Identifier: Apache-2.0
"""Building a model without weights, running it, and finding which of its parts are refused."""

from __future__ import annotations

import copy
import inspect
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .. import sources, support
from ..command import UsageError, one_line
from .inputs import Prompts, inputs_for
from .record import NAME, PREFIX, Call, Recorder
from .weightless import Weightless

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
)
"""What builds a model from a configuration, the plainest first: heads on top of a model have no attention."""


@dataclass(frozen=True)
class Refusal:
    """A part of a model that is not served, or that could not be run; `part` is "" for the whole model."""

    part: str
    reason: str
    refused: bool = True
    """False where it might be served, but nothing here could run it."""


@dataclass
class Probe:
    """What a run of a model showed."""

    model_class: str
    calls: list[Call] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    names: dict[torch.nn.Module, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    guesses: int = 0


def probe(config: Any, prompts: Prompts, *, trust_remote_code: bool = False) -> Probe:
    """Build the model of a configuration without weights, run it on prompts, and record its attention.

    Raises:
        UsageError: transformers cannot build a model from this configuration.
    """
    recorder = Recorder()
    with recorder.registered(), _quiet():
        model, refusals = _build(config, trust_remote_code)
        result = Probe(type(model).__name__, recorder.calls, refusals, {m: n for n, m in model.named_modules()})
        if any(refusal.part == "" for refusal in refusals):
            return result
        _remember_slow_modules(model)
        for name, part in _parts(model):
            if name == "" or (_unreached(part, result) and not _is_refused(name, result)):
                _run(part, name, prompts, result)
        result.refusals += _never_run(model, result)
        if not any("input_ids" in inspect.signature(part.forward).parameters for _, part in _parts(model)):
            result.notes.append("the model takes no text: the prompt lengths are not those of its inputs")
    return result


# ---------------------------------------------------------------------- building


class ModelRefused(Exception):
    """A model, or a part of it, was refused while it was built."""


def _build(config: Any, trust_remote_code: bool) -> tuple[PreTrainedModel, list[Refusal]]:
    """The model, with its refused parts on eager attention; refused as a whole, it is all eager and not to be run."""
    with suppress(ModelRefused):
        return _construct(config, NAME, trust_remote_code), []
    model = _construct(config, "eager", trust_remote_code)
    reasons = {name: refusal_of(type(part)) for name, part in _parts(model)}
    refused = {name: words for name, words in reasons.items() if words is not None}
    if "" not in refused:
        configs = {id(part.config) for name, part in _parts(model) if name in refused}
        keys = list(model.config.sub_configs)
        chosen = {key: "eager" if id(getattr(model.config, key, None)) in configs else NAME for key in keys}
        try:
            mixed = _construct(config, {"": NAME, **chosen}, trust_remote_code)
            outermost = {n: w for n, w in refused.items() if not any(n.startswith(f"{o}.") for o in refused)}
            return mixed, [Refusal(name, words) for name, words in outermost.items()]
        except ModelRefused as error:
            refused = {"": str(error)}
    return model, [Refusal("", refused[""])]


def refusal_of(model_class: type[PreTrainedModel]) -> str | None:
    """Why a class of models is refused while it is built, or None."""
    # All that the check looks at is the class and what its configuration says.
    stand_in = object.__new__(model_class)
    stand_in.__dict__["config"] = SimpleNamespace(_attn_implementation=NAME)
    try:
        support.check_new_module(stand_in, "", None)
    except ValueError as error:
        return str(error)
    return None


def _construct(config: Any, implementation: Any, trust_remote_code: bool) -> PreTrainedModel:
    """The model on the meta device, in eval mode, with a copy of the configuration.

    Raises:
        ModelRefused: we refuse it under this implementation.
        UsageError: transformers cannot build it.
    """
    config = copy.deepcopy(config)
    for auto_class in _auto_classes(config):
        options = {"attn_implementation": implementation, "trust_remote_code": trust_remote_code}
        try:
            with torch.device("meta"):
                return auto_class.from_config(config, **options).eval()
        except Exception as error:
            if str(error).startswith("Unrecognized configuration class"):
                continue
            if str(error).startswith(PREFIX):
                raise ModelRefused(str(error)) from error
            raise UsageError(f"transformers cannot build this model: {one_line(error)}") from error
    model_type = getattr(config, "model_type", None)
    raise UsageError(f"transformers has no model to build from a configuration of type {model_type!r}")


def _auto_classes(config: Any) -> Iterator[Any]:
    own = getattr(config, "auto_map", None) or {}
    names = [name for name in AUTO_CLASSES if name in own] or AUTO_CLASSES
    return (getattr(transformers, name) for name in names)


def _parts(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """The model, as "", and the models that it is made of."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel))


# ---------------------------------------------------------------------- running


def _run(model: PreTrainedModel, name: str, prompts: Prompts, result: Probe) -> None:
    """Run a model, or a part that its own run did not reach, on text alone and then on all that it takes."""
    failure = None
    for with_media in (False, True):
        before = len(result.calls)
        failure = _try(model, prompts, result, with_media=with_media)
        if failure is None and len(result.calls) > before:
            return
        if with_media or (failure is not None and failure.startswith(PREFIX)):
            break
        del result.calls[before:]
    if failure is None:
        return
    if failure.startswith(PREFIX):
        result.refusals.append(Refusal(name, failure))
    else:
        result.notes.append(f"{name or 'the whole model'} could not be run ({failure}), only its parts")


def _try(model: PreTrainedModel, prompts: Prompts, result: Probe, *, with_media: bool) -> str | None:
    """Run once; returns why it failed."""
    mode = Weightless()
    try:
        inputs = inputs_for(model, prompts, with_media=with_media)
        with torch.no_grad(), mode:
            model(**inputs)
    except UsageError:
        raise
    except Exception as error:
        return one_line(error, limit=2000)
    finally:
        result.guesses += mode.guesses
    return None


SLOW = 0.05
"""Seconds from which it is worth to remember what a module's result looks like."""


def _remember_slow_modules(model: torch.nn.Module) -> None:
    """Let modules without attention inside take a result's shape from an equal module that was slow.

    State-space layers go through their tokens one by one, and a model has dozens of them.
    """
    results: dict[Any, Tensor] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) or not any(True for _ in module.children()):
            continue
        if not _attention_layers(module):
            module.forward = partial(_run_or_remember, type(module), module.forward, results)


def _run_or_remember(kind: type, forward: Any, results: dict[Any, Tensor], *args: Any, **kwargs: Any) -> Any:
    tensors = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
    key = (kind, *((tensor.shape, tensor.dtype) for tensor in tensors))
    if key in results:
        return torch.empty_like(results[key])
    begun = time.perf_counter()
    result = forward(*args, **kwargs)
    slow = time.perf_counter() - begun > SLOW
    if slow and isinstance(result, Tensor) and result.is_meta and tensors and result.shape == tensors[0].shape:
        results[key] = result
    return result


def _attention_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules whose own code calls the attention interface."""
    classes: dict[torch.nn.Module, Any] = {module: type(module) for module in model.modules()}
    return [module for module, module_class in classes.items() if sources.layer_calls_interface(module_class)]


def _unreached(model: torch.nn.Module, result: Probe) -> list[torch.nn.Module]:
    reached = {call.module for call in result.calls}
    return [layer for layer in _attention_layers(model) if layer not in reached]


def _is_refused(name: str, result: Probe) -> bool:
    """Whether a module is, or lies in, a part that is refused."""
    return any(refusal.part in ("", name) or name.startswith(f"{refusal.part}.") for refusal in result.refusals)


def _never_run(model: PreTrainedModel, result: Probe) -> list[Refusal]:
    """Layers that no run reached, by the part of the model that holds them."""
    parts = [name for name, _ in _parts(model)]
    missing: dict[str, int] = {}
    for layer in _unreached(model, result):
        name = result.names[layer]
        if _is_refused(name, result):
            continue
        part = max((part for part in parts if part == "" or name.startswith(f"{part}.")), key=len)
        missing[part] = missing.get(part, 0) + 1
    words = "{} of its attention layers were not reached with the inputs made up here"
    return [Refusal(part, words.format(count), refused=False) for part, count in missing.items()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of transformers and this package, which are about running a model in earnest."""
    verbosity, level = transformers_logging.get_verbosity(), support.logger.level
    transformers_logging.set_verbosity_error()
    support.logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        support.logger.setLevel(level)
        support.log_once.cache_clear()  # what was not said here is still to be said
