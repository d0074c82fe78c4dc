# SPDX-License-Identifier: Apache-2.0
"""What layers of a model share reading a prompt on the CPU: which calls are remembered, and that none is mistaken."""

from __future__ import annotations

import math

import pytest
import torch

from attention_kernels import Spans, attention, attention_reference
from attention_kernels.blockwise import fused, remembered
from attention_kernels.paths import interpreting

from helpers import DTYPES, Problem, assert_within_bound

pytestmark = [
    pytest.mark.skipif(interpreting(), reason="the interpreter runs kernels on CPU tensors"),
    pytest.mark.usefixtures("nothing_known", "small_strips"),
]


@pytest.fixture
def small_strips(monkeypatch):
    """Triangles of few queries are computed in strips on all processors."""
    monkeypatch.setattr(fused, "FEWEST_STRIP_NUMBERS", 0)


CASES = {
    "encoder": Spans.full(40, 40),
    "cross": Spans.full(30, 70),
    "causal": Spans.causal(40),
    "drafted": Spans.causal(5, 200, offset=195),
    "windowed": Spans.sliding(4, 90, left=20, offset=86),
    "padded": Spans.causal(6, 90, offset=84) & Spans.padded(torch.arange(90) >= torch.tensor([[0], [1]]), 6),
    "in strips": Spans.causal(450),
    "documents": Spans.causal(300) & Spans.packed_lengths([190, 110]),
    "left padding": Spans.causal(300) & Spans.padded(torch.arange(300) >= torch.tensor([[130], [0]]), 300),
    "in a band": Spans.sliding(500, left=99),
}


def operands(spans, dtype=torch.float32, num_kv_heads=2, layout="tokens"):
    sizes = [(4, spans.query_len), (num_kv_heads, spans.key_len), (num_kv_heads, spans.key_len)]
    if layout == "tokens":
        return [torch.randn(2, tokens, heads, 32).transpose(1, 2).to(dtype) for heads, tokens in sizes]
    if layout == "tokens first":
        return [torch.randn(tokens, 2, heads, 32).permute(1, 2, 0, 3).to(dtype) for heads, tokens in sizes]
    return [torch.randn(2, heads, tokens, 32).to(dtype) for heads, tokens in sizes]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize("layout", ["tokens", "heads", "tokens first"])
@pytest.mark.parametrize("case", CASES)
def test_layers_are_checked_once(case, layout, num_kv_heads, dtype, checked_calls):
    torch.manual_seed(0)
    spans, sinks = CASES[case], torch.randn(4)
    for layer in range(3):
        given = operands(spans, dtype, num_kv_heads, layout)
        if dtype == torch.float64:
            output, _ = attention(*given, spans, sinks=sinks, return_lse=True)
            exact, _ = attention_reference(*given, mask=spans.to_dense()[:, None], sinks=sinks)
            torch.testing.assert_close(output, exact)
            assert output.transpose(1, 2).is_contiguous()
        else:
            with torch.inference_mode(layer == 2):
                Problem(*given, spans, sinks=sinks).check()
    assert len(checked_calls) == 1


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_scales_that_are_not_positive(case, dtype, scale):
    """Torch multiplies the -inf of hidden scores by the scale."""
    torch.manual_seed(0)
    for _ in range(2):
        Problem(*operands(CASES[case], dtype), CASES[case], scale=scale).check()


@pytest.mark.parametrize("case", CASES)
def test_output_alone_has_the_same_bits(case):
    torch.manual_seed(0)
    spans = CASES[case]
    given = operands(spans)
    with_lse, _ = attention(*given, spans, return_lse=True)
    for _ in range(2):
        assert torch.equal(attention(*given, spans), with_lse)


@pytest.mark.parametrize(("kept", "way"), [(999, remembered.attend_planned), (1000, remembered.attend_at_once)])
def test_large_masks_are_not_kept(kept, way, monkeypatch, checked_calls):
    spans = CASES["drafted"]  # 1,000 scores
    monkeypatch.setattr(remembered, "KEPT_SCORES", kept)
    given = operands(spans)
    outputs = [attention(*given, spans) for _ in range(2)]
    (known,) = remembered._known.values()
    assert known.compute.func is way
    assert torch.equal(*outputs)
    assert len(checked_calls) == 1


@pytest.mark.parametrize("case", ["causal", "in strips"])
def test_narrower_values(case, checked_calls):
    torch.manual_seed(0)
    spans = CASES[case]
    for _ in range(2):
        query, key, value = operands(spans)
        Problem(query, key, value[..., :24], spans).check()
    assert len(checked_calls) == 1


@pytest.mark.parametrize("changed", ["shape", "heads", "strides", "dtype", "scale", "softcap", "bias", "gradient"])
def test_another_call_is_checked(changed, checked_calls):
    torch.manual_seed(0)
    spans, options = CASES["causal"], {}
    query, key, value = operands(spans)
    attention(query, key, value, spans)
    if changed == "shape":
        query, key, value = (each[:1] for each in (query, key, value))
    elif changed == "heads":
        key, value = key[:, :1], value[:, :1]
    elif changed == "strides":
        key = key.contiguous()
    elif changed == "dtype":
        query, key, value = (each.to(torch.bfloat16) for each in (query, key, value))
    elif changed == "gradient":
        query.requires_grad_()
    else:
        options[changed] = {"scale": 0.3, "softcap": 2.0, "bias": torch.randn(1, 1, 40, 40)}[changed]
    output = attention(query, key, value, spans, **options)
    assert len(checked_calls) == 2
    mask = spans.to_dense()[:, None]
    exact, _ = attention_reference(query, key, value, mask=mask, **options)
    eager, _ = attention_reference(query, key, value, mask=mask, dtype=query.dtype, **options)
    assert_within_bound(output.detach(), eager.detach(), exact.detach())


def test_spans_that_are_written_to_are_read_again():
    torch.manual_seed(0)
    spans = Spans.causal(40)
    given = operands(spans)
    attention(*given, spans)
    spans.end.fill_(7)
    expected, _ = attention_reference(*given, mask=spans.to_dense()[:, None])
    torch.testing.assert_close(attention(*given, spans).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("encoder", "cross")])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_hidden_nonfinite_values_do_not_leak(poison, case, num_kv_heads):
    """The last key is hidden from all rows but the last, the first one from some by padding, a window or documents."""
    torch.manual_seed(0)
    spans = CASES[case]
    query, key, value = operands(spans, num_kv_heads=num_kv_heads)
    expected = attention(query, key, value, spans)
    for poisoned in ("key", "value"):
        for place in (0, spans.key_len - 1):
            given = {"key": key.clone(), "value": value.clone()}
            given[poisoned][:, :, place] = poison
            output = attention(query, **given, spans=spans)
            sees = spans.to_dense()[:, None, :, place].expand(output.shape[:3])
            torch.testing.assert_close(output[~sees], expected[~sees])
            assert poisoned == "key" or not output[sees].isfinite().any()
