# SPDX-License-Identifier: Apache-2.0
"""The reference model with eyes: the encoder of `modeling_vision`, a projector, and the text model.

A patch of an image is one token. Its features take the place of the embedding of an image token, and in the text model
the tokens of an image see each other in both directions; so do those of one frame of a video. Everything else is
causal.

Letters in shapes: C and F as in `modeling_vision`; B, T, E as in `modeling_reference`.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_multimodal import ReferenceMultimodalConfig
from .modeling_reference import CACHE, ReferenceModel
from .modeling_vision import ReferenceMultimodalPreTrainedModel, ReferenceVisionModel


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
        past_key_values = kwargs.pop(CACHE, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        for values, grids, names in (
            (pixel_values, image_grid_thw, ("pixel_values", "image_grid_thw")),
            (pixel_values_videos, video_grid_thw, ("pixel_values_videos", "video_grid_thw")),
        ):
            if values is not None and grids is None:
                raise ValueError(f"{names[0]} need {names[1]}, got None; the processor returns both.")
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
        past_key_values = kwargs.pop(CACHE, past_key_values)
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
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def prepare_inputs_for_generation(self, *args, is_first_iteration: bool = False, **kwargs) -> dict[str, Any]:
        """Images and videos go into the first step, and with a cache only into that."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Each text as often as there are beams or answers, with its images and videos, which are no rows."""
        media = {}
        if input_ids is not None and expand_size > 1:
            names = (("pixel_values", "image_grid_thw", "image"), ("pixel_values_videos", "video_grid_thw", "video"))
            for values, grids, kind in names:
                if kwargs.get(values) is None or kwargs.get(grids) is None:
                    continue
                # After how many patches, and so after how many images, each text ends.
                patches = (input_ids == getattr(self.config, f"{kind}_token_id")).sum(1).cumsum(0)
                images = torch.searchsorted(
                    kwargs[grids].prod(1).cumsum(0), patches.to(kwargs[grids].device), right=True
                )
                for name, ends in ((values, patches), (grids, images)):
                    parts = torch.tensor_split(kwargs.pop(name), ends[:-1].tolist())
                    media[name] = torch.cat([part for part in parts for _ in range(expand_size)])
        input_ids, expanded = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, {**expanded, **media}

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
