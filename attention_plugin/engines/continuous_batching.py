# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching and the variable-length path of vision towers, switched on by one call.

Both ask one thing of an attention implementation: that its name contains "flash". Loading a model under such a name
would send it to the loader of flash-attn; a model that is loaded already can be renamed, as only its configuration
holds the name. So `enable` registers the same attention once more, under a name that says so, and writes that name
into the configurations of one model. No code of transformers is replaced, and no other model is touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from .. import support
from ..masks import span_mask
from .batched_attention import add_hooks, remove_hooks, variable_length_forward
from .flash_gates import check_transformers, refuse_transformers

SUFFIX = "_flash"
"""What a name gets to pass for a flash implementation. A digit after it would ask for a release of flash-attn."""


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
        RuntimeError: the installed transformers decides by something else than the name. Later, as the error of a
            request: the model does not hand its attention layers the cache.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            "attention_plugin.enable_continuous_batching: `model` must be a loaded model of transformers, got "
            f'{type(model).__name__}; load one with from_pretrained(..., attn_implementation="my_triton")'
        )
    parts = list(_parts(model))
    _check_model(model, parts)
    for name in _own_names(model):
        check_transformers(name + SUFFIX)
    for name in {config._attn_implementation for config in parts}:
        AttentionInterface.register(name + SUFFIX, partial(variable_length_forward, AttentionInterface()[name]))
        AttentionMaskInterface.register(name + SUFFIX, span_mask)
        support.registered_names.add(name + SUFFIX)
    for config in parts:
        _rename(config, config._attn_implementation + SUFFIX)
    add_hooks(model)
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Take back `enable`; a model that is not enabled stays as it is."""
    for config in _configs(model):
        name = config._attn_implementation
        if name in support.registered_names and name.endswith(SUFFIX):
            _rename(config, name.removesuffix(SUFFIX))
    remove_hooks(model)
    return model


def serve(model: str, *, name: str = "my_triton", **options: Any) -> Any:
    """Start `transformers serve` for one model, with continuous batching and this attention.

    The command itself knows no other implementations than those of transformers, and loads the model on its own; so
    what it has loaded is switched over. It returns once the server listens, in a thread that keeps the process alive.

    Args:
        model: what to serve, as for `transformers serve`.
        name: the implementation to use, one given to `register`.
        options: of `transformers.cli.serve.Serve`, such as `port`, `device` and `cb_num_blocks`.

    Returns:
        The `Serve` object, whose `kill_server()` ends it.

    Raises:
        ValueError, RuntimeError: as for `enable`; or it ended before it listened. The server is stopped.
    """
    from transformers.cli.serve import Serve

    server: Any = Serve(force_model=model, continuous_batching=True, non_blocking=True, **options)
    try:
        manager = getattr(server, "_model_manager", None)
        if manager is None or not hasattr(manager, "loaded_models"):
            refuse_transformers("`transformers serve` keeps the models it has loaded elsewhere")
        # Before it listens, or the first requests might be answered without. One that ended has dropped its models.
        for loaded_model in [loaded.model for loaded in list(manager.loaded_models.values())]:
            if loaded_model is not None:
                loaded_model.set_attn_implementation(name)
                enable(loaded_model)
        _wait_until_it_listens(server)
    except Exception:
        server.kill_server()
        raise
    return server


def _wait_until_it_listens(server: Any) -> None:
    """The server of `Serve`, uvicorn's, listens some time after its thread has begun."""
    if not hasattr(server, "_thread") or not hasattr(getattr(server, "server", None), "started"):
        refuse_transformers("`transformers serve` keeps its web server elsewhere")
    while not server.server.started:
        if not server._thread.is_alive():
            raise RuntimeError(
                "attention_plugin: `transformers serve` ended before it listened; its log says why. Where the port is "
                "in use, pass another `port`"
            )
        time.sleep(0.02)


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
        refuse_transformers("a configuration keeps the name of its attention implementation elsewhere")


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
