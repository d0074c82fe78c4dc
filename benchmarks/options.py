# SPDX-License-Identifier: Apache-2.0
"""The command line: what each section takes, and what is refused with one line before anything is measured."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from attention_plugin.command import OneLineParser

from . import cases, models, saved, serve, tensor_parallel
from .providers import BASELINE, OURS, PROVIDERS

SECTIONS = {
    "kernels": "attention by itself: every case, or sweeps over sizes; and the masks it needs",
    "host": "what a call costs in Python, before a device works",
    "training": "forward and backward of every case",
    "models": "whole models",
    "memory": "peak memory over the length of a prompt",
    "tp": "a model sharded over ranks",
    "serve": "requests that arrive together, batched continuously",
}
"""Sections of a run, in its order."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FOLDER = Path(__file__).resolve().parent
CHECKPOINTS = FOLDER.parent / "checkpoints"
RESULTS = FOLDER / "results" / "local"

Run = argparse.Namespace


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every section takes."""
    parser.add_argument("--quick", action="store_true", help="small sizes and few samples: seconds instead of minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=tuple(DTYPES),
        help="default: float32 and bfloat16 (with --quick: float32; on a GPU: bfloat16)",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="WHAT",
        default=[],
        help="implementations to compare with, by name, in place of all of them; or the JSON of an earlier run, to "
        "compare row by row",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        default=RESULTS / "latest.json",
        help="every sample; default: benchmarks/results/local/latest.json",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        default=RESULTS / "latest.png",
        help="the main picture, others go beside it; default: benchmarks/results/local/latest.png",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="begin no case after that time; what was measured is kept"
    )
    parser.add_argument("--list", action="store_true", help="list cases, sweeps and implementations; measure nothing")


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """What sections of cases take."""
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of every case, in place of the default")


def add_sweeps(parser: argparse.ArgumentParser) -> None:
    """What the kernels take beside their cases."""
    parser.add_argument(
        "--sweep",
        nargs="+",
        choices=(*cases.SWEEPS, "all"),
        default=[],
        help="in place of the cases, few of them at many sizes: " + ", ".join(cases.SWEEPS),
    )
    parser.add_argument(
        "--shapes-of",
        nargs="+",
        choices=tuple(cases.MODELS),
        metavar="MODEL",
        help=f"only these models in the sweep ranks: {', '.join(cases.MODELS)}",
    )
    parser.add_argument("--degrees", type=int, nargs="+", metavar="N", help="ranks that share them; default: 1 2 4 8")


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """What sharding takes."""
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="default: 1 and 2; on GPUs 1, 2, 4, 8")
    parser.add_argument("--model", metavar="MODEL", help="folder or hub id, in place of the reference model")


def add_engines(parser: argparse.ArgumentParser) -> None:
    """What serving takes."""
    parser.add_argument(
        "--engine",
        nargs="+",
        choices=serve.ENGINES,
        default=[],
        help="also by these engines, with their own attention and with this project's",
    )
    parser.add_argument(
        "--python",
        type=Path,
        metavar="PATH",
        help="the Python that an engine is installed beside; default: .venv-ENGINE, which `make test-engines` makes",
    )


EXTRAS = {
    "kernels": (add_tokens, add_sweeps),
    "training": (add_tokens,),
    "tp": (add_ranks,),
    "serve": (add_engines,),
}


def parser_of(section: str | None, description: str | None, epilog: str | None) -> OneLineParser:
    """The parser of one section, or of all of them together."""
    parser = OneLineParser(
        prog=" ".join(["python -m benchmarks", *([section] if section else [])]),
        description=SECTIONS[section] if section else description,
        epilog=None if section else epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_common(parser)
    for add in EXTRAS.get(section, ()) if section else (add_tokens,):
        add(parser)
    if section is None:
        add_choice(parser)
    return parser


def add_choice(parser: argparse.ArgumentParser) -> None:
    """What chooses one section."""
    parser.add_argument("--only", choices=tuple(SECTIONS), help="one section; the same as naming it first")
    parser.add_argument("--tp", type=int, metavar="N", help="only the section tp, with 1 and N ranks")


def parse(section: str | None, arguments: Sequence[str], description: str | None = None, epilog: str = "") -> Run:
    """The options, checked; impossible ones end the program with status 2 and one line."""
    parser = parser_of(section, description, epilog)
    run = parser.parse_args(arguments)
    if section is None:
        if run.tp is not None and run.only not in (None, "tp"):
            parser.error(f"--tp {run.tp} is of the section tp, and --only names {run.only}; leave one of them out")
        section = run.only or (None if run.tp is None else "tp")
        if section is not None:
            # Once more as that section, whose own defaults then hold.
            choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            add_choice(choice)
            kept = choice.parse_known_args(arguments)[1]
            ranks = [] if run.tp is None else ["--ranks", *map(str, sorted({1, run.tp}))]
            return parse(section, [*kept, *(ranks if section == "tp" else [])])
    run.sections = (section,) if section else tuple(SECTIONS)
    if run.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave the option out to run on the CPU")
    run.device = torch.device(run.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if getattr(run, "tokens", None) is not None and run.tokens < 64:
        parser.error(f"--tokens must be at least 64, got {run.tokens}")
    if run.seconds is not None and not run.seconds > 0:
        parser.error(f"--seconds must be positive, got {run.seconds:g}; leave it out for all the time it takes")
    if run.plot.suffix != ".png":
        parser.error(f"--plot must end in .png, got {run.plot}")
    check_against(run, parser)
    run.thoroughness = "quick" if run.quick else "full"
    run.dtypes = [DTYPES[name] for name in run.dtype] if run.dtype else cases.DTYPES[run.device.type, run.thoroughness]
    run.sweep = list(cases.SWEEPS) if "all" in getattr(run, "sweep", []) else getattr(run, "sweep", [])
    check_shapes(run, parser)
    run.engines = engines_of(run, parser)
    run.checkpoint = CHECKPOINTS / "reference"
    if run.quick and not models.is_checkpoint(run.checkpoint):
        # Trained for seconds only: the full run must not find it in the place of its own.
        run.checkpoint = CHECKPOINTS / "reference-quick"
    check_ranks(run, parser)
    if not run.list:
        check_files(run, parser)
    return run


def check_files(run: Run, parser: OneLineParser) -> None:
    """What cannot be written is told before the measuring, and not after it."""
    for option, path in (("--json", run.json), ("--plot", run.plot)):
        if path.is_dir():
            parser.error(f"{option} must be a file, and {path} is a folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"{option} {path} cannot be written: {error.strerror}")
        if not os.access(path.parent, os.W_OK):
            parser.error(f"{option} {path} cannot be written: its folder takes no files")


def check_against(run: Run, parser: OneLineParser) -> None:
    """Tell names of implementations from files of earlier runs."""
    names = [provider.name for provider in PROVIDERS]
    run.peers = [word for word in run.against if word in names]
    if run.peers and run.sections == ("tp",):
        parser.error(f"--against {run.peers[0]}: tp compares {OURS} on several ranks; give it an earlier run's JSON")
    if run.peers not in ([], [BASELINE]) and run.sections == ("host",):
        parser.error(f"--against {run.peers[0]}: host knows the cost of {BASELINE} only; leave it out")
    paths = [Path(word) for word in run.against if word not in names]
    if len(paths) > 1:
        parser.error(f"--against takes one earlier run, got {', '.join(map(str, paths))}; `compare` compares more")
    try:
        # Read before the run, which may write to the same place.
        run.earlier = saved.load(paths[0]) if paths else None
    except ValueError as error:
        parser.error(f"--against: neither an implementation ({', '.join(names)}) nor an earlier run: {error}")


def check_shapes(run: Run, parser: OneLineParser) -> None:
    """Heads of the models of the sweep ranks must be divisible."""
    if getattr(run, "shapes_of", None) is None and getattr(run, "degrees", None) is None:
        run.shapes_of = run.degrees = None
        return
    run.sweep = sorted({*run.sweep, "ranks"}, key=list(cases.SWEEPS).index)
    run.shapes_of, run.degrees = run.shapes_of or tuple(cases.MODELS), run.degrees or cases.DEGREES
    for model in run.shapes_of:
        for degree in run.degrees:
            try:
                if degree < 1:
                    raise ValueError(f"a degree must be at least 1, got {degree}")
                cases.MODELS[model].on_rank(degree)
            except ValueError as error:
                parser.error(f"--degrees {degree}, {model}: {error}")


def engines_of(run: Run, parser: OneLineParser) -> list[tuple[str, Path]]:
    """Engines that serve, each with its Python."""
    engines, python = getattr(run, "engine", []), getattr(run, "python", None)
    if python is not None and len(engines) != 1:
        parser.error(f"--python names the environment of one engine; give one with --engine, got {engines or 'none'}")
    if python is not None and not python.exists():
        parser.error(f"--python: there is no {python}; `make test-engines` makes environments")
    root = FOLDER.parent
    return [(engine, python or root / f".venv-{engine}" / "bin" / "python") for engine in engines]


def check_ranks(run: Run, parser: OneLineParser) -> None:
    """Ranks that were asked for must be possible; default ones that are not become a row that says why."""
    run.model = getattr(run, "model", None) or str(run.checkpoint)
    asked = getattr(run, "ranks", None)
    default = (1, 2) if run.device.type == "cpu" else (1, 2, 4, 8)
    run.ranks = sorted({1, *(asked or default)})
    if "tp" not in run.sections:
        return
    try:
        reasons = [tensor_parallel.impossible_ranks(ranks, run.model, run.device) for ranks in run.ranks]
    except ValueError as error:
        parser.error(str(error))
    if asked and (reason := next((each for each in reasons if each is not None), None)) is not None:
        parser.error(reason)


def providers_of(run: Run, *, slow: bool = True) -> list[str]:
    """Names of the implementations that a run compares; `slow` ones write all scores to memory."""
    from .providers import ON_REQUEST, SLOW

    if run.peers:
        return [OURS, *(name for name in run.peers if name != OURS)]
    left_out = ON_REQUEST if slow else {*ON_REQUEST, *SLOW} - {BASELINE}
    return [provider.name for provider in PROVIDERS if provider.name not in left_out]
