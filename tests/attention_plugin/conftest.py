# SPDX-License-Identifier: Apache-2.0
"""Fixtures of several of the plugin's test files."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from attention_kernels import tuned


@pytest.fixture
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory, of which nothing is left afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.forget()
    yield tmp_path
    tuned.forget()
