# SPDX-License-Identifier: Apache-2.0
"""Masks as spans equal the dense masks that transformers builds from the same arguments, element by element."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, StaticCache, masking_utils

from attention_kernels import attention_reference
from attention_kernels import spans as spans_module
from attention_plugin import SpanMask, attention_forward, carried_mask, span_mask
from attention_plugin import masks as masks_module
from attention_plugin.attention import resolve_mask
from attention_plugin.documents import document_ids
from attention_plugin.reading import Frame, read_spans
from model.modeling_reference import CACHE

# Fresh cases on every run; a failure prints the decorator that reproduces it.
PROPERTY = {"deadline": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}

BUILDERS = {
    "causal": masking_utils.create_causal_mask,
    "sliding": masking_utils.create_sliding_window_causal_mask,
    "chunked": masking_utils.create_chunked_causal_mask,
    "bidirectional": masking_utils.create_bidirectional_mask,
    "bidirectional_sliding": masking_utils.create_bidirectional_sliding_window_mask,
}
BIDIRECTIONAL = ("bidirectional", "bidirectional_sliding")
CHUNKS_HAVE_BLOCKS = "block_sequence_ids" in inspect.signature(masking_utils.create_chunked_causal_mask).parameters
"""Earlier than transformers 5.23 chunked masks know no blocks, and `generate` cannot build them at all."""
REMAPS = hasattr(masking_utils, "remap_positions_for_packed_sequence")
"""Earlier, a mask of packed documents is one of the places in the row, whatever the positions in the documents."""


def make_config(implementation: str, *, window: int = 4, chunk: int = 4, layer_types: list[str] | None = None):
    """A configuration as the mask builders and the caches read it."""
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=16
    )
    config.sliding_window = window
    config.attention_chunk_size = chunk
    config.layer_types = layer_types or ["full_attention", "full_attention"]
    config._attn_implementation = implementation
    return config


# ---------------------------------------------------------------------- what a case can hold


def near(batch, head, q_idx, kv_idx):
    """A user's function whose rows are one run of keys: three neighbours on each side."""
    return (q_idx - kv_idx).abs() <= 3


def recent(batch, head, q_idx, kv_idx):
    return kv_idx > q_idx - 5


def every_third(batch, head, q_idx, kv_idx):
    """A user's function whose rows are several runs of keys."""
    return (q_idx - kv_idx) % 3 == 0


def even_rows(batch, head, q_idx, kv_idx):
    return ((q_idx + batch) % 2 == 0) | (kv_idx == 0)


def first_keys(batch, head, q_idx, kv_idx):
    """Keys every row sees, as prefixes and registers: a second run beside a window."""
    return kv_idx < 2


USERS_OWN = (near, recent, every_third, even_rows, first_keys)
"""Functions that only an evaluation can know."""


@dataclass
class Case:
    """One call of a mask builder."""

    pattern: str
    batch: int
    query_len: int
    window: int
    chunk: int
    attention_mask: Tensor | None
    past: Any
    position_ids: Tensor | None
    block_ids: Tensor | None
    or_function: Callable | None
    and_function: Callable | None
    layer_types: list[str]

    @property
    def known(self) -> bool:
        """Whether the mask consists of transformers' own functions, and of blocks that are one run of tokens each."""
        users_own = self.or_function in USERS_OWN or self.and_function in USERS_OWN
        # transformers does not remap the positions of a union that packing wraps in a way that can be read.
        packed_union = REMAPS and self.or_function is not None and self.packed
        return not users_own and not packed_union and not self.blocks_recur

    @property
    def packed(self) -> bool:
        """Whether the positions of some row do not count up by one, and the mask heeds them."""
        if self.position_ids is None or self.pattern in BIDIRECTIONAL:
            return False
        return bool((self.position_ids.diff(dim=1) != 1).any())

    @property
    def blocks_recur(self) -> bool:
        """Whether a block id comes back after another one."""
        if self.block_ids is None or self.pattern in BIDIRECTIONAL:
            return False
        for row in self.block_ids.tolist():
            runs = [new for old, new in zip([None, *row], row, strict=False) if new != old and new >= 0]
            if len(set(runs)) < len(runs):
                return True
        return False

    def build(self, implementation: str) -> Any:
        arguments: dict[str, Any] = {
            "config": make_config(implementation, window=self.window, chunk=self.chunk, layer_types=self.layer_types),
            "inputs_embeds": torch.zeros(self.batch, self.query_len, 1),
            "attention_mask": self.attention_mask,
            CACHE: self.past,
            "or_mask_function": self.or_function,
            "and_mask_function": self.and_function,
        }
        if self.pattern in BIDIRECTIONAL:
            return BUILDERS[self.pattern](**arguments, allow_is_bidirectional_skip=False)
        arguments |= {"position_ids": self.position_ids}
        if self.pattern != "chunked" or CHUNKS_HAVE_BLOCKS:
            arguments |= {"block_sequence_ids": self.block_ids}
        else:
            assume(self.block_ids is None)
        if self.pattern == "generate":
            return masking_utils.create_masks_for_generate(**arguments)
        return BUILDERS[self.pattern](**arguments, allow_is_causal_skip=False)


