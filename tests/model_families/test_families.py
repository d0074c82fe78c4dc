# SPDX-License-Identifier: Apache-2.0
"""Model families of transformers under `my_triton` equal eager; docs/models.md says what these tests see."""

import importlib
import inspect
import json
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from attention_kernels.paths import interpreting
from model_families import compare, discover, report, walk

RESULTS = json.loads(report.RESULTS.read_text())
ROWS = {row["folder"]: row for row in RESULTS["families"]}
PASSING = [folder for folder, row in ROWS.items() if walk.passed(row)]
VERSION = pytest.mark.skipif(
    transformers.__version__ != RESULTS["transformers"], reason=f"results.json is of {RESULTS['transformers']}"
)

# Features of attention and kinds of model, each by a family that has it.
SAMPLE = """
    bart bert deepseek_v32 deepseek_v4 detr doge gemma2 gpt_oss informer inkling2 lightglue llama longt5 minimax_m3_vl
    mimi qwen3_vl sam2 segformer swin t5 time_series_transformer vit wav2vec2 whisper
""".split()
MINUTES_IN_INTERPRETER = {"internvl", "qianfan_ocr"}
"""Together they would take as long as all the others; towers like theirs are among those."""

IN_INTERPRETER = set(PASSING[::4]) | {"deepseek_v32", "doge", "gemma2", "gpt_oss", "inkling2", "t5"} & set(PASSING)
IN_INTERPRETER -= MINUTES_IN_INTERPRETER
"""A quarter, and those with every feature."""

SHORT_IN_INTERPRETER = {"inkling2", "doge"}


def check(folder):
    """The classes that are on record, compared again."""
    for entry in ROWS[folder]["models"]:
        if interpreting():
            checks = {"outputs": compare.outputs, "gradients": compare.gradients}
        else:
            checks = compare.CHECKS
        found, reached = walk.examine_class(folder, entry["class"], checks)
        assert reached, f"{entry['class']} never called the implementation"
        for name, value in found["checks"].items():
            recorded = entry["checks"][name]
            if isinstance(value, float):
                assert value < compare.TOLERANCE, f"{entry['class']}, {name}: {value:.1e}"
            else:
                assert value.startswith(("not applicable", "float64")), f"{entry['class']}, {name}: {value}"
            applies = [not str(each).startswith("not applicable") for each in (value, recorded)]
            assert applies[0] == applies[1], f"{entry['class']}, {name}: {value}, on record {recorded}"


@VERSION
@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(folder, marks=pytest.mark.interpreter if folder in SHORT_IN_INTERPRETER else ())
        for folder in SAMPLE
        if folder in PASSING
    ],
)
def test_sampled_rows_of_the_table_are_true(folder):
    check(folder)


@VERSION
@pytest.mark.families
@pytest.mark.parametrize(
    "folder",
    [pytest.param(folder, marks=pytest.mark.interpreter if folder in IN_INTERPRETER else ()) for folder in PASSING],
)
def test_family_equals_eager(folder):
    check(folder)


@VERSION
def test_every_family_is_on_record():
    assert list(ROWS) == discover.folders()
    assert RESULTS["refused"] == discover.folders_without_call()


def test_the_page_is_written_from_the_record():
    assert report.PAGE.read_text() == report.page(RESULTS)


def models_of(folder):
    """The model classes of a folder's files that define attention layers."""
    for path in sorted((discover.ROOT / folder).glob("modeling_*.py")):
        if re.search(r"^class \w*Attention\w*\((?:nn\.|torch\.nn\.)?Module", path.read_text(), re.MULTILINE):
            module = importlib.import_module(f"transformers.models.{folder}.{path.stem}")
            for value in vars(module).values():
                if (
                    inspect.isclass(value)
                    and issubclass(value, PreTrainedModel)
                    and value.__module__ == module.__name__
                ):
                    yield value


@VERSION
def test_every_model_that_computes_attention_itself_is_refused():
    """While it is built: as soon as it receives a submodule, before its layers exist."""
    folders = discover.folders_without_call()
    refused = set()
    for folder in folders:
        for model_class in models_of(folder):
            model = model_class.__new__(model_class)
            torch.nn.Module.__init__(model)
            model.config = SimpleNamespace(_attn_implementation="my_triton")
            words = rf"{model_class.__name__} computes attention in its own code \(modeling_\w+.py does not leave it to"
            with pytest.raises(ValueError, match=words):
                model.layer = torch.nn.Identity()
            model.config = SimpleNamespace(_attn_implementation="eager")
            model.layer = torch.nn.Identity()
            refused.add(folder)
    assert refused == set(folders)
    assert len(refused) > 80
