# SPDX-License-Identifier: Apache-2.0
"""Tuning: what is kept and read, by whom, and the measuring itself, in the interpreter; only times need a GPU."""

from __future__ import annotations

import json
import logging
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch

from attention_kernels import tuned
from attention_kernels.config_tables import BACKWARD_CONFIGS, CONFIGS, DECODE_CONFIGS, DecodeConfig, ForwardConfig
from attention_kernels.configs import assuming, forward_config
from attention_kernels.paths import interpreting
from attention_plugin import tune as command
from attention_plugin.__main__ import main
from attention_plugin.tune import ahead, measure, store, tune
from attention_plugin.tune import problems as calls
from attention_plugin.tune.problems import PASSES, Problem, Sizes, call, rows_to_measure
from attention_plugin.tune.store import Measured, save
from attention_plugin.warmup import calls as calls_of_warmup

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("user_cache")

CPU = torch.device("cpu")
KEY = ("forward", 2, 128, "spans")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured")


def measured(dim=128, block_n=64):
    return Measured(("forward", 2, dim, "spans"), ForwardConfig(64, block_n, 4, 2), 90.0, 100.0)


def chosen(dim=128):
    return forward_config("sm_90", torch.bfloat16, dim, dim, 4096, has_tiles=False, has_dropout=False, device=CPU)


def test_what_was_saved_is_used_and_read_once(monkeypatch):
    assert chosen() == CONFIGS["sm_90"][KEY[1:]]
    file = save("interpreter", [measured()])
    assert chosen() == CONFIGS["sm_90"][KEY[1:]], "a running process keeps what it has read"
    tuned.forget()
    assert chosen()[:4] == (64, 64, 4, 2)
    file.unlink()
    monkeypatch.setattr(tuned, "read_rows", lambda file: pytest.fail("read twice"))
    assert chosen()[:4] == (64, 64, 4, 2)
    assert chosen(64) == CONFIGS["sm_90"][2, 64, "spans"], "other rows are the tables'"


def test_without_platformdirs_the_tables_serve(monkeypatch, caplog):
    """As on machines where the package was not installed by pip: calls must not fail for what nobody has measured."""
    monkeypatch.setitem(sys.modules, "platformdirs", None)  # what makes an import fail
    tuned.forget()
    for _ in range(2):
        assert not tuned.tuned_rows(CPU)
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith("attention: where `my-triton tune` leaves what it measures is not known (")
    assert told.endswith("so the built-in tile shapes are used; pip install platformdirs")
    tuned.forget()


@pytest.mark.parametrize("options", [[], ["--show"], ["--clear"]])
def test_without_platformdirs_the_command_says_what_it_needs(options, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert main(["tune", *options]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("my-triton tune: tune needs platformdirs, which cannot be imported (")
    assert "pip install platformdirs" in error


def test_showing_and_clearing_are_two_things(capsys):
    with pytest.raises(SystemExit) as error:
        main(["tune", "--show", "--clear"])
    assert error.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_other_kernels_versions_and_devices_have_files_of_their_own(monkeypatch):
    file = save("interpreter", [measured()])
    assert tuned.tuned_file("another") != file
    monkeypatch.setattr(tuned, "_triton_version", lambda: "0.0")
    assert tuned.tuned_file("interpreter") != file and not tuned.tuned_rows(CPU)
    monkeypatch.undo()


def test_changed_sources_change_the_version(monkeypatch):
    before = tuned.tuned_file("interpreter")
    monkeypatch.setattr(tuned, "sources_hash", lambda: "other")
    assert tuned.tuned_file("interpreter") != before


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"rows": 3}', '{"rows": [{"key": ["forward", 2, 128, "spans"], "config": {}}]}', "\0\0",
        "[" * 100_000,
        '{"rows": [{"key": ["forward", Infinity, 128, "spans"], "config": {"block_m": 64, "block_n": 64, '
        '"num_warps": 4, "num_stages": 2, "chunk_d": 0, "overlap": false, "descriptors": false}}]}',
    ],
    ids=range(8),
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_one_warning_and_replaced(text, caplog):
    file = save("interpreter", [measured()])
    file.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert chosen() == CONFIGS["sm_90"][KEY[1:]]
        chosen()
    (record,) = caplog.records
    assert str(file) in record.message and "my-triton tune --clear" in record.message
    save("interpreter", [measured()])
    tuned.forget()
    assert chosen()[:4] == (64, 64, 4, 2)


