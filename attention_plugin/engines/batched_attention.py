# SPDX-License-Identifier: Apache-2.0
"""Attention over the cache of transformers' continuous batching, and whose batch a thread computes.

The requests of a batch lie behind one another in one row, and each sees its own keys: spans made of the cumulative
lengths that continuous batching hands to every layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_kernels import Spans

from .. import support
from ..carried_mask import SpanMask

PREPARED_KEYWORDS = ("cu_seq_lens_k", "max_length_k", "read_index", "write_index", "block_table")
"""What continuous batching prepares for the update of its cache."""

UNUSED_KEYWORDS = ("max_length_q", "logits_indices", "logits_processor_args")
"""What continuous batching hands to every layer and no attention needs."""


def variable_length_forward(
    forward: Callable,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SpanMask | Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """The AttentionInterface function of an enabled model.

    Args:
        forward: the registered function that attends.
        module, query, key, value, attention_mask, kwargs: as for `attention_forward`; in a batch also
            `PREPARED_KEYWORDS`, and continuous batching's `cache` of all requests where attention is to write to it.

    Raises:
        ValueError: continuous batching was told to keep its cache by block tables.
        RuntimeError: a batch is being computed, and the model does not say so to this layer, or has made a mask of its
            own; or a batch comes from outside of the model that was enabled.
    """
    if kwargs.get("write_index") is not None or kwargs.get("block_table") is not None:
        return _paged_forward(forward, module, query, key, value, attention_mask, kwargs)
    if not torch.compiler.is_compiling() and _cache_in_use() is not None:
        _refuse_model(type(module).__name__, "is not told of the requests in a batch")
    return forward(module, query, key, value, attention_mask, **kwargs)


# The cache writes into views of its own tensors, which compilers handle by copying all of it.
@torch.compiler.disable
def _paged_forward(
    forward: Callable,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SpanMask | Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Any]:
    """Attend to what the cache has of the same requests, after the new keys and values were written to it.

    The requests lie behind one another, in a batch of one. Their keys are gathered by the cache; pages are not read in
    place. A mask that transformers has built knows nothing of the cache, and is ignored; what a model has made of one
    would be lost with it.
    """
    if isinstance(attention_mask, Tensor):
        _refuse_model(type(module).__name__, "attends under a mask of its own, which knows nothing of the cache")
    prepared = {name: kwargs.pop(name) for name in PREPARED_KEYWORDS if name in kwargs}
    if prepared.get("block_table") is not None:
        raise ValueError(
            "my_triton attention: `block_table` of continuous batching is not served; pass "
            "ContinuousBatchingConfig(max_blocks_per_request=0), with which keys are gathered by their indices"
        )
    query_offsets = kwargs.pop("cu_seq_lens_q")
    for name in UNUSED_KEYWORDS:
        kwargs.pop(name, None)
    cache = kwargs.pop("cache", None)
    cache = _cache_in_use() if cache is None else cache
    if cache is None:
        raise RuntimeError(
            "my_triton attention: a batch reached a layer outside of a pass of the model that was enabled; pass the "
            "model that transformers serves to attention_plugin.enable_continuous_batching"
        )
    layer_idx: Any = module.layer_idx
    # Before transformers 5.24 attention wrote to the cache; since then layers do, which leaves them their own lengths.
    if isinstance(prepared["cu_seq_lens_k"], dict):
        key, value = cache.update(key_states=key, value_states=value, layer_idx=layer_idx, kwargs=prepared)
    spans = _shared_spans(
        cache, layer_idx, query_offsets, prepared["cu_seq_lens_k"], (query.shape[2], key.shape[2]),
        _window(cache, layer_idx, kwargs.pop("sliding_window", None)),
    )  # fmt: skip
    return forward(module, query, key, value, SpanMask(spans), **kwargs)


def request_spans(
    query_offsets: Tensor, key_offsets: Tensor, query_len: int, key_len: int, sliding_window: int | None
) -> Spans:
    """What each row of a batch of requests sees: keys of its own request, up to its own token.

    The queries of a request are its newest tokens, so its last query stands at its last key.

    Args:
        query_offsets, key_offsets: integer `[requests + 1]`, cumulative lengths. Rows beyond the last see nothing.
        sliding_window: number of keys that a row sees at most, or None.
    """
    own = Spans.packed_offsets(query_offsets, query_offsets, query_len, query_len)
    keys = Spans.packed_offsets(query_offsets, key_offsets, query_len, key_len)
    newer = own.end - 1 - torch.arange(query_len, device=own.device, dtype=torch.int32)
    end = torch.minimum(keys.end - newer, keys.end)  # a row of padding, which has no request, counts fewer than none
    start = keys.start if sliding_window is None else torch.maximum(keys.start, end - sliding_window)
    return Spans(start, end, query_len, key_len)


def _window(cache: Any, layer_idx: int, sliding_window: int | None) -> int | None:
    """The window of a layer: some models leave it to their masks and do not pass it, but the cache forgets by it."""
    allocator = cache.layer_to_allocator[layer_idx]
    windows = [window for window in (sliding_window, getattr(allocator, "sliding_window", None)) if window is not None]
    return min(windows, default=None)


class _Shared(NamedTuple):
    """Spans that the layers of one forward pass share, and who used them last."""

    offsets: tuple[Tensor, Tensor]
    layer_idx: int
    spans: Spans


_shared: WeakKeyDictionary[Any, dict[int | None, _Shared]] = WeakKeyDictionary()


def _shared_spans(
    cache: Any,
    layer_idx: int,
    query_offsets: Tensor,
    key_offsets: Tensor,
    lengths: tuple[int, int],
    sliding_window: int | None,
) -> Spans:
    """The spans of a layer, built by the first layer of a forward pass that has this window.

    Offsets are written in place from one batch to the next, and when a CUDA graph is captured the same tensors come
    twice: a layer that is no deeper than the last one begins another pass.
    """
    by_window = _shared.setdefault(cache, {})
    last = by_window.get(sliding_window)
    if (
        last is None
        or last.offsets[0] is not query_offsets
        or last.offsets[1] is not key_offsets
        or layer_idx <= last.layer_idx
        or (last.spans.query_len, last.spans.key_len) != lengths
    ):
        spans = request_spans(query_offsets, key_offsets, *lengths, sliding_window)
    else:
        spans = last.spans
    by_window[sliding_window] = _Shared((query_offsets, key_offsets), layer_idx, spans)
    return spans


# ---------------------------------------------------------------------- passes

_in_use = threading.local()
"""`cache`: of the pass that this thread is computing. Layers that write to it do not hand it on to attention."""


def add_hooks(model: PreTrainedModel) -> None:
    """Have each pass of a model tell its thread which cache is in use, once; a copy of a model has them already."""
    if _begin_pass not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin_pass, with_kwargs=True)
        model.register_forward_hook(_check_pass, with_kwargs=True)
        model.register_forward_hook(_end_pass, with_kwargs=True, always_call=True)


def remove_hooks(model: PreTrainedModel) -> None:
    """Take back `add_hooks`, if it was called, on this model or on what it is a copy of."""
    ours = (_begin_pass, _check_pass, _end_pass)
    before: list[dict[int, Any]] = [model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs]
    after: list[dict[int, Any]] = [
        model._forward_hooks, model._forward_hooks_with_kwargs, model._forward_hooks_always_called,
    ]  # fmt: skip
    for hooks, *flags in (before, after):
        for number in [number for number, hook in hooks.items() if hook in ours]:
            for each in (hooks, *flags):
                each.pop(number, None)


def _batch_cache(kwargs: dict[str, Any]) -> Any:
    """Continuous batching's cache among a model's arguments, or None: since 5.24 every cache goes by this name."""
    cache = kwargs.get("cache")
    return cache if hasattr(cache, "layer_to_allocator") else None


def _cache_in_use() -> Any:
    return getattr(_in_use, "cache", None)


@torch.compiler.disable
def _use(cache: Any) -> None:
    _in_use.cache = cache


def _begin_pass(model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    cache = _batch_cache(kwargs)
    if cache is not None:
        _use(cache)


def _check_pass(model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Refuse the result of a pass if the cache went into the model and never arrived at an attention layer.

    Such a layer sees the newest tokens alone. In compiled code nothing else would tell.
    """
    cache = _batch_cache(kwargs)
    if cache is None or _shared.pop(cache, None) is not None:
        return
    if model.config.get_text_config(decoder=True)._attn_implementation in support.registered_names:
        _refuse_model(type(model).__name__, "does not hand `cache` on to its attention layers")


def _end_pass(model: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if _batch_cache(kwargs) is not None:
        _use(None)


def _refuse_model(name: str, reason: str) -> NoReturn:
    raise RuntimeError(
        f"my_triton attention: {name} {reason}, so that continuous batching cannot work with it, whatever the "
        "implementation; use `model.generate`"
    )
