# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning example: it agrees with eager, what it saves is what it trained, and what it refuses."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from model.modeling_reference import ReferenceForCausalLM

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "finetune.py"
STEPS = 6


@pytest.fixture(scope="module")
def example() -> dict:
    """The names that the script defines."""
    return runpy.run_path(str(SCRIPT))


def run_example(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in `folder`, with a cache of its own for the checkpoint's code."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def without_layout(text: str) -> str:
    return re.sub(r"[\s│]", "", text)


def test_losses_agree_and_fall_and_the_adapter_is_the_trained_one(
    checkpoint_dir: Path, tmp_path: Path, example: dict
) -> None:
    adapter = tmp_path / "adapter"
    run = run_example(tmp_path, str(checkpoint_dir), "--steps", str(STEPS), "--output", str(adapter))
    assert run.returncode == 0, run.stdout + run.stderr
    losses = re.findall(r"^│ (\d+) +│ ([\d.]+) +│ ([\d.]+) +│", run.stdout, re.MULTILINE)
    assert [int(step) for step, *_ in losses] == list(range(1, STEPS + 1))
    for _, ours, eager in losses:
        assert float(ours) == pytest.approx(float(eager), rel=1e-5, abs=1e-5)  # five digits are printed
    assert float(losses[-1][1]) < float(losses[0][1])

    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint_dir)
    base = ReferenceForCausalLM.from_pretrained(checkpoint_dir, attn_implementation="my_triton")
    before = example["sample"](base, tokenizer)
    model = PeftModel.from_pretrained(base, adapter)
    after = example["sample"](model, tokenizer)
    assert before != after
    # The panels show them in this order.
    assert re.search(
        re.escape(without_layout(before)) + ".*" + re.escape(without_layout(after)), without_layout(run.stdout)
    )


@pytest.mark.parametrize(
    ("ours", "problem"),
    [
        ([5.0, 4.0], None),
        ([5.0, 4.01], "the losses differ by 2.5e-03, more than 1e-03"),
        ([4.0, 5.0], "the loss with my_triton did not fall"),
        ([5.0, float("nan")], "the loss with my_triton did not fall"),
    ],
)
def test_wrong_losses_are_named(example: dict, ours: list[float], problem: str | None) -> None:
    runs = {"my_triton": example["Run"](ours, 1.0, "", ""), "eager": example["Run"]([5.0, 4.0], 1.0, "", "")}
    problems = example["report"](runs, Console(quiet=True))
    assert problem in problems if problem else not problems


def test_documents_are_distinct_and_fit(checkpoint_dir: Path, example: dict) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint_dir)
    found = [tuple(document["input_ids"]) for document in example["documents"](tokenizer)]
    assert len(set(found)) == len(found) > 500
    assert {len(token_ids) in example["DOCUMENT_TOKENS"] for token_ids in found} == {True}
    ends = {(token_ids[0], token_ids[-1]) for token_ids in found}
    assert ends == {(tokenizer.bos_token_id, tokenizer.eos_token_id)}


def test_a_model_of_images_is_not_tuned_on_text(
    multimodal_checkpoint_dir: Path,
    example: dict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, str(multimodal_checkpoint_dir)])
    with pytest.raises(SystemExit) as stopped:
        example["main"]()
    assert stopped.value.code == 2
    assert "holds no language model of text, but " in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no checkpoint; make one with `python -m model.checkpoint nowhere"),
        (["CHECKPOINT", "--steps", "1"], "--steps must be at least 2 and --lora-rank 1, got 1 and 8"),
        (["CHECKPOINT", "--lora-rank", "0"], "--steps must be at least 2 and --lora-rank 1, got 80 and 0"),
        (["CHECKPOINT", "--attn-implementation", "no_such"], "choose from"),
        (["CHECKPOINT", "--output", str(SCRIPT)], "--output cannot be written: "),
    ],
)
def test_bad_arguments_are_named(
    checkpoint_dir: Path,
    example: dict,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(checkpoint_dir) if argument == "CHECKPOINT" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments])
    with pytest.raises(SystemExit) as stopped:
        example["main"]()
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
