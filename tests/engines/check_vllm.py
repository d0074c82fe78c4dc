# SPDX-License-Identifier: Apache-2.0
"""Our backend against vLLM's own parts, in vLLM's environment: what it says of itself, and graphs' addresses."""

import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.backends.utils import compute_mm_prefix_range_tensor
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.worker.utils import clear_layer_kv_caches, customize_attention_spec, select_common_block_size

load_general_plugins()

from attention_plugin.engines.batch import HeldSpans  # noqa: E402
from attention_plugin.engines.vllm import MyTritonBackend, MyTritonImpl, MyTritonMetadataBuilder  # noqa: E402

ASKED = dict(
    head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16, use_mla=False, has_sink=False,
    use_sparse=False, use_mm_prefix=False, use_per_head_quant_scales=False, device_capability=None,
    attn_type=AttentionType.DECODER,
)  # fmt: skip


class Capability:
    def __init__(self, major, minor):
        self.major, self.minor = major, minor


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"head_size": 72, "dtype": torch.float16},
        {"dtype": torch.float32},
        {"has_sink": True, "has_sliding_window": True},
        {"use_mm_prefix": True},
        {"kv_cache_dtype": "fp8", "device_capability": Capability(9, 0)},
        {"kv_cache_dtype": "fp8_e5m2", "device_capability": Capability(8, 6)},
        {"kv_cache_dtype": "bfloat16"},
        {"block_size": 256},
        {"block_size": 528},
        {"use_non_causal": True},
        {"attn_type": AttentionType.ENCODER_ONLY},
    ],
)
def test_it_says_what_it_serves(asked):
    assert MyTritonBackend.validate_configuration(**{**ASKED, **asked}) == []


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"head_size": 576}, "head_size"),
        ({"dtype": torch.float64}, "dtype"),
        ({"use_mla": True}, "MLA"),
        ({"use_sparse": True}, "sparse"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "attention type"),
        ({"device_capability": Capability(7, 5)}, "compute capability"),
        ({"kv_cache_dtype": "float16"}, "a cache of float16 beside a model of torch.bfloat16"),
        ({"kv_cache_dtype": "fp8", "device_capability": Capability(8, 6)}, "fp8_e5m2 does not"),
        ({"use_batch_invariant": True}, "batch invariance"),
        ({"use_dcp": True}, "DCP"),
    ],
)
def test_it_says_what_it_does_not_serve(asked, words):
    assert any(words in reason for reason in MyTritonBackend.validate_configuration(**{**ASKED, **asked}))


def test_its_name_survives_pickling():
    member = AttentionBackendEnum["MY_TRITON"]
    assert pickle.loads(pickle.dumps({"backend": member}))["backend"] is member


def impl(**options):
    return MyTritonImpl(num_heads=4, head_size=8, scale=0.3, num_kv_heads=2, **options)


def test_alibi_is_refused_by_name():
    with pytest.raises(ValueError, match=r"MY_TRITON: `alibi_slopes` are not served .* TRITON_ATTN"):
        impl(alibi_slopes=[1.0] * 4)


def test_chunks_are_refused_by_name():
    impl(chunk_lookback=-1)
    with pytest.raises(ValueError, match=r"chunked attention with `chunk_lookback`=1 is not served; .* TRITON_ATTN"):
        impl(chunk_lookback=1)


class Common:
    """The part of vLLM's description of a batch that the builder reads."""

    causal, mm_req_doc_ranges = True, None

    def __init__(self, rows, lengths, table, **more):
        self.query_start_loc = torch.tensor([0, *rows], dtype=torch.int32).cumsum(0).int()
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.block_table_tensor, self.num_reqs = table, len(rows)
        self.num_actual_tokens, self.max_query_len = sum(rows), max(rows)
        self.__dict__.update(more)


def builder(kinds, held=None):
    made = MyTritonMetadataBuilder.__new__(MyTritonMetadataBuilder)
    made.page_size, made.kinds, made.held = 4, kinds, held
    return made


