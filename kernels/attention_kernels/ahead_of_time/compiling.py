# SPDX-License-Identifier: Apache-2.0
"""Compiling exactly as a launch would, for a GPU that need not be there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ..launch import COMPILER_OPTIONS
from .machine_code import MachineCode, read_amd, read_cubin


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel.

    Attributes:
        shared_memory: bytes per program.
        threads: per program.
        binary: the machine code, by Triton's names of its stages: "cubin" or "amdgcn".
        seconds: what Triton took for it; next to nothing where its cache had it.
    """

    shared_memory: int
    threads: int
    binary: Mapping[str, Any]
    seconds: float

    @cached_property
    def code(self) -> MachineCode:
        """Registers, spills and instructions; read when first asked for, which takes a third of a second."""
        return read_cubin(self.binary["cubin"]) if "cubin" in self.binary else read_amd(self.binary["amdgcn"])

    @property
    def registers(self) -> int:
        """Registers per thread."""
        return self.code.registers

    @property
    def spills(self) -> int:
        """Instructions that move registers to memory and back; on AMD, spilled registers."""
        return self.code.spills


class AbsentDevice:
    """The part of a Triton driver that compiling needs: what to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """What Triton compiles for."""
        return self.target

    def get_current_device(self) -> str:
        """The key of Triton's in-memory cache of compiled kernels: one device per target."""
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        """Nothing is launched."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are that stand for those of a call."""
        return torch.device("cpu")


def gpu_target(architecture: str) -> GPUTarget:
    """Triton's name of an architecture such as "sm_90" or "gfx942"."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


@contextmanager
def absent_device(architecture: str) -> Iterator[None]:
    """Make `kernel.warmup` compile for `architecture`."""
    with active_driver(AbsentDevice(gpu_target(architecture))):
        yield


@contextmanager
def active_driver(device: AbsentDevice) -> Iterator[None]:
    """Have Triton ask this one."""
    driver.set_active(device)
    try:
        yield
    finally:
        if torch.cuda.is_available():  # without a GPU there is no driver to go back to
            driver.reset_active()


def compile_only(kernel: Any, architecture: str, arguments: Mapping[str, Any]) -> tuple[Any, float]:
    """Triton's compiled kernel, as a launch with `arguments` on `architecture` would have it, and the seconds taken."""
    with absent_device(architecture):
        began = time.perf_counter()
        compiled = kernel.warmup(grid=(1,), **arguments, **COMPILER_OPTIONS)
        return compiled, time.perf_counter() - began


def compile_ahead(kernel: Any, architecture: str, arguments: Mapping[str, Any]) -> Compiled:
    """The same, with what it takes of the chip.

    Args:
        kernel: a function decorated with `triton.jit`; in the interpreter there is nothing to compile.
        architecture: such as "sm_90" or "gfx942".
        arguments: those of a launch, by name, `num_warps` and `num_stages` included; tensors may be on the CPU.

    Raises:
        triton.CompilationError: what Triton raises.
    """
    compiled, seconds = compile_only(kernel, architecture, arguments)
    target = gpu_target(architecture)
    # Warp specialisation adds warps to those that were asked for.
    warps = getattr(compiled.metadata, "num_warps", arguments.get("num_warps", 4))
    return Compiled(compiled.metadata.shared, warps * target.warp_size, compiled.asm, seconds)
