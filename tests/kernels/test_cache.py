# SPDX-License-Identifier: Apache-2.0
"""Attention over caches: split keys, pages, quantised numbers, against float64 on whichever path this process runs."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from torch.autograd import forward_ad

from attention_kernels import PagedCache, Spans, attention, attention_reference, gathered, paged_attention, write_cache
from attention_kernels.configs import assuming, unsupported_dtype
from attention_kernels.paths import interpreting
from attention_kernels.quantised import QUANTISED, quantise

from helpers import DEVICE, DTYPES, KERNEL_DTYPES, SLOW_IN_INTERPRETER, assert_within_bound, tensor

pytestmark = pytest.mark.interpreter

STORED = [dtype for dtype in QUANTISED if unsupported_dtype(torch.empty(0, device=DEVICE).device, dtype) is None]
"""What a cache may hold on this device; float8_e5m2 or int8 at least."""

on_the_torch_path = pytest.mark.skipif(
    DEVICE != "cpu" or interpreting(), reason="keys are gathered on the CPU, outside of the interpreter"
)


@dataclass
class PagedProblem:
    """A call of `paged_attention`, and per sequence its queries, keys and values as the cache holds them."""

    query: torch.Tensor
    cache: PagedCache
    offsets: torch.Tensor | None
    query_lens: list[int]
    window: int | None
    options: dict

    def spans(self):
        """The default, or a window on top of it."""
        if self.window is None:
            return None
        from attention_kernels.paged import causal_spans

        causal = causal_spans(self.cache, self.query.shape[2], self.offsets)
        start = (causal.end - self.window).clamp(min=0)
        return Spans(start, causal.end, causal.query_len, causal.key_len)

    def run(self, **options):
        return paged_attention(
            self.query, self.cache, self.spans(), query_offsets=self.offsets, return_lse=True,
            max_query_len=max(1, *self.query_lens) if self.offsets is not None else None, **self.options, **options,
        )  # fmt: skip

    def check(self, **options):
        output, lse = self.run(**options)
        found: list[list[torch.Tensor]] = [[], [], []]
        for sequence, query_len in enumerate(self.query_lens):
            place = (slice(sequence, sequence + 1), slice(None), slice(0, query_len))
            if self.offsets is not None:
                first = int(self.offsets[sequence])
                place = (slice(0, 1), slice(None), slice(first, first + query_len))
            (exact, exact_lse), (eager, _) = (
                self.reference(self.query[place], sequence, dtype) for dtype in (torch.float64, output.dtype)
            )
            torch.testing.assert_close(lse[place].double(), exact_lse, rtol=1e-4, atol=1e-4)
            for parts, part in zip(found, (output[place], eager, exact), strict=True):
                parts.append(part.flatten())
        assert_within_bound(*(torch.cat(parts) for parts in found))

    def reference(self, query, sequence, dtype):
        """Attention of one sequence's queries in `dtype`."""
        key, value = self.cache.gather(sequence, torch.float64)
        q_pos = torch.arange(query.shape[2], device=DEVICE)[:, None] + key.shape[2] - query.shape[2]
        k_pos = torch.arange(key.shape[2], device=DEVICE)[None]
        mask = (k_pos <= q_pos) & (k_pos > q_pos - (self.window or 10**9))
        named = {name: self.options[name] for name in ("sinks", "scale", "softcap")}
        return attention_reference(query, key, value, mask=mask, **named, dtype=dtype)


def random_paged_problem(seed, **fixed):
    """Page sizes, lengths, layouts, dtypes and features at random; every unused place holds NaN where it can."""
    draw = random.Random(seed)
    torch.manual_seed(seed)

    def choose(name, choices):
        return fixed.get(name, draw.choice(choices))

    dtype, stored = choose("dtype", DTYPES), choose("stored", [None, None, *STORED])
    num_kv_heads, group_size = draw.randint(1, 3), draw.choice([1, 2, 3, 7, 8])
    head_dim = choose("head_dim", [8, 15, 64, 80, 128])
    value_dim = draw.choice([head_dim, head_dim, 24])
    page_size = choose("page_size", [1, 2, 5, 16, 33, 64, 528])
    sequences, packed = draw.randint(1, 4), choose("packed", [False, True])
    seq_lens = [draw.choice([0, 1, 2, 17, 40, 100]) for _ in range(sequences)]
    if packed:
        query_lens = [min(length, draw.choice([0, 1, 1, 3, 40])) for length in seq_lens]
    else:
        query_lens = [choose("query_len", [1, 1, 2, 5, 16, 20])] * sequences
        seq_lens = [max(length, query_lens[0]) for length in seq_lens]
    num_heads = num_kv_heads * group_size
    lengths = sum(query_lens) if packed else query_lens[0]
    query = tensor(1 if packed else sequences, num_heads, lengths, head_dim, dtype=dtype, layout="tokens")
    offsets = torch.tensor([0, *query_lens], device=DEVICE).cumsum(0).int() if packed else None
    options = {
        "sinks": torch.randn(num_heads, device=DEVICE) if draw.random() < 0.3 else None,
        "scale": draw.choice([None, 0.2]),
        "softcap": draw.choice([None, None, 5.0]),
        "num_splits": choose("num_splits", [None, 1, 2, 5]),
    }
    cache = random_cache(draw, seq_lens, page_size, num_kv_heads, (head_dim, value_dim), dtype, stored)
    return PagedProblem(query, cache, offsets, query_lens, draw.choice([None, None, 7]), options)


