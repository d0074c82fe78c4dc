# SPDX-License-Identifier: Apache-2.0
"""Configuration of the reference language model."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"


class ReferenceConfig(PreTrainedConfig):
    """Shape and behaviour of a reference language model. All arguments are keywords, and all have defaults.

    Arguments:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the gated feed-forward block.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads; each serves an equal group of query heads.
        head_dim: width of one head, an even number; `hidden_size // num_attention_heads` when None.
        layer_types: "full_attention" or "sliding_attention" for each layer. When None, every layer is full, or, where
            `sliding_window` is set, sliding and full layers take turns, beginning with a sliding one.
        sliding_window: number of keys, its own among them, that a query of a sliding layer sees.
        max_position_embeddings: longest sequence the model is meant for.
        rope_parameters: `{"rope_type": "default", "rope_theta": base}`; base 10,000 when None.
        rms_norm_eps: added to the mean square before its root is taken.
        attention_dropout: probability with which an attention weight is dropped in training.
        initializer_range: standard deviation of fresh weights.
        tie_word_embeddings: whether the output projection is the embedding matrix.
        use_cache: whether a forward pass returns a key-value cache unless told otherwise.

    Raises:
        ValueError: where the numbers contradict each other; the message names the argument, the rule and the value.
    """

    model_type: ClassVar[str] = "my_reference"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    # Paths are relative to the base model. Plain "colwise" and "rowwise" are the two styles that transformers, vLLM and
    # SGLang all understand; whatever is not named here is replicated.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    # The stages in order, each with the names of what goes in and what comes out. "layers" is the one ModuleList, and
    # so the one place where an engine may cut the model.
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "num_attention_heads", "num_key_value_heads"):
            if (number := getattr(self, name)) is None or number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            pattern = [FULL_ATTENTION] if self.sliding_window is None else [SLIDING_ATTENTION, FULL_ATTENTION]
            self.layer_types = [pattern[layer % len(pattern)] for layer in range(self.num_hidden_layers)]
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        """Raise `ValueError` for the first rule that the configuration breaks."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be one of the {self.vocab_size} token ids of vocab_size, or None, got "
                f"{self.pad_token_id}."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even, since rotary embeddings turn pairs, got {self.head_dim}.")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must name each of the {self.num_hidden_layers} layers, got {len(self.layer_types)} names."
            )
        if unknown := sorted(set(self.layer_types) - {FULL_ATTENTION, SLIDING_ATTENTION}):
            raise ValueError(f'layer_types may hold "{FULL_ATTENTION}" and "{SLIDING_ATTENTION}", got {unknown}.')
        if SLIDING_ATTENTION in self.layer_types and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(f"sliding layers need a sliding_window of at least 1, got {self.sliding_window}.")
        if self.rope_parameters["rope_type"] != "default":
            raise ValueError(f'rope_type must be "default", got "{self.rope_parameters["rope_type"]}".')


# With this, saving a model or a configuration also saves this file and names it in config.json.
ReferenceConfig.register_for_auto_class()
