# SPDX-License-Identifier: Apache-2.0
"""The tp section: a model sharded by its own plan over ranks, compared with one rank.

torchrun starts `benchmarks.rank` once per rank. On a CPU ranks share its cores, so that more of them are no faster:
there the section shows that sharding is right, and what share of time goes to collectives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .measure import Result, dtype_name
from .models import ModelSizes, is_checkpoint, near_tie, tokens_agree
from .providers import OURS
from .rank import load_config, model_class
from .rows import ABSENT, results_of

SAMPLES = 3
LIMIT_SECONDS = 300.0
PHASES = ("prefill", "decode")
WEIGHTS = ("*.safetensors", "*.bin")


def config_of(model: str) -> PreTrainedConfig:
    """The configuration of a model's text part.

    Raises:
        ValueError: `model` is no folder with a config.json and no hub id that can be had.
    """
    try:
        return load_config(model).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {model}: no configuration found ({str(error).splitlines()[0]}); give a folder that "
            "save_pretrained has written, or the id of a model on the hub"
        ) from None


def impossible_ranks(ranks: int, model: str, device: torch.device) -> str | None:
    """Why a model cannot be sharded over `ranks` ranks here, in words, or None."""
    from model.configuration_reference import ReferenceConfig

    untrained = Path(model).name.startswith("reference") and not is_checkpoint(Path(model))
    config = ReferenceConfig() if untrained else config_of(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if ranks < 1 or heads % ranks or config.num_attention_heads % ranks:
        return f"--ranks must divide the model's {config.num_attention_heads} heads and {heads} key heads, got {ranks}"
    if device.type == "cuda" and ranks > torch.cuda.device_count():
        return f"--ranks {ranks} needs {ranks} GPUs, this machine has {torch.cuda.device_count()}"
    return None


def with_weights(model: str, scratch: Path, dtype: torch.dtype) -> str:
    """The model, or, for a folder that holds a configuration alone, a copy of it with random weights in `scratch`."""
    folder = Path(model)
    if not folder.is_dir() or any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        return model
    torch.manual_seed(0)
    config = load_config(model)
    loader = model_class(config)
    drawn = loader.from_config(config) if loader is AutoModelForCausalLM else loader(config)
    drawn.to(dtype).save_pretrained(scratch)
    return str(scratch)


def run_tensor_parallel(
    model: str,
    ranks: Sequence[int],
    sizes: ModelSizes,
    dtype: torch.dtype,
    device: torch.device,
    say: Callable[[str], None],
) -> list[Result]:
    """Greedy generation on each number of ranks, which must begin with one: the same tokens, and how long they take.

    One result for prefill and one for decoding on each number of ranks.
    """
    results: list[Result] = []
    truth: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory() as scratch:
        model = with_weights(model, Path(scratch), dtype)
        for count in ranks:
            name = f"{count} rank{'s' if count > 1 else ''}"
            say(name)
            mine = [Result("tp", phase, name, dtype_name(dtype), details={"ranks": count}) for phase in PHASES]
            results += mine
            if (reason := impossible_ranks(count, model, device)) is not None:
                for result in mine:
                    result.status, result.reason = "unavailable", reason
                continue
            try:
                outcome = start_ranks(model, count, sizes, dtype, device)
            except RuntimeError as error:
                for result in mine:
                    result.status, result.reason = "failed", str(error)
                continue
            truth = outcome if count == 1 else truth
            for result in mine:
                note(result, outcome, truth, sizes, dtype)
    return results


def note(
    result: Result, outcome: dict[str, Any], truth: dict[str, Any] | None, sizes: ModelSizes, dtype: torch.dtype
) -> None:
    """Put into a result what the ranks found; other tokens than those of one rank are a failure, but for near ties."""
    tokens, phase = outcome["tokens"], result.case
    total = sum(map(len, tokens))
    result.work = outcome["prompt_tokens"] if phase == "prefill" else len(tokens) * sizes.new_tokens
    result.description = (
        f"{OURS}, {len(tokens)} prompts of up to {sizes.prompt_tokens:,} tokens padded left, "
        f"{sizes.new_tokens} greedy tokens each"
    )
    right = truth if truth is not None else outcome
    equal = sum(
        mine == theirs
        for mine, theirs in zip(chain.from_iterable(tokens), chain.from_iterable(right["tokens"]), strict=True)
    )
    result.details |= {
        "threads_per_rank": outcome["threads"],
        "heads_per_rank": outcome["heads"][0],
        "kv_heads_per_rank": outcome["heads"][1],
        "share_of_attention": outcome["shares"][phase]["attention"],
        "share_of_collectives": outcome["shares"][phase]["collectives"],
        "tokens_equal_to_one_rank": equal,
        "tokens_total": total,
    }
    margins = torch.tensor(right["margins"])
    if tokens_agree(torch.tensor(tokens), torch.tensor(right["tokens"]), margins, near_tie(dtype)):
        result.samples = outcome["seconds"][phase]
    else:
        result.status, result.reason = "failed", f"only {equal} of {total} greedy tokens equal those of one rank"


def start_ranks(model: str, ranks: int, sizes: ModelSizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Run `benchmarks.rank` on `ranks` ranks and return what rank 0 found.

    Raises:
        RuntimeError: the ranks failed or took too long; the message holds the end of what they printed.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "outcome.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "benchmarks.rank", model, str(out), "--device", device.type, "--dtype", dtype_name(dtype)]
        command += ["--prompt-tokens", str(sizes.prompt_tokens), "--new-tokens", str(sizes.new_tokens)]
        command += ["--samples", str(SAMPLES)]
        # Without this every rank would take all cores, and they would wait for each other.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        try:
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{ranks} ranks did not finish within {LIMIT_SECONDS:.0f} s") from None
        if run.returncode or not out.exists():
            raise RuntimeError(f"{ranks} ranks failed: {last_error(run.stderr)}")
        return json.loads(out.read_text(encoding="utf-8"))


def last_error(output: str) -> str:
    """The last line of a rank's output that names an error, without torchrun's own summary of failed ranks."""
    lines = [line.strip() for line in output.splitlines() if "Error" in line and "ChildFailedError" not in line]
    return (lines or ["no error message"])[-1][-300:]


def tensor_parallel_table(results: Sequence[Result]) -> Table | None:
    """Generation on each number of ranks: prefill and decoding, and where their time goes."""
    rows = results_of(results, "tp")
    if not rows:
        return None
    table = Table(
        title="Tensor parallel, sharded by the model's own plan: tokens per second "
        "(% of time in attention; in collectives)",
        caption=next((row.description for row in rows if row.description), None),
    )
    for heading in ("ranks", "threads each", "heads each", "prefill", "decoding", "against one rank"):
        table.add_column(heading, justify="right")
    for name in dict.fromkeys(row.provider for row in rows):
        prefilled, decoded = (next(row for row in rows if (row.provider, row.case) == (name, case)) for case in PHASES)
        found = decoded.details
        heads = f"{found['heads_per_rank']} ({found['kv_heads_per_rank']} key)" if "heads_per_rank" in found else ABSENT
        agreement = ABSENT
        if "tokens_total" in found:
            agreement = f"{found['tokens_equal_to_one_rank']} of {found['tokens_total']} greedy tokens equal"
        threads = str(found.get("threads_per_rank", ABSENT))
        table.add_row(name, threads, heads, rate(prefilled), rate(decoded), agreement)
    return table


def rate(result: Result) -> Text:
    """Tokens per second, and the shares of time."""
    if not result.measured:
        failed = result.status == "failed"
        return Text("FAILED" if failed else ABSENT, style="bold red" if failed else "dim")
    shares = (result.details[f"share_of_{name}"] for name in ("attention", "collectives"))
    attention, collectives = (f"{100 * share:.0f} %" for share in shares)
    return Text(f"{result.work / result.median:,.0f} ({attention}; {collectives})")
