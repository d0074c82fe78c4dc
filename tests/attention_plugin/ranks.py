# SPDX-License-Identifier: Apache-2.0
"""Several ranks of one process group: real processes that speak gloo."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import distributed

LIMIT_SECONDS = 120.0


def run_ranks(work: Callable[..., Any], folder: Path, ranks: int, *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returned on each of the ranks."""
    context = torch.multiprocessing.spawn(_enter_rank, (folder, ranks, work, arguments), nprocs=ranks, join=False)
    deadline = time.monotonic() + LIMIT_SECONDS
    try:
        while not context.join(timeout=1.0):  # raises the error of a rank that failed
            assert time.monotonic() < deadline, f"the ranks did not finish within {LIMIT_SECONDS:.0f} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(ranks)]


def _enter_rank(rank: int, folder: Path, ranks: int, work: Callable[..., Any], arguments: tuple) -> None:
    """The whole life of a rank; what `work` returns goes to a file."""
    torch.set_num_threads(1)
    # The ranks meet at a file, for which no port must be free.
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", meeting, timedelta(seconds=LIMIT_SECONDS), rank=rank, world_size=ranks)
    torch.save(work(*arguments), folder / f"rank-{rank}.pt")
    distributed.destroy_process_group()
