# SPDX-License-Identifier: Apache-2.0
"""The engines' own HTTP servers with our attention, and what happens to them when things go wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch import ENGINES, SGLANG, VLLM, Server, tail

pytestmark = pytest.mark.engines

RANKS = {"vllm": ("--tensor-parallel-size", "2"), "sglang": ("--tp-size", "2")}
PROMPTS = [
    "Return the", "This class provides a way to", "Raise ValueError if the name of the file is not", "The",
    "This module provides a class that reads the lines of a file and returns them as a list of strings. " * 6,
]  # fmt: skip
REQUESTS, CANCELLED_SHARE = 200, 0.2


# With pytest-xdist, tests that share a server stay together.
one_server_each = [
    pytest.param(engine, marks=pytest.mark.xdist_group(f"server of {engine.name}"), id=engine.name)
    for engine in ENGINES.values()
]


@pytest.fixture(scope="module", params=one_server_each)
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


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.name)
def test_a_killed_worker_ends_the_server_with_the_engine_s_own_message(engine, text_model, tmp_path):
    """Requests in the middle get errors, nobody waits for ever."""
    with Server(engine, tmp_path, text_model, *RANKS[engine.name], ranks=2) as server:
        outcomes: list[object] = []

        def run():
            try:
                outcomes.append(server.complete(PROMPTS[0], 300)[0])
            except (OSError, ValueError) as error:  # the connection is closed
                outcomes.append(error)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        os.kill(worker_of(server), signal.SIGKILL)
        for thread in threads:
            thread.join(timeout=120)
        assert not any(thread.is_alive() for thread in threads), "a request waits for a worker that is gone"
        assert len(outcomes) == 4
        deadline = time.monotonic() + 90
        while server.process.poll() is None and time.monotonic() < deadline:
            try:
                if server.request("GET", "/health", timeout=10)[0] != 200:
                    break
            except OSError:
                break
            time.sleep(1)
        else:
            assert server.process.poll() is not None, "the server answers that it is well, and it is not"
        log = tail(server.log, 400)
        # Which of an engine's processes notices first, and so which message, is chance.
        words = {
            "vllm": ("died", "EngineDead", "terminated"),
            "sglang": ("child failed", "remote worker crashing", "died"),
        }
        assert any(word.lower() in log.lower() for word in words[engine.name]), log


def worker_of(server):
    """The process of a rank, by the name that its engine gives it."""
    rows = subprocess.run(["ps", "-eo", "pid,sid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {VLLM.name: ("VllmWorker", "Worker"), SGLANG.name: ("sglang::scheduler",)}[server.engine.name]
    found = [row.split(None, 2) for row in rows[1:]]
    found = [row for row in found if int(row[1]) == server.process.pid and any(name in row[2] for name in names)]
    assert found, "\n".join(rows)
    return int(found[-1][0])
