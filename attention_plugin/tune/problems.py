# SPDX-License-Identifier: Apache-2.0
"""What is measured: for each row a call, its candidates, and how its result is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attention_kernels import Spans, attention_reference, tuned
from attention_kernels.arguments import Returned, Wanted, arguments_of
from attention_kernels.config_tables import (
    CONFIGS,
    DECODE_CONFIGS,
    GLUON_CONFIGS,
    BackwardConfig,
    DecodeConfig,
    ForwardConfig,
)
from attention_kernels.configs import architecture, backward_config
from attention_kernels.reference import error_bound

PASSES = ("forward", "backward", "decode")
WITH_TMA = ("sm_90", "sm_100", "sm_120", "interpreter")
"""Architectures whose hardware copies tiles by itself; the interpreter does as if."""


@dataclass(frozen=True)
class Sizes:
    """How large the measured calls are: causal ones of `batch` x `heads` x `tokens`, and one query per sequence."""

    batch: int = 4
    heads: int = 16
    tokens: int = 4096
    decode_batch: int = 32
    decode_keys: int = 8192
    page_size: int = 16


CHECKED = Sizes(batch=2, heads=4, tokens=150, decode_batch=2, decode_keys=333)
"""Sizes at which results are compared with float64: no multiples of a tile."""


@dataclass(frozen=True)
class Problem:
    """One row of the tables on a device.

    Attributes:
        key: as in `attention_kernels.tuned`.
        default: the built-in shape.
        candidates: other shapes to try.
    """

    key: tuned.Key
    default: tuned.Config
    candidates: tuple[tuned.Config, ...]


def rows_to_measure(
    device: torch.device, passes: tuple[str, ...], dims: tuple[int, ...], dtype: torch.dtype
) -> list[Problem]:
    """The rows to measure, in order: a head dim's passes before the next one's, so that a cut leaves some of each.

    The Gluon kernel, which may hang, comes after all others.
    """
    name, size = architecture(device), dtype.itemsize
    kinds = {"forward": ("spans",), "backward": ("query", "key_value"), "decode": ("few", "few pages", "many pages")}
    found = []
    for dim, each in product(dims, passes):
        for kind in kinds[each]:
            default = _default(name, each, dtype, dim, kind)
            shapes = tuple(shape for shape in _shapes(name, each, kind, default) if shape != default)
            found.append(Problem((each, size, dim, kind), default, shapes))
    gluon = GLUON_CONFIGS.get(name, {}) if size == 2 and "forward" in passes else {}
    return found + [
        Problem(tuned.gluon_key(dtype, dim), gluon[dim]._replace(reason=""), ()) for dim in dims if dim in gluon
    ]


def _default(name: str, part: str, dtype: torch.dtype, dim: int, kind: str) -> Any:
    key: Any = (dtype.itemsize, dim, kind)
    if part == "forward":
        return CONFIGS[name][key]._replace(reason="")
    if part == "decode":
        return DECODE_CONFIGS[name][key]._replace(reason="")
    return backward_config(name, dtype, dim, dim, key[2])._replace(reason="")


def _shapes(name: str, part: str, kind: str, default: Any) -> Iterator[tuned.Config]:
    """Shapes around those that are known to be good; those that do not fit a device are dropped untimed."""
    if part == "decode":
        few = (32, 4, 2), (32, 4, 4), (64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 4, 2), (128, 8, 2)
        few_pages = (32, 4, 3), (32, 4, 5), (32, 4, 6), (64, 4, 3), (64, 4, 5), (64, 8, 5), (128, 8, 5)
        for block_n, warps, stages in {"few": few, "few pages": few_pages}.get(kind, ()):
            yield DecodeConfig(default.block_m, block_n, warps, stages, default.chunk_d)
        if kind == "many pages":
            for shape in (
                (64, 32, 4, 3),
                (64, 64, 4, 3),
                (64, 64, 8, 3),
                (128, 32, 8, 3),
                (128, 64, 8, 3),
                (128, 64, 8, 4),
            ):
                yield DecodeConfig(*shape, default.chunk_d)
        return
    if part == "forward":
        for shape in ((64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2),
                      (128, 64, 8, 3), (128, 128, 8, 2)):  # fmt: skip
            yield ForwardConfig(*shape, default.chunk_d)
        if default.chunk_d:
            return  # these loops multiply whole heads
        for shape in ((64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)):
            yield ForwardConfig(*shape, overlap=True)
            if name in WITH_TMA:
                yield ForwardConfig(*shape, overlap=True, descriptors=True)
        return
    for rows, keys, warps, stages in ((64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2), (64, 32, 4, 2)):
        block_m, block_n = (rows, keys) if kind == "query" else (keys, rows)
        yield BackwardConfig(block_m, block_n, warps, stages, default.chunk_d, default.piece_d)


def call(problem: Problem, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Callable[[], tuple[Tensor, ...]]:
    """A call that the row serves, through the launchers that every call goes through; returns its results."""
    from attention_kernels import backward, decode, forward

    part, _, _, kind = problem.key
    query, key, value, spans = inputs(problem.key, device, dtype, sizes)
    given = arguments_of(query, key, value, spans)
    if part == "decode" and kind != "few":
        key, value, block_table, seq_lens = in_pages(key, value, sizes.page_size)
        return lambda: decode.decode(
            query, key, value, *given.spans, scale=given.scale, block_table=block_table, seq_lens=seq_lens
        )[:1]
    if part == "decode":
        return lambda: decode.decode(query, key, value, *given.spans, scale=given.scale)[:1]
    if part == "gluon":
        from attention_kernels.hopper import launching

        return lambda: launching.forward(given, wants_rounding=False)[:1]
    if part == "forward":
        return lambda: forward.forward(given, wants_rounding=False)[:1]
    output, lse, rounding = forward.forward(given, wants_rounding=True)
    gradient = torch.ones_like(output)
    returned = Returned(output, lse, rounding, gradient, None)
    wanted = Wanted(query=kind == "query", key_value=kind != "query", bias=False, sinks=False)

    def run() -> tuple[Tensor, ...]:
        grads = backward.backward(returned, wanted, given)
        return tuple(grad for grad in grads[:3] if grad is not None)

    return run


def in_pages(key: Tensor, value: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same keys and values in pages, as `decode.decode` takes them, with their block table and lengths."""
    batch, _, tokens, _ = key.shape
    pages = -(-tokens // page_size)
    padded = (pad(each.transpose(1, 2), (0, 0, 0, 0, 0, pages * page_size - tokens)) for each in (key, value))
    key, value = (each.unflatten(1, (pages, page_size)).flatten(0, 1).transpose(1, 2) for each in padded)
    block_table = torch.arange(batch * pages, dtype=torch.int32, device=key.device).view(batch, pages)
    return key, value, block_table, torch.full((batch,), tokens, dtype=torch.int32, device=key.device)


def inputs(key: tuned.Key, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> tuple[Any, ...]:
    """Query, key and value of a row, stored token by token, and their spans: causal, or all keys for one query.

    On torch's meta device, where compiling is all that comes of a call, they have no content.
    """
    part, _, dim, kind = key
    one_query = part == "decode" and kind != "many pages"
    batch, tokens = (sizes.decode_batch, sizes.decode_keys) if one_query else (sizes.batch, sizes.tokens)
    rows = 1 if one_query else tokens
    shapes = ((batch, count, heads, dim) for count, heads in ((rows, sizes.heads), (tokens, 2), (tokens, 2)))
    if device.type == "meta":
        drawn = (torch.empty(shape, device=device) for shape in shapes)
    else:
        generator = torch.Generator(device).manual_seed(0)
        drawn = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    return (*(each.to(dtype).transpose(1, 2) for each in drawn), Spans.causal(rows, tokens, device=device))


def is_right(problem: Problem, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a row's call gives what it should, by the project's bound: twice the error of eager in the same dtype."""
    ours = torch.cat([each.double().flatten() for each in call(problem, device, dtype, CHECKED)()])
    exact, allowed = _truth(problem.key, device, dtype)
    return float((ours - exact).norm()) <= allowed


@cache
def _truth(key: tuned.Key, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The exact results of a row's call at `CHECKED`, and the largest error that is right."""
    part, _, _, kind = key
    query, keys, value, _ = inputs(key, device, dtype, CHECKED)
    rows, tokens = query.shape[2], keys.shape[2]
    mask = torch.ones(rows, tokens, dtype=torch.bool, device=device).tril(tokens - rows)
    results = []
    for precision in (torch.float64, dtype):
        leaves = [each.detach().clone().requires_grad_(part == "backward") for each in (query, keys, value)]
        output = attention_reference(*leaves, mask=mask, dtype=precision)[0]
        wanted = leaves[:1] if kind == "query" else leaves[1:]
        parts = torch.autograd.grad(output.sum(), wanted) if part == "backward" else (output,)
        results.append(torch.cat([each.detach().double().flatten() for each in parts]))
    exact, eager = results
    return exact, error_bound(float((eager - exact).norm()), float(exact.norm()), dtype)
