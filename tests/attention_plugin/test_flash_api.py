# SPDX-License-Identifier: Apache-2.0
"""The functions of the flash-attn package, against float64 under masks written as its documentation states them."""

from __future__ import annotations

import inspect
import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attention_kernels import attention_reference
from attention_plugin import flash_api
from attention_plugin.flash_api import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    positions,
)

from helpers import DEVICE, DTYPES, SLOW_IN_INTERPRETER, assert_within_bound

pytestmark = pytest.mark.interpreter

SEEDS_PER_TEST = 5
SEEDS = [pytest.param(seed, marks=SLOW_IN_INTERPRETER if seed else ()) for seed in range(0, 60, SEEDS_PER_TEST)]


def documented_mask(seqlen_q, seqlen_k, causal=False, window_size=(-1, -1)):
    """Row i sees [i + seqlen_k - seqlen_q - left, i + seqlen_k - seqlen_q + right], both included."""
    left, right = window_size
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            here = i + seqlen_k - seqlen_q
            if causal and j > here:
                mask[i, j] = False
            if left >= 0 and j < here - left:
                mask[i, j] = False
            if right >= 0 and j > here + right:
                mask[i, j] = False
    return mask.to(DEVICE)


def documented_bias(slopes, seqlen_q, seqlen_k):
    """`-slope * |i + seqlen_k - seqlen_q - j|`, float64 `[num_heads, seqlen_q, seqlen_k]`, of slopes `[num_heads]`."""
    i, j = torch.arange(seqlen_q, device=DEVICE)[:, None], torch.arange(seqlen_k, device=DEVICE)
    return -slopes.double()[:, None, None] * (i + seqlen_k - seqlen_q - j).abs()


@dataclass
class Options:
    """What the three functions share, drawn at random."""

    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0

    @classmethod
    def draw(cls, draw):
        windows = [(-1, -1), (-1, -1), (-1, 0), (0, 0), (3, 2), (5, -1), (-1, 4), (40, 0), (2**31 - 1, 1)]
        return cls(draw.choice([None, 0.2]), draw.random() < 0.5, draw.choice(windows), draw.choice([0.0, -1.0, 4.0]))

    def reference(self, q, k, v, dtype, slopes=None):
        """Output `[seqlen_q, heads, dim]` and log-sum-exp of one sequence, every intermediate in `dtype`."""
        mask = documented_mask(q.shape[0], k.shape[0], self.causal, self.window_size)
        bias = None if slopes is None else documented_bias(slopes, q.shape[0], k.shape[0])[None]
        output, lse = attention_reference(
            *(each.transpose(0, 1)[None] for each in (q, k, v)), mask=mask, bias=bias, scale=self.softmax_scale,
            softcap=self.softcap if self.softcap > 0 else None, dtype=dtype,
        )  # fmt: skip
        return output[0].transpose(0, 1), lse[0]


class Comparison:
    """Outputs and log-sum-exps of several sequences beside their references."""

    def __init__(self, options):
        self.options, self.parts, self.bias = options, [], 0.0

    def add(self, output, lse, q, k, v, slopes=None):
        exact, exact_lse = self.options.reference(q, k, v, torch.float64, slopes)
        eager, _ = self.options.reference(q, k, v, q.dtype, slopes)
        self.parts.append((output, eager, exact))
        assert output.dtype == q.dtype
        if slopes is not None:
            self.bias = max(self.bias, float(slopes.max()) * (q.shape[0] + k.shape[0]))
        tolerance = (2e-5 if q.dtype == torch.float32 else 2e-4) + 1e-6 * self.bias
        torch.testing.assert_close(lse.double(), exact_lse, rtol=tolerance, atol=tolerance)

    def check(self):
        actual, eager, exact = (
            torch.cat([part.flatten() for part in parts]) for parts in zip(*self.parts, strict=True)
        )
        if self.bias and actual.dtype == torch.float32:
            # Scores are exact to the rounding of slope times length.
            torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6 * (1 + self.bias))
        else:
            assert_within_bound(actual, eager, exact)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def offsets(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def for_seeds(first_seed, check):
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        torch.manual_seed(seed)
        try:
            check(random.Random(seed))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def draw_heads(draw):
    num_kv_heads = draw.randint(1, 2)
    return num_kv_heads * draw.choice([1, 2, 3]), num_kv_heads, draw.choice([8, 15, 64])


# ---------------------------------------------------------------------- masks, as the documentation draws them


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "rows"),
    [(2, 5, ["11110", "11111"]), (5, 2, ["00", "00", "00", "10", "11"])],
)
def test_causal_masks_of_the_documentation(seqlen_q, seqlen_k, rows):
    """Values that are unit vectors make the output the attention weights: where they are not 0, the mask is."""
    q, k = normal(1, seqlen_q, 1, 8), normal(1, seqlen_k, 1, 8)
    v = torch.eye(seqlen_k, device=DEVICE)[None, :, None]
    expected = torch.tensor([[digit == "1" for digit in row] for row in rows], device=DEVICE)
    assert torch.equal(documented_mask(seqlen_q, seqlen_k, causal=True), expected)
    assert torch.equal(flash_attn_func(q, k, v, causal=True)[0, :, 0] != 0, expected)
    lengths = offsets([seqlen_q]), offsets([seqlen_k])
    output = flash_attn_varlen_func(q[0], k[0], v[0], *lengths, seqlen_q, seqlen_k, causal=True)
    assert torch.equal(output[:, 0] != 0, expected)
    assert torch.equal(flash_attn_with_kvcache(q, k, v, causal=True)[0, :, 0] != 0, expected)


