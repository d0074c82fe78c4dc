# SPDX-License-Identifier: Apache-2.0
"""The operator against float64, on whichever path this process runs: torch, Triton's interpreter, or a GPU."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from attention_kernels import Spans, attention
from attention_kernels.paths import interpreting, runs_triton

from helpers import DEVICE, DTYPES, LAYOUTS, SLOW_IN_INTERPRETER, Problem, assert_within_bound, random_problem, tensor

pytestmark = pytest.mark.interpreter

SEEDS_PER_TEST = 8


@pytest.mark.parametrize(
    "first_seed",
    [pytest.param(seed, marks=SLOW_IN_INTERPRETER if seed >= 40 else ()) for seed in range(0, 240, SEEDS_PER_TEST)],
)
def test_random_problems(first_seed):
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        problem = random_problem(seed)
        try:
            problem.check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(1, 1), (15, 15), (17, 40), (72, 72), (96, 64), (160, 160), (192, 128), (256, 256)]
)
def test_head_dims(head_dim, value_dim, dtype):
    torch.manual_seed(head_dim)
    query, key = tensor(1, 4, 45, head_dim, dtype=dtype, layout="tokens"), tensor(1, 2, 61, head_dim, dtype=dtype)
    Problem(query, key, tensor(1, 2, 61, value_dim, dtype=dtype), Spans.causal(45, 61, device=DEVICE)).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(464, 464), (512, 512), (512, 64), (40, 512), (576, 512)])
def test_wide_heads(head_dim, value_dim, dtype):
    torch.manual_seed(head_dim)
    query, key = tensor(1, 2, 19, head_dim, dtype=dtype), tensor(1, 1, 37, head_dim, dtype=dtype)
    Problem(query, key, tensor(1, 1, 37, value_dim, dtype=dtype), Spans.causal(19, 37, device=DEVICE)).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [5.0, 50.0])
def test_softcap_moves_a_score_by_what_its_tanh_is_off(softcap, dtype):
    """A row that sees one key has its capped score for a log-sum-exp; small ones and large ones, of either sign."""
    torch.manual_seed(0)
    query, key, value = (tensor(1, 1, 96, 16, dtype=dtype) for _ in range(3))
    query = query * torch.logspace(-4, 2, 96, device=DEVICE)[:, None].to(dtype)
    spans = Spans.sliding(96, left=0, device=DEVICE)
    _, lse = attention(query, key, value, spans, softcap=softcap, return_lse=True)
    terms = query.double() * key.double() / 4
    exact = softcap * torch.tanh(terms.sum(-1) / softcap)
    assert exact.abs().min() < 1e-3 < 0.99 * softcap < exact.abs().max()
    off = 1e-6 * softcap if dtype.itemsize == 2 else 1e-6
    # A sum of large terms that cancel is off by a part of what they are; the cap passes on the less the larger it is.
    off = off + 1e-6 * exact.abs()
    off = off + torch.finfo(torch.float32).eps * terms.abs().sum(-1) * (1 - (exact / softcap) ** 2)
    assert ((lse.double() - exact).abs() <= off).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    torch.manual_seed(0)
    tensors = [tensor(2, heads, 35, 24, layout=layout) for heads in (6, 3, 3)]
    spans = Spans.causal(35, device=DEVICE)
    strided = attention(*tensors, spans)
    torch.testing.assert_close(strided, attention(*(t.contiguous() for t in tensors), spans), rtol=1e-6, atol=1e-6)


def test_broadcast_operands():
    torch.manual_seed(0)
    query, key, value = tensor(1, 4, 9, 16), tensor(3, 2, 20, 16), tensor(3, 2, 20, 16)
    output = attention(query, key, value)
    torch.testing.assert_close(output, attention(query.expand(3, -1, -1, -1).contiguous(), key, value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_are_zero(dtype):
    torch.manual_seed(0)
    query, key, value = (tensor(2, 2, 70, 32, dtype=dtype) for _ in range(3))
    bounds = torch.zeros(2, 70, dtype=torch.int32, device=DEVICE)
    bounds[1, 10:20] = 33
    spans = Spans(torch.zeros_like(bounds), bounds, 70, 70)
    output, lse = attention(query, key, value, spans, return_lse=True)
    empty = (bounds == 0)[:, None].expand(2, 2, 70)
    assert (output[empty] == 0).all()
    assert (lse[empty] == -math.inf).all()
    assert lse[~empty].isfinite().all()
    Problem(query, key, value, spans).check()


def test_a_row_without_keys_keeps_its_sink():
    query, key, value = (tensor(1, 2, 4, 16) for _ in range(3))
    sinks = torch.tensor([0.5, -math.inf], device=DEVICE)
    nothing = torch.zeros(1, 4, dtype=torch.int32, device=DEVICE)
    output, lse = attention(query, key, value, Spans(nothing, nothing, 4, 4), sinks=sinks, return_lse=True)
    assert (output == 0).all()
    torch.testing.assert_close(lse[0, 0], torch.full((4,), 0.5, device=DEVICE))
    assert (lse[0, 1] == -math.inf).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["key", "value", "both"])
@pytest.mark.parametrize("hidden_by", ["spans", "key_mask", "mask", "bias"])
def test_masked_nonfinite_values_never_leak(hidden_by, where, poison):
    """Each row's output is what it would be if the keys it does not see held something finite."""
    torch.manual_seed(0)
    length = 75
    query, key, value = (tensor(2, 2, length, 24) for _ in range(3))
    hidden = torch.zeros(length, dtype=torch.bool, device=DEVICE)
    hidden[[3, 40, 74]] = True
    spans, mask, bias = Spans.full(length, device=DEVICE), None, None
    if hidden_by == "spans":
        spans = Spans.sliding(length, left=9, device=DEVICE)
    elif hidden_by == "key_mask":
        spans = Spans.padded(~hidden[None], length)
    elif hidden_by == "mask":
        mask = ~hidden[None, None, None]
    else:
        bias = torch.zeros(1, 1, 1, length, device=DEVICE).masked_fill(hidden, -math.inf)
    poisoned_key, poisoned_value = key.clone(), value.clone()
    if where in ("key", "both"):
        poisoned_key[:, :, hidden] = poison
    if where in ("value", "both"):
        poisoned_value[:, :, hidden, 5] = poison
    output = attention(query, poisoned_key, poisoned_value, spans, mask=mask, bias=bias)
    expected = attention(query, key, value, spans, mask=mask, bias=bias)
    sees = (spans.to_dense()[0] & hidden).any(1) if hidden_by == "spans" else torch.zeros_like(hidden)
    torch.testing.assert_close(output[:, :, ~sees], expected[:, :, ~sees], rtol=1e-5, atol=1e-5)
    if sees.any() and not (where == "key" and math.isinf(poison)):
        assert not output[:, :, sees].isfinite().all(-1).any(), "a visible NaN or Inf was swallowed"


