# SPDX-License-Identifier: Apache-2.0
"""A driver for Triton whose device is the machine: kernels are compiled as for a GPU, and take tensors on the CPU."""

from __future__ import annotations

import random
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver

from attention_kernels.ahead_of_time.compiling import AbsentDevice, active_driver, gpu_target

from .machine import PARAMETERS, Code, Machine
from .memory import GlobalMemory
from .program import parse
from .tile_maps import TileMap
from .turns import Turns

MOST_CODES = 32
"""Kernels that are kept translated: each takes some megabytes."""

SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}


class Device(AbsentDevice):
    """A driver whose launches run."""

    def __init__(self, capability: int, *, late: bool, seed: int | None, counts: bool) -> None:
        super().__init__(gpu_target(f"sm_{capability}"))
        self.late, self.seed, self.counts = late, seed, counts
        self.turns: dict[str, Turns] = {}
        self._codes: OrderedDict[str, Code] = OrderedDict()

    def text_of(self, kernel: CompiledKernel) -> str:
        """What is run."""
        return kernel.asm["ptx"]

    def launch(self, kernel: CompiledKernel, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        """Run all programs, one after the other."""
        text = self.text_of(kernel)
        if (code := self._codes.get(text)) is None:
            code = self._codes[text] = Code(parse(text))
            if len(self._codes) > MOST_CODES:
                self._codes.popitem(last=False)
        given = [*flattened(kernel, arguments), None, None]  # and memory that Triton wants for itself
        assert len(given) == len(code.program.parameters), (len(given), len(code.program.parameters))
        memory = GlobalMemory(each for each in _tensors(arguments))
        parameters, tile_maps = np.zeros(code.parameter_bytes, np.uint8), {}
        for (name, bits, is_map), value in zip(code.program.parameters, given, strict=True):
            first = code.parameters[name]
            if is_map:
                value.memory = memory
                tile_maps[PARAMETERS + first] = value
            else:
                parameters[first : first + bits // 8] = np.frombuffer(packed(value, bits), np.uint8)
        turns = self.turns.setdefault(code.program.name, Turns()) if self.counts else None
        order = None if self.seed is None else random.Random(self.seed)
        with np.errstate(all="ignore"):
            for z, y, x in np.ndindex(*grid[::-1]):
                Machine(
                    code, memory, parameters, tile_maps, kernel.metadata.shared, (x, y, z), grid, late=self.late,
                    order=order, turns=turns,
                ).run()  # fmt: skip


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "base"):
        yield value.base


def packed(value: Any, bits: int) -> bytes:
    """A number or an address as a kernel finds it."""
    if value is None:
        value = 0
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if isinstance(value, float):
        return struct.pack("<f" if bits == 32 else "<d", value)
    return (int(value) & (1 << bits) - 1).to_bytes(bits // 8, "little")


def flattened(kernel: CompiledKernel, arguments: tuple[Any, ...]) -> Iterator[Any]:
    """What kernels take of the arguments: all that is not compiled in."""
    maps = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())

    def walk(kind: Any, value: Any) -> Iterator[Any]:
        if isinstance(kind, tuple):
            for each_kind, each in zip(kind, value, strict=True):
                yield from walk(each_kind, each)
        elif isinstance(kind, str) and kind.startswith("tensordesc"):
            if (metadata := next(maps, None)) is None:  # the GPU has no such copies, and takes what describes them
                yield from decomposed(value)
            else:
                yield tile_map(value, metadata)
                yield from (*value.shape, *value.strides)
        elif kind in ("fp32", "f32"):
            yield float(value)
        elif kind != "constexpr":
            yield value

    for kind, value in zip(kernel.src.signature.values(), arguments, strict=True):
        yield from walk(kind, value)


def decomposed(descriptor: Any) -> Iterable[Any]:
    """A tensor descriptor as kernels take it where there is no TMA."""
    from triton.backends import driver as backends

    if hasattr(backends, "decompose_descriptor"):  # since Triton 3.9
        return backends.decompose_descriptor(descriptor)
    from triton.backends.nvidia.driver import make_tensordesc_arg

    return make_tensordesc_arg(descriptor, None)


def tile_map(descriptor: Any, metadata: dict[str, Any]) -> TileMap:
    """Of a tensor descriptor."""
    unit = metadata["elem_size"]
    return TileMap(
        address=descriptor.base.data_ptr(),
        shape=tuple(descriptor.shape[::-1]),
        strides=tuple(stride * unit for stride in descriptor.strides[::-1]),
        box=tuple(metadata["block_size"][::-1]),
        unit=unit,
        span=SWIZZLES[metadata["swizzle"]],
    )


@contextmanager
def device(capability: int, *, late: bool = False, seed: int | None = None, counts: bool = False) -> Iterator[Device]:
    """Make kernels run here, compiled for a compute capability such as 90.

    Args:
        capability: of the GPU.
        late: whether copies and products that run beside the threads happen as late as they may.
        seed: of the order in which threads that could all go on do; None for one that is the same each time.
        counts: whether turns of memory are counted, by the name of the kernel.
    """
    here = Device(capability, late=late, seed=seed, counts=counts)

    def init_handles(self: CompiledKernel) -> None:
        if self.module is None:
            self.module = self.function = self

            def run(x, y, z, stream, function, packed_metadata, launch_metadata, enter, leave, *arguments) -> None:
                driver.active.launch(self, (x, y, z), arguments)  # not `here`: Triton keeps kernels for longer

            self._run = run

    with active_driver(here), patch.object(CompiledKernel, "_init_handles", init_handles):
        yield here
