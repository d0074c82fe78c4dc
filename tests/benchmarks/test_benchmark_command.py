# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' command line: what a run writes and shows, and what is refused with one line."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import cases, providers, saved, training

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_command_writes_json_and_a_picture(tmp_path: Path) -> None:
    out, picture = tmp_path / "run.json", tmp_path / "run.png"
    command = [sys.executable, "-m", "benchmarks", "kernels", "--quick", "--tokens", "64", "--device", "cpu"]
    folders = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    run = subprocess.run(
        [*command, "--json", str(out), "--plot", str(picture)],
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": folders},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for words in ("Summary", "sliding", "sdpa cannot express attention sinks", "FlashAttention"):
        assert words in run.stdout

    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["format"] == saved.FORMAT
    assert document["machine"]["threads"] >= 1 and document["machine"]["processor"]
    assert document["versions"]["torch"] and document["versions"]["transformers"] and document["date"]
    rows = document["results"]
    assert {row["section"] for row in rows} == {"kernels", "masks"}
    timed = [row for row in rows if row["section"] == "kernels" and row["status"] == "ok"]
    assert {row["case"] for row in timed} == {case.name for case in cases.CASES}
    for row in timed:
        assert row["samples"] and row["median"] > 0 and row["iqr"] >= 0
        assert row["details"]["error"] <= row["details"]["error_bound"]
        assert row["baseline"] in ("sdpa", "eager") and row["times_as_fast"] > 0
    assert all(row["reason"] for row in rows if row["status"] != "ok")

    assert document["limits"]["flops_per_second"]["float32"] > 0 and document["limits"]["bytes_per_second"] > 0
    for name in ("roofline", "skipped"):
        assert (tmp_path / f"run-{name}.png").exists()
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", header[16:24])
    assert width > 600 and height > 600


def test_training_by_itself_writes_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "run.json", tmp_path / "run.png"
    arguments = ["training", "--quick", "--tokens", "64", "--device", "cpu", "--json", str(out)]
    assert runner.main([*arguments, "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    for words in ("Attention forward and backward, float32", "slowest and fastest case", "unavailable in training"):
        assert words in shown
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["arguments"]["sections"] == ["training"]
    rows = document["results"]
    assert {row["section"] for row in rows} == {"training"}
    assert {row["case"] for row in rows} == {case.name for case in cases.CASES} - {"decode"}
    assert len(rows) == len(training.CASES) * (len(providers.PROVIDERS) - len(providers.ON_REQUEST))
    for row in rows:
        if row["status"] != "ok":
            assert row["reason"] and not row["samples"]
            continue
        assert row["samples"] and row["median"] > 0 and row["times_as_fast"] > 0
        assert row["details"]["tokens_checked"] == 64
        for gradient in row["details"]["gradients"].values():
            assert gradient["error"] <= gradient["error_bound"]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bogus"], "--bogus"),
        (["--only", "everything"], "everything"),
        (["--tp", "3"], "must divide"),
        (["--tp", "0"], "must divide"),
        (["--tokens", "1"], "at least 64"),
        (["--plot", "picture.pdf"], ".png"),
        (["--seconds", "0"], "must be positive"),
        (["--seconds", "nan"], "must be positive"),
        (["--only", "kernels", "--tp", "2"], "leave one of them out"),
        (["kernels", "--json", str(Path(__file__).parent)], "--json must be a file"),
        (["kernels", "--json", str(Path(__file__) / "run.json")], "cannot be written"),
        (["--against", "nothing"], "neither an implementation"),
        (["--against", "a.json", "b.json"], "one earlier run"),
        (["tp", "--against", "sdpa"], "several ranks"),
        (["host", "--against", "eager"], "host knows"),
        (["kernels", "--degrees", "3"], "cannot be shared by 3 ranks"),
        (["kernels", "--degrees", "0"], "at least 1"),
        pytest.param(
            ["--device", "cuda"], "no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
        ),
    ],
)
def test_impossible_requests_end_with_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        runner.main(arguments)
    output = capsys.readouterr()
    assert ending.value.code == 2
    assert words in output.err and output.err.count("\n") == 1 and output.out == ""


def test_list_names_every_case_and_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--list"]) == 0
    output = capsys.readouterr().out
    for entry in (*cases.CASES, *providers.PROVIDERS):
        assert entry.name in output
