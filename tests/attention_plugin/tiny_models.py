# SPDX-License-Identifier: Apache-2.0
"""Tiny random causal language models, one per model type, built from transformers' own config classes.

A config class is shrunk by the names of its fields, so that one table serves nearly every model
(`model_families/sizes.py`).
"""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from model_families.sizes import OVERRIDES, SIZES, SLIDING_WINDOW, VOCAB_SIZE

__all__ = ["SLIDING_WINDOW", "VOCAB_SIZE", "WINDOWS", "build"]

# Fields that limit how far back a sliding or chunked layer looks.
WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size")


def shrink(model_type):
    """A tiny config of this model type. Layer types that alternate by default are all present."""
    config_class = CONFIG_MAPPING[model_type]
    fields = set(config_class.__dataclass_fields__)
    values = {name: value for name, value in SIZES.items() if name in fields}
    if "layer_types" in fields:
        layer_types = list(dict.fromkeys(config_class().layer_types or ["full_attention"]))
        if layer_types == ["full_attention"] and "sliding_window" in fields:
            layer_types = ["sliding_attention", "full_attention"]
        values["layer_types"] = layer_types if len(layer_types) > 1 else layer_types * 2
        values["num_hidden_layers"] = len(values["layer_types"])
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention expands keys to every head
    values.update(OVERRIDES.get(model_type, {}))
    return config_class(**values)


def build(model_type, implementation, state=None, **changes):
    """The tiny model under one attention implementation, with seeded weights or those of `state`.

    `changes` are config values to set after shrinking.
    """
    config = shrink(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).float().eval()
    if state is None:
        randomise_zeros(model)
    else:
        model.load_state_dict(state)
    return model


@torch.no_grad()
def randomise_zeros(model):
    """Give attention sinks and the padding token's embedding values, as training would.

    Both start at zero or unset. An all-zero embedding in a row without keys stays zero, where gemma3n's norm has no
    finite gradient.
    """
    for name, parameter in model.named_parameters():
        if "sink" in name:
            parameter.normal_()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].normal_(std=0.2)
