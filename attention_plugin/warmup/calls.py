# SPDX-License-Identifier: Apache-2.0
"""The calls of a model, made with tensors of no content through the real launchers, which compile and do not launch.

What Triton compiles apart depends on dtypes, on what is None, and on whether a number is 1 or a multiple of 16. So
calls are made with prompts of one and of several sequences, with and without a 2D mask (`generate` makes one where it
is given none), of lengths that are multiples of 16 and that are not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from attention_kernels import Spans, configs
from attention_kernels.arguments import Arguments, Returned, Wanted, arguments_of
from attention_kernels.passes import launch_forward

from ..explain import Report


@dataclass(frozen=True)
class Kind:
    """All of a call that decides which kernels it needs, but for lengths."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    has_sinks: bool
    softcap: float | None
    has_mask: bool
    has_bias: bool

    @property
    def words(self) -> str:
        """For a reader."""
        dims = f"{self.head_dim}" if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        extras = [name for name, has in (("sinks", self.has_sinks), ("softcap", self.softcap is not None),
                                         ("mask", self.has_mask), ("bias", self.has_bias)) if has]  # fmt: skip
        return ", ".join([f"{self.heads}/{self.kv_heads} heads of {dims}", *extras])


def kinds_of(report: Report) -> list[Kind]:
    """The kinds of calls of a model that is explained."""
    calls = [row.call for row in report.rows if row.call.refused is None]
    kinds = (
        Kind(
            call.scores[1], call.num_kv_heads, call.head_dim, call.value_dim, call.has_sinks, call.softcap,
            call.dense is not None, call.bias is not None,
        )
        for call in calls
    )  # fmt: skip
    return list(dict.fromkeys(kinds))


def compile_calls(
    kinds: list[Kind], dtype: torch.dtype, lengths: tuple[int, ...], target: str, device: torch.device, training: bool
) -> list[dict[str, Any]]:
    """Compile; see `warm_up`."""
    from attention_kernels.ahead_of_time import absent_device

    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(absent_device(target))
            stack.enter_context(configs.assuming(target))
        note = stack.enter_context(compiling_only(found))
        for kind in kinds:
            note["for"] = kind.words
            for length in dict.fromkeys(each for n in lengths for each in (max(16, n // 16 * 16), n // 16 * 16 + 1)):
                for batch, masked in product((1, 2), (False, True)):
                    _prompt(kind, dtype, batch, length, masked, device, training)
                    _next_token(kind, dtype, batch, length, masked, device)
    return list(found.values())


@contextmanager
def compiling_only(found: dict[str, dict[str, Any]]) -> Iterator[dict[str, str]]:
    """While this holds, launching one of our kernels compiles it, notes it in `found` and goes no further."""
    from attention_kernels import backward_kernels, decode, forward

    names = ("query_kernel", "key_value_kernel", "statistics_kernel", "exact_statistics_kernel", "row_bounds_kernel")
    kernels: list[Any] = [forward.forward_kernel, decode.decode_kernel, decode.merge_kernel]
    kernels += [getattr(backward_kernels, name) for name in (*names, "bias_kernel")]
    with suppress(ImportError):  # Triton has no Gluon here, so nothing calls it
        from attention_kernels.hopper import gluon_forward

        kernels.append(gluon_forward.forward_kernel)
    note = {"for": ""}
    for kernel in kernels:
        kernel.run = _compiler(kernel, note, found)
    try:
        yield note
    finally:
        for kernel in kernels:
            del kernel.run


def _compiler(kernel: Any, note: dict[str, str], found: dict[str, dict[str, Any]]) -> Any:
    def compile_it(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        began = time.perf_counter()
        compiled = type(kernel).run(kernel, *args, grid=grid, warmup=True, **kwargs)
        seconds = time.perf_counter() - began
        found.setdefault(compiled.hash, {"kernel": compiled.name, "for": note["for"], "seconds": seconds})
        return compiled

    return compile_it


def _tensors(
    kind: Kind, dtype: torch.dtype, batch: int, rows: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Query stored token by token, as projections leave it; keys and values too, or by head as a cache."""

    def empty(tokens: int, heads: int, dim: int, by_head: bool) -> Tensor:
        if by_head:
            return torch.empty(batch, heads, tokens, dim, dtype=dtype, device=device)
        return torch.empty(batch, tokens, heads, dim, dtype=dtype, device=device).transpose(1, 2)

    cached = rows == 1
    return (
        empty(rows, kind.heads, kind.head_dim, False),
        empty(keys, kind.kv_heads, kind.head_dim, cached),
        empty(keys, kind.kv_heads, kind.value_dim, cached),
    )


def _spans(batch: int, rows: int, keys: int, masked: bool, device: torch.device) -> Spans:
    """Causal; with a 2D mask as `Spans.padded` leaves it on a GPU, where it does not look at it."""
    spans = Spans.causal(rows, keys, device=device)
    if not masked:
        return spans
    first = torch.zeros(batch, 1, dtype=torch.int32, device=device)
    key_mask = torch.ones(batch, keys, dtype=torch.bool, device=device)
    return spans & Spans(first, first + keys, rows, keys, key_mask, first[:, 0])


def _arguments(
    kind: Kind, dtype: torch.dtype, batch: int, rows: int, keys: int, masked: bool, device: torch.device
) -> Arguments:
    spans = _spans(batch, rows, keys, masked, device)
    mask = torch.ones(batch, 1, rows, keys, dtype=torch.bool, device=device) if kind.has_mask else None
    bias = torch.zeros(1, kind.heads, rows, keys, dtype=dtype, device=device) if kind.has_bias else None
    sinks = torch.zeros(kind.heads, dtype=dtype, device=device) if kind.has_sinks else None
    tensors = _tensors(kind, dtype, batch, rows, keys, device)
    return arguments_of(*tensors, spans, mask=mask, bias=bias, sinks=sinks, softcap=kind.softcap)


def _prompt(
    kind: Kind, dtype: torch.dtype, batch: int, length: int, masked: bool, device: torch.device, training: bool
) -> None:
    from attention_kernels import backward

    arguments = _arguments(kind, dtype, batch, length, length, masked, device)
    launch_forward(arguments, False, None)
    if training:
        output, lse, rounding = launch_forward(arguments, True, None)
        wanted = Wanted(query=True, key_value=True, bias=kind.has_bias, sinks=kind.has_sinks)
        backward.backward(Returned(output, lse, rounding, output, None), wanted, arguments)


def _next_token(kind: Kind, dtype: torch.dtype, batch: int, length: int, masked: bool, device: torch.device) -> None:
    """With keys read whole, and in parts that are merged."""
    arguments = _arguments(kind, dtype, batch, 1, length, masked, device)
    for splits in (1, 2, 16):
        launch_forward(arguments, False, splits)
