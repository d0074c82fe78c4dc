# SPDX-License-Identifier: Apache-2.0
"""The attention function on tensors, and on whole models that are not causal language models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils

from attention_kernels import Spans, attention_reference
from attention_plugin import attention_forward, span_mask
from attention_plugin.attention import _spans_without_mask

BATCH, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 4, 2, 8, 12
IMPLEMENTATION = "my_triton"
TOLERANCE = 2e-4


# ---------------------------------------------------------------------- the function


def layer(**attributes: Any) -> torch.nn.Module:
    """An attention layer as far as the function looks at it, in eval mode."""
    module = torch.nn.Module().eval()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def tensors(query_len: int, key_len: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(BATCH, HEADS, query_len, DIM),
        torch.randn(BATCH, KV_HEADS, key_len, DIM),
        torch.randn(BATCH, KV_HEADS, key_len, VALUE_DIM),
    )


def assert_equals_reference(result: tuple[Tensor, None], query: Tensor, key: Tensor, value: Tensor, **options) -> None:
    output, weights = result
    expected, _ = attention_reference(query, key, value, **options)
    assert weights is None
    assert output.shape == (BATCH, query.shape[2], HEADS, value.shape[-1]) and output.is_contiguous()
    assert output.dtype == query.dtype
    torch.testing.assert_close(output.transpose(1, 2).double(), expected, atol=1e-5, rtol=1e-5)


def causal(query_len: int, key_len: int) -> Tensor:
    return torch.ones(query_len, key_len, dtype=torch.bool).tril(key_len - query_len)


MASK_SHAPES = [(BATCH, 1, 5, 9), (1, 1, 5, 9), (BATCH, HEADS, 5, 9), (1, HEADS, 1, 9), (BATCH, 1, 5, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_boolean_mask(shape: tuple[int, ...]):
    query, key, value = tensors(5, 9)
    mask = torch.rand(shape) < 0.6
    result = attention_forward(layer(is_causal=True), query, key, value, mask)
    assert_equals_reference(result, query, key, value, mask=mask)


@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_additive_mask(shape: tuple[int, ...]):
    query, key, value = tensors(5, 9)
    mask = torch.randn(shape)
    result = attention_forward(layer(is_causal=True), query, key, value, mask)
    assert_equals_reference(result, query, key, value, bias=mask)


def test_additive_mask_of_hidden_keys():
    """transformers hides keys with the lowest finite number; a row that sees none is then the mean of all values."""
    query, key, value = tensors(5, 9)
    bias = torch.where(torch.rand(BATCH, 1, 5, 9) < 0.6, 0.0, torch.finfo(torch.float32).min)
    bias[0, 0, 2] = torch.finfo(torch.float32).min
    result = attention_forward(layer(), query, key, value, bias)
    mean = value[0].mean(1).repeat_interleave(HEADS // KV_HEADS, 0)
    torch.testing.assert_close(result[0][0, 2], mean, atol=1e-5, rtol=1e-5)
    rows = torch.tensor([0, 1, 3, 4])
    others = attention_forward(layer(), query[:, :, rows], key, value, bias[:, :, rows])
    assert_equals_reference(others, query[:, :, rows], key, value, bias=bias[:, :, rows])


@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_position_bias_beside_a_mask(shape: tuple[int, ...]):
    query, key, value = tensors(5, 9)
    bias = torch.randn(shape)
    padding = torch.ones(BATCH, 9, dtype=torch.bool)
    padding[1, :2] = False
    mask = span_mask(BATCH, 5, 9, q_offset=4, attention_mask=padding)
    result = attention_forward(layer(), query, key, value, mask, position_bias=bias)
    assert_equals_reference(result, query, key, value, mask=causal(5, 9) & padding[:, None, None], bias=bias)
    added = attention_forward(layer(), query, key, value, bias, position_bias=bias)
    assert_equals_reference(added, query, key, value, bias=2 * bias)
    boolean = attention_forward(layer(), query, key, value, causal(5, 9)[None, None], position_bias=bias)
    assert_equals_reference(boolean, query, key, value, mask=causal(5, 9), bias=bias)


def test_gradients_reach_every_argument():
    query, key, value = (tensor.requires_grad_() for tensor in tensors(5, 5))
    bias, sinks = torch.randn(1, HEADS, 5, 5, requires_grad=True), torch.randn(HEADS, requires_grad=True)
    leaves = (query, key, value, bias, sinks)
    upstream = torch.randn(BATCH, 5, HEADS, VALUE_DIM)
    output, _ = attention_forward(
        layer(), query, key, value, span_mask(BATCH, 5, 5), position_bias=bias, s_aux=sinks, softcap=5.0
    )
    ours = torch.autograd.grad(output, leaves, upstream)
    expected, _ = attention_reference(query, key, value, mask=causal(5, 5), bias=bias, sinks=sinks, softcap=5.0)
    reference = torch.autograd.grad(expected.transpose(1, 2), leaves, upstream.double())
    for name, mine, other in zip(("query", "key", "value", "bias", "sinks"), ours, reference, strict=True):
        torch.testing.assert_close(
            mine.double(), other.double(), atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learned_scale_has_a_gradient(shape: tuple[int, ...]):
    query, key, value = tensors(5, 5)
    upstream, grads = torch.randn(BATCH, 5, HEADS, VALUE_DIM), []
    for dtype in (torch.float32, torch.float64):
        scale = torch.full(shape, 0.3, dtype=dtype, requires_grad=True)
        if dtype == torch.float32:
            output, _ = attention_forward(layer(), query, key, value, span_mask(BATCH, 5, 5), scaling=scale)
        else:
            expected, _ = attention_reference(query.double() * scale, key, value, mask=causal(5, 5), scale=1.0)
            output = expected.transpose(1, 2)
        grads += torch.autograd.grad(output, scale, upstream.to(output.dtype))
    torch.testing.assert_close(grads[0].double(), grads[1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"scaling": 0.3}, {"scaling": None}, {"softcap": None}])
def test_scores(options: dict[str, Any]):
    query, key, value = tensors(7, 7)
    result = attention_forward(layer(), query, key, value, span_mask(BATCH, 7, 7), **options)
    expected = {"scale": options.get("scaling"), "softcap": options.get("softcap")}
    assert_equals_reference(result, query, key, value, mask=causal(7, 7), **expected)


def test_sinks():
    query, key, value = tensors(7, 7)
    sinks = torch.randn(HEADS)
    result = attention_forward(layer(), query, key, value, span_mask(BATCH, 7, 7), s_aux=sinks)
    assert_equals_reference(result, query, key, value, mask=causal(7, 7), sinks=sinks)


def test_a_mask_with_holes_and_rows_without_keys():
    query, key, value = tensors(6, 6)

    def odd_distances(batch, head, q_idx, kv_idx):
        return (q_idx - kv_idx) % 2 == 1

    mask = span_mask(
        BATCH, 6, 6, mask_function=masking_utils.and_masks(masking_utils.causal_mask_function, odd_distances)
    )
    assert mask.holes is not None
    result = attention_forward(layer(), query, key, value, mask)
    distance = torch.arange(6)[:, None] - torch.arange(6)
    assert_equals_reference(result, query, key, value, mask=causal(6, 6) & (distance % 2 == 1))
    assert (result[0][:, 0] == 0).all()  # the first row sees nothing


@pytest.mark.parametrize("of_module", [True, False, None])
@pytest.mark.parametrize("argument", [True, False, None])
def test_is_causal_without_a_mask(of_module: bool | None, argument: bool | None):
    query, key, value = tensors(6, 6)
    module = layer() if of_module is None else layer(is_causal=of_module)
    result = attention_forward(module, query, key, value, None, is_causal=argument)
    decided = next((choice for choice in (argument, of_module) if choice is not None), True)
    assert_equals_reference(result, query, key, value, mask=causal(6, 6) if decided else None)


@pytest.mark.parametrize("key_len", [6, 9])
def test_cross_attention_that_does_not_say_so_sees_all_keys(key_len: int):
    """As Mllama's, which has no `is_causal`; eager attention hides nothing without a mask."""
    query, key, value = tensors(6, key_len)
    module = type("SomeCrossAttention", (torch.nn.Module,), {})().eval()
    assert_equals_reference(attention_forward(module, query, key, value, None), query, key, value)


