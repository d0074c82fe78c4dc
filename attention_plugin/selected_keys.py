# SPDX-License-Identifier: Apache-2.0
"""Sparse attention: rows that name the keys, or the blocks of keys, which they see, as a boolean mask.

Models choose keys with a small network of their own and hand over their numbers. Under eager they write them into a
dense mask themselves; here that is done for them, in one byte for each query and key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention_kernels.checks import check_tensors

from .support import log_once


def selected_keys(
    module: torch.nn.Module, indices: Tensor | None, block_indices: Tensor | None, scores: tuple[int, int, int, int]
) -> Tensor | None:
    """The mask of selected keys, bool `[batch, 1 or num_heads, query_len, key_len]`, or None if there is no selection.

    Args:
        module: the attention layer; its configuration says how many keys a block has.
        indices: `[batch, query_len, selected]`, numbers of keys that all heads of a row see.
        block_indices: `[batch, groups, query_len, selected]`, numbers of blocks that a group of heads sees.
        scores: `(batch, num_heads, query_len, key_len)`.

    A number outside of the keys, such as -1, selects nothing.

    Raises:
        ValueError: an argument is not of integers or does not fit, or nothing says how large a block is.
    """
    if indices is None and block_indices is None:
        return None
    log_once(
        "sparse attention over selected keys (`indices`, `block_indices`) is computed with a dense mask, one byte for "
        "each query and key"
    )
    batch, num_heads, query_len, key_len = scores
    given = {"indices": indices, "block_indices": block_indices}
    check_tensors("my_triton attention", {name: each for name, each in given.items() if each is not None})
    selected = None
    if indices is not None:
        _check("indices", indices, (batch, query_len), indices.shape[:-1])
        selected = _scattered(indices, key_len)[:, None]
    if block_indices is not None:
        groups = block_indices.shape[1] if block_indices.ndim == 4 else 0
        if not groups or num_heads % groups:
            groups = num_heads
        _check("block_indices", block_indices, (batch, groups, query_len), block_indices.shape[:-1])
        size = _block_size(module)
        blocks = _scattered(block_indices, -(-key_len // size)).repeat_interleave(size, -1)[..., :key_len]
        blocks = blocks.repeat_interleave(num_heads // groups, 1)
        selected = blocks if selected is None else selected & blocks
    return selected


def _scattered(indices: Tensor, size: int) -> Tensor:
    """True at the numbers that the last dimension holds, bool `[..., size]`."""
    known = (indices >= 0) & (indices < size)
    places = torch.where(known, indices, size).long()  # the others go to a column that is dropped
    return indices.new_zeros((*indices.shape[:-1], size + 1), dtype=torch.bool).scatter(-1, places, True)[..., :size]


def _block_size(module: torch.nn.Module) -> int:
    size: Any = getattr(getattr(module, "config", None), "index_block_size", None)
    if isinstance(size, int) and size > 0:
        return size
    raise ValueError(
        "my_triton attention: `block_indices` needs `index_block_size`, the number of keys in a block, in the "
        f"configuration of the attention layer, got {size!r}; hand over `indices` of keys instead"
    )


def _check(name: str, indices: Tensor, expected: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if indices.is_floating_point() or indices.dtype == torch.bool or tuple(shape) != expected:
        words = {2: "[batch, query_len, selected]", 3: "[batch, groups of heads, query_len, selected]"}[len(expected)]
        raise ValueError(
            f"my_triton attention: `{name}` must be integers {words} = {[*expected, 'any number']}, got "
            f"{indices.dtype} {list(indices.shape)}"
        )
