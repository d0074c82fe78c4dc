# SPDX-License-Identifier: Apache-2.0
"""Whether a model was asked for its attention weights, which it does not always tell its attention function."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from . import sources
from .support import log_once, refuse_absent_weights

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # a release that collects outputs in another way: arguments and configurations still tell
    _active_collector = None  # type: ignore[assignment]


class AbsentWeights:
    """Stands in place of weights where a model may have been asked for them without saying so here.

    Computing with it is an error that says what to do, where None would look like an answer.
    """

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        refuse_absent_weights()

    def _refuse(self, *args: Any) -> NoReturn:
        refuse_absent_weights()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = __truediv__ = _refuse
    __rtruediv__ = __pow__ = __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __getitem__ = __iter__ = __len__ = __bool__ = __int__ = __float__ = __array__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        refuse_absent_weights()

    def __repr__(self) -> str:
        return "AbsentWeights()"


def weights_wanted(module: torch.nn.Module, output_attentions: bool | None) -> bool:
    """Whether a model's caller has asked for attention weights, by an argument or in the configuration.

    Args:
        module: the attention layer.
        output_attentions: what reached the attention function. False is no answer: some layers pass their own default.
    """
    if torch.compiler.is_compiling():
        return bool(output_attentions) or _collected_around_compiler(module)
    wanted = bool(output_attentions) or _collects_attentions() or _set_where_it_counts(module)
    if wanted:
        log_once(
            "attention weights were asked for: each layer writes down [batch, num_heads, query_len, key_len] numbers, "
            "so that memory grows with the square of the tokens"
        )
    return wanted


def absent_weights(module: torch.nn.Module, output_attentions: bool | None) -> AbsentWeights | None:
    """What to return in place of weights that nobody seems to want: None, where that can be known."""
    if output_attentions is None and not torch.compiler.is_compiling() and _gathers_by_hand(module):
        return AbsentWeights()
    return None


def _collects_attentions() -> bool:
    """Whether transformers' hooks, which read the weights off the layers' outputs, are waiting for them."""
    collector = None if _active_collector is None else _active_collector.get()
    return collector is not None and any(key.endswith("attentions") for key in collector)


def _collected_around_compiler(module: torch.nn.Module) -> bool:
    """The same where a compiler traces: what was set outside of a part of a model that is compiled cannot be traced."""
    if _active_collector is None or _active_collector.compiling:
        return _collects_attentions()
    return bool(module._forward_hooks) and torch.compiler.disable(_collects_attentions)()  # nor can the hooks


def _gathers_by_hand(module: torch.nn.Module) -> bool:
    return sources.gathers_weights_by_hand(type(module).__module__)


def _set_where_it_counts(module: torch.nn.Module) -> bool:
    """Whether the configuration asks for weights in a model that hands them out itself."""
    if not _gathers_by_hand(module):
        return False
    return bool(getattr(getattr(module, "config", None), "output_attentions", False))
