# SPDX-License-Identifier: Apache-2.0
"""Ring attention over two and three ranks, real processes that speak gloo, against one with the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from attention_kernels import Spans
from attention_kernels.paths import interpreting
from attention_plugin.ring import ring_attention

from helpers import SLOW_IN_INTERPRETER, Problem, assert_within_bound
from ranks import run_ranks

pytestmark = [pytest.mark.interpreter, *([SLOW_IN_INTERPRETER] if SLOW_IN_INTERPRETER else [])]

SHARD = 22
PADDING = SHARD + 7
NAMES = ("query", "key", "value", "sinks")


@dataclass
class Case:
    """A call of `ring_attention`; the mask by a name, since its size depends on the number of ranks."""

    mask: str = "causal"
    heads: tuple[int, int] = (2, 2)
    dtype: torch.dtype = torch.float32
    sinks: bool = False
    poison: bool = False
    """Whether the second row's padding holds NaN, and NaN comes back for it."""
    options: dict[str, Any] = field(default_factory=dict)

    def problem(self, ranks: int) -> Problem:
        """The whole sequence."""
        torch.manual_seed(ranks)
        batch, tokens, (num_heads, num_kv_heads) = 2, ranks * SHARD, self.heads
        query = torch.randn(batch, tokens, num_heads, 16).transpose(1, 2)
        key, value = torch.randn(batch, num_kv_heads, tokens, 16), torch.randn(batch, num_kv_heads, tokens, 24)
        sinks = torch.randn(num_heads).to(torch.promote_types(self.dtype, torch.float32)) if self.sinks else None
        query, key, value = (each.to(self.dtype) for each in (query, key, value))
        if self.poison:
            for each in (query, key, value):
                each[1, :, :PADDING] = torch.nan
        return Problem(query, key, value, self.spans(tokens), sinks=sinks, **self.options)

    def spans(self, tokens: int) -> Spans:
        index = torch.arange(tokens)[None]
        causal = Spans.causal(tokens)
        window = {"left": 9, "right": 4}
        return {
            "causal": lambda: causal,
            "full": lambda: Spans.full(tokens),
            "window": lambda: Spans.sliding(tokens, left=6),
            "packed": lambda: causal & Spans.packed((index + 5) // 17),
            "own documents": lambda: causal & Spans.packed(index // SHARD),
            "left padding": lambda: causal & Spans.padded(index >= torch.tensor([[0], [PADDING]]), tokens),
            "holes": lambda: causal & Spans.padded((index % 5 != 2) & (index != torch.tensor([[1], [40]])), tokens),
            "both sides": lambda: Spans.sliding(tokens, **window),
            "nothing": lambda: Spans.sliding(tokens, left=0) & Spans.padded(index < 0, tokens),
        }[self.mask]()

    def ring_options(self, spans: Spans) -> dict[str, Any]:
        """The mask as `ring_attention` takes it."""
        plain = {"causal": {}, "full": {"causal": False}, "window": {"sliding_window": 7}}
        return {**self.options, **plain.get(self.mask, {"spans": spans})}


CASES = {
    "causal": Case(),
    "full": Case("full"),
    "window": Case("window"),
    "packed": Case("packed"),
    "own documents": Case("own documents"),
    "left padding": Case("left padding"),
    "poisoned padding": Case("left padding", poison=True),
    "left padding and sinks": Case("left padding", sinks=True),
    "holes": Case("holes"),
    "both sides": Case("both sides"),
    "nothing": Case("nothing"),
    "grouped heads": Case(heads=(6, 2)),
    "sinks": Case(sinks=True),
    "softcap": Case(options={"softcap": 1.5, "scale": 0.4}),
    "peaked": Case("full", options={"scale": 3.0}),
    "all": Case("window", (4, 2), sinks=True, options={"softcap": 1.5}),
    "float64": Case(dtype=torch.float64, sinks=True),
    "bfloat16": Case(dtype=torch.bfloat16, heads=(4, 2), sinks=True),
    "bfloat16 peaked": Case("full", dtype=torch.bfloat16, options={"scale": 2.0}),
    "float16": Case("window", dtype=torch.float16),
}


FEW = ("causal", "window", "packed", "poisoned padding", "left padding and sinks", "all", "bfloat16")
"""What more than two ranks, and Triton's interpreter, which is slow, are tried with."""


def weighting(problem: Problem, poison: bool = False) -> tuple[Tensor, Tensor]:
    """What the loss multiplies output and log-sum-exp with."""
    batch, num_heads, tokens, _ = problem.query.shape
    generator = torch.Generator().manual_seed(1)
    value_dim = problem.value.shape[-1]
    output = torch.randn(batch, num_heads, tokens, value_dim, generator=generator, dtype=torch.float64)
    if poison:
        output[1, :, :PADDING] = torch.nan
    return output.to(problem.query.dtype), torch.randn(batch, num_heads, tokens, generator=generator)


def results(
    leaves: dict[str, Tensor], output: Tensor, lse: Tensor, weights: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients. Rows without keys have no finite log-sum-exp that a loss could use."""
    seen = lse.masked_fill(lse == -torch.inf, 0.0)
    loss = (output * weights[0].to(output.dtype)).sum() + (seen * weights[1].to(seen.dtype)).sum()
    gradients = torch.autograd.grad(loss, leaves.values())
    named = {f"gradient of {name}": each for name, each in zip(leaves, gradients, strict=True)}
    return {"output": output.detach(), "lse": lse.detach(), **named}


def leaves_of(problem: Problem, dtype: torch.dtype | None = None, tokens: slice = slice(None)) -> dict[str, Tensor]:
    named = {name: getattr(problem, name) for name in NAMES}
    cut = {name: each[:, :, tokens] if name != "sinks" else each for name, each in named.items() if each is not None}
    return {name: each.detach().to(dtype or each.dtype).requires_grad_() for name, each in cut.items()}


def on_every_rank(names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """All cases in one start of processes, and then the same again: bits must repeat."""
    found = {name: run_case(CASES[name]) for name in names} | {"again": run_case(CASES["all"])}
    found["refused"] = {"messages": refusals(distributed.get_rank())}
    if distributed.get_world_size() > 2:
        found["subgroup"] = run_in_subgroup(distributed.get_rank())
    return found


def run_case(case: Case, group: distributed.ProcessGroup | None = None) -> dict[str, Tensor]:
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    mine = slice(rank * SHARD, (rank + 1) * SHARD)
    problem = case.problem(ranks)
    leaves = leaves_of(problem, tokens=mine)
    output, lse = ring_attention(**leaves, **case.ring_options(problem.spans), group=group, return_lse=True)
    assert output.transpose(1, 2).is_contiguous()
    return results(leaves, output, lse, tuple(each[:, :, mine] for each in weighting(problem, case.poison)))


def run_in_subgroup(rank: int) -> dict[str, Tensor]:
    """All ranks but the first, which is turned away."""
    group = distributed.new_group(range(1, distributed.get_world_size()))
    if rank > 0:
        return run_case(CASES["causal"], group)
    query = torch.zeros(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="not a rank of `group`"):
        ring_attention(query, query, query, group=group)
    return {}


def refusals(rank: int) -> list[str]:
    """What ranks that are not called alike say; all of them, and none waits for the other."""
    query, longer = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 9, 16)
    spans = Spans.causal(8 * distributed.get_world_size())
    messages = []
    for shard, options in (
        (longer if rank else query, {}),
        (query.clone().requires_grad_(rank == 0), {}),
        (query, {"spans": None if rank else spans}),
        (query, {"spans": Spans.causal(8)}),
    ):
        with pytest.raises(ValueError, match="ring_attention") as caught:
            ring_attention(shard, shard, shard, **options)
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_equal_one_process(count, tmp_path):
    """All cases in one test: ranks take longer to start than to run them."""
    names = FEW if count > 2 or interpreting() else tuple(CASES)
    ranks = run_ranks(on_every_rank, tmp_path, count, names)
    for name in names:
        try:
            check_case(ranks, name)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    for rank in ranks:
        assert all(torch.equal(rank["again"][what], rank["all"][what]) for what in rank["all"]), "bits do not repeat"
    check_refusals([rank["refused"]["messages"] for rank in ranks])
    if count > 2:
        check_case([{"causal": rank["subgroup"]} for rank in ranks[1:]], "causal")


def gathered(ranks: list[dict[str, dict[str, Tensor]]], name: str) -> dict[str, Tensor]:
    """The shards side by side; the sinks' gradients added up, as a trainer does it."""
    parts = [rank[name] for rank in ranks]
    return {
        what: sum(part[what] for part in parts) if "sinks" in what else torch.cat([part[what] for part in parts], 2)
        for what in parts[0]
    }


def check_case(ranks: list[dict[str, dict[str, Tensor]]], name: str) -> None:
    """The ranks' shards, side by side, against one process and float64."""
    case, actual = CASES[name], gathered(ranks, name)
    problem = case.problem(len(ranks))

    def alone(dtype: torch.dtype | None, run) -> dict[str, Tensor]:
        leaves = leaves_of(problem, dtype)
        return results(leaves, *run(Problem(**{**vars(problem), **leaves})), weighting(problem, case.poison))

    exact = alone(torch.float64, lambda whole: whole.reference(torch.float64))
    if case.dtype.itemsize == 2:
        eager = alone(None, lambda whole: whole.reference(case.dtype))
        for what in actual.keys() - {"lse"}:
            if what != "gradient of sinks":
                assert_within_bound(actual[what], eager[what], exact[what], what)
        if case.sinks:
            # One number a head, in which the outputs of all rows may cancel; those of blocks are rounded before they
            # meet. So the floor is a quarter of a unit in the last place of the largest gradient.
            largest = max(float(each.norm()) for what, each in exact.items() if "gradient" in what)
            error = float((actual["gradient of sinks"] - exact["gradient of sinks"]).norm())
            assert error <= torch.finfo(case.dtype).eps / 4 * largest, f"gradient of sinks: error {error:.2e}"
    else:
        expected = alone(None, lambda whole: whole.run())
        tight = 1e-5 if case.dtype == torch.float32 else 1e-12
        for what in actual:
            assert actual[what].dtype == expected[what].dtype
            size = float(exact[what].nan_to_num(0.0, 0.0, 0.0).abs().amax())
            torch.testing.assert_close(actual[what], expected[what], rtol=tight, atol=tight * max(size, 1.0))
    torch.testing.assert_close(actual["lse"].double(), exact["lse"], rtol=1e-4, atol=1e-4)


def check_refusals(ranks: list[list[str]]) -> None:
    for messages in ranks:
        assert messages == ranks[0]
    messages = ranks[0]
    assert "differ from rank 0" in messages[0]
    assert "9, 16" in messages[0]
    assert all("differ from rank 0" in each for each in messages[1:3])
    assert "`spans` must be the mask of the whole sequence" in messages[3]


# ---------------------------------------------------------------------- one process


@pytest.fixture
def alone(tmp_path):
    distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["causal", "full", "window", "left padding and sinks", "nothing"])
def test_one_rank_needs_no_communication(alone, monkeypatch, name):
    monkeypatch.setattr(distributed, "batch_isend_irecv", None)
    monkeypatch.setattr(distributed, "all_gather", None)
    case = CASES[name]
    problem = case.problem(2)
    tensors = problem.query, problem.key, problem.value
    actual = ring_attention(*tensors, **case.ring_options(problem.spans), sinks=problem.sinks)
    assert torch.equal(actual, problem.run()[0])


def test_a_process_without_a_group_is_told_what_to_do():
    query = torch.zeros(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="init_process_group"):
        ring_attention(query, query, query)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(1, 1, 5, 8)}, "cross attention"),
        ({"spans": Spans.causal(8)}, "1 shards of 4 = 4 rows"),
        ({"sliding_window": 0}, "at least 1"),
        ({"sliding_window": 3, "causal": False}, "Spans.sliding"),
        ({"sliding_window": 3, "spans": Spans.causal(4)}, "Spans.sliding"),
        ({"sinks": torch.zeros(3)}, r"ring_attention: `sinks` must be .*\[num_heads\]"),
        ({"value": None}, "ring_attention: `value` must be a tensor, got NoneType"),
        ({"spans": torch.ones(4, 4)}, "ring_attention: `spans` must be Spans, got Tensor; see Spans.from_dense"),
    ],
)
def test_what_does_not_fit_is_refused(alone, changes, message):
    query = torch.zeros(1, 1, 4, 8)
    with pytest.raises((ValueError, TypeError), match=message):
        ring_attention(**{"query": query, "key": query, "value": query, **changes})


def test_keys_travel_no_further_than_they_are_seen():
    from attention_plugin.ring import _course

    for spans, steps in [
        (Spans.causal(40), 3),
        (Spans.full(40), 3),
        (Spans.sliding(40, left=10), 1),
        (Spans.sliding(40, left=11), 2),
        (Spans.packed(torch.arange(40)[None] // 10), 0),
    ]:
        courses = [_course(spans, rank, 4, 10, torch.device("cpu")) for rank in range(4)]
        assert [course.steps for course in courses] == [steps] * 4
        dense = spans.to_dense()[0].view(4, 10, 4, 10)
        for rank, course in enumerate(courses):
            seen = [bool(dense[rank, :, owner].any()) for owner in range(4)]
            assert [block is not None for block in course.blocks] == seen
