# SPDX-License-Identifier: Apache-2.0
"""What is measured, declared as data: attention problems, their sizes, and sweeps over both.

A case says in words of a model what a problem is (a 2D padding mask, positions that restart, a window); `problem.py`
draws its tensors. The section "kernels" runs every case at one size; a sweep runs few cases at many sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Sizes:
    """Sizes of a problem.

    Attributes:
        tokens: keys in all, divided between the sequences of a case (in decoding: keys of the longest sequence).
        num_heads, num_kv_heads, head_dim: of queries, and of keys.
        value_dim: columns of values; None is `head_dim`.
        window: keys that a row of a windowed case sees.
        decode_batch: sequences of a decoding case.
        batch: how often the sequences of any other case are repeated.
        new_tokens: how many of the last tokens are queries, where the others are in a cache; None is all of them.
            Decoding has one.
    """

    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 512
    decode_batch: int = 8
    batch: int = 1
    value_dim: int | None = None
    new_tokens: int | None = None


SIZES = {
    ("cpu", "full"): Sizes(tokens=4096, num_heads=8, num_kv_heads=2, head_dim=64),
    ("cpu", "quick"): Sizes(tokens=2048, num_heads=8, num_kv_heads=2, head_dim=64, window=256),
    ("cuda", "full"): Sizes(tokens=8192, num_heads=32, num_kv_heads=8, head_dim=128, decode_batch=16),
    ("cuda", "quick"): Sizes(tokens=2048, num_heads=16, num_kv_heads=4, head_dim=128, window=256),
}
"""By device type and thoroughness."""

TRAINING_SIZES = SIZES | {
    ("cpu", "full"): replace(SIZES["cpu", "full"], tokens=2048, window=256),
    ("cpu", "quick"): replace(SIZES["cpu", "quick"], tokens=1024, window=128),
}
"""Likewise, where the backward pass is timed too."""

DTYPES = {
    ("cpu", "full"): (torch.float32, torch.bfloat16),
    ("cpu", "quick"): (torch.float32,),
    ("cuda", "full"): (torch.bfloat16,),
    ("cuda", "quick"): (torch.bfloat16,),
}
"""What a run measures unless told otherwise, likewise."""


@dataclass(frozen=True)
class Case:
    """One attention problem.

    Attributes:
        name: how tables, JSON and the command line call it.
        description: for a reader; `{tokens}`, `{window}`, `{batch}`, `{padded}`, `{new}` and `{before}` are filled in.
        causal: whether a row sees only keys up to its own position.
        windowed: whether a row sees only the last `Sizes.window` keys.
        real_shares: for each sequence of the batch, the share of it that is no padding.
        padding_side: where the padding is.
        packed: whether documents of `DOCUMENT_SHARES` share one row, told apart by `position_ids` that restart.
        images: whether two stretches of the row are images, whose tokens see each other in both directions (Gemma 3).
        decode: one new query per sequence over a cache.
        ragged: whether the sequences of a decoding case differ in length, by a left padding.
        sinks: whether each head has an attention sink (GPT-OSS).
        softcap: bound of the scores (Gemma 2), or None.
        bias: whether a bias of its own for each head, row and key is added to the scores (T5); training learns it.
    """

    name: str
    description: str
    causal: bool = True
    windowed: bool = False
    real_shares: tuple[float, ...] = (1.0,)
    padding_side: str = "left"
    packed: bool = False
    images: bool = False
    decode: bool = False
    ragged: bool = True
    sinks: bool = False
    softcap: float | None = None
    bias: bool = False


DOCUMENT_SHARES = (4, 12, 8, 20, 16, 8, 28, 32)
"""Lengths of packed documents, in 128ths of a row: mixed, as in real data."""

IMAGE_SHARES = ((0.125, 0.25), (0.5, 0.75))
"""Where the images of a row begin and end."""

CASES = (
    Case("causal", "a prompt of {tokens} tokens"),
    Case("left_padded", "a prompt of {tokens} tokens whose left half is padding", real_shares=(0.5,)),
    Case("sliding", "a window of {window} keys over {tokens} tokens", windowed=True),
    Case("packed", "eight documents packed into {tokens} tokens", packed=True),
    Case("image_blocks", "a prompt of {tokens} tokens, three eighths of them in two images", images=True),
    Case("bidirectional", "an encoder over {tokens} tokens", causal=False),
    Case(
        "encoder_padded",
        "an encoder, {batch} texts of {padded} tokens or less, padded right",
        causal=False,
        real_shares=(1.0, 0.75, 0.5, 0.25),
        padding_side="right",
    ),
    Case("decode", "one new token for each of {batch} sequences over up to {tokens} keys, padded left", decode=True),
    Case("sinks", "a prompt of {tokens} tokens, an attention sink per head", sinks=True),
    Case("softcap", "a prompt of {tokens} tokens, scores capped at 30", softcap=30.0),
    Case("bias", "an encoder over {tokens} tokens, a learned bias for each head, row and key", causal=False, bias=True),
)


def case_named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


# ---------------------------------------------------------------------- sweeps


@dataclass(frozen=True)
class Point:
    """A case at some sizes.

    Attributes:
        label: what tables and JSON call it; it tells it from every other point.
        case, sizes: what is measured.
        piece: sizes of a piece of a prompt that is in the same batch (the case `PIECE`), or None where there is none.
    """

    label: str
    case: Case
    sizes: Sizes
    piece: Sizes | None = None


@dataclass(frozen=True)
class Sweep:
    """Points that belong together.

    Attributes:
        name: how the command line calls it.
        description: for a reader, with where its sizes are from.
        points: by device type and thoroughness.
        one_block: whether the points are measured with the keys of a sequence in one block of memory.
        backward: whether the backward pass is timed as well, by itself.
        pages: whether the points are measured with keys in pages, plain and in float8.
    """

    name: str
    description: str
    points: dict[tuple[str, str], tuple[Point, ...]]
    one_block: bool = True
    backward: bool = False
    pages: bool = False


CAUSAL, BIDIRECTIONAL = case_named("causal"), case_named("bidirectional")
DECODE_EVEN = Case(
    "decode_even", "one new token for each of {batch} sequences over {tokens} keys", decode=True, ragged=False
)


def lengths(cases: Sequence[Case], head_dims: Sequence[int], tokens: Sequence[int], total: int, width: int) -> Points:
    """As many sequences as make up `total` tokens, as many heads as make up `width` columns."""
    return tuple(
        Point(
            f"{case.name} d{head_dim} {total // length}x{length}",
            case,
            Sizes(length, width // head_dim, width // head_dim, head_dim, batch=total // length),
        )
        for case in cases
        for head_dim in head_dims
        for length in tokens
    )


Points = tuple[Point, ...]

LENGTHS = Sweep(
    "lengths",
    "batch x tokens = 16k and heads x head dim = 2,048, as in the FlashAttention papers (arXiv 2307.08691, "
    "2407.08608); on a CPU a quarter of each",
    {
        ("cuda", "full"): lengths(
            (CAUSAL, BIDIRECTIONAL), (64, 128, 256), (512, 1024, 2048, 4096, 8192, 16384), 16384, 2048
        ),
        ("cuda", "quick"): lengths((CAUSAL,), (64, 128), (2048, 16384), 16384, 2048),
        ("cpu", "full"): lengths((CAUSAL,), (64, 128, 256), (512, 1024, 2048, 4096), 4096, 512),
        ("cpu", "quick"): lengths((CAUSAL,), (64, 128), (512, 2048), 2048, 512),
    },
    backward=True,
)


def decoding(batches: Sequence[int], keys: Sequence[int], most: int, heads: tuple[int, int, int]) -> Points:
    """Every batch over every number of keys whose cache has at most `most` tokens in all."""
    return tuple(
        Point(f"decode {batch}x{length}", DECODE_EVEN, Sizes(length, *heads, decode_batch=batch))
        for batch in batches
        for length in keys
        if batch * length <= most
    )


GPU_DECODE = (1, 2, 4, 8, 16, 32, 64, 128)
DECODE = Sweep(
    "decode",
    "1 to 128 sequences over 1k to 128k keys, the cache at most 2 million tokens; from one block of memory for each "
    "sequence, from pages, and from pages in float8",
    {
        ("cuda", "full"): decoding(GPU_DECODE, (1024, 4096, 16384, 65536, 131072), 2**21, (32, 8, 128)),
        ("cuda", "quick"): decoding((1, 32), (1024, 16384), 2**21, (32, 8, 128)),
        ("cpu", "full"): decoding((1, 8, 32), (1024, 4096, 16384), 2**17, (8, 2, 64)),
        ("cpu", "quick"): decoding((1, 8), (1024, 4096), 2**15, (8, 2, 64)),
    },
    pages=True,
)

SINGLE_TOKENS = Case("singles", "one new token for each of {batch} sequences over up to {tokens} keys", decode=True)
PIECE = Case("piece", "{new} new tokens of a prompt after {before} others")


def mixed(batches: Sequence[int], keys: int, pieces: Sequence[tuple[int, int]], heads: tuple[int, int, int]) -> Points:
    """Every batch of single tokens over up to `keys` keys beside every piece: its new tokens, and those before it."""
    return tuple(
        Point(
            f"mixed {batch}x{keys} + {new} after {before}",
            SINGLE_TOKENS,
            Sizes(keys, *heads, decode_batch=batch),
            Sizes(before + new, *heads, new_tokens=new),
        )
        for batch in batches
        for new, before in pieces
    )


MIXED = Sweep(
    "mixed",
    "what an engine's scheduler hands to attention in one call: 31 or 255 sequences with one new token each over up to "
    "4k keys, beside a piece of 2,048 or 7,936 tokens of a long prompt, at its beginning or after 8k others; from "
    "pages, and from pages in float8; smaller on a CPU",
    {
        ("cuda", "full"): mixed((31, 255), 4096, ((2048, 0), (2048, 8192), (7936, 0), (7936, 8192)), (32, 8, 128)),
        ("cuda", "quick"): mixed((31,), 4096, ((2048, 0), (2048, 8192)), (32, 8, 128)),
        ("cpu", "full"): mixed((7, 31), 2048, ((256, 0), (256, 1792), (1024, 0), (1024, 3072)), (8, 2, 64)),
        ("cpu", "quick"): mixed((7, 31), 1024, ((256, 0), (256, 768)), (8, 2, 64)),
    },
    one_block=False,
    pages=True,
)

DIMS = ((64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512))


def head_dims(tokens: int, width: int) -> Points:
    """Odd head dims and their neighbours among the powers of two, causal."""
    return tuple(
        Point(
            f"causal d{head_dim}" + ("" if value_dim == head_dim else f"/{value_dim}"),
            CAUSAL,
            Sizes(tokens, heads := max(1, width // head_dim), heads, head_dim, value_dim=value_dim),
        )
        for head_dim, value_dim in DIMS
    )


HEAD_DIMS = Sweep(
    "head_dims",
    "head dims of real models that are no powers of two, beside those that are; 192/128 is that of latent attention",
    {
        ("cuda", "full"): head_dims(8192, 2048),
        ("cuda", "quick"): head_dims(2048, 2048),
        ("cpu", "full"): head_dims(2048, 512),
        ("cpu", "quick"): head_dims(1024, 512),
    },
)


# ---------------------------------------------------------------------- shapes of known models


@dataclass(frozen=True)
class Shape:
    """Attention of a known model, from its published configuration.

    Attributes:
        num_heads, num_kv_heads, head_dim: of the whole model.
        window: of its layers that have one, or None.
        sinks, softcap: as for `Case`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None

    def on_rank(self, degree: int) -> tuple[int, int]:
        """Query and key heads of one of `degree` ranks. Where a rank has less than one key head, it holds a whole one.

        Raises:
            ValueError: query heads cannot be divided, or key heads neither divided nor repeated.
        """
        repeated = degree % self.num_kv_heads == 0
        if self.num_heads % degree or (self.num_kv_heads % degree and not repeated):
            raise ValueError(
                f"{self.num_heads} query heads and {self.num_kv_heads} key heads cannot be shared by {degree} ranks"
            )
        return self.num_heads // degree, max(1, self.num_kv_heads // degree)


