# SPDX-License-Identifier: Apache-2.0
"""Gradients against float64, on whichever path this process runs: torch, Triton's interpreter, or a GPU."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attention_kernels import Spans, attention, attention_reference
from attention_kernels.arguments import Arguments, Returned, Wanted
from attention_kernels.paths import runs_triton

from helpers import (
    DEVICE,
    DTYPES,
    KERNEL_DTYPES,
    LAYOUTS,
    SLOW_IN_INTERPRETER,
    Problem,
    assert_gradients_within_bound,
    random_problem,
    tensor,
)

pytestmark = pytest.mark.interpreter

SEEDS_PER_TEST = 5


@pytest.mark.parametrize(
    "first_seed",
    [
        pytest.param(seed, marks=SLOW_IN_INTERPRETER if seed >= 5015 else ())
        for seed in range(5000, 5250, SEEDS_PER_TEST)
    ],
)
def test_random_problems(first_seed):
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        try:
            assert_gradients_within_bound(random_problem(seed))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (15, 40), (72, 72), (192, 128), (256, 256), (300, 20)])
def test_head_dims(head_dim, value_dim, dtype):
    torch.manual_seed(head_dim)
    query, key = tensor(1, 4, 45, head_dim, dtype=dtype, layout="tokens"), tensor(1, 2, 70, head_dim, dtype=dtype)
    spans = Spans.sliding(45, 70, left=50, device=DEVICE)
    assert_gradients_within_bound(Problem(query, key, tensor(1, 2, 70, value_dim, dtype=dtype), spans, softcap=5.0))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(512, 512), (464, 16), (40, 512), (576, 512)])
def test_wide_heads(head_dim, value_dim, dtype):
    torch.manual_seed(head_dim)
    query, key = tensor(1, 2, 19, head_dim, dtype=dtype), tensor(1, 1, 37, head_dim, dtype=dtype)
    problem = Problem(query, key, tensor(1, 1, 37, value_dim, dtype=dtype), Spans.causal(19, 37, device=DEVICE))
    problem.bias = torch.randn(1, 1, 19, 37, device=DEVICE)
    assert_gradients_within_bound(problem)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_many_tiles(dtype):
    """Several tiles in both directions: every loop of every kernel takes several steps."""
    torch.manual_seed(0)
    query, key, value = (tensor(1, 1, 400, 32, dtype=dtype) for _ in range(3))
    for spans in (Spans.causal(400, device=DEVICE), Spans.sliding(400, left=200, right=30, device=DEVICE)):
        assert_gradients_within_bound(Problem(query, key, value, spans))


BROADCASTS = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize(
    "broadcast",
    # In the interpreter four of them: each dimension once whole and once summed over.
    [
        pytest.param(each, marks=SLOW_IN_INTERPRETER if index not in (0, 5, 10, 15) else ())
        for index, each in enumerate(BROADCASTS)
    ],
    ids=["".join("1" if b else "n" for b in each) for each in BROADCASTS],
)
def test_bias_gradient_is_summed_over_what_was_broadcast(broadcast):
    torch.manual_seed(0)
    query, key, value = tensor(2, 4, 70, 16), tensor(2, 2, 130, 16), tensor(2, 2, 130, 16)
    shape = [1 if once else size for once, size in zip(broadcast, (2, 4, 70, 130), strict=True)]
    bias = torch.randn(shape, device=DEVICE)
    problem = Problem(query, key, value, Spans.causal(70, 130, device=DEVICE), bias=bias, softcap=3.0)
    assert_gradients_within_bound(problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_peaked_softmax(dtype, with_sinks):
    """Where one weight is close to 1 gradients are differences of close numbers."""
    torch.manual_seed(0)
    query, key, value = (tensor(1, 2, 60, 64, dtype=dtype) for _ in range(3))
    sinks = torch.tensor([30.0, -5.0], device=DEVICE) if with_sinks else None
    problem = Problem(query * 2, key, value, Spans.causal(60, device=DEVICE), scale=1.0, sinks=sinks)
    assert_gradients_within_bound(problem)


def test_one_key_gets_no_score_gradient():
    """A softmax over a single key is constant."""
    torch.manual_seed(0)
    query, key, value = (tensor(1, 2, 50, 24).requires_grad_() for _ in range(3))
    output = attention(query, key, value, Spans.sliding(50, left=0, device=DEVICE))
    grad_query, grad_key, _ = torch.autograd.grad(output, (query, key, value), torch.randn_like(output))
    # The torch path multiplies what torch's fused attention rounds; Triton's kernels see the very same numbers twice.
    limit = 0.0 if runs_triton(query) else 1e-5
    assert grad_query.abs().max() <= limit
    assert grad_key.abs().max() <= limit


def gradients(query, key, value, spans, **options):
    leaves = [each.detach().requires_grad_() for each in (query, key, value)]
    output = attention(*leaves, spans, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape[1:], generator=generator).to(output.device, output.dtype).expand_as(output)
    return torch.autograd.grad(output, leaves, grad)


def test_repeated_calls_give_the_same_bits():
    torch.manual_seed(0)
    tensors = tensor(2, 6, 70, 24), tensor(2, 2, 90, 24), tensor(2, 2, 90, 24)
    spans = Spans.causal(70, 90, device=DEVICE)
    first, second = (gradients(*tensors, spans, softcap=3.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
def test_a_sequence_does_not_depend_on_its_neighbours(options):
    torch.manual_seed(0)
    tensors = tensor(3, 4, 70, 32), tensor(3, 2, 90, 32), tensor(3, 2, 90, 32)
    pads = torch.tensor([[5], [0], [60]], device=DEVICE)
    shown = torch.arange(90, device=DEVICE)[None] >= pads
    together = gradients(*tensors, Spans.causal(70, 90, device=DEVICE) & Spans.padded(shown, 70), **options)
    for index in range(3):
        one = slice(index, index + 1)
        spans = Spans.causal(70, 90, device=DEVICE) & Spans.padded(shown[one], 70)
        alone = gradients(*(each[one] for each in tensors), spans, **options)
        assert all(torch.equal(a[one], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    torch.manual_seed(0)
    tensors = [tensor(2, heads, 35, 24, layout=layout) for heads in (6, 3, 3)]
    spans = Spans.causal(35, device=DEVICE)
    strided, dense = gradients(*tensors, spans), gradients(*(each.contiguous() for each in tensors), spans)
    torch.testing.assert_close(strided, dense, rtol=1e-5, atol=1e-6)


def test_gradient_of_a_sum():
    """Its strides are 0."""
    torch.manual_seed(0)
    query, key, value = (tensor(1, 2, 20, 16).requires_grad_() for _ in range(3))
    attention(query, key, value, Spans.causal(20, device=DEVICE)).sum().backward()
    exact = [each.detach().double().requires_grad_() for each in (query, key, value)]
    mask = Spans.causal(20, device=DEVICE).to_dense()[:, None]
    attention_reference(*exact, mask=mask)[0].sum().backward()
    for ours, truth in zip((query, key, value), exact, strict=True):
        torch.testing.assert_close(ours.grad, truth.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sinks", [None, [0.5, -1.0]])
def test_gradient_of_the_log_sum_exp(sinks):
    torch.manual_seed(0)
    sinks = None if sinks is None else torch.tensor(sinks, device=DEVICE)
    query, key, value = (tensor(1, 2, 40, 16) for _ in range(3))
    named = {"query": query, "key": key, "value": value, "sinks": sinks}
    spans = Spans.sliding(40, left=9, device=DEVICE)
    weights = torch.randn(1, 2, 40, 16, device=DEVICE), torch.randn(1, 2, 40, device=DEVICE)

    def results(run, dtype, **options):
        leaves = {name: each.detach().to(dtype).requires_grad_() for name, each in named.items() if each is not None}
        output, lse = run(*(leaves[name] for name in ("query", "key", "value")), sinks=leaves.get("sinks"), **options)
        loss = (output * weights[0]).sum() + (lse * weights[1]).sum()
        return torch.autograd.grad(loss, leaves.values())

    actual = results(attention, torch.float32, spans=spans, return_lse=True)
    expected = results(attention_reference, torch.float64, mask=spans.to_dense()[:, None])
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden_by", ["spans", "key_mask", "mask", "bias"])
def test_masked_nan_reaches_no_gradient(hidden_by):
    torch.manual_seed(0)
    tensors = [tensor(1, 2, 80, 16) for _ in range(3)]
    shown = torch.arange(80, device=DEVICE)[None] < 77
    spans, options = Spans.full(80, device=DEVICE), {}
    if hidden_by == "key_mask":
        shown[0, 20] = False
    if hidden_by in ("spans", "key_mask"):
        spans = spans & Spans.padded(shown, 80)
    if hidden_by == "mask":
        options["mask"] = shown[:, None, None]
    if hidden_by == "bias":
        options["bias"] = torch.where(shown, 0.0, -math.inf)[:, None, None]
    expected = gradients(*tensors, spans, **options)
    for each, poison in zip(tensors[1:], (math.nan, math.inf), strict=True):
        each[:, :, ~shown[0]] = poison
    actual = gradients(*tensors, spans, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert all((each[:, :, ~shown[0]] == 0).all() for each in actual[1:])


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}])
def test_rows_that_see_nothing_pass_nothing_on(options):
    """Left padding as a model may leave it: NaN in the queries of padding, and in what comes back for them."""
    torch.manual_seed(0)
    query, key, value = (tensor(2, 2, 70, 16) for _ in range(3))
    shown = torch.arange(70, device=DEVICE)[None] >= torch.tensor([[0], [40]], device=DEVICE)
    spans = Spans.causal(70, device=DEVICE) & Spans.padded(shown, 70)
    hidden = ~shown[:, None, :, None]
    results = []
    for filling in (0.0, math.nan):
        leaves = [each.masked_fill(hidden, filling).requires_grad_() for each in (query, key, value)]
        output = attention(*leaves, spans, **options)
        assert (output.masked_select(hidden) == 0).all()
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        results.append(torch.autograd.grad(output, leaves, grad.masked_fill(hidden, filling)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert all((each.masked_select(hidden) == 0).all() for each in results[1])


@pytest.mark.parametrize("wanted", ["query", "key", "value", "bias", "sinks"])
def test_one_gradient_alone(wanted):
    torch.manual_seed(0)
    query, key, value = (tensor(1, 2, 40, 16) for _ in range(3))
    problem = Problem(query, key, value, Spans.causal(40, device=DEVICE))
    problem.bias = torch.randn(1, 2, 1, 40, device=DEVICE)
    problem.sinks = torch.randn(2, device=DEVICE)
    assert_gradients_within_bound(problem, wanted=[wanted])


def test_broadcast_batch():
    """Keys shared by the batch (a common prefix) receive the sum of what each sequence sends back."""
    torch.manual_seed(0)
    query = tensor(3, 4, 9, 16).requires_grad_()
    key, value = (tensor(1, 2, 20, 16).requires_grad_() for _ in range(2))
    output = attention(query, key, value)
    grad = torch.randn_like(output)
    actual = torch.autograd.grad(output, (query, key, value), grad)
    whole = [key.detach().expand(3, -1, -1, -1).contiguous().requires_grad_() for _ in range(1)]
    whole.append(value.detach().expand(3, -1, -1, -1).contiguous().requires_grad_())
    expected = torch.autograd.grad(attention(query, *whole), (query, *whole), grad)
    torch.testing.assert_close(actual[0], expected[0])
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs.sum(0, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "query_len", "key_len"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_tensors(batch, query_len, key_len):
    query = tensor(batch, 2, query_len, 16).requires_grad_()
    key, value = (tensor(batch, 2, key_len, 16).requires_grad_() for _ in range(2))
    bias = torch.zeros(1, 2, 1, key_len, device=DEVICE, requires_grad=True)
    found = torch.autograd.grad(attention(query, key, value, bias=bias).sum(), (query, key, value, bias))
    for ours, leaf in zip(found, (query, key, value, bias), strict=True):
        assert ours.shape == leaf.shape
        assert (ours == 0).all()


def test_gradients_of_gradients_are_refused():
    query, key, value = (tensor(1, 1, 4, 8).requires_grad_() for _ in range(3))
    (grad,) = torch.autograd.grad(attention(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_of_torch_func_are_refused(transform):
    query = tensor(1, 1, 4, 8)

    def loss(query):
        return attention(query, query, query).sum()

    with pytest.raises(RuntimeError, match=r"torch\.func"):
        if transform == "jvp":
            torch.func.jvp(loss, (query,), (query,))
        elif transform == "vmap":
            torch.func.vmap(loss)(query[None])
        else:
            torch.func.grad(loss)(query)


@pytest.mark.parametrize("query_len", [1, 4])
def test_forward_differentiation_is_refused(query_len):
    """Kernels would drop the tangents in silence."""
    query, key = tensor(1, 1, query_len, 8), tensor(1, 1, 4, 8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        for each in (attention, torch.compile(attention, backend="eager")):
            with pytest.raises(RuntimeError, match="forward differentiation are not served; use torch"):
                each(dual, key, key)
        scale = forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))
        with pytest.raises(RuntimeError, match="forward differentiation are not served; use torch"):
            attention(query, key, key, scale=scale)
        assert attention(query, key, key).shape == query.shape, "a call without tangents loses none"


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=SLOW_IN_INTERPRETER)])
@pytest.mark.parametrize("features", ["plain", "all"])
def test_operators_pass_opcheck(features, dtype):
    torch.manual_seed(0)
    query = tensor(2, 4, 9, 8, dtype=dtype, layout="tokens").requires_grad_()
    key, value = (tensor(2, 2, 9, dim, dtype=dtype).requires_grad_() for dim in (8, 5))
    spans = Spans.causal(9, device=DEVICE)
    extras: list = [None] * 6
    softcap, dropout_p = None, 0.0
    if features == "all":
        hidden = torch.ones(2, 9, dtype=torch.bool, device=DEVICE), torch.ones(2, dtype=torch.int32, device=DEVICE)
        hidden[0][0, 4] = False
        bias = torch.randn(1, 4, 9, 9, device=DEVICE, requires_grad=True)
        sinks = torch.randn(4, device=DEVICE, requires_grad=True)
        seed = torch.tensor([3], device=DEVICE)
        extras = [*hidden, torch.rand(2, 1, 9, 9, device=DEVICE) > 0.2, bias, sinks, seed]
        softcap, dropout_p = 2.0, 0.2
    arguments = (query, key, value, spans.start, spans.end, *extras, 0.3, softcap, dropout_p)
    torch.library.opcheck(torch.ops.attention_kernels.forward.default, (*arguments, True, None))

    plain = [each.detach() if isinstance(each, torch.Tensor) else each for each in arguments]
    output, lse, rounding = torch.ops.attention_kernels.forward(*plain, True, None)
    wants = (True, True, features == "all", features == "all")
    given = (output, lse, rounding, torch.randn_like(output), torch.randn_like(lse), *wants, *plain)
    torch.library.opcheck(torch.ops.attention_kernels.backward.default, given)


def test_operators_are_registered_with_the_names_of_their_arguments():
    """Those of the tuples that are handed to them, in their order."""
    arguments, wanted = list(Arguments._fields), [f"wants_{name}" for name in Wanted._fields]
    forward, backward = (
        [each.name for each in getattr(torch.ops.attention_kernels, name).default._schema.arguments]
        for name in ("forward", "backward")
    )
    assert forward == [*arguments, "wants_gradient", "num_splits"]
    assert backward == [*Returned._fields, *wanted, *arguments]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_sinks_that_are_frozen_have_no_gradient(dtype):
    """And it is not computed; the others' is the same."""
    query, key, value = (tensor(1, heads, 21, 16, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
    spans, sinks, gradient = Spans.causal(21, device=DEVICE), torch.randn(4, device=DEVICE), torch.randn_like(query)
    outcomes = []
    for frozen in (False, True):
        own = sinks.clone().requires_grad_(not frozen)
        output = attention(query, key, value, spans, sinks=own)
        outcomes.append(torch.autograd.grad(output, (query, key, value, *([] if frozen else [own])), gradient))
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=False))
    assert len(outcomes[0]) == 4 and outcomes[0][3].abs().sum() > 0
    operands = query, key, value, spans.start, spans.end, None, None, None, None, sinks, None, 0.25, None, 0.0
    with torch.no_grad():
        results = torch.ops.attention_kernels.forward(*operands, True, None)
        wants = (True, True, False, False)
        assert not torch.ops.attention_kernels.backward(*results, gradient, None, *wants, *operands)[4].numel()


