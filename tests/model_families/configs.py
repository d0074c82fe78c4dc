# SPDX-License-Identifier: Apache-2.0
"""Any config class of transformers, shrunk by the names of its fields, with its sub-configs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .overrides import FAMILY_OVERRIDES
from .sizes import FAMILY_SIZES, LISTS, MROPE_SECTION, OVERRIDES, SIZES, SPECIAL_TOKENS, WITH_MROPE


def shrink(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A tiny config. Layer types that alternate by default are all present."""
    return config_class(**values(config_class))


def values(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Arguments of `config_class` for a tiny config; sub-configs as dicts, which the class turns into configs."""
    fields = set(getattr(config_class, "__dataclass_fields__", ()))
    default = config_class()
    sub_configs = {name: _sub_config(spec) for name, spec in _specs(config_class).items()}
    chosen: dict[str, Any] = {}
    for name in fields - sub_configs.keys():
        value = _default(default, name)
        if isinstance(value, PreTrainedConfig):
            sub_configs[name] = type(value)
        elif name in SPECIAL_TOKENS:
            chosen[name] = SPECIAL_TOKENS[name]
        elif isinstance(value, (list, tuple)) and name in LISTS:
            chosen[name] = type(value)(LISTS[name](len(value)))
        elif (
            name == "rope_parameters"
            and isinstance(value, dict)
            and ("mrope_section" in value or config_class.model_type in WITH_MROPE)
        ):
            chosen[name] = {**value, "mrope_section": MROPE_SECTION}
        elif isinstance(value, (list, tuple)):
            continue
        elif name in SIZES:
            chosen[name] = SIZES[name]
        elif name in FAMILY_SIZES:
            chosen[name] = FAMILY_SIZES[name]
    _alternate_layer_types(config_class, default, fields, chosen)
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]  # latent attention expands keys to every head
    overrides = {**OVERRIDES.get(config_class.model_type, {}), **FAMILY_OVERRIDES.get(config_class.model_type, {})}
    specs = _specs(config_class)
    for name, sub_class in sub_configs.items():
        if sub_class is None:
            continue
        replaced = overrides.get(name)
        if isinstance(replaced, dict):
            sub_class = CONFIG_MAPPING[replaced["model_type"]] if "model_type" in replaced else sub_class
        elif name in overrides:
            continue
        shrunk = values(sub_class)
        structure = (
            {} if replaced and "model_type" in replaced else (specs[name].init_kwargs or {} if name in specs else {})
        )
        structure = {key: value for key, value in structure.items() if key.startswith("out_") and key not in shrunk}
        config = sub_class(**{**shrunk, **structure, **(replaced or {})})
        overrides[name] = {"model_type": sub_class.model_type, **config.to_dict()}
    return {**chosen, **overrides}


def _default(config: PreTrainedConfig, name: str) -> Any:
    """The value of a field, or None where it differs between layers and has no value of its own."""
    try:
        return getattr(config, name, None)
    except AttributeError:
        return None
    except Exception as error:
        if "per-layer attribute" in str(error):
            return None
        raise


def _specs(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """What a class says of its sub-configs; earlier than transformers 5.23, of some their classes alone."""
    if hasattr(config_class, "sub_configs_defaults"):
        return config_class.sub_configs_defaults
    return {
        name: SimpleNamespace(config_class=sub_class, model_type=None, init_kwargs=None)
        for name, sub_class in config_class.sub_configs.items()
    }


def _sub_config(spec: Any) -> type[PreTrainedConfig] | None:
    """The class of a sub-config: where any is allowed, the default one."""
    if spec.config_class is not AutoConfig:
        return spec.config_class
    return None if spec.model_type is None else CONFIG_MAPPING[spec.model_type]


def _alternate_layer_types(
    config_class: type[PreTrainedConfig], default: PreTrainedConfig, fields: set[str], chosen: dict[str, Any]
) -> None:
    if "layer_types" not in fields:
        return
    layer_types = list(dict.fromkeys(default.layer_types or ["full_attention"]))
    if layer_types == ["full_attention"] and "sliding_window" in fields:
        layer_types = ["sliding_attention", "full_attention"]
    chosen["layer_types"] = layer_types if len(layer_types) > 1 else layer_types * 2
    chosen["num_hidden_layers"] = len(chosen["layer_types"])
