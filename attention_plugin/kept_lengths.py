# SPDX-License-Identifier: Apache-2.0
"""Lengths of packed documents, handed on in models whose layers keep them back from their attention.

Such a layer has them among its `**kwargs` and calls its attention without those. Two hooks, put there while the model
is built, bring them across on the mask, which every such layer does hand on. So they also arrive where a layer is
computed again from a checkpoint, outside of which its own hooks stay.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sources

LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")


class _Loaded(NamedTuple):
    """A mask on its way through a layer, and the lengths that it carries."""

    attention_mask: Any
    lengths: dict[str, Tensor]


def hand_on(model: torch.nn.Module) -> None:
    """Have the layers of a model, or of a part of one, hand on the lengths that they would keep back."""
    for layer in model.modules():
        kind = type(layer)
        for class_name, part in sources.layers_keeping_keywords(kind.__module__):
            attention = getattr(layer, part, None) if class_name == kind.__name__ else None
            if isinstance(attention, torch.nn.Module) and _takes_lengths(attention) and not hands_on(attention):
                layer.register_forward_pre_hook(_load, with_kwargs=True)
                attention.register_forward_pre_hook(_unload, with_kwargs=True)


def hands_on(attention: torch.nn.Module) -> bool:
    """Whether an attention layer is given the lengths that its model keeps back."""
    return _unload in attention._forward_pre_hooks.values()


def _takes_lengths(attention: torch.nn.Module) -> bool:
    kind: Any = type(attention)
    parameters = inspect.signature(attention.forward).parameters.values()
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    return takes_any and sources.layer_calls_interface(kind)


def _load(layer: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    # Those of continuous batching belong to its cache, without which they mean nothing.
    names = LENGTHS if kwargs.get("write_index") is None else ()
    lengths = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    if not lengths:
        return None
    return args, {**kwargs, "attention_mask": _Loaded(kwargs.get("attention_mask"), lengths)}


def _unload(attention: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    loaded = kwargs.get("attention_mask")
    if not isinstance(loaded, _Loaded):
        return None
    return args, {**kwargs, "attention_mask": loaded.attention_mask, **loaded.lengths}