@pytest.mark.parametrize("is_causal", [True, False])
def test_is_causal_gives_way_to_a_mask(is_causal: bool):
    query, key, value = tensors(6, 6)
    for mask, dense in ((span_mask(BATCH, 6, 6), causal(6, 6)), (torch.ones(1, 1, 6, 6, dtype=torch.bool), None)):
        result = attention_forward(layer(), query, key, value, mask, is_causal=is_causal)
        assert_equals_reference(result, query, key, value, mask=dense)


def test_no_mask_and_one_query_sees_every_key():
    query, key, value = tensors(1, 9)
    assert_equals_reference(attention_forward(layer(is_causal=True), query, key, value, None), query, key, value)


@pytest.mark.parametrize("query_len", [1, 9])
def test_no_mask_and_a_sliding_window(query_len: int):
    query, key, value = tensors(query_len, 9)
    result = attention_forward(layer(is_causal=True), query, key, value, None, sliding_window=4)
    assert_equals_reference(result, query, key, value, mask=causal(query_len, 9).triu(9 - query_len - 3))


def test_layers_without_a_mask_share_their_spans():
    """As `shared_spans` says; inside a mode, and with gradients, calls are served as any."""

    def spans(key_len: int = 9, window: int | None = None, query_len: int = 1) -> Spans:
        return _spans_without_mask(query_len, key_len, True, window, torch.device("cpu"))

    assert spans() is spans() and spans(window=4) is spans(window=4)
    assert spans(query_len=9) is spans(query_len=9) is not spans()
    assert spans(10).key_len == 10 and int(spans(window=4).start) == 5 and int(spans().start) == 0
    with FakeTensorMode():
        assert attention_forward(layer(is_causal=True), *tensors(1, 9), None)[0].shape == (BATCH, 1, HEADS, VALUE_DIM)
    query, key, value = (each.requires_grad_() for each in tensors(1, 9))
    attention_forward(layer(is_causal=True), query, key, value, None)[0].sum().backward()
    assert query.grad is not None and key.grad is not None


