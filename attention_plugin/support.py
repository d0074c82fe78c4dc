# SPDX-License-Identifier: Apache-2.0
"""What is served and what is refused: which arguments, which models, and the words of every refusal."""

from __future__ import annotations

import logging
import sys
from functools import lru_cache
from typing import Any, NoReturn

import torch
from transformers import Cache, PreTrainedModel

from attention_kernels.checks import is_one_or

from . import kept_lengths, sources

logger = logging.getLogger("attention_plugin")

registered_names: set[str] = set()
"""Names under which this package's attention is registered with transformers."""

IGNORED_KEYWORDS = frozenset(
    {
        "cache_position",
        "deterministic",  # the forward pass always is
        "encoder_hidden_states",
        "labels",
        "logits_to_keep",
        "max_length_k",  # launch hints of variable-length kernels: the lengths themselves are in cu_seq_lens
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "return_dict",
        "seq_idx",  # for state-space layers beside attention
        "token_type_ids",
        "use_cache",
    }
)
"""Keywords that reach attention functions on their way through `**kwargs` and do not change attention."""

REFUSED_KEYWORDS = {
    "head_mask": "masks of heads are not served",
    "layer_head_mask": "masks of heads are not served",
    "cache": "continuous batching is served once attention_plugin.enable_continuous_batching(model) was called",
}
"""Keywords that would change the result, with the reason why they are not served."""

EAGER = 'load the model with attn_implementation="eager" for this'


@lru_cache
@torch.compiler.assume_constant_result  # a compiler says it as it traces, and not in what it compiles
def log_once(message: str) -> None:
    """Say what runs on another path, once per process: nothing falls back in silence."""
    logger.warning(message)


def check_keywords(keywords: dict[str, Any], module: torch.nn.Module) -> None:
    """Refuse keywords that would change the result and are not served. None and False mean absent.

    A keyword that eager attention of the layer's own file is seen not to read is ignored here too, and logged once: it
    only passes through the model's `**kwargs`.

    Raises:
        ValueError: names the keyword, the reason and the alternative.
    """
    for name, value in keywords.items():
        if value is None or value is False or name in IGNORED_KEYWORDS:
            continue
        if name == "cache" and isinstance(value, Cache):  # what was `past_key_values` before transformers 5.24
            continue
        if name not in REFUSED_KEYWORDS and _ignored_by_eager(type(module).__module__, name):
            continue
        reason = REFUSED_KEYWORDS.get(name, "it is not known, so it might change the result")
        raise ValueError(f"my_triton attention: `{name}`={_brief(value)} is refused: {reason}; {EAGER}")


@torch.compiler.assume_constant_result  # strings in: a compiler runs it as it traces, and not in what it compiles
def _ignored_by_eager(module_name: str, keyword: str) -> bool:
    ignored = sources.eager_ignores(module_name, keyword)
    if ignored:
        log_once(
            f"`{keyword}` reaches attention in {_file(module_name)}, whose eager attention ignores it: so does this"
        )
    return ignored


def note_kept_lengths(module: torch.nn.Module) -> None:
    """Log that lengths of documents would not reach a layer, in a model that was switched over to this attention."""
    if not kept_lengths.hands_on(module):
        _note_kept_lengths(type(module).__module__)


@torch.compiler.assume_constant_result  # strings in: a compiler runs it as it traces, and not in what it compiles
def _note_kept_lengths(module_name: str) -> None:
    if sources.layers_keeping_keywords(module_name):
        log_once(
            f"the layers of {_file(module_name)} keep `cu_seq_lens_q` and `cu_seq_lens_k` from their attention, and "
            "this model was built with another implementation: documents packed by lengths would see each other; load "
            "it with this attn_implementation, or pass `position_ids` that start anew and use_cache=False"
        )


def check_dropout(dropout: float, training: bool) -> None:
    """Refuse dropout of attention weights outside of training.

    Raises:
        ValueError: dropout is not 0 and the layer is in eval mode.
    """
    if dropout and not training:
        raise ValueError(
            f"my_triton attention: `dropout`={dropout} with a module in eval mode would change the result at random; "
            "pass 0.0 unless `module.training`"
        )


