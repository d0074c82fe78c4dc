# SPDX-License-Identifier: Apache-2.0
"""What all launchers share: operands, memory, the device, and a record of what was launched."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from .config_tables import MOST_ROWS
from .configs import last_cache, padded_dim
from .dropout import threshold_and_scale
from .tiles import DropoutOperand, Operand, OperandInUnits, SpanOperand

MOST_COLUMNS = 1024
"""The most columns of a tile, those of the widest heads."""

COMPILER_OPTIONS: Mapping[str, Any] = {"enable_fp_fusion": True}
"""What every kernel is compiled with. A product and a sum become one instruction, faster and rounded once; Triton 3.10
makes them two unless it is asked for."""

INTERPRETED: bool = tiles.INTERPRETED.value
"""Whether Triton runs its kernels in its interpreter (TRITON_INTERPRET=1 when they were imported)."""


class Recording(NamedTuple):
    """What was launched while it was recorded, for `prebound` to launch again."""

    kernels: list[tuple[Any, tuple[int, ...], list[Any]]]
    """Each kernel as compiled, its grid and its arguments in order."""

    memory: list[Tensor]
    """The memory that was taken for what kernels write."""


_thread = threading.local()


@contextmanager
def recording() -> Iterator[Recording]:
    """Record what this thread launches, and the memory that it takes, while this holds."""
    outer = getattr(_thread, "recording", None)
    _thread.recording = recorded = Recording([], [])
    try:
        yield recorded
    finally:
        _thread.recording = outer


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Launch a kernel on the current device."""
    compiled = kernel[grid](**arguments, **COMPILER_OPTIONS)
    if (recorded := _recording_here()) is not None:
        recorded.kernels.append((compiled, grid, [arguments[name] for name in kernel.arg_names]))


