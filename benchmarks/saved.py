# SPDX-License-Identifier: Apache-2.0
"""Saved runs: JSON with every sample, the machine, the versions and what is needed to repeat them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .measure import Result
from .rows import baseline_of, speed
from .work import Limits

FORMAT = 1
"""Version of the JSON's layout."""

PACKAGES = ("torch", "triton", "transformers", "my-triton-attention", "flash-attn", "flash-attn-4", "numpy")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads and, on a GPU, which one."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = [
            line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        processor = models[0] if models else processor
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or processor,
        "device_type": device.type,
        "processor": processor,
        "capabilities": torch.backends.cpu.get_cpu_capability() + "+AMX" * torch.cpu._is_amx_tile_supported(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0]
        if hasattr(os, "getloadavg")
        else None,  # programs that ran or waited for a core, in the last minute
        "gpu": gpu,
        "gpu_count": torch.cuda.device_count() if gpu else 0,
        "system": platform.platform(),
    }


CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")


def gpu_clocks(device: torch.device) -> dict[str, str] | None:
    """Clocks, power, temperature and why clocks are held down, from nvidia-smi; None where that is not there."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", "-i", str(device.index or 0)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(CLOCKS, (text.strip() for text in run.stdout.split(",")), strict=False))


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and of every package that matters here; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


CLOCKS_SECONDS = 20.0
"""How old a run's last look at the clocks may be: nvidia-smi may take as long as a small case does."""


class Recorder:
    """Writes a run down as it goes, after every case: an interrupted run leaves what it has measured.

    Attributes:
        results: so far.
        machine: what `describe_machine` says.
        limits: of the machine (`Limits.to_json`), or None where they were not measured.
    """

    def __init__(self, path: Path, device: torch.device, arguments: dict[str, Any]) -> None:
        self.results: list[Result] = []
        self.machine = describe_machine(device)
        self.limits: dict[str, Any] | None = None
        self._path, self._arguments, self._device = path, arguments, device
        self._clocks = {"before": gpu_clocks(device)}
        self._looked = time.monotonic()
        self._began = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

    def add(self, results: Sequence[Result]) -> None:
        """Take more results, and write all."""
        self.results += results
        self.write()

    def write(self) -> None:
        """Write what there is; a reader sees the old file or the new one, never half of one."""
        if "after" not in self._clocks or time.monotonic() - self._looked > CLOCKS_SECONDS:
            self._clocks["after"] = gpu_clocks(self._device)
            self._looked = time.monotonic()
        document = {
            "format": FORMAT,
            "date": self._began,
            "arguments": self._arguments,
            "machine": self.machine | {"clocks": self._clocks},
            "versions": describe_versions(),
            "limits": self.limits,
            "results": rows_of(self.results),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draft.replace(self._path)


def rows_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every result with every sample, and its speed relative to its baseline."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault((result.section, result.case, result.dtype, result.unit), []).append(result)
    rows = []
    for result in results:
        peers = groups[result.section, result.case, result.dtype, result.unit]
        baseline = baseline_of(peers) if result.unit == "s" else None
        ratio = speed(result, baseline)
        relative = {"baseline": baseline.provider if ratio is not None else None, "times_as_fast": ratio}
        rows.append(result.to_json() | relative)
    return rows


def load(path: Path) -> dict[str, Any]:
    """A saved run.

    Raises:
        ValueError: the file cannot be read, is no run, or has a layout that this program does not know.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no saved run ({error}); `python -m benchmarks --json PATH` writes one") from None
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}, this program reads {FORMAT}; measure again with this version")
    if missing := {"machine", "results"} - document.keys():
        raise ValueError(
            f"{path} has no {' and no '.join(sorted(missing))}; `python -m benchmarks --json PATH` writes both"
        )
    return document


def results_in(document: dict[str, Any]) -> list[Result]:
    """The rows of a saved run as results."""
    names = [field.name for field in fields(Result)]
    return [Result(**{name: row[name] for name in names}) for row in document["results"]]


def limits_of(document: dict[str, Any]) -> Limits | None:
    """What the machine of a saved run could do, or None where that was not measured."""
    return None if document.get("limits") is None else Limits(**document["limits"])


def printable_command() -> str:
    """The command that was typed, for the JSON."""
    return " ".join(["python -m benchmarks", *sys.argv[1:]])
