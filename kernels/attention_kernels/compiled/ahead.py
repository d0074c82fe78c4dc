# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for GPUs that are not there, and read registers, spills and shared memory from the machine code."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel.

    Attributes:
        shared_memory: bytes of a program.
        registers: of a thread.
        spills: local-memory instructions (on AMD GPUs registers that were spilled).
        warps: of a program.
        seconds: that compiling took; next to none where it was remembered.
        code: SASS or AMD's assembly.
    """

    shared_memory: int
    registers: int
    spills: int
    warps: int
    seconds: float
    code: str


class AbsentDevice:
    """The part of a Triton driver that compiling needs: what to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> str:
        """The key of Triton's in-memory cache of compiled kernels: one device per target."""
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        """None that is used."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")


def gpu_target(architecture: str) -> GPUTarget:
    """Triton's name of an architecture such as "sm_90" or "gfx942"."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


@contextmanager
def absent_device(architecture: str) -> Iterator[None]:
    """Make `kernel.warmup` compile for `architecture`."""
    driver.set_active(AbsentDevice(gpu_target(architecture)))
    try:
        yield
    finally:
        if torch.cuda.is_available():  # without a GPU there is no driver to go back to
            driver.reset_active()


def compile_ahead(kernel: Any, architecture: str, arguments: dict[str, Any]) -> Compiled:
    """Compile a Triton kernel exactly as a launch with `arguments` on `architecture` would."""
    begun = time.perf_counter()
    with absent_device(architecture):
        compiled = kernel.warmup(grid=(1,), **arguments)
    seconds, warps = time.perf_counter() - begun, compiled.metadata.num_warps
    if "cubin" in compiled.asm:
        registers, code = read_cubin(compiled.asm["cubin"])
        spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
        return Compiled(compiled.metadata.shared, registers, spills, warps, seconds, code)
    code = compiled.asm["amdgcn"]
    spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", code))
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", code))
    return Compiled(compiled.metadata.shared, registers, spills, warps, seconds, code)


def read_cubin(cubin: bytes) -> tuple[int, str]:
    """Registers of a thread, and SASS, by the cuobjdump that Triton ships."""
    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", str(file)], capture_output=True, text=True, check=True)
        code = subprocess.run([tool, "--dump-sass", str(file)], capture_output=True, text=True, check=True)
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage.stdout[:200]!r}")
    return int(registers.group(1)), code.stdout