def filled_cache(kind: str, config: Any, batch: int, seen: int, room: int) -> Any:
    """A cache of the given kind whose layers have seen `seen` tokens, some of them in a second step."""
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=room)
    for tokens in (seen - seen // 3, seen // 3):
        for layer in range(config.num_hidden_layers if tokens else 0):
            states = torch.zeros(batch, 1, tokens, 1)
            cache.update(states, states, layer)
    return cache


@st.composite
def padding_masks(draw, batch: int, tokens: int) -> Tensor | None:
    """None, or a 2D mask padded on the left, the right, both sides or in the middle; each row as it likes."""
    if draw(st.booleans()):
        return None
    mask = torch.ones(batch, tokens, dtype=torch.long)
    for row in range(batch):
        side = draw(st.sampled_from(["none", "left", "right", "both", "holes", "all"]))
        left, right = (draw(st.integers(0, tokens // 2)) for _ in range(2))
        if side in ("left", "both"):
            mask[row, :left] = 0
        if side in ("right", "both"):
            mask[row, tokens - right :] = 0
        if side == "holes":
            mask[row] = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens)))
        if side == "all":
            mask[row] = 0
    return mask if draw(st.booleans()) else mask.bool()


@st.composite
def packed_positions(draw, batch: int, tokens: int) -> Tensor:
    """Positions of packed documents, which begin anywhere and at any position; sometimes one row for the batch."""
    rows = 1 if draw(st.booleans()) else batch
    positions = torch.empty(rows, tokens, dtype=torch.long)
    for row in range(rows):
        here, values = draw(st.integers(0, 3)), []
        for _ in range(tokens):
            values.append(here)
            here = draw(st.sampled_from([here + 1] * 5 + [0, 0, here, here + 2]))
        positions[row] = torch.tensor(values)
    return positions


@st.composite
def block_sequence_ids(draw, batch: int, tokens: int) -> Tensor:
    """Block ids, -1 outside of blocks: runs with ids of their own, or ids that may come back."""
    recurring = draw(st.booleans())
    ids = torch.empty(batch, tokens, dtype=torch.long)
    for row in range(batch):
        values, fresh = [], 0
        while len(values) < tokens:
            length, text = draw(st.integers(1, 6)), draw(st.booleans())
            block = -1 if text else draw(st.integers(0, 2)) if recurring else fresh
            fresh += not text
            values += [block] * length
        ids[row] = torch.tensor(values[:tokens])
    return ids


@st.composite
def cases(draw, patterns: tuple[str, ...] = tuple(BUILDERS)) -> Case:
    pattern = draw(st.sampled_from(patterns))
    batch, query_len = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    window, chunk = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    cache_kind = draw(st.sampled_from(["none", "none", "dynamic", "static"]))
    local = "chunked_attention" if pattern == "chunked" else "sliding_attention"
    layer_types = draw(st.permutations(["full_attention", local]))
    if draw(st.booleans()):
        layer_types = ["full_attention"] * 2
    past, seen = None, 0
    if cache_kind != "none":
        seen = draw(st.integers(0, 30))
        config = make_config("sdpa", window=window, chunk=chunk, layer_types=layer_types)
        past = filled_cache(cache_kind, config, batch, seen, seen + query_len + draw(st.integers(0, 9)))
    # Sometimes a mask for other tokens than the cache and the queries: prefix tuning, or a mask as long as the cache.
    masked_tokens = max(1, seen + query_len + draw(st.sampled_from([0] * 6 + [-2, 3])))
    attention_mask = draw(padding_masks(batch, masked_tokens))
    position_ids = None
    if attention_mask is None and past is None and draw(st.booleans()):
        position_ids = draw(packed_positions(batch, query_len))
    block_ids = draw(block_sequence_ids(batch, seen + query_len)) if draw(st.booleans()) else None
    own = masking_utils.sliding_window_bidirectional_overlay(2)
    functions = st.one_of(st.none(), st.none(), st.none(), st.sampled_from([*USERS_OWN, own, own]))
    return Case(
        pattern, batch, query_len, window, chunk, attention_mask, past, position_ids, block_ids,
        draw(functions), draw(functions), layer_types,
    )  # fmt: skip


# ---------------------------------------------------------------------- exactness


@contextmanager
def counted_evaluations() -> Iterator[list[int]]:
    """Collects the number of rows of each evaluation of a mask function for queries and keys."""
    rows: list[int] = []
    original = masking_utils.sdpa_mask

    def counting(*args, **kwargs):
        rows.append(kwargs["q_length"])
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_utils, "sdpa_mask", counting)
        yield rows


