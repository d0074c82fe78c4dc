# SPDX-License-Identifier: Apache-2.0
"""Decoding calls that are remembered: kernels get what `decode.decode` gives them; nothing that differs is reused."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from attention_kernels import Spans, attention, operators, prebound
from attention_kernels.operators import interpreting

pytest.importorskip("triton")

from attention_kernels import configs, decode

recorded = pytest.mark.skipif(interpreting() or torch.cuda.is_available(), reason="kernels that record run on CPUs")


class Recorder:
    """In place of a kernel and of what it compiles to: notes each call with its grid, and may run it."""

    def __init__(self, kernel, runs):
        self.kernel, self.runs, self.calls = kernel, runs, []
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def call(*arguments, **named):
            again = len(arguments) == len(self.arg_names) and isinstance(arguments[-1], int | str)
            if self.runs:
                self.kernel[grid](*arguments, **named)
            arguments += tuple(named[name] for name in self.arg_names[len(arguments) :])
            self.calls.append(((*grid, 1, 1)[:3], arguments, again))
            return self

        return call


@pytest.fixture
def kernels(monkeypatch):
    prebound.forget()
    both = [Recorder(getattr(decode, name), interpreting()) for name in ("decode_kernel", "merge_kernel")]
    monkeypatch.setattr(decode, "decode_kernel", both[0])
    monkeypatch.setattr(decode, "merge_kernel", both[1])
    monkeypatch.setattr(decode, "INTERPRETED", False)
    monkeypatch.setattr(configs, "processors", lambda device: 64)
    monkeypatch.setattr(operators, "runs_triton", lambda tensor: True)
    yield both
    prebound.forget()


def tensors(dtype=torch.float16, key_len=512, heads_first=True, dim=32):
    def draw(heads, tokens):
        if heads_first:
            return torch.randn(2, heads, tokens, dim).to(dtype)
        return torch.randn(2, tokens, heads, dim).to(dtype).transpose(1, 2)

    return draw(4, 1), draw(2, key_len), draw(2, key_len)


def padded(key_len=512):
    """As on a GPU, where padding always keeps its mask."""
    shown = torch.arange(key_len) >= torch.tensor([[3], [90]])
    shown[0, 100:110] = False
    return Spans.causal(1, key_len, offset=key_len - 20) & Spans.padded(shown, 1)


def remembered():
    return len(prebound._launches)


def comparable(argument):
    """An argument with each tensor as what a kernel sees of it, or of memory for results only its size."""
    if isinstance(argument, tuple):
        return tuple(comparable(each) for each in argument)
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


@recorded
@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize("spans", [Spans.full(1, 512), Spans.causal(1, 512, offset=300), padded()])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_kernels_get_what_they_get_without_memory(kernels, num_splits, spans, scale):
    attention(*tensors(), spans, scale=scale, num_splits=num_splits)
    assert remembered() == 1
    query, key, value = tensors()
    outcomes = []
    for direct in (False, True):
        for kernel in kernels:
            kernel.calls.clear()
        if direct:
            operands = (query, key, value, spans.start, spans.end, spans.key_mask, spans.gap_count)
            result = decode.decode(*operands, scale=32**-0.5 if scale is None else scale, num_splits=num_splits)
        else:
            result = attention(query, key, value, spans, scale=scale, num_splits=num_splits, return_lse=True)
        calls = [(grid, list(arguments)) for kernel in kernels for grid, arguments, _ in kernel.calls]
        for place, index in [(6, 0), (7, 1)]:  # memory for results: its kind, not its address
            arguments = calls[0][1]
            ours = arguments[place] if index == 0 else arguments[place].ptr
            assert ours.is_contiguous() or ours.transpose(1, 2).is_contiguous()
            rest = () if index == 0 else arguments[place][1:]
            arguments[place] = (ours.numel(), ours.dtype, rest)
        if len(calls) == 2:
            merged = calls[1][1]
            assert merged[2].data_ptr() == result[0].data_ptr() and merged[3].ptr.data_ptr() == result[1].data_ptr()
            merged[:4] = [each.numel() for each in merged[:3]] + [merged[3][1:]]
        seen = [(grid, [comparable(each) for each in arguments]) for grid, arguments in calls]
        outcomes.append((seen, [(each.shape, each.stride(), each.dtype) for each in result]))
    assert outcomes[0] == outcomes[1]


@recorded
def test_calls_of_a_kind_share_a_launch_and_others_do_not(kernels):
    spans = padded()
    for _ in range(3):
        attention(*tensors(), spans)
        attention(*tensors(), replace(spans))
    assert remembered() == 1
    attention(*tensors(), spans, scale=0.5)
    attention(*tensors(), spans, num_splits=2)
    attention(*tensors(heads_first=False), spans)
    attention(*tensors(torch.bfloat16), spans)
    attention(*tensors(dim=64), spans)
    attention(*tensors(), Spans.full(1, 512))
    attention(*tensors(key_len=1), Spans.full(1, 1))
    assert remembered() == 8


@recorded
def test_what_is_not_plain_is_neither_remembered_nor_served_from_memory(kernels):
    query, key, value = tensors()
    spans = Spans.full(1, 512)
    attention(query, key, value, spans)

    def launched_anew(*arguments, **named):
        kernels[0].calls.clear()
        attention(*arguments, **named)
        assert remembered() == 1
        return [again for *_, again in kernels[0].calls] == [False]

    assert not launched_anew(query, key, value, spans)
    for named in ({"softcap": 2.0}, {"sinks": torch.zeros(4)}, {"bias": torch.zeros(512)}):
        assert launched_anew(query, key, value, spans, **named)
    assert launched_anew(query, key, value, spans, mask=torch.ones(512, dtype=torch.bool))
    shifted = torch.empty(key.numel() + 1, dtype=key.dtype)[1:].view(key.shape).copy_(key)
    assert shifted.data_ptr() % 16
    assert launched_anew(query, shifted, value, spans)
    start = torch.zeros(3, dtype=torch.int32)[1:2].view(1, 1)
    assert launched_anew(query, key, value, replace(spans, start=start))
    with torch.autocast("cpu", torch.bfloat16):
        kernels[0].calls.clear()
        assert attention(query, key, value, spans).dtype == torch.bfloat16


@recorded
def test_wrong_arguments_are_found_after_right_ones(kernels):
    query, key, value = tensors()
    spans = Spans.full(1, 512)
    attention(query, key, value, spans)
    with pytest.raises(ValueError, match="share heads and length"):
        attention(query, key, value[:, :, 1:], spans)
    with pytest.raises(TypeError, match="one dtype"):
        attention(query, key, value.float(), spans)
    with pytest.raises(ValueError, match="`spans` is for"):
        attention(query, key, value, Spans.full(1, 256))
    with pytest.raises(ValueError, match="num_splits"):
        attention(query, key, value, spans, num_splits=0)


@recorded
def test_tensors_are_not_kept(kernels):
    operands = tensors()
    spans = padded()
    attention(*operands, spans)
    attention(*operands, spans)
    watched = [weakref.ref(each) for each in (*operands, spans, spans.start, spans.key_mask)]
    for kernel in kernels:
        kernel.calls.clear()
    del operands, spans
    gc.collect()
    assert [each() for each in watched] == [None] * len(watched)


@pytest.mark.skipif(not interpreting(), reason="computes what the recording tests only look at")
@pytest.mark.parametrize("num_splits", [1, 3])
def test_results_are_those_without_memory(kernels, num_splits):
    torch.manual_seed(0)
    spans = padded(128)
    attention(*tensors(key_len=128), spans, num_splits=num_splits)
    operands = tensors(key_len=128)
    output, lse = attention(*operands, spans, num_splits=num_splits, return_lse=True)
    assert kernels[0].calls[-1][2]
    prebound.forget()
    first, first_lse = attention(*operands, spans, num_splits=num_splits, return_lse=True)
    assert torch.equal(output, first) and torch.equal(lse, first_lse)
