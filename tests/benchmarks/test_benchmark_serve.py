# SPDX-License-Identifier: Apache-2.0
"""The section serve: right answers are timed, wrong ones are not, and an engine that is not there says so."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from attention_plugin.engines.flash_gates import MINIMUM_VERSION
from benchmarks import __main__ as runner
from benchmarks import measure, serve

CPU = torch.device("cpu")
LOAD = serve.Load(requests=5, longest=40, new_tokens=4, samples=2)


serves = pytest.mark.skipif(
    Version(transformers.__version__) < Version(MINIMUM_VERSION), reason="transformers serves from a later one on"
)


@serves
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=measure.dtype_name)
def test_continuous_batching_answers_as_eager_does(checkpoint_dir: Path, dtype: torch.dtype) -> None:
    python = Path("/no/such/python")
    results = serve.run_serve(checkpoint_dir, LOAD, dtype, CPU, lambda text: None, engines=[("vllm", python)])
    served = {result.provider: result for result in results if result.case == "transformers"}
    assert list(served) == ["my_triton", "sdpa", "eager"]
    for result in served.values():
        assert result.measured and len(result.samples) == LOAD.samples, result.reason
        assert result.details["tokens_total"] == result.work == 20
        waits = result.details["first_token_seconds"]
        assert 0 < waits["median"] <= waits["p95"] <= max(result.samples)
        assert result.details["token_seconds"]["median"] > 0
    absent = [result for result in results if result.case == "vllm"]
    assert [result.status for result in absent] == ["unavailable"] * 2
    assert all("make test-engines" in result.reason for result in absent)
    table = serve.serve_table(results)
    assert table is not None and table.row_count == 5


def test_prompts_have_mixed_lengths_and_no_common_beginning(checkpoint_dir: Path) -> None:
    prompts = serve.prompts_of(checkpoint_dir, replace(LOAD, requests=10, longest=100))
    assert [len(prompt) for prompt in prompts] == [100, 10, 45, 20, 80, 15, 30, 60, 100, 10]
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 10


def test_wrong_answers_fail() -> None:
    truth = serve.Truth(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1.0, 1.0], [1.0, 1e-5]]), 1e-3)
    for answers, reason in (
        ([[1, 2], [3, 4]], ""),
        ([[1, 2], [3, 9]], ""),  # a near tie
        ([[1, 9], [3, 4]], "only 3 of 4"),
        ([[1], [3]], r"answers of [2, 1] tokens"),
    ):
        result = measure.Result("serve", "transformers", "my_triton")
        assert serve.judge(result, answers, truth) == (not reason) and reason in result.reason
        assert (result.status == "failed") == bool(reason)


def test_an_engine_that_ends_without_an_answer_is_a_reason(tmp_path: Path) -> None:
    job = {"engine": "vllm", "options": {}, "prompts": [], "new_tokens": 1, "samples": 1}
    with pytest.raises(RuntimeError, match="vllm ended without an answer: ModuleNotFoundError"):
        serve.answers_of(Path(sys.executable), job)  # vLLM is not installed beside this Python


def test_the_percentile_is_a_value_that_occurs() -> None:
    assert serve.percentile([3.0, 1.0, 2.0]) == 3.0
    assert serve.percentile([float(each) for each in range(100)]) == 95.0


@serves
def test_serving_by_command(checkpoint_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(serve.LOADS, "quick", LOAD)
    monkeypatch.setattr("benchmarks.models.ensure_checkpoint", lambda *arguments: None)
    monkeypatch.setattr("benchmarks.options.CHECKPOINTS", checkpoint_dir.parent)
    (checkpoint_dir.parent / "reference").exists() or (checkpoint_dir.parent / "reference").symlink_to(checkpoint_dir)
    out, picture = tmp_path / "run.json", tmp_path / "run.png"
    arguments = ["serve", "--quick", "--device", "cpu", "--against", "sdpa", "--json", str(out), "--plot", str(picture)]
    assert runner.main(arguments) == 0
    assert "5 requests at once" in capsys.readouterr().out and picture.exists()
    rows = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert [row["provider"] for row in rows] == ["my_triton", "sdpa"]
    with pytest.raises(SystemExit):
        runner.main(["serve", "--python", sys.executable])
    assert "--engine" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        runner.main(["serve", "--engine", "vllm", "--python", str(tmp_path / "none")])
    assert "--python: there is no" in capsys.readouterr().err