# ---------------------------------------------------------------------- against float64


@pytest.mark.parametrize("first_seed", SEEDS)
def test_func(first_seed):
    def check(draw):
        batch, (num_heads, num_kv_heads, dim), dtype = draw.randint(1, 2), draw_heads(draw), draw.choice(DTYPES)
        seqlen_q, seqlen_k = draw.choice([0, 1, 2, 17, 33, 70]), draw.choice([0, 1, 5, 33, 70])
        q = normal(batch, seqlen_q, num_heads, dim, dtype=dtype)
        k, v = (normal(batch, seqlen_k, num_kv_heads, dim, dtype=dtype) for _ in range(2))
        options, slopes = Options.draw(draw), None
        if draw.random() < 0.4:
            slopes = torch.rand(draw.choice([(num_heads,), (batch, num_heads)]), device=DEVICE) * 0.5
        output, lse, probabilities = flash_attn_func(
            q, k, v, alibi_slopes=slopes, deterministic=True, return_attn_probs=True, **vars(options)
        )
        assert output.shape == q.shape
        assert output.is_contiguous()
        assert probabilities.numel() == 0
        comparison = Comparison(options)
        for b in range(batch):
            own = None if slopes is None else slopes.expand(batch, num_heads)[b]
            comparison.add(output[b], lse[b], q[b], k[b], v[b], own)
        comparison.check()

    for_seeds(first_seed, check)


@pytest.mark.parametrize("first_seed", SEEDS)
def test_varlen(first_seed):
    def check(draw):
        sequences, (num_heads, num_kv_heads, dim), dtype = draw.randint(1, 4), draw_heads(draw), draw.choice(DTYPES)
        lens_q = [draw.choice([0, 1, 1, 2, 17, 40]) for _ in range(sequences)]
        lens_k = [draw.choice([length, length, 0, 1, 30]) for length in lens_q]
        unused = draw.choice([0, 0, 3])  # rows beyond the last sequence, as buffers of a fixed size have
        q = normal(sum(lens_q) + unused, num_heads, dim, dtype=dtype)
        k, v = (normal(sum(lens_k) + unused, num_kv_heads, dim, dtype=dtype) for _ in range(2))
        options, slopes = Options.draw(draw), None
        if draw.random() < 0.4:
            slopes = torch.rand(draw.choice([(num_heads,), (sequences, num_heads)]), device=DEVICE) * 0.5
        lengths = offsets(lens_q), offsets(lens_k), max(lens_q), max(lens_k)
        output, lse, _ = flash_attn_varlen_func(
            q, k, v, *lengths, alibi_slopes=slopes, return_attn_probs=True, **vars(options)
        )
        assert output.shape == q.shape
        assert not output[sum(lens_q) :].any()
        comparison = Comparison(options)
        for d in range(sequences):
            rows, keys = (slice(int(each[d]), int(each[d + 1])) for each in lengths[:2])
            own = None if slopes is None else slopes.expand(sequences, num_heads)[d]
            comparison.add(output[rows], lse[:, rows], q[rows], k[keys], v[keys], own)
        comparison.check()

    for_seeds(first_seed, check)


