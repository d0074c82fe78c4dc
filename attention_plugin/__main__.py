# SPDX-License-Identifier: Apache-2.0
"""The program `my-triton`, also `python -m attention_plugin`: what works here, and what a model gets."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from .command import PROGRAM, OneLineParser, UsageError, one_line

COMMANDS = {
    "doctor": "what this machine has, which kernels it will use, what is missing; whether attention works here",
    "explain": "which attention and which mask each layer of a model gets, without loading its weights",
    "compile-report": "what the compiler makes of every shipped configuration on every chip, without a GPU",
    "tune": "measure tile shapes on this machine's GPU, and use the fastest from then on",
    "warmup": "compile ahead of serving the kernels that a model will need",
}
"""Commands and their help. Each is a module of this package with `add_arguments(parser)` and `run(options) -> int`."""


def command_module(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f".{name.replace('-', '_')}", __package__)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the program and of its commands."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = command_module(name)
        module.add_arguments(commands.add_parser(name, help=summary, description=module.__doc__))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a bad finding, 2 for what cannot be done."""
    options = build_parser().parse_args(arguments)
    try:
        return command_module(options.command).run(options)
    except UsageError as error:
        print(f"{PROGRAM} {options.command}: {one_line(error, limit=2000)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
