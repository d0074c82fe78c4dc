# SPDX-License-Identifier: Apache-2.0
"""The serve section: requests that arrive together, batched continuously, by transformers and by engines.

Prompts have mixed lengths. Every answer is compared with eager's, generated alone; an implementation that answers
something else has failed and is not timed. Prefix caches are off: each sample does all of the work.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import BatchEncoding, GenerationConfig, PreTrainedTokenizerFast

import attention_plugin

from .contest import note_reason
from .measure import Result, brief, dtype_name
from .models import TRUTH, decode, load_reference, near_tie, padded_prompts, prefill, tokens_agree
from .providers import BASELINE, FALLBACK_BASELINE, OURS
from .rows import ABSENT, TIMES, baseline_of, results_of, speed

LENGTH_SHARES = (1.0, 0.1, 0.45, 0.2, 0.8, 0.15, 0.3, 0.6)
"""Lengths of prompts relative to the longest, in the order of their arrival, repeated as often as is needed."""

LIMIT_SECONDS = 300.0
DRIVER = Path(__file__).resolve().parent / "drivers" / "engine.py"
"""In a folder of its own: Python looks there first, and modules here have names that engines import as well."""
ENGINES = ("vllm", "sglang")
OWN = "own attention"
"""What rows of engines are relative to."""


@dataclass(frozen=True)
class Load:
    """Requests that arrive at once.

    Attributes:
        requests: how many.
        longest: tokens of the longest prompt.
        new_tokens: greedy tokens after each.
        samples: how often all of them are answered, beside once to warm up.
    """

    requests: int
    longest: int
    new_tokens: int
    samples: int

    @property
    def description(self) -> str:
        """For a reader."""
        return f"{self.requests} requests at once, prompts of up to {self.longest} tokens, {self.new_tokens} new tokens"


LOADS = {"full": Load(24, 384, 32, 5), "quick": Load(8, 128, 8, 2)}


def prompts_of(folder: Path, load: Load) -> list[list[int]]:
    """Prompts of real text, as token ids."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    row = padded_prompts(tokenizer, load.longest)["input_ids"]
    text = row[0].tolist()
    lengths = [max(2, round(load.longest * LENGTH_SHARES[i % len(LENGTH_SHARES)])) for i in range(load.requests)]
    # Each begins elsewhere in the text, so that no two share a beginning.
    return [(text[3 * i :] + text)[:length] for i, length in enumerate(lengths)]


@dataclass(frozen=True)
class Truth:
    """Eager's greedy tokens `[requests, steps]` of each prompt alone, by how much each beat the second, and the margin
    below which either is right.
    """

    tokens: torch.Tensor
    margins: torch.Tensor
    tie: float


@torch.no_grad()
def build_truth(
    folder: Path, prompts: Sequence[Sequence[int]], steps: int, dtype: torch.dtype, device: torch.device
) -> Truth:
    """Generate with eager attention, one prompt after the other."""
    model = load_reference(folder, TRUTH, dtype, device).eval()
    tokens, margins = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        inputs = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        answer, beaten = decode(model, prefill(model, inputs), steps - 1)
        tokens.append(answer)
        margins.append(beaten)
    return Truth(torch.cat(tokens).cpu(), torch.cat(margins).float().cpu(), near_tie(dtype))


def judge(result: Result, tokens: Sequence[Sequence[int]], truth: Truth) -> bool:
    """Whether answers equal eager's, but for near ties; what was found is noted."""
    answers = torch.tensor([list(answer) for answer in tokens])
    if answers.shape != truth.tokens.shape:
        result.status = "failed"
        result.reason = f"answers of {list(answers.shape)} tokens instead of {list(truth.tokens.shape)}"
        return False
    equal = int((answers == truth.tokens).sum())
    result.details |= {"tokens_equal_to_eager": equal, "tokens_total": answers.numel()}
    if tokens_agree(answers, truth.tokens, truth.margins, truth.tie):
        return True
    result.status = "failed"
    result.reason = f"only {equal} of {answers.numel()} greedy tokens equal those of {TRUTH} alone"
    return False


# ---------------------------------------------------------------------- transformers


