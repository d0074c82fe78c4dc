# SPDX-License-Identifier: Apache-2.0
"""Sharing a machine's cores between the workers of a test run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

FOLDER = Path(tempfile.gettempdir()) / f"engine-cores-{os.getuid()}"


@contextlib.contextmanager
def cores(number: int, folder: Path = FOLDER) -> Iterator[None]:
    """Hold `number` cores, or all there are, while the block runs; wait for them where others hold them.

    Ranks of an engine that wait for one another spin: beside another engine, two on two cores take three to four times
    as long. Whoever comes first is served first. A process that ends holds nothing.
    """
    folder.mkdir(exist_ok=True)
    there_are = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as held:
        with (folder / "turn").open("ab") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            untaken = [held.enter_context((folder / str(core)).open("ab")) for core in range(there_are)]
            for _ in range(min(number, there_are)):
                while (core := next(filter(_lock, untaken), None)) is None:
                    time.sleep(0.1)
                untaken.remove(core)
        yield


def _lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