def assert_same(mask: SpanMask, dense: Tensor) -> None:
    ours = mask.to_dense()
    assert mask.shape[2:] == dense.shape[2:] and mask.shape[0] in (1, dense.shape[0])
    assert torch.equal(ours.expand_as(dense), dense), f"\n{mask.spans}\ndiffers at\n{(ours != dense).nonzero()[:20]}"
    spans = mask.spans
    assert int(spans.start.min()) >= 0 and int(spans.end.max()) <= spans.key_len


@settings(max_examples=800, **PROPERTY)
@given(case=cases())
def test_spans_equal_the_dense_mask(case: Case):
    dense = case.build("sdpa")
    with counted_evaluations() as evaluations:
        mask = case.build("my_triton")
    assert isinstance(mask, SpanMask)
    assert_same(mask, dense)
    # transformers' own functions are read, not evaluated; a user's function can only be evaluated.
    assert bool(evaluations) != case.known
    if case.known:
        assert mask.holes is None


@pytest.mark.skipif(
    not CHUNKS_HAVE_BLOCKS,
    reason="before 5.23 `create_masks_for_generate` hands chunked masks blocks they do not take, and raises",
)
@settings(max_examples=150, **PROPERTY)
@given(case=cases(("generate",)))
def test_masks_for_generate_equal_eager_masks(case: Case):
    # create_masks_for_generate cannot be told to build every mask; only eager's are never skipped.
    eager, ours = case.build("eager"), case.build("my_triton")
    assert eager.keys() == ours.keys() == set(case.layer_types)
    for layer_type, mask in eager.items():
        assert_same(ours[layer_type], mask == 0)


@settings(max_examples=100, **PROPERTY)
@given(data=st.data(), layer=st.sampled_from(["sliding_window", "attention_chunk_size", None]))
def test_masks_for_generate_of_uniform_models(data, layer):
    """Models without `layer_types`: all layers sliding, all chunked, or all causal."""
    batch, query_len = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    attention_mask = data.draw(padding_masks(batch, query_len))
    built = []
    assume(layer != "attention_chunk_size" or CHUNKS_HAVE_BLOCKS)
    for implementation in ("eager", "my_triton"):
        config = make_config(implementation)
        del config.layer_types
        for name in {"sliding_window", "attention_chunk_size"} - {layer}:
            setattr(config, name, None)
        built.append(
            masking_utils.create_masks_for_generate(config, torch.zeros(batch, query_len, 1), attention_mask, None)
        )
    assert_same(built[1], built[0] == 0)


@settings(max_examples=100, **PROPERTY)
@given(data=st.data())
def test_cross_attention_masks(data):
    """The keys are an encoder's: another length than the queries', with padding of their own."""
    batch, query_len, key_len = (data.draw(st.integers(1, high)) for high in (3, 40, 40))
    attention_mask = data.draw(padding_masks(batch, key_len))
    or_function = data.draw(st.sampled_from([None, every_third, masking_utils.sliding_window_bidirectional_overlay(2)]))
    pattern = data.draw(st.sampled_from(BIDIRECTIONAL))
    sdpa, ours = (
        BUILDERS[pattern](
            make_config(implementation),
            torch.zeros(batch, query_len, 1),
            attention_mask,
            encoder_hidden_states=torch.zeros(batch, key_len, 1),
            or_mask_function=or_function,
            allow_is_bidirectional_skip=False,
        )
        for implementation in ("sdpa", "my_triton")
    )
    assert_same(ours, sdpa)


@st.composite
def mask_functions(draw, batch: int, tokens: int, depth: int = 3) -> Callable:
    """Any combination of transformers' own functions, also of kinds that no builder makes."""
    inner = mask_functions(batch, tokens, depth - 1)
    ids = st.lists(st.integers(-1, 3), min_size=batch * tokens, max_size=batch * tokens)
    documents = torch.tensor(draw(ids)).view(batch, tokens)
    documents = documents.sort(1).values if draw(st.booleans()) else documents
    kind = draw(st.integers(0, 6 if depth == 0 else 9))
    if kind == 0:
        return masking_utils.causal_mask_function
    if kind == 1:
        return masking_utils.bidirectional_mask_function
    if kind == 2:
        return masking_utils.sliding_window_overlay(draw(st.integers(0, 8)))
    if kind == 3:
        return masking_utils.sliding_window_bidirectional_overlay(draw(st.integers(-1, 6)))
    if kind == 4:
        left_padding = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch)))
        return masking_utils.chunked_overlay(draw(st.integers(1, 7)), left_padding)
    if kind == 5:
        return masking_utils.blockwise_overlay(documents)
    if kind == 6:
        return masking_utils.packed_sequence_mask_function(documents)
    if kind == 7:
        return masking_utils.and_masks(*draw(st.lists(inner, min_size=1, max_size=3)))
    if kind == 8:
        return masking_utils.or_masks(*draw(st.lists(inner, min_size=1, max_size=3)))
    blocks = documents if draw(st.booleans()) else None
    return packed_function(draw(inner), draw(positions_of(documents)), documents, blocks)