def test_no_mask_and_another_number_of_keys_is_cross_attention():
    query, key, value = tensors(4, 9)
    assert_equals_reference(attention_forward(layer(is_causal=False), query, key, value, None), query, key, value)


@pytest.mark.parametrize("is_causal", [True, False])
def test_lengths_of_packed_documents(is_causal: bool):
    """As vision towers and padding-free training pass them; tokens beyond the last document see nothing."""
    query, key, value = (tensor[:1] for tensor in tensors(10, 10))
    offsets = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    output, _ = attention_forward(
        layer(is_causal=is_causal), query, key, value, None,
        cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=4, max_length_k=4,
    )  # fmt: skip
    document = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, -1, -1])
    mask = (document == document[:, None]) & (document >= 0)
    mask = mask & causal(10, 10) if is_causal else mask
    expected, _ = attention_reference(query, key, value, mask=mask)
    torch.testing.assert_close(output.transpose(1, 2).double(), expected, atol=1e-5, rtol=1e-5)
    assert (output[:, 8:] == 0).all()


def test_a_batch_of_one_beside_a_larger_one_is_broadcast():
    query, key, value = tensors(6, 6)
    for which in range(3):
        given = [tensor[:1] if number == which else tensor for number, tensor in enumerate((query, key, value))]
        whole = [tensor.expand(BATCH, -1, -1, -1) for tensor in given]
        assert_equals_reference(attention_forward(layer(), *given, span_mask(BATCH, 6, 6)), *whole, mask=causal(6, 6))


