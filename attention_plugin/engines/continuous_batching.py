# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching and the variable-length path of vision towers, switched on by one call.

Both ask one thing of an attention implementation: that its name contains "flash". Loading a model under such a name
would send it to the loader of flash-attn; a model that is loaded already can be renamed, as only its configuration
holds the name. So `enable` registers the same attention once more, under a name that says so, and writes that name
into the configurations of one model. No code of transformers is replaced, and no other model is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from attention_kernels import Spans

from .. import support
from ..masks import SpanMask, span_mask

SUFFIX = "_flash"
"""What a name gets to pass for a flash implementation. A digit after it would ask for a release of flash-attn."""

MINIMUM_VERSION = "5.23"
"""Earlier ones hand their cache over in another way, or lose the boundaries of images under such a name (Pixtral)."""

PREPARED_KEYWORDS = ("cu_seq_lens_k", "max_length_k", "read_index", "write_index", "block_table")
"""What continuous batching prepares for the update of its cache."""

UNUSED_KEYWORDS = ("max_length_q", "logits_indices", "logits_processor_args")
"""What continuous batching hands to every layer and no attention needs."""


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Let continuous batching, and vision towers that attend to all their images in one call, use this attention.

    Everything else about the model stays as it is, its results and `model.generate` included. Calling it again is
    harmless.

    Args:
        model: a model loaded with `attn_implementation="my_triton"` or another name given to `register`. Parts of it
            with other implementations keep them.

    Returns:
        The model itself.

    Raises:
        TypeError: `model` is no module of torch.
        ValueError: no part of the model uses this attention, or a part has layers that such a name rules out.
        RuntimeError: the installed transformers decides by something else than the name. In a batch, where an error is
            the request's: the model keeps the cache from its attention layers.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            "attention_plugin.enable_continuous_batching: `model` must be a loaded model of transformers, got "
            f'{type(model).__name__}; load one with from_pretrained(..., attn_implementation="my_triton")'
        )
    parts = list(_parts(model))
    _check_model(model, parts)
    for name in _own_names(model):
        _check_transformers(name + SUFFIX)
    for name in {config._attn_implementation for config in parts}:
        AttentionInterface.register(name + SUFFIX, partial(variable_length_forward, AttentionInterface()[name]))
        AttentionMaskInterface.register(name + SUFFIX, span_mask)
        support.registered_names.add(name + SUFFIX)
    for config in parts:
        _rename(config, config._attn_implementation + SUFFIX)
    _add_hooks(model)
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Take back `enable`; a model that is not enabled stays as it is."""
    for config in _configs(model):
        name = config._attn_implementation
        if name in support.registered_names and name.endswith(SUFFIX):
            _rename(config, name.removesuffix(SUFFIX))
    for hook in _hooks.pop(model, ()):
        hook.remove()
    return model


def serve(model: str, *, name: str = "my_triton", **options: Any) -> Any:
    """Start `transformers serve` for one model, with continuous batching and this attention.

    The command itself knows no other implementations than those of transformers, and loads the model on its own; so
    what it has loaded is switched over. It returns once the server runs, in a thread that keeps the process alive.

    Args:
        model: what to serve, as for `transformers serve`.
        name: the implementation to use, one given to `register`.
        options: of `transformers.cli.serve.Serve`, such as `port`, `device` and `cb_num_blocks`.

    Returns:
        The `Serve` object, whose `kill_server()` ends it.

    Raises:
        ValueError, RuntimeError: as for `enable`. The server is stopped.
    """
    from transformers.cli.serve import Serve

    server: Any = Serve(force_model=model, continuous_batching=True, non_blocking=True, **options)
    try:
        manager = getattr(server, "_model_manager", None)
        if manager is None or not hasattr(manager, "loaded_models"):
            _refuse_transformers("`transformers serve` keeps the models it has loaded elsewhere")
        for loaded in manager.loaded_models.values():
            loaded.model.set_attn_implementation(name)
            enable(loaded.model)
    except Exception:
        server.kill_server()
        raise
    return server


# ---------------------------------------------------------------------- attention


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
        RuntimeError: a batch is being computed, and the model does not say so to this layer.
    """
    if kwargs.get("write_index") is not None or kwargs.get("block_table") is not None:
        return _paged_forward(forward, module, query, key, value, kwargs)
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
    kwargs: dict[str, Any],
) -> tuple[Tensor, Any]:
    """Attend to what the cache has of the same requests, after the new keys and values were written to it.

    The requests lie behind one another, in a batch of one. Their keys are gathered by the cache; pages are not read in
    place. A mask that the model may have built knows nothing of the cache, and is ignored.
    """
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
        _refuse_transformers("a batch is computed by another model than the one that was enabled")
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