def paged(key_rows, page_size, draw):
    """Pages of keys or values of several sequences, in random order, and their table; what is unused holds NaN."""
    width = max(1, *(-(-len(rows) // page_size) for rows in key_rows)) + 1
    numbers = draw.sample(range(width * len(key_rows) + 2), width * len(key_rows))
    table = torch.tensor(numbers, dtype=torch.int32, device=DEVICE).view(len(key_rows), width)
    shape = (width * len(key_rows) + 2, page_size, *key_rows[0].shape[1:])
    pages = torch.full(shape, torch.nan, device=DEVICE, dtype=key_rows[0].dtype)
    for rows, own in zip(key_rows, table.tolist(), strict=True):
        for start in range(0, len(rows), page_size):
            part = rows[start : start + page_size]
            pages[own[start // page_size], : len(part)] = part
    return pages, table


@pytest.mark.parametrize("first_seed", SEEDS)
def test_varlen_over_pages(first_seed):
    def check(draw):
        sequences, (num_heads, num_kv_heads, dim), dtype = draw.randint(1, 3), draw_heads(draw), draw.choice(DTYPES)
        lens_k = [draw.choice([0, 1, 30, 70]) for _ in range(sequences)]
        lens_q, unused = [draw.choice([0, 1, 5, 33]) for _ in range(sequences)], draw.choice([0, 3])
        q = normal(sum(lens_q) + unused, num_heads, dim, dtype=dtype)
        keys, values = ([normal(n, num_kv_heads, dim, dtype=dtype) for n in lens_k] for _ in range(2))
        order, page_size, options = draw.random(), draw.choice([4, 16, 300, 512]), Options.draw(draw)
        (k, table), (v, _) = (paged(rows, page_size, random.Random(order)) for rows in (keys, values))
        ends = offsets(lens_q)
        output, lse, _ = flash_attn_varlen_func(
            q, k, v, ends, offsets(lens_k), max(lens_q), max(lens_k), block_table=table, return_attn_probs=True,
            **vars(options),
        )  # fmt: skip
        assert not output[sum(lens_q) :].any() and (lse[:, sum(lens_q) :] == -math.inf).all()
        comparison = Comparison(options)
        for d in range(sequences):
            rows = slice(int(ends[d]), int(ends[d + 1]))
            comparison.add(output[rows], lse[:, rows], q[rows], keys[d], values[d])
        comparison.check()

    for_seeds(first_seed, check)


# ---------------------------------------------------------------------- caches


def rotated(x, cos, sin, positions, interleaved):
    """Rotary embedding of `[tokens, heads, dim]` with complex numbers, in float64."""
    half = cos.shape[1]
    x = x.double()
    turn = torch.complex(cos.double(), sin.double())[positions][:, None]
    columns = torch.arange(2 * half, device=x.device).view(-1, 2) if interleaved else None
    columns = torch.arange(2 * half, device=x.device).view(2, -1).T if columns is None else columns
    pairs = torch.complex(x[..., columns[:, 0]], x[..., columns[:, 1]]) * turn
    result = x.clone()
    result[..., columns[:, 0]], result[..., columns[:, 1]] = pairs.real, pairs.imag
    return result


@pytest.mark.parametrize("first_seed", SEEDS)
def test_kvcache(first_seed):
    """Contiguous and paged caches: what is appended, where, and what is seen."""

    def check(draw):
        batch, (num_heads, num_kv_heads, dim), dtype = draw.randint(1, 3), draw_heads(draw), draw.choice(DTYPES)
        seqlen_q, new = draw.choice([1, 1, 2, 20]), draw.choice([0, 1, 2, 20])
        in_pages, capacity, options = draw.random() < 0.5, 96, Options.draw(draw)
        before = [draw.choice([0, 1, 30, capacity - 20]) for _ in range(batch)]
        full = not new and draw.random() < 0.2
        before = [capacity] * batch if full else before
        q = normal(batch, seqlen_q, num_heads, dim, dtype=dtype)
        k, v = (normal(batch, new, num_kv_heads, dim, dtype=dtype) if new else None for _ in range(2))
        rows = list(range(batch))
        arguments = {"cache_seqlens": None if full else torch.tensor(before, dtype=torch.int32, device=DEVICE)}
        if len(set(before)) == 1 and not full:
            arguments["cache_seqlens"] = before[0]
        first, slopes = [0] * batch, None
        if in_pages:
            old = [[normal(capacity, num_kv_heads, dim, dtype=dtype) for _ in range(batch)] for _ in range(2)]
            order, page_size = draw.random(), draw.choice([4, 16, 32])
            (k_cache, table), (v_cache, _) = (paged(each, page_size, random.Random(order)) for each in old)
            arguments["block_table"] = table[:, : capacity // page_size]

            def stored(cache, b):
                return cache[arguments["block_table"][b].long()].flatten(0, 1)
        else:
            k_cache, v_cache = (normal(batch + 2, capacity, num_kv_heads, dim, dtype=dtype) for _ in range(2))
            if draw.random() < 0.4:
                rows = draw.sample(range(batch + 2), batch)
                arguments["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
            if draw.random() < 0.4:
                first = [draw.randint(0, length) for length in before]
                arguments["cache_leftpad"] = torch.tensor(first, dtype=torch.int32, device=DEVICE)
            if draw.random() < 0.4:
                slopes = torch.rand(batch, num_heads, device=DEVICE) * 0.5
                arguments["alibi_slopes"] = slopes

            def stored(cache, b):
                return cache[rows[b]]

        untouched = k_cache.clone(), v_cache.clone()
        output, lse = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, num_splits=draw.choice([0, 1, 3]), return_softmax_lse=True, **arguments,
            **vars(options),
        )  # fmt: skip
        comparison = Comparison(options)
        for b in range(batch):
            end = before[b] + new
            for now, then, added in ((k_cache, untouched[0], k), (v_cache, untouched[1], v)):
                expected = stored(then, b).clone()
                if added is not None:
                    expected[before[b] : end] = added[b]
                assert torch.equal(stored(now, b), expected)
            own = None if slopes is None else slopes[b]
            seen = (stored(cache, b)[first[b] : end] for cache in (k_cache, v_cache))
            comparison.add(output[b], lse[b], q[b], *seen, own)
        comparison.check()

    for_seeds(first_seed, check)


@pytest.mark.parametrize("in_pages", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("window", [{}, {"causal": True}, {"window_size": (9, 0)}])
def test_kvcache_with_rotary_embedding(window, interleaved, in_pages):
    torch.manual_seed(0)
    before, new, dim, capacity = [5, 0], 3, 40, 32
    q, (k, v) = normal(2, new, 4, dim), (normal(2, new, 2, dim) for _ in range(2))
    k_cache, v_cache = normal(4, 16, 2, dim), normal(4, 16, 2, dim)
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32, device=DEVICE)
    rows = [[cache[table[b].long()].flatten(0, 1) for b in range(2)] for cache in (k_cache, v_cache)]
    angle = torch.rand(capacity, 16, device=DEVICE) * 6
    arguments = {"cache_seqlens": torch.tensor(before, dtype=torch.int32, device=DEVICE)}
    if in_pages:
        arguments["block_table"] = table
    else:
        k_cache, v_cache = (torch.stack(each) for each in rows)
    output = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, angle.cos(), angle.sin(), rotary_interleaved=interleaved, **arguments, **window
    )
    for b, length in enumerate(before):
        place = torch.arange(length, length + new, device=DEVICE)
        new_k = rotated(k[b], angle.cos(), angle.sin(), place, interleaved)
        own_q = rotated(q[b], angle.cos(), angle.sin(), place if window else place[:1].expand(new), interleaved)
        stored = k_cache[table[b].long()].flatten(0, 1) if in_pages else k_cache[b]
        torch.testing.assert_close(stored[place], new_k.float())
        keys, values = torch.cat([rows[0][b][:length].double(), new_k]), torch.cat([rows[1][b][:length], v[b]])
        expected, _ = Options(**window).reference(own_q, keys, values.double(), torch.float64)
        torch.testing.assert_close(output[b].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [(1, 9), (9, 1), (7, 7), (5, 11), (11, 5)])
def test_spans_of_lengths_are_shared_and_those_of_alibi(lengths):
    device = torch.device(DEVICE)
    for left, right in itertools.product((None, 0, 3, 1 << 40), (None, 0, 2, 1 << 40)):
        window = positions.Window(left, right)
        spans = positions.aligned_spans(window, *lengths, device)
        expected = positions.aligned_rows(*lengths, device).window(window)
        assert torch.equal(spans.to_dense(), expected.to_dense())
        assert positions.aligned_spans(window, *lengths, device) is spans


def test_kvcache_does_not_track_gradients():
    q = normal(1, 1, 2, 8).requires_grad_()
    k, v = normal(1, 1, 2, 8).requires_grad_(), normal(1, 1, 2, 8)
    k_cache, v_cache = normal(1, 4, 2, 8), normal(1, 4, 2, 8)
    assert not flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=2).requires_grad
    assert not k_cache.requires_grad


# ---------------------------------------------------------------------- gradients, dropout, packed tensors


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("options", [Options(), Options(causal=True), Options(window_size=(4, 2), softcap=3.0)])
def test_gradients(options, alibi):
    """Of all inputs and through the log-sum-exp, of the one function and of the other."""
    torch.manual_seed(0)
    lens_q, lens_k = [9, 1, 5], [7, 6, 12]
    slopes = torch.rand(3, 4, device=DEVICE) * 0.5 if alibi else None
    leaves = [normal(sum(lens), heads, 16) for lens, heads in ((lens_q, 4), (lens_k, 2), (lens_k, 2))]
    weight, lse_weight = normal(sum(lens_q), 4, 16), normal(4, sum(lens_q))
    own = [
        [leaf[sum(lens[:d]) : sum(lens[: d + 1])] for leaf, lens in zip(leaves, (lens_q, lens_k, lens_k), strict=True)]
        for d in range(3)
    ]

    def gradients(run, leaves):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        output, lse = run(*leaves)
        seen = lse.isfinite()
        loss = (output * weight[: len(output)]).sum() + (torch.where(seen, lse, 0) * lse_weight[:, : len(output)]).sum()
        return torch.autograd.grad(loss, leaves)

    def packed(q, k, v):
        lengths = offsets(lens_q), offsets(lens_k), max(lens_q), max(lens_k)
        return flash_attn_varlen_func(
            q, k, v, *lengths, alibi_slopes=slopes, return_attn_probs=True, **vars(options)
        )[:2]  # fmt: skip

    def reference(q, k, v):
        parts = [torch.split(each, lens) for each, lens in ((q, lens_q), (k, lens_k), (v, lens_k))]
        parts = [
            options.reference(*part, torch.float64, None if slopes is None else slopes[d])
            for d, part in enumerate(zip(*parts, strict=True))
        ]
        return torch.cat([output for output, _ in parts]), torch.cat([lse for _, lse in parts], 1)

    def assert_equal_gradients(ours, reference, leaves):
        exact = gradients(reference, [leaf.double() for leaf in leaves])
        for one, truth in zip(gradients(ours, leaves), exact, strict=True):
            torch.testing.assert_close(one.double(), truth, rtol=1e-4, atol=1e-4)

    assert_equal_gradients(packed, reference, leaves)
    slopes = None if slopes is None else slopes[:1]

    def single(q, k, v):
        output, lse, _ = flash_attn_func(
            q[None], k[None], v[None], alibi_slopes=slopes, return_attn_probs=True, **vars(options)
        )
        return output[0], lse[0]

    def reference_of_one(q, k, v):
        return options.reference(q, k, v, torch.float64, None if slopes is None else slopes[0])

    assert_equal_gradients(single, reference_of_one, own[0])


def test_dropout_repeats_by_seed():
    q, k, v = (normal(2, 40, 2, 16) for _ in range(3))
    lengths = offsets([40, 40]), offsets([40, 40]), 40, 40
    slopes = torch.rand(2, device=DEVICE)

    def outputs(seed, **options):
        torch.manual_seed(seed)
        packed = (each.flatten(0, 1) for each in (q, k, v))
        return flash_attn_func(q, k, v, 0.4, **options), flash_attn_varlen_func(*packed, *lengths, 0.4, **options)

    for options in ({}, {"alibi_slopes": slopes}):
        drawn = (outputs(seed, **options) for seed in (0, 0, 1))
        for one, again, other in zip(*drawn, strict=True):
            assert torch.equal(one, again)
            assert not torch.equal(one, other)
    # Kept weights make up for the dropped.
    torch.manual_seed(0)
    many, values = normal(1, 600, 1, 8), torch.ones(1, 50, 1, 8, device=DEVICE)
    mean = flash_attn_func(many, normal(1, 50, 1, 8), values, dropout_p=0.3).mean()
    assert abs(float(mean) - 1) < 0.03


def test_packed_tensors():
    torch.manual_seed(0)
    qkv, cu = normal(2, 12, 3, 2, 16), offsets([12, 12])
    q, k, v = qkv.unbind(2)
    options = {"causal": True, "window_size": (5, 5), "softcap": 3.0, "softmax_scale": 0.3}
    expected = flash_attn_func(q, k, v, **options)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, **options), expected)
    assert torch.equal(flash_attn_kvpacked_func(q, qkv[:, :, 1:], **options), expected)
    flat, one = qkv.flatten(0, 1), expected.flatten(0, 1)
    for packed in (
        flash_attn_varlen_qkvpacked_func(flat, cu, 12, **options),
        flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 12, 12, **options),
    ):
        torch.testing.assert_close(packed, one, rtol=1e-5, atol=1e-6)


def test_nothing_is_read_back():
    """Fake tensors have no values: whatever looked at one, which on a GPU is a synchronisation, would fail."""
    with FakeTensorMode():
        q, k, v = (torch.randn(10, heads, 16) for heads in (4, 2, 2))
        lengths, slopes = torch.zeros(4, dtype=torch.int32), torch.rand(3, 4)
        options = {"window_size": (3, 4), "softcap": 2.0}
        output = flash_attn_varlen_func(q, k, v, lengths, lengths, 5, 5, 0.1, alibi_slopes=slopes, **options)
        assert output.shape == q.shape
        output = flash_attn_func(q[None], k[None], v[None], 0.1, alibi_slopes=slopes[0], **options)
        assert output.shape == (1, 10, 4, 16)
        index = torch.zeros(1, dtype=torch.int32)
        output = flash_attn_with_kvcache(
            q[None], k[None], v[None], k[None, :2], v[None, :2], cache_seqlens=index, cache_leftpad=index,
            cache_batch_idx=index, **options,
        )  # fmt: skip
        assert output.shape == (1, 10, 4, 16)


def test_compiled_without_breaks():
    torch.manual_seed(0)
    q, k, v = (normal(1, 10, heads, 16).requires_grad_() for heads in (4, 2, 2))
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
    for options in ({"causal": True, "window_size": (3, 3)}, {"alibi_slopes": torch.rand(4, device=DEVICE)}):
        ours, plain = (function(q, k, v, **options) for function in (compiled, flash_attn_func))
        torch.testing.assert_close(ours, plain)
        for one, other in zip(*(torch.autograd.grad(each.sum(), (q, k, v)) for each in (ours, plain)), strict=True):
            torch.testing.assert_close(one, other)
    lengths = offsets([4, 6]), offsets([4, 6]), 6, 6
    compiled = torch.compile(flash_attn_varlen_func, fullgraph=True, backend="aot_eager")
    ours, plain = (f(q[0], k[0], v[0], *lengths, causal=True) for f in (compiled, flash_attn_varlen_func))
    torch.testing.assert_close(ours, plain)


# ---------------------------------------------------------------------- signatures and refusals

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flash_attn_func", f"q, k, v, {COMMON}"),
        ("flash_attn_kvpacked_func", f"q, kv, {COMMON}"),
        ("flash_attn_qkvpacked_func", f"qkv, {COMMON}"),
        ("flash_attn_varlen_func", f"q, k, v, {LENGTHS}, {COMMON}, block_table=None"),
        ("flash_attn_varlen_kvpacked_func", f"q, kv, {LENGTHS}, {COMMON}"),
        ("flash_attn_varlen_qkvpacked_func", f"qkv, cu_seqlens, max_seqlen, {COMMON}"),
        (
            "flash_attn_with_kvcache",
            "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
            "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
            "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
            "return_softmax_lse=False",
        ),
    ],
)
def test_signatures_are_those_of_flash_attn(name, arguments):
    assert name in flash_api.__all__
    parameters = inspect.signature(getattr(flash_api, name)).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    assert ", ".join(map(str, plain)) == arguments


