# SPDX-License-Identifier: Apache-2.0
"""Dropout: the same mask on every path, drawn as it should be, and right output and gradients under it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attention_kernels import Spans, attention, attention_reference, blockwise
from attention_kernels.dropout import draw_seed, keep_mask, squares, threshold_and_scale
from attention_kernels.paths import interpreting

from helpers import DEVICE, DTYPES, assert_within_bound

on_every_path = pytest.mark.interpreter

slow_in_interpreter = pytest.mark.exhaustive if interpreting() else pytest.mark.interpreter

CALLS = {
    "causal": lambda n: {"spans": Spans.causal(n, device=DEVICE)},
    "sliding": lambda n: {"spans": Spans.sliding(n, left=20, device=DEVICE), "softcap": 5.0},
    "padded": lambda n: {
        "spans": Spans.causal(n, device=DEVICE) & Spans.padded(torch.arange(n, device=DEVICE)[None] % 7 != 3, n),
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE),
    },
    "bias": lambda n: {"bias": torch.randn(1, 4, 1, n, device=DEVICE)},
}
"""Arguments of a call with 4 heads and `n` tokens."""


def tensors(*, tokens=70, batch=2, num_heads=4, num_kv_heads=2, dim=16, dtype=torch.float32):
    """Random query, key and value that want gradients."""
    torch.manual_seed(tokens)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return [torch.randn(batch, n, tokens, dim, device=DEVICE).to(dtype).requires_grad_() for n in heads]


def seed_of(number):
    return torch.tensor([number], dtype=torch.int64, device=DEVICE)


def mask_of(seed, dropout_p, batch, num_heads, query_len, key_len):
    """`[batch, num_heads, query_len, key_len]`, True where kept."""
    heads, rows, keys = (torch.arange(size, device=seed.device) for size in (batch * num_heads, query_len, key_len))
    heads = heads.reshape(batch, num_heads, 1, 1)
    return keep_mask(seed, dropout_p, heads, rows[:, None], keys, query_len, key_len)


# ---------------------------------------------------------------------- which weights are kept


def squares_of_integers(counter, seed):
    """The generator in Python's integers, from the two papers."""
    low = (1 << 64) - 1
    key = (seed + 0x9E3779B97F4A7C15) & low
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & low
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & low
    key = (key ^ (key >> 31)) | 1
    x = y = (counter * key) & low
    z = (y + key) & low
    for added in (y, z, y):
        x = (x * x + added) & low
        x = (x >> 32) | ((x << 32) & low)
    return ((x * x + z) & low) >> 32


@pytest.mark.parametrize("seed", [0, 1, -1, 12345, (1 << 63) - 1, -(1 << 63)])
def test_random_numbers_are_those_of_the_papers(seed):
    counters = [0, 1, 2, 63, (1 << 32) - 1, 1 << 32, (1 << 40) + 7, (1 << 62) + 12345, (1 << 63) - 1]
    expected = [squares_of_integers(counter, seed) for counter in counters]
    assert squares(torch.tensor(counters), torch.tensor([seed])).tolist() == expected


@pytest.mark.parametrize("dropout_p", [1e-3, 0.1, 0.5, 0.999])
def test_mask_compares_random_numbers(dropout_p):
    """Each weight's number is that of its place in `[batch, num_heads, query_len, key_len]`."""
    mask = mask_of(torch.tensor([7]), dropout_p, 2, 3, 5, 11)
    numbers = squares(torch.arange(mask.numel()), torch.tensor([7])).view_as(mask)
    assert torch.equal(mask, numbers >= round(dropout_p * 2**24) << 8)


def test_mask_of_a_part_is_part_of_the_mask():
    whole = mask_of(torch.tensor([3]), 0.3, 2, 4, 600, 500)
    heads = torch.tensor([2, 5]).reshape(2, 1, 1, 1)  # head 2 of the first sequence, head 1 of the second
    part = keep_mask(torch.tensor([3]), 0.3, heads, torch.arange(100, 557)[:, None], torch.arange(33, 480), 600, 500)
    assert torch.equal(part[0, 0], whole[0, 2, 100:557, 33:480])
    assert torch.equal(part[1, 0], whole[1, 1, 100:557, 33:480])