@pytest.mark.parametrize(
    ("name", "number", "rule"),
    [
        ("block_m", 96, "a power of two"),
        ("block_n", 8, "16 to 128"),
        ("block_n", "64", "16 to 128"),
        ("block_m", 256, "16 to 128"),
        ("num_warps", 0, "1 to 32"),
        ("num_warps", 64, "1 to 32"),
        ("num_warps", True, "1 to 32"),
        ("num_stages", 9, "1 to 8"),
        ("chunk_d", -1, "16 to 1024"),
        ("chunk_d", 8, "16 to 1024"),
        ("chunk_d", 2048, "16 to 1024"),
        ("chunk_d", False, "16 to 1024"),
    ],
)
def test_impossible_shapes_are_not_read(name, number, rule):
    row = measured().as_json()
    row["config"][name] = number
    with pytest.raises(ValueError, match=f"{name} of .* must be {rule}, got {number!r}"):
        tuned.parse_rows(json.dumps({"rows": [row]}))


@pytest.mark.parametrize("key", [("merge", 2, 128, "spans"), ("forward", 2, 100, "spans"), ("decode", 2, 128, "spans")])
def test_rows_that_no_table_has_are_not_read(key, caplog):
    file = save("interpreter", [measured()])
    assert not caplog.records
    row = {**measured().as_json(), "key": list(key)}
    file.write_text(json.dumps({"rows": [measured().as_json(), row]}))
    assert chosen() == CONFIGS["sm_90"][KEY[1:]]
    (record,) = caplog.records
    assert f"ValueError: {list(key)} is no row of the tables" in record.message


def test_built_in_shapes_are_within_what_is_read():
    tables = {"forward": CONFIGS, "backward": BACKWARD_CONFIGS, "decode": DECODE_CONFIGS}
    for part, table in tables.items():
        for rows in table.values():
            for key, config in rows.items():
                row = Measured((part, *key), config, 1.0, 1.0).as_json()
                assert tuned.parse_row(row)[1][:4] == config[:4]


def test_kinds_of_loops_are_kept_and_nothing_else_is_read_for_them():
    config = ForwardConfig(128, 64, 8, 3, overlap=True, descriptors=True)
    save("interpreter", [Measured(KEY, config, 90.0, 100.0)])
    assert chosen() == config._replace(reason=chosen().reason)
    row = measured().as_json()
    row["config"]["overlap"] = 1
    with pytest.raises(ValueError, match=r"overlap of .* must be true or false, got 1"):
        tuned.parse_rows(json.dumps({"rows": [row]}))


def test_hardware_that_copies_tiles_is_asked_to():
    for chip in ("sm_80", "sm_90"):
        with assuming(chip):
            problem = rows_to_measure(CPU, ("forward",), (128,), torch.bfloat16)[0]
        assert problem.default not in problem.candidates
        assert any(config.overlap for config in problem.candidates)
        assert any(config.descriptors for config in problem.candidates) == (chip == "sm_90")
        assert all(config.overlap for config in problem.candidates if config.descriptors)


def write_rows(part):
    for key in forward_keys(part):
        save("interpreter", [replace(measured(), key=key)])


def forward_keys(part):
    return sorted(key for key in tuned.KEYS if key[0] == "forward")[8 * part : 8 * part + 8]


def test_processes_that_write_at_a_time_lose_nothing(user_cache):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_rows, args=(part,)) for part in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    written = tuned.read_rows(tuned.tuned_file("interpreter"))
    assert sorted(written) == [key for part in range(4) for key in forward_keys(part)] and len(written) == 32
    assert not list(user_cache.rglob(".tuned-*")), "no halves are left"


