# SPDX-License-Identifier: Apache-2.0
"""Which model folders of transformers call the attention interface, and which of their classes stand for them."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

CALL = "ALL_ATTENTION_FUNCTIONS.get_interface("
ROOT = Path(transformers.__file__).parent / "models"

# Mappings from the most encompassing task to the least: the first that holds a class of a folder says which one is
# built first. Others follow until every attention class of the folder was seen at work.
TASKS = """
    IMAGE_TEXT_TO_TEXT MULTIMODAL_LM SPEECH_SEQ_2_SEQ SEQ_TO_SEQ_CAUSAL_LM TEXT_TO_WAVEFORM TEXT_TO_SPECTROGRAM RNNT TDT
    CTC MASKED_LM CAUSAL_LM ZERO_SHOT_OBJECT_DETECTION OBJECT_DETECTION UNIVERSAL_SEGMENTATION INSTANCE_SEGMENTATION
    SEMANTIC_SEGMENTATION ZERO_SHOT_IMAGE_CLASSIFICATION MASK_GENERATION DEPTH_ESTIMATION KEYPOINT_DETECTION
    KEYPOINT_MATCHING IMAGE_CLASSIFICATION VIDEO_CLASSIFICATION AUDIO_CLASSIFICATION TIME_SERIES_PREDICTION
    TOKEN_CLASSIFICATION TEXT_RECOGNITION PRETRAINING
""".split()


@dataclass(frozen=True)
class Family:
    """A folder of transformers/models whose code calls the attention interface.

    Attributes:
        folder: its name.
        files: its modeling files that call the interface.
        attention_classes: the classes in whose code the calls stand.
        model_classes: names of model classes to build, the one that encompasses most first.
    """

    folder: str
    files: tuple[str, ...]
    attention_classes: frozenset[str]
    model_classes: tuple[str, ...]


def folders() -> list[str]:
    """Names of all model folders whose modeling files call the interface."""
    return sorted({path.parent.name for path in ROOT.glob("*/modeling_*.py") if CALL in path.read_text()})


def folders_without_call() -> list[str]:
    """Names of all other folders that define an attention layer: they compute attention themselves."""
    calling = set(folders())
    return sorted(
        {
            path.parent.name
            for path in ROOT.glob("*/modeling_*.py")
            if path.parent.name not in calling
            and re.search(r"^class \w*Attention\w*\((?:nn\.|torch\.nn\.)?Module", path.read_text(), re.MULTILINE)
        }
    )


@lru_cache
def family(folder: str) -> Family:
    """What a folder holds; imports its modeling files."""
    modules = [
        importlib.import_module(f"transformers.models.{folder}.{path.stem}")
        for path in sorted((ROOT / folder).glob("modeling_*.py"))
        if CALL in path.read_text()
    ]
    attention = {name for module in modules for name in _classes_that_call(module)}
    models = [name for module in modules for name in _model_classes(module)]
    return Family(folder, tuple(module.__name__ for module in modules), frozenset(attention), tuple(models))


def model_class(folder: str, name: str) -> type[PreTrainedModel]:
    """A model class of a folder by its name."""
    for file in family(folder).files:
        module = importlib.import_module(file)
        if hasattr(module, name):
            return getattr(module, name)
    return getattr(transformers, name)


def _classes_that_call(module: ModuleType) -> list[str]:
    classes = (
        value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__
    )
    return [each.__name__ for each in classes if CALL in inspect.getsource(each)]


def _model_classes(module: ModuleType) -> list[str]:
    own = [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and "forward" in vars(value)
        and getattr(value, "config_class", None) is not None
    ]
    rank = _ranks()
    # Classes in no mapping come last, longest files' last classes first: wrappers are defined after their parts.
    return sorted(own, key=lambda name: (rank.get(name, len(TASKS)), -own.index(name)))


@lru_cache
def _ranks() -> dict[str, int]:
    ranks: dict[str, int] = {}
    for rank, task in enumerate(TASKS):
        for names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            for name in (names,) if isinstance(names, str) else names:
                ranks.setdefault(name, rank)
    return ranks
