# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, what transformers makes of them, and the table that `make test-engines` ends with."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from engine_table import Cell, table_of
from greedy import Greedy

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def text_model() -> Path:
    """The checkpoint that `python -m model.checkpoint` writes; `make test-engines` has trained it."""
    folder = REPOSITORY / "checkpoints" / "reference"
    assert (folder / "tokenizer.json").exists(), f"there is no checkpoint in {folder}; run `make test-engines`"
    return folder


@pytest.fixture(scope="session")
def greedy(text_model: Path) -> Greedy:
    return Greedy(text_model)


@pytest.fixture
def decided(text_model: Path) -> Callable[[Sequence[str], int, torch.dtype], list[str]]:
    """Of some texts those whose answers are no toss-up: in 16 bits, equal scores are decided by rounding."""

    def choose(prompts: Sequence[str], count: int, dtype: torch.dtype) -> list[str]:
        model = Greedy(text_model, dtype)
        return [prompt for prompt in prompts if model.margin(prompt, count) > 0.25]

    return choose


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Cell], None]:
    """Put a cell into the table at the end, if the test that did so passes."""

    def add(cell: Cell) -> None:
        request.node.user_properties.append(("engine cell", tuple(cell)))

    return add


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the table, and write it where docs/engines.md can be compared with it."""
    cells = [
        (Cell(*value), report.outcome)
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in getattr(report, "user_properties", [])
        if name == "engine cell"
    ]
    if not cells:
        return
    terminalreporter.write_sep("=", "same greedy tokens")
    table = table_of(cells)
    terminalreporter.write_line(table)
    if "PYTEST_XDIST_WORKER" not in os.environ and all(outcome == "passed" for _, outcome in cells):
        folder = REPOSITORY / "build"
        folder.mkdir(exist_ok=True)
        (folder / "engines.md").write_text(table)
