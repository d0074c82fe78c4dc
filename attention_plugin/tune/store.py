# SPDX-License-Identifier: Apache-2.0
"""The files of measured tile shapes: written whole, under a lock, and merged with what others wrote meanwhile."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from attention_kernels import tuned


@dataclass(frozen=True)
class Measured:
    """The best shape for one row of the tables.

    Attributes:
        key, config: as in `attention_kernels.tuned`.
        microseconds: median time of a call with it.
        default_microseconds: the same with the built-in shape, measured first.
        complete: whether time sufficed for all candidates; not in the file.
    """

    key: tuned.Key
    config: tuned.Config
    microseconds: float
    default_microseconds: float
    complete: bool = True

    def as_json(self) -> dict[str, Any]:
        """As in the file."""
        names = (name for name in (*tuned.NUMBERS, *tuned.FLAGS) if hasattr(self.config, name))
        config = {name: getattr(self.config, name) for name in names}
        times = {"microseconds": self.microseconds, "default_microseconds": self.default_microseconds}
        return {"key": list(self.key), "config": config, **times}


def save(device: str, measured: Sequence[Measured], without: Collection[tuned.Key] = ()) -> Path:
    """Add rows to a device's file, in place of older ones of the same keys; returns the file.

    Older rows of the keys in `without` are left out.

    Several processes may do so at a time: each waits for the others, reads what they wrote and puts a whole new file in
    place of theirs. A damaged file is replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    file = tuned.tuned_file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        rows = {key: row for row in rows_in(file) if (key := tuple(row["key"])) not in without}
        rows |= {each.key: each.as_json() for each in measured}
        text = json.dumps({"device": device, "rows": [rows[key] for key in sorted(rows)]}, indent=1)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".tuned-")
        try:
            with os.fdopen(handle, "w") as temporary:
                temporary.write(text + "\n")
            os.replace(name, file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    return file


def rows_in(file: Path) -> list[dict[str, Any]]:
    """The rows of a file as they are written; none of one that is damaged or not there."""
    if not tuned.read_rows(file):
        return []
    return json.loads(file.read_text())["rows"]


def files() -> list[Path]:
    """All files, of every device and version."""
    return sorted(file for file in tuned.folder().glob("tuned-*.json") if file.is_file())


def clear() -> list[Path]:
    """Delete all files and their locks; returns the files.

    Raises:
        OSError: the folder cannot be written.
    """
    found = files()
    locks = (lock for lock in tuned.folder().glob("tuned-*.lock") if lock.is_file())
    for file in (*found, *locks):
        file.unlink(missing_ok=True)
    tuned.forget()
    return found
