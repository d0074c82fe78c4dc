# SPDX-License-Identifier: Apache-2.0
"""Vision and audio towers that attend to all their images in one call once a model is enabled, with eager's result."""

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

import attention_plugin
from attention_plugin import support
from attention_plugin.engines import flash_gates

from tiny_models import build

if Version(transformers.__version__) < Version(flash_gates.MINIMUM_VERSION):
    pytest.skip("the call that enables it needs a later transformers", allow_module_level=True)

TOLERANCE = 1e-5
GATE = "is_flash_attention_requested"
LENGTHS = [12, 16, 5]
"""Patches of three images of different sizes."""

SIZES = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "adapter_in_dim": 32,
    "num_heads": 4,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": 4,
    "image_size": 32,
    "window_size": 16,  # two merged patches
    "num_position_embeddings": 64,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    "attention_dropout": 0.0,
    "initializer_range": 0.2,
}

# Class -> configuration class, where the code does not say it.
CONFIGURATIONS = {"Qwen3ASRAudioAttention": "Qwen3ASREncoderConfig"}

# Has its gate outside of its attention layer; see `test_pixtral`.
WHOLE = {"PixtralVisionModel"}


# Their layers take [1, tokens, hidden_size].
BATCH_FIRST = {
    "HYV4VLVisionAttention",
    "HunYuanVLVisionAttention",
    "MiniCPMOcrVisionAttention",
    "MiniCPMV4_6VisionAttention",
    "MiniCPMV4_7VisionAttention",
    "RadioAttention",
}


