# SPDX-License-Identifier: Apache-2.0
"""`my-triton doctor`: what it finds, and that what is broken is a row of its report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from attention_kernels import config_tables, configs, hopper
from attention_kernels.paths import interpreting
from attention_plugin import NAME, attention_forward
from attention_plugin.__main__ import main
from attention_plugin.doctor import findings
from attention_plugin.doctor.check import Outcome, check_attention

REPOSITORY = Path(__file__).resolve().parents[2]
DEVICE = findings.devices()[0]
HERE = f"attention on {DEVICE}"


def doctor(capsys) -> tuple[int, dict[tuple[str, str], dict]]:
    """Exit status, and findings by area and subject."""
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["works"] == (status == 0)
    return status, {(each["area"], each["subject"]): each for each in report["findings"]}


def in_new_process(*arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run the program in a process of its own, with `path` before everything else on Python's path."""
    folders = [*([] if path is None else [path]), REPOSITORY, REPOSITORY / "kernels"]
    whole = {**os.environ, "PYTHONPATH": ":".join(map(str, folders)), **environment}
    command = [sys.executable, "-m", "attention_plugin", *arguments]
    return subprocess.run(command, env=whole, capture_output=True, text=True, timeout=300)


# ---------------------------------------------------------------------- where all is well


@pytest.mark.interpreter
def test_attention_works_here(capsys):
    status, found = doctor(capsys)
    assert status == 0
    assert {each["status"] for each in found.values()} <= {"ok", "note", "missing"}
    assert found["versions", "torch"]["found"] == f"{version('torch')} (needs 2.11 or newer)"
    assert found["registered", "AttentionInterface"]["found"].split(", ")[0] == NAME
    if not torch.cuda.is_available():
        assert found["machine", "GPU"]["status"] in ("note", "missing")
        path = found["kernels", "cpu"]["found"]
        assert path.startswith("Triton kernels with the tile shapes of interpreter" if interpreting() else "torch: ")
    checks = [each for (area, _), each in found.items() if area.startswith("attention on ")]
    assert len(checks) >= 6
    assert all(each["status"] == "ok" for each in checks)


def test_the_table_says_the_same(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for words in ("machine\n", "versions", "kernels", "registered", "engines", "extras", "Attention works here."):
        assert words in printed.replace(" ", "") or words in printed
    assert re.search(r"prompt, float32 +ok +error \d\.\de-\d\d, at most \d\.\de-\d\d is right", printed)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_checks_are_within_the_bound(dtype):
    outcomes = check_attention(DEVICE, dtype)
    assert [outcome.what.split(",")[0] for outcome in outcomes] == ["prompt", "next token", "gradients"]
    assert all(0 < outcome.error <= outcome.bound < 0.05 for outcome in outcomes)


def test_floors_are_those_of_the_project():
    text = (REPOSITORY / "pyproject.toml").read_text()
    for package, floor in findings.FLOORS.items():
        assert f'"{package}>={floor}' in text
    assert f'requires-python = ">={".".join(map(str, findings.OLDEST_PYTHON))}"' in text


# ---------------------------------------------------------------------- where something is wrong


@pytest.fixture
def implementations():
    """Puts back what a test changes in transformers' tables."""
    tables = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    before = [dict(table) for table in tables]
    yield tables
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_wrong_numbers_are_broken(implementations, capsys):
    def slightly_wrong(*args, **kwargs):
        output, weights = attention_forward(*args, **kwargs)
        return output * 1.001, weights

    implementations[0][NAME] = slightly_wrong
    status, found = doctor(capsys)
    assert status == 1
    assert found["registered", "AttentionInterface"]["found"] == "'my_triton' is a function of someone else"
    assert found["registered", "AttentionInterface"]["advice"] == "call attention_plugin.register()"
    for what in ("prompt", "next token", "gradients"):
        assert found[HERE, f"{what}, float32"]["status"] == "broken"
    assert main(["doctor"]) == 1
    assert "Attention does not work here: see what is marked broken." in capsys.readouterr().out


def test_a_mask_that_forgets_padding_is_broken(implementations, capsys):
    mask_function = implementations[1][NAME]
    implementations[1][NAME] = lambda *args, attention_mask=None, **kwargs: mask_function(*args, **kwargs)
    status, found = doctor(capsys)
    assert status == 1
    assert found[HERE, "prompt, bfloat16"]["status"] == "broken"


def test_what_is_not_registered_is_broken(implementations, capsys):
    for table in implementations:
        del table[NAME]
    status, found = doctor(capsys)
    assert status == 1
    for interface in ("AttentionInterface", "AttentionMaskInterface"):
        assert found["registered", interface]["found"] == "'my_triton' is not there"
    assert found[HERE, "error"]["found"] == "KeyError: 'my_triton'"


def test_not_a_number_is_not_right():
    assert not Outcome("prompt", float("nan"), 1.0).right


def test_a_broken_triton_is_a_row(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so is of another system')")
    run = in_new_process("doctor", path=tmp_path)
    assert run.returncode == 1
    assert run.stderr == ""
    assert re.search(r"error +broken +ImportError: libtriton.so is of another system", run.stdout)
    assert "-> reinstall what the error names" in run.stdout
    assert "Attention does not work here" in run.stdout


def test_an_unsupported_gpu_is_a_row(monkeypatch):
    # There need be no GPU: what is asked of it is its name and its architecture.
    device = torch.device("cuda", 0)
    monkeypatch.setattr(findings, "devices", lambda: [device])
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_70")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    (finding,) = findings.guarded("kernels", findings.kernels)
    assert finding.status == "broken"
    assert "the GPU 'Tesla V100' (sm_70) is not supported by the Triton kernels" in finding.found
    assert finding.advice == 'attn_implementation="sdpa", or CPU tensors'


def test_a_supported_gpu_is_shown_its_tiles(monkeypatch):
    monkeypatch.setattr(findings, "devices", lambda: [torch.device("cuda", 0)])
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    measured = {("decode", 4, 64, "few"): config_tables.DecodeConfig(32, 128, 4, 1, reason="measured")}
    measured["gluon", 2, 128, "spans"] = config_tables.GLUON_CONFIGS["sm_90"][128]
    for module in (configs, hopper):
        monkeypatch.setattr(module, "tuned_rows", lambda device: measured)
    found = findings.guarded("kernels", findings.kernels)
    assert [finding.subject for finding in found] == ["cuda:0", "tiles, bfloat16", "tiles, float32", "Gluon kernel"]
    assert found[0].found == "Triton kernels with the tile shapes of sm_90, 227 KB of shared memory a program"
    tiles, decoding = config_tables.CONFIGS["sm_90"], config_tables.DECODE_CONFIGS["sm_90"]
    shapes = tiles[2, 64, "spans"], decoding[2, 64, "few"], tiles[4, 64, "spans"], measured["decode", 4, 64, "few"]
    own, own_decode, exact, exact_decode = (f"{shape.block_m}x{shape.block_n}" for shape in shapes)
    assert f"by head dim 64: {own}, decoding {own_decode}; 128: " in found[1].found
    assert f"by head dim 64: {exact}, decoding {exact_decode}; 128: " in found[2].found  # as `my-triton tune` found
    assert found[3].found == "serves prompts of head dim 128: `my-triton tune` found it right and faster here"


def test_what_comes_before_an_error_is_kept():
    def part():
        yield findings.Finding("machine", "CPU", "one")
        raise OSError("no such\ndevice")

    kept, error = findings.guarded("machine", part)
    assert kept.found == "one"
    assert (error.status, error.found) == ("broken", "OSError: no such device")


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        (None, "missing", "not installed (needs 2.11 or newer)"),
        ("2.10.1", "missing", "2.10.1 (needs 2.11 or newer)"),
        ("2.11.0+cu130", "ok", "2.11.0+cu130 (needs 2.11 or newer)"),
        ("2.11.0rc1", "missing", "2.11.0rc1 (needs 2.11 or newer)"),
        ("unknown", "note", "unknown (cannot be compared with 2.11)"),
    ],
)
def test_versions_are_compared_with_the_oldest_supported(found, status, words):
    finding = findings.version_finding("torch", found, "2.11", "pip install 'torch>=2.11'")
    assert (finding.status, finding.found) == (status, words)
    assert (finding.advice == "pip install 'torch>=2.11'") == (status == "missing")


