# SPDX-License-Identifier: Apache-2.0
"""What the commands of `my-triton` share: errors of one line, and libraries that only they need."""

from __future__ import annotations

import argparse
import importlib
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


def one_line(error: BaseException | str, limit: int = 400) -> str:
    """The words of an error without line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
