# SPDX-License-Identifier: Apache-2.0
"""Tiny models of a family, with the same weights under eager and under `my_triton`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

import attention_plugin  # noqa: F401  (importing it registers "my_triton")

from .configs import shrink
from .discover import model_class
from .inputs import BATCH, inputs_of, noise
from .overrides import ENLIVENED, IMPLEMENTATIONS, REFERENCES, SHARPENED

IMPLEMENTATION = "my_triton"
CROSS = " as decoder"
"""Added to the name of a class: with the cross attention that its configuration can switch on."""


@dataclass
class Pair:
    """One model twice, and inputs that both take."""

    name: str
    eager: PreTrainedModel
    ours: PreTrainedModel
    inputs: dict[str, Any]


def pair(folder: str, name: str) -> Pair:
    """Build a model class of a folder under both implementations.

    Raises:
        Exception: whatever the class raises under eager, or under `my_triton`.
    """
    eager = build(folder, name, REFERENCES.get(name, "eager"))
    inputs = inputs_of(eager)
    if name.endswith(CROSS):
        inputs["encoder_hidden_states"] = noise(BATCH, 9, eager.config.hidden_size)
        inputs["encoder_attention_mask"] = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
    ours = build(folder, name, IMPLEMENTATIONS.get(name, IMPLEMENTATION))
    ours.load_state_dict(eager.state_dict())
    copy_buffers(eager, ours)
    return Pair(name, eager, ours, inputs)


def build(folder: str, name: str, implementation: str | dict[str, str]) -> PreTrainedModel:
    """A tiny model in eval mode, with seeded weights of which none is constant."""
    cls = model_class(folder, name.removesuffix(CROSS))
    config = shrink(cls.config_class)
    if name.endswith(CROSS):
        config.is_decoder = config.add_cross_attention = True
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation=implementation).float().eval()
    randomise_constants(model)
    if name in ENLIVENED:
        enliven(model, ENLIVENED[name])
    if name in SHARPENED:
        sharpen(model, *SHARPENED[name])
    return model


@torch.no_grad()
def sharpen(model: PreTrainedModel, part: str, factor: float) -> None:
    """Multiply the weights in one part of a model, so that its tokens differ and attention matters."""
    for name, parameter in model.named_parameters():
        if part in name.split(".") and parameter.ndim > 1:
            parameter.mul_(factor)


@torch.no_grad()
def enliven(model: PreTrainedModel, gain: float) -> None:
    """Enlarge weights smaller than `gain / sqrt(inputs)`, but for those of embeddings: tokens then stay apart."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for parameter in model.parameters():
        if parameter.ndim > 1 and id(parameter) not in embeddings:
            wanted, deviation = gain * parameter[0].numel() ** -0.5, parameter.std().item()
            if 0 < deviation < wanted:
                parameter.mul_(wanted / deviation)


@torch.no_grad()
def randomise_constants(model: PreTrainedModel) -> None:
    """Give weights that begin as one number, such as 0 or a small scale of a layer, values as training would.

    Ones are left: they scale what is normalised.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        first = parameter.flatten()[:1]
        constant = parameter.numel() > 0 and bool((parameter == first).all())
        if (constant and first.item() != 1) or not parameter.isfinite().all():
            parameter.normal_(std=0.2, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):  # a codebook: with all of its entries equal all sounds are
            buffer.normal_(generator=generator)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].normal_(std=0.2, generator=generator)


@torch.no_grad()
def copy_buffers(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Buffers that are no part of the state, some of which are drawn at random."""
    others = dict(target.named_buffers())
    for name, buffer in source.named_buffers():
        if others[name].shape == buffer.shape:
            others[name].copy_(buffer)
