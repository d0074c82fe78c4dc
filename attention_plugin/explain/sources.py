# SPDX-License-Identifier: Apache-2.0
"""From what a user gives to a model's configuration."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..command import UsageError, one_line

_log = logging.getLogger(__name__)
INSTEAD = (
    "give a folder with a config.json, a config.json, a hub id that is in the cache, or a model type of transformers "
    "such as 'llama'"
)


def load_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model.

    Args:
        source: a folder with a `config.json`, the path of such a file, a model type of transformers (its default
            configuration), or a hub id.
        trust_remote_code: whether to run Python files that lie beside the configuration.

    Raises:
        UsageError: there is no such thing, or it is no configuration of a model.
    """
    if not source.strip():
        raise UsageError(f"MODEL_OR_CONFIG is empty; {INSTEAD}")
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"the folder {source!r} has no config.json; {INSTEAD}")
        return _from_file(path / "config.json", trust_remote_code)
    if path.is_file():
        return _from_file(path, trust_remote_code)
    if source in CONFIG_MAPPING:
        return _default(source)
    if path.is_absolute() or source.startswith((".", "~")) or source.endswith(".json") or source.count("/") > 1:
        raise UsageError(f"there is no file or folder {source!r}; {INSTEAD}")
    return _from_hub(source, trust_remote_code)


def _default(model_type: str) -> Any:
    try:
        return CONFIG_MAPPING[model_type]()
    except Exception as error:
        raise UsageError(
            f"the model type {model_type!r} has no default configuration ({one_line(error)}); give a config.json"
        ) from error


def _from_file(path: Path, trust_remote_code: bool) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} is no JSON file ({one_line(error)}); {INSTEAD}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise UsageError(f"{str(path)!r} is no model configuration: it has no 'model_type'; {INSTEAD}")
    known = content["model_type"] in CONFIG_MAPPING
    if "auto_map" not in content and not known:
        hint = _did_you_mean(content["model_type"]) or "a newer transformers may know it"
        raise UsageError(f"{str(path)!r}: this transformers has no model type {content['model_type']!r}; {hint}")
    if "AutoConfig" in content.get("auto_map", {}) and not known and not trust_remote_code:
        raise UsageError(
            f"{str(path)!r} belongs to a model with Python files of its own (auto_map); pass --trust-remote-code if "
            "you trust them"
        )
    try:
        # transformers looks for a model's Python files in its folder, and there for a configuration of this name only.
        if path.name == "config.json":
            return AutoConfig.from_pretrained(str(path.parent), trust_remote_code=trust_remote_code)
        if "AutoConfig" in content.get("auto_map", {}) and not known:
            config_class: Any = get_class_from_dynamic_module(content["auto_map"]["AutoConfig"], str(path.parent))
            return config_class.from_dict(content | {"name_or_path": str(path.parent)})
        return AutoConfig.from_pretrained(str(path))
    except Exception as error:
        raise UsageError(f"transformers cannot read {str(path)!r}: {one_line(error)}") from error


def _from_hub(source: str, trust_remote_code: bool) -> Any:
    # Without a network the hub is tried for half a minute.
    with _without_retries(), suppress(Exception):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, local_files_only=True)
        _log.warning("%r is shown as it lies in the hub's cache; a newer revision is not asked for", source)
        return config
    try:
        with _without_retries():
            return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"{source!r} is a model with Python files of its own; pass --trust-remote-code if you trust them"
            ) from error
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        hint = _did_you_mean(source)
        where = "in the hub's cache (HF_HUB_OFFLINE is set)" if offline else "in the hub's cache and on the hub"
        raise UsageError(
            f"{source!r} was looked for as a folder, a file, one of {len(list(CONFIG_MAPPING))} model types of "
            f"transformers, {where}, and not found"
            f"{f' ({hint})' if hint else ''}; {INSTEAD}"
        ) from error


def _did_you_mean(model_type: str) -> str:
    """A question with the model type that is spelt most like this one; empty where none is much like it."""
    close = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=1, cutoff=0.7)
    return f"did you mean {close[0]!r}?" if close else ""


@contextmanager
def _without_retries() -> Iterator[None]:
    """Without the warnings of the hub's client, two for each time that it tries again without a network."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "urllib3")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
