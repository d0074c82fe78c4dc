# SPDX-License-Identifier: Apache-2.0
"""The torch path: how rows are cut into pieces, gradients, memory, and that no path falls back in silence."""

from __future__ import annotations

import logging
import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_kernels import Spans, attention, attention_reference, blockwise, paths
from attention_kernels.blockwise.pieces import TILE_ROWS, Piece
from attention_kernels.blockwise.plan import Sharing, _recent_plans, plan_batch, plan_few_rows, plan_rows
from attention_kernels.paths import interpreting

import helpers
from helpers import DTYPES, Problem, assert_gradients_within_bound, assert_within_bound, random_spans, tensor

KERNELS = Path(blockwise.__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    """The torch path is that of CPU tensors, also where there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "DEVICE", "cpu")
        yield


def drawn_area(pieces, query_len, key_len):
    """Which (row, key) pairs the pieces compute, and that no pair is computed twice."""
    area = torch.zeros(query_len, key_len, dtype=torch.int32)
    for piece in [each for repeated in pieces for each in repeated.each()]:
        part, (rows, keys) = area[piece.rows, piece.keys], piece.shape
        assert part.shape == piece.shape
        whole = torch.ones_like(part)
        shapes = {"causal": whole.tril(keys - rows), "band": whole.tril(keys - rows).triu()}
        part += shapes.get(piece.kind, whole)
    assert area.numel() == 0 or int(area.max()) <= 1
    return area.bool()


@given(st.integers(0, 10_000))
def test_pieces_cover_what_is_visible(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    query_len = draw.choice([1, 7, 65, 200, 600])
    key_len = draw.choice([query_len, 3, 300])
    spans = random_spans(draw, 1, query_len, key_len).to("cpu")
    start, end = (bound.expand(1, query_len)[0] for bound in (spans.start, spans.end))
    pieces = plan_rows(start, end)
    area = drawn_area(pieces, query_len, key_len)
    visible = Spans(spans.start, spans.end, query_len, key_len).to_dense()[0]
    assert not (visible & ~area).any()
    unmasked = drawn_area([piece for piece in pieces if piece.kind != "masked"], query_len, key_len)
    assert not (unmasked & ~visible).any()


@pytest.mark.parametrize("smallest", [192, 384])
@pytest.mark.parametrize("rows", [100, 383, 384, 767, 1025, 2048, 3000, 6144])
def test_triangles_are_halved(rows, smallest, monkeypatch):
    monkeypatch.setattr(blockwise.pieces, "SMALLEST_HALF", smallest)
    monkeypatch.setattr(blockwise.pieces, "LARGEST_HALVED", 6144)
    plan = plan_batch(*bounds_of(Spans.causal(rows, rows + 10)), 1, rows, tiles_only=False)
    ((whole,), (halved,)) = ([group.pieces for group in groups] for groups in (plan.groups, plan.halved))
    assert torch.equal(drawn_area(whole, rows, rows + 10), drawn_area(halved, rows, rows + 10))
    single = [each for piece in halved for each in piece.each()]
    triangles = [piece.shape[0] for piece in single if piece.kind == "causal" and piece.shape[0] == piece.shape[1]]
    assert max(triangles) < 2 * smallest
    assert len(triangles) == 1 or min(triangles) >= smallest
    seen: list[range] = []
    for piece in single:  # what follows finds all of its rows there
        own = range(piece.rows.start, piece.rows.stop)
        assert piece.follows == any(row in earlier for earlier in seen for row in (own[0], own[-1]))
        seen.append(own)


@pytest.mark.parametrize(
    "spans",
    [Spans.causal(4096), Spans.causal(2048), Spans.packed_lengths([1000, 600, 448]) & Spans.causal(2048)],
    ids=["4096", "2048", "packed"],
)
def test_triangles_that_are_not_worth_more_calls_stay_whole(spans):
    plan = plan_batch(*bounds_of(spans), 1, spans.query_len, tiles_only=False)
    assert plan.halved == plan.groups
    triangles = [piece for piece in plan.groups[0].pieces if piece.kind == "causal"]
    assert not any(blockwise.fused.takes_strips(piece, torch.empty(1, 8, piece.shape[0], 64)) for piece in triangles)


@pytest.mark.parametrize("before", [0, 700])
def test_lone_triangles_are_marked(before):
    """The rows of a prompt beside whatever was there before it, and of one that was padded left."""
    padded = Spans.causal(900) & Spans.padded(torch.arange(900)[None] >= 100, 900)
    for spans in (Spans.causal(900, 900 + before), padded):
        plan = plan_batch(*bounds_of(spans), 1, 900, tiles_only=False)
        assert [piece.lone for piece in plan.groups[0].pieces if piece.kind == "causal"] == [True]


@pytest.mark.parametrize(("rows", "window"), [(192, 5), (1000, 1), (1000, 70), (700, 640), (4000, 3500)])
@pytest.mark.parametrize("cut", ["in_tiles", "halved"])
def test_bands_are_cut_into_tiles_that_share_a_call(rows, window, cut):
    spans = Spans.sliding(rows, rows + window - 1, left=window - 1, offset=window - 1)
    plan = plan_batch(*bounds_of(spans), 1, rows, tiles_only=False)
    ((whole,), (tiles,), (masked,)) = (
        [group.pieces for group in groups] for groups in (plan.groups, getattr(plan, cut), plan.masked)
    )
    assert [piece.kind for piece in whole] == ["band"]
    assert len(tiles) <= 2 and tiles[0].times > 1
    size = (spans.query_len, spans.key_len)
    for pieces in (whole, tiles):
        assert torch.equal(drawn_area(pieces, *size), spans.to_dense()[0])
    assert not (spans.to_dense()[0] & ~drawn_area(masked, *size)).any()


def test_few_rows_of_a_band_are_one_masked_tile():
    (group,) = plan_batch(*bounds_of(Spans.sliding(190, left=5)), 1, 190, tiles_only=False).groups
    assert [piece.kind for piece in group.pieces] == ["masked"]


def bounds_of(spans):
    return spans.start, spans.end


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(dtype, wide) for dtype in [*DTYPES, torch.float64] for wide in (False, True) if dtype.itemsize == 2 or not wide],
)
@pytest.mark.parametrize("tokens", [255, 256, 500, 767, 768, 1152, 1153])
@pytest.mark.parametrize("kind", ["causal", "cached", "padded", "packed", "windowed"])
def test_triangles_of_all_sizes(dtype, wide, tokens, kind, monkeypatch):
    """In strips, halved, or whole: beside other keys, of fewer key heads, with values of fewer columns, with sinks."""
    torch.manual_seed(tokens)
    monkeypatch.setattr(blockwise.processor, "MULTIPLIES_16_BITS", not wide)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # which decides whether there are strips
    monkeypatch.setattr(blockwise.fused, "FEWEST_STRIP_NUMBERS", 0)
    key_len = tokens + 70 if kind == "cached" else tokens
    spans = Spans.causal(tokens, key_len)
    if kind == "padded":
        spans = spans & Spans.padded(torch.arange(tokens) >= torch.tensor([[30], [0]]), tokens)
    if kind == "packed":
        spans = spans & Spans.packed_lengths([tokens - 90, 90])
    if kind == "windowed":
        spans = Spans.sliding(tokens, left=300)
    query, key = torch.randn(2, tokens, 4, 24).transpose(1, 2).to(dtype), torch.randn(2, 2, key_len, 24).to(dtype)
    value, sinks = torch.randn(2, 2, key_len, 16).to(dtype), torch.randn(4)
    strips, in_strips = [], blockwise.fused.strips
    monkeypatch.setattr(blockwise.fused, "strips", lambda *given: strips.append(given) or in_strips(*given))
    output, lse = attention(query, key, value, spans, sinks=sinks, return_lse=True)
    mask = spans.to_dense()[:, None]
    exact, exact_lse = attention_reference(query, key, value, mask=mask, sinks=sinks)
    if dtype == torch.float64:
        torch.testing.assert_close(output, exact)
    else:
        eager, _ = attention_reference(query, key, value, mask=mask, sinks=sinks, dtype=dtype)
        assert_within_bound(output, eager, exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)
    if kind in ("causal", "cached", "packed") and not interpreting():
        assert bool(strips) == (kind != "packed" and 256 <= tokens <= 1152 and (wide or dtype.itemsize > 2))


@pytest.mark.parametrize("fewest", [0, 4 * 450 * 24, 4 * 450 * 24 + 1])
def test_strips_take_enough_queries(fewest, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(blockwise.fused, "FEWEST_STRIP_NUMBERS", fewest)
    piece = Piece(slice(0, 450), slice(0, 450), "causal", lone=True)
    for batch in (1, 3):  # a sequence's bits do not depend on its neighbours
        assert blockwise.fused.takes_strips(piece, torch.empty(batch, 4, 450, 24)) == (fewest <= 4 * 450 * 24)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("window", [None, 100])
def test_heads_with_keys_of_their_own(amx, window, monkeypatch):
    """Their triangles are not halved on processors with AMX."""
    torch.manual_seed(0)
    monkeypatch.setattr(blockwise.processor, "AMX", amx)
    monkeypatch.setattr(blockwise.pieces, "LARGEST_HALVED", 1200)  # more than strips are worth their calls for
    query, key, value = (torch.randn(1, 4, 1200, 24) for _ in range(3))
    left = None if window is None else window - 1
    problem = Problem(query, key, value, Spans.sliding(1200, left=left))
    rows = captured_rows(monkeypatch)
    problem.check()
    if window is None and not interpreting():
        assert (rows == [1200]) == amx


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (8, 2), (8, 1)])
@pytest.mark.parametrize(
    "spans",
    [Spans.causal(800), Spans.sliding(800, left=99), Spans.chunked(600, 700, chunk_size=30, offset=100)],
    ids=["halves", "band", "tiles"],
)
def test_a_sequence_has_the_same_bits_in_any_batch(dtype, threads, num_heads, num_kv_heads, spans, monkeypatch):
    """Whether its own tiles share calls or those of all sequences do."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query, key, value = (
        torch.randn(20, tokens, heads, dim).transpose(1, 2).to(dtype)
        for tokens, heads, dim in (
            (spans.query_len, num_heads, 24),
            (spans.key_len, num_kv_heads, 24),
            (spans.key_len, num_kv_heads, 16),
        )
    )
    alone, alone_lse = attention(query[:1], key[:1], value[:1], spans, return_lse=True)
    for batch in (3, 20):
        output, lse = attention(query[:batch], key[:batch], value[:batch], spans, return_lse=True)
        assert torch.equal(output[:1], alone) and torch.equal(lse[:1], alone_lse)


