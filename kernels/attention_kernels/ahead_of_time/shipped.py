# SPDX-License-Identifier: Apache-2.0
"""Every configuration that ships, as a kernel and the arguments that a call would hand it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backward, backward_kernels
from .. import decode as decoding
from .. import forward as forwarding
from ..config_tables import (
    BACKWARD_CONFIGS,
    BACKWARD_FASTER_CONFIGS,
    CONFIGS,
    CONTIGUOUS,
    DECODE_CONFIGS,
    GLUON_CONFIGS,
    SERVES,
    SHARED_MEMORY,
    WITHOUT_E4M3,
    BackwardConfig,
    DecodeConfig,
    Extra,
    ForwardConfig,
)
from ..configs import whole_if_narrow
from ..launch import dropout_operand, span_operand
from ..spans import Spans

QUERY_LEN, KEY_LEN = 256, 512
DTYPES = {2: torch.bfloat16, 4: torch.float32}
DIMS = (64, 128, 256, 512)
"""The widest heads of the tables' rows."""


@dataclass(frozen=True)
class Case:
    """A row of a table on a chip.

    Attributes:
        architecture: such as "sm_90".
        part: "forward", "gluon", "backward", "decode", "merge" or "statistics".
        element_size: bytes of an element of the operands.
        dim: columns of queries, keys and values.
        work: the row's own name: "spans", "tiles", "dropout" or "short", with " (overlap)" for the loop of calls that
            have no mask and no bias, and " (softcap)" or " (hidden keys)" for calls that have these; the backward
            kernel, with " (spans)" for the faster row of calls with spans alone, or the most that such a row serves, by
            its name in `SERVES`; "few" or "many", with " pages" and " (float8)" for pages of that dtype; "" where there
            is one only.
        config: the tile shape, or None where the kernel has none.
    """

    architecture: str
    part: str
    element_size: int
    dim: int
    work: str
    config: ForwardConfig | BackwardConfig | DecodeConfig | None

    @property
    def dtype(self) -> torch.dtype:
        """Of queries and results."""
        return DTYPES[self.element_size]

    @property
    def name(self) -> str:
        """Unique among all cases."""
        words = (self.architecture, self.part, f"{8 * self.element_size}bit", str(self.dim), *self.work.split())
        return "-".join(words)

    def kernel(self) -> tuple[Any, dict[str, Any]]:
        """The kernel and its arguments, with all that this row can be asked for."""
        return _BUILDERS[self.part](self)


def shipped_cases(architecture: str) -> Iterator[Case]:
    """Every row of an architecture, in the order of the tables.

    Raises:
        ValueError: there is no such architecture.
    """
    if architecture not in SHARED_MEMORY:
        raise ValueError(f"architecture must be one of {', '.join(SHARED_MEMORY)}, got {architecture!r}")
    for (size, dim, work), config in CONFIGS[architecture].items():
        yield Case(architecture, "forward", size, dim, work, config)
        if work == "spans":
            for extra in ("softcap", "hidden keys"):
                yield Case(architecture, "forward", size, dim, f"spans ({extra})", config)
        elif config.overlap:
            yield Case(architecture, "forward", size, dim, f"{work} (overlap)", config)
    for dim, config in GLUON_CONFIGS.get(architecture, {}).items():
        yield Case(architecture, "gluon", 2, dim, "spans", config)
    for (size, dim, kernel), row in BACKWARD_CONFIGS[architecture].items():
        yield Case(architecture, "backward", size, dim, kernel, row)
    for (size, dim, kernel), faster in BACKWARD_FASTER_CONFIGS.get(architecture, {}).items():
        yield Case(architecture, "backward", size, dim, f"{kernel} (spans)", faster[0].config)
        for each in faster:
            yield Case(architecture, "backward", size, dim, f"{kernel} ({each.serves})", each.config)
    for (size, dim, rows), few_or_many in DECODE_CONFIGS[architecture].items():
        yield Case(architecture, "decode", size, dim, rows, few_or_many)
        if rows not in CONTIGUOUS:
            yield Case(architecture, "decode", size, dim, f"{rows} (float8)", few_or_many)
    for part in ("merge", "statistics"):
        for dim in DIMS:
            yield Case(architecture, part, 2, dim, "", None)


