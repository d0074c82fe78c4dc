# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for GPUs that are not there, and read registers, spills and shared memory from the machine code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel. `spills` counts local-memory instructions; None where no tool tells."""

    shared_memory: int
    registers: int | None
    spills: int | None


class AbsentDevice:
    """The part of a Triton driver that compiling needs: what to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # The key of Triton's in-memory cache of compiled kernels: one device per target.
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
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


def compile_ahead(kernel: triton.runtime.jit.JITFunction, architecture: str, arguments: dict) -> Compiled:
    """Compile `kernel` exactly as a launch with `arguments` on `architecture` would."""
    with absent_device(architecture):
        compiled = kernel.warmup(grid=(1,), **arguments)
    if "cubin" in compiled.asm:
        registers, spills = cubin_usage(compiled.asm["cubin"])
        return Compiled(compiled.metadata.shared, registers, spills)
    assembly = compiled.asm["amdgcn"]
    spilled = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly))
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", assembly))
    return Compiled(compiled.metadata.shared, registers, spilled)


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and the number of local-memory instructions of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
        code = subprocess.run([tool, "--dump-sass", file], capture_output=True, text=True, check=True)
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    assert registers is not None, "cuobjdump printed no register count"
    return int(registers.group(1)), len(re.findall(r"\b(?:STL|LDL)\b", code.stdout))
