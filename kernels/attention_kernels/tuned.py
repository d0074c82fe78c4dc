# SPDX-License-Identifier: Apache-2.0
"""Tile shapes measured on the user's own GPU by `my-triton tune`, which take the place of rows of the tables.

A file per device lies in the user's cache directory. Its name has a hash of the kernels' sources, of Triton's version
and of the device's name, so that a file of other kernels is never read. It is read once, when a device is first used; a
call costs one look into a dictionary. Nothing is ever measured within a call.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .config_tables import (
    BACKWARD_CONFIGS,
    CONFIGS,
    DECODE_CONFIGS,
    GLUON_CONFIGS,
    MOST_ROWS,
    BackwardConfig,
    DecodeConfig,
    ForwardConfig,
)

Key = tuple[str, int, int, str]
"""Pass ("forward", "backward", "decode"), bytes per element, widest head, and the row's own name, as in the tables.
Where there is a row for "gluon", that kernel serves the forward pass, with its built-in shape."""

Config = ForwardConfig | BackwardConfig | DecodeConfig

CLASSES: dict[str, Any] = {
    "forward": ForwardConfig,
    "gluon": ForwardConfig,
    "backward": BackwardConfig,
    "decode": DecodeConfig,
}
KEYS = {
    (part, *key)
    for part, table in (("forward", CONFIGS), ("backward", BACKWARD_CONFIGS), ("decode", DECODE_CONFIGS))
    for key in table["interpreter"]
} | {("gluon", 2, dim, "spans") for table in GLUON_CONFIGS.values() for dim in table}
"""Of all rows: every architecture has the same, but for those of "gluon"."""

NUMBERS = {
    "block_m": (16, MOST_ROWS),
    "block_n": (16, MOST_ROWS),
    "num_warps": (1, 32),
    "num_stages": (1, 8),
    "chunk_d": (16, 1024),
    "piece_d": (16, 1024),
}
"""The least and the most of a shape's numbers: what matrix instructions take, what a program may have. Pieces may also
be 0, which is all."""

FLAGS = ("overlap", "descriptors")
SOURCES = (
    "tiles", "forward", "backward", "backward_kernels", "decode", "launch", "config_tables", "hopper/gluon_forward",
    "hopper/launching",
)  # fmt: skip
"""Modules whose change makes measured shapes worthless."""

_rows: dict[torch.device, Mapping[Key, Config]] = {}
_log = logging.getLogger(__name__)


def gluon_key(dtype: torch.dtype, head_dim: int) -> Key:
    """The row that says that the Gluon kernel serves the forward pass of a head dim."""
    return "gluon", dtype.itemsize, head_dim, "spans"


def tuned_rows(device: torch.device) -> Mapping[Key, Config]:
    """What was measured for a device; empty where nothing was."""
    try:
        return _rows[device]
    except KeyError:
        rows = _rows[device] = _rows_in_file(device)
        return rows


def _rows_in_file(device: torch.device) -> Mapping[Key, Config]:
    try:
        file = tuned_file(device_name(device))
    except ImportError as error:
        _log.warning(
            "attention: where `my-triton tune` leaves what it measures is not known (%s), so the built-in tile shapes "
            "are used; pip install platformdirs", error,
        )  # fmt: skip
        return {}
    return read_rows(file)


def forget() -> None:
    """Read files anew when devices are used next."""
    _rows.clear()


def overriding(device: torch.device, key: Key, config: Config) -> AbstractContextManager[None]:
    """Use one tile shape while this holds, beside what was measured for other rows. Not for several threads."""
    return using(device, {**tuned_rows(device), key: config})


@contextmanager
def using(device: torch.device, rows: Mapping[Key, Config]) -> Iterator[None]:
    """Use these tile shapes and of other rows the built-in ones while this holds. Not for several threads."""
    from . import prebound  # which imports what imports this

    before = _rows.get(device)
    _rows[device] = rows
    prebound.forget()
    try:
        yield
    finally:
        del _rows[device]
        if before is not None:
            _rows[device] = before
        prebound.forget()


def read_rows(file: Path) -> Mapping[Key, Config]:
    """Rows of a file; none where there is no file, nor where it is damaged, which is logged."""
    try:
        return parse_rows(file.read_text())
    except FileNotFoundError:
        return {}
    except Exception as error:  # whatever it holds, calls go on
        _log.warning(
            "attention: %s holds no tile shapes that can be read (%s: %s), so the built-in ones are used; delete it, "
            "or run `my-triton tune --clear`",
            file, type(error).__name__, error,
        )  # fmt: skip
        return {}


def parse_rows(text: str) -> Mapping[Key, Config]:
    """Rows of a file's text.

    Raises:
        Exception: it is none; of many kinds, such as RecursionError where brackets are nested too deeply.
    """
    return dict(map(parse_row, json.loads(text)["rows"]))


def parse_row(row: Mapping[str, Any]) -> tuple[Key, Config]:
    """One row of a file."""
    name, size, dim, kind = key = tuple(row["key"])
    if key not in KEYS:
        raise ValueError(f"{row['key']} is no row of the tables")
    numbers = {each: row["config"][each] for each in NUMBERS if each in CLASSES[name]._fields}
    for each, number in numbers.items():
        least, most = NUMBERS[each]
        is_whole = each in ("chunk_d", "piece_d") and number == 0
        if type(number) is not int or not (is_whole or least <= number <= most):
            raise ValueError(f"{each} of {row['key']} must be {least} to {most}, got {number!r}")
        if each != "num_stages" and number & (number - 1):
            raise ValueError(f"{each} of {row['key']} must be a power of two, got {number}")
    flags = {each: row["config"][each] for each in FLAGS if each in CLASSES[name]._fields}
    for each, flag in flags.items():
        if type(flag) is not bool:
            raise ValueError(f"{each} of {row['key']} must be true or false, got {flag!r}")
    config = CLASSES[name](**numbers, **flags, reason="measured on this device")
    return (name, int(size), int(dim), kind), config


def tuned_file(name: str) -> Path:
    """Where the shapes for a device lie, by its name."""
    version = hashlib.sha256(f"{sources_hash()} {_triton_version()} {name}".encode()).hexdigest()[:16]
    return folder() / f"{file_stem(name)}-{version}.json"


def file_stem(name: str) -> str:
    """A device's name as the beginning of a file's name, of whatever version."""
    return "tuned-" + re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def folder() -> Path:
    """The folder of all files."""
    from platformdirs import user_cache_path  # when it is needed: an import takes time

    return user_cache_path("my-triton-attention", appauthor=False)


def device_name(device: torch.device) -> str:
    """The name by which a device's file is known; "interpreter" for a CPU, on which kernels run in no other way."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@lru_cache
def sources_hash() -> str:
    """Of the kernels' sources."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in SOURCES)).hexdigest()


def _triton_version() -> str:
    import triton

    return triton.__version__