@pytest.mark.parametrize("dropout_p", [1e-4, 0.01, 0.1, 0.5, 0.9, 0.9999])
def test_as_many_are_kept_as_should_be(dropout_p):
    threshold, scale = threshold_and_scale(dropout_p)
    share = 1 - threshold / 2**24
    assert abs(share - (1 - dropout_p)) <= 2**-25
    assert math.isclose(share * scale, 1.0)
    mask = mask_of(torch.tensor([11]), dropout_p, 2, 4, 512, 512)
    deviation = math.sqrt(mask.numel() * share * (1 - share))
    assert abs(int(mask.sum()) - mask.numel() * share) < 5 * deviation


def correlation_in_sigmas(left, right, share):
    """The correlation of two masks in standard deviations of that of independent ones."""
    left, right = left.double() - share, right.double() - share
    return float((left * right).sum() / (share * (1 - share) * math.sqrt(left.numel())))


def test_weights_are_dropped_independently():
    share = 0.7
    mask = mask_of(torch.tensor([5]), 1 - share, 3, 4, 256, 256)
    for dim, name in enumerate(("batch elements", "heads", "rows", "keys")):
        for distance in (1, 2):
            size = mask.shape[dim] - distance
            pair = mask.narrow(dim, 0, size), mask.narrow(dim, distance, size)
            assert abs(correlation_in_sigmas(*pair, share)) < 5, f"{name} at distance {distance}"
    assert abs(correlation_in_sigmas(mask, mask.transpose(-1, -2), share)) < 5 * math.sqrt(2)


def test_seeds_are_independent():
    share = 0.5
    seeds = [0, 1, 2, 3, 4, -1, 1 << 32, 1 << 62]
    masks = [mask_of(torch.tensor([seed]), 1 - share, 1, 2, 256, 256) for seed in seeds]
    for index, mask in enumerate(masks):
        for other in masks[:index]:
            assert abs(correlation_in_sigmas(mask, other, share)) < 5
            # Neither is one the other a step later.
            assert abs(correlation_in_sigmas(mask[..., 1:], other[..., :-1], share)) < 5


# ---------------------------------------------------------------------- attention under a mask


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_output_and_gradients(call, dtype):
    inputs, arguments = tensors(dtype=dtype), CALLS[call](70)
    spans = arguments.pop("spans", Spans.full(70, device=DEVICE))
    grad = torch.randn(2, 4, 70, 16, device=DEVICE).to(dtype)
    keep, scale = mask_of(seed_of(9), 0.3, 2, 4, 70, 70), threshold_and_scale(0.3)[1]

    def of_reference(wide):
        leaves = [each.detach().to(wide).requires_grad_() for each in inputs]
        output, lse = attention_reference(
            *leaves, mask=spans.to_dense()[:, None], keep=keep, keep_scale=scale, dtype=wide, **arguments
        )
        return output, lse, torch.autograd.grad(output, leaves, grad.to(wide))

    output, lse = attention(*inputs, spans, dropout_p=0.3, dropout_seed=seed_of(9), return_lse=True, **arguments)
    gradients = torch.autograd.grad(output, inputs, grad)
    exact, exact_lse, exact_gradients = of_reference(torch.float64)
    eager, _, eager_gradients = of_reference(dtype)
    assert_within_bound(output, eager, exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)
    for name, *triple in zip(("query", "key", "value"), gradients, eager_gradients, exact_gradients, strict=True):
        assert_within_bound(*triple, f"gradient of {name}")


@on_every_path
def test_gradients_of_bias_and_sinks():
    inputs = tensors()
    bias = torch.randn(1, 4, 70, 70, device=DEVICE, requires_grad=True)
    sinks = torch.randn(4, device=DEVICE, requires_grad=True)
    keep, scale = mask_of(seed_of(2), 0.2, 2, 4, 70, 70), threshold_and_scale(0.2)[1]
    output = attention(*inputs, bias=bias, sinks=sinks, dropout_p=0.2, dropout_seed=seed_of(2))
    exact, _ = attention_reference(*inputs, bias=bias, sinks=sinks, keep=keep, keep_scale=scale)
    grad = torch.randn_like(output)
    actual = torch.autograd.grad(output, (bias, sinks), grad)
    expected = torch.autograd.grad(exact, (bias, sinks), grad.double())
    for ours, truth in zip(actual, expected, strict=True):
        assert (ours - truth).norm() <= 1e-6 * truth.norm()


