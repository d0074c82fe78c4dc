# SPDX-License-Identifier: Apache-2.0
"""Where a call runs: by the Triton kernels, or in torch."""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .configs import unsupported_device

logger = logging.getLogger(__name__)


@lru_cache
def log_once(message: str) -> None:
    """Say which path runs, once per process: nothing falls back in silence."""
    logger.warning(message)


@lru_cache
def triton_installed() -> bool:
    """Whether Triton can be imported; it has no wheels for macOS and Windows."""
    return find_spec("triton") is not None


@lru_cache
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, and so on CPU tensors."""
    if not triton_installed():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def runs_triton(tensor: Tensor) -> bool:
    """Whether a call on this tensor runs the Triton kernel; where that may surprise, the log says why not."""
    if tensor.device.type == "cpu" and not interpreting():
        return False
    if tensor.dtype == torch.float64:
        log_once("float64 runs attention in torch: the Triton kernels are for float16, bfloat16 and float32")
        return False
    if tensor.device.type == "cpu":
        return True
    if tensor.device.type != "cuda":
        log_once(f"{tensor.device.type} tensors run attention in torch: the Triton kernels are for CUDA and ROCm")
        return False
    if not triton_installed():
        log_once("Triton is not installed, so attention runs in torch; `pip install triton` brings the kernels")
        return False
    if (reason := unsupported_device(tensor.device)) is not None:
        raise RuntimeError(reason)
    return True
