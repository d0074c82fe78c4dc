# SPDX-License-Identifier: Apache-2.0
"""Warming up: what a model needs is compiled through the real launchers, and found again in Triton's cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from attention_kernels import configs
from attention_kernels.paths import interpreting
from attention_plugin import compile_report, warmup
from attention_plugin.__main__ import main
from attention_plugin.warmup.calls import Kind, compile_calls

pytest.importorskip("triton")

compiles = pytest.mark.skipif(interpreting(), reason="the interpreter does not compile")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be compiled for")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = {
        "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 8, "num_local_experts": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@compiles
@pytest.mark.exhaustive
def test_another_process_finds_everything_in_the_cache(model, tmp_path):
    command = [sys.executable, "-m", "attention_plugin", "warmup", model, "--target", "sm_90", "--json"]
    command += ["--prompt-lengths", "32"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    runs = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        kernels = {file.name for file in tmp_path.rglob("*.cubin")}
        files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.cubin")}
        runs.append((json.loads(done.stdout), kernels, files))
    (first, kernels, files), (second, _, again) = runs
    assert kernels == {"forward_kernel.cubin", "decode_kernel.cubin", "merge_kernel.cubin"}
    assert first["architecture"] == "sm_90" and len(first["kernels"]) == len(second["kernels"]) == len(files)
    assert {row["for"] for row in first["kernels"]} == {"4/2 heads of 64, sinks"}
    assert files == again, "the second process compiled something anew"
    assert sum(row["seconds"] for row in second["kernels"]) < sum(row["seconds"] for row in first["kernels"]) / 3


@compiles
def test_a_launch_compiles_and_goes_no_further():
    from attention_kernels.ahead_of_time import absent_device
    from attention_kernels.decode import decode_kernel
    from attention_plugin.warmup import calls

    kind, found = Kind(4, 2, 64, 64, False, None, False, False), {}
    with absent_device("sm_90"), configs.assuming("sm_90"), calls.compiling_only(found) as note:
        note["for"] = kind.words
        calls._next_token(kind, torch.bfloat16, 1, 32, False, torch.device("cpu"))
    # Whole, and in parts whose number is or is not a multiple of 16.
    assert sorted(row["kernel"] for row in found.values()) == ["decode_kernel"] * 2 + ["merge_kernel"] * 2
    assert configs.architecture(torch.device("cpu")) == "interpreter" and "run" not in vars(decode_kernel)


@compiles
@pytest.mark.exhaustive
def test_training_compiles_the_backward_pass_and_leaves_everything_as_it_was():
    from attention_kernels.forward import forward_kernel

    kind = Kind(4, 2, 64, 64, False, None, False, False)
    found = compile_calls([kind], torch.bfloat16, (1,), "sm_90", torch.device("cpu"), True)
    names = {row["kernel"] for row in found}
    assert {"query_kernel", "key_value_kernel", "statistics_kernel", "row_bounds_kernel", "forward_kernel"} <= names
    assert configs.architecture(torch.device("cpu")) == "interpreter" and "run" not in vars(forward_kernel)


@compiles
def test_prompts_come_with_and_without_a_mask(monkeypatch):
    """As on a GPU: `generate` makes a mask for one sequence too, and nobody looks whether it hides a key."""
    from attention_kernels import decode, forward

    seen = {"prompt": set(), "token": set()}
    monkeypatch.setattr(forward, "forward", lambda given, **named: seen["prompt"].add(_mask(*given[:7])) or (None,) * 3)
    monkeypatch.setattr(decode, "decode", lambda *given, **named: seen["token"].add(_mask(*given[:7])) or (None,) * 2)
    kind = Kind(4, 2, 64, 64, False, None, False, False)
    compile_calls([kind], torch.bfloat16, (32,), "sm_90", torch.device("cpu"), False)
    assert seen["prompt"] == seen["token"] == {(1, False), (1, True), (2, False), (2, True)}


def _mask(query, key, value, start, end, key_mask, gap_count):
    assert (key_mask is None) == (gap_count is None)
    assert key_mask is None or key_mask.shape[0] == query.shape[0]
    return query.shape[0], key_mask is not None


def test_kinds_in_words():
    assert Kind(32, 8, 192, 128, True, 30.0, True, True).words == "32/8 heads of 192/128, sinks, softcap, mask, bias"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--target", "sm_70"],
            "--target must be one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942, got 'sm_70'",
        ),
        (["--target", "sm_90", "--prompt-lengths", "0"], "--prompt-lengths must be positive, got 0"),
        pytest.param([], "there is no GPU to compile for; name a chip with --target", marks=no_gpu),
    ],
)
@compiles
def test_what_cannot_be_warmed_up_is_said(options, words, capsys, model):
    assert main(["warmup", model, *options]) == 2
    assert words in capsys.readouterr().err


@compiles
def test_a_model_that_is_not_served(capsys):
    assert main(["warmup", "bloom", "--target", "sm_90"]) == 2
    assert "is served; see `my-triton explain bloom`" in capsys.readouterr().err


@compiles
@pytest.mark.parametrize(
    "command", [["warmup", "MODEL", "--target", "sm_90"], ["compile-report", "--architecture", "sm_90"]]
)
def test_an_unwritable_cache_is_found_out_before_compiling(command, model, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(compile_report, "draw_up", lambda *given, **options: pytest.fail("compiled"))
    monkeypatch.setattr(warmup, "warm_up", lambda *given: pytest.fail("compiled"))
    assert main([model if word == "MODEL" else word for word in command]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"my-triton {command[0]}: what Triton compiles cannot be kept in '{tmp_path}/file/cache' ([Errno 20] Not a "
    )
    assert error.endswith("; set TRITON_CACHE_DIR to a folder that can be written\n") and error.count("\n") == 1


def test_the_interpreter_compiles_nothing(monkeypatch, capsys, model):
    monkeypatch.setattr(warmup, "interpreting", lambda: True)
    assert main(["warmup", model]) == 2
    assert "TRITON_INTERPRET is set: the interpreter compiles nothing; unset it" in capsys.readouterr().err
