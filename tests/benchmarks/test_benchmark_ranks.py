# SPDX-License-Identifier: Apache-2.0
"""The section tp, in real processes: the same tokens on one rank and on two, heads of a shard, and where time goes."""

import time
from pathlib import Path

import pytest
import torch
from transformers import GraniteSWAConfig

from benchmarks import __main__ as runner
from benchmarks import measure, models, rank, summary, tensor_parallel

from helpers import EARLIER_TRANSFORMERS

CPU = torch.device("cpu")
SIZES = models.ModelSizes(prompt_tokens=32, new_tokens=3, sentences=0, train_seconds=1)
SMALL = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 8}


def config_folder(config, folder: Path) -> str:
    """A folder that holds a configuration and no weights."""
    config.save_pretrained(folder)
    return str(folder)


def sharded(model: str) -> list[measure.Result]:
    return tensor_parallel.run_tensor_parallel(model, (1, 2), SIZES, torch.float32, CPU, lambda text: None)


def heads_of(result: measure.Result) -> tuple[int, int]:
    return result.details["heads_per_rank"], result.details["kv_heads_per_rank"]


def test_two_ranks_generate_the_tokens_of_one(checkpoint_dir: Path) -> None:
    results = sharded(str(checkpoint_dir))
    assert [(r.case, r.provider) for r in results] == [
        (phase, name) for name in ("1 rank", "2 ranks") for phase in ("prefill", "decode")
    ]
    assert {r.reason for r in results} == {""} and all(r.measured for r in results)
    assert [heads_of(r) for r in results] == [(8, 2)] * 2 + [(4, 1)] * 2
    for result in results:
        attention, collectives = (result.details[f"share_of_{name}"] for name in ("attention", "collectives"))
        assert 0 < attention < 1 and 0 <= collectives < 1 and attention + collectives < 1
        assert (collectives > 0) == (result.details["ranks"] == 2)
    (table,) = [tensor_parallel.tensor_parallel_table(results)]
    assert table is not None and table.row_count == 2


@pytest.mark.skipif(EARLIER_TRANSFORMERS, reason="its tensor parallelism does not shard sinks")
def test_odd_heads_and_sharded_sinks(tmp_path: Path) -> None:
    """Granite's plan shards the sinks with the heads; its weights are drawn here, from a folder without any."""
    config = GraniteSWAConfig(num_attention_heads=6, num_key_value_heads=2, sliding_window=8, **SMALL)
    results = sharded(config_folder(config, tmp_path))
    assert all(r.measured for r in results), {r.reason for r in results}
    assert heads_of(results[-1]) == (3, 1)


def test_other_tokens_are_a_failure() -> None:
    outcome = {
        "tokens": [[1, 2]], "margins": [[1.0, 1.0]], "prompt_tokens": 4, "threads": 1, "heads": [4, 2],
        "shares": {"decode": {"attention": 0.1, "collectives": 0.2}}, "seconds": {"decode": [1.0]},
    }  # fmt: skip
    for dtype, margin, status in (
        (torch.float32, 1.0, "failed"),
        (torch.float32, 1e-4, "ok"),
        (torch.bfloat16, 0.2, "ok"),
        (torch.bfloat16, 0.3, "failed"),
    ):
        result = measure.Result("tp", "decode", "2 ranks", details={"ranks": 2})
        truth = outcome | {"tokens": [[1, 3]], "margins": [[1.0, margin]]}
        tensor_parallel.note(result, outcome, truth, SIZES, dtype)
        assert result.status == status and bool(result.samples) == (status == "ok")
        assert result.details["tokens_equal_to_one_rank"] == 1
        if status == "failed":
            assert "only 1 of 2 greedy tokens" in result.reason
            assert "FAILED" in tensor_parallel.rate(result).plain
            assert summary.absences([result])[0].plain.startswith("failed")


def test_time_inside_a_call_that_is_timed_counts_once() -> None:
    watch = rank.Stopwatch(CPU)
    inner = watch.wrapped("collectives", lambda: time.sleep(0.01))
    outer = watch.wrapped("attention", lambda: (inner(), time.sleep(0.01)))
    outer()
    assert watch.seconds("collectives") == 0 and watch.seconds("attention") >= 0.02
    inner()
    assert 0.01 <= watch.seconds("collectives") < 0.02 + watch.seconds("attention")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--ranks", "3"], "must divide"), (["--model", "/no/such/folder"], "no configuration found")],
)
def test_impossible_shards_end_with_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        runner.main(["tp", *arguments])
    output = capsys.readouterr()
    assert ending.value.code == 2 and words in output.err and output.err.count("\n") == 1


def test_ranks_that_are_not_possible_have_a_row_that_says_why(checkpoint_dir: Path) -> None:
    results = tensor_parallel.run_tensor_parallel(
        str(checkpoint_dir), (3,), SIZES, torch.float32, CPU, lambda text: None
    )
    assert [(r.status, r.samples) for r in results] == [("unavailable", [])] * 2
    assert all("must divide" in r.reason for r in results)
