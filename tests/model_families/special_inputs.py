# SPDX-License-Identifier: Apache-2.0
"""Inputs that the generic rules do not give: arguments by their names, and models by their class names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

BATCH = 2


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that are the same in each run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int, length: int, high: int = 48) -> Tensor:
    """Token ids that mean nothing special."""
    return torch.randint(3, high, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def _boxes(*shape: int) -> Tensor:
    """Boxes with sides of at least a tenth."""
    low = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(0)) * 0.5
    return torch.cat([low, low + 0.1 + low / 2], -1)


def _past_length(model: PreTrainedModel) -> int:
    return model.config.context_length + max(model.config.lags_sequence)


# Argument name -> what it is given, from the model and the inputs so far.
ARGUMENTS: dict[str, Callable[[PreTrainedModel, dict[str, Any]], Any]] = {
    # sizes of images
    "target_sizes": lambda model, inputs: torch.tensor([[4, 4]]),
    "image_sizes": lambda model, inputs: torch.tensor([[32, 32]] * BATCH),
    "image_merge_sizes": lambda model, inputs: torch.tensor([2] * BATCH),
    "merge_sizes": lambda model, inputs: torch.tensor([2] * BATCH),
    "aspect_ratio_ids": lambda model, inputs: torch.ones(BATCH, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda model, inputs: torch.ones(BATCH, 1, 4, dtype=torch.long),
    "bbox": lambda model, inputs: _boxes(BATCH, 13),
    "image_attention_mask": lambda model, inputs: torch.ones(BATCH, 13, inputs["pixel_values"].shape[1]),
    "input_points": lambda model, inputs: 20 * torch.rand(BATCH, 1, 3, 2, generator=torch.Generator().manual_seed(0)),
    # time series
    "past_time_features": lambda model, inputs: noise(BATCH, _past_length(model), 1, seed=1),
    "past_observed_mask": lambda model, inputs: torch.ones_like(_past_values(model)),
    "future_values": lambda model, inputs: noise(BATCH, model.config.prediction_length, seed=2),
    "future_time_features": lambda model, inputs: noise(BATCH, model.config.prediction_length, 1, seed=3),
    "past_values_padding": lambda model, inputs: torch.zeros(BATCH, 32, dtype=torch.long),
    "freq": lambda model, inputs: torch.zeros(BATCH, 1, dtype=torch.long),
    "past_values": lambda model, inputs: _past_values(model),
    # patches of pix2struct and its kind: row and column, then pixels
    "flattened_patches": lambda model, inputs: _flattened_patches(model),
}


def _past_values(model: PreTrainedModel) -> Tensor:
    if hasattr(model.config, "lags_sequence"):
        return noise(BATCH, _past_length(model))
    if hasattr(model.config, "num_input_channels"):
        return noise(BATCH, model.config.context_length, model.config.num_input_channels)
    return noise(BATCH, 32)


def _flattened_patches(model: PreTrainedModel) -> Tensor:
    vision = getattr(model.config, "vision_config", model.config)
    columns = vision.patch_embed_hidden_size
    places = torch.cartesian_prod(torch.arange(1, 4), torch.arange(1, 5)).float()
    return torch.cat([places.expand(BATCH, -1, -1), noise(BATCH, 12, columns)], -1)


def _pair_of_pictures(model: PreTrainedModel) -> dict[str, Any]:
    return {"pixel_values": torch.rand(1, 2, 1, 64, 64, generator=torch.Generator().manual_seed(0))}


def _speech_text(model: PreTrainedModel) -> dict[str, Any]:
    return {"input_ids": tokens(BATCH, 9, 30)[..., None].repeat(1, 1, model.config.num_codebooks + 1)}


def _codes(model: PreTrainedModel) -> dict[str, Any]:
    """As many rows of codes for each text as the decoder has codebooks."""
    config = getattr(model.config, "decoder", model.config)
    codes = tokens(BATCH * config.num_codebooks, 7)
    if not hasattr(model.config, "text_encoder"):
        return {"input_ids": codes}
    return {"input_ids": tokens(BATCH, 13), "attention_mask": _ones(BATCH, 13), "decoder_input_ids": codes}


def _prompted(model: PreTrainedModel) -> dict[str, Any]:
    """A picture and points in it."""
    size = model.config.vision_config.image_size
    return {"pixel_values": noise(BATCH, 3, size, size), "input_points": ARGUMENTS["input_points"](model, {})}


# Class name -> all inputs.
INPUTS: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "EfficientLoFTRForKeypointMatching": _pair_of_pictures,
    "EfficientLoFTRModel": _pair_of_pictures,
    "LightGlueForKeypointMatching": lambda model: {
        "pixel_values": torch.rand(1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        "output_hidden_states": True,  # its scores are near 0
    },
    "KyutaiSpeechToTextModel": _speech_text,
    "KyutaiSpeechToTextForConditionalGeneration": _speech_text,
    **dict.fromkeys(("MusicgenForCausalLM", "MusicgenModel", "MusicgenForConditionalGeneration"), _codes),
    **dict.fromkeys(("MusicgenMelodyForCausalLM", "MusicgenMelodyModel"), _codes),
    "ASTForAudioClassification": lambda model: {"input_values": noise(BATCH, 64, 16)},
    "ASTModel": lambda model: {"input_values": noise(BATCH, 64, 16)},
    "DiaForConditionalGeneration": lambda model: {
        "input_ids": tokens(BATCH, 13), "attention_mask": _ones(BATCH, 13),
        "decoder_input_ids": tokens(BATCH, 7)[..., None].repeat(1, 1, model.config.decoder_config.num_channels),
    },
    "MuseGlimmerAssistantModel": lambda model: {
        "noise_embeds": noise(BATCH, 4, 32),
        "use_cache": True,
        "context_hidden_states": noise(BATCH, 6, 32 * len(model.config.target_layer_ids), seed=1),
    },
    "Phi4MultimodalAudioModel": lambda model: {
        "hidden_states": noise(BATCH, 64, model.config.input_size), "mask": torch.ones(BATCH, 64, dtype=torch.bool),
    },
    "UdopForConditionalGeneration": lambda model: {
        "input_ids": tokens(BATCH, 13), "bbox": _boxes(BATCH, 13), "attention_mask": _ones(BATCH, 13),
        "pixel_values": noise(BATCH, 3, 32, 32), "decoder_input_ids": tokens(BATCH, 7),
    },
    "NeuCodecModel": lambda model: {
        "input_values": noise(BATCH, 1, 6400), "input_features": noise(BATCH, 20, 16, seed=1),
    },
    "Xcodec2Model": lambda model: {
        "input_values": noise(BATCH, 1, 6400), "input_features": noise(BATCH, 20, 16, seed=1),
    },
    "NeoMMEForMaskedLM": lambda model: {"input_ids": tokens(BATCH, 13), "attention_mask": _ones(BATCH, 13)},
    **dict.fromkeys(
        ("FunAsrNanoEncoder",),
        lambda model: {"input_features": noise(BATCH, 20, 112), "input_features_mask": _ones(BATCH, 20)},
    ),
    "LayoutLMForMaskedLM": lambda model: {
        "input_ids": tokens(BATCH, 13), "bbox": (30 * _boxes(BATCH, 13)).long(), "attention_mask": _ones(BATCH, 13),
    },
    **dict.fromkeys(
        (
            "LayoutLMv3ForQuestionAnswering",
            "LayoutLMv3ForSequenceClassification",
            "LayoutLMv3ForTokenClassification",
            "LayoutLMv3Model",
        ),
        lambda model: {
            "input_ids": tokens(BATCH, 13), "bbox": (30 * _boxes(BATCH, 13)).long(), "attention_mask": _ones(BATCH, 13),
            "pixel_values": noise(BATCH, 3, 32, 32),
        },
    ),
    "PPOCRV5ServerRecForTextRecognition": lambda model: {
        "pixel_values": noise(BATCH, 3, 96, 256), "output_hidden_states": True,
    },
    "PPOCRV5MobileRecForTextRecognition": lambda model: {"pixel_values": noise(BATCH, 3, 96, 128)},
    # Of a small picture their backbones leave a single place.
    **dict.fromkeys(
        ("ConditionalDetrForObjectDetection", "DetrForObjectDetection", "MaskFormerForInstanceSegmentation"),
        lambda model: {"pixel_values": noise(BATCH, 3, 128, 128)},
    ),
    "SamModel": _prompted,
    "SamHQModel": _prompted,
}  # fmt: skip