Q = torch.zeros(2, 3, 2, 8, device=DEVICE)
PAGES = torch.zeros(4, 4, 2, 8, device=DEVICE)
TABLE = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
INDEX = torch.zeros(2, dtype=torch.int32, device=DEVICE)
ANGLES = torch.zeros(3, 4, device=DEVICE)
WIDE_ANGLES = torch.zeros(4, 5, device=DEVICE)
LENS = torch.tensor([0, 1, 3], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": Q[0]}, r"`q` must be \[batch, seqlen, heads, head_dim\], got \[3, 2, 8\]"),
        ({"window_size": 4}, "`window_size` must be two whole numbers"),
        ({"window_size": (1, 2, 3)}, r"`window_size` must be two whole numbers .* -1 is unbounded"),
        ({"window_size": (1.0, 2)}, "`window_size` must be two whole numbers"),
        ({"alibi_slopes": torch.zeros(3, device=DEVICE)}, r"`alibi_slopes` must be .* = \[2\] or .* = \[2, 2\]"),
        ({"alibi_slopes": INDEX}, "`alibi_slopes` must be floating point"),
        (
            {"return_attn_probs": True, "dropout_p": 0.1},
            "`return_attn_probs` with `dropout_p`=0.1 is refused: .*_weights",
        ),
        ({"dropout_p": 1.5}, "`dropout_p` must be 0 to 1"),
        ({"k": torch.zeros(2, 3, 4, 8, device=DEVICE)}, "`key` and `value` must share heads"),
    ],
)
def test_bad_calls_of_func(change, words):
    with pytest.raises(ValueError, match=words):
        flash_attn_func(**{"q": Q, "k": Q, "v": Q} | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": Q}, r"`q` must be \[total, heads, head_dim\]"),
        ({"k": Q}, r"`k` must be \[total, heads, head_dim\]"),
        ({"softcap": "30"}, "`softcap` must be a finite number, got '30'"),
        ({"cu_seqlens_q": LENS.float()}, r"`cu_seqlens_q` must be int32 or int64 of shape \[sequences \+ 1\]"),
        ({"cu_seqlens_k": LENS[:2]}, "`cu_seqlens_k` must be int32 or int64 .* the same for queries and keys"),
        ({"alibi_slopes": torch.zeros(1, 2, device=DEVICE)}, r"`alibi_slopes` must be .* = \[2, 2\]"),
        ({"return_attn_probs": True, "dropout_p": 0.1}, "`return_attn_probs` with `dropout_p`=0.1 is refused"),
        ({"block_table": TABLE}, r"`k` must be \[pages, page_size, heads, head_dim\]"),
        ({"block_table": TABLE, "k": PAGES, "v": PAGES, "dropout_p": 0.1}, "`dropout_p`=0.1 with `block_table`"),
        (
            {"block_table": TABLE, "k": PAGES, "v": PAGES, "alibi_slopes": torch.zeros(2, device=DEVICE)},
            "`alibi_slopes` with `block_table` is refused: .* gather them first",
        ),
        (
            {"block_table": TABLE, "k": PAGES, "v": PAGES, "q": Q[0].clone().requires_grad_()},
            "`block_table` with tensors that require gradients is refused: .*no_grad",
        ),
    ],
)
def test_bad_calls_of_varlen(change, words):
    given = {"q": Q[0], "k": Q[0], "v": Q[0], "cu_seqlens_q": LENS, "cu_seqlens_k": LENS}
    with pytest.raises(ValueError, match=words):
        flash_attn_varlen_func(**given | {"max_seqlen_q": 2, "max_seqlen_k": 2} | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": Q[0]}, r"`q` must be \[batch, seqlen, heads, head_dim\]"),
        ({"k": Q}, "`k` and `v` go together"),
        ({"k": Q, "v": Q}, "`k` needs `cache_seqlens`"),
        ({"k": Q[0], "v": Q[0], "cache_seqlens": 0}, r"`k` must be \[batch, seqlen, heads, head_dim\]"),
        ({"k": Q[:1], "v": Q[:1], "cache_seqlens": 0}, r"`k` and `v` must be .* the batch and dtype of `q`, 2"),
        ({"k": Q, "v": Q, "cache_seqlens": 2}, "`cache_seqlens` must be 0 to 4 .* less 3 new tokens, got 2 to 2"),
        ({"cache_seqlens": 5}, "`cache_seqlens` must be 0 to 4 .*; make the cache, or the block table, larger"),
        ({"cache_seqlens": INDEX[:1]}, r"`cache_seqlens` must be a number or integers of shape \[batch\] = \[2\]"),
        ({"rotary_cos": ANGLES}, "`rotary_cos` and `rotary_sin` go together"),
        ({"rotary_cos": ANGLES, "rotary_sin": ANGLES}, "`rotary_cos` without `k` is refused"),
        (
            {"rotary_cos": ANGLES, "rotary_sin": ANGLES, "k": Q, "v": Q, "cache_seqlens": 0},
            r"`rotary_cos` and `rotary_sin` must be \[tokens of the cache = 4 or more",
        ),
        (
            {"rotary_cos": WIDE_ANGLES, "rotary_sin": WIDE_ANGLES, "k": Q, "v": Q, "cache_seqlens": 0},
            r"with a rotary_dim of at most 8, got \[4, 5\]",
        ),
        (
            {"k": Q[:, :, :1], "v": Q, "cache_seqlens": 0},
            r"`k` must have the heads, head dim, .* `k_cache`, \[2, 8\] .*, got \[1, 8\] torch.float32",
        ),
        (
            {"k": Q, "v": Q[..., :1], "cache_seqlens": 0},
            r"`v` must have the heads, head dim, .* `v_cache`, \[2, 8\] .*, got \[2, 1\] torch.float32",
        ),
        (
            {"k_cache": PAGES.double(), "k": Q, "v": Q, "cache_seqlens": 0, "block_table": TABLE},
            "`k` must have the .* dtype .* of `k_cache`, .* torch.float64 .* got .* torch.float32 .*; make the cache",
        ),
        ({"block_table": TABLE[0]}, r"`block_table` must be int32 \[batch, pages of the longest\], got torch.int32"),
        ({"softmax_scale": float("nan")}, "`softmax_scale` must be a finite number, got nan; pass None"),
        ({"softmax_scale": "1"}, "`softmax_scale` must be a finite number, got '1'"),
        ({"cache_batch_idx": INDEX.float()}, r"`cache_batch_idx` must be integers of shape \[batch\] = \[2\]"),
        *(
            ({"cache_leftpad": INDEX * 0 + first}, r"`cache_leftpad` must be from 0 to the \[4, 4\] tokens of each")
            for first in ((-1, 5) if DEVICE == "cpu" else ())  # elsewhere looking is not free
        ),
        ({"cache_leftpad": INDEX[:1]}, r"`cache_leftpad` must be integers of shape \[batch\] = \[2\]"),
        (
            {"k_cache": PAGES[:1], "v_cache": PAGES[:1]},
            "a row for each of the 2 sequences, got 1; pass `cache_batch_idx`",
        ),
        ({"block_table": TABLE, "cache_batch_idx": INDEX}, "`cache_batch_idx` with `block_table` is refused"),
        ({"block_table": TABLE, "cache_leftpad": INDEX}, "`cache_leftpad` with `block_table` is refused"),
        ({"block_table": TABLE, "alibi_slopes": INDEX.float()}, "`alibi_slopes` with `block_table` is refused"),
        ({"block_table": TABLE.long()}, "`block_table` must be int32"),
        ({"num_splits": -1}, "`num_splits` must be whole and at least 1, got -1"),
        *(
            ({"k": Q + 1, "v": Q + 1, "cache_seqlens": 1} | late, words)
            for late, words in (  # found before the new keys are written
                ({"num_splits": -1}, "flash_attn_with_kvcache: `num_splits` must be whole and at least 1, got -1"),
                ({"num_splits": -1, "block_table": TABLE}, "flash_attn_with_kvcache: `num_splits` must be whole"),
                ({"alibi_slopes": torch.zeros(3, device=DEVICE)}, "`alibi_slopes` must be"),
                (
                    {"q": torch.ones(2, 3, 3, 8, device=DEVICE)},
                    r"must have the head dim .*, a number of heads that divides its 3, .* \[4, 4, 2, 8\]",
                ),
                ({"q": torch.ones(2, 3, 2, 4, device=DEVICE)}, "must have the head dim and device of `q`, 4 on "),
                ({"softcap": float("inf")}, "`softcap` must be a finite number, got inf"),
                (
                    {"softmax_scale": torch.tensor(1.0, requires_grad=True)},
                    "`softmax_scale` must be a number, got a tensor",
                ),
                ({"v_cache": PAGES[:, :3]}, r"and one length, got \[4, 4, 2, 8\] and \[4, 3, 2, 8\] on .*; make"),
            )
        ),
        ({"softcap": float("nan")}, "`softcap` must be a finite number, got nan; pass 0"),
        (
            {"window_size": None, "rotary_cos": ANGLES, "rotary_sin": ANGLES, "k": Q, "v": Q, "cache_seqlens": 0},
            r"`window_size` must be two whole numbers \(left, right\), got None",
        ),
    ],
)
def test_bad_calls_of_kvcache(change, words):
    before = PAGES.clone()
    with pytest.raises(ValueError, match=words):
        flash_attn_with_kvcache(**{"q": Q, "k_cache": PAGES, "v_cache": PAGES} | change)
    assert torch.equal(PAGES, before), "a call that was refused wrote to the cache"