def tensors(dtype: torch.dtype, dim: int, query_len: int = QUERY_LEN) -> tuple[Tensor, ...]:
    """Query, key, value and output, `[2, 4 or 2, tokens, dim]`, stored token by token."""
    return tuple(
        torch.empty(2, tokens, heads, dim, dtype=dtype).transpose(1, 2)
        for heads, tokens in ((4, query_len), (2, KEY_LEN), (2, KEY_LEN), (4, query_len))
    )


def extras(query_len: int = QUERY_LEN) -> dict[str, Any]:
    """Everything that a call can have besides spans: a mask, a bias, a softcap and dropout; and spans with gaps."""
    spans = Spans.causal(query_len, KEY_LEN)
    hidden = torch.ones(2, KEY_LEN, dtype=torch.bool), torch.zeros(2, dtype=torch.int32)
    return {
        "spans": span_operand(spans.start, spans.end, *hidden),
        "mask": torch.ones(2, 1, query_len, KEY_LEN, dtype=torch.bool),
        "bias": torch.zeros(2, 1, query_len, KEY_LEN),  # in float32, which takes most room
        "dropout": dropout_operand(torch.zeros(1, dtype=torch.int64), 0.1),
        "softcap": 30.0,
    }


def extras_of(names: frozenset[Extra]) -> dict[str, Any]:
    """Of `extras` those with these names."""
    everything, given = extras(), spans_alone()
    for name in names:
        operand_name = "spans" if name == "hidden keys" else name
        given[operand_name] = everything[operand_name]
    return given


def spans_alone(query_len: int = QUERY_LEN) -> dict[str, Any]:
    """The same for a call with spans and nothing else."""
    spans = Spans.causal(query_len, KEY_LEN)
    nothing: Mapping[str, Any] = dict.fromkeys(("mask", "bias", "dropout", "softcap"))
    return {"spans": span_operand(spans.start, spans.end, None, None), **nothing}


def _forward(case: Case) -> tuple[Any, dict[str, Any]]:
    work, _, variant = case.work.partition(" ")
    assert isinstance(case.config, ForwardConfig)
    config = whole_if_narrow(case.config, case.dim)
    query_len = 8 if work == "short" else QUERY_LEN
    query, key, value, output = tensors(case.dtype, case.dim, query_len)
    given = spans_alone(query_len) if work == "spans" else extras(query_len)
    if work == "tiles":
        given |= {"dropout": None}
    if variant == "(overlap)":
        given |= {"mask": None, "bias": None}
    if variant == "(softcap)":
        given |= {"softcap": 30.0}
    if variant == "(hidden keys)":
        given |= {"spans": extras(query_len)["spans"]}
    return forwarding.forward_kernel, forwarding.kernel_arguments(
        query, key, value, output, output if case.element_size == 2 else None, torch.empty(2, 4, query_len),
        sinks=torch.zeros(4), scale=0.1, config=config, **given,
    )  # fmt: skip


def _gluon(case: Case) -> tuple[Any, dict[str, Any]]:
    from ..hopper import gluon_forward, launching

    query, key, value, output = tensors(case.dtype, case.dim)
    row = torch.empty(2, 4, QUERY_LEN)
    return gluon_forward.forward_kernel, launching.kernel_arguments(
        query, key, value, output, output, row, spans=extras()["spans"], sinks=torch.zeros(4), scale=0.1
    )