def packed_function(function: Callable, positions: Tensor, documents: Tensor, blocks: Tensor | None = None) -> Callable:
    """A mask function between the tokens of each document, as transformers packs it, united with blocks or not."""
    if REMAPS:
        function = masking_utils.remap_positions_for_packed_sequence(function, positions)
    if blocks is not None:
        function = masking_utils.or_masks(function, masking_utils.blockwise_overlay(blocks))
    return masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(documents))


@st.composite
def positions_of(draw, documents: Tensor) -> Tensor:
    """Positions that count from a number of their own in each document, or through all of them, or not at all."""
    batch, tokens = documents.shape
    positions = torch.arange(tokens).expand(batch, -1)
    how = draw(st.sampled_from(["restart", "restart", "continue", "any"]))
    if how == "restart":
        begins = documents.diff(dim=1, prepend=documents[:, :1]) != 0
        positions = positions - torch.where(begins, positions, 0).cummax(1).values + draw(st.integers(-1, 3))
    if how == "any":
        values = st.lists(st.integers(-1, tokens - 1), min_size=batch * tokens, max_size=batch * tokens)
        positions = torch.tensor(draw(values)).view(batch, tokens)
    return positions.clamp(max=tokens - 1)  # ids of blocks are looked up at them


@settings(max_examples=400, **PROPERTY)
@given(data=st.data())
def test_functions_that_packing_wraps(data):
    """Documents and positions that transformers itself would not put together, and functions it would not wrap."""
    batch, tokens = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 16))
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=tokens, max_size=tokens))
    documents = torch.arange(tokens).repeat_interleave(torch.tensor(lengths))[:tokens].expand(batch, -1)
    if data.draw(st.integers(0, 3)) == 0:
        documents = documents % 2  # a document that comes back
    left_padding = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch)))
    size = data.draw(st.integers(1, 6))
    functions = {
        "causal": masking_utils.causal_mask_function,
        "bidirectional": masking_utils.bidirectional_mask_function,
        "sliding": masking_utils.sliding_window_causal_mask_function(size),
        "bidirectional_sliding": masking_utils.sliding_window_bidirectional_mask_function(size),
        "chunked": masking_utils.chunked_causal_mask_function(size, left_padding),
        "chunks": masking_utils.chunked_overlay(size, left_padding),
    }
    function = functions[data.draw(st.sampled_from(sorted(functions)))]
    positions = data.draw(positions_of(documents))
    blocks = data.draw(st.one_of(st.none(), block_sequence_ids(batch, tokens)))
    packed = packed_function(function, positions, documents, blocks)
    dense = masking_utils.sdpa_mask(batch, tokens, tokens, mask_function=packed, allow_is_causal_skip=False)
    assert_same(span_mask(batch, tokens, tokens, mask_function=packed), dense)


@settings(max_examples=500, **PROPERTY)
@given(data=st.data())
def test_any_combination_of_known_functions(data):
    batch = data.draw(st.integers(1, 2))
    query_len, key_len = (data.draw(st.integers(1, 16)) for _ in range(2))
    q_offset, kv_offset = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    if data.draw(st.booleans()):  # the only frame in which documents can be packed
        key_len, q_offset, kv_offset = query_len, 0, 0
    tokens = max(q_offset + query_len, kv_offset + key_len)
    arguments = {
        "batch_size": batch,
        "q_length": query_len,
        "kv_length": key_len,
        "q_offset": torch.tensor(q_offset) if data.draw(st.booleans()) else q_offset,
        "kv_offset": kv_offset,
        "mask_function": data.draw(mask_functions(batch, tokens)),
        "attention_mask": data.draw(padding_masks(batch, tokens)),
    }
    if arguments["attention_mask"] is not None:
        arguments["attention_mask"] = arguments["attention_mask"].bool()
    assert_same(span_mask(**arguments), masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False))


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("shown", [[[True], [True]], [[True], [False]], None])
@pytest.mark.parametrize("pattern", ["causal", "bidirectional", "users'"])
def test_a_mask_of_one_key_is_repeated(
    pattern: str, shown: list | None, rows: int, is_traced: bool, monkeypatch: pytest.MonkeyPatch
):
    """As `sdpa` repeats a tensor of one column, whose values a GPU and a compiler are not asked for."""
    if is_traced:
        for module in (masks_module, carried_mask):
            monkeypatch.setattr(module, "is_traced", lambda tensor: True)
        monkeypatch.setattr(spans_module, "values_at_hand", lambda tensor: False)
    functions = {
        "causal": masking_utils.causal_mask_function,
        "bidirectional": masking_utils.bidirectional_mask_function,
        "users'": even_rows,
    }
    arguments: dict[str, Any] = {"batch_size": 2, "q_length": rows, "kv_length": 1, "mask_function": functions[pattern]}
    arguments["attention_mask"] = None if shown is None else torch.tensor(shown)
    tensors = [torch.randn(2, 2, tokens, 8) for tokens in (5, 7, 7)]
    mask = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask).nan_to_num()
    actual, _ = attention_forward(torch.nn.Module().eval(), *tensors, span_mask(**arguments))
    torch.testing.assert_close(actual.transpose(1, 2), expected)


