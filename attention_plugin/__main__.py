# SPDX-License-Identifier: Apache-2.0
"""The program `my-triton`, also `python -m attention_plugin`: what works here, and what a model gets."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
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
    parser = OneLineParser(prog=PROGRAM, description="What works on this machine, and what a model gets.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version('my-triton-attention')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = command_module(name)
        module.add_arguments(commands.add_parser(name, help=summary, description=module.__doc__))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 for a bad finding, 2 for what cannot be done, 130 for what was interrupted.
    """
    options = build_parser().parse_args(arguments)
    try:
        return command_module(options.command).run(options)
    except UsageError as error:
        print(f"{PROGRAM} {options.command}: {one_line(error, limit=2000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM} {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
