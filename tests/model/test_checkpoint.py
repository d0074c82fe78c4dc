# SPDX-License-Identifier: Apache-2.0
"""The checkpoint command: what it writes, who can load it, and what it refuses."""

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model import checkpoint, training
from model.configuration_reference import ReferenceConfig
from model.modeling_reference import ReferenceForCausalLM

TEXTS = ["Return the name of the file.", "Raise ValueError if the name is not valid.\n\n>>> f(1)\n2", "naïve 😀\ttab"]

# Run with the checkpoint and a folder to write to; prints what it found as one line of JSON.
LOADING_SCRIPT = """
import importlib.util, json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

checkpoint, again = sys.argv[1:]
found = {"repository on the path": importlib.util.find_spec("model") is not None}
tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
inputs = tokenizer(["Return the", "Raise an error if the file"], return_tensors="pt", padding=True)
options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
for implementation in ("eager", "sdpa"):
    load = dict(trust_remote_code=True, attn_implementation=implementation)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **load)
    static = model.generate(**inputs, **options, cache_implementation="static")
    found[implementation] = model.generate(**inputs, **options).tolist()
    found[implementation + " static"] = static.tolist()
    model.train().gradient_checkpointing_enable()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    found[implementation + " gradients"] = all(p.grad.isfinite().all().item() for p in model.parameters())
model.save_pretrained(again)
found["module"] = type(model).__module__
found["padded in front"] = inputs["attention_mask"][0, 0].item() == 0
found["base"] = type(AutoModel.from_pretrained(checkpoint, trust_remote_code=True)).__name__
found["config"] = type(AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)).__name__
print(json.dumps(found))
"""

# Run by torchrun with the checkpoint and a folder to write to; each rank writes its logits.
PARALLEL_SCRIPT = """
import os, sys

checkpoint, out = sys.argv[1:]
rank = os.environ["RANK"]
# A folder of its own for each rank: both would copy the modeling files to the same place at the same time.
os.environ["HF_MODULES_CACHE"] = f"{out}/modules-{rank}"
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(
    checkpoint, trust_remote_code=True, tp_plan="auto", attn_implementation="sdpa"
)
ids = torch.arange(3, 67).view(2, 32)
with torch.no_grad():
    logits = model(ids).logits
generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
attention = model.model.layers[0].self_attn
held = attention.q_proj.weight.to_local().shape[0], attention.k_proj.weight.to_local().shape[0]
torch.save({"logits": logits, "generated": generated, "held": held}, f"{out}/rank-{rank}.pt")
torch.distributed.destroy_process_group()
"""


def run_elsewhere(command: list[str], folder: Path) -> str:
    """Run a process in `folder`, without the repository on its path and with its own cache; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_steps_are_the_same_where_a_cpu_does_not_multiply_bfloat16():
    """Newton and Schulz's iteration in float32 instead: the same step, but for rounding; nothing else changes."""
    torch.manual_seed(0)
    start, gradient = torch.randn(2, 48, 32)
    steps = []
    for mode in (contextlib.nullcontext(), training.WidensBfloat16()):
        matrix = torch.nn.Parameter(start.clone())
        matrix.grad = gradient.clone()
        with mode:
            torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0).step()
        assert torch.equal(matrix.grad, gradient)
        steps.append(matrix.detach() - start)
    rounded, exact = steps
    with training.WidensBfloat16():  # the two calls by which releases of torch convert
        for widened in (start.bfloat16(), start.to(dtype=torch.bfloat16, copy=True)):
            assert widened.dtype == torch.float32 and widened.data_ptr() != start.data_ptr()
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()
    assert torch.randn(2).bfloat16().dtype == torch.bfloat16, "the mode has ended"


