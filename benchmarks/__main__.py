# SPDX-License-Identifier: Apache-2.0
"""Compare this project's attention with the others that transformers offers, on this machine.

Every result is checked against a float64 reference before it is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging as transformers_logging

from . import cases, compare, host, kernels, memory, models, page, readme, report, tensor_parallel, training
from .measure import Effort, Result
from .providers import BASELINE, FALLBACK_BASELINE, OURS, PROVIDERS, Provider

SECTIONS = ("kernels", "host", "training", "models", "tp")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READERS = {"compare": compare.run_compare, "report": page.run_report, "readme": readme.run_readme}
"""Commands that measure nothing: they read saved runs."""

COMMANDS = (
    f"A section may also come first: python -m benchmarks {SECTIONS[0]} --quick. "
    f"Commands that read saved runs instead: {', '.join(READERS)}; each has its own --help."
)

FOLDER = Path(__file__).resolve().parent
CHECKPOINTS = FOLDER.parent / "checkpoints"
RESULTS = FOLDER / "results" / "local"

KERNEL_EFFORT = {"full": Effort(seconds=4.0), "quick": Effort(seconds=0.6, most=20)}
TRAINING_EFFORT = {"full": Effort(seconds=2.5), "quick": Effort(seconds=0.5, most=20)}
MASK_EFFORT = {"full": Effort(seconds=1.0, most=20), "quick": Effort(seconds=0.2, most=10)}
LONG_MASK_EFFORT = Effort(seconds=2.0, most=10)
MODEL_EFFORT = {"full": Effort(seconds=8.0, most=20), "quick": Effort(seconds=1.0, most=10)}
HOST_EFFORT = {"full": Effort(seconds=2.0), "quick": Effort(seconds=0.3, most=20)}
HOST_TOKENS = {"full": 4096, "quick": 512}
MEMORY_TOKENS = {"full": (4096, 8192), "quick": (4096,)}
LONG_MASK_TOKENS = {"full": 32_768, "quick": 8192}

Run = argparse.Namespace


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """End the program with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str] | None) -> Run:
    """The options, checked; impossible ones end the program with status 2 and one line."""
    parser = OneLineParser(prog="python -m benchmarks", description=__doc__, epilog=COMMANDS)
    parser.add_argument(
        "--only",
        choices=SECTIONS,
        help="run one section: kernels (with masks and memory), host (what a call costs before a device works), "
        "training (forward and backward), models or tp",
    )
    parser.add_argument(
        "--tp", type=int, metavar="N", help="ranks of the tensor-parallel section; given alone, run only it"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few samples, in under 90 seconds")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=tuple(DTYPES),
        help="default: float32 and bfloat16 (with --quick: float32; GPU: bfloat16)",
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="tokens of the kernels and training sections, in place of the default"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        default=RESULTS / "latest.json",
        help="default: benchmarks/results/local/latest.json",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        default=RESULTS / "latest.png",
        help="default: benchmarks/results/local/latest.png",
    )
    parser.add_argument(
        "--against", type=Path, metavar="PATH", help="JSON of an earlier run to compare with, row by row"
    )
    parser.add_argument("--list", action="store_true", help="list cases and implementations, and measure nothing")
    run = parser.parse_args(arguments)
    if run.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave the option out to run on the CPU")
    run.device = torch.device(run.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if run.tokens is not None and run.tokens < 64:
        parser.error(f"--tokens must be at least 64, got {run.tokens}")
    if run.plot.suffix != ".png":
        parser.error(f"--plot must end in .png, got {run.plot}")
    if run.against is not None:
        try:
            # Read before the run, which may write to the same place.
            run.against = compare.load(run.against)
        except ValueError as error:
            parser.error(f"--against: {error}")
    if run.only is None and run.tp is not None:
        run.only = "tp"
    run.thoroughness = "quick" if run.quick else "full"
    run.checkpoint = CHECKPOINTS / "reference"
    if run.quick and not models.is_checkpoint(run.checkpoint):
        # Trained for seconds only: the full run must not find it in the place of its own.
        run.checkpoint = CHECKPOINTS / "reference-quick"
    run.tp = 2 if run.tp is None else run.tp
    reason = tensor_parallel.impossible_ranks(run.tp, run.checkpoint, run.device)
    if reason is not None and run.only == "tp":
        parser.error(reason)
    run.tp_reason = reason
    return run


def chosen_sizes(run: Run, defaults: dict[tuple[str, str], cases.Sizes]) -> cases.Sizes:
    """The default sizes of this device and thoroughness, with the tokens that were asked for."""
    sizes = defaults[run.device.type, run.thoroughness]
    if run.tokens is None:
        return sizes
    return replace(sizes, tokens=run.tokens, window=min(sizes.window, run.tokens // 4))


def chosen_dtypes(run: Run) -> Sequence[torch.dtype]:
    """The dtypes that were asked for, or else the default ones."""
    return [DTYPES[name] for name in run.dtype] if run.dtype else cases.DTYPES[run.device.type, run.thoroughness]


def chosen_providers(run: Run) -> list[Provider]:
    """All of them; those that there is no time to compile say so."""
    return [without_compiling(provider) if run.quick else provider for provider in PROVIDERS]


def run_kernels(run: Run, progress: Progress) -> list[Result]:
    """Attention by itself, the masks it needs, and the memory both take."""
    sizes, dtypes, providers = chosen_sizes(run, cases.SIZES), chosen_dtypes(run), chosen_providers(run)
    memory_tokens, long_mask_tokens = MEMORY_TOKENS[run.thoroughness], LONG_MASK_TOKENS[run.thoroughness]
    if run.tokens is not None:
        memory_tokens, long_mask_tokens = (run.tokens,), 8 * run.tokens
    memory_runs = [(tokens, name) for tokens in memory_tokens for name in (OURS, BASELINE)]
    total = len(cases.CASES) * (len(dtypes) + 1) + 1 + len(memory_runs)
    task = progress.add_task("", section="kernels", total=total)
    say = teller(progress, task)
    results: list[Result] = []
    for dtype in dtypes:
        for case in cases.CASES:
            results += kernels.run_case(case, sizes, dtype, run.device, providers, KERNEL_EFFORT[run.thoroughness], say)
            progress.advance(task)
    mask_names = [OURS, BASELINE, FALLBACK_BASELINE]
    for case in cases.CASES:
        say(f"{case.name}: building masks")
        results += kernels.run_masks(case, sizes, run.device, mask_names, MASK_EFFORT[run.thoroughness])
        progress.advance(task)
    results += long_masks(long_mask_tokens, run.device, say)
    progress.advance(task)
    for tokens, name in memory_runs:
        say(f"peak memory of {name}, {tokens:,} tokens")
        results.append(memory.measure_peak(name, tokens, run.device))
        progress.advance(task)
    say("done")
    return results


def run_host(run: Run, progress: Progress) -> list[Result]:
    """What a call costs in Python."""
    task = progress.add_task("", section="host", total=1)
    say = teller(progress, task)
    sizes = cases.Sizes(HOST_TOKENS[run.thoroughness], num_heads=32, num_kv_heads=8, head_dim=128)
    results = host.run_host(sizes, run.device, HOST_EFFORT[run.thoroughness], say)
    progress.advance(task)
    say("done")
    return results


def long_masks(tokens: int, device: torch.device, say: Callable[[str], None]) -> list[Result]:
    """The mask of a long prompt whose left half is padding. A dense one needs up to four bytes per pair on the way."""
    say(f"building masks for {tokens:,} tokens")
    problem = cases.build_problem(memory.MEMORY_CASE, cases.Sizes(tokens, 1, 1, 1), torch.float32, device)
    available = memory.available_bytes()
    tight = device.type == "cpu" and available is not None and available < 6 * tokens * tokens
    results = kernels.time_masks(problem, [OURS] if tight else [OURS, BASELINE], LONG_MASK_EFFORT)
    if tight:
        results.append(
            Result("masks", "", BASELINE, status="unavailable", reason="too little free memory for a dense mask")
        )
    for result in results:
        result.case = f"left_padded, {tokens:,} tokens"
    return results


def without_compiling(provider: Provider) -> Provider:
    """The provider, or in its place one that says that there is no time to compile it."""
    reason = "left out by --quick: compiling it takes seconds for every case"
    return replace(provider, unavailable=lambda problem: reason) if provider.compiles else provider


def run_training(run: Run, progress: Progress) -> list[Result]:
    """Attention by itself, forward and backward."""
    sizes, dtypes, providers = chosen_sizes(run, cases.TRAINING_SIZES), chosen_dtypes(run), chosen_providers(run)
    effort = TRAINING_EFFORT[run.thoroughness]
    task = progress.add_task("", section="training", total=len(training.CASES) * len(dtypes))
    say = teller(progress, task)
    results: list[Result] = []
    for dtype in dtypes:
        for case in training.CASES:
            results += training.run_case(case, sizes, dtype, run.device, providers, effort, say)
            progress.advance(task)
    say("done")
    return results


def run_models(run: Run, progress: Progress) -> list[Result]:
    """Whole models."""
    task = progress.add_task("", section="models", total=2)
    say, sizes, effort = teller(progress, task), models.SIZES[run.thoroughness], MODEL_EFFORT[run.thoroughness]
    results = models.run_reference_model(run.checkpoint, sizes, run.device, effort, say)
    progress.advance(task)
    results += models.run_embeddings(sizes, run.device, effort, say)
    progress.advance(task)
    say("done")
    return results


def run_tp(run: Run, progress: Progress) -> list[Result]:
    """The reference model over several ranks."""
    if run.tp_reason is not None:
        return [Result("tp", "generate", f"{run.tp} ranks", status="unavailable", reason=run.tp_reason)]
    task = progress.add_task("", section="tp", total=1)
    say = teller(progress, task)
    sizes = replace(models.SIZES[run.thoroughness], prompt_tokens=256)
    results = tensor_parallel.run_tensor_parallel(run.checkpoint, run.tp, sizes, run.device, say)
    progress.advance(task)
    say("done")
    return results


def teller(progress: Progress, task: int) -> Callable[[str], None]:
    """A function that shows what is running beside a progress bar."""
    return lambda text: progress.update(task, description=text)


def show(results: Sequence[Result], console: Console) -> None:
    """All tables, and why anything is missing."""
    tables: list[Table | None] = [
        *report.kernel_tables(results),
        report.mask_table(results),
        report.memory_table(results),
        report.host_table(results),
        *report.kernel_tables(results, "training"),
        report.model_table(results),
        report.tensor_parallel_table(results),
    ]
    for table in tables:
        if table is not None:
            console.print(table)
    for line in report.absences(results):
        console.print(line)


def list_all(console: Console) -> None:
    """Cases and implementations with what they are."""
    for heading, entries in (("cases", cases.CASES), ("implementations", PROVIDERS)):
        table = Table("name", "what it is", title=heading, title_justify="left")
        for entry in entries:
            table.add_row(entry.name, entry.description.replace("{", "<").replace("}", ">"))
        console.print(table)


def relative(path: Path) -> Path:
    """The path as seen from the current directory, where it lies below it."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 1 if this project's own attention failed anywhere, 2 for unusable arguments."""
    console = report.make_console()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in READERS:
        name, *rest = arguments
        reader = READERS[name]
        return reader(rest, OneLineParser(prog=f"python -m benchmarks {name}", description=reader.__doc__), console)
    if arguments and arguments[0] in SECTIONS:
        arguments.insert(0, "--only")
    run = parse(arguments)
    if run.list:
        list_all(console)
        return 0
    transformers_logging.disable_progress_bar()
    sections = (run.only,) if run.only else SECTIONS
    if {"models", "tp"} & set(sections):
        models.ensure_checkpoint(run.checkpoint, models.SIZES[run.thoroughness].train_seconds)
    runners = {
        "kernels": run_kernels, "host": run_host, "training": run_training, "models": run_models, "tp": run_tp,
    }  # fmt: skip
    results: list[Result] = []
    machine = report.describe_machine(run.device)
    described = {"command": report.printable_command(), "quick": run.quick, "sections": list(sections)}
    with report.make_progress(console) as progress:
        for section in sections:
            results += runners[section](run, progress)
            # After each section, so that an interrupted run leaves what it has measured.
            report.write_json(results, machine, described, run.json)
    files = {"every sample": relative(run.json)}
    if report.write_plot(results, machine, run.plot):
        files["picture"] = relative(run.plot)
    show(results, console)
    if run.against is not None and (ratios := compare.compare(run.against, compare.load(run.json))):
        console.print(compare.comparison_table(ratios, "This run: times as fast as the earlier one"))
    console.print(report.closing_panel(results, machine, files))
    return int(
        any(result.status == "failed" and (result.section == "tp" or result.provider == OURS) for result in results)
    )


if __name__ == "__main__":
    sys.exit(main())
