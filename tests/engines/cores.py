# SPDX-License-Identifier: Apache-2.0
"""Sharing a machine's cores between the workers of a test run."""

from __future__ import annotations

import contextlib
import getpass
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

FOLDER = Path(tempfile.gettempdir()) / f"engine-cores-{getpass.getuser()}"


@contextlib.contextmanager
def cores(number: int, folder: Path = FOLDER) -> Iterator[None]:
    """Hold `number` cores, or all there are, while the block runs; wait for them where others hold them.

    Ranks of an engine that wait for one another spin: beside another engine, two on two cores take three to four times
    as long. Whoever comes first is served first. A process that ends holds nothing.
    """
    folder.mkdir(exist_ok=True)
    there_are = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.ExitStack() as held:
        with FileLock(folder / "turn"):
            untaken = [FileLock(folder / str(core)) for core in range(there_are)]
            for _ in range(min(number, there_are)):
                while (core := next(filter(_taken, untaken), None)) is None:
                    time.sleep(0.1)
                untaken.remove(core)
                held.callback(core.release)
        yield


def _taken(core: FileLock) -> bool:
    """Take a core if nobody holds it."""
    try:
        core.acquire(timeout=0)
    except Timeout:
        return False
    return True