def test_the_directory_is_complete(checkpoint_dir: Path) -> None:
    assert {path.name for path in checkpoint_dir.iterdir()} == {
        "config.json",
        "configuration_reference.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_reference.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((checkpoint_dir / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_reference.ReferenceConfig",
        "AutoModel": "modeling_reference.ReferenceModel",
        "AutoModelForCausalLM": "modeling_reference.ReferenceForCausalLM",
    }
    assert config["architectures"] == ["ReferenceForCausalLM"]
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2
    weights = load_file(checkpoint_dir / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) > 1_000_000
    assert all(tensor.isfinite().all() for tensor in weights.values())
    generation = json.loads((checkpoint_dir / "generation_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint_dir)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config[name] == generation[name] == getattr(tokenizer, name)


def test_a_fresh_process_loads_generates_trains_and_saves_again(checkpoint_dir: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    printed = run_elsewhere([sys.executable, "-c", LOADING_SCRIPT, str(checkpoint_dir), str(again)], tmp_path)
    found = json.loads(printed.splitlines()[-1])
    assert not found["repository on the path"] and found["module"].startswith("transformers_modules.")
    assert (found["base"], found["config"]) == ("ReferenceModel", "ReferenceConfig")
    assert found["padded in front"]
    assert found["eager"] == found["eager static"] == found["sdpa"] == found["sdpa static"]
    assert found["eager gradients"] and found["sdpa gradients"]
    for name in ("modeling_reference.py", "configuration_reference.py"):
        assert (again / name).read_bytes() == (checkpoint_dir / name).read_bytes()
    maps = [json.loads((folder / "config.json").read_text())["auto_map"] for folder in (again, checkpoint_dir)]
    assert maps[0] == maps[1]


def test_two_ranks_compute_what_one_does(checkpoint_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL_SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run_elsewhere([*launcher, str(script), str(checkpoint_dir), str(tmp_path)], tmp_path)

    model = ReferenceForCausalLM.from_pretrained(checkpoint_dir, attn_implementation="sdpa")
    ids = torch.arange(3, 67).view(2, 32)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    for rank in (0, 1):
        written = torch.load(tmp_path / f"rank-{rank}.pt")
        torch.testing.assert_close(written["logits"], model(ids).logits.detach(), rtol=1e-4, atol=1e-4)
        assert torch.equal(written["generated"], generated)
        # Four of eight query heads and one of two key heads, 32 wide each.
        assert written["held"] == (128, 32)


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    config = ReferenceConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, sliding_window=8)
    model = ReferenceForCausalLM(config)
    stream = torch.arange(3, 64).repeat(20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for a second thread
    try:
        assert checkpoint.train(model, stream, train_seconds=3.0) < math.log(64) - 0.1
    finally:
        torch.set_num_threads(threads)
    assert not model.training


def test_learning_rate_rises_and_falls() -> None:
    factors = [training.learning_rate_factor(share / 100) for share in range(101)]
    assert 0 < factors[0] < 0.1 and max(factors) > 0.95 and abs(factors[-1]) < 1e-6
    peak = factors.index(max(factors))
    assert factors == sorted(factors[: peak + 1]) + sorted(factors[peak + 1 :], reverse=True)


def test_documents_are_distinct_real_text() -> None:
    documents = checkpoint.collect_documents()
    assert len(documents) == len(set(documents)) > 3000
    assert any("JSON" in text for text in documents)


def test_docstrings_of_broken_python_are_passed_over(tmp_path: Path) -> None:
    good, broken = tmp_path / "good.py", tmp_path / "broken.py"
    good.write_text('"""Module."""\nclass A:\n    """Class."""\n    async def f(self):\n        """Function."""\n')
    broken.write_text('"""Module."""\ndef (')
    assert list(checkpoint.docstrings(good)) == ["Module.", "Class.", "Function."]
    assert list(checkpoint.docstrings(broken)) == []


def test_the_tokenizer_loses_nothing_and_is_the_same_each_time(tmp_path: Path) -> None:
    tokenizer = checkpoint.train_tokenizer(TEXTS * 3, vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "text it never saw: Ω ≠ \x00", " two  spaces "]:
        ids = loaded(text)["input_ids"]
        assert ids[0] == loaded.bos_token_id
        assert loaded.decode(ids, skip_special_tokens=True) == text
    same: PreTrainedTokenizerFast = checkpoint.train_tokenizer(TEXTS * 3, vocab_size=300)
    assert same.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_the_stream_is_every_document_between_its_marks() -> None:
    tokenizer = checkpoint.train_tokenizer(TEXTS, vocab_size=300)
    stream = checkpoint.token_stream(TEXTS, tokenizer, seed=3).tolist()
    assert stream == checkpoint.token_stream(TEXTS, tokenizer, seed=3).tolist()
    assert stream.count(tokenizer.bos_token_id) == stream.count(tokenizer.eos_token_id) == len(TEXTS)
    texts = tokenizer.decode(stream).split("</s>")
    assert sorted(text.removeprefix("<s>") for text in texts if text) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-seconds", "0"], "train_seconds must be above 0 and finite, got 0.0"),
        (["--train-seconds", "-3"], "train_seconds must be above 0 and finite, got -3.0"),
        (["--train-seconds", "nan"], "train_seconds must be above 0 and finite, got nan"),
        (["--seed", "-1"], "seed must be at least 0 and below 2**63, got -1"),
        (["--seed", str(2**64)], f"seed must be at least 0 and below 2**63, got {2**64}"),
        (["--attn-implementation", "no_such"], "Unknown attention implementation 'no_such'; known are eager, "),
    ],
)
def test_bad_options_are_named(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert checkpoint.main([str(out), *options]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not out.exists()


def test_out_is_never_somebody_elses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, full = tmp_path / "file", tmp_path / "full"
    file.write_text("mine")
    full.mkdir()
    (full / "config.json").write_text('{"model_type": "llama"}')
    for out, message in ((file, "is a file"), (file / "inside", "Not a directory"), (full, "holds other files")):
        assert checkpoint.main([str(out)]) == 2
        assert message in capsys.readouterr().err
    assert file.read_text() == "mine" and len(list(full.iterdir())) == 1


def test_an_earlier_checkpoint_may_be_replaced(checkpoint_dir: Path, tmp_path: Path) -> None:
    training.prepare_out(checkpoint_dir, ReferenceConfig.model_type)
    training.prepare_out(tmp_path / "new" / "nested", ReferenceConfig.model_type)
    assert (tmp_path / "new" / "nested").is_dir()


def test_one_models_checkpoint_does_not_replace_the_others(
    checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it would leave of the first would be loaded with the second."""
    before = sorted(checkpoint_dir.iterdir())
    assert checkpoint.main([str(checkpoint_dir), "--multimodal"]) == 2
    assert "an earlier checkpoint of my_reference_multimodal, but" in capsys.readouterr().err
    assert sorted(checkpoint_dir.iterdir()) == before


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_attention_that_is_not_installed_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint.main([str(tmp_path / "out"), "--attn-implementation", "flash_attention_2"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and "flash" in line.lower()
