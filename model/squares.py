# SPDX-License-Identifier: Apache-2.0
"""Synthetic images and videos of a coloured square, with questions about them and their answers.

What the multimodal checkpoint is trained on. Some pairs of colour and place are held out: no training example shows or
names them together, so that a right answer about one has been read off the image.
"""

import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 230),
    "yellow": (235, 220, 40),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
    "orange": (240, 130, 20),
    "purple": (140, 40, 160),
}
ROWS = ["top", "middle", "bottom"]
COLUMNS = ["left", "centre", "right"]
PLACES = [f"{row} {column}" for row in ROWS for column in COLUMNS]
HELD_OUT = [(colour, PLACES[4 * index % len(PLACES)]) for index, colour in enumerate(COLOURS)]
SHORTEST_SIDE, LONGEST_SIDE = 24, 40

SEE, COLOUR, PLACE, MOVE = "What do you see?", "Which colour?", "Which place?", "How does it move?"


@dataclass(frozen=True)
class Example:
    """A question, what it is about, and the answer."""

    question: str
    answer: str
    images: list[Image.Image] = field(default_factory=list)
    videos: list[list[Image.Image]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict]:
        """The question as a conversation, as a chat template takes it: images and videos first, several numbered."""
        parts: list[dict] = []
        for number, _ in enumerate(self.images, 1):
            parts += [{"type": "text", "text": str(number)}] * (len(self.images) > 1) + [{"type": "image"}]
        parts += [{"type": "video"} for _ in self.videos]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}]


def draw_square(
    colour: str, place: str, height: int, width: int, generator: random.Random, background: int | None = None
) -> Image.Image:
    """An image of a square in one of the nine places, on grey."""
    background = generator.randint(90, 160) if background is None else background
    pixels = np.full((height, width, 3), background, dtype=np.uint8)
    row, column = (names.index(name) for names, name in zip((ROWS, COLUMNS), place.split(), strict=True))
    side = min(height, width) // 3
    top, left = (2 * row + 1) * height // 6 - side // 2, (2 * column + 1) * width // 6 - side // 2
    shade = [min(255, max(0, channel + generator.randint(-20, 20))) for channel in COLOURS[colour]]
    pixels[top : top + side, left : left + side] = shade
    return Image.fromarray(pixels)


def draw_example(generator: random.Random, held_out: bool = False, kind: str | None = None) -> Example:
    """A random example; `held_out` says which pairs of colour and place it shows (in a video: first).

    `kind` is "one" image, "several", "video" or "none"; drawn as well when None.
    """
    kind = kind or generator.choices(["one", "several", "video", "none"], weights=[6, 5, 4, 1])[0]
    if kind == "none":
        return Example(generator.choice([SEE, COLOUR, PLACE]), "nothing")
    if kind == "video":
        return _draw_video(generator, held_out)
    shown = [_pair(generator, held_out) for _ in range(1 if kind == "one" else generator.choice([2, 2, 3]))]
    images = [draw_square(*pair, _side(generator), _side(generator), generator) for pair in shown]
    question = generator.choice([SEE, COLOUR, PLACE])
    words = {SEE: "{0} square {1}", COLOUR: "{0}", PLACE: "{1}"}[question]
    answers = [words.format(*pair) for pair in shown]
    if len(answers) > 1:
        answers = [f"{number} {answer}" for number, answer in enumerate(answers, 1)]
    return Example(question, ", ".join(answers), images=images)


def _draw_video(generator: random.Random, held_out: bool) -> Example:
    """Two or three frames of a square that jumps; the answer names its colour, its first and its last place."""
    colour, first = _pair(generator, held_out)
    places = [first]
    for _ in range(generator.randint(1, 2)):
        allowed = [place for place in PLACES if place != places[-1] and (held_out or (colour, place) not in HELD_OUT)]
        places.append(generator.choice(allowed))
    height, width, background = _side(generator), _side(generator), generator.randint(90, 160)
    frames = [draw_square(colour, place, height, width, generator, background) for place in places]
    return Example(MOVE, f"{colour} square {places[0]} to {places[-1]}", videos=[frames])


def _pair(generator: random.Random, held_out: bool) -> tuple[str, str]:
    pairs = [(colour, place) for colour in COLOURS for place in PLACES if ((colour, place) in HELD_OUT) == held_out]
    return generator.choice(pairs)


def _side(generator: random.Random) -> int:
    return generator.randint(SHORTEST_SIDE, LONGEST_SIDE)