def test_arguments_by_keyword():
    """Two models pass every argument by its name."""
    query, key, value = tensors(6, 6)
    result = attention_forward(
        layer(), query=query, key=key, value=value, attention_mask=span_mask(BATCH, 6, 6), dropout=0.0, scaling=0.5
    )
    assert_equals_reference(result, query, key, value, mask=causal(6, 6), scale=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_transposed_inputs(dtype: torch.dtype):
    query, key, value = (tensor.to(dtype) for tensor in tensors(6, 6))
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)]
    output, _ = attention_forward(layer(), *strided, span_mask(BATCH, 6, 6))
    expected, _ = attention_reference(query, key, value, mask=causal(6, 6))
    assert output.dtype == dtype and output.is_contiguous()
    error = (output.transpose(1, 2).double() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps


# ---------------------------------------------------------------------- whole models

TEXT: dict[str, Any] = {
    "vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 41, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "dropout": 0.0, "init_std": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3, "forced_eos_token_id": None,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4, "initializer_range": 0.3,
}  # fmt: skip


def configs_of(model: Any) -> list[Any]:
    """The configs of a model and of all models inside."""
    return [part.config for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]


def pair(model_class: type, config: Any) -> tuple[Any, Any]:
    """The same random model twice: with eager attention, and with ours."""
    models = []
    for implementation in ("eager", IMPLEMENTATION):
        torch.manual_seed(0)
        # A copy: a model keeps its config and writes its implementation there.
        model = model_class._from_config(copy.deepcopy(config), attn_implementation=implementation)
        assert {part._attn_implementation for part in configs_of(model)} == {implementation}
        models.append(model.eval())
    ours = dict(models[1].named_parameters())
    assert all(torch.equal(parameter, ours[name]) for name, parameter in models[0].named_parameters())
    return models[0], models[1]


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def assert_close(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape and expected.isfinite().all()
    assert relative_error(ours, expected) < TOLERANCE


def padding(batch: int, tokens: int) -> Tensor:
    """Right padding, as encoders have it: each row shorter by three tokens than the one before."""
    return (torch.arange(tokens) < tokens - 3 * torch.arange(batch)[:, None]).long()


def ids(batch: int, tokens: int) -> Tensor:
    """Tokens of which none is special."""
    return torch.randint(5, 41, (batch, tokens))


ENCODERS: dict[str, Callable[[], tuple[type, Any]]] = {
    "bert": lambda: (transformers.BertModel, transformers.BertConfig(**TEXT)),
    "roberta": lambda: (transformers.RobertaModel, transformers.RobertaConfig(**TEXT, pad_token_id=0)),
    "electra": lambda: (transformers.ElectraModel, transformers.ElectraConfig(**TEXT, embedding_size=32)),
    "modernbert": lambda: (
        transformers.ModernBertModel,
        transformers.ModernBertConfig(
            vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            local_attention=8, pad_token_id=0, initializer_range=0.3,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_with_padding(name: str):
    eager, ours = pair(*ENCODERS[name]())
    attention_mask = padding(3, 14)
    inputs = {"input_ids": ids(3, 14), "attention_mask": attention_mask}
    with torch.no_grad():
        expected, output = (model(**inputs).last_hidden_state for model in (eager, ours))
        unpadded = eager(input_ids=inputs["input_ids"]).last_hidden_state
    real = attention_mask.bool()
    assert_close(output[real], expected[real])
    assert relative_error(unpadded[real], expected[real]) > 1e-2  # the padding matters


SEQUENCE_TO_SEQUENCE: dict[str, Callable[[], tuple[type, Any]]] = {
    "bart": lambda: (transformers.BartForConditionalGeneration, transformers.BartConfig(**BART)),
    "marian": lambda: (transformers.MarianMTModel, transformers.MarianConfig(**BART)),
    "t5": lambda: (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            vocab_size=41, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            initializer_factor=2.0, decoder_start_token_id=0,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCE_TO_SEQUENCE)
def test_sequence_to_sequence(name: str):
    eager, ours = pair(*SEQUENCE_TO_SEQUENCE[name]())
    inputs = {"input_ids": ids(2, 9), "attention_mask": padding(2, 9)}
    decoder = {"decoder_input_ids": ids(2, 7), "decoder_attention_mask": padding(2, 7)}
    with torch.no_grad():
        expected, output = (model(**inputs, **decoder).logits for model in (eager, ours))
        unpadded = eager(input_ids=inputs["input_ids"], **decoder).logits
        real = decoder["decoder_attention_mask"].bool()
        assert_close(output[real], expected[real])
        assert relative_error(unpadded[1, :4], expected[1, :4]) > 1e-2
        for options in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
            tokens = [
                model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)
                for model in (eager, ours)
            ]
            assert torch.equal(*tokens) and tokens[0].shape[1] == 9


@pytest.mark.parametrize("prompt", [0, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_sequence_to_sequence_prefilled_in_pieces(name: str, padded: bool, prompt: int):
    """transformers then asks for a mask of the encoder's tokens that has as many keys as the decoder's prompt.

    It cuts the encoder's padding to that, so that eager attention sees what is padded beyond it, and so do we.
    """
    attention_mask = padding(2, 9) if padded else torch.ones(2, 9, dtype=torch.long)
    inputs = {"input_ids": ids(2, 9), "attention_mask": attention_mask, "prefill_chunk_size": 4}
    inputs |= {"decoder_input_ids": ids(2, prompt), "prefill_chunk_size": prompt} if prompt else {}
    tokens = [
        model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        for model in pair(*SEQUENCE_TO_SEQUENCE[name]())
    ]
    assert torch.equal(*tokens) and tokens[0].shape[1] == prompt + 9  # with the token that the decoder starts with


def test_whisper():
    config = transformers.WhisperConfig(
        **BART | {"init_std": 0.2}, num_mel_bins=4, max_source_positions=12, max_target_positions=32,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    eager, ours = pair(transformers.WhisperForConditionalGeneration, config)
    inputs = {"input_features": torch.randn(2, 4, 24), "decoder_input_ids": ids(2, 6)}
    with torch.no_grad():
        assert_close(ours(**inputs).logits, eager(**inputs).logits)


VISION_MODELS: dict[str, Callable[[], tuple[type, Any]]] = {
    "vit": lambda: (transformers.ViTModel, transformers.ViTConfig(**VISION)),
    "clip": lambda: (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**VISION)),
    "siglip": lambda: (transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**VISION)),
    "dinov2": lambda: (transformers.Dinov2Model, transformers.Dinov2Config(**VISION)),
}


@pytest.mark.parametrize("name", VISION_MODELS)
def test_vision(name: str):
    eager, ours = pair(*VISION_MODELS[name]())
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert_close(ours(pixels).last_hidden_state, eager(pixels).last_hidden_state)


def test_clip_text_and_image():
    """A composite model: the text tower is causal and padded, the vision tower is neither."""
    text = {name: value for name, value in TEXT.items() if "dropout" not in name} | {"eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    eager, ours = pair(transformers.CLIPModel, config)
    assert (
        ours.config.text_config._attn_implementation == ours.config.vision_config._attn_implementation == IMPLEMENTATION
    )
    inputs = {"input_ids": ids(2, 9), "attention_mask": padding(2, 9), "pixel_values": torch.randn(3, 3, 16, 16)}
    with torch.no_grad():
        assert_close(ours(**inputs).logits_per_image, eager(**inputs).logits_per_image)


IMAGE_TOKEN, IMAGE_TOKENS = 40, 4


def gemma3_config() -> Any:
    """A language model whose image tokens see each other in both directions, with sliding and full layers."""
    text = {
        "vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "initializer_range": 0.3, "pad_token_id": 0,
        "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    return transformers.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=IMAGE_TOKENS, image_token_id=IMAGE_TOKEN,
        image_token_index=IMAGE_TOKEN, boi_token_index=3, eoi_token_index=4,
    )  # fmt: skip


def gemma3_inputs() -> dict[str, Tensor]:
    """Two left-padded rows, each with two images of four tokens."""
    tokens = torch.randint(5, 40, (2, 22))
    types = torch.zeros_like(tokens)
    for begin in (4, 12):
        tokens[:, begin : begin + IMAGE_TOKENS] = IMAGE_TOKEN
        types[:, begin : begin + IMAGE_TOKENS] = 1
    attention_mask = torch.ones_like(tokens)
    attention_mask[1, :3] = 0
    return {
        "input_ids": tokens,
        "attention_mask": attention_mask,
        "token_type_ids": types,
        "pixel_values": torch.randn(4, 3, 16, 16),
    }


def test_images_inside_text():
    eager, ours = pair(transformers.Gemma3ForConditionalGeneration, gemma3_config())
    inputs = gemma3_inputs()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, output = (model(**inputs).logits for model in (eager, ours))
        causal_only = eager(**inputs | {"token_type_ids": torch.zeros_like(real, dtype=torch.long)}).logits
        assert_close(output[real], expected[real])
        assert relative_error(causal_only[real], expected[real]) > 1e-2  # image tokens do see later ones
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
            tokens = [
                model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
                for model in (eager, ours)
            ]
            assert torch.equal(*tokens)


@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_another_implementation_for_the_vision_tower(other: str):
    torch.manual_seed(0)
    mixed = transformers.Gemma3ForConditionalGeneration._from_config(
        gemma3_config(), attn_implementation={"text_config": IMPLEMENTATION, "vision_config": other}
    ).eval()
    assert mixed.config.text_config._attn_implementation == IMPLEMENTATION
    assert mixed.config.vision_config._attn_implementation == other
    eager, _ = pair(transformers.Gemma3ForConditionalGeneration, gemma3_config())
    inputs = gemma3_inputs()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert_close(mixed(**inputs).logits[real], eager(**inputs).logits[real])


def test_beam_search_with_left_padding():
    eager, ours = pair(transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA))
    inputs = {"input_ids": ids(2, 9), "attention_mask": padding(2, 9).flip(1)}
    for options in ({"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}):
        tokens = [model.generate(**inputs, max_new_tokens=8, do_sample=False, **options) for model in (eager, ours)]
        assert torch.equal(*tokens)


def test_implementation_set_on_a_loaded_model():
    eager, ours = pair(transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA))
    inputs = {"input_ids": ids(2, 9), "attention_mask": padding(2, 9).flip(1)}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = eager(**inputs).logits[real]
        eager.set_attn_implementation(IMPLEMENTATION)
        assert eager.config._attn_implementation == IMPLEMENTATION
        assert torch.equal(eager(**inputs).logits[real], ours(**inputs).logits[real])
        assert_close(ours(**inputs).logits[real], expected)
        ours.set_attn_implementation("sdpa")
        assert_close(ours(**inputs).logits[real], expected)


def test_loaded_from_a_checkpoint(tmp_path):
    eager, _ = pair(transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA))
    eager.save_pretrained(tmp_path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=IMPLEMENTATION)
    tokens = ids(1, 9)
    with torch.no_grad():
        assert_close(ours(tokens).logits, eager(tokens).logits)
    ours.save_pretrained(tmp_path / "again")  # the name is not written down: it means nothing where we are not imported
    assert IMPLEMENTATION not in (tmp_path / "again" / "config.json").read_text()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = "the cat sat on a mat and dog ran to see what was there".split()
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", "[MASK]", *words])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", mask_token="[MASK]"
    )


SENTENCES = ["the cat sat on a mat", "the dog", "what was there to see"]


def test_text_generation_pipeline(tokenizer: Any):
    tokenizer.padding_side = "left"
    texts = []
    for model in pair(
        transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA | {"vocab_size": len(tokenizer)})
    ):
        generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=3)
        texts.append(generate(SENTENCES, max_new_tokens=6, do_sample=False))
    assert texts[0] == texts[1]
    assert all(answer[0]["generated_text"].startswith(text) for answer, text in zip(texts[0], SENTENCES, strict=True))


def test_masked_language_pipelines(tokenizer: Any):
    tokenizer.padding_side = "right"
    config = transformers.BertConfig(**TEXT | {"vocab_size": len(tokenizer)})
    filled, features = [], []
    for model in pair(transformers.BertForMaskedLM, config):
        fill = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, batch_size=2)
        filled.append(fill([f"{SENTENCES[0]} [MASK]", "the [MASK]"]))
        extract = transformers.pipeline("feature-extraction", model=model.bert, tokenizer=tokenizer, batch_size=3)
        features.append([torch.tensor(feature) for feature in extract(SENTENCES)])
    for expected, ours in zip(*filled, strict=True):
        assert [each["token"] for each in ours] == [each["token"] for each in expected]
        assert [each["score"] for each in ours] == pytest.approx([each["score"] for each in expected], rel=1e-3)
    for expected, ours in zip(*features, strict=True):
        assert_close(ours, expected)