def test_a_failed_write_leaves_the_old_file(monkeypatch):
    file = save("interpreter", [measured()])
    before = file.read_text()

    def fail(*names):
        raise OSError("disk full")

    monkeypatch.setattr(store.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save("interpreter", [measured(64)])
    assert file.read_text() == before and not list(file.parent.glob(".tuned-*"))


def test_show_and_clear(capsys):
    assert main(["tune", "--show"]) == 0
    assert "nothing measured; files would lie in" in capsys.readouterr().out
    file = save("interpreter", [measured()])
    assert main(["tune", "--show"]) == 0
    shown = capsys.readouterr().out
    assert "64x64" in shown and "which is not of a GPU of this machine" in shown
    assert main(["tune", "--clear"]) == 0
    assert f"deleted {file}" in capsys.readouterr().out and not file.exists()
    assert main(["tune", "--clear"]) == 0
    assert capsys.readouterr().out == f"nothing measured, so nothing to delete; files would lie in {file.parent}\n"


@pytest.mark.parametrize("time", [None, "90", [], 10**400], ids=range(4))
def test_rows_without_times_are_shown(time, capsys):
    """They serve calls like any other."""
    row = measured().as_json() | {"microseconds": time}
    if time is None:
        del row["microseconds"]
    save("interpreter", [measured()]).write_text(json.dumps({"rows": [row]}))
    assert main(["tune", "--show"]) == 0
    assert capsys.readouterr().out.split()[-2:] == ["?", "100"]


def test_folders_with_names_of_files_are_left_alone(capsys):
    file = save("interpreter", [measured()])
    for name in ("tuned-other.json", "tuned-other.lock"):
        (file.parent / name).mkdir()
    assert main(["tune", "--show"]) == main(["tune", "--clear"]) == 0
    assert "tuned-other" not in capsys.readouterr().out
    assert sorted(each.name for each in file.parent.iterdir()) == ["tuned-other.json", "tuned-other.lock"]


def test_files_that_cannot_be_deleted_are_one_line(monkeypatch, capsys):
    file = save("interpreter", [measured()])

    def unlink(file, missing_ok):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(type(file), "unlink", unlink)
    assert main(["tune", "--clear"]) == 2
    words = f"my-triton tune: what was measured cannot be deleted: [Errno 13] Permission denied: '{file}'\n"
    assert capsys.readouterr().err == words


@no_gpu
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, "-m", "attention_plugin", "tune"], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "my-triton tune: there is no GPU to measure on; built-in tile shapes stay in use\n"


def test_other_head_dims_are_refused(capsys):
    assert main(["tune", "--head-dim", "72"]) == 2
    assert "--head-dim must be of 64, 128, 256, 512, got 72: narrower heads use the next row" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["-5", "0", "nan"])
def test_times_that_are_none_are_refused(seconds, capsys):
    assert main(["tune", "--seconds", seconds]) == 2
    assert capsys.readouterr().err == f"my-triton tune: --seconds must be above 0, got {seconds}\n"


def problems(*dims):
    tile = ForwardConfig(64, 64, 4, 2)
    return [Problem(("forward", 2, dim, "spans"), tile, (tile._replace(block_n=32),)) for dim in dims]


