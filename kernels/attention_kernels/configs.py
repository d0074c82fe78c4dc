# SPDX-License-Identifier: Apache-2.0
"""Tile shapes of the kernels, as data, and what each GPU has room for.

Every row compiles without register spills on NVIDIA GPUs (a test compiles them all); none has been timed on a GPU yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch

Work = Literal["spans", "tiles", "short"]
"""What a call needs: spans alone; tiles of a mask, a bias or a softcap besides; or few query rows, with either."""


class ForwardConfig(NamedTuple):
    """Tile shape of the forward kernel.

    `chunk_d` is how many columns of a head are multiplied at a time; 0 means all.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    chunk_d: int = 0


Pass = Literal["query", "key_value", "bias", "statistics"]
"""The kernels of the backward pass that have tile shapes of their own."""


class BackwardConfig(NamedTuple):
    """Tile shape of a backward kernel.

    `chunk_d` is as in `ForwardConfig`. `piece_d` is how many columns of a gradient one program computes; 0 means all.
    A wide gradient would fill the registers, so its columns are shared between programs, each of which recomputes the
    weights.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    chunk_d: int = 0
    piece_d: int = 0


SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
"""Bytes of shared memory that one program may use (CUDA C++ Programming Guide, compute capabilities; CDNA3 ISA)."""

_ANYWHERE: dict[tuple[int, int, Work], ForwardConfig] = {
    # (bytes per element, widest head, work). These fit the smallest shared memory of all, 64 KB.
    (2, 64, "spans"): ForwardConfig(64, 32, 4, 2),
    (2, 64, "tiles"): ForwardConfig(64, 32, 4, 2),
    (2, 64, "short"): ForwardConfig(16, 64, 4, 2),
    (2, 128, "spans"): ForwardConfig(64, 32, 4, 2),
    (2, 128, "tiles"): ForwardConfig(64, 32, 4, 2),
    (2, 128, "short"): ForwardConfig(16, 64, 4, 2),
    (2, 256, "spans"): ForwardConfig(64, 32, 8, 1),
    (2, 256, "tiles"): ForwardConfig(64, 32, 8, 1),
    (2, 256, "short"): ForwardConfig(16, 32, 4, 2),
    # 512 columns of queries and keys together would fill the shared memory: they are multiplied in pieces.
    (2, 512, "spans"): ForwardConfig(64, 16, 8, 2, 64),
    (2, 512, "tiles"): ForwardConfig(64, 16, 8, 2, 64),
    (2, 512, "short"): ForwardConfig(16, 16, 8, 1, 64),
    # Exact float32 products run on the ordinary units, which hold their operands in registers: small tiles, in pieces.
    (4, 64, "spans"): ForwardConfig(32, 32, 4, 1, 32),
    (4, 64, "tiles"): ForwardConfig(32, 32, 4, 1, 32),
    (4, 64, "short"): ForwardConfig(16, 32, 4, 1, 32),
    (4, 128, "spans"): ForwardConfig(32, 32, 8, 1, 32),
    (4, 128, "tiles"): ForwardConfig(32, 32, 8, 1, 32),
    (4, 128, "short"): ForwardConfig(16, 32, 4, 1, 32),
    (4, 256, "spans"): ForwardConfig(32, 32, 8, 1, 32),
    (4, 256, "tiles"): ForwardConfig(32, 32, 8, 1, 32),
    (4, 256, "short"): ForwardConfig(16, 32, 8, 1, 32),
    (4, 512, "spans"): ForwardConfig(16, 16, 8, 1, 64),
    (4, 512, "tiles"): ForwardConfig(16, 16, 8, 1, 64),
    (4, 512, "short"): ForwardConfig(16, 16, 8, 1, 64),
}

_HOPPER: dict[tuple[int, int, Work], ForwardConfig] = {
    # Matrix instructions of a warp group take 64 rows: 8 warps for 128. Room for deep pipelines.
    (2, 64, "spans"): ForwardConfig(128, 128, 8, 2),
    (2, 64, "tiles"): ForwardConfig(128, 32, 8, 2),
    (2, 128, "spans"): ForwardConfig(128, 64, 8, 3),
    (2, 128, "tiles"): ForwardConfig(128, 32, 8, 2),
    # 128 rows would leave no registers to write down what rounding the output took.
    (2, 256, "spans"): ForwardConfig(64, 64, 8, 2),
    (2, 256, "tiles"): ForwardConfig(64, 16, 8, 2),
    (2, 256, "short"): ForwardConfig(16, 32, 4, 3),
}

_AMPERE: dict[tuple[int, int, Work], ForwardConfig] = {
    # Operands pass through registers on their way to the matrix units, so tiles are narrower than on Hopper.
    (2, 64, "spans"): ForwardConfig(128, 64, 8, 3),
    (2, 128, "spans"): ForwardConfig(128, 64, 8, 3),
    (2, 128, "tiles"): ForwardConfig(128, 32, 8, 3),
    (2, 256, "spans"): ForwardConfig(64, 32, 8, 2),
    (4, 64, "spans"): ForwardConfig(64, 32, 8, 2),
    (4, 64, "tiles"): ForwardConfig(64, 32, 8, 2),
}

_CONSUMER: dict[tuple[int, int, Work], ForwardConfig] = {
    # As Ampere, with shallower pipelines for 99 KB of shared memory.
    (2, 64, "spans"): ForwardConfig(128, 64, 8, 2),
    (2, 128, "spans"): ForwardConfig(128, 32, 8, 2),
    (2, 256, "spans"): ForwardConfig(64, 32, 8, 2),
    (2, 256, "tiles"): ForwardConfig(64, 32, 8, 2),
}

_CDNA: dict[tuple[int, int, Work], ForwardConfig] = {
    # Triton 3.6 cannot compile the pipelined loop over so small a tile for this target.
    (2, 64, "short"): ForwardConfig(16, 32, 4, 1),
    (2, 128, "short"): ForwardConfig(16, 32, 4, 1),
}

_INTERPRETED: dict[tuple[int, int, Work], ForwardConfig] = {
    # Triton's interpreter pays for each operation, whatever its size. Pieces are kept where the chips have them.
    (size, dim, work): ForwardConfig(16 if work == "short" else 64, 64, 1, 1, 0 if dim <= 128 else 64)
    for size in (2, 4) for dim in (64, 128, 256, 512) for work in get_args(Work)
}  # fmt: skip

CONFIGS: dict[str, dict[tuple[int, int, Work], ForwardConfig]] = {
    "sm_80": _ANYWHERE | _AMPERE,
    "sm_86": _ANYWHERE | _CONSUMER,
    "sm_90": _ANYWHERE | _HOPPER,
    "sm_100": _ANYWHERE | _HOPPER,
    "sm_120": _ANYWHERE | _CONSUMER,
    "gfx942": _ANYWHERE | _CDNA,
    "interpreter": _INTERPRETED,
}
"""Every configuration that ships, by architecture and by (bytes per element, widest head, work)."""

SHORT = 16
"""Query rows that count as few."""


def forward_config(
    architecture: str, dtype: torch.dtype, head_dim: int, value_dim: int, query_len: int, *, has_tiles: bool
) -> ForwardConfig:
    """The tile shape for a call. `has_tiles`: whether it has a mask, a bias or a softcap besides its spans."""
    widest = widest_row(head_dim, value_dim)
    work: Work = "short" if query_len <= SHORT else "tiles" if has_tiles else "spans"
    config = CONFIGS[architecture][dtype.itemsize, widest, work]
    # A head narrower than a piece is multiplied whole.
    return config._replace(chunk_d=0) if config.chunk_d >= padded_dim(head_dim) else config


_BACKWARD_ANYWHERE: dict[tuple[int, int, Pass], BackwardConfig] = {
    # (bytes per element, widest head, kernel). These fit the smallest shared memory of all, and every extra there is.
    (2, 64, "query"): BackwardConfig(32, 32, 4, 2),
    (2, 64, "key_value"): BackwardConfig(32, 32, 4, 2),
    (2, 64, "bias"): BackwardConfig(32, 64, 4, 1),
    (2, 64, "statistics"): BackwardConfig(32, 64, 4, 1),
    (2, 128, "query"): BackwardConfig(32, 32, 4, 2),
    (2, 128, "key_value"): BackwardConfig(32, 32, 4, 1, 0, 64),
    (2, 128, "bias"): BackwardConfig(32, 64, 4, 1),
    (2, 128, "statistics"): BackwardConfig(32, 64, 4, 1),
    # From here on operands would fill the shared memory and gradients the registers: products and results in pieces.
    (2, 256, "query"): BackwardConfig(32, 32, 8, 1, 64, 128),
    (2, 256, "key_value"): BackwardConfig(32, 32, 8, 1, 64, 128),
    (2, 256, "bias"): BackwardConfig(32, 32, 4, 1, 64),
    (2, 256, "statistics"): BackwardConfig(32, 32, 8, 1, 64),
    (2, 512, "query"): BackwardConfig(32, 32, 8, 1, 64, 128),
    (2, 512, "key_value"): BackwardConfig(32, 32, 8, 1, 64, 64),
    (2, 512, "bias"): BackwardConfig(32, 32, 4, 1, 64),
    (2, 512, "statistics"): BackwardConfig(32, 32, 8, 1, 64),
    # Exact float32 products hold their operands in registers.
    **{
        (4, dim, kernel): BackwardConfig(32, 32, 8, 1, 32, 64)
        for dim in (64, 128, 256, 512) for kernel in get_args(Pass)
    },
}  # fmt: skip

_BACKWARD_HOPPER: dict[tuple[int, int, Pass], BackwardConfig] = {
    (2, 64, "query"): BackwardConfig(32, 64, 8, 2),
    (2, 64, "key_value"): BackwardConfig(32, 64, 8, 2),
    (2, 64, "bias"): BackwardConfig(64, 64, 8, 1),
    (2, 128, "query"): BackwardConfig(32, 64, 8, 2),
    (2, 128, "key_value"): BackwardConfig(32, 32, 8, 2),
    (2, 128, "bias"): BackwardConfig(64, 64, 8, 1),
    (2, 256, "query"): BackwardConfig(32, 32, 8, 2),
    (2, 256, "key_value"): BackwardConfig(32, 32, 8, 2),
    (2, 128, "statistics"): BackwardConfig(64, 64, 8, 1),
    (2, 256, "statistics"): BackwardConfig(64, 32, 8, 1, 64),
    (2, 512, "key_value"): BackwardConfig(32, 64, 8, 1, 64, 64),
    (2, 512, "statistics"): BackwardConfig(64, 32, 8, 1, 64),
}

BACKWARD_CONFIGS: dict[str, dict[tuple[int, int, Pass], BackwardConfig]] = {
    "sm_80": _BACKWARD_ANYWHERE,
    "sm_86": _BACKWARD_ANYWHERE,
    "sm_90": _BACKWARD_ANYWHERE | _BACKWARD_HOPPER,
    "sm_100": _BACKWARD_ANYWHERE | _BACKWARD_HOPPER,
    "sm_120": _BACKWARD_ANYWHERE,
    "gfx942": _BACKWARD_ANYWHERE,
    "interpreter": {
        (size, dim, kernel): BackwardConfig(64, 64, 1, 1, *((0, 0) if dim <= 128 else (64, 128)))
        for size in (2, 4)
        for dim in (64, 128, 256, 512)
        for kernel in get_args(Pass)
    },
}
"""Every backward configuration that serves any call, by architecture."""

_BACKWARD_HOPPER_SPANS: dict[tuple[int, int, Pass], BackwardConfig] = {
    # Without masks, bias, softcap and dropout there is room for whole warp groups.
    (2, 64, "query"): BackwardConfig(128, 64, 8, 2),
    (2, 64, "key_value"): BackwardConfig(64, 128, 8, 2),
    (2, 128, "query"): BackwardConfig(128, 64, 8, 2),
    (2, 128, "key_value"): BackwardConfig(32, 128, 8, 2),
    (2, 256, "query"): BackwardConfig(64, 32, 8, 2),
}

BACKWARD_SPANS_CONFIGS: dict[str, dict[tuple[int, int, Pass], BackwardConfig]] = {
    "sm_90": _BACKWARD_HOPPER_SPANS,
    "sm_100": _BACKWARD_HOPPER_SPANS,
}
"""Faster ones for calls with spans alone, where there are such."""


def backward_config(
    architecture: str, dtype: torch.dtype, head_dim: int, value_dim: int, kernel: Pass, *, has_tiles: bool
) -> BackwardConfig:
    """The tile shape for a backward kernel; `has_tiles` as for `forward_config`, dropout included."""
    key = (dtype.itemsize, widest_row(head_dim, value_dim), kernel)
    spans_configs = {} if has_tiles else BACKWARD_SPANS_CONFIGS.get(architecture, {})
    return spans_configs.get(key) or BACKWARD_CONFIGS[architecture][key]


class DecodeConfig(NamedTuple):
    """Tile shape of the kernel for caches; as `ForwardConfig`, of rows that are queries of all heads of a group."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    chunk_d: int = 0


