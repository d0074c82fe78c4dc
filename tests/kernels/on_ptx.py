# SPDX-License-Identifier: Apache-2.0
"""Calls on CPU tensors whose kernels are compiled for a GPU and run on the machine in `ptx`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from attention_kernels import operators, prebound
from attention_kernels.configs import assuming

PROCESSORS = 4
"""Of the GPU that is assumed: few, so that small problems are split among them, too."""


@contextmanager
def running_on(capability: int, *, late: bool = False, seed: int | None = None) -> Iterator[None]:
    """Run kernels as compiled for a compute capability such as 90; `ptx.device` says what the rest is."""
    from ptx import device  # imports Triton

    prebound.forget()
    with (
        device(capability, late=late, seed=seed),
        assuming(f"sm_{capability}", PROCESSORS),
        patch.object(operators, "interpreting", lambda: True),  # which is what sends CPU tensors to kernels
    ):
        yield
    prebound.forget()
