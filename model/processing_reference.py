# SPDX-License-Identifier: Apache-2.0
"""Texts with images and videos to the inputs of the reference model.

In a text each image is one `<|image|>` and each video one `<|video|>`. They become

    <|image_start|> <|image|> ... <|image|> <|image_end|>
    <|video_start|> <|video|> ... <|frame|> <|video|> ... <|video_end|>

with one `<|image|>` or `<|video|>` for each patch, which the model replaces by that patch's features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.video_utils import make_batched_videos

from .image_processing_reference import ReferenceImageProcessor, ReferenceImagesKwargs

IMAGE, VIDEO = "<|image|>", "<|video|>"
IMAGE_START, IMAGE_END = "<|image_start|>", "<|image_end|>"
VIDEO_START, FRAME, VIDEO_END = "<|video_start|>", "<|frame|>", "<|video_end|>"
# In the order of their ids: vLLM takes the most frequent token of an image, among equals the one with the lowest id,
# for the token that features replace.
VISION_TOKENS = [IMAGE, VIDEO, IMAGE_START, IMAGE_END, VIDEO_START, FRAME, VIDEO_END]


class ReferenceVideoProcessor:
    """Videos as frames, each an image: what engines ask of a processor's `video_processor`."""

    model_input_names = ["pixel_values_videos", "video_grid_thw"]
    valid_kwargs = ReferenceImagesKwargs
    temporal_patch_size = 1  # no frames are merged into one
    do_sample_frames = False  # every frame is kept

    def __init__(self, image_processor: ReferenceImageProcessor) -> None:
        self.image_processor = image_processor

    @property
    def size(self) -> Any:
        """Of the frames; that of images."""
        return self.image_processor.size

    def __call__(self, videos: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Videos, each a sequence of frames of one size, to `pixel_values_videos` and `video_grid_thw`.

        Both are as an image processor's, with the frames of a video behind one another and their number in the grid;
        so are the keywords, such as `size`.
        """
        options = {name: value for name, value in kwargs.items() if name in self.valid_kwargs.__annotations__}
        patches, grids = [], []
        for video in make_batched_videos(videos):
            frames = self.image_processor(images=list(video), **options, return_tensors="np")
            rows, columns = frames["image_grid_thw"][0, 1:]
            patches.append(frames["pixel_values"])
            grids.append((len(frames["image_grid_thw"]), rows, columns))
        data = {"pixel_values_videos": np.concatenate(patches), "video_grid_thw": np.array(grids, dtype=np.int64)}
        return BatchFeature(data=data, tensor_type=return_tensors)


class ReferenceProcessor(ProcessorMixin):
    """Puts the tokenizer and the image processor together.

    Attributes:
        image_token, video_token: what stands for one image or video in a text, and for one patch in the inputs.
        image_token_id, video_token_id: the ids of these.
        image_token_ids, video_token_ids: all ids that an image or a video is made of, those before, between and behind
            its patches among them. `return_mm_token_type_ids=True` marks the first with 1, the second with 2 and text
            with 0, so that each image and each video is one unbroken run.
    """

    def __init__(
        self,
        image_processor: ReferenceImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.video_token = IMAGE, VIDEO
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
        self.image_token_ids = tokenizer.convert_tokens_to_ids([IMAGE, IMAGE_START, IMAGE_END])
        self.video_token_ids = tokenizer.convert_tokens_to_ids([VIDEO, VIDEO_START, FRAME, VIDEO_END])

    @property
    def video_processor(self) -> ReferenceVideoProcessor:
        """Videos go through the image processor, frame by frame."""
        return ReferenceVideoProcessor(self.image_processor)

    @property
    def model_input_names(self) -> list[str]:
        """Every key that a call may return for the model."""
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        return [*names, *ReferenceVideoProcessor.model_input_names, "mm_token_type_ids"]

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> tuple:
        """As transformers prepares inputs, for which lists without an image or a video are not what None is."""
        images, videos = (None if _is_empty(given) else given for given in (images, videos))
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> None:
        """`ValueError` unless each image and video has its place in the text, and each place its image or video."""
        super().validate_inputs(images=images, text=text, videos=videos, **kwargs)
        if text is None:
            return
        texts = [text] if isinstance(text, str) else text
        counts = {
            IMAGE: 0 if images is None else len(self.image_processor._prepare_images_structure(images)),
            VIDEO: 0 if videos is None else len(make_batched_videos(videos)),
        }
        for token, given in counts.items():
            places = sum(one.count(token) for one in texts)
            if places != given:
                raise ValueError(
                    f"each {token} of the text needs one of its own, got {places} and {given} to fill them."
                )
        for token, nested in ((IMAGE, images), (VIDEO, videos)):
            depth = 1 if token == IMAGE else 2  # a video is a sequence of frames itself
            if _depth(nested) <= depth or len(nested) != len(texts):
                continue
            for one, own in zip(texts, nested, strict=True):
                if one.count(token) != len(own):
                    raise ValueError(
                        f"each {token} of a text needs one of its own, got {one.count(token)} and {len(own)} to fill "
                        f"them in {one!r}."
                    )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that one image becomes."""
        _, rows, columns = (int(size) for size in image_inputs["image_grid_thw"][image_idx])
        return IMAGE_START + IMAGE * (rows * columns) + IMAGE_END

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        """The text that one video becomes."""
        frames, rows, columns = (int(size) for size in video_inputs["video_grid_thw"][video_idx])
        return VIDEO_START + FRAME.join([VIDEO * (rows * columns)] * frames) + VIDEO_END

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[Sequence[int]] | None = None,
        video_sizes: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Tokens that features replace, for images of `(height, width)` and videos of `(frames, height, width)`.

        The tokens before, between and behind are not counted. Patches are what the vision encoder gets, one a token.
        """
        options = {name: kwargs[name] for name in ("size", "patch_size") if kwargs.get(name) is not None}
        counted: dict[str, list[int]] = {}
        if image_sizes is not None:
            grids = [self.image_processor.grid_of(*size, **options) for size in image_sizes]
            tokens = [rows * columns for rows, columns in grids]
            counted |= {"num_image_tokens": tokens, "num_image_patches": list(tokens)}
        if video_sizes is not None:
            grids = [self.image_processor.grid_of(*size[1:], **options) for size in video_sizes]
            counted["num_video_tokens"] = [
                size[0] * rows * columns for size, (rows, columns) in zip(video_sizes, grids, strict=True)
            ]
        return MultiModalData(**counted)


def _is_empty(given: Any) -> bool:
    """Whether lists in one another hold nothing else."""
    return isinstance(given, (list, tuple)) and all(map(_is_empty, given))


def _depth(given: Any) -> int:
    """How many lists lie in one another before something else begins."""
    return 1 + max(map(_depth, given), default=0) if isinstance(given, (list, tuple)) else 0


ReferenceProcessor.register_for_auto_class("AutoProcessor")
