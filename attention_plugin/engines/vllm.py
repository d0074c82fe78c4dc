# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention backend MY_TRITON: from vLLM's metadata to the paged kernels, and nothing else.

Written to the contract of `vllm.v1.attention.backend` (vLLM 0.32 and 0.33). A layer's cache arrives as `[blocks,
num_kv_heads, block_size, 2 * head_dim]`, a token's key before its value.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.utils import compute_mm_prefix_range_tensor
from vllm.v1.kv_cache_interface import AttentionSpec

from attention_kernels import PagedCache, Spans, attention, write_cache
from attention_kernels.call_checks import MAX_VALUE_DIM
from attention_kernels.configs import unsupported_device

from .batch import Batch, HeldSpans, pages_of

logger = logging.getLogger(__name__)

NAME = "MY_TRITON"
QUANTISED_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""What vLLM's names of eight-bit caches mean. It hands such a cache over as bytes."""


def register() -> None:
    """Add the backend to vLLM's registry. Doing so again is harmless.

    vLLM's CPU platform has one attention backend, CPU_ATTN, and does not ask which one was wanted. There, the name
    resolves to this backend where `--attention-backend MY_TRITON` was given, and to vLLM's own everywhere else.
    """
    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, f"{__name__}.{MyTritonBackend.__name__}")
        # A spawned process reads vLLM's configuration before it loads plugins, and this name is part of it. An enum's
        # members are pickled by value, which nobody knows there yet.
        AttentionBackendEnum[NAME].__reduce_ex__ = lambda protocol: (registered_member, ())  # type: ignore[method-assign]
    if current_platform.is_cpu() and not AttentionBackendEnum.CPU_ATTN.is_overridden():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.ChosenOnCpu")


def registered_member() -> AttentionBackendEnum:
    """The member of vLLM's enum that stands for this backend, in whichever process this runs."""
    register()
    return AttentionBackendEnum[NAME]


def __getattr__(name: str) -> Any:
    """`ChosenOnCpu`, the backend that the configuration in force asks for. vLLM imports backends by name."""
    if name != "ChosenOnCpu":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    chosen = get_current_vllm_config().attention_config.backend
    if chosen is None or chosen.name != NAME:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    logger.warning("my_triton attention: the CPU platform runs %s in the place of CPU_ATTN, as asked for", NAME)
    return MyTritonBackend


class MyTritonBackend(AttentionBackend):
    """What vLLM asks before it chooses. Everything that is not said to be supported is refused by vLLM itself."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *QUANTISED_DTYPES]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """The name of `--attention-backend`."""
        return NAME

    @staticmethod
    def get_impl_cls() -> type[MyTritonImpl]:
        """What runs in a layer."""
        return MyTritonImpl

    @staticmethod
    def get_builder_cls() -> type[MyTritonMetadataBuilder]:
        """What describes a batch."""
        return MyTritonMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages of any size.

        A list of sizes would have vLLM note an alignment in each layer's specification of its cache. Layers of a draft
        model, which vLLM gives a backend of their own, would not have it, and so not share a group with ours.
        """
        return [MultipleOf(1)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Any up to that of the widest values."""
        return 1 <= head_size <= MAX_VALUE_DIM

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders, and encoders, which have no cache."""
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER, AttentionType.ENCODER_ONLY)

    @classmethod
    def supports_sink(cls) -> bool:
        """A score per head without a value."""
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Images whose tokens see each other in both directions."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows of any size."""
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Requests that see all of their keys, also beside causal ones."""
        return True

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """Why what is served one by one is not served together, or None."""
        if kv_cache_dtype in ("float16", "bfloat16") and kv_cache_dtype != str(dtype).removeprefix("torch."):
            return f"a cache of {kv_cache_dtype} beside a model of {dtype} not supported"
        is_old = device_capability is not None and (device_capability.major, device_capability.minor) < (8, 9)
        if QUANTISED_DTYPES.get(kv_cache_dtype) == torch.float8_e4m3fn and is_old:
            return "float8 e4m3 needs compute capability 8.9, fp8_e5m2 does not"
        return None

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """What the kernels are compiled for."""
        return capability is None or (capability.major, capability.minor) >= (8, 0)


class MyTritonMetadataBuilder(AttentionMetadataBuilder[Batch]):
    """Describes a batch to the layers of one group, which share their pages."""

    # The grid of a captured kernel follows from the number of requests and of rows of each.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = True

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        """For the layers of this name."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.page_size = kv_cache_spec.block_size
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        self.kinds = {_kind_of_spans(layer) for layer in layers.values()}
        self.held = None
        if vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
            self.held = HeldSpans(vllm_config.scheduler_config.max_num_batched_tokens, device)

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> int:
        """Rows of a request in a captured batch of unequal ones, as adaptive verification has: any number.

        Programs find on the device which rows are whose, so a graph serves requests of any numbers of rows up to the
        one that it was captured for.
        """
        return vllm_config.scheduler_config.max_num_batched_tokens

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        """The batch that vLLM describes. Nothing is read back from the device."""
        common = common_attn_metadata
        batch = Batch(
            common.query_start_loc, common.seq_lens, common.block_table_tensor, self.page_size,
            common.num_actual_tokens, common.max_query_len, common.causal,
            compute_mm_prefix_range_tensor(common.mm_req_doc_ranges, common.num_reqs, common.seq_lens.device),
            self.held,
        )  # fmt: skip
        for kind in self.kinds:  # here and not in a layer: a captured graph replays its layers without Python
            batch.spans(*kind)
        return batch

    def update_block_table(self, metadata: Batch, blk_table: Tensor, slot_mapping: Tensor) -> Batch:
        """The same batch in the pages of another group."""
        same = Batch(
            metadata.query_offsets, metadata.seq_lens, blk_table, self.page_size, metadata.num_rows,
            metadata.max_query_len, metadata.causal, metadata.blocks, self.held,
        )  # fmt: skip
        for kind in self.kinds:
            same.spans(*kind)
        return same


def _kind_of_spans(layer: Attention) -> tuple[int | None, bool]:
    """Window of a layer, and whether it also cuts images: `Batch.spans` builds a set of spans for each kind."""
    return layer.impl.window, bool(getattr(layer, "mm_prefix_clamp_sliding_window", False))


class MyTritonImpl(AttentionImpl[Batch]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        chunk_lookback: int = -1,
    ) -> None:
        """As vLLM describes a layer.

        Raises:
            ValueError: the layer has something that is not served and that vLLM does not ask about beforehand.
        """
        if alibi_slopes is not None:
            raise ValueError(
                f"{NAME}: `alibi_slopes` are not served over a paged cache; choose another backend for this model, "
                "such as --attention-backend TRITON_ATTN"
            )
        if chunk_lookback > -1:
            raise ValueError(
                f"{NAME}: chunked attention with `chunk_lookback`={chunk_lookback} is not served; choose another "
                "backend for this model, such as --attention-backend TRITON_ATTN"
            )
        if not current_platform.is_cpu() and (reason := unsupported_device(torch.device("cuda"))) is not None:
            raise ValueError(f"{NAME}: {reason}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.page_dtype = QUANTISED_DTYPES.get(kv_cache_dtype)
        self.softcap = logits_soft_cap or None
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        # vLLM empties an attribute of this name when it drops a cache, whose memory it would hold.
        self._k_scale_cache: tuple[Tensor, Tensor | None, PagedCache] | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a batch, whose keys `do_kv_cache_update` has already put into the pages.

        Args:
            layer: holds the scales of an eight-bit cache.
            query: `[tokens, num_heads, head_size]`, tokens of padding at the end.
            key, value: `[tokens, num_kv_heads, head_size]`; read by encoders alone.
            kv_cache: `[blocks, num_kv_heads, block_size, 2 * head_size]`.
            attn_metadata: the batch, or None while vLLM measures memory.
            output: `[tokens, num_heads, head_size]`, written to.
            output_scale, output_block_scale: always None, as `fused_output_quant_supported` says.
        """
        if attn_metadata is None:
            return output.zero_()
        rows = attn_metadata.num_rows
        if self.attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
            output[:rows] = self._encode(query[:rows], key[:rows], value[:rows], attn_metadata)
            return output
        window, window_cuts_blocks = self.window, bool(getattr(layer, "mm_prefix_clamp_sliding_window", False))
        attn_metadata.attend(
            query[:rows], self._pages_in(layer, kv_cache), output[:rows], window=window, sinks=self.sinks,
            window_cuts_blocks=window_cuts_blocks, scale=self.scale, softcap=self.softcap,
        )  # fmt: skip
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Put the keys and values of new tokens into their pages; a negative slot is padding."""
        if self.attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
            return
        tokens = slot_mapping.shape[0]
        write_cache(key[:tokens], value[:tokens], self._pages_in(layer, kv_cache), slot_mapping)

    def _pages_in(self, layer: Any, kv_cache: Tensor) -> PagedCache:
        """The layer's cache as the kernels take it; a view, made anew only when vLLM gives the layer another."""
        key_scale, value_scale = (None, None) if self.page_dtype is None else (layer._k_scale, layer._v_scale)
        known = self._k_scale_cache
        if known is not None and known[0] is kv_cache and known[1] is key_scale:
            return known[2]
        key, value = kv_cache.transpose(1, 2).tensor_split([self.head_size], dim=-1)
        if self.page_dtype is not None:
            key, value = key.view(self.page_dtype), value.view(self.page_dtype)
        pages = pages_of(key, value, key_scale, value_scale)
        self._k_scale_cache = kv_cache, key_scale, pages
        return pages

    def _encode(self, query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
        """Attention of each request's tokens to each other, without a cache."""
        rows = batch.num_rows
        spans = Spans.packed_offsets(batch.query_offsets, batch.query_offsets, rows, rows)
        if self.window is not None:
            spans = spans & Spans.sliding(rows, rows, left=self.window - 1, right=self.window - 1, device=spans.device)
        query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
        output = attention(query, key, value, spans, sinks=self.sinks, scale=self.scale, softcap=self.softcap)
        return output[0].transpose(0, 1)
