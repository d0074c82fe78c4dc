# SPDX-License-Identifier: Apache-2.0
"""Memory that threads keep for copies: it is lent to one at a time, and no result lies there."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attention_kernels import PagedCache, Spans, attention, blockwise, gathered, paged_attention
from attention_kernels.blockwise import fused
from attention_kernels.paths import interpreting
from attention_kernels.scratch import KEPT_BYTES, LINE, Scratch

SHAPES = [(2, 3, 5), (7,), (0, 4), (1, 1, 33)]

outside_the_interpreter = pytest.mark.skipif(interpreting(), reason="CPU tensors run kernels here, which copy nothing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_tensors_lie_apart_at_lines_of_the_cache(dtype):
    with Scratch().lent(SHAPES, dtype) as given:
        assert [tuple(each.shape) for each in given] == SHAPES
        assert all(each.dtype == dtype and each.is_contiguous() for each in given)
        places = [(each.data_ptr(), each.data_ptr() + each.numel() * each.itemsize) for each in given if each.numel()]
    assert all(first % LINE == 0 for first, _ in places)
    assert all(last <= first for (_, last), (first, _) in itertools.pairwise(places))


def address(memory, numbers):
    """Where so many numbers would lie; None if the memory is not lent."""
    with memory.lent([(numbers,)], torch.float32) as given:
        return None if given is None else given[0].data_ptr()


def test_memory_is_kept_until_more_is_needed_or_it_is_forgotten():
    memory = Scratch()
    assert address(memory, 1000) == address(memory, 10)
    with memory.lent([(100_000,)], torch.float32) as (larger,):
        assert larger.fill_(2.0).sum() == 200_000
    assert address(memory, KEPT_BYTES // 4) is not None
    assert address(memory, KEPT_BYTES // 4 + 1) is None
    memory.forget()
    assert memory._memory.numel() == 0


def test_what_is_lent_is_lent_to_nobody_else():
    memory = Scratch()
    with memory.lent([(8,)], torch.float32) as (outer,):
        assert address(memory, 8) is None
    with pytest.raises(RuntimeError, match="within"), memory.lent([(8,)], torch.float32):
        raise RuntimeError("within")
    assert address(memory, 8) == outer.data_ptr(), "it is given back whatever happens"
    with FlopCounterMode(display=False):
        assert address(memory, 8) is None, "a mode may have tensors of its own"


def test_what_inference_mode_took_can_be_written_to_outside():
    memory = Scratch()
    with torch.inference_mode():
        address(memory, 8)
    with memory.lent([(8,)], torch.float32) as (given,):
        assert given.fill_(1.0).sum() == 8
    with torch.device("meta"), Scratch().lent([(8,)], torch.float32) as (given,):
        assert given.device.type == "cpu"


def drawn(heads, tokens, layout="by token"):
    each = torch.randn(1, tokens, heads, 16, dtype=torch.bfloat16).transpose(1, 2)
    return each.contiguous() if layout == "by head" else each


@pytest.fixture
def widened(monkeypatch):
    """Every 16-bit operand is copied, into memory that is kept."""
    monkeypatch.setattr(blockwise.processor, "MULTIPLIES_16_BITS", False)
    monkeypatch.setattr(fused, "LEAST_KEPT_BYTES", 0)


@outside_the_interpreter
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("layout", ["by head", "by token"])
def test_results_outlast_the_calls_after_them(layout, trains, widened, monkeypatch):
    """In several threads; and gradients, for which all forward passes are made before the first backward pass."""
    torch.manual_seed(0)
    calls = [[drawn(heads, tokens, layout) for heads in (4, 2, 2)] for tokens in (700, 512, 900)]

    def run(call):
        leaves = [each.detach().requires_grad_(trains) for each in call]
        return leaves, attention(*leaves, Spans.causal(call[0].shape[2]), return_lse=True)

    def outcome(leaves, results):
        gradients = torch.autograd.grad(results[0].float().square().sum(), leaves) if trains else ()
        return [*results, *gradients]

    def same(found, expected):
        for each, right in zip(found, expected, strict=True):
            for ours, theirs in zip(outcome(*each), right, strict=True):
                torch.testing.assert_close(ours, theirs)

    with monkeypatch.context() as patch:
        patch.setattr(fused, "LEAST_KEPT_BYTES", 1 << 40)
        alone = [outcome(*run(call)) for call in calls]
    fused._scratch.forget()
    same([run(call) for call in calls], alone)
    assert fused._scratch._memory.numel(), "the memory was used"
    with ThreadPoolExecutor(2) as threads:
        same(list(threads.map(run, calls * 3)), alone * 3)


@outside_the_interpreter
def test_a_call_in_the_middle_of_another_leaves_it_alone(widened, monkeypatch):
    """As a signal's handler may make one."""
    torch.manual_seed(0)
    outer, inner = ([drawn(heads, tokens) for heads in (4, 2, 2)] for tokens in (600, 700))
    expected = attention(*outer, Spans.causal(600)), attention(*inner, Spans.causal(700))
    flash, within = fused.flash, []

    def interrupted(*arguments, **options):
        if not within:
            within.append(None)  # only once
            within[0] = attention(*inner, Spans.causal(700))
        return flash(*arguments, **options)

    monkeypatch.setattr(fused, "flash", interrupted)
    torch.testing.assert_close(attention(*outer, Spans.causal(600)), expected[0])
    torch.testing.assert_close(within[0], expected[1])


@outside_the_interpreter
def test_pages_that_are_gathered_in_the_middle_of_another_call_leave_it_alone(monkeypatch):
    torch.manual_seed(0)
    tokens = [torch.randn(4, 16, 2, 16) for _ in range(4)]
    table, lengths = torch.arange(4, dtype=torch.int32)[None], torch.tensor([60], dtype=torch.int32)
    caches = [PagedCache(*pair, table, lengths) for pair in (tokens[:2], tokens[2:])]
    query = torch.randn(1, 4, 1, 16)
    expected = [paged_attention(query, cache) for cache in caches]
    original, within = gathered.attention, []

    def interrupted(*arguments, **options):
        if not within:
            within.append(None)  # only once
            within[0] = paged_attention(query, caches[1])
        return original(*arguments, **options)

    monkeypatch.setattr(gathered, "attention", interrupted)
    torch.testing.assert_close(paged_attention(query, caches[0]), expected[0])
    torch.testing.assert_close(within[0], expected[1])
