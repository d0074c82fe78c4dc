# SPDX-License-Identifier: Apache-2.0
"""Questions about images and videos, put to an engine and compared with transformers, token by token.

    python multimodal_cases.py write  CHECKPOINT CASES [--causal]                where this project is installed
    python multimodal_cases.py vllm   CHECKPOINT CASES [--tensor-parallel 2]     in vLLM's environment
    python multimodal_cases.py sglang CHECKPOINT CASES [--pipeline-parallel 2]   in SGLang's environment

`write` asks the model in transformers, with eager attention, and writes questions and tokens as JSON. With `--causal`
images attend causally there, and are asked to in vLLM: what both engines' own CPU backends do in any case. The other
two print one line of JSON: for each kind of question how many answers were asked for, how many were equal token by
token, and how many were right; and by how much the log-probabilities of equal tokens differ at most, which shows
whether the same attention was computed even where the answer is so sure that another attention gives it too. They need
nothing of this project: the checkpoint brings its code.

An engine starts processes that import this file again, so the work is under the `__main__` guard.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("one", "several", "video", "none")
MAX_NEW_TOKENS = 32


class Answer(NamedTuple):
    """Tokens, the natural logarithm of the probability of each, and the text."""

    tokens: list[int]
    logprobs: list[float]
    text: str


def encode(image: Any) -> str:
    """A PIL image as base64 of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decode(text: str) -> Any:
    """The PIL image that `encode` wrote."""
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def frames_of(case: dict) -> list[Any]:
    """The videos of a case, arrays [frames, height, width, 3]."""
    import numpy as np

    return [np.stack([np.asarray(decode(frame)) for frame in video]) for video in case["videos"]]


def write_cases(checkpoint: str, cases: Path, causal: bool, each: int = 4) -> None:
    """Ask transformers and write `each` questions of every kind, all of them about pairs not seen in training."""
    import random

    from transformers import AutoModelForImageTextToText, AutoProcessor

    from model import squares
    from model.multimodal_checkpoint import batch_of, prompt_of

    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, trust_remote_code=True, attn_implementation="eager", is_mm_prefix_lm=not causal
    )
    generator, written = random.Random(11), []
    for kind in KINDS:
        for _ in range(each):
            example = squares.draw_example(generator, held_out=True, kind=kind)
            inputs = batch_of(processor, [example], with_answers=False)
            generated = model.generate(
                **inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            tokens = generated.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            scores = [logits[0].log_softmax(-1) for logits in generated.logits]
            written.append(
                {
                    "kind": kind,
                    "prompt": prompt_of(processor, example),
                    "images": [encode(image) for image in example.images],
                    "videos": [[encode(frame) for frame in video] for video in example.videos],
                    "tokens": tokens,
                    "logprobs": [float(row[token]) for row, token in zip(scores, tokens, strict=True)],
                    "answer": example.answer,
                }
            )
    cases.write_text(json.dumps({"causal": causal, "cases": written}))


def ask_vllm(checkpoint: str, cases: list[dict], options: dict[str, Any]) -> list[Answer]:
    """The answers, all questions in one batch."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=checkpoint,
        model_impl="transformers",
        trust_remote_code=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 3, "video": 1},
        **options,
    )
    prompts: list[dict] = []
    for case in cases:
        data: dict[str, Any] = {}
        if case["images"]:
            data["image"] = [decode(image) for image in case["images"]]
        if case["videos"]:
            data["video"] = frames_of(case)
        prompts.append({"prompt": case["prompt"], **({"multi_modal_data": data} if data else {})})
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS, logprobs=0))
    answers = []
    for output in outputs:
        best = output.outputs[0]
        logprobs = [each[token].logprob for each, token in zip(best.logprobs, best.token_ids, strict=True)]
        answers.append(Answer(list(best.token_ids), logprobs, best.text))
    return answers


def ask_sglang(checkpoint: str, cases: list[dict], options: dict[str, Any]) -> list[Answer]:
    """The answers, all questions in one batch."""
    import sglang

    engine = sglang.Engine(
        model_path=checkpoint,
        model_impl="transformers",
        trust_remote_code=True,
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        max_total_tokens=4096,
        max_running_requests=4,
        disable_overlap_schedule=True,
        disable_cuda_graph=True,
        grammar_backend="none",
        log_level="warning",
        **options,
    )
    outputs = engine.generate(
        prompt=[case["prompt"] for case in cases],
        image_data=[[f"data:image/png;base64,{image}" for image in case["images"]] for case in cases],
        video_data=[frames_of(case) or None for case in cases],
        sampling_params={"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS},
        return_logprob=True,
    )
    engine.shutdown()
    return [
        Answer(output["output_ids"], [row[0] for row in output["meta_info"]["output_token_logprobs"]], output["text"])
        for output in outputs
    ]


def main() -> int:
    """The command line; returns the exit status, 1 where tokens differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["write", "vllm", "sglang"])
    parser.add_argument("checkpoint")
    parser.add_argument("cases", type=Path)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pipeline-parallel", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.what == "write":
        write_cases(arguments.checkpoint, arguments.cases, arguments.causal)
        return 0
    read = json.loads(arguments.cases.read_text())
    cases, parallel = read["cases"], (arguments.tensor_parallel, arguments.pipeline_parallel)
    binding = "|".join(str(core) for core in range(max(parallel)))
    if arguments.what == "vllm":
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1"} | (
            {"VLLM_CPU_OMP_THREADS_BIND": binding} if "|" in binding else {}
        )
        options: dict[str, Any] = {"tensor_parallel_size": parallel[0], "pipeline_parallel_size": parallel[1]}
        if read["causal"]:
            options["hf_overrides"] = {"is_mm_prefix_lm": False}
        answers = ask_vllm(arguments.checkpoint, cases, options)
    else:
        os.environ |= {"SGLANG_CPU_OMP_THREADS_BIND": binding} if "|" in binding else {}
        answers = ask_sglang(arguments.checkpoint, cases, {"tp_size": parallel[0], "pp_size": parallel[1]})
    found: dict[str, Any] = {kind: {"asked": 0, "equal": 0, "right": 0} for kind in KINDS}
    difference = 0.0
    for case, answer in zip(cases, answers, strict=True):
        counts, equal = found[case["kind"]], answer.tokens == case["tokens"]
        counts["asked"] += 1
        counts["equal"] += equal
        counts["right"] += answer.text.removesuffix("</s>").strip() == case["answer"]
        if equal:
            pairs = zip(answer.logprobs, case["logprobs"], strict=True)
            difference = max([difference, *(abs(ours - theirs) for ours, theirs in pairs)])
    print(json.dumps(found | {"largest logprob difference": difference}), flush=True)
    return int(any(found[kind]["equal"] < found[kind]["asked"] for kind in KINDS))


if __name__ == "__main__":
    sys.exit(main())
