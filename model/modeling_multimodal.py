# SPDX-License-Identifier: Apache-2.0
"""The reference model with eyes: a vision encoder, a projector, and the text model of `modeling_reference`.

A patch of an image is one token. Its features take the place of the embedding of an image token, and in the text model
the tokens of an image see each other in both directions; so do those of one frame of a video. Everything else is
causal.

Letters in shapes: N images or frames, P patches of the largest of them, C channels of a pixel times its patch's pixels,
F hidden size of the encoder, H heads, D head dim; B, T, E as in `modeling_reference`.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .configuration_multimodal import ReferenceMultimodalConfig, ReferenceVisionConfig
from .modeling_reference import ReferenceMLP, ReferenceModel, ReferenceRMSNorm, eager_attention_forward


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
    """What transformers and the engines ask of the models below."""

    config: ReferenceMultimodalConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReferenceDecoderLayer", "ReferenceVisionLayer"]
    _skip_keys_device_placement = ["past_key_values"]
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


class ReferenceProjector(nn.Module):
    """Features of patches to embeddings of tokens."""

    def __init__(self, config: ReferenceMultimodalConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.down_proj = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[patches, F] to [patches, E]."""
        return self.down_proj(nn.functional.gelu(self.up_proj(features)))


def runs_of(is_feature: torch.Tensor) -> torch.Tensor:
    """Number the runs of True in a bool [B, T]: 0, 1, ... in each row, -1 where it is False."""
    begins = is_feature.clone()
    begins[:, 1:] &= ~is_feature[:, :-1]
    return torch.where(is_feature, begins.cumsum(1) - 1, -1)


class ReferenceMultimodalModel(ReferenceMultimodalPreTrainedModel):
    """Token ids, images and videos in, last hidden states out."""

    def __init__(self, config: ReferenceMultimodalConfig) -> None:
        super().__init__(config)
        self.vision_tower = ReferenceVisionModel(config.vision_config)
        self.multi_modal_projector = ReferenceProjector(config)
        self.language_model = ReferenceModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text model's."""
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """What takes the place of the image tokens.

        pixel_values [patches of all images, C] and image_grid_thw [images, 3] are what the processor returns.
        `last_hidden_state` is [patches of all images, F], `pooler_output` one [its patches, E] for each image.
        """
        features = self.vision_tower(pixel_values, image_grid_thw)
        together = torch.cat(features)
        projected = self.multi_modal_projector(together).split([len(one) for one in features])
        return BaseModelOutputWithPooling(last_hidden_state=together, pooler_output=list(projected))

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """As `get_image_features`; the patches of a video are those of its frames, one behind the other."""
        return self.get_image_features(pixel_values_videos, video_grid_thw, **kwargs)

    def get_placeholder_mask(
        self, token_id: int, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Where a token stands, bool [B, T]; without ids, where its embedding does."""
        if input_ids is not None:
            return input_ids == token_id
        token = torch.tensor(token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def merge(self, inputs_embeds: torch.Tensor, places: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        """Features, in order, at the places [B, T] of embeddings [B, T, E]; `ValueError` unless they are as many."""
        together = torch.cat(features).to(inputs_embeds.dtype)
        if (tokens := int(places.sum())) != len(together):
            raise ValueError(
                f"the text holds {tokens} tokens for patches, but the images or videos have {len(together)} patches; "
                "let the processor prepare both together."
            )
        return inputs_embeds.masked_scatter(places[..., None].expand_as(inputs_embeds), together)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Arguments as in `ReferenceModel.forward`, and what the processor returns for images and videos.

        An image must not be cut: all its tokens belong to one call. With inputs_embeds in place of input_ids, tokens of
        images are found by their embedding. mm_token_type_ids are taken, so that all that a processor returns can be
        handed in, and not read: they say less than the token ids. A mask that was prepared for each layer type is used
        as it is.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        blocks = None
        # While decoding, and in engines, whose features are in inputs_embeds already, nothing is to be found.
        if pixel_values is not None or pixel_values_videos is not None:
            image_places = self.get_placeholder_mask(self.config.image_token_id, input_ids, inputs_embeds)
            video_places = self.get_placeholder_mask(self.config.video_token_id, input_ids, inputs_embeds)
            if self.config.is_mm_prefix_lm:
                blocks = runs_of(image_places | video_places)
            if pixel_values is not None:
                features = self.get_image_features(pixel_values, image_grid_thw, return_dict=True).pooler_output
                inputs_embeds = self.merge(inputs_embeds, image_places, features)
            if pixel_values_videos is not None:
                features = self.get_video_features(pixel_values_videos, video_grid_thw, return_dict=True).pooler_output
                inputs_embeds = self.merge(inputs_embeds, video_places, features)
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            block_sequence_ids=blocks,
            return_dict=True,
            **{name: value for name, value in kwargs.items() if name != "return_dict"},
        )


class ReferenceForConditionalGeneration(ReferenceMultimodalPreTrainedModel, GenerationMixin):
    """Token ids, images and videos in, a score for each possible next token out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: ReferenceMultimodalConfig) -> None:
        super().__init__(config)
        self.model = ReferenceMultimodalModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text model's."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text model's."""
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs) -> Any:
        """See `ReferenceMultimodalModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, **kwargs) -> Any:
        """See `ReferenceMultimodalModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Arguments as in `ReferenceMultimodalModel.forward`, labels and logits as in `ReferenceForCausalLM`."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(self, *args, is_first_iteration: bool = False, **kwargs) -> dict[str, Any]:
        """Images and videos go into the first step, and with a cache only into that."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
                inputs.pop(name, None)
        return inputs

    @staticmethod
    def create_masks_for_generate(
        config: ReferenceMultimodalConfig, attention_mask: Any, is_first_iteration: bool | None = False, **kwargs
    ) -> Any:
        """Masks prepared for a step with a static cache, but for the first: only `forward` sees where images lie."""
        if is_first_iteration:
            return attention_mask
        return create_masks_for_generate(config=config.text_config, attention_mask=attention_mask, **kwargs)


ReferenceMultimodalModel.register_for_auto_class("AutoModel")
ReferenceForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
