# SPDX-License-Identifier: Apache-2.0
"""Which tile shape serves a call on a device: the row of the tables in `config_tables.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch

from .config_tables import (
    BACKWARD_CONFIGS,
    BACKWARD_FASTER_CONFIGS,
    CONFIGS,
    DECODE_CONFIGS,
    SERVES,
    SHARED_MEMORY,
    WITHOUT_E4M3,
    BackwardConfig,
    DecodeConfig,
    Extra,
    ForwardConfig,
    Pass,
    Rows,
    Work,
)
from .tuned import tuned_rows

Shape = TypeVar("Shape", ForwardConfig, DecodeConfig)

SHORT = 16
"""Up to how many query rows count as few."""

WIDEST, PIECE = 512, 128
"""The widest head that the tables have rows for, and how many columns of a wider one are multiplied at a time."""


def forward_config(
    architecture: str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    query_len: int,
    *,
    has_tiles: bool,
    has_dropout: bool,
    device: torch.device | None = None,
) -> ForwardConfig:
    """The tile shape for a call. `has_tiles`: whether it reads tiles of a mask or a bias, as `needs_tiles` says.

    With `device`, what was measured on it goes before the tables.
    """
    widest = widest_row(head_dim, value_dim)
    work: Work = "dropout" if has_dropout else "tiles" if has_tiles else "spans"
    work = "short" if query_len <= SHORT else work
    own: Any = device and tuned_rows(device).get(("forward", dtype.itemsize, widest, work))
    config: ForwardConfig = own or CONFIGS[architecture][dtype.itemsize, widest, work]
    if head_dim > WIDEST and not config.chunk_d:
        return config._replace(chunk_d=PIECE)
    return whole_if_narrow(config, head_dim)


def needs_tiles(*, mask: bool, bias: bool, hidden_keys: bool, softcap: bool) -> bool:
    """Whether a forward pass that has these needs the row with room for tiles of a mask and of a bias.

    Rows for spans have room for hidden keys or a softcap, but not for both.
    """
    return mask or bias or (hidden_keys and softcap)


def backward_config(
    architecture: str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    kernel: Pass,
    extras: frozenset[Extra] = frozenset(),
    device: torch.device | None = None,
) -> BackwardConfig:
    """The tile shape for a backward kernel of a call that has `extras`.

    With `device`, what was measured on it goes before the tables, for calls with spans alone.
    """
    key = (dtype.itemsize, widest_row(head_dim, value_dim), kernel)
    own: Any = None if device is None or extras else tuned_rows(device).get(("backward", *key))
    if own is not None:
        return own
    faster = BACKWARD_FASTER_CONFIGS.get(architecture, {}).get(key, ())
    every = BACKWARD_CONFIGS[architecture][key]
    return next((row.config for row in faster if extras <= SERVES[row.serves]), every)


def decode_config(
    architecture: str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    rows: int,
    device: torch.device | None = None,
    *,
    in_pages: bool = False,
) -> DecodeConfig:
    """The tile shape for queries of `dtype` of which a group of heads has `rows` (query tokens times group size)."""
    widest = widest_row(head_dim, value_dim)
    kind: Rows = "few" if rows <= SHORT else "many"
    if in_pages:
        kind = "few pages" if kind == "few" else "many pages"
    own: Any = device and tuned_rows(device).get(("decode", dtype.itemsize, widest, kind))
    return whole_if_narrow(own or DECODE_CONFIGS[architecture][dtype.itemsize, widest, kind], head_dim)


def whole_if_narrow(config: Shape, head_dim: int) -> Shape:
    """The tile shape, without pieces where a head is no wider than one: it is multiplied whole."""
    return config._replace(chunk_d=0) if config.chunk_d >= padded_dim(head_dim) else config


def widest_row(head_dim: int, value_dim: int) -> int:
    """The row of the tables that serves a pair of head dims. Heads beyond 512 are multiplied in pieces."""
    return min(WIDEST, max(64, padded_dim(head_dim), padded_dim(value_dim)))


def processors(device: torch.device) -> int:
    """Multiprocessors of a device, which run at least one program each; for the interpreter 8 are assumed."""
    assumed = _assumed[-1][1] if _assumed else None
    return assumed or _processors(device)


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@lru_cache
def last_cache(device: torch.device) -> int:
    """Bytes that should stay in a device's last cache, two thirds of it; the interpreter gets about a Hopper's."""
    return torch.cuda.get_device_properties(device).L2_cache_size * 2 // 3 if device.type == "cuda" else 32 << 20


def choose_splits(programs: int, key_len: int, block_n: int, device: torch.device) -> int:
    """In how many parts to split the keys, so that `programs` times as many fill the device.

    From shapes alone, without looking at lengths on the device. At most 128, and a part has room for at least four
    tiles of keys, since merging takes time as well.
    """
    wanted = -(-2 * processors(device) // max(1, programs))
    return max(1, min(wanted, key_len // (4 * block_n), 128))


def padded_dim(dim: int) -> int:
    """Tile width that holds `dim` columns: a power of two, and at least the 16 that a matrix instruction takes."""
    return max(16, 1 << (dim - 1).bit_length())


_assumed: list[tuple[str, int | None]] = []


@contextmanager
def assuming(name: str, processors: int | None = None) -> Iterator[None]:
    """Take every device for a GPU of an architecture while this holds, to compile for one that is not there.

    Args:
        name: such as "sm_90".
        processors: how many multiprocessors to assume; None for those of the device.

    Not safe with several threads.
    """
    _assumed.append((name, processors))
    try:
        yield
    finally:
        _assumed.pop()


def architecture(device: torch.device) -> str:
    """The architecture whose configurations serve a device; CPU tensors run kernels in the interpreter only."""
    return _assumed[-1][0] if _assumed else _architecture(device)


@lru_cache
def _architecture(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    # Siblings share shared memory and matrix instructions.
    siblings = {"sm_87": "sm_80", "sm_101": "sm_100", "sm_103": "sm_100", "sm_121": "sm_120"}
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
    """Why a GPU that the kernels run on has not a dtype, in words for its user, or None if it has."""
    if dtype != torch.float8_e4m3fn or architecture(device) not in WITHOUT_E4M3:
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else architecture(device)
    return f"the GPU {name!r} has no float8_e4m3fn (compute capability 8.9 has); keep the cache in float8_e5m2 or int8"
