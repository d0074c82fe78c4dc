# SPDX-License-Identifier: Apache-2.0
"""Start real engines, each in its own environment and process, and collect what they answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cores import cores

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TIMEOUT = 400.0
"""Seconds after which an engine that does not answer is ended, and its test fails."""

Prompt = str | dict[str, Any]


@dataclass(frozen=True)
class Engine:
    """How one engine is called, by its own names for the same things."""

    name: str
    own_backend: str | None
    our_backend: str
    fixed: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        """The Python of the engine's environment, which `make test-engines` has made."""
        return REPOSITORY / f".venv-{self.name}" / "bin" / "python"

    def options(self, model: Path, backend: str, dtype: str, tp: int, pp: int, **more: Any) -> dict[str, Any]:
        """Arguments of the engine's offline API; `backend` is "own" or "my_triton"."""
        chosen = self.own_backend if backend == "own" else self.our_backend
        names = {
            "vllm": ("model", "tensor_parallel_size", "pipeline_parallel_size"),
            "sglang": ("model_path", "tp_size", "pp_size"),
        }
        model_name, tp_name, pp_name = names[self.name]
        options = {model_name: str(model), "dtype": dtype, tp_name: tp, pp_name: pp, **self.fixed, **more}
        return options if chosen is None else {**options, "attention_backend": chosen}


VLLM = Engine(
    "vllm", None, "MY_TRITON",
    {"model_impl": "transformers", "trust_remote_code": True, "enforce_eager": True, "max_model_len": 512,
     "max_num_seqs": 8, "block_size": 32, "num_gpu_blocks_override": 96, "disable_log_stats": True},
    {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
)  # fmt: skip
SGLANG = Engine(
    "sglang", "torch_native", "my_triton",
    {"model_impl": "transformers", "trust_remote_code": True, "device": "cpu", "max_total_tokens": 4096,
     "max_running_requests": 8, "context_length": 512, "disable_overlap_schedule": True, "disable_cuda_graph": True,
     "grammar_backend": "none", "log_level": "warning"},
)  # fmt: skip
ENGINES = {engine.name: engine for engine in (VLLM, SGLANG)}


def set_right(engine: Engine, model: Path) -> dict[str, str]:
    """Arguments that give a checkpoint's windows their own width in SGLang, whose Transformers backend adds a key.

    Without them a token that the key more or less decides is another than transformers'.
    """
    if engine is not SGLANG:
        return {}
    config = json.loads((model / "config.json").read_text())
    parts = {"": config, "text_config": config.get("text_config", {})}
    narrower = {
        name: {"sliding_window": part["sliding_window"] - 1} for name, part in parts.items() if "sliding_window" in part
    }
    return {"json_model_override_args": json.dumps({**narrower.pop("", {}), **narrower})}


@dataclass(frozen=True)
class Round:
    """Prompts that are handed in together."""

    prompts: Sequence[Prompt]
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What came back for one round: new tokens of each prompt, and how many of its tokens were in the prefix cache."""

    tokens: list[list[int]]
    cached: list[int]


class EngineFailed(AssertionError):
    """An engine ended without an answer; the message holds the end of its log."""


def environment_of(engine: Engine, folder: Path, ranks: int, interpreted: bool) -> dict[str, str]:
    """Environment variables of an engine's processes: nothing is looked up outside, one thread for each rank."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    variables["PYTHONFAULTHANDLER"] = "1"  # a worker that a signal ends says where it was
    variables |= engine.environment
    if engine.name == "vllm":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks))) if ranks > 1 else "nobind"
    elif ranks > 1:
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
    return variables | ({"TRITON_INTERPRET": "1"} if interpreted else {})


