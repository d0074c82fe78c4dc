# SPDX-License-Identifier: Apache-2.0
"""The Gluon kernel for Hopper: simulated everywhere, run where there is such a GPU, and off unless it is asked for.

That it compiles, without spills and with products beside its exponentials, is for `test_configs.py`.
"""

from __future__ import annotations

import inspect
import logging
import math
import random
import sys
from dataclasses import replace

import pytest
import torch

from attention_kernels import Spans, attention, attention_reference, hopper, paths
from attention_kernels.arguments import arguments_of
from attention_kernels.configs import architecture, assuming
from attention_kernels.paths import interpreting, log_once

from helpers import DEVICE, Problem, assert_gradients_within_bound, assert_within_bound, random_spans, tensor

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from gluon_simulator import Descriptor, simulate

from attention_kernels.hopper import gluon_forward, launching
from attention_kernels.launch import span_operand

SOURCE = inspect.getsource(gluon_forward)

simulated = pytest.mark.skipif(
    interpreting() or DEVICE != "cpu",
    reason="the simulation takes CPU tensors, and runs in the half without interpreter",
)
on_hopper = pytest.mark.skipif(
    DEVICE == "cpu" or architecture(torch.empty(0, device=DEVICE).device) != "sm_90",
    reason="there is no Hopper GPU here; the kernel is simulated",
)


def simulated_attention(problem: Problem, programs: int = 3, source: str = SOURCE):
    """Output, log-sum-exp and what rounding took, as by `launching.forward`."""
    query, key, value, spans = problem.query, problem.key, problem.value, problem.spans
    batch, heads, query_len, dim = query.shape
    output, rounding = (query.new_full((batch, query_len, heads, dim), math.nan).transpose(1, 2) for _ in range(2))
    lse = torch.full((batch, heads, query_len), math.nan)
    operands = span_operand(spans.start, spans.end, spans.key_mask, spans.gap_count)
    scale = dim**-0.5 if problem.scale is None else problem.scale
    arguments = launching.kernel_arguments(
        query, key, value, output, rounding, lse, spans=operands, sinks=problem.sinks, scale=scale
    )
    del arguments["num_warps"]
    for name, given in arguments.items():
        if hasattr(given, "block_shape"):
            arguments[name] = Descriptor(given.base, given.block_shape)
    simulate(source, "forward_kernel", programs, arguments)
    return output, lse, rounding


