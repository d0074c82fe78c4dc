# SPDX-License-Identifier: Apache-2.0
"""Where keys and values live while a model generates: in pages behind a block table, plain or quantised.

Contiguous caches need nothing of this: `attention` takes them as they are, and reads no key outside of the spans. Pages
are those of PagedAttention (Kwon et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from . import prebound
from .checks import check_tensors, is_one_or
from .configs import unsupported_dtype
from .paths import runs_triton
from .quantised import QUANTISED, quantise


@dataclass(frozen=True, eq=False)
class PagedCache:
    """Keys and values of several sequences, in pages of equal size that may lie, and be shared, in any order.

    Attributes:
        key: `[pages, page_size, num_kv_heads, head_dim]`, of the queries' dtype, or float8_e4m3fn, float8_e5m2 or int8.
        value: `[pages, page_size, num_kv_heads, value_dim]`, of the key's dtype. Any strides.
        block_table: int32 `[batch, pages of the longest sequence]`; entry `j` is the page of the tokens from
            `j * page_size` on. Entries beyond a sequence's length are not read.
        seq_lens: int32 `[batch]`, number of tokens of each sequence, those of the current queries included.
        key_scale, value_scale: what quantised numbers are multiplied by, floating point, broadcastable to
            `[pages, page_size, num_kv_heads]`: one number, one for each head, or one for each token and head.

    Raises:
        ValueError, TypeError: an attribute breaks a rule above.
    """

    key: Tensor
    value: Tensor
    block_table: Tensor
    seq_lens: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def __post_init__(self) -> None:
        scales = {"key_scale": self.key_scale, "value_scale": self.value_scale}
        needed = {"key": self.key, "value": self.value, "block_table": self.block_table, "seq_lens": self.seq_lens}
        check_tensors("PagedCache", needed | {name: each for name, each in scales.items() if each is not None})
        if self.key.ndim != 4 or self.value.ndim != 4 or self.value.shape[:3] != self.key.shape[:3]:
            raise ValueError(
                "PagedCache: `key` and `value` must be [pages, page_size, num_kv_heads, dim] with equal first three "
                f"sizes, got {list(self.key.shape)} and {list(self.value.shape)}; take both from one allocation"
            )
        pages, page_size, num_kv_heads = self.key.shape[:3]
        if not page_size:
            raise ValueError("PagedCache: a page must hold at least one token, got 0; see page_size")
        if not num_kv_heads:
            raise ValueError("PagedCache: `key` and `value` must have at least one head, got 0; see num_kv_heads")
        if self.key.dtype != self.value.dtype:
            raise TypeError(
                f"PagedCache: `key` and `value` must share a dtype, got {self.key.dtype}, {self.value.dtype}; cast one"
            )
        for name, tensor, ndim in (("block_table", self.block_table, 2), ("seq_lens", self.seq_lens, 1)):
            if tensor.dtype != torch.int32 or tensor.ndim != ndim:
                raise ValueError(
                    f"PagedCache: `{name}` must be int32 with {ndim} dimensions, got {tensor.dtype} "
                    f"{list(tensor.shape)}; convert it with `.to(torch.int32)`"
                )
        if len(self.block_table) != len(self.seq_lens):
            raise ValueError(
                "PagedCache: `block_table` and `seq_lens` must have a row and a number for each sequence, got "
                f"{len(self.block_table)} and {len(self.seq_lens)}; leave out what belongs to no sequence"
            )
        for name, scale in scales.items():
            if (scale is not None) != self.quantised:
                raise ValueError(
                    f"PagedCache: `{name}` belongs to quantised keys and values ({[str(d) for d in QUANTISED]}), and "
                    f"to them only; got {'one' if scale is not None else 'none'} for {self.key.dtype}"
                )
            rows = (pages, page_size, num_kv_heads)
            if scale is not None and not _broadcasts(scale.shape, rows):
                raise ValueError(
                    f"PagedCache: `{name}` must broadcast to [pages, page_size, num_kv_heads] = {list(rows)}, got "
                    f"{list(scale.shape)}; give one number, one for each head, or one for each token and head"
                )
        tensors = self.key, self.value, self.block_table, self.seq_lens, self.key_scale, self.value_scale
        if len({each.device for each in tensors if each is not None}) > 1:
            names = (each.name for each in fields(self))
            where = [
                f"`{name}` on {each.device}" for name, each in zip(names, tensors, strict=True) if each is not None
            ]
            raise ValueError(f"PagedCache: all tensors must be on one device, got {', '.join(where)}; move them to one")

    @property
    def quantised(self) -> bool:
        """Whether keys and values are quantised."""
        return self.key.dtype in QUANTISED

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[1]

    @property
    def key_len(self) -> int:
        """Tokens that the block table has room for."""
        return self.block_table.shape[1] * self.page_size

    def check(self) -> None:
        """Look at the block table and the lengths, which on a GPU is a synchronisation.

        Raises:
            IndexError: an entry that a sequence needs is not the number of a page, or a length exceeds the table.
        """
        pages = self.key.shape[0]
        lengths = self.seq_lens[:, None]
        needed = torch.arange(self.block_table.shape[1], device=lengths.device)[None] * self.page_size < lengths
        wrong = needed & ((self.block_table < 0) | (self.block_table >= pages))
        if wrong.any():
            sequence, entry = wrong.nonzero()[0].tolist()
            raise IndexError(
                f"PagedCache: `block_table`[{sequence}, {entry}] = {int(self.block_table[sequence, entry])} is needed "
                f"by {int(self.seq_lens[sequence])} tokens and must be 0 to {pages - 1}; write the page's number there"
            )
        if ((self.seq_lens < 0) | (self.seq_lens > self.key_len)).any():
            raise IndexError(
                f"PagedCache: `seq_lens` must be 0 to {self.key_len} (pages of the block table times page size), got "
                f"{self.seq_lens.tolist()}; widen the block table"
            )

    def take(self, pages: Tensor, dtype: torch.dtype, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """A copy of some pages, dequantised: keys and values `[len(pages), page_size, num_kv_heads, dim]` of `dtype`.

        Args:
            pages: int64 `[n]`, their numbers.
            out: where to copy keys and values to, of the cache's dtype.
        """

        def taken(tensor: Tensor, scale: Tensor | None, out: Tensor | None) -> Tensor:
            copy = torch.index_select(tensor, 0, pages, out=out)
            if scale is not None:
                copy = copy.float() * scale.expand(tensor.shape[:3]).index_select(0, pages)[..., None].float()
            return copy.to(dtype)

        key, value = (None, None) if out is None else out
        return taken(self.key, self.key_scale, key), taken(self.value, self.value_scale, value)

    def gather(self, sequence: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence, dequantised: `[1, num_kv_heads, seq_len, dim]` of `dtype`."""
        length = int(self.seq_lens[sequence])
        pages = self.block_table[sequence, : -(-length // self.page_size)].long()
        key, value = (taken.flatten(0, 1)[:length].transpose(0, 1)[None] for taken in self.take(pages, dtype))
        return key, value


def write_cache(key: Tensor, value: Tensor, cache: PagedCache, slots: Tensor) -> None:
    """Put new keys and values into pages, quantised on the way where the cache is.

    Args:
        key: `[tokens, num_kv_heads, head_dim]`.
        value: `[tokens, num_kv_heads, value_dim]`.
        cache: whose `key` and `value` are written. Scales are not: they must be set before.
        slots: int64 or int32 `[tokens]`, `page * page_size + place in the page`; a negative slot is left out (padding).
            Slots that come twice, or beyond the pages, are undefined behaviour.

    Raises:
        ValueError: shapes or devices do not fit, or slots are no integers.
        TypeError: an argument is no tensor or no cache, or the GPU has not the dtype of the cache.
    """
    check_tensors("write_cache", {"key": key, "value": value, "slots": slots})
    check_is_cache("write_cache", cache)
    if slots.dtype not in (torch.int64, torch.int32) or slots.ndim != 1:
        raise ValueError(
            f"write_cache: `slots` must be int64 or int32 [tokens], got {slots.dtype} {list(slots.shape)}; a slot is "
            "`page * page_size + place in the page`"
        )
    for name, new, old in (("key", key, cache.key), ("value", value, cache.value)):
        if new.shape != (slots.numel(), *old.shape[2:]):
            raise ValueError(
                f"write_cache: `{name}` must be [tokens, num_kv_heads, dim] = {[slots.numel(), *old.shape[2:]]} for "
                f"{slots.numel()} slots and this cache, got {list(new.shape)}; give each token a slot of its own"
            )
    check_on_its_device("write_cache", cache, {"key": key, "value": value, "slots": slots})
    if runs_triton(key):
        from .write import write  # not before it is needed: importing Triton takes time

        if (reason := unsupported_dtype(key.device, cache.key.dtype)) is not None:
            raise TypeError(f"write_cache: {reason}")
        slots = slots.contiguous()
        for new, old, scale in ((key, cache.key, cache.key_scale), (value, cache.value, cache.value_scale)):
            inputs = new.resolve_neg(), old, scale, slots
            prebound.launched(partial(write, *inputs), prebound.NO_SPANS, inputs, ("write",))
        return
    _write_in_torch(key, value, cache, slots)


@torch.no_grad()  # or the cache would be part of every later pass's graph; kernels leave no trace in one
def _write_in_torch(key: Tensor, value: Tensor, cache: PagedCache, slots: Tensor) -> None:
    """`write_cache` without kernels."""
    kept = slots >= 0
    page, place = slots[kept].long() // cache.page_size, slots[kept].long() % cache.page_size
    for new, old, scale in ((key, cache.key, cache.key_scale), (value, cache.value, cache.value_scale)):
        rows = new[kept]
        if scale is not None:
            rows = quantise(rows.float() / scale.expand(old.shape[:3])[page, place][..., None].float(), old.dtype)
        old[page, place] = rows.to(old.dtype)


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of this shape can be expanded to the other."""
    own = (1,) * (len(to) - len(shape)) + tuple(shape)
    return len(own) == len(to) and all(map(is_one_or, own, to))


def check_is_cache(function: str, cache: object) -> None:
    """Refuse, in the name of the function that was called, what is no `PagedCache`."""
    if not isinstance(cache, PagedCache):
        raise TypeError(
            f"{function}: `cache` must be a PagedCache, got {type(cache).__name__}; keys and values that lie side by "
            "side belong to `attention`"
        )


def check_on_its_device(function: str, cache: PagedCache, given: dict[str, Tensor | None]) -> None:
    """Refuse tensors, by name, that are not where the cache is."""
    for name, each in given.items():
        if each is not None and each.device != cache.key.device:
            raise ValueError(
                f"{function}: `{name}` is on {each.device}, the cache on {cache.key.device}; move it there"
            )
