# SPDX-License-Identifier: Apache-2.0
"""Calling again what was called before: kernels already compiled, with other tensors of the same kind.

The layers of a model make the same call with tensors that differ in their addresses alone. Checking arguments, choosing
tiles and having Triton find the compiled kernel takes several times as long as handing it the addresses. So the first
call of a kind is remembered, by all that the checks and Triton's specialisation look at: shapes, strides, dtypes,
devices, scale, softcap and number of parts. Addresses count by whether 16 divides them: only such calls are remembered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .configs import SHORT
from .spans import Spans

if TYPE_CHECKING:
    from .tiles import SpanOperand

ALIGNMENT = 15
"""Bits of an address that are 0 where Triton takes it as divisible by 16."""

MOST_LAUNCHES = 64
"""Kinds of calls that are remembered. A growing cache makes a new kind with every token."""

Run = Callable[..., object]

Asked = tuple[float | None, float | None, int | None, bool]
"""What a caller has asked for: scale, softcap, in how many parts to compute, and whether by the Gluon kernel."""

_launches: dict[tuple, Launch] = {}
_known_spans: WeakKeyDictionary[Spans, tuple[tuple, SpanOperand] | None] = WeakKeyDictionary()


class Launch(ABC):
    """A kernel compiled for one kind of call, and its arguments but for the tensors."""

    def __init__(
        self, output: Tensor, lse: Tensor, arguments: list[Any], tensors: tuple[int, ...], attend: Run
    ) -> None:
        """Of a call that has been made.

        Args:
            output, lse: its results.
            arguments: what its kernel took, in order, query, key and value first.
            tensors: the places of all tensors among them that differ from call to call.
            attend: the compiled kernel, with its grid.
        """
        self.device_type, self.device_index = output.device.type, output.device.index
        self.output, self.lse = (output.shape, output.stride(), output.dtype), (lse.shape, lse.stride(), lse.dtype)
        self.operand, self.strides = type(arguments[0]), tuple(each[1:] for each in arguments[:3])
        self.arguments = [None if place in tensors else each for place, each in enumerate(arguments)]
        self.attend = attend

    def results(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for output and log-sum-exp."""
        (shape, strides, dtype), (lse_shape, lse_strides, lse_dtype) = self.output, self.lse
        output = query.new_empty_strided(shape, strides, dtype=dtype)
        return output, query.new_empty_strided(lse_shape, lse_strides, dtype=lse_dtype)

    def with_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> list[Any]:
        """The arguments, with query, key and value in their places."""
        operand, arguments = self.operand, self.arguments.copy()
        query_strides, key_strides, value_strides = self.strides
        arguments[0] = operand(query, *query_strides)
        arguments[1], arguments[2] = operand(key, *key_strides), operand(value, *value_strides)
        return arguments

    def on_device(self, run: Run, *arguments: Any) -> None:
        """Run on the device of the call: Triton launches on the current one."""
        if self.device_index is None or torch.cuda.current_device() == self.device_index:
            run(*arguments)
        else:
            with torch.cuda.device(self.device_index):
                run(*arguments)

    @abstractmethod
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, spans: SpanOperand, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Output and log-sum-exp, or None if a result came to lie where the kernels were not compiled for."""


class Forward(Launch):
    """`forward.forward_kernel`, compiled for one kind of call."""

    TENSORS = (0, 1, 2, 3, 5, 6, 9)
    """Places of query, key, value, output, log-sum-exp, spans and sinks among its arguments."""

    def __init__(self, output: Tensor, lse: Tensor, arguments: list[Any], attend: Run) -> None:
        super().__init__(output, lse, arguments, self.TENSORS, attend)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, spans: SpanOperand, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """As `Launch` says."""
        output, lse = self.results(query)
        if (output.data_ptr() | lse.data_ptr()) & ALIGNMENT:
            return None
        arguments = self.with_inputs(query, key, value)
        arguments[3], arguments[5], arguments[6] = self.operand(output, *self.output[1]), lse, spans
        arguments[9] = sinks
        self.on_device(self.attend, *arguments)
        return output, lse


class Decode(Launch):
    """`decode.decode_kernel` and, where keys are split, `decode.merge_kernel`, compiled for one kind of call."""

    TENSORS = (0, 1, 2, 6, 7, 8, 11)
    """Places of query, key, value, output, log-sum-exp, spans and sinks among the arguments of the former."""

    def __init__(
        self, output: Tensor, lse: Tensor, splits: int, arguments: list[Any], attend: Run, merge: Run | None
    ) -> None:
        """As `Launch`, of a call that computed its keys in so many parts; `merge` takes tensors alone."""
        super().__init__(output, lse, arguments, self.TENSORS, attend)
        self.parts_shape, self.part_lse_shape = ((splits, *each.shape) for each in (output.transpose(1, 2), lse))
        self.lse_strides = arguments[7][1:]
        self.merge = merge

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, spans: SpanOperand, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """As `Launch` says."""
        output, lse = parts, part_lse = self.results(query)
        addresses = output.data_ptr() | lse.data_ptr()
        if self.merge is not None:
            parts = query.new_empty(self.parts_shape, dtype=lse.dtype)
            part_lse = query.new_empty(self.part_lse_shape, dtype=lse.dtype)
            addresses |= parts.data_ptr() | part_lse.data_ptr()
        if addresses & ALIGNMENT:
            return None
        arguments = self.with_inputs(query, key, value)
        arguments[6], arguments[7], arguments[8] = parts, self.operand(part_lse, *self.lse_strides), spans
        arguments[11] = sinks
        self.on_device(self._run, arguments, parts, part_lse, output, lse)
        return output, lse

    def _run(self, arguments: list[Any], parts: Tensor, part_lse: Tensor, output: Tensor, lse: Tensor) -> None:
        self.attend(*arguments)
        if self.merge is not None:
            self.merge(parts, part_lse, output, self.operand(lse, *self.lse_strides))


def relaunch(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans | None, sinks: Tensor | None, asked: Asked
) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp of a call without gradients, if one of its kind is remembered."""
    if not _launches or spans is None or (known := _spans_as_operand(spans)) is None:
        return None
    if (query.data_ptr() | key.data_ptr() | value.data_ptr()) & ALIGNMENT:
        return None
    launch = _launches.get(_kind(query, key, value, known[0], sinks, asked))
    # Autocast changes dtypes.
    if launch is None or torch.is_autocast_enabled(launch.device_type):
        return None
    if sinks is not None and sinks.data_ptr() & ALIGNMENT:
        return None
    return launch(query, key, value, known[1], sinks)