def test_several_numbers_of_splits():
    with pytest.raises(
        TypeError, match=r"flash_attn_with_kvcache: `num_splits` must be a number, got tensor\(\[1, 2\]"
    ):
        flash_attn_with_kvcache(Q, PAGES, PAGES, num_splits=torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: flash_attn_func(Q, Q, Q, alibi_slopes=[0.5, 0.5]), "`alibi_slopes` must be a tensor, got list"),
        (lambda: flash_attn_func([[1.0]], Q, Q), "flash_attn_func: `q` must be a tensor, got list"),
        (
            lambda: flash_attn_varlen_func(Q[0], Q[0], Q[0], [0, 3], LENS, 2, 2),
            "`cu_seqlens_q` must be a tensor, got list",
        ),
        (
            lambda: flash_attn_with_kvcache(Q, PAGES, PAGES, cache_seqlens=[1, 2]),
            "`cache_seqlens` must be .*, got list",
        ),
        (
            lambda: flash_attn_with_kvcache(Q, PAGES, PAGES, cache_batch_idx=[0, 1]),
            "`cache_batch_idx` must be a tensor",
        ),
        (lambda: flash_attn_qkvpacked_func([Q, Q, Q]), "flash_attn_qkvpacked_func: `qkv` must be a tensor, got list"),
        (
            lambda: flash_attn_varlen_func(Q[0], PAGES, PAGES, LENS, LENS, 2, 2, block_table=[[0]]),
            "`block_table` must be a tensor, got list",
        ),
    ],
)
def test_lists_are_no_tensors(call, words):
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU looking would be a synchronisation")
@pytest.mark.parametrize("wrong", [[0, 3, 2], [-1, 2, 3], [0, 2, 4]])
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_offsets_that_fall_or_lie_beyond_the_tokens_are_found_on_the_cpu(name, wrong):
    offsets = {"cu_seqlens_q": LENS, "cu_seqlens_k": LENS} | {name: torch.tensor(wrong, dtype=torch.int32)}
    with pytest.raises(ValueError, match=f"`{name}` must never fall, from 0 to the 3 tokens .*, got .*{wrong[1]}"):
        flash_attn_varlen_func(Q[0], Q[0], Q[0], **offsets, max_seqlen_q=3, max_seqlen_k=3)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU looking would be a synchronisation")
