# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, what transformers makes of them, and the table that `make test-engines` ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

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


class OneServerEach(LoadScopeScheduling):
    """Workers of a test run are handed tests one by one, but all tests of a server together."""

    def _split_scope(self, nodeid: str) -> str:
        module, _, test = nodeid.partition("::")
        return module + test[test.index("[") :] if module.endswith("test_servers.py") else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneServerEach:
    """In place of `--dist loadgroup`, which pytest 9.2 and pytest-xdist 3.8 together ignore."""
    return OneServerEach(config, log)


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
