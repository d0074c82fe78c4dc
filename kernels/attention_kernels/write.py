# SPDX-License-Identifier: Apache-2.0
"""Writing new keys or values into the pages of a cache."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, launch, launching_on
from .quantised import largest, quantise
from .tiles import settle_keys

MOST_NUMBERS = 2048
"""Of a program: as many as four warps write 16 bytes each of, in 16 bits, twice."""


@triton.jit
def write_kernel(
    new_ptr, new_stride_t, new_stride_h, new_stride_n, pages_ptr, page_stride, row_stride, head_stride, column_stride,
    scale_ptr, scale_stride_page, scale_stride_row, scale_stride_head, slots_ptr, page_size, num_heads, most,
    DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Write one token of HEADS heads to its slot; the grid is (tokens, heads / HEADS).

    ROUND: whether numbers become integers.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        page, row = slot // page_size, slot % page_size
        h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        columns = tl.arange(0, BLOCK_D)
        inside = (h < num_heads)[:, None] & (columns < DIM)[None, :]
        h, columns = h.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
        place = token * new_stride_t + h * new_stride_h + columns * new_stride_n
        numbers = tl.load(new_ptr + place, mask=inside, other=0.0)
        if scale_ptr is not None:
            place = page * scale_stride_page + row * scale_stride_row + h * scale_stride_head
            scale = tl.load(scale_ptr + place, mask=h < num_heads, other=1.0)
            numbers = tl.div_rn(numbers.to(tl.float32), scale.to(tl.float32))
            numbers = tl.clamp(numbers, -most, most, propagate_nan=tl.PropagateNan.ALL)
            if ROUND:
                # To the nearest, ties to even, as torch rounds: 1.5 * 2^23 leaves float32 no digits after the point.
                numbers = (numbers + 12582912.0) - 12582912.0
        place = page * page_stride + row * row_stride + h * head_stride + columns * column_stride
        tl.store(pages_ptr + place, numbers.to(pages_ptr.dtype.element_ty), mask=inside)


def write(new: Tensor, pages: Tensor, scale: Tensor | None, slots: Tensor) -> None:
    """Launch the kernel on validated arguments (`cache.write_cache` says what they are), for keys or for values."""
    tokens, heads, _ = new.shape
    if not new.numel():
        return
    if INTERPRETED and scale is not None:
        # The interpreter can neither compute in bf16 nor round to float8: only where rows go is left to it.
        page, row = (part(slots.clamp(min=0), pages.shape[1]) for part in (torch.floor_divide, torch.remainder))
        rows = quantise(new.float() / scale.expand(pages.shape[:3])[page, row][..., None].float(), pages.dtype)
        new, pages, scale = rows.view(torch.int8), pages.view(torch.int8), None
    arguments = write_arguments(new, pages, scale, slots)
    with launching_on(new):
        launch(write_kernel, (tokens, triton.cdiv(heads, arguments["HEADS"])), arguments)


def write_arguments(new: Tensor, pages: Tensor, scale: Tensor | None, slots: Tensor) -> dict[str, Any]:
    """Everything `write_kernel` is called with but its grid; compiling ahead of time takes the same."""
    _, heads, dim = new.shape
    block_d = triton.next_power_of_2(dim)
    new_t, new_h, new_n = new.stride()
    of_page, of_row, of_head, of_column = pages.stride()
    scale_page, scale_row, scale_head = (0, 0, 0) if scale is None else scale.expand(pages.shape[:3]).stride()
    return dict(
        new_ptr=new, new_stride_t=new_t, new_stride_h=new_h, new_stride_n=new_n, pages_ptr=pages, page_stride=of_page,
        row_stride=of_row, head_stride=of_head, column_stride=of_column, scale_ptr=scale,
        scale_stride_page=scale_page, scale_stride_row=scale_row, scale_stride_head=scale_head, slots_ptr=slots,
        page_size=pages.shape[1], num_heads=heads, most=largest(pages.dtype), DIM=dim,
        HEADS=min(triton.next_power_of_2(heads), max(1, MOST_NUMBERS // block_d)), BLOCK_D=block_d,
        ROUND=pages.dtype == torch.int8,
    )  # fmt: skip


settle_keys(globals())
