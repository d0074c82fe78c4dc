# SPDX-License-Identifier: Apache-2.0
"""Inputs of a tiny model, from the arguments that its `forward` names and the sizes that its config holds."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from . import special_inputs
from .sizes import SPECIAL_TOKENS

BATCH, TOKENS, DECODER_TOKENS, FRAMES, SAMPLES = 2, 13, 7, 64, 1600
FIRST_SPECIAL = 48  # token ids from here on have a meaning somewhere


def inputs_of(model: PreTrainedModel) -> dict[str, Any]:
    """Two samples without padding, in the first form that the model takes.

    Raises:
        ValueError: it takes none of them; its errors.
    """
    errors = []
    for inputs in candidates(model):
        try:
            inputs = inputs(model)
            with torch.no_grad():
                model(**inputs)
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if "my_triton" in str(error):
                raise
            where = [each for each in traceback.extract_tb(error.__traceback__) if "models/" in each.filename][-1:]
            place = "".join(f"{Path(each.filename).name}:{each.lineno} " for each in where)
            errors.append(f"{place}{type(error).__name__}: {error}")
        else:
            return inputs
    raise ValueError("; ".join(dict.fromkeys(errors)))


def candidates(model: PreTrainedModel) -> Iterator[Callable[[PreTrainedModel], dict[str, Any]]]:
    """Functions that make inputs of a model, the likeliest first: layouts are not told by names."""
    special = special_inputs.INPUTS.get(type(model).__name__)
    if special is not None:
        yield special
        return
    names = set(inspect.signature(model.forward).parameters)
    pictures = (images, squares, videos) if "pixel_values" in names else (None,)
    sounds = (None,)
    if "input_features" in names:
        sounds = (mels_first, mels_last)
    elif "input_values" in names:
        sounds = (samples, channel_of_samples, mels_last)
    for picture in pictures:
        for sound in sounds:
            yield partial(generic, picture=picture, sound=sound)


def generic(model: PreTrainedModel, picture: Callable | None, sound: Callable | None) -> dict[str, Any]:
    """Inputs by the names of the arguments."""
    names = set(inspect.signature(model.forward).parameters)
    inputs: dict[str, Any] = {}
    if {"hidden_states", "grid_thw"} <= names:
        patches = images(model, names)
        inputs |= {"hidden_states": patches["pixel_values"], "grid_thw": patches["grid_thw"]}
    if picture is not None:
        inputs |= picture(model, names)
    elif "pixel_values_videos" in names and "input_ids" not in names:
        inputs["pixel_values_videos"] = videos(model, names)["pixel_values"]
    if sound is not None:
        inputs |= sound(model, names)
        length = next(iter(sound(model, names).values())).shape[-1 if sound is mels_first else 1]
        for name in ("input_features_mask", "feature_attention_mask"):
            if name in names:
                inputs[name] = torch.ones(BATCH, length, dtype=torch.long)
    for name in sorted(names & special_inputs.ARGUMENTS.keys()):
        inputs[name] = special_inputs.ARGUMENTS[name](model, inputs)
    if "input_ids" in names:
        inputs |= text(model, names, inputs)
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = tokens(BATCH, DECODER_TOKENS)
    return inputs


def text(model: PreTrainedModel, names: set[str], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Token ids, with a placeholder for each feature of the images and sounds in `inputs`."""
    ids = tokens(BATCH, TOKENS)
    for kind, token in (("image", SPECIAL_TOKENS["image_token_id"]), ("audio", SPECIAL_TOKENS["audio_token_id"])):
        count = features(model, kind, inputs)
        if count:
            ids = with_placeholders(ids, token, count)
    made = {"input_ids": ids}
    if "mm_token_type_ids" in names:
        made["mm_token_type_ids"] = (ids == SPECIAL_TOKENS["image_token_id"]).long()
    if "attention_mask" in names:
        made["attention_mask"] = torch.ones_like(ids)
    return made


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(batch: int, length: int) -> Tensor:
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


def squares(model: PreTrainedModel, names: set[str]) -> dict[str, Tensor]:
    """As `images`; a patch of a list of patches keeps its channels, rows and columns."""
    made = images(model, names)
    patch = field(model.config, "patch_size", default=8)
    pixels = made["pixel_values"]
    return {
        **made,
        "pixel_values": pixels.reshape(*pixels.shape[:-1], -1, patch, patch) if pixels.ndim == 2 else pixels,
    }


def videos(model: PreTrainedModel, names: set[str]) -> dict[str, Tensor]:
    """A few frames for each sample."""
    frames = field(model.config, "num_frames", "frames_per_clip", default=2)
    pixels = images(model, set())["pixel_values"]
    return {"pixel_values": pixels[:, None] + 0.1 * noise(BATCH, frames, *pixels.shape[1:])}


def mels_first(model: PreTrainedModel, names: set[str]) -> dict[str, Tensor]:
    """A spectrogram `[batch, bins, frames]`."""
    return {"input_features": noise(BATCH, bins(model), frames(model))}


def mels_last(model: PreTrainedModel, names: set[str]) -> dict[str, Tensor]:
    """A spectrogram `[batch, frames, bins]`."""
    name = "input_features" if "input_features" in names else "input_values"
    return {name: noise(BATCH, frames(model), bins(model))}


def samples(model: PreTrainedModel, names: set[str]) -> dict[str, Tensor]:
    """Sound as it is."""
    return {"input_values": noise(BATCH, SAMPLES)}


def channel_of_samples(model: PreTrainedModel, names: set[str]) -> dict[str, Tensor]:
    """Sound of one channel."""
    return {"input_values": noise(BATCH, 1, SAMPLES)}


def bins(model: PreTrainedModel) -> int:
    """Number of frequencies of a spectrogram."""
    names = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size", "n_mels")
    return field(model.config, *names, default=16) * field(model.config, "num_stacked_frames", default=1)


def frames(model: PreTrainedModel) -> int:
    """Length of a spectrogram, which some models fix."""
    window, positions = (field(model.config, name) for name in ("n_window", "max_source_positions"))
    return 2 * (window or positions or FRAMES // 2)  # of a sound that needs no cutting


@torch.no_grad()
def features(model: PreTrainedModel, kind: str, inputs: dict[str, Tensor]) -> int:
    """How many placeholders an image or a sound needs, as the model's own tower says."""
    if not any(name.startswith("pixel" if kind == "image" else "input_") for name in inputs):
        return 0
    base = getattr(model, "model", model)
    function = getattr(model, f"get_{kind}_features", None) or getattr(base, f"get_{kind}_features", None)
    if function is None:
        return 0
    known = inspect.signature(function).parameters
    output = function(**{name: value for name, value in inputs.items() if name in known})
    vectors = getattr(output, "pooler_output", output)
    if isinstance(vectors, (list, tuple)):
        vectors = torch.cat([vector.reshape(-1, vector.shape[-1]) for vector in vectors])
    return vectors.reshape(-1, vectors.shape[-1]).shape[0] // BATCH
