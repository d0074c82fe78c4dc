# SPDX-License-Identifier: Apache-2.0
"""What transformers decides by the word "flash" in an implementation's name, each tried before it is relied on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import transformers
from packaging.version import Version

from .batched_attention import PREPARED_KEYWORDS, UNUSED_KEYWORDS

MINIMUM_VERSION = "5.23"
"""Earlier ones hand their cache over in another way, or lose the boundaries of images under such a name (Pixtral)."""


def check_transformers(name: str) -> None:
    """Try each gate with the name, since code that decides by something else would be wrong in silence.

    Raises:
        RuntimeError: a gate has moved.
    """
    if Version(transformers.__version__) < Version(MINIMUM_VERSION):
        refuse_transformers(f"it needs transformers {MINIMUM_VERSION} or newer")
    for moved, gate in _GATES.items():
        try:
            open_to_us = gate(name)
        except Exception as error:  # whatever a changed signature, a moved name or a new refusal raises
            refuse_transformers(moved, error)
        if not open_to_us:
            refuse_transformers(moved)


def _passes_for_flash(name: str) -> bool:
    from transformers.utils.generic import is_flash_attention_requested

    # A release of flash-attn that is asked for by number would have its functions loaded.
    by_number = is_flash_attention_requested(requested_attention_implementation=name, version=[2, 3, 4])
    return is_flash_attention_requested(requested_attention_implementation=name) and not by_number


def _is_taken_as_it_is(name: str) -> bool:
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=name), _supports_flash_attn=False)
    manager: Any = SimpleNamespace(_original_attn_impl=None)
    # It has no `set_attn_implementation`, which switching to something else would call.
    ContinuousBatchingManager.switch_to_cb_friendly_attn(manager, model)  # type: ignore[arg-type]
    return True


def _gets_no_dense_mask(name: str) -> bool:
    from transformers.generation.continuous_batching.utils import attn_mask_is_needed

    return not attn_mask_is_needed(SimpleNamespace(_attn_implementation=name))  # type: ignore[arg-type]


def _hands_over_the_cache(name: str) -> bool:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.cache_allocators import SlidingAttentionCacheAllocator
    from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs

    allocator = SimpleNamespace(index=0, layer_type="full_attention", update=lambda key, value, *_: (key, value))
    cache: Any = SimpleNamespace(layer_to_allocator=[allocator])
    offsets = torch.zeros(2, dtype=torch.int32)
    prepared: dict[str, Any] = {name: {"full_attention": offsets} for name in ("cu_seq_lens_k", "max_length_k")}
    prepared |= {"read_index": [None], "write_index": [None], "block_table": None}
    states = torch.zeros(1, 2, 3, 4)
    key, _ = PagedAttentionCache.update(cache, key_states=states, value_states=states, layer_idx=0, kwargs=prepared)
    return (
        {"cache", "cu_seq_lens_q", *PREPARED_KEYWORDS, *UNUSED_KEYWORDS} <= set(PagedAttentionArgs.__annotations__)
        and key.shape == states.shape
        and prepared["cu_seq_lens_k"] is offsets
        and "sliding_window" in SlidingAttentionCacheAllocator.__init__.__code__.co_names
    )


_GATES: dict[str, Callable[[str], bool]] = {
    "`is_flash_attention_requested` no longer goes by the word 'flash' in the name": _passes_for_flash,
    "`ContinuousBatchingManager` no longer takes every name that contains 'flash'": _is_taken_as_it_is,
    "continuous batching builds dense masks for such a name": _gets_no_dense_mask,
    "continuous batching hands its cache to attention in another way": _hands_over_the_cache,
}
"""What a failed gate means, and how to find out."""


def refuse_transformers(moved: str, error: Exception | None = None) -> NoReturn:
    """Refuse the installed transformers, in which something has moved.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"attention_plugin.enable_continuous_batching: transformers {transformers.__version__} is not served: {moved}"
        f"{'' if error is None else f' ({type(error).__name__}: {error})'}; install a release that is (constraints.txt "
        'names one), or use attn_implementation="sdpa" for continuous batching and stay with `model.generate` otherwise'
    ) from error
