# SPDX-License-Identifier: Apache-2.0
"""The tensors of a case, and its mask stated twice.

Transformers builds each implementation's own mask, exactly as it does inside a model. `Problem.visible` states the same
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

from model.modeling_reference import CACHE

from .cases import DOCUMENT_SHARES, IMAGE_SHARES, Case, Sizes


@dataclass(frozen=True)
class Problem:
    """The tensors of a case, in the layout in which a model's attention layer has them.

    Attributes:
        query: `[batch, num_heads, query_len, head_dim]`.
        key: `[batch, num_kv_heads, key_len, head_dim]`.
        value: `[batch, num_kv_heads, key_len, value_dim]`.
        attention_mask: int64 `[batch, key_len]`, 1 for tokens and 0 for padding, or None where there is no padding.
        position_ids: int64 `[batch, query_len]`.
        real: bool `[batch, key_len]`, False at padding.
        documents: int64 `[key_len]`, number of the document that each token belongs to.
        images: int64 `[key_len]`, number of the image that each token belongs to, -1 for text; or None.
        window: number of keys that a row sees, its own included, or None.
        sinks: `[num_heads]` or None.
        bias: `[1, num_heads, query_len, key_len]` or None.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    real: Tensor
    documents: Tensor
    images: Tensor | None
    window: int | None
    sinks: Tensor | None
    bias: Tensor | None

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
        sizes = {"tokens": tokens, "padded": key_len, "new": self.query.shape[2], "before": self.query_offset}
        texts = {name: f"{size:,}" for name, size in sizes.items()}
        return self.case.description.format(window=window, batch=batch, **texts)

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by name, for saved runs."""
        batch, num_heads, query_len, head_dim = self.query.shape
        return {
            "batch": batch, "query_len": query_len, "key_len": self.key.shape[2], "num_heads": num_heads,
            "num_kv_heads": self.key.shape[1], "head_dim": head_dim, "value_dim": self.value.shape[3],
        }  # fmt: skip

    def visible(self, rows: Tensor) -> Tensor:
        """Which keys the query rows `rows` (int64 `[n]`) see: bool `[batch, 1, n, key_len]`, from positions alone."""
        q_pos = rows[:, None] + self.query_offset
        k_pos = torch.arange(self.key.shape[2], device=self.key.device)[None, :]
        seen = self.documents[q_pos] == self.documents[k_pos]
        if self.case.causal:
            seen = seen & (k_pos <= q_pos)
        if self.window is not None:
            seen = seen & (k_pos > q_pos - self.window)
        if self.images is not None:
            seen = seen | ((self.images[q_pos] == self.images[k_pos]) & (self.images[q_pos] >= 0))
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
        images = {} if self.images is None else {"block_sequence_ids": self.images.expand(self.query.shape[0], -1)}
        return partial(
            create_causal_mask if self.window is None else create_sliding_window_causal_mask,
            config=config,
            inputs_embeds=embeddings,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            **{CACHE: cache},
            **images,
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
    case = replace(case, real_shares=shares_of(case, sizes))
    batch = len(case.real_shares)
    key_len = sizes.tokens if case.decode else sizes.tokens * sizes.batch // batch
    query_len = 1 if case.decode else sizes.new_tokens or key_len

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    def heads(number: int, tokens: int, columns: int) -> Tensor:
        # A projection's output, split into heads and transposed, as models do: the strides are part of the problem.
        split = draw(batch, tokens, number, columns).transpose(1, 2)
        # A cache has appended to it, which leaves head after head in memory.
        return split.contiguous() if case.decode and tokens > 1 else split

    query = heads(sizes.num_heads, query_len, sizes.head_dim)
    key = heads(sizes.num_kv_heads, key_len, sizes.head_dim)
    value = heads(sizes.num_kv_heads, key_len, sizes.value_dim or sizes.head_dim)
    index = torch.arange(key_len, device=device)
    lengths = torch.tensor([round(share * key_len) for share in case.real_shares], device=device)[:, None]
    real = index < lengths if case.padding_side == "right" else index >= key_len - lengths
    documents, position_ids = torch.zeros_like(index), (real.long().cumsum(1) - 1).clamp(min=0)
    if case.packed:
        documents = _documents(key_len, device)
        first_token = torch.searchsorted(documents, documents)
        position_ids = (index - first_token).expand(batch, -1)
    return Problem(
        case=case,
        query=query,
        key=key,
        value=value,
        attention_mask=None if real.all() else real.long(),
        position_ids=position_ids[:, -query_len:].contiguous(),
        real=real,
        documents=documents,
        images=_images(key_len, device) if case.images else None,
        window=min(sizes.window, key_len) if case.windowed else None,
        sinks=draw(sizes.num_heads) if case.sinks else None,
        bias=draw(1, sizes.num_heads, query_len, key_len) if case.bias else None,
    )


def shares_of(case: Case, sizes: Sizes) -> tuple[float, ...]:
    """For each sequence, the share of it that is no padding."""
    if not case.decode:
        return case.real_shares * sizes.batch
    step = 0.5 / sizes.decode_batch if case.ragged else 0.0
    return tuple(1.0 - index * step for index in range(sizes.decode_batch))


def _documents(tokens: int, device: torch.device) -> Tensor:
    """Number of the document of each token, int64 `[tokens]`."""
    ends = torch.tensor(DOCUMENT_SHARES, device=device).cumsum(0) * tokens // sum(DOCUMENT_SHARES)
    return torch.searchsorted(ends, torch.arange(tokens, device=device), right=True)


def _images(tokens: int, device: torch.device) -> Tensor:
    """Number of the image of each token, -1 for text, int64 `[tokens]`."""
    numbers = torch.full((tokens,), -1, device=device)
    for number, (start, end) in enumerate(IMAGE_SHARES):
        numbers[round(start * tokens) : round(end * tokens)] = number
    return numbers
