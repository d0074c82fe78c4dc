# SPDX-License-Identifier: Apache-2.0
"""Inputs that make a model run: prompts of given lengths, and pictures and sounds of the sizes that it asks for."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..command import UsageError

MOST_TOKENS = 1 << 22
"""Tokens of all prompts together, padding included: masks take a few dozen bytes for each."""

DEFAULT_TOKENS = 1024
"""Longest prompt by default, unless a window is wider than half of it."""

MOST_DEFAULT_TOKENS = 1 << 15


Layout = Literal["left", "right", "packed"]
"""Padding on the left or right, or prompts packed into one row."""


@dataclass(frozen=True)
class Prompts:
    """A batch of texts: how long each is, and how they share one tensor."""

    lengths: tuple[int, ...]
    layout: Layout = "left"

    @property
    def shape(self) -> tuple[int, int]:
        """`(batch, tokens)`."""
        return (1, sum(self.lengths)) if self.layout == "packed" else (len(self.lengths), max(self.lengths))

    def attended(self) -> Tensor:
        """int64 `[batch, tokens]`, 0 at padding."""
        tokens = self.shape[1]
        if self.layout == "packed":
            return torch.ones(1, tokens, dtype=torch.long)
        index, lengths = torch.arange(tokens), torch.tensor(self.lengths)[:, None]
        return (index >= tokens - lengths if self.layout == "left" else index < lengths).long()

    def position_ids(self) -> Tensor:
        """int64 `[1, tokens]`, from 0 again in each packed text."""
        return torch.cat([torch.arange(length) for length in self.lengths])[None]


def check_lengths(lengths: Sequence[int], layout: str) -> None:
    """Refuse prompt lengths that make no batch.

    Raises:
        UsageError: names the rule and the lengths.
    """
    if layout not in get_args(Layout):
        raise UsageError(f"the layout of prompts must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    if not all(isinstance(length, int) for length in lengths):
        raise UsageError(f"--prompt-lengths must be whole numbers, got {list(lengths)}; round them")
    if not lengths:
        raise UsageError("--prompt-lengths is empty; give numbers of tokens, such as --prompt-lengths 300 120")
    if min(lengths) < 1:
        raise UsageError(f"--prompt-lengths must be at least 1, got {min(lengths)}; leave out prompts without tokens")
    tokens = sum(lengths) if layout == "packed" else len(lengths) * max(lengths)
    if tokens > MOST_TOKENS:
        raise UsageError(
            f"--prompt-lengths make a batch of {tokens:,} tokens, padding included, and at most {MOST_TOKENS:,} are "
            "drawn; give shorter or fewer prompts"
        )


def default_lengths(config: Any) -> tuple[int, int]:
    """A long prompt and one of a third of its length: long enough to show windows, short enough for the model."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    windows = [_value(part, name) for part in parts for name in ("sliding_window", "attention_chunk_size")]
    widest = max([size for size in windows if isinstance(size, int)], default=0)
    tokens = DEFAULT_TOKENS if not widest else min(max(DEFAULT_TOKENS, 2 * widest), MOST_DEFAULT_TOKENS)
    limits = [_value(part, "max_position_embeddings") for part in parts]
    # Some learned positions begin after the padding's.
    limit = min([size - 2 for size in limits if isinstance(size, int) and size > 2], default=tokens)
    tokens = max(1, min(tokens, limit))
    return tokens, max(1, tokens // 3)


def _value(config: Any, name: str) -> Any:
    """A value of a configuration, or None where it has none, or not one for all layers."""
    try:
        return getattr(config, name)
    except Exception:  # transformers has an error of its own for values that differ between layers
        return None


def inputs_for(model: Any, prompts: Prompts, *, with_media: bool) -> dict[str, Any]:
    """Keyword arguments of `model.forward`, as far as its signature names things that are known.

    Args:
        with_media: whether to give pictures and sounds also where there is a text.

    Raises:
        LookupError: an argument without default is not known.
    """
    parameters = inspect.signature(model.forward).parameters
    has_text = "input_ids" in parameters
    makers = {} if has_text and not with_media else {
        "pixel_values": _pixels, "input_features": _features, "input_values": _sound, "hidden_states": _patches,
        "grid_thw": _grid, "image_sizes": _image_sizes, "speech_input": _sound,
    }  # fmt: skip
    inputs: dict[str, Any] = _texts(model.config, prompts, parameters) if has_text else {}
    for name, maker in makers.items():
        if name in parameters:
            made = maker(model.config, prompts, parameters)
            if made is not None:
                inputs[name] = made
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = torch.full(_decoder_shape(model.config, prompts), _plain_token(model.config))
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    for name, parameter in parameters.items():
        variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not variable and name not in inputs:
            raise LookupError(f"its `forward` needs `{name}`, which this command cannot make up")
    return inputs


def _texts(config: Any, prompts: Prompts, parameters: Any) -> dict[str, Tensor]:
    attended, token = prompts.attended(), _plain_token(config)
    padding = getattr(config, "pad_token_id", None)
    padding = padding if isinstance(padding, int) and padding >= 0 else 0
    # Some default configurations have a vocabulary without the padding.
    vocabulary = _value(config.get_text_config(), "vocab_size")
    last = vocabulary - 1 if isinstance(vocabulary, int) and vocabulary > 0 else None
    inputs = {"input_ids": torch.where(attended == 1, token, padding).clamp(max=last, min=0)}
    if prompts.layout == "packed":
        if "position_ids" not in parameters:
            raise UsageError(
                "--packed: this model takes no `position_ids`, which tell packed texts apart; leave it out"
            )
        inputs["position_ids"] = prompts.position_ids()
    elif "attention_mask" in parameters:
        inputs["attention_mask"] = attended
    if "bbox" in parameters:
        inputs["bbox"] = torch.zeros(*prompts.shape, 4, dtype=torch.long)
    return inputs


def _decoder_shape(config: Any, prompts: Prompts) -> tuple[int, int]:
    limits = [getattr(config, name, None) for name in ("max_target_positions", "decoder_max_position_embeddings")]
    longest = min([prompts.shape[1], *(limit for limit in limits if isinstance(limit, int) and limit > 0)])
    return prompts.shape[0], longest


def _plain_token(config: Any) -> int:
    """A token that the configuration gives no meaning of its own, such as that of a picture's place."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    names = [(name, value) for part in parts if part is not None for name, value in vars(part).items()]
    special = {
        value for name, value in names if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    return next(number for number in range(5, 10_000) if number not in special)


def _size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None)
    if size is None:
        size = getattr(getattr(config, "vision_config", None), "image_size", None)
    if isinstance(size, dict):
        size = (size.get("height", 224), size.get("width", 224))
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[-1])
    return (size, size) if isinstance(size, int) else (224, 224)


def _channels(config: Any) -> int:
    part = getattr(config, "vision_config", None) or config
    return next((getattr(part, n) for n in ("num_channels", "in_channels", "in_chans") if hasattr(part, n)), 3)


def _pixels(config: Any, prompts: Prompts, parameters: Any) -> Tensor:
    if (patches := _patches(config, prompts, parameters)) is not None:
        return patches
    frames = getattr(config, "num_frames", None)
    shape = (*((frames,) if isinstance(frames, int) else ()), _channels(config), *_size(config))
    return torch.zeros(shape).expand(prompts.shape[0], *shape)


def _image_sizes(config: Any, prompts: Prompts, parameters: Any) -> Tensor | None:
    return torch.tensor([_size(config)] * prompts.shape[0]) if "pixel_values" in parameters else None


def _sound(config: Any, prompts: Prompts, parameters: Any) -> Tensor:
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if isinstance(bins, int) and isinstance(frames, int):
        return torch.zeros(prompts.shape[0], frames, bins)  # a spectrogram, as a picture
    return torch.zeros(prompts.shape[0], 16_000)


def _features(config: Any, prompts: Prompts, parameters: Any) -> Tensor | None:
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if isinstance(bins, int) and isinstance(frames, int):
        return torch.zeros(prompts.shape[0], bins, 2 * frames)  # as Whisper: two frames for each position
    width = getattr(config, "feature_projection_input_dim", bins)
    return torch.zeros(prompts.shape[0], 200, width) if isinstance(width, int) else None


GRID = (16, 24)
"""Rows and columns of patches in the pictures of models that take pictures of any shape."""


def _patches(config: Any, prompts: Prompts, parameters: Any) -> Tensor | None:
    side = getattr(config, "patch_size", None)
    if "grid_thw" not in parameters or not isinstance(side, int):
        return None
    width = _channels(config) * getattr(config, "temporal_patch_size", 1) * side**2
    return torch.zeros(prompts.shape[0] * GRID[0] * GRID[1], width)


def _grid(config: Any, prompts: Prompts, parameters: Any) -> Tensor:
    return torch.tensor([[1, *GRID]] * prompts.shape[0])
