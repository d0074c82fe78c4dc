# SPDX-License-Identifier: Apache-2.0
"""What runs the kernels in `make test-ptx`, and what tests of remembered calls share."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

from attention_kernels import call_checks, tuned
from attention_kernels.blockwise import remembered

whole_run = ExitStack()

if "PTX_CAPABILITY" in os.environ:  # `make test-ptx`; before the tests ask what runs them
    from on_ptx import running_on

    seed = os.environ.get("PTX_SEED")
    order = {} if seed is None else {"late": True, "seed": int(seed)}
    whole_run.enter_context(running_on(int(os.environ["PTX_CAPABILITY"]), **order))


def pytest_unconfigure() -> None:
    """Leave the process as it was."""
    whole_run.close()


@pytest.fixture(autouse=True)
def built_in_shapes(monkeypatch):
    """What `my-triton tune` has left on this machine does not decide what is tested."""
    monkeypatch.setattr(tuned, "_rows_in_file", lambda device: {})
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture
def nothing_known():
    """No call of the torch path is remembered yet."""
    remembered._known.clear()
    yield
    remembered._known.clear()


@pytest.fixture
def checked_calls(monkeypatch):
    """Calls that went through all checks, as a growing list."""
    calls, fitting = [], call_checks.fitting_tensors
    monkeypatch.setattr(call_checks, "fitting_tensors", lambda *given: calls.append(given) or fitting(*given))
    return calls
