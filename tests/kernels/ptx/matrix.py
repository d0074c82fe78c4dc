# SPDX-License-Identifier: Apache-2.0
"""Matrix instructions, as the PTX manual lays their operands out over registers and shared memory."""

from __future__ import annotations

import numpy as np

from .arithmetic import bfloat16_to_float, halves, joined
from .memory import SharedMemory, swizzled

LANES = np.arange(32)
ROW, PAIR = LANES // 4, LANES % 4

SPANS = {0: 0, 1: 128, 2: 64, 3: 32}
"""Bytes that are swizzled, by what `wgmma`'s descriptors say."""


def numbers(bits, kind: str) -> np.ndarray:
    """float32 of 16 bits."""
    return bfloat16_to_float(bits) if kind == "bf16" else np.asarray(bits).view(np.float16).astype(np.float32)


def load_matrix(shared: SharedMemory, addresses, count: int, transposed: bool) -> list[np.ndarray]:
    """`ldmatrix`: 8 x 8 matrices of 16 bits, of each whose rows 8 lanes have the addresses."""
    results = []
    for each in range(count):
        rows = addresses[:, 8 * each : 8 * each + 8].astype(np.uint32)
        words = shared.read(rows.reshape(-1), 2, 8)
        matrix = np.stack(words, -1).reshape(*rows.shape, 8)
        if transposed:
            matrix = matrix.swapaxes(1, 2)
        results.append(joined(matrix[:, ROW, 2 * PAIR], matrix[:, ROW, 2 * PAIR + 1]).reshape(-1))
    return results


def store_matrix(shared: SharedMemory, addresses, values, transposed: bool, warps) -> None:
    """`stmatrix`: the other way."""
    for each, value in enumerate(values):
        low, high = (half.reshape(len(warps), 32) for half in halves(value))
        matrix = np.empty((len(warps), 8, 8), np.uint16)
        matrix[:, ROW, 2 * PAIR], matrix[:, ROW, 2 * PAIR + 1] = low, high
        if transposed:
            matrix = matrix.swapaxes(1, 2)
        rows = addresses[:, 8 * each : 8 * each + 8].astype(np.uint32).reshape(-1)
        columns = [np.ascontiguousarray(matrix[:, :, column]).reshape(-1) for column in range(8)]
        shared.write(rows, 2, columns, np.repeat(warps, 8))


def _rows_from(registers, kind: str) -> np.ndarray:
    """A of `m16n8k16` from four registers of each lane: `[warps, 16, 16]`."""
    result = np.empty((len(registers[0]) // 32, 16, 16), np.float32)
    for each, register in enumerate(registers):
        low, high = (numbers(half, kind).reshape(-1, 32) for half in halves(register))
        rows, columns = ROW + 8 * (each % 2), 2 * PAIR + 8 * (each // 2)
        result[:, rows, columns], result[:, rows, columns + 1] = low, high
    return result


def multiply(shape: str, kind: str, a, b, c) -> list[np.ndarray]:
    """`mma.sync`: A is `[16, 16]`, B `[16, 8]`, the sums `[16, 8]`."""
    assert shape == "m16n8k16" and kind in ("bf16", "f16"), (shape, kind)
    rows = _rows_from(a, kind)
    columns = np.empty((len(rows), 16, 8), np.float32)
    for each, register in enumerate(b):
        low, high = (numbers(half, kind).reshape(-1, 32) for half in halves(register))
        columns[:, 2 * PAIR + 8 * each, ROW], columns[:, 2 * PAIR + 8 * each + 1, ROW] = low, high
    product = rows @ columns
    results = []
    for each, register in enumerate(c):
        part = product[:, ROW + 8 * (each // 2), 2 * PAIR + each % 2]
        results.append((part.reshape(-1) + register.view(np.float32)).view(np.uint32))
    return results


def _places(descriptor: int, span: int, extent: int, transposed: int) -> np.ndarray:
    """Shared addresses `[extent, 16]` of an operand of which an instruction takes 16 terms.

    PTX ISA, "Matrix-descriptor format" and the canonical layouts of CUTLASS' `mma_sm90_desc.hpp`.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    assert descriptor >> 49 & 7 == 0, "base offset"
    outer, inner = np.arange(extent)[:, None], np.arange(16)[None, :]
    if not transposed:
        if span:
            places = outer // 8 * stride + outer % 8 * span + 2 * inner
        else:
            places = outer // 8 * stride + inner // 8 * leading + outer % 8 * 16 + inner % 8 * 2
    else:
        assert span, "without a swizzle"
        across = span // 2
        places = outer % across * 2 + outer // across * leading + inner % 8 * span + inner // 8 * stride
    return swizzled(start + places, span)


def from_shared(
    shared: SharedMemory, descriptor: int, span: int, extent: int, transposed: int, kind: str
) -> np.ndarray:
    """An operand `[extent, 16]`, swizzled by `span` bytes."""
    return numbers(shared.read_as_hardware(_places(descriptor, span, extent, transposed)), kind)


def _from_hopper(shared: SharedMemory, descriptor: int, extent: int, transposed: int, kind: str) -> np.ndarray:
    return from_shared(shared, descriptor, SPANS[descriptor >> 62], extent, transposed, kind)


def multiply_from_shared(
    shared: SharedMemory, threads, columns: int, kind: str, a, b, accumulators, adds, transposed
) -> list[np.ndarray]:
    """`wgmma`: `[64, 16]` of registers or shared memory times `[16, columns]` of shared memory, for each warp group."""
    assert len(threads) % 128 == 0 and (threads[::128] % 128 == 0).all(), "threads of a warp group are elsewhere"
    results = [each.copy() for each in accumulators]
    for first in range(0, len(threads), 128):
        here = slice(first, first + 128)
        right = _from_hopper(shared, int(b[first]), columns, transposed[1], kind).T
        if isinstance(a, list):
            left = _rows_from([each[here] for each in a], kind).reshape(64, 16)
        else:
            left = _from_hopper(shared, int(a[first]), 64, transposed[0], kind)
        product = left @ right
        for each, result in enumerate(results):
            rows = np.repeat(np.arange(4) * 16, 32) + np.tile(ROW, 4) + 8 * (each % 4 // 2)
            part = product[rows, 8 * (each // 4) + 2 * np.tile(PAIR, 4) + each % 2]
            before = np.where(adds[here], result[here].view(np.float32), np.float32(0))
            result[here] = (before + part).view(np.uint32)
    return results