def ask(
    engine: Engine,
    folder: Path,
    rounds: Sequence[Round],
    *,
    model: Path,
    backend: str = "my_triton",
    dtype: str = "float32",
    tp: int = 1,
    pp: int = 1,
    interpreted: bool = False,
    **options: Any,
) -> list[Answer]:
    """Answers of an engine's offline API, one for each round; greedy, past the end token.

    Args:
        folder: for the job, its result and the engine's log.
        model: a checkpoint directory.
        backend: "own" for the engine's, "my_triton" for this project's.
        tp, pp: degrees of tensor and pipeline parallelism.
        interpreted: whether Triton kernels run in Triton's interpreter; otherwise CPU tensors take the torch path.
        options: further arguments of the engine, before those of `set_right`.

    Raises:
        EngineFailed: no answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job, result, log = (folder / name for name in ("job.json", "result.json", "log.txt"))
    result.unlink(missing_ok=True)
    work = [{"prompts": list(each.prompts), "max_tokens": each.max_tokens} for each in rounds]
    options = set_right(engine, model) | options
    job.write_text(json.dumps({"engine": engine.options(model, backend, dtype, tp, pp, **options), "rounds": work}))
    command = [engine.python, HERE / f"drive_{engine.name}.py", job, result]
    variables = environment_of(engine, folder, tp * pp, interpreted)
    if engine is VLLM and tp * pp == 1:
        # The scheduler in the same process: one of its own, as servers and more ranks have, takes ten seconds to start.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with cores(tp * pp), log.open("w") as output, _process(command, variables, output) as process:
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise EngineFailed(f"{engine.name} gave no answer in {TIMEOUT:.0f} s\n{tail(log)}") from None
    if not result.exists():
        raise EngineFailed(f"{engine.name} ended with status {process.returncode}\n{tail(log)}")
    return [Answer(**each) for each in json.loads(result.read_text())["rounds"]]


class _process:
    """A process in a session of its own, all of which is ended at the end: engines leave workers behind."""

    def __init__(self, command: Sequence[Any], variables: dict[str, str], output: Any) -> None:
        self.process = subprocess.Popen(
            [str(part) for part in command], env=variables, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True, cwd=HERE,
        )  # fmt: skip

    def __enter__(self) -> subprocess.Popen:
        return self.process

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Server:
    """An engine's OpenAI-compatible HTTP server with our attention, started as the examples start it."""

    def __init__(self, engine: Engine, folder: Path, model: Path, *arguments: str, ranks: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.engine, self.log, self.port = engine, folder / "log.txt", free_port()
        options = {
            "vllm": [
                "--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16",
                "--block-size", "32", "--num-gpu-blocks-override", "160",
            ],
            "sglang": [
                "--device", "cpu", "--dtype", "float32", "--context-length", "512", "--max-total-tokens", "4096",
                "--max-running-requests", "16", "--disable-overlap-schedule", "--disable-cuda-graph",
                "--grammar-backend", "none",
            ],
        }  # fmt: skip
        script = REPOSITORY / "examples" / f"serve_{engine.name}.sh"
        windows = [
            part for name, value in set_right(engine, model).items() for part in ("--" + name.replace("_", "-"), value)
        ]
        self.ranks = ranks
        self.command = ["bash", script, model, *options[engine.name], *windows, *arguments]
        self.variables = environment_of(engine, folder, ranks, interpreted=False) | {"PORT": str(self.port)}
        self.variables["PATH"] = f"{engine.python.parent}:{self.variables['PATH']}"

    def __enter__(self) -> Server:
        self._held = contextlib.ExitStack()
        self._held.enter_context(cores(self.ranks))
        output = self._held.enter_context(self.log.open("w"))
        self.process = self._held.enter_context(_process(self.command, self.variables, output))
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise EngineFailed(f"{self.engine.name} ended with status {self.process.returncode}\n{tail(self.log)}")
            try:
                if self.request("GET", "/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.5)
        raise EngineFailed(f"{self.engine.name} did not come up in {TIMEOUT:.0f} s\n{tail(self.log)}")

    def request(self, method: str, path: str, body: Any = None, timeout: float = 120.0) -> tuple[int, Any]:
        """Status and decoded answer of one request; the answer's text where it is not JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text

    def complete(self, prompt: Any, max_tokens: int, **more: Any) -> tuple[int, Any]:
        """One greedy completion of a text, past the end token."""
        body = {"model": "served", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return self.request("POST", "/v1/completions", {**body, **more})

    def begin_and_cancel(self, prompt: str, after_bytes: int) -> None:
        """Begin a streamed completion and hang up in its middle."""
        body = {"model": "served", "prompt": prompt, "max_tokens": 200, "temperature": 0, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(
            "POST", "/v1/completions", json.dumps({**body, "ignore_eos": True}), {"Content-Type": "application/json"}
        )
        connection.getresponse().read(after_bytes)
        connection.close()


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def tail(log: Path, lines: int = 200) -> str:
    """The end of a log, and after it the first lines of all that name an error: what came of it is long, in engines."""
    written = log.read_text(errors="replace").splitlines()
    errors = [line for line in written if re.search(r"Fatal|Error\b|ERROR", line)]
    return "\n".join([*written[-lines:], "", "the first errors of this log:", *errors[:5]])
