# SPDX-License-Identifier: Apache-2.0
"""An engine's batch: what each row sees, stated densely, and attention over pages, against float64."""

from __future__ import annotations

import random

import pytest
import torch

from attention_kernels import PagedCache, attention_reference
from attention_plugin.engines.batch import Batch, HeldSpans, pages_of

from helpers import DEVICE, assert_within_bound

pytestmark = pytest.mark.interpreter


def integers(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def random_batch(draw, *, causal=True, blocks=None, padding=3):
    """Prefill, pieces of prompts and decoding in one batch, pages in any order, rows of padding at the end."""
    page_size = draw.choice([1, 4, 16])
    lengths = [draw.randint(1, 40) for _ in range(draw.randint(1, 4))]
    rows = [draw.choice([1, length, draw.randint(1, length)]) for length in lengths]
    pages = -(-max(lengths) // page_size) + 1
    numbers = draw.sample(range(pages * len(lengths)), pages * len(lengths))
    offsets = integers(0, *rows).cumsum(0).int()
    return Batch(
        offsets, integers(*lengths), integers(*numbers).view(len(lengths), pages), page_size,
        sum(rows) + padding, max(rows), causal, blocks,
    )  # fmt: skip


def dense(batch, window=None, window_cuts_blocks=False):
    """The mask of each request, `[rows, tokens]`, by its definition and row by row."""
    masks = []
    for request, length in enumerate(batch.seq_lens.tolist()):
        rows = int(batch.query_offsets[request + 1] - batch.query_offsets[request])
        mask = torch.zeros(rows, length, dtype=torch.bool, device=DEVICE)
        causal = batch.causal if isinstance(batch.causal, bool) else bool(batch.causal[request])
        for row in range(rows):
            position = length - rows + row
            for key in range(length):
                in_window = window is None or key > position - window
                in_window &= causal or window is None or key < position + window
                block = False
                for first, last in [] if batch.blocks is None else batch.blocks[request].tolist():
                    block |= first < last and first <= position <= last and first <= key <= last
                if window_cuts_blocks:
                    block &= window is None or key > position - window
                mask[row, key] = ((key <= position or not causal) and in_window) or block
        masks.append(mask)
    return masks


def shown(batch, spans):
    """What spans show of each request."""
    whole = spans.to_dense()[0]
    for request, length in enumerate(batch.seq_lens.tolist()):
        rows = slice(int(batch.query_offsets[request]), int(batch.query_offsets[request + 1]))
        assert not whole[rows, length:].any()
        yield whole[rows, :length]


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("causal", [True, False, "each its own"])
def test_rows_see_their_own_request(window, causal):
    for seed in range(8):
        draw = random.Random(seed)
        batch = random_batch(draw)
        batch.causal = causal
        if causal == "each its own":
            dtype = draw.choice([torch.bool, torch.int32])  # vLLM has both
            batch.causal = torch.tensor([draw.random() < 0.5 for _ in batch.seq_lens], device=DEVICE, dtype=dtype)
        for found, expected in zip(shown(batch, batch.spans(window)), dense(batch, window), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("window_cuts_blocks", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_images_see_each_other_in_both_directions(window, window_cuts_blocks):
    for seed in range(8):
        batch = random_batch(random.Random(seed))
        length = batch.seq_lens[:, None, None]
        runs = torch.tensor([[[0, 3], [5, 5], [8, 15]]], dtype=torch.int32, device=DEVICE)
        batch.blocks = torch.minimum(runs.expand(len(batch.seq_lens), -1, -1), length - 1)
        found = shown(batch, batch.spans(window, window_cuts_blocks))
        for mask, expected in zip(found, dense(batch, window, window_cuts_blocks), strict=True):
            assert torch.equal(mask, expected)


def test_spans_of_a_kind_are_built_once_for_all_layers():
    batch = random_batch(random.Random(1))
    assert batch.spans(7) is batch.spans(7)
    assert batch.spans(7) is not batch.spans(None)


def test_held_spans_stay_where_they_are():
    held, addresses = HeldSpans(max_rows=256, device=DEVICE), set()
    for seed in range(3):
        batch = random_batch(random.Random(seed))
        batch.held = held
        spans = batch.spans(5)
        addresses.add((spans.start.data_ptr(), spans.end.data_ptr()))
        for found, expected in zip(shown(batch, spans), dense(batch, 5), strict=True):
            assert torch.equal(found, expected)
    assert len(addresses) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_over_pages_is_as_exact_as_eager(dtype):
    draw = random.Random(5)
    torch.manual_seed(5)
    batch, window = random_batch(draw), 9
    heads, kv_heads, dim = 6, 2, 24
    pages = int(batch.block_table.max()) + 1
    key, value = (torch.randn(pages, batch.page_size, kv_heads, dim, device=DEVICE).to(dtype) for _ in range(2))
    query = torch.randn(batch.num_rows, heads, dim, device=DEVICE).to(dtype)
    sinks = torch.randn(heads, device=DEVICE)
    out = torch.full_like(query, torch.nan)
    options = {"sinks": sinks, "scale": 0.3, "softcap": 5.0}
    assert batch.attend(query, pages_of(key, value), out, window=window, **options) is out
    cache = PagedCache(key, value, batch.block_table, batch.seq_lens)
    for request, mask in enumerate(dense(batch, window)):
        rows = slice(int(batch.query_offsets[request]), int(batch.query_offsets[request + 1]))
        part = query[rows].transpose(0, 1)[None]
        eager, exact = (
            attention_reference(part, *cache.gather(request, torch.float64), mask=mask, **options, dtype=each)[0]
            for each in (dtype, torch.float64)
        )
        assert_within_bound(out[rows].transpose(0, 1)[None], eager, exact)