@settings(max_examples=100, **PROPERTY)
@given(data=st.data())
def test_chunks_beside_lengths_are_counted_in_each_document(data):
    """From its first token that is no padding on the left, whatever documents the mask function knows of already."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    size, left, beyond = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 4)), data.draw(st.integers(0, 2))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = sum(lengths) + beyond
    token = torch.arange(tokens)
    attended = token >= left if data.draw(st.booleans()) else None
    padding = None if attended is None else attended[None]
    left_padding = torch.zeros(1, dtype=torch.long) if attended is None else (~attended).sum()[None]
    function = masking_utils.chunked_causal_mask_function(size, left_padding)
    q_offset: int | Tensor = 0
    if attended is None and REMAPS and data.draw(st.booleans()):  # as compilers, which cannot tell, always have it
        function = packed_function(function, token[None], torch.zeros_like(token)[None], None)
    elif data.draw(st.booleans()):
        q_offset = torch.tensor(0)  # as with a static cache
    mask = span_mask(1, tokens, tokens, q_offset, mask_function=function, attention_mask=padding)

    document = torch.searchsorted(offsets, token, right=True) - 1
    first = offsets[document] if attended is None else offsets[document].clamp(min=left)
    chunk = (token - first).div(size, rounding_mode="floor")
    expected = (document == document[:, None]) & (chunk == chunk[:, None]) & (token <= token[:, None])
    expected &= (token < offsets[-1])[:, None]
    expected = expected if attended is None else expected & attended
    _, weights = attention_forward(
        torch.nn.Module().eval(), *torch.randn(3, 1, 2, tokens, 8), mask, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
        output_attentions=True,
    )  # fmt: skip
    assert torch.equal(weights[0, 0] > 0, expected)


def test_chunks_beside_lengths_keep_to_the_documents_of_positions():
    """Beside a 2D mask positions alone show two documents, where the lengths have one."""
    function = masking_utils.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long))
    mask = span_mask(1, 8, 8, mask_function=function, attention_mask=torch.ones(1, 8, dtype=torch.bool))
    positions, offsets = torch.arange(4).repeat(2)[None], torch.tensor([0, 8])
    _, weights = attention_forward(
        torch.nn.Module().eval(), *torch.randn(3, 1, 2, 8, 8), mask, is_causal=True, position_ids=positions,
        cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, output_attentions=True,
    )  # fmt: skip
    one = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(weights[0, 0] > 0, torch.block_diag(one, one))


def test_a_chunked_mask_of_one_row_is_repeated_beside_lengths():
    function = masking_utils.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long))
    mask = span_mask(1, 1, 8, 7, mask_function=function)
    offsets = torch.tensor([0, 8])
    tensors = torch.randn(3, 1, 2, 8, 8)
    output, _ = attention_forward(
        torch.nn.Module().eval(), *tensors, mask, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets
    )
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors[:, :, :, 6:])
    torch.testing.assert_close(output.transpose(1, 2)[:, :, 6:], expected)


@pytest.mark.parametrize("query_len", range(1, 41))
def test_every_pattern_at_every_query_length(query_len: int):
    """The whole grid of query lengths, which random cases may leave holes in, with left padding and without."""
    for pattern in BUILDERS:
        for attention_mask in (None, torch.arange(query_len).expand(2, -1) >= torch.tensor([[0], [query_len // 2]])):
            case = Case(
                pattern, 2, query_len, 5, 6, attention_mask, None, None, None, None, None, ["full_attention"] * 2
            )
            assert_same(case.build("my_triton"), case.build("sdpa"))


@pytest.mark.parametrize("pattern", ["causal", "sliding"])
def test_decoder_made_bidirectional_by_its_config(pattern: str):
    dense_and_ours = []
    for implementation in ("sdpa", "my_triton"):
        config = make_config(implementation)
        config.is_causal = False
        dense_and_ours.append(BUILDERS[pattern](config, torch.zeros(2, 9, 1), None, None, allow_is_causal_skip=False))
    assert_same(dense_and_ours[1], dense_and_ours[0])
    assert dense_and_ours[1].to_dense()[0, 0, 0, 1]


def test_masks_live_where_their_tokens_do():
    """Whatever torch's default device is."""
    attention_mask = torch.ones(1, 4, dtype=torch.long, device="cpu")
    with torch.device("meta"):
        mask = span_mask(1, 4, 4, attention_mask=attention_mask, device="cpu")
    assert mask.device.type == mask.spans.end.device.type == mask.attended.device.type == "cpu"


