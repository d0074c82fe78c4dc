# SPDX-License-Identifier: Apache-2.0
"""The engines' own HTTP servers with our attention: all tests of an engine ask one server."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch import ENGINES, Server

pytestmark = pytest.mark.engines

PROMPTS = [
    "Return the", "This class provides a way to", "Raise ValueError if the name of the file is not", "The",
    "This module provides a class that reads the lines of a file and returns them as a list of strings. " * 6,
]  # fmt: skip
REQUESTS, CANCELLED_SHARE = 200, 0.2


@pytest.fixture(scope="module", params=ENGINES.values(), ids=lambda engine: engine.name)
def server(request, text_model, tmp_path_factory):
    engine = request.param
    with Server(engine, tmp_path_factory.mktemp(engine.name), text_model) as running:
        yield running


def answered_text(answer):
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["text"]


def test_text_prompts_are_answered_as_transformers_answers_them(server, greedy):
    for prompt in PROMPTS:
        assert answered_text(server.complete(prompt, 12)) == greedy.text(prompt, 12)


def test_several_prompts_in_one_request(server, greedy):
    status, body = server.complete(PROMPTS, 12)
    assert status == 200
    assert [choice["text"] for choice in body["choices"]] == [greedy.text(prompt, 12) for prompt in PROMPTS]


def test_200_requests_at_once_some_of_which_hang_up(server, greedy):
    """Those that stay get the tokens that they would get alone."""
    draw = random.Random(0)
    kinds = [
        (draw.choice(PROMPTS), draw.choice([1, 5, 12, 30]), draw.random() < CANCELLED_SHARE) for _ in range(REQUESTS)
    ]
    expected = {kind[:2]: greedy.text(*kind[:2]) for kind in set(kinds)}

    def run(kind):
        prompt, tokens, cancelled = kind
        if cancelled:
            return server.begin_and_cancel(prompt, after_bytes=draw.choice([1, 40, 400]))
        return answered_text(server.complete(prompt, tokens))

    with ThreadPoolExecutor(REQUESTS) as threads:
        answers = list(threads.map(run, kinds))
    wrong = [kind for kind, answer in zip(kinds, answers, strict=True) if not kind[2] and answer != expected[kind[:2]]]
    assert not wrong
    assert sum(kind[2] for kind in kinds) > 20
    assert answered_text(server.complete(PROMPTS[0], 12)) == greedy.text(PROMPTS[0], 12)


def test_a_prompt_longer_than_the_context_is_an_error_and_nothing_else_suffers(server, greedy):
    status, body = server.complete(PROMPTS[-1] * 10, 12)
    assert status == 400
    assert "context length" in str(body)
    assert answered_text(server.complete(PROMPTS[0], 12)) == greedy.text(PROMPTS[0], 12)


def test_an_empty_prompt_is_the_beginning_of_a_text_or_an_error(server, greedy):
    status, body = server.complete("", 12)
    if status == 200:
        assert body["choices"][0]["text"] == greedy.text("", 12)
    else:
        assert status == 400 and "prompt" in str(body).lower()
    assert answered_text(server.complete(PROMPTS[0], 12)) == greedy.text(PROMPTS[0], 12)
