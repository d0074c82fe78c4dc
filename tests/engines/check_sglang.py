# SPDX-License-Identifier: Apache-2.0
"""Our backend against SGLang's own pools and layers, in its environment: graphs' hooks, windows' pool, refusals."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins import load_plugins

load_plugins()

from attention_plugin.engines.sglang import MyTritonBackend  # noqa: E402

HEADS, KV_HEADS, DIM, CONTEXT, SLOTS = 4, 2, 8, 64, 128


class Setting:
    """A model's layers, SGLang's pools for them, and the backend over both. Requests' tokens lie in shuffled slots."""

    def __init__(
        self,
        *,
        page_size=1,
        windowed_pool=False,
        dtype=torch.float32,
        window=3,
        drafts=None,
        parallel=(1, 1),
        change=lambda setting: None,
        **model,
    ):
        torch.manual_seed(0)
        options = dict(page_size=page_size, dtype=dtype, device="cpu", head_num=KV_HEADS, head_dim=DIM)
        if windowed_pool:
            self.pool = SWAKVPool(
                size=SLOTS, size_swa=SLOTS, swa_attention_layer_ids=[1], full_attention_layer_ids=[0], **options
            )
            shuffled = torch.randperm(SLOTS // page_size) + 1
            by_page = torch.cat([torch.zeros(1, dtype=torch.int64), shuffled])
            slots = torch.arange(SLOTS + page_size)
            self.pool.full_to_swa_index_mapping = by_page[slots // page_size] * page_size + slots % page_size
        else:
            self.pool = MHATokenToKVPool(size=SLOTS, layer_num=2, enable_memory_saver=False, **options)
        self.requests = ReqToTokenPool(4, CONTEXT, "cpu", enable_memory_saver=False)
        pages = torch.randperm(SLOTS // page_size)[: 5 * (CONTEXT // page_size // 4)] + 1
        for row, own in enumerate(pages.view(5, -1)):
            slots = (own[:, None] * page_size + torch.arange(page_size)).flatten()
            self.requests.req_to_token[row, : len(slots)] = slots
        self.layers = torch.nn.ModuleList(
            RadixAttention(HEADS, DIM, 0.3, KV_HEADS, layer_id, sliding_window_size=size)
            for layer_id, size in ((0, -1), (1, window))
        )
        change(self)
        config = {
            "attention_arch": AttentionArch.MHA, "context_len": CONTEXT, "attention_chunk_size": None, **model,
        }  # fmt: skip
        drafts = {"speculative_num_draft_tokens": None, "speculative_eagle_topk": None, **(drafts or {})}
        runner = SimpleNamespace(
            device="cpu", req_to_token_pool=self.requests, token_to_kv_pool=self.pool, page_size=page_size,
            model_config=SimpleNamespace(**config), model=self.layers,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:  # the engine's own configuration, which is made when it starts
            ranks = SimpleNamespace(attn_dcp_size=parallel[0], attn_cp_size=parallel[1])
            patch.setattr("attention_plugin.engines.sglang.get_spec", lambda: SimpleNamespace(**drafts))
            patch.setattr("attention_plugin.engines.sglang.get_parallel", lambda: ranks)
            self.backend = MyTritonBackend(runner)
        self.history = [{} for _ in range(5)]  # keys and values of each request and layer, as they were written

    def batch(self, rows, lengths, mode, requests=None, drafts=0):
        """The fields of a forward batch that a backend reads."""
        requests = torch.tensor(list(range(1, len(rows) + 1)) if requests is None else requests)
        slots = [
            self.requests.req_to_token[request, length + drafts - row : length + drafts]
            for request, row, length in zip(requests.tolist(), rows, lengths, strict=True)
        ]
        extend = mode == ForwardMode.EXTEND
        return SimpleNamespace(
            batch_size=len(rows), req_pool_indices=requests, forward_mode=mode, spec_info=None,
            seq_lens=torch.tensor(lengths), seq_lens_cpu=torch.tensor(lengths), out_cache_loc=torch.cat(slots).long(),
            out_cache_loc_is_physical=False, input_ids=torch.zeros(sum(rows)),
            extend_seq_lens=torch.tensor(rows) if extend else None, extend_seq_lens_cpu=list(rows) if extend else None,
        )  # fmt: skip

    def step(self, batch, rows, **options):
        """Run both layers on random tokens, and check each request against attention over all that it has written."""
        for layer in self.layers:
            query, key, value = (torch.randn(sum(rows), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
            run = self.backend.forward_decode if batch.forward_mode.is_decode() else self.backend.forward_extend
            out = run(query.flatten(1), key.clone(), value.clone(), layer, batch, **options).view(-1, HEADS, DIM)
            first = 0
            for request, count in zip(batch.req_pool_indices.tolist(), rows, strict=True):
                part = slice(first, first + count)
                old = self.history[request].get(layer.layer_id, (key[:0], value[:0]))
                keys, values = (torch.cat(each) for each in zip(old, (key[part], value[part]), strict=True))
                self.history[request][layer.layer_id] = keys, values
                position = torch.arange(len(keys) - count, len(keys))[:, None]
                index = torch.arange(len(keys))[None]
                mask = index <= position
                if layer.sliding_window_size >= 0:
                    mask &= index >= position - layer.sliding_window_size
                q, k, v = (each.transpose(0, 1) for each in (query[part], keys, values))
                expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, scale=0.3)
                torch.testing.assert_close(out[part].transpose(0, 1), expected, rtol=1e-5, atol=1e-5)
                first += count


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("windowed_pool", [False, True])
def test_prefill_pieces_and_decoding(page_size, windowed_pool):
    setting = Setting(page_size=page_size, windowed_pool=windowed_pool)
    for rows, lengths in (((5, 1, 9), (5, 1, 9)), ((4, 1, 1), (9, 2, 10))):
        batch = setting.batch(rows, lengths, ForwardMode.EXTEND)
        setting.backend.init_forward_metadata(batch)
        setting.step(batch, rows)
    batch = setting.batch((1, 1, 1), (10, 3, 11), ForwardMode.DECODE)
    setting.backend.init_forward_metadata(batch)
    setting.step(batch, (1, 1, 1))


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("windowed_pool", [False, True])
def test_what_a_captured_graph_reads_stays_where_it_is(page_size, windowed_pool):
    setting = Setting(page_size=page_size, windowed_pool=windowed_pool)
    batch = setting.batch((6, 7), (6, 7), ForwardMode.EXTEND)
    setting.backend.init_forward_metadata(batch)
    setting.step(batch, (6, 7))
    setting.backend.init_cuda_graph_state(4, 4)
    assert setting.backend.get_cuda_graph_seq_len_fill_value() == 1
    addresses = set()
    for step in range(2):
        batch = setting.batch((1, 1), (7 + step, 8 + step), ForwardMode.DECODE)
        setting.backend.init_forward_metadata_out_graph(batch, in_capture=step == 0)
        metadata = setting.backend.forward_metadata
        read = [metadata.batch.seq_lens, metadata.batch.block_table, metadata.batch.query_offsets]
        read += [metadata.window_batch.block_table, metadata.window_slots]
        for window in setting.backend.windows:
            read += [metadata.batch.spans(window).start, metadata.batch.spans(window).end]
        addresses.add(tuple(0 if tensor is None else tensor.data_ptr() for tensor in read))
        setting.step(batch, (1, 1))
    assert len(addresses) == 1


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_graph_replayed_for_fewer_requests_leaves_the_others_keys_alone(page_size):
    """SGLang fills up the requests of a replay, and not the slots of new tokens."""
    setting = Setting(page_size=page_size, windowed_pool=True)
    batch = setting.batch((6, 7), (6, 7), ForwardMode.EXTEND)
    setting.backend.init_forward_metadata(batch)
    setting.step(batch, (6, 7))
    setting.backend.init_cuda_graph_state(4, 4)
    batch = setting.batch((1, 1), (7, 8), ForwardMode.DECODE)
    setting.backend.init_forward_metadata_out_graph(batch, in_capture=True)
    captured = setting.backend.forward_metadata
    setting.step(batch, (1, 1))
    live = setting.batch((1,), (9,), ForwardMode.DECODE, requests=[2])
    filled = {
        "batch_size": 2, "req_pool_indices": torch.tensor([2, 0]), "seq_lens": torch.tensor([9, 1]),
        "seq_lens_cpu": torch.tensor([9, 1]), "input_ids": torch.zeros(2),
    }  # fmt: skip
    setting.backend.init_forward_metadata_out_graph(SimpleNamespace(**vars(live) | filled))
    ours = setting.pool.translate_loc_from_full_to_swa(setting.requests.req_to_token[2, :9].long())
    assert captured.window_slots.tolist() == [ours[8], 0], "the page of nobody takes what is filled up"
    pages = captured.window_batch.block_table[0, : -(-9 // page_size)]
    assert pages.tolist() == (ours[::page_size] // page_size).tolist()
    for buffer in setting.pool.swa_kv_pool.get_kv_buffer(0):
        buffer[captured.window_slots[1:]] = torch.nan  # what the graph writes for the request that is none
    setting.backend.init_forward_metadata(live)
    setting.step(live, (1,))


def test_a_prefill_in_a_graph_is_refused():
    setting = Setting()
    setting.backend.init_cuda_graph_state(4, 16)
    batch = setting.batch((4, 4), (4, 4), ForwardMode.EXTEND)
    with pytest.raises(ValueError, match=r"a prefill in a CUDA graph \(--cuda-graph-backend-prefill full\) is not"):
        setting.backend.init_forward_metadata_out_graph(batch, in_capture=True)


def test_rows_that_only_the_input_has():
    """SGLang pads `input_ids` between ranks, and hands the layers the rows of requests."""
    setting = Setting()
    batch = setting.batch((5, 2), (5, 2), ForwardMode.EXTEND)
    batch.input_ids = torch.zeros(16)
    setting.backend.init_forward_metadata(batch)
    setting.step(batch, (5, 2))


def test_windows_of_encoders_have_two_sides():
    setting = Setting(window=2)
    layer = setting.layers[1]
    layer.attn_type = AttentionType.ENCODER_ONLY
    batch = setting.batch((7, 3), (7, 3), ForwardMode.EXTEND)
    setting.backend.init_forward_metadata(batch)
    query, key, value = (torch.randn(10, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    out = setting.backend.forward_extend(query.flatten(1), key.clone(), value.clone(), layer, batch)
    for rows in (slice(0, 7), slice(7, 10)):
        q, k, v = (each[rows].transpose(0, 1) for each in (query, key, value))
        index = torch.arange(q.shape[1])
        mask = (index[:, None] - index[None]).abs() <= 2
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, scale=0.3)
        found = out.view(10, HEADS, DIM)[rows].transpose(0, 1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_chain_of_drafts_is_verified_in_one_pass():
    setting = Setting(drafts={"speculative_num_draft_tokens": 3})
    batch = setting.batch((5, 8), (5, 8), ForwardMode.EXTEND)
    setting.backend.init_forward_metadata(batch)
    setting.step(batch, (5, 8))
    batch = setting.batch((3, 3), (5, 8), ForwardMode.TARGET_VERIFY, drafts=3)  # lengths without the drafts
    setting.backend.init_forward_metadata(batch)
    setting.step(batch, (3, 3))


@pytest.mark.parametrize("scale", [None, 0.5, torch.tensor(0.5)], ids=["none", "number", "tensor"])
def test_float8_pools(scale):
    setting = Setting(dtype=torch.float8_e5m2)
    batch = setting.batch((5,), (5,), ForwardMode.EXTEND)
    setting.backend.init_forward_metadata(batch)
    query, key, value = (torch.randn(5, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    layer = setting.layers[0]
    layer.k_scale = layer.v_scale = scale
    factor = 1.0 if scale is None else float(scale)
    out = setting.backend.forward_extend(query.flatten(1), key.clone(), value.clone(), layer, batch)
    stored = ((each / factor).to(torch.float8_e5m2).float().transpose(0, 1) * factor for each in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), *stored, is_causal=True, enable_gqa=True, scale=0.3
    )
    torch.testing.assert_close(out.view(5, HEADS, DIM).transpose(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_sinks_and_softcap_reach_the_kernels():
    setting = Setting()
    layer, sinks = setting.layers[0], torch.randn(HEADS)
    layer.logit_cap = 2.0
    batch = setting.batch((5,), (5,), ForwardMode.EXTEND)
    setting.backend.init_forward_metadata(batch)
    query, key, value = (torch.randn(5, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    out = setting.backend.forward_extend(query.flatten(1), key.clone(), value.clone(), layer, batch, sinks=sinks)
    k, v = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (key, value))
    scores = 2.0 * torch.tanh(torch.einsum("qhd,khd->hqk", query, k) * 0.3 / 2.0)
    scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    weights = torch.cat([scores, sinks[:, None, None].expand(-1, 5, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out.view(5, HEADS, DIM), torch.einsum("hqk,khd->qhd", weights, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"attention_arch": AttentionArch.MLA}, "multi-head latent attention is not served; use --attention-backend"),
        (
            {"drafts": {"speculative_eagle_topk": 4}},
            r"trees of drafts are not served, chains are \(speculative_eagle_topk",
        ),
        ({"parallel": (2, 1)}, r"context parallelism \(--dcp-size, --attn-cp-size\) is not served"),
        ({"parallel": (1, 2)}, "context parallelism"),
        (
            {"attention_chunk_size": CONTEXT // 2, "change": lambda it: setattr(it.layers[0], "use_irope", True)},
            r"chunked attention \(attention_chunk_size=32\) is not served, and not needed up to --context-length 32;",
        ),
        (
            {"windowed_pool": True, "change": lambda it: setattr(it.pool.swa_kv_pool, "use_hnd", True)},
            "head-major pages",
        ),
        (
            {"windowed_pool": True, "change": lambda it: setattr(it.pool.full_kv_pool, "k_scale_buffer", [1])},
            "a pool with scales of blocks .* is not served, fp8_e4m3 is",
        ),
    ],
)
def test_what_is_not_served_is_refused_when_the_engine_starts(options, words):
    with pytest.raises(ValueError, match=words):
        Setting(**options)


def test_chunks_that_are_longer_than_the_context_are_none():
    Setting(attention_chunk_size=CONTEXT, change=lambda it: setattr(it.layers[0], "use_irope", True))


def test_images_that_see_each_other_elsewhere_are_told_of(caplog):
    Setting()
    assert not caplog.records
    Setting(change=lambda it: setattr(it.layers, "prepare_attn_masks", print))
    assert "not each other in both directions; --attention-backend triton" in caplog.text


@pytest.mark.parametrize(
    "attributes, words",
    [
        ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, "layer 0 is bidirectional over a cache"),
        ({"logit_cap": 3.0, "logit_capping_method": "other"}, "`logit_capping_method`='other' is not served"),
        ({"xai_temperature_len": 5}, "a temperature that depends on the length"),
    ],
)
def test_what_a_layer_may_not_ask_for(attributes, words):
    setting = Setting()
    for name, value in attributes.items():
        setattr(setting.layers[0], name, value)
    batch = setting.batch((2,), (2,), ForwardMode.EXTEND)
    setting.backend.init_forward_metadata(batch)
    with pytest.raises(ValueError, match=words):
        setting.step(batch, (2,))


def test_unknown_keywords_are_refused_by_name():
    setting = Setting()
    batch = setting.batch((2,), (2,), ForwardMode.EXTEND)
    setting.backend.init_forward_metadata(batch)
    with pytest.raises(ValueError, match="`score_mod` of layer 0 is not served; use --attention-backend triton"):
        setting.step(batch, (2,), score_mod=print)


def test_cross_attention_is_refused_by_name():
    setting = Setting()
    batch = setting.batch((2,), (2,), ForwardMode.EXTEND)
    batch.encoder_lens = torch.tensor([3])
    with pytest.raises(ValueError, match=r"cross attention\) are not served; use --attention-backend torch_native"):
        setting.backend.init_forward_metadata(batch)
