# SPDX-License-Identifier: Apache-2.0
"""`output_attentions`: the weights that models return are those of eager attention."""

import copy
import importlib
import logging
from typing import Any

import pytest
import torch
import transformers
from test_attention import ENCODERS, LLAMA, SEQUENCE_TO_SEQUENCE, VISION_MODELS, ids, padding, pair
from torch import Tensor

from attention_plugin import attention_forward, sources, span_mask, support, weights

import tiny_models

CAUSAL = ("llama", "gemma2", "gpt_oss", "gpt2", "opt", "bert", "llama4_text", "deepseek_v3")
TOKENS = 9
TOLERANCE = 1e-5
EAGER = 'attn_implementation="eager"'


def assert_same(ours: Any, expected: Any, rows: Tensor | None = None) -> None:
    """The same weights in each layer, in the rows `[batch, query_len]` that are tokens."""
    assert ours is not None and len(ours) == len(expected) > 0
    for mine, other in zip(ours, expected, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        if rows is not None:
            mine, other = (tensor.transpose(1, 2)[rows] for tensor in (mine, other))
        assert float((mine - other).norm()) <= TOLERANCE * float(other.norm())


def models(model_type: str, **changes: Any) -> tuple[Any, Any]:
    """The same tiny model with eager attention and with ours."""
    eager = tiny_models.build(model_type, "eager", **changes)
    return eager, tiny_models.build(model_type, "my_triton", eager.state_dict(), **changes)


def tokens() -> Tensor:
    return torch.randint(5, tiny_models.VOCAB_SIZE, (2, TOKENS))


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize("model_type", CAUSAL)
@torch.no_grad()
def test_causal_models(model_type: str):
    eager, ours = models(model_type)
    inputs = {"input_ids": tokens(), "output_attentions": True}
    expected, result = (model(**inputs) for model in (eager, ours))
    assert_same(result.attentions, expected.attentions)
    assert (result.logits - expected.logits).norm() <= 2e-4 * expected.logits.norm()
    assert ours(inputs["input_ids"]).attentions is None  # asked for in one call only


@pytest.mark.parametrize("model_type", CAUSAL)
@torch.no_grad()
def test_left_padding(model_type: str):
    """A row without keys is 0 here, and some average over padding in eager attention; nobody reads either."""
    eager, ours = models(model_type)
    attention_mask = (torch.arange(TOKENS) >= torch.tensor([[0], [4]])).long()
    inputs = {"input_ids": tokens(), "attention_mask": attention_mask, "output_attentions": True}
    expected, result = (model(**inputs).attentions for model in (eager, ours))
    assert_same(result, expected, attention_mask.bool())
    assert all((layer[1, :, :4] == 0).all() and (layer[1, :, :, :4] == 0).all() for layer in result)


@torch.no_grad()
def test_packed_documents():
    eager, ours = models("llama")
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    inputs = {"input_ids": tokens()[:1], "position_ids": positions, "use_cache": False, "output_attentions": True}
    expected, result = (model(**inputs).attentions for model in (eager, ours))
    assert_same(result, expected)
    assert all((layer[:, :, 4:, :4] == 0).all() for layer in result)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_generation(model_type: str):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    prompt = tokens()
    eager, ours = (
        model.generate(prompt, **options, output_attentions=True, return_dict_in_generate=True)
        for model in models(model_type)
    )
    assert torch.equal(eager.sequences, ours.sequences)
    assert [step[0].shape[2] for step in ours.attentions] == [TOKENS, 1, 1, 1]
    for step, expected in zip(ours.attentions, eager.attentions, strict=True):
        assert_same(step, expected)


@pytest.mark.parametrize("name", SEQUENCE_TO_SEQUENCE)
@torch.no_grad()
def test_sequence_to_sequence(name: str):
    eager, ours = pair(*SEQUENCE_TO_SEQUENCE[name]())
    source, target = ids(2, 9), ids(2, 7)
    inputs = {"input_ids": source, "attention_mask": padding(2, 9), "decoder_input_ids": target}
    expected, result = (model(**inputs, output_attentions=True) for model in (eager, ours))
    for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert_same(result[kind], expected[kind])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    expected, result = (model.generate(source, **options, output_attentions=True) for model in (eager, ours))
    assert_same(result.encoder_attentions, expected.encoder_attentions)
    for kind in ("decoder_attentions", "cross_attentions"):
        for step, other in zip(result[kind], expected[kind], strict=True):
            assert_same(step, other)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_encoders(name: str):
    eager, ours = pair(*ENCODERS[name]())
    attention_mask = padding(3, 14)
    inputs = {"input_ids": ids(3, 14), "attention_mask": attention_mask, "output_attentions": True}
    expected, result = (model(**inputs).attentions for model in (eager, ours))
    assert_same(result, expected, attention_mask.bool())


@pytest.mark.parametrize("name", VISION_MODELS)
@torch.no_grad()
def test_vision(name: str):
    eager, ours = pair(*VISION_MODELS[name]())
    pixels = torch.randn(2, 3, 16, 16)
    assert_same(*(model(pixels, output_attentions=True).attentions for model in (ours, eager)))


# ---------------------------------------------------------------------- ways to ask


@torch.no_grad()
def test_configuration():
    """Given when the configuration is made; transformers refuses it on a model that has an implementation."""
    eager, ours = pair(transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA, output_attentions=True))
    inputs = ids(2, 6)
    assert_same(ours(inputs).attentions, eager(inputs).attentions)
    assert ours(inputs, output_attentions=False).attentions is None
    with pytest.raises(ValueError, match="`output_attentions` attribute is not supported"):
        transformers.LlamaConfig(**LLAMA, attn_implementation="my_triton").output_attentions = True


