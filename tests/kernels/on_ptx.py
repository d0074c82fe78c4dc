# SPDX-License-Identifier: Apache-2.0
"""Calls on CPU tensors whose kernels are compiled for a GPU and run on the machine in `ptx`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from attention_kernels import paths, prebound
from attention_kernels.configs import assuming

if TYPE_CHECKING:
    from ptx import Device

PROCESSORS = 4
"""Of the GPU that is assumed: few, so that small problems are split among them, too."""


@contextmanager
def running_on(capability: int, **options: Any) -> Iterator[Device]:
    """Run kernels as compiled for a compute capability such as 90; `options` are those of `ptx.device`."""
    from ptx import device  # imports Triton

    prebound.forget()
    with (
        device(capability, **options) as here,
        assuming(f"sm_{capability}", PROCESSORS),
        patch.object(paths, "interpreting", lambda: True),  # which is what sends CPU tensors to kernels
    ):
        try:
            yield here
        finally:
            prebound.forget()  # or calls elsewhere would be launched here