def _backward(case: Case) -> tuple[Any, dict[str, Any]]:
    kernel, _, variant = case.work.partition(" ")
    query, key, value, output = tensors(case.dtype, case.dim)
    row = torch.empty(2, 4, QUERY_LEN)
    most = SERVES.get(variant.strip("()"))
    given = extras() if most is None else extras_of(most)
    call = backward.Call(query, key, value, output, row, row, scale=0.1, **given)
    config = case.config
    assert isinstance(config, BackwardConfig)
    if kernel == "query":
        return backward_kernels.query_kernel, backward.query_arguments(call, query, config)
    if kernel == "key_value":
        bounds = torch.empty(1, 8, 4, dtype=torch.int32)
        return backward_kernels.key_value_kernel, backward.key_value_arguments(call, key, value, bounds, config)
    if kernel == "statistics":
        arguments = backward.exact_statistics_arguments(call, row, row, torch.zeros(4), config)
        return backward_kernels.exact_statistics_kernel, arguments
    return backward_kernels.bias_kernel, backward.bias_arguments(call, torch.empty_like(given["bias"]), config)


def _decode(case: Case) -> tuple[Any, dict[str, Any]]:
    """With sinks, a softcap and split keys; and a mask, a bias and padding, or pages, which have none of these.

    Pages are those of an engine's batch: of sequences of unequal lengths if they have many rows.
    """
    rows, *variant = case.work.split()
    query_len = 1 if rows == "few" else 8
    query, key, value, _ = tensors(case.dtype, case.dim, query_len)
    given = extras(query_len)
    pages: dict[str, Any] = dict.fromkeys(("block_table", "seq_lens", "query_offsets", "key_scale", "value_scale"))
    if variant:
        given |= spans_alone(query_len) | {"softcap": given["softcap"]}
        kind = case.dtype
        if "(float8)" in variant:
            # Older chips have the other float8 only; `unsupported_dtype` says so to their users.
            kind = torch.float8_e5m2 if case.architecture in WITHOUT_E4M3 else torch.float8_e4m3fn
            pages |= dict.fromkeys(("key_scale", "value_scale"), torch.ones(9, 2, 16))
        key = value = torch.empty(9, 16, 2, case.dim, dtype=kind).transpose(1, 2)
        pages["block_table"] = torch.zeros(2, 32, dtype=torch.int32)
        pages["seq_lens"], pages["query_offsets"] = torch.ones(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    del given["dropout"]  # there is none in decoding
    assert isinstance(case.config, DecodeConfig)
    parts, part_lse = torch.empty(4, 2, query_len, 4, case.dim), torch.empty(4, 2, 4, query_len)
    return decoding.decode_kernel, decoding.decode_arguments(
        query, key, value, parts, part_lse, **given, **pages, sinks=torch.zeros(4), scale=0.1, key_len=KEY_LEN,
        sequences=len(query), searching=bool(variant) and rows == "many",
        config=whole_if_narrow(case.config, case.dim),
    )  # fmt: skip


def _merge(case: Case) -> tuple[Any, dict[str, Any]]:
    lse, part_lse = torch.empty(2, 8, 1), torch.empty(4, 2, 8, 1)
    output = torch.empty(2, 1, 8, case.dim, dtype=case.dtype).transpose(1, 2)
    return decoding.merge_kernel, decoding.merge_arguments(torch.empty(4, 2, 1, 8, case.dim), part_lse, output, lse)


def _statistics(case: Case) -> tuple[Any, dict[str, Any]]:
    _, _, _, output = tensors(case.dtype, case.dim)
    row = torch.empty(2, 4, QUERY_LEN)
    call = backward.Call(output, output, output, output, row, row, scale=0.1, **spans_alone())
    return backward_kernels.statistics_kernel, backward.statistics_arguments(call, output, output, row, row)


_BUILDERS = {
    "forward": _forward,
    "gluon": _gluon,
    "backward": _backward,
    "decode": _decode,
    "merge": _merge,
    "statistics": _statistics,
}
