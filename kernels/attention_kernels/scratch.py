# SPDX-License-Identifier: Apache-2.0
"""Memory that a thread keeps from one call to the next, for copies on the CPU.

Filling memory that is new to the process can take several times as long as the copy itself.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

KEPT_BYTES = 64 << 20
"""Memory that each thread keeps in one scratch, at most."""

LINE = 64
"""Bytes at whose multiples tensors begin: a line of a processor's cache."""


class Scratch(threading.local):
    """Such memory for one purpose: what it gives is overwritten when it is asked again by the same thread."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def forget(self) -> None:
        """Give the thread's memory back."""
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def room(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor] | None:
        """Contiguous tensors of these shapes with any content; None if they take more than `KEPT_BYTES`."""
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        places = [-(-size // LINE) * LINE for size in sizes]
        if sum(places) > KEPT_BYTES:
            return None
        if self._memory.numel() < sum(places):
            with torch.inference_mode(False):  # or else it could not be written to outside of that mode
                self._memory = torch.empty(sum(places), dtype=torch.uint8, device="cpu")  # whatever the default is
        parts = self._memory[: sum(places)].split(places)
        return [part[:size].view(dtype).view(shape) for part, size, shape in zip(parts, sizes, shapes, strict=True)]