_DECODE_ANYWHERE: dict[tuple[int, int, Literal["few", "many"]], DecodeConfig] = {
    # (bytes per element of the queries, widest head, rows). Few rows wait for memory: deep pipelines, narrow tiles.
    (2, 64, "few"): DecodeConfig(16, 64, 4, 2),
    (2, 128, "few"): DecodeConfig(16, 32, 4, 2),
    (2, 256, "few"): DecodeConfig(16, 32, 4, 1),
    (2, 512, "few"): DecodeConfig(16, 16, 8, 1, 64),
    (2, 64, "many"): DecodeConfig(64, 32, 4, 1),
    (2, 128, "many"): DecodeConfig(64, 32, 8, 1),
    (2, 256, "many"): DecodeConfig(32, 32, 8, 1),
    (2, 512, "many"): DecodeConfig(32, 16, 8, 1, 64),
    **{
        (4, dim, rows): DecodeConfig(16, 32 if dim == 64 else 16, 8, 1, 32)
        for dim in (64, 128, 256, 512)
        for rows in ("few", "many")
    },
}

_DECODE_HOPPER: dict[tuple[int, int, Literal["few", "many"]], DecodeConfig] = {
    (2, 64, "few"): DecodeConfig(16, 64, 4, 3),
    (2, 128, "few"): DecodeConfig(16, 32, 4, 3),
    (2, 256, "few"): DecodeConfig(16, 32, 8, 2),
}

