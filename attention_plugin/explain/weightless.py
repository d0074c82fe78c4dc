# SPDX-License-Identifier: Apache-2.0
"""Running a model whose weights do not exist.

Weights live on torch's meta device, which knows shapes and no values. The inputs are real. So whatever a model computes
from its inputs alone, masks and positions above all, keeps its values, and whatever depends on a weight has a shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

LARGEST = 1 << 24
"""Elements up to which tensors keep their values; larger ones have a shape only, so that memory stays bounded."""

META = torch.device("meta")

_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
_INDEXES = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)
_SIZED_BY_VALUES = (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default)


class Weightless(TorchDispatchMode):
    """Operations on real tensors and on tensors without values, mixed.

    Real tensors are made where a model asks for new tensors on the meta device, and stay real when they are moved
    there. An operation with a tensor without values among its operands gives one. A decision that hangs on values that
    do not exist is taken as if they were 0 (no expert is chosen, nothing is selected), and counted in `guesses`. Rows
    of an embedding that it does not have, such as those of positions beyond the learned ones, are an error as ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self.guesses = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation of torch."""
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if not any(tensor.is_meta for tensor in tensors):
            return self._on_values(function, args, kwargs, tensors)
        if function in _READS:
            self.guesses += 1
            return _zero_like(args[0])
        if function in _SIZED_BY_VALUES:
            self.guesses += 1
            shape = (0, args[0].ndim) if function is _SIZED_BY_VALUES[0] else (0,)
            return torch.empty(shape, dtype=torch.long if len(shape) == 2 else args[0].dtype, device=META)
        if function is torch.ops.aten.embedding.default:
            _check_rows(*args[:2])
        if function in _INDEXES:
            args = (args[0], self._as_places(args[1]), *args[2:])
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        args, kwargs = tree_map(_without_values, (args, kwargs))
        if function is torch.ops.aten._grouped_mm.default:  # the meta device wants it in bfloat16
            return function(*(_in_bfloat16(leaf) for leaf in args), **kwargs).to(args[0].dtype)
        return function(*args, **kwargs)

    def _on_values(self, function: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """An operation on real tensors, or one that makes a tensor: real, unless it would be too large."""
        on_meta = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta"
        if on_meta:
            kwargs["device"] = torch.device("cpu")
        elif not tensors:
            return function(*args, **kwargs)
        if _is_in_place(function) or not self._is_large(function, args, kwargs):
            return function(*args, **kwargs)
        if "device" in kwargs:
            kwargs["device"] = META
        return function(*tree_map(_without_values, args), **tree_map(_without_values, kwargs))

    def _is_large(self, function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the result would have too many elements, found out on the meta device."""
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": META}
        try:
            result = function(*tree_map(_without_values, args), **tree_map(_without_values, kwargs))
        except (RuntimeError, NotImplementedError):  # its size depends on values: it is no larger than its operands
            return False
        return any(isinstance(leaf, Tensor) and leaf.numel() > LARGEST for leaf in tree_flatten(result)[0])

    def _as_places(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Boolean indices as indices of places, of which there are none if they have no values."""
        places: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                places.append(index)
            elif index.is_meta:
                self.guesses += 1
                places += [torch.empty((0,), dtype=torch.long, device=META) for _ in range(index.ndim)]
            else:
                places += index.nonzero().unbind(1)
        return places


def _check_rows(table: Tensor, rows: Tensor) -> None:
    """Let an embedding refuse rows that it does not have, which the meta device does not.

    Raises:
        IndexError: the largest is beyond its end.
    """
    if _is_real(rows) and rows.numel() and (largest := int(rows.max())) >= len(table):
        raise IndexError(f"an embedding of {len(table)} rows is asked for row {largest}")


def _zero_like(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return False
    return 0.0 if tensor.is_floating_point() else 0


def _without_values(leaf: Any) -> Any:
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=META) if _is_real(leaf) else leaf


def _in_bfloat16(leaf: Any) -> Any:
    return leaf.to(torch.bfloat16) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_meta


def _is_in_place(function: Any) -> bool:
    return function._schema.is_mutable
