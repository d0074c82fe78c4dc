# SPDX-License-Identifier: Apache-2.0
"""What is served and what is refused: which arguments, which models, and the words of every refusal."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from functools import lru_cache
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

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
    "indices": "sparse attention over selected keys is not served",
    "block_indices": "sparse attention over selected blocks is not served",
    "sinks": "sinks that differ between tokens are not served; sinks per head are, as `s_aux`",
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


def check_keywords(keywords: dict[str, Any]) -> None:
    """Refuse keywords that would change the result and are not served. None and False mean absent.

    Raises:
        ValueError: names the keyword, the reason and the alternative.
    """
    for name, value in keywords.items():
        if value is None or value is False or name in IGNORED_KEYWORDS:
            continue
        reason = REFUSED_KEYWORDS.get(name, "it is not known, so it might change the result")
        raise ValueError(f"my_triton attention: `{name}`={_brief(value)} is refused: {reason}; {EAGER}")


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


def refuse_absent_weights() -> NoReturn:
    """Refuse to pretend that there are attention weights.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "my_triton attention: `output_attentions` did not reach the attention function, because the model's own code "
        "keeps it back, so there are no attention weights here; set `output_attentions=True` in the configuration "
        f"of this part of the model when it is created, or {EAGER}"
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


# ---------------------------------------------------------------------- models


def refuse_model(config: Any) -> None:
    """Refuse a model whose own code computes attention, as soon as its first mask is asked for.

    Models are refused earlier, while they are built, by `check_new_module`; this catches one that was built before its
    implementation was set.

    Raises:
        ValueError: the model's code does not use transformers' attention interface.
    """
    _refuse_model_of(type(config).__module__, getattr(config, "model_type", None))


@torch.compiler.assume_constant_result  # strings in: a compiler runs it as it traces, and not in what it compiles
def _refuse_model_of(config_module_name: str, model_type: str | None) -> None:
    module_name = config_module_name.replace("configuration_", "modeling_")
    module = sys.modules.get(module_name)
    if module is not None and module_name != config_module_name and not _uses_interface(module_name):
        raise ValueError(_model_refusal(model_type or module_name, module_name))


def check_new_module(module: torch.nn.Module, name: str, submodule: torch.nn.Module | None) -> None:
    """Refuse a model that computes attention itself, while it is being built.

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
    module_name = type(module).__module__
    if not _uses_interface(module_name):
        raise ValueError(_model_refusal(type(module).__name__, module_name))


@lru_cache
def _uses_interface(module_name: str) -> bool:
    """Whether a modeling file leaves attention to transformers' interface: transformers itself looks for the same sign.

    A file that defines attention layers must call the interface, and must not choose their class from a table of its
    own by the name of the implementation. A file without attention layers is made of other models, which are looked at
    in their turn. A file that cannot be read is given the benefit of the doubt: its masks still refuse to be computed
    with.
    """
    try:
        code = inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):
        return True
    if re.search(r"\w+_ATTENTION_CLASSES\s*\[|\w+_ATTENTION_CLASSES\s*=", code):
        return False
    defines_attention = re.search(r"^class \w*Attention\w*\((?:nn\.|torch\.nn\.)?Module", code, re.MULTILINE)
    return defines_attention is None or "ALL_ATTENTION_FUNCTIONS.get_interface(" in code


def _model_refusal(model: str, module_name: str) -> str:
    return (
        f"my_triton attention: {model} computes attention in its own code ({module_name.rsplit('.', 1)[-1]}.py does "
        f"not leave it to transformers' AttentionInterface), so attn_implementation cannot reach it; {EAGER}. For one "
        "part of a larger model pass a dict, such as "
        'attn_implementation={"text_config": "my_triton", "vision_config": "eager"}'
    )


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
