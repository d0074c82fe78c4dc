# SPDX-License-Identifier: Apache-2.0
"""Train a small reference model on the Python standard library's documentation and write it as a checkpoint.

    python -m model.checkpoint OUT [--multimodal] [--train-seconds 60] [--seed 0] [--attn-implementation sdpa]

OUT becomes a directory that `AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)` loads anywhere: it
holds the configuration, the weights, the tokenizer and the modeling files themselves. With `--multimodal` it is a model
that reads images instead: see `model.multimodal_checkpoint`.
"""

import argparse
import ast
import contextlib
import importlib
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AttentionInterface, GenerationConfig, PreTrainedTokenizerFast

from .configuration_reference import ReferenceConfig
from .modeling_reference import ReferenceForCausalLM
from .training import UnusableInput, idle_cores, prepare, train_on, train_tokenizer

SEQUENCE_LENGTH = 256
BATCH_SIZE = 4
# Code of other people, and the tests' documentation, which is often broken on purpose.
FOREIGN_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
SAMPLE_PROMPTS = ["Return the", "This class", "If the file"]


def collect_documents() -> list[str]:
    """The distinct documentation strings of the running Python's standard library, in the order of their files.

    Raises:
        UnusableInput: where there are too few to train on, as in a Python without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents: dict[str, None] = {}  # a set that keeps its order
    for path in sorted(root.rglob("*.py")):
        if not FOREIGN_FOLDERS.intersection(path.relative_to(root).parts):
            documents.update(dict.fromkeys(docstrings(path)))
    if sum(map(len, documents)) < 100_000:
        raise UnusableInput(f"{root} holds too few documentation strings to train on; is this Python stripped?")
    return list(documents)


def docstrings(path: Path) -> Iterator[str]:
    """The documentation strings of one module, its classes and its functions; none where it is not valid Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and (text := ast.get_docstring(node)):
            yield text


def token_stream(documents: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """All documents in an order drawn from `seed`, each closed by its end token, as one int64 tensor [tokens]."""
    shuffled = random.Random(seed).sample(documents, len(documents))
    stream: list[int] = []
    for token_ids in tokenizer(shuffled)["input_ids"]:
        stream += [*token_ids, tokenizer.eos_token_id]
    return torch.tensor(stream)


def reference_config(tokenizer: PreTrainedTokenizerFast) -> ReferenceConfig:
    """The trained model's shape: 4 layers, every other one with a window shorter than the training sequences."""
    return ReferenceConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train(model: ReferenceForCausalLM, stream: torch.Tensor, train_seconds: float) -> float:
    """Train in place on windows drawn from `stream`, int64 [tokens], showing progress; returns the smoothed loss.

    At least one step is taken, however short the time.
    """
    window = torch.arange(SEQUENCE_LENGTH)

    def draw(elapsed: float) -> dict[str, torch.Tensor]:
        offsets = torch.randint(len(stream) - SEQUENCE_LENGTH, (BATCH_SIZE, 1))
        batch = stream[offsets + window]  # [BATCH_SIZE, SEQUENCE_LENGTH]
        return {"input_ids": batch, "labels": batch}

    return train_on(model, draw, train_seconds)


def save(model: ReferenceForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the complete checkpoint directory: configuration, weights, tokenizer, modeling files."""
    # Saving names the classes that it saves; the base model is not among them, and engines ask for it.
    model.config.auto_map = {"AutoModel": "modeling_reference.ReferenceModel"}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def sample(model: ReferenceForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Each of the sample prompts with up to 48 tokens that the model drew after it."""
    inputs = tokenizer(SAMPLE_PROMPTS, return_tensors="pt", padding=True).to(model.device)
    drawn = model.generate(**inputs, max_new_tokens=48, do_sample=True, temperature=0.6, top_k=40)
    return tokenizer.batch_decode(drawn, skip_special_tokens=True)


def write_checkpoint(
    out: str | Path, train_seconds: float = 60.0, seed: int = 0, attn_implementation: str = "sdpa"
) -> ReferenceForCausalLM:
    """Train a model for `train_seconds` and write it, with its tokenizer, to the directory `out`.

    `attn_implementation` is any name that transformers knows, those that an imported package registered among them. The
    same seed gives the same corpus, tokenizer, first weights and order of batches; how many steps fit into the time is
    the machine's. Training runs on the accelerator where there is one. Returns the trained model.

    Raises:
        UnusableInput: for an `out` that is in the way, a time that is not above 0, a seed that is not an int64 of 0 or
            more, an unknown attention implementation, or a Python without documentation.
        ImportError: from transformers, where an attention implementation's package is not installed.
        OSError: where `out` cannot be written.
    """
    out = prepare(out, ReferenceConfig.model_type, train_seconds, seed, attn_implementation)
    print("reading the standard library's documentation", flush=True)
    documents = collect_documents()
    tokenizer = train_tokenizer(documents)
    stream = token_stream(documents, tokenizer, seed)
    model = ReferenceForCausalLM(reference_config(tokenizer))
    model.set_attn_implementation(attn_implementation)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(documents):,} texts, {len(stream):,} tokens, {parameters:,} parameters, {model.device}", flush=True)
    train(model, stream, train_seconds)
    save(model, tokenizer, out)
    for text in sample(model, tokenizer):
        print(f"\n--- a sample ---\n{text}")
    print("\n--- to load it ---")
    print(f'AutoModelForCausalLM.from_pretrained("{out.resolve()}", trust_remote_code=True)')
    print(f'AutoTokenizer.from_pretrained("{out.resolve()}", trust_remote_code=True)')
    return model


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for arguments that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m model.checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; an earlier checkpoint is replaced")
    parser.add_argument("--multimodal", action="store_true", help="a model that reads images of coloured squares")
    parser.add_argument("--train-seconds", type=float, help="time to train (default: 60, with --multimodal 120)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the batches (default: 0)")
    parser.add_argument(
        "--attn-implementation", default="sdpa", help="used in training, such as my_triton; default: sdpa"
    )
    options = parser.parse_args(arguments)
    if options.attn_implementation not in AttentionInterface():
        with contextlib.suppress(ImportError):
            importlib.import_module("attention_plugin")  # registers "my_triton"; of others transformers knows none
    try:
        write = write_checkpoint
        if options.multimodal:
            from .multimodal_checkpoint import write_multimodal_checkpoint as write  # needs Pillow
        seconds = {} if options.train_seconds is None else {"train_seconds": options.train_seconds}
        write(options.out, seed=options.seed, attn_implementation=options.attn_implementation, **seconds)
    except (UnusableInput, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(idle_cores())
    sys.exit(main())
