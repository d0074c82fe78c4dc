# SPDX-License-Identifier: Apache-2.0
"""What layers of a model share when they decode on the CPU: which calls are remembered, and that none is mistaken."""

from __future__ import annotations

import gc
import math
import random

import pytest
import torch

from attention_kernels import Spans, attention, attention_reference, blockwise
from attention_kernels.blockwise import fused, remembered, tokens
from attention_kernels.paths import interpreting

from helpers import DTYPES, assert_within_bound

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter runs kernels on CPU tensors")

KEYS = 200


WAYS = {
    "few keys": (),
    "many keys": ((tokens, "CACHED_BYTES", 0),),
    "head by head": ((fused, "FEWEST_FOLDED", dict.fromkeys(DTYPES, 9)),),
    "rows together": ((fused, "FEWEST_FOLDED", {}), (tokens, "FEWEST_ROWS", dict.fromkeys(DTYPES, 2))),
}
"""What processors, or calls of some size, do in their own ways, so that each is tested on all."""


@pytest.fixture(autouse=True, params=WAYS.values(), ids=WAYS)
def way(request, monkeypatch, nothing_known):
    """One way of decoding, and nothing is remembered yet."""
    for changed in request.param:
        monkeypatch.setattr(*changed)


def padded_spans(pads=(0, 0, 70, 110)):
    shown = torch.arange(KEYS) >= torch.tensor(pads)[:, None]
    return Spans.causal(1, KEYS) & Spans.padded(shown, 1)


def operands(dtype=torch.float32, batch=4, num_kv_heads=2):
    query = torch.randn(batch, 4, 1, 32).to(dtype)
    return query, *(torch.randn(batch, num_kv_heads, KEYS, 32).to(dtype) for _ in range(2))


def check(given, spans, **options):
    output, lse = attention(*given, spans, return_lse=True, **options)
    dense = {"mask": spans.to_dense()[:, None], **options}
    exact, exact_lse = attention_reference(*given, **dense)
    eager, _ = attention_reference(*given, dtype=given[0].dtype, **dense)
    if output.dtype == torch.float64:
        torch.testing.assert_close(output, exact)
    else:
        assert_within_bound(output, eager, exact)
    tolerance = 1e-12 if output.dtype == torch.float64 else 2e-5 if output.dtype == torch.float32 else 1e-4
    torch.testing.assert_close(lse.double(), exact_lse, rtol=tolerance, atol=tolerance)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_layers_are_checked_once(dtype, num_kv_heads, checked_calls):
    torch.manual_seed(0)
    spans = padded_spans()
    for layer in range(3):
        with torch.inference_mode(layer == 2):
            check(operands(dtype, num_kv_heads=num_kv_heads), spans)
    assert len(checked_calls) == 1


