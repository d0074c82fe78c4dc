# SPDX-License-Identifier: Apache-2.0
"""Questions about images and videos of squares, as engines are asked them, and what transformers answers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

from model import squares
from model.multimodal_checkpoint import batch_of, prompt_of

MAX_NEW_TOKENS = 32
KINDS = ("one", "several", "video", "none")


@dataclass(frozen=True)
class Question:
    """A question, how an engine is asked it, and the tokens that transformers answers up to the end token."""

    kind: str
    prompt: dict[str, Any]
    answer: str
    tokens: list[int]
    messages: list[dict[str, Any]]


class Questions:
    """Questions about pairs of colour and place that training never showed, and transformers' own answers."""

    def __init__(self, model: Path, folder: Path, *, causal: bool, each: int = 3) -> None:
        """Of each kind `each`; images are written to `folder`. With `causal` images attend causally."""
        folder.mkdir(parents=True, exist_ok=True)
        self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
        reference = AutoModelForImageTextToText.from_pretrained(
            model, trust_remote_code=True, attn_implementation="eager", is_mm_prefix_lm=not causal
        )
        self.end = self.processor.tokenizer.eos_token_id
        generator, self.all = random.Random(11), []
        for kind in KINDS:
            for number in range(each):
                example = squares.draw_example(generator, held_out=True, kind=kind)
                inputs = batch_of(self.processor, [example], with_answers=False)
                tokens = reference.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=None)
                new_tokens = tokens[0, inputs["input_ids"].shape[1] :].tolist()
                prompt = self._prompt(example, folder / f"{kind}-{number}")
                self.all.append(Question(kind, prompt, example.answer, self.until_end(new_tokens), example.messages))

    def until_end(self, tokens: list[int]) -> list[int]:
        """Tokens up to the one that ends the answer: what comes after it means nothing."""
        return tokens[: tokens.index(self.end)] if self.end in tokens else tokens

    def text(self, tokens: list[int]) -> str:
        """Tokens as a text."""
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _prompt(self, example: squares.Example, place: Path) -> dict[str, Any]:
        def written(image: Any, name: str) -> str:
            path = place.with_name(f"{place.name}-{name}.png")
            image.save(path)
            return str(path)

        images = [written(image, f"{index}") for index, image in enumerate(example.images)]
        videos = [
            [written(frame, f"{index}-{step}") for step, frame in enumerate(video)]
            for index, video in enumerate(example.videos)
        ]
        return {"text": prompt_of(self.processor, example), "images": images, "videos": videos}
