# SPDX-License-Identifier: Apache-2.0
"""Inputs of a tiny model, from the arguments that its `forward` names and the sizes that its config holds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from . import special_inputs
from .sizes import SPECIAL_TOKENS

BATCH, TOKENS, DECODER_TOKENS, FRAMES, SAMPLES = 2, 13, 7, 32, 1600
FIRST_SPECIAL = 48  # token ids from here on have a meaning somewhere


def inputs_of(model: PreTrainedModel) -> dict[str, Any]:
    """Two samples without padding."""
    special = special_inputs.INPUTS.get(type(model).__name__)
    if special is not None:
        return special(model)
    names = set(inspect.signature(model.forward).parameters)
    inputs: dict[str, Any] = {}
    if "pixel_values" in names:
        inputs |= images(model, names)
    if {"hidden_states", "grid_thw"} <= names:
        patches = images(model, names)
        inputs |= {"hidden_states": patches["pixel_values"], "grid_thw": patches["grid_thw"]}
    if names & {"input_features", "input_values"}:
        inputs |= audio(model, names)
    if "input_ids" in names:
        inputs["input_ids"] = tokens(BATCH, TOKENS, model.config)
        features = image_features(model, inputs) if "pixel_values" in inputs else 0
        if features:
            inputs["input_ids"] = with_placeholders(inputs["input_ids"], SPECIAL_TOKENS["image_token_id"], features)
        if "mm_token_type_ids" in names:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == SPECIAL_TOKENS["image_token_id"]).long()
        if "attention_mask" in names:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "decoder_input_ids" in names:
            inputs["decoder_input_ids"] = tokens(BATCH, DECODER_TOKENS, model.config)
    elif "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = tokens(BATCH, DECODER_TOKENS, model.config)
    return inputs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(batch: int, length: int, config: PreTrainedConfig | None = None) -> Tensor:
    """Token ids that mean nothing special."""
    return torch.randint(3, FIRST_SPECIAL, (batch, length), generator=generator(batch * 100 + length))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def with_placeholders(input_ids: Tensor, token: int, count: int) -> Tensor:
    """`count` placeholders in each row, after the first token."""
    middle = torch.full((len(input_ids), count), token)
    return torch.cat([input_ids[:, :1], middle, input_ids[:, 1:]], 1)


def configs_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and its sub-configs, the outermost first."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs_of(value)


def field(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of these fields that a config has, vision configs before the others."""
    for each in sorted(configs_of(config), key=lambda part: "vision" not in (part.model_type or "")):
        for name in names:
            if getattr(each, name, None) is not None:
                return getattr(each, name)
    return default


def images(model: PreTrainedModel, names: set[str]) -> dict[str, Tensor]:
    """One image a sample: as pixels, or as a list of patches with the number of them in each direction."""
    config = model.config
    channels = field(config, "num_channels", "in_channels", "in_chans", default=3)
    patch = field(config, "patch_size", default=8)
    grid = next((name for name in ("image_grid_thw", "grid_thw") if name in names), None)
    if grid:
        temporal = field(config, "temporal_patch_size", default=1)
        merge = field(config, "spatial_merge_size", default=2)
        side = 2 * merge
        columns = channels * temporal * patch * patch
        return {
            "pixel_values": noise(BATCH * side * side, columns),
            grid: torch.tensor([[1, side, side]] * BATCH),
        }
    size = field(config, "image_size", "crop_size", default=32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {"pixel_values": noise(BATCH, channels, height, width)}


def audio(model: PreTrainedModel, names: set[str]) -> dict[str, Tensor]:
    """A spectrogram or samples."""
    if "input_values" in names and "input_features" not in names:
        return {"input_values": noise(BATCH, SAMPLES)}
    bins = field(model.config, "num_mel_bins", "feature_size", "n_mels", default=16)
    return {"input_features": noise(BATCH, bins, FRAMES)}


@torch.no_grad()
def image_features(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """How many placeholders an image needs, as the model's own vision tower says."""
    base = getattr(model, "model", model)
    function = getattr(model, "get_image_features", None) or getattr(base, "get_image_features", None)
    if function is None:
        return 0
    known = inspect.signature(function).parameters
    output = function(**{name: value for name, value in inputs.items() if name in known})
    features = getattr(output, "pooler_output", output)
    if isinstance(features, (list, tuple)):
        features = torch.cat([feature.reshape(-1, feature.shape[-1]) for feature in features])
    return features.reshape(-1, features.shape[-1]).shape[0] // BATCH
