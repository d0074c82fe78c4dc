# SPDX-License-Identifier: Apache-2.0
"""Every shipped configuration compiles ahead of time, for each GPU, within its limits."""

from __future__ import annotations

import pytest
import torch

from attention_kernels import Spans
from attention_kernels.configs import CONFIGS, SHARED_MEMORY, forward_config
from attention_kernels.operators import interpreting

from ahead_of_time import compile_ahead

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter does not compile")

DTYPES = {2: torch.bfloat16, 4: torch.float32}


def forward_arguments(architecture, dtype, dim, work):
    """Arguments of a launch that has everything its kind of work can have."""
    from attention_kernels.forward import kernel_arguments, span_operand

    query_len, key_len = (8 if work == "short" else 256), 512
    query, output = (torch.empty(2, query_len, 4, dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    key, value = (torch.empty(2, key_len, 2, dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    spans = Spans.causal(query_len, key_len)
    key_mask = gap_count = mask = bias = softcap = None
    if work != "spans":
        key_mask, gap_count = torch.ones(2, key_len, dtype=torch.bool), torch.zeros(2, dtype=torch.int32)
        mask = torch.ones(2, 1, query_len, key_len, dtype=torch.bool)
        bias, softcap = torch.zeros(2, 1, query_len, key_len, dtype=dtype), 30.0
    config = forward_config(architecture, dtype, dim, dim, query_len, has_tiles=work != "spans")
    operand = span_operand(spans.start, spans.end, key_mask, gap_count)
    lse, sinks = torch.empty(2, 4, query_len), torch.zeros(4)
    return kernel_arguments(query, key, value, output, lse, operand, mask, bias, sinks, 0.1, softcap, config)


def shipped_configurations():
    """Each architecture's rows; of rows that share one tile shape only the last, whose kernel needs the most."""
    for architecture, configs in CONFIGS.items():
        rows = {(element_size, dim, config): work for (element_size, dim, work), config in configs.items()}
        for (element_size, dim, _), work in rows.items():
            yield pytest.param(
                architecture, element_size, dim, work, id=f"{architecture}-{element_size * 8}bit-{dim}-{work}"
            )


@pytest.mark.parametrize(("architecture", "element_size", "dim", "work"), list(shipped_configurations()))
def test_configuration_compiles_within_limits(architecture, element_size, dim, work):
    from attention_kernels.forward import forward_kernel

    compiled = compile_ahead(
        forward_kernel, architecture, forward_arguments(architecture, DTYPES[element_size], dim, work)
    )
    assert compiled.shared_memory <= SHARED_MEMORY[architecture]
    if architecture == "sm_90" and dim <= 256:
        assert compiled.spills == 0


def test_every_architecture_has_every_row():
    assert all(configs.keys() == CONFIGS["sm_90"].keys() for configs in CONFIGS.values())
    assert CONFIGS.keys() == SHARED_MEMORY.keys()


@pytest.mark.parametrize("dim", [1, 16, 17, 64, 65, 80, 129, 256, 300, 512])
def test_a_configuration_for_every_head_dim(dim):
    for architecture in CONFIGS:
        config = forward_config(architecture, torch.float32, dim, dim, 100, has_tiles=False)
        assert config.chunk_d == 0 or config.chunk_d < max(dim, 32)
