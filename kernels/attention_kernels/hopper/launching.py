# SPDX-License-Identifier: Apache-2.0
"""Which calls the Gluon kernel serves, and launching it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..arguments import Arguments
from ..config_tables import GLUON_CONFIGS
from ..configs import SHORT, architecture, processors
from ..launch import (
    copied_by_hardware,
    launch,
    launching_on,
    memory,
    operand,
    span_operand,
    token_major_memory,
    within_reach,
)
from ..tiles import SpanOperand
from .gluon_forward import GROUP_ROWS, GROUPS, Work, forward_kernel

CACHE = 32 << 20
"""Bytes of keys and values that programs work on at a time: what stays in Hopper's last cache of 50 MB."""

TILE_ROWS = GROUPS.value * GROUP_ROWS.value
"""Query rows of a program."""

ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def unserved(arguments: Arguments) -> str | None:
    """Why the Gluon kernel does not serve a call, or None if it does."""
    query, key, value = arguments[:3]
    name, head_dim = architecture(query.device), query.shape[3]
    configs = GLUON_CONFIGS.get(name)
    if configs is None:
        return f"it is for {', '.join(GLUON_CONFIGS)}, and the device is {name}"
    if query.dtype not in ELEMENTS:
        return f"it is for 16-bit tensors, and these are {query.dtype}"
    if head_dim not in configs or value.shape[3] != head_dim:
        dims = f"{head_dim} and {value.shape[3]}"
        return f"it is for head dims of {', '.join(map(str, configs))}, the same for values, and these are {dims}"
    extras = {
        "a mask": arguments.mask, "a bias": arguments.bias, "a softcap": arguments.softcap,
        "dropout": arguments.dropout_seed,
    }  # fmt: skip
    for extra, given in extras.items():
        if given is not None:
            return f"it does not know {extra}"
    if query.shape[2] <= SHORT:
        return f"at most {SHORT} query tokens do not fill its tiles"
    for which, tensor in (("query", query), ("key", key), ("value", value)):
        if not copied_by_hardware(tensor):
            return f"the hardware copies no tiles of `{which}`: its rows have gaps or begin at no multiple of 16 bytes"
    return None


def forward(arguments: Arguments, *, wants_rounding: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel on a call that it serves; results are those of `attention_kernels.forward.forward`."""
    query, key, value = within_reach(*arguments[:3])
    output = token_major_memory(query)
    rounding = token_major_memory(query) if wants_rounding else None
    lse = memory(query, *query.shape[:3], dtype=torch.float32)
    given = kernel_arguments(
        query, key, value, output, rounding, lse, spans=span_operand(*arguments.spans), sinks=arguments.sinks,
        scale=arguments.scale,
    )  # fmt: skip
    programs = min(processors(query.device), given["work"].num_tiles)
    with launching_on(query):
        launch(forward_kernel, (programs,), given)
    return output, lse, query.new_empty(0) if rounding is None else rounding


def kernel_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    rounding: Tensor | None,
    lse: Tensor,
    *,
    spans: SpanOperand,
    sinks: Tensor | None,
    scale: float,
) -> dict[str, Any]:
    """Everything the kernel is called with but its grid; compiling ahead of time takes the same."""
    batch, num_heads, query_len, head_dim = query.shape
    config, group_size = GLUON_CONFIGS["sm_90"][head_dim], num_heads // key.shape[1]
    bytes_per_head = 2 * key.shape[2] * head_dim * key.element_size()
    return dict(
        query_tiles=tile_descriptor(query, GROUP_ROWS.value),
        key_tiles=tile_descriptor(key, config.block_n),
        value_tiles=tile_descriptor(value, config.block_n),
        output_tiles=tile_descriptor(output, GROUP_ROWS.value),
        rounding_tiles=None if rounding is None else tile_descriptor(rounding, GROUP_ROWS.value),
        query=operand(query),
        key=operand(key),
        value=operand(value),
        output=operand(output),
        rounding=None if rounding is None else operand(rounding),
        lse_ptr=lse,
        spans=spans,
        sinks_ptr=None if sinks is None else sinks.contiguous(),
        scale=scale,
        work=Work(
            num_heads=num_heads,
            group_size=group_size,
            batch_heads=batch * num_heads,
            query_len=query_len,
            key_len=key.shape[2],
            section=min(batch * num_heads, max(1, CACHE // bytes_per_head) * group_size),
            num_tiles=-(-query_len // TILE_ROWS) * batch * num_heads,
        ),
        HEAD_DIM=head_dim,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        num_warps=4,  # those of the first group; the kernel asks for more
    )


def tile_descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """What the hardware needs to copy tiles of `rows` tokens of `[batch, heads, tokens, dim]`."""
    block, layout = tile_layout(rows, tensor.shape[3], tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


@lru_cache
def tile_layout(rows: int, head_dim: int, dtype: torch.dtype) -> tuple[list[int], gl.NVMMASharedLayout]:
    """Shape of such a tile, and how it lies in shared memory for the matrix units."""
    block = [1, 1, rows, head_dim]
    return block, gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[dtype])
