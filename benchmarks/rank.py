# SPDX-License-Identifier: Apache-2.0
"""What each rank of the section tp does: load its shard, generate, and find out where the time goes.

torchrun starts it once per rank: `python -m torch.distributed.run --nproc-per-node RANKS -m benchmarks.rank MODEL OUT`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BatchEncoding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import attention_plugin
from model.configuration_reference import ReferenceConfig
from model.modeling_reference import ReferenceForCausalLM

from .models import PROMPT_SHARES, decode, padded_prompts, prefill
from .providers import OURS

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast")


def load_config(model: str) -> PreTrainedConfig:
    """A model's configuration; the reference model, which no Auto class knows, is told by its type."""
    file = Path(model) / "config.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == ReferenceConfig.model_type:
        return ReferenceConfig.from_pretrained(model)
    return AutoConfig.from_pretrained(model, trust_remote_code=False)  # else it asks on the terminal


def model_class(config: PreTrainedConfig) -> Any:
    """The class that loads a model with this configuration."""
    return ReferenceForCausalLM if isinstance(config, ReferenceConfig) else AutoModelForCausalLM


def prompts_of(model: str, vocab_size: int, longest: int) -> BatchEncoding:
    """Prompts of mixed lengths padded on the left: real text where the model has a tokenizer, else random tokens."""
    if (Path(model) / "tokenizer.json").exists():
        return padded_prompts(PreTrainedTokenizerFast.from_pretrained(model), longest)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (len(PROMPT_SHARES), longest), generator=generator)
    lengths = torch.tensor([max(1, round(share * longest)) for share in PROMPT_SHARES])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return BatchEncoding({"input_ids": tokens * mask, "attention_mask": mask})


# ---------------------------------------------------------------------- where the time goes


class Stopwatch:
    """Time inside some calls, by name: CUDA events on a GPU, the clock on the wall elsewhere.

    A call inside another that is timed counts once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._inside = device, False
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed under a name. What it has begun is waited for: its time is not to fall on others."""

        def timed(*arguments: Any, **keywords: Any) -> Any:
            if self._inside:
                return function(*arguments, **keywords)
            self._inside, started = True, self._now()
            try:
                result = function(*arguments, **keywords)
                local = result._local_tensor if isinstance(result, DTensor) else result
                if isinstance(local, AsyncCollectiveTensor):
                    local.wait()
                return result
            finally:
                self._spans.setdefault(name, []).append((started, self._now()))
                self._inside = False

        return timed

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, name: str) -> float:
        """All time under a name so far."""
        if self._device.type != "cuda":
            return sum(end - start for start, end in self._spans.get(name, []))
        torch.cuda.synchronize(self._device)
        return sum(start.elapsed_time(end) for start, end in self._spans.get(name, [])) / 1000


@contextmanager
def watched(device: torch.device, heads: list[tuple[int, int]]) -> Iterator[Stopwatch]:
    """Time attention and collectives in here, and note query and key heads of each attention call."""
    watch = Stopwatch(device)
    attend = watch.wrapped("attention", attention_plugin.attention_forward)

    def noted(module: Any, query: Tensor, key: Tensor, *arguments: Any, **keywords: Any) -> Any:
        heads.append((query.shape[1], key.shape[1]))
        return attend(module, query, key, *arguments, **keywords)

    with ExitStack() as stack:
        for name in COLLECTIVES:
            function = getattr(torch.distributed, name)
            stack.enter_context(patch.object(torch.distributed, name, watch.wrapped("collectives", function)))
        redistribute = watch.wrapped("collectives", DTensor.redistribute)
        stack.enter_context(patch.object(DTensor, "redistribute", redistribute))
        AttentionInterface.register(OURS, noted)
        try:
            yield watch
        finally:
            AttentionInterface.register(OURS, attention_plugin.attention_forward)


# ---------------------------------------------------------------------- one rank


def finish(device: torch.device) -> float:
    """The time, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def generate(model: PreTrainedModel, inputs: BatchEncoding, steps: int) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Greedy tokens `[batch, 1 + steps]`, their margins, and the seconds of prefill and of decoding."""
    device = inputs["input_ids"].device
    begun = finish(device)
    state = prefill(model, inputs)
    between = finish(device)
    tokens, margins = decode(model, state, steps)
    return tokens, margins, {"prefill": between - begun, "decode": finish(device) - between}


def shares_of_time(model: PreTrainedModel, inputs: BatchEncoding, steps: int) -> dict[str, Any]:
    """For prefill and decoding, the shares of time in attention and in collectives; and the heads of this rank.

    A pass of its own: to tell them apart, each is waited for, which the passes that are timed do not do.
    """
    device, heads = inputs["input_ids"].device, []
    shares: dict[str, Any] = {}
    with watched(device, heads) as watch:
        begun = finish(device)
        state = prefill(model, inputs)
        spent, before = finish(device) - begun, {}
        for name in ("attention", "collectives"):
            before[name] = watch.seconds(name)
            shares.setdefault("prefill", {})[name] = before[name] / spent
        begun = finish(device)
        decode(model, state, steps)
        spent = finish(device) - begun
        shares["decode"] = {name: (watch.seconds(name) - before[name]) / spent for name in before}
    # Models may call attention with different heads (some layers without sharding): the fewest are a shard's.
    return {"shares": shares, "heads": min(heads)}


@torch.no_grad()
def run_rank(options: argparse.Namespace) -> None:
    """Load a shard, generate, and on rank 0 write tokens, times and shares."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    sharding = {"tp_plan": "auto"} if ranks > 1 else {}
    dtype = getattr(torch, options.dtype)
    loader = model_class(load_config(options.model))
    model = loader.from_pretrained(options.model, attn_implementation=OURS, dtype=dtype, **sharding)
    model.to(device).eval()
    inputs = prompts_of(options.model, model.config.get_text_config().vocab_size, options.prompt_tokens).to(device)
    seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
    for sample in range(options.samples + 1):
        tokens, margins, taken = generate(model, inputs, options.new_tokens)
        for phase, each in taken.items():
            seconds[phase] += [each] if sample else []  # the first was warm-up
    outcome = {
        "tokens": tokens.tolist(),
        "margins": margins.tolist(),
        "seconds": seconds,
        "prompt_tokens": int(inputs["attention_mask"].sum()),
        "threads": torch.get_num_threads(),
    }
    outcome |= shares_of_time(model, inputs, options.new_tokens)
    if rank == 0:
        options.out.write_text(json.dumps(outcome), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    """The command line of a rank."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("out", type=Path, help="where rank 0 writes what it found, as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--samples", type=int, default=3)
    run_rank(parser.parse_args())


if __name__ == "__main__":
    main()
