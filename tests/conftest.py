# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test folders share."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]

# Before torch is imported, and for what tests start: threads of workers that share cores wait for one another, eight
# milliseconds at a time.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

# Wall-clock time says nothing about these properties, and a failure must be repeatable from its output.
settings.register_profile("project", deadline=None, print_blob=True)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def own_random_numbers(request: pytest.FixtureRequest) -> None:
    """A test draws the same numbers whichever tests ran before it in its worker."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference checkpoint, trained for five seconds by the real command, once for all workers of a test run."""
    return trained_once(tmp_path_factory, "reference-checkpoint", "--train-seconds", "5")


@pytest.fixture(scope="session")
def multimodal_checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint, trained for three seconds by the real command: complete, but it has learned nothing."""
    return trained_once(tmp_path_factory, "multimodal-checkpoint", "--multimodal", "--train-seconds", "3")


def trained_once(tmp_path_factory: pytest.TempPathFactory, name: str, *options: str) -> Path:
    """What `python -m model.checkpoint` writes with these options, shared by the workers of a test run."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # each worker has its own folder inside that of the run
    finished, unfinished = shared / name, shared / f"{name}-in-training"
    with FileLock(shared / f"{name}.lock"):
        if not finished.exists():
            command = [sys.executable, "-m", "model.checkpoint", str(unfinished), *options]
            environment = os.environ | {"HF_HUB_OFFLINE": "1"}
            run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout + run.stderr
            unfinished.rename(finished)
    return finished