def test_no_triton_is_as_it_should_be_where_there_are_no_wheels(monkeypatch):
    monkeypatch.setattr(findings.platform, "system", lambda: "Darwin")
    finding = findings.version_finding("triton", None, "3.6", "pip install triton")
    assert (finding.status, finding.found) == ("note", "has no wheels for this system: torch computes attention")


# ---------------------------------------------------------------------- engines and extras


def distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    """What pip leaves of an installed distribution."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (information / "entry_points.txt").write_text(entry_points)


def test_plugins_of_engines_are_read_from_installed_distributions(tmp_path, monkeypatch):
    distribution(tmp_path, "vllm", "0.33.0")
    distribution(
        tmp_path, "tritonplugins", "1.0",
        "[vllm.general_plugins]\nours = attention_plugin.engines.some:start\nforeign = someone.else:start\n",
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    vllm, _ = findings.engines()
    assert vllm.status == "ok"
    assert vllm.found.startswith("vllm 0.33.0; plugin ")
    assert "ours = attention_plugin.engines.some:start" in vllm.found
    assert "foreign" not in vllm.found


def test_an_engine_without_a_plugin_is_missing_one(tmp_path, monkeypatch):
    distribution(tmp_path, "sglang", "0.5.23")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(findings, "plugins_in", lambda group: [])
    vllm, sglang = findings.engines()
    assert (vllm.status, vllm.found) == ("note", "vllm is not installed; no plugin of this package is declared")
    assert (sglang.status, sglang.found) == ("missing", "sglang 0.5.23; no plugin of this package is declared")
    assert sglang.advice.startswith("pip install --force-reinstall --no-deps . in this package")


def test_a_library_that_is_not_there_comes_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(findings, "installed_version", lambda package: None)
    rich, plots, _ = findings.extras()
    assert (rich.status, rich.advice) == ("missing", "pip install rich")
    assert plots.found == "not installed; for `my-triton explain --plot`"


def test_without_rich_only_json_is_printed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["doctor"]) == 2
    assert "my-triton doctor: doctor without --json needs rich, which cannot be imported" in capsys.readouterr().err
    assert main(["doctor", "--json"]) == 0


# ---------------------------------------------------------------------- the program


def test_help_names_the_commands():
    run = in_new_process("--help")
    assert run.returncode == 0
    assert "usage: my-triton" in run.stdout
    assert "doctor" in run.stdout and "explain" in run.stdout


def test_no_command_and_unknown_ones_are_said_in_one_line(capsys):
    for arguments, words in (
        ([], "the following arguments are required: COMMAND"),
        (["mend"], "invalid choice: 'mend'"),
    ):
        with pytest.raises(SystemExit) as leaving:
            main(arguments)
        error = capsys.readouterr().err
        assert leaving.value.code == 2
        assert error.startswith("my-triton: ") and error.count("\n") == 1
        assert words in error
