# SPDX-License-Identifier: Apache-2.0
"""Blackwell's memory for the operands and results of its matrix instructions (`tcgen05`)."""

from __future__ import annotations

import numpy as np

from .arithmetic import halves
from .matrix import from_shared, numbers
from .memory import MemoryFault, SharedMemory

LANES, COLUMNS = 128, 512
SPANS = {0: 0, 2: 128, 4: 64, 6: 32}
"""Bytes that are swizzled, by what matrix descriptors say."""


class TensorMemory:
    """128 lanes of 512 columns of 32 bits. What nobody wrote is NaN."""

    def __init__(self) -> None:
        self.cells = np.full((LANES, COLUMNS), 0xFFFFFFFF, np.uint32)
        self.allocated = 0

    def allocate(self, columns: int) -> int:
        """Address of as many columns."""
        first = self.allocated
        self.allocated += columns
        if self.allocated > COLUMNS:
            raise MemoryFault(f"{self.allocated} columns of tensor memory, of {COLUMNS}")
        return first

    def places(self, shape: str, count: int, addresses, warps, lanes, half: int) -> tuple[np.ndarray, np.ndarray]:
        """Lanes `[threads, 1]` and columns `[threads, count]` that warps read or write."""
        lane, column = (addresses >> 16).astype(np.int64), (addresses & 0xFFFF).astype(np.int64)
        if (lane // 32 != warps % 4).any():
            raise MemoryFault("a warp reaches for lanes of tensor memory that are another's")
        columns = column[:, None] + np.arange(count)
        if shape == "32x32b":
            lane = lane + lanes
        else:
            assert shape == "16x32bx2", shape
            lane, columns = lane + lanes % 16, columns + (lanes // 16 * half)[:, None]
        if (columns >= self.allocated).any():
            raise MemoryFault(f"column {columns.max()} of tensor memory, of {self.allocated} that are allocated")
        return lane[:, None], columns

    def multiply(
        self, shared: SharedMemory, target: int, a: int, a_inside: bool, b: int, instruction: int, adds: bool
    ) -> None:
        """`tcgen05.mma` of 16-bit numbers: 16 terms of each sum. `a` is a descriptor, or an address in here."""
        rows, columns = (instruction >> 24 & 31) << 4, (instruction >> 17 & 63) << 3
        assert instruction >> 4 & 3 == 1 and instruction & 0x6000 == 0, "float32 sums of products that are not negated"
        kinds = [("f16", "bf16")[instruction >> shift & 7] for shift in (7, 10)]
        right = self._operand(shared, b, columns, instruction >> 16 & 1, kinds[1])
        if a_inside:
            lane, column = self._rows(a, rows)
            low, high = halves(self.cells[lane[:, None], column + np.arange(8)])
            left = np.stack([numbers(low, kinds[0]), numbers(high, kinds[0])], -1).reshape(rows, 16)
        else:
            left = self._operand(shared, a, rows, instruction >> 15 & 1, kinds[0])
        lane, column = self._rows(target, rows)
        where = lane[:, None], column + np.arange(columns)
        if column + columns > self.allocated:
            raise MemoryFault(f"sums in column {column + columns - 1} of tensor memory, of {self.allocated}")
        before = self.cells[where].view(np.float32) if adds else np.float32(0)
        self.cells[where] = (before + left @ right.T).view(np.uint32)

    @staticmethod
    def _operand(shared: SharedMemory, descriptor: int, extent: int, transposed: int, kind: str) -> np.ndarray:
        assert descriptor >> 46 & 7 == 1 and descriptor >> 52 & 1 == 0, "a descriptor of another kind"
        return from_shared(shared, descriptor, SPANS[descriptor >> 61], extent, transposed, kind)

    @staticmethod
    def _rows(address: int, rows: int) -> tuple[np.ndarray, int]:
        """Lanes of rows: 64 take the first half of each warp's."""
        row = np.arange(rows)
        lane = row if rows == 128 else row // 16 * 32 + row % 16
        assert rows in (64, 128)
        return (address >> 16) + lane, address & 0xFFFF
