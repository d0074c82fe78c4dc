# SPDX-License-Identifier: Apache-2.0
"""What transformers' common tests ask of `sdpa`, asked of `my_triton`: loading, dispatch, generation, checkpointing."""

import pytest
import torch

from model_families import compare
from model_families.build import pair

from helpers import EARLIER_TRANSFORMERS

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "opt": "OPTForCausalLM",
    "bart": "BartForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "vit": "ViTForImageClassification",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
DECODERS = ("llama", "gemma2", "gpt2", "mistral", "qwen3", "opt")


def close(actual, expected):
    return compare.worst(actual, expected) < compare.TOLERANCE


@pytest.mark.parametrize("folder", FAMILIES)
@torch.no_grad()
def test_loading_and_switching(folder, tmp_path):
    """Saved under one implementation, loaded under the other, and switched while it is loaded."""
    if folder == "t5" and EARLIER_TRANSFORMERS:
        pytest.skip("earlier than 5.23 its layers are not told of the switch")
    built = pair(folder, FAMILIES[folder])
    expected = compare.run(built.eager, built.inputs)
    built.eager.save_pretrained(tmp_path)
    loaded = type(built.eager).from_pretrained(tmp_path, attn_implementation="my_triton").eval()
    assert loaded.config._attn_implementation == "my_triton"
    with compare.recorded() as seen:
        assert close(compare.run(loaded, built.inputs), expected)
    assert seen
    loaded.set_attn_implementation("eager")
    with compare.recorded() as seen:
        assert close(compare.run(loaded, built.inputs), expected)
    assert not seen
    loaded.set_attn_implementation("my_triton")
    with compare.recorded() as seen:
        assert close(compare.run(loaded, built.inputs), expected)
    assert seen


@torch.no_grad()
def test_parts_of_a_model_may_differ():
    built = pair("qwen3_vl", FAMILIES["qwen3_vl"])
    expected = compare.run(built.eager, built.inputs)
    for ours, other in (("text_config", "vision_config"), ("vision_config", "text_config")):
        built.ours.set_attn_implementation({ours: "my_triton", other: "eager"})
        with compare.recorded() as seen:
            assert close(compare.run(built.ours, built.inputs), expected)
        assert seen == {"Qwen3VLTextAttention" if ours == "text_config" else "Qwen3VLVisionAttention"}


@pytest.mark.parametrize("folder", DECODERS)
@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}], ids=["static", "beams"]
)
@torch.no_grad()
def test_generation(folder, options):
    built = pair(folder, FAMILIES[folder])
    inputs, _ = compare.padded_inputs(built, left=True)
    common = {**inputs, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    assert torch.equal(built.ours.generate(**common), built.eager.generate(**common))


@torch.no_grad()
def test_assisted_generation():
    """Another model guesses, and several tokens are checked at once."""
    built, guesser = pair("llama", FAMILIES["llama"]), pair("llama", FAMILIES["llama"])
    for parameter in guesser.ours.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    inputs = {name: value[:1] for name, value in built.inputs.items()}
    common = {**inputs, "max_new_tokens": 12, "do_sample": False}
    expected = built.eager.generate(**common)
    assert torch.equal(built.ours.generate(**common, assistant_model=guesser.ours), expected)


@pytest.mark.parametrize("folder", ["llama", "gpt2", "bart", "bert", "vit"])
def test_gradient_checkpointing(folder):
    """Forward runs twice and gives the gradients of one run."""
    built = pair(folder, FAMILIES[folder])
    expected = compare.parameter_gradients(built.eager.train(), built.inputs)
    built.ours.train().gradient_checkpointing_enable({"use_reentrant": False})
    actual = compare.parameter_gradients(built.ours, built.inputs)
    assert compare.gradient_error(actual, expected) < compare.TOLERANCE


def test_prefix_tuning():
    """Trained keys and values in front of the cache."""
    import peft

    built = pair("llama", FAMILIES["llama"])
    results = []
    for model in (built.ours, built.eager):
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
        results.append(tuned(**built.inputs).logits)
    assert compare.relative_error(*results) < compare.TOLERANCE
