# SPDX-License-Identifier: Apache-2.0
"""Partial attention over disjoint keys against float64 attention over all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from attention_kernels import Spans, attention, cascade_attention, merge_states

from helpers import (
    DEVICE,
    DTYPES,
    GRADIENTS,
    SLOW_IN_INTERPRETER,
    Problem,
    assert_gradients_within_bound,
    random_spans,
    tensor,
)

pytestmark = pytest.mark.interpreter


@dataclass
class Split(Problem):
    """A problem whose keys are attended to in parts, which are then merged."""

    cuts: tuple[int, ...] = ()
    with_sinks: int | None = 0
    """The part that is given the sinks; None makes them a state of their own."""

    def parts(self) -> list[slice]:
        """The keys of each part."""
        return [slice(*ends) for ends in zip((0, *self.cuts), (*self.cuts, self.key.shape[2]), strict=True)]

    def run(self) -> tuple[Tensor, Tensor]:
        rows, states = slice(None), []
        for index, keys in enumerate(self.parts()):
            sinks = self.sinks if index == self.with_sinks else None
            options = {"sinks": sinks, "scale": self.scale, "softcap": self.softcap, "return_lse": True}
            key, value = self.key[:, :, keys], self.value[:, :, keys]
            states.append(attention(self.query, key, value, self.spans.cut(rows, keys), **options))
        if self.sinks is not None and self.with_sinks is None:
            output, lse = states[0]
            states.append((torch.zeros_like(output), self.sinks.to(lse.dtype)[:, None].expand(lse.shape)))
        return merge_states(*zip(*states, strict=True))


@dataclass
class Cascade(Problem):
    """A problem whose first keys are shared by the batch; `key` and `value` are each sequence's own."""

    prefix_key: Tensor | None = None
    prefix_value: Tensor | None = None
    prefix_spans: Spans | None = None

    def run(self) -> tuple[Tensor, Tensor]:
        return cascade_attention(
            self.query, self.prefix_key, self.prefix_value, self.key, self.value, self.spans,
            prefix_spans=self.prefix_spans, sinks=self.sinks, scale=self.scale, softcap=self.softcap, return_lse=True,
        )  # fmt: skip

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        batch, _, query_len, _ = self.query.shape
        key, value = (
            torch.cat([prefix.expand(batch, -1, -1, -1), own], 2)
            for prefix, own in ((self.prefix_key, self.key), (self.prefix_value, self.value))
        )
        prefix_spans = self.prefix_spans or Spans.full(query_len, self.prefix_key.shape[2], device=DEVICE)
        dense = (each.to_dense().expand(batch, -1, -1) for each in (prefix_spans, self.spans))
        whole = Spans.full(query_len, key.shape[2], device=DEVICE)
        mask = torch.cat(list(dense), 2)[:, None]
        return Problem(self.query, key, value, whole, mask, None, self.sinks, self.scale, self.softcap).reference(dtype)


def assert_part_gradients(problem: Problem, more: Sequence[str] = ()) -> None:
    """Gradients within the error bound.

    A sink's is one number, in which the outputs of all rows may cancel; those of parts have been rounded before they
    meet. So in 16 bits its floor is a quarter of a unit in the last place of the problem's largest gradient.
    """
    names = [*GRADIENTS[:3], *more]
    assert_gradients_within_bound(problem, names + ["sinks"] * (problem.query.dtype == torch.float32))
    if problem.sinks is None or problem.query.dtype == torch.float32:
        return
    grad = torch.randn_like(problem.run()[0])
    found = []
    for dtype in (problem.query.dtype, torch.float64):
        named = {name: getattr(problem, name).detach() for name in ("query", "key", "value", *more)}
        leaves = {name: each.to(dtype).requires_grad_() for name, each in named.items()}
        leaves["sinks"] = problem.sinks.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        other = replace(problem, **leaves)
        output = other.run()[0] if dtype != torch.float64 else other.reference(dtype)[0]
        found.append(torch.autograd.grad(output, leaves.values(), grad.to(dtype)))
    largest = max(float(each.norm()) for each in found[1])
    error = float((found[0][-1] - found[1][-1]).norm())
    assert error <= torch.finfo(problem.query.dtype).eps / 4 * largest, f"gradient of sinks: error {error:.2e}"


