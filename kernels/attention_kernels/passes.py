# SPDX-License-Identifier: Apache-2.0
"""One forward or backward pass of a checked call, by whichever path serves it.

    forward         on the torch path `blockwise.forward`; else `launch_forward`, whose launches `prebound` remembers
    launch_forward  the kernel for few queries (`decode`), the Gluon kernel (`hopper`) or the Triton kernel (`forward`)
    backward        on the torch path `blockwise.backward`; else `launch_backward`, remembered likewise
    launch_backward the kernels of `backward`

Launchers are imported where they are needed: importing Triton takes time.
"""

from __future__ import annotations

from torch import Tensor

from . import blockwise, hopper, prebound
from .arguments import Arguments, Returned, Wanted
from .configs import SHORT
from .paths import log_once, runs_triton


def forward(
    arguments: Arguments, trains: bool, num_splits: int | None, known_spans: prebound.KnownSpans | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and, for 16-bit gradients, what the output lost when it was rounded (else empty).

    Args:
        arguments: of the call.
        trains: whether gradients follow.
        num_splits: as in `operators.attention`.
        known_spans: what `prebound` knows of the spans, if it knows them; else they are described here.
    """
    if not runs_triton(arguments.query):
        problem = blockwise.Problem.of(arguments, trains=trains, fixed_splits=num_splits is not None)
        return blockwise.forward(problem)

    def launch() -> tuple[Tensor, Tensor, Tensor]:
        return launch_forward(arguments, trains, num_splits)

    asked = forward_asked(arguments.scale, arguments.softcap, arguments.dropout_p, trains, num_splits)
    known_spans = known_spans or prebound.describe_spans(*arguments.spans)
    output, lse, rounding = prebound.launched(launch, known_spans, arguments.beside_spans, asked)
    assert output is not None and lse is not None
    return output, lse, arguments.query.new_empty(0) if rounding is None else rounding


def forward_asked(scale: float, softcap: float | None, dropout_p: float, trains: bool, num_splits: int | None) -> tuple:
    """What decides, beside its tensors, which kernels a forward pass launches: its kind, for `prebound`."""
    return "forward", scale, softcap, dropout_p, trains, num_splits, hopper.wanted()


def launch_forward(arguments: Arguments, trains: bool, num_splits: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward`, by whichever of the kernels serves a call."""
    query = arguments.query
    if query.shape[2] <= SHORT and not trains and arguments.dropout_seed is None:
        from .decode import decode

        output, lse = decode(
            query, arguments.key, arguments.value, *arguments.spans, arguments.mask, arguments.bias, arguments.sinks,
            scale=arguments.scale, softcap=arguments.softcap, num_splits=num_splits,
        )  # fmt: skip
        return output, lse, query.new_empty(0)
    wants_rounding = has_rounding(query, trains)
    gluon_wanted = hopper.wanted()
    if gluon_wanted or (gluon_wanted is None and hopper.is_proven(query.device, query.dtype, query.shape[3])):
        from .hopper import launching as gluon

        reason = gluon.unserved(arguments)
        if reason is None:
            return gluon.forward(arguments, wants_rounding=wants_rounding)
        if gluon_wanted:
            log_once(f"the Gluon kernel leaves calls to the Triton kernel: {reason}")
    from .forward import forward as triton_forward

    return triton_forward(arguments, wants_rounding=wants_rounding)


def has_rounding(query: Tensor, trains: bool) -> bool:
    """Whether the forward pass keeps what rounding took from its output: the backward pass adds it again."""
    return trains and query.dtype.itemsize == 2


def backward(
    returned: Returned, wanted: Wanted, arguments: Arguments, known_spans: prebound.KnownSpans | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias and sinks; None where not wanted.

    Args:
        returned: what `forward` returned, and the gradients of it.
        wanted: which gradients.
        arguments: of the call.
        known_spans: as for `forward`.
    """
    if runs_triton(arguments.query):
        return launch_backward(returned, wanted, arguments, known_spans)
    problem = blockwise.Problem.of(arguments, trains=True)
    return blockwise.backward(problem, *returned, *wanted)


def launch_backward(
    returned: Returned, wanted: Wanted, arguments: Arguments, known_spans: prebound.KnownSpans | None
) -> tuple[Tensor | None, ...]:
    """As `backward`, by the kernels."""
    from . import backward as kernels

    # A sum's gradient, for example, has strides of 0: slow to read column by column.
    if returned.grad_output.stride(-1) != 1:
        returned = returned._replace(grad_output=returned.grad_output.contiguous())

    def launch() -> kernels.Gradients:
        return kernels.backward(returned, wanted, arguments)

    inputs = *arguments.beside_spans, *returned
    # The sinks' gradient follows from what the kernels give in any case.
    asked = ("backward", *wanted[:3], arguments.scale, arguments.softcap, arguments.dropout_p)
    if known_spans is None or not known_spans.are(*arguments.spans):
        known_spans = prebound.describe_spans(*arguments.spans)
    found = kernels.Gradients(*prebound.launched(launch, known_spans, inputs, asked))
    bias, sinks = arguments.bias, arguments.sinks
    return (
        *found[:3],
        None if bias is None or found.bias is None else kernels.whole_bias_gradient(found.bias, bias),
        kernels.sink_gradient(sinks, found.lse2, found.delta) if wanted.sinks and sinks is not None else None,
    )
