# SPDX-License-Identifier: Apache-2.0
"""Tiles of a tensor that the hardware copies (TMA)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .memory import UNITS, GlobalMemory, SharedMemory, swizzled


@dataclass
class TileMap:
    """What `cuTensorMapEncodeTiled` would be given; the innermost dimension first.

    Attributes:
        address: of the first number.
        shape: of the tensor.
        strides: in bytes.
        box: shape of a tile.
        unit: bytes of a number.
        span: bytes that are swizzled; 0 if none.
        memory: of the launch.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    unit: int
    span: int
    memory: GlobalMemory | None = None

    def __post_init__(self) -> None:
        assert self.address % 16 == 0 and all(each % 16 == 0 for each in self.strides[1:])
        assert self.strides[0] == self.unit and all(0 < each <= 256 for each in self.box)
        assert self.box[0] * self.unit % 16 == 0 and (not self.span or self.box[0] * self.unit <= self.span)

    @property
    def size(self) -> int:
        """Bytes of a tile."""
        return int(np.prod(self.box)) * self.unit

    def _places(self, coordinates: list[int], shared_address: int):
        """Where each number is in global and in shared memory, and whether it is one of the tensor's."""
        assert shared_address % 128 == 0
        within = np.indices(self.box[::-1]).reshape(len(self.box), -1)[::-1]
        index = within + np.array(coordinates)[:, None]
        inside = ((index >= 0) & (index < np.array(self.shape)[:, None])).all(0)
        addresses = (self.address + (index * np.array(self.strides)[:, None]).sum(0)).astype(np.uint64)
        shared = swizzled(shared_address + np.arange(within.shape[1]) * self.unit, self.span)
        return addresses, shared, inside

    def load(self, shared: SharedMemory, coordinates: list[int], target: int) -> None:
        """Copy a tile to shared memory; zeros where the tensor has nothing."""
        addresses, places, inside = self._places(coordinates, target)
        values = np.zeros(len(addresses), UNITS[self.unit])
        if inside.any():
            (values[inside],) = self.memory.read(addresses[inside], self.unit, 1)
        shared.places(np.array([places.min(), places.max()], np.uint32), self.unit, self.unit)
        shared.views[self.unit][places // self.unit] = values
        shared.unfenced[target : target + self.size] = 0

    def store(self, shared: SharedMemory, coordinates: list[int], source: int) -> None:
        """Copy a tile from shared memory; nothing where the tensor has nothing."""
        addresses, places, inside = self._places(coordinates, source)
        values = shared.read_as_hardware(places, self.unit)
        if inside.any():
            self.memory.write(addresses[inside], self.unit, [values[inside]])
