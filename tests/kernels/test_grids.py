# SPDX-License-Identifier: Apache-2.0
"""How many programs a kernel is launched as, of which CUDA takes 2^31 - 1 in the first dimension and few in the others.

And which program has which tile. For the numbers nothing is launched: tensors are the CPU's, and tile shapes those of
the interpreter.
"""

import pytest
import torch
import triton
import triton.language as tl

from attention_kernels import Spans, attention, backward, decode, launch, prebound
from attention_kernels.arguments import Returned, Wanted, arguments_of
from attention_kernels.paths import interpreting
from attention_kernels.tiles import place_of

from helpers import DEVICE, tensor

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


@pytest.mark.parametrize("max_query_len", [7_936, None])
def test_a_piece_of_a_long_prompt_beside_many_single_tokens(grids, max_query_len):
    """Not each of the others has as many tiles as it."""
    pieces = [1] * 255 + [7_936]
    offsets = torch.tensor([0, *pieces], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens, pages = sum(pieces), empty(40_000, 8, 16, 16)
    spans, table = Spans.full(tokens, 16 * 500), torch.zeros(256, 500, dtype=torch.int32)
    decode.decode(
        empty(1, 32, tokens, 16), pages, pages, spans.start, spans.end, scale=1.0, block_table=table,
        seq_lens=torch.full((256,), 8_000, dtype=torch.int32), query_offsets=offsets, max_query_len=max_query_len,
    )  # fmt: skip
    check(grids, "decode_kernel")
    programs, parts = grids["decode_kernel"]
    rows_of_a_tile = decode.decode_config("interpreter", torch.float32, 16, 16, 4 * 7_936, pages.device).block_m
    with_rows = 8 * sum(-(-4 * piece // rows_of_a_tile) for piece in pieces)
    assert with_rows <= programs <= with_rows + 8 * 256 and parts == 1


@pytest.mark.parametrize("bias", [None, "rows", "keys"])
def test_gradients_of_many_keys(grids, bias):
    keys = 70_000 * 64
    long, short = empty(1, 1, keys, 1), empty(1, 1, 16, 1)
    query, key = (long, short) if bias == "keys" else (short, long)
    scores = (query.shape[2], key.shape[2])
    spans, row = Spans.full(*scores), torch.empty(1, 1, scores[0])
    given = {None: None, "rows": empty(1, 1, 1, scores[1]), "keys": empty(1, 1, scores[0], 1)}[bias]
    wanted = Wanted(query=False, key_value=bias is None, bias=bias is not None, sinks=False)
    returned = Returned(query, row, torch.empty(0), query, None)
    backward.backward(returned, wanted, arguments_of(query, key, key, spans, bias=given))
    check(grids, "key_value_kernel" if bias is None else "bias_kernel")
    assert max(grid[0] for grid in grids.values()) > MOST_IN_OTHERS


@pytest.mark.parametrize(("dim", "value_dim", "pieces"), [(576, 512, 5), (320, 320, 3), (160, 512, 4), (64, 64, 1)])
def test_no_program_has_a_piece_without_columns(grids, dim, value_dim, pieces):
    """Pieces have 128 columns here; heads are padded to the next power of two."""
    query, value = empty(1, 1, 16, dim), empty(1, 1, 16, value_dim)
    spans, row = Spans.full(16), torch.empty(1, 1, 16)
    wanted = Wanted(query=True, key_value=True, bias=False, sinks=False)
    returned = Returned(value, row, torch.empty(0), value, None)
    backward.backward(returned, wanted, arguments_of(query, query, value, spans))
    assert grids["query_kernel"][1] == -(-dim // 128) and grids["key_value_kernel"][1] == pieces


# ---------------------------------------------------------------------- the order of tiles

runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not interpreting(), reason="kernels run on GPUs, or interpreted")


@triton.jit
def places_kernel(places_ptr, num_tiles, section):
    """Write down the tile and the head of each program."""
    tile, head = place_of(tl.program_id(0), num_tiles, section)
    tl.store(places_ptr + 2 * tl.program_id(0), tile)
    tl.store(places_ptr + 2 * tl.program_id(0) + 1, head)


@pytest.mark.interpreter
@runs_kernels
@pytest.mark.parametrize(("tiles", "heads", "section"), [(1, 4, 2), (3, 1, 1), (4, 12, 4), (5, 10, 1), (3, 6, 6)])
def test_each_tile_of_each_head_has_one_program(tiles, heads, section):
    """Section by section of the heads, and within one all first tiles before all second ones."""
    places = torch.full((tiles * heads, 2), -1, dtype=torch.int32, device=DEVICE)
    places_kernel[(tiles * heads,)](places, tiles, section)
    order = [(head // section, tile, head) for head in range(heads) for tile in range(tiles)]
    assert places.tolist() == [[tile, head] for _, tile, head in sorted(order)]


@triton.jit
def packed_tiles_kernel(found_ptr, offsets_ptr, sequences, group_size, BLOCK_M: tl.constexpr):
    """Write down the sequence and the tile of each program, and whether there are rows."""
    b, row_tile, has_rows = decode.packed_tile(offsets_ptr, sequences, tl.program_id(0), group_size, BLOCK_M)
    place = found_ptr + 3 * tl.program_id(0)
    tl.store(place, b)
    tl.store(place + 1, row_tile)
    tl.store(place + 2, has_rows.to(tl.int32))


@pytest.mark.interpreter
@runs_kernels
@pytest.mark.parametrize("lengths", [[1, 40, 1], [0, 0, 5, 0], [16, 16], [17, 0, 1, 33, 2, 64, 0], [0, 0]])
@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_each_tile_of_each_sequence_has_one_program(lengths, group_size):
    block_m, offsets = 16, [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    programs = decode.packed_tiles((offsets[-1] + 2) * group_size, len(lengths), block_m)  # two rows are nobody's
    found = torch.full((programs, 3), -1, dtype=torch.int32, device=DEVICE)
    given = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    packed_tiles_kernel[(programs,)](found, given, len(lengths), group_size, block_m)
    with_rows = [[b, tile] for b, tile, has_rows in found.tolist() if has_rows]
    assert with_rows == [[b, t] for b, n in enumerate(lengths) for t in range(-(-n * group_size // block_m))]


@pytest.mark.interpreter
@runs_kernels
def test_the_order_of_tiles_changes_nothing(monkeypatch):
    torch.manual_seed(0)
    tensors = [tensor(2, heads, 150, 16).requires_grad_() for heads in (6, 2, 2)]

    def run():
        prebound.forget()
        output = attention(*tensors, Spans.causal(150, device=DEVICE))
        return output, *torch.autograd.grad(output.square().sum(), tensors)

    expected = run()
    for cache in (1, 2 * 150 * 2 * 16 * 4):  # a group at a time, and two or four of six
        monkeypatch.setattr(launch, "last_cache", lambda device, cache=cache: cache)
        assert all(torch.equal(actual, wanted) for actual, wanted in zip(run(), expected, strict=True))


def test_heads_side_by_side_are_whole_groups_that_fit_the_last_cache(monkeypatch):
    key, value = empty(1, 4, 1_000, 64), empty(1, 4, 1_000, 32)
    group = 1_000 * (64 + 32) * 4
    for cache, heads in ((group - 1, 3), (2 * group, 6), (3 * group, 6), (7 * group, 12), (100 * group, 24)):
        monkeypatch.setattr(launch, "last_cache", lambda device, cache=cache: cache)
        assert launch.section_of(24, 3, 1_000, key, value) == heads  # 8 groups, and numbers that divide 8