@pytest.fixture
def gpu(monkeypatch):
    """The CPU in the place of a GPU, for what a command does before and after it measures."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(tuned, "device_name", lambda device: "interpreter")
    monkeypatch.setattr(command, "unsupported_device", lambda device: None)
    monkeypatch.setattr(command, "chip_of", lambda device: None)
    monkeypatch.setattr(command, "rows_to_measure", lambda *given: problems(64, 128, 256))


def test_an_unwritable_cache_is_found_out_before_measuring(gpu, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(command, "measure_row", lambda *given: pytest.fail("measured"))
    assert main(["tune"]) == 2
    words = f"what is measured cannot be kept: [Errno 20] Not a directory: '{tmp_path}/file/my-triton-attention'"
    assert capsys.readouterr().err == f"my-triton tune: {words}\n"


def kept():
    tuned.forget()
    return [key[2] for key in tuned.tuned_rows(CPU)]


def test_a_built_in_shape_that_fails_costs_its_own_row_only(gpu, monkeypatch, capsys):
    def check_and_time(problem, config, *given):
        return (None, "wrong result") if problem.key[2] == 128 else (1.0, "1 s")

    monkeypatch.setattr(measure, "_check_and_time", check_and_time)
    assert main(["tune"]) == 1 and kept() == [64, 256]
    told = capsys.readouterr().err.splitlines()[-1]
    words = "the built-in tile shape of ('forward', 2, 128, 'spans') fails here (wrong result); see `my-triton doctor`"
    assert told == f"my-triton tune: {words}"


def test_every_pass_of_a_head_dim_comes_before_the_next():
    """A cut leaves something of each."""
    with assuming("sm_90"):
        rows = rows_to_measure(CPU, PASSES, (64, 128, 256), torch.bfloat16)
    rows, gluon = rows[:-3], rows[-3:]
    assert [problem.key[2] for problem in rows] == [64] * 6 + [128] * 6 + [256] * 6
    assert [problem.key[0] for problem in rows] == ["forward", "backward", "backward", *["decode"] * 3] * 3
    assert [problem.key[:3] for problem in gluon] == [("gluon", 2, 64), ("gluon", 2, 128), ("gluon", 2, 256)]


@pytest.mark.parametrize(("took", "left"), [(2.0, [64, 128]), (5.0, [64])])
def test_time_runs_out_between_candidates(took, left, gpu, monkeypatch, capsys):
    """Of the second row one candidate is tried, and kept if it is faster than the built-in shape."""
    rows = [
        replace(each, candidates=(*each.candidates, each.default._replace(block_n=16))) for each in problems(64, 128)
    ]
    clock, times = [0.0], iter((5.0, 4.0, 3.0, 5.0, took))

    def check_and_time(*given):
        clock[0] += 60
        return next(times), "some s"

    monkeypatch.setattr(command, "rows_to_measure", lambda *given: rows)
    monkeypatch.setattr(measure, "_check_and_time", check_and_time)
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    assert main(["tune", "--seconds", "270"]) == 1
    assert kept() == left and clock == [300.0]


def test_what_was_measured_before_an_interruption_is_kept(gpu, monkeypatch, capsys):
    def check_and_time(problem, config, *given):
        if problem.key[2] == 256:
            raise KeyboardInterrupt
        return 1.0, "1 s"

    monkeypatch.setattr(measure, "_check_and_time", check_and_time)
    assert main(["tune"]) == 1 and kept() == [64, 128]
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "my-triton tune: interrupted; the rows that were measured are kept"


CHIP = ahead.Chip("sm_90", "sm_90", 132)
compiles = pytest.mark.skipif(interpreting(), reason="the interpreter does not compile")


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """How many kernels are in Triton's cache, which is empty at first; this process has none of them in its own."""
    from attention_kernels import backward_kernels, decode, forward

    def count():
        for module in (backward_kernels, decode, forward):
            for kernel in vars(module).values():
                if hasattr(kernel, "device_caches"):
                    kernel.device_caches.clear()
        return len(list((tmp_path / "triton").rglob("*.cubin")))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    assert count() == 0
    return count


def compile_to_measure(problem, config):
    """As the process that measures, but for a GPU that is not there, and with small tensors that have content."""
    from attention_kernels.ahead_of_time import absent_device

    with (
        absent_device(CHIP.target), assuming(CHIP.architecture, CHIP.processors), calls_of_warmup.compiling_only({}),
        tuned.using(CPU, {problem.key: config}),
    ):  # fmt: skip
        for sizes in (calls.CHECKED, SMALL):
            call(problem, CPU, torch.bfloat16, sizes)()


EXHAUSTIVE = ("spans", "query", "key_value", "many pages")
SMALL = Sizes(batch=1, tokens=256, decode_keys=1024)
"""What Triton tells apart is the same as of `Sizes()`."""