def memory(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for what kernels write: contiguous, on the device of `like` and, unless another is named, in its dtype."""
    return _noted(like.new_empty(shape, dtype=dtype or like.dtype))


def token_major_memory(like: Tensor, dim: int | None = None) -> Tensor:
    """Memory in the shape of `like`, or with `dim` as its last dimension, that is stored token by token.

    Not as a transposed view: a call returns tensors that are no views, whether its launches are repeated or not.
    """
    batch, heads, tokens, own_dim = like.shape
    dim = own_dim if dim is None else dim
    strides = max(tokens, 1) * heads * dim, dim, heads * dim, 1
    return _noted(like.new_empty_strided((batch, heads, tokens, dim), strides))


def _noted(tensor: Tensor) -> Tensor:
    if (recorded := _recording_here()) is not None:
        recorded.memory.append(tensor)
    return tensor


def _recording_here() -> Recording | None:
    return None if torch.compiler.is_compiling() else getattr(_thread, "recording", None)


def launching_on(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's device current: Triton launches on the current one, which need not be the tensors'."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def within_reach(*tensors: Tensor | None) -> list[Any]:
    """The tensors `[batch, heads, rows, columns]`, with a copy of each whose rows lie too far apart.

    Offsets inside a tile are 32-bit numbers. That is too little for a transposed `[tokens, batch, heads, dim]` in which
    two tokens lie 2^24 elements apart.
    """
    return [tensor if tensor is None or _is_within_reach(tensor) else tensor.contiguous() for tensor in tensors]


def columns_within_reach(*tensors: Tensor) -> list[Tensor]:
    """As `within_reach`, for kernels whose rows may lie anywhere: with a copy where columns lie too far apart."""
    return [
        tensor if (min(tensor.shape[3], MOST_COLUMNS) - 1) * tensor.stride(3) < 1 << 31 else tensor.contiguous()
        for tensor in tensors
    ]


def _is_within_reach(tensor: Tensor) -> bool:
    (rows, columns), (row_stride, column_stride) = tensor.shape[2:], tensor.stride()[2:]
    reach = (min(rows, MOST_ROWS) - 1) * row_stride + (min(columns, MOST_COLUMNS) - 1) * column_stride
    return reach < 1 << 31


def section_of(heads: int, group_size: int, rows: int, *read: Tensor) -> int:
    """For how many heads at a time programs run side by side: `section` of the kernels (`tiles.place_of`).

    As many whole groups of heads as have what they read in the last cache, and a number that divides `heads`.

    Args:
        heads: those of all sequences together.
        rows: of each of the tensors, which a group reads.
    """
    groups = heads // group_size
    row = sum(tensor.shape[3] * tensor.element_size() for tensor in read)
    fitting = min(groups, last_cache(read[0].device) // max(1, rows * row))
    return next((number for number in range(fitting, 1, -1) if groups % number == 0), 1) * group_size


def operand(tensor: Tensor) -> Operand | OperandInUnits:
    """A tensor `[batch, heads, rows, columns]` as kernels take it.

    Where its strides are multiples of 16 bytes, but not of 16 elements, that is `OperandInUnits`.
    """
    stride_b, stride_h, stride_m, stride_n = strides = tensor.stride()
    told = all(stride % 16 == 0 for stride in strides[:3])
    in_units = stride_n == 1 and all(
        size == 1 or stride * tensor.element_size() % 16 == 0
        for size, stride in zip(tensor.shape[:3], strides[:3], strict=True)
    )
    if in_units and not told:
        return OperandInUnits(tensor, stride_b, stride_h, stride_m, stride_n, 1)
    return Operand(tensor, stride_b, stride_h, stride_m, stride_n)


def score_operand(
    tensor: Tensor | None, scores: tuple[int, int, int, int], *, transposed: bool = False
) -> Operand | OperandInUnits | None:
    """A mask or a bias as kernels take it, broadcast to the shape of the scores; `transposed` for tiles of key rows."""
    if tensor is None:
        return None
    tensor = tensor.expand(scores)
    tensor = tensor.transpose(2, 3) if transposed else tensor
    return operand(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor)


def span_operand(start: Tensor, end: Tensor, key_mask: Tensor | None, gap_count: Tensor | None) -> SpanOperand:
    """Spans as kernels take them. Broadcast dimensions get stride 0."""
    (start_b, start_m), (end_b, end_m) = (
        [0 if size == 1 else stride for size, stride in zip(bound.shape, bound.stride(), strict=True)]
        for bound in (start, end)
    )
    strides = (start_b, start_m, end_b, end_m)
    if key_mask is None or gap_count is None:
        return SpanOperand(start, end, *strides, None, 0, None, 0)
    key_mask = key_mask.contiguous()
    key_mask_stride = 0 if key_mask.shape[0] == 1 else key_mask.stride(0)
    gap_stride = 0 if gap_count.shape[0] == 1 else gap_count.stride(0)
    return SpanOperand(start, end, *strides, key_mask.view(torch.uint8), key_mask_stride, gap_count, gap_stride)


def tile_descriptor(tensor: Tensor, rows: int) -> TensorDescriptor | None:
    """What the hardware needs to copy tiles of `rows` tokens of `[batch, heads, tokens, dim]`; None if it cannot."""
    if not copied_by_hardware(tensor):
        return None
    block = [1, 1, rows, padded_dim(tensor.shape[3])]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def copied_by_hardware(tensor: Tensor) -> bool:
    """Whether TMA copies tiles of a tensor: rows without gaps, whose addresses are multiples of 16 bytes.

    CUDA C++ Programming Guide, tensor maps.
    """
    strides, size = tensor.stride(), tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in strides[:3])
    return aligned and strides[3] == 1 and 0 not in strides and tensor.numel() > 0


def dropout_operand(seed: Tensor | None, dropout_p: float) -> DropoutOperand | None:
    """Dropout as kernels take it; None where there is none."""
    return None if seed is None else DropoutOperand(seed, *threshold_and_scale(dropout_p))