@torch.no_grad()
def test_loading_with_a_configuration(tmp_path):
    eager, _ = models("llama")
    eager.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, output_attentions=True)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=config, attn_implementation="my_triton")
    inputs = tokens()
    assert_same(ours(inputs).attentions, eager(inputs, output_attentions=True).attentions)


def test_the_log_says_once_what_it_costs(caplog: pytest.LogCaptureFixture):
    _, ours = models("llama")
    support.log_once.cache_clear()
    ours(tokens())
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "attention_plugin"):
        for _ in range(2):
            ours(tokens(), output_attentions=True)
    messages = [record.getMessage() for record in caplog.records if record.name == "attention_plugin"]
    assert len(messages) == 1
    assert "[batch, num_heads, query_len, key_len]" in messages[0] and "square" in messages[0]


def llama4_vision(**changes: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
    config = transformers.Llama4VisionConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
        vision_output_dim=32, projector_input_dim=32, projector_output_dim=32, **changes,
    )  # fmt: skip
    # Its code takes the weights from where they are only beside the hidden states.
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "output_hidden_states": True}
    return pair(transformers.Llama4VisionModel, config), inputs


def pix2struct_vision(**changes: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
    config = transformers.Pix2StructVisionConfig(
        hidden_size=32, patch_embed_hidden_size=12, d_ff=48, d_kv=8, num_hidden_layers=2, num_attention_heads=4,
        seq_len=16, **changes,
    )  # fmt: skip
    patches = torch.randn(2, 8, 14)
    patches[..., :2] = 1.0  # row and column
    return pair(transformers.Pix2StructVisionModel, config), {"flattened_patches": patches}


@pytest.mark.parametrize("make", [llama4_vision, pix2struct_vision])
@torch.no_grad()
def test_models_that_keep_the_wish_to_themselves(make: Any):
    """They gather the weights of layers that they have not told to return any: an error, or the configuration."""
    (_, ours), inputs = make()
    assert ours(**inputs).attentions is None
    absent = ours(**inputs, output_attentions=True).attentions
    for use in (
        lambda weights: weights.shape,
        lambda weights: weights[0],
        lambda weights: weights.mean(1),
        lambda weights: weights * 2,
        lambda weights: 2 / weights,
        lambda weights: weights**2,
        lambda weights: -weights,
        lambda weights: weights < 1,
        int,
        lambda weights: torch.stack([weights]),
        lambda weights: torch.sum(weights),
        bool,
        len,
    ):
        with pytest.raises(ValueError, match=f"`output_attentions` did not reach .* configuration .*{EAGER}"):
            use(absent[0])
    assert "Absent" in repr(absent[0]) and not hasattr(absent[0], "__array_interface__")
    assert not hasattr(absent[0], "to"), "hooks that move outputs look for it"
    (eager, ours), _ = make(output_attentions=True)
    assert_same(ours(**inputs).attentions, eager(**inputs).attentions)


TEXT = {"vocab_size": 41, "max_position_embeddings": 64}


def bridgetower(**changes: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.BridgeTowerConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        text_config=sizes | TEXT | {"hidden_size": 32, "intermediate_size": 48} | changes,
        vision_config=sizes | {"hidden_size": 64, "patch_size": 8, "image_size": 16},
    )  # fmt: skip
    inputs = {"input_ids": ids(2, 9), "pixel_values": torch.randn(2, 3, 16, 16)}
    return pair(transformers.BridgeTowerModel, config), inputs


def kosmos2_5(**changes: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
    config = transformers.Kosmos2_5Config(
        text_config=TEXT | {"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4} | changes,
        vision_config={
            "hidden_size": 32, "patch_embed_hidden_size": 12, "d_ff": 48, "d_kv": 8, "num_hidden_layers": 2,
            "num_attention_heads": 4, "seq_len": 16,
        },
        latent_query_num=5,
    )  # fmt: skip
    inputs = pix2struct_vision()[1]
    inputs |= {"input_ids": ids(2, 9), "width": torch.ones(2), "height": torch.ones(2)}
    inputs["image_embeds_position_mask"] = (torch.arange(9) < 5).expand(2, -1)
    return pair(transformers.Kosmos2_5ForConditionalGeneration, config), inputs


@pytest.mark.parametrize(
    ("make", "weights_of"),
    [
        (bridgetower, lambda output: [weights for pair in output.attentions for weights in pair]),
        (kosmos2_5, lambda output: [output.projection_attentions]),
    ],
)
@torch.no_grad()
def test_models_that_always_hand_weights_out(make: Any, weights_of: Any):
    """And have told no layer: an error for who looks at them, or the configuration."""
    (_, ours), inputs = make()
    for absent in weights_of(ours(**inputs, output_attentions=True)):
        with pytest.raises(ValueError, match=f"`output_attentions` did not reach .* configuration .*{EAGER}"):
            absent.mean()
    (eager, ours), _ = make(output_attentions=True)
    assert_same(weights_of(ours(**inputs)), weights_of(eager(**inputs)))


def test_which_files_gather_weights_by_hand():
    by_hand = ("bridgetower", "kosmos2", "kosmos2_5", "llama4", "longt5", "patchtst", "pix2struct")
    for name in (*by_hand, "llama", "bert", "t5", "gpt2"):
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        assert sources.gathers_weights_by_hand(module.__name__) == (name in by_hand)
    assert not sources.gathers_weights_by_hand("a_module_that_is_not_there")


@torch.no_grad()
def test_layers_that_pass_the_wish_on_by_hand():
    config = transformers.LongT5Config(
        vocab_size=41, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, local_radius=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    eager, ours = pair(transformers.LongT5ForConditionalGeneration, config)
    inputs = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 7)}
    expected, result = (model(**inputs, output_attentions=True) for model in (eager, ours))
    for kind in ("decoder_attentions", "cross_attentions"):
        assert_same(result[kind], expected[kind])
    assert ours(**inputs).cross_attentions is None


@torch.no_grad()
def test_a_release_without_the_record(monkeypatch: pytest.MonkeyPatch):
    """What reaches the attention function still counts."""
    eager, ours = models("llama")
    monkeypatch.setattr(weights, "_active_collector", None)
    inputs = tokens()
    assert_same(*(model(inputs, output_attentions=True).attentions for model in (ours, eager)))


@torch.no_grad()
def test_autocast():
    _, ours = models("llama")
    inputs = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        result = ours(inputs, output_attentions=True).attentions
    for layer, expected in zip(result, ours(inputs, output_attentions=True).attentions, strict=True):
        assert float((layer - expected).norm()) < 0.05 * float(expected.norm())
        torch.testing.assert_close(layer.sum(-1).float(), torch.ones(layer.shape[:-1]), atol=0.01, rtol=0)


@torch.no_grad()
def test_compiled():
    _, ours = models("llama")
    inputs = tokens()
    compiled = torch.compile(ours, backend="eager")
    assert_same(*(model(inputs, output_attentions=True).attentions for model in (compiled, ours)))
    assert compiled(inputs).attentions is None


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
def test_gradients_through_the_weights(model_type: str):
    """Of a loss that is made of weights and logits."""
    inputs, gradients = tokens(), []
    for model in models(model_type):
        result = model(inputs, output_attentions=True)
        loss = sum((layer.square().sum() for layer in result.attentions), result.logits.logsumexp(-1).mean())
        loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    eager, ours = gradients
    assert eager.keys() == ours.keys()
    for name, expected in eager.items():
        # A bias of keys moves all scores of a row alike: its gradient is 0, but for rounding.
        assert float((ours[name] - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-5, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool):
    _, ours = models("llama")
    inputs, gradients = tokens(), []
    for checkpointing in (False, True):
        ours = copy.deepcopy(ours).train()
        ours.zero_grad()
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        result = ours(inputs, output_attentions=True, use_cache=False)
        assert len(result.attentions) == 2
        result.logits.logsumexp(-1).mean().backward()
        gradients.append(ours.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------------- the function


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_weights_are_what_the_values_were_multiplied_with(dropout: float):
    """Those after dropout, as eager attention returns them."""
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 12)
    module, options = torch.nn.Module().train(), {"dropout": dropout, "s_aux": torch.randn(4), "softcap": 3.0}
    torch.manual_seed(1)
    output, weights = attention_forward(
        module, query, key, value, span_mask(2, 6, 6), output_attentions=True, **options
    )
    expected = weights @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(output.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
    torch.manual_seed(1)
    without, nothing = attention_forward(module, query, key, value, span_mask(2, 6, 6), **options)
    assert nothing is None
    torch.testing.assert_close(without, output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype):
    query, key, value = (torch.randn(1, 2, 20, 16).to(dtype) for _ in range(3))
    _, weights = attention_forward(
        torch.nn.Module().eval(), query, key, value, None, is_causal=False, output_attentions=True
    )
    exact = torch.softmax(query.double() @ key.double().transpose(-1, -2) / 4, -1)
    assert weights.dtype == dtype
    assert float((weights.double() - exact).norm()) < torch.finfo(dtype).eps * float(exact.norm())
