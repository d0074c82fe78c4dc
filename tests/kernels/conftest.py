# SPDX-License-Identifier: Apache-2.0
"""What tests of remembered calls share."""

from __future__ import annotations

import pytest

from attention_kernels import operators
from attention_kernels.blockwise import remembered


@pytest.fixture
def nothing_known():
    """No call of the torch path is remembered yet."""
    remembered._known.clear()
    yield
    remembered._known.clear()


@pytest.fixture
def checked_calls(monkeypatch):
    """Calls that went through all checks, as a growing list."""
    calls, validated = [], operators._validated
    monkeypatch.setattr(operators, "_validated", lambda *given: calls.append(given) or validated(*given))
    return calls
