# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, what transformers makes of them, and the table that `make test-engines` ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine_table import FOUND, Cell, table_of
from greedy import Greedy

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def text_model() -> Path:
    """The checkpoint that `python -m model.checkpoint` writes; `make test-engines` has trained it."""
    folder = REPOSITORY / "checkpoints" / "reference"
    assert (folder / "tokenizer.json").exists(), f"there is no checkpoint in {folder}; run `make test-engines`"
    return folder


@pytest.fixture(scope="session")
def multimodal_model() -> Path:
    """The checkpoint that `python -m model.checkpoint --multimodal` writes; `make test-engines` has trained it."""
    folder = REPOSITORY / "checkpoints" / "multimodal"
    assert (folder / "tokenizer.json").exists(), f"there is no checkpoint in {folder}; run `make test-engines`"
    return folder


@pytest.fixture(scope="session")
def greedy(text_model: Path) -> Greedy:
    return Greedy(text_model)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Cell], None]:
    """Put a cell into the table at the end, if the test that did so passes."""

    def add(cell: Cell) -> None:
        request.node.user_properties.append(("engine cell", tuple(cell)))

    return add


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
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
    complete = not config.option.keyword and not any("::" in argument for argument in config.args)
    if complete and not exitstatus:
        FOUND.parent.mkdir(exist_ok=True)
        FOUND.write_text(table)
