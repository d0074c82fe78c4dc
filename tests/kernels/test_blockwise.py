# SPDX-License-Identifier: Apache-2.0
"""The torch path: how rows are cut into pieces, gradients, memory, and that no path falls back in silence."""

from __future__ import annotations

import logging
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_kernels import Spans, attention, attention_reference, operators
from attention_kernels.pieces import plan_rows

from helpers import random_problem, random_spans


def drawn_area(pieces, query_len, key_len):
    """Which (row, key) pairs the pieces compute, and that no pair is computed twice."""
    area = torch.zeros(query_len, key_len, dtype=torch.int32)
    for piece in pieces:
        part = area[piece.rows, piece.keys]
        part += torch.ones_like(part).tril() if piece.kind == "causal" else 1
    assert int(area.max()) <= 1
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


GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative to the largest gradient of the problem: single ones may be 0 by cancellation."""


@pytest.mark.parametrize("first_seed", range(1000, 1120, 10))
def test_gradients_of_random_problems(first_seed):
    for seed in range(first_seed, first_seed + 10):
        problem = random_problem(seed)
        inputs = {name: getattr(problem, name) for name in ("query", "key", "value", "bias", "sinks")}
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items() if tensor is not None}
        output, _ = problem.run()
        exact, _ = problem.reference(torch.float64)
        grad = torch.randn_like(output)
        actual = torch.autograd.grad(output, inputs.values(), grad)
        expected = torch.autograd.grad(exact, inputs.values(), grad.double())
        size = max(float(gradient.double().norm()) for gradient in expected)
        for name, ours, truth in zip(inputs, actual, expected, strict=True):
            error = float((ours.double() - truth.double()).norm())
            tolerance = GRADIENT_TOLERANCE[problem.query.dtype]
            assert error <= tolerance * size, f"seed {seed}, gradient of {name}: error {error:.2e} of {size:.2e}"


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


@pytest.mark.parametrize("hidden", ["spans", "key_mask"])
def test_gradients_do_not_see_masked_nan(hidden):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 80, 16) for _ in range(3))
    shown = torch.ones(1, 80, dtype=torch.bool)
    shown[0, -3:] = False
    if hidden == "key_mask":
        shown[0, 20] = False
    spans = Spans.full(80) & Spans.padded(shown, 80)
    expected = gradients_of_sum(query, key, value, spans)
    key[:, :, ~shown[0]] = torch.nan
    value[:, :, ~shown[0]] = torch.inf
    actual = gradients_of_sum(query, key, value, spans)
    torch.testing.assert_close(actual, expected)
    assert (actual[1][:, :, ~shown[0]] == 0).all()


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


def test_spans_changed_in_place_are_planned_anew():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 100, 16) for _ in range(3))
    spans = Spans.sliding(100, left=7)
    attention(query, key, value, spans)
    spans.end.clamp_(max=50)
    exact, _ = attention_reference(query, key, value, mask=spans.to_dense()[:, None])
    torch.testing.assert_close(attention(query, key, value, spans), exact.float(), rtol=1e-5, atol=1e-5)


def gradients_of_sum(*arguments):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in arguments[:3]]
    output = attention(*tensors, *arguments[3:])
    return torch.autograd.grad((output * output).sum(), tensors)


def test_registered_operators_pass_opcheck():
    query, key, value = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    spans = Spans.causal(9)
    arguments = (query, key, value, spans.start, spans.end, None, None, None, None, None, 0.3, None)
    torch.library.opcheck(torch.ops.attention_kernels.forward.default, arguments)


def test_memory_grows_with_tokens():
    """The peak of a sliding-window forward over 8,192 tokens stays below what one dense boolean mask would take."""
    code = """
import resource, torch
from attention_kernels import Spans, attention
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def run(tokens):
    query, key, value = (torch.randn(1, 4, tokens, 64) for _ in range(3))
    spans = Spans.sliding(tokens, left=255) & Spans.padded((torch.arange(tokens) >= 100)[None], tokens)
    attention(query, key, value, spans)
run(512)
before = peak()
run(8192)
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Query, key, value and output take 32 MB; a dense boolean mask alone would take 64 MB, its float form 256 MB.
    assert int(result.stdout) < 56 * 1024


def test_other_paths_are_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(operators, "interpreting", lambda: True)
    operators.log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            attention(*(torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(3)))
    assert [record.message for record in caplog.records if "float64" in record.message] == [
        "float64 runs attention in torch: the Triton kernels are for float16, bfloat16 and float32"
    ]