@pytest.mark.skipif(interpreting(), reason="of the torch path, whose output is that of float32 to the last bits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["fused", "written out"])
def test_what_rounding_took_is_kept_for_gradients(dtype, options):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 300, 32).to(dtype).requires_grad_() for _ in range(3))
    output = attention(query, key, value, Spans.causal(300), **options)
    exact, _ = attention_reference(query, key, value, mask=Spans.causal(300).to_dense()[:, None], **options)
    rounding = output.grad_fn.saved_tensors[2]
    if dtype == torch.float32:
        assert rounding.numel() == 0
        return
    assert rounding.dtype == dtype and rounding.stride() == output.stride()
    lost = (output.double() - exact).norm()
    assert (output.double() + rounding.double() - exact).norm() < lost / 100
    with torch.no_grad():
        assert attention(query, key, value, Spans.causal(300), **options).dtype == dtype


@pytest.mark.parametrize("tokens", [500, 1000])
def test_hidden_values_do_not_leak_from_triangles(tokens):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, tokens, 16) for _ in range(3))
    expected = attention(query, key, value, Spans.causal(tokens))
    for poison in (float("nan"), float("inf")):
        for place in (70, tokens // 2, tokens - 1):
            poisoned = value.clone()
            poisoned[:, :, place] = poison
            output = attention(query, key, poisoned, Spans.causal(tokens))
            torch.testing.assert_close(output[:, :, :place], expected[:, :, :place])
            assert not output[:, :, place:].isfinite().any()


@pytest.mark.parametrize(("threads", "heads", "expected"), [(1, 1, True), (2, 1, True), (4, 1, False), (4, 17, True)])
def test_strips_are_for_heads_that_keep_all_threads_busy(threads, heads, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert blockwise.fused.fill_threads(heads) == expected


@pytest.mark.parametrize(
    ("spans", "waste"),
    [
        (Spans.causal(4096), 1.0),
        (Spans.causal(4096) & Spans.packed_lengths([512] * 8), 1.0),
        (Spans.causal(4096) & Spans.padded((torch.arange(4096) >= 2048)[None], 4096), 1.0),
        (Spans.causal(1024, 4096), 1.0),
        (Spans.sliding(4096, left=511), 1.5),
    ],
)
def test_work_is_skipped(spans, waste):
    start, end = (bound.expand(1, spans.query_len)[0] for bound in (spans.start, spans.end))
    area = drawn_area(plan_rows(start, end), spans.query_len, spans.key_len)
    assert area.sum() <= waste * spans.visible_pairs()


@given(st.integers(0, 10_000))
def test_neighbours_are_cut_apart_where_it_spares_enough(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, query_len, key_len = draw.choice([1, 2, 7, 16]), draw.choice([1, 3, 16]), 400
    start = torch.randint(0, key_len, (batch, query_len), dtype=torch.int32)
    end = start + torch.randint(-20, key_len, start.shape, dtype=torch.int32)
    end = end.clamp(max=key_len)
    sharing = Sharing(heads=draw.choice([1, 3, 8]), threads=draw.choice([1, 2, 4]), worth=draw.choice([0, 50, 10_000]))
    groups = list(plan_few_rows(start, end, batch, sharing))
    assert [index for group in groups for index in range(group.elements.start, group.elements.stop)] == [*range(batch)]
    computed = 0
    for elements, pieces, _ in groups:
        visible = Spans(start[elements], end[elements], query_len, key_len).to_dense()
        area = torch.zeros_like(visible)
        for piece in pieces:
            area[:, piece.rows, piece.keys] = True
            assert piece.blind or visible[:, piece.rows].any(-1).all()
            assert piece.kind == "masked" or visible[:, piece.rows, piece.keys].all()
            of_a_thread = math.ceil((elements.stop - elements.start) * sharing.heads / sharing.threads)
            computed += of_a_thread * (piece.keys.stop - piece.keys.start)
        assert not (visible & ~area).any()
    if groups[1:]:
        unwilling = sharing._replace(worth=1 << 30)
        ((whole,),) = [group.pieces for group in plan_few_rows(start, end, batch, unwilling)]
        together = math.ceil(batch * sharing.heads / sharing.threads) * (whole.keys.stop - whole.keys.start)
        assert computed + (len(groups) - 1) * sharing.worth < together


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("num_kv_heads", "sinks"), [(1, None), (2, "sinks"), (8, None)])
def test_decoding_over_uneven_padding(dtype, threads, num_kv_heads, sinks, monkeypatch):
    """Some sequences are computed together and some are not; what is padded or not filled yet may hold anything."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(blockwise.problem, "CALL_NUMBERS", 1 << 12)
    torch.manual_seed(0)
    pads, filled = torch.tensor([0, 3, 250, 130, 131, 299]), 300
    shown = torch.arange(400) >= pads[:, None]
    spans = Spans.causal(1, 400, offset=filled - 1) & Spans.padded(shown, 1)
    query = torch.randn(6, 8, 1, 32).to(dtype)
    key, value = (torch.randn(6, num_kv_heads, 400, 32).to(dtype) for _ in range(2))
    inputs = {"query": query, "key": key, "value": value, "sinks": None if sinks is None else torch.randn(8).to(dtype)}
    hidden = ~spans.to_dense()[:, 0, None, :, None].expand_as(key)
    with torch.no_grad():
        for _ in range(2):  # the second time with what was remembered
            output, lse = attention(**inputs, spans=spans, return_lse=True)
            exact, exact_lse = attention_reference(**inputs, mask=spans.to_dense()[:, None])
            eager, _ = attention_reference(**inputs, mask=spans.to_dense()[:, None], dtype=dtype)
            bound = 2 * (eager.double() - exact).norm() + 3e-7 * exact.norm()
            assert (output.double() - exact).norm() <= bound
            tolerance = 1e-12 if dtype == torch.float64 else 2e-5 if dtype == torch.float32 else 1e-4
            torch.testing.assert_close(lse.double(), exact_lse.double(), rtol=tolerance, atol=tolerance)
            assert output.transpose(1, 2).is_contiguous()
        inputs |= {name: inputs[name].masked_fill(hidden, torch.nan) for name in ("key", "value")}
        assert (attention(**inputs, spans=spans).double() - exact).norm() <= bound


def captured_rows(monkeypatch):
    """How many rows each call of torch's fused attention has from now on."""
    rows, fused = [], torch._scaled_dot_product_flash_attention_for_cpu

    def counted(query, *arguments, **keywords):
        rows.append(query.shape[2])
        return fused(query, *arguments, **keywords)

    monkeypatch.setattr(torch, "_scaled_dot_product_flash_attention_for_cpu", counted)
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, (2, 1, 600, 700), (1, 8, 600, 700)], ids=["spans", "shared", "by head"])
def test_heads_of_a_group_as_rows_of_one(dtype, mask, monkeypatch):
    torch.manual_seed(0)
    rows = captured_rows(monkeypatch)
    problem = Problem(
        query=tensor(2, 8, 600, 32, dtype=dtype),
        key=tensor(2, 2, 700, 32, dtype=dtype),
        value=tensor(2, 2, 700, 48, dtype=dtype),
        spans=Spans.chunked(600, 700, chunk_size=30, offset=100),  # too small for pieces without masks
        mask=None if mask is None else torch.rand(mask) < 0.7,
    )
    problem.check()
    by_head = mask is not None and mask[1] > 1
    assert max(rows) == TILE_ROWS if by_head else max(rows) >= blockwise.fused.LARGE_STEP_ROWS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 8])
