# SPDX-License-Identifier: Apache-2.0
"""Recording what each layer of a model asks of attention, through the very functions that serve it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from attention_kernels import Spans, call_checks

from .. import attention as adapter
from .. import masks, reading, support

NAME = "my_triton_explained"
"""The implementation that records, as transformers knows it while a model is explained."""

PREFIX = "my_triton attention:"


@dataclass(frozen=True)
class Call:
    """One call of attention.

    Attributes:
        module: the layer.
        scores: `(batch, num_heads, query_len, key_len)`.
        num_kv_heads, head_dim, value_dim: of keys and values.
        mask_name: the mask in words.
        spans: what each row sees, None where refused.
        dense: a boolean mask beside the spans, without values where it depends on weights; or None.
        bias: shape of what is added to the scores, or None.
        has_sinks, softcap: what else changes the scores.
        refused: why it is not served, or None.
    """

    module: torch.nn.Module
    scores: tuple[int, int, int, int]
    num_kv_heads: int
    head_dim: int
    value_dim: int
    mask_name: str
    spans: Spans | None = None
    dense: Tensor | None = None
    bias: tuple[int, ...] | None = None
    has_sinks: bool = False
    softcap: float | None = None
    refused: str | None = None


class Recorder:
    """The attention function and the mask function of `NAME`: both do what ours do, short of computing attention."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._names: dict[int, tuple[Any, str]] = {}
        self._current: Call | None = None

    @contextmanager
    def registered(self) -> Iterator[None]:
        """While this holds, transformers knows `NAME`, and our adapter hands its operator's arguments over here."""
        original = adapter.attention
        AttentionInterface.register(NAME, self.attention)
        AttentionMaskInterface.register(NAME, self.mask)
        support.registered_names.add(NAME)
        adapter.attention = self.operator  # type: ignore[assignment]
        try:
            yield
        finally:
            adapter.attention = original
            support.registered_names.discard(NAME)
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(NAME, None)

    def mask(self, **kwargs: Any) -> Any:
        """The mask function: ours, on the CPU, where the inputs have values."""
        result = masks.span_mask(**{**kwargs, "device": "cpu"})
        mask_function = kwargs.get("mask_function", masking_utils.causal_mask_function)
        name = name_of_mask(mask_function)
        attended = getattr(result, "attended", None)
        if attended is not None and not bool(attended.all()):
            name += ", padding"
        self._names.setdefault(id(result), (result, name))
        return result

    def attention(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """The attention function: ours, whose refusals are recorded and not raised."""
        scores = (max(query.shape[0], key.shape[0]), query.shape[1], query.shape[2], key.shape[2])
        name = self._name_of(attention_mask)
        self._current = Call(module, scores, key.shape[1], query.shape[3], value.shape[3], name)
        before = len(self.calls)
        try:
            return adapter.attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
        except (ValueError, TypeError) as error:
            del self.calls[before:]
            self.calls.append(replace(self._current, refused=str(error)))
            return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    def operator(
        self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, *, mask: Tensor | None = None,
        bias: Tensor | None = None, sinks: Tensor | None = None, softcap: float | None = None, return_lse: bool = False,
        **others: Any,
    ) -> Any:  # fmt: skip
        """In place of `attention_kernels.attention`: checks tensors as it does, and computes nothing."""
        query, key, value = call_checks.fitting_tensors(query, key, value)
        assert self._current is not None
        name = self._current.mask_name or name_of_spans(spans)
        shape = None if bias is None else tuple(bias.shape)
        known: dict[str, Any] = {
            "spans": spans,
            "dense": mask,
            "bias": shape,
            "has_sinks": sinks is not None,
            "softcap": softcap,
        }
        self.calls.append(replace(self._current, mask_name=name, **known))
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
        return (output, query.new_empty(query.shape[:3], dtype=torch.float32)) if return_lse else output

    def _name_of(self, attention_mask: Any) -> str:
        if isinstance(attention_mask, Tensor):
            return "boolean mask" if attention_mask.dtype == torch.bool else "added to the scores"
        return self._names.get(id(attention_mask), (None, ""))[1]


# ---------------------------------------------------------------------- masks in words


def name_of_mask(mask_function: Callable) -> str:
    """What transformers' description of a mask means, such as "causal, window 512"."""
    cells = reading.closure(mask_function)
    if mask_function is masking_utils.causal_mask_function:
        return "causal"
    if mask_function is masking_utils.bidirectional_mask_function:
        return "all keys"
    for factory, words in _WORDS.items():
        if reading.made_by(mask_function, factory):
            return words(cells)
    return f"function {getattr(mask_function, '__qualname__', type(mask_function).__qualname__)}"


def _joined(names: list[str], separator: str) -> str:
    flat = [part for name in names for part in name.split(separator)]
    kept = list(dict.fromkeys(part for part in flat if part not in ("", "all keys"))) or ["all keys"]
    kept.sort(key=lambda part: part != "causal")
    return separator.join(kept)


_WORDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "sliding_window_overlay": lambda cells: f"window {cells['sliding_window']}",
    "sliding_window_bidirectional_overlay": lambda cells: f"window {cells['sliding_window']} either side",
    "chunked_overlay": lambda cells: f"chunks of {cells['chunk_size']}",
    "blockwise_overlay": lambda cells: "own block",
    "packed_sequence_mask_function": lambda cells: "own document",
    "remap_positions_for_packed_sequence": lambda cells: name_of_mask(cells["mask_function"]),
    "and_masks": lambda cells: _joined([name_of_mask(part) for part in cells["mask_functions"]], ", "),
    "or_masks": lambda cells: _joined([name_of_mask(part) for part in cells["mask_functions"]], " or "),
}


def name_of_spans(spans: Spans) -> str:
    """The same for spans that no mask function made."""
    index = torch.arange(spans.query_len)[None] + spans.key_len - spans.query_len
    shape = (spans.batch, spans.query_len)
    start, end = spans.start.expand(shape), spans.end.expand(shape)
    if bool((start == 0).all()) and bool((end == spans.key_len).all()):
        return "all keys"
    causal = bool((end <= index + 1).all())
    if causal and bool((start == 0).all()):
        return "causal"
    widest = int((end - start).max())
    return f"{'causal' if causal else 'spans'}, at most {widest} keys"