def test_full_and_windowed_layers_take_turns(checked_calls):
    torch.manual_seed(0)
    kinds = padded_spans(), Spans.sliding(1, KEYS, left=30, offset=KEYS - 1)
    for _ in range(3):
        for spans in kinds:
            check(operands(), spans)
    assert len(checked_calls) == len(kinds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_with_sinks_are_checked_once(dtype, checked_calls):
    torch.manual_seed(0)
    spans = padded_spans()
    for _ in range(3):
        check(operands(dtype), spans, sinks=torch.randn(4).to(dtype))
    assert len(checked_calls) == 1
    with pytest.raises(ValueError, match="num_heads"):
        attention(*operands(dtype), spans, sinks=torch.randn(1).to(dtype))


def test_what_differs_is_checked_anew(checked_calls):
    torch.manual_seed(0)
    spans = padded_spans()
    query, key, value = operands()
    attention(query, key, value, spans)

    def by_token(tensor):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    other = {
        "scale": lambda: check((query, key, value), spans, scale=0.3),
        "heads": lambda: check(operands(num_kv_heads=1), spans),
        "dtype": lambda: check(operands(torch.bfloat16), spans),
        "strides": lambda: check((query, by_token(key), by_token(value)), spans),
        "spans": lambda: check((query, key, value), padded_spans((1, 2, 3, 4))),
        "softcap": lambda: attention(query, key, value, spans, softcap=2.0),
        "sinks": lambda: check((query, key, value), spans, sinks=torch.randn(4)),
        "gradient": lambda: attention(query.requires_grad_(), key, value, spans),
    }
    for number, (name, call) in enumerate(other.items(), start=2):
        call()
        assert len(checked_calls) == number, name


def test_wrong_arguments_are_refused_after_right_ones():
    torch.manual_seed(0)
    spans = padded_spans()
    query, key, value = operands()
    attention(query, key, value, spans)
    with pytest.raises(ValueError, match="scale"):
        attention(query, key, value, spans, scale=math.inf)
    with pytest.raises(ValueError, match="num_splits"):
        attention(query, key, value, spans, num_splits=0)
    with pytest.raises(ValueError, match="build it for their lengths"):
        attention(query, key[:, :, 1:], value[:, :, 1:], spans)
    with pytest.raises(TypeError, match="one dtype"):
        attention(query, key, value.double(), spans)


def test_spans_changed_in_place_are_seen(checked_calls):
    torch.manual_seed(0)
    spans = padded_spans()
    given = operands()
    attention(*given, spans)
    spans.start.fill_(150)
    check(given, spans)
    assert len(checked_calls) == 2


def test_other_spans_at_the_same_place_are_not_mistaken():
    """Python gives the address of what is gone to what comes next."""
    torch.manual_seed(0)
    given = operands()
    for first in range(0, 150, 10):
        spans = Spans.sliding(1, KEYS, left=first, offset=KEYS - 1)
        check(given, spans)
        check(given, spans)
        del spans
        gc.collect()


@pytest.fixture
def calls_with_products(monkeypatch):
    """Parts that were computed by two products, as a growing list."""
    calls, two_products = [], tokens.two_products
    monkeypatch.setattr(tokens, "two_products", lambda *given: calls.append(given) or two_products(*given))
    return calls


def test_many_keys_take_two_products_where_they_are_matrices(calls_with_products):
    torch.manual_seed(0)
    many = tokens.CACHED_BYTES == 0
    spans, (query, key, value) = padded_spans(), operands()
    by_token = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (key, value)]
    for given, expected in (
        ((query, key, value), many),
        ((query, key, by_token[1]), False),
        ((query, by_token[0], value), False),
        ([each.double() for each in (query, key, value)], False),
        ([each[:, :, :, ::2] for each in (query, key, value)], False),  # columns that are not side by side
        ((query, key.repeat(1, 1, 2, 1)[:, :, :KEYS], value), many),  # a cache with room for more
        ((query[:, :2], by_token[0][:, :1], by_token[1][:, :1]), many),  # one head of keys
    ):
        calls_with_products.clear()
        check(given, spans)
        check(given, spans)
        assert bool(calls_with_products) == expected


@pytest.mark.parametrize("seed", range(20))
def test_random_calls(seed):
    """Groups, odd sizes, scores of any size, whole caches and padded ones; the second time from memory."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, num_kv_heads, keys, dim = (draw.randint(1, most) for most in (5, 3, 700, 80))
    query = torch.randn(batch, num_kv_heads * draw.randint(1, 9), 1, dim) * draw.choice([0.01, 1.0, 30.0])
    key, value = (torch.randn(batch, num_kv_heads, keys, dim) for _ in range(2))
    shown = torch.arange(keys) >= torch.tensor([draw.choice([0, draw.randrange(keys)]) for _ in range(batch)])[:, None]
    spans = Spans.causal(1, keys) & Spans.padded(shown, 1) if draw.random() < 0.7 else Spans.full(1, keys)
    for _ in range(2):
        check((query, key, value), spans)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_hidden_nonfinite_values_do_not_leak_from_remembered_calls(poison, monkeypatch):
    monkeypatch.setattr(blockwise.problem, "CALL_NUMBERS", 1 << 18)  # sequences are computed together, with a mask
    torch.manual_seed(0)
    spans = padded_spans()
    query, key, value = operands()
    expected = attention(query, key, value, spans)
    assert any(part.mask is not None for part in next(iter(remembered._known.values())).compute.args[0])
    hidden = ~spans.to_dense()[:, 0, None, :, None]
    key, value = (each.masked_fill(hidden, poison) for each in (key, value))
    torch.testing.assert_close(attention(query, key, value, spans), expected)
    value[1, 0, 5] = math.nan
    output = attention(query, key, value, spans)
    assert output[1, :2].isnan().all()
    torch.testing.assert_close(output[[0, 2, 3]], expected[[0, 2, 3]])


def test_autocast_is_followed():
    torch.manual_seed(0)
    spans, given = padded_spans(), operands()
    assert attention(*given, spans).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*given, spans).dtype == torch.bfloat16
    assert attention(*given, spans).dtype == torch.float32


def test_few_spans_are_remembered():
    torch.manual_seed(0)
    given, kept = operands(), [padded_spans((0, 1, 2, pad)) for pad in range(10)]
    for spans in kept:
        attention(*given, spans)
    assert len(remembered._known) == remembered.MOST_SPANS
