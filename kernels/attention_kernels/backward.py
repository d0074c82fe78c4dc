# SPDX-License-Identifier: Apache-2.0
"""Launching the backward pass: which kernels run, on what, in which tile shapes."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .arguments import Arguments, Returned, Wanted
from .backward_kernels import (
    ROWS_PER_SCAN,
    bias_kernel,
    exact_statistics_kernel,
    key_value_kernel,
    query_kernel,
    row_bounds_kernel,
    statistics_kernel,
)
from .configs import BackwardConfig, Extra, Pass, architecture, backward_config, padded_dim
from .launch import (
    INTERPRETED,
    dropout_operand,
    launch,
    launching_on,
    memory,
    operand,
    score_operand,
    section_of,
    span_operand,
    token_major_memory,
    within_reach,
)
from .tiles import DropoutOperand, SpanOperand

STATISTICS_ROWS = 16
"""Rows of a program of `statistics_kernel`."""


class Gradients(NamedTuple):
    """What the kernels of the backward pass give; gradients are None where not wanted.

    `bias` is what `whole_bias_gradient` takes, `lse2` and `delta` what `sink_gradient` takes.
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    lse2: Tensor
    delta: Tensor


def backward(returned: Returned, wanted: Wanted, arguments: Arguments) -> Gradients:
    """Launch the kernels whose gradients are wanted.

    Args:
        returned: from `forward.forward`, and the gradients of it; that of the output best without gaps in a row.
        wanted: which gradients; that of the sinks is `sink_gradient`.
        arguments: those of the forward pass.

    Returns:
        Gradients of query, key and value, each in the shape and dtype of what it belongs to and stored token by token,
        as the output is, or None where not wanted; and what `whole_bias_gradient` and `sink_gradient` take.
    """
    output, lse, rounding, grad_output, grad_lse = returned
    query, key, value, bias = arguments.query, arguments.key, arguments.value, arguments.bias
    if INTERPRETED and query.dtype == torch.bfloat16:
        # As in the forward pass: the interpreter cannot multiply bf16.
        exact = output.float() + rounding.float() if rounding.numel() else output.float()
        wide = arguments._replace(
            query=query.float(), key=key.float(), value=value.float(), bias=None if bias is None else bias.float()
        )
        exactly = Returned(exact, lse, rounding.new_empty(0), grad_output.float(), grad_lse)
        results = backward(exactly, wanted, wide)
        named = zip(results._fields, results, (query, key, value, bias), strict=False)
        return results._replace(
            **{name: each.to(of.dtype) for name, each, of in named if each is not None and of is not None}
        )
    statistics = memory(lse, *lse.shape), memory(lse, *lse.shape)
    query, key, value, grad_output, mask, bias = within_reach(query, key, value, grad_output, arguments.mask, bias)
    call = Call(
        query, key, value, grad_output, *statistics, span_operand(*arguments.spans), mask, bias,
        dropout_operand(arguments.dropout_seed, arguments.dropout_p), arguments.scale, arguments.softcap,
    )  # fmt: skip
    with launching_on(query):
        grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
        if query.dtype == torch.float32 or wanted.bias:
            exact_statistics(call, lse, grad_lse, arguments.sinks)
        else:
            statistics_of_output(call, output, rounding, lse, grad_lse)
        grad_query = query_gradient(call) if wanted.query else None
        spans_batch = max(each.shape[0] for each in arguments.spans[:3] if each is not None)
        grad_key, grad_value = key_value_gradients(call, spans_batch) if wanted.key_value else (None, None)
        grad_bias = bias_gradients(call) if wanted.bias else None
    return Gradients(grad_query, grad_key, grad_value, grad_bias, *statistics)


