# SPDX-License-Identifier: Apache-2.0
"""Everything that matters on one GPU, in one command and a set time.

Each part is a process of its own: a crash of one leaves the others whole. A part stops by itself when its time is up,
and writes after every case, so that what was measured is kept even where it had to be stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from rich.console import Console

from model.training import is_checkpoint

from . import page
from .models import SIZES
from .options import CHECKPOINTS, FOLDER
from .providers import GLUON

FUSED = ("sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Peers of the sweeps: those that need not be compiled for every point."""

STARTING = 8.0
"""Seconds that a part needs before its first case."""

GRACE = 30.0
"""Seconds beyond a part's time, for the case that runs when time is up."""


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: of its files.
        command: after `python -m`.
        share: of the time that is left when it begins, relative to the parts from it on.
    """

    name: str
    command: tuple[str, ...]
    share: float


WORDS = 10.0
"""Seconds for a part that is stopped to say what it knows: pytest shows what failed when it ends."""

# Compiling kernels for the tests takes longer than running them, and takes one core each. The checkpoint takes four.
WORKERS = ("-n", str(max(2, (os.cpu_count() or 2) - 4))) if importlib.util.find_spec("xdist") else ()
TESTS = ("pytest", "-q", "-p", "no:cacheprovider", "--maxfail=10", *WORKERS)
GPU_TESTED = "prebound wide_output cache operators shared_spans merge dropout overlap gradients weights spans"
GPU_TESTS = tuple(f"tests/kernels/test_{name}.py" for name in GPU_TESTED.split())
"""The others in their folder are of the torch path, or compile for GPUs that are not there. First what no interpreter
has run: kernels launched again, parts of outputs, pages."""

EACH_COMPILED = ("-k", "not random_problems and not random_pages")
"""Left to `python -m pytest tests/kernels`: problems that nearly all take kernels of their own, which takes minutes."""

GLUON_TESTS = "tests/kernels/test_hopper.py"

PARTS = (
    Part("tests", (*TESTS, *EACH_COMPILED, *GPU_TESTS), 120),
    Part("overview", ("benchmarks", "kernels"), 80),
    Part("lengths", ("benchmarks", "kernels", "--sweep", "lengths", "--against", *FUSED), 130),
    Part("decode", ("benchmarks", "kernels", "--sweep", "decode", "--against", *FUSED), 70),
    Part("mixed", ("benchmarks", "kernels", "--sweep", "mixed", "--against", *FUSED), 30),
    Part("training", ("benchmarks", "training", "--against", *FUSED, "eager"), 50),
    Part("host", ("benchmarks", "host"), 15),
    Part("head-dims", ("benchmarks", "kernels", "--sweep", "head_dims", "--against", *FUSED), 25),
    Part("models", ("benchmarks", "models", "--dtype", "bfloat16"), 40),
    Part("ranks", ("benchmarks", "kernels", "--sweep", "ranks", "--against", *FUSED), 30),
    Part("memory", ("benchmarks", "memory", "--dtype", "bfloat16"), 15),
    Part("gluon-tests", (*TESTS, GLUON_TESTS), 45),
    Part("gluon-lengths", ("benchmarks", "kernels", "--sweep", "lengths", "--against", GLUON, "sdpa_cudnn"), 20),
)
"""In the order of what is missed most if time runs out; last what no GPU has run yet and might not come to an end."""


def run_gpu_report(arguments: Sequence[str], parser: argparse.ArgumentParser, console: Console) -> int:
    """Measure everything that matters on a GPU in under nine minutes.

    0; 1 where a part failed; 2 with one line where there is no GPU.
    """
    parser.add_argument("--seconds", type=float, default=520.0, metavar="N", help="time for all parts; default: 520")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="default: benchmarks/results/NAME-OF-THE-GPU")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="all files in one, too: NAME.tar.gz")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="some parts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a rehearsal, at small sizes")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; `make bench` measures on the CPU, --device cpu rehearses this command")
    if options.archive is not None and not options.archive.resolve().parent.is_dir():
        parser.error(f"--archive: there is no folder {options.archive.resolve().parent}; make it, or choose another")
    if not options.seconds > 0:  # nor is NaN
        parser.error(f"--seconds must be positive, got {options.seconds:g}; the default is 520")
    parts = [part for part in PARTS if options.only is None or part.name in options.only]
    folder = (options.folder or FOLDER / "results" / device_slug(options.device)).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--folder: results cannot be kept in {folder} ({error}); choose another")
    ends = time.monotonic() + options.seconds
    training = train_beside(options.device) if any(part.name == "models" for part in parts) else None
    outcomes = {}
    for index, part in enumerate(parts):
        if part.name == "models" and training is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                training.wait(max(0.0, ends - time.monotonic()))
        # The time that earlier parts did not use is shared by those that are left.
        left = ends - time.monotonic()
        seconds = left * part.share / sum(each.share for each in parts[index:])
        if seconds <= STARTING:
            outcomes[part.name] = "left out: no time is left; --seconds N gives more, --only takes some parts"
        else:
            console.print(f"{part.name}: {seconds:.0f} s of the {left:.0f} s that are left")
            outcomes[part.name] = run_part(part, seconds, min(left, seconds + GRACE), folder, options.device)
        console.print(f"{part.name}: {outcomes[part.name]}")
        with contextlib.suppress(OSError):  # a disk that is full ends no measurement; the last one says so
            write_archive(folder, options.archive)  # each time: the command may be ended from outside
    if training is not None:
        end(training)
    try:
        if any(folder.glob("*.json")):
            page.write_pages(folder, console)
    finally:  # what was measured is not lost with its pictures
        write_archive(folder, options.archive)
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


def write_archive(folder: Path, path: Path | None) -> None:
    """All files of a folder in one, which is never there in part."""
    if path is None:
        return
    unfinished, own = path.with_name(f"{path.name}.part"), {path.name, f"{path.name}.part"}
    with tarfile.open(unfinished, "w:gz") as archive:
        archive.add(folder, folder.name, filter=lambda each: None if Path(each.name).name in own else each)
    unfinished.replace(path)


def run_part(part: Part, seconds: float, limit: float, folder: Path, device: str) -> str:
    """Run one part, which stops by itself after `seconds` and is stopped after `limit`; what became of it, in words.

    What it printed goes to `NAME.txt`.
    """
    module, *arguments = part.command
    if module == "benchmarks":
        quick = ["--quick"] if device == "cpu" else []
        arguments += ["--device", device, "--seconds", f"{max(1, seconds - STARTING):.0f}", *quick]
        arguments += ["--json", str(folder / f"{part.name}.json"), "--plot", str(folder / f"{part.name}.png")]
    else:
        limit = seconds
    with open(folder / f"{part.name}.txt", "w", encoding="utf-8") as output:
        run = start([module, *arguments], output)
        try:
            status = run.wait(limit)
        except subprocess.TimeoutExpired:
            end(run)
            said = (folder / f"{part.name}.txt").read_text(encoding="utf-8", errors="replace")
            if failed := re.search(r"\b\d+ failed\b", said):
                return f"failed: {failed[0]} in {limit:.0f} s; its words are in {part.name}.txt"
            if module == "pytest":
                return f"failed: the tests were not through after {limit:.0f} s; their words are in {part.name}.txt"
            return f"stopped after {limit:.0f} s; what it had measured is kept"
    return "done" if status == 0 else f"failed with status {status}; its words are in {part.name}.txt"


def start(module_and_arguments: Sequence[str], output: int | IO[str], **variables: str) -> subprocess.Popen:
    """A module in a session of its own, which `end` ends as a whole: parts start processes, too."""
    command = [sys.executable, "-m", *module_and_arguments]
    with hearing_interrupts():
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=FOLDER.parent, start_new_session=True,
            env=os.environ | variables,
        )  # fmt: skip


@contextlib.contextmanager
def hearing_interrupts() -> Iterator[None]:
    """What a shell starts in the background ignores interrupts, and so would what is started here: `end` sends one."""
    ignores = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignores:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignores:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def end(run: subprocess.Popen) -> None:
    """Interrupt a process, give it a while to say what it knows, and end all that it started."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        run.send_signal(signal.SIGINT)
        run.wait(WORDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def train_beside(device: str) -> subprocess.Popen | None:
    """Train the checkpoint of the part models on the CPU, beside the parts before it; None where it is there."""
    folder = CHECKPOINTS / "reference"
    if device == "cpu" or is_checkpoint(folder):
        return None
    command = ["model.checkpoint", str(folder), "--train-seconds", str(SIZES["full"].train_seconds)]
    return start(command, subprocess.DEVNULL, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="4")


def device_slug(device: str) -> str:
    """A folder's name for the device: `nvidia-h100-80gb-hbm3`."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu-rehearsal"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