_DECODE_INTERPRETED: dict[tuple[int, int, Literal["few", "many"]], DecodeConfig] = {
    (size, dim, rows): DecodeConfig(16 if rows == "few" else 64, 32, 1, 1, 0 if dim <= 128 else 64)
    for size in (2, 4)
    for dim in (64, 128, 256, 512)
    for rows in ("few", "many")
}

DECODE_CONFIGS: dict[str, dict[tuple[int, int, Literal["few", "many"]], DecodeConfig]] = {
    "sm_80": _DECODE_ANYWHERE,
    "sm_86": _DECODE_ANYWHERE,
    "sm_90": _DECODE_ANYWHERE | _DECODE_HOPPER,
    "sm_100": _DECODE_ANYWHERE | _DECODE_HOPPER,
    "sm_120": _DECODE_ANYWHERE,
    "gfx942": _DECODE_ANYWHERE,
    "interpreter": _DECODE_INTERPRETED,
}
"""Configurations of the kernel for caches, by architecture."""


def decode_config(architecture: str, dtype: torch.dtype, head_dim: int, value_dim: int, rows: int) -> DecodeConfig:
    """The tile shape for queries of `dtype` of which a group of heads has `rows` (query tokens times group size)."""
    widest = widest_row(head_dim, value_dim)
    config = DECODE_CONFIGS[architecture][dtype.itemsize, widest, "few" if rows <= SHORT else "many"]
    return config._replace(chunk_d=0) if config.chunk_d >= padded_dim(head_dim) else config


