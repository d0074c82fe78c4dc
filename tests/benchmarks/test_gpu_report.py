# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks gpu-report`: rehearsed on the CPU; what becomes of parts that fail, or take too long."""

import json
import re
import signal
import subprocess
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import cases, gpu_report, options, providers
from benchmarks.gpu_report import Part

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_rehearsal_writes_each_part_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gpu-report", "--device", "cpu", "--only", "host", "--folder", str(tmp_path), "--seconds", "100"]
    assert runner.main(arguments) == 0
    assert "host: done" in capsys.readouterr().out
    rows = json.loads((tmp_path / "host.json").read_text(encoding="utf-8"))["results"]
    assert {row["section"] for row in rows} == {"host"}
    for name in ("host.txt", "host.png", "report.html", "report.md"):
        assert (tmp_path / name).stat().st_size > 0


def test_a_part_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = (Part("broken", ("no_such_module",), 1), Part("fine", ("pytest", "--version"), 1))
    monkeypatch.setattr(gpu_report, "PARTS", parts)
    assert runner.main(["gpu-report", "--device", "cpu", "--folder", str(tmp_path)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "broken: failed with status 1; its words are in broken.txt" in shown
    assert "fine: done" in shown
    assert "no_such_module" in (tmp_path / "broken.txt").read_text(encoding="utf-8")


def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    part = Part("endless", ("http.server", "0", "--bind", "127.0.0.1"), 1)
    assert gpu_report.run_part(part, 1.0, 60.0, tmp_path, "cpu") == "stopped after 1 s; what it had measured is kept"


STARTS_ANOTHER_AND_WAITS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(child.pid, flush=True)
"""


@pytest.mark.parametrize("in_background", [False, True])
def test_what_a_stopped_part_has_found_and_started(
    in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Its failures are shown and count, and the processes that it started end with it.

    In the background a shell has its processes ignore interrupts.
    """
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    monkeypatch.setattr(gpu_report, "WORDS", 60.0)  # a busy machine may need more than a GPU's, which is paid for
    (tmp_path / "test_slow.py").write_text(
        f"def test_fails():\n    {STARTS_ANOTHER_AND_WAITS.strip().replace(chr(10), '; ')}; assert child.pid == 0\n"
        "def test_waits():\n    import time; time.sleep(300)\n"
    )
    begin, limit = gpu_report.start, 25.0

    def start_and_wait_for_the_first(*arguments: Any) -> subprocess.Popen:
        """However long a busy machine takes until then: a time limit may be over sooner."""
        run = begin(*arguments)
        while run.poll() is None and "F" not in (tmp_path / "tests.txt").read_text(encoding="utf-8"):
            time.sleep(0.1)
        wait = run.wait
        run.wait = lambda seconds=None: wait(0.1 if seconds == limit else seconds)
        return run

    monkeypatch.setattr(gpu_report, "start", start_and_wait_for_the_first)
    part = Part("tests", ("pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)), 1)
    outcome = gpu_report.run_part(part, limit, 60.0, tmp_path, "cpu")
    assert outcome == "failed: 1 failed in 25 s; its words are in tests.txt"
    said = (tmp_path / "tests.txt").read_text(encoding="utf-8")
    assert "assert child.pid == 0" in said
    child = re.search(r"^(\d+)$", said, re.MULTILINE)
    assert child is not None and not is_running(int(child[1]))


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(found) and not found.startswith("Z")


def test_the_checkpoint_is_trained_beside_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none, and then on the CPU; what is not done at the end is ended."""
    monkeypatch.setattr(gpu_report, "CHECKPOINTS", tmp_path)
    assert gpu_report.train_beside("cpu") is None, "a rehearsal trains in its own time"
    training = gpu_report.train_beside("cuda")
    assert training is not None and training.poll() is None
    assert "model.checkpoint" in training.args and str(tmp_path / "reference") in training.args
    gpu_report.end(training)
    assert training.poll() is not None
    monkeypatch.setattr(gpu_report, "is_checkpoint", lambda folder: True)
    assert gpu_report.train_beside("cuda") is None


def test_all_files_in_one(tmp_path: Path) -> None:
    archive, folder = tmp_path / "all.tar.gz", tmp_path / "run"
    arguments = ["gpu-report", "--device", "cpu", "--only", "host", "--folder", str(folder), "--seconds", "100"]
    assert runner.main([*arguments, "--archive", str(archive)]) == 0
    with tarfile.open(archive) as packed:
        assert {f"run/{path.name}" for path in folder.iterdir()} <= set(packed.getnames())


def test_the_files_in_one_hold_what_was_done_before_the_command_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_part(part: Part, seconds: float, limit: float, folder: Path, device: str) -> str:
        if part.name == "later":
            raise KeyboardInterrupt
        (folder / "first.txt").write_text("measured")
        return "done"

    monkeypatch.setattr(gpu_report, "PARTS", (Part("first", ("a",), 1), Part("later", ("b",), 1)))
    monkeypatch.setattr(gpu_report, "run_part", run_part)
    archive, folder = tmp_path / "all.tar.gz", tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        runner.main(["gpu-report", "--device", "cpu", "--folder", str(folder), "--archive", str(archive)])
    with tarfile.open(archive) as packed:
        assert packed.getnames() == ["run", "run/first.txt"]
    assert list(tmp_path.glob("*.part")) == []


def test_a_folder_that_is_not_there_is_found_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        runner.main(["gpu-report", "--device", "cpu", "--archive", str(tmp_path / "nowhere" / "all.tar.gz")])
    assert error.value.code == 2
    shown = "".join(capsys.readouterr().err.split())
    assert f"--archive:thereisnofolder{tmp_path / 'nowhere'};makeit,orchooseanother" in shown


@pytest.mark.parametrize(("option", "value"), [("--seconds", "-5"), ("--seconds", "nan"), ("--folder", "file")])
def test_what_cannot_be_measured_is_said_in_one_line(
    option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as error:
        runner.main(["gpu-report", "--device", "cpu", option, value])
    assert error.value.code == 2 and option in capsys.readouterr().err


def test_a_disk_that_is_full_ends_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be archived at the end is; what could not is an error then."""
    written: list[Path] = []

    def write_archive(folder: Path, path: Path | None) -> None:
        written.append(folder)
        if len(written) < 3:
            raise OSError("no space left on device")

    monkeypatch.setattr(gpu_report, "PARTS", (Part("first", ("a",), 1), Part("later", ("b",), 1)))
    monkeypatch.setattr(gpu_report, "run_part", lambda *arguments: "done")
    monkeypatch.setattr(gpu_report, "write_archive", write_archive)
    assert runner.main(["gpu-report", "--device", "cpu", "--folder", str(tmp_path / "run")]) == 0
    assert len(written) == 3


def test_parts_without_time_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gpu-report", "--device", "cpu", "--only", "host", "--folder", str(tmp_path), "--seconds", "3"]
    assert runner.main(arguments) == 0
    assert "host: left out: no time is left" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_one_line_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        runner.main(["gpu-report"])
    assert error.value.code == 2
    assert "torch finds no GPU here; `make bench` measures on the CPU" in capsys.readouterr().err


def test_parts_name_what_there_is() -> None:
    """Their commands are understood, and the tests of the Gluon kernel run once: apart from the others."""
    for part in gpu_report.PARTS:
        module, *arguments = part.command
        if module == "benchmarks":
            options.parse(arguments[0], [*arguments[1:], "--device", "cpu"], "", "")
    swept = {name for part in gpu_report.PARTS for name in part.command if name in cases.SWEEPS}
    assert swept == set(cases.SWEEPS)
    tests = {part.name: part.command for part in gpu_report.PARTS if part.command[0] == "pytest"}
    assert all((REPOSITORY / name).exists() for name in (*gpu_report.GPU_TESTS, gpu_report.GLUON_TESTS))
    assert set(gpu_report.GPU_TESTS) <= set(tests["tests"])
    assert gpu_report.GLUON_TESTS in tests["gluon-tests"] and gpu_report.GLUON_TESTS not in tests["tests"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_gluon_kernel_runs_on_request_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert providers.GLUON not in options.providers_of(options.parse("kernels", [], "", ""))
    files = ["--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.png")]
    arguments = ["kernels", "--quick", "--tokens", "64", "--against", providers.GLUON, *files]
    assert runner.main(arguments) == 0
    assert "my_triton_gluon: the Gluon kernel runs on Hopper GPUs only" in " ".join(capsys.readouterr().out.split())
