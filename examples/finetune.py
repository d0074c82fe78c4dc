# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a checkpoint on this Python's own code, with LoRA and packed documents, and check the attention by it.

    python examples/finetune.py CHECKPOINT [--steps 80] [--lora-rank 8] [--attn-implementation both] [--output OUT]

A row holds several functions of the standard library, told apart by `position_ids` that start anew. The same training
runs with `my_triton` and with `eager`: same seed, same order, same first adapter. The losses must agree at every step,
and fall; else the exit status is 1. It is 2 for arguments that cannot be used.
"""

import argparse
import ast
import json
import os
import sys
import sysconfig
import time
import warnings
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

import attention_plugin

IMPLEMENTATIONS = [attention_plugin.NAME, "eager"]
SEED = 0
DOCUMENTS_PER_ROW = 8
DOCUMENT_TOKENS = range(32, 257)
# Of a loss. Both compute in float32 but sum in another order; what that rounds off grows from step to step.
TOLERANCE = 1e-3
ROWS_PRINTED = 10
PROMPT = "def "


class Run(NamedTuple):
    """What one training was: the loss of every step, its wall-clock time, and a sample before and after."""

    losses: list[float]
    seconds: float
    before: str
    after: str


def documents(tokenizer: transformers.PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """The token ids of the standard library's functions without documentation, in the order of their files.

    The reference model was trained on documentation, so this is text that it has not seen.
    """
    sources: dict[str, None] = {}  # a set that keeps its order
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef) and not ast.get_docstring(node):
                sources[ast.unparse(node)] = None
    encoded = tokenizer([source + tokenizer.eos_token for source in sources])["input_ids"]
    return [{"input_ids": token_ids} for token_ids in encoded if len(token_ids) in DOCUMENT_TOKENS]


def sample(model: transformers.PreTrainedModel | PeftModel, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """What the model writes after `PROMPT`, drawn from the same random numbers at every call."""
    transformers.set_seed(SEED)
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    tokens = model.eval().generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.5, top_k=40)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def finetune(checkpoint: Path, implementation: str, steps: int, rank: int, output: Path | None) -> Run:
    """Train a new LoRA adapter for `checkpoint` with the given attention, and save it to `output` unless None."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, attn_implementation=implementation)
    before = sample(base, tokenizer)
    transformers.set_seed(SEED)  # an adapter begins with random numbers
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = get_peft_model(base, lora)
    options = dict(max_steps=steps, per_device_train_batch_size=DOCUMENTS_PER_ROW, learning_rate=1e-2, seed=SEED)
    quiet = dict(report_to="none", disable_tqdm=True, log_level="error", dataloader_pin_memory=False)
    with TemporaryDirectory() as scratch:
        arguments = TrainingArguments(scratch, **options, **quiet, logging_steps=1, save_strategy="no")
        # Makes one row of a batch, with position_ids and the lengths of the documents. There must be no attention_mask:
        # beside one, transformers does not look for documents, and eager attention sees across them.
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        trainer = Trainer(model, arguments, data_collator=collator, train_dataset=documents(tokenizer))
        trainer.remove_callback(transformers.PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    if output is not None:
        model.save_pretrained(output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(losses, seconds, before, sample(model, tokenizer))


def report(runs: dict[str, Run], console: Console) -> list[str]:
    """Print samples, losses and times; returns what is wrong with them, in words."""
    first_run = next(iter(runs.values()))
    for title, text in (("a sample before", first_run.before), ("and after", first_run.after)):
        console.print(Panel(Text(text), title=title))
    steps = list(zip(*(run.losses for run in runs.values()), strict=True))
    differences = [(max(losses) - min(losses)) / min(losses) for losses in steps]
    table = Table("step", *(f"loss, {name}" for name in runs), "relative difference")
    for index in sorted({(len(steps) - 1) * row // (ROWS_PRINTED - 1) for row in range(ROWS_PRINTED)}):
        table.add_row(str(index + 1), *(f"{loss:.5f}" for loss in steps[index]), f"{differences[index]:.1e}")
    table.add_section()
    table.add_row("all", *(f"{run.seconds:.1f} s" for run in runs.values()), f"at most {max(differences):.1e}")
    if len(runs) == 1:
        table.columns.pop()
    console.print(table)

    fifth = max(1, len(steps) // 5)
    problems = []
    for name, run in runs.items():
        first, last = mean(run.losses[:fifth]), mean(run.losses[-fifth:])
        console.print(f"{name}: mean loss {first:.3f} in the first fifth of the steps, {last:.3f} in the last")
        if not last < first:
            problems.append(f"the loss with {name} did not fall")
    if not max(differences) <= TOLERANCE:
        problems.append(f"the losses differ by {max(differences):.1e}, more than {TOLERANCE:.0e}")
    return problems


def parse_arguments() -> argparse.Namespace:
    """The command line; ends the process with status 2 and a message where it cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="directory made by `python -m model.checkpoint`")
    parser.add_argument("--steps", type=int, default=80, help="at least 2 (default: 80)")
    parser.add_argument("--lora-rank", type=int, default=8, help="at least 1 (default: 8)")
    parser.add_argument("--attn-implementation", choices=["both", *IMPLEMENTATIONS], default="both")
    parser.add_argument("--output", type=Path, help="directory for the trained adapter (default: it is not kept)")
    options = parser.parse_args()
    if not (options.checkpoint / "config.json").is_file():
        make = f"python -m model.checkpoint {options.checkpoint} --train-seconds 60"
        parser.error(f"{options.checkpoint} holds no checkpoint; make one with `{make}`")
    own_classes = json.loads((options.checkpoint / "config.json").read_text(encoding="utf-8")).get("auto_map")
    if own_classes is not None and "AutoModelForCausalLM" not in own_classes:
        parser.error(f"{options.checkpoint} holds no language model of text, but {', '.join(own_classes)}")
    if options.steps < 2 or options.lora_rank < 1:
        parser.error(f"--steps must be at least 2 and --lora-rank 1, got {options.steps} and {options.lora_rank}")
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)  # now, and not after the training
        except OSError as error:
            parser.error(f"--output cannot be written: {error}")
    return options


def main() -> int:
    """Train, report, and return the exit status."""
    options, console = parse_arguments(), Console()
    idle_cores = round((os.cpu_count() or 1) - os.getloadavg()[0])
    torch.set_num_threads(max(1, min(idle_cores, torch.get_num_threads())))  # all wait for one whose core is busy
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's to heed
    choice = options.attn_implementation
    runs: dict[str, Run] = {}
    for name in IMPLEMENTATIONS if choice == "both" else [choice]:
        with console.status(f"{options.steps} steps with {name}"):
            output = None if runs else options.output  # the first run's adapter; the second only checks it
            runs[name] = finetune(options.checkpoint, name, options.steps, options.lora_rank, output)
    problems = report(runs, console)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
