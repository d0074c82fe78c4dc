# SPDX-License-Identifier: Apache-2.0
"""One forward pass of a serving engine: several requests' new tokens, one after the other, over keys in pages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention_kernels import PagedCache, Spans, paged_attention


@dataclass(eq=False)
class Batch:
    """What the rows of a forward pass see, whichever layer asks.

    The new tokens of a request are its last ones: prefill, a piece of a long prompt, decoding and the verification of
    drafts differ in their number alone.

    Attributes:
        query_offsets: int32 `[requests + 1]`; request `r` has the rows `[query_offsets[r], query_offsets[r + 1])`.
            Rows beyond the last belong to nobody.
        seq_lens: int32 `[requests]`, tokens of each request, the new ones included.
        block_table: int32 `[requests, pages]`, the page of each run of `page_size` tokens.
        page_size: tokens of a page.
        num_rows: rows of the batch, those that belong to nobody included.
        max_query_len: at least the most rows of a request.
        causal: whether a row sees keys up to its own position, or all of its request; for each request by itself as
            bool or integer `[requests]`. With a window the latter sees `window - 1` keys on either side.
        blocks: int32 `[requests, blocks, 2]` or None; first and last position of runs of tokens (images) that see each
            other in both directions. A run whose first and last position are equal is none.
        held: keeps spans at fixed addresses, where CUDA graphs were captured with them.
    """

    query_offsets: Tensor
    seq_lens: Tensor
    block_table: Tensor
    page_size: int
    num_rows: int
    max_query_len: int
    causal: bool | Tensor = True
    blocks: Tensor | None = None
    held: HeldSpans | None = None
    _spans: dict[tuple[int | None, bool], Spans] = field(default_factory=dict, repr=False)

    def spans(self, window: int | None = None, window_cuts_blocks: bool = False) -> Spans:
        """What each row sees of its own request, for layers with this window. Built once for all of them.

        Args:
            window: number of keys that a row sees at most, its own among them; None is all.
            window_cuts_blocks: whether the window also bounds which keys before it a row sees of its own block. Those
                behind it stay visible, as in transformers' Gemma 4.
        """
        kind = (window, window_cuts_blocks)
        if kind not in self._spans:
            spans = self._build_spans(window, window_cuts_blocks)
            self._spans[kind] = spans if self.held is None else self.held.hold(spans, kind)
        return self._spans[kind]

    def _build_spans(self, window: int | None, window_cuts_blocks: bool) -> Spans:
        """`spans`, one for each row, over the keys of its own request. Nothing is read back from the device."""
        rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.seq_lens.device)
        request = (torch.searchsorted(self.query_offsets, rows, right=True) - 1).clamp_(0, self.seq_lens.shape[0] - 1)
        # The last row of a request stands at its last key.
        position = rows + (self.seq_lens - self.query_offsets[1:])[request]
        key_len = self.block_table.shape[1] * self.page_size
        end = position + 1
        if self.causal is not True:
            ahead = self.seq_lens[request]
            if window is not None:
                ahead = torch.minimum(ahead, position + window)
            end = torch.where(self.causal[request] != 0, end, ahead) if isinstance(self.causal, Tensor) else ahead
        first_of_window = position * 0 if window is None else position - (window - 1)
        start = first_of_window
        if self.blocks is not None:
            first, last = self.blocks[request].unbind(-1)  # [rows, blocks]
            inside = (first < last) & (first <= position[:, None]) & (position[:, None] <= last)
            end = torch.maximum(end, torch.where(inside, last + 1, 0).amax(1))
            end = torch.minimum(end, self.seq_lens[request])
            start = torch.minimum(start, torch.where(inside, first, key_len).amin(1))
            if window is not None and window_cuts_blocks:
                start = torch.maximum(start, first_of_window)
        start, end = (bound.clamp(0, key_len).to(torch.int32)[None] for bound in (start, end))
        return Spans(start, end, self.num_rows, key_len)

    def attend(
        self,
        query: Tensor,
        pages: PagedCache,
        out: Tensor,
        *,
        window: int | None = None,
        window_cuts_blocks: bool = False,
        sinks: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of one layer.

        Args:
            query: `[num_rows, num_heads, head_dim]`.
            pages: the layer's keys and values, the new ones included; its block table plays no role.
            out: `[num_rows, num_heads, value_dim]`, contiguous; rows that belong to nobody are undefined.
            window, window_cuts_blocks: as for `spans`.
            sinks, scale, softcap: as for `attention_kernels.paged_attention`.

        Returns:
            `out`.
        """
        cache = PagedCache(pages.key, pages.value, self.block_table, self.seq_lens, pages.key_scale, pages.value_scale)
        paged_attention(
            query.transpose(0, 1)[None], cache, self.spans(window, window_cuts_blocks), sinks=sinks, scale=scale,
            softcap=softcap, query_offsets=self.query_offsets, max_query_len=self.max_query_len,
            out=out.transpose(0, 1)[None],
        )  # fmt: skip
        return out


class HeldSpans:
    """Spans of one batch after another, at the same addresses: a captured CUDA graph reads what lies there."""

    def __init__(self, max_rows: int, device: torch.device | str) -> None:
        """For batches of up to `max_rows` rows."""
        self.max_rows, self.device = max_rows, device
        self._bounds: dict[tuple, Tensor] = {}

    def hold(self, spans: Spans, kind: tuple) -> Spans:
        """The spans, copied to where those of this kind lie."""
        if kind not in self._bounds:
            self._bounds[kind] = torch.zeros(2, 1, self.max_rows, dtype=torch.int32, device=self.device)
        start, end = self._bounds[kind][:, :, : spans.query_len]
        start.copy_(spans.start)
        end.copy_(spans.end)
        return Spans(start, end, spans.query_len, spans.key_len)


def pages_of(
    key: Tensor, value: Tensor, key_scale: Tensor | None = None, value_scale: Tensor | None = None
) -> PagedCache:
    """Pages without requests: what `write_cache` and `Batch.attend` take.

    Args:
        key: `[pages, page_size, num_kv_heads, head_dim]`; value likewise. Any strides.
        key_scale, value_scale: of quantised pages, as for `PagedCache`.
    """
    empty = torch.zeros(0, dtype=torch.int32, device=key.device)
    return PagedCache(key, value, empty[:, None], empty, key_scale, value_scale)
