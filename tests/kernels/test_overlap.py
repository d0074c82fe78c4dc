# SPDX-License-Identifier: Apache-2.0
"""The forward kernel's overlapped loop, through pointers and through descriptors, against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from attention_kernels import Spans, attention
from attention_kernels.config_tables import CONFIGS
from attention_kernels.paths import interpreting

from helpers import DEVICE, DTYPES, LAYOUTS, SLOW_IN_INTERPRETER, Problem, forward_rows, random_problem, tensor

pytest.importorskip("triton")

from attention_kernels.forward import kernel_arguments
from attention_kernels.launch import span_operand, tile_descriptor

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(DEVICE == "cpu" and not interpreting(), reason="the torch path has no tile shapes"),
]

HAS_TMA = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
LOOPS = [
    pytest.param({"overlap": True}, id="pointers"),
    pytest.param(
        {"overlap": True, "descriptors": True},
        id="descriptors",
        marks=pytest.mark.skipif(not HAS_TMA, reason="this GPU's hardware copies no tiles by itself"),
    ),
]


@pytest.fixture(params=LOOPS)
def loop(request):
    """Use an overlapped loop wherever heads are multiplied whole."""
    with forward_rows(**request.param):
        yield request.param


def overlapping_problem(seed):
    """Masks and biases have the plain loop."""
    return replace(random_problem(seed), mask=None, bias=None)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=SLOW_IN_INTERPRETER if seed >= 1015 else ()) for seed in range(1000, 1100)]
)
def test_random_problems_overlapped(seed, loop):
    overlapping_problem(seed).check()


@pytest.mark.skipif(not interpreting(), reason="a compiler may join products and sums differently in each loop")
@pytest.mark.parametrize("seed", range(1100, 1110))
def test_the_plain_loop_gives_the_same_bits(seed, loop):
    problem = overlapping_problem(seed)
    overlapped = problem.run()
    with forward_rows(overlap=False):
        plain = problem.run()
    assert all(torch.equal(one, other) for one, other in zip(overlapped, plain, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [24, 72, 100, 128])
def test_any_layout_overlapped(layout, dim, loop):
    """Rows of 100 16-bit numbers are no multiple of 16 bytes, columns do not lie side by side: those have pointers."""
    torch.manual_seed(dim)
    query, key, value = (tensor(2, heads, 133, dim, dtype=torch.float16, layout=layout) for heads in (4, 2, 2))
    Problem(query, key, value, Spans.sliding(133, left=50, device=DEVICE)).check()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_hidden_nonfinite_values_never_leak_overlapped(where, poison, loop):
    torch.manual_seed(0)
    query, key, value = (tensor(1, 2, 200, 32) for _ in range(3))
    shown = torch.ones(1, 200, dtype=torch.bool, device=DEVICE)
    shown[:, :90], shown[:, 150] = False, False
    spans = Spans.causal(200, device=DEVICE) & Spans.padded(shown, 200)
    expected = attention(query, key, value, spans)
    {"key": key, "value": value}[where][:, :, ~shown[0]] = poison
    torch.testing.assert_close(attention(query, key, value, spans), expected, rtol=1e-5, atol=1e-5)
    assert (expected[:, :, :90] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_visible_nan_stays_in_its_rows_overlapped(dtype, loop):
    torch.manual_seed(0)
    query, key, value = (tensor(1, 1, 150, 16, dtype=dtype) for _ in range(3))
    value[0, 0, 70] = math.nan
    output = attention(query, key, value, Spans.sliding(150, left=20, device=DEVICE))
    sees = torch.zeros(150, dtype=torch.bool, device=DEVICE)
    sees[70:91] = True
    assert output[0, 0, sees].isnan().all()
    assert output[0, 0, ~sees].isfinite().all()


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_masks_and_biases_have_the_plain_loop(name):
    query, key, value = (tensor(1, 1, 70, 16) for _ in range(3))
    scores = torch.zeros(1, 1, 70, 70, device=DEVICE)
    extra = {"mask": scores == 0, "bias": scores}[name]
    spans, config = Spans.causal(70, device=DEVICE), CONFIGS["sm_90"][2, 128, "spans"]
    operand = span_operand(spans.start, spans.end, None, None)

    def overlaps(**given):
        given = {"mask": None, "bias": None} | given
        return kernel_arguments(
            query, key, value, query, None, query, spans=operand, **given, sinks=None, dropout=None, scale=1.0,
            softcap=2.0, config=config,
        )["OVERLAP"]  # fmt: skip

    assert overlaps()
    assert not overlaps(**{name: extra})


@pytest.mark.parametrize(("query_len", "key_len"), [(0, 3), (3, 0), (1, 1), (65, 64)])
def test_few_keys_and_rows_overlapped(query_len, key_len, loop):
    torch.manual_seed(0)
    query, key = tensor(2, 2, query_len, 16), tensor(2, 1, key_len, 16)
    Problem(query, key, key, Spans.causal(query_len, key_len, device=DEVICE)).check()


def test_descriptors_where_the_hardware_can_use_them():
    """Rows without gaps whose addresses are multiples of 16 bytes."""
    storage = torch.zeros(2, 60, 3, 136, dtype=torch.bfloat16)
    key = storage[..., :128].transpose(1, 2)
    descriptor = tile_descriptor(key, 32)
    assert descriptor is not None
    assert descriptor.block_shape == [1, 1, 32, 128]
    assert descriptor.shape == [2, 3, 60, 128]
    without = {
        "unaligned": storage[..., 1:129].transpose(1, 2),
        "columns apart": key.transpose(2, 3),
        "rows of 260 bytes": torch.zeros(2, 3, 60, 130, dtype=torch.bfloat16),
        "broadcast": key[:, :1].expand(2, 3, 60, 128),
        "empty": key[:0],
    }
    assert {name: tile_descriptor(each, 32) for name, each in without.items()} == dict.fromkeys(without)