@compiles
@pytest.mark.parametrize(
    "kind",
    ["few", "few pages", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in EXHAUSTIVE)],
)
def test_what_is_compiled_ahead_is_what_measuring_launches(kind, compiled):
    with assuming("sm_90"):
        rows = rows_to_measure(CPU, PASSES, (64,), torch.bfloat16)
    (problem,) = (problem for problem in rows if problem.key[3] == kind and problem.candidates)  # Gluon's has none
    config = problem.candidates[-1]
    assert kind != "spans" or config.descriptors
    assert ahead.compile_shape(problem, config, CHIP, torch.bfloat16, Sizes()) is None
    count = compiled()
    assert count >= 3, "with every extra, and of both sizes"
    compile_to_measure(problem, config)
    assert compiled() == count


@compiles
def test_processes_compile_ahead_and_say_what_is_out(compiled, monkeypatch):
    monkeypatch.setattr(ahead, "_cores", lambda: 2)
    monkeypatch.setattr(ahead, "unfit", lambda *given: pytest.fail("tried here"))
    built_in = DecodeConfig(16, 64, 4, 1)
    broken = built_in._replace(block_n=48)  # no power of two
    problem = Problem(("decode", 2, 64, "few"), built_in, (broken,))
    with ahead.compiling_ahead([problem], CHIP, torch.bfloat16, Sizes()) as shapes:
        deadline = time.monotonic() + 300
        assert shapes.why_not(problem, built_in, deadline) is None
        count = compiled()
        assert count >= 2
        assert shapes.why_not(problem, broken, deadline).startswith("does not compile: ")
        (process,) = multiprocessing.active_children()
        bystander = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
        bystander.start()
    process.join(30)
    assert not process.is_alive()
    assert bystander.is_alive(), "it is someone else's"
    bystander.kill()
    compile_to_measure(problem, built_in)
    assert compiled() == count


class NoPool:
    """Processes that cannot be started, or that die."""

    def __init__(self, *given, **named):
        self.asked = 0
        if self.most < 0:
            raise OSError("no semaphores")

    def submit(self, *given):
        self.asked += 1
        if self.asked > self.most:
            raise OSError("no more processes")
        future = Future()
        future.set_exception(BrokenProcessPool("killed"))
        return future

    def shutdown(self, **named):
        pass


@pytest.mark.parametrize(
    ("most", "words"), [(-1, "no semaphores"), (0, "no more processes"), (1, "no more processes"), (2, "killed")]
)
def test_without_processes_candidates_are_compiled_here(most, words, monkeypatch, caplog):
    (problem,) = problems(64)
    monkeypatch.setattr(ahead, "_cores", lambda: 8)
    monkeypatch.setattr(ahead, "ProcessPoolExecutor", NoPool)
    monkeypatch.setattr(NoPool, "most", most, raising=False)
    monkeypatch.setattr(ahead, "unfit", lambda *given: "spills")
    with ahead.compiling_ahead([problem], CHIP, torch.bfloat16, Sizes()) as shapes:
        deadline = time.monotonic() + 60
        assert shapes.why_not(problem, problem.default, deadline) is None, "it serves calls, whatever it does"
        for _ in range(2):
            assert shapes.why_not(problem, problem.candidates[0], deadline) == "spills"
    (record,) = caplog.records
    assert f"do not run here ({words})" in record.message