def test_sinks_of_rows_without_keys():
    """Where there is no key the log-sum-exp is the sink, and so is its gradient."""
    query, key = tensor(1, 2, 4, 8), tensor(1, 2, 0, 8)
    sinks = torch.randn(2, device=DEVICE, requires_grad=True)
    _, lse = attention(query, key, key, sinks=sinks, return_lse=True)
    (gradient,) = torch.autograd.grad(lse.sum(), sinks)
    torch.testing.assert_close(gradient, torch.full_like(sinks, 4.0))  # a weight of 1, from a log-sum-exp in float32


def offloaded(step):
    """With what is saved for the backward pass moved elsewhere in between."""
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        return step()


def selectively_recomputed(step):
    """With what a policy chooses kept, which is asked about each operator."""
    asked = []

    def policy(context, operator, *arguments, **named):
        asked.append(operator)
        return CheckpointPolicy.MUST_SAVE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    results = step(partial(checkpoint, use_reentrant=False, context_fn=contexts))
    assert torch.ops.attention_kernels.forward.default in asked
    return results


@pytest.mark.parametrize("how", [offloaded, selectively_recomputed])
def test_what_looks_at_a_call_sees_an_operator(how):
    """Without it autograd calls the kernels' launchers by themselves."""
    query, key, value = (tensor(2, heads, 20, 16).requires_grad_() for heads in (4, 2, 2))
    spans, gradient = Spans.causal(20, device=DEVICE), tensor(2, 4, 20, 16)

    def step(through=lambda call, *inputs: call(*inputs)):
        output = through(lambda *inputs: attention(*inputs, spans), query, key, value)
        return torch.autograd.grad(output, (query, key, value), gradient)

    for ours, plain in zip(how(step), step(), strict=True):
        assert torch.equal(ours, plain)


def test_several_gradients_at_once():
    query = tensor(1, 2, 9, 16).requires_grad_()
    output, gradients = attention(query, query, query, Spans.causal(9, device=DEVICE)), tensor(3, 2, 9, 16)[:, None]
    (together,) = torch.autograd.grad(output, query, gradients, is_grads_batched=True, retain_graph=True)
    for ours, gradient in zip(together, gradients, strict=True):
        torch.testing.assert_close(ours, *torch.autograd.grad(output, query, gradient, retain_graph=True))


def test_a_sink_that_is_none_beside_a_row_that_sees_nothing():
    """The softmax of such a row has neither a key nor a sink: nothing to divide by."""
    torch.manual_seed(0)
    inputs = [tensor(1, 2, 3, 8).requires_grad_() for _ in range(3)]
    sinks = torch.tensor([-math.inf, 0.5], device=DEVICE, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False] * 3, [True] * 3], device=DEVICE)
    output = attention(*inputs, mask=mask, sinks=sinks)
    for gradient in torch.autograd.grad(output.sum(), (*inputs, sinks)):
        assert gradient.isfinite().all()