def test_prepared_masks_come_back():
    """`generate` with a static cache prepares masks, then hands them to the model as its attention mask."""
    config = make_config("my_triton")
    prepared = masking_utils.create_causal_mask(config, torch.zeros(1, 4, 1), None, None)
    again = masking_utils.create_causal_mask(config, torch.zeros(1, 4, 1), prepared, None)
    assert again is prepared
    dense = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert masking_utils.create_causal_mask(config, torch.zeros(1, 4, 1), dense, None) is dense


def test_windows_that_hide_the_own_key_are_evaluated():
    """A window of no keys leaves empty rows, of which a union of spans could make no sense."""
    function = masking_utils.or_masks(masking_utils.sliding_window_causal_mask_function(0), near)
    for mask_function in (masking_utils.sliding_window_overlay(0), function):
        dense = masking_utils.sdpa_mask(1, 9, 9, mask_function=mask_function, allow_is_causal_skip=False)
        assert_same(span_mask(1, 9, 9, mask_function=mask_function), dense)


def test_block_ids_that_end_too_early_are_an_error():
    """As transformers' own mask functions find: a row without an id has no place."""
    mask_function = masking_utils.blockwise_overlay(torch.zeros(1, 5, dtype=torch.long))
    for build in (masking_utils.sdpa_mask, span_mask):
        with pytest.raises(IndexError):
            build(1, 6, 5, mask_function=mask_function, allow_is_causal_skip=False)