def test_a_captured_graph_finds_the_next_batch_at_the_same_addresses():
    made = builder({(None, False), (3, False)}, HeldSpans(16, "cpu"))
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    first = made.build(0, Common([1, 1], [5, 9], table))
    addresses = [first.spans(window).end.data_ptr() for window in (None, 3)]
    second = made.build(0, Common([1, 1], [6, 10], table))
    assert [second.spans(window).end.data_ptr() for window in (None, 3)] == addresses
    assert second.spans(None).end.tolist() == [[6, 10]]
    assert second.spans(3).start.tolist() == [[3, 7]]
    moved = made.update_block_table(second, table + 8, None)
    assert moved.block_table.data_ptr() != table.data_ptr() and moved.spans(3).start.tolist() == [[3, 7]]


def test_a_captured_graph_takes_requests_of_other_numbers_of_rows():
    """With adaptive verification vLLM decides on the device how many drafts of a request are looked at."""
    torch.manual_seed(0)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=16))
    assert MyTritonMetadataBuilder.get_varlen_cudagraph_max_query_len(config, None) >= 3
    made, ours = builder({(None, False)}, HeldSpans(16, "cpu")), impl()
    table, cache = torch.arange(12, dtype=torch.int32).view(3, 4), torch.randn(12, 2, 4, 16)
    common = Common([2, 2, 2], [2, 2, 2], table, max_query_len=3)  # vLLM's dummy batch, and what it promises
    captured = made.build(0, common)
    for rows, lengths in (([3, 1, 2], [9, 5, 2]), ([1, 3, 0], [7, 11, 0])):
        common.query_start_loc.copy_(torch.tensor([0, *rows]).cumsum(0))
        common.seq_lens.copy_(torch.tensor(lengths))
        made.build(0, common)
        query, output = torch.randn(6, 4, 8), torch.empty(6, 4, 8)
        ours.forward(Layer, query, None, None, cache, captured, output)  # as a replay, with what was captured
        alone = torch.empty(sum(rows), 4, 8)
        fresh = builder({(None, False)}).build(0, Common(rows, lengths, table))
        ours.forward(Layer, query[: sum(rows)], None, None, cache, fresh, alone)
        torch.testing.assert_close(output[: sum(rows)], alone)


def test_images_see_each_other():
    ranges = {0: [(1, 3)]}
    batch = builder({(None, False)}).build(
        0, Common([5, 2], [5, 2], torch.zeros(2, 2, dtype=torch.int32), mm_req_doc_ranges=ranges)
    )
    assert torch.equal(batch.blocks, compute_mm_prefix_range_tensor(ranges, 2, torch.device("cpu")))
    assert batch.spans(None).end.tolist() == [[1, 4, 4, 4, 5, 1, 2]]


@pytest.mark.parametrize("causal", [False, torch.tensor([1, 0], dtype=torch.int32), torch.tensor([True, False])])
def test_windows_of_what_is_not_causal_have_two_sides(causal):
    """vLLM's flag for each request is an int32."""
    table = torch.zeros(2, 2, dtype=torch.int32)
    spans = builder({(2, False)}).build(0, Common([5, 2], [5, 2], table, causal=causal)).spans(2)
    ends = [2, 3, 4, 5, 5] if causal is False else [1, 2, 3, 4, 5]
    assert spans.start.tolist() == [[0, 0, 1, 2, 3, 0, 0]] and spans.end.tolist() == [[*ends, 2, 2]]


@pytest.mark.parametrize("block_size", [1, 16, 24, 256, 272, 528, 784, 1056])
def test_a_block_of_any_size_is_a_page(block_size):
    """Hybrid models have blocks as large as the state of another layer; cut up, they would need an alignment."""
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    assert customize_attention_spec(MyTritonBackend, spec) == spec
    assert select_common_block_size(block_size, [MyTritonBackend], [spec]) == block_size
    assert MyTritonBackend.get_preferred_block_size(block_size) == block_size


