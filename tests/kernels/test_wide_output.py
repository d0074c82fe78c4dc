# SPDX-License-Identifier: Apache-2.0
"""An output that fills the registers is written in parts: on Hopper where heads have 256 columns."""

from __future__ import annotations

import pytest
import torch

from attention_kernels import Spans, attention
from attention_kernels.config_tables import SHARED_MEMORY
from attention_kernels.configs import architecture
from attention_kernels.paths import interpreting

from helpers import DEVICE, Problem, forward_rows, tensor

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(DEVICE == "cpu" and not interpreting(), reason="the torch path has no tile shapes"),
    pytest.mark.skipif(
        SHARED_MEMORY.get(architecture(torch.empty(0, device=DEVICE).device), 1 << 20) < 200 * 1024,
        reason="this GPU's shared memory has no room for such tiles",
    ),
]


@pytest.fixture(autouse=True)
def wide_tiles():
    """As on Hopper; the interpreter's own tiles have 64 rows."""
    with forward_rows(block_m=128, block_n=64, num_warps=8, num_stages=2, chunk_d=0, overlap=False):
        yield


@pytest.mark.parametrize("value_dim", [129, 192, 200, 256])
def test_all_parts_of_the_output_are_written(value_dim):
    torch.manual_seed(value_dim)
    query, key = tensor(2, 2, 131, 160, dtype=torch.float16), tensor(2, 1, 131, 160, dtype=torch.float16)
    value = tensor(2, 1, 131, value_dim, dtype=torch.float16)
    Problem(query, key, value, Spans.causal(131, device=DEVICE)).check()


@pytest.mark.parametrize("value_dim", [130, 256])
def test_what_rounding_took_is_written_beside_them(value_dim):
    """Of either half: with it the output is the one of tiles of 64 rows, which are written whole, in float32."""
    torch.manual_seed(value_dim)
    spans = Spans.sliding(140, left=60, device=DEVICE)
    query, key, value = (tensor(1, 2, 140, dim, dtype=torch.float16) for dim in (16, 16, value_dim))
    # Scores without rounding, which tiles of other sizes may do otherwise: a weight's last bit would be another.
    query, key = ((8 * each).round() / 8 for each in (query, key))
    for each in (query, key, value):
        each.requires_grad_()

    def exact():
        output = attention(query, key, value, spans)
        rounding = output.grad_fn.saved_tensors[2]
        assert rounding.dtype == output.dtype and rounding.stride() == output.stride()
        assert all((half != 0).any() for half in (rounding[..., :128], rounding[..., 128:]))
        return output.float() + rounding.float()

    in_parts = exact()
    with forward_rows(block_m=64):
        torch.testing.assert_close(in_parts, exact(), rtol=0, atol=2e-6)