MODELS = {
    "llama3-8b": Shape(32, 8, 128),
    "llama3-70b": Shape(64, 8, 128),
    "qwen3-8b": Shape(32, 8, 128),
    "qwen3-14b": Shape(40, 8, 128),
    "qwen3-32b": Shape(64, 8, 128),
    "gemma2-9b": Shape(16, 8, 256, window=4096, softcap=50.0),
    "gemma3-27b": Shape(32, 16, 128, window=1024),
    "gpt-oss-20b": Shape(64, 8, 64, window=128, sinks=True),
    "gpt-oss-120b": Shape(64, 8, 64, window=128, sinks=True),
}
"""From config.json of each model's repository. Qwen3 14B has five query heads for each key head: an odd number on a
rank of its own."""

DEGREES = (1, 2, 4, 8)


def ranks_of(models: Sequence[str], degrees: Sequence[int], tokens: int, keys: int, batch: int) -> Points:
    """What one rank of each model computes: a prompt of `tokens`, and a token for `batch` sequences over `keys`."""

    def points() -> Iterator[Point]:
        for model in models:
            shape = MODELS[model]
            for degree in degrees:
                heads = shape.on_rank(degree)
                for case in (CAUSAL, DECODE_EVEN):
                    size = keys if case.decode else tokens
                    sizes = Sizes(size, *heads, shape.head_dim, decode_batch=batch)
                    own = replace(case, sinks=shape.sinks, softcap=shape.softcap)
                    phase = "decode" if case.decode else "prefill"
                    yield Point(f"{model} TP{degree} {phase}", own, sizes)
                if shape.window is not None and shape.window < tokens:
                    own = replace(case_named("sliding"), sinks=shape.sinks, softcap=shape.softcap)
                    sizes = Sizes(tokens, *heads, shape.head_dim, window=shape.window)
                    yield Point(f"{model} TP{degree} windowed prefill", own, sizes)

    return tuple(points())


RANKS = Sweep(
    "ranks",
    "what one rank of a known model under tensor parallelism computes (heads divided by the degree), on one device",
    {
        ("cuda", "full"): ranks_of(tuple(MODELS), DEGREES, tokens=8192, keys=16384, batch=32),
        ("cuda", "quick"): ranks_of(("llama3-8b", "gpt-oss-20b"), (1, 8), tokens=2048, keys=4096, batch=8),
        ("cpu", "full"): ranks_of(("llama3-8b", "qwen3-14b", "gpt-oss-20b"), (8,), tokens=1024, keys=4096, batch=8),
        ("cpu", "quick"): ranks_of(("qwen3-14b", "gpt-oss-20b"), (8,), tokens=512, keys=1024, batch=4),
    },
)

SWEEPS = {sweep.name: sweep for sweep in (LENGTHS, DECODE, MIXED, HEAD_DIMS, RANKS)}
