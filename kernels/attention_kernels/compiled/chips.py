# SPDX-License-Identifier: Apache-2.0
"""Chips: what fits at a time, how fast each unit is, and what that says of a compiled loop.

An estimate of the loop alone, with operands at hand: what memory, the head and tail of a row, and the last wave cost is
not in it. It says which unit is the narrowest and how far from the matrix units' peak that keeps a kernel at best.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .ahead import Compiled
from .machine_code import OTHER, Loop


@dataclass(frozen=True)
class Chip:
    """Limits of one processor (SM or CU), and what it does in a cycle.

    Attributes:
        registers: 32-bit, of all threads at a time.
        shared_memory: bytes for all programs at a time.
        reserved: bytes of it that each program takes beside its own.
        threads: at a time.
        warp_size: threads of a warp.
        matrix_flops: 16-bit floating point operations with float32 sums, dense.
        exponentials, float32, integer: operations of a lane.
    """

    registers: int
    shared_memory: int
    reserved: int
    threads: int
    warp_size: int
    matrix_flops: int
    exponentials: int
    float32: int
    integer: int


CHIPS = {
    "sm_80": Chip(65536, 164 * 1024, 1024, 2048, 32, 2048, 16, 64, 64),
    "sm_86": Chip(65536, 100 * 1024, 1024, 1536, 32, 512, 16, 128, 64),
    "sm_89": Chip(65536, 100 * 1024, 1024, 1536, 32, 512, 16, 128, 64),
    "sm_90": Chip(65536, 228 * 1024, 1024, 2048, 32, 4096, 16, 128, 64),
    "sm_100": Chip(65536, 228 * 1024, 1024, 2048, 32, 8192, 16, 128, 64),
    "sm_120": Chip(65536, 100 * 1024, 1024, 1536, 32, 512, 16, 128, 64),
    "gfx942": Chip(131072, 64 * 1024, 0, 2048, 64, 2048, 16, 128, 64),
}
"""Limits: CUDA C++ Programming Guide, technical specifications by compute capability; AMD CDNA3 ISA. Operations in a
cycle: the same guide's table of arithmetic throughput; of matrix units, the peak of the white papers of A100, GA102,
AD102, H100, B200, RTX 5090 and MI300X divided by processors and clock."""

FULL_RATE = 4
"""Schedulers of a processor; each issues one instruction of a warp in a cycle."""


def programs_at_a_time(compiled: Compiled, chip: Chip) -> int:
    """How many programs one processor holds, by registers (in blocks of 8 a thread), shared memory and threads."""
    threads = compiled.warps * chip.warp_size
    registers = -(-max(compiled.registers, 1) // 8) * 8 * threads
    shared = compiled.shared_memory + chip.reserved
    return min(chip.registers // registers, chip.shared_memory // shared if shared else 32, chip.threads // threads, 32)


@dataclass(frozen=True)
class Estimate:
    """Cycles of one turn of the inner loop on one processor, by unit, for one program.

    Attributes:
        cycles: by unit: "matrix", "exponential", "float32", "integer and moves", "issue".
        narrowest: the unit that takes longest.
        overlapped: share of the matrix units' peak, were all units busy side by side.
        in_turn: the same, were products and all the rest to take turns.
    """

    cycles: dict[str, float]
    narrowest: str
    overlapped: float
    in_turn: float


def estimate(compiled: Compiled, loop: Loop, chip: Chip) -> Estimate | None:
    """What a loop's instructions cost; None for one without matrix instructions (exact float32)."""
    flops = sum(count * flops_of(name, chip) for name, count in loop.matrix_names().items())
    if not flops:
        return None
    lanes = compiled.warps * chip.warp_size
    counts = loop.counts
    # Each warp executes every instruction of the loop; a matrix instruction of a warp group is one of its four warps'.
    cycles = {
        "matrix": flops * compiled.warps / chip.matrix_flops,
        "exponential": counts.get("exponential", 0) * lanes / chip.exponentials,
        "float32": counts.get("float32", 0) * lanes / chip.float32,
        OTHER: counts.get(OTHER, 0) * lanes / chip.integer,
        "issue": sum(counts.values()) * compiled.warps / FULL_RATE,
    }
    rest = max(value for unit, value in cycles.items() if unit != "matrix")
    narrowest = max(cycles, key=lambda unit: cycles[unit])
    matrix = cycles["matrix"]
    return Estimate(cycles, narrowest, matrix / max(matrix, rest), matrix / (matrix + rest))


def flops_of(name: str, chip: Chip) -> float:
    """Floating point operations of a matrix instruction, for one warp; 0 for those whose shape is not in their name."""
    if (shape := re.match(r"HGMMA\.64x(\d+)x(\d+)", name)) is not None:
        return 2 * 64 * int(shape[1]) * int(shape[2]) / 4
    if name.startswith("HMMA.16816"):
        return 2 * 16 * 8 * 16
    if (shape := re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)", name)) is not None:
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3])
    return 0
