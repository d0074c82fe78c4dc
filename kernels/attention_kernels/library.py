# SPDX-License-Identifier: Apache-2.0
"""Registering the operators with `torch.library`, and their gradients.

Compilers and dispatch modes see the operators `attention_kernels::forward` and `attention_kernels::backward`. Where
nothing but autograd looks at a call, `Attention` does without them: what a registration does at each call takes longer
than everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import blockwise, passes
from .arguments import ARGUMENTS, RETURNED, WANTED, Arguments, Returned, Wanted

_library = torch.library.Library("attention_kernels", "DEF")
_library.define(f"forward({ARGUMENTS}, bool wants_gradient, int? num_splits) -> (Tensor, Tensor, Tensor)")
_library.define(f"backward({RETURNED}, {WANTED}, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


def are_real(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary tensors: none is fake, of a subclass, without storage, or a lazy negation (`is_neg`)."""
    return all(
        tensor is None or (type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta and not tensor.is_neg())
        for tensor in tensors
    )


# ---------------------------------------------------------------------- the operators


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`passes.forward`; the inputs are `Arguments`, wants_gradient and num_splits."""
    *arguments, trains, num_splits = inputs
    return passes.forward(Arguments(*arguments), trains, num_splits)


def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors in the shapes, dtypes and strides of what `_forward` returns."""
    query, _, value, *_, trains, _ = inputs
    batch, num_heads, query_len, _ = query.shape
    output = query.new_empty(batch, query_len, num_heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, num_heads, query_len, dtype=blockwise.accumulator(query.dtype))
    return output, lse, torch.empty_like(output) if passes.has_rounding(query, trains) else query.new_empty(0)


def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    """`passes.backward`, empty where a gradient is not wanted; the inputs are `Returned`, `Wanted` and `Arguments`."""
    gradients = passes.backward(*_parts_of(inputs))
    return tuple(inputs[0].new_empty(0) if gradient is None else gradient for gradient in gradients)


def _backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    """Empty tensors in the shapes, dtypes and strides of what `_backward` returns."""
    (output, *_), wanted, given = _parts_of(inputs)
    return (
        _empty_token_major(given.query) if wanted.query else output.new_empty(0),
        *(_empty_token_major(each) if wanted.key_value else output.new_empty(0) for each in (given.key, given.value)),
        _empty_like(given.bias) if wanted.bias else output.new_empty(0),
        _empty_like(given.sinks) if wanted.sinks else output.new_empty(0),
    )


def _parts_of(inputs: tuple[Any, ...]) -> tuple[Returned, Wanted, Arguments]:
    returned = len(Returned._fields)
    wanted = returned + len(Wanted._fields)
    return Returned(*inputs[:returned]), Wanted(*inputs[returned:wanted]), Arguments(*inputs[wanted:])


def _empty_token_major(tensor: Tensor) -> Tensor:
    """An empty tensor of the same shape that is stored token by token."""
    batch, heads, tokens, dim = tensor.shape
    return tensor.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _empty_like(tensor: Tensor | None) -> Tensor:
    """An empty, contiguous tensor of the same shape."""
    assert tensor is not None  # its gradient is wanted
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------- autograd

_DIFFERENTIABLE = [Arguments._fields.index(name) for name in ("query", "key", "value", "bias", "sinks")]
"""Where the inputs that have gradients stand, in the order of the gradients."""

ComputeGradients = Callable[[Returned, Wanted, Arguments], Iterable[Any]]
"""`passes.backward`, or the registered operator in its place."""


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep for the backward pass what `_gradients` reads; `inputs` are those of `_forward`."""
    ctx.set_materialize_grads(False)
    *tensors, ctx.scale, ctx.softcap, ctx.dropout_p, _, _ = inputs
    ctx.save_for_backward(*output, *tensors)


def _gradients(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, compute: ComputeGradients
) -> tuple[Tensor | None, ...]:
    """A gradient for each input of the forward pass, None for most."""
    output, lse, rounding, *tensors = ctx.saved_tensors  # those of `Arguments` come before its numbers
    arguments = Arguments._make([*tensors, ctx.scale, ctx.softcap, ctx.dropout_p])
    needed = ctx.needs_input_grad
    query, key, value, bias, sinks = (needed[place] for place in _DIFFERENTIABLE)
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    wanted = Wanted(query, key or value, bias, sinks)
    computed = compute(Returned(output, lse, rounding, grad_output, grad_lse), wanted, arguments)
    gradients: list[Tensor | None] = [None] * len(needed)
    for place, gradient in zip(_DIFFERENTIABLE, computed, strict=True):
        gradients[place] = gradient if needed[place] else None
    return tuple(gradients)


def _call_backward(returned: Returned, wanted: Wanted, arguments: Arguments) -> Iterable[Tensor]:
    """The registered operator, as `ComputeGradients`."""
    return torch.ops.attention_kernels.backward(*returned, *wanted, *arguments)


def _autograd(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, grad_rounding: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradient of the registered operator. Nothing depends on rounding."""
    return _gradients(ctx, grad_output, grad_lse, _call_backward)


class Attention(torch.autograd.Function):
    """The operator and its gradient, without what its registration does for compilers and modes at each call."""

    @staticmethod
    def forward(ctx: Any, *inputs_and_known_spans: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As `passes.forward`; the inputs are those of `_forward`."""
        *inputs, ctx.known_spans = inputs_and_known_spans
        *arguments, trains, num_splits = inputs
        results = passes.forward(Arguments(*arguments), trains, num_splits, ctx.known_spans)
        _setup_context(ctx, inputs, results)
        return results

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, grad_rounding: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """As `passes.backward`.

        The registered operator computes it where a compiler, a mode or another backward pass looks on: it serves the
        first two and refuses the last.
        """
        gradients = grad_output, grad_lse, grad_rounding
        looked_at = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        if looked_at or not are_real(*gradients) or any(map(_is_batched, gradients)):
            return _autograd(ctx, *gradients)
        return _gradients(ctx, grad_output, grad_lse, partial(passes.backward, known_spans=ctx.known_spans))


def _is_batched(gradient: Tensor | None) -> bool:
    """Whether it is a batch of gradients: `torch.autograd.grad(..., is_grads_batched=True)`, or `torch.func`."""
    functorch = torch._C._functorch
    return gradient is not None and (
        functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)
    )


def _refuse_double_backward(ctx: Any, *gradients: Tensor | None) -> NoReturn:
    """Refuse gradients of gradients.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "attention: gradients of gradients (double backward) are not served; "
        'use attn_implementation="eager" where a loss needs them'
    )


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("attention_kernels::forward", _forward_fake, lib=_library)
torch.library.register_fake("attention_kernels::backward", _backward_fake, lib=_library)
torch.library.register_autograd("attention_kernels::forward", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("attention_kernels::backward", _refuse_double_backward, lib=_library)