class Call(NamedTuple):
    """What the kernels of one backward pass share: `[batch, heads, tokens, dim]` tensors and the rest of the call.

    `lse2` and `delta`, float32 `[batch, num_heads, query_len]`, are what `store_statistics` says.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor
    lse2: Tensor
    delta: Tensor
    spans: SpanOperand
    mask: Tensor | None
    bias: Tensor | None
    dropout: DropoutOperand | None
    scale: float
    softcap: float | None

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """`(batch, num_heads, query_len, key_len)`."""
        return (*self.query.shape[:3], self.key.shape[2])

    @property
    def section(self) -> int:
        """Heads of queries whose programs run side by side."""
        batch, num_heads, _, key_len = self.scores
        return section_of(batch * num_heads, num_heads // self.key.shape[1], key_len, self.key, self.value)

    @property
    def extras(self) -> frozenset[Extra]:
        """What the call has besides spans."""
        given: dict[Extra, object] = {
            "mask": self.mask,
            "bias": self.bias,
            "softcap": self.softcap,
            "hidden keys": self.spans.key_mask_ptr,
            "dropout": self.dropout,
        }
        return frozenset(name for name, extra in given.items() if extra is not None)

    def config(self, kernel: Pass) -> BackwardConfig:
        """Tile shape of one of the kernels."""
        device, dims = self.query.device, (self.query.shape[-1], self.value.shape[-1])
        return backward_config(architecture(device), self.query.dtype, *dims, kernel, self.extras, device)

    def arguments(self, config: BackwardConfig, *, transposed: bool = False) -> dict[str, Any]:
        """Arguments that all kernels take."""
        head_dim, value_dim = self.query.shape[-1], self.value.shape[-1]
        block_d, block_dv = padded_dim(head_dim), padded_dim(value_dim)
        return dict(
            query=operand(self.query), key=operand(self.key), value=operand(self.value),
            grad_output=operand(self.grad_output), lse2_ptr=self.lse2, delta_ptr=self.delta, spans=self.spans,
            mask=score_operand(self.mask, self.scores, transposed=transposed),
            bias=score_operand(self.bias, self.scores, transposed=transposed),
            dropout=self.dropout, scale=self.scale, softcap=self.softcap,
            group_size=self.query.shape[1] // self.key.shape[1], query_len=self.scores[2], key_len=self.scores[3],
            HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_d, BLOCK_DV=block_dv,
            CHUNK_D=min(config.chunk_d or block_d, block_d), CHUNK_DV=min(config.chunk_d or block_dv, block_dv),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, PRECISION="ieee", num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip


def statistics_of_output(call: Call, output: Tensor, rounding: Tensor, lse: Tensor, grad_lse: Tensor | None) -> None:
    """Fill `call.lse2` and `call.delta` from the output."""
    batch, num_heads, query_len, _ = call.scores
    if call.delta.numel():
        tiles = triton.cdiv(query_len, STATISTICS_ROWS)
        arguments = statistics_arguments(call, output, rounding if rounding.numel() else None, lse, grad_lse)
        launch(statistics_kernel, (tiles * batch * num_heads,), arguments)


def statistics_arguments(
    call: Call, output: Tensor, rounding: Tensor | None, lse: Tensor, grad_lse: Tensor | None
) -> dict[str, Any]:
    """Everything `statistics_kernel` is called with but its grid; compiling ahead of time takes the same."""
    value_dim = output.shape[3]
    return dict(
        output=operand(output), rounding=None if rounding is None else operand(rounding),
        grad_output=operand(call.grad_output), grad_lse_ptr=grad_lse, lse_ptr=lse, lse2_ptr=call.lse2,
        delta_ptr=call.delta, num_heads=call.scores[1], query_len=call.scores[2], VALUE_DIM=value_dim,
        BLOCK_DV=padded_dim(value_dim), BLOCK_M=STATISTICS_ROWS,
    )  # fmt: skip


def exact_statistics(call: Call, lse: Tensor, grad_lse: Tensor | None, sinks: Tensor | None) -> None:
    """Fill `call.lse2` and `call.delta` from recomputed weights."""
    batch, num_heads, query_len, _ = call.scores
    if call.delta.numel():
        arguments = exact_statistics_arguments(call, lse, grad_lse, sinks, call.config("statistics"))
        tiles = triton.cdiv(query_len, arguments["BLOCK_M"])
        launch(exact_statistics_kernel, (tiles * batch * num_heads,), arguments)


def exact_statistics_arguments(
    call: Call, lse: Tensor, grad_lse: Tensor | None, sinks: Tensor | None, config: BackwardConfig
) -> dict[str, Any]:
    """Everything `exact_statistics_kernel` is called with but its grid; compiling ahead of time takes the same."""
    return call.arguments(config) | dict(
        lse_ptr=lse, grad_lse_ptr=grad_lse, sinks_ptr=None if sinks is None else sinks.contiguous(),
        num_heads=call.scores[1], section=call.section,
    )  # fmt: skip


def query_gradient(call: Call) -> Tensor:
    """Gradient of the query."""
    grad_query = token_major_memory(call.query)
    batch, num_heads, query_len, _ = call.scores
    if grad_query.numel():
        arguments = query_arguments(call, grad_query, call.config("query"))
        tiles = triton.cdiv(query_len, arguments["BLOCK_M"]) * batch * num_heads
        launch(query_kernel, (tiles, triton.cdiv(arguments["HEAD_DIM"], arguments["PIECE_D"])), arguments)
    return grad_query


def query_arguments(call: Call, grad_query: Tensor, config: BackwardConfig) -> dict[str, Any]:
    """Everything `query_kernel` is called with but its grid; compiling ahead of time takes the same."""
    arguments = call.arguments(config)
    piece = min(config.piece_d or arguments["BLOCK_D"], arguments["BLOCK_D"])
    return arguments | dict(
        grad_query=operand(grad_query), num_heads=call.query.shape[1], section=call.section, PIECE_D=piece
    )


def key_value_gradients(call: Call, spans_batch: int) -> tuple[Tensor, Tensor]:
    """Gradients of key and value. `spans_batch` is 1 if all batch elements share their spans."""
    grad_key, grad_value = token_major_memory(call.key), token_major_memory(call.value)
    batch, num_kv_heads, key_len, _ = call.key.shape
    if not grad_key.numel():
        return grad_key, grad_value
    config = call.config("key_value")
    tiles = triton.cdiv(key_len, config.block_n)
    bounds = memory(call.lse2, spans_batch, tiles, 4, dtype=torch.int32)
    launch(row_bounds_kernel, (tiles * spans_batch,), dict(
        spans=call.spans, bounds_ptr=bounds, query_len=call.scores[2], key_len=key_len, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, ROWS=ROWS_PER_SCAN.value,
    ))  # fmt: skip
    arguments = key_value_arguments(call, grad_key, grad_value, bounds, config)
    pieces = max(
        triton.cdiv(arguments["HEAD_DIM"], arguments["PIECE_D"]),
        triton.cdiv(arguments["VALUE_DIM"], arguments["PIECE_DV"]),
    )
    launch(key_value_kernel, (tiles * batch * num_kv_heads, pieces), arguments)
    return grad_key, grad_value


def key_value_arguments(
    call: Call, grad_key: Tensor, grad_value: Tensor, bounds: Tensor, config: BackwardConfig
) -> dict[str, Any]:
    """Everything `key_value_kernel` is called with but its grid; compiling ahead of time takes the same."""
    arguments = call.arguments(config, transposed=True)
    pieces = {
        f"PIECE_{name}": min(config.piece_d or arguments[f"BLOCK_{name}"], arguments[f"BLOCK_{name}"])
        for name in ("D", "DV")
    }
    return arguments | pieces | dict(
        grad_key=operand(grad_key), grad_value=operand(grad_value), bounds_ptr=bounds,
        bounds_stride_b=0 if bounds.shape[0] == 1 else bounds.stride(0), num_kv_heads=call.key.shape[1],
    )  # fmt: skip


def bias_gradients(call: Call) -> Tensor:
    """Gradient of the bias, or shares of it.

    A bias with all rows and keys is summed over batch and heads inside the kernel, so that nothing larger than the
    gradient exists. One that is broadcast over rows or keys is small: each head writes its own share.
    """
    bias = call.bias
    assert bias is not None
    batch, num_heads, query_len, key_len = call.scores
    over_rows, over_keys = bias.shape[2] == 1 < query_len, bias.shape[3] == 1 < key_len
    small = over_rows or over_keys
    shape = (batch, num_heads, *bias.shape[2:]) if small else bias.shape
    grad_bias = memory(bias, *shape, dtype=torch.float32 if small else None)
    if not call.query.numel() or not call.key.numel():
        return torch.zeros_like(bias)
    arguments = bias_arguments(call, grad_bias, call.config("bias"))
    key_tiles = 1 if over_keys else triton.cdiv(key_len, arguments["BLOCK_N"])
    row_tiles = 1 if over_rows else triton.cdiv(query_len, arguments["BLOCK_M"])
    launch(bias_kernel, (key_tiles * row_tiles * shape[0] * shape[1],), arguments)
    return grad_bias


def bias_arguments(call: Call, grad_bias: Tensor, config: BackwardConfig) -> dict[str, Any]:
    """Everything `bias_kernel` is called with but its grid; compiling ahead of time takes the same."""
    over = [share == 1 < whole for share, whole in zip(grad_bias.shape, call.scores, strict=True)]
    return call.arguments(config) | dict(
        grad_bias=operand(grad_bias), batch=call.scores[0], num_heads=call.scores[1], OVER_BATCH=over[0],
        OVER_HEADS=over[1], OVER_ROWS=over[2], OVER_KEYS=over[3],
    )  # fmt: skip


def whole_bias_gradient(shares: Tensor, bias: Tensor) -> Tensor:
    """Gradient of the bias from what `bias_kernel` has written."""
    return shares.sum_to_size(bias.shape).to(bias.dtype)


def sink_gradient(sinks: Tensor, lse2: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the sinks: a sink's score has a weight in every row and a value of 0."""
    # A sum over all rows, in float64: there is no better place to lose no digits than where there is so little to add.
    weights = torch.exp2(sinks.double()[:, None] / math.log(2) - lse2.double())
    return -(weights * delta).sum((0, 2)).to(sinks.dtype)
