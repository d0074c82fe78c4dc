# SPDX-License-Identifier: Apache-2.0
"""Keywords that few models pass: sinks for each token, selected keys, and those that eager attention ignores."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BertConfig, LlamaConfig
from transformers.models.deepseek_v4 import modeling_deepseek_v4
from transformers.models.informer import modeling_informer
from transformers.models.llama import modeling_llama
from transformers.models.sam import modeling_sam

from attention_kernels import attention_reference
from attention_plugin import SpanMask, attention_forward, sources, span_mask, support

BATCH, HEADS, KV_HEADS, TOKENS, DIM = 2, 4, 2, 6, 8


def tensors():
    torch.manual_seed(0)
    return [torch.randn(BATCH, heads, TOKENS, DIM, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def module(**config):
    layer = torch.nn.Module().eval()
    layer.config = SimpleNamespace(**config)
    return layer


def eager_with_sinks(query, key, value, mask, sinks):
    key, value = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (key, value))
    scores = (query @ key.transpose(2, 3) * DIM**-0.5).masked_fill(~mask, float("-inf"))
    weights = torch.cat([scores, sinks.expand(BATCH, HEADS, TOKENS, 1)], -1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2), weights


@pytest.mark.parametrize("shape", [(BATCH, HEADS, TOKENS, 1), (1, HEADS, 1, 1)])
def test_sinks_of_tokens(shape):
    inputs = [*tensors(), torch.randn(shape, requires_grad=True)]
    mask = span_mask(BATCH, TOKENS, TOKENS)
    actual, weights = attention_forward(module(), *inputs[:3], mask, sinks=inputs[3], output_attentions=True)
    expected, expected_weights = eager_with_sinks(*inputs[:3], mask.to_dense(), inputs[3])
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(weights, expected_weights)
    grad = torch.randn_like(expected)
    for ours, eager in zip(*(torch.autograd.grad(each, inputs, grad) for each in (actual, expected)), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_sinks_of_tokens_in_rows_without_keys():
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    mask = span_mask(BATCH, TOKENS, TOKENS, attention_mask=padding)
    inputs = [*tensors(), torch.randn(BATCH, HEADS, TOKENS, 1, requires_grad=True)]
    output, _ = attention_forward(module(), *inputs[:3], mask, sinks=inputs[3])
    assert not output[0, :2].any()
    assert all(each.isfinite().all() for each in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize(
    "sinks, got",
    [
        (torch.zeros(HEADS), "torch.float32 [4]"),
        (torch.zeros(BATCH, HEADS, TOKENS), "torch.float32 [2, 4, 6]"),
        (torch.zeros(BATCH, HEADS, TOKENS, 1, dtype=torch.long), "torch.int64 [2, 4, 6, 1]"),
    ],
)
def test_sinks_of_another_shape(sinks, got):
    words = r"`sinks` must be floating point and broadcast to .* = \[2, 4, 6, 1\], got .*sinks per head are `s_aux`"
    with pytest.raises(ValueError, match=words) as caught:
        attention_forward(module(), *tensors(), span_mask(BATCH, TOKENS, TOKENS), sinks=sinks)
    assert f"got {got}" in str(caught.value)


def test_sinks_of_both_kinds():
    both = {"sinks": torch.zeros(BATCH, HEADS, TOKENS, 1), "s_aux": torch.zeros(HEADS)}
    with pytest.raises(ValueError, match=r"`s_aux` .* and `sinks` .* exclude each other.*logaddexp"):
        attention_forward(module(), *tensors(), span_mask(BATCH, TOKENS, TOKENS), **both)


def test_selected_keys():
    """-1 selects nothing, and what the mask hides stays hidden."""
    query, key, value = tensors()
    indices = torch.randint(-1, TOKENS, (BATCH, TOKENS, 3), dtype=torch.int32)
    indices[..., 0] = torch.arange(TOKENS)
    causal = span_mask(BATCH, TOKENS, TOKENS)
    actual, _ = attention_forward(module(), query, key, value, causal, indices=indices)
    chosen = (indices[..., None, :] == torch.arange(TOKENS)[:, None]).any(-1)[:, None]
    expected, _ = attention_reference(query, key, value, mask=causal.to_dense() & chosen, dtype=torch.float32)
    torch.testing.assert_close(actual, expected.transpose(1, 2))


def test_selected_blocks():
    """A group of heads chooses blocks of keys; the last block is not full."""
    query, key, value = tensors()
    blocks = torch.randint(-1, 2, (BATCH, KV_HEADS, TOKENS, 2))
    blocks[..., 0] = torch.arange(TOKENS) // 4
    causal = span_mask(BATCH, TOKENS, TOKENS)
    actual, _ = attention_forward(module(index_block_size=4), query, key, value, causal, block_indices=blocks)
    chosen = (blocks[..., None, :] == (torch.arange(TOKENS) // 4)[:, None]).any(-1).repeat_interleave(2, 1)
    expected, _ = attention_reference(query, key, value, mask=causal.to_dense() & chosen, dtype=torch.float32)
    torch.testing.assert_close(actual, expected.transpose(1, 2))


@pytest.mark.parametrize(
    "keyword, value, words",
    [
        ("indices", torch.zeros(2, 6, 3), r"`indices` must be integers .* = \[2, 6, 'any number'\], got torch.float32"),
        ("indices", torch.zeros(2, 5, 3, dtype=torch.long), r"`indices` must .* got torch.int64 \[2, 5, 3\]"),
        ("block_indices", torch.zeros(2, 3, 6, 1).long(), r"`block_indices` must .* got torch.int64 \[2, 3, 6, 1\]"),
        ("block_indices", torch.zeros(2, 2, 6, 1).long(), r"`block_indices` needs `index_block_size`.* got None; hand"),
    ],
)
def test_selections_that_do_not_fit(keyword, value, words):
    with pytest.raises(ValueError, match=words):
        attention_forward(module(), *tensors(), span_mask(BATCH, TOKENS, TOKENS), **{keyword: value})


def test_keywords_that_eager_attention_ignores(caplog):
    """Read off the function of the layer's own file; a layer of no known file gives no such permission."""
    support.log_once.cache_clear()
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    layer = modeling_llama.LlamaAttention(config, 0).eval()
    for _ in range(2):
        attention_forward(layer, *tensors(), span_mask(BATCH, TOKENS, TOKENS), grid_of_patches=3)
    said = [each.getMessage() for each in caplog.records if "grid_of_patches" in each.getMessage()]
    assert len(said) == 1 and "modeling_llama.py, whose eager attention ignores it: so does this" in said[0]
    with pytest.raises(ValueError, match=r"`head_mask`=.* is refused"):
        attention_forward(layer, *tensors(), span_mask(BATCH, TOKENS, TOKENS), head_mask=torch.ones(4))
    with pytest.raises(ValueError, match="`grid_of_patches`=3 is refused: it is not known"):
        attention_forward(module(), *tensors(), span_mask(BATCH, TOKENS, TOKENS), grid_of_patches=3)