@pytest.mark.parametrize("query_len", [3, 40], ids=["short", "long"])
def test_a_nan_in_a_bias_reaches_its_row_and_no_other(query_len):
    torch.manual_seed(0)
    query, key, value = (tensor(1, 2, tokens, 24) for tokens in (query_len, 50, 50))
    bias = torch.randn(1, 2, query_len, 50, device=DEVICE)
    expected = attention(query, key, value, bias=bias)
    bias[0, 1, 2, 30] = math.nan
    output, lse = attention(query, key, value, bias=bias, return_lse=True)
    reached = torch.zeros(1, 2, query_len, dtype=torch.bool, device=DEVICE)
    reached[0, 1, 2] = True
    assert output[reached].isnan().all() and lse[reached].isnan().all()
    torch.testing.assert_close(output[~reached], expected[~reached], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("far", ["query", "key", "value", "bias"])
def test_rows_that_lie_far_apart(far):
    """As those of many sequences' tokens, `[tokens, batch, heads, dim]`: 2^31 numbers and more in one tile."""
    torch.manual_seed(0)
    tensors = {name: tensor(1, 1, 70, 16, dtype=torch.float16) for name in ("query", "key", "value")}
    tensors["bias"] = tensor(1, 1, 70, 70, dtype=torch.float16)
    stride = (1 << 31) // 63 + 100  # tiles have 64 rows, in the interpreter as well
    memory = torch.empty(70 * stride, dtype=torch.float16, device=DEVICE)  # of which a CPU gives what is touched only
    apart = memory.as_strided(tensors[far].shape, (stride, stride, stride, 1)).copy_(tensors[far])
    spans = Spans.causal(70, device=DEVICE)

    def run(given):
        given = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
        output = attention(given["query"], given["key"], given["value"], spans, bias=given["bias"])
        return output, *torch.autograd.grad(output.float().square().sum(), list(given.values()))

    for actual, expected in zip(run(tensors | {far: apart}), run(tensors), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("far", ["query", "key", "value"])
@pytest.mark.parametrize("query_len", [4, 20])
def test_columns_that_lie_far_apart(far, query_len):
    """As those of a cache that is stored `[columns, tokens]`."""
    torch.manual_seed(0)
    tensors = {name: tensor(1, 1, 30, 64, dtype=torch.float16) for name in ("query", "key", "value")}
    tensors["query"] = tensors["query"][:, :, :query_len]
    stride = (1 << 31) // 63 + 100
    memory = torch.empty(64 * stride, dtype=torch.float16, device=DEVICE)
    apart = memory.as_strided(tensors[far].shape, (stride, stride, 1, stride)).copy_(tensors[far])
    assert torch.equal(attention(**tensors | {far: apart}), attention(**tensors))


def test_a_batch_element_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    query, key, value = tensor(3, 4, 70, 32), tensor(3, 2, 90, 32), tensor(3, 2, 90, 32)
    pads = torch.tensor([[0], [13], [50]], device=DEVICE)
    padding = torch.arange(90, device=DEVICE)[None] >= pads
    spans = Spans.causal(70, 90, device=DEVICE) & Spans.padded(padding, 70)
    together = attention(query, key, value, spans)
    for index in range(3):
        one = slice(index, index + 1)
        alone = Spans.causal(70, 90, device=DEVICE) & Spans.padded(padding[one], 70)
        assert torch.equal(together[one], attention(query[one], key[one], value[one], alone))


def test_repeated_calls_give_the_same_bits():
    problem = random_problem(5)
    first, second = problem.run(), problem.run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("batch", "query_len", "key_len"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_tensors(batch, query_len, key_len):
    query, key = tensor(batch, 2, query_len, 16), tensor(batch, 2, key_len, 16)
    output, lse = attention(query, key, key, return_lse=True)
    assert output.shape == (batch, 2, query_len, 16)
    assert (output == 0).all()
    assert (lse == -math.inf).all()


def test_float32_is_not_tf32():
    """tf32 keeps 10 bits of the operands: its error would be a thousand times that of float32."""
    torch.manual_seed(0)
    query, key, value = (tensor(1, 2, 128, 64) for _ in range(3))
    problem = Problem(query, key, value, Spans.full(128, device=DEVICE))
    output, _ = problem.run()
    exact, _ = problem.reference(torch.float64)
    assert (output.double() - exact).norm() / exact.norm() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype):
    torch.manual_seed(0)
    query, key, value = (tensor(1, 2, 40, 32, dtype=dtype) for _ in range(3))
    problem = Problem(query * 30, key * 30, value, Spans.causal(40, device=DEVICE))
    output, _ = problem.run()
    exact, _ = problem.reference(torch.float64)
    eager, _ = problem.reference(dtype)
    assert_within_bound(output, eager, exact)


@pytest.mark.parametrize("trains", [False, True])
def test_tensors_that_are_yet_to_be_negated(trains):
    """`imag` of a conjugate is a view whose numbers have the other sign."""
    numbers = torch.randn(1, 2, 9, 16, dtype=torch.complex64, device=DEVICE)
    lazy = [numbers.conj().imag.requires_grad_(trains) for _ in range(3)]
    assert lazy[0].is_neg()
    plain = [each.detach().resolve_neg().clone().requires_grad_(trains) for each in lazy]
    outputs = [attention(*each, Spans.causal(9, device=DEVICE)) for each in (lazy, plain)]
    torch.testing.assert_close(*outputs)
    if trains:
        gradients = [
            torch.autograd.grad(*each, torch.ones_like(each[0])) for each in zip(outputs, (lazy, plain), strict=True)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("trains", [False, True])
def test_tensors_without_numbers(trains):
    """Shapes, strides and dtypes are those of a call with numbers."""
    query, key = (torch.empty(2, heads, 20, 16, device="meta", requires_grad=trains) for heads in (4, 2))
    spans = Spans.causal(20, device="meta")
    output, lse = attention(query, key, key, spans, return_lse=True)
    assert output.is_meta and output.shape == (2, 4, 20, 16) and output.transpose(1, 2).is_contiguous()
    assert lse.shape == (2, 4, 20)
    if trains:
        (gradient,) = torch.autograd.grad(output.sum(), key)
        assert gradient.is_meta and gradient.shape == key.shape


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("spans", [None, Spans.causal(9, device=DEVICE)])
def test_traced_calls(trains, spans):
    query, key, value = (tensor(1, 2, 9, 16).requires_grad_(trains) for _ in range(3))

    def call(*inputs):
        return attention(*inputs, spans)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jit.trace is deprecated, and warns of every check
        graph = torch.jit.trace(call, (query, key, value), check_trace=False)
    # A call that trains may run other kernels than one that does not.
    others = [tensor(1, 2, 9, 16).requires_grad_(trains) for _ in range(3)]
    assert torch.equal(graph(*others), call(*others))


def test_this_process_runs_the_path_it_says():
    probe = torch.zeros(1, device=DEVICE)
    assert runs_triton(probe) == (DEVICE == "cuda" or interpreting())


@pytest.mark.skipif(DEVICE == "cpu" and not interpreting(), reason="the torch path has no tile shapes")
@pytest.mark.parametrize(
    "extra", ["nothing", "softcap", "sinks", "hidden keys", "softcap and hidden keys", "mask", "bias", "dropout"]
)
def test_the_forward_kernel_is_launched_in_the_row_for_what_a_call_has(extra, monkeypatch):
    from attention_kernels import forward

    query, key, value = (tensor(1, 1, 40, 16) for _ in range(3))
    shown = torch.ones(1, 40, dtype=torch.bool, device=DEVICE)
    shown[:, 20] = False
    causal, scores = Spans.causal(40, device=DEVICE), torch.zeros(1, 1, 40, 40, device=DEVICE)
    options = {
        "nothing": {}, "softcap": {"softcap": 5.0}, "sinks": {"sinks": torch.zeros(1, device=DEVICE)},
        "hidden keys": {}, "softcap and hidden keys": {"softcap": 5.0}, "mask": {"mask": scores == 0},
        "bias": {"bias": scores}, "dropout": {"dropout_p": 0.1},
    }[extra]  # fmt: skip
    asked, choose = [], forward.forward_config
    monkeypatch.setattr(forward, "forward_config", lambda *given, **has: asked.append(has) or choose(*given, **has))
    attention(query, key, value, causal & Spans.padded(shown, 40) if "hidden keys" in extra else causal, **options)
    (has,) = asked
    assert has["has_tiles"] == (extra in ("softcap and hidden keys", "mask", "bias"))
    assert has["has_dropout"] == (extra == "dropout")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_bias_hides_no_key(dtype):
    """Models fill masks with it: a row of nothing else is the mean of its values, as in eager attention."""
    torch.manual_seed(0)
    query, key, value = tensor(1, 2, 4, 16, dtype=dtype), *(tensor(1, 2, 40, 16, dtype=dtype) for _ in range(2))
    for lowest in {torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min} if dtype != torch.float16 else {-65504.0}:
        bias = torch.zeros(4, 40, device=DEVICE, dtype=dtype)
        bias[1] = lowest
        bias[2, :30] = lowest
        output = attention(query, key, value, bias=bias)
        rounding = torch.finfo(dtype).eps
        if dtype != torch.float16:  # to whose lowest number a score still adds something
            torch.testing.assert_close(output[:, :, 1], value.mean(2), rtol=0, atol=2 * rounding)
        hidden = torch.zeros(4, 40, device=DEVICE, dtype=torch.bool)
        hidden[2, :30] = True
        seen = attention(query, key, value, mask=~hidden)
        torch.testing.assert_close(output[:, :, 2], seen[:, :, 2], rtol=0, atol=2 * rounding)
