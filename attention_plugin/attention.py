# SPDX-License-Identifier: Apache-2.0
"""The AttentionInterface function: transformers' arguments in, one operator call, (output, weights or None) out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attention_kernels import Spans, attention, attention_weights, draw_seed
from attention_kernels.checks import check_tensors, check_whole, is_one_or
from attention_kernels.shared_spans import window_spans
from attention_kernels.spans import rise_within, values_at_hand

from .carried_mask import SpanMask
from .documents import document_ids
from .selected_keys import selected_keys
from .support import (
    check_dropout,
    check_head_sinks,
    check_keywords,
    check_position_bias,
    check_scaling,
    is_causal_without_mask,
    note_kept_lengths,
    refuse_alignment,
    refuse_mask,
    refuse_two_sinks,
)
from .token_sinks import keys_share
from .weights import AbsentWeights, absent_weights, weights_wanted


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SpanMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | AbsentWeights | None]:
    """Attention as transformers' models call it.

    Args:
        module: the attention layer; its `is_causal` decides where neither a mask nor the argument does.
        query: `[batch, num_heads, query_len, head_dim]`.
        key: `[batch, num_kv_heads, key_len, head_dim]`, before any repetition of heads.
        value: `[batch, num_kv_heads, key_len, value_dim]`.
        attention_mask: from the registered mask function; or a bool tensor, True where visible; or a floating point
            tensor added to the scores; or None.
        dropout: probability of dropping a weight of the softmax; 0 unless `module.training`. Which weights are dropped
            is drawn from torch's generator of the device.
        scaling: factor of the scores, default `head_dim ** -0.5`; a learned one is a tensor of one number.
        is_causal: overrides `module.is_causal`; both give way to a mask.
        sliding_window: number of keys a row of causal attention sees, used where there is no mask (a mask has it
            already).
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: sinks, `[num_heads]`.
        position_bias: added to the scores, broadcastable to `[batch, num_heads, query_len, key_len]`.
        position_ids: `[batch or 1, query_len]`; where they restart in causal attention without earlier keys, a packed
            document begins, unless transformers has built the mask without a 2D mask and so has looked for documents
            itself.
        cu_seq_lens_q, cu_seq_lens_k: cumulative lengths `[documents + 1]` of documents packed in a batch of one.
        output_attentions: also return the weights, which models do not pass on everywhere: transformers' record of what
            the caller asked for counts as well.
        sinks: sinks that differ from token to token, `[batch, num_heads, query_len, 1]`.
        indices: `[batch, query_len, selected]`, the only keys that a row sees, among those that the mask leaves it.
        block_indices: `[batch, groups of heads, query_len, selected]`, the same for blocks of keys.
        kwargs: refused by name unless known not to change attention.

    Returns:
        Output `[batch, query_len, num_heads, value_dim]`, contiguous, and the weights
        `[batch, num_heads, query_len, key_len]` (after dropout, as eager attention returns them) if they were asked
        for. Otherwise None, or an object that refuses to be used where a model may have been asked without passing it
        on.

    Raises:
        ValueError, TypeError: an argument is not served or breaks a rule; the message names it and the alternative.
    """
    check_keywords(kwargs, module)
    check_dropout(dropout, module.training)
    if is_causal is None:
        # Cross attention that does not say so (Mllama's) sees all keys: they are not of the tokens that ask.
        is_causal = getattr(module, "is_causal", "CrossAttention" not in type(module).__name__)
        if attention_mask is None and is_causal:
            is_causal = is_causal_without_mask(type(module).__module__)
    try:
        (batch, num_heads, query_len, _), (key_batch, _, key_len, _) = query.shape, key.shape
    except (AttributeError, ValueError):
        attention(query, key, value)  # says what they must be
        raise
    if position_ids is not None:
        check_tensors("my_triton attention", {"position_ids": position_ids})
    if s_aux is not None:
        check_head_sinks(s_aux)
    scores = (batch if batch > key_batch else key_batch, num_heads, query_len, key_len)
    has_lengths, chunk_size = cu_seq_lens_q is not None or cu_seq_lens_k is not None, None
    if has_lengths and isinstance(attention_mask, SpanMask) and attention_mask.counts_chunks:
        assert attention_mask.chunks is not None
        chunk_size, attention_mask = attention_mask.chunks[0], attention_mask.without_chunks()
    spans, mask, bias = resolve_mask(attention_mask, scores, is_causal, sliding_window, position_ids, query.device)
    if has_lengths:
        spans = _within_lengths(spans, chunk_size, cu_seq_lens_q, cu_seq_lens_k, scores)
    elif query_len > 1:
        note_kept_lengths(module)
    if position_bias is not None:
        check_position_bias(position_bias, scores)
        bias = position_bias if bias is None else bias + position_bias
    selected = selected_keys(module, indices, block_indices, scores)
    if selected is not None:
        mask = selected if mask is None else mask & selected
    if isinstance(scaling, Tensor) and scaling.requires_grad:  # a learned one
        check_scaling(scaling)
        query, scaling = (query * scaling).to(query.dtype), 1.0
    options: dict[str, Any] = {"mask": mask, "bias": bias, "scale": scaling, "softcap": softcap, "dropout_p": dropout}
    wanted = weights_wanted(module, output_attentions)
    if not wanted and sinks is None:
        output = attention(query, key, value, spans, sinks=s_aux, **options)
        return output.transpose(1, 2), absent_weights(module, output_attentions)  # contiguous, says `attention`
    if sinks is not None and s_aux is not None:
        refuse_two_sinks()
    options["dropout_seed"] = draw_seed(query.device) if dropout else None
    output, lse = attention(query, key, value, spans, sinks=s_aux, return_lse=True, **options)
    weights = attention_weights(query, key, lse, spans, **options) if wanted else None
    if sinks is not None:
        share = keys_share(lse, sinks)
        output = (output * share).to(output.dtype)
        weights = None if weights is None else (weights * share).to(weights.dtype)
    output = output.transpose(1, 2).contiguous()
    return output, absent_weights(module, output_attentions) if weights is None else weights


def resolve_mask(
    attention_mask: SpanMask | Tensor | None,
    scores: tuple[int, int, int, int],
    is_causal: bool,
    sliding_window: int | None,
    position_ids: Tensor | None,
    device: torch.device,
) -> tuple[Spans, Tensor | None, Tensor | None]:
    """Spans, boolean mask and additive bias of whatever a model hands in as its mask.

    Args:
        scores: `(batch, num_heads, query_len, key_len)`; the other arguments as for `attention_forward`.

    Raises:
        ValueError: the mask is of no known kind or does not fit, or there is none and more than one reading of that.
    """
    query_len, key_len = scores[2:]
    packed = position_ids if is_causal and query_len == key_len > 1 else None
    if packed is not None and packed.shape[1:] != (query_len,):
        packed = None  # of several dimensions (multimodal rotary embeddings), or of other tokens
    attended = attention_mask.attended if isinstance(attention_mask, SpanMask) else None
    if isinstance(attention_mask, SpanMask) and attended is None:
        # Without a 2D mask transformers has looked for packing itself; its mask holds, as it does under eager.
        packed = None
    if isinstance(attention_mask, SpanMask) and (rewritten := attention_mask.rewritten) is not None:
        attention_mask = rewritten  # no longer what the spans say
    if attention_mask is None:
        attention_mask = SpanMask(_spans_without_mask(query_len, key_len, is_causal, sliding_window, device))
    if isinstance(attention_mask, SpanMask):
        attention_mask = attention_mask.fitted(query_len, key_len)
        spans = attention_mask.spans
        if spans.query_len != query_len or spans.key_len != key_len:
            refuse_mask(attention_mask, scores)
        spans = spans if packed is None else attention_mask.spans_within_documents(packed)
        return spans, attention_mask.holes, None
    fits = isinstance(attention_mask, Tensor) and attention_mask.ndim == 4
    if not fits or not all(map(is_one_or, attention_mask.shape, scores)):
        refuse_mask(attention_mask, scores)
    if packed is not None and attended is not None:  # beside what was rewritten
        spans = Spans.packed(document_ids(packed, attended))
    else:
        spans = Spans.full(query_len, key_len, device=device)
    if attention_mask.dtype == torch.bool:
        return spans, attention_mask, None
    if attention_mask.is_floating_point():
        return spans, None, attention_mask
    refuse_mask(attention_mask, scores)


def _spans_without_mask(
    query_len: int, key_len: int, is_causal: bool, sliding_window: int | None, device: torch.device
) -> Spans:
    """What a call without a mask means: all keys, or causal; a single query is the newest token and sees all keys."""
    if not is_causal or (query_len == 1 and sliding_window is None):
        return window_spans(query_len, key_len, device=device)
    if not is_one_or(query_len, key_len):
        refuse_alignment(query_len, key_len)
    if sliding_window is not None:
        check_whole("my_triton attention", "sliding_window", sliding_window)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"my_triton attention: `sliding_window` must be at least 1, got {sliding_window}; pass None for no window"
        )
    left = None if sliding_window is None else sliding_window - 1
    return window_spans(query_len, key_len, left=left, right=0, device=device)


def _within_lengths(
    spans: Spans,
    chunk_size: int | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    scores: tuple[int, int, int, int],
) -> Spans:
    """The spans, cut at the boundaries of documents, and into chunks that are counted from the first token of each."""
    batch, _, query_len, key_len = scores
    if cu_seq_lens_q is None or cu_seq_lens_k is None or batch != 1:
        raise ValueError(
            "my_triton attention: `cu_seq_lens_q` and `cu_seq_lens_k` go together and describe a batch of 1, got "
            f"{'only one of them' if batch == 1 else f'a batch of {batch}'}; pack the documents into one row"
        )
    for name, offsets, tokens in (
        ("cu_seq_lens_q", cu_seq_lens_q, query_len),
        ("cu_seq_lens_k", cu_seq_lens_k, key_len),
    ):
        is_list = isinstance(offsets, Tensor) and offsets.ndim > 0
        if not is_list or (values_at_hand(offsets) and not _are_cumulative(offsets, tokens)):
            raise ValueError(
                f"my_triton attention: `{name}` must be a tensor of cumulative lengths, from 0 on, never falling and "
                f"not beyond the {tokens} tokens there are, got "
                f"{offsets.tolist() if isinstance(offsets, Tensor) else offsets}; of lengths pass "
                "torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
            )
    if cu_seq_lens_q.ndim != 1 or cu_seq_lens_q.shape != cu_seq_lens_k.shape or len(cu_seq_lens_q) < 2:
        raise ValueError(
            "my_triton attention: `cu_seq_lens_q` and `cu_seq_lens_k` must be [documents + 1], for as many documents "
            f"and one at least, got {list(cu_seq_lens_q.shape)} and {list(cu_seq_lens_k.shape)}; a document without "
            "queries or keys has its offset twice"
        )
    documents = Spans.packed_offsets(cu_seq_lens_q, cu_seq_lens_k, query_len, key_len).to(spans.device)
    own = spans & documents
    if chunk_size is None:
        return own
    row = own.end - 1  # chunked attention is causal: the last key that a row sees is its own
    return replace(own, start=torch.maximum(own.start, row - (row - own.start) % chunk_size))


def _are_cumulative(offsets: Tensor, tokens: int) -> bool:
    return not offsets[:1].any() and rise_within(offsets, tokens)
