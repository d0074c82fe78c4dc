# SPDX-License-Identifier: Apache-2.0
"""Memory that threads keep for copies: tensors in it do not overlap, and no result lies there."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from attention_kernels import Spans, attention, blockwise, scratch
from attention_kernels.scratch import KEPT_BYTES, LINE, Scratch

SHAPES = [(2, 3, 5), (7,), (0, 4), (1, 1, 33)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_tensors_lie_apart_at_lines_of_the_cache(dtype):
    given = Scratch().room(SHAPES, dtype)
    assert [tuple(each.shape) for each in given] == SHAPES
    assert all(each.dtype == dtype and each.is_contiguous() for each in given)
    begins = [(each.data_ptr(), each.data_ptr() + each.numel() * each.itemsize) for each in given if each.numel()]
    assert all(first % LINE == 0 for first, _ in begins)
    assert all(last <= first for (_, last), (first, _) in itertools.pairwise(begins))


def test_memory_is_kept_until_more_is_needed_or_it_is_forgotten():
    memory = Scratch()
    large, small = (memory.room([(size,)], torch.float32)[0] for size in (1000, 10))
    assert large.data_ptr() == small.data_ptr()
    assert memory.room([(100_000,)], torch.float32)[0].numel() == 100_000
    assert memory.room([(KEPT_BYTES // 4,)], torch.float32) is not None
    assert memory.room([(KEPT_BYTES // 4 + 1,)], torch.float32) is None
    memory.forget()
    assert memory._memory.numel() == 0


def test_what_inference_mode_took_can_be_written_to_outside():
    memory = Scratch()
    with torch.inference_mode():
        memory.room([(8,)], torch.float32)
    assert memory.room([(8,)], torch.float32)[0].fill_(1.0).sum() == 8
    with torch.device("meta"):
        assert Scratch().room([(8,)], torch.float32)[0].device.type == "cpu"


@pytest.mark.parametrize("layout", ["by head", "by token"])
def test_results_of_long_16_bit_prompts_outlast_the_calls_after_them(layout, monkeypatch):
    """In several threads, and where an output is not rounded and so could be the copy itself."""
    monkeypatch.setattr(blockwise.processor, "MULTIPLIES_16_BITS", False)
    torch.manual_seed(0)

    def drawn(heads, tokens):
        each = torch.randn(1, tokens, heads, 16, dtype=torch.bfloat16).transpose(1, 2)
        return each.contiguous() if layout == "by head" else each

    calls = [(drawn(4, tokens), drawn(2, tokens), drawn(2, tokens), Spans.causal(tokens)) for tokens in (700, 512, 900)]
    with torch.inference_mode():
        alone = []
        for call in calls:
            blockwise.fused._scratch.forget()
            alone.append(tuple(each.clone() for each in attention(*call, return_lse=True)))
    monkeypatch.setattr(scratch, "KEPT_BYTES", 0)
    fresh = [attention(*call, return_lse=True) for call in calls]
    monkeypatch.undo()
    monkeypatch.setattr(blockwise.processor, "MULTIPLIES_16_BITS", False)
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda call: attention(*call, return_lse=True), calls * 3))
    for found in (fresh, results[:3], results[3:6], results[6:]):
        for (output, lse), (expected, expected_lse) in zip(found, alone, strict=True):
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(lse, expected_lse)