def check_position_bias(bias: Any, scores: tuple[int, ...]) -> None:
    """Refuse a position bias that is none, by the name that models give it, and before a mask is added to it.

    Raises:
        ValueError: it is no floating point tensor, or does not broadcast to the scores.
    """
    fits = isinstance(bias, torch.Tensor) and bias.is_floating_point() and bias.ndim <= 4
    if not fits or not all(map(is_one_or, reversed(bias.shape), reversed(scores))):
        raise ValueError(
            "my_triton attention: `position_bias` must be a floating point tensor that broadcasts to [batch, "
            f"num_heads, query_len, key_len] = {list(scores)}, got {_brief(bias)}; slice or expand it"
        )


def check_head_sinks(sinks: Any) -> None:
    """Refuse sinks that are not one for each head, by the name that models give them.

    Raises:
        ValueError: they are no tensor of one dimension.
    """
    if not isinstance(sinks, torch.Tensor) or sinks.ndim != 1:
        raise ValueError(
            f"my_triton attention: `s_aux` must be [num_heads], one sink for each head, got {_brief(sinks)}; sinks "
            "that differ between tokens are `sinks`, [batch, num_heads, query_len, 1]"
        )


def check_scaling(scaling: torch.Tensor) -> None:
    """Refuse a learned factor of the scores that is more than one number.

    Raises:
        ValueError: it is.
    """
    if scaling.numel() != 1:
        raise ValueError(
            f"my_triton attention: `scaling` must be one number, got {_brief(scaling)}; multiply the queries by "
            "factors of heads or columns in the model"
        )


def refuse_padding_mask(mask: torch.Tensor, batch_size: int) -> NoReturn:
    """Refuse a mask that is none of padding.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"my_triton attention: `attention_mask` must be [batch, tokens] with a batch of {batch_size} or 1, 0 at "
        f"padding, got {list(mask.shape)}; a mask of each query is a bool or additive tensor [batch, num_heads or 1, "
        "query_len, key_len]"
    )


class NoWeightsError(ValueError, AttributeError):
    """There are no attention weights. Who asks by `hasattr` whether they are a tensor is told that they are not."""


def refuse_absent_weights() -> NoReturn:
    """Refuse to pretend that there are attention weights.

    Raises:
        NoWeightsError: always.
    """
    raise NoWeightsError(
        "my_triton attention: `output_attentions` did not reach the attention function, because the model's own code "
        "keeps it back, so there are no attention weights here; set `output_attentions=True` in the configuration "
        f"of this part of the model when it is created, or {EAGER}"
    )


def refuse_two_sinks() -> NoReturn:
    """Refuse sinks of both kinds in one call.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "my_triton attention: `s_aux` (a sink for each head) and `sinks` (one for each head and token) exclude each "
        "other; add up their exponentials in `sinks`: torch.logaddexp(sinks, s_aux[:, None, None])"
    )


def refuse_alignment(query_len: int, key_len: int) -> NoReturn:
    """Refuse to guess where queries stand among more (or fewer) keys when there is no mask that says so.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"my_triton attention: `attention_mask`=None with causal attention of {query_len} queries over {key_len} keys "
        "is ambiguous (implementations differ on where the queries stand); pass a mask from "
        "transformers.masking_utils, or is_causal=False for attention to all keys"
    )


def refuse_mask(mask: Any, scores: tuple[int, ...]) -> NoReturn:
    """Refuse a mask that is neither ours, nor boolean, nor additive, or does not fit the scores.

    Raises:
        ValueError: always.
    """
    dtype = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
    what = f"{dtype} {list(getattr(mask, 'shape', ()))}"
    raise ValueError(
        "my_triton attention: `attention_mask` must be what the registered mask function built, or a bool or floating "
        f"point tensor that broadcasts to [batch, num_heads, query_len, key_len] = {list(scores)}, got {what}; build "
        "it with transformers.masking_utils"
    )


def refuse_foreign_use(operation: str, error: type[Exception] = TypeError) -> NoReturn:
    """Refuse that something other than our attention function computes with the mask.

    Raises:
        `error`: always.
    """
    raise error(
        f"my_triton attention: a model applied {operation} to its attention mask, so it computes attention (or changes "
        f"the mask) itself and cannot use this implementation; {EAGER}"
    )


def refuse_writing(operation: str) -> NoReturn:
    """Refuse that a model writes to its mask where what it writes would be lost.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"my_triton attention: a model applied {operation} to its attention mask under torch.compile, which is "
        "refused, as attention would not see what is written; make a new mask, as `mask.masked_fill` does"
    )


