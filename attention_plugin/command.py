# SPDX-License-Identifier: Apache-2.0
"""What the commands of `my-triton` share: errors of one line, and libraries that only they need."""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
from types import ModuleType
from typing import NoReturn

PROGRAM = "my-triton"


class UsageError(Exception):
    """What was asked for cannot be done; ends the program with status 2 and this one line."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """End the program with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def require(module: str, purpose: str, extra: str = "cli") -> ModuleType:
    """Import a library that only the commands need.

    Raises:
        UsageError: it is not installed; says what it is for and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UsageError(
            f"{purpose} needs {package}, which cannot be imported ({error}); pip install {package}, or "
            f"this package with its extra `{extra}`"
        ) from error


def check_kernel_cache(command: str) -> None:
    """Find out whether Triton can keep what it compiles, before it compiles anything.

    Raises:
        UsageError: it cannot; names the folder, and the variable that names another.
    """
    cache = require("triton.knobs", command).cache
    if cache.manager_class is not None:  # something else than a folder
        return
    try:
        os.makedirs(cache.dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache.dir):
            pass
    except OSError as error:
        raise UsageError(
            f"what Triton compiles cannot be kept in {cache.dir!r} ({one_line(error)}); set TRITON_CACHE_DIR to a "
            "folder that can be written"
        ) from error


def one_line(error: BaseException | str, limit: int = 400) -> str:
    """The words of an error without line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
