# SPDX-License-Identifier: Apache-2.0
"""What a multiprocessor of each chip has and how fast its pipes are, as published."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """A multiprocessor (AMD: compute unit).

    Attributes:
        card: the card whose matrix rate is given.
        shared_memory: bytes for all programs on it together.
        reserved: bytes of it that each program costs besides its own.
        threads, blocks: the most that are resident.
        matrix: floating-point operations per clock of dense bf16 products that are added up in float32.
        float32: additions, multiplications or fused multiply-adds per clock.
        simple: integer operations, comparisons, selections and packing conversions per clock.
        special: exponentials per clock.
    """

    card: str
    shared_memory: int
    reserved: int
    threads: int
    blocks: int
    matrix: int
    float32: int
    simple: int = 64
    special: int = 16


KB = 1024

CHIPS: dict[str, Chip] = {
    # Room and rates of ordinary instructions: CUDA C++ Programming Guide, "Compute Capabilities" and "Arithmetic
    # Instructions". Matrix rates: published dense bf16 TFLOP/s with float32 sums, divided by multiprocessors and boost
    # clock.
    "sm_80": Chip("A100 SXM: 312 TFLOP/s, 108 at 1.41 GHz", 164 * KB, KB, 2048, 32, 2048, 64),
    "sm_86": Chip("RTX 3090: 71 TFLOP/s, 82 at 1.70 GHz", 100 * KB, KB, 1536, 16, 512, 128),
    "sm_89": Chip("RTX 4090: 165 TFLOP/s, 128 at 2.52 GHz", 100 * KB, KB, 1536, 24, 512, 128),
    "sm_90": Chip("H100 SXM: 989 TFLOP/s, 132 at 1.83 GHz", 228 * KB, KB, 2048, 32, 4096, 128),
    "sm_100": Chip("B200: 2,250 TFLOP/s, 148 at 1.85 GHz", 228 * KB, KB, 2048, 32, 8192, 128),
    "sm_120": Chip("RTX 5090: 210 TFLOP/s, 170 at 2.41 GHz", 100 * KB, KB, 1536, 24, 512, 128),
    # CDNA3 instruction set and MI300X data sheet: 1,307 TFLOP/s, 304 compute units at 2.1 GHz.
    "gfx942": Chip("MI300X: 1,307 TFLOP/s, 304 at 2.1 GHz", 64 * KB, 0, 2048, 32, 2048, 128),
}

REGISTERS = 64 * KB
"""Registers of 32 bits of an NVIDIA multiprocessor; a warp takes them in portions of 256."""

SHARED_BYTES = 128
"""Bytes per clock that an NVIDIA multiprocessor reads from shared memory."""

ISSUE = 4
"""Instructions per clock that an NVIDIA multiprocessor issues, each for 32 threads."""


def resident(architecture: str, registers: int, threads: int, shared_memory: int) -> int:
    """How many programs a multiprocessor holds at a time; 0 if it cannot hold one."""
    chip = CHIPS[architecture]
    limits = [chip.blocks, chip.threads // threads]
    if shared_memory:
        limits.append(chip.shared_memory // (shared_memory + chip.reserved))
    if architecture.startswith("gfx"):
        # Four units of 512 registers per lane, in portions of 8, with 8 waves at most.
        waves = min(8, 512 // max(8, -(-registers // 8) * 8))
        limits.append(4 * waves * 64 // threads)
    else:
        per_warp = -(-registers * 32 // 256) * 256
        limits.append(REGISTERS // per_warp // (threads // 32))
    return min(limits)
