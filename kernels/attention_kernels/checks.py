# SPDX-License-Identifier: Apache-2.0
"""What arguments must be, where several functions ask for the same: each error is in the name of the one called."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_one_or(size: int, full: int) -> bool:
    """Whether a dimension can be expanded to `full`.

    Not as `size in (1, full)`: torch.compile takes a number for no member of a tuple that holds a symbolic size.
    """
    return size == 1 or size == full


def check_tensors(function: str, given: dict[str, Any]) -> None:
    """Refuse arguments, by name, that are no tensors with a number at every place."""
    for name, each in given.items():
        if not isinstance(each, Tensor):
            raise TypeError(f"{function}: `{name}` must be a tensor, got {type(each).__name__}; see torch.as_tensor")
        if each.layout != torch.strided or each.is_nested:
            kind = "a nested one" if each.is_nested else f"one of layout {each.layout}"
            raise TypeError(
                f"{function}: `{name}` must be a dense tensor, got {kind}; see Tensor.to_dense, and "
                "torch.nested.to_padded_tensor"
            )


def check_no_transform(function: str, *given: object) -> None:
    """Refuse what no kernel would carry through: transforms of `torch.func`, and tangents of forward differentiation.

    Raises:
        RuntimeError: one is active; compiled code does not tell for which of its tensors.
    """
    carries = torch._C._are_functorch_transforms_active()
    if forward_ad._current_level >= 0:
        # Not in a function of its own: a compiler would take that for one that knows no tangents.
        carries = carries or torch.compiler.is_compiling()
        for each in given:
            carries = carries or (isinstance(each, Tensor) and forward_ad.unpack_dual(each).tangent is not None)
    if carries:
        raise RuntimeError(
            f"{function}: transforms of torch.func (vmap, grad, jvp, ...) and forward differentiation are not served; "
            'use torch.autograd, and a dimension of the batch in place of vmap, or attn_implementation="eager"'
        )


def is_number(given: object) -> bool:
    """Whether that is a number: of Python, NumPy, or a tensor, or what torch.compile traces in the place of one."""
    if isinstance(given, Tensor):
        return given.numel() == 1 and not given.is_complex()
    return isinstance(given, (int, float, numbers.Real, torch.SymInt, torch.SymFloat))


def check_whole(function: str, name: str, given: object, *, or_tensor: bool = False) -> None:
    """Refuse what is no whole number; with `or_tensor` a tensor may hold several. What is traced is not looked at."""
    if type(given) is int or torch.compiler.is_compiling():
        return
    if isinstance(given, Tensor):
        if given.is_floating_point() or given.is_complex() or not (or_tensor or given.numel() == 1):
            raise TypeError(
                f"{function}: `{name}` must be {'integers' if or_tensor else 'a whole number'}, got {given.dtype} "
                f"{list(given.shape)}; see Tensor.long"
            )
        return
    try:
        operator.index(given)  # type: ignore[arg-type]
        whole = not isinstance(given, bool)
    except TypeError:
        whole = False
    if not whole:
        raise TypeError(f"{function}: `{name}` must be a whole number, got {given!r}; see int")


def check_numbers(function: str, scale: float | None, softcap: float | None, num_splits: int | None) -> None:
    """Refuse numbers that no attention has."""
    for name, given in (("scale", scale), ("softcap", softcap), ("num_splits", num_splits)):
        if given is not None and not is_number(given):
            raise TypeError(f"{function}: `{name}` must be a number, got {given!r}; pass None for the default")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{function}: `softcap` must be a positive number, got {softcap}; pass None for no softcap")
    for name, given in (("scale", scale), ("softcap", softcap)):
        if isinstance(given, Tensor) and given.requires_grad:
            raise ValueError(
                f"{function}: `{name}` must be a number, got a tensor that wants a gradient; detach it, or multiply "
                "`query` by a scale and pass 1.0"
            )
    # torch.compile may trace a number, which math.isfinite does not take.
    if scale is not None and not -math.inf < float(scale) < math.inf:
        raise ValueError(f"{function}: `scale` must be finite, got {float(scale)}; pass None for `head_dim ** -0.5`")
    if num_splits is not None and (num_splits < 1 or num_splits % 1):
        raise ValueError(
            f"{function}: `num_splits` must be whole and at least 1, got {num_splits}; pass None for the default"
        )


def check_dropout(function: str, dropout_p: float) -> None:
    """Refuse what is no probability."""
    if not is_number(dropout_p) or not 0 <= dropout_p <= 1:
        raise ValueError(f"{function}: `dropout_p` must be 0 to 1, got {dropout_p!r}; it is the share that is dropped")


def check_sinks(function: str, sinks: Tensor | None, query: Tensor) -> None:
    """Refuse sinks that do not belong to the heads of `query`."""
    if sinks is None:
        return
    check_tensors(function, {"sinks": sinks})
    num_heads = query.shape[1]
    if sinks.shape != (num_heads,) or not sinks.is_floating_point():
        raise ValueError(
            f"{function}: `sinks` must be floating point of shape [num_heads] = [{num_heads}], got {sinks.dtype} "
            f"{list(sinks.shape)}; sinks that differ between tokens belong in `bias`"
        )
    if sinks.device != query.device:
        raise ValueError(f"{function}: `sinks` is on {sinks.device}, `query` on {query.device}; move it there")


def on_scores(function: str, name: str, tensor: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask or a bias with four dimensions, or an error if it does not broadcast to the shape of the scores."""
    if tensor is None:
        return None
    check_tensors(function, {name: tensor})
    if (tensor.dtype == torch.bool) != (name == "mask") or (name == "bias" and not tensor.is_floating_point()):
        raise TypeError(
            f"{function}: `mask` must be bool (True where visible) and `bias` floating point (added to the scores), "
            f"got `{name}` of {tensor.dtype}; convert it, or pass it as the other"
        )
    scores, shape = (*query.shape[:3], key.shape[2]), (1,) * (4 - tensor.ndim) + tuple(tensor.shape)
    if len(shape) != 4 or not all(map(is_one_or, shape, scores)):
        raise ValueError(
            f"{function}: `{name}` of shape {list(tensor.shape)} does not broadcast to [batch, num_heads, query_len, "
            f"key_len] = {list(scores)}; slice or expand it"
        )
    if tensor.device != query.device:
        raise ValueError(f"{function}: `{name}` is on {tensor.device}, `query` on {query.device}; move it there")
    return tensor.reshape(shape)
