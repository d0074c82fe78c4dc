# SPDX-License-Identifier: Apache-2.0
"""Attention weights recomputed from the log-sum-exp, against a dense softmax in float64."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from attention_kernels import Spans, attention, attention_reference, attention_weights, draw_seed

from helpers import DEVICE, DTYPES, Problem, random_problem, tensor


def weights_of(problem: Problem, **dropout) -> Tensor:
    options = {"mask": problem.mask, "bias": problem.bias, "scale": problem.scale, "softcap": problem.softcap}
    _, lse = attention(
        problem.query, problem.key, problem.value, problem.spans, sinks=problem.sinks, return_lse=True, **options
    )
    return attention_weights(problem.query, problem.key, lse, problem.spans, **options, **dropout)


def reference_weights(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The weights are what attention makes of an identity matrix."""
    batch, num_kv_heads, key_len, _ = problem.key.shape
    identity = torch.eye(key_len, device=DEVICE, dtype=problem.key.dtype).expand(batch, num_kv_heads, -1, -1)
    return dataclasses.replace(problem, value=identity).reference(dtype)[0]


@pytest.mark.parametrize("seed", range(40))
def test_random_problems(seed: int):
    problem = random_problem(seed)
    weights = weights_of(problem)
    exact = reference_weights(problem, torch.float64)
    assert weights.dtype == problem.query.dtype
    eager = reference_weights(problem, problem.query.dtype)
    error, eager_error = (float((each.double() - exact).norm()) for each in (weights, eager))
    # The scores here and those in the log-sum-exp are rounded apart, where eager's softmax of one key is exactly 1.
    floor = max(torch.finfo(problem.query.dtype).eps / 4, 1e-5)
    assert error <= 2 * eager_error + floor * float(exact.norm())
    assert (weights[exact == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_add_up_to_one(dtype: torch.dtype):
    problem = Problem(*(tensor(2, heads, 33, 16, dtype=dtype) for heads in (6, 2, 2)), Spans.causal(33, device=DEVICE))
    total = weights_of(problem).float().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=8 * torch.finfo(dtype).eps)


def gradients(function, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    result = function()
    torch.manual_seed(1)
    upstream = torch.randn(result.shape, dtype=torch.float64, device=DEVICE).to(result.dtype)
    return dict(zip(leaves, torch.autograd.grad(result, list(leaves.values()), upstream), strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_gradients(seed: int):
    """Also through the log-sum-exp, which is all that sinks act through."""
    problem = random_problem(seed)
    problem.query, problem.key = problem.query.float(), problem.key.float()
    problem.value = problem.value.float()
    problem.sinks = torch.randn(problem.query.shape[1], device=DEVICE)
    names = [name for name in ("query", "key", "bias", "sinks") if getattr(problem, name) is not None]
    leaves = {name: getattr(problem, name).detach().clone().requires_grad_() for name in names}
    problem = dataclasses.replace(problem, **leaves)
    ours = gradients(lambda: weights_of(problem), leaves)
    exact = gradients(lambda: reference_weights(problem, torch.float64), leaves)
    for name in names:
        scale = float(exact[name].double().norm())
        assert float((ours[name] - exact[name]).double().norm()) <= 2e-5 * scale + 1e-6, name


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_without_keys_and_nan_in_hidden_keys(poison: float, softcap: float | None):
    """Padding on the left of a causal batch: keys that no row sees, and rows that see none."""
    query, key, value = (tensor(2, heads, 9, 8) for heads in (4, 2, 2))
    spans = Spans.causal(9, device=DEVICE) & Spans.padded(torch.arange(9, device=DEVICE)[None] >= 4, 9)
    clean = weights_of(Problem(query, key, value, spans, softcap=softcap))
    key[:, :, :4] = poison
    query.requires_grad_()
    weights = weights_of(Problem(query, key, value, spans, softcap=softcap))
    assert (weights[:, :, :4] == 0).all() and (weights[..., :4] == 0).all()
    torch.testing.assert_close(weights, clean)
    if math.isnan(poison):
        weights.sum().backward()
        assert query.grad.isfinite().all() and (query.grad[:, :, :4] == 0).all()


def test_nan_in_a_visible_key_reaches_the_rows_that_see_it():
    query, key, value = (tensor(1, 2, 6, 8) for _ in range(3))
    key[:, 1, 3] = math.nan
    weights = weights_of(Problem(query, key, value, Spans.causal(6, device=DEVICE)))
    assert weights[:, 0].isfinite().all() and weights[:, 1, :3].isfinite().all()
    visible = torch.ones(3, 6, dtype=torch.bool, device=DEVICE).tril(3)
    assert (weights[0, 1, 3:].isnan() == visible).all()


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
def test_dropout_is_that_of_the_output(dropout_p: float):
    query, key, value = tensor(2, 4, 20, 16), tensor(2, 2, 31, 16), tensor(2, 2, 31, 8)
    spans = Spans.causal(20, 31, device=DEVICE)
    options = {"softcap": 4.0, "dropout_p": dropout_p, "dropout_seed": draw_seed(query.device)}
    output, lse = attention(query, key, value, spans, return_lse=True, **options)
    weights = attention_weights(query, key, lse, spans, **options)
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), output, atol=1e-5, rtol=1e-5)
    before = attention_weights(query, key, lse, spans, softcap=4.0)
    kept = weights != 0
    share = float(kept[before > 0].float().mean())
    assert abs(share - (1 - dropout_p)) < 0.05
    if dropout_p < 1:
        torch.testing.assert_close(weights[kept], before[kept] / (1 - dropout_p), rtol=1e-5, atol=0)


def test_a_batch_of_one_beside_a_larger_one():
    problem = Problem(tensor(1, 4, 5, 8), tensor(3, 2, 7, 8), tensor(3, 2, 7, 8), Spans.full(5, 7, device=DEVICE))
    expected, _ = attention_reference(problem.query, problem.key, torch.eye(7, device=DEVICE).expand(3, 2, 7, 7))
    torch.testing.assert_close(weights_of(problem).double(), expected, atol=1e-6, rtol=1e-5)
    problem.query, problem.key, problem.value = tensor(3, 4, 5, 8), tensor(1, 2, 7, 8), tensor(1, 2, 7, 8)
    expected, _ = attention_reference(problem.query, problem.key, torch.eye(7, device=DEVICE).expand(1, 2, 7, 7))
    torch.testing.assert_close(weights_of(problem).double(), expected, atol=1e-6, rtol=1e-5)


def test_without_spans_and_float64():
    query, key, value = (tensor(1, 2, 6, 8, dtype=torch.float64) for _ in range(3))
    _, lse = attention(query, key, value, return_lse=True)
    weights = attention_weights(query, key, lse)
    torch.testing.assert_close(weights, torch.softmax(query @ key.transpose(-1, -2) * 8**-0.5, -1))


def test_autocast_rounds_what_attention_is_given_and_no_scores():
    query, key, value = (tensor(1, 2, 33, 16) for _ in range(3))
    with torch.autocast(query.device.type, torch.bfloat16):
        _, lse = attention(query, key, value, return_lse=True)
        weights = attention_weights(query, key, lse)
    rounded = [each.to(torch.bfloat16) for each in (query, key, value)]
    _, expected_lse = attention(*rounded, return_lse=True)
    assert torch.equal(lse, expected_lse)
    assert torch.equal(weights, attention_weights(*rounded[:2], lse))


def test_no_branches_that_tracing_cannot_follow():
    query, key, value = (tensor(1, 2, 6, 8) for _ in range(3))
    spans = Spans.causal(6, device=DEVICE)
    _, lse = attention(query, key, value, spans, return_lse=True)
    traced = torch.compile(attention_weights, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(query, key, lse, spans), attention_weights(query, key, lse, spans))


def test_weights_of_nothing():
    query, key, lse = tensor(0, 4, 6, 8), tensor(0, 2, 5, 8), torch.zeros(0, 4, 6, device=DEVICE)
    assert attention_weights(query, key, lse).shape == (0, 4, 6, 5)


def test_errors():
    query, key, value = tensor(2, 4, 6, 8), tensor(2, 2, 6, 8), tensor(2, 2, 6, 8)
    _, lse = attention(query, key, value, return_lse=True)
    with pytest.raises(
        ValueError, match=r"`lse` must be torch.float32 of shape .* \[2, 4, 6\], got .* \[2, 4, 5\]; take"
    ):
        attention_weights(query, key, lse[..., :5])
    with pytest.raises(ValueError, match=r"`lse` must be torch.float32 .*got torch.float64 \[2, 4, 6\]"):
        attention_weights(query, key, lse.double())
    with pytest.raises(ValueError, match=r"must be a multiple .*got 4 and 3; pass what `attention` was given"):
        attention_weights(query, tensor(2, 3, 6, 8), lse)
    with pytest.raises(ValueError, match=r"`spans` is for batch 1, 5 queries and 6 keys, but .* 6 queries and 6 keys;"):
        attention_weights(query, key, lse, Spans.causal(5, 6, device=query.device))
    three = Spans.padded(torch.arange(6, device=query.device) >= torch.arange(3, device=query.device)[:, None], 6)
    with pytest.raises(ValueError, match=r"`spans` is for batch 3, .* but the tensors have batch 2,"):
        attention_weights(query, key, lse, three)
    with pytest.raises(TypeError, match=r"attention_weights: `spans` must be Spans, got Tensor; pass a dense mask"):
        attention_weights(query, key, lse, torch.ones(6, 6, device=query.device))
    for name in ("query", "key", "lse"):
        arguments = {"query": query, "key": key, "lse": lse} | {name: None}
        with pytest.raises(TypeError, match=f"attention_weights: `{name}` must be a tensor, got NoneType; see"):
            attention_weights(**arguments)
    for other in (torch.float64, torch.int32):
        with pytest.raises(TypeError, match=f"share one floating-point dtype, got {query.dtype} and {other}; pass"):
            attention_weights(query, key.to(other), lse)
    with pytest.raises(TypeError, match=r"share one floating-point dtype, got torch.int32 and torch.int32; pass"):
        attention_weights(query.int(), key.int(), lse)
    with pytest.raises(ValueError, match=r"attention_weights: `dropout_p` must be 0 to 1, got 2"):
        attention_weights(query, key, lse, dropout_p=2)
    with pytest.raises(ValueError, match=r"`dropout_p`=0\.1 needs the `dropout_seed` .*draw one for both"):
        attention_weights(query, key, lse, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"must be \[batch, heads, tokens, head_dim\], got .* \[2, 2, 6, 9\]; pass"):
        attention_weights(query, tensor(2, 2, 6, 9), lse)
    with pytest.raises(ValueError, match=r"batch sizes of `query` and `key` must be equal or 1, got 2 and 3; pass"):
        attention_weights(query, tensor(3, 2, 6, 8), lse)
    with pytest.raises(TypeError, match=r"attention_weights: `mask` must be bool .*got `mask` of torch.float32"):
        attention_weights(query, key, lse, mask=torch.ones(6, 6, device=DEVICE))
    with pytest.raises(ValueError, match=r"attention_weights: `bias` of shape \[6, 7\] does not broadcast"):
        attention_weights(query, key, lse, bias=torch.ones(6, 7, device=DEVICE))
    with pytest.raises(ValueError, match="attention_weights: `softcap` must be a positive number, got 0"):
        attention_weights(query, key, lse, softcap=0.0)
