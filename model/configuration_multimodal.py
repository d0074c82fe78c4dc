# SPDX-License-Identifier: Apache-2.0
"""Configuration of the reference model that reads images and videos."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .configuration_reference import ReferenceConfig


class ReferenceVisionConfig(PreTrainedConfig):
    """Shape of the vision encoder. All arguments are keywords, and all have defaults.

    Arguments:
        hidden_size: width of the residual stream.
        intermediate_size: width inside the gated feed-forward block.
        num_hidden_layers: number of encoder layers.
        num_attention_heads: number of heads; queries, keys and values have the same number.
        head_dim: width of one head; `hidden_size // num_attention_heads` when None.
        patch_size: height and width, in pixels, of the square patches an image is cut into; one patch, one token.
        num_channels: channels of a pixel.
        num_frequencies: sine waves, along each side of an image, that tell a patch its place.
        rms_norm_eps: added to the mean square before its root is taken.
        attention_dropout: probability with which an attention weight is dropped in training.
        initializer_range: standard deviation of fresh weights.

    Raises:
        ValueError: for a size below 1; the message names the argument, the rule and the value.
    """

    model_type: ClassVar[str] = "my_reference_vision"
    base_config_key: ClassVar[str] = "vision_config"
    # vLLM shards queries, keys, values and the gated block wherever it finds them. Without a plan it would not shard
    # what follows them.
    base_model_tp_plan: ClassVar[dict[str, str]] = dict(ReferenceConfig.base_model_tp_plan)

    hidden_size: int = 96
    intermediate_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    head_dim: int | None = None
    patch_size: int = 8
    num_channels: int = 3
    num_frequencies: int = 4
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        for name in ("head_dim", "patch_size", "num_channels", "num_frequencies"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


class ReferenceMultimodalConfig(PreTrainedConfig):
    """A text model, a vision encoder, and the tokens that stand for images and videos in a text.

    Arguments:
        text_config: configuration of the text model, or a dict of its arguments.
        vision_config: configuration of the vision encoder, or a dict of its arguments.
        image_token_id: the token that is replaced by one patch of an image.
        video_token_id: the token that is replaced by one patch of a video's frame.
        image_start_token_id: the token in front of an image.
        image_end_token_id: the token behind an image.
        tie_word_embeddings: whether the output projection is the embedding matrix.
        is_mm_prefix_lm: whether the tokens of an image, and those of a frame, see each other in both directions. The
            name is vLLM's, which reads it too. False makes the model causal throughout, for engines that are.

    Raises:
        ValueError: where two of the tokens are the same, or a token lies outside of the vocabulary.
    """

    model_type: ClassVar[str] = "my_reference_multimodal"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": ReferenceConfig, "vision_config": ReferenceVisionConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_id: int = 3
    video_token_id: int = 4
    image_start_token_id: int = 5
    image_end_token_id: int = 6
    tie_word_embeddings: bool = True
    is_mm_prefix_lm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, PreTrainedConfig):
                setattr(self, name, config_class(**(value or {})))
        # One switch for both: engines read the one or the other.
        self.text_config.tie_word_embeddings = self.tie_word_embeddings
        super().__post_init__(**kwargs)
        names = ["image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id"]
        tokens = {name: getattr(self, name) for name in names}
        if len(set(tokens.values())) < len(tokens):
            raise ValueError(f"the tokens of images and videos must differ, got {tokens}.")
        if outside := {name: token for name, token in tokens.items() if not 0 <= token < self.text_config.vocab_size}:
            raise ValueError(f"tokens must be below the vocab_size of {self.text_config.vocab_size}, got {outside}.")


ReferenceVisionConfig.register_for_auto_class()
ReferenceMultimodalConfig.register_for_auto_class()