def gradients_under(inputs, **arguments):
    output = attention(*inputs, Spans.causal(inputs[0].shape[2], device=DEVICE), **arguments)
    return output, *torch.autograd.grad(output.square().sum(), inputs)


def equal_bits(left, right):
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="tiles of the torch path")
def test_tiles_do_not_change_the_mask(monkeypatch):
    """However rows are cut."""
    inputs = tensors(tokens=300)
    padded = torch.arange(300)[None] >= torch.tensor([[40], [0]])
    spans = Spans.causal(300) & Spans.padded(padded, 300)
    arguments = {"dropout_p": 0.3, "dropout_seed": seed_of(4)}

    def run():
        output = attention(*inputs, spans, **arguments)
        return output, *torch.autograd.grad(output.square().sum(), inputs)

    expected = run()
    monkeypatch.setattr(blockwise.written_out, "TILE_SCORES", 1 << 14)
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)


@on_every_path
def test_seed_decides():
    inputs = tensors()
    first = gradients_under(inputs, dropout_p=0.2, dropout_seed=seed_of(1))
    assert equal_bits(first, gradients_under(inputs, dropout_p=0.2, dropout_seed=seed_of(1)))
    assert not torch.equal(first[0], gradients_under(inputs, dropout_p=0.2, dropout_seed=seed_of(2))[0])


@on_every_path
@slow_in_interpreter
def test_manual_seed_decides():
    inputs = tensors()
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(gradients_under(inputs, dropout_p=0.2))
        results.append(gradients_under(inputs, dropout_p=0.2))
    assert equal_bits(results[0], results[2]) and equal_bits(results[1], results[3])
    assert not torch.equal(results[0][0], results[1][0])  # each call draws anew
    assert not torch.equal(results[0][0], results[4][0])


def test_drawn_seeds_differ():
    torch.manual_seed(0)
    seeds = torch.cat([draw_seed(torch.device("cpu")) for _ in range(1000)])
    assert seeds.unique().numel() == 1000
    assert seeds.min() < -(1 << 62) and seeds.max() > 1 << 62


@on_every_path
@slow_in_interpreter
def test_no_dropout_is_no_dropout():
    inputs = tensors()
    assert equal_bits(gradients_under(inputs, dropout_p=0.0), gradients_under(inputs))
    assert equal_bits(gradients_under(inputs, dropout_p=0.0, dropout_seed=seed_of(1)), gradients_under(inputs))


@on_every_path
def test_all_dropped():
    for each in gradients_under(tensors(), dropout_p=1.0):
        assert (each == 0).all()


@on_every_path
@slow_in_interpreter
def test_mean_over_seeds_is_no_dropout():
    """The mean over seeds is within five standard errors of the output without dropout."""
    query, key, value = (each.detach() for each in tensors(tokens=16, batch=1))
    count = 200
    outputs = torch.stack(
        [attention(query, key, value, dropout_p=0.3, dropout_seed=seed_of(seed)) for seed in range(count)]
    )
    difference = outputs.mean(0) - attention(query, key, value)
    assert (difference.abs() < 5 * outputs.std(0) / math.sqrt(count)).all()


@on_every_path
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_drops_the_same(reentrant):
    inputs = tensors()
    spans = Spans.causal(70, device=DEVICE)

    def call(query, key, value):
        return attention(query, key, value, spans, dropout_p=0.3)

    torch.manual_seed(0)
    plain = call(*inputs)
    expected = torch.autograd.grad(plain.square().sum(), inputs)
    torch.manual_seed(0)
    output = checkpoint(call, *inputs, use_reentrant=reentrant)
    torch.manual_seed(1)  # what happens in between does not matter
    output.square().sum().backward()
    assert torch.equal(output, plain)
    assert equal_bits([each.grad for each in inputs], expected)


@on_every_path
@pytest.mark.parametrize("dropout_p", [-0.1, 1.1, math.nan])
def test_bad_probability(dropout_p):
    with pytest.raises(ValueError, match="`dropout_p` must be 0 to 1"):
        attention(*tensors(), dropout_p=dropout_p)


@on_every_path
@pytest.mark.parametrize("seed", [torch.zeros(2, dtype=torch.int64), torch.zeros(1), torch.tensor(1)])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match=r"`dropout_seed` must be int64 of shape \[1\]"):
        attention(*tensors(), dropout_p=0.1, dropout_seed=seed.to(DEVICE))
