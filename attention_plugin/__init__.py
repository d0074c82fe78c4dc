# SPDX-License-Identifier: Apache-2.0
"""One attention for every model: importing this package registers `my_triton` with Hugging Face transformers.

import attention_plugin
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="my_triton")
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AttentionInterface, AttentionMaskInterface

from attention_kernels.checks import check_numbers

from . import support
from .attention import attention_forward
from .carried_mask import SpanMask
from .engines.continuous_batching import disable as disable_continuous_batching
from .engines.continuous_batching import enable as enable_continuous_batching
from .masks import span_mask

__all__ = [
    "NAME",
    "SpanMask",
    "attention_forward",
    "disable_continuous_batching",
    "enable_continuous_batching",
    "register",
    "span_mask",
]

NAME = "my_triton"
"""The name to pass as `attn_implementation`."""


def register(name: str = NAME, *, scale: float | None = None, softcap: float | None = None) -> None:
    """Register this attention with transformers, both the attention function and the mask function.

    Importing the package has already registered `NAME`. Registering again under the same name replaces its options;
    doing so twice, or in many processes, is harmless.

    Args:
        name: what to pass as `attn_implementation`.
        scale: factor of the scores, in place of the one a model passes.
        softcap: softcap of the scores, in place of the one a model passes.

    Raises:
        ValueError: a name that transformers gives a meaning of its own, or an option out of range.
        TypeError: an option that is no number.
    """
    own = _names_of_transformers()
    if not isinstance(name, str) or not name or "flash" in name or "|" in name or "/" in name or name in own:
        raise ValueError(
            "attention_plugin.register: `name` must be text, neither empty nor with 'flash', '|' or '/' in it, nor one "
            f"of transformers' own {own}, to which transformers gives another meaning; got {name!r}, try "
            f"{NAME + '_variant'!r}"
        )
    check_numbers("attention_plugin.register", scale, softcap, None)
    overrides = {key: value for key, value in (("scaling", scale), ("softcap", softcap)) if value is not None}
    forward = partial(_with_overrides, overrides) if overrides else attention_forward
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, span_mask)
    support.registered_names.add(name)


def _with_overrides(overrides: dict[str, float], *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """`attention_forward` with a variant's own scale or softcap in place of the model's."""
    return attention_forward(*args, **{**kwargs, **overrides})


def _names_of_transformers() -> list[str]:
    """Names that belong to implementations of transformers itself, and not to someone who registered them."""
    own = (name for name, function in AttentionInterface().items() if _is_from_transformers(function))
    return sorted({*own, "eager"})


def _is_from_transformers(function: Callable) -> bool:
    return str(getattr(function, "__module__", "")).startswith("transformers.")


register()
register_module_module_registration_hook(support.check_new_module)