def random_cache(draw, seq_lens, page_size, num_kv_heads, dims, dtype, stored):
    """A cache filled through `write_cache`, its pages in random order among others that hold NaN."""
    table_len = max(1, *(-(-length // page_size) for length in seq_lens)) + 1
    pages = table_len * len(seq_lens) + 3
    numbers = draw.sample(range(pages), table_len * len(seq_lens))
    table = torch.tensor(numbers, dtype=torch.int32, device=DEVICE).view(len(seq_lens), table_len)
    kind = stored or dtype
    poison = 127 if kind == torch.int8 else math.nan
    key, value = (torch.full((pages, page_size, num_kv_heads, dim), poison, device=DEVICE).to(kind) for dim in dims)
    scales = (None, None)
    if stored is not None:
        shape = draw.choice([(1,), (num_kv_heads,), (pages, page_size, num_kv_heads)])
        scales = [torch.rand(shape, device=DEVICE) * 0.02 + 0.02 for _ in dims]
    cache = PagedCache(key, value, table, torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE), *scales)
    for sequence, length in enumerate(seq_lens):
        index = torch.arange(length, device=DEVICE)
        slots = table[sequence, index // page_size].long() * page_size + index % page_size
        new = [torch.randn(length, num_kv_heads, dim, device=DEVICE).to(dtype) for dim in dims]
        write_cache(*new, cache, slots)
    return cache


SEEDS_PER_TEST = 5


@pytest.mark.parametrize(
    "first_seed",
    [pytest.param(seed, marks=SLOW_IN_INTERPRETER if seed >= 25 else ()) for seed in range(0, 250, SEEDS_PER_TEST)],
)
def test_random_pages(first_seed):
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        try:
            random_paged_problem(seed).check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("num_splits", [1, 3, 64, None])
def test_contiguous_keys_are_split(num_splits, dtype):
    """Decoding with a cache of which some is empty, some padding, and more queries than one."""
    torch.manual_seed(0)
    query, key, value = (tensor(2, heads, n, 40, dtype=dtype) for heads, n in ((6, 3), (2, 300), (2, 300)))
    shown = torch.arange(300, device=DEVICE)[None] >= torch.tensor([[0], [150]], device=DEVICE)
    spans = Spans.causal(3, 300, offset=240, device=DEVICE) & Spans.padded(shown, 3)
    sinks = torch.randn(6, device=DEVICE)
    output, lse = attention(query, key, value, spans, sinks=sinks, num_splits=num_splits, return_lse=True)
    mask = spans.to_dense()[:, None]
    exact, exact_lse = attention_reference(query, key, value, mask=mask, sinks=sinks)
    eager, _ = attention_reference(query, key, value, mask=mask, sinks=sinks, dtype=dtype)
    assert_within_bound(output, eager, exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


def test_with_fixed_splits_a_sequence_does_not_depend_on_its_neighbours():
    problem = random_paged_problem(3, packed=False, num_splits=4, stored=None)
    together, _ = problem.run()
    cache = problem.cache
    for sequence in range(len(problem.query_lens)):
        one = slice(sequence, sequence + 1)
        own = PagedCache(cache.key, cache.value, cache.block_table[one], cache.seq_lens[one])
        alone = PagedProblem(problem.query[one], own, None, [problem.query_lens[0]], problem.window, problem.options)
        assert torch.equal(alone.run()[0], together[one])


@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
def test_with_fixed_splits_a_packed_sequence_does_not_depend_on_its_neighbours(architecture):
    """Not on tables with other tiles for many queries either, as GPUs have."""
    torch.manual_seed(0)
    cache = random_cache(random.Random(0), [130, 40], 16, 2, (64, 64), torch.float16, None)
    alone = PagedCache(cache.key, cache.value, cache.block_table[:1], cache.seq_lens[:1])
    query, options = tensor(1, 8, 21, 64, dtype=torch.float16), {"sinks": None, "scale": None, "softcap": None}
    with assuming(architecture) if interpreting() else nullcontext():
        expected, together = (
            PagedProblem(
                query[:, :, : sum(lengths)], held, torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int(), lengths,
                None, options | {"num_splits": 4},
            ).run()[0]
            for held, lengths in ((alone, [1]), (cache, [1, 20]))
        )  # fmt: skip
    assert torch.equal(together[:, :, :1], expected)


def test_more_splits_than_keys_change_nothing():
    problem = random_paged_problem(3, num_splits=20, stored=None)
    problem.check()
    assert torch.equal(problem.run()[0], replace(problem, options=problem.options | {"num_splits": 70_000}).run()[0])


def every_other(tensor):
    """The same numbers, two apart in memory, beside others."""
    return torch.stack([tensor, torch.full_like(tensor, 1)], -1)[..., 0]


def test_integers_that_lie_apart_in_memory():
    """Block tables, offsets of queries and slots may be columns of larger tensors, or transposed."""
    torch.manual_seed(0)
    seq_lens, query_lens = [40, 7, 33], [3, 1, 20]
    cache = random_cache(random.Random(0), seq_lens, 8, 2, (16, 16), torch.float32, None)
    offsets = torch.tensor([0, *query_lens], device=DEVICE).cumsum(0).int()
    query = tensor(1, 4, sum(query_lens), 16)
    options = {"sinks": None, "scale": None, "softcap": None, "num_splits": None}
    expected, _ = PagedProblem(query, cache, offsets, query_lens, None, options).run()
    for table in (every_other(cache.block_table), cache.block_table.t().contiguous().t()):
        assert not table.is_contiguous()
        apart = PagedCache(cache.key, cache.value, table, every_other(cache.seq_lens))
        assert torch.equal(
            PagedProblem(query, apart, every_other(offsets), query_lens, None, options).run()[0], expected
        )

    copies = [replace(cache, key=torch.zeros_like(cache.key), value=torch.zeros_like(cache.value)) for _ in range(2)]
    slots, new = torch.tensor([9, 30, -1, 2], device=DEVICE), torch.randn(4, 2, 16, device=DEVICE)
    for copy, places in zip(copies, (slots, every_other(slots)), strict=True):
        write_cache(new, new, copy, places)
    assert torch.equal(copies[0].key, copies[1].key) and torch.equal(copies[0].value, copies[1].value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-6])
def test_small_scales_of_values(scale, dtype):
    """Weights times such scales are below the smallest numbers of float16, the values they stand for are not."""
    torch.manual_seed(0)
    cache = random_cache(random.Random(0), [60, 20], 16, 2, (64, 64), dtype, STORED[0])
    cache = replace(cache, value_scale=torch.tensor([scale], device=DEVICE))
    options = {"sinks": None, "scale": None, "softcap": None, "num_splits": None}
    PagedProblem(tensor(2, 4, 1, 64, dtype=dtype), cache, None, [1, 1], None, options).check()


@pytest.fixture
def calls_of_attention(monkeypatch):
    """Shapes of the queries of each call that the torch path makes, as a growing list."""
    calls, attend = [], gathered.attention

    def noted(query, *given, **named):
        calls.append(query.shape)
        return attend(query, *given, **named)

    monkeypatch.setattr(gathered, "attention", noted)
    return calls


def batch_of(seq_lens, *, query_len=1, window=None, page_size=16, num_splits=None, dtype=torch.float32):
    """Sequences of these lengths, with as many queries each, in a cache with NaN in all other places."""
    torch.manual_seed(0)
    cache = random_cache(random.Random(0), seq_lens, page_size, 2, (32, 32), dtype, None)
    query = tensor(len(seq_lens), 4, query_len, 32, dtype=dtype)
    options = {"sinks": None, "scale": None, "softcap": None, "num_splits": num_splits}
    return PagedProblem(query, cache, None, [query_len] * len(seq_lens), window, options)


@on_the_torch_path
@pytest.mark.parametrize(
    ("problem", "sequences_per_call"),
    [
        ({"seq_lens": [100, 3, 64, 90]}, [4]),
        ({"seq_lens": [3000, 20, 3000, 30]}, [2, 2]),  # cut where it spares much
        ({"seq_lens": [3000, 20, 3000, 30], "window": 10}, [4]),  # of a window's pages there are equally many
        ({"seq_lens": [40, 50, 60], "query_len": 3}, [3]),
        ({"seq_lens": [40, 50, 60], "query_len": 30}, [1, 1, 1]),  # no decoding
        ({"seq_lens": [40, 50, 60], "num_splits": 1}, [1, 1, 1]),  # each for itself
    ],
    ids=str,
)
def test_sequences_of_like_lengths_are_computed_together(problem, sequences_per_call, calls_of_attention, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # which decides how many a call has at least
    batch_of(**problem).check()
    assert [shape[0] for shape in calls_of_attention] == sequences_per_call


@on_the_torch_path
def test_few_sequences_are_gathered_at_a_time(calls_of_attention, monkeypatch):
    monkeypatch.setattr(gathered, "GATHERED_BYTES", 2 * 64 * 2 * 2 * 32 * 4)  # keys and values of 2 x 64 tokens
    batch_of([64, 60, 50, 64, 64]).check()
    assert [shape[0] for shape in calls_of_attention] == [2, 2, 1]


@on_the_torch_path
def test_entries_of_sequences_without_keys_are_not_read():
    problem = batch_of([100, 0, 90, 0])
    problem.cache.block_table[[1, 3]] = 10**6
    output, lse = problem.run()
    expected, expected_lse = batch_of([100, 0, 90, 0]).run()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert not output[[1, 3]].any() and (lse[[1, 3]] == -math.inf).all()


@on_the_torch_path
def test_memory_that_is_kept_serves_every_mode_and_thread():
    problems = [batch_of([100 - number, 77, 3]) for number in range(8)]
    expected = [problem.run()[0] for problem in problems]
    gathered._scratch.forget()
    with torch.inference_mode():
        problems[0].run()
    problems[0].run()
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            for output, right in zip(threads.map(lambda problem: problem.run()[0], problems), expected, strict=True):
                torch.testing.assert_close(output, right)


@pytest.mark.parametrize("stored", [None, *STORED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_multi_head_latent_attention(dtype, stored):
    """One key head of 576 columns, of which the first 512 are the values: the same storage."""
    torch.manual_seed(0)
    pages, page_size = 6, 16
    key = torch.randn(pages, page_size, 1, 576, device=DEVICE).to(dtype)
    scale = None
    if stored is not None:
        scale = torch.tensor([0.03], device=DEVICE)
        key = quantise(key.float() / 0.03, stored)
    table = torch.tensor([[4, 1, 3], [2, 0, 5]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([33, 48], dtype=torch.int32, device=DEVICE)
    cache = PagedCache(key, key[..., :512], table, lengths, scale, scale)
    query = tensor(2, 8, 2, 576, dtype=dtype)
    options = {"sinks": None, "scale": 0.05, "softcap": None, "num_splits": 2}
    PagedProblem(query, cache, None, [2, 2], None, options).check()
    # A piece of a prompt, several tiles of rows, beside a single token: tiles without rows go on there.
    query, offsets = tensor(1, 8, 21, 576, dtype=dtype), torch.tensor([0, 20, 21], dtype=torch.int32, device=DEVICE)
    for splits in (2, None):
        PagedProblem(query, cache, offsets, [20, 1], None, options | {"num_splits": splits}).check()


def test_shared_pages():
    """Two sequences with one prefix: the prefix's pages are in both rows of the table."""
    torch.manual_seed(0)
    key, value = (torch.randn(5, 4, 1, 16, device=DEVICE) for _ in range(2))
    table = torch.tensor([[3, 0, 1], [3, 0, 2]], dtype=torch.int32, device=DEVICE)
    cache = PagedCache(key, value, table, torch.tensor([9, 11], dtype=torch.int32, device=DEVICE))
    options = {"sinks": None, "scale": None, "softcap": None}
    PagedProblem(tensor(2, 2, 1, 16), cache, None, [1, 1], None, options).check()


@pytest.mark.parametrize("stored", [None, *STORED])
def test_writing(stored):
    torch.manual_seed(0)
    kind = stored or torch.float32
    key, value = (torch.zeros(3, 4, 2, dim, device=DEVICE).to(kind) for dim in (8, 5))
    scales = (None, None) if stored is None else [torch.rand(2, device=DEVICE) * 0.1 + 0.02 for _ in range(2)]
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    cache = PagedCache(key, value, table.to(DEVICE), lengths.to(DEVICE), *scales)
    slots = torch.tensor([11, -1, 0, 6], device=DEVICE)
    new = [torch.randn(4, 2, dim, device=DEVICE) * 3 for dim in (8, 5)]
    write_cache(*new, cache, slots)
    for rows, stored_rows, scale in zip(new, (cache.key, cache.value), scales, strict=True):
        expected = torch.zeros(12, *rows.shape[1:], device=DEVICE).to(kind)
        kept = rows if scale is None else quantise(rows / scale[:, None], kind)
        for slot, row in ((11, 0), (0, 2), (6, 3)):
            expected[slot] = kept[row].to(kind)
        assert torch.equal(stored_rows.flatten(0, 1).float(), expected.float())


def test_checking_finds_entries_out_of_range():
    problem = random_paged_problem(8, packed=False, stored=None, page_size=16)
    problem.run(check=True)
    table = problem.cache.block_table
    unused = int(problem.cache.seq_lens[0] + 15) // 16
    table[0, unused] = 10**6
    problem.run(check=True)  # nobody reads it
    table[0, 0] = problem.cache.key.shape[0]
    with pytest.raises(IndexError, match=r"`block_table`\[0, 0\] = .* must be 0 to .*; write the page's number there"):
        problem.run(check=True)
    table[0, 0], table[0, unused] = 0, 0
    problem.cache.seq_lens[0] = problem.cache.key_len + 1
    with pytest.raises(IndexError, match=r"`seq_lens` must be 0 to .*; widen the block table"):
        problem.run(check=True)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": (1, 4, 1, 8)}, ValueError, r"`query` must be .* 16\] like the cache's"),
        ({"query": (2, 3, 1, 16)}, ValueError, "must be a multiple of the cache's key heads, got 3 and 2"),
        ({"query": (3, 4, 1, 16)}, ValueError, "a batch of 3, the cache 2 sequences; pass `query_offsets`"),
        ({"dtype": torch.float16}, TypeError, "`query` is torch.float16, the cache torch.float32"),
        ({"query_offsets": torch.zeros(2, dtype=torch.int32)}, ValueError, r"`query_offsets` must be int32 .* = \[3\]"),
        ({"num_splits": 0}, ValueError, "`num_splits` must be whole and at least 1, got 0"),
        ({"sinks": torch.zeros(3)}, ValueError, r"`sinks` must be .* \[num_heads\] = \[4\], got torch.float32 \[3\]"),
        (
            {"sinks": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            "`sinks` must be floating point .*, got torch.int64",
        ),
        ({"softcap": -1.0}, ValueError, "`softcap` must be a positive number, got -1.0; pass None"),
        ({"softcap": 0.0}, ValueError, "`softcap` must be a positive number, got 0.0"),
        ({"scale": float("nan")}, ValueError, "`scale` must be finite, got nan"),
        ({"scale": float("inf")}, ValueError, "`scale` must be finite, got inf"),
        ({"scale": "2"}, TypeError, "`scale` must be a number, got '2'"),
        ({"query_offsets": [0, 1, 2]}, TypeError, "`query_offsets` must be a tensor, got list"),
        ({"sinks": [0.0] * 4}, TypeError, "`sinks` must be a tensor, got list"),
        ({"spans": "causal"}, TypeError, "`spans` must be Spans, got str; leave it out for causal attention"),
        ({"spans": Spans.causal(1, 8, device="meta")}, ValueError, "`spans` is on meta, `query` on cpu; use spans.to"),
        (
            {"query_offsets": torch.zeros(3, dtype=torch.int32, device="meta")},
            ValueError,
            "`query_offsets` is on meta, the cache on cpu; move it there",
        ),
        ({"max_query_len": 0}, ValueError, "`max_query_len` must be whole and at least 1, got 0; leave it out"),
        ({"max_query_len": 1.5}, ValueError, "`max_query_len` must be whole and at least 1, got 1.5"),
        ({"max_query_len": "1"}, ValueError, "`max_query_len` must be whole and at least 1, got '1'"),
        ({"num_splits": torch.ones(2)}, TypeError, "`num_splits` must be a number, got tensor"),
        ({"spans": Spans.causal(1, 9)}, ValueError, "`spans` must be for 1 queries and the cache's 8 keys"),
        ({"spans": Spans(*torch.ones(2, 3, 1, dtype=torch.int32), 1, 8)}, ValueError, "of a batch of 2 or 1"),
    ],
)
def test_bad_calls(change, error, words):
    key = torch.zeros(4, 4, 2, 16)
    cache = PagedCache(key, key, torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
    change = dict(change)
    query = torch.zeros(change.pop("query", (2, 4, 1, 16)), dtype=change.pop("dtype", torch.float32))
    with pytest.raises(error, match=f"paged_attention: .*{words}"):
        paged_attention(query, cache, **change)


@pytest.mark.parametrize("wrong", [[0, 2, 1], [0, 1, 4], [-1, 1, 2]])
@pytest.mark.parametrize("check", [True] if DEVICE != "cpu" else [True, False])
def test_offsets_out_of_range_are_found(wrong, check):
    """On a GPU looking is a synchronisation, for which one has to ask."""
    key = torch.zeros(4, 4, 2, 16, device=DEVICE)
    cache = PagedCache(key, key, *(torch.ones(shape, dtype=torch.int32, device=DEVICE) for shape in ((2, 2), (2,))))
    offsets = torch.tensor(wrong, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="`query_offsets` must never fall, from 0 to the 3 tokens there are, got"):
        paged_attention(torch.zeros(1, 4, 3, 16, device=DEVICE), cache, query_offsets=offsets, check=check)


@pytest.mark.parametrize("check", [True] if DEVICE != "cpu" else [True, False])
def test_queries_that_a_length_would_cut_off_are_found(check):
    key = torch.zeros(4, 4, 2, 16, device=DEVICE)
    cache = PagedCache(key, key, *(torch.ones(shape, dtype=torch.int32, device=DEVICE) for shape in ((2, 2), (2,))))
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32, device=DEVICE)
    query = torch.zeros(1, 4, 3, 16, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"`max_query_len` must be at least 2, the most queries .*, got 1; leave it out"
    ):
        paged_attention(query, cache, query_offsets=offsets, max_query_len=1, check=check)
    assert paged_attention(query, cache, query_offsets=offsets, max_query_len=2, check=check).shape == query.shape


def test_no_sequences_have_no_longest_one():
    key = torch.zeros(4, 4, 2, 16, device=DEVICE)
    cache = PagedCache(key, key, *(torch.ones(shape, dtype=torch.int32, device=DEVICE) for shape in ((0, 2), (0,))))
    offsets = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    output = paged_attention(key.new_zeros(1, 4, 0, 16), cache, query_offsets=offsets, max_query_len=5, check=True)
    assert output.shape == (1, 4, 0, 16)
    output = paged_attention(key.new_zeros(1, 4, 3, 16), cache, query_offsets=offsets)  # rows of no sequence
    assert output.shape == (1, 4, 3, 16)
    assert paged_attention(key.new_zeros(0, 4, 3, 16), cache).shape == (0, 4, 3, 16)


@pytest.mark.parametrize("first", [1, 5, 33])
@pytest.mark.parametrize("query_lens", [[40, 20], [1, 40], [1, 1]])
def test_rows_before_the_first_sequence(first, query_lens):
    """They belong to none, and what is beside the output stays as it was."""
    torch.manual_seed(0)
    cache = random_cache(random.Random(0), [50, 45], 16, 2, (16, 16), torch.float32, None)
    offsets = torch.tensor([first, *query_lens], device=DEVICE).cumsum(0).int()
    query = tensor(1, 8, first + sum(query_lens), 16)
    options = {"sinks": torch.randn(8, device=DEVICE), "scale": None, "softcap": None, "num_splits": None}
    memory = torch.full((2 * first + sum(query_lens) + 70, 8, 16), 7.0, device=DEVICE)
    place = slice(first + 35, 2 * first + 35 + sum(query_lens))
    problem = PagedProblem(query, cache, offsets, query_lens, None, options)
    problem.check(out=memory[place][None].transpose(1, 2))
    assert (memory[: place.start] == 7).all() and (memory[place.stop :] == 7).all()


def test_forward_differentiation_is_refused():
    key = torch.zeros(4, 4, 2, 16, device=DEVICE)
    cache = PagedCache(key, key, *(torch.ones(shape, dtype=torch.int32, device=DEVICE) for shape in ((2, 2), (2,))))
    with forward_ad.dual_level():
        query = forward_ad.make_dual(torch.zeros(2, 4, 1, 16, device=DEVICE), torch.ones(2, 4, 1, 16, device=DEVICE))
        with pytest.raises(RuntimeError, match=r"paged_attention: .* forward differentiation are not served; use"):
            paged_attention(query, cache)


@pytest.mark.parametrize("wanted", ["query", "key"])
def test_gradients_are_refused(wanted):
    key = torch.zeros(4, 4, 2, 16, requires_grad=wanted == "key")
    cache = PagedCache(key, key, torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
    query = torch.zeros(2, 4, 1, 16, requires_grad=wanted == "query")
    with pytest.raises(ValueError, match=r"require gradients are refused, .* under torch\.no_grad"):
        paged_attention(query, cache)
    with torch.no_grad():
        assert not paged_attention(query, cache).any()


def test_keys_that_do_not_lie_in_pages_are_refused():
    with pytest.raises(TypeError, match=r"`cache` must be a PagedCache, got NoneType; .* belong to `attention`"):
        paged_attention(torch.zeros(2, 4, 1, 16), None)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"value": torch.zeros(4, 5, 2, 16)}, ValueError, "equal first three"),
        ({"key": torch.zeros(4, 16)}, ValueError, r"`key` and `value` must be .*, got \[4, 16\]"),
        (dict.fromkeys(("key", "value"), torch.zeros(4, 4, 0, 16)), ValueError, "at least one head, got 0"),
        (
            dict.fromkeys(("key", "value"), torch.zeros(4, 4, 2, 16).to(torch.int8))
            | {"key_scale": torch.ones(7), "value_scale": torch.ones(1)},
            ValueError,
            r"`key_scale` must broadcast to .* = \[4, 4, 2\], got \[7\]; give one number",
        ),
        ({"value": torch.zeros(4, 4, 2, 16, dtype=torch.float16)}, TypeError, "must share a dtype"),
        ({"block_table": torch.zeros(2, 2)}, ValueError, "`block_table` must be int32 with 2 dimensions"),
        (
            {"seq_lens": torch.ones(1, dtype=torch.int32)},
            ValueError,
            "`block_table` and `seq_lens` must .*, got 2 and 1",
        ),
        ({"key_scale": 1.0}, TypeError, "`key_scale` must be a tensor, got float"),
        ({"seq_lens": [1, 1]}, TypeError, "`seq_lens` must be a tensor, got list"),
        ({"key_scale": torch.ones(1)}, ValueError, "`key_scale` belongs to quantised keys and values"),
        (
            dict.fromkeys(("key", "value"), torch.zeros(4, 4, 2, 16).to(torch.int8))
            | {"key_scale": torch.ones(1, device="meta"), "value_scale": torch.ones(1)},
            ValueError,
            "must be on one device, got `key` on cpu, .*, `key_scale` on meta, `value_scale` on cpu; move them to one",
        ),
    ],
)
def test_bad_caches(change, error, words):
    zeros = torch.zeros(4, 4, 2, 16)
    given = {"key": zeros, "value": zeros, "block_table": torch.zeros(2, 2, dtype=torch.int32)}
    with pytest.raises(error, match=words):
        PagedCache(**(given | {"seq_lens": torch.ones(2, dtype=torch.int32)} | change))
    with pytest.raises(ValueError, match="a page must hold at least one token, got 0"):
        empty = torch.zeros(1, 0, 1, 8)
        PagedCache(empty, empty, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("name", "served"), [("sm_80", False), ("sm_86", False), ("sm_89", True), ("sm_90", True), ("gfx942", True)]
)
def test_chips_without_float8_e4m3fn_are_told(name, served):
    with assuming(name):
        reason = unsupported_dtype(torch.device("cpu"), torch.float8_e4m3fn)
        assert (reason is None) == served
        assert served or (f"the GPU '{name}' has no float8_e4m3fn" in reason and "float8_e5m2 or int8" in reason)
        assert unsupported_dtype(torch.device("cpu"), torch.float8_e5m2) is None


@pytest.mark.skipif(DEVICE == "cpu" and not interpreting(), reason="the torch path has float8 everywhere")
def test_neither_reading_nor_writing_float8_e4m3fn_reaches_the_compiler_there():
    cache = random_cache(random.Random(0), [3], 16, 1, (16, 16), torch.float16, None)
    pages = torch.zeros_like(cache.key, dtype=torch.float8_e4m3fn)
    scale = torch.ones(1, device=DEVICE)
    cache = PagedCache(pages, pages, cache.block_table, cache.seq_lens, scale, scale)
    new, slots = torch.zeros(2, 1, 16, dtype=torch.float16, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    with assuming("sm_80"):
        with pytest.raises(TypeError, match=r"write_cache: the GPU .* has no float8_e4m3fn"):
            write_cache(new, new, cache, slots)
        with pytest.raises(TypeError, match=r"paged_attention: the GPU .* has no float8_e4m3fn"):
            paged_attention(tensor(1, 1, 1, 16, dtype=torch.float16), cache)


def test_writing_what_does_not_fit():
    zeros = torch.zeros(2, 4, 1, 8)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    cache, slots = PagedCache(zeros, zeros, table, lengths), torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match=r"`value` must be .* = \[2, 1, 8\] for 2 slots and this cache, got \[2, 1, 7\]"
    ):
        write_cache(torch.zeros(2, 1, 8), torch.zeros(2, 1, 7), cache, slots)
    with pytest.raises(
        ValueError, match=r"`slots` must be int64 or int32 \[tokens\], got torch.float32 \[2\]; a slot is"
    ):
        write_cache(*torch.zeros(2, 2, 1, 8), cache, slots.float())
    for name, given in (("slots", [0, 1]), ("key", None), ("value", 1.0)):
        arguments = {"key": torch.zeros(2, 1, 8), "value": torch.zeros(2, 1, 8), "slots": slots} | {name: given}
        with pytest.raises(TypeError, match=f"write_cache: `{name}` must be a tensor, got {type(given).__name__}; see"):
            write_cache(cache=cache, **arguments)
    with pytest.raises(TypeError, match="write_cache: `cache` must be a PagedCache, got tuple; "):
        write_cache(*torch.zeros(2, 2, 1, 8), (zeros, zeros), slots)
    with pytest.raises(ValueError, match="write_cache: `slots` is on meta, the cache on cpu; move it there"):
        write_cache(*torch.zeros(2, 2, 1, 8), cache, slots.to("meta"))
    assert not zeros.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("token_by_token", [True, False])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_output_is_written_where_it_is_asked_for(dtype, token_by_token, num_splits):
    problem = random_paged_problem(4, dtype=dtype, stored=None, packed=True, num_splits=num_splits)
    expected, _ = problem.run()
    tokens, heads = problem.query.shape[2], problem.query.shape[1]
    sizes = (1, tokens, heads, expected.shape[3]) if token_by_token else (1, heads, tokens, expected.shape[3])
    out = torch.full(sizes, torch.nan, dtype=dtype, device=DEVICE)
    out = out.transpose(1, 2) if token_by_token else out
    found, _ = problem.run(out=out)
    assert found is out or found.data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)


def test_a_place_for_the_output_that_does_not_fit_is_refused():
    problem = random_paged_problem(4, dtype=torch.float32, stored=None, packed=True)
    with pytest.raises(ValueError, match=r"paged_attention: `out` must be torch.float32 .* like the output, got"):
        problem.run(out=problem.query.double())
    with pytest.raises(ValueError, match=r"leave it out to have it made"):
        problem.run(out=problem.query[:, :, 1:])


@pytest.mark.parametrize("packed", [False, True])
def test_spans_reach_no_key_behind_a_sequence(packed):
    """What stands there in the block table may be no page at all."""
    problem = random_paged_problem(8, packed=packed, stored=None, page_size=16, query_len=1)
    cache, rows = problem.cache, problem.query.shape[2]
    visible = torch.arange(cache.block_table.shape[1], device=DEVICE)[None] * 16 < cache.seq_lens[:, None]
    cache.block_table[~visible] = 10**6
    everything = Spans.full(rows, cache.key_len, device=DEVICE)
    ends = cache.seq_lens
    if problem.offsets is not None:
        ends = ends.repeat_interleave(problem.offsets.diff().long())
    clamped = Spans(everything.start, ends.view(-1, 1) if problem.offsets is None else ends[None], rows, cache.key_len)
    options = problem.options | {"query_offsets": problem.offsets, "return_lse": True}
    found, expected = (paged_attention(problem.query, cache, spans, **options) for spans in (everything, clamped))
    assert not (ends == cache.key_len).all()
    before_the_first = Spans(clamped.start - 5, clamped.end, rows, cache.key_len)
    found += paged_attention(problem.query, cache, before_the_first, **options)
    for one, other in zip(found, 2 * expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@on_the_torch_path
def test_another_default_device_does_not_reach_the_memory_that_is_kept():
    problem = batch_of([100, 77, 3])
    expected, _ = problem.run()
    gathered._scratch.forget()
    with torch.device("meta"):
        found, _ = problem.run()
    torch.testing.assert_close(found, expected)


def test_writing_takes_no_gradient_along():
    zeros = torch.zeros(2, 4, 1, 8, device=DEVICE)
    table, lengths = (
        torch.zeros(1, 1, dtype=torch.int32, device=DEVICE),
        torch.ones(1, dtype=torch.int32, device=DEVICE),
    )
    cache = PagedCache(zeros, zeros.clone(), table, lengths)
    new = torch.ones(1, 1, 8, device=DEVICE, requires_grad=True)
    write_cache(new, new, cache, torch.tensor([3], device=DEVICE))
    assert not cache.key.requires_grad and cache.key[0, 3].eq(1).all()
