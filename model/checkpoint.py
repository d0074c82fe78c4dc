# SPDX-License-Identifier: Apache-2.0
"""Train a small reference model on the Python standard library's documentation and write it as a checkpoint.

    python -m model.checkpoint OUT [--train-seconds 60] [--seed 0] [--attn-implementation sdpa]

OUT becomes a directory that `AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)` loads anywhere: it
holds the configuration, the weights, the tokenizer and the modeling files themselves.
"""

import argparse
import ast
import json
import math
import os
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AttentionInterface, GenerationConfig, PreTrainedTokenizerFast

from .configuration_reference import ReferenceConfig
from .modeling_reference import ReferenceForCausalLM

BOS, EOS, PAD = SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]
VOCAB_SIZE = 2048
SEQUENCE_LENGTH = 256
BATCH_SIZE = 4
MATRIX_LEARNING_RATE = 1e-2
VECTOR_LEARNING_RATE = 1e-2
# Code of other people, and the tests' documentation, which is often broken on purpose.
FOREIGN_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
SAMPLE_PROMPTS = ["Return the", "This class", "If the file"]


class UnusableInput(ValueError):
    """What the caller gave cannot be worked with; the message says what, why, and what to give instead."""


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


def train_tokenizer(documents: list[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level pairs learned from `documents`: every text has tokens, and decoding gives back the text itself.

    A text is preceded by the token that begins a document, as every document is in training. Padding goes to the left.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


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


def build_optimizers(model: ReferenceForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms.

    Muon gets as far in one step as AdamW in about three, and a minute on a laptop has only some hundred steps.
    """
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=VECTOR_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(elapsed: float) -> float:
    """Of the highest learning rate, after a share `elapsed` of the training: a short rise, then a cosine to zero."""
    return min(1.0, 0.02 + elapsed / 0.03) * 0.5 * (1.0 + math.cos(math.pi * elapsed))


def train(model: ReferenceForCausalLM, stream: torch.Tensor, train_seconds: float) -> float:
    """Train in place on windows drawn from `stream`, int64 [tokens], showing progress; returns the smoothed loss.

    At least one step is taken, however short the time.
    """
    optimizers = build_optimizers(model)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    window = torch.arange(SEQUENCE_LENGTH)
    model.train()
    loss_average, steps = math.nan, 0
    bar_format = "training {percentage:3.0f}%|{bar:30}| {desc}, {remaining} left"
    with tqdm(total=train_seconds, bar_format=bar_format) as bar:
        started = time.monotonic()
        while steps == 0 or bar.n < train_seconds:
            for group, highest in groups:
                group["lr"] = highest * learning_rate_factor(bar.n / train_seconds)
            offsets = torch.randint(len(stream) - SEQUENCE_LENGTH, (BATCH_SIZE, 1))
            batch = stream[offsets + window].to(model.device)  # [BATCH_SIZE, SEQUENCE_LENGTH]
            loss = model(batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            steps += 1
            loss_average = loss.item() if steps == 1 else 0.95 * loss_average + 0.05 * loss.item()
            bar.set_description_str(f"{steps} steps, loss {loss_average:.3f}", refresh=False)
            bar.update(min(train_seconds, time.monotonic() - started) - bar.n)
    model.eval()
    return loss_average


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


def prepare_out(out: Path) -> None:
    """Make the directory `out`. `UnusableInput` unless it is new, empty, or an earlier checkpoint of this model."""
    if out.exists() and not out.is_dir():
        raise UnusableInput(f"OUT must be a directory, but {out} is a file; give another path.")
    # Now and not after the training: a place that cannot be written to should cost nobody a minute.
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not is_checkpoint(out):
        raise UnusableInput(f"OUT must be new, empty or an earlier checkpoint, but {out} holds other files.")


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds the configuration of a reference model."""
    try:
        return (
            json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == ReferenceConfig.model_type
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_checkpoint(
    out: str | Path, train_seconds: float = 60.0, seed: int = 0, attn_implementation: str = "sdpa"
) -> ReferenceForCausalLM:
    """Train a model for `train_seconds` and write it, with its tokenizer, to the directory `out`.

    `attn_implementation` is any name that transformers knows, those that an imported package registered among them. The
    same seed gives the same corpus, tokenizer, first weights and order of batches; how many steps fit into the time is
    the machine's. Training runs on the accelerator where there is one. Returns the trained model.

    Raises:
        UnusableInput: for an `out` that is in the way, a time that is not above 0, an unknown attention implementation,
            or a Python without documentation.
        OSError: where `out` cannot be written.
    """
    if not 0.0 < train_seconds < math.inf:
        raise UnusableInput(f"train_seconds must be above 0 and finite, got {train_seconds}.")
    known = ["eager", *AttentionInterface().valid_keys()]
    if attn_implementation not in known:
        raise UnusableInput(f"Unknown attention implementation {attn_implementation!r}; known are {', '.join(known)}.")
    out = Path(out)
    prepare_out(out)

    torch.manual_seed(seed)
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


def idle_cores() -> int:
    """Cores that other programs have left idle in the last minute, at least one.

    Where a thread's core is busy all others wait for it at every step: on two busy cores, two threads took a tenth of
    the steps that one did.
    """
    return max(1, round((os.cpu_count() or 1) - os.getloadavg()[0]))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for arguments that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m model.checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; an earlier checkpoint is replaced")
    parser.add_argument("--train-seconds", type=float, default=60.0, help="time to train (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the batches (default: 0)")
    parser.add_argument("--attn-implementation", default="sdpa", help="attention used in training (default: sdpa)")
    options = parser.parse_args(arguments)
    try:
        write_checkpoint(options.out, options.train_seconds, options.seed, options.attn_implementation)
    except (UnusableInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(idle_cores())
    sys.exit(main())
