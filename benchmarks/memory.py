# SPDX-License-Identifier: Apache-2.0
"""Peak memory of building a mask and running one forward pass with it.

On the CPU each measurement is a process of its own, because a process's peak can only rise. Run as a program, this
module is that process: `python -m benchmarks.memory PROVIDER TOKENS DTYPE`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from .cases import Sizes, case_named
from .measure import Result, brief, dtype_name
from .problem import build_problem
from .providers import OURS, PROVIDERS

MEMORY_CASE = case_named("left_padded")
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
LIMIT_SECONDS = 120.0


def problem_sizes(tokens: int) -> Sizes:
    """A padded prompt of `tokens` tokens, 8 heads of 64."""
    return Sizes(tokens, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)


def measure_peak(provider: str, tokens: int, dtype: torch.dtype, device: torch.device) -> Result:
    """Bytes at the peak beyond the inputs: the mask, the output and whatever a provider needs in between."""
    result = Result("memory", f"{tokens:,} tokens", provider, dtype_name(dtype), unit="bytes")
    result.details["tokens"] = tokens
    if device.type == "cuda":
        try:
            result.samples = [float(_peak_here(provider, tokens, dtype, device))]
        except torch.OutOfMemoryError as error:
            result.status, result.reason = "unavailable", brief(error)
        return result
    command = [sys.executable, "-m", "benchmarks.memory", provider, str(tokens), dtype_name(dtype)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True)
        result.samples = [float(json.loads(run.stdout.splitlines()[-1])["bytes"])]
    except (subprocess.SubprocessError, ValueError, IndexError, KeyError) as error:
        result.status, result.reason = "unavailable", f"its process did not finish: {brief(error)}"
    return result


@torch.no_grad()
def _peak_here(provider_name: str, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rise of this process's peak memory, in bytes. A small run before loads what is loaded lazily."""
    provider = next(each for each in PROVIDERS if each.name == provider_name)
    for size in (256, tokens):
        problem = build_problem(MEMORY_CASE, problem_sizes(size), dtype, device)
        before = _peak(device)
        provider.bind(problem, problem.mask_builder(provider.mask_name)())()
    return _peak(device, reset=False) - before


def _peak(device: torch.device, reset: bool = True) -> int:
    """Most bytes ever in use, by this process or, on a GPU, since the last reset."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which on Linux begins at the peak of the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes() -> int | None:
    """Memory of the machine that is free for a large allocation, or None where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def main() -> None:
    """Print the peak of one provider as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument(
        "provider", choices=[provider.name for provider in PROVIDERS], metavar=f"PROVIDER ({OURS}, ...)"
    )
    parser.add_argument("tokens", type=int, metavar="TOKENS")
    parser.add_argument("dtype", metavar="DTYPE (float32, ...)")
    options = parser.parse_args()
    peak = _peak_here(options.provider, options.tokens, getattr(torch, options.dtype), torch.device("cpu"))
    print(json.dumps({"bytes": peak}))


if __name__ == "__main__":
    main()
