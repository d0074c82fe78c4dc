# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that reads images: what is written, who can load it, and what it is trained on."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from attention_plugin.__main__ import main
from model import checkpoint, squares
from model.configuration_multimodal import ReferenceMultimodalConfig
from model.modeling_multimodal import ReferenceForConditionalGeneration
from model.multimodal_checkpoint import answers_of, batch_of, build_processor, multimodal_config, prompt_of
from model.training import is_checkpoint, prepare_out, train_on

from helpers import EARLIER_TRANSFORMERS

# Run with the checkpoint; prints what it found as one line of JSON. torchvision is made impossible to import.
LOADING_SCRIPT = """
import importlib.util, json, sys

sys.modules["torchvision"] = None
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

checkpoint = sys.argv[1]
load = dict(trust_remote_code=True)
processor = AutoProcessor.from_pretrained(checkpoint, **load)
model = AutoModelForImageTextToText.from_pretrained(checkpoint, **load)
text = "<s>user\\n<|image|><|image|>What do you see?\\nassistant\\n"
images = [Image.new("RGB", size, (200, 30, 30)) for size in ((24, 40), (30, 30))]
inputs = processor(text=text, images=images, return_tensors="pt", return_mm_token_type_ids=True)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
parts = [AutoConfig, AutoImageProcessor, AutoModel]
print(json.dumps({
    "repository on the path": importlib.util.find_spec("model") is not None,
    "classes": [type(part.from_pretrained(checkpoint, **load)).__name__ for part in parts]
    + [type(processor).__name__, type(model).__name__],
    "chat": processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False),
    "tokens": tokens[0].tolist(),
    "patches": inputs["image_grid_thw"].prod(-1).tolist(),
}))
"""


def test_the_directory_is_complete(multimodal_checkpoint_dir: Path) -> None:
    assert {path.name for path in multimodal_checkpoint_dir.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "configuration_multimodal.py",
        "configuration_reference.py",
        "generation_config.json",
        "image_processing_reference.py",
        "model.safetensors",
        "modeling_multimodal.py",
        "modeling_reference.py",
        "modeling_vision.py",
        "processing_reference.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((multimodal_checkpoint_dir / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_multimodal.ReferenceMultimodalConfig",
        "AutoModel": "modeling_multimodal.ReferenceMultimodalModel",
        "AutoModelForImageTextToText": "modeling_multimodal.ReferenceForConditionalGeneration",
        "AutoProcessor": "processing_reference.ReferenceProcessor",
        "AutoImageProcessor": "image_processing_reference.ReferenceImageProcessor",
    }
    assert config["architectures"] == ["ReferenceForConditionalGeneration"] and config["is_mm_prefix_lm"]


