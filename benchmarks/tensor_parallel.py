# SPDX-License-Identifier: Apache-2.0
"""The tp section: the reference checkpoint sharded over ranks, compared with one rank.

The runner starts torchrun, which starts this module once per rank:
`python -m torch.distributed.run --nproc-per-node RANKS -m benchmarks.tensor_parallel CHECKPOINT ...`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from model.configuration_reference import ReferenceConfig
from model.modeling_reference import ReferenceForCausalLM

from .measure import Result
from .models import ModelSizes, is_checkpoint, padded_prompts
from .providers import OURS

SAMPLES = 3
LIMIT_SECONDS = 240.0


def impossible_ranks(ranks: int, folder: Path, device: torch.device) -> str | None:
    """Why the reference model cannot be sharded over `ranks` ranks here, in words, or None."""
    config = ReferenceConfig.from_pretrained(folder) if is_checkpoint(folder) else ReferenceConfig()
    heads = config.num_key_value_heads
    if ranks < 1 or heads % ranks:
        return f"--tp must divide the reference model's {heads} key-value heads, got {ranks}"
    if device.type == "cuda" and ranks > torch.cuda.device_count():
        return f"--tp {ranks} needs {ranks} GPUs, this machine has {torch.cuda.device_count()}"
    return None


def run_tensor_parallel(
    folder: Path, ranks: int, sizes: ModelSizes, device: torch.device, say: Callable[[str], None]
) -> list[Result]:
    """Greedy generation on one rank and on `ranks` ranks: the same tokens, and how long they take."""
    results, truth = [], None
    for count in sorted({1, ranks}):
        say(f"{count} rank{'s' if count > 1 else ''}")
        name = f"{count} rank{'s' if count > 1 else ''}"
        result = Result("tp", "generate", name, "float32", unit="s")
        results.append(result)
        try:
            outcome = start_ranks(folder, count, sizes, device)
        except RuntimeError as error:
            result.status, result.reason = "failed", str(error)
            continue
        tokens = outcome["tokens"]
        truth = tokens if count == 1 else truth
        total = sum(map(len, tokens))
        result.work = total
        result.description = (
            f"{OURS}, {len(tokens)} prompts of up to {sizes.prompt_tokens:,} tokens, "
            f"{sizes.new_tokens} greedy tokens each"
        )
        pairs = zip(chain.from_iterable(tokens), chain.from_iterable(truth or []), strict=False)
        equal = sum(mine == theirs for mine, theirs in pairs)
        result.details |= {
            "threads_per_rank": outcome["threads"],
            "heads_per_rank": outcome["heads"],
            "tokens_equal_to_one_rank": equal,
            "tokens_total": total,
        }
        if tokens == truth:
            result.samples = outcome["seconds"]
        else:
            result.status, result.reason = "failed", f"only {equal} of {total} greedy tokens equal those of one rank"
    return results


def start_ranks(folder: Path, ranks: int, sizes: ModelSizes, device: torch.device) -> dict[str, Any]:
    """Run this module on `ranks` ranks and return what rank 0 found.

    Raises:
        RuntimeError: the ranks failed or took too long; the message holds the end of what they printed.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "outcome.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "benchmarks.tensor_parallel", str(folder), str(out), "--device", device.type]
        command += ["--prompt-tokens", str(sizes.prompt_tokens), "--new-tokens", str(sizes.new_tokens)]
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


@torch.no_grad()
def run_rank(options: argparse.Namespace) -> None:
    """What each rank does: load its shard, generate, and on rank 0 write tokens and times."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    device = torch.device(options.device, int(os.environ["LOCAL_RANK"])) if options.device == "cuda" else "cpu"
    sharding = {"tp_plan": "auto"} if ranks > 1 else {}
    model = ReferenceForCausalLM.from_pretrained(options.checkpoint, attn_implementation=OURS, **sharding)
    model.to(device).eval()
    heads: list[int] = []
    attention = model.model.layers[0].self_attn
    attention.q_proj.register_forward_hook(lambda _, __, output: heads.append(output.shape[-1] // attention.head_dim))
    inputs = padded_prompts(PreTrainedTokenizerFast.from_pretrained(options.checkpoint), options.prompt_tokens).to(
        device
    )
    lengths = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens, "do_sample": False}
    seconds = []
    for _ in range(SAMPLES + 1):
        started = time.perf_counter()
        tokens = model.generate(**inputs, **lengths)[:, inputs["input_ids"].shape[1] :].tolist()
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        outcome = {
            "tokens": tokens,
            "seconds": seconds[1:],  # the first was warm-up
            "threads": torch.get_num_threads(),
            "heads": heads[-1],
        }
        options.out.write_text(json.dumps(outcome), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    """The command line of a rank."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensor_parallel", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="where rank 0 writes what it found, as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=16)
    run_rank(parser.parse_args())


if __name__ == "__main__":
    main()