def test_what_sources_say():
    assert sources.widens_masks(modeling_deepseek_v4.__name__) and not sources.widens_masks(modeling_llama.__name__)
    assert sources.measures_masks(modeling_informer.__name__) and not sources.measures_masks(modeling_llama.__name__)
    assert sources.models_from_tables(modeling_sam.__name__) == {"SamVisionEncoder"}
    assert not sources.models_from_tables(modeling_llama.__name__)
    assert not sources.eager_ignores(modeling_llama.__name__, "scaling")
    assert not sources.eager_ignores("a_module_that_is_not_there", "scaling")


# ---------------------------------------------------------------------- masks


def test_a_mask_of_one_row_serves_all_queries():
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    one = span_mask(BATCH, 1, TOKENS, attention_mask=padding, q_offset=TOKENS - 1)
    inputs = tensors()
    actual, _ = attention_forward(module(), *inputs, one)
    expected, _ = attention_reference(*inputs, mask=padding.bool()[:, None, None], dtype=torch.float32)
    torch.testing.assert_close(actual, expected.transpose(1, 2))


def test_a_mask_of_one_row_is_repeated_without_a_look_at_padding(monkeypatch):
    """On a GPU each layer would wait for it."""
    bidirectional = support.sys.modules["transformers.masking_utils"].bidirectional_mask_function
    options = {"mask_function": bidirectional, "allow_is_bidirectional_skip": True, "config": BertConfig()}
    one = span_mask(BATCH, 1, TOKENS, attention_mask=torch.ones(BATCH, TOKENS), **options)
    assert one.everything
    monkeypatch.setattr(SpanMask, "_shows_all_tokens", lambda *arguments: pytest.fail("it looked"))
    assert one.fitted(TOKENS, TOKENS).spans.query_len == TOKENS
    assert one.fitted(1, TOKENS) is one


