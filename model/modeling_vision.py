# SPDX-License-Identifier: Apache-2.0
"""The vision encoder of the reference model: patches of images of any size in, their features out.

Letters in shapes: N images or frames, P patches of the largest of them, C channels of a pixel times its patch's pixels,
F hidden size, H heads, D head dim.
"""

import math

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_multimodal import ReferenceMultimodalConfig, ReferenceVisionConfig
from .modeling_reference import CACHE, ReferenceMLP, ReferenceRMSNorm, eager_attention_forward


class ReferencePatchEmbedding(nn.Module):
    """Patches to vectors, each with its place within its image added."""

    def __init__(self, config: ReferenceVisionConfig) -> None:
        super().__init__()
        self.num_frequencies = config.num_frequencies
        pixels, waves = config.num_channels * config.patch_size**2, 4 * config.num_frequencies
        self.pixels = nn.Linear(pixels, config.hidden_size)
        self.place = nn.Linear(waves, config.hidden_size, bias=False)
        # The place, which is hardest to learn, begins as loud as the pixels, which are many more.
        self.loudness = math.sqrt(pixels / waves)

    def forward(self, pixel_values: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        """Patches [patches of all images, C], and rows and columns of each image, to [patches of all images, F]."""
        places = torch.cat([self.places(rows, columns, pixel_values.device) for rows, columns in sizes])
        return self.pixels(pixel_values) + self.place(places.to(pixel_values.dtype))

    def places(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Sines and cosines of where each patch lies, as a share of the image's height and width: [patches, 4 waves].

        Shares and not row numbers: "top left" means the same in images of all sizes. Computed anew in each pass, since
        a buffer that no checkpoint holds would be left unset by engines.
        """
        middles = [(torch.arange(count, device=device) + 0.5) / count for count in (rows, columns)]
        shares = torch.cartesian_prod(*middles)  # [patches, 2]
        waves = math.pi * torch.arange(1, self.num_frequencies + 1, device=device)
        angles = (shares[:, :, None] * waves).flatten(1)
        return self.loudness * torch.cat((angles.sin(), angles.cos()), dim=-1)


class ReferenceVisionAttention(nn.Module):
    """Every patch of an image sees every other; the attention itself is the configured function's."""

    def __init__(self, config: ReferenceVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """[N, P, F] to [N, P, F]."""
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # [N, H, P, D]
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=False,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1))


class ReferenceVisionLayer(GradientCheckpointingLayer):
    """Attention, then the feed-forward block, each normalised before and added to the residual stream after."""

    def __init__(self, config: ReferenceVisionConfig) -> None:
        super().__init__()
        self.self_attn = ReferenceVisionAttention(config)
        self.mlp = ReferenceMLP(config)
        self.input_layernorm = ReferenceRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = ReferenceRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """[N, P, F] to [N, P, F]."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), attention_mask)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ReferenceMultimodalPreTrainedModel(PreTrainedModel):
    """What transformers and the engines ask of the encoder and of the models around it."""

    config: ReferenceMultimodalConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReferenceDecoderLayer", "ReferenceVisionLayer"]
    _skip_keys_device_placement = [CACHE]
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True


class ReferenceVisionModel(ReferenceMultimodalPreTrainedModel):
    """Patches of images and of frames in, features of the patches out."""

    config: ReferenceVisionConfig
    input_modalities = ("image", "video")

    def __init__(self, config: ReferenceVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = ReferencePatchEmbedding(config)
        self.layers = nn.ModuleList(ReferenceVisionLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = ReferenceRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> list[torch.Tensor]:
        """Patches [patches of all, C] and frames, rows and columns [images, 3] to one [its patches, F] for each image.

        `ValueError` where the grids do not add up to the patches.
        """
        grids = [(frames, rows, columns) for frames, rows, columns in grid_thw.tolist()]
        if (expected := sum(map(math.prod, grids))) != len(pixel_values):
            raise ValueError(f"grids of {expected} patches came with {len(pixel_values)} patches.")
        sizes = [(rows, columns) for frames, rows, columns in grids for _ in range(frames)]
        counts = [rows * columns for rows, columns in sizes]
        # Of the norm: engines pack the weights of matrices, and what is left of those says nothing.
        embedded = self.embeddings(pixel_values.to(self.norm.weight.dtype), sizes)
        # One row for each image or frame, the smaller ones padded behind.
        hidden_states = pad_sequence(embedded.split(counts), batch_first=True)  # [N, P, F]
        lengths = torch.tensor(counts, device=hidden_states.device)
        is_patch = torch.arange(hidden_states.shape[1], device=hidden_states.device) < lengths[:, None]
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=is_patch if min(counts) < max(counts) else None,
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask)
        return list(self.norm(hidden_states)[is_patch].split([math.prod(grid) for grid in grids]))
