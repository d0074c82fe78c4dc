# SPDX-License-Identifier: Apache-2.0
"""Memory that a thread keeps from one call to the next, for copies on the CPU.

Filling memory that is new to the process can take several times as long as the copy itself.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

KEPT_BYTES = 64 << 20
"""Memory that each thread keeps in one scratch, at most."""

LINE = 64
"""Bytes at whose multiples tensors begin: a line of a processor's cache."""

with torch.inference_mode(False):  # whatever imports this
    _NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


class Scratch(threading.local):
    """Such memory for one purpose."""

    def __init__(self) -> None:
        self._memory: Tensor | None = _NOTHING

    def forget(self) -> None:
        """Give the thread's memory back."""
        self._memory = _NOTHING

    @contextmanager
    def lent(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Iterator[list[Tensor] | None]:
        """Contiguous tensors of these shapes with any content, which are nobody else's until the block ends.

        None where they would take more than `KEPT_BYTES`, where the memory is lent already (a signal's handler, or a
        mode that looks at each call, may call attention in the middle of a call), and where a mode makes tensors that
        are none.
        """
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        places = [-(-size // LINE) * LINE for size in sizes]
        memory = self._memory
        if memory is None or sum(places) > KEPT_BYTES or is_in_torch_dispatch_mode():
            yield None
            return
        self._memory = None
        try:
            if memory.numel() < sum(places):
                with torch.inference_mode(False):  # or else it could not be written to outside of that mode
                    memory = torch.empty(sum(places), dtype=torch.uint8, device="cpu")  # whatever the default is
            parts = memory[: sum(places)].split(places)
            yield [part[:size].view(dtype).view(shape) for part, size, shape in zip(parts, sizes, shapes, strict=True)]
        finally:
            self._memory = memory