def test_a_bias_alone_takes_one_call(dtype, heads, monkeypatch):
    torch.manual_seed(0)
    rows = captured_rows(monkeypatch)
    bias = torch.randn(1, heads, 600, 700).to(dtype)
    bias[:, :, ::7] = -torch.inf  # rows that see nothing
    bias[..., 11] = -torch.inf
    problem = Problem(
        query=tensor(2, 8, 600, 32, dtype=dtype),
        key=tensor(2, 2, 700, 32, dtype=dtype),
        value=tensor(2, 2, 700, 32, dtype=dtype),
        spans=Spans.full(600, 700),
        bias=bias,
    )
    problem.check()
    assert rows == [600 if heads > 1 else 2400]
    output, lse = problem.run()
    assert (output[:, :, ::7] == 0).all() and (lse[:, :, ::7] == -torch.inf).all()


def larger_problem(seed):
    """8 heads x 700 tokens: beyond what is written out whatever the dtype."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice(DTYPES)
    key_len, dim, num_kv_heads = draw.choice([700, 300]), draw.choice([32, 64, 80]), draw.choice([8, 2])
    return Problem(
        query=tensor(1, 8, 700, dim, dtype=dtype),
        key=tensor(1, num_kv_heads, key_len, dim, dtype=dtype),
        value=tensor(1, num_kv_heads, key_len, dim, dtype=dtype),
        spans=random_spans(draw, 1, 700, key_len),
        bias=torch.randn(1, draw.choice([1, 8]), draw.choice([1, 700]), key_len).to(dtype) if seed % 3 == 0 else None,
        sinks=torch.randn(8) if seed % 2 == 0 else None,
        scale=draw.choice([None, 1.0, -0.3]),
        softcap=draw.choice([None, None, 30.0]),
    )


@pytest.mark.parametrize("seed", range(12))
def test_gradients_of_larger_problems(seed):
    assert_gradients_within_bound(larger_problem(seed))


@pytest.mark.parametrize("tokens", [40, 300])
@pytest.mark.parametrize("wanted", [("query",), ("key",), ("value",), ("bias",), ("sinks",), ("query", "sinks")])
def test_single_gradients(wanted, tokens):
    """What is not wanted is not computed, and the rest is what it is among all."""
    torch.manual_seed(0)
    inputs = {name: torch.randn(1, 4, tokens, 16) for name in ("query", "key", "value")}
    inputs |= {"bias": torch.randn(1, 4, 1, tokens), "sinks": torch.randn(4)}

    def gradients(names):
        leaves = {name: each.detach().requires_grad_(name in names) for name, each in inputs.items()}
        output = attention(**leaves, spans=Spans.causal(tokens))
        return dict(zip(names, torch.autograd.grad(output.square().sum(), [leaves[n] for n in names]), strict=True))

    everything = gradients(tuple(inputs))
    for name, gradient in gradients(wanted).items():
        torch.testing.assert_close(gradient, everything[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("spans", [Spans.causal(15), Spans.causal(101), Spans.causal(200, 215), Spans.full(1, 77)])
def test_bits_of_merges_and_sinks_do_not_depend_on_neighbours(dtype, spans):
    """Functions of torch compute what is left over after a processor's whole vectors in another way."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 5, tokens, 8).to(dtype) for tokens in (spans.query_len, *[spans.key_len] * 2))
    sinks = torch.randn(5)
    whole = attention(query, key, value, spans, sinks=sinks, return_lse=True)
    for index in range(3):
        one = (each[index : index + 1] for each in (query, key, value))
        alone = attention(*one, spans, sinks=sinks, return_lse=True)
        assert all(torch.equal(a, b[index : index + 1]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bits_do_not_depend_on_neighbours(dtype, softcap):
    """A padded sequence alone and in a batch: the same output and gradients, bit for bit."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 8, 300, 32).to(dtype) for _ in range(3))
    shown = torch.arange(300) >= torch.tensor([[50], [7]])
    whole = gradients_of_sum(query, key, value, Spans.causal(300) & Spans.padded(shown, 300), softcap=softcap)
    for index in range(2):
        spans = Spans.causal(300) & Spans.padded(shown[index : index + 1], 300)
        parts = [each[index : index + 1] for each in (query, key, value)]
        alone = gradients_of_sum(*parts, spans, softcap=softcap)
        assert all(torch.equal(one, other[index : index + 1]) for one, other in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("query_len", [1, 7])
@pytest.mark.parametrize("padding", ["left", "holes"])
@pytest.mark.parametrize("trains", [False, True], ids=["decodes", "trains"])
def test_with_fixed_splits_a_padded_sequence_does_not_depend_on_its_neighbours(
    dtype, query_len, padding, trains, monkeypatch
):
    """Decoding shares calls between sequences otherwise, and takes two products for many keys of the whole batch."""
    torch.manual_seed(0)
    monkeypatch.setattr(blockwise.tokens, "CACHED_BYTES", 2 * 2 * 50 * 48 * 4)  # more than one sequence has
    query = torch.randn(3, 6, query_len, 24).to(dtype).requires_grad_(trains)
    key, value = torch.randn(2, 3, 2, 50, 24).to(dtype)
    shown = torch.arange(50) >= torch.tensor([[0], [3], [20]]) if padding == "left" else torch.rand(3, 50) > 0.3

    def results(some):
        spans = Spans.causal(query_len, 50) & Spans.padded(shown[some], query_len)
        num_splits = None if trains else 2
        return attention(query[some], key[some], value[some], spans, num_splits=num_splits, return_lse=True)

    whole = results(slice(0, 3))
    for index in range(3):
        one = slice(index, index + 1)
        assert all(torch.equal(alone, together[one]) for alone, together in zip(results(one), whole, strict=True))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    torch.manual_seed(0)
    query = torch.randn(1, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, 2, 6, 3, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, 2, 6, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 4, 1, 6, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    spans = Spans.sliding(4, 6, left=3)

    def both(query, key, value, bias, sinks):
        return attention(query, key, value, spans, bias=bias, sinks=sinks, softcap=softcap, return_lse=True)

    assert torch.autograd.gradcheck(both, (query, key, value, bias, sinks))


def test_threads_share_what_is_remembered():
    """Plans, masks of tiles and decoding calls, while threads take turns as often as Python lets them."""
    torch.manual_seed(0)
    shown = torch.arange(300) >= torch.tensor([[0], [20], [100], [250]])
    kinds = [
        lambda: Spans.causal(1, 300) & Spans.padded(shown, 1),
        lambda: Spans.sliding(300, left=60),
        lambda: Spans.causal(300) & Spans.padded(shown, 300),
    ]
    shared = [kind() for kind in kinds]
    query, key, value = torch.randn(4, 4, 300, 16), torch.randn(4, 2, 300, 16), torch.randn(4, 2, 300, 16)
    expected = [attention(query[:, :, -spans.query_len :], key, value, spans) for spans in shared]

    def work(seed):
        draw = random.Random(seed)
        for _ in range(40):
            which = draw.randrange(len(kinds))
            spans = shared[which] if draw.random() < 0.5 else kinds[which]()
            if draw.random() < 0.1:
                _recent_plans.clear()
            output = attention(query[:, :, -spans.query_len :], key, value, spans)
            torch.testing.assert_close(output, expected[which])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)


def test_spans_are_reused_between_dtypes():
    """Plans and masks are remembered by the identity of the spans; a call of another dtype needs a mask of its own."""
    torch.manual_seed(0)
    spans = Spans.sliding(100, left=7)
    mask = spans.to_dense()[:, None]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float64):
        query, key, value = (torch.randn(1, 2, 100, 16, dtype=dtype) for _ in range(3))
        for softcap in (None, 2.0):
            output = attention(query, key, value, spans, softcap=softcap)
            exact, _ = attention_reference(query, key, value, mask=mask, softcap=softcap)
            assert (output.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm() + 1e-12


@pytest.mark.parametrize("query_len", [1, 100])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("start", "end"), [(0, 51), (-1, 50)])
def test_keys_that_are_not_there_are_not_read(query_len, softcap, start, end):
    """Of a cache that is sliced, others lie behind. Bounds of rows that see nothing may be anything."""
    query, *cache = (torch.randn(1, 2, tokens, 16) for tokens in (query_len, 100, 100))
    key, value = (each[:, :, :50] for each in cache)
    bounds = torch.zeros(2, 1, query_len, dtype=torch.int32)
    spans = Spans(*bounds, query_len, 50)
    spans.end.fill_(50)
    attention(query, key, value, spans, softcap=softcap)
    spans.start[:, -1], spans.end[:, -1] = 70, 60
    attention(query, key, value, spans, softcap=softcap)
    spans.start[:, -1], spans.end[:, -1] = start, end
    words = f"`spans` must lie within the 50 keys .* from {start} to {end}; clamp"
    with pytest.raises(ValueError, match=words):
        attention(query, key, value, spans, softcap=softcap)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("query_len", [1, 100])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_spans_changed_in_place_are_planned_anew(inference, query_len, softcap):
    """Torch counts changes of spans, but not of those that were made in inference mode."""
    with torch.inference_mode(inference):
        torch.manual_seed(0)
        query, key, value = (torch.randn(1, 2, tokens, 16) for tokens in (query_len, 100, 100))
        spans = Spans.sliding(query_len, 100, left=7)
        spans = replace(spans, start=spans.start.clone(), end=spans.end.clone())
        for last in (100, 50, 97):
            spans.end.clamp_(max=last) if query_len > 1 else spans.end.fill_(last)
            exact, _ = attention_reference(query, key, value, mask=spans.to_dense()[:, None], softcap=softcap)
            output = attention(query, key, value, spans, softcap=softcap)
            torch.testing.assert_close(output, exact.float(), rtol=1e-5, atol=1e-5)


def gradients_of_sum(query, key, value, spans, **arguments):
    tensors = [each.detach().clone().requires_grad_() for each in (query, key, value)]
    output = attention(*tensors, spans, **arguments)
    return torch.autograd.grad((output * output).sum(), tensors)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_registered_operators_pass_opcheck(dropout_p):
    query, key, value = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    spans, seed = Spans.causal(9), torch.tensor([3]) if dropout_p else None
    arguments = (query, key, value, spans.start, spans.end, None, None, None, None, None, seed, 0.3, None, dropout_p)
    torch.library.opcheck(torch.ops.attention_kernels.forward.default, (*arguments, True, None))


@pytest.fixture
def growth_of_peak():
    if not os.path.exists("/proc/self/status"):
        pytest.skip("reads the peak from Linux's /proc")
    return _growth_of_peak


def _growth_of_peak(run):
    """KiB by which the peak memory of a process grows when `run`, code, is run with 8,192 tokens after 512."""
    code = f"""
import torch
from attention_kernels import Spans, attention
torch.set_num_threads(1)
def peak():  # getrusage would count what pytest held when it started this process
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def run(tokens):
    query, key, value = (torch.randn(1, 4, tokens, 64) for _ in range(3))
    spans = Spans.sliding(tokens, left=255) & Spans.padded((torch.arange(tokens) >= 100)[None], tokens)
    {run}
run(512)
before = peak()
run(8192)
print(peak() - before)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(result.stdout)


def test_memory_grows_with_tokens(growth_of_peak):
    """The peak of a sliding-window forward over 8,192 tokens stays below what one dense boolean mask would take."""
    # Query, key, value and output take 32 MB; a dense boolean mask alone would take 64 MB, its float form 256 MB.
    assert growth_of_peak("attention(query, key, value, spans)") < 56 * 1024


@pytest.mark.parametrize(
    "arguments", ["", "softcap=30.0", "dropout_p=0.1", "dropout_p=0.1, softcap=30.0, sinks=torch.zeros(4)"]
)
def test_memory_of_training_grows_with_tokens(growth_of_peak, arguments):
    run = f"""
    for each in (query, key, value): each.requires_grad_()
    output = attention(query, key, value, spans, {arguments})
    torch.autograd.grad(output, (query, key, value), torch.randn_like(output))
"""
    # Query, key, value, output and their gradients take 64 MB; what comes on top stays below a dense boolean mask.
    assert growth_of_peak(run) < 96 * 1024


def test_other_paths_are_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(paths, "interpreting", lambda: True)
    paths.log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            attention(*(torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(3)))
    assert [record.message for record in caplog.records if "float64" in record.message] == [
        "float64 runs attention in torch: the Triton kernels are for float16, bfloat16 and float32"
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["as it is", "wide"])
def test_long_16_bit_operands_are_widened_where_that_is_faster(dtype, wide, monkeypatch):
    monkeypatch.setattr(blockwise.processor, "MULTIPLIES_16_BITS", not wide)
    torch.manual_seed(0)
    query, key, value = (tensor(2, heads, 600, 24, dtype=dtype, layout="tokens") for heads in (4, 2, 2))
    spans = Spans.causal(600)
    Problem(query, key, value, spans).check()

    def as_multiplied(rows=600, batch=2, bias=None):
        given = (
            query[:, :, :rows],
            *(each[:1].expand(batch, -1, -1, -1) if batch > 2 else each for each in (key, value)),
        )
        problem = blockwise.Problem(*given, spans.start, spans.end, None, None, bias, None, None, 1.0, None, 0.0)
        with blockwise.fused.as_multiplied(problem) as changed:
            return changed.key.dtype, changed.key.is_contiguous()

    affected = wide and dtype != torch.float32
    assert as_multiplied() == ((torch.float32, True) if affected else (dtype, False))
    assert as_multiplied(bias=tensor(1, 1, 600, 600)) == (dtype, affected)
    assert as_multiplied(rows=500) == (dtype, False), "few rows read keys few times"
    assert as_multiplied(batch=3) == (dtype, False), "shared keys are not multiplied"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("key_len", [40, 300, 1400])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("window", [None, 200])
def test_what_rows_do_not_see_is_not_in_them(dtype, key_len, poison, where, window):
    """Looked for in the output, or in values and the log-sum-exp, whichever have fewer numbers."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, n, 32).to(dtype) for heads, n in ((4, 300), (2, key_len), (2, key_len)))
    spans = Spans.sliding(300, key_len, left=window, offset=0)
    clean = attention(query, key, value, spans)
    {"key": key, "value": value}[where][:, :, 20] = poison
    output = attention(query, key, value, spans)
    sees = spans.to_dense()[0, :, 20]
    # The careful loop rounds otherwise.
    tolerance = {"rtol": 1e-2, "atol": 2e-3} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(output[:, :, ~sees], clean[:, :, ~sees], **tolerance)
    assert not math.isnan(poison) or output[:, :, sees].isnan().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("keys", [1, 3, 8, 15, 16, 17])
@pytest.mark.parametrize("rows", [1, 3, 90])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_in_all_that_a_row_sees_is_in_the_row(dtype, keys, rows, softcap):
    """In a query, or in the keys before all new ones. Torch's fused attention finds none among fewer than a vector."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, tokens, 16).to(dtype) for tokens in (rows, keys, keys))
    query[0, 0, 0] = math.nan
    zero = query[1, 0, 0].zero_()  # its scores are 0, and so is the log-sum-exp of one key
    for _ in range(2):
        output, lse = attention(query, key, value, Spans.full(rows, keys), softcap=softcap, return_lse=True)
        assert output[0, 0, 0].isnan().all() and lse[0, 0, 0].isnan()
        assert int(output.isnan().sum()) == zero.numel()
        torch.testing.assert_close(output[1, 0, 0], value[1, 0].mean(0), rtol=2e-2, atol=2e-2)
    key, value = (torch.cat([each, torch.randn(2, 2, rows, 16).to(dtype)], dim=2) for each in (key, value))
    key[0, :, :keys] = math.nan
    output = attention(query, key, value, Spans.causal(rows, keys + rows), softcap=softcap)
    assert output[0].isnan().all() and not output[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 90])
@pytest.mark.parametrize("spans", [Spans.full, Spans.causal])
def test_an_infinite_score_makes_nan_of_its_row(dtype, rows, spans):
    """Inf over Inf. In 16 bits torch's fused attention makes 0 of it."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, tokens, 16).to(dtype) for tokens in (rows, 200, 200))
    key[0, 0, 40, 3] = math.inf
    for _ in range(2):
        output = attention(query, key, value, spans(rows, 200))
        assert torch.equal(output[0, 0].isnan().any(-1), query[0, 0, :, 3] > 0)
        assert not output[0, 1].isnan().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [40, 400])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_blind_rows_hold_reaches_no_gradient(poison, tokens, softcap):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, tokens, 16) for _ in range(3))
    grad, spans = torch.randn(1, 4, tokens, 16), Spans.causal(tokens)
    spans = replace(spans, start=spans.start.expand(1, tokens).clone(), end=spans.end.clone())
    spans.start[:, 7], spans.end[:, 7] = 0, 0

    def gradients():
        leaves = [each.clone().requires_grad_() for each in (query, key, value)]
        return torch.autograd.grad(attention(*leaves, spans, softcap=softcap), leaves, grad)

    clean = gradients()
    query[:, :, 7] = grad[:, :, 7] = poison
    for actual, expected in zip(gradients(), clean, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [("query",), ("key", "value"), ("query", "key", "value")])
@pytest.mark.parametrize("tokens", [40, 400])
def test_a_hidden_key_without_bound_reaches_no_gradient(tokens, wanted):
    """Its scores are -Inf in all rows, as is right: no NaN tells of it before weights of 0 are multiplied by it."""
    torch.manual_seed(0)
    operands = {name: torch.rand(1, 4, tokens, 16) for name in ("query", "key", "value")}
    mask, grad = torch.ones(1, 1, tokens, tokens, dtype=torch.bool), torch.randn(1, 4, tokens, 16)
    mask[..., 20] = False

    def gradients():
        leaves = {name: each.clone().requires_grad_(name in wanted) for name, each in operands.items()}
        output = attention(**leaves, mask=mask)
        return torch.autograd.grad(output, [leaves[name] for name in wanted], grad)

    clean = gradients()
    operands["key"][:, :, 20] = -math.inf
    for actual, expected in zip(gradients(), clean, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("dims", [(16, 16), (24, 16)])
@pytest.mark.parametrize("tokens", [7, 60, 300, 700])
def test_gradients_are_stored_token_by_token(tokens, dims, heads):
    """Whichever part of them was all of them: compilers were told so."""
    shapes = [(2, heads[0], tokens, dims[0]), (2, heads[1], tokens, dims[0]), (2, heads[1], tokens, dims[1])]
    leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
    output = attention(*leaves, Spans.causal(tokens))
    for gradient in torch.autograd.grad(output, leaves, torch.randn_like(output)):
        assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_autocast_rounds_nothing_inside(softcap):
    """It casts the operands of `attention`, and no product of float32 that follows from them."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, 200, 32).bfloat16() for _ in range(3))
    key[:, :, 190] = math.nan  # what is written out looks after it
    spans = Spans.sliding(200, left=20)
    plain = attention(query, key, value, spans, softcap=softcap, return_lse=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = attention(query, key, value, spans, softcap=softcap, return_lse=True)
        within = gradients_of_sum(query[:, :, :150], key[:, :, :150], value[:, :, :150], Spans.causal(150))
    without = gradients_of_sum(query[:, :, :150], key[:, :, :150], value[:, :, :150], Spans.causal(150))
    for one, other in zip((*plain, *without), (*cast, *within), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one.isnan(), other.isnan())


def test_masks_lie_where_the_operands_do():
    """Not on torch's default device, for which one call here would spoil those of the whole process."""
    code = """
import torch
from attention_kernels import Spans, attention, attention_reference
query, key, value = (torch.randn(1, 4, 900, 32) for _ in range(3))
for spans in (Spans.causal(900), Spans.sliding(900, left=100), Spans.chunked(900, chunk_size=50)):
    exact, _ = attention_reference(query, key, value, mask=spans.to_dense()[:, None])
    with torch.device("meta"):
        attention(query, key, value, spans)
    torch.testing.assert_close(attention(query, key, value, spans), exact.float(), rtol=1e-4, atol=1e-4)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(KERNELS)}, capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()


def test_finite_values_of_an_infinite_sum_are_computed_as_fast(monkeypatch):
    monkeypatch.setattr(blockwise.attend, "attend_written_out", None)
    query, key = torch.randn(1, 4, 300, 32).half(), torch.randn(1, 1, 300, 32).half()
    output = attention(query, key, torch.full_like(key, 6e4), Spans.causal(300))
    torch.testing.assert_close(output, torch.full_like(output, 6e4))


def test_nan_that_no_row_sees_costs_nothing(monkeypatch):
    """As in a static cache that is not full, whose memory may hold anything."""
    monkeypatch.setattr(blockwise.attend, "attend_written_out", None)
    query, key, value = (torch.randn(1, heads, 300, 32) for heads in (4, 1, 1))
    spans = Spans.causal(300) & Spans.padded(torch.arange(300)[None] >= 100, 300)
    clean = attention(query, key, value, spans)
    key[:, :, :100] = value[:, :, :100] = math.nan
    torch.testing.assert_close(attention(query, key, value, spans), clean)