def test_a_model_that_computes_with_its_mask_is_given_eagers(caplog):
    """If its file calls the interface; others are refused, as test_refusals says."""
    support.log_once.cache_clear()
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    mask = span_mask(BATCH, TOKENS, TOKENS, attention_mask=padding, config=LlamaConfig(), dtype=torch.float16)
    assert isinstance(mask, SpanMask) and mask.dtype == torch.float16 and mask.shape == (BATCH, 1, TOKENS, TOKENS)
    expected = torch.where(mask.to_dense(), 0.0, torch.finfo(torch.float16).min).half()
    assert torch.equal(mask[:, 0], expected[:, 0])
    assert torch.equal(torch.cat([mask, mask]), torch.cat([expected, expected]))
    assert torch.equal(mask.masked_fill(expected == 0, 1.0), expected.masked_fill(expected == 0, 1.0))
    assert torch.equal(1 + mask, 1 + expected)
    said = [each.getMessage() for each in caplog.records]
    assert any("is given a dense one, a number for each score" in message for message in said)


def test_models_of_tables_are_refused_by_class():
    """Other parts of such a file are served, with a dict that names them."""
    config = CONFIG_MAPPING["git"](
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=61,
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
            "image_size": 32, "patch_size": 8,
        },
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"computes attention in its own code .*modeling_git.py"):
        AutoModelForCausalLM.from_config(config, attn_implementation="my_triton")
    parts = {"": "eager", "vision_config": "my_triton"}
    model = AutoModelForCausalLM.from_config(config, attn_implementation=parts).eval()
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    inputs = {"input_ids": torch.randint(3, 61, (2, 5)), "pixel_values": torch.randn(2, 3, 32, 32)}
    assert model.config.vision_config._attn_implementation == "my_triton"
    torch.testing.assert_close(model(**inputs).logits, eager(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_encoders_are_given_a_mask_that_hides_nothing():
    bidirectional = support.sys.modules["transformers.masking_utils"].bidirectional_mask_function
    options = {"mask_function": bidirectional, "allow_is_bidirectional_skip": True, "config": BertConfig()}
    mask = span_mask(BATCH, TOKENS, TOKENS, **options)
    assert mask.everything
    query, key, value = tensors()
    more = [torch.cat([each, each], 2) for each in (key, value)]
    actual, _ = attention_forward(module(), query, *more, mask)
    expected, _ = attention_reference(query, *more, dtype=torch.float32)
    torch.testing.assert_close(actual, expected.transpose(1, 2))


def test_is_causal_counts_only_where_something_reads_it():
    """Models that support eager attention alone may state it without meaning it."""
    from transformers.models.bridgetower import modeling_bridgetower

    assert sources.is_causal_counts(modeling_llama.__name__)
    assert sources.is_causal_counts("a_module_that_is_not_there")
    assert not sources.is_causal_counts(modeling_bridgetower.__name__)


def test_models_that_negate_their_mask_are_given_a_boolean_one():
    from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderConfig

    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    mask = span_mask(BATCH, TOKENS, TOKENS, attention_mask=padding, config=ParakeetEncoderConfig())
    assert mask.dtype == torch.bool
    assert torch.equal(mask.logical_not(), ~mask.to_dense())


def test_a_model_that_measures_its_mask_is_given_none_where_nothing_is_hidden():
    from transformers.models.informer.configuration_informer import InformerConfig

    config = InformerConfig(prediction_length=4)
    bidirectional = support.sys.modules["transformers.masking_utils"].bidirectional_mask_function
    options = {"mask_function": bidirectional, "config": config}
    assert span_mask(BATCH, TOKENS, TOKENS, allow_is_bidirectional_skip=True, **options) is None
    assert span_mask(BATCH, TOKENS, TOKENS, **options) is not None


def test_a_model_that_widens_its_mask_is_given_a_tensor():
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    mask = span_mask(BATCH, TOKENS, TOKENS, config=DeepseekV4Config())
    assert isinstance(mask, torch.Tensor) and mask.dtype == torch.float32
    assert mask.shape == (BATCH, 1, TOKENS, TOKENS)
