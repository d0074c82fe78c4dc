# SPDX-License-Identifier: Apache-2.0
"""The arguments of a call that has passed its checks, in the one order in which all who take them do.

`operators` makes them; `torch.library`, the passes and the launchers hand them on.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .spans import Spans


class Arguments(NamedTuple):
    """One call of `operators.attention`, which says what they are; masks and biases are four-dimensional.

    The spans come as their tensors, and what has a default comes with a value.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    start: Tensor
    end: Tensor
    key_mask: Tensor | None
    gap_count: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    dropout_seed: Tensor | None
    scale: float
    softcap: float | None
    dropout_p: float

    @property
    def spans(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The tensors that spans are made of."""
        return self.start, self.end, self.key_mask, self.gap_count

    @property
    def beside_spans(self) -> tuple[Tensor | None, ...]:
        """The other tensors, in the order by which `prebound` knows them."""
        return self.query, self.key, self.value, self.sinks, self.dropout_seed, self.mask, self.bias


class Returned(NamedTuple):
    """What a forward pass returned, and the gradients of it: what its backward pass begins with.

    Attributes:
        output, lse: as `operators.attention` returns them.
        rounding: what the output lost when it was rounded to 16 bits, of its shape, or empty.
        grad_output: gradient of the output, of its shape; any strides.
        grad_lse: gradient of the log-sum-exp; None where nothing depends on it.
    """

    output: Tensor
    lse: Tensor
    rounding: Tensor
    grad_output: Tensor
    grad_lse: Tensor | None


class Wanted(NamedTuple):
    """Of which inputs the backward pass is to give gradients."""

    query: bool
    key_value: bool
    bias: bool
    sinks: bool


ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor start, Tensor end, Tensor? key_mask, Tensor? gap_count, "
    "Tensor? mask, Tensor? bias, Tensor? sinks, Tensor? dropout_seed, float scale, float? softcap, float dropout_p"
)
"""`Arguments` in the words of `torch.library`."""

RETURNED = "Tensor output, Tensor lse, Tensor rounding, Tensor grad_output, Tensor? grad_lse"
"""`Returned`, likewise."""

WANTED = "bool wants_query, bool wants_key_value, bool wants_bias, bool wants_sinks"
"""`Wanted`, likewise."""


def arguments_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Arguments:
    """The arguments of a checked call. A `scale` of None is `head_dim ** -0.5`."""
    return Arguments(
        query, key, value, spans.start, spans.end, spans.key_mask, spans.gap_count, mask, bias, sinks, dropout_seed,
        query.shape[-1] ** -0.5 if scale is None else float(scale), None if softcap is None else float(softcap),
        float(dropout_p),
    )  # fmt: skip