def launch_and_remember(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, sinks: Tensor | None, asked: Asked
) -> tuple[Tensor, Tensor] | None:
    """As `relaunch`, of a call that has been checked and that no other of its kind came before; None if not served."""
    from . import decode  # imports Triton, which takes time

    known = _spans_as_operand(spans)
    same_batch = query.shape[0] == key.shape[0] == value.shape[0]
    if decode.INTERPRETED or known is None or not same_batch or not query.numel() or not key.numel():
        return None
    if (query.data_ptr() | key.data_ptr() | value.data_ptr()) & ALIGNMENT:
        return None
    if sinks is not None and (sinks.data_ptr() & ALIGNMENT or not sinks.is_contiguous()):
        return None  # where they have gaps, kernels get a copy
    scale, softcap, num_splits, wants_gluon = asked
    if wants_gluon and query.shape[2] > SHORT:
        return None
    scale = query.shape[3] ** -0.5 if scale is None else scale
    softcap = None if softcap is None else float(softcap)
    launch: Launch | None
    if query.shape[2] <= SHORT:
        output, lse, launch = decode_first(query, key, value, known[1], sinks, scale, softcap, num_splits)
    else:
        output, lse, launch = forward_first(query, key, value, known[1], sinks, scale, softcap)
    if launch is not None and not (output.data_ptr() | lse.data_ptr()) & ALIGNMENT:
        if len(_launches) >= MOST_LAUNCHES:
            _launches.clear()
        _launches[_kind(query, key, value, known[0], sinks, asked)] = launch
    return output, lse


