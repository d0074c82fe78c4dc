# SPDX-License-Identifier: Apache-2.0
"""Spans of lengths alone: shared where that is safe, and anew where it is not."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from attention_kernels import Spans
from attention_kernels.shared_spans import MOST_KEPT, MOST_QUERIES, _kept, window_spans

from helpers import DEVICE

on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="streams and graphs are a GPU's")


@pytest.fixture
def device():
    return torch.device("cpu") if DEVICE == "cpu" else torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("window", [{}, {"right": 0}, {"left": 3, "right": 0}, {"left": 2, "right": 1}])
@pytest.mark.parametrize("lengths", [(9, 9), (1, 9), (4, 9)])
def test_what_they_are(lengths, window, device):
    spans = window_spans(*lengths, **window, device=device)
    expected = Spans.sliding(*lengths, **{"left": None, "right": None, **window}, device=device)
    assert (spans.query_len, spans.key_len) == lengths and torch.equal(spans.to_dense(), expected.to_dense())
    assert window_spans(*lengths, **window, device=device) is spans


def test_other_lengths_and_windows_are_others(device):
    kinds = [(9, 9, None, None), (9, 9, None, 0), (9, 9, 0, 0), (9, 10, None, None), (8, 9, None, None)]
    found = [window_spans(*lengths, left=left, right=right, device=device) for *lengths, left, right in kinds]
    assert len({id(each) for each in found}) == len(kinds)


def test_few_are_kept_and_no_long_ones(device):
    before = window_spans(9, 9, device=device)
    for key_len in range(20, 20 + MOST_KEPT):
        window_spans(9, key_len, device=device)
    assert window_spans(9, 9, device=device) is not before and len(_kept) == MOST_KEPT
    long = MOST_QUERIES + 1
    assert window_spans(long, long, right=0, device=device) is not window_spans(long, long, right=0, device=device)


def test_tensors_of_another_kind_are_not_shared(device):
    """Autograd takes none that were made in inference mode; fake ones belong to their mode."""
    before = window_spans(9, 9, right=0, device=device)
    with torch.inference_mode():
        inside = window_spans(9, 9, right=0, device=device)
        assert inside is window_spans(9, 9, right=0, device=device)
    assert inside is not before is window_spans(9, 9, right=0, device=device)
    with FakeTensorMode():
        fake = window_spans(9, 9, right=0, device=device)
        assert fake is not window_spans(9, 9, right=0, device=device) and type(fake.end) is FakeTensor


def test_bad_windows_are_named(device):
    with pytest.raises(ValueError, match="`left` must be None or at least 0, got -1"):
        window_spans(9, 9, left=-1, right=0, device=device)


@on_a_gpu
def test_a_graph_and_another_stream_have_their_own(device):
    before = window_spans(9, 9, right=0, device=device)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert window_spans(9, 9, right=0, device=device) is not before
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured = window_spans(9, 9, right=0, device=device)
        assert captured is not window_spans(9, 9, right=0, device=device)
    assert window_spans(9, 9, right=0, device=device) is before