def served_problem(seed: int) -> Problem:
    """A random problem of those that the kernel serves."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.float16, torch.bfloat16])
    batch, kv_heads, group_size = draw.randint(1, 2), draw.randint(1, 2), draw.choice([1, 2, 3])
    query_len = draw.choice([17, 64, 65, 128, 129, 200])
    key_len = draw.choice([query_len, 1, 63, 129, 300])
    dim = draw.choice([64, 64, 128, 256])
    heads = kv_heads * group_size

    def draw_tensor(number: int, tokens: int) -> torch.Tensor:
        return tensor(batch, number, tokens, dim, dtype=dtype, layout=draw.choice(["heads", "tokens"]))

    return Problem(
        query=draw_tensor(heads, query_len),
        key=draw_tensor(kv_heads, key_len),
        value=draw_tensor(kv_heads, key_len),
        spans=random_spans(draw, batch, query_len, key_len),
        sinks=torch.randn(heads, device=DEVICE) if draw.random() < 0.4 else None,
        scale=draw.choice([None, 0.3]),
    )


def check_simulated(problem: Problem, **options) -> None:
    output, lse, rounding = simulated_attention(problem, **options)
    exact, exact_lse = problem.reference(torch.float64)
    eager, _ = problem.reference(problem.query.dtype)
    assert_within_bound(output, eager, exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    # Rounding took what it says: together they are closer than the rounded output alone can be.
    whole = output.double() + rounding.double()
    assert (whole - output.double()).abs().max() <= torch.finfo(output.dtype).eps * output.double().abs().max()
    assert (whole - exact).norm() <= (output.double() - exact).norm()


@simulated
@pytest.mark.parametrize("seed", range(40))
def test_random_problems_in_the_simulation(seed):
    check_simulated(served_problem(seed), programs=1 + seed % 4)


@simulated
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("where", ["key", "value"])
def test_hidden_nonfinite_values_never_leak_in_the_simulation(where, dim):
    torch.manual_seed(0)
    query, key, value = (tensor(1, 2, 140, dim, dtype=torch.bfloat16) for _ in range(3))
    shown = torch.ones(1, 140, dtype=torch.bool)
    shown[:, :3], shown[:, 70] = False, False
    problem = Problem(query, key, value, Spans.sliding(140, left=6) & Spans.padded(shown, 140))
    for poison in (math.nan, math.inf):
        {"key": key, "value": value}[where][:, :, ~shown[0]] = poison
        output, lse, rounding = simulated_attention(problem)
        clean = replace(problem, key=key.nan_to_num(0, 0), value=value.nan_to_num(0, 0))
        exact, exact_lse = clean.reference(torch.float64)
        assert_within_bound(output, clean.reference(torch.bfloat16)[0], exact)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
        assert rounding.isfinite().all()
        assert (output[:, :, :3] == 0).all()


@simulated
def test_a_visible_nan_stays_in_its_rows_in_the_simulation():
    torch.manual_seed(0)
    query, key, value = (tensor(1, 1, 150, 64, dtype=torch.float16) for _ in range(3))
    value[0, 0, 70] = math.nan
    output, _, _ = simulated_attention(Problem(query, key, value, Spans.sliding(150, left=20)))
    sees = torch.zeros(150, dtype=torch.bool)
    sees[70:91] = True
    assert output[0, 0, sees].isnan().all()
    assert output[0, 0, ~sees].isfinite().all()


BREAKS = {
    "keys are not waited for": (
        "wait_for(buffers.k_ready, turn + 1, STAGES, first_key + BLOCK_N < last)",
        "turn",
    ),
    "values are not waited for": ("wait_for(buffers.v_ready, turn - 1, STAGES)", "turn"),
    "values are given back before their product": (
        "acc = warpgroup_mma_wait(0, deps=(running,))\n"
        "                mbarrier.arrive(buffers.v_free.index((turn - 1) & (STAGES - 1)), count=1)\n",
        "mbarrier.arrive(buffers.v_free.index((turn - 1) & (STAGES - 1)), count=1)\n"
        "                acc = warpgroup_mma_wait(0, deps=(running,))\n",
    ),
    "values are never given back": (
        "mbarrier.arrive(buffers.v_free.index((turn - 1) & (STAGES - 1)), count=1)",
        "turn",
    ),
    "buffers are filled while they are in use": (
        "mbarrier.wait(buffers.k_free.index(stage), phase ^ 1)",
        "stage",
    ),
    "queries are replaced while they are in use": (
        "mbarrier.wait(buffers.q_free.index(group), (round_number & 1) ^ 1)",
        "group",
    ),
    "the output leaves without a fence": (
        "    fence_async_shared()\n    copy_out(",
        "    copy_out(",
    ),
    "the output is not waited for": ("    tma.store_wait(0)\n", ""),
    "the output is not scaled": ("                acc *= gl.convert_layout(alpha, rows)[:, None]\n", ""),
    "phases are mixed up": ("(turn & STAGES) // STAGES, pred=pred", "1 - (turn & STAGES) // STAGES, pred=pred"),
    "an arrival too many": (
        "mbarrier.arrive(buffers.q_free.index(GROUP), count=1)",
        "mbarrier.arrive(buffers.q_free.index(GROUP), count=2)",
    ),
    "partitions disagree about keys": ("first // BLOCK_N * BLOCK_N, last", "first // BLOCK_N * BLOCK_N, last - 128"),
    "the body has a masked key": ("(first_key + BLOCK_N > body_last)", "(first_key > body_last)"),
    "a section is left out": ("first_head + within % heads_here", "within % heads_here"),
}


@simulated
@pytest.mark.parametrize("name", BREAKS)
def test_the_simulation_notices(name, monkeypatch):
    """A kernel that is broken on purpose is caught: what passes above means something."""
    monkeypatch.setattr(launching, "CACHE", 2 * 700 * 128 * 2)  # sections of one head
    torch.manual_seed(0)
    query, key, value = (tensor(1, 2, tokens, 128, dtype=torch.float16) for tokens in (300, 700, 700))
    problem = Problem(query, key, value, Spans.causal(300, 700))
    check_simulated(problem)
    old, new = BREAKS[name]
    assert SOURCE.count(old) >= 1
    monkeypatch.setattr("gluon_simulator.DEADLOCK_SECONDS", 0.5)  # a whole kernel may take longer on a busy machine
    with pytest.raises((RuntimeError, AssertionError, IndexError)):
        check_simulated(problem, source=SOURCE.replace(old, new))


# ---------------------------------------------------------------------- asking for it


@pytest.fixture
def gluon():
    """Ask for the kernel while a test runs."""
    hopper.enable()
    yield
    hopper.enable(None)


def test_nobody_asks_for_it_by_default():
    assert hopper.wanted() is None


@pytest.mark.skipif(DEVICE == "cpu" and not interpreting(), reason="the torch path has no other kernel")
@pytest.mark.interpreter
def test_calls_that_it_does_not_serve_say_so_once(gluon, caplog):
    log_once.cache_clear()
    query = tensor(1, 1, 40, 40, dtype=torch.float16)
    with caplog.at_level(logging.WARNING, paths.logger.name):
        for _ in range(2):
            output = attention(query, query, query, Spans.causal(40, device=DEVICE))
    (message,) = [record.message for record in caplog.records if "Gluon" in record.message]
    assert message.startswith("the Gluon kernel leaves calls to the Triton kernel: it is for ")
    exact, _ = attention_reference(query, query, query, mask=torch.ones(40, 40, device=DEVICE).tril().bool())
    torch.testing.assert_close(output, exact.to(output.dtype), rtol=2e-3, atol=2e-3)


def test_what_it_serves_and_why_not():
    def unserved(*shape, dtype=torch.bfloat16, value_dim=None, layout="tokens", **extras):
        batch, heads, tokens, dim = shape
        query, key = (tensor(batch, heads, tokens, dim, dtype=dtype, layout=layout) for _ in range(2))
        value = tensor(batch, heads, tokens, value_dim or dim, dtype=dtype, layout=layout)
        return launching.unserved(arguments_of(query, key, value, Spans.full(tokens), **extras))

    shape = (1, 2, 20, 64)
    with assuming("sm_90"):
        assert [unserved(1, 2, 20, dim) for dim in (64, 128, 256)] == [None] * 3
        assert unserved(*shape, dtype=torch.float32) == "it is for 16-bit tensors, and these are torch.float32"
        assert "head dims of 64, 128, 256, the same for values, and these are 80 and 80" in unserved(1, 2, 20, 80)
        assert "these are 128 and 64" in unserved(1, 2, 20, 128, value_dim=64)
        assert unserved(*shape, softcap=30.0) == "it does not know a softcap"
        assert unserved(*shape, bias=torch.zeros(1)) == "it does not know a bias"
        assert unserved(*shape, mask=torch.zeros(1)) == "it does not know a mask"
        assert unserved(*shape, dropout_seed=torch.zeros(1)) == "it does not know dropout"
        assert unserved(1, 2, 16, 64) == "at most 16 query tokens do not fill its tiles"
        assert unserved(*shape, layout="columns").startswith("the hardware copies no tiles of `query`")
    with assuming("sm_100"):
        assert unserved(*shape) == "it is for sm_90, and the device is sm_100"


def test_without_gluon_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "attention_kernels.hopper.gluon_forward", None)
    monkeypatch.delattr(hopper, "gluon_forward")
    with pytest.raises(
        RuntimeError, match=r"enable: the kernel needs triton\.experimental\.gluon.*install triton 3\.6"
    ):
        hopper.enable()
    assert hopper.wanted() is None


# ---------------------------------------------------------------------- on a Hopper GPU


@on_hopper
@pytest.mark.parametrize("seed", range(100))
def test_random_problems_on_hopper(seed, gluon, caplog):
    with caplog.at_level(logging.WARNING, paths.logger.name):
        served_problem(seed).check()
    assert not caplog.records


@on_hopper
@pytest.mark.parametrize("seed", range(10))
def test_gradients_on_hopper(seed, gluon):
    assert_gradients_within_bound(served_problem(seed), ("query", "key", "value"))


@on_hopper
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_long_prompts_give_the_triton_kernels_result(dim, gluon):
    torch.manual_seed(dim)
    query, key, value = (tensor(2, heads, 3000, dim, dtype=torch.bfloat16, layout="tokens") for heads in (8, 2, 2))
    spans = Spans.causal(3000, device=DEVICE)
    output = attention(query, key, value, spans)
    again = attention(query, key, value, spans)
    hopper.enable(False)
    torch.testing.assert_close(output, attention(query, key, value, spans), rtol=2e-2, atol=2e-2)
    assert torch.equal(output, again)