def forward_first(
    query: Tensor, key: Tensor, value: Tensor, spans: SpanOperand, sinks: Tensor | None, scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Forward | None]:  # fmt: skip
    """Launch as `forward.forward` does without gradients; also what launches again, unless descriptors were made."""
    from . import forward

    batch, num_heads, query_len, head_dim = query.shape
    output = query.new_empty(batch, query_len, num_heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty(batch, num_heads, query_len, dtype=torch.float32)
    config = forward.forward_config(
        forward.architecture(query.device), query.dtype, head_dim, value.shape[3], query_len,
        has_tiles=spans.key_mask_ptr is not None, has_dropout=False, device=query.device,
    )  # fmt: skip
    named = forward.kernel_arguments(
        query, key, value, output, None, lse, spans, None, None, sinks, None, scale, softcap, config
    )
    grid = (-(-query_len // config.block_m) * batch * num_heads, 1, 1)
    with forward.launching_on(query):
        attend = forward.forward_kernel[grid](**named)[grid]
    if named["key_descriptor"] is not None or named["value_descriptor"] is not None:
        return output, lse, None
    return output, lse, Forward(output, lse, [named[name] for name in forward.forward_kernel.arg_names], attend)


def decode_first(
    query: Tensor, key: Tensor, value: Tensor, spans: SpanOperand, sinks: Tensor | None, scale: float,
    softcap: float | None, num_splits: int | None,
) -> tuple[Tensor, Tensor, Decode]:  # fmt: skip
    """Launch as `decode.decode` does; also what launches again."""
    from . import decode

    batch, num_heads, query_len, head_dim = query.shape
    num_kv_heads, key_len, value_dim = value.shape[1:]
    rows = query_len * (num_heads // num_kv_heads)
    config = decode.decode_config(
        decode.architecture(query.device), query.dtype, head_dim, value_dim, rows, query.device
    )
    programs = batch * num_kv_heads, -(-rows // config.block_m)
    splits = num_splits or decode.choose_splits(programs[0] * programs[1], key_len, config.block_n, query.device)
    output = query.new_empty(batch, query_len, num_heads, value_dim)
    lse = query.new_empty(batch, num_heads, query_len, dtype=torch.float32)
    parts, part_lse = output, lse
    if splits > 1:
        parts, part_lse = (lse.new_empty(splits, *each.shape) for each in (output, lse))
    named = decode.decode_arguments(
        query, key, value, parts, part_lse, spans, None, None, sinks, scale, softcap, None, None, None, None, key_len,
        config,
    )  # fmt: skip
    tokens = batch * query_len
    sizes = splits, num_heads, query_len, tokens, part_lse.stride(0), value_dim, decode.padded_dim(value_dim)
    arguments = [named[name] for name in decode.decode_kernel.arg_names]
    grid, merge_grid, merge = (*programs, splits), (tokens, num_heads, 1), None
    with decode.launching_on(query):
        attend = decode.decode_kernel[grid](**named)[grid]
        if splits > 1:
            own = decode.row_operand(lse)
            merge_all = decode.merge_kernel[merge_grid](parts, part_lse, output, own, *sizes)[merge_grid]

            def merge(*tensors):
                merge_all(*tensors, *sizes)

    output = output.transpose(1, 2)
    return output, lse, Decode(output, lse, splits, arguments, attend, merge)


def forget() -> None:
    """Remember no call any more."""
    _launches.clear()


def _kind(query: Tensor, key: Tensor, value: Tensor, spans: tuple, sinks: Tensor | None, asked: Asked) -> tuple:
    """All that decides how a call is checked and which kernels serve it."""
    own = None if sinks is None else (sinks.shape, sinks.stride(), sinks.dtype, sinks.device)
    return (
        query.shape, query.stride(), query.dtype, query.device, key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device, spans, own, asked,
    )  # fmt: skip


def _spans_as_operand(spans: Spans) -> tuple[tuple, SpanOperand] | None:
    """What decides which kernels serve spans, and the spans as kernels take them; None for unusual ones.

    All layers share their spans, whose tensors never change but in their values.
    """
    try:
        return _known_spans[spans]
    except KeyError:
        known = _known_spans[spans] = _describe_spans(spans)
        return known


def _describe_spans(spans: Spans) -> tuple[tuple, SpanOperand] | None:
    from .launch import span_operand

    tensors = [each for each in (spans.start, spans.end, spans.key_mask, spans.gap_count) if each is not None]
    if any(each.data_ptr() & ALIGNMENT or type(each) is not Tensor for each in tensors):
        return None
    if spans.key_mask is not None and not spans.key_mask.is_contiguous():
        return None  # the operand would be a copy, and so miss later changes
    kinds = tuple((each.shape, each.stride(), each.dtype, each.device) for each in tensors)
    operand = span_operand(spans.start, spans.end, spans.key_mask, spans.gap_count)
    return (spans.query_len, spans.key_len, *kinds), operand
