# SPDX-License-Identifier: Apache-2.0
"""A decoder-only language model that runs on any attention back end.

The model computes everything but attention itself: each layer asks transformers for the attention function that the
configuration names and hands it query, key, value, a mask and every keyword argument that the caller gave the model.
That is what lets one model serve in transformers, vLLM and SGLang.

Letters in shapes: B batch, T tokens of this call, S keys (cached ones and this call's), E hidden size, H query heads,
K key-value heads, D head dim, V vocabulary. Under tensor parallelism H and K are the heads of one rank, which is why
no code below reads a head count from the configuration to shape a tensor.
"""

import inspect

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_reference import FULL_ATTENTION, SLIDING_ATTENTION, ReferenceConfig

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What transformers calls the cache of keys and values: `past_key_values` before 5.24. Models here take both names.

Before 5.24 `cache` is something else, continuous batching's, which attention functions write to.
"""

MASK_BUILDERS = {FULL_ATTENTION: create_causal_mask, SLIDING_ATTENTION: create_sliding_window_causal_mask}


class ReferenceRMSNorm(nn.Module):
    """Divides each token by its root mean square, in float32, then scales every channel by a learned weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., E] to [..., E], same dtype."""
        wide = hidden_states.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)


class ReferenceRotaryEmbedding(nn.Module):
    """The angles by which queries and keys are turned at each position.

    The frequencies are computed in every forward pass and not kept in a buffer: engines build models without storage
    and load only what the checkpoint holds, so a buffer that no checkpoint holds would be left unset.
    """

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.theta = config.rope_parameters["rope_theta"]

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [B or 1, T], integers, to cosine and sine, [B or 1, 1, T, D] each, in `dtype`."""
        pairs = torch.arange(0, self.head_dim, 2, device=position_ids.device, dtype=torch.float32)
        # Angles stay in float32: a position beyond 256 is no longer exact in bfloat16.
        angles = position_ids[:, None, :, None].float() * self.theta ** (-pairs / self.head_dim)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn channel i of [B, heads, T, D] together with channel i + D/2, by the angle of its position."""
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat((-second, first), dim=-1) * sine


def repeat_kv(states: torch.Tensor, repeats: int) -> torch.Tensor:
    """Give each query head its own copy of its key-value head: [B, K, S, D] to [B, K * repeats, S, D]."""
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in four plain steps, the implementation called "eager".

    query [B, H, T, D], key and value [B, K, S, D], attention_mask a float [B, 1, T, S] that is added to the scores.
    Returns the output [B, T, H, D] and the weights [B, H, T, S], both in the dtype of query.
    """
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ReferenceAttention(nn.Module):
    """Grouped-query attention with rotary positions; the attention itself is the configured function's."""

    def __init__(self, config: ReferenceConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == SLIDING_ATTENTION else None

        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, E] to [B, T, E], and the attention weights where the attention function returns them."""
        cache = kwargs.pop(CACHE, None)
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # [B, H, T, D]
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)  # [B, K, T, D]
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)  # [B, K, T, D]

        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if cache is not None:
            # Continuous batching's cache writes to `kwargs` what attention has to know; others do not look at them.
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)  # [B, K, S, D]

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1)), weights


class ReferenceMLP(nn.Module):
    """The gated feed-forward block: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., E] to [..., E]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class ReferenceDecoderLayer(GradientCheckpointingLayer):
    """Attention, then the feed-forward block, each normalised before and added to the residual stream after."""

    def __init__(self, config: ReferenceConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = ReferenceAttention(config, layer_idx)
        self.mlp = ReferenceMLP(config)
        self.input_layernorm = ReferenceRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = ReferenceRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """[B, T, E] to [B, T, E]; every keyword argument goes to the attention."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ReferencePreTrainedModel(PreTrainedModel):
    """What transformers and the engines ask of both models below."""

    config: ReferenceConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReferenceDecoderLayer"]
    _skip_keys_device_placement = [CACHE]
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ReferenceDecoderLayer, "attentions": ReferenceAttention}


class ReferenceModel(ReferencePreTrainedModel):
    """Token ids in, last hidden states out."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(ReferenceDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = ReferenceRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = ReferenceRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()
        # transformers adds a sharded embedding to every plan. A tied output projection would be sharded with it, which
        # takes a style that not every engine knows, so the embedding stays whole on each rank.
        self._tp_plan.pop("embed_tokens", None)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        block_sequence_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run every layer.

        input_ids [B, T] or inputs_embeds [B, T, E], exactly one of them, else `ValueError`. past_key_values may be
        given as `CACHE` as well, and is returned by that name. attention_mask is None, or [B, S] with 1 for a token and
        0 for padding, or a prepared mask per layer type. position_ids [B or 1, T] continue the cache when None; where
        they start anew within a row, and attention_mask is None, the row holds several packed documents that do not see
        each other. block_sequence_ids [B, T] number the blocks of tokens that also see each other backwards, such as
        those of an image, -1 elsewhere. `last_hidden_state` is [B, T, E].
        """
        past_key_values = kwargs.pop(CACHE, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if block_sequence_ids is not None and past_key_values is not None:
            seen_tokens = int(past_key_values.get_seq_length())
            block_sequence_ids = nn.functional.pad(block_sequence_ids, (seen_tokens, 0), value=-1)
        if position_ids is None:
            seen_tokens = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + seen_tokens

        # Before a cache is made: beside one, transformers takes position_ids that start anew for a continuation.
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = {
                layer_type: MASK_BUILDERS[layer_type](
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    block_sequence_ids=block_sequence_ids,
                    **{CACHE: past_key_values},
                )
                for layer_type in set(self.config.layer_types)
            }
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(position_ids, hidden_states.dtype)
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                **{CACHE: past_key_values},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values})


class ReferenceForCausalLM(ReferencePreTrainedModel, GenerationMixin):
    """Token ids in, a score for each possible next token out."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__(config)
        self.model = ReferenceModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Arguments as in `ReferenceModel.forward`; further keyword arguments reach the attention function.

        labels [B, T] are the input ids themselves, -100 where a token does not count; the loss shifts them.
        logits_to_keep is how many positions from the end get logits (0: all of them), or the indices of those that do.
        `logits` is [B, T or positions kept, V].
        """
        past_key_values = kwargs.pop(CACHE, past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


# With this, saving a model also saves this file and names it in config.json.
ReferenceModel.register_for_auto_class("AutoModel")
ReferenceForCausalLM.register_for_auto_class("AutoModelForCausalLM")
