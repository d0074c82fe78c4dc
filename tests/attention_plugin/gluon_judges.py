# SPDX-License-Identifier: Apache-2.0
"""What the process that tries the Gluon kernel may find, for tests: it is a process of its own that imports this."""

from __future__ import annotations

import os
import time
from typing import Any

from attention_plugin.tune.gluon import Verdict


def faster(*given: Any) -> Verdict:
    """By a tenth."""
    return Verdict(None, 90e-6, 100e-6)


def as_fast(*given: Any) -> Verdict:
    """But for noise."""
    return Verdict(None, 98e-6, 100e-6)


def wrong(*given: Any) -> Verdict:
    """A result beyond the bound."""
    return Verdict("documents, bfloat16: error 1.00e+00, allowed 1.00e-03")


def raises(*given: Any) -> Verdict:
    """As the driver does."""
    raise RuntimeError("an illegal memory access was encountered\nmore of the same")


def dies(*given: Any) -> Verdict:
    """As a process does that the system ends."""
    os._exit(7)


def says_its_number(*given: Any) -> Verdict:
    """As one that hangs, and says which process it is."""
    print(os.getpid(), flush=True)
    return hangs()


def hangs(*given: Any) -> Verdict:
    """As warps that wait for one another."""
    time.sleep(600)
    return Verdict()