_hooks: WeakKeyDictionary[PreTrainedModel, list[RemovableHandle]] = WeakKeyDictionary()
_in_use = threading.local()
"""`cache`: of the pass that this thread is computing. Layers that write to it do not hand it on to attention."""


def _add_hooks(model: PreTrainedModel) -> None:
    if model not in _hooks:
        _hooks[model] = [
            model.register_forward_pre_hook(_begin_pass, with_kwargs=True),
            model.register_forward_hook(_check_pass, with_kwargs=True),
            model.register_forward_hook(_end_pass, with_kwargs=True, always_call=True),
        ]


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


# ---------------------------------------------------------------------- models


def _configs(model: PreTrainedModel) -> Iterator[PreTrainedConfig]:
    """All configurations that a model's parts look at, each once."""
    waiting = [getattr(module, "config", None) for module in model.modules()]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop(0)
        if not isinstance(config, PreTrainedConfig) or id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        waiting += [getattr(config, name, None) for name in config.sub_configs]


def _parts(model: PreTrainedModel) -> Iterator[PreTrainedConfig]:
    """Configurations set to this attention and not enabled yet."""
    for config in _configs(model):
        name = config._attn_implementation
        if name in support.registered_names and not name.endswith(SUFFIX):
            yield config


def _own_names(model: PreTrainedModel) -> set[str]:
    """Names of this attention that parts of the model have, as they were before enabling."""
    names = {config._attn_implementation for config in _configs(model)}
    return {name.removesuffix(SUFFIX) for name in names if name in support.registered_names}


def _rename(config: PreTrainedConfig, name: str) -> None:
    """Write the name where `set_attn_implementation` writes it: the public way also overwrites nested parts."""
    config._attn_implementation_internal = name
    if config._attn_implementation != name:
        _refuse_transformers("a configuration keeps the name of its attention implementation elsewhere")


def _check_model(model: PreTrainedModel, parts: list[PreTrainedConfig]) -> None:
    names = {config._attn_implementation for config in _configs(model)}
    if not parts and not any(name in support.registered_names for name in names):
        raise ValueError(
            "attention_plugin.enable_continuous_batching: no part of `model` uses this attention, its implementations "
            f'are {sorted(map(str, names))}; load it with attn_implementation="my_triton", or call '
            'model.set_attn_implementation("my_triton") first'
        )
    for config in parts:
        if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
            raise ValueError(
                f"attention_plugin.enable_continuous_batching: `model` has layers of chunked attention "
                f"({config.model_type}), which transformers refuses under a name that contains 'flash', and in "
                "continuous batching under any; use `model.generate` without enabling"
            )


# ---------------------------------------------------------------------- transformers


def _check_transformers(name: str) -> None:
    """Try each gate with the name, since code that decides by something else would be wrong in silence.

    Raises:
        RuntimeError: a gate has moved.
    """
    if Version(transformers.__version__) < Version(MINIMUM_VERSION):
        _refuse_transformers(f"it needs transformers {MINIMUM_VERSION} or newer")
    for moved, gate in _GATES.items():
        try:
            open_to_us = gate(name)
        except Exception as error:  # whatever a changed signature, a moved name or a new refusal raises
            _refuse_transformers(moved, error)
        if not open_to_us:
            _refuse_transformers(moved)


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


def _refuse_transformers(moved: str, error: Exception | None = None) -> NoReturn:
    raise RuntimeError(
        f"attention_plugin.enable_continuous_batching: transformers {transformers.__version__} is not served: {moved}"
        f"{'' if error is None else f' ({type(error).__name__}: {error})'}; install a release that is (constraints.txt "
        'names one), or use attn_implementation="sdpa" for continuous batching and stay with `model.generate` otherwise'
    ) from error