def run_serve(
    folder: Path,
    load: Load,
    dtype: torch.dtype,
    device: torch.device,
    say: Callable[[str], None],
    names: Sequence[str] = (OURS, BASELINE, FALLBACK_BASELINE),
    engines: Sequence[tuple[str, Path]] = (),
) -> list[Result]:
    """Transformers' continuous batching by each of `names`, then engines, each given with the Python it runs in."""
    prompts = prompts_of(folder, load)
    say(f"{TRUTH}, one request after the other, for comparison")
    truth = build_truth(folder, prompts, load.new_tokens, dtype, device)
    results = []
    for name in names:
        say(f"transformers, {name}")
        results.append(run_transformers(folder, name, load, prompts, truth, dtype, device))
    for engine, python in engines:
        for backend in ("own", OURS):
            say(f"{engine}, {'its own attention' if backend == 'own' else OURS}")
            results.append(run_engine(engine, python, backend, folder, load, prompts, truth, dtype, device))
    for result in results:
        result.description, result.work = load.description, load.requests * load.new_tokens
    return results


@torch.no_grad()
def run_transformers(
    folder: Path,
    name: str,
    load: Load,
    prompts: list[list[int]],
    truth: Truth,
    dtype: torch.dtype,
    device: torch.device,
) -> Result:
    """Continuous batching of transformers with one attention implementation."""
    result = Result("serve", "transformers", name, dtype_name(dtype))
    try:
        from transformers import ContinuousBatchingConfig

        model = load_reference(folder, name, dtype, device).eval()
        if name == OURS:
            attention_plugin.enable_continuous_batching(model)
        options: dict[str, Any] = {
            "generation_config": GenerationConfig(
                max_new_tokens=load.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            "continuous_batching_config": ContinuousBatchingConfig(
                page_size=32, num_blocks=blocks_of(prompts, load), max_batch_tokens=512, use_cuda_graph=False,
                allow_block_sharing=False,
            ),
            "record_timestamps": True,
        }  # fmt: skip
        for sample in range(load.samples + 1):
            answers = list(model.generate_batch(prompts, **options).values())
            if errors := [answer.error for answer in answers if answer.error]:
                raise RuntimeError(errors[0])
            if not judge(result, [answer.generated_tokens for answer in answers], truth):
                result.samples = []
                break
            if sample:  # the first was warm-up
                note_times(result, answers)
    except Exception as error:
        note_reason(result, brief(error))
    return result


def blocks_of(prompts: Sequence[Sequence[int]], load: Load) -> int:
    """Blocks of 32 tokens that hold all requests at once."""
    return sum(-(-(len(prompt) + load.new_tokens) // 32) + 1 for prompt in prompts)


def note_times(result: Result, answers: Sequence[Any]) -> None:
    """From the first request's arrival to the last token; and what a user waits for, of the last sample."""
    begun = min(answer.created_time for answer in answers)
    result.samples.append(max(answer.timestamps[-1] for answer in answers) - begun)
    first = [answer.timestamps[0] - begun for answer in answers]
    each = [
        (answer.timestamps[-1] - answer.timestamps[0]) / (len(answer.timestamps) - 1)
        for answer in answers
        if len(answer.timestamps) > 1
    ]
    result.details |= {
        "first_token_seconds": {"median": statistics.median(first), "p95": percentile(first)},
        "token_seconds": {"median": statistics.median(each), "p95": percentile(each)} if each else None,
    }


def percentile(values: Sequence[float], share: float = 0.95) -> float:
    """The value that a share of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# ---------------------------------------------------------------------- engines


def options_of(
    engine: str, backend: str, folder: Path, load: Load, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Arguments of an engine's own API."""
    longest = load.longest + load.new_tokens + 32
    cpu = device.type == "cpu"
    if engine == "vllm":
        options = {
            "model": str(folder), "trust_remote_code": True, "dtype": dtype_name(dtype), "model_impl": "transformers",
            "max_model_len": longest, "max_num_seqs": load.requests, "enable_prefix_caching": False,
            "enforce_eager": cpu, "disable_log_stats": True,
        }  # fmt: skip
        return options if backend == "own" else options | {"attention_backend": "MY_TRITON"}
    options = {
        "model_path": str(folder), "trust_remote_code": True, "dtype": dtype_name(dtype), "model_impl": "transformers",
        "context_length": longest, "max_running_requests": load.requests, "disable_radix_cache": True,
        "max_total_tokens": 2 * load.requests * longest, "log_level": "warning",
    }  # fmt: skip
    if cpu:
        options |= {"device": "cpu", "disable_overlap_schedule": True, "disable_cuda_graph": True}
        options |= {"grammar_backend": "none", "attention_backend": "torch_native"}
    return options if backend == "own" else options | {"attention_backend": OURS}


def run_engine(
    engine: str,
    python: Path,
    backend: str,
    folder: Path,
    load: Load,
    prompts: list[list[int]],
    truth: Truth,
    dtype: torch.dtype,
    device: torch.device,
) -> Result:
    """One engine with its own attention, or with ours, in its own environment."""
    result = Result("serve", engine, OWN if backend == "own" else OURS, dtype_name(dtype))
    if not python.exists():
        result.status = "unavailable"
        result.reason = (
            f"{engine} is not at {python}; `make test-engines` makes an environment, --python PATH names another"
        )
        return result
    options = options_of(engine, backend, folder.resolve(), load, dtype, device)
    job = {"engine": engine, "options": options, "prompts": prompts}
    job |= {"new_tokens": load.new_tokens, "samples": load.samples}
    try:
        outcome = answers_of(python, job)
    except RuntimeError as error:
        result.status, result.reason = "failed" if backend == OURS else "unavailable", str(error)
        return result
    if judge(result, outcome["tokens"], truth):
        result.samples = outcome["seconds"]
    return result


def answers_of(python: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What `engine.py` finds, in a session of its own, all of which is ended at the end: engines leave workers behind.

    Raises:
        RuntimeError: no answer; the message holds the end of what it printed.
    """
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / name for name in ("job.json", "result.json", "log.txt")]
        paths[0].write_text(json.dumps(job), encoding="utf-8")
        command = [str(python), str(DRIVER), str(paths[0]), str(paths[1])]
        with open(paths[2], "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=scratch, start_new_session=True
            )
            try:
                process.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"{job['engine']} gave no answer in {LIMIT_SECONDS:.0f} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not paths[1].exists():
            lines = [line for line in paths[2].read_text(encoding="utf-8", errors="replace").splitlines() if line]
            telling = [line for line in lines if "Error" in line] or lines or ["no output"]
            raise RuntimeError(f"{job['engine']} ended without an answer: {telling[-1].strip()[-200:]}")
        return json.loads(paths[1].read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- table


def serve_table(results: Sequence[Result]) -> Table | None:
    """Tokens per second, and what a user waits for."""
    rows = results_of(results, "serve")
    if not rows:
        return None
    table = Table(title=f"Serving, {rows[0].dtype}", caption=rows[0].description)
    for heading in (
        "server",
        "attention",
        "new tokens/s",
        "first token, median and p95",
        "a token, median and p95",
        "",
    ):
        table.add_column(heading, justify="left" if heading in ("server", "attention") else "right")
    for row in rows:
        if not row.measured:
            table.add_row(row.case, row.provider, "FAILED" if row.status == "failed" else ABSENT, ABSENT, ABSENT, "")
            continue
        peers = results_of(rows, "serve", case=row.case)
        own = next((peer for peer in peers if peer.provider == OWN and peer.measured), None)
        ratio = speed(row, own or baseline_of(peers))
        rate = f"{row.work / row.median:,.0f}" + ("" if ratio is None else f" ({ratio:.2f}{TIMES})")
        waits = [row.details.get(name) for name in ("first_token_seconds", "token_seconds")]
        cells = [ABSENT if each is None else waited(each) for each in waits]
        found = row.details
        equal = f"{found['tokens_equal_to_eager']} of {found['tokens_total']}"
        table.add_row(row.case, row.provider, rate, *cells, equal)
    return table


def waited(times: dict[str, float]) -> str:
    """Median and 95th percentile in milliseconds."""
    return f"{1e3 * times['median']:.0f}, {1e3 * times['p95']:.0f} ms"