def test_nobody_waits_beyond_the_deadline_for_a_shape_to_compile():
    (problem,) = problems(64)
    shapes = ahead.Ahead(CHIP, {(problem.key, problem.default): Future()})
    for deadline in (time.monotonic() - 1, time.monotonic() + 0.05):
        with pytest.raises(ahead.OutOfTime):
            shapes.why_not(problem, problem.default, deadline)


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="runs the kernels, in the interpreter")
@pytest.mark.parametrize("failure", [RuntimeError, None])
def test_a_built_in_shape_fails_that_is_wrong_or_cannot_run(failure, monkeypatch):
    def is_right(*given):
        if failure is not None:
            raise failure
        return False

    monkeypatch.setattr(measure, "is_right", is_right)
    monkeypatch.setattr(command, "rows_to_measure", lambda *given: problems(64))
    outcome = tune(CPU, dtype=torch.float32, sizes=Sizes(1, 2, 64, 1, 256), quiet=True)
    assert not outcome.measured and outcome.complete
    (words,) = outcome.failed
    assert "fails here (RuntimeError)" in words if failure else "fails here (wrong result)" in words


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="runs the kernels, in the interpreter")
def test_measuring_checks_times_and_saves(monkeypatch):
    """Decoding only, two candidates: one right, and one that the kernel cannot run."""
    key = ("decode", 4, 64, "few")
    broken = DecodeConfig(16, 48, 1, 1)  # no power of two
    good = DecodeConfig(16, 64, 1, 1)
    problem = Problem(key, DecodeConfig(16, 32, 1, 1), (broken, good))
    monkeypatch.setattr(command, "rows_to_measure", lambda *given: [problem])
    tried = []
    real = measure._check_and_time
    monkeypatch.setattr(measure, "_check_and_time", lambda *given: tried.append(real(*given)) or tried[-1])
    monkeypatch.setattr(measure, "WORTH", 10.0)
    # More keys a step take fewer steps, and the interpreter pays for steps.
    (found,) = tune(CPU, dtype=torch.float32, sizes=Sizes(1, 2, 64, 1, 256), quiet=True).measured
    assert tried[0][0] > 0 and tried[1][0] is None and tried[2][0] > 0
    assert found.key == key and found.default_microseconds > 0
    assert dict(tuned.tuned_rows(CPU))[key][:4] == found.config[:4]


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="runs the kernels, in the interpreter")
def test_measuring_again_compares_with_the_built_in_shape(monkeypatch):
    """And not with what the run before has left, which nothing would then be faster than."""
    key = ("decode", 4, 64, "few")
    built_in, faster = DecodeConfig(16, 32, 1, 1), DecodeConfig(16, 64, 1, 1)
    monkeypatch.setattr(command, "rows_to_measure", lambda *given: [Problem(key, built_in, (faster,))])
    monkeypatch.setattr(
        measure, "time_of", lambda *given: 1.0 if tuned.tuned_rows(CPU).get(key, built_in)[:4] == faster[:4] else 2.0
    )
    for _ in range(3):
        (found,) = tune(CPU, dtype=torch.float32, sizes=Sizes(1, 2, 64, 1, 256), quiet=True).measured
        assert (found.microseconds, found.default_microseconds) == (1e6, 2e6)
        assert dict(tuned.tuned_rows(CPU))[key][:4] == faster[:4]


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="runs the kernels, in the interpreter")
@pytest.mark.parametrize(
    "key", [("forward", 4, 64, "spans"), ("backward", 4, 64, "query"), ("backward", 4, 64, "key_value")]
)
def test_wrong_results_are_noticed(key, monkeypatch):
    (problem,) = (each for each in rows_to_measure(CPU, (key[0],), (64,), torch.float32) if each.key == key)
    small = Sizes(1, 2, 40, 1, 40)
    monkeypatch.setattr(calls, "CHECKED", small)
    calls._truth.cache_clear()
    assert measure.is_right(problem, CPU, torch.float32)
    monkeypatch.setattr(calls, "call", lambda *given: lambda: tuple(each * 1.001 for each in call(*given)()))
    assert not measure.is_right(problem, CPU, torch.float32)
    calls._truth.cache_clear()


def test_loading_a_kernel_takes_no_time_from_its_samples(monkeypatch):
    """Its launcher is compiled by its first launch, for longer than all samples may take."""

    class Event:
        def __init__(self, enable_timing):
            self.at = 0.0

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return (later.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(measure, "FLUSHED_BYTES", 1)
    monkeypatch.setattr(measure, "GPU_SECONDS", 1.0)
    taken = []

    def run():
        taken.append(None)
        time.sleep(1.2 if len(taken) == 1 else 0.01)

    assert measure._median_on_current(run, CPU) < 1.2
    assert len(taken) > 1 + 5
