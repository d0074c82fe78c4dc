# SPDX-License-Identifier: Apache-2.0
"""What the two trained checkpoints share: tokenizer, optimisers, the loop, and the checks of what the user gave."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerFast

from .configuration_reference import ReferenceConfig

BOS, EOS, PAD = SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]
VOCAB_SIZE = 2048
MATRIX_LEARNING_RATE = 1e-2
VECTOR_LEARNING_RATE = 1e-2


class UnusableInput(ValueError):
    """What the caller gave cannot be worked with; the message says what, why, and what to give instead."""


def train_tokenizer(
    documents: list[str], vocab_size: int = VOCAB_SIZE, special_tokens: Sequence[str] = (), **options: Any
) -> PreTrainedTokenizerFast:
    """Byte-level pairs learned from `documents`: every text has tokens, and decoding gives back the text itself.

    A text is preceded by the token that begins a document, as every document is in training. Padding goes to the left.
    Ids of `special_tokens` follow those of the three that every tokenizer has; `options` go to the tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *special_tokens],
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
        **options,
    )


def build_optimizers(
    model: PreTrainedModel,
    matrix_learning_rate: float = MATRIX_LEARNING_RATE,
    vector_learning_rate: float = VECTOR_LEARNING_RATE,
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices that multiply, AdamW for embeddings and norms.

    Muon gets as far in one step as AdamW in about three, and a minute on a laptop has only some hundred steps.
    """
    matrices = [parameter for name, parameter in model.named_parameters() if ".layers." in name and parameter.ndim == 2]
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=matrix_learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=vector_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class WidensBfloat16(TorchFunctionMode):
    """Makes conversions to bfloat16, by which Muon rounds what it multiplies, give a float32 copy instead.

    On a CPU without instructions for bfloat16 torch's products take about a hundred times as long as in float32: a
    minute would have 15 steps.
    """

    def __torch_function__(
        self, function: Callable, types: Any, arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        # Up to torch 2.14 Muon calls `bfloat16()`, from 2.15 on `to(dtype=torch.bfloat16, copy=True)`.
        converts = function is torch.Tensor.to and (keywords or {}).get("dtype") is torch.bfloat16
        if converts or function is torch.Tensor.bfloat16:
            return arguments[0].to(torch.float32, copy=True)
        return function(*arguments, **(keywords or {}))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are worth having on a device."""
    return device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def learning_rate_factor(elapsed: float) -> float:
    """Of the highest learning rate, after a share `elapsed` of the training: a short rise, then a cosine to zero."""
    return min(1.0, 0.02 + elapsed / 0.03) * 0.5 * (1.0 + math.cos(math.pi * elapsed))


def train_on(
    model: PreTrainedModel,
    draw: Callable[[float], Mapping[str, torch.Tensor]],
    train_seconds: float,
    matrix_learning_rate: float = MATRIX_LEARNING_RATE,
    vector_learning_rate: float = VECTOR_LEARNING_RATE,
) -> float:
    """Train in place on batches, the model's arguments with labels, showing progress; returns the smoothed loss.

    `draw` gets the share of the time that has passed. At least one step is taken, however short the time.
    """
    optimizers = build_optimizers(model, matrix_learning_rate, vector_learning_rate)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    model.train()
    loss_average, steps = math.nan, 0
    bar_format = "training {percentage:3.0f}%|{bar:30}| {desc}, {remaining} left"
    # A log, unlike a terminal, keeps every state of the bar.
    interval = 0.1 if sys.stderr.isatty() else 15.0
    with tqdm(total=train_seconds, bar_format=bar_format, mininterval=interval) as bar:
        started = time.monotonic()
        while steps == 0 or bar.n < train_seconds:
            for group, highest in groups:
                group["lr"] = highest * learning_rate_factor(bar.n / train_seconds)
            batch = {name: tensor.to(model.device) for name, tensor in draw(bar.n / train_seconds).items()}
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with nullcontext() if multiplies_bfloat16(model.device) else WidensBfloat16():
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            steps += 1
            loss_average = loss.item() if steps == 1 else 0.95 * loss_average + 0.05 * loss.item()
            bar.set_description_str(f"{steps} steps, loss {loss_average:.3f}", refresh=False)
            bar.update(min(train_seconds, time.monotonic() - started) - bar.n)
    model.eval()
    return loss_average


def prepare_out(out: Path, model_type: str) -> None:
    """Make the directory `out`. `UnusableInput` unless it is new, empty, or an earlier checkpoint of that model."""
    if out.exists() and not out.is_dir():
        raise UnusableInput(f"OUT must be a directory, but {out} is a file; give another path.")
    # Now and not after the training: a place that cannot be written to should cost nobody a minute.
    out.mkdir(parents=True, exist_ok=True)
    # Files of another model would stay beside the new ones, and be loaded with them.
    if any(out.iterdir()) and not is_checkpoint(out, model_type):
        raise UnusableInput(
            f"OUT must be new, empty or an earlier checkpoint of {model_type}, but {out} holds other files; give "
            "another path."
        )


def is_checkpoint(folder: Path, model_type: str = ReferenceConfig.model_type) -> bool:
    """Whether `folder` holds the configuration of such a model."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == model_type
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepare(out: str | Path, model_type: str, train_seconds: float, seed: int, attn_implementation: str) -> Path:
    """Check the arguments of a training, seed torch and make the directory `out`.

    Raises:
        UnusableInput: for an `out` that is in the way, a time that is not above 0, a seed that torch does not take, or
            an unknown attention implementation.
        OSError: where `out` cannot be written.
    """
    if not 0.0 < train_seconds < math.inf:
        raise UnusableInput(f"train_seconds must be above 0 and finite, got {train_seconds}.")
    if not 0 <= seed < 2**63:
        raise UnusableInput(f"seed must be at least 0 and below 2**63, got {seed}.")
    known = ["eager", *AttentionInterface().valid_keys()]
    if attn_implementation not in known:
        raise UnusableInput(f"Unknown attention implementation {attn_implementation!r}; known are {', '.join(known)}.")
    out = Path(out)
    prepare_out(out, model_type)
    torch.manual_seed(seed)
    return out


def idle_cores() -> int:
    """Cores that other programs have left idle in the last minute, at least one.

    Where a thread's core is busy all others wait for it at every step: on two busy cores, two threads took a tenth of
    the steps that one did.
    """
    return max(1, round((os.cpu_count() or 1) - os.getloadavg()[0]))