# ---------------------------------------------------------------------- models


def refuse_model(config: Any) -> None:
    """Refuse a model whose own code computes attention, as soon as its first mask is asked for.

    Models are refused earlier, while they are built, by `check_new_module`; this catches one that was built before its
    implementation was set.

    Raises:
        ValueError: the model's code does not use transformers' attention interface.
    """
    config_class = type(config)
    _refuse_model_of(config_class.__module__, config_class.__name__, getattr(config, "model_type", None))


@torch.compiler.assume_constant_result  # strings in: a compiler runs it as it traces, and not in what it compiles
def _refuse_model_of(config_module_name: str, config_class_name: str, model_type: str | None) -> None:
    module_name = _modeling_module(config_module_name)
    if module_name is None:
        return
    own = (getattr(sys.modules[module_name], name) for name in sources.models_from_tables(module_name))
    from_table = any(getattr(each.config_class, "__name__", None) == config_class_name for each in own)
    if from_table or not sources.leaves_attention(module_name):
        raise ValueError(_model_refusal(model_type or module_name, module_name))


def _modeling_module(config_module_name: str) -> str | None:
    """The module of the model that a configuration's module belongs to, if it has been imported."""
    module_name = config_module_name.replace("configuration_", "modeling_")
    return module_name if module_name != config_module_name and module_name in sys.modules else None


def may_compute_with_masks(config: Any) -> bool:
    """Whether a model that computes with its mask may have a dense one: where it is seen to leave attention to us."""
    return _modeling_file_says(type(config).__module__, "calls_interface")


def needs_tensor(config: Any) -> bool:
    """Whether a model would pass over a mask that is no tensor, where it adds columns for keys of its own."""
    return _modeling_file_says(type(config).__module__, "widens_masks")


def measures_masks(config: Any) -> bool:
    """Whether a model refuses masks of other sizes than it expects, which it does not build for all of its layers."""
    return _modeling_file_says(type(config).__module__, "measures_masks")


def negates_masks(config: Any) -> bool:
    """Whether a model takes its mask for boolean, so that an additive one would mean its opposite."""
    return _modeling_file_says(type(config).__module__, "negates_masks")


@torch.compiler.assume_constant_result  # strings in: a compiler runs it as it traces, and not in what it compiles
def _modeling_file_says(config_module_name: str, question: str) -> bool:
    """The answer of a function of `sources` for the modeling file beside a configuration; False without one."""
    module_name = _modeling_module(config_module_name)
    return module_name is not None and bool(getattr(sources, question)(module_name))


@torch.compiler.assume_constant_result
def is_causal_without_mask(module_name: str) -> bool:
    """Whether the `is_causal` of a file's layers counts where there is no mask; see `sources.is_causal_counts`."""
    return sources.is_causal_counts(module_name)


def check_new_module(module: torch.nn.Module, name: str, submodule: torch.nn.Module | None) -> None:
    """Refuse a model that computes attention itself, while it is being built; mend one that keeps lengths back.

    Runs for every submodule that any module receives, as torch's module registration hook: the one documented point
    through which each model passes before its layers exist, some of which would fail there with a bare KeyError.

    Raises:
        ValueError: the model is set to one of our names and its code does not use transformers' attention interface.
    """
    if not isinstance(module, PreTrainedModel):
        return
    config = module.__dict__.get("config")
    if getattr(config, "_attn_implementation", None) not in registered_names:
        return
    own = type(module)
    if own.__name__ in sources.models_from_tables(own.__module__) or not sources.leaves_attention(own.__module__):
        raise ValueError(_model_refusal(own.__name__, own.__module__))
    if submodule is not None:
        kept_lengths.hand_on(submodule)


def _model_refusal(model: str, module_name: str) -> str:
    return (
        f"my_triton attention: {model} computes attention in its own code ({_file(module_name)} does "
        f"not leave it to transformers' AttentionInterface), so attn_implementation cannot reach it; {EAGER}. For one "
        "part of a larger model pass a dict, such as "
        'attn_implementation={"text_config": "my_triton", "vision_config": "eager"}'
    )


def _file(module_name: str) -> str:
    return module_name.rsplit(".", 1)[-1] + ".py"


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
