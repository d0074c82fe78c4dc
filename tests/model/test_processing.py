# SPDX-License-Identifier: Apache-2.0
"""The processor of images and videos: tokens, their types, counts, pixels, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.processing_utils import MultiModalData

from model.image_processing_reference import ReferenceImageProcessor
from model.multimodal_checkpoint import build_processor
from model.processing_reference import VISION_TOKENS, ReferenceProcessor

SIZES = [(24, 24), (40, 24), (17, 61), (500, 300), (8, 8), (1, 90)]  # height, width


@pytest.fixture(scope="module")
def processor() -> ReferenceProcessor:
    return build_processor()


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def runs(values: list[int]) -> list[int]:
    """The values with repetitions left out."""
    return [value for index, value in enumerate(values) if index == 0 or value != values[index - 1]]


def test_token_types_are_unbroken_runs_and_counts_are_of_features(processor: ReferenceProcessor) -> None:
    images, video = [picture(*size) for size in SIZES], [picture(33, 40, seed) for seed in range(3)]
    text = f"a {processor.image_token}{processor.image_token} b {processor.video_token}" + processor.image_token * 4
    inputs = processor(text=text, images=images, videos=[video], return_mm_token_type_ids=True)
    ids, types = inputs["input_ids"][0], inputs["mm_token_type_ids"][0]
    # Neighbouring images share a run: their ids tell them apart.
    assert runs(types) == [0, 1, 0, 2, 1]
    counted = processor._get_num_multimodal_tokens(image_sizes=SIZES, video_sizes=[(3, 33, 40)])
    assert isinstance(counted, MultiModalData)
    assert ids.count(processor.image_token_id) == sum(counted["num_image_tokens"]) == len(inputs["pixel_values"])
    assert counted["num_image_patches"] == counted["num_image_tokens"]
    assert ids.count(processor.video_token_id) == counted["num_video_tokens"][0] == len(inputs["pixel_values_videos"])
    # Two marks around each image and video, and one between two frames, are placeholders, but no features.
    assert types.count(1) == sum(counted["num_image_tokens"]) + 2 * len(images)
    assert types.count(2) == counted["num_video_tokens"][0] + 2 + 2
    assert [grid.prod() for grid in inputs["image_grid_thw"]] == counted["num_image_tokens"]
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 5]]


def test_without_images_nothing_is_counted(processor: ReferenceProcessor) -> None:
    assert processor._get_num_multimodal_tokens() == MultiModalData()
    inputs = processor(text=["only text", "and more of it"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"} and inputs["input_ids"].shape[0] == 2


def test_no_images_are_lists_without_images_too(processor: ReferenceProcessor) -> None:
    texts = ["only text", "and more of it"]
    expected = processor(text=texts, padding=True)["input_ids"]
    for empty in ([], [[], []]):
        inputs = processor(text=texts, images=empty, videos=empty, padding=True)
        assert inputs["input_ids"] == expected and "pixel_values" not in inputs
    with pytest.raises(ValueError, match="images must hold at least one image, got none; leave the argument out"):
        processor.image_processor([])


def test_videos_heed_what_images_do(processor: ReferenceProcessor) -> None:
    frames = [picture(24, 24, seed) for seed in range(2)]
    for options, grid in (({}, [1, 3, 3]), ({"size": {"max_height": 16, "max_width": 16}}, [1, 2, 2])):
        for more in ({}, {"do_rescale": False, "do_normalize": False}):
            given = options | more
            video = processor(text=processor.video_token, videos=[frames], return_tensors="pt", **given)
            images = processor(text=processor.image_token * 2, images=frames, return_tensors="pt", **given)
            assert images["image_grid_thw"].tolist() == [grid] * 2
            assert video["video_grid_thw"].tolist() == [[2, *grid[1:]]]
            assert torch.equal(video["pixel_values_videos"], images["pixel_values"])
            assert (images["pixel_values"].max() > 100) == bool(more)


def test_special_tokens_are_one_token_each_and_features_have_the_lowest_ids(processor: ReferenceProcessor) -> None:
    ids = [processor.tokenizer(token)["input_ids"] for token in VISION_TOKENS]
    assert [len(one) for one in ids] == [1] * len(VISION_TOKENS)
    assert ids[0] == [processor.image_token_id] and ids[1] == [processor.video_token_id]
    # vLLM counts on it for an image of one patch, in which each token occurs once.
    assert processor.image_token_id == min(processor.image_token_ids)
    assert processor.video_token_id == min(processor.video_token_ids)
    assert set(processor.image_token_ids).isdisjoint(processor.video_token_ids)


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [(24, 24, (3, 3)), (40, 24, (5, 3)), (17, 61, (2, 6)), (500, 300, (6, 4)), (1, 1, (1, 1)), (1, 9000, (1, 6))],
)
def test_sizes_keep_their_shape_in_whole_patches(height: int, width: int, grid: tuple[int, int]) -> None:
    assert ReferenceImageProcessor().grid_of(height, width) == grid


def test_patches_are_the_pixels_row_after_row() -> None:
    image = picture(16, 24)
    outputs = ReferenceImageProcessor()(image, return_tensors="pt")
    assert outputs["pixel_values"].dtype == torch.float32 and outputs["image_grid_thw"].tolist() == [[1, 2, 3]]
    tile = np.asarray(image)[8:16, 16:24].transpose(2, 0, 1).reshape(-1) / 127.5 - 1
    np.testing.assert_allclose(outputs["pixel_values"][5], tile, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_become_rgb(mode: str) -> None:
    outputs = ReferenceImageProcessor()(picture(24, 24).convert(mode))
    assert outputs["pixel_values"].shape == (9, 3 * 8 * 8)


def test_arrays_and_tensors_are_images_too() -> None:
    image = picture(24, 32)
    expected = ReferenceImageProcessor()(image, return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    for same in (array, torch.from_numpy(array.transpose(2, 0, 1).copy())):
        torch.testing.assert_close(ReferenceImageProcessor()(same, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "<|image|>", "images": None}, r"1 <\|image\|> tokens|needs one of its own, got 1 and 0"),
        (
            {"text": ["<|image|>", "none"], "images": [[], [picture(24, 24)]]},
            r"each <\|image\|> of a text needs one of its own, got 1 and 0 to fill them in '<\|image\|>'",
        ),
        (
            {"text": ["<|image|>", "<|image|><|image|>"], "images": [[picture(24, 24)] * 2, [picture(24, 24)]]},
            r"each <\|image\|> of a text needs one of its own, got 1 and 2 to fill them in '<\|image\|>'",
        ),
        ({"text": "none", "images": [picture(24, 24)]}, r"should be the same|needs one of its own, got 0 and 1"),
        ({"text": "<|video|>", "videos": None}, r"1 <\|video\|> tokens|needs one of its own, got 1 and 0"),
        (
            {"text": "<|video|>", "videos": [[picture(24, 24), picture(24, 40)]]},
            "must have the same shape",
        ),
        (
            {"text": "<|image|>", "images": [picture(20, 24)], "do_resize": False},
            "20 by 24 pixels is not 2 by 3 whole patches of 8 pixels; leave do_resize at True",
        ),
        (
            {"text": "<|image|>", "images": [picture(20, 24)], "size": {"height": 9, "width": 9}},
            "size must hold max_height and max_width of at least one patch, 8 pixels, got",
        ),
    ],
)
def test_bad_inputs_are_refused(processor: ReferenceProcessor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 by 1 pixels, got 0 by 5"):
        ReferenceImageProcessor().grid_of(0, 5)


def test_the_chat_template_puts_images_where_they_are_said(processor: ReferenceProcessor) -> None:
    image = {"type": "image"}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "What?"}, image, {"type": "video"}]},
        {"role": "assistant", "content": "a square"},
        {"role": "user", "content": "Sure?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<s>user\n<|image|>What?<|image|><|video|>\nassistant\na square</s>\nuser\nSure?\nassistant\n"
    # The begin token is the template's: the tokenizer puts none before a text.
    assert processor.tokenizer(text)["input_ids"].count(processor.tokenizer.bos_token_id) == 1
