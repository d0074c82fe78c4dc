# SPDX-License-Identifier: Apache-2.0
"""Run inside an engine's environment: start it, answer the same prompts several times, write down how long it took.

    python engine.py JOB.json RESULT.json

A job holds the engine's name, its own arguments, prompts as token ids, the number of new tokens and of samples. It
imports nothing of this project: the engine finds that by its plugins.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

torch.cpu._init_amx()  # for vLLM's own attention, which does not ask for AMX itself; workers import this file as well

Generate = Callable[[list[list[int]], int], list[list[int]]]


def vllm(options: dict[str, Any]) -> Generate:
    """Greedy tokens by vLLM."""
    from vllm import LLM, SamplingParams

    engine = LLM(**options)

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def sglang(options: dict[str, Any]) -> Generate:
    """Greedy tokens by SGLang."""
    from sglang import Engine

    engine = Engine(**options)

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        sampling = {"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True}
        return [output["output_ids"] for output in engine.generate(input_ids=prompts, sampling_params=sampling)]

    return generate


def main() -> None:
    """Answer one job."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    generate = {"vllm": vllm, "sglang": sglang}[job["engine"]](job["options"])
    seconds = []
    for sample in range(job["samples"] + 1):
        started = time.perf_counter()
        tokens = generate(job["prompts"], job["new_tokens"])
        seconds += [time.perf_counter() - started] if sample else []  # the first was warm-up
    Path(sys.argv[2]).write_text(json.dumps({"tokens": tokens, "seconds": seconds}), encoding="utf-8")
    os._exit(0)  # whoever started this ends its workers


if __name__ == "__main__":  # worker processes import this file
    main()