def test_queries_that_a_length_would_cut_off_are_found_on_the_cpu():
    with pytest.raises(
        ValueError, match=r"`max_seqlen_q` must be a number of at least 2, the most queries of a sequence, got 1"
    ):
        flash_attn_varlen_func(Q[0], PAGES, PAGES, LENS, LENS, 1, 2, block_table=TABLE)
    with pytest.raises(ValueError, match=r"`max_seqlen_q` must be a number of at least 2, .* got None"):
        flash_attn_varlen_func(Q[0], PAGES, PAGES, LENS, LENS, None, 2, block_table=TABLE)


def test_caches_that_are_too_wide_stay_as_they_are():
    wide = torch.zeros(4, 4, 2, 577, device=DEVICE)
    new = torch.ones(2, 1, 2, 577, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"keys must have at most 576 columns and values 512, .* got 577, 577 and torch"
    ):
        flash_attn_with_kvcache(new, wide, wide, new, new, cache_seqlens=0)
    whole = torch.zeros(4, 4, 2, 8, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"in one of the dtypes .* got 8, 8 and torch.int32; cast them"):
        flash_attn_with_kvcache(whole[:2, :1], whole, whole, whole[:2, :1] + 1, whole[:2, :1] + 1, cache_seqlens=0)
    assert not wide.any() and not whole.any()


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU looking would be a synchronisation")
def test_rows_beyond_the_cache_are_found_on_the_cpu():
    with pytest.raises(ValueError, match=r"`cache_batch_idx` must be 0 to 3, rows of the cache, got \[0, 4\]"):
        flash_attn_with_kvcache(Q, PAGES, PAGES, cache_batch_idx=torch.tensor([0, 4]))


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU looking would be a synchronisation")
def test_lengths_beyond_the_cache_are_found_on_the_cpu():
    lengths = torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"`cache_seqlens` must be 0 to 4 .* less 3 new tokens, got 1 to 2"):
        flash_attn_with_kvcache(Q, PAGES, PAGES, Q, Q, cache_seqlens=lengths)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: flash_attn_kvpacked_func(Q, Q[:, :, None]), "`kv` must have 5 dimensions, of which .* is 2"),
        (lambda: flash_attn_qkvpacked_func(Q), "`qkv` must have 5 dimensions, of which the third from the end is 3"),
        (lambda: flash_attn_varlen_kvpacked_func(Q[0], Q, LENS, LENS, 2, 2), "`kv` must have 4 dimensions"),
        (lambda: flash_attn_varlen_qkvpacked_func(Q[0], LENS, 2), "`qkv` must have 4 dimensions"),
    ],
)
def test_bad_packed_tensors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