def test_its_vision_tower_is_explained(multimodal_checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain", str(multimodal_checkpoint_dir), "--trust-remote-code", "--prompt-lengths", "30", "--json"]
    assert main(command) == 0
    reached = [name for row in json.loads(capsys.readouterr().out)["layers"] for name in row["names"]]
    assert [name for name in reached if name.startswith("vision_tower.layers.")], reached


@pytest.mark.skipif(EARLIER_TRANSFORMERS, reason="its AutoImageProcessor cannot do without torchvision")
def test_a_fresh_process_loads_and_generates_without_torchvision(
    multimodal_checkpoint_dir: Path, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADING_SCRIPT, str(multimodal_checkpoint_dir)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert not found["repository on the path"]
    assert found["classes"] == [
        "ReferenceMultimodalConfig",
        "ReferenceImageProcessor",
        "ReferenceMultimodalModel",
        "ReferenceProcessor",
        "ReferenceForConditionalGeneration",
    ]
    assert found["chat"] == "<s>user\n<|image|>\n" and found["patches"] == [15, 16]

    model = ReferenceForConditionalGeneration.from_pretrained(
        multimodal_checkpoint_dir, attn_implementation="my_triton"
    )
    config = ReferenceMultimodalConfig.from_pretrained(multimodal_checkpoint_dir)
    ids = torch.tensor([found["tokens"]])
    assert int((ids == config.image_token_id).sum()) >= sum(found["patches"])
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_drafts_from_the_prompt_have_no_images(multimodal_checkpoint_dir: Path) -> None:
    """What follows the last words where they stood before is an image, which no answer has."""
    model = ReferenceForConditionalGeneration.from_pretrained(
        multimodal_checkpoint_dir, attn_implementation="my_triton"
    )
    processor = build_processor()
    text = f"what is this? {processor.image_token} what is this? "
    inputs = processor(text=[text], images=[[Image.new("RGB", (64, 64), "red")]], return_tensors="pt")
    greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    drafted = model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(greedy, drafted)
    assert not set(processor.image_token_ids) & set(greedy[0, inputs["input_ids"].shape[1] :].tolist())


def test_training_lowers_the_loss() -> None:
    """What is learned in a minute or two is for the command to report; here the path from images to loss is."""
    torch.manual_seed(0)
    processor, generator = build_processor(), random.Random(0)
    model = ReferenceForConditionalGeneration(multimodal_config(processor))
    examples = [squares.draw_example(generator, kind=kind) for kind in ("one", "several", "video", "none")]
    batch = batch_of(processor, examples, with_answers=True)
    with torch.no_grad():
        before = model(**batch).loss.item()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_on(model, lambda elapsed: batch, 4.0, 3e-3, 3e-3)
    finally:
        torch.set_num_threads(threads)
    assert not model.training
    with torch.no_grad():
        assert model(**batch).loss.item() < before / 2
    assert len(answers_of(model, processor, examples)) == 4


def test_labels_are_the_answers() -> None:
    processor, generator = build_processor(), random.Random(2)
    examples = [squares.draw_example(generator, kind=kind) for kind in ("several", "video", "none")]
    batch = batch_of(processor, examples, with_answers=True)
    for row, example in enumerate(examples):
        counted = batch["labels"][row] >= 0
        assert processor.decode(batch["labels"][row][counted]) == example.answer + "</s>"
        prompt = processor.decode(batch["input_ids"][row][~counted & batch["attention_mask"][row].bool()])
        assert prompt.endswith(f"{example.question}\nassistant\n")
        assert prompt_of(processor, example).startswith("<s>user\n")


@pytest.mark.parametrize("held_out", [False, True])
def test_training_never_shows_what_is_held_out(held_out: bool) -> None:
    generator = random.Random(4)
    for _ in range(300):
        example = squares.draw_example(generator, held_out, kind="one")
        if example.question == squares.SEE:
            colour, place = example.answer.split(" square ")
            assert ((colour, place) in squares.HELD_OUT) is held_out
    example = squares.draw_example(generator, held_out, kind="video")
    assert 2 <= len(example.videos[0]) <= 3 and len({frame.size for frame in example.videos[0]}) == 1


@pytest.mark.parametrize("place", squares.PLACES)
def test_squares_are_where_the_answer_says(place: str) -> None:
    image = squares.draw_square("white", place, 36, 30, random.Random(0), background=100)
    bright = torch.tensor(list(image.convert("L").tobytes())).view(36, 30) > 200
    rows, columns = (bright.any(axis).nonzero().float().mean() / size for axis, size in ((1, 36), (0, 30)))
    row, column = squares.ROWS[int(rows * 3)], squares.COLUMNS[int(columns * 3)]
    assert f"{row} {column}" == place


def test_bad_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert checkpoint.main([str(out), "--multimodal", "--train-seconds", "0"]) == 2
    assert "error: train_seconds must be above 0 and finite, got 0.0" in capsys.readouterr().err
    assert not out.exists()


def test_a_multimodal_checkpoint_may_be_replaced(multimodal_checkpoint_dir: Path) -> None:
    prepare_out(multimodal_checkpoint_dir, ReferenceMultimodalConfig.model_type)
    assert not is_checkpoint(multimodal_checkpoint_dir), "the one that reads text is another"
