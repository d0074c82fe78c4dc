# SPDX-License-Identifier: Apache-2.0
"""How many programs a kernel is launched as: CUDA takes 2^31 - 1 in the first dimension, and few in the others.

Nothing is launched: tensors are the CPU's, and tile shapes those of the interpreter.
"""

import pytest
import torch

from attention_kernels import Spans, backward, decode

MOST_IN_OTHERS = 65_535
"""CUDA C++ Programming Guide, compute capabilities: programs in a grid's second and third dimension."""


@pytest.fixture
def grids(monkeypatch):
    """The grids of what is launched, by the kernel's name; nothing runs."""
    found = {}
    for module in (backward, decode):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, arguments: found.update({kernel.__name__: grid}))
    return found


def check(grids, *names):
    assert set(names) <= grids.keys()
    for name, (first, *others) in grids.items():
        assert first < 2**31, name
        assert all(size <= MOST_IN_OTHERS for size in others), f"{name}: {first}, {others}"


def empty(*shape):
    """A tensor of any size that takes next to no memory."""
    return torch.empty(1).expand(shape)


def test_a_prompt_of_many_rows_over_pages(grids):
    tokens = 600_000  # of 8 heads of a group: 75,000 tiles of rows
    table, lengths = torch.zeros(1, 40_000, dtype=torch.int32), torch.full((1,), tokens, dtype=torch.int32)
    spans = Spans.full(tokens, tokens)
    decode.decode(
        empty(1, 8, tokens, 16), empty(40_000, 1, 16, 16), empty(40_000, 1, 16, 16), spans.start, spans.end,
        scale=1.0, block_table=table, seq_lens=lengths, num_splits=1,
    )  # fmt: skip
    check(grids, "decode_kernel")
    assert grids["decode_kernel"][0] > MOST_IN_OTHERS


@pytest.mark.parametrize("bias", [None, "rows", "keys"])
def test_gradients_of_many_keys(grids, bias):
    keys = 70_000 * 64
    long, short = empty(1, 1, keys, 1), empty(1, 1, 16, 1)
    query, key = (long, short) if bias == "keys" else (short, long)
    scores = (query.shape[2], key.shape[2])
    spans, row = Spans.full(*scores), torch.empty(1, 1, scores[0])
    given = {None: None, "rows": empty(1, 1, 1, scores[1]), "keys": empty(1, 1, scores[0], 1)}[bias]
    backward.backward(
        query, row, torch.empty(0), query, None, False, bias is None, bias is not None, query, key, key, spans.start,
        spans.end, None, None, None, given, None, None, 1.0, None, 0.0,
    )  # fmt: skip
    check(grids, "key_value_kernel" if bias is None else "bias_kernel")
    assert max(grid[0] for grid in grids.values()) > MOST_IN_OTHERS