@functools.cache
def gated_classes() -> dict[str, str]:
    """Class -> module, for all classes of transformers that pass cumulative lengths to flash implementations only."""
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        code = path.read_text()
        if GATE not in code:
            continue
        classes = (node for node in ast.parse(code).body if isinstance(node, ast.ClassDef))
        for node in classes:
            if any(is_gate(part) for part in ast.walk(node)):
                found[node.name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


def is_gate(node: ast.AST) -> bool:
    if not isinstance(node, ast.If) or GATE not in ast.unparse(node.test):
        return False
    return any("cu_seq_lens_q" in ast.unparse(statement) for statement in node.body)


def configuration_of(cls: type, module: Any) -> type[PreTrainedConfig]:
    configurations = vars(importlib.import_module(module.__name__.replace("modeling_", "configuration_")))
    if cls.__name__ in CONFIGURATIONS:
        return configurations[CONFIGURATIONS[cls.__name__]]
    annotation = inspect.signature(cls.__init__).parameters["config"].annotation
    if inspect.isclass(annotation) and issubclass(annotation, PreTrainedConfig):
        return annotation
    kind = "Audio" if "Audio" in cls.__name__ else "Vision"
    return next(value for name, value in configurations.items() if kind in name and name.endswith("Config"))


LAYERS = {"depth": 2, "num_hidden_layers": 2}


def shrink(config_class: type[PreTrainedConfig], sizes: dict[str, Any]) -> PreTrainedConfig:
    return config_class(**{name: value for name, value in sizes.items() if name in config_class.__dataclass_fields__})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call to this attention had cumulative lengths. Names that a test registers are taken away again."""
    seen = []
    plain = attention_plugin.attention_forward

    def counting(*args: Any, **kwargs: Any):
        seen.append(kwargs.get("cu_seq_lens_q") is not None)
        return plain(*args, **kwargs)

    before = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    names = set(support.registered_names)
    monkeypatch.setitem(AttentionInterface._global_mapping, "my_triton", counting)
    yield seen
    for table, entries in zip((AttentionInterface, AttentionMaskInterface), before, strict=True):
        table._global_mapping.clear()
        table._global_mapping.update(entries)
    support.registered_names.clear()
    support.registered_names.update(names)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


# ---------------------------------------------------------------------- every gated layer


def test_the_gated_classes_are_found():
    """None found would test nothing: the gate has moved, and `enable_continuous_batching` should be looked at."""
    assert len(gated_classes()) >= 36  # docs/engines.md names the number
    assert {"VisionAttention", "Qwen2_5_VLVisionAttention", "Qwen3VLVisionAttention", *WHOLE} <= set(gated_classes())


@pytest.mark.parametrize("name", sorted(set(gated_classes()) - WHOLE))
@torch.no_grad()
def test_every_gated_layer(name: str, calls: list[bool]):
    attention_plugin.enable_continuous_batching(build("llama", "my_triton"))  # registers the name
    module = importlib.import_module(gated_classes()[name])
    cls = getattr(module, name)
    accepted = inspect.signature(cls.forward).parameters
    torch.manual_seed(0)
    layer = cls(
        shrink(configuration_of(cls, module), SIZES),
        **({"layer_idx": 0} if "layer_idx" in inspect.signature(cls.__init__).parameters else {}),
    ).eval()
    tokens = sum(LENGTHS)
    hidden = torch.randn(tokens, next(weight for weight in layer.parameters() if weight.ndim == 2).shape[1])
    angles = torch.randn(tokens, getattr(layer, "head_dim", 8) // 2).repeat(1, 2)
    cu_seqlens = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    arguments: dict[str, Any] = {"cu_seqlens": cu_seqlens}
    if "position_embeddings" in accepted:
        arguments["position_embeddings"] = (angles.cos(), angles.sin())
    if "max_seqlen" in accepted:
        arguments["max_seqlen"] = max(LENGTHS)
    if name in ("HunYuanVLVisionAttention", "HYV4VLVisionAttention"):  # hand on what their towers pass
        arguments["attention_mask"] = None
    batch_first = name in BATCH_FIRST
    outputs = {}
    for implementation in ("eager", "my_triton", "my_triton_flash"):
        calls.clear()
        layer.config._attn_implementation = implementation
        output = layer(hidden[None] if batch_first else hidden, **arguments)
        outputs[implementation] = output[0] if isinstance(output, tuple) else output
        assert calls == {"eager": [], "my_triton": [False] * len(LENGTHS), "my_triton_flash": [True]}[implementation]
    for implementation in ("my_triton", "my_triton_flash"):
        assert relative_error(outputs[implementation], outputs["eager"]) < TOLERANCE


# ---------------------------------------------------------------------- whole towers

TOWERS = {
    "qwen2_vl": "Qwen2VisionTransformerPretrainedModel",
    "qwen2_5_vl": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen3_vl": "Qwen3VLVisionModel",
}


def pair_of(cls: type, config: PreTrainedConfig) -> tuple[Any, Any]:
    """The enabled model and the same under eager."""
    models = []
    for implementation in ("my_triton", "eager"):
        torch.manual_seed(0)
        models.append(cls._from_config(config.__class__(**config.to_dict()), attn_implementation=implementation).eval())
    return attention_plugin.enable_continuous_batching(models[0]), models[1]


@pytest.mark.parametrize("folder", TOWERS)
@torch.no_grad()
def test_whole_towers(folder: str, calls: list[bool]):
    """Images and a video of different sizes, in full and, for Qwen2.5-VL, in windows."""
    cls = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), TOWERS[folder])
    config = shrink(cls.config_class, SIZES | LAYERS)
    ours, eager = pair_of(cls, config)
    grid = torch.tensor([[1, 4, 6], [1, 8, 4], [2, 4, 4]])
    patch = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(int(grid.prod(-1).sum()), patch)
    outputs, expected = (model(pixels, grid_thw=grid) for model in (ours, eager))
    assert calls == [True] * config.depth
    assert relative_error(outputs[0], expected[0]) < TOLERANCE
    assert relative_error(outputs[1], expected[1]) < TOLERANCE

    calls.clear()
    again = attention_plugin.disable_continuous_batching(ours)(pixels, grid_thw=grid)
    assert len(calls) > 3 * config.depth and not any(calls)  # an image, or window, at a time
    assert relative_error(again[0], expected[0]) < TOLERANCE


@torch.no_grad()
def test_pixtral(calls: list[bool]):
    """Eager gets a dense mask here, this attention the lengths."""
    from transformers import PixtralVisionConfig, PixtralVisionModel

    ours, eager = pair_of(PixtralVisionModel, shrink(PixtralVisionConfig, SIZES | LAYERS))
    pixels, sizes = torch.randn(3, 3, 32, 32), torch.tensor([[32, 16], [8, 32], [20, 12]])
    outputs, expected = (model(pixels, image_sizes=sizes).last_hidden_state for model in (ours, eager))
    assert calls == [True, True]
    assert relative_error(outputs, expected) < TOLERANCE


@torch.no_grad()
def test_parts_of_another_implementation_keep_it(calls: list[bool]):
    """A model of text and images with this attention in its vision tower alone."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    sizes = {"vocab_size": 61, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**sizes, "hidden_size": 32, "intermediate_size": 48, "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
        image_token_id=59, video_token_id=58, vision_start_token_id=57, vision_end_token_id=56,
    )  # fmt: skip
    grid = torch.tensor([[1, 4, 6], [1, 8, 4]])
    images = [int(each) // 4 for each in grid.prod(-1)]
    tokens = torch.tensor([[5, 57, *[59] * images[0], 56, 9, 57, *[59] * images[1], 56, 7, 8]])
    inputs = {
        "input_ids": tokens,
        "pixel_values": torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 16),
        "image_grid_thw": grid,
        "mm_token_type_ids": (tokens == 59).int(),
    }
    logits = []
    for implementation in ({"": "eager", "text_config": "eager", "vision_config": "my_triton"}, "my_triton", "eager"):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()
        if implementation != "eager":
            attention_plugin.enable_continuous_batching(model)
        text = "my_triton_flash" if implementation == "my_triton" else "eager"
        vision = "eager" if implementation == "eager" else "my_triton_flash"
        assert model.config.text_config._attn_implementation == text
        assert model.config.vision_config._attn_implementation == vision
        calls.clear()
        logits.append(model(**inputs).logits)
        assert sum(calls) == (0 if implementation == "eager" else 2)
    for each in logits[:2]:
        assert relative_error(each, logits[2]) < TOLERANCE
