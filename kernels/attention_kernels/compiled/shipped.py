# SPDX-License-Identifier: Apache-2.0
"""Every configuration that ships, as something to compile: the call that needs the most of those that it serves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..configs import (
    BACKWARD_CONFIGS,
    BACKWARD_SPANS_CONFIGS,
    CONFIGS,
    DECODE_CONFIGS,
    SHARED_MEMORY,
    BackwardConfig,
    DecodeConfig,
    ForwardConfig,
    Work,
    backward_config,
    decode_config,
    forward_config,
)
from ..launch import dropout_operand, span_operand
from ..spans import Spans
from .ahead import Compiled, compile_ahead

DTYPES = {2: torch.bfloat16, 4: torch.float32}
QUERY_LEN, KEY_LEN = 256, 512


@dataclass(frozen=True)
class Shipped:
    """One configuration.

    Attributes:
        architecture: the chip.
        kernel: "forward", "query", "key_value", "bias", "statistics" (of the backward pass) or "decode".
        element_size: bytes of a number of the queries.
        dim: widest head that it serves.
        work: what the call has: "spans", "tiles" or "short" (forward), "few" or "many" rows (decode).
        config: the tile shape.
    """

    architecture: str
    kernel: str
    element_size: int
    dim: int
    work: str
    config: ForwardConfig | BackwardConfig | DecodeConfig

    @property
    def name(self) -> str:
        """`sm_90 forward 16bit d128 spans`."""
        return f"{self.architecture} {self.kernel} {8 * self.element_size}bit d{self.dim} {self.work}"

    def compile(self) -> Compiled:
        """Compile the kernel with everything that its kind of work can have."""
        dtype = DTYPES[self.element_size]
        if self.kernel == "forward":
            return _compile_forward(self.architecture, dtype, self.dim, self.work)
        if self.kernel == "decode":
            return _compile_decode(self.architecture, dtype, self.dim, self.work)
        return _compile_backward(self.architecture, dtype, self.dim, self.kernel, self.work)


def shipped(architecture: str | None = None) -> Iterator[Shipped]:
    """All configurations, or those of one chip; of rows that share a tile shape, the one that needs the most."""
    for chip in SHARED_MEMORY if architecture is None else (architecture,):
        rows: dict[tuple[int, int, ForwardConfig], Work] = {
            (size, dim, config): work for (size, dim, work), config in CONFIGS[chip].items()
        }
        for (size, dim, forward), work in rows.items():
            yield Shipped(chip, "forward", size, dim, work, forward)
        for table, kind in ((BACKWARD_CONFIGS, "tiles"), (BACKWARD_SPANS_CONFIGS, "spans")):
            for (size, dim, kernel), backward in table.get(chip, {}).items():
                yield Shipped(chip, kernel, size, dim, kind, backward)
        for (size, dim, few), decode in DECODE_CONFIGS[chip].items():
            if size == 2 or few == "few":  # float32's few and many rows share their tile shapes
                yield Shipped(chip, "decode", size, dim, few, decode)


def _tensors(dtype: torch.dtype, dim: int, query_len: int = QUERY_LEN) -> Iterator[Tensor]:
    """Query, key, value and output, `[2, 4 or 2, tokens, dim]`, stored token by token."""
    return (
        torch.empty(2, tokens, heads, dim, dtype=dtype).transpose(1, 2)
        for heads, tokens in ((4, query_len), (2, KEY_LEN), (2, KEY_LEN), (4, query_len))
    )


def _extras(dtype: torch.dtype, query_len: int = QUERY_LEN) -> dict[str, Any]:
    """Everything that a call can have besides spans: a mask, a bias, a softcap and dropout; and spans with gaps."""
    spans = Spans.causal(query_len, KEY_LEN)
    hidden = torch.ones(2, KEY_LEN, dtype=torch.bool), torch.zeros(2, dtype=torch.int32)
    return {
        "spans": span_operand(spans.start, spans.end, *hidden),
        "mask": torch.ones(2, 1, query_len, KEY_LEN, dtype=torch.bool),
        "bias": torch.zeros(2, 1, query_len, KEY_LEN, dtype=dtype),
        "dropout": dropout_operand(torch.zeros(1, dtype=torch.int64), 0.1),
        "softcap": 30.0,
    }


def _spans_alone(query_len: int = QUERY_LEN) -> dict[str, Any]:
    spans = Spans.causal(query_len, KEY_LEN)
    nothing = dict.fromkeys(("mask", "bias", "dropout", "softcap"))
    return {"spans": span_operand(spans.start, spans.end, None, None), **nothing}


def _compile_forward(architecture: str, dtype: torch.dtype, dim: int, work: str) -> Compiled:
    """Compile the forward kernel with everything that its kind of work can have."""
    from ..forward import forward_kernel, kernel_arguments

    query_len = 8 if work == "short" else QUERY_LEN
    query, key, value, output = _tensors(dtype, dim, query_len)
    config = forward_config(architecture, dtype, dim, dim, query_len, has_tiles=work != "spans")
    given = _spans_alone(query_len) if work == "spans" else _extras(dtype, query_len)
    arguments = kernel_arguments(
        query, key, value, output, output if dtype.itemsize == 2 else None, torch.empty(2, 4, query_len),
        sinks=torch.zeros(4), scale=0.1, config=config, **given,
    )  # fmt: skip
    return compile_ahead(forward_kernel, architecture, arguments)


def _compile_backward(architecture: str, dtype: torch.dtype, dim: int, kernel: Any, work: str) -> Compiled:
    """Compile a backward kernel with everything that its kind of work can have."""
    from .. import backward

    query, key, value, output = _tensors(dtype, dim)
    row = torch.empty(2, 4, QUERY_LEN)
    given = _spans_alone() if work == "spans" else _extras(dtype)
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


def _compile_decode(architecture: str, dtype: torch.dtype, dim: int, rows: str) -> Compiled:
    """With everything there is: pages, float8 with scales, a mask, a bias, sinks, a softcap, split keys."""
    from ..decode import decode_arguments, decode_kernel

    query_len = 1 if rows == "few" else 8
    config = decode_config(architecture, dtype, dim, dim, 4 * query_len)
    query = torch.empty(2, query_len, 8, dim, dtype=dtype).transpose(1, 2)
    # Older chips have the other float8 only; `unsupported_dtype` says so to their users.
    kind = torch.float8_e5m2 if architecture in ("sm_80", "sm_86") else torch.float8_e4m3fn
    pages = torch.empty(9, 16, 2, dim, dtype=kind).transpose(1, 2)
    given = _extras(dtype, query_len)
    arguments = decode_arguments(
        query, pages, pages, torch.empty(4, 2, query_len, 8, dim), torch.empty(4, 2, 8, query_len), given["spans"],
        given["mask"], given["bias"], torch.zeros(8), 0.1, 30.0, torch.zeros(2, 32, dtype=torch.int32), None,
        torch.ones(9, 2, 16), torch.ones(9, 2, 16), KEY_LEN, config,
    )  # fmt: skip
    return compile_ahead(decode_kernel, architecture, arguments)
