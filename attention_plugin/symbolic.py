# SPDX-License-Identifier: Apache-2.0
"""Reading a mask function while torch.compile traces it, where nobody can look into its closure.

The function is run once on symbols in place of the indices of batch, query and key. What comes back is an expression,
such as `key > query - 5`, and is compared with the expressions that transformers' own functions give with their
arguments left open. So the same functions are recognised as by their code, with the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

FACTORIES: dict[str, dict[str, type | tuple[type, ...]]] = {
    "sliding_window_overlay": {"sliding_window": (int, torch.SymInt)},
    "sliding_window_bidirectional_overlay": {"sliding_window": (int, torch.SymInt)},
    "chunked_overlay": {"chunk_size": (int, torch.SymInt), "left_padding": Tensor},
    "blockwise_overlay": {"block_sequence_ids": Tensor},
    "packed_sequence_mask_function": {"packed_sequence_mask": Tensor},
}
"""What makes mask functions in `masking_utils`, with its arguments; older releases of transformers lack some."""


@dataclass(frozen=True, eq=False)
class Recognised:
    """A mask function of transformers: the name of its factory, and what its closure holds by name."""

    factory: str
    cells: dict[str, Any]


class Unreadable(Exception):
    """A mask function did with an index what no expression here can say."""


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: Expression(name, self, *others)


class Expression:
    """An operation and its operands; operators make larger expressions, everything else is `Unreadable`."""

    __hash__ = object.__hash__

    def __init__(self, operation: str, *operands: Any) -> None:
        self.operation = operation
        self.operands = operands

    __add__, __sub__, __mul__, __floordiv__, __mod__ = map(_operator, ("+", "-", "*", "//", "%"))
    __lt__, __le__, __gt__, __ge__, __ne__ = map(_operator, ("<", "<=", ">", ">=", "!="))
    __and__, __or__, __xor__, __invert__, __neg__, __abs__ = map(_operator, ("&", "|", "^", "~", "negative", "abs"))
    __getitem__ = _operator("item")

    def __eq__(self, other: object) -> Any:
        return Expression("==", self, other)

    device = None

    def new_ones(self, *args: Any, **kwargs: Any) -> Expression:
        """What `and_masks` begins with."""
        return Expression("true")

    def new_zeros(self, *args: Any, **kwargs: Any) -> Expression:
        """What `or_masks` begins with."""
        return Expression("false")

    def to(self, *args: Any, **kwargs: Any) -> Expression:
        """Expressions have no device."""
        return self

    def _refuse(self, *args: Any) -> NoReturn:
        raise Unreadable

    __radd__ = __rsub__ = __rmul__ = __rfloordiv__ = __rmod__ = __truediv__ = __rtruediv__ = _refuse
    __pow__ = __rpow__ = __rand__ = __ror__ = __rxor__ = __matmul__ = __rmatmul__ = __lshift__ = __rshift__ = _refuse
    __bool__ = __int__ = __float__ = __index__ = __len__ = __iter__ = __contains__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        raise Unreadable

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise Unreadable


class _ItemsOfTensors(TorchFunctionMode):
    """Makes an expression of a tensor that is indexed with symbols."""

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.__getitem__:
            return Expression("item", *args)
        raise Unreadable


def recognise(mask_function: Callable) -> Callable | Recognised | None:
    """transformers' mask function that this one is equal to, or None for a function that is not known.

    Compositions are `Recognised` with the names of their factories, `and_masks` and `or_masks`.
    """
    batch, query, key = (Expression(name) for name in ("batch", "query", "key"))
    try:
        with _ItemsOfTensors():
            expression = mask_function(batch, Expression("head"), query, key)
    except Unreadable:
        return None
    return _read(expression, _templates(batch))


def _templates(batch: Expression) -> list[tuple[Callable | str, Any]]:
    """Functions and factories of `masking_utils`, each with its expression. What may differ is "open" and named."""
    # Any, since transformers declares indices as int and passes tensors.
    query: Any = Expression("open", "query")
    key: Any = Expression("open", "key")
    indices: tuple[Any, ...] = (batch, None, query, key)
    templates: list[tuple[Callable | str, Any]] = [
        (function, function(*indices))
        for function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    ]
    for name, arguments in FACTORIES.items():
        factory = getattr(masking_utils, name, None)
        if factory is not None:
            function = factory(*[Expression("open", argument) for argument in arguments])
            templates.append((name, function(*indices)))
    return templates


def _read(expression: Any, templates: list[tuple[Callable | str, Any]]) -> Callable | Recognised | None:
    if not isinstance(expression, Expression):
        return None
    for known, template in templates:
        found: dict[str, Any] = {}
        if _matches(template, expression, found):
            return _at_positions(known, found)
    for operation, factory, neutral in (("&", "and_masks", "true"), ("|", "or_masks", "false")):
        if expression.operation == operation:
            operands = [part for part in _flat(expression, operation) if getattr(part, "operation", None) != neutral]
            parts = [_read(part, templates) for part in operands]
            return None if any(part is None for part in parts) else Recognised(factory, {"mask_functions": parts})
    return None


def _flat(expression: Any, operation: str) -> list[Any]:
    """Operands of a chain of one operation."""
    if not isinstance(expression, Expression) or expression.operation != operation:
        return [expression]
    return [part for operand in expression.operands for part in _flat(operand, operation)]


def _at_positions(known: Callable | str, found: dict[str, Any]) -> Callable | Recognised | None:
    """The function known by a match, which may be over positions that a tensor gives for each token."""
    indices = {name: found.pop(name) for name in ("query", "key") if name in found}
    function: Callable | Recognised
    if isinstance(known, str):
        if not all(isinstance(found[name], kind) for name, kind in FACTORIES[known].items()):
            return None
        function = Recognised(known, found)
    else:
        function = known
    if all(_matches(Expression(name), index, {}) for name, index in indices.items()):
        return function
    remapping: dict[str, Any] = {}
    for name, index in indices.items():
        template = Expression("item", Expression("open", "position_ids"), (Expression("batch"), Expression(name)))
        if not _matches(template, index, remapping):
            return None
    if not isinstance(remapping["position_ids"], Tensor):
        return None
    return Recognised("remap_positions_for_packed_sequence", {"mask_function": function, **remapping})


def _matches(template: Any, value: Any, found: dict[str, Any]) -> bool:
    """Whether a value has the form of a template; what its open places stand for is written to `found`."""
    if isinstance(template, Expression):
        if template.operation == "open":
            name = template.operands[0]
            if name in found:
                return _matches(found[name], value, found)
            found[name] = value
            return True
        return (
            isinstance(value, Expression)
            and template.operation == value.operation
            and _matches(template.operands, value.operands, found)
        )
    if isinstance(template, tuple):
        return (
            isinstance(value, tuple)
            and len(template) == len(value)
            and all(_matches(part, other, found) for part, other in zip(template, value, strict=True))
        )
    if isinstance(template, Tensor):
        return template is value
    return not isinstance(value, (Expression, Tensor, tuple)) and template == value
