# SPDX-License-Identifier: Apache-2.0
"""The saved baseline of `make bench-ci`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import saved

SAVED = Path(__file__).resolve().parents[1] / "results" / "regression.json"


class Baseline:
    """Ratios of an earlier commit, and those of this run.

    A processor that has no baseline of its own is held to the lowest of the others'.
    """

    def __init__(self, processors: dict[str, dict[str, Any]], here: str, *, is_saved_anew: bool) -> None:
        self.ratios: dict[str, float] = {}
        self.is_saved_anew = is_saved_anew
        self._known = {here: processors[here]} if here in processors else processors

    def least(self, case: str, slowdown: float) -> float | None:
        """The least ratio that is no slow-down, or None for a case that the baseline does not have."""
        found = self._found(case)
        return min(found.values()) * (1 - slowdown) if found else None

    def note(self, case: str, ratio: float) -> None:
        """Keep this run's ratio of a case."""
        self.ratios[case] = ratio

    def described(self, case: str) -> str:
        """The baseline of a case, in words."""
        found = self._found(case)
        processor = min(found, key=lambda name: found[name])
        return f"{found[processor]:.2f} in the baseline (of {processor})"

    def _found(self, case: str) -> dict[str, float]:
        return {name: entry["ratios"][case] for name, entry in self._known.items() if case in entry["ratios"]}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--save-baseline`."""
    parser.addoption("--save-baseline", action="store_true", help=f"write {SAVED.name} in place of comparing with it")


@pytest.fixture(scope="session")
def baseline(request: pytest.FixtureRequest) -> Iterator[Baseline]:
    """What the session compares with; this processor's part is written at its end where that was asked for."""
    saving = request.config.getoption("--save-baseline")
    if not saving and not SAVED.exists():
        pytest.fail(f"{SAVED} is missing; `make bench-ci-save` writes it")
    processors = json.loads(SAVED.read_text(encoding="utf-8")) if SAVED.exists() else {}
    machine = saved.describe_machine(torch.device("cpu"))
    # Two kinds of processor may have one name, and be far apart in 16 bits.
    here = f"{machine['processor']} ({machine['capabilities']}), {machine['threads']} threads"
    held = Baseline({} if saving else processors, here, is_saved_anew=saving)
    yield held
    if saving:
        processors[here] = {"versions": saved.describe_versions(), "ratios": held.ratios}
        SAVED.write_text(json.dumps(processors, indent=1) + "\n", encoding="utf-8")
