# SPDX-License-Identifier: Apache-2.0
"""The reference model that reads images: the same numbers on every path, masks as spans, and where features go."""

import ast
import inspect
import random
import re

import pytest
import torch
from PIL import Image
from transformers import AttentionMaskInterface
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import attention_plugin  # noqa: F401  (registers "my_triton")
from attention_plugin import SpanMask
from model import modeling_vision, squares
from model.configuration_multimodal import ReferenceMultimodalConfig, ReferenceVisionConfig
from model.modeling_multimodal import ReferenceForConditionalGeneration, runs_of
from model.modeling_reference import CACHE
from model.multimodal_checkpoint import batch_of, build_processor, multimodal_config
from model.processing_reference import ReferenceProcessor

IMPLEMENTATIONS = ["sdpa", "my_triton"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
CASES = {
    "one": ["one"],
    "several": ["several"],
    "video": ["video"],
    "none": ["none"],
    "mixed": ["several", "none", "one", "video"],
}


@pytest.fixture(scope="module")
def processor() -> ReferenceProcessor:
    return build_processor()


@pytest.fixture(scope="module")
def model(processor: ReferenceProcessor) -> ReferenceForConditionalGeneration:
    """Weights large enough that attention is far from uniform, and a window that is shorter than the texts."""
    torch.manual_seed(0)
    config = multimodal_config(processor)
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.15
    config.text_config.sliding_window = 40
    return ReferenceForConditionalGeneration(config).eval()


def inputs_of(processor: ReferenceProcessor, case: str, with_answers: bool = False) -> dict[str, torch.Tensor]:
    generator = random.Random(3)
    examples = [squares.draw_example(generator, kind=kind) for kind in CASES[case]]
    return dict(batch_of(processor, examples, with_answers))


def results(model: ReferenceForConditionalGeneration, inputs: dict, implementation: str) -> list[torch.Tensor]:
    """Logits of the tokens, and the gradients of all weights that were used."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    logits = outputs.logits[inputs["attention_mask"].bool()].detach()
    return [logits, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outputs_and_gradients_equal_eager(
    model: ReferenceForConditionalGeneration, processor: ReferenceProcessor, implementation: str, case: str
) -> None:
    inputs = inputs_of(processor, case, with_answers=True)
    if case == "mixed":
        assert not inputs["attention_mask"].all() and len(inputs["image_grid_thw"].unique(dim=0)) > 1
    expected, actual = results(model, inputs, "eager"), results(model, inputs, implementation)
    assert len(expected) == len(actual) > 10
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("implementation", ["eager", *IMPLEMENTATIONS])
def test_generation_is_the_same_with_every_cache_and_batch(
    model: ReferenceForConditionalGeneration, processor: ReferenceProcessor, implementation: str
) -> None:
    model.set_attn_implementation(implementation)
    # Random weights would say the tokens of images, too, for which there are no images.
    placeholders = [processor.image_token_id, processor.video_token_id]
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, suppress_tokens=placeholders)
    inputs = inputs_of(processor, "mixed")
    length = inputs["input_ids"].shape[1]
    dynamic = model.generate(**inputs, **options)[:, length:]
    assert torch.equal(dynamic, model.generate(**inputs, **options, use_cache=False)[:, length:])
    assert torch.equal(dynamic, model.generate(**inputs, **options, cache_implementation="static")[:, length:])
    generator = random.Random(3)
    for row, kind in enumerate(CASES["mixed"]):
        alone = dict(batch_of(processor, [squares.draw_example(generator, kind=kind)], with_answers=False))
        tokens = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert tokens.tolist() == dynamic[row].tolist(), kind


def test_an_image_sees_itself_in_both_directions_and_no_other(
    model: ReferenceForConditionalGeneration, processor: ReferenceProcessor
) -> None:
    model.set_attn_implementation("eager")
    inputs = inputs_of(processor, "several")
    outputs = model(**inputs, output_attentions=True)
    blocks = runs_of(inputs["input_ids"] == processor.image_token_id)[0]
    assert blocks.max() == len(inputs["image_grid_thw"]) - 1
    index = torch.arange(len(blocks))
    causal = index[:, None] >= index
    block = (blocks[:, None] == blocks) & (blocks >= 0)
    near = index[:, None] - index < model.config.text_config.sliding_window
    sliding, full = (weights[0].abs().sum(0) > 0 for weights in outputs.attentions)
    assert torch.equal(sliding, causal & near | block)
    assert torch.equal(full, causal | block)


@pytest.mark.parametrize("case", ["one", "several", "video", "mixed"])
def test_the_mask_of_images_is_read_as_spans(
    model: ReferenceForConditionalGeneration,
    processor: ReferenceProcessor,
    case: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inputs = inputs_of(processor, case)
    ids = inputs["input_ids"]
    blocks = runs_of((ids == processor.image_token_id) | (ids == processor.video_token_id))
    masks = {}
    for implementation in ("my_triton", "sdpa"):
        model.set_attn_implementation(implementation)
        arguments = dict(
            config=model.config.text_config,
            inputs_embeds=torch.empty(*ids.shape, 1),
            attention_mask=inputs["attention_mask"],
            block_sequence_ids=blocks,
            **{CACHE: None},
        )
        masks[implementation] = create_causal_mask(**arguments), create_sliding_window_causal_mask(**arguments)
    for ours, theirs in zip(*masks.values(), strict=True):
        assert isinstance(ours, SpanMask) and ours.holes is None
        rows = inputs["attention_mask"].bool()[:, None, :, None]
        assert torch.equal(ours.to_dense() & rows, theirs & rows)
    assert "cannot be read as spans" not in caplog.text
    assert "my_triton" in AttentionMaskInterface().valid_keys()


def test_causal_images_when_the_configuration_says_so(
    model: ReferenceForConditionalGeneration, processor: ReferenceProcessor
) -> None:
    model.set_attn_implementation("eager")
    inputs = inputs_of(processor, "one")
    both = model(**inputs).logits
    model.config.is_mm_prefix_lm = False
    try:
        outputs = model(**inputs, output_attentions=True)
    finally:
        model.config.is_mm_prefix_lm = True
    assert all(weights.triu(1).abs().sum() == 0 for weights in outputs.attentions)
    assert (both - outputs.logits).abs().max() > 1e-3


def test_a_second_image_may_follow_a_cached_conversation(
    model: ReferenceForConditionalGeneration, processor: ReferenceProcessor
) -> None:
    model.set_attn_implementation("sdpa")
    inputs = inputs_of(processor, "several")
    ids = inputs["input_ids"]
    cut = int((ids[0] == processor.tokenizer.convert_tokens_to_ids("<|image_end|>")).nonzero()[0]) + 1
    patches = int(inputs["image_grid_thw"][0].prod())
    whole = model(**inputs).logits
    pieces = [
        (slice(None, cut), slice(None, 1), slice(None, patches)),
        (slice(cut, None), slice(1, None), slice(patches, None)),
    ]
    cache, logits = None, []
    for tokens, images, rows in pieces:
        outputs = model(
            input_ids=ids[:, tokens],
            image_grid_thw=inputs["image_grid_thw"][images],
            pixel_values=inputs["pixel_values"][rows],
            use_cache=True,
            **{CACHE: cache},
        )
        cache = getattr(outputs, CACHE)
        logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, **TOLERANCE)


def test_beams_and_several_answers_have_their_texts_images(
    model: ReferenceForConditionalGeneration, processor: ReferenceProcessor
) -> None:
    """A text without images between two with one and two of them, of other sizes."""
    pictures = [Image.new("RGB", size, (90 * n, 30, 30)) for n, size in enumerate(((24, 40), (30, 30), (48, 24)))]
    texts = ["a <|image|> b", "none", "<|image|> and <|image|>"]
    own = [pictures[:1], None, pictures[1:]]
    together = processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    answers = model.generate(**together, **options)[:, together["input_ids"].shape[1] :].unflatten(0, (3, 2))
    for text, images, answer in zip(texts, own, answers, strict=True):
        alone = processor(text=text, images=images, return_tensors="pt")
        assert torch.equal(model.generate(**alone, **options)[:, alone["input_ids"].shape[1] :], answer)
    ids, expanded = model._expand_inputs_for_generation(expand_size=2, **together)
    again = processor(
        text=[text for text in texts for _ in range(2)],
        images=[*pictures[:1] * 2, *pictures[1:] * 2], padding=True, padding_side="left", return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(ids, again["input_ids"])
    assert all(torch.equal(expanded[name], again[name]) for name in ("pixel_values", "image_grid_thw"))


def test_features_take_the_place_of_tokens(
    model: ReferenceForConditionalGeneration, processor: ReferenceProcessor
) -> None:
    model.set_attn_implementation("sdpa")
    inputs = inputs_of(processor, "several")
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert [len(one) for one in features.pooler_output] == inputs["image_grid_thw"].prod(-1).tolist()
    alone = model.get_image_features(
        inputs["pixel_values"][: len(features.pooler_output[0])], inputs["image_grid_thw"][:1]
    ).pooler_output
    torch.testing.assert_close(alone[0], features.pooler_output[0], **TOLERANCE)

    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    expected = model(**inputs).logits
    by_embedding = {name: value for name, value in inputs.items() if name != "input_ids"}
    torch.testing.assert_close(model(**by_embedding, inputs_embeds=embeddings).logits, expected, **TOLERANCE)
    inputs["pixel_values"] = inputs["pixel_values"] + 0.5
    assert (model(**inputs).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("case", "values", "grids"),
    [("one", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")],
)
def test_pixels_without_their_grid_are_refused(
    model: ReferenceForConditionalGeneration, processor: ReferenceProcessor, case: str, values: str, grids: str
) -> None:
    inputs = inputs_of(processor, case)
    del inputs[grids]
    with pytest.raises(ValueError, match=f"{values} need {grids}, got None; the processor returns both"):
        model(**inputs)


def test_a_video_is_its_frames(model: ReferenceForConditionalGeneration, processor: ReferenceProcessor) -> None:
    model.set_attn_implementation("sdpa")
    inputs = inputs_of(processor, "video")
    ((frames, rows, columns),) = inputs["video_grid_thw"].tolist()
    as_video = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    as_images = model.get_image_features(
        inputs["pixel_values_videos"], torch.tensor([[1, rows, columns]] * frames)
    ).pooler_output
    assert len(as_video) == 1 and len(as_images) == frames > 1
    torch.testing.assert_close(as_video[0], torch.cat(as_images))


def test_wrong_numbers_of_patches_are_refused(
    model: ReferenceForConditionalGeneration, processor: ReferenceProcessor
) -> None:
    inputs = inputs_of(processor, "one")
    patches = len(inputs["pixel_values"])
    with pytest.raises(ValueError, match=f"grids of {patches} patches came with {patches - 1} patches"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][1:]})
    with pytest.raises(ValueError, match=f"holds {patches - 9} tokens for patches, .* have {patches} patches"):
        first = int((inputs["input_ids"][0] == processor.image_token_id).nonzero()[0])
        ids = torch.cat((inputs["input_ids"][:, :first], inputs["input_ids"][:, first + 9 :]), dim=1)
        model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=inputs["input_ids"], inputs_embeds=torch.zeros(1, 1, 1))


def test_engines_find_what_they_look_for(model: ReferenceForConditionalGeneration) -> None:
    base = model.model
    assert base.get_decoder() is base.language_model and base.get_encoder(modality="image") is base.vision_tower
    assert set(base.tp_plan.values()) == {"colwise", "rowwise"}
    # All of both towers, or nothing of one: vLLM shards what it recognises and then needs the rest of it.
    linear = {
        name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear) and "layers." in name
    }
    assert {re.sub(r"layers\.\d+", "layers.*", name) for name in linear} == set(base.tp_plan)
    assert [name for name in base._pp_plan if name.startswith("language_model.")] == list(base._pp_plan)
    assert model.config.get_text_config() is model.config.text_config and not list(model.buffers())
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(modeling_vision))) if isinstance(node, ast.Call)]
    assert sum(ast.unparse(call.func) == "attention_interface" for call in calls) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReferenceMultimodalConfig(image_token_id=4), "tokens of images and videos must differ, got"),
        (lambda: ReferenceMultimodalConfig(video_token_id=5000), "below the vocab_size of 2048, got .*5000"),
        (lambda: ReferenceVisionConfig(patch_size=0), "patch_size must be at least 1, got 0"),
    ],
)
def test_contradictory_configurations_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
