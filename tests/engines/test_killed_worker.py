# SPDX-License-Identifier: Apache-2.0
"""What becomes of an engine's server when one of its ranks is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

import pytest

from launch import ENGINES, SGLANG, VLLM, Server, tail

pytestmark = pytest.mark.engines

RANKS = {"vllm": ("--tensor-parallel-size", "2"), "sglang": ("--tp-size", "2")}
PROMPT = "Return the"


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.name)
def test_a_killed_worker_ends_the_server_with_the_engine_s_own_message(engine, text_model, tmp_path):
    """Requests in the middle get errors, nobody waits for ever."""
    with Server(engine, tmp_path, text_model, *RANKS[engine.name], ranks=2) as server:
        outcomes: list[object] = []

        def run():
            try:
                outcomes.append(server.complete(PROMPT, 300)[0])
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
        assert len(outcomes) == 4 and any(outcome != 200 for outcome in outcomes), outcomes
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
