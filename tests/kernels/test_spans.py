# SPDX-License-Identifier: Apache-2.0
"""Spans against masks stated as predicates over positions, and their composition, bounds and picture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_kernels import Spans

sizes = st.integers(1, 40)
offsets = st.integers(-5, 45)


def dense_mask(query_len, key_len, predicate, *, offset=0):
    """Boolean `[query_len, key_len]` mask of a predicate over positions; row `i` stands at position `i + offset`."""
    q_pos = torch.arange(query_len)[:, None] + offset
    return predicate(q_pos, torch.arange(key_len)[None, :]).expand(query_len, key_len)


def assert_spans(spans, dense):
    assert torch.equal(spans.to_dense(), dense if dense.ndim == 3 else dense[None])


@given(query_len=sizes, key_len=sizes, offset=offsets)
def test_causal(query_len, key_len, offset):
    expected = dense_mask(query_len, key_len, lambda q, k: k <= q, offset=offset)
    assert_spans(Spans.causal(query_len, key_len, offset=offset), expected)
    assert_spans(Spans.causal(query_len, key_len, offset=torch.tensor(offset)), expected)


@given(query_len=sizes, key_len=sizes)
def test_causal_ends_at_the_last_key_by_default(query_len, key_len):
    expected = dense_mask(query_len, key_len, lambda q, k: k <= q, offset=key_len - query_len)
    assert_spans(Spans.causal(query_len, key_len), expected)


@given(sizes, sizes, offsets, st.none() | st.integers(0, 20), st.none() | st.integers(0, 20))
def test_sliding(query_len, key_len, offset, left, right):
    def visible(q, k):
        after = True if left is None else k >= q - left
        before = True if right is None else k <= q + right
        return torch.ones_like(q + k, dtype=torch.bool) & after & before

    spans = Spans.sliding(query_len, key_len, left=left, right=right, offset=offset)
    assert_spans(spans, dense_mask(query_len, key_len, visible, offset=offset))


@given(sizes, sizes, offsets, st.integers(1, 12), st.lists(st.integers(-3, 30), min_size=1, max_size=3))
def test_chunked(query_len, key_len, offset, chunk_size, firsts):
    spans = Spans.chunked(query_len, key_len, chunk_size=chunk_size, first=torch.tensor(firsts), offset=offset)
    expected = [
        dense_mask(query_len, key_len, lambda q, k, f=f: (q - f) // chunk_size == (k - f) // chunk_size, offset=offset)
        for f in firsts
    ]
    assert_spans(spans, torch.stack(expected))


@given(st.lists(st.integers(-1, 2), min_size=1, max_size=30), st.data())
def test_blocks(ids, data):
    """Runs of equal ids are blocks; an id that comes back begins another block."""
    offset = data.draw(st.integers(0, len(ids) - 1))
    query_len = data.draw(st.integers(1, len(ids) - offset))
    block = torch.tensor(ids)
    run = torch.nn.functional.pad((block.diff() != 0).cumsum(0), (1, 0))
    expected = dense_mask(query_len, len(ids), lambda q, k: (run[q] == run[k]) & (block[q] >= 0), offset=offset)
    assert_spans(Spans.blocks(block[None], query_len, offset=offset), expected)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_packed(lengths):
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = documents[:, None] == documents[None, :]
    assert_spans(Spans.packed_lengths(lengths), expected)
    assert_spans(Spans.packed(documents[None]), expected)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    assert_spans(Spans.packed_offsets(ends, ends, sum(lengths), sum(lengths)), expected)


def test_any_byte_but_zero_is_a_token():
    """A mask may be a view of other bytes."""
    mask = torch.tensor([[0, 255, 2, 0], [0, 0, 0, 0]], dtype=torch.uint8).view(torch.bool)
    spans = Spans.padded(mask, 1)
    assert spans.key_mask is None and spans.start.tolist() == [[1], [4]] and spans.end.tolist() == [[3], [0]]


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4), sizes)
def test_padded(rows, query_len):
    key_mask = torch.tensor(rows)
    spans = Spans.padded(key_mask, query_len)
    expected = key_mask[:, None].expand(-1, query_len, -1)
    assert torch.equal(spans.to_dense().expand_as(expected), expected)
    changes = (key_mask[:, 1:] != key_mask[:, :-1]).sum(1) + key_mask[:, 0] + key_mask[:, -1]
    assert (spans.key_mask is not None) == bool((changes > 2).any()), "a mask is kept exactly where there are gaps"


def test_limits_that_no_sum_holds():
    """Positions are int32: a limit of more keys than there are is none."""
    for far in (2**31 - 1, 2**40):
        assert torch.equal(Spans.sliding(6, left=far).to_dense(), Spans.causal(6).to_dense())
        assert Spans.sliding(6, left=None, right=far).to_dense().all()
        assert Spans.chunked(6, chunk_size=far, first=2).to_dense().sum(-1).tolist() == [[2, 2, 4, 4, 4, 4]]


def test_blocks_of_no_keys():
    spans = Spans.blocks(torch.zeros(1, 0, dtype=torch.int64), 2)
    assert (spans.query_len, spans.key_len) == (2, 0) and not spans.to_dense().any()


def test_runs_are_compiled_for_any_length():
    """By inductor, whose code for another way to say the same fails at the second length."""
    compiled = {kind: torch.compile(lambda ids, kind=kind: kind(ids).end) for kind in (Spans.packed, Spans.blocks)}
    for tokens in (20, 13, 7):
        ids = torch.arange(tokens)[None] // 5
        for kind, run in compiled.items():
            assert torch.equal(run(ids), kind(ids).end)


@given(st.data())
def test_composition(data):
    query_len, key_len = data.draw(sizes), data.draw(sizes)

    def draw():
        bounds = st.lists(st.integers(0, key_len), min_size=query_len, max_size=query_len)
        start, end = (torch.tensor([data.draw(bounds)], dtype=torch.int32) for _ in range(2))
        spans = Spans(start, end, query_len, key_len)
        if data.draw(st.booleans()):
            shown = st.lists(st.booleans(), min_size=key_len, max_size=key_len)
            spans = spans & Spans.padded(torch.tensor([data.draw(shown)]), query_len)
        return spans

    left, right = draw(), draw()
    assert_spans(left & right, left.to_dense() & right.to_dense())
    union = left.to_dense() | right.to_dense()
    if left.key_mask is not None or right.key_mask is not None:
        with pytest.raises(ValueError, match="padding in the middle"):
            left | right
    elif Spans.from_dense(union) is None:
        with pytest.raises(ValueError, match="leaves a gap"):
            left | right
    else:
        assert_spans(left | right, union)
        assert_spans(Spans.from_dense(union), union)


@pytest.mark.parametrize("combine", [Spans.__and__, Spans.__or__, Spans.union_touching])
def test_spans_that_do_not_fit_each_other(combine):
    first = torch.zeros(3, 4, dtype=torch.int32)
    two, three = (Spans(first[:batch], first[:batch] + 5, 4, 5) for batch in (2, 3))
    with pytest.raises(ValueError, match="spans of 2 samples with those of 3; build both for the same batch, or one"):
        combine(two, three)
    with pytest.raises(ValueError, match="4 x 5 with 4 x 6; build both for the same lengths"):
        combine(two, Spans.full(4, 6))
    assert combine(two, Spans.full(4, 5)).batch == combine(Spans.full(4, 5), two).batch == 2


@given(st.data())
def test_cut(data):
    query_len, key_len = data.draw(sizes), data.draw(sizes)
    spans = Spans.sliding(query_len, key_len, left=data.draw(st.none() | st.integers(0, 9)), offset=data.draw(offsets))
    if data.draw(st.booleans()):
        spans = spans & Spans.padded(torch.rand(2, key_len, generator=torch.manual_seed(key_len)) > 0.3, query_len)
    rows, keys = (
        slice(*sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2))))
        for size in (query_len, key_len)
    )
    cut = spans.cut(rows, keys)
    expected = spans.to_dense()[:, rows, keys]
    assert torch.equal(cut.to_dense().expand(expected.shape), expected)  # what sequences share may be stated once
    if cut.key_mask is not None:
        again = Spans.padded(cut.key_mask, cut.query_len)
        assert torch.equal(cut.gap_count, again.gap_count)


def test_cut_takes_consecutive_rows_and_keys():
    with pytest.raises(ValueError, match="step 1"):
        Spans.causal(8).cut(slice(0, 8, 2), slice(None))


@given(st.data())
@settings(max_examples=60)
def test_tile_bounds(data):
    query_len, key_len = data.draw(sizes), data.draw(sizes)
    block_m = data.draw(st.sampled_from([1, 4, 16]))
    bounds = torch.randint(0, key_len + 1, (2, 2, query_len), dtype=torch.int32, generator=torch.manual_seed(query_len))
    spans = Spans(bounds[0], bounds[1], query_len, key_len)
    dense = spans.to_dense()
    found = spans.tile_bounds(block_m)
    for batch in range(2):
        for tile, rows in enumerate(dense[batch].split(block_m)):
            first, body_first, body_last, last = (int(bound[batch, tile]) for bound in found)
            assert first <= body_first <= body_last <= last
            assert not rows[:, :first].any()
            assert not rows[:, last:].any()
            assert rows[:, body_first:body_last].all()
            if rows.any():
                assert rows[:, first].any()
                assert rows[:, last - 1].any()


def test_left_padding_shares_its_ends():
    """What 32,768 left-padded causal tokens of eight sequences cost: one row of ends and eight starts."""
    mask = torch.arange(32768)[None] >= torch.arange(8)[:, None]
    spans = Spans.causal(32768) & Spans.padded(mask, 32768)
    assert spans.nbytes == 4 * (32768 + 8)


def test_picture():
    lines = str(Spans.causal(4)).splitlines()
    assert lines[0] == "Spans(batch=1, query_len=4, key_len=4)"
    assert lines[1:] == ["#...", "##..", "###.", "####"]
    large = str(Spans.causal(100_000) & Spans.packed_lengths([50_000, 50_000])).splitlines()
    assert len(large) == 25
    assert {len(line) for line in large[1:]} == {48}
    assert large[1][-1] == "." and large[-1][0] == "." and "#" in large[-1]


def test_visible_pairs():
    assert Spans.causal(5).visible_pairs() == 15
    assert Spans.packed_lengths([2, 3]).visible_pairs() == 13


def test_to_moves_every_part():
    spans = Spans.padded(torch.tensor([[True, False, True]]), 2)
    moved = spans.to("meta")
    assert {part.device.type for part in (moved.start, moved.end, moved.key_mask, moved.gap_count)} == {"meta"}
