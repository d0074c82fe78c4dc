# SPDX-License-Identifier: Apache-2.0
"""What is measured: attention problems, declared as data.

A case says in words of a model what the problem is (a 2D padding mask, positions that restart, a window). From that,
transformers builds each implementation's own mask, exactly as it does inside a model. `Problem.visible` states the same
mask once more, independently, as a predicate over positions: that is what results are checked against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

DOCUMENT_SHARES = (4, 12, 8, 20, 16, 8, 28, 32)
"""Lengths of packed documents, in 128ths of a row: mixed, as in real data."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that all cases of a run share. `tokens` are keys in all (per sequence in decoding)."""

    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 512
    decode_batch: int = 8


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
        description: for a reader; `{tokens}`, `{window}`, `{batch}` and `{padded}` are filled in.
        causal: whether a row sees only keys up to its own position.
        windowed: whether a row sees only the last `Sizes.window` keys.
        real_shares: for each sequence of the batch, the share of it that is no padding.
        padding_side: where the padding is.
        packed: whether eight documents share one row, told apart by `position_ids` that restart.
        decode: one new query per sequence over a cache, with a left padding that differs between sequences.
        sinks: whether each head has an attention sink (GPT-OSS).
        softcap: bound of the scores (Gemma 2), or None.
    """

    name: str
    description: str
    causal: bool = True
    windowed: bool = False
    real_shares: tuple[float, ...] = (1.0,)
    padding_side: str = "left"
    packed: bool = False
    decode: bool = False
    sinks: bool = False
    softcap: float | None = None


CASES = (
    Case("causal", "a prompt of {tokens} tokens"),
    Case("left_padded", "a prompt of {tokens} tokens whose left half is padding", real_shares=(0.5,)),
    Case("sliding", "a window of {window} keys over {tokens} tokens", windowed=True),
    Case("packed", "eight documents packed into {tokens} tokens", packed=True),
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
)


@dataclass(frozen=True)
class Problem:
    """The tensors of a case, in the layout in which a model's attention layer has them.

    Attributes:
        query: `[batch, num_heads, query_len, head_dim]`.
        key, value: `[batch, num_kv_heads, key_len, head_dim]`.
        attention_mask: int64 `[batch, key_len]`, 1 for tokens and 0 for padding, or None where there is no padding.
        position_ids: int64 `[batch, query_len]`.
        real: bool `[batch, key_len]`, False at padding.
        documents: int64 `[key_len]`, number of the document that each token belongs to.
        window: number of keys that a row sees, its own included, or None.
        sinks: `[num_heads]` or None.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    real: Tensor
    documents: Tensor
    window: int | None
    sinks: Tensor | None

    @property
    def query_offset(self) -> int:
        """Key index of the first query row: the number of tokens in the cache."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def description(self) -> str:
        """The case's description with this problem's sizes."""
        batch, _, key_len, _ = self.key.shape
        tokens = key_len if self.case.decode else batch * key_len
        window = "" if self.window is None else f"{self.window:,}"
        return self.case.description.format(tokens=f"{tokens:,}", window=window, batch=batch, padded=f"{key_len:,}")

    def visible(self, rows: Tensor) -> Tensor:
        """Which keys the query rows `rows` (int64 `[n]`) see: bool `[batch, 1, n, key_len]`, from positions alone."""
        q_pos = rows[:, None] + self.query_offset
        k_pos = torch.arange(self.key.shape[2], device=self.key.device)[None, :]
        seen = self.documents[q_pos] == self.documents[k_pos]
        if self.case.causal:
            seen = seen & (k_pos <= q_pos)
        if self.window is not None:
            seen = seen & (k_pos > q_pos - self.window)
        return seen[None, None] & self.real[:, None, None, :]

    def compared(self, rows: Tensor) -> Tensor:
        """Which of `rows` mean anything, bool `[batch, n]`: real tokens that see a key. The rest may hold anything."""
        return self.visible(rows).any(-1)[:, 0] & self.real[:, rows + self.query_offset]

    def mask_builder(self, implementation: str) -> Callable[[], Any]:
        """A call that builds the mask which transformers gives to the attention function named `implementation`."""
        config = self.config(implementation)
        embeddings = self.query.new_empty(self.query.shape[0], self.query.shape[2], 1)
        if not self.case.causal:
            return partial(create_bidirectional_mask, config, embeddings, self.attention_mask)
        cache = None
        if self.query_offset:
            cache = DynamicCache()
            past = slice(0, self.query_offset)
            cache.update(self.key[:, :, past], self.value[:, :, past], 0)
        return partial(
            create_causal_mask if self.window is None else create_sliding_window_causal_mask,
            config=config,
            inputs_embeds=embeddings,
            attention_mask=self.attention_mask,
            past_key_values=cache,
            position_ids=self.position_ids,
        )

    def config(self, implementation: str) -> LlamaConfig:
        """A configuration with this problem's shapes, set to `implementation`."""
        config = LlamaConfig(
            num_attention_heads=self.query.shape[1],
            num_key_value_heads=self.key.shape[1],
            head_dim=self.query.shape[3],
            hidden_size=self.query.shape[1] * self.query.shape[3],
            num_hidden_layers=1,
        )
        config.sliding_window = self.window
        config._attn_implementation = implementation
        return config


def build_problem(case: Case, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    """Draw the tensors of a case. The same seed draws the same tensors on the same kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    if case.decode:
        step = 0.5 / sizes.decode_batch
        case = replace(case, real_shares=tuple(1.0 - index * step for index in range(sizes.decode_batch)))
    batch = len(case.real_shares)
    key_len = sizes.tokens if case.decode else sizes.tokens // batch
    query_len = 1 if case.decode else key_len

    def draw(num_heads: int, tokens: int) -> Tensor:
        # A projection's output, split into heads and transposed, as models do: the strides are part of the problem.
        shape = (batch, tokens, num_heads, sizes.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype).transpose(1, 2)

    query, key, value = draw(sizes.num_heads, query_len), *(draw(sizes.num_kv_heads, key_len) for _ in range(2))
    index = torch.arange(key_len, device=device)
    lengths = torch.tensor([round(share * key_len) for share in case.real_shares], device=device)[:, None]
    real = index < lengths if case.padding_side == "right" else index >= key_len - lengths
    documents, position_ids = torch.zeros_like(index), (real.long().cumsum(1) - 1).clamp(min=0)
    if case.packed:
        documents = _documents(key_len, device)
        first_token = torch.searchsorted(documents, documents)
        position_ids = (index - first_token).expand(batch, -1)
    sinks = torch.randn(sizes.num_heads, generator=generator, device=device).to(dtype) if case.sinks else None
    return Problem(
        case=case,
        query=query,
        key=key,
        value=value,
        attention_mask=None if real.all() else real.long(),
        position_ids=position_ids[:, -query_len:].contiguous(),
        real=real,
        documents=documents,
        window=min(sizes.window, key_len) if case.windowed else None,
        sinks=sinks,
    )


def _documents(tokens: int, device: torch.device) -> Tensor:
    """Number of the document of each token, int64 `[tokens]`."""
    ends = torch.tensor(DOCUMENT_SHARES, device=device).cumsum(0) * tokens // sum(DOCUMENT_SHARES)
    return torch.searchsorted(ends, torch.arange(tokens, device=device), right=True)