@pytest.mark.parametrize("kind, more", [(FullAttentionSpec, {}), (SlidingWindowSpec, {"sliding_window": 128})])
def test_layers_of_a_draft_share_groups_of_the_cache_with_ours(kind, more):
    """vLLM chooses the backend of a draft by itself, and groups layers whose specifications are equal.

    Groups have as many layers as the smallest: a draft of one layer that is apart makes as many groups as layers.
    """
    spec = kind(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, **more)
    ours, drafts = (customize_attention_spec(each, spec) for each in (MyTritonBackend, TritonAttentionBackend))
    assert ours == drafts


class Layer:
    _k_scale, _v_scale = torch.tensor(0.5), torch.tensor(0.25)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_e5m2"])
def test_a_step_writes_and_reads_the_cache_as_vllm_lays_it_out(kv_cache_dtype):
    torch.manual_seed(0)
    ours = impl(kv_cache_dtype=kv_cache_dtype)
    dtypes = {"auto": None, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    stored = torch.float32 if kv_cache_dtype == "auto" else torch.uint8
    cache = torch.zeros(6, 2, 4, 16, dtype=stored)  # [blocks, num_kv_heads, block_size, 2 * head_size]
    query, key, value = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    table = torch.tensor([[3, 1], [5, 0]], dtype=torch.int32)
    slots = torch.tensor([12, 13, 14, 15, 4, 20, 21])
    batch = builder({(None, False)}).build(0, Common([5, 2], [5, 2], table))
    ours.do_kv_cache_update(Layer, key, value, cache, slots)
    output = torch.full_like(query, torch.nan)
    ours.forward(Layer, query, key, value, cache, batch, output)
    if (dtype := dtypes[kv_cache_dtype]) is not None:
        key, value = ((each / scale).to(dtype).float() * scale for each, scale in ((key, 0.5), (value, 0.25)))
    for rows in (slice(0, 5), slice(5, 7)):
        q, k, v = (each[rows].transpose(0, 1) for each in (query, key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
        torch.testing.assert_close(output[rows].transpose(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_a_cache_that_vllm_drops_is_let_go_of():
    ours, cache = impl(kv_cache_dtype="fp8"), torch.zeros(6, 2, 4, 16, dtype=torch.uint8)
    pages = ours._pages_in(Layer, cache)
    assert ours._pages_in(Layer, cache) is pages
    layer = SimpleNamespace(_k_scale=torch.tensor(2.0), _v_scale=torch.tensor(2.0), impl=ours, kv_cache=cache)
    assert ours._pages_in(layer, cache).key_scale is layer._k_scale, "weights were loaded anew"
    dropped = weakref.ref(cache)
    del cache, pages
    clear_layer_kv_caches([layer])
    gc.collect()
    assert dropped() is None


@pytest.mark.parametrize("window", [None, 2])
def test_encoders_see_their_own_request_in_both_directions(window):
    torch.manual_seed(0)
    ours = impl(attn_type=AttentionType.ENCODER_ONLY, sliding_window=window)
    query, key, value = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    batch = builder(set()).build(0, Common([5, 2], [5, 2], torch.zeros(2, 2, dtype=torch.int32)))
    output = torch.full_like(query, torch.nan)
    ours.do_kv_cache_update(Layer, key, value, torch.zeros(0), torch.zeros(0))
    ours.forward(Layer, query, key, value, torch.zeros(0), batch, output)
    for rows in (slice(0, 5), slice(5, 7)):
        q, k, v = (each[rows].transpose(0, 1) for each in (query, key, value))
        index = torch.arange(q.shape[1])
        mask = (index[:, None] - index[None]).abs() < (window or 99)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, scale=0.3)
        torch.testing.assert_close(output[rows].transpose(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_measuring_memory_runs_no_attention():
    output = torch.full((3, 4, 8), torch.nan)
    assert not impl().forward(Layer, None, None, None, None, None, output).any()
