# SPDX-License-Identifier: Apache-2.0
"""Every shipped configuration compiles ahead of time, for each GPU, within its limits."""

from __future__ import annotations

import pytest
import torch

from attention_kernels import Spans
from attention_kernels.configs import (
    BACKWARD_CONFIGS,
    BACKWARD_SPANS_CONFIGS,
    CONFIGS,
    DECODE_CONFIGS,
    SHARED_MEMORY,
    backward_config,
    decode_config,
    forward_config,
)
from attention_kernels.operators import interpreting

from ahead_of_time import compile_ahead

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter does not compile")

DTYPES = {2: torch.bfloat16, 4: torch.float32}


QUERY_LEN, KEY_LEN = 256, 512


def tensors(dtype, dim, query_len=QUERY_LEN):
    """Query, key, value and output, `[2, 4 or 2, tokens, dim]`, stored token by token."""
    return (
        torch.empty(2, tokens, heads, dim, dtype=dtype).transpose(1, 2)
        for heads, tokens in ((4, query_len), (2, KEY_LEN), (2, KEY_LEN), (4, query_len))
    )


def extras(dtype, query_len=QUERY_LEN):
    """Everything that a call can have besides spans: a mask, a bias, a softcap and dropout; and spans with gaps."""
    from attention_kernels.launch import dropout_operand, span_operand

    spans = Spans.causal(query_len, KEY_LEN)
    hidden = torch.ones(2, KEY_LEN, dtype=torch.bool), torch.zeros(2, dtype=torch.int32)
    return {
        "spans": span_operand(spans.start, spans.end, *hidden),
        "mask": torch.ones(2, 1, query_len, KEY_LEN, dtype=torch.bool),
        "bias": torch.zeros(2, 1, query_len, KEY_LEN, dtype=dtype),
        "dropout": dropout_operand(torch.zeros(1, dtype=torch.int64), 0.1),
        "softcap": 30.0,
    }


def spans_alone(query_len=QUERY_LEN):
    from attention_kernels.launch import span_operand

    spans = Spans.causal(query_len, KEY_LEN)
    nothing = dict.fromkeys(("mask", "bias", "dropout", "softcap"))
    return {"spans": span_operand(spans.start, spans.end, None, None), **nothing}


def compile_forward(architecture, dtype, dim, work):
    """Compile the forward kernel with everything that its kind of work can have."""
    from attention_kernels.forward import forward_kernel, kernel_arguments

    query_len = 8 if work == "short" else QUERY_LEN
    query, key, value, output = tensors(dtype, dim, query_len)
    config = forward_config(architecture, dtype, dim, dim, query_len, has_tiles=work != "spans")
    given = spans_alone(query_len) if work == "spans" else extras(dtype, query_len)
    arguments = kernel_arguments(
        query, key, value, output, output if dtype.itemsize == 2 else None, torch.empty(2, 4, query_len),
        sinks=torch.zeros(4), scale=0.1, config=config, **given,
    )  # fmt: skip
    return compile_ahead(forward_kernel, architecture, arguments)


def compile_backward(architecture, dtype, dim, kernel, work):
    """Compile a backward kernel with everything that its kind of work can have."""
    from attention_kernels import backward

    query, key, value, output = tensors(dtype, dim)
    row = torch.empty(2, 4, QUERY_LEN)
    given = spans_alone() if work == "spans" else extras(dtype)
    softcap = given.pop("softcap")
    call = backward.Call(query, key, value, output, row, row, scale=0.1, softcap=softcap, **given)
    config = backward_config(architecture, dtype, dim, dim, kernel, has_tiles=work == "tiles")
    if kernel == "query":
        arguments = backward.query_arguments(call, query, config)
        return compile_ahead(backward.query_kernel, architecture, arguments)
    if kernel == "key_value":
        bounds = torch.empty(1, 8, 4, dtype=torch.int32)
        arguments = backward.key_value_arguments(call, key, value, bounds, config)
        return compile_ahead(backward.key_value_kernel, architecture, arguments)
    if kernel == "statistics":
        arguments = backward.exact_statistics_arguments(call, row, row, torch.zeros(4), config)
        return compile_ahead(backward.exact_statistics_kernel, architecture, arguments)
    arguments = backward.bias_arguments(call, torch.empty_like(given["bias"]), config)
    return compile_ahead(backward.bias_kernel, architecture, arguments)


def chip_marks(architecture, element_size):
    """`make test` compiles for the chip whose limits are strictest (nothing may spill there), in 16 bits."""
    return () if architecture == "sm_90" and element_size == 2 else pytest.mark.exhaustive


