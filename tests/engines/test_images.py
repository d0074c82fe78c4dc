# SPDX-License-Identifier: Apache-2.0
"""Engines serve the reference model that reads images: the same tokens as transformers, and the right answers."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from questions import MAX_NEW_TOKENS, Questions

from engine_table import Cell
from launch import ENGINES, SGLANG, VLLM, EngineFailed, Round, Server, ask

pytestmark = pytest.mark.engines

BACKENDS = {"own": "the engine's own", "my_triton": "my_triton, torch path"}
PARALLEL = {"-": (1, 1), "TP 2": (2, 1), "PP 2": (1, 2)}
OPTIONS = {
    "vllm": {"limit_mm_per_prompt": {"image": 3, "video": 1}},
    "sglang": {},
}
RIGHT_SHARE = 0.75
"""Of the answers that must be right to the letter. A model that does not see guesses one in 72."""


@pytest.fixture(scope="module")
def both_ways(multimodal_model, tmp_path_factory):
    """The questions with transformers' answers where images attend in both directions."""
    return Questions(multimodal_model, tmp_path_factory.mktemp("both"), causal=False)


@pytest.fixture(scope="module")
def causal(multimodal_model, tmp_path_factory):
    """The same where they attend causally, as they do in the engines' own CPU backends."""
    return Questions(multimodal_model, tmp_path_factory.mktemp("causal"), causal=True)


def check(engine, questions, folder, model, **options):
    """All questions in one batch: tokens as in transformers."""
    work = [Round([question.prompt for question in questions.all], MAX_NEW_TOKENS)]
    (answer,) = ask(engine, folder, work, model=model, **OPTIONS[engine.name], **options)
    for question, tokens in zip(questions.all, answer.tokens, strict=True):
        assert questions.until_end(tokens) == question.tokens, f"{question.kind}: {question.messages}"


def test_the_answers_show_that_the_text_sees_the_images(both_ways):
    right = sum(both_ways.text(question.tokens) == question.answer for question in both_ways.all)
    assert right >= RIGHT_SHARE * len(both_ways.all)


@pytest.mark.parametrize("parallel", ["-", "TP 2"])
def test_vllm_with_our_attention(parallel, multimodal_model, both_ways, tmp_path, record):
    """Images attend in both directions, several of them, of different sizes, and frames of videos."""
    tp, pp = PARALLEL[parallel]
    check(VLLM, both_ways, tmp_path, multimodal_model, tp=tp, pp=pp)
    record(Cell("vllm", "multimodal", parallel, BACKENDS["my_triton"], "float32", "transformers"))


def test_vllm_with_our_attention_in_the_vision_encoder_too(multimodal_model, both_ways, tmp_path, record):
    """The encoder runs in transformers, which knows `my_triton` in the engine's process, and no other new name."""

    def override(name):
        return {"hf_overrides": {"vision_config": {"_attn_implementation": name}}}

    check(VLLM, both_ways, tmp_path / "ours", multimodal_model, **override("my_triton"))
    with pytest.raises(EngineFailed, match=r'attn_implementation="of_nobody". is not supported'):
        check(VLLM, both_ways, tmp_path / "unknown", multimodal_model, **override("of_nobody"))
    record(Cell("vllm", "multimodal", "-", "my_triton, also in the encoder", "float32", "transformers"))


def test_vllm_with_its_own_attention(multimodal_model, causal, tmp_path, record):
    """Its CPU backend has no attention in both directions, so the model is told to do without."""
    check(VLLM, causal, tmp_path, multimodal_model, backend="own", hf_overrides={"is_mm_prefix_lm": False})
    record(Cell("vllm", "multimodal, images causal", "-", BACKENDS["own"], "float32", "transformers, images causal"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parallel", PARALLEL)
def test_sglang(backend, parallel, multimodal_model, causal, tmp_path, record):
    """Its Transformers backend attends causally."""
    tp, pp = PARALLEL[parallel]
    check(SGLANG, causal, tmp_path, multimodal_model, backend=backend, tp=tp, pp=pp)
    cell = Cell(
        "sglang", "multimodal, images causal", parallel, BACKENDS[backend], "float32", "transformers, images causal"
    )
    record(cell)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.name)
def test_images_over_http_and_a_broken_one(engine, multimodal_model, both_ways, causal, tmp_path):
    """An image that cannot be read is the error of its own request."""
    questions = both_ways if engine is VLLM else causal
    asked = [question for question in questions.all if question.kind in ("one", "several")]
    arguments = ["--limit-mm-per-prompt", '{"image": 3}'] if engine is VLLM else []
    with Server(engine, tmp_path, multimodal_model, *arguments) as server:

        def chat(question, images):
            content, remaining = [], list(images)
            for part in question.messages[0]["content"]:
                if part["type"] == "image":
                    content.append({"type": "image_url", "image_url": {"url": remaining.pop(0)}})
                else:
                    content.append(part)
            body = {"model": "served", "messages": [{"role": "user", "content": content}], "temperature": 0}
            return server.request("POST", "/v1/chat/completions", {**body, "max_tokens": MAX_NEW_TOKENS})

        for question in asked[:4]:
            status, body = chat(question, [data_url(path) for path in question.prompt["images"]])
            assert status == 200, body
            assert body["choices"][0]["message"]["content"].strip() == questions.text(question.tokens)
        status, body = chat(asked[0], ["data:image/png;base64,AAAA"])
        assert 400 <= status < 600, body
        assert body, "an error without words"
        status, body = chat(asked[0], [data_url(path) for path in asked[0].prompt["images"]])
        assert status == 200
        assert body["choices"][0]["message"]["content"].strip() == questions.text(asked[0].tokens)


def data_url(path):
    """An image as a URL that holds it."""
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
