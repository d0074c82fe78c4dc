# SPDX-License-Identifier: Apache-2.0
"""Memory as programs see it. Whoever reads or writes what nobody gave them is told at once."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np
from torch import Tensor

UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class MemoryFault(Exception):
    """An address that is misaligned, or that lies in nothing the kernel was given."""


class GlobalMemory:
    """The tensors of a launch, where they are."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        extents = sorted(extent(each) for each in tensors if each.numel())
        merged: list[list[int]] = []
        for first, last in extents:
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], last)
            else:
                merged.append([first, last])
        self.first = np.array([each[0] for each in merged], np.uint64)
        self.last = np.array([each[1] for each in merged], np.uint64)
        self.origin = self.first & ~np.uint64(15)
        self.views = []
        for origin, last in zip(self.origin.tolist(), self.last.tolist(), strict=True):
            size = (last - origin + 15) // 16 * 16
            whole = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(origin))
            self.views.append({unit: whole.view(kind) for unit, kind in UNITS.items()})

    def places(self, addresses: np.ndarray, size: int, unit: int):
        """Of `size` bytes at each address: which view, and the number of the first unit in it."""
        if not len(self.first):
            raise MemoryFault(f"{addresses[0]:#x}: the kernel was given no memory")
        if (addresses % np.uint64(size)).any():
            raise MemoryFault(f"{addresses[addresses % np.uint64(size) != 0][0]:#x} is no multiple of {size}")
        which = np.searchsorted(self.first, addresses, "right").astype(np.int64) - 1
        outside = (which < 0) | (addresses + np.uint64(size) > self.last[which])
        if outside.any():
            where = addresses[outside][0]
            near = int(np.abs(self.first.astype(np.int64) - np.int64(where)).argmin())
            raise MemoryFault(
                f"{size} bytes at {where:#x}, {np.int64(where) - np.int64(self.first[near])} from a tensor of "
                f"{self.last[near] - self.first[near]} bytes ({outside.sum()} of {len(addresses)} threads)"
            )
        return which, ((addresses - self.origin[which]) // np.uint64(unit)).astype(np.int64)

    def read(self, addresses: np.ndarray, unit: int, count: int) -> list[np.ndarray]:
        """`count` numbers of `unit` bytes from each address on."""
        which, places = self.places(addresses, unit * count, unit)
        if (which == which[0]).all():
            view = self.views[which[0]][unit]
            return [view[places + each] for each in range(count)]
        results = [np.empty(len(addresses), UNITS[unit]) for _ in range(count)]
        for region in np.unique(which):
            here = which == region
            for each, result in enumerate(results):
                result[here] = self.views[region][unit][places[here] + each]
        return results

    def write(self, addresses: np.ndarray, unit: int, values: list[np.ndarray]) -> None:
        """Numbers of `unit` bytes from each address on."""
        which, places = self.places(addresses, unit * len(values), unit)
        for region in np.unique(which):
            here = which == region
            for each, value in enumerate(values):
                self.views[region][unit][places[here] + each] = value[here]


def extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and after its last."""
    first = tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (reach + 1) * tensor.element_size()


class SharedMemory:
    """What the threads of a program share. What nobody wrote is NaN.

    Attributes:
        unfenced: of each byte which warp wrote it (its number and 1) without a fence since, after which the hardware's
            own copies and products see it; else 0. Of what `cp.async` wrote too, Triton takes no fence to be needed.
    """

    BASE = 1024
    """Address of the first byte; the hardware keeps some before it, and swizzles by the bits of addresses."""

    def __init__(self, size: int) -> None:
        self.size = size
        whole = np.full((self.BASE + size + 15) // 16 * 16, 0xFF, np.uint8)
        self.views = {unit: whole.view(kind) for unit, kind in UNITS.items()}
        self.unfenced = np.zeros(len(whole), np.uint8)

    def places(self, addresses: np.ndarray, size: int, unit: int) -> np.ndarray:
        """The number of the first unit of `size` bytes at each address."""
        if (addresses % np.uint32(size)).any():
            raise MemoryFault(f"shared {addresses[addresses % np.uint32(size) != 0][0]} is no multiple of {size}")
        where = addresses.astype(np.int64)
        if (where < self.BASE).any() or (where + size > self.BASE + self.size).any():
            raise MemoryFault(
                f"{size} bytes at shared {where.min() - self.BASE} to {where.max() - self.BASE} of {self.size}"
            )
        return where // unit

    def read(self, addresses: np.ndarray, unit: int, count: int) -> list[np.ndarray]:
        """As `GlobalMemory.read`."""
        places = self.places(addresses, unit * count, unit)
        return [self.views[unit][places + each] for each in range(count)]

    def write(self, addresses: np.ndarray, unit: int, values: list[np.ndarray], warps: np.ndarray | None) -> None:
        """As `GlobalMemory.write`, by threads of these warps; None if no fence is needed."""
        places = self.places(addresses, unit * len(values), unit)
        for each, value in enumerate(values):
            self.views[unit][places + each] = value
        for each in range(unit * len(values)):
            self.unfenced[places * unit + each] = 0 if warps is None else warps + 1

    def fence(self, warps: np.ndarray) -> None:
        """Make visible to the hardware what these warps wrote."""
        self.unfenced[np.isin(self.unfenced, warps + 1)] = 0

    def read_as_hardware(self, places: np.ndarray, unit: int = 2) -> np.ndarray:
        """Numbers at these byte addresses, as the hardware's copies and products read them."""
        if (places < self.BASE).any() or (places >= self.BASE + self.size).any():
            raise MemoryFault("the hardware reads outside shared memory")
        if self.unfenced[places].any():
            raise MemoryFault("the hardware reads what no fence.proxy.async made visible to it")
        return self.views[unit][places // unit]


def swizzled(addresses: np.ndarray, span: int) -> np.ndarray:
    """Where the hardware has what is at these shared addresses before swizzling by `span` bytes (32, 64, 128; 0)."""
    if not span:
        return addresses
    return addresses ^ (((addresses >> 7) & (span // 16 - 1)) << 4)