def shipped_configurations():
    """Each architecture's forward rows; of those that share a tile shape only the last, which needs the most."""
    for architecture in SHARED_MEMORY:
        rows = {(size, dim, config): work for (size, dim, work), config in CONFIGS[architecture].items()}
        for (element_size, dim, _), work in rows.items():
            yield pytest.param(
                architecture,
                element_size,
                dim,
                work,
                id=f"{architecture}-{element_size * 8}bit-{dim}-{work}",
                marks=chip_marks(architecture, element_size),
            )


def shipped_backward_configurations():
    """Each architecture's backward rows: those for any call with all extras, and the faster ones with spans alone."""
    for architecture in SHARED_MEMORY:
        for table, work in ((BACKWARD_CONFIGS, "tiles"), (BACKWARD_SPANS_CONFIGS, "spans")):
            for element_size, dim, kernel in table.get(architecture, {}):
                name = f"{architecture}-{element_size * 8}bit-{dim}-{kernel}-{work}"
                yield pytest.param(
                    architecture, element_size, dim, kernel, work, id=name, marks=chip_marks(architecture, element_size)
                )


def assert_within_limits(compiled, architecture, dim):
    assert compiled.shared_memory <= SHARED_MEMORY[architecture]
    if architecture == "sm_90" and dim <= 256:
        assert compiled.spills == 0


@pytest.mark.parametrize(("architecture", "element_size", "dim", "work"), list(shipped_configurations()))
def test_configuration_compiles_within_limits(architecture, element_size, dim, work):
    assert_within_limits(compile_forward(architecture, DTYPES[element_size], dim, work), architecture, dim)


@pytest.mark.parametrize(
    ("architecture", "element_size", "dim", "kernel", "work"), list(shipped_backward_configurations())
)
def test_backward_configuration_compiles_within_limits(architecture, element_size, dim, kernel, work):
    compiled = compile_backward(architecture, DTYPES[element_size], dim, kernel, work)
    assert_within_limits(compiled, architecture, dim)
    if architecture == "sm_90":
        assert compiled.spills == 0  # at 512 columns, too


def test_every_architecture_has_every_row():
    tables: tuple[dict, ...] = (CONFIGS, BACKWARD_CONFIGS, DECODE_CONFIGS)
    for table in tables:
        assert table.keys() == {*SHARED_MEMORY, "interpreter"}
        assert all(configs.keys() == table["sm_90"].keys() for configs in table.values())


def shipped_decode_configurations():
    """Each architecture's rows for caches; float32's few and many rows share their tile shapes."""
    for architecture in SHARED_MEMORY:
        for element_size, dim, rows in DECODE_CONFIGS[architecture]:
            if element_size == 2 or rows == "few":
                name = f"{architecture}-{element_size * 8}bit-{dim}-{rows}"
                yield pytest.param(
                    architecture, element_size, dim, rows, id=name, marks=chip_marks(architecture, element_size)
                )


@pytest.mark.parametrize(("architecture", "element_size", "dim", "rows"), list(shipped_decode_configurations()))
def test_decode_configuration_compiles_within_limits(architecture, element_size, dim, rows):
    """With everything there is: pages, float8 with scales, a mask, a bias, sinks, a softcap, split keys."""
    from attention_kernels.decode import decode_arguments, decode_kernel

    dtype, query_len = DTYPES[element_size], 1 if rows == "few" else 8
    config = decode_config(architecture, dtype, dim, dim, 4 * query_len)
    query = torch.empty(2, query_len, 8, dim, dtype=dtype).transpose(1, 2)
    # Older chips have the other float8 only; `unsupported_dtype` says so to their users.
    kind = torch.float8_e5m2 if architecture in ("sm_80", "sm_86") else torch.float8_e4m3fn
    pages = torch.empty(9, 16, 2, dim, dtype=kind).transpose(1, 2)
    given = extras(dtype, query_len)
    arguments = decode_arguments(
        query, pages, pages, torch.empty(4, 2, query_len, 8, dim), torch.empty(4, 2, 8, query_len), given["spans"],
        given["mask"], given["bias"], torch.zeros(8), 0.1, 30.0, torch.zeros(2, 32, dtype=torch.int32), None,
        torch.ones(9, 2, 16), torch.ones(9, 2, 16), KEY_LEN, config,
    )  # fmt: skip
    compiled = compile_ahead(decode_kernel, architecture, arguments)
    assert_within_limits(compiled, architecture, dim)


@pytest.mark.parametrize("dim", [1, 16, 17, 64, 65, 80, 129, 256, 300, 512])
def test_a_configuration_for_every_head_dim(dim):
    for architecture in CONFIGS:
        config = forward_config(architecture, torch.float32, dim, dim, 100, has_tiles=False)
        assert config.chunk_d == 0 or config.chunk_d < max(dim, 32)