@pytest.mark.parametrize("chunk_elements", [1, 7, 64])
def test_evaluation_in_pieces(chunk_elements: int, monkeypatch: pytest.MonkeyPatch):
    """Rows that are spans and rows that are not, in separate pieces, make one mask."""
    monkeypatch.setattr(masks_module, "CHUNK_ELEMENTS", chunk_elements)

    def late_holes(batch, head, q_idx, kv_idx):
        return (kv_idx <= q_idx) & ((q_idx < 20) | (kv_idx % 2 == 0))

    attention_mask = torch.ones(2, 30, dtype=torch.bool)
    attention_mask[1, :7] = False
    for function in (late_holes, near):
        sizes = {"batch_size": 2, "q_length": 24, "kv_length": 30, "q_offset": torch.tensor(6), "use_vmap": True}
        dense = masking_utils.sdpa_mask(
            **sizes, mask_function=function, attention_mask=attention_mask, allow_is_causal_skip=False
        )
        with counted_evaluations() as rows:
            mask = span_mask(**sizes, mask_function=function, attention_mask=attention_mask)
        assert sum(rows) == 24 and max(rows) <= max(1, chunk_elements // 60)
        assert_same(mask, dense)
        assert (mask.holes is None) == (function is near)


def test_unknown_functions_are_logged_once(caplog: pytest.LogCaptureFixture):
    masks_module.log_once.cache_clear()
    for _ in range(3):
        span_mask(1, 6, 6, mask_function=every_third)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "every_third" in messages[0] and "kept dense" in messages[1]
    caplog.clear()
    span_mask(1, 6, 6)
    assert not caplog.records


# ---------------------------------------------------------------------- what building a mask costs

LENGTH = 2048


def known_functions(tokens: int, device: str = "cpu") -> dict[str, dict[str, Any]]:
    """Arguments of `span_mask` for every kind of mask that is read rather than evaluated."""
    documents = torch.arange(tokens, device=device)[None] // 100
    positions = torch.arange(tokens, device=device)[None] % 100
    blocks = torch.where(documents % 2 == 0, documents, -1)
    padding = (torch.arange(tokens, device=device) >= tokens // 3)[None]
    window = masking_utils.sliding_window_causal_mask_function(64)
    chunks = masking_utils.chunked_causal_mask_function(128, torch.zeros(1, dtype=torch.long, device=device))
    functions = {
        "causal": masking_utils.causal_mask_function,
        "sliding": window,
        "chunked": chunks,
        "bidirectional": masking_utils.bidirectional_mask_function,
        "bidirectional_sliding": masking_utils.sliding_window_bidirectional_mask_function(64),
        "packed": packed_function(masking_utils.causal_mask_function, positions, documents),
        "packed_sliding": packed_function(window, positions, documents),
        "packed_chunked": packed_function(chunks, positions, documents),
        "blocks": masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(blocks)),
    }
    arguments = {name: {"mask_function": function} for name, function in functions.items()}
    arguments["left_padded"] = {"attention_mask": padding}
    arguments["padded_sliding"] = {"mask_function": window, "attention_mask": padding}
    arguments["static_cache"] = {"q_offset": torch.tensor(0, device=device), "attention_mask": padding}
    holes = padding.clone()
    holes[:, tokens // 2] = False
    arguments["holes"] = {"attention_mask": holes}
    return arguments


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements and bytes that the result of an operation had, and which operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.bytes = 0
        self.operations: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.add(str(function))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return result


@pytest.mark.parametrize("name", known_functions(4))
def test_known_masks_touch_no_square_array(name: str):
    arguments = known_functions(LENGTH)[name]
    with LargestTensor() as largest:
        mask = span_mask(1, LENGTH, LENGTH, **arguments)
    assert 0 < largest.elements <= 4 * LENGTH
    dense = masking_utils.sdpa_mask(1, LENGTH, LENGTH, **arguments, allow_is_causal_skip=False)
    assert_same(mask, dense)


@pytest.mark.parametrize("name", sorted(set(known_functions(4)) - {"blocks"}))
def test_known_masks_read_nothing_back_from_a_device(name: str):
    """On the meta device there is nothing to read: any synchronisation would raise.

    Blocks are not among these: only the ids can tell whether one comes back, so one boolean is read.
    """
    arguments = known_functions(64, "meta")[name]
    mask = span_mask(1, 64, 64, **arguments, device="meta")
    assert mask.device.type == "meta" and mask.shape == (1, 1, 64, 64)
    if "attention_mask" in arguments:
        assert mask.spans.key_mask is not None  # whether padding has holes cannot be known, so it is kept
    positions = torch.arange(64, device="meta")[None]
    assert mask.spans_within_documents(positions).device.type == "meta"


def test_an_evaluated_mask_costs_a_byte_for_each_element(monkeypatch: pytest.MonkeyPatch):
    """What an evaluation needs besides is bounded, and nothing of it remains if the rows turn out to be spans."""
    monkeypatch.setattr(masks_module, "CHUNK_ELEMENTS", 1 << 14)
    for function, most_bytes in ((near, 8 << 14), (every_third, 512 * 512)):
        with LargestTensor() as largest:
            mask = span_mask(1, 512, 512, mask_function=function)
        assert largest.bytes <= most_bytes
        assert (mask.holes is None) == (function is near)


def test_a_long_mask_is_small():
    attention_mask = torch.ones(1, 32768, dtype=torch.long)
    attention_mask[:, :10000] = 0
    config = make_config("my_triton")
    embeddings = torch.zeros(1, 32768, 1)
    with LargestTensor() as largest:
        mask = masking_utils.create_causal_mask(config, embeddings, attention_mask, None)
    assert mask.spans.nbytes < 1_000_000
    assert largest.bytes <= 8 * 32768  # no temporary is larger than an int64 for each token
    assert mask.spans.start.shape == (1, 1) or mask.spans.start.shape == (1, 32768)
    assert int(mask.spans.visible_pairs()) == (32768 - 10000) * (32768 - 10000 + 1) // 2


# ---------------------------------------------------------------------- packed positions beside a 2D mask


def padded_documents(lengths: list[int], left: int, right: int) -> tuple[Tensor, Tensor]:
    """Positions and 2D mask of documents in a row, with padding on both sides."""
    positions = torch.cat([torch.ones(left), *(torch.arange(length) for length in lengths), torch.ones(right)])
    attended = torch.cat([torch.zeros(left), torch.ones(sum(lengths)), torch.zeros(right)])
    return positions.long()[None], attended.long()[None]


@pytest.mark.parametrize("left, right", [(0, 0), (3, 0), (0, 4), (2, 5)])
@pytest.mark.parametrize("lengths", [[5, 7], [1, 1, 6], [4, 1, 3, 9], [12]])
def test_packed_positions_beside_a_2d_mask_keep_documents_apart(lengths: list[int], left: int, right: int):
    """transformers drops the packing here; the result is that of the documents attended one by one."""
    positions, attended = padded_documents(lengths, left, right)
    tokens = positions.shape[1]
    query, key, value = torch.randn(3, 1, 4, tokens, 8).unbind()
    layer = torch.nn.Module().eval()
    config = make_config("my_triton")
    mask = masking_utils.create_causal_mask(config, torch.zeros(1, tokens, 1), attended, None, position_ids=positions)
    output, _ = attention_forward(layer, query, key, value, mask, position_ids=positions)
    begin = left
    for length in lengths:
        rows = slice(begin, begin + length)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        alone, _ = attention_reference(query[:, :, rows], key[:, :, rows], value[:, :, rows], mask=causal)
        torch.testing.assert_close(output[:, rows].transpose(1, 2).double(), alone, atol=1e-5, rtol=1e-5)
        begin += length
    # The next layer hands in the same positions, whose documents are known by then.
    assert mask.spans_within_documents(positions) is mask.spans_within_documents(positions)


def test_packed_positions_of_each_row_of_a_batch():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    mask = span_mask(2, 6, 6, attention_mask=torch.ones(2, 6))
    spans, _, _ = resolve_mask(mask, (2, 4, 6, 6), True, None, positions, torch.device("cpu"))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    document = torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.equal(spans.to_dense(), torch.stack([causal & (document == document[:, None]), causal]))


def test_packed_positions_without_a_mask():
    """A model that hands in no mask at all is causal within its documents."""
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    spans, _, _ = resolve_mask(None, (1, 2, 5, 5), True, None, positions, torch.device("cpu"))
    document = torch.tensor([0, 0, 1, 1, 1])
    assert torch.equal(spans.to_dense()[0], (document == document[:, None]).tril())


def test_packed_positions_do_not_divide_a_mask_that_transformers_has_packed_itself():
    """Without a 2D mask transformers looks for packed documents on its own: its answer holds, as it does for eager."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    spans, _, _ = resolve_mask(span_mask(1, 6, 6), (1, 4, 6, 6), True, None, positions, torch.device("cpu"))
    assert torch.equal(spans.to_dense()[0], torch.ones(6, 6, dtype=torch.bool).tril())


def test_packed_positions_do_not_divide_bidirectional_attention():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    mask = span_mask(1, 6, 6, mask_function=masking_utils.bidirectional_mask_function, attention_mask=torch.ones(1, 6))
    spans, _, _ = resolve_mask(mask, (1, 4, 6, 6), False, None, positions, torch.device("cpu"))
    assert spans.to_dense().all()


@settings(max_examples=100, **PROPERTY)
@given(data=st.data())
def test_ordinary_positions_are_one_document(data):
    """Positions that count attended tokens, as `generate` makes them, or all tokens, as models do."""
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    attended = data.draw(padding_masks(batch, tokens))
    attended = torch.ones(batch, tokens, dtype=torch.bool) if attended is None else attended.bool()
    counted = attended.long().cumsum(1) - 1
    offset = data.draw(st.integers(0, 5))
    for fill in (0, 1, -1):
        positions = counted.masked_fill(~attended, fill)
        assert (document_ids(positions, attended) == 0).all()
        assert (document_ids(positions.clamp(min=0) + offset * attended, attended) == 0).all()
    assert (document_ids(counted.clamp(min=0), attended) == 0).all()
    assert (document_ids(torch.arange(tokens)[None], attended) == 0).all()
    assert (document_ids(torch.arange(tokens)[None] + offset, None) == 0).all()


@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(12) // 4,  # tokens that share a position
        torch.zeros(12, dtype=torch.long),
        torch.tensor([0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 4, 5]),  # branches after the same beginning
        torch.arange(12).flip(0),
        torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 0, 1, 2, 3]),
        torch.tensor([3, 4, 5, 6, 7, 3, 3, 5, 6, 7, 8, 9]),
    ],
)
def test_other_positions_that_go_back_are_no_documents(positions):
    assert (document_ids(positions[None], None) == 0).all()
    assert (document_ids(positions[None], torch.ones(1, 12, dtype=torch.bool)) == 0).all()


def test_documents_that_count_from_where_the_row_does():
    positions = torch.tensor([[5, 6, 7, 0, 1, 2], [1, 2, 3, 1, 2, 1], [0, 0, 1, 0, 0, 1]])
    expected = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 2], [0, 1, 1, 2, 3, 3]])
    assert torch.equal(document_ids(positions, None), expected)


@settings(max_examples=100, **PROPERTY)
@given(data=st.data())
def test_restarting_positions_begin_documents(data):
    """Documents that count from 0 are told apart, whatever padding lies around, between and inside them."""
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=5))
    attended = torch.ones(1, sum(lengths), dtype=torch.bool)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    expected = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])[None]
    if max(lengths) == 1:
        expected.zero_()  # positions that are all the same say nothing
    padding = data.draw(st.integers(0, 4))
    at = data.draw(st.sampled_from([0, sum(lengths), *torch.tensor(lengths).cumsum(0).tolist()]))
    parts = [(attended, False), (positions, data.draw(st.integers(0, 3))), (expected, -1)]
    attended, positions, expected = (
        torch.cat([tensor[:, :at], torch.full((1, padding), fill, dtype=tensor.dtype), tensor[:, at:]], 1)
        for tensor, fill in parts
    )
    assert torch.equal(document_ids(positions, attended)[attended], expected[attended])


# ---------------------------------------------------------------------- the mask object


def test_what_a_mask_offers():
    attention_mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    mask = span_mask(2, 4, 4, attention_mask=attention_mask)
    assert mask.shape == mask.size() == (2, 1, 4, 4) and mask.ndim == mask.dim() == 4 and mask.size(-1) == 4
    assert mask.contiguous() is mask
    assert mask.to("cpu") is mask and mask.to(torch.float16) is mask
    moved = mask.to("meta", torch.bool)
    assert moved.device.type == "meta" and moved.attended.device.type == "meta" and moved.shape == mask.shape
    assert "query_len=4" in repr(mask)
    assert torch.equal(mask.attended, attention_mask.bool())


def test_frame_and_unknown_functions():
    frame = Frame(1, 4, 4, 0, 0, torch.device("cpu"))
    assert read_spans(every_third, frame) is None
    assert read_spans(masking_utils.and_masks(masking_utils.causal_mask_function, near), frame) is None
    assert read_spans(masking_utils.or_masks(masking_utils.causal_mask_function, near), frame) is None
    assert read_spans(masking_utils.padding_mask_function(torch.ones(1, 4, dtype=torch.bool)), frame) is None
