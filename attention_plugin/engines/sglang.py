# SPDX-License-Identifier: Apache-2.0
"""SGLang's attention backend my_triton: from SGLang's batches and pools to the paged kernels, and nothing else.

Written to the contract of `sglang.srt.layers.attention.base_attn_backend` (SGLang 0.5.23). SGLang's pool writes new
keys and values itself; a request's row in `req_to_token` says where each of its tokens lies, which is a block table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_parallel, get_spec
from torch import Tensor

from attention_kernels import PagedCache
from attention_kernels.configs import unsupported_device

from .batch import Batch, HeldSpans, pages_of

logger = logging.getLogger(__name__)

NAME = "my_triton"


def register() -> None:
    """Add the backend to SGLang's registry and to the choices of its command line. Doing so again is harmless."""
    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    if NAME not in ATTENTION_BACKENDS:
        register_attention_backend(NAME)(MyTritonBackend)


class MyTritonBackend(AttentionBackend):
    """Prefill, pieces of long prompts, decoding and mixtures of them, over keys in SGLang's pools.

    Served: grouped heads, windows (also in a pool of their own), sinks, softcap, encoders, float8 pools, the
    verification of drafts that form a chain. Refused by name: multi-head latent attention, cross attention, chunked
    attention, context parallelism, pools with scales of blocks, trees of drafts, score functions.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        """For a model runner whose model and pools exist.

        Raises:
            ValueError: the model or the configuration asks for something that is not served.
        """
        super().__init__()
        self.device = torch.device(runner.device)
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.pool = runner.token_to_kv_pool
        self.page_size = runner.page_size or 1
        self.context_len = runner.model_config.context_len
        self.windowed_pool = isinstance(self.pool, SWAKVPool)
        layers = [module for module in runner.model.modules() if isinstance(module, RadixAttention)]
        self.windows = {_window(layer) for layer in layers}
        self.num_draft_tokens = get_spec().speculative_num_draft_tokens or 0
        self._refuse_unserved(runner, layers)
        if hasattr(runner.model, "prepare_attn_masks"):  # which SGLang calls for a backend of its own alone
            logger.warning(
                "my_triton attention: SGLang hands masks of images over to its own Triton backend only, so tokens of "
                "an image see those before them, and not each other in both directions; --attention-backend triton"
            )
        self.forward_metadata: _Metadata | None = None

    def _refuse_unserved(self, runner: Any, layers: list[RadixAttention]) -> None:
        if runner.model_config.attention_arch == AttentionArch.MLA:
            _refuse("multi-head latent attention is not served", "flashinfer")
        if (get_spec().speculative_eagle_topk or 1) > 1:
            _refuse(
                "trees of drafts are not served, chains are (speculative_eagle_topk or, for n-grams, "
                "speculative_ngram_max_bfs_breadth of 1)",
                "triton",
            )
        if max(get_parallel().attn_dcp_size, get_parallel().attn_cp_size) > 1:
            _refuse("context parallelism (--dcp-size, --attn-cp-size) is not served", "fa3")
        chunk = runner.model_config.attention_chunk_size
        if any(layer.use_irope for layer in layers) and chunk is not None and chunk < self.context_len:
            _refuse(
                f"chunked attention (attention_chunk_size={chunk}) is not served, and not needed up to "
                f"--context-length {chunk}",
                "triton",
            )
        for pool in _pools(self.pool):
            if getattr(pool, "use_hnd", False):
                _refuse("a pool of head-major pages (SGLANG_USE_HND_KVCACHE) is not served", "trtllm_mha")
            if getattr(pool, "k_scale_buffer", None) is not None:
                _refuse("a pool with scales of blocks (--kv-cache-dtype mxfp8) is not served, fp8_e4m3 is", "fa4")
        if self.device.type == "cuda" and (reason := unsupported_device(self.device)) is not None:
            _refuse(reason, "torch_native")

    def support_triton(self) -> bool:
        """Whether SGLang may run Triton kernels of its own beside this backend."""
        return self.device.type != "cpu"

    # ------------------------------------------------------------------ metadata

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Describe a batch that runs layer by layer.

        Raises:
            ValueError: it has an encoder's keys.
        """
        self._refuse_encoder(forward_batch)
        table, slots = self._block_table(forward_batch), self._window_slots(forward_batch)
        offsets, rows, most = self._queries(forward_batch)
        batch = Batch(offsets, self._seq_lens(forward_batch), table, self.page_size, rows, most)
        self.forward_metadata = self._metadata(batch, None if slots is None else self._in_window_pool(table), slots)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make the tensors that captured graphs read, for up to `max_bs` requests."""
        pages = -(-self.context_len // self.page_size)
        self.held_table = torch.zeros(max_bs, pages, dtype=torch.int32, device=self.device)
        self.held_window_table = torch.zeros_like(self.held_table) if self.windowed_pool else None
        self.held_lengths = torch.zeros(max_bs, dtype=torch.int32, device=self.device)
        self.held_offsets: dict[tuple[int, int], Tensor] = {}
        self.held_window_slots = torch.zeros(max_num_tokens, dtype=torch.int64, device=self.device)
        self.held_spans = HeldSpans(max_num_tokens, self.device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of the requests that fill up a captured batch."""
        return 1

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        """The same where SGLang fills up a batch on the CPU."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Bring the tensors that captured layers read up to date, before a capture and before each replay.

        Every request of a captured batch has equally many rows: one while decoding, all drafts while verifying. A
        replay may have fewer requests than were captured. SGLang fills up their lengths, which lead to its page of
        nobody, and not the slots of their new tokens.

        Raises:
            ValueError: the batch is a prefill, or has an encoder's keys.
        """
        self._refuse_encoder(forward_batch)
        if not self._rows_each(forward_batch):
            _refuse("a prefill in a CUDA graph (--cuda-graph-backend-prefill full) is not served", "triton")
        requests = forward_batch.batch_size
        offsets, rows, most = self._queries(forward_batch)
        offsets = self.held_offsets.setdefault((rows, most), offsets)  # the same numbers each time
        lengths, table = self.held_lengths[:requests], self.held_table[:requests]
        lengths.copy_(self._seq_lens(forward_batch))
        now = self._block_table(forward_batch)
        table[:, : now.shape[1]] = now  # beyond the longest request nothing is read
        window_table = slots = None
        found = self._window_slots(forward_batch)
        if self.held_window_table is not None and found is not None:
            window_table = self.held_window_table[:requests]
            window_table[:, : now.shape[1]] = self._in_window_pool(now)
            slots = self.held_window_slots[:rows]
            slots[: found.shape[0]] = found
            slots[found.shape[0] :] = 0
        batch = Batch(offsets, lengths, table, self.page_size, rows, most, held=self.held_spans)
        self.forward_metadata = self._metadata(batch, window_table, slots)

    def _metadata(self, batch: Batch, window_table: Tensor | None, window_slots: Tensor | None) -> _Metadata:
        """The batch as layers without and with a pool of windows see it."""
        for window in self.windows:  # here and not in a layer: a captured graph replays its layers without Python
            batch.spans(window)
        in_windows = batch if window_table is None else replace(batch, block_table=window_table)
        return _Metadata(batch, in_windows, window_slots)

    def _window_slots(self, forward_batch: ForwardBatch) -> Tensor | None:
        """Where the new tokens go in the pool of windows, if there is one."""
        if not self.windowed_pool or forward_batch.out_cache_loc is None:
            return None
        return self.pool.translate_loc_from_full_to_swa(forward_batch.out_cache_loc)

    def _in_window_pool(self, table: Tensor) -> Tensor:
        """The pages in the pool of windows. Entries of tokens that are no longer there are not read."""
        first_slots = (table.long() * self.page_size).clamp(max=self.pool.full_to_swa_index_mapping.numel() - 1)
        return (self.pool.translate_loc_from_full_to_swa(first_slots) // self.page_size).to(torch.int32)

    def _refuse_encoder(self, forward_batch: ForwardBatch) -> None:
        if getattr(forward_batch, "encoder_lens", None) is not None:
            _refuse("an encoder's keys in the cache (cross attention) are not served", "torch_native")

    def _drafts(self, forward_batch: ForwardBatch) -> int:
        """New tokens of each request that its length does not count yet."""
        return self.num_draft_tokens if forward_batch.forward_mode.is_target_verify() else 0

    def _seq_lens(self, forward_batch: ForwardBatch) -> Tensor:
        return (forward_batch.seq_lens + self._drafts(forward_batch)).to(torch.int32)

    def _queries(self, forward_batch: ForwardBatch) -> tuple[Tensor, int, int]:
        """Offsets of each request's rows, int32 `[requests + 1]`, the number of rows, the most rows of a request."""
        requests = forward_batch.batch_size
        if each := self._rows_each(forward_batch):
            offsets = torch.arange(requests + 1, dtype=torch.int32, device=self.device) * each
            return offsets, requests * each, each
        offsets = torch.zeros(requests + 1, dtype=torch.int32, device=self.device)
        torch.cumsum(forward_batch.extend_seq_lens, 0, out=offsets[1:])
        # Not the rows of `input_ids`: SGLang may have padded those, and hands the layers fewer.
        known = forward_batch.extend_seq_lens_cpu
        if known is None:
            known = forward_batch.extend_seq_lens.tolist()
        return offsets, sum(known), max(known)

    def _rows_each(self, forward_batch: ForwardBatch) -> int:
        """Rows of each request, where they are equally many by the kind of the batch; 0 for others."""
        return self._drafts(forward_batch) or int(forward_batch.forward_mode.is_decode_or_idle())

    def _block_table(self, forward_batch: ForwardBatch) -> Tensor:
        """Pages of each request, int32 `[requests, pages]`, as far as its tokens are known to reach."""
        longest = self.context_len
        if forward_batch.seq_lens_cpu is not None and len(forward_batch.seq_lens_cpu):
            longest = min(longest, int(forward_batch.seq_lens_cpu.max()) + self._drafts(forward_batch))
        first_slots = self.req_to_token[:, : longest : self.page_size][forward_batch.req_pool_indices]
        return (first_slots // self.page_size).to(torch.int32)

    # ------------------------------------------------------------------ layers

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of one layer.

        Args:
            q: `[tokens, num_heads * head_dim]`; k and v likewise, or None where another layer has written them.
            layer, forward_batch: as SGLang describes them.
            save_kv_cache: whether k and v are to be put into the pool.
            sinks: `[num_heads]`.
            kwargs: refused by name unless None.

        Returns:
            `[tokens, num_heads * value_dim]`.

        Raises:
            ValueError: the layer has something that is not served.
        """
        _check_layer(layer, kwargs)
        metadata = self.forward_metadata
        assert metadata is not None  # SGLang describes a batch before it runs its layers
        if save_kv_cache and k is not None and v is not None:
            where = KVWriteLoc.for_batch(forward_batch, swa_loc=metadata.window_slots)
            # The pool divides by the scales in place.
            scaled = (k, v) if layer.k_scale is None else (k.clone(), v.clone(), layer.k_scale, layer.v_scale)
            self.pool.set_kv_buffer(layer, where, *scaled)
        batch = metadata.batch
        if self.windowed_pool and self.pool.layers_mapping[layer.layer_id][1]:
            batch = metadata.window_batch
        if layer.attn_type == AttentionType.ENCODER_ONLY or layer.is_cross_attention:
            batch = replace(batch, causal=False, held=None, _spans={})
        rows = batch.num_rows
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = query.new_empty(*query.shape[:2], layer.v_head_dim)
        if rows < out.shape[0]:
            out[rows:] = 0  # padding
        batch.attend(
            query[:rows], self._pages(layer), out[:rows],
            window=_window(layer), sinks=sinks, scale=layer.scaling, softcap=layer.logit_cap or None,
        )  # fmt: skip
        return out.flatten(1)

    def forward_decode(self, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `forward_extend`: decoding is a batch of one new token each."""
        return self.forward_extend(q, *args, **kwargs)

    def _pages(self, layer: RadixAttention) -> PagedCache:
        """A layer's pool as pages: `[slots, num_kv_heads, dim]`, some slots of which are a page."""
        key, value = self.pool.get_kv_buffer(layer.layer_id)
        scales: tuple[Tensor | None, Tensor | None] = (None, None)
        if key.dtype.itemsize == 1:
            scales = tuple(
                scale.reshape(1)
                if isinstance(scale, Tensor)
                # Some models load numbers (--quantization-param-path): filled on the device, for captured graphs.
                else key.new_full((1,), 1.0 if scale is None else scale, dtype=torch.float32)
                for scale in (layer.k_scale, layer.v_scale)
            )  # type: ignore[assignment]
        key, value = (each.view(-1, self.page_size, *each.shape[1:]) for each in (key, value))
        return pages_of(key, value, *scales)


class _Metadata:
    """What the layers of one forward pass share."""

    def __init__(self, batch: Batch, window_batch: Batch, window_slots: Tensor | None) -> None:
        """The batch, the same in the pool of windows, and where that pool's new tokens go."""
        self.batch, self.window_batch, self.window_slots = batch, window_batch, window_slots


def _pools(pool: Any) -> Iterator[Any]:
    """A pool, and those in it: of full and of windowed layers."""
    yield pool
    for name in ("full_kv_pool", "swa_kv_pool"):
        if (part := getattr(pool, name, None)) is not None:
            yield part


def _window(layer: RadixAttention) -> int | None:
    """Keys that a row of a layer sees at most, its own among them. SGLang counts those before it; -1 is no window."""
    size = layer.sliding_window_size
    return None if size is None or size < 0 else size + 1


def _check_layer(layer: RadixAttention, keywords: dict[str, Any]) -> None:
    """Refuse what a layer asks for and is not served, as an error in the engine's own log."""
    for name, value in keywords.items():
        if value is not None:
            _refuse(f"`{name}` of layer {layer.layer_id} is not served", "triton")
    if layer.attn_type == AttentionType.DECODER_BIDIRECTIONAL:
        _refuse(f"layer {layer.layer_id} is bidirectional over a cache, which is not served", "triton")
    if layer.logit_cap and layer.logit_capping_method != "tanh":
        _refuse(f"`logit_capping_method`={layer.logit_capping_method!r} is not served, 'tanh' is", "triton")
    if layer.xai_temperature_len > 0:
        _refuse("a temperature that depends on the length (xai_temperature_len) is not served", "triton")


def _refuse(reason: str, alternative: str) -> None:
    raise ValueError(f"my_triton attention in SGLang: {reason}; use --attention-backend {alternative}")