def widest_row(head_dim: int, value_dim: int) -> int:
    """The row of the tables that serves a pair of head dims. Heads beyond 512 are multiplied in the same pieces."""
    return min(512, max(64, padded_dim(head_dim), padded_dim(value_dim)))


@lru_cache
def processors(device: torch.device) -> int:
    """How many programs a device runs at a time, at least; the interpreter pretends to have a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def choose_splits(programs: int, key_len: int, block_n: int, device: torch.device) -> int:
    """In how many parts to split the keys, so that `programs` become enough for the device.

    From shapes alone, without looking at lengths on the device. A part has four tiles at least: merging costs, too.
    """
    wanted = -(-2 * processors(device) // max(1, programs))
    return max(1, min(wanted, key_len // (4 * block_n), 64))


def padded_dim(dim: int) -> int:
    """Tile width that holds `dim` columns: a power of two, and at least the 16 that a matrix instruction takes."""
    return max(16, 1 << (dim - 1).bit_length())


@lru_cache
def architecture(device: torch.device) -> str:
    """The architecture whose configurations serve a device; CPU tensors run kernels in the interpreter only."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    # Siblings share shared memory and matrix instructions.
    siblings = {"sm_87": "sm_80", "sm_89": "sm_86", "sm_101": "sm_100", "sm_103": "sm_100", "sm_121": "sm_120"}
    return siblings.get(name, name)


def unsupported_device(device: torch.device) -> str | None:
    """Why the kernels do not run on a GPU, in words for its user, or None if they do."""
    name = architecture(device)
    if name in SHARED_MEMORY:
        return None
    return (
        f"attention: the GPU {torch.cuda.get_device_name(device)!r} ({name}) is not supported by the Triton kernels, "
        f'which run on {", ".join(SHARED_MEMORY)} and their siblings; use attn_implementation="sdpa", or CPU tensors'
    )


def unsupported_dtype(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a GPU that the kernels run on cannot read a dtype, in words for its user, or None if it can."""
    if dtype != torch.float8_e4m3fn or device.type != "cuda" or torch.version.hip:
        return None
    if torch.cuda.get_device_capability(device) >= (8, 9):
        return None
    return (
        f"the GPU {torch.cuda.get_device_name(device)!r} has no float8_e4m3fn (compute capability 8.9 has); keep the "
        "cache in float8_e5m2 or int8"
    )