def random_split(seed: int) -> Split:
    """Random sizes, mask and features, in one to four parts, of which some may have no keys."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice(DTYPES)
    batch, num_kv_heads, group_size = draw.randint(1, 2), draw.randint(1, 2), draw.choice([1, 2, 3])
    query_len, key_len = draw.choice([1, 5, 17, 70]), draw.choice([1, 7, 64, 100])
    head_dim, value_dim = draw.choice([8, 15, 64]), draw.choice([8, 16, 40])
    cuts = sorted(draw.randint(0, key_len) for _ in range(draw.randint(0, 3)))
    return Split(
        query=tensor(batch, num_kv_heads * group_size, query_len, head_dim, dtype=dtype),
        key=tensor(batch, num_kv_heads, key_len, head_dim, dtype=dtype),
        value=tensor(batch, num_kv_heads, key_len, value_dim, dtype=dtype),
        spans=random_spans(draw, batch, query_len, key_len),
        sinks=torch.randn(num_kv_heads * group_size, device=DEVICE) if draw.random() < 0.4 else None,
        scale=draw.choice([None, 0.3]),
        softcap=draw.choice([None, None, 1.5]),
        cuts=tuple(cuts),
        with_sinks=draw.choice([None, *range(len(cuts) + 1)]),
    )


@pytest.mark.parametrize("first_seed", range(9000, 9040, 10))
def test_random_splits(first_seed):
    for seed in range(first_seed, first_seed + 10):
        try:
            random_split(seed).check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize(
    "first_seed", [9100, *(pytest.param(seed, marks=SLOW_IN_INTERPRETER) for seed in range(9103, 9115, 3))]
)
def test_gradients_of_random_splits(first_seed):
    for seed in range(first_seed, first_seed + 3):
        try:
            assert_part_gradients(random_split(seed))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_peaked_softmax(dtype):
    """One part has nearly all the weight, in some rows the first and in others the second."""
    torch.manual_seed(0)
    query, key, value = (tensor(1, 2, 60, 32, dtype=dtype) for _ in range(3))
    problem = Split(query * 3, key, value, Spans.causal(60, device=DEVICE), scale=1.0, cuts=(30,))
    problem.check()
    assert_gradients_within_bound(problem)


def test_a_tensor_of_states_is_a_sequence_of_them():
    torch.manual_seed(0)
    outputs, lses = torch.randn(3, 2, 4, 5, 8, device=DEVICE), torch.randn(3, 2, 4, 5, device=DEVICE)
    merged = merge_states(outputs, lses)
    assert all(torch.equal(a, b) for a, b in zip(merged, merge_states(list(outputs), list(lses)), strict=True))
    torch.testing.assert_close(merged[1], lses.logsumexp(0))
    torch.testing.assert_close(merged[0], (outputs * lses.softmax(0)[..., None]).sum(0))


def test_one_state_is_itself():
    torch.manual_seed(0)
    output, lse = torch.randn(1, 2, 5, 8, device=DEVICE).half(), 40 * torch.randn(1, 2, 5, device=DEVICE)
    lse[0, 0] = -math.inf
    merged, merged_lse = merge_states([output], [lse])
    assert torch.equal(merged, output.masked_fill(lse[..., None] == -math.inf, 0.0))
    assert torch.equal(merged_lse, lse)


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_far_log_sum_exps_do_not_overflow(size):
    outputs, lses = torch.ones(2, 1, 1, 3, 4, device=DEVICE), torch.full((2, 1, 1, 3), size, device=DEVICE)
    merged, lse = merge_states(outputs, lses)
    torch.testing.assert_close(merged, outputs[0])
    torch.testing.assert_close(lse, lses[0] + math.log(2))


def test_blind_rows_pass_nothing_on():
    """Row 0 is blind in both states, row 1 in the first; what the outputs hold there, and what comes back, is NaN."""
    torch.manual_seed(0)
    outputs, lses = torch.randn(2, 1, 1, 3, 4, device=DEVICE), torch.randn(2, 1, 1, 3, device=DEVICE)
    lses[:, :, :, 0] = lses[0, :, :, 1] = -math.inf
    outputs[:, :, :, 0] = outputs[0, :, :, 1] = math.nan
    outputs, lses = outputs.requires_grad_(), lses.requires_grad_()
    output, lse = merge_states(outputs, lses)
    assert (output[:, :, 0] == 0).all()
    assert (lse[:, :, 0] == -math.inf).all()
    assert torch.equal(output[:, :, 1], outputs[1, :, :, 1])
    incoming = torch.randn_like(output), torch.randn_like(lse)
    for each in incoming:
        each[:, :, 0] = math.nan
    grad_outputs, grad_lses = torch.autograd.grad((output, lse), (outputs, lses), incoming)
    assert (grad_outputs[:, :, :, 0] == 0).all()
    assert (grad_outputs[0, :, :, 1] == 0).all()
    assert (grad_lses[:, :, :, 0] == 0).all()
    assert grad_lses.isfinite().all()


def test_gradients_are_right():
    torch.manual_seed(0)
    outputs = torch.randn(3, 1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(merge_states, (outputs, lses))


def test_states_that_do_not_fit_are_refused():
    output, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="same number of states"):
        merge_states([], [])
    with pytest.raises(ValueError, match="same number of states"):
        merge_states([output, output], [lse])
    with pytest.raises(ValueError, match="wrap a single state in a list"):
        merge_states(output, lse)
    with pytest.raises(ValueError, match="in state 1"):
        merge_states([output, output[:, :1]], [lse, lse[:, :1]])
    with pytest.raises(TypeError, match="in state 1"):
        merge_states([output, output.half()], [lse, lse])
    with pytest.raises(TypeError, match="log-sum-exp"):
        merge_states([output], [lse.half()])
    for nothing in (None, 3, torch.zeros(())):
        with pytest.raises(TypeError, match=r"`outputs` must be a sequence of states, or a tensor .*, got .*; wrap"):
            merge_states(nothing, [lse])
    with pytest.raises(TypeError, match=r"merge_states: `lses\[0\]` must be a tensor, got float; see"):
        merge_states([output], [0.5])


# ---------------------------------------------------------------------- cascade


def random_cascade(seed: int) -> Cascade:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice(DTYPES)
    batch, num_kv_heads, group_size = draw.randint(1, 3), draw.randint(1, 2), draw.choice([1, 2, 3])
    query_len, prefix_len, key_len = draw.choice([1, 5, 17]), draw.choice([0, 1, 40, 90]), draw.choice([0, 1, 17, 33])
    head_dim, value_dim = draw.choice([8, 15, 64]), draw.choice([8, 40])
    prefix_spans = random_spans(draw, batch, query_len, prefix_len) if draw.random() < 0.5 else None
    if prefix_spans is not None and prefix_spans.key_mask is not None:
        prefix_spans = Spans.padded(torch.rand(1, prefix_len, device=DEVICE) > 0.3, query_len)
    layout = draw.choice(["heads", "tokens", "slices"])
    return Cascade(
        query=tensor(batch, num_kv_heads * group_size, query_len, head_dim, dtype=dtype, layout=layout),
        key=tensor(batch, num_kv_heads, key_len, head_dim, dtype=dtype),
        value=tensor(batch, num_kv_heads, key_len, value_dim, dtype=dtype),
        spans=random_spans(draw, batch, query_len, key_len),
        sinks=torch.randn(num_kv_heads * group_size, device=DEVICE) if draw.random() < 0.4 else None,
        scale=draw.choice([None, 0.3]),
        softcap=draw.choice([None, None, 1.5]),
        prefix_key=tensor(1, num_kv_heads, prefix_len, head_dim, dtype=dtype),
        prefix_value=tensor(1, num_kv_heads, prefix_len, value_dim, dtype=dtype),
        prefix_spans=prefix_spans,
    )


@pytest.mark.parametrize("first_seed", range(9200, 9230, 10))
def test_random_cascades(first_seed):
    for seed in range(first_seed, first_seed + 10):
        try:
            random_cascade(seed).check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize(
    "first_seed", [9300, *(pytest.param(seed, marks=SLOW_IN_INTERPRETER) for seed in range(9303, 9309, 3))]
)
def test_gradients_of_random_cascades(first_seed):
    for seed in range(first_seed, first_seed + 3):
        try:
            assert_part_gradients(random_cascade(seed), ("prefix_key", "prefix_value"))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_the_prefix_is_attended_to_once(monkeypatch):
    """By all queries together, and without a copy of queries that are stored token by token."""
    from attention_kernels import merge

    calls = []

    def recorded(query, key, *arguments, **options):
        calls.append((query, key))
        return attention(query, key, *arguments, **options)

    monkeypatch.setattr(merge, "attention", recorded)
    query, own = tensor(3, 4, 5, 16, layout="tokens"), tensor(3, 2, 7, 16)
    prefix = tensor(1, 2, 50, 16)
    cascade_attention(query, prefix, prefix, own, own)
    _, (folded, seen) = calls
    assert seen is prefix
    assert folded.shape == (1, 4, 15, 16)
    assert folded.data_ptr() == query.data_ptr()


def test_cascades_that_do_not_fit_are_refused():
    query, own, prefix = tensor(2, 2, 3, 8), tensor(2, 2, 4, 8), tensor(1, 2, 5, 8)
    with pytest.raises(ValueError, match="one prefix for the whole batch"):
        cascade_attention(query, own, own, own, own)
    with pytest.raises(ValueError, match=r"cascade_attention: `query` must be .* got \[2, 3, 8\]; unsqueeze"):
        cascade_attention(query[0], prefix, prefix, own, own)
    with pytest.raises(ValueError, match="`sinks` must be"):
        cascade_attention(query, prefix, prefix, own, own, sinks=torch.zeros(3, device=DEVICE))
    with pytest.raises(ValueError, match="`prefix_spans` is for batch 1 and 4 queries"):
        cascade_attention(query, prefix, prefix, own, own, prefix_spans=Spans.full(4, 5, device=DEVICE))
    with pytest.raises(TypeError, match="cascade_attention: `prefix_key` must be a tensor, got NoneType"):
        cascade_attention(query, None, None, own, own)
    with pytest.raises(TypeError, match="cascade_attention: `prefix_spans` must be Spans, got str; leave it out"):
        cascade_attention(query, prefix, prefix, own, own, prefix_spans="all")
    with pytest.raises(TypeError, match="cascade_attention: `sinks` must be a tensor, got list"):
        cascade_attention(query, prefix, prefix, own, own, sinks=[0.0, 0.0])
    holes = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    holes[0, 2] = False
    with pytest.raises(ValueError, match="same for the whole batch"):
        cascade_attention(query, prefix, prefix, own, own, prefix_spans=Spans.padded(holes, 3))


@pytest.mark.parametrize(("batch", "query_len"), [(0, 3), (2, 0)])
def test_cascades_of_nothing(batch, query_len):
    query, prefix, own = tensor(batch, 4, query_len, 8), tensor(1, 2, 5, 8), tensor(batch, 2, 6, 8)
    output, lse = cascade_attention(query, prefix, prefix, own, own, return_lse=True)
    assert output.shape == (batch, 4, query_len, 8) and lse.shape == (batch, 4, query_len)
