# SPDX-License-Identifier: Apache-2.0
"""How long the main loop keeps each pipe of a multiprocessor busy, and so what is the most that a kernel can reach.

An estimate from counted instructions and published rates. It knows nothing of latency, of memory beyond the
multiprocessor, of ends of loops and of masks: a bound, not a prediction of a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .chips import CHIPS, ISSUE, SHARED_BYTES
from .compiling import Compiled
from .machine_code import Loop
from .shipped import Case


@dataclass(frozen=True)
class Roofline:
    """One turn of the main loop of one program.

    Attributes:
        cycles: for which each pipe is busy.
        binding: the pipe that is busy longest.
        share_overlapped: share of the matrix units' peak, if everything else ran beside them.
        share_serial: the same, if matrix units and the other pipes took turns.
    """

    cycles: dict[str, float]
    binding: str
    share_overlapped: float
    share_serial: float


def roofline(case: Case, compiled: Compiled) -> Roofline | None:
    """The estimate for a row; None where the loop cannot be counted (AMD, products in pieces, no products)."""
    loop = compiled.code.loop
    if loop is None or loop.nested or not loop.matrix or case.config is None:
        return None
    chip, counts, threads = CHIPS[case.architecture], loop.counts, 32 * case.config.num_warps
    warps = threads // 32

    def cycles(kinds: tuple[str, ...], rate: int) -> float:
        return sum(counts.get(kind, 0) for kind in kinds) * threads / rate

    busy = {
        "matrix": loop_products(case, loop, warps) * 2 / chip.matrix,
        "exp": cycles(("special",), chip.special),
        "float": cycles(("float",), chip.float32),
        "simple": cycles(("integer", "compare", "convert"), chip.simple),
        "shared": (loop.shared_bytes * warps + (copied_bytes(case) if compiled.code.bulk_copies else 0)) / SHARED_BYTES,
        "issue": loop.instructions * warps / ISSUE,
    }
    others = max(length for pipe, length in busy.items() if pipe != "matrix")
    binding = max(busy, key=lambda pipe: busy[pipe])
    return Roofline(busy, binding, busy["matrix"] / max(busy.values()), busy["matrix"] / (busy["matrix"] + others))


def loop_products(case: Case, loop: Loop, warps: int) -> float:
    """Multiply-adds of one turn: from the instructions' shapes where their names tell them, else from the tile's."""
    total = 0.0
    for name, number in loop.matrix.items():
        shape = matrix_shape(name)
        if shape is None:
            return tile_products(case)
        # A warp group's instruction is counted once for each of its four warps.
        total += number * shape[0] * shape[1] * shape[2] * warps / (4 if name.startswith("HGMMA") else 1)
    return total


def tile_products(case: Case) -> float:
    """Multiply-adds of one tile of rows and keys: products over whole heads, and over pieces of gradients."""
    config, kernel = case.config, case.work.split()[0] if case.work else ""
    assert config is not None
    piece = min(getattr(config, "piece_d", 0) or case.dim, case.dim)
    columns = 2 * case.dim + (piece if kernel == "query" else 2 * piece if kernel == "key_value" else 0)
    return config.block_m * config.block_n * columns


def matrix_shape(name: str) -> tuple[int, int, int] | None:
    """Rows, columns and depth of a matrix instruction, where its name tells them."""
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        return int(match.group(1)), int(match.group(2)), int(match.group(3))
    if match := re.match(r"HMMA\.(16)(8)(8|16)\.", name):
        return int(match.group(1)), int(match.group(2)), int(match.group(3))
    return None


def copied_bytes(case: Case) -> int:
    """Bytes of the tiles of keys and values that a turn has copied into shared memory."""
    assert case.config is not None
    return case.config.block_n * 2 * case.dim * case.element_size
