# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for GPUs that need not be there, and what their machine code says. Needs Triton."""

from .compiling import Compiled, absent_device, compile_ahead, gpu_target
from .machine_code import Loop, MachineCode, read_amd, read_cubin
from .shipped import Case, shipped_cases

__all__ = [
    "Case",
    "Compiled",
    "Loop",
    "MachineCode",
    "absent_device",
    "compile_ahead",
    "gpu_target",
    "read_amd",
    "read_cubin",
    "shipped_cases",
]
